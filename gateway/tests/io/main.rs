//! Payloads on disks, end to end over real connections: disk nodes are in-process servers with their chunks in memory
//! and faults on demand.
//!
//! - [`node`]: such a disk node; [`cluster`]: some of them, a map, and an object store on top;
//! - [`write`], [`read`]: what staging and reading promise;
//! - [`meta`]: metadata shards as maps; [`heal`]: what repair, garbage collection and census promise.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;
mod heal;
mod meta;
mod node;
mod read;
mod write;
