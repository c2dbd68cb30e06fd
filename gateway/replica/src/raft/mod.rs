//! The Raft library's door: its types, and one shard's replica behind ours. Beside `log.rs` the only place that knows
//! openraft.
//!
//! - [`machine`]: the state machine; applies entries to the state database.
//! - [`types`]: the library's types, and their conversions to ours; [`timing`]: timers.
//! - [`containment`]: a panic ends the replica and no more; [`runtime`]: its tasks are in there.
//! - [`network`]: messages to other replicas; [`heartbeats`]: those of several shards together; [`barrier`]: whom a
//!   read barrier asks.
//! - `objections`: what another replica says or answers that is not even shown to the library.
//! - [`members`]: how its leader sees them, and changes them. `rest`: a shard that sleeps stops its timers.
//! - here: [`Replica`]: propose, read barrier, incoming messages.

pub mod barrier;
pub mod containment;
pub mod heartbeats;
pub mod machine;
pub mod members;
pub mod network;
mod objections;
mod rest;
pub mod runtime;
pub mod timing;
pub mod types;

use crate::log::ShardLog;
use crate::message::{PeerMessage, PeerRequest, PeerResponse, ReplicaId};
use barrier::Barriers;
use containment::{Contained, Containment, ReplicaEnded};
use granary_meta::{BadBytes, Reply};
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::ControlError;
use machine::{Machine, SnapshotSource};
use network::{PeerLinks, Peers};
use objections::{objection, objection_to_snapshot};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use openraft::ReadPolicy;
use rest::RestState;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use timing::raft_config;
pub use timing::Timing;
use types::members_from_applied;
pub use types::{
    entry_from_wire, entry_to_wire, log_id_from_wire, log_id_to_wire, vote_from_wire, vote_to_wire, Batch, Entry,
    LogId, Replies, TypeConfig, Vote,
};

type Raft = openraft::Raft<TypeConfig, Machine>;

/// One shard's replica on this disk.
pub struct Replica {
    /// Which shard.
    pub shard: ShardId,
    /// Its id.
    pub me: ReplicaId,
    timing: Timing,
    raft: Contained<Raft>,
    containment: Arc<Containment>,
    log: ShardLog,
    incoming: tokio::sync::Mutex<Option<network::IncomingSnapshot>>,
    peers: Arc<Peers>,
    rest: Mutex<RestState>,
    /// Since when it has been seen to lead, and in which term.
    led: Mutex<Option<(u64, Instant)>>,
    /// Where the log began when it was last asked to be purged, and how many entries more than needed were asked for.
    asked_to_purge: Mutex<(u64, u64)>,
    /// Read barriers under way.
    barriers: Arc<Barriers>,
}

fn leader_of(id: Option<ReplicaId>) -> Option<DiskId> {
    id.map(|id| id.disk)
}

fn unavailable(why: impl ToString) -> ControlError {
    ControlError::Unavailable(why.to_string())
}

impl Replica {
    /// Starts the replica on its log and state, which must be those of the replica `me`. To be called inside
    /// `containment`.
    ///
    /// # Errors
    /// Why it cannot run; the data is left as it is.
    pub async fn open(
        me: ReplicaId,
        peers: Arc<Peers>,
        timing: Timing,
        (log, machine): (ShardLog, Machine),
        containment: Arc<Containment>,
    ) -> Result<Replica, String> {
        let shard = machine.shard;
        let config = raft_config(shard, &timing)?;
        let barriers = Arc::<Barriers>::default();
        let links = PeerLinks { shard, me, peers: peers.clone(), barriers: barriers.clone() };
        let raft = Raft::new(me, config, links, log.clone(), machine).await.map_err(|error| error.to_string())?;
        let raft = Contained::new(raft, containment.clone());
        let incoming = tokio::sync::Mutex::new(None);
        Ok(Replica {
            shard,
            me,
            timing,
            raft,
            containment,
            log,
            incoming,
            peers,
            rest: RestState::awake(),
            led: Mutex::default(),
            asked_to_purge: Mutex::default(),
            barriers,
        })
    }

    fn deadline(&self) -> Duration {
        Duration::from_millis(self.timing.request_ms)
    }

    /// Makes these replicas the first members. On a replica that has members already it does nothing.
    ///
    /// # Errors
    /// Unavailable or BadRequest.
    pub async fn initialize(&self, members: BTreeSet<ReplicaId>) -> Result<(), ControlError> {
        match self.raft.call(|raft| raft.initialize(members)).await? {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(error)) => Err(ControlError::BadRequest(error.to_string())),
            Err(RaftError::Fatal(error)) => Err(unavailable(error)),
        }
    }

    /// Stands for election at once when this is the only voter, instead of waiting for a leader that cannot be.
    pub async fn elect_if_sole_voter(&self) {
        if self.voters() == BTreeSet::from([self.me]) {
            let _ = self.raft.call(|raft| async { raft.trigger().elect(false).await }).await;
        }
    }

    /// Puts a batch through the log. The replies are those of its requests, in order.
    ///
    /// # Errors
    /// NotLeader when it was not proposed; Unavailable when its outcome is not known.
    pub async fn propose(&self, batch: Batch) -> Result<Vec<Reply>, ControlError> {
        self.wake_for_command();
        match self.raft.call(|raft| tokio::time::timeout(self.deadline(), raft.client_write(batch))).await? {
            Err(_) => Err(unavailable("no majority answered in time")),
            Ok(Ok(written)) => Ok(written.data.0),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
                Err(ControlError::NotLeader { leader: leader_of(to.leader_id) })
            }
            Ok(Err(error)) => Err(unavailable(error)),
        }
    }

    /// Returns when this replica, confirmed as leader by a majority, has applied all that was committed when it was
    /// called. It does not wake a shard: the majority is asked now, whether timers run or not.
    ///
    /// # Errors
    /// NotLeader or Unavailable.
    pub async fn read_barrier(&self) -> Result<(), ControlError> {
        let voters = self.settled_voters();
        let mut barrier = self.barriers.begin(self.me, voters.as_deref());
        let hurry = || self.peers.heartbeats.hurry(self.shard, |disk| self.barriers.wait_for_disk(disk));
        hurry();
        let ask = |raft| async move {
            let confirmed = Raft::ensure_linearizable(raft, ReadPolicy::ReadIndex);
            tokio::pin!(confirmed);
            tokio::select! {
                confirmed = &mut confirmed => return confirmed,
                () = barrier.is_late(Duration::from_millis(self.timing.read_hedge_ms)) => {}
            }
            self.peers.heartbeats.counters.late_barriers.fetch_add(1, Ordering::Relaxed);
            barrier.ask_all();
            hurry();
            confirmed.await
        };
        match self.raft.call(|raft| tokio::time::timeout(self.deadline(), ask(raft))).await? {
            Err(_) => Err(unavailable("no majority answered in time")),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to)))) => {
                Err(ControlError::NotLeader { leader: leader_of(to.leader_id) })
            }
            Ok(Err(error)) => Err(unavailable(error)),
        }
    }

    /// Does work of this replica that does not wait, such as reading its state: a panic in it ends the replica.
    ///
    /// # Errors
    /// The replica has failed.
    pub fn contain<T>(&self, work: impl FnOnce() -> T) -> Result<T, ReplicaEnded> {
        self.raft.look(|_| work())
    }

    /// Answers a message of another replica. One that is meant for another replica of this disk does nothing.
    ///
    /// # Errors
    /// [`ReplicaEnded`]: what it would have answered is not to be told.
    pub async fn handle(&self, message: PeerMessage) -> Result<PeerResponse, ReplicaEnded> {
        self.raft.call(|raft| self.answer(raft, message)).await
    }

    async fn answer(&self, raft: &Raft, message: PeerMessage) -> PeerResponse {
        let failed = |error: String| PeerResponse::Failed(error);
        let PeerMessage { from, to, request } = message;
        match (to, &request) {
            (None, PeerRequest::Members | PeerRequest::Identify) => {}
            (None, _) => return failed("the message names no replica".to_owned()),
            (Some(to), _) if to == self.me => {}
            (Some(_), _) => return PeerResponse::OtherReplica { me: self.me },
        }
        if request.claim().is_some_and(|vote| vote.node != from) {
            return failed(format!("{from} speaks for another replica"));
        }
        let term = raft.metrics().borrow_watched().current_term;
        if let Some(why) = objection(&request, term) {
            if let Some(left_out) = self.peers.complaints.turn(Instant::now()) {
                tracing::warn!(shard = %self.shard, %from, why, left_out, "a message that no replica sends");
            }
            return failed(why.to_owned());
        }
        match &request {
            PeerRequest::Append { .. }
            | PeerRequest::Vote { pre_vote: true, .. }
            | PeerRequest::Members
            | PeerRequest::Identify
            | PeerRequest::Rebuild => {}
            _ => self.wake("a message"),
        }
        match request {
            PeerRequest::Append { vote, previous, entries, committed } => {
                let has_entries = !entries.is_empty();
                let entries: Result<Vec<Entry>, BadBytes> = entries.into_iter().map(entry_from_wire).collect();
                let entries = match entries {
                    Ok(entries) => entries,
                    Err(error) => return failed(error.to_string()),
                };
                let rpc = AppendEntriesRequest::<TypeConfig> {
                    vote: vote_from_wire(vote),
                    prev_log_id: previous.map(log_id_from_wire),
                    entries,
                    leader_commit: committed.map(log_id_from_wire),
                };
                let answer = raft.append_entries(rpc).await;
                // Only now: the append renewed the leader's lease, so a timer that starts again does not find it run
                // out.
                self.wake_after_append(vote.term, vote.node, has_entries);
                match answer {
                    Ok(AppendEntriesResponse::Success) => PeerResponse::Appended,
                    Ok(AppendEntriesResponse::PartialSuccess(to)) => {
                        PeerResponse::AppendedTo(to.as_ref().map(log_id_to_wire))
                    }
                    Ok(AppendEntriesResponse::Conflict) => PeerResponse::Conflict,
                    Ok(AppendEntriesResponse::HigherVote(vote)) => PeerResponse::HigherVote(vote_to_wire(&vote)),
                    Err(error) => failed(error.to_string()),
                }
            }
            PeerRequest::Vote { vote, last, transfer, pre_vote } => {
                let mut rpc = VoteRequest::<TypeConfig>::new(vote_from_wire(vote), last.map(log_id_from_wire));
                rpc.leadership_transfer = transfer;
                let answer = if pre_vote { raft.pre_vote(rpc).await } else { raft.vote(rpc).await };
                match answer {
                    Ok(answer) => PeerResponse::Voted {
                        vote: vote_to_wire(&answer.vote),
                        granted: answer.vote_granted,
                        last: answer.last_log_id.as_ref().map(log_id_to_wire),
                    },
                    Err(error) => failed(error.to_string()),
                }
            }
            PeerRequest::Transfer { vote, to, last } => {
                let rpc =
                    TransferLeaderRequest::<TypeConfig>::new(vote_from_wire(vote), to, last.map(log_id_from_wire));
                match raft.handle_transfer_leader(rpc).await {
                    Ok(Ok(())) => PeerResponse::Done,
                    Ok(Err(error)) => failed(error.to_string()),
                    Err(error) => failed(error.to_string()),
                }
            }
            PeerRequest::SnapshotPiece { vote, transfer, offset, data, last } => {
                let mut incoming = self.incoming.lock().await;
                let piece = network::Piece { from, transfer, offset, data, last };
                match network::take_piece(
                    self.shard,
                    (&self.peers.snapshot_dir, &self.peers.space),
                    &mut incoming,
                    piece,
                )
                .await
                {
                    Ok(None) => PeerResponse::Done,
                    Ok(Some((path, applied))) => {
                        if let Some(why) = objection_to_snapshot(&vote, &applied) {
                            tracing::warn!(shard = %self.shard, %from, why, "a snapshot that no replica has");
                            return match tokio::fs::remove_file(&path).await {
                                Ok(()) => failed(why.to_owned()),
                                Err(error) => failed(format!("{why}; its file stays: {error}")),
                            };
                        }
                        let meta = openraft::SnapshotMeta {
                            last_log_id: applied.last.map(log_id_from_wire),
                            last_membership: members_from_applied(&applied),
                        };
                        let snapshot = openraft::Snapshot { meta, snapshot: SnapshotSource::File(path) };
                        match raft.install_full_snapshot(vote_from_wire(vote), snapshot).await {
                            Ok(installed) => PeerResponse::Installed(vote_to_wire(&installed.vote)),
                            Err(error) => failed(error.to_string()),
                        }
                    }
                    Err(error) => failed(error.to_string()),
                }
            }
            PeerRequest::Members => {
                // Put aside, for room for it would be taken and given back with every message.
                let leads = raft.is_leader() && Box::pin(self.read_barrier()).await.is_ok();
                PeerResponse::Members { leads, membership: self.committed_members() }
            }
            PeerRequest::Identify => PeerResponse::Identity { me: self.me, is_empty: self.is_empty() },
            PeerRequest::Rebuild => failed("this replica is sound".to_owned()),
        }
    }

    /// Has it not failed?
    ///
    /// # Errors
    /// Why it has.
    pub fn check(&self) -> Result<(), ReplicaEnded> {
        self.containment.check()
    }

    /// Waits until it fails, and says why.
    pub async fn failed(&self) -> String {
        self.containment.failed().await
    }

    /// Takes it for failed when its Raft core has ended by itself, for an error of its storage say.
    pub fn look_for_end(&self) {
        let ended = self.raft.look(|raft| raft.metrics().borrow_watched().running_state.clone().err());
        if let Some(why) = ended.ok().flatten() {
            self.containment.fail(format!("its Raft core has ended: {why}"));
        }
        // A panic that somebody caught on the way: the hook has seen it.
        if let Err(ended) = self.check() {
            self.containment.fail(ended.0);
        }
    }

    /// Ends its tasks, and returns when none runs any more.
    pub async fn shutdown(&self) {
        if let Ok(Err(error)) = self.raft.call(Raft::shutdown).await {
            tracing::warn!(shard = %self.shard, %error, "replica did not end cleanly");
        }
        self.containment.end().await;
    }
}
