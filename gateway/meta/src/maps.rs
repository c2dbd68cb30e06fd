//! The cluster map in the root shard, and what each of the last maps changed. In every object shard the epoch of the
//! oldest map by which payloads may have been placed.

use crate::apply::Tx;
use crate::check::check_map;
use crate::codec::{decode, MapHead, OldestMap};
use crate::keys::{kind, Keys};
use crate::kv::{Kv, StateError};
use crate::record::ObjectData;
use crate::{Answer, Reply};
use granary_placement::id::Epoch;
use granary_placement::map::ClusterMap;
use granary_placement::map::{diff, MapDiff};

/// How many differences are kept. Part of the replicated history.
pub const KEPT_DIFFS: u64 = 64;

/// See [`crate::Command::RequireMap`].
pub fn require<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, epoch: Epoch) -> Result<Reply, StateError> {
    let key = tx.keys.single(kind::OLDEST_MAP);
    if tx.load::<OldestMap>(&key)?.unwrap_or_default().0 < epoch {
        tx.store(key, &OldestMap(epoch))?;
    }
    Ok(Reply::Done)
}

/// The reply to a payload that was placed by a map of `epoch`, when that is too old. One that lies in its record lies
/// on no disk.
pub fn too_old<K: Kv + ?Sized>(
    tx: &Tx<'_, '_, K>,
    data: &ObjectData,
    epoch: Epoch,
) -> Result<Option<Reply>, StateError> {
    if data.extents().is_empty() {
        return Ok(None);
    }
    let OldestMap(oldest) = tx.load(&tx.keys.single(kind::OLDEST_MAP))?.unwrap_or_default();
    Ok((epoch < oldest).then_some(Reply::StaleMap { oldest }))
}

/// See [`crate::Command::SetMap`].
pub fn set<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, map: &ClusterMap) -> Result<Reply, StateError> {
    if let Err(why) = check_map(map, tx.level) {
        return Ok(Reply::Refused(why));
    }
    let key = tx.keys.single(kind::MAP);
    if let Some(there) = tx.load::<ClusterMap>(&key)? {
        if there.cluster_id != map.cluster_id {
            return Ok(Reply::Refused("map of another cluster".to_owned()));
        }
        if Some(map.epoch.0) != there.epoch.0.checked_add(1) {
            return Ok(Reply::EpochConflict { current: there.epoch });
        }
        tx.store(tx.keys.map_diff(map.epoch), &diff(&there, map))?;
        if let Some(old) = map.epoch.0.checked_sub(KEPT_DIFFS) {
            tx.batch.delete(tx.keys.map_diff(Epoch(old)));
        }
    }
    tx.store(key, map)?;
    Ok(Reply::Done)
}

/// See [`crate::Query::GetMap`].
pub fn answer<K: Kv + ?Sized>(kv: &K, keys: &Keys, newer_than: Epoch) -> Result<Answer, StateError> {
    let Some(bytes) = kv.get(&keys.single(kind::MAP))? else { return Ok(Answer::NoMap) };
    let epoch = MapHead::decode(&bytes)?.epoch;
    if epoch <= newer_than {
        return Ok(Answer::MapUnchanged);
    }
    if epoch.0 - newer_than.0 <= KEPT_DIFFS {
        if let Some(diffs) = diffs_between(kv, keys, newer_than, epoch, bytes.len())? {
            return Ok(Answer::MapDiffs(diffs));
        }
    }
    Ok(Answer::Map(Box::new(decode(&bytes)?)))
}

/// What leads from one epoch to another; None when a step is not kept, or all together are no smaller than the map's
/// `map_bytes`.
fn diffs_between<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    from: Epoch,
    to: Epoch,
    map_bytes: usize,
) -> Result<Option<Vec<MapDiff>>, StateError> {
    let (mut diffs, mut left) = (Vec::new(), map_bytes);
    for epoch in from.0 + 1..=to.0 {
        let Some(bytes) = kv.get(&keys.map_diff(Epoch(epoch)))? else { return Ok(None) };
        if bytes.len() >= left {
            return Ok(None);
        }
        left -= bytes.len();
        diffs.push(decode(&bytes)?);
    }
    Ok(Some(diffs))
}
