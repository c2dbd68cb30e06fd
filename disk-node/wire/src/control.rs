//! Everything said over the one multiplexed control connection of a peer: chunk housekeeping, metadata, Raft, status.

use crate::auth::{AWAY_VERSION, DAMAGED_VERSION, PROTOCOL_VERSIONS};
use crate::chunk::{ChunkHealth, ChunkId, ChunkInfo};
use bytes::Bytes;
use granary_placement::id::{DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::{ClusterMap, MapDiff};
use serde::{Deserialize, Serialize};

/// A request to a disk node. Postcard-encoded: variants are only ever added at the end, and with a new protocol
/// version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Answers Status.
    Status,
    /// Deletes chunks. Answers Deleted when the deletions are durable. A chunk that is not there counts as deleted.
    DeleteChunks {
        /// Which, at most 1,000.
        chunks: Vec<ChunkId>,
        /// The lease under which background work deletes; refused with StaleLease once another holder has acted here.
        lease: Option<LeaseStamp>,
    },
    /// Which of these chunks (at most 1,000) are in the index? Reads no payload. Answers Have.
    HaveChunks(Vec<ChunkId>),
    /// Reads these chunks (at most 256) from the disk and checks every block. Answers Health.
    VerifyChunks(Vec<ChunkId>),
    /// Chunks in order of their ids. Answers Chunks.
    ListChunks {
        /// After this one.
        after: Option<ChunkId>,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
    /// A request to a shard whose leader is here. Answers Shard.
    Shard {
        /// The shard that is meant; its replica must be on this disk.
        shard: ShardId,
        /// A `ShardRequest` of granary-meta, unread here.
        request: Bytes,
    },
    /// A Raft message between replicas; the body is granary-replica's own. Answers Raft.
    Raft {
        /// The shard that is meant; its replica must be on this disk.
        shard: ShardId,
        /// Who sends it.
        from: DiskId,
        /// A message of granary-replica, unread here.
        message: Bytes,
    },
    /// Makes this node the first of a new shard with these members; repeated, it does nothing. Answers Done.
    InitShard {
        /// The shard that is meant; its replica must be on this disk.
        shard: ShardId,
        /// All members, this one among them.
        members: Vec<DiskId>,
    },
    /// Here is a map; taken if its epoch is higher than the one known. Answers Done.
    OfferMap(Box<ClusterMap>),
    /// The newest map this node knows. Answers Map.
    GetMap,
    /// How the replicas on this node stand. Answers Shards.
    ShardStatus,
    /// Here is what changed in the map. Answers Done when it led to a newer map or the node has one at least as new;
    /// EpochMismatch when the node has another map than the one it was made from: it is then offered the whole.
    OfferMapDiff(Box<MapDiff>),
    /// Heartbeats of several shards, each as in Raft, that were due at about the same time. Answers RaftBatch.
    RaftBatch {
        /// Who sends them.
        from: DiskId,
        /// Which shard each is for, and the message; at most 1,000.
        messages: Vec<(ShardId, Bytes)>,
    },
    /// The heartbeat of the link between two metadata disks, which stands for those of all shards that sleep; the body
    /// is granary-replica's own. Answers LinkBeat.
    LinkBeat {
        /// Who sends it.
        from: DiskId,
        /// A message of granary-replica, unread here.
        message: Bytes,
    },
    /// Puts chunks into quarantine, or takes them out: a mark with the time of its setting, which ListChunks shows.
    /// Nothing else changes; a chunk in quarantine is read like any other. A chunk that is in it already keeps its
    /// time, one that is not there is left out. Answers Done.
    Quarantine {
        /// Which, at most 1,000.
        chunks: Vec<ChunkId>,
        /// Into it, or out of it.
        into: bool,
        /// The lease under which it is done.
        lease: LeaseStamp,
    },
    /// What changed in the map since that epoch. Answers MapDiffs, where this node still knows, or Map: the newest, or
    /// none when it is not newer.
    GetMapSince(Epoch),
    /// Does this node reach these disks (at most 64) right now? It asks each for its status. Answers Reached.
    Reach(Vec<DiskId>),
    /// Chunks that the node's scrub found damaged, in order of their ids. One leaves the list when it is replaced,
    /// deleted, or verified and found good. Answers Chunks, without marks of quarantine.
    ListDamaged {
        /// After this one.
        after: Option<ChunkId>,
        /// At most this many, 1 to 1,000.
        limit: u32,
    },
}

impl ControlRequest {
    /// The oldest protocol version whose speakers can read it. It is sent to no others.
    pub fn since(&self) -> u16 {
        let away = match self {
            ControlRequest::ListDamaged { .. } => return DAMAGED_VERSION,
            ControlRequest::Reach(_) => true,
            ControlRequest::OfferMap(map) => map.has_away(),
            ControlRequest::OfferMapDiff(diff) => diff.has_away(),
            _ => false,
        };
        since(away)
    }
}

impl ControlResponse {
    /// The oldest protocol version whose speakers can read it. It is sent to no others.
    pub fn since(&self) -> u16 {
        let away = match self {
            ControlResponse::Reached(_) => true,
            ControlResponse::Map(map) => map.as_ref().is_some_and(|map| map.has_away()),
            ControlResponse::MapDiffs(diffs) => diffs.iter().any(MapDiff::has_away),
            _ => false,
        };
        since(away)
    }
}

fn since(away: bool) -> u16 {
    if away {
        AWAY_VERSION
    } else {
        PROTOCOL_VERSIONS.min
    }
}

/// The answer of a disk node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlResponse {
    /// Done.
    Done,
    /// How the node stands.
    Status(NodeStatus),
    /// How many of them were there.
    Deleted(u32),
    /// In the order asked.
    Have(Vec<bool>),
    /// In the order asked.
    Health(Vec<ChunkHealth>),
    /// A page.
    Chunks {
        /// In order.
        chunks: Vec<ChunkInfo>,
        /// There is more.
        more: bool,
    },
    /// A `ShardResponse` of granary-meta, unread here.
    Shard(Bytes),
    /// The Raft answer.
    Raft(Bytes),
    /// The map, if there is one.
    Map(Option<Box<ClusterMap>>),
    /// How the replicas stand.
    Shards(Vec<ShardStatus>),
    /// It could not be done.
    Error(ControlError),
    /// The answer to each message, in the order they came.
    RaftBatch(Vec<Result<Bytes, ControlError>>),
    /// The other end's heartbeat of the link.
    LinkBeat(Bytes),
    /// Differences that lead from the map asked about to the newest one, in order.
    MapDiffs(Vec<MapDiff>),
    /// In the order asked: whether the very disk that the newest map means by that number answered this node.
    Reached(Vec<Reach>),
}

/// What a node found out about another disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// It answered.
    Reached,
    /// It was tried just now and does not answer, or says that it cannot use its disk, or another is at its address.
    Unreached,
    /// This node could not try it, or what came back says nothing of the disk.
    Unknown,
}

/// Why a request could not be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ControlError {
    /// Ask the leader; None when an election is under way. The command was not proposed.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// Who leads.
        leader: Option<DiskId>,
    },
    /// No majority answered, or leadership was lost on the way. A command may or may not have been applied: retry it
    /// under the same request id.
    #[error("shard unavailable: {0}")]
    Unavailable(String),
    /// This node holds no replica of that shard.
    #[error("no replica of shard {0} here")]
    NoSuchShard(ShardId),
    /// Queues are full; nothing was done. Wait and retry.
    #[error("overloaded")]
    Overloaded,
    /// The request makes no sense.
    #[error("bad request: {0}")]
    BadRequest(String),
    /// The node cannot use its disk.
    #[error("disk error: {0}")]
    Disk(String),
    /// The difference is from another map than the node has.
    #[error("the node has the map of epoch {known}")]
    EpochMismatch {
        /// Epoch of the newest map that it knows; zero for none.
        known: Epoch,
    },
    /// The sender does not hold the lease of its task any more: another holder has acted here since. Nothing was done.
    #[error("the lease of this task was taken over (epoch {current} now)")]
    StaleLease {
        /// The epoch that the node knows.
        current: u64,
    },
    /// The sender's clock and the shard leader's are too far apart. Nothing was done.
    #[error("the sender's clock is {ahead_ms} ms ahead of the shard leader's")]
    ClockOff {
        /// How far the sender's is ahead, in milliseconds; negative: it lags.
        ahead_ms: i64,
    },
    /// A disk of the shard has no room for what makes metadata grow; deletes are taken. Nothing was done.
    #[error("disk {disk} has no room left for more metadata")]
    NoRoom {
        /// Which disk.
        disk: DiskId,
    },
}

/// How a disk node stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its number by its own label; None before it was given one.
    pub disk: Option<DiskId>,
    /// The UUID on the disk's label.
    pub uuid: DiskUuid,
    /// Epoch of the newest map it knows; zero for none.
    pub epoch: Epoch,
    /// Size of the file system, in bytes.
    pub capacity_bytes: u64,
    /// What new chunks may still take, reserve left out, in bytes.
    pub free_bytes: u64,
    /// Chunks in the index.
    pub chunks: u64,
    /// Payload of them, in bytes.
    pub chunk_bytes: u64,
    /// The highest feature level that its build of the shards' state machine knows.
    pub feature_level: u32,
    /// How many connections for chunk requests the gateway that asks may have: its share of the node's places. Zero:
    /// not said.
    pub data_connections: u32,
}

/// How a shard's replica on one disk stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStatus {
    /// The shard that the replica is of.
    pub shard: ShardId,
    /// `leader`, `follower`, `candidate` or `learner`; `stopped` when its data cannot be used, `failed` between a panic
    /// in it and its next opening.
    pub state: String,
    /// Current term.
    pub term: u64,
    /// Who leads, as far as this replica knows.
    pub leader: Option<DiskId>,
    /// Last log index on this disk.
    pub last_log_index: u64,
    /// Last applied index.
    pub applied_index: u64,
    /// Voters by the membership in force.
    pub voters: Vec<DiskId>,
}
