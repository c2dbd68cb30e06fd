//! Heads of chunk requests and answers: paths, queries, error codes, and the codes that authenticate them.
//!
//! A request carries `x-granary-mac`: HMAC-SHA256 under the client's session key over a label, the number of requests
//! before it on the connection (u64), method, path with query (each with its length, u32, before it) and content length
//! (u64; all ones for none), and `x-granary-lease` with its length if the request has one. An answer carries one under
//! the server's session key over a label, the same number, status (u16), `x-granary-answer` (with its length) and
//! content length. The counters are not sent: each end counts, so nothing can be repeated or reordered.

use crate::auth::{same, MacKey};
use crate::chunk::{block_count, ChunkId, ChunkSpec, MAX_CHUNK_BYTES};
use crate::error::ChunkError;
use granary_placement::id::HashSlot;
use granary_placement::lease::LeaseStamp;
use granary_placement::scheme::CodecId;
use http::{HeaderMap, StatusCode};

/// Header with the authentication code.
pub(crate) const MAC_HEADER: &str = "x-granary-mac";
/// Header of an answer: the spec of the blocks that follow, or what went wrong.
pub(crate) const ANSWER_HEADER: &str = "x-granary-answer";
/// Header of a background write: the lease it is made under.
pub(crate) const LEASE_HEADER: &str = "x-granary-lease";
/// Paths of chunks begin so.
pub(crate) const CHUNKS_PATH: &str = "/v1/chunks/";

const LABEL_REQUEST: &[u8] = b"granary request\0";
const LABEL_ANSWER: &[u8] = b"granary answer\0";

/// Longest text of an error in a header, in bytes.
const MAX_ERROR_TEXT_BYTES: usize = 300;

/// Length of a PUT body, in bytes: the payload and its checksum table.
pub(crate) fn put_len_bytes(len_bytes: u64) -> u64 {
    len_bytes.saturating_add(block_count(len_bytes).saturating_mul(4))
}

fn len_of(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// The code of a request.
pub(crate) fn request_mac(
    key: &MacKey,
    counter: u64,
    method: &str,
    target: &str,
    content_len: Option<u64>,
    lease: Option<&str>,
) -> [u8; 32] {
    let lease_len = lease.map(|lease| len_of(lease.as_bytes()));
    key.mac(&[
        LABEL_REQUEST,
        &counter.to_be_bytes(),
        &len_of(method.as_bytes()),
        method.as_bytes(),
        &len_of(target.as_bytes()),
        target.as_bytes(),
        &content_len.unwrap_or(u64::MAX).to_be_bytes(),
        lease_len.as_ref().map_or(&[], |len| &len[..]),
        lease.unwrap_or_default().as_bytes(),
    ])
}

/// The code of an answer.
pub(crate) fn answer_mac(key: &MacKey, counter: u64, status: StatusCode, answer: &str, content_len: u64) -> [u8; 32] {
    key.mac(&[
        LABEL_ANSWER,
        &counter.to_be_bytes(),
        &status.as_u16().to_be_bytes(),
        &len_of(answer.as_bytes()),
        answer.as_bytes(),
        &content_len.to_be_bytes(),
    ])
}

/// Does the head carry this code?
pub(crate) fn mac_matches(headers: &HeaderMap, expected: &[u8; 32]) -> bool {
    let mut sent = [0u8; 32];
    let mut all = headers.get_all(MAC_HEADER).iter();
    let (Some(header), None) = (all.next(), all.next()) else { return false };
    hex::decode_to_slice(header.as_bytes(), &mut sent).is_ok() && same(&sent, expected)
}

/// A lease stamp as the text of a header: the epoch, and the task's name in hexadecimal digits, because it may have any
/// bytes.
pub(crate) fn lease_text(lease: &LeaseStamp) -> String {
    format!("{} {}", lease.epoch, hex::encode(&lease.task))
}

/// The lease stamp in a header.
pub(crate) fn parse_lease(text: &str) -> Option<LeaseStamp> {
    let (epoch, task) = text.split_once(' ')?;
    if !epoch.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let task = String::from_utf8(hex::decode(task).ok()?).ok()?;
    LeaseStamp::is_task(&task).then_some(LeaseStamp { task, epoch: epoch.parse().ok()? })
}

/// The text of a header that stands there at most once.
pub(crate) fn single_header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut all = headers.get_all(name).iter();
    match (all.next(), all.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// A spec as a query.
pub(crate) fn spec_query(spec: &ChunkSpec) -> String {
    format!(
        "codec={}&k={}&m={}&unit={}&extent_len={}&len={}&owner={}&created={}",
        spec.codec.number(),
        spec.k,
        spec.m,
        spec.unit_bytes,
        spec.extent_len_bytes,
        spec.len_bytes,
        spec.owner,
        spec.created_ms
    )
}

/// The values of exactly these keys, in exactly this order: the only writer of such queries is this file.
fn values<const N: usize>(query: &str, keys: [&str; N]) -> Option<[u64; N]> {
    let mut parts = query.split('&');
    let mut found = [0u64; N];
    for (place, key) in found.iter_mut().zip(keys) {
        let digits = parts.next()?.strip_prefix(key)?.strip_prefix('=')?;
        // `parse` alone would take a plus sign.
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *place = digits.parse().ok()?;
    }
    parts.next().is_none().then_some(found)
}

/// The spec in a query.
pub(crate) fn parse_spec(query: &str) -> Option<ChunkSpec> {
    let [codec, k, m, unit, extent_len, len, owner, created] =
        values(query, ["codec", "k", "m", "unit", "extent_len", "len", "owner", "created"])?;
    make_spec([codec, k, m, unit, extent_len, len, owner, created])
}

fn make_spec([codec, k, m, unit, extent_len, len, owner, created]: [u64; 8]) -> Option<ChunkSpec> {
    Some(ChunkSpec {
        codec: CodecId::from_number(codec.try_into().ok()?)?,
        k: k.try_into().ok()?,
        m: m.try_into().ok()?,
        unit_bytes: unit.try_into().ok()?,
        extent_len_bytes: extent_len,
        len_bytes: len,
        owner: HashSlot::new(owner.try_into().ok()?)?,
        created_ms: created,
    })
}

/// Can a chunk be like this? Checked before anything is sent and before anything received is believed.
pub(crate) fn check_spec(id: &ChunkId, spec: &ChunkSpec) -> Result<(), String> {
    if spec.len_bytes == 0 || spec.len_bytes > MAX_CHUNK_BYTES {
        return Err(format!("a chunk of {} bytes", spec.len_bytes));
    }
    if spec.k == 0 || u16::from(id.index) >= u16::from(spec.k) + u16::from(spec.m) {
        return Err(format!("chunk {} of a {}+{} code", id.index, spec.k, spec.m));
    }
    Ok(())
}

/// The head of an answer with blocks.
pub(crate) fn blocks_answer(first_block: u32, blocks: usize, spec: &ChunkSpec) -> String {
    format!("first={first_block}&blocks={blocks}&{}", spec_query(spec))
}

/// First block, how many, and the chunk's spec.
pub(crate) fn parse_blocks_answer(text: &str) -> Option<(u32, u32, ChunkSpec)> {
    let [first, blocks, codec, k, m, unit, extent_len, len, owner, created] =
        values(text, ["first", "blocks", "codec", "k", "m", "unit", "extent_len", "len", "owner", "created"])?;
    let spec = make_spec([codec, k, m, unit, extent_len, len, owner, created])?;
    Some((first.try_into().ok()?, blocks.try_into().ok()?, spec))
}

/// The query of a read.
pub(crate) fn read_query(first_block: u32, blocks: u32) -> String {
    format!("first={first_block}&blocks={blocks}")
}

/// First block and how many.
pub(crate) fn parse_read(query: &str) -> Option<(u32, u32)> {
    let [first, blocks] = values(query, ["first", "blocks"])?;
    Some((first.try_into().ok()?, blocks.try_into().ok()?))
}

/// Status and answer header of an error.
pub(crate) fn error_answer(error: &ChunkError) -> (StatusCode, String) {
    match error {
        ChunkError::NotFound => (StatusCode::NOT_FOUND, "not-found".to_owned()),
        ChunkError::Corrupt { block } => (StatusCode::UNPROCESSABLE_ENTITY, format!("corrupt {block}")),
        ChunkError::DiskFull => (StatusCode::INSUFFICIENT_STORAGE, "disk-full".to_owned()),
        ChunkError::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded".to_owned()),
        ChunkError::Rejected(why) => (StatusCode::BAD_REQUEST, format!("rejected {}", header_text(why))),
        ChunkError::Disk(why) => (StatusCode::INTERNAL_SERVER_ERROR, format!("disk {}", header_text(why))),
        // A node's own trouble with other nodes is not the client's link.
        ChunkError::Link(error) => (StatusCode::BAD_GATEWAY, format!("disk {}", header_text(&error.to_string()))),
        ChunkError::StaleLease { current } => (StatusCode::PRECONDITION_FAILED, format!("stale-lease {current}")),
    }
}

/// The error in an answer header; None if this build does not know it.
pub(crate) fn parse_error(text: &str) -> Option<ChunkError> {
    let (code, rest) = text.split_once(' ').unwrap_or((text, ""));
    Some(match code {
        "not-found" => ChunkError::NotFound,
        "corrupt" => ChunkError::Corrupt { block: rest.parse().ok()? },
        "disk-full" => ChunkError::DiskFull,
        "overloaded" => ChunkError::Overloaded,
        "rejected" => ChunkError::Rejected(rest.to_owned()),
        "disk" => ChunkError::Disk(rest.to_owned()),
        "stale-lease" => ChunkError::StaleLease { current: rest.parse().ok()? },
        _ => return None,
    })
}

/// Text that can stand in a header: visible ASCII and single spaces, bounded.
fn header_text(text: &str) -> String {
    let visible: String = text
        .chars()
        .take(MAX_ERROR_TEXT_BYTES)
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
        .collect();
    visible.trim().to_owned()
}

#[cfg(test)]
mod tests;
