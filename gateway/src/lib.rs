//! The gateway: a stateless front end. Any number of them run beside each other, all equal.
//!
//! Reading order:
//! 1. [`settings`], [`logging`], [`metrics`]: what it is told, and what it tells;
//! 2. [`shards`]: the way to the metadata shards: leaders, retries, listings over all shards, the cluster map;
//! 3. [`disks`], [`object`]: disk nodes and whether they answer; payloads on their way into extents and back;
//!    [`background`]: repair, garbage and walks, each at one gateway at a time, and the census;
//! 4. [`s3`]: the S3 front end over both, and [`digest`], the checksums it makes;
//! 5. [`gateway`]: one gateway put together, from start to drain; [`bootstrap`] forms a new cluster;
//! 6. [`ops`]: changes of the cluster map, pure, and how they are committed;
//!    [`admin`]: health, metrics, status page and the admin API; [`cli`]: the `granary` command on top of it;
//! 7. [`dev`]: a whole cluster on one machine, for `granary dev`.

// Files that tests/ shares with the tests in here name the crate.
#[cfg(test)]
extern crate self as granary_gateway;

pub mod admin;
pub mod background;
pub mod backoff;
pub mod bootstrap;
pub mod cli;
mod descriptors;
pub mod dev;
mod digest;
pub mod disks;
pub mod gateway;
pub mod logging;
pub mod metrics;
pub mod object;
pub mod ops;
pub mod s3;
pub mod settings;
pub mod shards;
