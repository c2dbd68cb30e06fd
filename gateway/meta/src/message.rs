//! The bytes of requests and answers of a shard: what a gateway sends to the disk that leads it, and what its log
//! keeps. The wire carries them unread. docs/formats/metadata.md draws both.

use crate::command::MetaRequest;
use crate::query::{Answer, Query};
use crate::reply::Reply;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of requests to a shard and their answers. Version 1: the first.
pub const SHARD_VERSION: u8 = 1;
/// Version of batches of requests inside a log entry. Version 1: the first.
pub const BATCH_VERSION: u8 = 1;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct BadBytes {
    /// What was expected.
    pub what: &'static str,
    /// What is wrong.
    pub why: String,
}

/// What is asked of a shard's leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "one lives for one request; a box would cost every command an allocation")]
pub enum ShardRequest {
    /// A change. Answers [`ShardResponse::Reply`].
    Command(MetaRequest),
    /// A linearizable read. Answers [`ShardResponse::Answer`].
    Query(Query),
}

/// What a shard's leader answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardResponse {
    /// The command was applied; this is its reply.
    Reply(Reply),
    /// What the query found.
    Answer(Answer),
}

impl ShardRequest {
    /// The request's bytes: version, postcard.
    ///
    /// # Errors [`BadBytes`] when it cannot be encoded, which no request of ours does.
    pub fn encode(&self) -> Result<Bytes, BadBytes> {
        encode_versioned("shard request", SHARD_VERSION, self)
    }

    /// The request in those bytes, all of them.
    ///
    /// # Errors [`BadBytes`].
    pub fn decode(bytes: &[u8]) -> Result<ShardRequest, BadBytes> {
        decode_versioned("shard request", SHARD_VERSION, bytes)
    }
}

impl ShardResponse {
    /// The answer's bytes: version, postcard.
    ///
    /// # Errors [`BadBytes`] when it cannot be encoded, which no answer of ours does.
    pub fn encode(&self) -> Result<Bytes, BadBytes> {
        encode_versioned("shard answer", SHARD_VERSION, self)
    }

    /// The answer in those bytes, all of them.
    ///
    /// # Errors [`BadBytes`].
    pub fn decode(bytes: &[u8]) -> Result<ShardResponse, BadBytes> {
        decode_versioned("shard answer", SHARD_VERSION, bytes)
    }
}

/// A version byte and the postcard of a value.
///
/// # Errors [`BadBytes`] when it cannot be encoded.
pub fn encode_versioned<T: Serialize>(what: &'static str, version: u8, value: &T) -> Result<Bytes, BadBytes> {
    postcard::to_extend(value, vec![version])
        .map(Bytes::from)
        .map_err(|error| BadBytes { what, why: error.to_string() })
}

/// The value behind a version byte, which must be `version`, and nothing behind it.
///
/// # Errors [`BadBytes`].
pub fn decode_versioned<T: DeserializeOwned>(what: &'static str, version: u8, bytes: &[u8]) -> Result<T, BadBytes> {
    let bad = |why: String| BadBytes { what, why };
    match bytes.split_first() {
        Some((found, body)) if *found == version => match postcard::take_from_bytes(body) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(bad(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(bad(error.to_string())),
        },
        Some((found, _)) => Err(bad(format!("version {found} is not known to this build"))),
        None => Err(bad("empty".to_owned())),
    }
}

/// One command's bytes, as they stand in a batch.
///
/// # Errors [`BadBytes`] when it cannot be encoded.
pub fn encode_request(request: &MetaRequest) -> Result<Vec<u8>, BadBytes> {
    postcard::to_stdvec(request).map_err(|error| BadBytes { what: "request", why: error.to_string() })
}

/// A batch of encoded requests: version, count as varint, the requests. The same bytes as postcard of
/// `Vec<MetaRequest>`.
pub fn encode_batch<'a>(requests: impl ExactSizeIterator<Item = &'a [u8]>) -> Bytes {
    let mut bytes = vec![BATCH_VERSION];
    let mut count = requests.len();
    while count >= 0x80 {
        bytes.push((count & 0x7f) as u8 | 0x80);
        count >>= 7;
    }
    bytes.push(count as u8);
    for request in requests {
        bytes.extend_from_slice(request);
    }
    Bytes::from(bytes)
}

/// The requests of a batch.
///
/// # Errors [`BadBytes`].
pub fn decode_batch(bytes: &[u8]) -> Result<Vec<MetaRequest>, BadBytes> {
    decode_versioned("batch", BATCH_VERSION, bytes)
}
