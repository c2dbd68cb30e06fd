//! A replica's timers stop and start here; when, is decided in [`crate::sleep`].

use super::types::TypeConfig;
use super::{leader_of, Replica};
use crate::message::{Asleep, ReplicaId};
use crate::sleep::{Facts, Rest};
use granary_placement::id::DiskId;
use openraft::RaftMetrics;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How a replica rests, and what would have woken it.
pub(super) struct RestState {
    rest: Rest,
    /// Commands and changes of members it was given.
    commands: u64,
}

impl RestState {
    pub(super) fn awake() -> Mutex<RestState> {
        Mutex::new(RestState { rest: Rest::Awake, commands: 0 })
    }
}

impl Replica {
    fn rest_state(&self) -> MutexGuard<'_, RestState> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What [`crate::sleep`] decides by.
    pub fn facts(&self) -> Facts {
        let (rest, commands) = {
            let state = self.rest_state();
            (state.rest, state.commands)
        };
        self.metrics(|metrics| self.facts_by(metrics, rest, commands)).unwrap_or_else(|_| Facts {
            shard: self.shard,
            running: false,
            leads: false,
            leader: None,
            term: 0,
            last: 0,
            applied: 0,
            settled: false,
            others: BTreeSet::new(),
            rest,
            commands,
        })
    }

    fn facts_by(&self, metrics: &RaftMetrics<TypeConfig>, rest: Rest, commands: u64) -> Facts {
        let last = metrics.last_log_index.unwrap_or(0);
        let membership = &metrics.membership_config;
        let others: BTreeSet<ReplicaId> = membership.nodes().map(|(id, ())| *id).filter(|id| *id != self.me).collect();
        let leads = metrics.state.is_leader();
        let settled = leads
            && membership.get_joint_config().len() == 1
            && membership.log_id() == metrics.committed_membership_config.log_id()
            && others.iter().all(|node| {
                let matched = metrics.replication.as_ref().and_then(|replication| replication.get(node));
                matched.and_then(Option::as_ref).is_some_and(|matched| matched.index == last)
            });
        Facts {
            shard: self.shard,
            running: metrics.running_state.is_ok(),
            leads,
            leader: leader_of(metrics.current_leader),
            term: metrics.current_term,
            last,
            applied: metrics.last_applied.as_ref().map_or(0, |applied| applied.index),
            settled,
            others: others.into_iter().map(|id| id.disk).filter(|disk| *disk != self.me.disk).collect(),
            rest,
            commands,
        }
    }

    /// Starts the timers, if they stand still. The next tick comes within a fifth of the heartbeat interval.
    pub fn wake(&self, why: &str) {
        let mut state = self.rest_state();
        self.wake_locked(&mut state, why);
    }

    /// To be called before anything is put into the log: a sleep that was decided before it is not begun after it.
    pub(super) fn wake_for_command(&self) {
        let mut state = self.rest_state();
        state.commands += 1;
        self.wake_locked(&mut state, "a command");
    }

    fn wake_locked(&self, state: &mut RestState, why: &str) {
        if state.rest != Rest::Awake {
            state.rest = Rest::Awake;
            let _ = self.raft.look(|raft| raft.runtime_config().tick(true));
            tracing::debug!(shard = %self.shard, why, "awake");
        }
    }

    /// An append was taken: it wakes a replica unless it is an empty one (a read barrier's) of the leader it sleeps
    /// under.
    pub(super) fn wake_after_append(&self, term: u64, from: ReplicaId, has_entries: bool) {
        let mut state = self.rest_state();
        let expected = matches!(state.rest, Rest::Following { leader, term: known }
            if leader == from.disk && known == term && !has_entries);
        if !expected {
            self.wake_locked(&mut state, "an append");
        }
    }

    /// Stops the timers of a leader, unless it was given a command meanwhile.
    pub fn sleep_as_leader(&self, at: &Asleep, commands: u64) {
        let facts = self.facts();
        let mut state = self.rest_state();
        let as_decided = facts.leads && facts.settled && (facts.term, facts.last) == (at.term, at.index);
        if as_decided && state.rest == Rest::Awake && state.commands == commands {
            state.rest = Rest::Leading { term: at.term };
            let _ = self.raft.look(|raft| raft.runtime_config().tick(false));
            tracing::debug!(shard = %self.shard, "asleep as leader");
        }
    }

    /// Stops the timers of a follower.
    pub fn sleep_as_follower(&self, at: &Asleep, leader: DiskId) {
        let facts = self.facts();
        let mut state = self.rest_state();
        let as_decided =
            !facts.leads && facts.leader == Some(leader) && (facts.term, facts.last) == (at.term, at.index);
        if as_decided && state.rest == Rest::Awake {
            state.rest = Rest::Following { leader, term: at.term };
            let _ = self.raft.look(|raft| raft.runtime_config().tick(false));
            tracing::debug!(shard = %self.shard, %leader, "asleep as follower");
        }
    }
}
