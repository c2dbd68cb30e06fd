//! Buckets: fences in every object shard; names, ids and the cluster map in the root shard.

use crate::apply::Tx;
use crate::keys::kind;
use crate::kv::{Kv, StateError};
use granary_placement::map::ClusterMap;
use granary_wire::meta::Reply;
use granary_wire::record::{AccountId, BucketId, BucketRecord};

/// Longest bucket name, in bytes; S3's limit.
const MAX_BUCKET_NAME_BYTES: usize = 63;

/// See [`granary_wire::meta::Command::FenceBucket`]. The fence stays for ever: bucket ids are never used again.
pub fn fence<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, bucket: BucketId) -> Result<Reply, StateError> {
    for kind in [kind::OBJECT, kind::VERSION, kind::UPLOAD] {
        let range = tx.keys.bucket_range(kind, bucket, "");
        if !tx.batch.scan(&range.from, &range.to, 1)?.is_empty() {
            return Ok(Reply::Fenced { empty: false });
        }
    }
    tx.store_now(tx.keys.fence(bucket))?;
    Ok(Reply::Fenced { empty: true })
}

/// See [`granary_wire::meta::Command::UnfenceBucket`].
pub fn unfence<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, bucket: BucketId) -> Result<Reply, StateError> {
    tx.batch.delete(tx.keys.fence(bucket));
    Ok(Reply::Done)
}

/// See [`granary_wire::meta::Command::CreateBucket`].
pub fn create<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, name: &str, owner: AccountId) -> Result<Reply, StateError> {
    if name.is_empty() || name.len() > MAX_BUCKET_NAME_BYTES || name.as_bytes().contains(&0) {
        return Ok(Reply::Refused("not a bucket name".to_owned()));
    }
    let key = tx.keys.bucket(name);
    if let Some(there) = tx.load::<BucketRecord>(&key)? {
        return Ok(Reply::BucketExists(there));
    }
    let counter_key = tx.keys.single(kind::BUCKET_COUNTER);
    let id = tx.load::<u64>(&counter_key)?.unwrap_or(0) + 1;
    tx.store(counter_key, &id)?;
    let bucket = BucketRecord { id: BucketId(id), name: name.to_owned(), created_ms: tx.now_ms, owner, deleting: false };
    tx.store(key, &bucket)?;
    Ok(Reply::Bucket(bucket))
}

/// See [`granary_wire::meta::Command::BeginDeleteBucket`].
pub fn begin_delete<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, name: &str, id: BucketId) -> Result<Reply, StateError> {
    let key = tx.keys.bucket(name);
    match tx.load::<BucketRecord>(&key)? {
        Some(there) if there.id == id => {
            let marked = BucketRecord { deleting: true, ..there };
            tx.store(key, &marked)?;
            Ok(Reply::Bucket(marked))
        }
        _ => Ok(Reply::NoSuchBucket),
    }
}

/// See [`granary_wire::meta::Command::EndDeleteBucket`]. A bucket that is gone is as asked for.
pub fn end_delete<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    name: &str,
    id: BucketId,
    remove: bool,
) -> Result<Reply, StateError> {
    let key = tx.keys.bucket(name);
    match tx.load::<BucketRecord>(&key)? {
        Some(there) if there.id == id && remove && !there.deleting => {
            Ok(Reply::Refused("bucket is not marked as being deleted".to_owned()))
        }
        Some(there) if there.id == id && remove => {
            tx.batch.delete(key);
            Ok(Reply::Done)
        }
        Some(there) if there.id == id => {
            tx.store(key, &BucketRecord { deleting: false, ..there })?;
            Ok(Reply::Done)
        }
        _ if remove => Ok(Reply::Done),
        _ => Ok(Reply::NoSuchBucket),
    }
}

/// See [`granary_wire::meta::Command::SetMap`].
pub fn set_map<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, map: &ClusterMap) -> Result<Reply, StateError> {
    let key = tx.keys.single(kind::MAP);
    if let Some(there) = tx.load::<ClusterMap>(&key)? {
        if there.cluster_id != map.cluster_id {
            return Ok(Reply::Refused("map of another cluster".to_owned()));
        }
        if Some(map.epoch.0) != there.epoch.0.checked_add(1) {
            return Ok(Reply::EpochConflict { current: there.epoch });
        }
    }
    tx.store(key, map)?;
    Ok(Reply::Done)
}
