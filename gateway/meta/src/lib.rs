//! One metadata shard, as values: a deterministic state machine over a small ordered map. No I/O, no async, no clock.
//!
//! In reading order:
//!
//! 1. [`record`], [`keys`], [`codec`], [`kv`]: what the map holds, byte by byte, and the seam to it.
//!    `docs/formats/metadata.md`.
//! 2. [`command`], [`nature`], [`reply`], [`check`], [`apply`] with [`objects`], [`uploads`], [`queues`],
//!    [`repair_slots`], [`buckets`], [`rules`], [`maps`], [`leases`], [`settings`], [`level`]: a batch and a command
//!    in, writes and a reply out.
//! 3. [`query`], [`answer`], [`list`]: a view and a query in, an answer out.
//! 4. [`message`]: requests and answers as bytes.
//! 5. [`memory`]: the shards of a cluster in memory, for tests of whoever talks to them.
//!
//! `MemoryKv` and a command are all a test needs. granary-replica runs this behind Raft, over RocksDB.

pub mod answer;
pub mod apply;
pub mod buckets;
pub mod check;
pub mod codec;
pub mod command;
pub mod keys;
pub mod kv;
pub mod leases;
pub mod level;
pub mod list;
pub mod maps;
pub mod memory;
pub mod message;
pub mod nature;
pub mod objects;
pub mod query;
pub mod queues;
pub mod record;
pub mod repair_slots;
pub mod reply;
pub mod rules;
pub mod settings;
pub mod uploads;

pub use command::{ChunkRef, Command, Conditions, MetaRequest, VersionPick};
pub use message::{BadBytes, ShardRequest, ShardResponse};
pub use query::{Answer, ListFrom, ListItem, ObjectSummary, Query};
pub use reply::Reply;
