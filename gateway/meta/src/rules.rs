//! Rules of buckets: made in the root shard under rising epochs, held by every object shard, and what a write must
//! agree with.
//!
//! A gateway that remembers an old rule is told so by the shard (StaleRule); a shard that was not told of a new one yet
//! is told by the first gateway that knows it (RuleBehind). So once a shard has a rule, nothing is written there by an
//! older one.

use crate::apply::Tx;
use crate::kv::{Kv, StateError};
use crate::record::{BucketId, BucketRecord, BucketRule, Versioning};
use crate::Reply;

/// See [`crate::Command::BeginBucketRule`].
pub fn begin<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    name: &str,
    id: BucketId,
    wanted: BucketRule,
) -> Result<Reply, StateError> {
    let key = tx.keys.bucket(name);
    let Some(there) = tx.load::<BucketRecord>(&key)?.filter(|there| there.id == id) else {
        return Ok(Reply::NoSuchBucket);
    };
    if let Some(why) = forbidden(&there.rule, &wanted) {
        return Ok(Reply::Refused(why.to_owned()));
    }
    let rule = BucketRule { epoch: there.rule.epoch + 1, ..wanted };
    let changed = BucketRecord { rule, rule_pending: true, ..there };
    tx.store(key, &changed)?;
    Ok(Reply::Bucket(changed))
}

/// Why S3 does not know such a change.
fn forbidden(from: &BucketRule, to: &BucketRule) -> Option<&'static str> {
    if from.versioning != Versioning::Off && to.versioning == Versioning::Off {
        return Some("versioning that was on can be suspended, not off");
    }
    if from.lock && !to.lock {
        return Some("a lock stays");
    }
    if to.lock && to.versioning != Versioning::Enabled {
        return Some("a lock wants versioning");
    }
    None
}

/// See [`crate::Command::EndBucketRule`].
pub fn end<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, name: &str, id: BucketId, epoch: u64) -> Result<Reply, StateError> {
    let key = tx.keys.bucket(name);
    let Some(there) = tx.load::<BucketRecord>(&key)?.filter(|there| there.id == id) else {
        return Ok(Reply::NoSuchBucket);
    };
    if there.rule.epoch != epoch {
        return Ok(Reply::StaleRule { current: there.rule.epoch });
    }
    if there.rule_pending {
        tx.store(key, &BucketRecord { rule_pending: false, ..there })?;
    }
    Ok(Reply::Done)
}

/// The rule this shard holds; one it was never told of is the rule of a new bucket.
pub fn held<K: Kv + ?Sized>(tx: &Tx<'_, '_, K>, bucket: BucketId) -> Result<BucketRule, StateError> {
    Ok(tx.load(&tx.keys.rule(bucket))?.unwrap_or_default())
}

/// See [`crate::Command::SetBucketRule`].
pub fn set<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, bucket: BucketId, rule: &BucketRule) -> Result<Reply, StateError> {
    let there = held(tx, bucket)?;
    if there.epoch > rule.epoch {
        return Ok(Reply::StaleRule { current: there.epoch });
    }
    if there.epoch == rule.epoch {
        return Ok(if there == *rule {
            Reply::Done
        } else {
            Reply::Refused(format!("another rule has the epoch {}", rule.epoch))
        });
    }
    tx.store(tx.keys.rule(bucket), rule)?;
    Ok(Reply::Done)
}

/// The rule that decides a write which was made by the rule of `epoch`, or the reply that turns it away.
pub fn for_write<K: Kv + ?Sized>(
    tx: &Tx<'_, '_, K>,
    bucket: BucketId,
    epoch: u64,
) -> Result<Result<BucketRule, Reply>, StateError> {
    let rule = held(tx, bucket)?;
    Ok(match epoch.cmp(&rule.epoch) {
        std::cmp::Ordering::Less => Err(Reply::StaleRule { current: rule.epoch }),
        std::cmp::Ordering::Equal => Ok(rule),
        std::cmp::Ordering::Greater => Err(Reply::RuleBehind { known: rule.epoch }),
    })
}
