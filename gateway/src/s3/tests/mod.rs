//! The whole front end over a store in memory: real HTTP on loopback, signatures made by hand.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod client;
mod http;
mod listing;
mod memory;
mod multipart;
mod objects;
mod signatures;
