//! The gateway: a stateless front end. Any number of them run beside each other, all equal.
//!
//! Reading order:
//! 1. [`settings`], [`logging`], [`metrics`]: what it is told, and what it tells;
//! 2. [`shards`]: the way to the metadata shards: leaders, retries, listings over all shards, the cluster map;
//! 3. [`disks`], [`object`]: disk nodes and whether they answer; payloads on their way into extents and back;
//! 4. [`ops`]: changes of the cluster map and of feature levels, pure, and how they are committed; settings of the
//!    whole cluster; [`background`]: repair, garbage and walks, each at one gateway at a time, and the census;
//! 5. [`s3`]: the S3 front end, and [`digest`], the checksums it makes; [`door`]: the places of a listener;
//! 6. [`admin`]: health, metrics, status page and the admin API; [`gateway`]: one gateway put together, from start to
//!    drain; [`bootstrap`] forms a new cluster;
//! 7. [`cli`]: the `granary` command on top of it; [`dev`]: a whole cluster on one machine, for `granary dev`.

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
mod door;
pub mod gateway;
pub mod logging;
pub mod metrics;
pub mod object;
pub mod ops;
pub mod s3;
pub mod settings;
pub mod shards;
