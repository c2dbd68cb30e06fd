//! What runs metadata shards on a disk: Raft carries the commands of [`granary_meta`] to three or five disks, and all
//! replicas of a disk share two databases. In reading order:
//!
//! 1. [`store`] (RocksDB's door), [`writer`] (group commit), [`snapshot`]: what is durable when.
//! 2. [`log`] and [`raft`] (openraft's doors), [`message`]: the log, the replica, the words between replicas.
//! 3. [`batching`], [`host`]: commands and reads that share their rounds, and [`MetaHost`], which a disk node holds.
//!    [`members`]: how the members of a shard become those of the map.
//! 4. [`sleep`]: shards that nobody uses stop their timers. [`clock`]: leaders whose clocks are off give way. [`room`]:
//!    full disks take deletes and repairs only.
//!
//! What a 200 rests on: a command is acknowledged after a majority of disks synced it in their Raft logs ([`writer`]),
//! in the order of that log; the state is only a cache of it up to the last flush ([`store`]).

pub mod batching;
pub mod clock;
pub mod counters;
#[cfg(test)]
mod fake_peers;
pub mod fatal;
pub mod host;
pub mod log;
pub mod log_bytes;
pub mod members;
pub mod message;
pub mod raft;
pub mod room;
pub mod sleep;
pub mod snapshot;
pub mod store;
pub mod writer;

pub use clock::WallClock;
pub use counters::MetaCounters;
pub use granary_meta::level::{AWAY_LEVEL, MAX_FEATURE_LEVEL};
pub use host::{HostConfig, MetaError, MetaHost};
pub use raft::network::{PeerTransport, TransportError};
pub use raft::Timing;
pub use room::Space;
