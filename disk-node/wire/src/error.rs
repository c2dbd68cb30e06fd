//! What can go wrong between two nodes. Every error is `Clone`: one lost connection fails many waiters.

use crate::auth::VersionRange;

/// Why a connection was not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The other end does not speak this protocol at all.
    #[error("the peer does not speak the Granary node protocol")]
    Magic,
    /// The other end speaks no version of it that this end does.
    #[error("the peer speaks {theirs} of the node protocol, this end speaks {ours}: upgrade the older of the two")]
    Version {
        /// Versions of this end.
        ours: VersionRange,
        /// Versions of the other end.
        theirs: VersionRange,
    },
    /// The other end belongs to another cluster.
    #[error("the peer belongs to another cluster")]
    Cluster,
    /// The other end does not know the cluster secret.
    #[error("the peer does not have the same cluster secret")]
    Secret,
    /// The client meant another disk than the one at this address.
    #[error("another disk answers at this address than the one meant")]
    Disk,
    /// A request or an answer that was altered, replayed or put in another order.
    #[error("a message does not carry the authentication code it should")]
    Message,
}

/// Why nothing came back from a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// No connection could be made: the request was certainly not sent.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The peer, or this end in the peer's eyes, is not who it should be.
    #[error("not authenticated: {0}")]
    Auth(#[from] AuthError),
    /// No answer in time. The request may have been carried out.
    #[error("no answer in time")]
    Timeout,
    /// The connection was lost. The request may have been carried out.
    #[error("connection lost: {0}")]
    Closed(String),
    /// A message is longer than a frame may be. Nothing was sent.
    #[error("message too large")]
    TooLarge,
    /// Too many requests are under way to this peer, or connections to it. Nothing was sent.
    #[error("too many requests or connections under way to this peer")]
    Busy,
    /// The peer said something that makes no sense.
    #[error("protocol error: {0}")]
    Protocol(String),
}

/// Why a chunk could not be stored or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The disk does not have it.
    #[error("no such chunk")]
    NotFound,
    /// A block does not agree with its checksum.
    #[error("block {block} is corrupt")]
    Corrupt {
        /// Number of the block in the chunk.
        block: u32,
    },
    /// The disk has no room for it.
    #[error("disk full")]
    DiskFull,
    /// Queues or pools are full; nothing was done. Wait and retry.
    #[error("overloaded")]
    Overloaded,
    /// The request makes no sense; repeating it will not help.
    #[error("rejected: {0}")]
    Rejected(String),
    /// The node cannot use its disk.
    #[error("disk error: {0}")]
    Disk(String),
    /// The node could not be asked, or did not answer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The sender does not hold the lease of its task any more: another holder has acted here since. Nothing was done.
    #[error("the lease of this task was taken over (epoch {current} now)")]
    StaleLease {
        /// The epoch that the disk knows.
        current: u64,
    },
}
