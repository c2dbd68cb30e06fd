//! What the S3 verbs need from the rest of the gateway, and nothing else: metadata, staged payloads, reads.
//!
//! The seam keeps the verbs testable: `s3/memory.rs` (tests) is a whole store in a few maps; `s3/live.rs` is the cluster.

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use granary_meta::record::{AccountId, BucketId, BucketRecord, ObjectData, UploadId, UploadRecord};
use granary_meta::{Answer, ChunkRef, Command, ListFrom, ListItem, Query, Reply};
use std::ops::Range;

pub use crate::shards::buckets::{Created, Removed};

/// Why a shard gave no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BackendError {
    /// It did not happen and can be tried again.
    #[error("the shard is not available: {0}")]
    Unavailable(String),
    /// A command was sent and its answer was lost: it may have been applied, or may be later.
    #[error("the outcome is not known: {0}")]
    OutcomeUnknown(String),
    /// It cannot be done, now or later: a defect on our side.
    #[error("the shard refused: {0}")]
    Refused(String),
}

/// The body broke off, or broke a promise its headers made. The reason is kept by whoever made the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the body is not what its headers promised")]
pub struct BrokenBody;

/// Why a payload was not staged. Nothing of it stays.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StageError {
    /// The stream ended in [`BrokenBody`].
    #[error("the body is not what its headers promised")]
    Body,
    /// Too few disks take writes.
    #[error("the payload cannot be stored now: {0}")]
    Unavailable(String),
    /// No space.
    #[error("no space left: {0}")]
    Full(String),
    /// Anything else.
    #[error("the payload was not stored: {0}")]
    Internal(String),
}

/// Why a payload cannot be read on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// Fewer good chunks than needed right now.
    #[error("the payload cannot be read now: {0}")]
    Unavailable(String),
    /// Anything else.
    #[error("the payload cannot be read: {0}")]
    Internal(String),
}

/// A payload that is durable and belongs to nobody yet. Dropped without a word, it is deleted.
pub trait StagedPayload: Send {
    /// What the record is to say.
    fn data(&self) -> ObjectData;
    /// Chunks that did not reach their disk.
    fn missing(&self) -> Vec<ChunkRef>;
    /// The commit happened: the payload belongs to its record.
    fn committed(self: Box<Self>);
    /// Nobody knows whether the commit happened: leave the payload to garbage collection, which asks the shard.
    fn unknown(self: Box<Self>);
}

/// Whose payload it is and how it is to be stored.
#[derive(Debug, Clone, Copy)]
pub struct StageSpec<'a> {
    /// The scheme a storage class names; None for the default.
    pub scheme: Option<&'a str>,
    /// The bucket that will own it.
    pub bucket: BucketId,
    /// The key that will own it.
    pub key: &'a str,
    /// Exact length, in bytes.
    pub len_bytes: u64,
    /// May it ride in the record when it is small? Never for parts: a record of many parts would outgrow its shard.
    pub inline: bool,
}

/// A page of a merged listing: items in byte order, and whether there is more.
pub type ListingPage = (Vec<ListItem>, bool);

/// A page of a merged listing of uploads: in byte order of key, then id, and whether there is more.
pub type UploadsPage = (Vec<(String, UploadId, UploadRecord)>, bool);

/// Where a listing of uploads goes on: after this upload of the key, or after all of them.
pub type UploadsAfter = Option<(String, Option<UploadId>)>;

/// The rest of the gateway.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Does a storage class of that name exist?
    fn has_scheme(&self, name: &str) -> bool;
    /// A bucket by name; may be remembered, because a shard refuses buckets that are gone.
    async fn bucket(&self, name: &str) -> Result<Option<BucketRecord>, BackendError>;
    /// A bucket by name, as it is now.
    async fn bucket_now(&self, name: &str) -> Result<Option<BucketRecord>, BackendError>;
    /// Makes a bucket.
    async fn create_bucket(&self, name: &str, owner: AccountId) -> Result<Created, BackendError>;
    /// Deletes a bucket if nothing is in it.
    async fn delete_bucket(&self, name: &str) -> Result<Removed, BackendError>;
    /// Buckets in order of name, after one; `limit` is 1 to 1,000.
    async fn list_buckets(&self, after: &str, limit: u32) -> Result<(Vec<BucketRecord>, bool), BackendError>;
    /// A command to the shard that owns (bucket, key).
    async fn command_for(&self, bucket: BucketId, key: &str, command: Command) -> Result<Reply, BackendError>;
    /// A query to the shard that owns (bucket, key).
    async fn query_for(&self, bucket: BucketId, key: &str, query: Query) -> Result<Answer, BackendError>;
    /// A page of current objects, merged over all shards; `limit` is 1 to 1,000. None: the bucket is fenced.
    async fn list_objects(
        &self,
        bucket: BucketId,
        prefix: &str,
        delimiter: &str,
        from: ListFrom,
        limit: u32,
    ) -> Result<Option<ListingPage>, BackendError>;
    /// A page of uploads in progress, merged over all shards; `limit` is 1 to 1,000. None: the bucket is fenced.
    async fn list_uploads(
        &self,
        bucket: BucketId,
        prefix: &str,
        after: UploadsAfter,
        limit: u32,
    ) -> Result<Option<UploadsPage>, BackendError>;
    /// Streams a payload to the disks (or into bytes that ride in the record). Polls the stream to its end, so that an error at the
    /// very end is seen too. Durable when it returns.
    async fn stage(
        &self,
        spec: StageSpec<'_>,
        body: BoxStream<'_, Result<Bytes, BrokenBody>>,
    ) -> Result<Box<dyn StagedPayload>, StageError>;
    /// Reads a range of a payload: exactly its bytes, verified, or an error.
    fn read(&self, data: &ObjectData, range: Range<u64>) -> BoxStream<'static, Result<Bytes, ReadError>>;
}
