//! ListObjects and ListObjectsV2: pages of keys in the order of their raw bytes.

use super::access::account_text;
use super::call::Call;
use super::{checksums, error, meta};
use crate::shards::list::Page as ListingPage;
use crate::shards::ShardError;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use base64::Engine;
use granary_meta::{ListFrom, ListItem, ObjectSummary};
use percent_encoding::{utf8_percent_encode, AsciiSet, NON_ALPHANUMERIC};
use s3s::dto::{
    CommonPrefix, ETag, EncodingType, ListObjectsInput, ListObjectsOutput, ListObjectsV2Input, ListObjectsV2Output,
    Object, Owner,
};
use s3s::{s3_error, S3Request, S3Response, S3Result};

/// Most keys of one page, and the page when none is asked for.
pub(super) const MAX_KEYS: i32 = 1000;
/// What [`url_encode`] encodes.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');
/// First byte of a continuation token: its version.
const TOKEN_VERSION: u8 = 1;

/// Does the answer percent-encode its keys?
///
/// # Errors
/// InvalidArgument for an encoding we do not know.
pub(super) fn wants_url(encoding: Option<&EncodingType>) -> S3Result<bool> {
    match encoding.map(|encoding| encoding.as_str()) {
        None => Ok(false),
        Some("url") => Ok(true),
        Some(_) => Err(s3_error!(InvalidArgument, "Invalid Encoding Method specified in Request")),
    }
}

/// Percent-encodes all but unreserved characters and the slash. A space becomes `%20`, which clients that read `+` as a
/// space and clients that do not both understand.
pub(super) fn url_encode(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

/// The page size to use for one asked for.
///
/// # Errors
/// InvalidArgument when negative.
pub(super) fn page_size(asked: Option<i32>) -> S3Result<i32> {
    match asked {
        None => Ok(MAX_KEYS),
        Some(asked) if asked < 0 => {
            Err(s3_error!(InvalidArgument, "Argument max-keys must be an integer between 0 and 2147483647"))
        }
        Some(asked) => Ok(asked.min(MAX_KEYS)),
    }
}

fn token_of(position: &str) -> String {
    let mut raw = vec![TOKEN_VERSION];
    raw.extend_from_slice(position.as_bytes());
    URL_SAFE_NO_PAD.encode(raw)
}

fn position_of(token: &str) -> S3Result<String> {
    let bad = || s3_error!(InvalidArgument, "The continuation token provided is incorrect");
    let raw = URL_SAFE_NO_PAD.decode(token).map_err(|_| bad())?;
    match raw.split_first() {
        Some((&TOKEN_VERSION, position)) if position.len() <= meta::KEY_BYTES => {
            String::from_utf8(position.to_vec()).map_err(|_| bad())
        }
        _ => Err(bad()),
    }
}

async fn page(
    call: &Call,
    bucket: &str,
    prefix: &str,
    delimiter: &str,
    from: ListFrom,
    limit: i32,
) -> S3Result<ListingPage> {
    let mut bucket = call.bucket(bucket).await?;
    let mut tries = 0;
    loop {
        // An empty page is asked for with a limit of one, so that a bucket that is gone is noticed.
        let limit = u32::try_from(limit.max(1)).unwrap_or(1);
        match call.cx.shards.list_objects(bucket.id, prefix, delimiter, from.clone(), limit).await {
            Ok(page) => return Ok(page),
            Err(ShardError::BucketFenced) => tries += 1,
            Err(cause) => return Err(error::query(cause)),
        }
        bucket = call.after_fence(&bucket, tries).await?;
    }
}

/// What both versions answer.
struct Page {
    contents: Vec<Object>,
    prefixes: Vec<CommonPrefix>,
    truncated: bool,
    /// The last item's position, raw.
    last: Option<String>,
    url: bool,
}

impl Page {
    fn encode(&self, text: String) -> String {
        if self.url {
            url_encode(&text)
        } else {
            text
        }
    }
}

async fn collect(
    call: &Call,
    bucket: &str,
    (prefix, delimiter): (&str, &str),
    from: ListFrom,
    max_keys: i32,
    url: bool,
    with_owner: bool,
) -> S3Result<Page> {
    let ListingPage { items, more } = page(call, bucket, prefix, delimiter, from, max_keys).await?;
    let mut page = Page { contents: Vec::new(), prefixes: Vec::new(), truncated: false, last: None, url };
    if max_keys == 0 {
        return Ok(page);
    }
    page.truncated = more;
    page.last = items.last().map(|item| item.sort_key().to_owned());
    // Keys may hold characters that XML cannot: such a page is encoded, and says so, even when nobody asked.
    page.url |= !(fits(prefix) && fits(delimiter) && items.iter().all(|item| fits(item.sort_key())));
    for item in items {
        match item {
            ListItem::Object(object) => {
                let key = page.encode(object.key.clone());
                page.contents.push(object_of(object, key, with_owner));
            }
            ListItem::Prefix(prefix) => {
                let prefix = Some(page.encode(prefix));
                page.prefixes.push(CommonPrefix { prefix });
            }
        }
    }
    Ok(page)
}

fn fits(text: &str) -> bool {
    meta::fits_xml(text)
}

fn object_of(object: ObjectSummary, key: String, with_owner: bool) -> Object {
    let class = if object.storage_class.is_empty() { "STANDARD".to_owned() } else { object.storage_class };
    Object {
        key: Some(key),
        size: i64::try_from(object.size_bytes).ok(),
        e_tag: Some(ETag::Strong(object.etag)),
        last_modified: Some(meta::timestamp(object.modified_ms)),
        storage_class: Some(class.into()),
        owner: with_owner.then(|| Owner { id: Some(account_text(object.owner)), display_name: None }),
        checksum_algorithm: object.checksum.map(|(algorithm, _)| vec![checksums::name(algorithm).to_owned().into()]),
        checksum_type: object.checksum.map(|(_, kind)| checksums::kind_name(kind).to_owned().into()),
        ..Default::default()
    }
}

fn from(position: Option<String>) -> ListFrom {
    match position {
        Some(position) if !position.is_empty() => ListFrom::After(position),
        _ => ListFrom::Start,
    }
}

/// Version 1: goes on after a marker, which the client makes from the last key.
pub(super) async fn list_objects(
    call: &Call,
    req: S3Request<ListObjectsInput>,
) -> S3Result<S3Response<ListObjectsOutput>> {
    let input = req.input;
    let url = wants_url(input.encoding_type.as_ref())?;
    let max_keys = page_size(input.max_keys)?;
    let (prefix, delimiter) = (input.prefix.unwrap_or_default(), input.delimiter.unwrap_or_default());
    let marker = input.marker.unwrap_or_default();
    let page =
        collect(call, &input.bucket, (&prefix, &delimiter), from(Some(marker.clone())), max_keys, url, true).await?;
    // NextMarker only under a delimiter: without one the last key says it.
    let next_marker =
        page.last.clone().filter(|_| page.truncated && !delimiter.is_empty()).map(|last| page.encode(last));
    let output = ListObjectsOutput {
        name: Some(input.bucket),
        prefix: Some(page.encode(prefix)),
        marker: Some(page.encode(marker)),
        max_keys: Some(max_keys),
        is_truncated: Some(page.truncated),
        delimiter: Some(delimiter).filter(|text| !text.is_empty()).map(|text| page.encode(text)),
        next_marker,
        encoding_type: page.url.then(|| EncodingType::from_static(EncodingType::URL)),
        contents: Some(page.contents),
        common_prefixes: Some(page.prefixes),
        ..Default::default()
    };
    Ok(S3Response::new(output))
}

/// Version 2: goes on after an opaque token, or starts after a key.
pub(super) async fn list_objects_v2(
    call: &Call,
    req: S3Request<ListObjectsV2Input>,
) -> S3Result<S3Response<ListObjectsV2Output>> {
    let input = req.input;
    let url = wants_url(input.encoding_type.as_ref())?;
    let max_keys = page_size(input.max_keys)?;
    let (prefix, delimiter) = (input.prefix.unwrap_or_default(), input.delimiter.unwrap_or_default());
    let position = match &input.continuation_token {
        Some(token) => Some(position_of(token)?),
        None => input.start_after.clone(),
    };
    let owner = input.fetch_owner.unwrap_or(false);
    let page = collect(call, &input.bucket, (&prefix, &delimiter), from(position), max_keys, url, owner).await?;
    let next_continuation_token = page.last.as_deref().filter(|_| page.truncated).map(token_of);
    let output = ListObjectsV2Output {
        name: Some(input.bucket),
        prefix: Some(page.encode(prefix)),
        max_keys: Some(max_keys),
        key_count: i32::try_from(page.contents.len() + page.prefixes.len()).ok(),
        continuation_token: input.continuation_token,
        is_truncated: Some(page.truncated),
        next_continuation_token,
        delimiter: Some(delimiter).filter(|text| !text.is_empty()).map(|text| page.encode(text)),
        start_after: input.start_after.map(|text| page.encode(text)),
        encoding_type: page.url.then(|| EncodingType::from_static(EncodingType::URL)),
        contents: Some(page.contents),
        common_prefixes: Some(page.prefixes),
        ..Default::default()
    };
    Ok(S3Response::new(output))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn everything_but_unreserved_characters_is_encoded() {
        assert_eq!(url_encode("a/b-c_d.e~f"), "a/b-c_d.e~f");
        assert_eq!(url_encode("a+b c%2F*é\u{1}"), "a%2Bb%20c%252F%2A%C3%A9%01");
    }

    #[test]
    fn a_token_gives_its_position_back_and_others_are_refused() {
        for position in ["a", "ключ/+%", "a\u{1}b"] {
            assert_eq!(position_of(&token_of(position)).unwrap(), position);
        }
        for token in ["", "AA", "!!!", &URL_SAFE_NO_PAD.encode([TOKEN_VERSION, 0xff]), &token_of(&"k".repeat(1025))] {
            assert!(position_of(token).is_err(), "{token}");
        }
    }
}
