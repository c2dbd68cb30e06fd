//! The backend that is the cluster: metadata shards and the object store.

use super::backend::{
    Backend, BackendError, BrokenBody, Created, ListingPage, ReadError, Removed, StageError, StageSpec, StagedPayload,
    UploadsAfter, UploadsPage,
};
use crate::disks::DiskHealth;
use crate::object::{self, BodyError, ObjectStore, Staged};
use crate::shards::{ShardError, Shards};
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::StreamExt;
use granary_meta::record::{AccountId, BucketId, BucketRecord, ObjectData};
use granary_meta::{Answer, ChunkRef, Command, ListFrom, Query, Reply};
use granary_placement::id::HashSlot;
use std::ops::Range;

/// The cluster, as the S3 verbs see it.
pub struct Live {
    shards: Shards,
    objects: ObjectStore,
}

impl Live {
    /// Joins the two halves.
    pub fn new(shards: Shards, objects: ObjectStore) -> Live {
        Live { shards, objects }
    }

    /// Disks answer, but fewer than two have room: trying again does not help, space does.
    fn is_full(&self) -> bool {
        let view = self.objects.disks().view();
        let up = view.iter().filter(|disk| disk.health == DiskHealth::Up).count();
        let full = view.iter().filter(|disk| disk.is_full()).count();
        full > 0 && up - full < 2
    }
}

/// A failed command: whether it was applied is the question.
fn of_command(error: ShardError) -> BackendError {
    match error {
        error if error.outcome_unknown() => BackendError::OutcomeUnknown(error.to_string()),
        ShardError::Refused { .. } => BackendError::Refused(error.to_string()),
        error => BackendError::Unavailable(error.to_string()),
    }
}

/// A failed query: it changed nothing.
fn of_query(error: ShardError) -> BackendError {
    match error {
        ShardError::Refused { .. } => BackendError::Refused(error.to_string()),
        error => BackendError::Unavailable(error.to_string()),
    }
}

impl StagedPayload for Staged {
    fn data(&self) -> ObjectData {
        self.data.clone()
    }

    fn missing(&self) -> Vec<ChunkRef> {
        self.missing.clone()
    }

    fn committed(self: Box<Self>) {
        Staged::committed(*self);
    }

    fn unknown(self: Box<Self>) {
        Staged::unknown(*self);
    }
}

#[async_trait]
impl Backend for Live {
    fn has_scheme(&self, name: &str) -> bool {
        self.shards.current_map().is_some_and(|map| map.schemes.contains_key(name))
    }

    async fn bucket(&self, name: &str) -> Result<Option<BucketRecord>, BackendError> {
        self.shards.get_bucket(name).await.map_err(of_query)
    }

    async fn bucket_now(&self, name: &str) -> Result<Option<BucketRecord>, BackendError> {
        self.shards.fresh_bucket(name).await.map_err(of_query)
    }

    async fn create_bucket(&self, name: &str, owner: AccountId) -> Result<Created, BackendError> {
        self.shards.create_bucket(name, owner).await.map_err(of_command)
    }

    async fn delete_bucket(&self, name: &str) -> Result<Removed, BackendError> {
        self.shards.delete_bucket(name).await.map_err(of_command)
    }

    async fn list_buckets(&self, after: &str, limit: u32) -> Result<(Vec<BucketRecord>, bool), BackendError> {
        let page = self.shards.list_buckets(after, limit).await.map_err(of_query)?;
        Ok((page.buckets, page.more))
    }

    async fn command_for(&self, bucket: BucketId, key: &str, command: Command) -> Result<Reply, BackendError> {
        self.shards.command_for(bucket, key, command).await.map_err(of_command)
    }

    async fn query_for(&self, bucket: BucketId, key: &str, query: Query) -> Result<Answer, BackendError> {
        self.shards.query_for(bucket, key, query).await.map_err(of_query)
    }

    async fn list_objects(
        &self,
        bucket: BucketId,
        prefix: &str,
        delimiter: &str,
        from: ListFrom,
        limit: u32,
    ) -> Result<Option<ListingPage>, BackendError> {
        match self.shards.list_objects(bucket, prefix, delimiter, from, limit).await {
            Ok(page) => Ok(Some((page.items, page.more))),
            Err(ShardError::BucketFenced) => Ok(None),
            Err(error) => Err(of_query(error)),
        }
    }

    async fn list_uploads(
        &self,
        bucket: BucketId,
        prefix: &str,
        after: UploadsAfter,
        limit: u32,
    ) -> Result<Option<UploadsPage>, BackendError> {
        match self.shards.list_uploads(bucket, prefix, after, limit).await {
            Ok(page) => Ok(Some((page.uploads, page.more))),
            Err(ShardError::BucketFenced) => Ok(None),
            Err(error) => Err(of_query(error)),
        }
    }

    async fn stage(
        &self,
        spec: StageSpec<'_>,
        body: BoxStream<'_, Result<Bytes, BrokenBody>>,
    ) -> Result<Box<dyn StagedPayload>, StageError> {
        let owner = HashSlot::of(spec.bucket.0, spec.key);
        let body = body.map(|item| item.map_err(|broken| Box::new(broken) as BodyError));
        let staged = if spec.inline {
            self.objects.stage(spec.scheme, owner, spec.len_bytes, body).await
        } else {
            self.objects.stage_part(spec.scheme, owner, spec.len_bytes, body).await
        };
        match staged {
            Ok(staged) => Ok(Box::new(staged)),
            Err(
                object::StageError::Body(_) | object::StageError::TooShort { .. } | object::StageError::TooLong { .. },
            ) => Err(StageError::Body),
            Err(error @ object::StageError::Unavailable(_)) if self.is_full() => {
                Err(StageError::Full(error.to_string()))
            }
            Err(error @ object::StageError::Unavailable(_)) => Err(StageError::Unavailable(error.to_string())),
            Err(error) => Err(StageError::Internal(error.to_string())),
        }
    }

    fn read(&self, data: &ObjectData, range: Range<u64>) -> BoxStream<'static, Result<Bytes, ReadError>> {
        let reader = self.objects.read(data, range);
        reader
            .map(|item| {
                item.map_err(|error| match error {
                    object::ReadError::Lost { .. } | object::ReadError::Unreachable { .. } => {
                        ReadError::Unavailable(error.to_string())
                    }
                    error => ReadError::Internal(error.to_string()),
                })
            })
            .boxed()
    }
}
