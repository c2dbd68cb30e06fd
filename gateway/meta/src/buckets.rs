//! Buckets: fences in every object shard; names and ids in the root shard.

use crate::apply::Tx;
use crate::codec::{Fence, LastBucketId};
use crate::keys::kind;
use crate::kv::{Kv, StateError};
use crate::record::{AccountId, BucketId, BucketRecord, BucketRule};
use crate::Reply;

/// Longest bucket name, in bytes; S3's limit.
const MAX_BUCKET_NAME_BYTES: usize = 63;

/// See [`crate::Command::FenceBucket`]. The fence of a bucket that is removed stays for ever: ids are never used again.
pub fn fence<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, bucket: BucketId, attempt: u64) -> Result<Reply, StateError> {
    let key = tx.keys.fence(bucket);
    match tx.load::<Fence>(&key)? {
        Some(there) if there.attempt > attempt => return Ok(Reply::StaleAttempt { current: there.attempt }),
        // A fence that came late must not go up again behind its own attempt's Unfence: nobody would take it down.
        Some(there) if there.attempt == attempt && !there.up => return Ok(Reply::StaleAttempt { current: attempt }),
        _ => {}
    }
    let empty = is_empty(tx, bucket)?;
    tx.store(key, &Fence { at_ms: tx.now_ms, attempt, up: empty })?;
    Ok(Reply::Fenced { empty })
}

fn is_empty<K: Kv + ?Sized>(tx: &Tx<'_, '_, K>, bucket: BucketId) -> Result<bool, StateError> {
    for kind in [kind::OBJECT, kind::VERSION, kind::UPLOAD] {
        let range = tx.keys.bucket_range(kind, bucket, "");
        if !tx.batch.scan(&range.from, &range.to, 1)?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// See [`crate::Command::UnfenceBucket`]. The attempt stays on record.
pub fn unfence<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, bucket: BucketId, attempt: u64) -> Result<Reply, StateError> {
    let key = tx.keys.fence(bucket);
    if let Some(there) = tx.load::<Fence>(&key)?.filter(|there| there.attempt > attempt) {
        return Ok(Reply::StaleAttempt { current: there.attempt });
    }
    tx.store(key, &Fence { at_ms: tx.now_ms, attempt, up: false })?;
    Ok(Reply::Done)
}

/// See [`crate::Command::CreateBucket`].
pub fn create<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, name: &str, owner: AccountId) -> Result<Reply, StateError> {
    if name.is_empty() || name.len() > MAX_BUCKET_NAME_BYTES || name.as_bytes().contains(&0) {
        return Ok(Reply::Refused("not a bucket name".to_owned()));
    }
    let key = tx.keys.bucket(name);
    if let Some(there) = tx.load::<BucketRecord>(&key)? {
        return Ok(Reply::BucketExists(there));
    }
    let counter_key = tx.keys.single(kind::BUCKET_COUNTER);
    let id = tx.load::<LastBucketId>(&counter_key)?.map_or(0, |last| last.0) + 1;
    tx.store(counter_key, &LastBucketId(id))?;
    let bucket = BucketRecord {
        id: BucketId(id),
        name: name.to_owned(),
        created_ms: tx.now_ms,
        owner,
        deleting: false,
        delete_attempt: 0,
        rule: BucketRule::default(),
        rule_pending: false,
    };
    tx.store(key, &bucket)?;
    tx.batch.put(tx.keys.bucket_of(owner, name), Vec::new());
    Ok(Reply::Bucket(bucket))
}

/// See [`crate::Command::BeginDeleteBucket`].
pub fn begin_delete<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, name: &str, id: BucketId) -> Result<Reply, StateError> {
    let key = tx.keys.bucket(name);
    match tx.load::<BucketRecord>(&key)? {
        Some(there) if there.id == id => {
            let marked = BucketRecord { deleting: true, delete_attempt: there.delete_attempt + 1, ..there };
            tx.store(key, &marked)?;
            Ok(Reply::Bucket(marked))
        }
        _ => Ok(Reply::NoSuchBucket),
    }
}

/// See [`crate::Command::EndDeleteBucket`]. The attempt is what makes a removal safe: as long as no later one was
/// handed out here, nobody took a fence of this one down.
pub fn end_delete<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    name: &str,
    id: BucketId,
    attempt: u64,
    remove: bool,
) -> Result<Reply, StateError> {
    let key = tx.keys.bucket(name);
    match tx.load::<BucketRecord>(&key)? {
        Some(there) if there.id == id => {
            if there.delete_attempt != attempt || (remove && !there.deleting) {
                return Ok(Reply::StaleAttempt { current: there.delete_attempt });
            }
            if remove {
                tx.batch.delete(key);
                tx.batch.delete(tx.keys.bucket_of(there.owner, name));
            } else {
                tx.store(key, &BucketRecord { deleting: false, ..there })?;
            }
            Ok(Reply::Done)
        }
        _ => Ok(Reply::NoSuchBucket),
    }
}
