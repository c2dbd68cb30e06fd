//! To which feature level the shards can be raised, or why not: [`plan`], which is pure. [`raise`] does it.
//!
//! A replica whose build does not know the level of its shard stops, and a disk node whose build does not know what a
//! map of that level says can read none any more. So a level is raised only when every disk node has said that it knows
//! it: one that is silent may run an older release. Gateways are for the operator to know: disk nodes refuse older ones
//! from then on.

use crate::shards::buckets::{odd_answer, odd_reply};
use crate::shards::{ShardError, Shards};
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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
    /// Disk nodes do not answer.
    #[error("it is not known which release runs on disks {}: start their nodes, or drain or replace them", list(.0))]
    SilentDisks(Vec<DiskId>),
    /// Shards do not answer.
    #[error("shards {} do not answer; try again when they have a leader, see `granary status`", list(.0))]
    SilentShards(Vec<ShardId>),
}

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// The shards that can be raised to the highest level that all builds know: those of the gateway, of all disks that are
/// not out for good, and of members of a shard. A plan without shards: there is nothing to raise.
///
/// # Errors
/// [`LevelError`] when a disk or a shard that counts is silent.
pub fn plan(map: &ClusterMap, known: &Known) -> Result<Plan, LevelError> {
    let members: BTreeSet<DiskId> = map.shards.iter().flat_map(|shard| shard.members.iter().copied()).collect();
    let readers = (map.disks.values())
        .filter(|disk| members.contains(&disk.id) || disk.state != DiskState::Out)
        .map(|disk| disk.id);
    let (mut level, mut silent) = (known.gateway, Vec::new());
    for disk in readers {
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

/// How long a shard may take to tell its feature level.
const ASK: Duration = Duration::from_secs(5);

/// A shard that was not raised. Those before it in the plan were.
#[derive(Debug, thiserror::Error)]
#[error("shard {shard} was not raised to feature level {level}: {source}; try again")]
pub struct NotRaised {
    shard: ShardId,
    level: u32,
    source: ShardError,
}

/// The level of a shard.
///
/// # Errors
/// It does not answer.
pub async fn of_shard(shards: &Shards, shard: ShardId) -> Result<u32, ShardError> {
    match shards.query(shard, Query::FeatureLevel).await? {
        Answer::FeatureLevel(level) => Ok(level),
        other => Err(odd_answer(shard, &other)),
    }
}

/// The level of every shard that answers.
pub async fn of_shards(shards: &Shards, map: &ClusterMap) -> BTreeMap<ShardId, u32> {
    let ask = (0u16..).zip(&map.shards).map(|(number, _)| ShardId(number)).map(|shard| async move {
        let level = tokio::time::timeout(ASK, of_shard(shards, shard)).await.ok()?.ok()?;
        Some((shard, level))
    });
    futures::future::join_all(ask).await.into_iter().flatten().collect()
}

/// Raises the shards of a plan, level by level; answers which.
///
/// # Errors
/// [`NotRaised`]: the plan is to be made anew.
pub async fn raise(shards: &Shards, plan: &Plan) -> Result<Vec<ShardId>, NotRaised> {
    for (shard, from) in &plan.raise {
        for level in *from + 1..=plan.level {
            let done = shards.command(*shard, Command::SetFeatureLevel { level }).await;
            tracing::debug!(shard = shard.0, level, result = ?done, "a feature level is raised");
            let reply = done.and_then(|reply| match reply {
                Reply::Done => Ok(()),
                other => Err(odd_reply(*shard, &other)),
            });
            reply.map_err(|source| NotRaised { shard: *shard, level, source })?;
        }
    }
    if !plan.raise.is_empty() {
        tracing::info!(shards = plan.raise.len(), level = plan.level, "the feature level was raised");
    }
    Ok(plan.raise.iter().map(|(shard, _)| *shard).collect())
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
    fn whoever_reads_maps_and_is_silent_stops_it() {
        let map = cluster(8);
        let disk = map.shards[0].members[0];
        let mut silent = known(&map, 1, 2, 2);
        silent.disks.remove(&disk);
        assert_eq!(plan(&map, &silent), Err(LevelError::SilentDisks(vec![disk])));
        // So does one that holds chunks only: it is told the map all the same.
        let storage = DiskId(6);
        let mut chunks_only = map.clone();
        chunks_only.disks.get_mut(&storage).unwrap().roles.metadata = false;
        chunks_only.shards.iter_mut().for_each(|shard| shard.members = (1..=5).map(DiskId).collect());
        let mut quiet = known(&map, 1, 2, 2);
        quiet.disks.remove(&storage);
        assert_eq!(plan(&chunks_only, &quiet), Err(LevelError::SilentDisks(vec![storage])));
        quiet.disks.insert(storage, 1);
        assert_eq!(plan(&chunks_only, &quiet).unwrap(), Plan { level: 1, raise: Vec::new() });
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
