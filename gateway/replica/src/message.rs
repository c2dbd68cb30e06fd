//! What replicas say to each other and keep in their logs, in our own types: neither bytes on the wire nor bytes on
//! disk depend on the Raft library. docs/formats/metadata.md draws both.

use bytes::Bytes;
use granary_meta::codec::Record;
use granary_meta::message::{decode_versioned, encode_versioned, BadBytes};
use granary_placement::id::{DiskId, ShardId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Version of messages between replicas. Version 1: the first.
pub const MESSAGE_VERSION: u8 = 1;
/// Version of log entries. Version 1: the first.
pub const ENTRY_VERSION: u8 = 1;

/// Which replica: its id in Raft. The disk's number alone would not do: metadata that were lost leave an empty replica
/// behind, and that one must never count as the one that voted and acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ReplicaId {
    /// The disk it is on.
    pub disk: DiskId,
    /// Drawn at random when the replica was made.
    pub incarnation: u64,
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{:016x}", self.disk, self.incarnation)
    }
}

/// For the Raft library's own tests, which number their replicas.
impl From<u64> for ReplicaId {
    fn from(number: u64) -> ReplicaId {
        ReplicaId { disk: DiskId(u32::try_from(number).unwrap_or(u32::MAX)), incarnation: 0 }
    }
}

/// A leader's or candidate's claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireVote {
    /// The Raft term.
    pub term: u64,
    /// The candidate or leader.
    pub node: ReplicaId,
    /// Granted by a majority: that node is leader.
    pub committed: bool,
}

/// A place in the log and the leadership it was written under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireLogId {
    /// Term of the leader.
    pub term: u64,
    /// The leader that wrote it.
    pub node: ReplicaId,
    /// Its index in the log, from 0.
    pub index: u64,
}

/// Members of a shard: one set of voters, or two while it changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WireMembership {
    /// Sets of voters.
    pub configs: Vec<Vec<ReplicaId>>,
    /// Voters and learners.
    pub nodes: Vec<ReplicaId>,
}

/// What an entry does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WirePayload {
    /// Nothing; a new leader begins with one.
    Blank,
    /// Requests, as [`encode_batch`](granary_meta::message::encode_batch) wrote them.
    Batch(Bytes),
    /// A change of members.
    Membership(WireMembership),
}

/// A log entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireEntry {
    /// Its place in the log.
    pub id: WireLogId,
    /// What it does.
    pub payload: WirePayload,
}

/// How far a shard's state was applied.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AppliedState {
    /// Last entry applied.
    pub last: Option<WireLogId>,
    /// Entry of the membership in force.
    pub membership_at: Option<WireLogId>,
    /// The membership in force.
    pub membership: WireMembership,
}

/// A message to a replica, with who speaks to whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerMessage {
    /// The sender. Its disk is that of the connection, and a claim to lead or a candidacy in the request is its own.
    pub from: ReplicaId,
    /// The replica that is meant; another one on that disk answers OtherReplica. None for what any may answer: Members
    /// and Identify.
    pub to: Option<ReplicaId>,
    /// What it says.
    pub request: PeerRequest,
}

/// What is said to a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerRequest {
    /// AppendEntries.
    Append {
        /// The vote under which the sender leads.
        vote: WireVote,
        /// Entry before the first.
        previous: Option<WireLogId>,
        /// Entries, bounded in number and bytes by the sender.
        entries: Vec<WireEntry>,
        /// What the leader has committed.
        committed: Option<WireLogId>,
    },
    /// RequestVote, or PreVote.
    Vote {
        /// The term and the candidate that asks.
        vote: WireVote,
        /// Its last entry.
        last: Option<WireLogId>,
        /// It was asked to by the leader.
        transfer: bool,
        /// PreVote: only ask whether the vote would be given; no term changes.
        pre_vote: bool,
    },
    /// The leader hands over.
    Transfer {
        /// The vote under which the sender leads.
        vote: WireVote,
        /// To whom.
        to: ReplicaId,
        /// Its last entry.
        last: Option<WireLogId>,
    },
    /// A piece of a snapshot file, in order.
    SnapshotPiece {
        /// The vote under which the sender leads.
        vote: WireVote,
        /// The number of the transfer, chosen by the sender.
        transfer: u64,
        /// Where the piece begins.
        offset: u64,
        /// At most [`crate::snapshot::PIECE_BYTES`].
        data: Bytes,
        /// The file ends here: install it.
        last: bool,
    },
    /// Who are the members, as you know them?
    Members,
    /// Which replica is there? An empty one is made for the answer where the map wants one.
    Identify,
    /// From the leader to a replica whose data cannot be used, once all that the leader has applied is on a majority of
    /// the voters, that one not counted: begin anew, empty and under another incarnation. Answers Identity.
    Rebuild,
}

/// The answer of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerResponse {
    /// All entries are on disk.
    Appended,
    /// Entries up to this one are.
    AppendedTo(Option<WireLogId>),
    /// The entry before the first is not there.
    Conflict,
    /// There is a later leader or candidate.
    HigherVote(WireVote),
    /// Answer to Vote.
    Voted {
        /// The vote it holds now.
        vote: WireVote,
        /// Granted?
        granted: bool,
        /// Its last entry.
        last: Option<WireLogId>,
    },
    /// Done.
    Done,
    /// Answer to the last piece: installed, or refused by a later vote.
    Installed(WireVote),
    /// Members as this replica knows them, and whether it leads.
    Members {
        /// It is the leader and a majority confirmed it just now.
        leads: bool,
        /// The members from this entry on.
        membership: WireMembership,
    },
    /// It could not be done.
    Failed(String),
    /// Answer to Identify.
    Identity {
        /// The replica that answers.
        me: ReplicaId,
        /// It has neither a log nor a vote.
        is_empty: bool,
    },
    /// The message was for another replica than the one that is here now.
    OtherReplica {
        /// The one that is here.
        me: ReplicaId,
    },
    /// The replica is here, but its data cannot be used.
    Broken {
        /// The one that is here.
        me: ReplicaId,
        /// Why.
        why: String,
    },
}

/// A shard that sleeps, or is to: its leader sends no Raft heartbeats for it, and its followers hold no elections while
/// the link to the leader's disk is alive and says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Asleep {
    /// The shard that the replica is of.
    pub shard: ShardId,
    /// Term of its leader.
    pub term: u64,
    /// Last index of its log, applied everywhere.
    pub index: u64,
}

/// The heartbeat of the link between two disks, both ways: the disk with the lower id sends one, the other answers with
/// its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LinkBeat {
    /// Shards that the sender leads, that have nothing to do, and of which the receiver holds a replica.
    pub asleep: Vec<Asleep>,
    /// Those of the receiver's last such list whose replica at the sender sleeps too.
    pub agreed: Vec<Asleep>,
    /// The sender's clock, Unix milliseconds.
    pub clock_ms: u64,
    /// The sender's disk has no room for metadata to grow.
    pub is_full: bool,
}

/// A message's bytes: version, postcard.
///
/// # Errors
/// [`BadBytes`] when it cannot be encoded, which no message of ours does.
pub fn encode_message<T: Serialize>(message: &T) -> Result<Bytes, BadBytes> {
    encode_versioned("message", MESSAGE_VERSION, message)
}

/// The message in those bytes.
///
/// # Errors
/// [`BadBytes`].
pub fn decode_message<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BadBytes> {
    decode_versioned("message", MESSAGE_VERSION, bytes)
}

/// A log entry as it lies on disk: CRC-32 (4, BE) over group (2, BE), index (8, BE) and the rest; version; postcard.
/// The seed makes an entry that lies in the wrong place fail as a flipped bit does.
///
/// # Errors
/// [`BadBytes`] when it cannot be encoded.
pub fn encode_entry(group: u16, entry: &WireEntry) -> Result<Vec<u8>, BadBytes> {
    let mut bytes = postcard::to_extend(entry, vec![0, 0, 0, 0, ENTRY_VERSION])
        .map_err(|error| BadBytes { what: "log entry", why: error.to_string() })?;
    let crc = entry_crc(group, entry.id.index, bytes.get(4..).unwrap_or_default());
    for (place, byte) in bytes.iter_mut().zip(crc.to_be_bytes()) {
        *place = byte;
    }
    Ok(bytes)
}

fn entry_crc(group: u16, index: u64, rest: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&group.to_be_bytes());
    crc.update(&index.to_be_bytes());
    crc.update(rest);
    crc.finalize()
}

/// The entry at `index` of `group` in those bytes.
///
/// # Errors
/// [`BadBytes`]: flipped, cut, misplaced, or of another version.
pub fn decode_entry(group: u16, index: u64, bytes: &[u8]) -> Result<WireEntry, BadBytes> {
    let bad = |why: &str| BadBytes { what: "log entry", why: format!("group {group} index {index}: {why}") };
    let (crc, rest) = bytes.split_first_chunk::<4>().ok_or_else(|| bad("cut short"))?;
    if u32::from_be_bytes(*crc) != entry_crc(group, index, rest) {
        return Err(bad("checksum mismatch"));
    }
    let entry: WireEntry = decode_versioned("log entry", ENTRY_VERSION, rest)?;
    if entry.id.index != index {
        return Err(bad("names another index"));
    }
    Ok(entry)
}

impl PeerRequest {
    /// The claim to lead, or the candidacy, that the sender makes with it.
    pub fn claim(&self) -> Option<&WireVote> {
        match self {
            PeerRequest::Append { vote, .. }
            | PeerRequest::Vote { vote, .. }
            | PeerRequest::Transfer { vote, .. }
            | PeerRequest::SnapshotPiece { vote, .. } => Some(vote),
            PeerRequest::Members | PeerRequest::Identify | PeerRequest::Rebuild => None,
        }
    }

    /// Does it bring what clients and healers asked for, which has no bound in size? A blank entry or a change of
    /// members is small.
    pub fn carries_commands(&self) -> bool {
        match self {
            PeerRequest::Append { entries, .. } => {
                entries.iter().any(|entry| matches!(entry.payload, WirePayload::Batch(_)))
            }
            _ => false,
        }
    }
}

/// Whose a metadata directory is, as its log database keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataIdentity {
    /// The disk it is on.
    pub disk: DiskId,
    /// Drawn at random when the directory was made; the disk's label has it too.
    pub number: u64,
    /// The number of the directory that was lost on this disk before it, if one was.
    pub replaces: Option<u64>,
}

/// That a replica lives here, as the log database keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// See [`ReplicaId::incarnation`].
    pub incarnation: u64,
}

/// Records that a replica keeps for itself; feature levels do not concern them.
macro_rules! first_version {
    ($($record:ty),+ $(,)?) => {
        $(impl Record for $record {
            const VERSION: u8 = 1;

            fn version_at(_level: u32) -> u8 {
                1
            }
        })+
    };
}

first_version!(AppliedState, WireVote, WireLogId, MetadataIdentity, ReplicaRecord);
