//! What all verbs share: the backend, who we are, and a small cache of what never changes.

use super::access::AccessKey;
use super::backend::Backend;
use super::error;
use crate::metrics::Metrics;
use granary_meta::record::{AccountId, BucketRecord, UploadId, UploadRecord};
use granary_meta::{Answer, Query};
use s3s::{s3_error, S3Result};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Most uploads remembered; a full cache is emptied.
const CACHE_ENTRIES: usize = 10_000;

/// Settings of the S3 front end.
#[derive(Debug, Clone)]
pub struct S3Settings {
    /// The region clients sign for.
    pub region: String,
    /// Domain under which buckets are host names; None for path style alone.
    pub base_domain: Option<String>,
    /// Access keys by id. Empty ones are refused at start.
    pub keys: HashMap<String, AccessKey>,
    /// Whose buckets and objects these are.
    pub owner: AccountId,
    /// Connections served at the same time; on more, requests are answered with 503.
    pub max_connections: usize,
    /// Requests in work at the same time; more are answered with 503.
    pub max_requests: usize,
    /// Longest wait for the rest of a request's headers once its first byte came.
    pub header_timeout: Duration,
    /// Longest wait for the next byte of a body, in either direction.
    pub body_idle_timeout: Duration,
    /// Longest silence of a kept-alive connection between requests.
    pub keep_alive: Duration,
    /// Where requests are counted; None: nowhere.
    pub metrics: Option<Metrics>,
}

impl S3Settings {
    /// Settings with one root key, for a region; the rest by default.
    pub fn new(region: &str, access_key: &str, secret: &str) -> S3Settings {
        let key = AccessKey { secret: secret.to_owned(), account: AccountId::ROOT };
        S3Settings {
            region: region.to_owned(),
            base_domain: None,
            keys: HashMap::from([(access_key.to_owned(), key)]),
            owner: AccountId::ROOT,
            max_connections: 4096,
            max_requests: 1024,
            header_timeout: Duration::from_secs(30),
            body_idle_timeout: Duration::from_secs(60),
            keep_alive: Duration::from_secs(120),
            metrics: None,
        }
    }
}

/// Shared by all verbs.
pub struct S3Context {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) settings: S3Settings,
    pub(super) owner: AccountId,
    /// What an upload began with never changes; that it still exists is decided by its shard.
    uploads: RwLock<HashMap<UploadId, Arc<UploadRecord>>>,
}

impl S3Context {
    /// Joins a backend and settings.
    pub fn new(backend: Arc<dyn Backend>, settings: S3Settings) -> Arc<S3Context> {
        let owner = settings.owner;
        Arc::new(S3Context { backend, settings, owner, uploads: RwLock::default() })
    }

    /// A bucket by name; may be remembered.
    ///
    /// # Errors
    /// NoSuchBucket, 503.
    pub(super) async fn bucket(&self, name: &str) -> S3Result<BucketRecord> {
        self.backend.bucket(name).await.map_err(error::backend)?.ok_or_else(|| s3_error!(NoSuchBucket))
    }

    /// A bucket by name, as it is now.
    ///
    /// # Errors
    /// NoSuchBucket, 503.
    pub(super) async fn bucket_now(&self, name: &str) -> S3Result<BucketRecord> {
        self.backend.bucket_now(name).await.map_err(error::backend)?.ok_or_else(|| s3_error!(NoSuchBucket))
    }

    /// Asks the shard of a key; while the bucket is fenced, its name is looked up again.
    ///
    /// # Errors
    /// NoSuchBucket, 503. Everything else is an answer.
    pub(super) async fn ask(
        &self,
        name: &str,
        key: &str,
        query: impl Fn(&BucketRecord) -> Query,
    ) -> S3Result<(BucketRecord, Answer)> {
        let mut bucket = self.bucket(name).await?;
        let mut tries = 0;
        loop {
            let answer = self.backend.query_for(bucket.id, key, query(&bucket)).await.map_err(error::backend)?;
            if !matches!(answer, Answer::BucketFenced) {
                return Ok((bucket, answer));
            }
            tries += 1;
            bucket = self.after_fence(bucket, tries).await?;
        }
    }

    /// The bucket to read from after a shard called it fenced: the same after a wait, or the one that has its name now.
    ///
    /// # Errors
    /// NoSuchBucket when it is gone, 503 when the fence stays.
    pub(super) async fn after_fence(&self, bucket: BucketRecord, tries: u32) -> S3Result<BucketRecord> {
        let now = self.bucket_now(&bucket.name).await?;
        if now.id == bucket.id {
            super::put::fenced(self, &bucket, tries).await?;
        } else if tries > 5 {
            return Err(error::unavailable("The bucket is being made and deleted."));
        }
        Ok(now)
    }

    /// What an upload began with.
    ///
    /// # Errors
    /// NoSuchUpload, NoSuchBucket, 503.
    pub(super) async fn upload(
        &self,
        bucket: &str,
        key: &str,
        upload: UploadId,
    ) -> S3Result<(BucketRecord, Arc<UploadRecord>)> {
        let cached = self.uploads.read().unwrap_or_else(PoisonError::into_inner).get(&upload).cloned();
        if let Some(record) = cached {
            return Ok((self.bucket(bucket).await?, record));
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
                let mut cache = self.uploads.write().unwrap_or_else(PoisonError::into_inner);
                if cache.len() >= CACHE_ENTRIES {
                    cache.clear();
                }
                cache.insert(upload, record.clone());
                Ok((bucket, record))
            }
            (_, other) => Err(error::answer(other)),
        }
    }

    /// Takes an upload out of the cache.
    pub(super) fn forget_upload(&self, upload: UploadId) {
        self.uploads.write().unwrap_or_else(PoisonError::into_inner).remove(&upload);
    }
}
