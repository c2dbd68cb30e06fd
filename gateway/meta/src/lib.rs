//! One metadata shard, and a disk full of them.
//!
//! A shard is a deterministic state machine over a small ordered map; Raft carries its commands to three or five disks; all replicas of a
//! disk share two databases. In reading order:
//!
//! 1. [`keys`], [`codec`], [`kv`]: what the map holds, byte by byte, and the seam to it. `docs/formats/metadata.md`.
//! 2. [`command`], [`apply`] with [`objects`], [`uploads`], [`queues`], [`buckets`]: a batch and a command in, writes and a reply out.
//! 3. [`query`], [`list`]: a view and a query in, an answer out.
//! 4. [`store`] (RocksDB's door), [`writer`] (group commit), [`snapshot`]: what is durable when.
//! 5. [`log`] and [`raft`] (openraft's doors), [`message`]: the log, the replica, the words between replicas.
//! 6. [`lanes`], [`host`]: batching of commands and reads, and [`MetaHost`], which a disk node holds.
//!
//! 2 and 3 are pure: `MemoryKv` and a command are all a test needs. What a 200 rests on: a command is acknowledged after a majority of
//! disks synced it in their Raft logs ([`writer`]), in the order of that log; the state is only a cache of it up to the last flush
//! ([`store`]).

pub mod apply;
pub mod buckets;
pub mod codec;
pub mod command;
pub mod fatal;
pub mod host;
pub mod keys;
pub mod kv;
pub mod lanes;
pub mod list;
pub mod log;
pub mod message;
pub mod objects;
pub mod query;
pub mod queues;
pub mod raft;
pub mod snapshot;
pub mod store;
pub mod uploads;
pub mod writer;

pub use host::{HostConfig, MetaCounters, MetaError, MetaHost};
pub use raft::network::{PeerTransport, TransportError};
pub use raft::Timing;
