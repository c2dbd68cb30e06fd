//! What can be said to a disk node, and the client end of saying it.
//!
//! Reading order:
//! 1. [`chunk`]: chunk ids, what a chunk is, block checksums;
//! 2. [`record`] and [`meta`]: what metadata shards store, the commands that change it and the queries that read it;
//! 3. [`control`]: everything said over the one multiplexed control connection of a peer;
//! 4. [`auth`], [`frame`], [`server`], [`client`]: the handshake, the frames, both ends of a connection.
//!
//! Chunk bytes travel as raw HTTP/1.1 bodies on pooled connections; everything else as frames on one connection per peer.

pub mod chunk;
pub mod control;
pub mod meta;
pub mod record;
