//! What can be said to a disk node, and the client end of saying it.
//!
//! Reading order:
//! 1. [`chunk`]: chunk ids, what a chunk is, block checksums;
//! 2. [`record`] and [`meta`]: what metadata shards store, the commands that change it and the queries that read it;
//! 3. [`control`]: everything said over the one multiplexed control connection of a peer;
//! 4. [`auth`] and [`frame`]: the handshake that opens every connection, the frames of a control connection;
//! 5. [`server`] and [`client`]: both ends; [`error`]: what can go wrong between them.
//!
//! Chunk bytes travel as raw HTTP/1.1 bodies on pooled connections; everything else as frames on one connection per peer.

pub mod auth;
mod body;
pub mod chunk;
pub mod client;
pub mod control;
pub mod error;
pub mod frame;
mod head;
pub mod meta;
pub mod record;
pub mod server;

// The test support is shared with the integration tests and names this crate as they do.
#[cfg(test)]
extern crate self as granary_wire;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod test_support;

pub use auth::{ClusterSecret, Credentials, PROTOCOL_VERSION};
pub use client::{ChunkWriter, ClientLimits, NodeClient};
pub use error::{AuthError, ChunkError, LinkError};
pub use server::{serve, ChunkBlocks, ChunkSink, NodeService, ServerLimits};
