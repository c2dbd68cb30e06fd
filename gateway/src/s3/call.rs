//! One request inside its verb: who makes it, and the way to buckets and shards on its behalf.

use super::context::S3Context;
use super::error;
use super::request::RequestInfo;
use crate::shards::ShardError;
use granary_meta::record::{AccountId, BucketRecord, UploadId, UploadRecord};
use granary_meta::{Answer, Command, Query, Reply};
use http::Extensions;
use s3s::{s3_error, S3Result};
use std::sync::Arc;
use std::time::Duration;

/// How often a request is sent again because its bucket is fenced, or has another rule. A fence is taken back when the
/// bucket turns out not to be empty.
pub(super) const BUCKET_RETRIES: u32 = 5;
/// Pause before a fenced bucket is asked again.
const FENCE_WAIT: Duration = Duration::from_millis(200);

/// Who signed a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    /// The account that the access key acts for. It owns what the request creates.
    pub(super) account: AccountId,
    /// Id of the access key.
    pub(super) access_key_id: String,
    /// The x-amz-request-id of the request.
    pub(super) request_id: String,
}

/// A request in the hands of its verb. Cheap to clone.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) cx: Arc<S3Context>,
    pub(super) caller: Arc<Caller>,
}

impl Call {
    /// Begins the verb of the request that carries these extensions.
    ///
    /// # Errors
    /// InternalError for a request that passed no access check.
    pub(super) fn begin(cx: &Arc<S3Context>, extensions: &Extensions) -> S3Result<Call> {
        match RequestInfo::of(extensions).and_then(|info| info.enter()) {
            Some(caller) => Ok(Call { cx: cx.clone(), caller }),
            None => Err(error::internal("a verb was called for a request that passed no access check")),
        }
    }

    /// A bucket by name. It may come from a cache: the shards of a bucket that is gone refuse its requests.
    ///
    /// # Errors
    /// NoSuchBucket, AccessDenied, 503.
    pub(super) async fn bucket(&self, name: &str) -> S3Result<BucketRecord> {
        match self.cx.shards.get_bucket(name).await.map_err(error::query)? {
            // Since it was cached it may have been deleted, and made again by the caller.
            Some(found) if found.owner != self.caller.account => {
                self.allowed(self.cx.shards.recent_bucket(name).await.map_err(error::query)?)
            }
            found => self.allowed(found),
        }
    }

    /// A bucket by name, as the root shard has it now.
    ///
    /// # Errors
    /// NoSuchBucket, AccessDenied, 503.
    pub(super) async fn bucket_now(&self, name: &str) -> S3Result<BucketRecord> {
        let found = self.cx.shards.fresh_bucket(name).await.map_err(error::query)?;
        self.allowed(found)
    }

    /// An account uses its own buckets and no others.
    fn allowed(&self, found: Option<BucketRecord>) -> S3Result<BucketRecord> {
        let bucket = found.ok_or_else(|| s3_error!(NoSuchBucket))?;
        if bucket.owner != self.caller.account {
            return Err(error::other_owner());
        }
        Ok(bucket)
    }

    /// Sends a command to the shard that owns (bucket, key), on behalf of the caller.
    ///
    /// # Errors
    /// As [`crate::shards::Shards::command_for`].
    pub(super) async fn command(
        &self,
        bucket: &BucketRecord,
        key: &str,
        command: Command,
    ) -> Result<Reply, ShardError> {
        self.cx.shards.command_for(self.caller.account, bucket.id, key, command).await
    }

    /// Asks the shard of a key; while the bucket is fenced, its name is looked up again.
    ///
    /// # Errors
    /// NoSuchBucket, AccessDenied, 503. Everything else is an answer.
    pub(super) async fn ask(
        &self,
        name: &str,
        key: &str,
        query: impl Fn(&BucketRecord) -> Query,
    ) -> S3Result<(BucketRecord, Answer)> {
        let mut bucket = self.bucket(name).await?;
        let mut tries = 0;
        loop {
            let answer = self.cx.shards.query_for(bucket.id, key, query(&bucket)).await.map_err(error::query)?;
            if !matches!(answer, Answer::BucketFenced) {
                return Ok((bucket, answer));
            }
            tries += 1;
            bucket = self.after_fence(&bucket, tries).await?;
        }
    }

    /// The bucket to go on with after a shard called it fenced: the same one after a pause, or the one that has its
    /// name now.
    ///
    /// # Errors
    /// NoSuchBucket when it is gone, AccessDenied, 503 when the fence stays.
    pub(super) async fn after_fence(&self, bucket: &BucketRecord, tries: u32) -> S3Result<BucketRecord> {
        let now = self.bucket_now(&bucket.name).await?;
        if tries >= BUCKET_RETRIES {
            return Err(error::unavailable("The bucket is being deleted."));
        }
        if now.id == bucket.id {
            tokio::time::sleep(FENCE_WAIT).await;
        }
        Ok(now)
    }

    /// The bucket and the record of an upload. What an upload was created with never changes, so the record may come
    /// from a cache; whether the upload still exists is decided by its shard.
    ///
    /// # Errors
    /// NoSuchUpload, NoSuchBucket, AccessDenied, 503.
    pub(super) async fn upload(
        &self,
        bucket: &str,
        key: &str,
        upload: UploadId,
    ) -> S3Result<(BucketRecord, Arc<UploadRecord>)> {
        let found = self.bucket(bucket).await?;
        if let Some(record) = self.cx.uploads.get(&(found.id, key.to_owned(), upload)) {
            return Ok((found, record));
        }
        let query = |bucket: &BucketRecord| Query::ListParts {
            bucket: bucket.id,
            key: key.to_owned(),
            upload,
            after: 0,
            limit: 1,
        };
        match self.ask(bucket, key, query).await? {
            (bucket, Answer::Parts { upload: record, .. }) => {
                let record = Arc::new(record);
                self.cx.uploads.insert((bucket.id, key.to_owned(), upload), record.clone());
                Ok((bucket, record))
            }
            (_, other) => Err(error::answer(other)),
        }
    }

    /// Takes an upload out of the cache.
    pub(super) fn forget_upload(&self, bucket: &BucketRecord, key: &str, upload: UploadId) {
        self.cx.uploads.remove(&(bucket.id, key.to_owned(), upload));
    }
}
