//! The scenery of the metadata tests: values shared with granary-meta's, and clusters of hosts.
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used, missing_docs)]

pub mod cluster;
#[path = "../../../meta/tests/scenery/mod.rs"]
mod values;

pub use values::*;
