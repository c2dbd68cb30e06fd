//! The S3 front end: the only folder that knows s3s.
//!
//! ```text
//! server (listener, bounds, time limits)
//!   -> service (ids, refusals, drain, log)  -> s3s: signatures, routing, XML
//!        -> access (who may come in)        -> verbs (the table) -> one verb family per file
//!                                                -> backend (the rest of the gateway, as a trait)
//! ```
//! Reading order: [`S3Context`] and its settings; `verbs` for the table; `put` for the path of an upload (`intake` for its bytes, `sums`
//! for what is verified); `get`; then any other verb. `error` is the only place where S3 error codes are chosen for foreign errors.
//!
//! **Invariant:** nothing is committed before the body came to its end without an error and all promised sums were compared.
//! **Invariant:** a payload whose commit may have happened is never deleted from here.

mod access;
pub mod backend;
mod body;
mod bucket;
mod complete;
mod context;
mod copy;
mod delete;
mod error;
mod get;
mod intake;
mod list;
mod live;
mod meta;
mod multipart;
mod probe;
mod put;
mod request;
mod server;
mod service;
mod sums;
#[cfg(test)]
mod tests;
mod verbs;

pub use access::AccessKey;
pub use context::{S3Context, S3Settings};
pub use live::Live;
pub use server::serve;
pub use service::S3SetupError;
