//! Messages to other replicas, over whatever carries them, and snapshot files in pieces both ways.

use super::barrier::Barriers;
use super::containment::spawn_blocking;
use super::heartbeats::Heartbeats;
use super::machine::SnapshotSource;
use super::objections::objection_to_answer;
use super::types::LeaderId;
use super::{entry_to_wire, log_id_from_wire, log_id_to_wire, vote_from_wire, vote_to_wire, TypeConfig};
use crate::message::{decode_message, encode_message, AppliedState, PeerMessage, PeerRequest, PeerResponse, ReplicaId};
use crate::room::Space;
use crate::snapshot::{self, SnapshotError, PIECE_BYTES};
use bytes::Bytes;
use futures::future::BoxFuture;
use granary_placement::id::{DiskId, ShardId};
use granary_wire::LogPace;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, Snapshot};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

/// How long a receiver may take to install a snapshot.
pub const INSTALL_DEADLINE: Duration = Duration::from_secs(600);
/// How long one piece of a snapshot may take.
const PIECE_DEADLINE: Duration = Duration::from_secs(20);

/// A message that did not get an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The peer cannot be reached; trying again at once is useless.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("timed out")]
    Timeout,
    /// The peer refused the message.
    #[error("refused: {0}")]
    Refused(String),
}

/// Carries messages between metadata disks. The disk node implements it over its control connections.
pub trait PeerTransport: Send + Sync + 'static {
    /// Sends a message to the replica of `shard` on disk `to` and gives its answer.
    fn raft(
        &self,
        to: DiskId,
        shard: ShardId,
        message: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>>;

    /// Sends messages to several replicas on disk `to` and gives the answer of each, in that order.
    fn raft_batch(
        &self,
        to: DiskId,
        messages: Vec<(ShardId, Bytes)>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<Result<Bytes, TransportError>>, TransportError>>;

    /// Sends the heartbeat of the link to disk `to` and gives the other end's.
    fn link_beat(
        &self,
        to: DiskId,
        message: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>>;

    /// Whether another disk answers where gateways look for this one. None when that cannot be told now.
    fn is_displaced(&self, deadline: Duration) -> BoxFuture<'static, Option<bool>>;
}

/// What all replicas of a disk share to talk to others.
pub struct Peers {
    /// Carries the messages.
    pub transport: Arc<dyn PeerTransport>,
    /// Where snapshot files lie for a while.
    pub snapshot_dir: PathBuf,
    /// Numbers snapshot transfers.
    pub transfers: AtomicU64,
    /// One snapshot is written and sent at a time.
    pub sending: Semaphore,
    /// How long AppendEntries and votes may take.
    pub message_deadline: Duration,
    /// The file system they lie on.
    pub space: Space,
    /// Sends heartbeats.
    pub heartbeats: Arc<Heartbeats>,
    /// What other disks said of their replicas when they were taken for others, or asked.
    pub heard: Mutex<BTreeMap<(ShardId, DiskId), Heard>>,
    /// Log lines about what they say and no replica says.
    pub complaints: LogPace,
}

/// The replica of a shard on another disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// Which.
    pub id: ReplicaId,
    /// Its data cannot be used.
    pub is_broken: bool,
}

impl Peers {
    /// Sends a message to the replica of a shard on disk `to` and decodes its answer. What that says of the replica
    /// there is kept.
    ///
    /// # Errors
    /// [`TransportError`]; refused also when another replica is there, or one that cannot be used.
    pub async fn ask(
        &self,
        to: DiskId,
        shard: ShardId,
        message: &PeerMessage,
        deadline: Duration,
    ) -> Result<PeerResponse, TransportError> {
        let message = encode_message(message).map_err(|error| TransportError::Refused(error.to_string()))?;
        let answer = tokio::time::timeout(deadline, self.transport.raft(to, shard, message, deadline));
        self.hear(to, shard, &answer.await.unwrap_or(Err(TransportError::Timeout))?)
    }

    fn hear(&self, disk: DiskId, shard: ShardId, answer: &[u8]) -> Result<PeerResponse, TransportError> {
        let answer: PeerResponse =
            decode_message(answer).map_err(|error| TransportError::Refused(error.to_string()))?;
        let (heard, refused) = match &answer {
            PeerResponse::Identity { me, .. } => (Heard { id: *me, is_broken: false }, None),
            PeerResponse::OtherReplica { me } => {
                (Heard { id: *me, is_broken: false }, Some(format!("the replica there is {me} now")))
            }
            PeerResponse::Broken { me, why } => (Heard { id: *me, is_broken: true }, Some(format!("{me}: {why}"))),
            _ => return Ok(answer),
        };
        if heard.id.disk != disk {
            return Err(TransportError::Refused(format!("disk {disk} calls its replica {}", heard.id)));
        }
        let before = self.heard().insert((shard, disk), heard);
        if before.is_none_or(|before| before != heard) {
            tracing::info!(%shard, replica = %heard.id, broken = heard.is_broken, "heard of a replica");
        }
        refused.map_or(Ok(answer), |why| Err(TransportError::Refused(why)))
    }

    /// What is known of the replicas on other disks. Never removed: at most one for each shard here and disk there ever
    /// was.
    pub fn heard(&self) -> MutexGuard<'_, BTreeMap<(ShardId, DiskId), Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes links for one shard.
pub struct PeerLinks {
    /// Which shard.
    pub shard: ShardId,
    /// The replica here.
    pub me: ReplicaId,
    /// Shared by all shards.
    pub peers: Arc<Peers>,
    /// Read barriers of the shard under way: the heartbeats that they wait for are urgent.
    pub barriers: Arc<Barriers>,
}

/// The way to one other replica.
pub struct PeerLink {
    shard: ShardId,
    me: ReplicaId,
    to: ReplicaId,
    peers: Arc<Peers>,
    /// Given for a link that carries heartbeats only: the read barriers that may wait for them.
    heartbeats_for: Option<Arc<Barriers>>,
}

impl PeerLinks {
    fn link(&self, to: ReplicaId, heartbeats_for: Option<Arc<Barriers>>) -> PeerLink {
        PeerLink { shard: self.shard, me: self.me, to, peers: self.peers.clone(), heartbeats_for }
    }
}

impl RaftNetworkFactory<TypeConfig> for PeerLinks {
    type Network = PeerLink;

    async fn new_client(&mut self, target: ReplicaId, _node: &()) -> PeerLink {
        self.link(target, None)
    }

    async fn new_heartbeat_client(&mut self, target: ReplicaId, _node: &()) -> PeerLink {
        self.link(target, Some(self.barriers.clone()))
    }
}

fn rpc_error(error: TransportError) -> RPCError<TypeConfig> {
    match error {
        TransportError::Unreachable(_) | TransportError::Refused(_) => {
            RPCError::Unreachable(Unreachable::from_string(error.to_string()))
        }
        TransportError::Timeout => RPCError::Network(NetworkError::from_string("timed out")),
    }
}

fn unexpected(response: PeerResponse) -> RPCError<TypeConfig> {
    let why = match response {
        PeerResponse::Failed(why) => why,
        _ => "an answer to something else".to_owned(),
    };
    RPCError::Unreachable(Unreachable::from_string(why))
}

impl PeerLink {
    fn message(&self, request: PeerRequest) -> PeerMessage {
        PeerMessage { from: self.me, to: Some(self.to), request }
    }

    async fn ask(&self, request: PeerRequest) -> Result<PeerResponse, RPCError<TypeConfig>> {
        self.ask_within(request, self.peers.message_deadline).await
    }

    async fn ask_within(&self, request: PeerRequest, deadline: Duration) -> Result<PeerResponse, RPCError<TypeConfig>> {
        let message = self.message(request);
        let answer = self.peers.ask(self.to.disk, self.shard, &message, deadline).await;
        answer.and_then(|answer| self.judge(&message.request, answer)).map_err(rpc_error)
    }

    /// Refuses an answer that no replica gives.
    fn judge(&self, asked: &PeerRequest, answer: PeerResponse) -> Result<PeerResponse, TransportError> {
        let Some(why) = objection_to_answer(asked, &answer) else { return Ok(answer) };
        if let Some(left_out) = self.peers.complaints.turn(Instant::now()) {
            tracing::warn!(shard = %self.shard, from = %self.to, why, left_out, "an answer that no replica gives now");
        }
        Err(TransportError::Refused(why.to_owned()))
    }

    async fn heartbeat(&self, request: PeerRequest, barriers: &Barriers) -> Result<PeerResponse, TransportError> {
        let asked = self.message(request);
        let message = encode_message(&asked).map_err(|error| TransportError::Refused(error.to_string()))?;
        let urgent = || barriers.wait_for(self.to);
        let answer = self.peers.heartbeats.send(self.to.disk, self.shard, message, urgent).await;
        let heard = answer.and_then(|answer| self.peers.hear(self.to.disk, self.shard, &answer));
        let heard = heard.and_then(|answer| self.judge(&asked.request, answer));
        let confirms = matches!(heard, Ok(PeerResponse::Appended | PeerResponse::AppendedTo(_)));
        barriers.note(self.to, confirms);
        heard
    }

    async fn request_vote(
        &self,
        rpc: VoteRequest<TypeConfig>,
        pre_vote: bool,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = PeerRequest::Vote {
            vote: vote_to_wire(&rpc.vote),
            last: rpc.last_log_id.as_ref().map(log_id_to_wire),
            transfer: rpc.leadership_transfer,
            pre_vote,
        };
        match self.ask(request).await? {
            PeerResponse::Voted { vote, granted, last } => {
                Ok(VoteResponse::new(vote_from_wire(vote), last.map(log_id_from_wire), granted))
            }
            other => Err(unexpected(other)),
        }
    }

    /// Writes the snapshot to a file and sends it. The file may be further applied than the metadata the library holds;
    /// the receiver takes the file's own word, and the leader merely thinks it a little behind.
    async fn send_snapshot(
        &self,
        vote: super::Vote,
        source: SnapshotSource,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let lost = |why: String| StreamingError::Network(NetworkError::from_string(why));
        let _turn = self.peers.sending.acquire().await.map_err(|_| lost("stopping".to_owned()))?;
        let shard = self.shard;
        let path = match source {
            SnapshotSource::File(path) => path,
            SnapshotSource::Live(state) => {
                let path = self.peers.snapshot_dir.join(format!("out-{shard}-{}", self.to.disk));
                if !self.peers.space.has_room_for(self.peers.space.reserve_bytes / 2) {
                    return Err(lost("there is no room to write a snapshot".to_owned()));
                }
                let (to, space) = (path.clone(), self.peers.space.clone());
                let write = move || {
                    let written = snapshot::write_file(&state, shard, &to, &space);
                    if written.is_err() {
                        // Half of it is of no use, and takes room.
                        let _ = std::fs::remove_file(&to);
                    }
                    written
                };
                let written = spawn_blocking(write).await;
                written.map_err(|error| lost(error.to_string()))?.map_err(|error| lost(error.to_string()))?;
                path
            }
        };
        let sent = self.send_file(vote, &path).await;
        if let Err(error) = tokio::fs::remove_file(&path).await {
            tracing::warn!(%error, path = %path.display(), "cannot remove a sent snapshot file");
        }
        sent
    }

    async fn send_file(
        &self,
        vote: super::Vote,
        path: &Path,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let lost = |why: String| StreamingError::Network(NetworkError::from_string(why));
        let transfer = self.peers.transfers.fetch_add(1, Ordering::Relaxed);
        let mut file = tokio::fs::File::open(path).await.map_err(|error| lost(error.to_string()))?;
        let len = file.metadata().await.map_err(|error| lost(error.to_string()))?.len();
        tracing::info!(shard = %self.shard, to = %self.to, len_bytes = len, "sending a snapshot");
        let mut offset = 0u64;
        loop {
            let step = (len - offset).min(PIECE_BYTES as u64);
            let mut data = vec![0u8; step as usize];
            file.read_exact(&mut data).await.map_err(|error| lost(error.to_string()))?;
            let last = offset + step == len;
            let request = PeerRequest::SnapshotPiece {
                vote: vote_to_wire(&vote),
                transfer,
                offset,
                data: Bytes::from(data),
                last,
            };
            let deadline = if last { INSTALL_DEADLINE } else { PIECE_DEADLINE };
            match self.ask_within(request, deadline).await? {
                PeerResponse::Done if !last => offset += step,
                PeerResponse::Installed(vote) => return Ok(SnapshotResponse::new(vote_from_wire(vote))),
                other => return Err(unexpected(other).into()),
            }
        }
    }
}

impl RaftNetworkV2<TypeConfig> for PeerLink {
    type SnapshotData = SnapshotSource;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = PeerRequest::Append {
            vote: vote_to_wire(&rpc.vote),
            previous: rpc.prev_log_id.as_ref().map(log_id_to_wire),
            entries: rpc.entries.iter().map(entry_to_wire).collect(),
            committed: rpc.leader_commit.as_ref().map(log_id_to_wire),
        };
        let answer = match &self.heartbeats_for {
            Some(barriers) if rpc.entries.is_empty() => self.heartbeat(request, barriers).await.map_err(rpc_error),
            _ => self.ask(request).await,
        };
        match answer? {
            PeerResponse::Appended => Ok(AppendEntriesResponse::Success),
            PeerResponse::AppendedTo(to) => Ok(AppendEntriesResponse::PartialSuccess(to.map(log_id_from_wire))),
            PeerResponse::Conflict => Ok(AppendEntriesResponse::Conflict),
            PeerResponse::HigherVote(vote) => Ok(AppendEntriesResponse::HigherVote(vote_from_wire(vote))),
            other => Err(unexpected(other)),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.request_vote(rpc, false).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.request_vote(rpc, true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: super::Vote,
        snapshot: Snapshot<LeaderId, ReplicaId, (), SnapshotSource>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            sent = self.send_snapshot(vote, snapshot.snapshot) => sent,
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = PeerRequest::Transfer {
            vote: vote_to_wire(rpc.from_leader()),
            to: *rpc.to_node_id(),
            last: rpc.last_log_id().map(log_id_to_wire),
        };
        match self.ask(request).await? {
            PeerResponse::Done => Ok(Ok(())),
            other => Err(unexpected(other)),
        }
    }
}

/// A snapshot file that is arriving.
pub struct IncomingSnapshot {
    from: ReplicaId,
    transfer: u64,
    len_bytes: u64,
    path: PathBuf,
    file: tokio::fs::File,
}

/// One piece of it.
pub struct Piece {
    /// Who sends it.
    pub from: ReplicaId,
    /// Which transfer.
    pub transfer: u64,
    /// Where it begins.
    pub offset: u64,
    /// Its bytes.
    pub data: Bytes,
    /// The file ends here.
    pub last: bool,
}

/// Takes the next piece; after the last one, the path of the checked file and what it holds. A piece at offset 0 begins
/// anew, for one transfer is under way at a time.
///
/// # Errors
/// [`SnapshotError`]: the sender begins again.
pub async fn take_piece(
    shard: ShardId,
    (dir, space): (&Path, &Space),
    incoming: &mut Option<IncomingSnapshot>,
    piece: Piece,
) -> Result<Option<(PathBuf, AppliedState)>, SnapshotError> {
    // The file, and once it is whole the same again in the database.
    let needed = match (piece.last, &*incoming) {
        (true, Some(arriving)) => arriving.len_bytes + 2 * piece.data.len() as u64,
        _ => piece.data.len() as u64,
    };
    if !space.has_room_for(needed) {
        if let Some(given_up) = incoming.take() {
            tokio::fs::remove_file(&given_up.path).await?;
        }
        return Err(SnapshotError::NoRoom);
    }
    if piece.offset == 0 {
        let path = dir.join(format!("in-{shard}"));
        let file = tokio::fs::File::create(&path).await?;
        *incoming = Some(IncomingSnapshot { from: piece.from, transfer: piece.transfer, len_bytes: 0, path, file });
    }
    let Some(mut arriving) = incoming.take() else {
        return Err(SnapshotError::Damaged("a piece of no transfer".to_owned()));
    };
    if (arriving.from, arriving.transfer, arriving.len_bytes) != (piece.from, piece.transfer, piece.offset) {
        *incoming = Some(arriving);
        return Err(SnapshotError::Damaged("a piece out of order".to_owned()));
    }
    arriving.file.write_all(&piece.data).await?;
    arriving.len_bytes += piece.data.len() as u64;
    if !piece.last {
        *incoming = Some(arriving);
        return Ok(None);
    }
    arriving.file.flush().await?;
    drop(arriving.file);
    let path = arriving.path;
    let checked = path.clone();
    let applied = spawn_blocking(move || snapshot::check_file(&checked, shard)).await??;
    Ok(Some((path, applied)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fake_peers::FakePeers;
    use crate::message::{WireLogId, WireVote};

    const ME: ReplicaId = ReplicaId { disk: DiskId(1), incarnation: 7 };
    const OTHER: ReplicaId = ReplicaId { disk: DiskId(2), incarnation: 7 };

    fn links(answer: PeerResponse) -> PeerLinks {
        let transport = Arc::new(FakePeers::new(move |_, _, _| Some(answer.clone())));
        let deadline = Duration::from_secs(20);
        let peers = Arc::new(Peers {
            transport: transport.clone(),
            snapshot_dir: PathBuf::new(),
            transfers: AtomicU64::new(1),
            sending: Semaphore::new(1),
            message_deadline: deadline,
            space: Space::without_reserve(),
            heartbeats: Heartbeats::new(transport, Duration::from_millis(1), deadline),
            heard: Mutex::default(),
            complaints: LogPace::default(),
        });
        PeerLinks { shard: ShardId(1), me: ME, peers, barriers: Arc::default() }
    }

    /// What the library is told when it asks, as leader and as candidate of term 5, and this is the answer.
    async fn told(answer: PeerResponse) -> [bool; 3] {
        let leads = |committed| vote_from_wire(WireVote { term: 5, node: ME, committed });
        let append = || AppendEntriesRequest::<TypeConfig> {
            vote: leads(true),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        };
        let option = || RPCOption::new(Duration::from_secs(20));
        let mut links = links(answer);
        let (mut link, mut beats) = (links.new_client(OTHER, &()).await, links.new_heartbeat_client(OTHER, &()).await);
        let asked = link.vote(VoteRequest::new(leads(false), None), option()).await;
        let (appended, beat) =
            (link.append_entries(append(), option()).await, beats.append_entries(append(), option()).await);
        [asked.is_ok(), appended.is_ok(), beat.is_ok()]
    }

    #[tokio::test]
    async fn the_library_is_not_shown_an_answer_that_no_replica_gives() {
        let higher = |term| PeerResponse::HigherVote(WireVote { term, node: OTHER, committed: false });
        let voted = |term| PeerResponse::Voted {
            vote: WireVote { term, node: OTHER, committed: false },
            granted: false,
            last: None,
        };
        let [candidate, leader, nobody] = [[true, false, false], [false, true, true], [false; 3]];
        assert_eq!(told(voted(6)).await, candidate);
        assert_eq!(told(voted(u64::MAX)).await, nobody);
        assert_eq!(told(higher(6)).await, leader);
        assert_eq!(told(higher(u64::MAX)).await, nobody);
        assert_eq!(told(PeerResponse::AppendedTo(None)).await, leader);
        let beyond = WireLogId { term: 5, node: ME, index: 1 << 40 };
        assert_eq!(told(PeerResponse::AppendedTo(Some(beyond))).await, nobody);
    }
}
