//! The next step from the members a shard has to those the cluster map wants, as a value.
//!
//! The map names disks; Raft's members are replicas. A disk whose metadata were lost comes back with another replica,
//! which is a new member like any other: it learns the log first, and then takes the place of the old one.

use crate::message::ReplicaId;
use granary_placement::id::DiskId;
use std::collections::{BTreeMap, BTreeSet};

/// How the members of a shard stand, as its leader knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// Those that vote.
    pub voters: BTreeSet<ReplicaId>,
    /// Voters and learners.
    pub nodes: BTreeSet<ReplicaId>,
    /// How many entries of the log each is known to have. The leader's own are not in it.
    pub matched: BTreeMap<ReplicaId, u64>,
    /// How many entries the leader has.
    pub entries: u64,
    /// A learner may lack so many and still become a voter.
    pub lag: u64,
}

impl Standing {
    fn has_caught_up(&self, id: &ReplicaId) -> bool {
        let matched = self.matched.get(id).copied().unwrap_or(0);
        matched > 0 && matched + self.lag >= self.entries
    }
}

/// What the leader does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The members are as wanted.
    Done,
    /// Nothing can be done until a learner has caught up or a disk is known.
    Wait,
    /// Have it learn.
    AddLearner(ReplicaId),
    /// Make these the voters, by joint consensus.
    ChangeVoters(BTreeSet<ReplicaId>),
    /// Let go of these learners.
    Remove(BTreeSet<ReplicaId>),
}

/// The next step. `wanted` has the replica that is on each disk the map names; None where none is known.
///
/// A disk that is not ready holds up no other: those that are become voters, and as many of the old voters as there are
/// disks missing stay, those with most of the log first. So the shard never has fewer voters than it had, unless fewer
/// are wanted.
pub fn next_step(wanted: &BTreeMap<DiskId, Option<ReplicaId>>, standing: &Standing) -> Step {
    let known: BTreeSet<ReplicaId> = wanted.values().copied().flatten().collect();
    if let Some(new) = known.difference(&standing.nodes).next() {
        return Step::AddLearner(*new);
    }
    let ready: BTreeSet<ReplicaId> =
        known.iter().filter(|id| standing.voters.contains(id) || standing.has_caught_up(id)).copied().collect();
    if ready.is_empty() {
        return Step::Wait;
    }
    let mut old: Vec<&ReplicaId> = standing.voters.difference(&ready).collect();
    old.sort_by_key(|id| std::cmp::Reverse(standing.matched.get(id).copied().unwrap_or(standing.entries)));
    let kept = old.into_iter().take(wanted.len() - ready.len()).copied();
    let voters: BTreeSet<ReplicaId> = ready.iter().copied().chain(kept).collect();
    if voters != standing.voters {
        return Step::ChangeVoters(voters);
    }
    let is_unknown = |id: &ReplicaId| wanted.get(&id.disk).is_some_and(Option::is_none);
    let stale: BTreeSet<ReplicaId> = standing
        .nodes
        .iter()
        .filter(|id| !standing.voters.contains(id) && !known.contains(id) && !is_unknown(id))
        .copied()
        .collect();
    if !stale.is_empty() {
        return Step::Remove(stale);
    }
    if known.len() == wanted.len() && known == standing.voters {
        Step::Done
    } else {
        Step::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Replica `incarnation` of disk `disk`.
    fn id((disk, incarnation): (u32, u64)) -> ReplicaId {
        ReplicaId { disk: DiskId(disk), incarnation }
    }

    fn ids(ids: &[(u32, u64)]) -> BTreeSet<ReplicaId> {
        ids.iter().copied().map(id).collect()
    }

    fn wanted(ids: &[(u32, u64)]) -> BTreeMap<DiskId, Option<ReplicaId>> {
        ids.iter()
            .map(|(disk, incarnation)| (DiskId(*disk), (*incarnation != 0).then(|| id((*disk, *incarnation)))))
            .collect()
    }

    /// Voters, learners, and who has how many of 100 entries.
    fn standing(voters: &[(u32, u64)], learners: &[(u32, u64)], matched: &[((u32, u64), u64)]) -> Standing {
        Standing {
            voters: ids(voters),
            nodes: ids(&[voters, learners].concat()),
            matched: matched.iter().map(|(of, entries)| (id(*of), *entries)).collect(),
            entries: 100,
            lag: 10,
        }
    }

    const OLD: [(u32, u64); 3] = [(1, 1), (2, 1), (3, 1)];

    #[test]
    fn an_empty_replica_learns_before_it_takes_the_place_of_the_one_that_was_lost() {
        let want = wanted(&[(1, 1), (2, 1), (3, 2)]);
        assert_eq!(next_step(&want, &standing(&OLD, &[], &[])), Step::AddLearner(id((3, 2))));
        let learning = standing(&OLD, &[(3, 2)], &[((2, 1), 100), ((3, 1), 100), ((3, 2), 80)]);
        assert_eq!(next_step(&want, &learning), Step::Wait);
        let learned = standing(&OLD, &[(3, 2)], &[((2, 1), 100), ((3, 1), 100), ((3, 2), 90)]);
        assert_eq!(next_step(&want, &learned), Step::ChangeVoters(ids(&[(1, 1), (2, 1), (3, 2)])));
        let done = standing(&[(1, 1), (2, 1), (3, 2)], &[], &[]);
        assert_eq!(next_step(&want, &done), Step::Done);
    }

    #[test]
    fn a_learner_that_never_catches_up_blocks_no_other() {
        let want = wanted(&[(1, 1), (4, 1), (5, 1)]);
        let half = standing(&OLD, &[(4, 1), (5, 1)], &[((2, 1), 40), ((3, 1), 99), ((4, 1), 100), ((5, 1), 0)]);
        assert_eq!(next_step(&want, &half), Step::ChangeVoters(ids(&[(1, 1), (3, 1), (4, 1)])), "3 has more than 2");
        let after = standing(&[(1, 1), (3, 1), (4, 1)], &[(5, 1)], &[((3, 1), 99), ((4, 1), 100), ((5, 1), 0)]);
        assert_eq!(next_step(&want, &after), Step::Wait);
    }

    #[test]
    fn a_disk_that_is_not_known_yet_holds_up_no_other_and_loses_no_learner() {
        let want = wanted(&[(1, 1), (4, 1), (5, 0)]);
        let half = standing(&OLD, &[(4, 1), (5, 3)], &[((2, 1), 100), ((3, 1), 100), ((4, 1), 100)]);
        let Step::ChangeVoters(voters) = next_step(&want, &half) else { panic!() };
        assert!(voters.len() == 3 && voters.is_superset(&ids(&[(1, 1), (4, 1)])), "{voters:?}");
        let after = standing(&[(1, 1), (2, 1), (4, 1)], &[(5, 3)], &[((2, 1), 100), ((4, 1), 100)]);
        assert_eq!(next_step(&want, &after), Step::Wait);
    }

    #[test]
    fn learners_that_nobody_wants_go() {
        let want = wanted(&OLD);
        assert_eq!(next_step(&want, &standing(&OLD, &[(3, 7), (6, 1)], &[])), Step::Remove(ids(&[(3, 7), (6, 1)])));
        assert_eq!(next_step(&want, &standing(&OLD, &[], &[])), Step::Done);
    }

    #[test]
    fn fewer_voters_only_when_fewer_are_wanted() {
        assert_eq!(
            next_step(&wanted(&[(1, 1), (2, 1)]), &standing(&OLD, &[], &[])),
            Step::ChangeVoters(ids(&OLD[..2]))
        );
        assert_eq!(next_step(&wanted(&[(4, 0), (5, 0)]), &standing(&OLD, &[], &[])), Step::Wait);
        let grows = standing(&OLD[..1], &[(2, 1), (3, 1)], &[((2, 1), 100)]);
        assert_eq!(next_step(&wanted(&OLD), &grows), Step::ChangeVoters(ids(&OLD[..2])));
    }
}
