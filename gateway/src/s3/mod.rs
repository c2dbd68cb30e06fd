//! The S3 front end: the only folder that knows s3s.
//!
//! ```text
//! server (listener, bounds, time limits)
//!   -> service (ids, refusals, drain, log)  -> s3s: signatures, routing, XML
//!        -> access (who may come in)        -> verbs (the table) -> one verb family per file
//!                                                -> shards (records) and object store (payloads)
//! ```
//! Reading order: [`S3Context`] and its settings; `verbs` for the table; `call` for what every verb is given: the
//! caller, and the way to buckets and shards; `put` for the path of an upload (`upload_body` for its bytes, `checksums`
//! for what is verified, `commit` for how it gets its record); `get`; then any other verb. `error` is the only place
//! where S3 error codes are chosen for foreign errors.
//!
//! **Invariant:** nothing is committed before the body came to its end without an error and all promised checksums were
//! compared.
//! **Invariant:** a payload whose commit may have happened is never deleted from here.

mod access;
mod bucket;
mod call;
mod checksums;
mod commit;
mod complete;
mod context;
mod copy;
mod delete;
mod error;
mod get;
mod host;
mod list;
mod meta;
mod multipart;
mod put;
mod request;
mod request_body;
mod response_body;
mod server;
mod service;
mod strict;
mod subresources;
#[cfg(test)]
mod tests;
mod upload_body;
mod verbs;
mod xml_scan;

pub use access::AccessKey;
pub use context::{S3Context, S3Settings};
pub use server::serve;
pub use service::S3SetupError;
