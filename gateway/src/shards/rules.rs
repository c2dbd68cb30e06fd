//! A bucket's rule: versioning, lock, policy; changed so that no write is decided by the old one once the change is
//! done.
//!
//! 1. the root shard makes the rule, under the next epoch, and marks it as pending;
//! 2. every object shard is told; from then on it turns away writes that were decided by an older rule, and says so;
//! 3. the root shard takes the mark off.
//!
//! Between 1 and 3 gateways may meet shards of either rule: one that is behind is told by whoever knows better
//! (RuleBehind), a gateway that is behind looks the bucket up again (StaleRule). A gateway that dies in between leaves
//! the mark, and whoever looks the bucket up next goes on from 2: telling a shard twice changes nothing, and a shard
//! that has a later rule keeps it.

use super::buckets::odd_reply;
use super::{ShardError, Shards};
use granary_meta::record::{BucketRecord, Versioning};
use granary_meta::{Command, Reply};
use granary_placement::id::ShardId;

/// What setting a rule came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleSet {
    /// Every shard has it. The bucket as it is now.
    Done(BucketRecord),
    /// There is no such bucket.
    NoSuchBucket,
    /// S3 does not allow this change; in words for the log.
    Forbidden(String),
}

impl Shards {
    /// Gives a bucket another rule. When this returns, no shard takes a write that was decided by an older one.
    ///
    /// # Errors
    /// A shard does not answer. The rule may be in force in part; it is finished by whoever looks the bucket up next.
    pub async fn set_rule(
        &self,
        bucket: &BucketRecord,
        versioning: Versioning,
        lock: bool,
        policy_epoch: u64,
    ) -> Result<RuleSet, ShardError> {
        let (name, id) = (bucket.name.clone(), bucket.id);
        let begin = Command::BeginBucketRule { name, bucket: id, versioning, lock, policy_epoch };
        let begun = match self.command(ShardId::ROOT, begin).await {
            Ok(Reply::Bucket(begun)) => begun,
            Ok(Reply::NoSuchBucket) => return Ok(RuleSet::NoSuchBucket),
            Ok(other) => return Err(odd_reply(ShardId::ROOT, &other)),
            Err(ShardError::Refused { why, .. }) => return Ok(RuleSet::Forbidden(why)),
            Err(error) => return Err(error),
        };
        let begun_at = tokio::time::Instant::now();
        self.finish_rule(&begun).await?;
        let done = BucketRecord { rule_pending: false, ..begun };
        self.inner.buckets.put(&done, begun_at);
        Ok(RuleSet::Done(done))
    }

    /// Finishes a rule that was found pending for longer than whoever began it should take. Requests wait for it no
    /// longer than that either.
    pub(super) async fn finish_rule_left_pending(&self, bucket: &mut BucketRecord) {
        let (key, now) = ((bucket.id, bucket.rule.epoch), tokio::time::Instant::now());
        let settle = self.inner.timing.settle;
        match self.inner.buckets.pending.get(&key) {
            None => self.inner.buckets.pending.insert(key, now),
            Some(since) if now.duration_since(since) < settle => {}
            Some(_) => match tokio::time::timeout(settle, self.finish_rule(bucket)).await {
                Ok(Ok(())) => bucket.rule_pending = false,
                _ => tracing::warn!(bucket = %bucket.name, "the rule of a bucket is not in every shard yet"),
            },
        }
    }

    /// Steps 2 and 3 for a bucket whose rule is pending.
    ///
    /// # Errors
    /// A shard does not answer.
    pub(super) async fn finish_rule(&self, bucket: &BucketRecord) -> Result<(), ShardError> {
        let (id, rule) = (bucket.id, bucket.rule);
        for (shard, reply) in self.on_all_shards(bucket.owner, || Command::SetBucketRule { bucket: id, rule }).await? {
            // With a later rule under way, whoever began that one tells it to all.
            if !matches!(reply, Reply::Done | Reply::StaleRule { .. }) {
                return Err(odd_reply(shard, &reply));
            }
        }
        let end = Command::EndBucketRule { name: bucket.name.clone(), bucket: id, epoch: rule.epoch };
        match self.command(ShardId::ROOT, end).await? {
            Reply::Done | Reply::StaleRule { .. } | Reply::NoSuchBucket => Ok(()),
            other => Err(odd_reply(ShardId::ROOT, &other)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::buckets::Created;
    use super::super::memory::MemoryPeers;
    use super::super::tests::map;
    use super::super::Timing;
    use super::*;
    use crate::metrics::Metrics;
    use granary_meta::record::{AccountId, ObjectMeta, UploadId, UploadRecord};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::sync::watch;

    fn cluster() -> Arc<MemoryPeers> {
        MemoryPeers::new(&map(5, 4, 1))
    }

    fn gateway(cluster: &Arc<MemoryPeers>) -> Shards {
        let timing = Timing {
            deadline: Duration::from_millis(200),
            first_pause: Duration::from_millis(1),
            settle: Duration::from_millis(300),
            ..Timing::default()
        };
        let known = watch::Sender::new(Some(Arc::new(map(5, 4, 1))));
        Shards::with_timing(cluster.clone(), known, Metrics::new().unwrap(), timing)
    }

    /// A write decided by the rule that the gateway remembers.
    async fn put(shards: &Shards, bucket: &BucketRecord, key: &str) -> Reply {
        let record =
            UploadRecord { initiated_ms: 1, meta: ObjectMeta::default(), checksum: None, owner: AccountId::ROOT };
        let (upload, rule_epoch) = (UploadId([1; 16]), bucket.rule.epoch);
        let command = Command::CreateUpload { bucket: bucket.id, key: key.to_owned(), upload, record, rule_epoch };
        shards.command(shards.shard_of(bucket.id, key).unwrap(), command).await.unwrap()
    }

    async fn create(shards: &Shards) -> BucketRecord {
        match shards.create_bucket("b", AccountId::ROOT).await.unwrap() {
            Created::New(bucket) => bucket,
            other => panic!("{other:?}"),
        }
    }

    /// One key of each shard.
    fn keys(shards: &Shards, bucket: &BucketRecord) -> Vec<String> {
        let key_in = |shard| {
            let mut keys = (0..).map(|number| format!("key-{number}"));
            keys.find(|key| shards.shard_of(bucket.id, key).unwrap() == shard).unwrap()
        };
        shards.object_shards().into_iter().map(key_in).collect()
    }

    #[tokio::test]
    async fn a_gateway_that_remembers_the_old_rule_cannot_write_by_it() {
        let cluster = cluster();
        let (one, other) = (gateway(&cluster), gateway(&cluster));
        let created = create(&one).await;
        let old = other.get_bucket("b").await.unwrap().unwrap();
        let RuleSet::Done(new) = one.set_rule(&created, Versioning::Enabled, false, 0).await.unwrap() else { panic!() };
        assert_eq!((new.rule.epoch, new.rule.versioning, new.rule_pending), (1, Versioning::Enabled, false));
        assert_eq!(other.get_bucket("b").await.unwrap().unwrap(), old, "the other gateway has not heard of it");
        for (written, key) in (0..).zip(keys(&one, &created)) {
            assert_eq!(put(&other, &old, &key).await, Reply::StaleRule { current: 1 });
            assert_eq!(one.bucket_usage(old.id).await.unwrap().uploads, written);
            // Looked up again, it goes by the new one.
            let fresh = other.fresh_bucket("b").await.unwrap().unwrap();
            assert_eq!(fresh.rule, new.rule);
            assert_eq!(put(&other, &fresh, &key).await, Reply::Done);
        }
    }

    #[tokio::test]
    async fn a_rule_that_was_left_pending_is_finished_by_whoever_looks_the_bucket_up() {
        let cluster = cluster();
        let (one, other) = (gateway(&cluster), gateway(&cluster));
        let created = create(&one).await;
        cluster.state().silent.insert(ShardId(2));
        assert!(one.set_rule(&created, Versioning::Enabled, false, 0).await.unwrap_err().outcome_unknown());
        // It is told in part, and still pending: a shard that was not told says that it is behind.
        let pending = other.fresh_bucket("b").await.unwrap().unwrap();
        assert!(pending.rule_pending && pending.rule.epoch == 1);
        cluster.state().silent.clear();
        let behind = &keys(&one, &created)[1];
        assert_eq!(put(&other, &pending, behind).await, Reply::RuleBehind { known: 0 });
        for _ in 0..1000 {
            if !other.fresh_bucket("b").await.unwrap().unwrap().rule_pending {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for key in keys(&one, &created) {
            assert_eq!(put(&one, &created, &key).await, Reply::StaleRule { current: 1 });
        }
        assert!(!one.fresh_bucket("b").await.unwrap().unwrap().rule_pending);
    }

    #[tokio::test]
    async fn what_s3_forbids_and_buckets_that_are_gone_are_told_apart() {
        let one = gateway(&cluster());
        let created = create(&one).await;
        let RuleSet::Done(on) = one.set_rule(&created, Versioning::Enabled, true, 0).await.unwrap() else { panic!() };
        assert!(matches!(one.set_rule(&on, Versioning::Off, true, 0).await.unwrap(), RuleSet::Forbidden(_)));
        let gone = BucketRecord { id: granary_meta::record::BucketId(99), ..on };
        assert_eq!(one.set_rule(&gone, Versioning::Enabled, true, 0).await.unwrap(), RuleSet::NoSuchBucket);
    }
}
