//! Buckets: looked up by name, made, and deleted behind fences.
//!
//! Deleting, in the order that keeps every acknowledged PUT:
//! 1. the root shard marks the bucket as being deleted;
//! 2. every object shard fences it, if it is empty there; a fenced bucket takes nothing, for ever;
//! 3. all fenced: the root shard removes the name. Any not empty: fences come off, then the mark.
//!
//! A crash leaves the mark and some fences; the next DeleteBucket, or a CreateBucket of the name, begins at 1 again.

use super::{ShardError, Shards};
use futures::stream::{FuturesUnordered, StreamExt};
use granary_placement::id::ShardId;
use granary_wire::meta::{Answer, Command, ListFrom, Query, Reply};
use granary_wire::record::{AccountId, BucketId, BucketRecord, Usage};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

/// Most buckets remembered by name.
const CACHE_BUCKETS: usize = 10_000;

/// What CreateBucket came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// It was made.
    New(BucketRecord),
    /// There was one of that name; its owner may be another.
    Exists(BucketRecord),
}

/// What DeleteBucket came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// Gone; no PUT into it was or will be acknowledged.
    Done,
    /// There is no such bucket.
    NoSuchBucket,
    /// It holds objects, versions or uploads.
    NotEmpty,
}

/// A page of buckets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketPage {
    /// In order of name.
    pub buckets: Vec<BucketRecord>,
    /// There is more after the last.
    pub more: bool,
}

/// Buckets by name. Only what exists is remembered: that a name is free may change at any time, while a bucket that was deleted
/// answers for itself by its fences.
#[derive(Default)]
pub(super) struct BucketCache {
    by_name: RwLock<HashMap<String, BucketRecord>>,
    /// One deletion of a bucket at a time in this gateway: two would take each other's fences off.
    deleting: Mutex<HashMap<BucketId, Arc<tokio::sync::Mutex<()>>>>,
}

impl BucketCache {
    fn get(&self, name: &str) -> Option<BucketRecord> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn put(&self, bucket: &BucketRecord) {
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        if by_name.len() >= CACHE_BUCKETS && !by_name.contains_key(&bucket.name) {
            // Which one goes does not matter: it costs that bucket one lookup.
            if let Some(victim) = by_name.keys().next().cloned() {
                by_name.remove(&victim);
            }
        }
        by_name.insert(bucket.name.clone(), bucket.clone());
    }

    fn forget(&self, name: &str) {
        self.by_name.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    fn turn(&self, bucket: BucketId) -> Arc<tokio::sync::Mutex<()>> {
        let mut deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        deleting.retain(|_, turn| Arc::strong_count(turn) > 1);
        deleting.entry(bucket).or_default().clone()
    }
}

impl Shards {
    /// The bucket of that name, from memory when it was seen before. For requests that go on to an object shard: that shard answers
    /// BucketFenced when the bucket is gone, and the caller then takes [`Shards::fresh_bucket`] and tries once more.
    /// A bucket that is being deleted comes back with `deleting` set.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn get_bucket(&self, name: &str) -> Result<Option<BucketRecord>, ShardError> {
        match self.inner.buckets.get(name) {
            Some(bucket) => Ok(Some(bucket)),
            None => self.fresh_bucket(name).await,
        }
    }

    /// The bucket of that name as the root shard has it now. For requests on the bucket itself, and after BucketFenced. While it is
    /// being deleted this waits some seconds for the end of that; if it comes back with `deleting` set all the same, the deletion was
    /// broken off: the sensible answer is 409 OperationAborted, and the next DeleteBucket finishes it.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn fresh_bucket(&self, name: &str) -> Result<Option<BucketRecord>, ShardError> {
        self.inner.buckets.forget(name);
        let deadline = tokio::time::Instant::now() + self.inner.timing.settle;
        let mut pause = Duration::from_millis(10);
        loop {
            let found = self.look_up(name).await?;
            match &found {
                Some(bucket) if bucket.deleting && tokio::time::Instant::now() + pause < deadline => {
                    tokio::time::sleep(super::jitter(pause)).await;
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                Some(bucket) if !bucket.deleting => {
                    self.inner.buckets.put(bucket);
                    return Ok(found);
                }
                _ => return Ok(found),
            }
        }
    }

    async fn look_up(&self, name: &str) -> Result<Option<BucketRecord>, ShardError> {
        match self.query(ShardId::ROOT, Query::GetBucket { name: name.to_owned() }).await? {
            Answer::Bucket(bucket) => Ok(Some(bucket)),
            Answer::NoSuchBucket => Ok(None),
            other => Err(odd_answer(ShardId::ROOT, &other)),
        }
    }

    /// Makes a bucket. One of that name whose deletion was broken off is deleted to the end first, if it is empty.
    ///
    /// # Errors
    /// A shard does not answer; the bucket may have been made.
    pub async fn create_bucket(&self, name: &str, owner: AccountId) -> Result<Created, ShardError> {
        match self.create_once(name, owner).await? {
            Created::Exists(bucket) if bucket.deleting && bucket.owner == owner => {
                // Either somebody is at it, and we wait our turn, or it was broken off, and we finish it.
                match self.delete_known(&bucket).await? {
                    Removed::NotEmpty => Ok(Created::Exists(BucketRecord { deleting: false, ..bucket })),
                    Removed::Done | Removed::NoSuchBucket => self.create_once(name, owner).await,
                }
            }
            created => Ok(created),
        }
    }

    async fn create_once(&self, name: &str, owner: AccountId) -> Result<Created, ShardError> {
        match self.command(ShardId::ROOT, Command::CreateBucket { name: name.to_owned(), owner }).await? {
            Reply::Bucket(bucket) => {
                self.inner.buckets.put(&bucket);
                Ok(Created::New(bucket))
            }
            Reply::BucketExists(bucket) => Ok(Created::Exists(bucket)),
            other => Err(odd_reply(ShardId::ROOT, &other)),
        }
    }

    /// Deletes a bucket if it is empty: no objects, no versions, no uploads in any shard.
    ///
    /// # Errors
    /// A shard does not answer. The bucket is then marked and perhaps fenced in part; deleting it again goes on from there.
    pub async fn delete_bucket(&self, name: &str) -> Result<Removed, ShardError> {
        match self.look_up(name).await? {
            Some(bucket) => self.delete_known(&bucket).await,
            None => {
                self.inner.buckets.forget(name);
                Ok(Removed::NoSuchBucket)
            }
        }
    }

    async fn delete_known(&self, bucket: &BucketRecord) -> Result<Removed, ShardError> {
        let turn = self.inner.buckets.turn(bucket.id);
        let _turn = turn.lock().await;
        // Most refusals are of buckets with objects in plain sight: they cost one listing and no fence.
        if !bucket.deleting && self.holds_objects(bucket.id).await? {
            return Ok(Removed::NotEmpty);
        }
        self.inner.buckets.forget(&bucket.name);
        let begin = Command::BeginDeleteBucket { name: bucket.name.clone(), bucket: bucket.id };
        match self.command(ShardId::ROOT, begin).await? {
            Reply::Bucket(_) => {}
            Reply::NoSuchBucket => return Ok(Removed::NoSuchBucket),
            other => return Err(odd_reply(ShardId::ROOT, &other)),
        }
        let fenced = self.on_all_shards(|| Command::FenceBucket { bucket: bucket.id }).await?;
        let mut empty = true;
        for (shard, reply) in &fenced {
            match reply {
                Reply::Fenced { empty: empty_here } => empty &= empty_here,
                other => return Err(odd_reply(*shard, other)),
            }
        }
        if !empty {
            // Everywhere, not only where this call set the fence: a call that was broken off may have set others.
            for (shard, reply) in self.on_all_shards(|| Command::UnfenceBucket { bucket: bucket.id }).await? {
                if reply != Reply::Done {
                    return Err(odd_reply(shard, &reply));
                }
            }
        }
        let end = Command::EndDeleteBucket { name: bucket.name.clone(), bucket: bucket.id, remove: empty };
        let ended = self.command(ShardId::ROOT, end).await?;
        self.inner.buckets.forget(&bucket.name);
        match ended {
            Reply::Done if empty => Ok(Removed::Done),
            Reply::Done => Ok(Removed::NotEmpty),
            Reply::NoSuchBucket => Ok(Removed::NoSuchBucket),
            other => Err(odd_reply(ShardId::ROOT, &other)),
        }
    }

    async fn holds_objects(&self, bucket: BucketId) -> Result<bool, ShardError> {
        match self.list_objects(bucket, "", "", ListFrom::Start, 1).await {
            Ok(page) => Ok(!page.items.is_empty()),
            Err(ShardError::BucketFenced) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The same command on every object shard, in parallel; fails when any does not answer, after all have been heard.
    async fn on_all_shards(&self, command: impl Fn() -> Command) -> Result<Vec<(ShardId, Reply)>, ShardError> {
        let mut running: FuturesUnordered<_> = self
            .object_shards()
            .into_iter()
            .map(|shard| (shard, command()))
            .map(|(shard, command)| async move { self.command(shard, command).await.map(|reply| (shard, reply)) })
            .collect();
        let mut replies = Vec::new();
        let mut failed = None;
        while let Some(result) = running.next().await {
            match result {
                Ok(reply) => replies.push(reply),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(replies), Err)
    }

    /// Buckets in order of name, those being deleted left out. `limit`: 1 to 1,000.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn list_buckets(&self, after: &str, limit: u32) -> Result<BucketPage, ShardError> {
        match self
            .query(ShardId::ROOT, Query::ListBuckets { after: after.to_owned(), limit: limit.clamp(1, 1000) })
            .await?
        {
            Answer::Buckets { buckets, more } => Ok(BucketPage { buckets, more }),
            other => Err(odd_answer(ShardId::ROOT, &other)),
        }
    }

    /// What lies in a bucket, summed over all shards; each shard's part is exact at the moment it is read.
    ///
    /// # Errors
    /// A shard does not answer.
    pub async fn bucket_usage(&self, bucket: BucketId) -> Result<Usage, ShardError> {
        let mut running: FuturesUnordered<_> = self
            .object_shards()
            .into_iter()
            .map(|shard| async move { (shard, self.query(shard, Query::BucketUsage { bucket }).await) })
            .collect();
        let mut sum = Usage::default();
        while let Some((shard, answer)) = running.next().await {
            match answer? {
                Answer::Usage(part) => {
                    sum.objects += part.objects;
                    sum.versions += part.versions;
                    sum.bytes += part.bytes;
                    sum.uploads += part.uploads;
                    sum.upload_bytes += part.upload_bytes;
                }
                Answer::BucketFenced => {}
                other => return Err(odd_answer(shard, &other)),
            }
        }
        Ok(sum)
    }
}

pub(super) fn odd_reply(shard: ShardId, reply: &Reply) -> ShardError {
    match reply {
        Reply::BucketFenced => ShardError::BucketFenced,
        other => ShardError::Refused { shard, why: format!("reply of another kind: {}", short(other)) },
    }
}

pub(super) fn odd_answer(shard: ShardId, answer: &Answer) -> ShardError {
    match answer {
        Answer::BucketFenced => ShardError::BucketFenced,
        other => ShardError::Refused { shard, why: format!("answer of another kind: {}", short(other)) },
    }
}

fn short(value: &dyn std::fmt::Debug) -> String {
    format!("{value:?}").chars().take(60).collect()
}
