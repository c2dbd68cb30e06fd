//! What can be said to a disk node, and the client end of saying it.
//!
//! Reading order:
//! 1. [`chunk`]: chunk ids, what a chunk is, block checksums;
//! 2. [`control`]: everything said over the one multiplexed control connection of a peer;
//! 3. [`auth`] and [`frame`]: the handshake that opens every connection, the frames of a control connection;
//! 4. [`server`] and [`client`]: both ends; [`error`]: what can go wrong between them.
//!
//! Chunk bytes travel as raw HTTP/1.1 bodies on pooled connections; everything else as frames on one connection per
//! peer.

pub mod auth;
mod body;
pub mod chunk;
pub mod client;
pub mod control;
pub mod error;
pub mod frame;
mod head;
mod log_pace;
pub mod server;

// The test support is shared with the integration tests and names this crate as they do.
#[cfg(test)]
extern crate self as granary_wire;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod test_support;

pub use auth::{
    ClusterSecret, Credentials, Ends, GatewayId, VersionRange, AWAY_VERSION, DAMAGED_VERSION, PROTOCOL_VERSIONS,
};
pub use client::{ChunkWriter, ClientLimits, NodeClient};
pub use error::{AuthError, ChunkError, LinkError};
pub use log_pace::LogPace;
pub use server::{serve, Asker, ChunkBlocks, ChunkSink, NodeService, ServerLimits};
