//! What metadata shards store. Values are encoded with a leading version byte (docs/formats/metadata.md).

use bytes::Bytes;
use granary_placement::extent::ExtentLayout;
use granary_placement::id::{ExtentId, PlacementGroupId};
use granary_placement::scheme::CodecId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// A bucket's number, unique for ever: a bucket made again under an old name is another bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BucketId(pub u64);

impl fmt::Display for BucketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An account's number. Root is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AccountId(pub u64);

impl AccountId {
    /// The account of the root credentials.
    pub const ROOT: AccountId = AccountId(1);
}

/// One multipart upload: 128 random bits from the gateway that began it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UploadId(pub [u8; 16]);

/// One version of an object. The number is the shard's own counter, so versions order as the Raft log does, never by a
/// clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VersionSeq(pub u64);

/// Where one extent of an object lies and how it is coded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentRef {
    /// The extent's random id, the same on every disk.
    pub extent: ExtentId,
    /// Its placement group.
    pub group: PlacementGroupId,
    /// The erasure code that made its coding chunks.
    pub codec: CodecId,
    /// Data chunks.
    pub k: u8,
    /// Coding chunks.
    pub m: u8,
    /// Unit of a full stripe, in bytes.
    pub unit_bytes: u32,
    /// Payload, in bytes; at least 1.
    pub len_bytes: u64,
    /// Generation of its chunks.
    pub generation: u32,
    /// `slots[i]` is the slot of the group whose disk holds chunk index i. 0, 1, 2 ... for an extent as wide as its
    /// group; fewer slots for one that was written narrower while disks were down.
    pub slots: Vec<u8>,
}

impl ExtentRef {
    /// Its geometry.
    pub fn layout(&self) -> ExtentLayout {
        ExtentLayout { k: self.k, unit_bytes: self.unit_bytes.into(), len_bytes: self.len_bytes }
    }
}

/// An object's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectData {
    /// Small enough to ride in the record.
    Inline {
        /// The whole payload.
        bytes: Bytes,
        /// CRC-32 of it, made by the gateway before the commit and checked before a byte leaves.
        crc32: u32,
    },
    /// In chunks, in this order.
    Extents(Vec<ExtentRef>),
}

impl ObjectData {
    /// The extents; none when inline.
    pub fn extents(&self) -> &[ExtentRef] {
        match self {
            ObjectData::Inline { .. } => &[],
            ObjectData::Extents(extents) => extents,
        }
    }
}

/// The checksum algorithms of S3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ChecksumAlgorithm {
    /// CRC-32 (ISO-HDLC).
    Crc32,
    /// CRC-32C (iSCSI).
    Crc32c,
    /// CRC-64/NVME.
    Crc64Nvme,
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
}

/// Whether a multipart checksum covers the bytes or the parts' checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ChecksumKind {
    /// Over all bytes of the object.
    FullObject,
    /// Over the concatenated checksums of the parts.
    Composite,
}

/// A verified checksum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    /// How it was computed.
    pub algorithm: ChecksumAlgorithm,
    /// What it covers.
    pub kind: ChecksumKind,
    /// Raw bytes, not base64.
    pub value: Vec<u8>,
}

/// What a client said about an object beside its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ObjectMeta {
    /// Standard headers to give back, lower-case names: content-type, cache-control, content-disposition,
    /// content-encoding, content-language, expires, x-amz-website-redirect-location.
    pub headers: Vec<(String, String)>,
    /// x-amz-meta-*, lower-case names without the prefix, values as received.
    pub user: Vec<(String, String)>,
    /// Storage class as asked for; empty means STANDARD.
    pub storage_class: String,
    /// x-amz-tagging, as pairs.
    pub tags: Vec<(String, String)>,
}

/// One version of an object, or a delete marker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRecord {
    /// Set when applied; whatever a command carries is ignored.
    pub version: VersionSeq,
    /// Written while versioning was off or suspended: addressed as version `null`.
    pub null_version: bool,
    /// A delete marker has no data.
    pub delete_marker: bool,
    /// When it was written, Unix milliseconds by the gateway's clock; shown as Last-Modified.
    pub modified_ms: u64,
    /// Payload, in bytes.
    pub size_bytes: u64,
    /// Without quotes: hex MD5, or hex MD5 of the parts' MD5s and `-N`.
    pub etag: String,
    /// Sizes of the parts it was completed from, in order; empty for a plain PUT.
    pub part_sizes: Vec<u64>,
    /// At most one verified checksum.
    pub checksum: Option<Checksum>,
    /// Checksums of the parts, in order, where the upload had them; empty otherwise.
    pub part_checksums: Vec<Vec<u8>>,
    /// What the client said about it.
    pub meta: ObjectMeta,
    /// Who wrote it.
    pub owner: AccountId,
    /// The payload itself, or the extents that it lies in.
    pub data: ObjectData,
}

/// A multipart upload in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadRecord {
    /// When it began, Unix milliseconds.
    pub initiated_ms: u64,
    /// What the object will carry.
    pub meta: ObjectMeta,
    /// The checksum algorithm and kind named at the start.
    pub checksum: Option<(ChecksumAlgorithm, ChecksumKind)>,
    /// Who began it.
    pub owner: AccountId,
}

/// One uploaded part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRecord {
    /// 1 to 10,000.
    pub number: u16,
    /// Payload, in bytes.
    pub size_bytes: u64,
    /// Hex MD5.
    pub etag: String,
    /// When it came, Unix milliseconds.
    pub modified_ms: u64,
    /// Verified checksum of the part.
    pub checksum: Option<Checksum>,
    /// The payload itself, or the extents that it lies in.
    pub data: ObjectData,
}

/// Versioning of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Versioning {
    /// Was never on: every write replaces the null version, and a delete removes it.
    #[default]
    Off,
    /// Every write adds a version, and a delete a marker.
    Enabled,
    /// Was on: every write replaces the null version, and a delete replaces it by a marker; other versions stay.
    Suspended,
}

impl Versioning {
    /// Do writes replace the null version?
    pub fn writes_null(self) -> bool {
        self != Versioning::Enabled
    }
}

/// What a shard must know of a bucket's configuration to decide a write. It is made in the root shard, and every shard
/// holds a copy; epochs tell which is newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BucketRule {
    /// Rises by one with each change; 0: as the bucket was made, which shards need not be told.
    pub epoch: u64,
    /// Whether a PUT keeps the versions before.
    pub versioning: Versioning,
    /// Versions are locked.
    pub lock: bool,
    /// Epoch of the bucket's policy.
    pub policy_epoch: u64,
}

/// A bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketRecord {
    /// Its number; set when applied.
    pub id: BucketId,
    /// Its name, which no other bucket has.
    pub name: String,
    /// When it was made, Unix milliseconds.
    pub created_ms: u64,
    /// Whose it is.
    pub owner: AccountId,
    /// Being deleted: takes no uploads, not listed; finished or taken back by whoever began it, or by the next
    /// DeleteBucket.
    pub deleting: bool,
    /// The last attempt to delete it; 0 before the first. Only grows: of two deletions at once the later attempt is the
    /// one that counts, in the root shard and in every fence.
    pub delete_attempt: u64,
    /// What writes to it have to go by.
    pub rule: BucketRule,
    /// The rule was begun and not ended: shards may not have it yet. Whoever meets this sends it to them, and ends it.
    pub rule_pending: bool,
}

/// What a shard knows of an extent it owns: enough to find, rebuild and report it without the object record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentRecord {
    /// Where and how.
    pub extent: ExtentRef,
    /// Whose it is: bucket and key of the object or upload.
    pub bucket: BucketId,
    /// The key, for reports.
    pub key: String,
}

/// What lies in a bucket, or a shard's part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Current objects, delete markers not counted.
    pub objects: u64,
    /// All versions, delete markers too.
    pub versions: u64,
    /// Payload of all versions, in bytes.
    pub bytes: u64,
    /// Multipart uploads in progress.
    pub uploads: u64,
    /// Payload of their parts, in bytes.
    pub upload_bytes: u64,
}

/// The lease of a background task: who does it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Name of the task.
    pub task: String,
    /// Rises by one each time it is taken; never falls.
    pub epoch: u64,
    /// How often the holder renewed it; 0 when it was just taken.
    pub renewals: u64,
    /// Who holds it; None after a release.
    pub holder: Option<[u8; 16]>,
    /// Where the holder can be reached; empty after a release.
    pub address: String,
    /// The time to live that the holder reckons with, in milliseconds: nobody takes the lease over earlier.
    pub ttl_ms: u64,
    /// When it was taken, Unix milliseconds by the holder's clock. For status pages; nothing is decided by it.
    pub taken_ms: u64,
    /// When it was last taken, renewed or released, likewise.
    pub renewed_ms: u64,
    /// What the holder said at its last renewal.
    pub progress: Bytes,
}

/// The cluster settings that are not at their defaults.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SettingsRecord {
    /// Rises by one with each change; 0: nothing was ever set.
    pub epoch: u64,
    /// Values by name.
    pub values: BTreeMap<String, String>,
}

/// A chunk in the repair queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingRecord {
    /// When it was first queued, Unix milliseconds.
    pub queued_ms: u64,
    /// Another one each time it is reported; never used twice in a shard, so that word of a repair that began before a
    /// report is known as such.
    pub generation: u64,
}

/// A slot of a placement group in the repair queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairSlotRecord {
    /// When it was first queued, Unix milliseconds.
    pub queued_ms: u64,
    /// Another one each time it is queued; never used twice in a shard, so that word of an older repair is known as
    /// such.
    pub generation: u64,
    /// The last extent that is done; None at the beginning.
    pub cursor: Option<ExtentId>,
}
