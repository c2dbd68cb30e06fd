//! Who belongs to a replica's shard: what its leader sees, and the steps it takes.

use super::containment::ReplicaEnded;
use super::types::{membership_to_wire, TypeConfig};
use super::{Raft, Replica};
use crate::members::{next_step, Standing, Step};
use crate::message::{ReplicaId, WireMembership};
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::ShardStatus;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{ChangeMembers, RaftMetrics, ServerState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// How many entries a learner may lack when it becomes a voter, at most.
const MAX_LAG: u64 = 64;
/// How long a leader leads before it hands over because its log is long: several looks of its followers at theirs.
const TURN: Duration = Duration::from_secs(3);
/// How much log a shard keeps on a full disk, in bytes.
const SHORT_LOG_BYTES: u64 = 2 * 1024 * 1024;

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It leads, or believes so.
    Leader,
    /// It follows a leader.
    Follower,
    /// It stands for election.
    Candidate,
    /// It has no vote.
    Learner,
    /// Its data cannot be used.
    Stopped,
    /// It failed, and is opened again after a pause.
    Failed,
}

impl Phase {
    /// The word for it in a status.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Leader => "leader",
            Phase::Follower => "follower",
            Phase::Candidate => "candidate",
            Phase::Learner => "learner",
            Phase::Stopped => "stopped",
            Phase::Failed => "failed",
        }
    }

    /// Does it take part in its shard?
    pub fn runs(self) -> bool {
        !matches!(self, Phase::Stopped | Phase::Failed)
    }

    fn of(metrics: &RaftMetrics<TypeConfig>) -> Phase {
        match (&metrics.running_state, metrics.state) {
            (Err(_), _) | (_, ServerState::Shutdown) => Phase::Stopped,
            (_, ServerState::Learner) => Phase::Learner,
            (_, ServerState::Follower) => Phase::Follower,
            (_, ServerState::Candidate) => Phase::Candidate,
            (_, ServerState::Leader) => Phase::Leader,
        }
    }
}

/// The status of a replica that does not run.
pub fn out_of_service(shard: ShardId, phase: Phase) -> ShardStatus {
    ShardStatus {
        shard,
        state: phase.word().to_owned(),
        term: 0,
        leader: None,
        last_log_index: 0,
        applied_index: 0,
        voters: Vec::new(),
    }
}

/// How many entries of the log each other member is known to have.
fn matched(metrics: &RaftMetrics<TypeConfig>) -> BTreeMap<ReplicaId, u64> {
    let replication = metrics.replication.iter().flatten();
    replication.map(|(id, last)| (*id, last.as_ref().map_or(0, |last| last.index + 1))).collect()
}

impl Replica {
    /// Looks at what the library says of itself.
    pub(super) fn metrics<T>(&self, look: impl FnOnce(&RaftMetrics<TypeConfig>) -> T) -> Result<T, ReplicaEnded> {
        self.raft.look(|raft| {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            look(&metrics)
        })
    }

    /// Members as last committed here, voters and learners.
    pub(super) fn committed_members(&self) -> WireMembership {
        self.metrics(|metrics| membership_to_wire(metrics.committed_membership_config.membership())).unwrap_or_default()
    }

    /// Voters and learners as last written here, committed or not.
    pub fn nodes(&self) -> BTreeSet<ReplicaId> {
        self.metrics(|metrics| metrics.membership_config.nodes().map(|(id, ())| *id).collect()).unwrap_or_default()
    }

    /// Its voters; None while they change.
    pub(super) fn settled_voters(&self) -> Option<Vec<ReplicaId>> {
        let look = |metrics: &RaftMetrics<TypeConfig>| match metrics.membership_config.membership().get_joint_config() {
            joint if joint.len() == 1 => Some(metrics.membership_config.voter_ids().collect()),
            _ => None,
        };
        self.metrics(look).ok().flatten()
    }

    /// The voters as last written here.
    pub fn voters(&self) -> BTreeSet<ReplicaId> {
        self.metrics(|metrics| metrics.membership_config.voter_ids().collect()).unwrap_or_default()
    }

    /// Does it believe to lead?
    pub fn is_leader(&self) -> bool {
        self.raft.look(Raft::is_leader).unwrap_or(false)
    }

    /// Has it neither a log nor a vote? By the log itself: the library's metrics say so of every replica for a moment
    /// after it was opened.
    pub fn is_empty(&self) -> bool {
        self.log.is_empty()
    }

    /// Has it entries, or had it?
    pub fn has_log(&self) -> bool {
        self.log.has_entries()
    }

    /// One step towards the replicas on these disks, if this replica leads: see [`next_step`]. True when the members
    /// are as wanted.
    ///
    /// # Errors
    /// The step failed; it is tried again at the next call.
    pub async fn reconcile(&self, wanted: &BTreeMap<DiskId, Option<ReplicaId>>) -> Result<bool, String> {
        if wanted.is_empty() || !self.is_leader() {
            return Ok(true);
        }
        let standing = self.metrics(|metrics| Standing {
            voters: metrics.membership_config.voter_ids().collect(),
            nodes: metrics.membership_config.nodes().map(|(id, ())| *id).collect(),
            matched: matched(metrics),
            entries: metrics.last_log_index.map_or(0, |last| last + 1),
            lag: self.timing.keep_entries.min(MAX_LAG),
        });
        let standing = standing.map_err(|error| error.to_string())?;
        let shard = self.shard;
        match next_step(wanted, &standing) {
            Step::Done => return Ok(true),
            Step::Wait => {}
            Step::AddLearner(new) => {
                self.wake_for_command();
                tracing::info!(%shard, replica = %new, "adding a replica as learner");
                let changed = self.raft.call(|raft| raft.add_learner(new, (), false)).await;
                changed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            }
            Step::ChangeVoters(voters) => {
                self.wake_for_command();
                tracing::info!(%shard, voters = ?voters.iter().map(ToString::to_string).collect::<Vec<_>>(), "changing voters");
                let changed = self.raft.call(|raft| raft.change_membership(voters, false)).await;
                changed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            }
            Step::Remove(stale) => {
                self.wake_for_command();
                tracing::info!(%shard, replicas = ?stale.iter().map(ToString::to_string).collect::<Vec<_>>(), "removing learners");
                let change = ChangeMembers::RemoveNodes(stale);
                let changed = self.raft.call(|raft| raft.change_membership(change, true)).await;
                changed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            }
        }
        Ok(false)
    }

    /// Is all that anyone was told of on a majority of the voters, of this leader and those in `present` only? It knows
    /// what was committed before once an entry of its own term is committed; what is committed later is committed
    /// without the one that is to go.
    pub fn can_spare(&self, id: ReplicaId, present: &BTreeSet<ReplicaId>) -> bool {
        self.metrics(|metrics| self.can_spare_by(metrics, id, present)).unwrap_or(false)
    }

    fn can_spare_by(&self, metrics: &RaftMetrics<TypeConfig>, id: ReplicaId, present: &BTreeSet<ReplicaId>) -> bool {
        if !metrics.state.is_leader() || metrics.membership_config.get_joint_config().len() != 1 {
            return false;
        }
        let committed = match metrics.cluster_committed.as_ref().max(metrics.last_applied.as_ref()) {
            Some(committed) if committed.leader_id.term == metrics.current_term => committed.index + 1,
            _ => return false,
        };
        let (voters, matched): (Vec<ReplicaId>, _) =
            (metrics.membership_config.voter_ids().collect(), matched(metrics));
        let has_all = |voter: &&ReplicaId| {
            **voter == self.me || present.contains(voter) && matched.get(voter).is_some_and(|has| *has >= committed)
        };
        voters.iter().filter(|voter| **voter != id).filter(has_all).count() * 2 > voters.len()
    }

    /// Keeps the log short in bytes, where few entries are many: makes the state durable and purges what it covers.
    pub async fn keep_log_short(&self, disk_is_full: bool) {
        let most_bytes = if disk_is_full { SHORT_LOG_BYTES } else { self.timing.log_bytes };
        let (_, Some(upto)) = self.log.excess(most_bytes) else { return };
        let snapshot = self.metrics(|metrics| {
            // A leader keeps what a member lacks, and asked to purge it, remembers that it was asked: it would do
            // nothing when it is asked again as a follower, who keeps nothing for others.
            let matched = matched(metrics);
            let has_it = |id: ReplicaId| id == self.me || matched.get(&id).is_some_and(|has| *has > upto);
            if metrics.state.is_leader() && !metrics.membership_config.nodes().all(|(id, ())| has_it(*id)) {
                return None;
            }
            Some(metrics.snapshot.as_ref().map_or(0, |snapshot| snapshot.index))
        });
        let Ok(Some(snapshot)) = snapshot else { return };
        // One step each time: the other is due when this one is done.
        let purge_upto = (snapshot >= upto).then(|| self.more_than_asked(upto).min(snapshot));
        let asked = self.raft.call(|raft| async move {
            match purge_upto {
                Some(upto) => raft.trigger().purge_log(upto).await,
                None => raft.trigger().snapshot().await,
            }
        });
        if let Ok(Err(error)) = asked.await {
            tracing::debug!(shard = %self.shard, %error, "the log is not shortened");
        }
    }

    /// The index to ask the library to purge up to: each time further while nothing was purged, for it ignores an index
    /// that it was asked for before.
    fn more_than_asked(&self, upto: u64) -> u64 {
        let first = self.log.first_index();
        let mut asked = self.asked_to_purge.lock().unwrap_or_else(PoisonError::into_inner);
        let more = if asked.0 == first { asked.1.saturating_mul(2).max(1) } else { 0 };
        *asked = (first, more);
        upto.saturating_add(more)
    }

    /// Bytes of the log.
    pub fn log_bytes(&self) -> u64 {
        self.log.excess(u64::MAX).0
    }

    /// Hands leadership over when the log has grown far past what snapshots should leave of it.
    ///
    /// A leader of this library keeps every entry that a voter has not acknowledged, also for one that is dead; its
    /// followers do not. So while a disk is dead the leaders take turns: the next one begins with a short log, and this
    /// one purges as a follower. A turn lasts long enough for that.
    pub async fn transfer_leadership_if_log_is_long(&self) {
        let limit = 4 * (self.timing.snapshot_entries + self.timing.keep_entries);
        let is_long = self.metrics(|metrics| {
            let purged = metrics.purged.as_ref().map_or(0, |purged| purged.index);
            let entries = metrics.last_log_index.unwrap_or(0).saturating_sub(purged);
            entries > limit || self.log.excess(self.timing.log_bytes.saturating_mul(2)).1.is_some()
        });
        if let Some(to) = self.successor(|_| true).filter(|_| self.has_led_for_a_turn() && is_long == Ok(true)) {
            tracing::info!(shard = %self.shard, %to, "handing leadership over: the log is long because a voter lags");
            self.transfer(to).await;
        }
    }

    async fn transfer(&self, to: ReplicaId) {
        let _ = self.raft.call(|raft| async move { raft.trigger().transfer_leader(to).await }).await;
    }

    /// Has it been seen to lead in this term for as long as a turn lasts?
    fn has_led_for_a_turn(&self) -> bool {
        let term = self.metrics(|metrics| metrics.state.is_leader().then_some(metrics.current_term)).ok().flatten();
        let mut led = self.led.lock().unwrap_or_else(PoisonError::into_inner);
        match (term, *led) {
            (Some(term), Some((known, since))) if term == known => since.elapsed() >= TURN,
            (Some(term), _) => {
                *led = Some((term, Instant::now()));
                false
            }
            (None, _) => {
                *led = None;
                false
            }
        }
    }

    /// As leader, hands leadership over to a voter that has nearly all of the log, if there is one.
    pub async fn hand_over(&self) {
        self.wake("it is handed over");
        if let Some(to) = self.successor(|_| true) {
            self.transfer(to).await;
        }
    }

    /// As [`Replica::hand_over`], to a voter on a disk that may lead; without one this one leads on.
    pub async fn hand_over_to(&self, may_lead: impl Fn(DiskId) -> bool) {
        if let Some(to) = self.successor(may_lead) {
            self.wake("it is handed over");
            self.transfer(to).await;
        }
    }

    /// A voter that has nearly all of this leader's log: the next after this one in the order of ids. So where several
    /// disks must not lead, they pass the shard on until it comes to one that may, and never to and fro.
    fn successor(&self, may_lead: impl Fn(DiskId) -> bool) -> Option<ReplicaId> {
        self.metrics(|metrics| self.successor_by(metrics, may_lead)).ok().flatten()
    }

    fn successor_by(&self, metrics: &RaftMetrics<TypeConfig>, may_lead: impl Fn(DiskId) -> bool) -> Option<ReplicaId> {
        if !metrics.state.is_leader() {
            return None;
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let matched = matched(metrics);
        let voters = metrics.membership_config.voter_ids().filter(|id| *id != self.me && may_lead(id.disk));
        let has_most = |has: &u64| *has > 0 && has + self.timing.keep_entries > last;
        voters.filter(|id| matched.get(id).is_some_and(has_most)).min_by_key(|id| (*id < self.me, *id))
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.metrics(Phase::of).unwrap_or(Phase::Failed)
    }

    /// How it stands.
    pub fn status(&self) -> ShardStatus {
        self.metrics(|metrics| self.status_by(metrics)).unwrap_or_else(|_| out_of_service(self.shard, Phase::Failed))
    }

    fn status_by(&self, metrics: &RaftMetrics<TypeConfig>) -> ShardStatus {
        let voters: BTreeSet<DiskId> = metrics.membership_config.voter_ids().map(|id| id.disk).collect();
        ShardStatus {
            shard: self.shard,
            state: Phase::of(metrics).word().to_owned(),
            term: metrics.current_term,
            leader: metrics.current_leader.map(|id| id.disk),
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: metrics.last_applied.as_ref().map_or(0, |applied| applied.index),
            voters: voters.into_iter().collect(),
        }
    }
}
