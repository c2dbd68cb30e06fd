//! The Raft library's door: its types, and one shard's replica behind ours. Beside `log.rs` the only place that knows
//! openraft.
//!
//! - [`machine`]: the state machine; applies entries to the state database.
//! - [`network`]: messages to other replicas; [`heartbeats`]: those of several shards together.
//! - `rest`: a shard that sleeps stops its timers.
//! - here: types, their conversions, and [`Replica`]: propose, read barrier, incoming messages, members.

pub mod heartbeats;
pub mod machine;
pub mod network;
mod rest;

use crate::log::ShardLog;
use crate::message::{
    AppliedState, PeerRequest, PeerResponse, WireEntry, WireLogId, WireMembership, WirePayload, WireVote,
};
use bytes::Bytes;
use granary_meta::message::decode_batch;
use granary_meta::{BadBytes, MetaRequest, Reply};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::settings::Values;
use granary_wire::control::{ControlError, ShardStatus};
use machine::{Machine, SnapshotSource};
use network::{PeerLinks, Peers};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use openraft::{EntryPayload, Membership, ReadPolicy, ServerState, SnapshotPolicy, StoredMembership};
use rest::RestState;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Requests of one log entry, decoded, and their bytes as they travel and lie on disk. Cheap to clone.
#[derive(Clone)]
pub struct Batch {
    /// The requests, in order.
    pub requests: Arc<Vec<MetaRequest>>,
    /// See [`granary_meta::message::encode_batch`].
    pub encoded: Bytes,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({} requests, {} bytes)", self.requests.len(), self.encoded.len())
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Serialize for Batch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.encoded.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Batch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Batch, D::Error> {
        let encoded = Bytes::deserialize(deserializer)?;
        Batch::decode(encoded).map_err(serde::de::Error::custom)
    }
}

impl Batch {
    /// The batch in those bytes.
    ///
    /// # Errors
    /// [`BadBytes`].
    pub fn decode(encoded: Bytes) -> Result<Batch, BadBytes> {
        Ok(Batch { requests: Arc::new(decode_batch(&encoded)?), encoded })
    }
}

/// Replies of one log entry, in the order of its requests.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Replies(pub Vec<Reply>);

openraft::declare_raft_types!(
    /// Our choice of openraft's types. Node ids are disk ids; addresses come from the cluster map.
    pub TypeConfig:
        D = Batch,
        R = Replies,
        NodeId = u64,
        Node = (),
);

type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
/// A vote.
pub type Vote = openraft::impls::Vote<LeaderId>;
/// A place in the log.
pub type LogId = openraft::impls::LogId<LeaderId>;
type Payload = EntryPayload<Batch, u64, ()>;
/// A log entry.
pub type Entry = openraft::impls::Entry<LeaderId, Payload>;
type Members = StoredMembership<LeaderId, u64, ()>;

/// Vote to our form.
pub fn vote_to_wire(vote: &Vote) -> WireVote {
    WireVote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
}

/// Vote from our form.
pub fn vote_from_wire(vote: WireVote) -> Vote {
    Vote { leader_id: LeaderId { term: vote.term, node_id: vote.node }, committed: vote.committed }
}

/// Log id to our form.
pub fn log_id_to_wire(id: &LogId) -> WireLogId {
    WireLogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

/// Log id from our form.
pub fn log_id_from_wire(id: WireLogId) -> LogId {
    LogId { leader_id: LeaderId { term: id.term, node_id: id.node }, index: id.index }
}

fn membership_to_wire(membership: &Membership<u64, ()>) -> WireMembership {
    WireMembership {
        configs: membership.get_joint_config().iter().map(|config| config.iter().copied().collect()).collect(),
        nodes: membership.nodes().map(|(node, ())| *node).collect(),
    }
}

fn membership_from_wire(membership: WireMembership) -> Membership<u64, ()> {
    let configs = membership.configs.into_iter().map(|config| config.into_iter().collect()).collect();
    Membership::new_with_defaults(configs, membership.nodes)
}

/// Entry to our form.
pub fn entry_to_wire(entry: &Entry) -> WireEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => WirePayload::Blank,
        EntryPayload::Normal(batch) => WirePayload::Batch(batch.encoded.clone()),
        EntryPayload::Membership(membership) => WirePayload::Membership(membership_to_wire(membership)),
    };
    WireEntry { id: log_id_to_wire(&entry.log_id), payload }
}

/// Entry from our form.
///
/// # Errors
/// [`BadBytes`]: its batch cannot be decoded.
pub fn entry_from_wire(entry: WireEntry) -> Result<Entry, BadBytes> {
    let payload = match entry.payload {
        WirePayload::Blank => EntryPayload::Blank,
        WirePayload::Batch(bytes) => EntryPayload::Normal(Batch::decode(bytes)?),
        WirePayload::Membership(membership) => EntryPayload::Membership(membership_from_wire(membership)),
    };
    Ok(Entry { log_id: log_id_from_wire(entry.id), payload })
}

fn members_from_applied(applied: &AppliedState) -> Members {
    Members::new(applied.membership_at.map(log_id_from_wire), membership_from_wire(applied.membership.clone()))
}

/// Timers of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// Between heartbeats of a leader, in milliseconds.
    pub heartbeat_ms: u64,
    /// Shortest time without a leader before an election, in milliseconds.
    pub election_min_ms: u64,
    /// Longest, in milliseconds. Drawn anew for each election.
    pub election_max_ms: u64,
    /// How long a command or query may take before it is given up as Unavailable, in milliseconds.
    pub request_ms: u64,
    /// Log entries between two snapshots: how much a restarted replica replays at most.
    pub snapshot_entries: u64,
    /// Log entries kept behind a snapshot for replicas that lag a little.
    pub keep_entries: u64,
    /// A shard whose log has not grown for so long stops its timers, in milliseconds; 0: never.
    pub sleep_after_ms: u64,
}

impl Timing {
    /// How long a heartbeat waits for those of other shards to the same disk.
    pub fn heartbeat_window(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms / 5)
    }

    /// Between two heartbeats of a link. A link without one for twice as long is lost: what its disk led has a new
    /// leader about a second later than if its shards had been awake. Links cost more than anything else while nobody
    /// is there, for there is one between each two disks.
    pub fn link_beat(&self) -> Duration {
        Duration::from_millis(self.election_min_ms)
    }

    /// The timers of that shard. The root shard never sleeps, and no client waits for it but one that makes or deletes
    /// a bucket: its timers run slower, for they are most of what a cluster costs that nobody uses.
    #[must_use]
    pub fn of(&self, shard: ShardId) -> Timing {
        match shard {
            ShardId::ROOT => Timing {
                heartbeat_ms: self.heartbeat_ms.saturating_mul(4).min(self.election_min_ms),
                election_min_ms: self.election_min_ms.saturating_mul(2),
                election_max_ms: self.election_max_ms.saturating_mul(2),
                ..self.clone()
            },
            _ => self.clone(),
        }
    }

    /// From the settings `node.raft_*`.
    pub fn from_settings(values: &Values) -> Timing {
        Timing {
            heartbeat_ms: millis(values.time("node.raft_heartbeat")),
            election_min_ms: millis(values.time("node.raft_election_min")),
            election_max_ms: millis(values.time("node.raft_election_max")),
            request_ms: millis(values.time("node.raft_request")),
            snapshot_entries: values.number("node.raft_snapshot_entries"),
            keep_entries: values.number("node.raft_keep_entries"),
            sleep_after_ms: millis(values.time("node.raft_sleep_after")),
        }
    }
}

impl Default for Timing {
    fn default() -> Timing {
        Timing::from_settings(&Values::default())
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn raft_config(shard: ShardId, timing: &Timing) -> Result<Arc<openraft::Config>, String> {
    let config = openraft::Config {
        cluster_name: format!("shard-{shard}"),
        heartbeat_interval: timing.heartbeat_ms,
        election_timeout_min: timing.election_min_ms,
        election_timeout_max: timing.election_max_ms,
        install_snapshot_timeout: network::INSTALL_DEADLINE.as_millis() as u64,
        max_payload_entries: 256,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_entries),
        max_in_snapshot_log_to_keep: timing.keep_entries,
        replication_lag_threshold: timing.snapshot_entries,
        purge_batch_size: 64,
        api_channel_size: Some(1_024),
        notification_channel_size: Some(4_096),
        state_machine_channel_size: Some(256),
        enable_pre_vote: Some(true),
        allow_log_reversion: Some(false),
        // A leader that restarts must be elected again: only the blank entry of a new leadership tells it what was
        // committed before, and until then its reads could be older than ones already given.
        enable_leader_restore: Some(false),
        ..openraft::Config::default()
    };
    config.validate().map(Arc::new).map_err(|error| error.to_string())
}

/// One shard's replica on this disk.
pub struct Replica {
    /// Which shard.
    pub shard: ShardId,
    me: u64,
    timing: Timing,
    raft: openraft::Raft<TypeConfig, Machine>,
    incoming: tokio::sync::Mutex<Option<network::IncomingSnapshot>>,
    peers: Arc<Peers>,
    rest: Mutex<RestState>,
    /// Read barriers under way.
    barriers: Arc<AtomicUsize>,
}

/// While it lives, heartbeats of the replica's shard wait for no others.
struct Urgent<'a>(&'a Replica);

impl Urgent<'_> {
    fn new(replica: &Replica) -> Urgent<'_> {
        replica.barriers.fetch_add(1, Ordering::SeqCst);
        replica.peers.heartbeats.hurry(replica.shard);
        Urgent(replica)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.barriers.fetch_sub(1, Ordering::SeqCst);
    }
}

fn leader_of(node: Option<u64>) -> Option<DiskId> {
    node.and_then(|node| u32::try_from(node).ok()).map(DiskId)
}

fn unavailable(why: impl ToString) -> ControlError {
    ControlError::Unavailable(why.to_string())
}

impl Replica {
    /// Starts the replica on its log and state.
    ///
    /// # Errors
    /// Why it cannot run; the data is left as it is.
    pub async fn open(peers: Arc<Peers>, timing: Timing, log: ShardLog, machine: Machine) -> Result<Replica, String> {
        let shard = machine.shard;
        let config = raft_config(shard, &timing)?;
        let me = u64::from(peers.me.0);
        let barriers = Arc::<AtomicUsize>::default();
        let links = PeerLinks { shard, peers: peers.clone(), barriers: barriers.clone() };
        let raft = openraft::Raft::new(me, config, links, log, machine).await.map_err(|error| error.to_string())?;
        let incoming = tokio::sync::Mutex::new(None);
        Ok(Replica { shard, me, timing, raft, incoming, peers, rest: RestState::awake(), barriers })
    }

    fn deadline(&self) -> Duration {
        Duration::from_millis(self.timing.request_ms)
    }

    /// Makes these disks the first members. On a replica that has members already it does nothing.
    ///
    /// # Errors
    /// Unavailable or BadRequest.
    pub async fn initialize(&self, members: &[DiskId]) -> Result<(), ControlError> {
        let members: BTreeSet<u64> = members.iter().map(|disk| u64::from(disk.0)).collect();
        match self.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(error)) => Err(ControlError::BadRequest(error.to_string())),
            Err(RaftError::Fatal(error)) => Err(unavailable(error)),
        }
    }

    /// Stands for election at once when this is the only voter, instead of waiting for a leader that cannot be.
    pub async fn elect_if_sole_voter(&self) {
        let alone = {
            let metrics = self.raft.metrics();
            let voters: Vec<u64> = metrics.borrow_watched().membership_config.voter_ids().collect();
            voters == [self.me]
        };
        if alone {
            let _ = self.raft.trigger().elect(false).await;
        }
    }

    /// Puts a batch through the log. The replies are those of its requests, in order.
    ///
    /// # Errors
    /// NotLeader when it was not proposed; Unavailable when its outcome is not known.
    pub async fn propose(&self, batch: Batch) -> Result<Vec<Reply>, ControlError> {
        self.wake_for_command();
        match tokio::time::timeout(self.deadline(), self.raft.client_write(batch)).await {
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
        let _urgent = Urgent::new(self);
        match tokio::time::timeout(self.deadline(), self.raft.ensure_linearizable(ReadPolicy::ReadIndex)).await {
            Err(_) => Err(unavailable("no majority answered in time")),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to)))) => {
                Err(ControlError::NotLeader { leader: leader_of(to.leader_id) })
            }
            Ok(Err(error)) => Err(unavailable(error)),
        }
    }

    /// Answers a message of another replica.
    pub async fn handle(&self, from: DiskId, request: PeerRequest) -> PeerResponse {
        let failed = |error: String| PeerResponse::Failed(error);
        match &request {
            PeerRequest::Append { .. } | PeerRequest::Vote { pre_vote: true, .. } | PeerRequest::Members => {}
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
                let answer = self.raft.append_entries(rpc).await;
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
                let answer = if pre_vote { self.raft.pre_vote(rpc).await } else { self.raft.vote(rpc).await };
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
                match self.raft.handle_transfer_leader(rpc).await {
                    Ok(Ok(())) => PeerResponse::Done,
                    Ok(Err(error)) => failed(error.to_string()),
                    Err(error) => failed(error.to_string()),
                }
            }
            PeerRequest::SnapshotPiece { vote, transfer, offset, data, last } => {
                let mut incoming = self.incoming.lock().await;
                let piece = network::Piece { from, transfer, offset, data, last };
                match network::take_piece(self.shard, &self.peers.snapshot_dir, &mut incoming, piece).await {
                    Ok(None) => PeerResponse::Done,
                    Ok(Some((path, applied))) => {
                        let meta = openraft::SnapshotMeta {
                            last_log_id: applied.last.map(log_id_from_wire),
                            last_membership: members_from_applied(&applied),
                        };
                        let snapshot = openraft::Snapshot { meta, snapshot: SnapshotSource::File(path) };
                        match self.raft.install_full_snapshot(vote_from_wire(vote), snapshot).await {
                            Ok(installed) => PeerResponse::Installed(vote_to_wire(&installed.vote)),
                            Err(error) => failed(error.to_string()),
                        }
                    }
                    Err(error) => failed(error.to_string()),
                }
            }
            PeerRequest::Members => {
                let leads = self.raft.is_leader() && self.read_barrier().await.is_ok();
                PeerResponse::Members { leads, membership: self.committed_members() }
            }
        }
    }

    fn committed_members(&self) -> WireMembership {
        let metrics = self.raft.metrics();
        let membership = metrics.borrow_watched().committed_membership_config.clone();
        membership_to_wire(membership.membership())
    }

    /// Members as last committed here: all disks, voters and learners.
    pub fn members(&self) -> BTreeSet<DiskId> {
        self.committed_members().nodes.into_iter().filter_map(|node| leader_of(Some(node))).collect()
    }

    /// Does it believe to lead?
    pub fn is_leader(&self) -> bool {
        self.raft.is_leader()
    }

    /// One step towards these members, if this replica leads: new ones become learners, and when every one of them has
    /// caught up, the voters are changed at once (by joint consensus). True when the members are as wanted.
    ///
    /// # Errors
    /// The step failed; it is tried again at the next call.
    pub async fn reconcile(&self, wanted: &[DiskId]) -> Result<bool, String> {
        let wanted: BTreeSet<u64> = wanted.iter().map(|disk| u64::from(disk.0)).collect();
        if wanted.is_empty() || !self.raft.is_leader() {
            return Ok(true);
        }
        let (voters, nodes, replicated, last) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let membership = &metrics.membership_config;
            let voters: BTreeSet<u64> = membership.voter_ids().collect();
            let nodes: BTreeSet<u64> = membership.nodes().map(|(node, ())| *node).collect();
            (voters, nodes, metrics.replication.clone().unwrap_or_default(), metrics.last_log_index.unwrap_or(0))
        };
        if voters == wanted && nodes == wanted {
            return Ok(true);
        }
        self.wake_for_command();
        for new in wanted.difference(&nodes) {
            tracing::info!(shard = %self.shard, disk = new, "adding a replica as learner");
            self.raft.add_learner(*new, (), false).await.map_err(|error| error.to_string())?;
        }
        let lag = self.timing.keep_entries.min(64);
        let caught_up = wanted.difference(&voters).all(|new| {
            let matched = replicated.get(new).cloned().flatten().map_or(0, |matched| matched.index + 1);
            matched + lag > last && matched > 0
        });
        if !caught_up {
            return Ok(false);
        }
        tracing::info!(shard = %self.shard, ?wanted, "changing members");
        self.raft.change_membership(wanted, false).await.map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Hands leadership over when the log has grown far past what snapshots should leave of it.
    ///
    /// A leader of this library keeps every entry that a voter has not acknowledged, also for one that is dead; its
    /// followers do not. So while a disk is dead the leaders take turns: the next one begins with a short log, and this
    /// one purges as a follower.
    pub async fn transfer_leadership_if_log_is_long(&self) {
        let limit = 4 * (self.timing.snapshot_entries + self.timing.keep_entries);
        let is_long = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let purged = metrics.purged.as_ref().map_or(0, |purged| purged.index);
            metrics.last_log_index.unwrap_or(0).saturating_sub(purged) > limit
        };
        if let Some(to) = self.successor().filter(|_| is_long) {
            tracing::info!(shard = %self.shard, to, "handing leadership over: the log is long because a voter lags");
            let _ = self.raft.trigger().transfer_leader(to).await;
        }
    }

    /// As leader, hands leadership over to a voter that has nearly all of the log, if there is one.
    pub async fn hand_over(&self) {
        self.wake("it is handed over");
        if let Some(to) = self.successor() {
            let _ = self.raft.trigger().transfer_leader(to).await;
        }
    }

    /// The voter that has most of this leader's log, if that is nearly all of it.
    fn successor(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if !metrics.state.is_leader() {
            return None;
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let replicated = metrics.replication.clone().unwrap_or_default();
        let voters = metrics.membership_config.voter_ids().filter(|node| *node != self.me);
        voters
            .filter_map(|node| replicated.get(&node).cloned().flatten().map(|matched| (matched.index, node)))
            .max()
            .filter(|(matched, _)| matched + self.timing.keep_entries >= last)
            .map(|(_, node)| node)
    }

    /// How it stands.
    pub fn status(&self) -> ShardStatus {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let state = match (&metrics.running_state, metrics.state) {
            (Err(_), _) | (_, ServerState::Shutdown) => "stopped",
            (_, ServerState::Learner) => "learner",
            (_, ServerState::Follower) => "follower",
            (_, ServerState::Candidate) => "candidate",
            (_, ServerState::Leader) => "leader",
        };
        ShardStatus {
            shard: self.shard,
            state: state.to_owned(),
            term: metrics.current_term,
            leader: leader_of(metrics.current_leader),
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: metrics.last_applied.as_ref().map_or(0, |applied| applied.index),
            voters: metrics.membership_config.voter_ids().filter_map(|node| leader_of(Some(node))).collect(),
        }
    }

    /// Ends its tasks.
    pub async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(shard = %self.shard, %error, "replica did not end cleanly");
        }
    }
}
