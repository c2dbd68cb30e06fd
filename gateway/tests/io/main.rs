//! Payloads on disks, end to end over real connections: disk nodes are in-process servers with their chunks in memory
//! and faults on demand.
//!
//! - [`node`]: such a disk node; [`cluster`]: some of them, a map, and an object store on top;
//! - [`write`], [`read`]: what staging and reading promise; [`reads`]: reads that last long;
//! - [`peers`]: the metadata shards, in memory; [`meta`]: what tests do in them behind the gateways' backs;
//! - [`heal`]: what repair and garbage collection promise; [`healers`]: several healers at once; [`takeover`]: gateways
//!   that are paused and killed while they heal; [`moves`]: slots that get another disk; [`census`]: the count;
//!   [`lost`]: keys that cannot be read; [`sweep`]: what becomes of chunks that nobody owns; [`away`]: disks that go
//!   out of service and come back; [`scrub`]: what disks find damaged by themselves.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../../disk-node/tests/answers/rows.rs"]
mod answers;
mod away;
mod census;
mod cluster;
mod heal;
mod healers;
mod lost;
mod meta;
mod moves;
mod node;
#[allow(dead_code)] // the tests inside the gateway use more of it
mod peers;
mod read;
mod reads;
mod scrub;
mod sweep;
mod takeover;
mod write;
