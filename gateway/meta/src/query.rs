//! Queries that read a metadata shard, and their answers. A query is answered from a state that holds every command
//! acknowledged before it.

use crate::command::{ChunkRef, VersionPick};
use crate::record::{
    AccountId, BucketId, BucketRecord, ChecksumAlgorithm, ChecksumKind, ExtentRecord, ExtentRef, LeaseRecord,
    MissingRecord, ObjectRecord, PartRecord, RepairSlotRecord, UploadId, UploadRecord, Usage, VersionSeq,
};
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId};
use granary_placement::map::ClusterMap;
use granary_placement::map::MapDiff;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a listing goes on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ListFrom {
    /// The first key of the prefix.
    Start,
    /// After this key (or, with a delimiter, after this common prefix and everything under it).
    After(String),
}

/// A read of a shard; linearizable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// One object record. Answers Object, NoSuchKey or BucketFenced.
    GetObject {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// The newest version, or one by its number.
        version: VersionPick,
    },
    /// Current objects in byte order of their keys. Answers Listing or BucketFenced.
    ListObjects {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// Only keys with this prefix; may be empty.
        prefix: String,
        /// Keys that contain it after the prefix are folded into a common prefix; may be empty.
        delimiter: String,
        /// Where to go on.
        from: ListFrom,
        /// At most this many items, 1 to 1,001.
        limit: u32,
    },
    /// Uploads in byte order of key, then upload id. Answers Uploads or BucketFenced.
    ListUploads {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// Only keys with this prefix.
        prefix: String,
        /// After this key and upload; None for the first. An upload id of None: after all uploads of the key.
        after: Option<(String, Option<UploadId>)>,
        /// At most this many, 1 to 1,001.
        limit: u32,
    },
    /// An upload and its parts in order. Answers Parts or NoSuchUpload. A completed upload answers NoSuchUpload.
    ListParts {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// Which upload of the key: the id that began it.
        upload: UploadId,
        /// After this number.
        after: u16,
        /// At most this many, 1 to 10,000.
        limit: u32,
    },
    /// Was this upload completed, and how? Answers Completed or NoSuchUpload. For a repeated Complete.
    CompletedUpload {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// Which upload of the key: the id that began it.
        upload: UploadId,
    },
    /// Extents of one group, in order of their ids. Answers Extents. For repair and census.
    ExtentsOfGroup {
        /// Which group; None for all groups in order.
        group: Option<PlacementGroupId>,
        /// After this one.
        after: Option<(PlacementGroupId, ExtentId)>,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
    /// Which of these extents does the shard own? Answers Alive, in the same order. What garbage collection and sweeps
    /// ask.
    ExtentsAlive {
        /// At most 1,000.
        extents: Vec<(PlacementGroupId, ExtentId)>,
        /// Those on the garbage queue count too: they are known, and their chunks go in time.
        or_garbage: bool,
    },
    /// The repair queue, in order. Answers Missing.
    ListMissing {
        /// After this chunk.
        after: Option<ChunkRef>,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
    /// The garbage queue, oldest first. Answers Garbage.
    ListGarbage {
        /// Only what was queued at or before this time, Unix milliseconds.
        until_ms: u64,
        /// After this one: when it was queued, Unix milliseconds, and its extent.
        after: Option<(u64, ExtentId)>,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
    /// Usage of a bucket in this shard. Answers Usage.
    BucketUsage {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
    },
    /// Root shard: a bucket by name. Answers Bucket or NoSuchBucket.
    GetBucket {
        /// The bucket's name.
        name: String,
    },
    /// Root shard: buckets in order of name, those being deleted left out. Answers Buckets.
    ListBuckets {
        /// Only those of this account. Others' cost nothing.
        owner: Option<AccountId>,
        /// Only names with this prefix; may be empty.
        prefix: String,
        /// After this name; empty for the first.
        after: String,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
    /// Root shard: the cluster map, when it is newer than what the asker has. Answers MapUnchanged, MapDiffs when the
    /// differences are kept and smaller than the map, else Map, or NoMap.
    GetMap {
        /// Epoch of the asker's map; 0 asks for the whole map.
        newer_than: Epoch,
    },
    /// Root shard: the leases of all tasks, in order of their names. Answers Leases.
    ListLeases,
    /// Root shard: the cluster settings, when they are newer than what the asker has. Answers Settings or
    /// SettingsUnchanged.
    GetSettings {
        /// The epoch known to the asker; 0: none.
        newer_than: u64,
    },
    /// The repair queue of slots, in order of group and slot. Answers RepairSlots.
    ListRepairSlots {
        /// After this slot.
        after: Option<(PlacementGroupId, u8)>,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
    /// Any shard: its feature level. Answers FeatureLevel.
    FeatureLevel,
}

/// One item of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ListItem {
    /// A key, with what a listing says of its newest version.
    Object(ObjectSummary),
    /// Keys folded by the delimiter, with the delimiter at its end.
    Prefix(String),
}

impl ListItem {
    /// What it sorts by.
    pub fn sort_key(&self) -> &str {
        match self {
            ListItem::Object(object) => &object.key,
            ListItem::Prefix(prefix) => prefix,
        }
    }
}

/// What a listing says of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectSummary {
    /// The object's key: 1 to 1,024 bytes of UTF-8.
    pub key: String,
    /// Payload, in bytes.
    pub size_bytes: u64,
    /// Without quotes.
    pub etag: String,
    /// Unix milliseconds.
    pub modified_ms: u64,
    /// Empty means STANDARD.
    pub storage_class: String,
    /// The account that it belongs to.
    pub owner: AccountId,
    /// Algorithm and kind of its checksum.
    pub checksum: Option<(ChecksumAlgorithm, ChecksumKind)>,
}

/// What a query found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The version asked for, with its payload or where that lies.
    Object(Box<ObjectRecord>),
    /// Nothing there.
    NoSuchKey,
    /// See [`Reply::BucketFenced`](crate::Reply::BucketFenced).
    BucketFenced,
    /// No such upload.
    NoSuchUpload,
    /// No such bucket.
    NoSuchBucket,
    /// A page of a listing.
    Listing {
        /// In byte order of their sort keys.
        items: Vec<ListItem>,
        /// There is more after the last item.
        more: bool,
    },
    /// A page of uploads.
    Uploads {
        /// Key, id, record; in order.
        uploads: Vec<(String, UploadId, UploadRecord)>,
        /// There is more.
        more: bool,
    },
    /// An upload and a page of its parts.
    Parts {
        /// The upload as it was begun.
        upload: UploadRecord,
        /// In order. Their data is left out (empty Extents): a part may have many extents.
        parts: Vec<PartRecord>,
        /// There is more.
        more: bool,
    },
    /// A completed upload: the reply it got.
    Completed {
        /// Version given.
        version: VersionSeq,
        /// ETag stored.
        etag: String,
        /// The parts it was completed with.
        parts: Vec<(u16, String)>,
    },
    /// A page of extents.
    Extents {
        /// In order of (group, extent).
        extents: Vec<ExtentRecord>,
        /// There is more.
        more: bool,
    },
    /// In the order asked.
    Alive(Vec<bool>),
    /// A page of the repair queue: the chunk, its entry, the extent.
    Missing {
        /// In order.
        chunks: Vec<(ChunkRef, MissingRecord, ExtentRecord)>,
        /// There is more.
        more: bool,
    },
    /// A page of the garbage queue.
    Garbage {
        /// (time queued, the extent).
        extents: Vec<(u64, ExtentRef)>,
        /// There is more.
        more: bool,
    },
    /// What the bucket takes in this shard alone.
    Usage(Usage),
    /// The bucket of that name.
    Bucket(BucketRecord),
    /// A page of buckets.
    Buckets {
        /// In order of name; those being deleted are left out.
        buckets: Vec<BucketRecord>,
        /// There is more.
        more: bool,
    },
    /// The whole map in force.
    Map(Box<ClusterMap>),
    /// No map was installed yet.
    NoMap,
    /// The query does not belong to this shard, or is malformed.
    Refused(String),
    /// The leases, held and released ones, in order of their tasks.
    Leases(Vec<LeaseRecord>),
    /// The settings have the epoch that the asker named, or a lower one.
    SettingsUnchanged,
    /// The settings that are not at their defaults.
    Settings {
        /// How often settings were changed so far.
        epoch: u64,
        /// Values by name.
        values: BTreeMap<String, String>,
    },
    /// A page of the repair queue of slots.
    RepairSlots {
        /// In order.
        slots: Vec<(PlacementGroupId, u8, RepairSlotRecord)>,
        /// There is more.
        more: bool,
    },
    /// The map has the epoch that the asker named, or a lower one.
    MapUnchanged,
    /// What leads from the asker's map to the newest, one epoch after the other.
    MapDiffs(Vec<MapDiff>),
    /// What the shard's commands may write.
    FeatureLevel(u32),
}
