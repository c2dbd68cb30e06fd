//! Buckets: looked up by name, made, and deleted behind fences.
//!
//! Deleting, in the order that keeps every acknowledged PUT:
//! 1. the root shard marks the bucket as being deleted, and numbers the attempt;
//! 2. every object shard fences it for this attempt, if it is empty there; a fenced bucket takes nothing;
//! 3. all fenced: the root shard removes the name. Any not empty: fences come off, then the mark.
//!
//! A crash leaves the mark and some fences; the next DeleteBucket, or a CreateBucket of the name, begins at 1 again.
//!
//! Gateways know nothing of each other, so two may delete one bucket at once, and their commands may arrive late. The
//! attempt's number keeps them apart: it rises with every step 1, a shard refuses commands of attempts below the
//! highest it saw, and the root shard ends only the last attempt it handed out. So a name is removed only while every
//! fence its deletion counted on is up.

use super::{ShardError, Shards};
use futures::stream::{FuturesUnordered, StreamExt};
use granary_meta::record::{AccountId, BucketId, BucketRecord, Usage};
use granary_meta::{Answer, Command, ListFrom, Query, Reply};
use granary_placement::id::ShardId;
use quick_cache::sync::Cache;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Most buckets remembered by name, and most names remembered as free.
const CACHE_BUCKETS: usize = 10_000;

/// Most attempts of one DeleteBucket. Each but the first follows one of another gateway that took over and then broke
/// off.
const MAX_ATTEMPTS: usize = 3;

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
    /// It belongs to another account.
    OtherOwner,
}

/// A page of buckets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketPage {
    /// In order of name.
    pub buckets: Vec<BucketRecord>,
    /// There is more after the last.
    pub more: bool,
}

/// Buckets by name. A bucket is remembered for long: one that was deleted answers for itself by its fences. That a name
/// is free may change at any time, and is remembered for [`Timing::recent`](super::Timing::recent) only.
pub(super) struct BucketCache {
    by_name: Cache<String, Seen>,
    free: Mutex<FreeNames>,
    /// Rules that were found pending, and since when.
    pub(super) pending: Cache<(BucketId, u64), Instant>,
    /// One deletion of a bucket at a time in this gateway: a second would only take the first one over.
    deleting: Mutex<HashMap<BucketId, Arc<tokio::sync::Mutex<()>>>>,
}

/// A bucket, and when it was last looked up.
#[derive(Clone)]
struct Seen {
    bucket: BucketRecord,
    at: Instant,
}

/// Names that no bucket had, and when they were looked up. Changes of the cache of buckets are made under its lock, so
/// that what was looked up before a bucket was made here never hides that bucket.
#[derive(Default)]
struct FreeNames {
    since: HashMap<String, Instant>,
    /// Buckets made by this gateway.
    made: u64,
}

impl Default for BucketCache {
    fn default() -> BucketCache {
        BucketCache {
            by_name: Cache::new(CACHE_BUCKETS),
            free: Mutex::default(),
            pending: Cache::new(CACHE_BUCKETS),
            deleting: Mutex::default(),
        }
    }
}

impl BucketCache {
    fn free(&self) -> MutexGuard<'_, FreeNames> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a bucket that was looked up at that time. Ids and epochs of rules rise: what is later stays.
    pub(super) fn put(&self, bucket: &BucketRecord, at: Instant) {
        let mut free = self.free();
        free.since.remove(&bucket.name);
        let age = |bucket: &BucketRecord| (bucket.id, bucket.rule.epoch);
        if self.by_name.get(&bucket.name).is_none_or(|seen| age(&seen.bucket) <= age(bucket)) {
            self.by_name.insert(bucket.name.clone(), Seen { bucket: bucket.clone(), at });
        }
    }

    /// Remembers a bucket that this gateway has made.
    fn put_made(&self, bucket: &BucketRecord) {
        self.free().made += 1;
        self.put(bucket, Instant::now());
    }

    /// Remembers that a name was free, unless a bucket was made here since there were `made` of them.
    fn put_free(&self, name: &str, at: Instant, made: u64, recent: Duration) {
        let mut free = self.free();
        if free.since.len() >= CACHE_BUCKETS {
            free.since.retain(|_, since| since.elapsed() < recent);
        }
        if free.made == made && free.since.len() < CACHE_BUCKETS {
            free.since.insert(name.to_owned(), at);
        }
    }

    fn is_free(&self, name: &str, recent: Duration) -> bool {
        self.free().since.get(name).is_some_and(|since| since.elapsed() < recent)
    }

    fn turn(&self, bucket: BucketId) -> Arc<tokio::sync::Mutex<()>> {
        let mut deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        deleting.retain(|_, turn| Arc::strong_count(turn) > 1);
        deleting.entry(bucket).or_default().clone()
    }
}

impl Shards {
    /// The bucket of that name, from memory when it was seen before. For requests that go on to an object shard: that
    /// shard answers BucketFenced when the bucket is gone, and the caller then takes [`Shards::fresh_bucket`] and tries
    /// once more. A bucket that is being deleted comes back with `deleting` set. A bucket that this gateway made is
    /// there at once; one that another made, where there was none, after
    /// [`Timing::recent`](super::Timing::recent) at the latest.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn get_bucket(&self, name: &str) -> Result<Option<BucketRecord>, ShardError> {
        match self.inner.buckets.by_name.get(name) {
            Some(seen) => Ok(Some(seen.bucket)),
            None if self.inner.buckets.is_free(name, self.inner.timing.recent) => Ok(None),
            None => self.fresh_bucket(name).await,
        }
    }

    /// The bucket of that name as the root shard had it no longer than [`Timing::recent`](super::Timing::recent) ago.
    /// For requests that are about to be turned away because the bucket is another account's.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn recent_bucket(&self, name: &str) -> Result<Option<BucketRecord>, ShardError> {
        match self.inner.buckets.by_name.get(name) {
            Some(seen) if seen.at.elapsed() < self.inner.timing.recent => Ok(Some(seen.bucket)),
            None if self.inner.buckets.is_free(name, self.inner.timing.recent) => Ok(None),
            _ => self.fresh_bucket(name).await,
        }
    }

    /// The bucket of that name as the root shard has it now. For requests on the bucket itself, and after BucketFenced.
    /// While it is being deleted this waits some seconds for the end of that; if it comes back with `deleting` set all
    /// the same, the deletion was broken off: the sensible answer is 409 OperationAborted, and the next DeleteBucket
    /// finishes it.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn fresh_bucket(&self, name: &str) -> Result<Option<BucketRecord>, ShardError> {
        self.inner.buckets.by_name.remove(name);
        let deadline = Instant::now() + self.inner.timing.settle;
        let mut pause = Duration::from_millis(10);
        loop {
            let (at, made) = (Instant::now(), self.inner.buckets.free().made);
            let mut found = self.look_up(name).await?;
            if let Some(bucket) = found.as_mut().filter(|bucket| bucket.rule_pending && !bucket.deleting) {
                self.finish_rule_left_pending(bucket).await;
            }
            match &found {
                Some(bucket) if bucket.deleting && Instant::now() + pause < deadline => {
                    tokio::time::sleep(super::jitter(pause)).await;
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                Some(bucket) if !bucket.deleting => {
                    // One whose rule is pending is looked up again each time, until somebody has finished it.
                    if !bucket.rule_pending {
                        self.inner.buckets.put(bucket, at);
                    }
                    return Ok(found);
                }
                Some(_) => return Ok(found),
                None => {
                    self.inner.buckets.put_free(name, at, made, self.inner.timing.recent);
                    return Ok(None);
                }
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
                    Removed::Done | Removed::NoSuchBucket | Removed::OtherOwner => self.create_once(name, owner).await,
                }
            }
            created => Ok(created),
        }
    }

    async fn create_once(&self, name: &str, owner: AccountId) -> Result<Created, ShardError> {
        match self.command_by(owner, ShardId::ROOT, Command::CreateBucket { name: name.to_owned(), owner }).await? {
            Reply::Bucket(bucket) => {
                self.inner.buckets.put_made(&bucket);
                Ok(Created::New(bucket))
            }
            Reply::BucketExists(bucket) => Ok(Created::Exists(bucket)),
            other => Err(odd_reply(ShardId::ROOT, &other)),
        }
    }

    /// Brings a bucket's rule to the shard of a key that has not heard of it yet (RuleBehind). Done when it has this
    /// rule or a later one.
    ///
    /// # Errors
    /// The shard does not answer.
    pub async fn push_bucket_rule(
        &self,
        account: AccountId,
        bucket: &BucketRecord,
        key: &str,
    ) -> Result<(), ShardError> {
        let shard = self.shard_of(bucket.id, key)?;
        let command = Command::SetBucketRule { bucket: bucket.id, rule: bucket.rule };
        match self.command_by(account, shard, command).await? {
            Reply::Done | Reply::StaleRule { .. } => Ok(()),
            other => Err(odd_reply(shard, &other)),
        }
    }

    /// Deletes a bucket of that owner if it is empty: no objects, no versions, no uploads in any shard.
    ///
    /// # Errors
    /// A shard does not answer. The bucket is then marked and perhaps fenced in part; deleting it again goes on from
    /// there.
    pub async fn delete_bucket(&self, name: &str, owner: AccountId) -> Result<Removed, ShardError> {
        match self.look_up(name).await? {
            Some(bucket) if bucket.owner != owner => Ok(Removed::OtherOwner),
            Some(bucket) => self.delete_known(&bucket).await,
            None => {
                self.inner.buckets.by_name.remove(name);
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
        self.inner.buckets.by_name.remove(&bucket.name);
        for _ in 0..MAX_ATTEMPTS {
            let removed = self.attempt_delete(bucket).await?;
            self.inner.buckets.by_name.remove(&bucket.name);
            if let Some(removed) = removed {
                return Ok(removed);
            }
            // The attempt that took over began after ours, so what it saw is an answer to this call too. Given time to
            // end, it leaves its mark only if it was broken off.
            match self.fresh_bucket(&bucket.name).await? {
                Some(now) if now.id == bucket.id && now.deleting => {}
                Some(now) if now.id == bucket.id => return Ok(Removed::NotEmpty),
                _ => return Ok(Removed::NoSuchBucket),
            }
        }
        let detail = "other deletions of the bucket took this one over and did not end".to_owned();
        Err(ShardError::Unavailable { shard: ShardId::ROOT, detail })
    }

    /// One attempt, from mark to end. None: a later attempt took over, and decides.
    async fn attempt_delete(&self, bucket: &BucketRecord) -> Result<Option<Removed>, ShardError> {
        let id = bucket.id;
        let begin = Command::BeginDeleteBucket { name: bucket.name.clone(), bucket: id };
        let attempt = match self.command_by(bucket.owner, ShardId::ROOT, begin).await? {
            Reply::Bucket(marked) => marked.delete_attempt,
            Reply::NoSuchBucket => return Ok(Some(Removed::NoSuchBucket)),
            other => return Err(odd_reply(ShardId::ROOT, &other)),
        };
        let (mut empty, mut stale) = (true, false);
        for (shard, reply) in self.on_all_shards(bucket.owner, || Command::FenceBucket { bucket: id, attempt }).await? {
            match reply {
                Reply::Fenced { empty: empty_here } => empty &= empty_here,
                Reply::StaleAttempt { .. } => stale = true,
                other => return Err(odd_reply(shard, &other)),
            }
        }
        if empty && stale {
            return Ok(None);
        }
        if !empty {
            // Everywhere, not only where this attempt set the fence: one that was broken off may have set others. Where
            // a later attempt was, it sees to the fence.
            for (shard, reply) in
                self.on_all_shards(bucket.owner, || Command::UnfenceBucket { bucket: id, attempt }).await?
            {
                if !matches!(reply, Reply::Done | Reply::StaleAttempt { .. }) {
                    return Err(odd_reply(shard, &reply));
                }
            }
        }
        let end = Command::EndDeleteBucket { name: bucket.name.clone(), bucket: id, attempt, remove: empty };
        match self.command_by(bucket.owner, ShardId::ROOT, end).await? {
            Reply::Done if empty => Ok(Some(Removed::Done)),
            Reply::StaleAttempt { .. } if empty => Ok(None),
            // With a later attempt under way the mark is that one's to take back.
            Reply::Done | Reply::StaleAttempt { .. } => Ok(Some(Removed::NotEmpty)),
            Reply::NoSuchBucket => Ok(Some(Removed::NoSuchBucket)),
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
    pub(super) async fn on_all_shards(
        &self,
        account: AccountId,
        command: impl Fn() -> Command,
    ) -> Result<Vec<(ShardId, Reply)>, ShardError> {
        let mut running: FuturesUnordered<_> = self
            .object_shards()
            .into_iter()
            .map(|shard| (shard, command()))
            .map(|(shard, command)| async move {
                self.command_by(account, shard, command).await.map(|reply| (shard, reply))
            })
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

    /// Buckets in order of name, those being deleted left out; all, or those of one account, whose names begin with
    /// `prefix`. `limit`: 1 to 1,000.
    ///
    /// # Errors
    /// The root shard does not answer.
    pub async fn list_buckets(
        &self,
        owner: Option<AccountId>,
        prefix: &str,
        after: &str,
        limit: u32,
    ) -> Result<BucketPage, ShardError> {
        let (prefix, after, limit) = (prefix.to_owned(), after.to_owned(), limit.clamp(1, 1000));
        match self.query(ShardId::ROOT, Query::ListBuckets { owner, prefix, after, limit }).await? {
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

pub(crate) fn odd_reply(shard: ShardId, reply: &Reply) -> ShardError {
    match reply {
        Reply::BucketFenced => ShardError::BucketFenced,
        other => ShardError::Garbled { shard, why: format!("reply of another kind: {}", short(other)) },
    }
}

pub(crate) fn odd_answer(shard: ShardId, answer: &Answer) -> ShardError {
    match answer {
        Answer::BucketFenced => ShardError::BucketFenced,
        other => ShardError::Garbled { shard, why: format!("answer of another kind: {}", short(other)) },
    }
}

pub(super) fn short(value: &dyn std::fmt::Debug) -> String {
    format!("{value:?}").chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_meta::record::BucketRule;

    fn bucket(id: u64, epoch: u64) -> BucketRecord {
        BucketRecord {
            id: BucketId(id),
            name: "b".to_owned(),
            created_ms: 1,
            owner: AccountId::ROOT,
            deleting: false,
            delete_attempt: 0,
            rule: BucketRule { epoch, ..BucketRule::default() },
            rule_pending: false,
        }
    }

    #[test]
    fn what_was_looked_up_before_never_hides_what_is_later() {
        let (cache, now, long) = (BucketCache::default(), Instant::now(), Duration::from_secs(3600));
        let made = cache.free().made;
        cache.put_free("b", now, made, long);
        assert!(cache.is_free("b", long) && !cache.is_free("c", long));
        cache.put_made(&bucket(2, 1));
        assert!(!cache.is_free("b", long));
        // Its answer was under way while the bucket was made.
        cache.put_free("b", now, made, long);
        assert!(!cache.is_free("b", long));
        for older in [bucket(1, 9), bucket(2, 0)] {
            cache.put(&older, now);
            assert_eq!(cache.by_name.get("b").unwrap().bucket, bucket(2, 1));
        }
        cache.put(&bucket(3, 0), now);
        assert_eq!(cache.by_name.get("b").unwrap().bucket, bucket(3, 0));
    }

    #[test]
    fn free_names_are_not_remembered_without_bound() {
        let (cache, now, long) = (BucketCache::default(), Instant::now(), Duration::from_secs(3600));
        for number in 0..CACHE_BUCKETS + 5 {
            cache.put_free(&number.to_string(), now, 0, long);
        }
        assert!(cache.is_free("0", long) && cache.free().since.len() == CACHE_BUCKETS);
        // Those whose time is over make room.
        cache.put_free("new", now, 0, Duration::ZERO);
        assert!(cache.is_free("new", long) && cache.free().since.len() == 1);
    }
}
