//! Pure: to which feature level the shards can be raised, or why not.
//!
//! A replica whose build does not know the level of its shard stops. So a level is raised only when every disk node
//! that may hold a replica has said that it knows it: one that is silent may run an older release.

use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use std::collections::{BTreeMap, BTreeSet};

/// What the shards and the disk nodes said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// The level of each shard that answered.
    pub shards: BTreeMap<ShardId, u32>,
    /// The highest level that the build of each disk's node knows, of those that answer.
    pub disks: BTreeMap<DiskId, u32>,
    /// The highest level that the gateway's own build knows.
    pub gateway: u32,
}

/// What is to be raised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The highest level that all builds know.
    pub level: u32,
    /// Shards with a lower one, and which.
    pub raise: Vec<(ShardId, u32)>,
}

/// Why no shard can be raised. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// Disk nodes that may hold a replica do not answer.
    #[error("it is not known which release runs on disks {}: start their nodes, or drain or replace them", list(.0))]
    SilentDisks(Vec<DiskId>),
    /// Shards do not answer.
    #[error("shards {} do not answer; try again when they have a leader, see `granary status`", list(.0))]
    SilentShards(Vec<ShardId>),
}

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// The shards that can be raised to the highest level that all builds know: those of the gateway and of all disks in
/// service that have the metadata role or are members of a shard. A plan without shards: there is nothing to raise.
///
/// # Errors
/// [`LevelError`] when a disk or a shard that counts is silent.
pub fn plan(map: &ClusterMap, known: &Known) -> Result<Plan, LevelError> {
    let members: BTreeSet<DiskId> = map.shards.iter().flat_map(|shard| shard.members.iter().copied()).collect();
    let holders = (map.disks.values())
        .filter(|disk| members.contains(&disk.id) || (disk.roles.metadata && disk.state != DiskState::Out))
        .map(|disk| disk.id);
    let (mut level, mut silent) = (known.gateway, Vec::new());
    for disk in holders {
        match known.disks.get(&disk) {
            Some(knows) => level = level.min(*knows),
            None => silent.push(disk),
        }
    }
    if !silent.is_empty() {
        return Err(LevelError::SilentDisks(silent));
    }
    let (mut raise, mut silent) = (Vec::new(), Vec::new());
    for (number, _) in (0u16..).zip(&map.shards) {
        let shard = ShardId(number);
        match known.shards.get(&shard) {
            Some(has) if *has < level => raise.push((shard, *has)),
            Some(_) => {}
            None => silent.push(shard),
        }
    }
    if silent.is_empty() {
        Ok(Plan { level, raise })
    } else {
        Err(LevelError::SilentShards(silent))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::change::drain;
    use super::super::form::tests::cluster;
    use super::*;

    fn known(map: &ClusterMap, shards: u32, disks: u32, gateway: u32) -> Known {
        let shards = (0u16..).zip(&map.shards).map(|(number, _)| (ShardId(number), shards)).collect();
        Known { shards, disks: map.disks.keys().map(|disk| (*disk, disks)).collect(), gateway }
    }

    #[test]
    fn shards_are_raised_to_what_every_build_knows_and_no_further() {
        let map = cluster(8);
        let all = map.shards.len();
        // (shards, disk nodes, gateway) and what follows: (level, shards to raise)
        let table = [
            ((1, 1, 1), (1, 0)),
            ((1, 2, 1), (1, 0)),
            ((1, 1, 2), (1, 0)),
            ((1, 2, 2), (2, all)),
            ((1, 4, 3), (3, all)),
            ((2, 2, 2), (2, 0)),
            ((3, 2, 2), (2, 0)),
        ];
        for ((shards, disks, gateway), expected) in table {
            let plan = plan(&map, &known(&map, shards, disks, gateway)).unwrap();
            assert_eq!((plan.level, plan.raise.len()), expected, "{shards} {disks} {gateway}");
            assert!(plan.raise.iter().all(|(_, has)| *has == shards));
        }
        let mut one_old = known(&map, 1, 2, 2);
        one_old.disks.insert(map.shards[0].members[0], 1);
        assert_eq!(plan(&map, &one_old).unwrap(), Plan { level: 1, raise: Vec::new() }, "one replica is enough");
        let mut one_raised = known(&map, 1, 2, 2);
        one_raised.shards.insert(ShardId(0), 2);
        let raise = plan(&map, &one_raised).unwrap().raise;
        assert_eq!((raise.len(), raise[0].0), (all - 1, ShardId(1)), "one that was raised before is left alone");
    }

    #[test]
    fn whoever_may_hold_a_replica_and_is_silent_stops_it() {
        let map = cluster(8);
        let disk = map.shards[0].members[0];
        let mut silent = known(&map, 1, 2, 2);
        silent.disks.remove(&disk);
        assert_eq!(plan(&map, &silent), Err(LevelError::SilentDisks(vec![disk])));
        // A disk that is draining holds replicas until others have them.
        let draining = drain(&map, disk).unwrap();
        assert_eq!(plan(&draining, &silent), Err(LevelError::SilentDisks(vec![disk])));
        // One that is out holds none.
        let mut out = draining.clone();
        out.disks.get_mut(&disk).unwrap().state = DiskState::Out;
        assert_eq!(plan(&out, &silent).unwrap().level, 2);
        let mut silent = known(&map, 1, 2, 2);
        silent.shards.remove(&ShardId(0));
        assert_eq!(plan(&map, &silent), Err(LevelError::SilentShards(vec![ShardId(0)])));
    }
}
