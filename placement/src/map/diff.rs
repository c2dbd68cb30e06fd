//! What one cluster map has that another has not.
//!
//! A map of 10,000 disks has 500,000 slots, and most changes touch few of them: peers that have the map before are sent
//! the difference. It names what it was made from, so it can only be applied to that, and what comes out is validated
//! like any map.

use super::{ClusterMap, Disk, DiskState, GroupSlot, MapError, PlacementGroup, ShardReplicas, SlotRange};
use crate::id::{ClusterId, DiskId, Epoch, PlacementGroupId, ShardId, HASH_SLOTS};
use crate::scheme::Scheme;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Entries of a keyed part of the map that were added, changed or taken away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes<K: Ord, V> {
    /// Added or changed, with their new values.
    pub set: BTreeMap<K, V>,
    /// Taken away.
    pub gone: Vec<K>,
}

/// One slot of a placement group that both maps have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotChange {
    /// The group.
    pub group: PlacementGroupId,
    /// Index into its slots.
    pub slot: u8,
    /// The slot as it is in the newer map.
    pub to: GroupSlot,
}

/// The difference between two maps of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapDiff {
    /// Of which cluster both are.
    pub cluster_id: ClusterId,
    /// The map that it is applied to.
    pub from: Epoch,
    /// The map that comes out.
    pub to: Epoch,
    /// As in the newer map.
    pub next_disk_id: u32,
    /// Disks.
    pub disks: Changes<DiskId, Disk>,
    /// Schemes.
    pub schemes: Changes<String, Scheme>,
    /// The default scheme, if it is another.
    pub default_scheme: Option<String>,
    /// Groups that are new or of another scheme or width.
    pub groups: Changes<PlacementGroupId, PlacementGroup>,
    /// Slots that changed in groups that are otherwise the same.
    pub slots: Vec<SlotChange>,
    /// How many shards the newer map has.
    pub shard_count: u32,
    /// Shards that are new or whose replicas changed.
    pub shards: BTreeMap<ShardId, ShardReplicas>,
    /// Which shard owns which hash slots, if that changed.
    pub slot_shards: Option<Vec<SlotRange>>,
}

impl MapDiff {
    /// Does it say of a disk that it is away? Releases that do not know this state cannot read such a difference.
    pub fn has_away(&self) -> bool {
        self.disks.set.values().any(|disk| disk.state == DiskState::Away)
    }
}

/// What `new` has that `old` has not. `apply_diff(old, &diff(old, new))` gives `new`, if it is valid.
pub fn diff(old: &ClusterMap, new: &ClusterMap) -> MapDiff {
    let mut groups = Changes { set: BTreeMap::new(), gone: gone(&old.groups, &new.groups) };
    let mut slots = Vec::new();
    for (id, group) in &new.groups {
        match old.groups.get(id) {
            Some(before) if before == group => {}
            Some(before) if is_same_but_for_slots(before, group) => {
                let pairs = (0u8..).zip(before.slots.iter().zip(&group.slots));
                let changed = pairs.filter(|(_, (before, after))| before != after);
                slots.extend(changed.map(|(slot, (_, after))| SlotChange { group: *id, slot, to: *after }));
            }
            _ => {
                groups.set.insert(*id, group.clone());
            }
        }
    }
    let numbered = (0..=u16::MAX).map(ShardId).zip(&new.shards);
    let changed = numbered.filter(|(shard, replicas)| old.shards.get(usize::from(shard.0)) != Some(*replicas));
    MapDiff {
        cluster_id: new.cluster_id,
        from: old.epoch,
        to: new.epoch,
        next_disk_id: new.next_disk_id,
        disks: changes(&old.disks, &new.disks),
        schemes: changes(&old.schemes, &new.schemes),
        default_scheme: (old.default_scheme != new.default_scheme).then(|| new.default_scheme.clone()),
        groups,
        slots,
        shard_count: u32::try_from(new.shards.len()).unwrap_or(u32::MAX),
        shards: changed.map(|(shard, replicas)| (shard, replicas.clone())).collect(),
        slot_shards: (old.slot_shards != new.slot_shards).then(|| new.slot_shards.clone()),
    }
}

/// The map that `diff` leads to from `old`, validated.
///
/// # Errors
/// [`MapError::DiffBase`] when the difference was made from another map; [`MapError::Diff`] when it does not fit `old`;
/// the first rule that the result breaks.
pub fn apply_diff(old: &ClusterMap, diff: &MapDiff) -> Result<ClusterMap, MapError> {
    if diff.cluster_id != old.cluster_id {
        return Err(MapError::Diff("is of another cluster"));
    }
    if diff.from != old.epoch {
        return Err(MapError::DiffBase { from: diff.from, have: old.epoch });
    }
    if diff.to <= diff.from {
        return Err(MapError::Diff("does not lead to a newer map"));
    }
    let mut map = old.clone();
    map.epoch = diff.to;
    map.next_disk_id = diff.next_disk_id;
    apply_changes(&mut map.disks, &diff.disks)?;
    apply_changes(&mut map.schemes, &diff.schemes)?;
    if let Some(scheme) = &diff.default_scheme {
        map.default_scheme.clone_from(scheme);
    }
    apply_changes(&mut map.groups, &diff.groups)?;
    for change in &diff.slots {
        let group = map.groups.get_mut(&change.group);
        let slot = group.and_then(|group| group.slots.get_mut(usize::from(change.slot)));
        *slot.ok_or(MapError::Diff("changes a slot that the map does not have"))? = change.to;
    }
    let count = usize::try_from(diff.shard_count).unwrap_or(usize::MAX);
    if count > usize::from(HASH_SLOTS) + 1 {
        return Err(MapError::TooManyShards(count));
    }
    map.shards.truncate(count);
    for (shard, replicas) in &diff.shards {
        let (number, known) = (usize::from(shard.0), map.shards.len());
        match map.shards.get_mut(number) {
            Some(place) => place.clone_from(replicas),
            // In order of their numbers, so each new one is the next or leaves a gap.
            None if number == known => map.shards.push(replicas.clone()),
            None => return Err(MapError::Diff("leaves out a shard")),
        }
    }
    if map.shards.len() != count {
        return Err(MapError::Diff("has another number of shards than it says"));
    }
    if let Some(slot_shards) = &diff.slot_shards {
        map.slot_shards.clone_from(slot_shards);
    }
    map.validate()?;
    Ok(map)
}

fn is_same_but_for_slots(before: &PlacementGroup, after: &PlacementGroup) -> bool {
    before.scheme == after.scheme
        && before.slots.len() == after.slots.len()
        && after.slots.len() <= usize::from(u8::MAX)
}

fn gone<K: Ord + Clone, V>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Vec<K> {
    old.keys().filter(|key| !new.contains_key(key)).cloned().collect()
}

fn changes<K: Ord + Clone, V: PartialEq + Clone>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Changes<K, V> {
    let changed = new.iter().filter(|(key, value)| old.get(key) != Some(value));
    Changes { set: changed.map(|(key, value)| (key.clone(), value.clone())).collect(), gone: gone(old, new) }
}

fn apply_changes<K: Ord + Clone, V: Clone>(map: &mut BTreeMap<K, V>, changes: &Changes<K, V>) -> Result<(), MapError> {
    for key in &changes.gone {
        map.remove(key).ok_or(MapError::Diff("takes away what the map does not have"))?;
    }
    map.extend(changes.set.iter().map(|(key, value)| (key.clone(), value.clone())));
    Ok(())
}
