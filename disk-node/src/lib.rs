//! The daemon of one disk: its chunks, its shard replicas, and the server in front of them.
//!
//! Reading order:
//! 1. [`label`]: which disk of which cluster this is, and the lock on it;
//! 2. [`store`]: the chunk store: segments, index, recovery; the bulk of this crate, with a map of its own;
//! 3. [`maps`] and [`peers`]: the newest cluster map, and the other disk nodes;
//! 4. [`roles`]: the shard replicas of this disk; [`neighbours`]: who shares its file system;
//! 5. [`scrub`]: the task that has every chunk read now and then;
//! 6. [`chunks`]: what is answered to each request; [`serve`]: how the parts are put together and stopped;
//! 7. [`inspect`]: reading a disk that nobody serves; [`admin`] and [`metrics`]: health and counters.
//!
//! One process per disk: when a disk can no longer be trusted its process ends, and nothing else does.

pub mod admin;
pub mod chunks;
pub mod inspect;
pub mod label;
pub mod leases;
pub mod maps;
pub mod metrics;
pub mod neighbours;
pub mod peers;
pub mod roles;
pub mod scrub;
pub mod serve;
pub mod store;
