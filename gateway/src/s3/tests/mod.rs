//! The whole front end over a cluster inside the test process: HTTP on loopback, signatures made by hand, the real
//! shards and object store below. See [`cluster`].
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod accounts;
mod client;
mod cluster;
mod http;
mod listing;
mod moves;
mod multipart;
#[allow(missing_docs, dead_code)] // shared with the tests of the object store, which use more of it
#[path = "../../../tests/io/node.rs"]
mod node;
mod objects;
mod rules;
mod signatures;
mod strict;
