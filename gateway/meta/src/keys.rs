//! Keyspaces of the state database. One database holds all shards of a disk; every key begins with its shard.
//!
//! ```text
//! key = shard (2, BE) | kind (1) | rest                       docs/formats/metadata.md has the table of kinds
//! ```
//! Object keys contain no NUL byte, so `key | 0x00 | suffix` keeps the byte order of whole keys, and everything of one
//! key is one range.

use crate::record::{AccountId, BucketId, UploadId, VersionSeq};
use crate::ChunkRef;
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId, ShardId};

/// Kinds of entries. The byte stands behind the shard in every key; never reuse one.
pub mod kind {
    /// Current object of each key; a key whose newest version is a delete marker has none.
    pub const OBJECT: u8 = b'O';
    /// Versions that are not the current object: older ones, and delete markers.
    pub const VERSION: u8 = b'V';
    /// Multipart uploads.
    pub const UPLOAD: u8 = b'U';
    /// Parts of uploads.
    pub const PART: u8 = b'P';
    /// Completed uploads, and their order.
    pub const COMPLETED: u8 = b'D';
    /// Extents the shard owns.
    pub const EXTENT: u8 = b'E';
    /// The repair queue.
    pub const MISSING: u8 = b'M';
    /// The garbage queue, and its index by extent.
    pub const GARBAGE: u8 = b'G';
    /// Fences of buckets: the highest attempt at a deletion seen, and whether its fence is up.
    pub const FENCE: u8 = b'F';
    /// Usage by bucket.
    pub const USAGE: u8 = b'S';
    /// Replies by request id, and their order.
    pub const REQUEST: u8 = b'R';
    /// Object locks (reserved).
    pub const LOCK: u8 = b'L';
    /// Root shard: buckets by name.
    pub const BUCKET: u8 = b'B';
    /// Root shard: names of buckets by owner.
    pub const BUCKET_OF: u8 = b'W';
    /// Root shard: the bucket id counter.
    pub const BUCKET_COUNTER: u8 = b'I';
    /// Root shard: the cluster map.
    pub const MAP: u8 = b'C';
    /// Root shard: what each of the last maps changed.
    pub const MAP_DIFF: u8 = b'X';
    /// Root shard: leases by task.
    pub const LEASE: u8 = b'T';
    /// The highest lease epoch seen of each task.
    pub const LEASE_SEEN: u8 = b'K';
    /// Rules of buckets, in every object shard.
    pub const RULE: u8 = b'Q';
    /// The repair queue of slots.
    pub const REPAIR_SLOT: u8 = b'J';
    /// Root shard: the cluster settings.
    pub const SETTINGS: u8 = b'Y';
    /// Root shard: accounts and keys (reserved).
    pub const ACCOUNT: u8 = b'A';
    /// The oldest cluster map by which payloads may have been placed.
    pub const OLDEST_MAP: u8 = b'N';
    /// The shard's feature level.
    pub const LEVEL: u8 = b'%';
    /// The shard's counters.
    pub const COUNTERS: u8 = b'#';
    /// How far the Raft log was applied, and the membership in force there.
    pub const APPLIED: u8 = b'!';
}

/// A half-open range of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// First key.
    pub from: Vec<u8>,
    /// First key behind the range.
    pub to: Vec<u8>,
}

/// Builds the keys of one shard.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    shard: [u8; 2],
}

/// The first key behind every key that begins with `prefix`. None when there is no such key (all bytes 0xFF).
pub fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

impl Keys {
    /// Keys of `shard`.
    pub fn new(shard: ShardId) -> Keys {
        Keys { shard: shard.0.to_be_bytes() }
    }

    fn key(&self, kind: u8, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = Vec::with_capacity(3 + parts.iter().map(|part| part.len()).sum::<usize>());
        key.extend_from_slice(&self.shard);
        key.push(kind);
        for part in parts {
            key.extend_from_slice(part);
        }
        key
    }

    /// Every key with that prefix. The shard 0xFFFF does not exist, so the end always does.
    fn range(&self, kind: u8, parts: &[&[u8]]) -> KeyRange {
        let from = self.key(kind, parts);
        let to = after_prefix(&from).unwrap_or_else(|| vec![u8::MAX; 3]);
        KeyRange { from, to }
    }

    /// Everything of the shard.
    pub fn shard_range(&self) -> KeyRange {
        let from = self.shard.to_vec();
        let to = after_prefix(&from).unwrap_or_else(|| vec![u8::MAX; 3]);
        KeyRange { from, to }
    }

    /// Everything of one kind.
    pub fn kind_range(&self, kind: u8) -> KeyRange {
        self.range(kind, &[])
    }

    /// Current object.
    pub fn object(&self, bucket: BucketId, key: &str) -> Vec<u8> {
        self.key(kind::OBJECT, &[&bucket.0.to_be_bytes(), key.as_bytes()])
    }

    /// Entries of a bucket in a kind whose keys begin with the bucket; `prefix` of the object key may be empty.
    pub fn bucket_range(&self, kind: u8, bucket: BucketId, prefix: &str) -> KeyRange {
        self.range(kind, &[&bucket.0.to_be_bytes(), prefix.as_bytes()])
    }

    /// Length of what stands before the object key.
    pub const BUCKET_PREFIX_BYTES: usize = 11;

    /// A version that is not the current object; newer ones first.
    pub fn version(&self, bucket: BucketId, key: &str, version: VersionSeq) -> Vec<u8> {
        self.key(kind::VERSION, &[&bucket.0.to_be_bytes(), key.as_bytes(), &[0], &(!version.0).to_be_bytes()])
    }

    /// All such versions of one key.
    pub fn versions_of(&self, bucket: BucketId, key: &str) -> KeyRange {
        self.range(kind::VERSION, &[&bucket.0.to_be_bytes(), key.as_bytes(), &[0]])
    }

    /// An upload.
    pub fn upload(&self, bucket: BucketId, key: &str, upload: UploadId) -> Vec<u8> {
        self.key(kind::UPLOAD, &[&bucket.0.to_be_bytes(), key.as_bytes(), &[0], &upload.0])
    }

    /// A part.
    pub fn part(&self, upload: UploadId, number: u16) -> Vec<u8> {
        self.key(kind::PART, &[&upload.0, &number.to_be_bytes()])
    }

    /// All parts of an upload.
    pub fn parts_of(&self, upload: UploadId) -> KeyRange {
        self.range(kind::PART, &[&upload.0])
    }

    /// A completed upload.
    pub fn completed(&self, bucket: BucketId, key: &str, upload: UploadId) -> Vec<u8> {
        self.key(kind::COMPLETED, &[&[0], &bucket.0.to_be_bytes(), key.as_bytes(), &[0], &upload.0])
    }

    /// Place of a completed upload in their order.
    pub fn completed_order(&self, sequence: u64) -> Vec<u8> {
        self.key(kind::COMPLETED, &[&[1], &sequence.to_be_bytes()])
    }

    /// An extent.
    pub fn extent(&self, group: PlacementGroupId, extent: ExtentId) -> Vec<u8> {
        self.key(kind::EXTENT, &[&group.0.to_be_bytes(), &extent.0])
    }

    /// All extents of a group.
    pub fn extents_of(&self, group: PlacementGroupId) -> KeyRange {
        self.range(kind::EXTENT, &[&group.0.to_be_bytes()])
    }

    /// A chunk in the repair queue.
    pub fn missing(&self, chunk: ChunkRef) -> Vec<u8> {
        self.key(kind::MISSING, &[&chunk.group.0.to_be_bytes(), &chunk.extent.0, &[chunk.index]])
    }

    /// All chunks of an extent in the repair queue.
    pub fn missing_of(&self, group: PlacementGroupId, extent: ExtentId) -> KeyRange {
        self.range(kind::MISSING, &[&group.0.to_be_bytes(), &extent.0])
    }

    /// An extent in the garbage queue.
    pub fn garbage(&self, queued_ms: u64, extent: ExtentId) -> Vec<u8> {
        self.key(kind::GARBAGE, &[&[0], &queued_ms.to_be_bytes(), &extent.0])
    }

    /// The garbage queue in its order.
    pub fn garbage_range(&self) -> KeyRange {
        self.range(kind::GARBAGE, &[&[0]])
    }

    /// Is this extent in the garbage queue?
    pub fn garbage_index(&self, extent: ExtentId) -> Vec<u8> {
        self.key(kind::GARBAGE, &[&[1], &extent.0])
    }

    /// The fence of a bucket.
    pub fn fence(&self, bucket: BucketId) -> Vec<u8> {
        self.key(kind::FENCE, &[&bucket.0.to_be_bytes()])
    }

    /// Usage of a bucket.
    pub fn usage(&self, bucket: BucketId) -> Vec<u8> {
        self.key(kind::USAGE, &[&bucket.0.to_be_bytes()])
    }

    /// The reply to a request.
    pub fn request(&self, request_id: &[u8; 16]) -> Vec<u8> {
        self.key(kind::REQUEST, &[&[0], request_id])
    }

    /// Place of a request in their order.
    pub fn request_order(&self, sequence: u64) -> Vec<u8> {
        self.key(kind::REQUEST, &[&[1], &sequence.to_be_bytes()])
    }

    /// A bucket by name.
    pub fn bucket(&self, name: &str) -> Vec<u8> {
        self.key(kind::BUCKET, &[name.as_bytes()])
    }

    /// A bucket by owner and name.
    pub fn bucket_of(&self, owner: AccountId, name: &str) -> Vec<u8> {
        self.key(kind::BUCKET_OF, &[&owner.0.to_be_bytes(), name.as_bytes()])
    }

    /// All buckets of an owner whose names begin so, or of all owners.
    pub fn buckets_of(&self, owner: Option<AccountId>, prefix: &str) -> KeyRange {
        match owner {
            Some(owner) => self.range(kind::BUCKET_OF, &[&owner.0.to_be_bytes(), prefix.as_bytes()]),
            None => self.range(kind::BUCKET, &[prefix.as_bytes()]),
        }
    }

    /// The rule of a bucket.
    pub fn rule(&self, bucket: BucketId) -> Vec<u8> {
        self.key(kind::RULE, &[&bucket.0.to_be_bytes()])
    }

    /// A slot in the repair queue.
    pub fn repair_slot(&self, group: PlacementGroupId, slot: u8) -> Vec<u8> {
        self.key(kind::REPAIR_SLOT, &[&group.0.to_be_bytes(), &[slot]])
    }

    /// What the map of this epoch changed.
    pub fn map_diff(&self, to: Epoch) -> Vec<u8> {
        self.key(kind::MAP_DIFF, &[&to.0.to_be_bytes()])
    }

    /// The lease of a task.
    pub fn lease(&self, task: &str) -> Vec<u8> {
        self.key(kind::LEASE, &[task.as_bytes()])
    }

    /// The highest lease epoch seen of a task.
    pub fn lease_seen(&self, task: &str) -> Vec<u8> {
        self.key(kind::LEASE_SEEN, &[task.as_bytes()])
    }

    /// A key of a kind that has one entry only: counters, applied, level, map, bucket counter, settings.
    pub fn single(&self, kind: u8) -> Vec<u8> {
        self.key(kind, &[])
    }
}

/// Takes `(object key, 16 bytes)` out of an upload's key.
pub fn split_upload_key(key: &[u8]) -> Option<(&str, UploadId)> {
    let rest = key.get(Keys::BUCKET_PREFIX_BYTES..)?;
    let split = rest.len().checked_sub(17)?;
    let (object_key, tail) = rest.split_at(split);
    let id: [u8; 16] = tail.get(1..)?.try_into().ok()?;
    Some((std::str::from_utf8(object_key).ok()?, UploadId(id)))
}

/// Takes the chunk out of a repair-queue key.
pub fn split_missing_key(key: &[u8]) -> Option<ChunkRef> {
    let rest = key.get(3..)?;
    let group = u32::from_be_bytes(rest.get(0..4)?.try_into().ok()?);
    let extent: [u8; 16] = rest.get(4..20)?.try_into().ok()?;
    Some(ChunkRef { group: PlacementGroupId(group), extent: ExtentId(extent), index: *rest.get(20)? })
}

/// Takes the slot out of a key of the repair queue of slots.
pub fn split_repair_slot_key(key: &[u8]) -> Option<(PlacementGroupId, u8)> {
    let rest = key.get(3..)?;
    let group = u32::from_be_bytes(rest.get(0..4)?.try_into().ok()?);
    Some((PlacementGroupId(group), *rest.get(4)?))
}

/// Takes the name out of the key of a bucket by owner.
pub fn split_bucket_of_key(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key.get(11..)?).ok()
}

/// Takes the time out of a garbage-queue key.
pub fn split_garbage_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(4..12)?.try_into().ok()?))
}
