//! What the benchmarks share with the test suites: a small S3 client that signs with a third party's signer and says exactly
//! what it sent and got.
//!
//! Reading order: [`s3`], the client; then the subcommands of `granary-bench`, one module each.

pub mod s3;
