//! Values of the state database: the version of that type of record, then its body (docs/formats/metadata.md).

use crate::kv::StateError;
use crate::level::AWAY_LEVEL;
use crate::record::{
    AccountId, BucketRecord, BucketRule, Checksum, ExtentRecord, ExtentRef, LeaseRecord, MissingRecord, ObjectMeta,
    ObjectRecord, PartRecord, RepairSlotRecord, SettingsRecord, UploadRecord, Usage, VersionSeq,
};
use crate::{ObjectSummary, Reply};
use granary_placement::id::{ClusterId, Epoch};
use granary_placement::map::ClusterMap;
use granary_placement::map::MapDiff;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A type of value in the state database. Each has versions of its own: a new field is a new version of one record.
///
/// A record that has had other versions keeps a type for each and a function from each to the next, and decodes them
/// all:
///
/// ```
/// # use granary_meta::codec::{other_version, plain, Record};
/// # use granary_meta::kv::StateError;
/// # use serde::{Deserialize, Serialize};
/// #[derive(Serialize, Deserialize)]
/// struct NoteV1 { text: String }
/// #[derive(Serialize, Deserialize)]
/// struct Note { text: String, author: u64 }
///
/// impl Note {
///     fn migrate(from: NoteV1) -> Note { Note { text: from.text, author: 1 } }
/// }
///
/// impl Record for Note {
///     const VERSION: u8 = 2;
///     fn version_at(level: u32) -> u8 { if level < 2 { 1 } else { 2 } }
///     fn encode_as(&self, version: u8, out: Vec<u8>) -> Result<Vec<u8>, StateError> {
///         match version {
///             1 => plain::encode(&NoteV1 { text: self.text.clone() }, out),
///             _ => plain::encode(self, out),
///         }
///     }
///     fn decode_as(version: u8, body: &[u8]) -> Result<Note, StateError> {
///         match version {
///             1 => plain::decode(body).map(Note::migrate),
///             2 => plain::decode(body),
///             other => Err(other_version(other)),
///         }
///     }
/// }
/// ```
pub trait Record: Serialize + DeserializeOwned {
    /// The newest version, which this type is.
    const VERSION: u8;

    /// The version that commands write at a feature level.
    fn version_at(level: u32) -> u8;

    /// Appends the body of that version, one of those that `version_at` gives.
    ///
    /// # Errors
    /// [`StateError::Value`] when it cannot be encoded.
    fn encode_as(&self, version: u8, out: Vec<u8>) -> Result<Vec<u8>, StateError> {
        if version == Self::VERSION {
            plain::encode(self, out)
        } else {
            Err(other_version(version))
        }
    }

    /// The record in the body of that version, all of it.
    ///
    /// # Errors
    /// [`StateError::Value`]: a version unknown to this build, or not such a value.
    fn decode_as(version: u8, body: &[u8]) -> Result<Self, StateError> {
        if version == Self::VERSION {
            plain::decode(body)
        } else {
            Err(other_version(version))
        }
    }
}

/// Records that have had one version only.
macro_rules! first_version {
    ($($record:ty),+ $(,)?) => {
        $(impl Record for $record {
            const VERSION: u8 = 1;

            fn version_at(_level: u32) -> u8 {
                1
            }
        })+
    };
}

first_version!(
    ObjectRecord,
    UploadRecord,
    PartRecord,
    ExtentRecord,
    ExtentRef,
    Usage,
    BucketRecord,
    BucketRule,
    LeaseRecord,
    SettingsRecord,
    RepairSlotRecord,
    MissingRecord,
    Counters,
    KeptReply,
    Fence,
    CompletedUpload,
    QueuedAt,
    LastBucketId,
    LeaseSeen,
    OldestMap,
    FeatureLevel,
);

/// Maps and their differences. Version 2: a disk may be away, the last of its states. A body of version 1 is one of
/// version 2 in which no disk is.
macro_rules! away_since_version_2 {
    ($($record:ty),+) => {
        $(impl Record for $record {
            const VERSION: u8 = 2;

            fn version_at(level: u32) -> u8 {
                if level < AWAY_LEVEL {
                    1
                } else {
                    2
                }
            }

            fn encode_as(&self, version: u8, out: Vec<u8>) -> Result<Vec<u8>, StateError> {
                match version {
                    1 if self.has_away() => Err(StateError::Value("a disk that is away in version 1".to_owned())),
                    1 | 2 => plain::encode(self, out),
                    other => Err(other_version(other)),
                }
            }

            fn decode_as(version: u8, body: &[u8]) -> Result<Self, StateError> {
                match version {
                    1 | 2 => plain::decode(body),
                    other => Err(other_version(other)),
                }
            }
        })+
    };
}

away_since_version_2!(ClusterMap, MapDiff);

/// Bodies that are the postcard of one type.
pub mod plain {
    use crate::kv::StateError;
    use serde::de::DeserializeOwned;
    use serde::Serialize;

    /// Appends the body.
    ///
    /// # Errors
    /// [`StateError::Value`] when it cannot be encoded, which no value of ours does.
    pub fn encode<T: Serialize>(value: &T, out: Vec<u8>) -> Result<Vec<u8>, StateError> {
        postcard::to_extend(value, out).map_err(|error| StateError::Value(error.to_string()))
    }

    /// The value that the body begins with.
    ///
    /// # Errors
    /// [`StateError::Value`]: not such a value.
    pub fn decode_prefix<T: DeserializeOwned>(body: &[u8]) -> Result<T, StateError> {
        postcard::take_from_bytes(body).map(|(head, _)| head).map_err(|error| StateError::Value(error.to_string()))
    }

    /// The value in the body, all of it.
    ///
    /// # Errors
    /// [`StateError::Value`]: not such a value.
    pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, StateError> {
        match postcard::take_from_bytes(body) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(StateError::Value(format!("{} bytes behind a value", rest.len()))),
            Err(error) => Err(StateError::Value(error.to_string())),
        }
    }
}

/// The fields of a ClusterMap that stand first: who has the newest map is told so without decoding all of it. Must stay
/// a prefix of `ClusterMap`; a test holds it to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapHead {
    /// See ClusterMap.
    pub cluster_id: ClusterId,
    /// See ClusterMap.
    pub epoch: Epoch,
}

impl MapHead {
    /// The head of an encoded ClusterMap.
    ///
    /// # Errors
    /// As [`decode`].
    pub fn decode(bytes: &[u8]) -> Result<MapHead, StateError> {
        match split(bytes)? {
            (1 | 2, body) => plain::decode_prefix(body),
            (version, body) => {
                ClusterMap::decode_as(version, body).map(|map| MapHead { cluster_id: map.cluster_id, epoch: map.epoch })
            }
        }
    }
}

/// A value's version is none that this build knows.
pub fn other_version(version: u8) -> StateError {
    StateError::Value(format!("value version {version} is not known to this build"))
}

/// The value's bytes in the version of a feature level. What is replicated must be written by this one.
///
/// # Errors
/// [`StateError::Value`] when it cannot be encoded, which no value of ours does.
pub fn encode_at<T: Record>(level: u32, value: &T) -> Result<Vec<u8>, StateError> {
    let version = T::version_at(level);
    value.encode_as(version, vec![version])
}

/// The value's bytes in its newest version: for what one replica keeps for itself.
///
/// # Errors
/// [`StateError::Value`] when it cannot be encoded, which no value of ours does.
pub fn encode<T: Record>(value: &T) -> Result<Vec<u8>, StateError> {
    value.encode_as(T::VERSION, vec![T::VERSION])
}

fn split(bytes: &[u8]) -> Result<(u8, &[u8]), StateError> {
    match bytes.split_first() {
        Some((version, body)) => Ok((*version, body)),
        None => Err(StateError::Value("empty value".to_owned())),
    }
}

/// The value in those bytes, all of them, of any version that the record ever had.
///
/// # Errors
/// [`StateError::Value`]: a version unknown to this build, or not such a value.
pub fn decode<T: Record>(bytes: &[u8]) -> Result<T, StateError> {
    let (version, body) = split(bytes)?;
    T::decode_as(version, body)
}

/// When an entry was put into a queue, Unix milliseconds by the command's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedAt(pub u64);

/// The last bucket id given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBucketId(pub u64);

/// The highest lease epoch seen of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseSeen(pub u64);

/// The oldest cluster map by which payloads that a shard takes may have been placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OldestMap(pub Epoch);

/// The feature level of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureLevel(pub u32);

/// What a shard counts. One value per shard; every number only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Versions handed out; the last one given.
    pub versions: u64,
    /// Commands applied.
    pub commands: u64,
    /// First place still kept in the order of completed uploads.
    pub completed_first: u64,
    /// Next place there.
    pub completed_next: u64,
    /// First place still kept in the order of requests.
    pub kept_first: u64,
    /// Next place there.
    pub kept_next: u64,
    /// The shard's clock, Unix milliseconds: the highest stamp of a command.
    pub clock_ms: u64,
}

/// A reply kept for a repeated request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptReply {
    /// Its place in the window.
    pub sequence: u64,
    /// The reply.
    pub reply: Reply,
}

/// What a shard knows of the deletions of a bucket. Kept when the fence is down, so that late commands of an attempt
/// that is over find out; bucket ids are never used again, so there is at most one per bucket that somebody tried to
/// delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// When this was last changed, by the command's time, Unix milliseconds.
    pub at_ms: u64,
    /// The highest attempt seen. A fence that is up is this attempt's.
    pub attempt: u64,
    /// The fence is up: the bucket takes nothing.
    pub up: bool,
}

/// A completed upload, kept for a repeated CompleteUpload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletedUpload {
    /// By the command's time, Unix milliseconds.
    pub at_ms: u64,
    /// Version given.
    pub version: VersionSeq,
    /// ETag stored.
    pub etag: String,
    /// The parts it was completed with.
    pub parts: Vec<(u16, String)>,
}

/// The fields of an ObjectRecord that stand before its payload: a listing reads these and leaves extents and inline
/// bytes undecoded. Must stay a prefix of `ObjectRecord`; a test below holds it to that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectHead {
    /// See ObjectRecord.
    pub version: VersionSeq,
    /// See ObjectRecord.
    pub null_version: bool,
    /// See ObjectRecord.
    pub delete_marker: bool,
    /// See ObjectRecord.
    pub modified_ms: u64,
    /// See ObjectRecord.
    pub size_bytes: u64,
    /// See ObjectRecord.
    pub etag: String,
    /// See ObjectRecord.
    pub part_sizes: Vec<u64>,
    /// See ObjectRecord.
    pub checksum: Option<Checksum>,
    /// See ObjectRecord.
    pub part_checksums: Vec<Vec<u8>>,
    /// See ObjectRecord.
    pub meta: ObjectMeta,
    /// See ObjectRecord.
    pub owner: AccountId,
}

impl ObjectHead {
    /// The head of an encoded ObjectRecord.
    ///
    /// # Errors
    /// As [`decode`].
    pub fn decode(bytes: &[u8]) -> Result<ObjectHead, StateError> {
        match split(bytes)? {
            (ObjectRecord::VERSION, body) => plain::decode_prefix(body),
            (version, body) => ObjectRecord::decode_as(version, body).map(ObjectHead::from),
        }
    }

    /// What a listing says of it.
    pub fn summary(self, key: String) -> ObjectSummary {
        ObjectSummary {
            key,
            size_bytes: self.size_bytes,
            etag: self.etag,
            modified_ms: self.modified_ms,
            storage_class: self.meta.storage_class,
            owner: self.owner,
            checksum: self.checksum.map(|checksum| (checksum.algorithm, checksum.kind)),
        }
    }
}

impl From<ObjectRecord> for ObjectHead {
    fn from(record: ObjectRecord) -> ObjectHead {
        ObjectHead {
            version: record.version,
            null_version: record.null_version,
            delete_marker: record.delete_marker,
            modified_ms: record.modified_ms,
            size_bytes: record.size_bytes,
            etag: record.etag,
            part_sizes: record.part_sizes,
            checksum: record.checksum,
            part_checksums: record.part_checksums,
            meta: record.meta,
            owner: record.owner,
        }
    }
}
