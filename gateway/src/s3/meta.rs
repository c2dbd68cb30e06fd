//! What a client says about an object beside its bytes, read from headers and written back to them.
//!
//! Values are taken from the raw headers: s3s would decode and re-encode user metadata, and they must come back byte
//! for byte.

use super::error;
use granary_meta::record::ObjectMeta;
use granary_meta::Conditions;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use percent_encoding::percent_decode_str;
use s3s::dto::{ETagCondition, Timestamp};
use s3s::{s3_error, S3Result};
use std::time::{Duration, UNIX_EPOCH};

/// Most user metadata, names and values together, in bytes.
const USER_METADATA_BYTES: usize = 2048;
/// Longest standard header that is kept, in bytes.
const HEADER_BYTES: usize = 4096;
/// Longest key, in bytes.
pub(super) const KEY_BYTES: usize = 1024;
const USER_PREFIX: &str = "x-amz-meta-";
const TAGS: usize = 10;
const TAG_KEY_CHARS: usize = 128;
const TAG_VALUE_CHARS: usize = 256;

const KEPT: [&str; 7] = [
    "content-type",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "expires",
    "x-amz-website-redirect-location",
];

/// A record's time as S3 shows it.
pub(super) fn timestamp(unix_ms: u64) -> Timestamp {
    Timestamp::from(UNIX_EPOCH + Duration::from_millis(unix_ms))
}

/// A client's time, in whole seconds since 1970. Conditions compare seconds: HTTP dates have no more.
pub(super) fn seconds(time: &Timestamp) -> i64 {
    let mut text = Vec::new();
    // s3s keeps the date in a type of a crate that is not ours to name; its text form is stable.
    if time.format(s3s::dto::TimestampFormat::EpochSeconds, &mut text).is_err() {
        return 0;
    }
    let text = String::from_utf8(text).unwrap_or_default();
    text.split('.').next().and_then(|whole| whole.parse().ok()).unwrap_or(0)
}

/// Checks a key: 1 to 1,024 bytes, no NUL; everything else is taken as it is.
pub(super) fn check_key(key: &str) -> S3Result<()> {
    if key.is_empty() {
        return Err(s3_error!(InvalidArgument, "A key must not be empty."));
    }
    if key.len() > KEY_BYTES {
        return Err(s3_error!(KeyTooLongError));
    }
    if key.contains('\0') {
        return Err(s3_error!(InvalidArgument, "A key must not contain the NUL character."));
    }
    Ok(())
}

/// May this text stand in XML 1.0? Keys may hold characters that may not.
pub(super) fn fits_xml(text: &str) -> bool {
    text.chars().all(|c| (c >= ' ' && c != '\u{fffe}' && c != '\u{ffff}') || matches!(c, '\t' | '\n' | '\r'))
}

/// A key for an answer in XML; left out when XML cannot hold it. The client knows it: it is in its request.
pub(super) fn xml_key(key: &str) -> Option<String> {
    fits_xml(key).then(|| key.to_owned())
}

fn text_of(name: &HeaderName, value: &HeaderValue) -> S3Result<String> {
    String::from_utf8(value.as_bytes().to_vec())
        .map_err(|_| s3_error!(InvalidArgument, "The header {name} is not valid UTF-8."))
}

/// Reads an object's headers, user metadata, tags and storage class.
///
/// # Errors
/// MetadataTooLarge, InvalidTag, InvalidStorageClass, InvalidArgument.
pub(super) fn read(headers: &HeaderMap, has_scheme: impl Fn(&str) -> bool) -> S3Result<ObjectMeta> {
    let mut meta = ObjectMeta {
        storage_class: storage_class(headers, has_scheme)?,
        tags: tags(headers)?,
        ..ObjectMeta::default()
    };
    for name in KEPT {
        let Some(value) = headers.get(name) else { continue };
        let mut value = text_of(&HeaderName::from_static(name), value)?;
        if name == "content-encoding" {
            value = without_aws_chunked(&value);
            if value.is_empty() {
                continue;
            }
        }
        if value.len() > HEADER_BYTES {
            return Err(s3_error!(MetadataTooLarge));
        }
        meta.headers.push((name.to_owned(), value));
    }
    let mut user_bytes = 0;
    for name in headers.keys() {
        let Some(short) = name.as_str().strip_prefix(USER_PREFIX) else { continue };
        // A header that comes twice is one whose values are joined, as in its signature.
        let values: S3Result<Vec<String>> = headers.get_all(name).iter().map(|value| text_of(name, value)).collect();
        let value = values?.join(",");
        user_bytes += short.len() + value.len();
        meta.user.push((short.to_owned(), value));
    }
    if user_bytes > USER_METADATA_BYTES {
        return Err(s3_error!(MetadataTooLarge));
    }
    meta.user.sort();
    Ok(meta)
}

/// `aws-chunked` says how the body travelled, not what it is.
fn without_aws_chunked(value: &str) -> String {
    let kept: Vec<&str> =
        value.split(',').map(str::trim).filter(|token| !token.eq_ignore_ascii_case("aws-chunked")).collect();
    kept.join(", ")
}

/// The storage class asked for: empty for STANDARD, else the name of a scheme.
///
/// # Errors
/// InvalidStorageClass.
pub(super) fn storage_class(headers: &HeaderMap, has_scheme: impl Fn(&str) -> bool) -> S3Result<String> {
    let Some(value) = headers.get("x-amz-storage-class") else { return Ok(String::new()) };
    match value.to_str() {
        Ok("STANDARD" | "") => Ok(String::new()),
        Ok(name) if has_scheme(name) => Ok(name.to_owned()),
        _ => Err(s3_error!(InvalidStorageClass)),
    }
}

/// The scheme that a record's storage class names.
pub(super) fn scheme_of(meta: &ObjectMeta) -> Option<&str> {
    Some(meta.storage_class.as_str()).filter(|name| !name.is_empty())
}

fn tags(headers: &HeaderMap) -> S3Result<Vec<(String, String)>> {
    let Some(value) = headers.get("x-amz-tagging") else { return Ok(Vec::new()) };
    let bad = || {
        s3_error!(InvalidArgument, "The header 'x-amz-tagging' shall be encoded as UTF-8 then URLEncoded URL query parameters without tag name duplicates.")
    };
    let text = value.to_str().map_err(|_| bad())?;
    let mut tags: Vec<(String, String)> = Vec::new();
    if !is_form(text) {
        return Err(bad());
    }
    for (key, value) in form_urlencoded::parse(text.as_bytes()).into_owned() {
        if key.is_empty() || key.chars().count() > TAG_KEY_CHARS || value.chars().count() > TAG_VALUE_CHARS {
            return Err(s3_error!(InvalidTag));
        }
        if tags.iter().any(|(have, _)| *have == key) {
            return Err(bad());
        }
        tags.push((key, value));
    }
    if tags.len() > TAGS {
        return Err(error::custom("BadRequest", StatusCode::BAD_REQUEST, "Object tags cannot be greater than 10"));
    }
    Ok(tags)
}

/// Whether a form decodes without loss. The decoder itself takes a broken escape for text, and replaces what is not
/// UTF-8.
fn is_form(text: &str) -> bool {
    let is_escape =
        |rest: &str| rest.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
    text.split('%').skip(1).all(is_escape) && percent_decode_str(text).decode_utf8().is_ok()
}

/// A kept header by name.
pub(super) fn kept<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
}

/// The user metadata as response headers.
pub(super) fn user_headers(meta: &ObjectMeta) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in &meta.user {
        let name = HeaderName::from_bytes(format!("{USER_PREFIX}{name}").as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value.as_bytes())) {
            headers.insert(name, value);
        }
    }
    headers
}

/// Conditions of a write, for the shard to decide.
///
/// # Errors
/// NotImplemented for an If-None-Match other than `*`.
pub(super) fn write_conditions(
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<Conditions> {
    let if_none_match_any = match if_none_match {
        None => false,
        Some(ETagCondition::Any) => true,
        Some(ETagCondition::ETag(_)) => return Err(error::not_implemented("An If-None-Match other than * on a write")),
    };
    let if_match = if_match.map(|condition| match condition {
        ETagCondition::Any => "*".to_owned(),
        ETagCondition::ETag(etag) => match etag.as_strong() {
            Some(value) => value.to_owned(),
            // A weak ETag never matches in a strong comparison; no ETag of ours looks like this.
            None => format!("W/{}", etag.value()),
        },
    });
    Ok(Conditions { if_match, if_none_match_any })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_bytes(value.as_bytes()).unwrap(),
            );
        }
        map
    }

    #[test]
    fn only_the_aws_chunked_token_leaves_the_content_encoding() {
        let encoding = |value| {
            kept(&read(&headers(&[("content-encoding", value)]), |_| false).unwrap(), "content-encoding")
                .map(str::to_owned)
        };
        assert_eq!(encoding("aws-chunked"), None);
        assert_eq!(encoding("aws-chunked,gzip").as_deref(), Some("gzip"));
        assert_eq!(encoding("gzip, AWS-Chunked, br").as_deref(), Some("gzip, br"));
    }

    #[test]
    fn user_metadata_comes_back_byte_for_byte() {
        let given = headers(&[("x-amz-meta-name", "Grüße =?utf-8?q?x?= 日本"), ("x-amz-meta-b", " a, b ")]);
        let meta = read(&given, |_| false).unwrap();
        let back = user_headers(&meta);
        assert_eq!(back.get("x-amz-meta-name").unwrap().as_bytes(), "Grüße =?utf-8?q?x?= 日本".as_bytes());
        assert_eq!(back.get("x-amz-meta-b").unwrap().as_bytes(), b" a, b ");
        let long = "x".repeat(2045);
        assert!(read(&headers(&[("x-amz-meta-abc", &long)]), |_| false).is_ok());
        assert!(read(&headers(&[("x-amz-meta-abcd", &long)]), |_| false).is_err());
    }

    #[test]
    fn a_storage_class_is_standard_or_the_name_of_a_scheme() {
        let class = |name| storage_class(&headers(&[("x-amz-storage-class", name)]), |scheme| scheme == "wide");
        assert_eq!(class("STANDARD").unwrap(), "");
        assert_eq!(class("wide").unwrap(), "wide");
        assert_eq!(class("GLACIER").unwrap_err().code(), &s3s::S3ErrorCode::InvalidStorageClass);
    }

    #[test]
    fn tags_are_decoded_and_bounded() {
        let tags = |text| tags(&headers(&[("x-amz-tagging", text)]));
        assert_eq!(tags("a=1&b+c=%2F").unwrap(), [("a".into(), "1".into()), ("b c".into(), "/".into())]);
        assert!(tags("a=1&a=2").is_err());
        assert_eq!(tags("%C3%A4%EF%BF%BD=1").unwrap(), [("ä\u{fffd}".into(), "1".into())]);
        for bad in ["a=%zz", "a=%", "a=%2", "a=%+1", "a=%C3", "a%C3=%A4", "%ff=1"] {
            assert!(tags(bad).is_err(), "{bad}");
        }
        assert!(tags(&(0..11).map(|i| format!("k{i}=v")).collect::<Vec<_>>().join("&")).is_err());
    }
}
