//! The Raft library's types as we choose them, and their conversions to and from our own form.

use crate::message::{AppliedState, ReplicaId, WireEntry, WireLogId, WireMembership, WirePayload, WireVote};
use bytes::Bytes;
use granary_meta::message::decode_batch;
use granary_meta::{BadBytes, MetaRequest, Reply};
use openraft::{EntryPayload, Membership, StoredMembership};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::sync::Arc;

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
    /// Our choice of openraft's types. Addresses come from the cluster map.
    pub TypeConfig:
        D = Batch,
        R = Replies,
        NodeId = ReplicaId,
        Node = (),
        AsyncRuntime = super::runtime::ReplicaRuntime,
);

pub(super) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, ReplicaId>;
/// A vote.
pub type Vote = openraft::impls::Vote<LeaderId>;
/// A place in the log.
pub type LogId = openraft::impls::LogId<LeaderId>;
type Payload = EntryPayload<Batch, ReplicaId, ()>;
/// A log entry.
pub type Entry = openraft::impls::Entry<LeaderId, Payload>;
pub(super) type Members = StoredMembership<LeaderId, ReplicaId, ()>;

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

pub(super) fn membership_to_wire(membership: &Membership<ReplicaId, ()>) -> WireMembership {
    WireMembership {
        configs: membership.get_joint_config().iter().map(|config| config.iter().copied().collect()).collect(),
        nodes: membership.nodes().map(|(node, ())| *node).collect(),
    }
}

fn membership_from_wire(membership: WireMembership) -> Membership<ReplicaId, ()> {
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

pub(super) fn members_from_applied(applied: &AppliedState) -> Members {
    Members::new(applied.membership_at.map(log_id_from_wire), membership_from_wire(applied.membership.clone()))
}
