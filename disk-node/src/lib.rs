//! The daemon of one disk.
//!
//! Reading order:
//! 1. [`store`]: the chunk store, segments and index, with crash recovery;

pub mod metrics;
pub mod store;
