//! Read barriers ask no more followers than they need.
//!
//! A barrier needs the word of half of the others. It asks so many at once, always the same ones while they answer;
//! the heartbeats to the rest wait for company as those of timers do. When one that was asked fails, or takes longer
//! than `node.read_hedge`, everybody is asked at once, and whoever kept a barrier waiting comes last for
//! [`SLOW_FOR`]. Whose word counts, and since when, is decided by the Raft library alone.

use crate::message::ReplicaId;
use granary_placement::id::DiskId;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How long one that kept a barrier waiting is asked after the others.
const SLOW_FOR: Duration = Duration::from_secs(5);

/// The barriers of one shard that are under way, and whom they ask.
#[derive(Default)]
pub struct Barriers {
    state: Mutex<State>,
    failed: Notify,
}

#[derive(Default)]
struct State {
    under_way: usize,
    /// How many of them ask everybody.
    of_all: usize,
    /// Whom the latest barrier asked first.
    first: Vec<ReplicaId>,
    answered: BTreeMap<ReplicaId, Instant>,
    slow_since: BTreeMap<ReplicaId, Instant>,
}

/// One barrier; it is under way while this lives.
pub struct Barrier<'a> {
    barriers: &'a Barriers,
    begun: Instant,
    first: Vec<ReplicaId>,
    asks_all: bool,
}

/// Whom `me` asks first: as many of the other voters as make a majority with it, those after it in turn, so that
/// leaders on different disks ask different ones; those that were slow lately come last. Nobody means everybody.
fn whom_first(me: ReplicaId, voters: &[ReplicaId], is_slow: impl Fn(&ReplicaId) -> bool) -> Vec<ReplicaId> {
    let mut others: Vec<ReplicaId> = voters.iter().copied().filter(|voter| *voter != me).collect();
    others.sort_unstable_by_key(|voter| (is_slow(voter), *voter < me, *voter));
    others.truncate(voters.len() / 2);
    others
}

impl Barriers {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a barrier of `me`, the leader. `voters` is None while a change of members is under way: then the majority
    /// is not known here, and everybody is asked.
    pub fn begin(&self, me: ReplicaId, voters: Option<&[ReplicaId]>) -> Barrier<'_> {
        let now = Instant::now();
        let mut state = self.state();
        state.slow_since.retain(|_, since| now.duration_since(*since) < SLOW_FOR);
        let first = voters.map(|voters| whom_first(me, voters, |voter| state.slow_since.contains_key(voter)));
        let asks_all = first.is_none();
        let first = first.unwrap_or_default();
        state.first.clone_from(&first);
        state.under_way += 1;
        state.of_all += usize::from(asks_all);
        state.answered.retain(|follower, _| voters.is_none_or(|voters| voters.contains(follower)));
        Barrier { barriers: self, begun: now, first, asks_all }
    }

    /// Does a barrier wait for the heartbeat to this follower?
    pub fn wait_for(&self, follower: ReplicaId) -> bool {
        let state = self.state();
        state.of_all > 0 || (state.under_way > 0 && state.first.contains(&follower))
    }

    /// Does a barrier wait for the heartbeat to the follower on this disk?
    pub fn wait_for_disk(&self, disk: DiskId) -> bool {
        let state = self.state();
        state.of_all > 0 || (state.under_way > 0 && state.first.iter().any(|follower| follower.disk == disk))
    }

    /// Notes the end of a heartbeat to this follower.
    pub fn note(&self, follower: ReplicaId, has_answered: bool) {
        let mut state = self.state();
        if has_answered {
            state.answered.insert(follower, Instant::now());
        } else if state.under_way > 0 && state.first.contains(&follower) {
            drop(state);
            self.failed.notify_waiters();
        }
    }
}

impl Barrier<'_> {
    /// Returns when those that were asked first are not to be waited for any longer.
    pub async fn is_late(&self, hedge: Duration) {
        tokio::select! {
            () = tokio::time::sleep(hedge) => {}
            () = self.barriers.failed.notified() => {}
        }
    }

    /// From now on everybody is asked, and who has not answered since this barrier began comes last for a while.
    pub fn ask_all(&mut self) {
        let now = Instant::now();
        let mut state = self.barriers.state();
        if !self.asks_all {
            self.asks_all = true;
            state.of_all += 1;
        }
        let late: Vec<ReplicaId> = self
            .first
            .iter()
            .copied()
            .filter(|asked| state.answered.get(asked).is_none_or(|at| *at < self.begun))
            .collect();
        state.slow_since.extend(late.into_iter().map(|asked| (asked, now)));
    }
}

impl Drop for Barrier<'_> {
    fn drop(&mut self) {
        let mut state = self.barriers.state();
        state.under_way -= 1;
        state.of_all -= usize::from(self.asks_all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use granary_placement::id::DiskId;

    fn replica(disk: u32) -> ReplicaId {
        ReplicaId { disk: DiskId(disk), incarnation: 7 }
    }

    fn disks(found: Vec<ReplicaId>) -> Vec<u32> {
        found.into_iter().map(|replica| replica.disk.0).collect()
    }

    #[test]
    fn a_barrier_asks_as_many_as_it_needs_in_turn_and_slow_ones_last() {
        let five: Vec<ReplicaId> = (1..=5).map(replica).collect();
        let none = |_: &ReplicaId| false;
        assert_eq!(disks(whom_first(replica(1), &five, none)), [2, 3]);
        assert_eq!(disks(whom_first(replica(4), &five, none)), [5, 1]);
        assert_eq!(disks(whom_first(replica(4), &five, |voter| voter.disk.0 == 5)), [1, 2]);
        assert_eq!(disks(whom_first(replica(4), &five, |_| true)), [5, 1]);
        assert_eq!(disks(whom_first(replica(2), &five[..2], none)), [1]);
        assert_eq!(disks(whom_first(replica(1), &five[..1], none)), [] as [u32; 0]);
        // Four voters: a majority is three of them.
        assert_eq!(disks(whom_first(replica(1), &five[..4], none)), [2, 3]);
    }

    #[test]
    fn everybody_is_asked_when_one_is_late_or_members_change() {
        let barriers = Barriers::default();
        let five: Vec<ReplicaId> = (1..=5).map(replica).collect();
        let waited =
            |barriers: &Barriers| -> Vec<u32> { (2..=5).filter(|disk| barriers.wait_for(replica(*disk))).collect() };
        assert_eq!(waited(&barriers), [] as [u32; 0]);
        let mut one = barriers.begin(replica(1), Some(&five));
        assert_eq!(waited(&barriers), [2, 3]);
        barriers.note(replica(2), true);
        one.ask_all();
        assert_eq!(waited(&barriers), [2, 3, 4, 5]);
        drop(one);
        assert_eq!(waited(&barriers), [] as [u32; 0]);
        // 3 did not answer: 4 takes its place. 2 did.
        let two = barriers.begin(replica(1), Some(&five));
        assert_eq!(waited(&barriers), [2, 4]);
        let three = barriers.begin(replica(1), None);
        assert_eq!(waited(&barriers), [2, 3, 4, 5]);
        drop((two, three));
        assert_eq!(waited(&barriers), [] as [u32; 0]);
    }

    #[tokio::test]
    async fn a_failure_ends_the_wait_for_those_asked_first() {
        let barriers = Barriers::default();
        let five: Vec<ReplicaId> = (1..=5).map(replica).collect();
        let one = barriers.begin(replica(1), Some(&five));
        let late = one.is_late(Duration::from_secs(600));
        tokio::pin!(late);
        assert!(futures::poll!(&mut late).is_pending());
        barriers.note(replica(4), false);
        assert!(futures::poll!(&mut late).is_pending(), "one that was not asked failed");
        barriers.note(replica(2), false);
        assert!(futures::poll!(&mut late).is_ready());
    }
}
