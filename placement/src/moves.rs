//! What changes between two maps: the moves that the healer and the shard hosts carry out.

use crate::id::{DiskId, PlacementGroupId, ShardId};
use crate::map::ClusterMap;

/// One slot of one group that changes its disk: every chunk of it is to come into being on `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Move {
    /// The group.
    pub group: PlacementGroupId,
    /// Index into its slots.
    pub slot: usize,
    /// The current disk of the slot in the old map.
    pub from: DiskId,
    /// The current disk of the slot in the new map.
    pub to: DiskId,
}

/// One change of a shard's members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaMove {
    /// The shard.
    pub shard: ShardId,
    /// The member that leaves; None when the shard grows.
    pub from: Option<DiskId>,
    /// The member that joins; None when the shard shrinks.
    pub to: Option<DiskId>,
}

/// Slots whose current disk differs, in order of group and slot. Groups that only one of the maps has are no moves: a
/// new group is empty, and groups are never removed.
pub fn moves(old: &ClusterMap, new: &ClusterMap) -> Vec<Move> {
    let mut moves = Vec::new();
    for (&group, before) in &old.groups {
        let Some(after) = new.group(group) else { continue };
        for (slot, (before, after)) in before.slots.iter().zip(&after.slots).enumerate() {
            let (from, to) = (before.current, after.current);
            if from != to {
                moves.push(Move { group, slot, from, to });
            }
        }
    }
    moves
}

/// Members that differ, in order of shard. The order of members in a shard means nothing here.
pub fn replica_moves(old: &ClusterMap, new: &ClusterMap) -> Vec<ReplicaMove> {
    let mut moves = Vec::new();
    for (number, (before, after)) in old.shards.iter().zip(&new.shards).enumerate() {
        let Ok(number) = u16::try_from(number) else { break };
        let mut leaving = before.members.iter().copied().filter(|disk| !after.members.contains(disk));
        let mut joining = after.members.iter().copied().filter(|disk| !before.members.contains(disk));
        loop {
            let (from, to) = (leaving.next(), joining.next());
            if from.is_none() && to.is_none() {
                break;
            }
            moves.push(ReplicaMove { shard: ShardId(number), from, to });
        }
    }
    moves
}
