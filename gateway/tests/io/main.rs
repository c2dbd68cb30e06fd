//! Payloads on disks, end to end over real connections: disk nodes are in-process servers with their chunks in memory and faults
//! on demand.
//!
//! - [`node`]: such a disk node; [`cluster`]: some of them, a map, and an object store on top;
//! - [`write`], [`read`]: what staging and reading promise.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cluster;
mod node;
mod read;
mod write;
