//! The harness of the suites: a real cluster in a folder of its own, real clients, and tools that break things.
//!
//! Reading order:
//! 1. [`cluster`]: `granary dev` as a child process; its disk nodes found, killed, emptied and started again;
//! 2. [`tree`]: source trees, and the judge that compares a restored tree byte for byte;
//! 3. [`programs`]: where the client programs are, in a clean environment;
//! 4. [`register`]: what a key may hold while several write and read it;
//! 5. [`seed`]: seeded randomness that prints how to replay it.
//!
//! A test that cannot get what it needs (a program, a mount) fails; nothing is skipped.
// A harness that cannot go on fails the test that uses it, with the reason: that is what a panic is for here.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod cluster;
pub mod programs;
pub mod register;
pub mod seed;
pub mod tree;

/// True in the long form (`make soak`).
pub fn soak() -> bool {
    std::env::var_os("GRANARY_SOAK").is_some()
}
