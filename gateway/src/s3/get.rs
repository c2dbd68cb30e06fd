//! GetObject, HeadObject, GetObjectAttributes, GetObjectTagging: reading one object.

use super::call::Call;
use super::checksums::{self, put_checksum};
use super::response_body::ExactBody;
use super::{error, meta};
use granary_meta::record::{BucketRecord, ChecksumKind, ObjectRecord};
use granary_meta::{Answer, Query, VersionPick};
use http::{header, HeaderMap, HeaderValue, StatusCode};
use s3s::dto::{
    self, ETag, ETagCondition, GetObjectAttributesInput, GetObjectAttributesOutput, GetObjectInput, GetObjectOutput,
    GetObjectTaggingInput, GetObjectTaggingOutput, HeadObjectInput, HeadObjectOutput, ObjectAttributes, Timestamp,
};
use s3s::{s3_error, S3Error, S3ErrorCode, S3Request, S3Response, S3Result};
use std::ops::Range;

/// The version a request names; buckets have no versions but the null one.
///
/// # Errors
/// NoSuchVersion for any other.
pub(super) fn pick(version_id: Option<&str>) -> S3Result<VersionPick> {
    match version_id {
        None => Ok(VersionPick::Current),
        Some("null") => Ok(VersionPick::Null),
        Some(_) => Err(s3_error!(NoSuchVersion)),
    }
}

/// The record of an object.
///
/// # Errors
/// NoSuchBucket, NoSuchKey, 503.
pub(super) async fn find(
    call: &Call,
    bucket: &str,
    key: &str,
    version: VersionPick,
) -> S3Result<(BucketRecord, Box<ObjectRecord>)> {
    meta::check_key(key)?;
    let query = |bucket: &BucketRecord| Query::GetObject { bucket: bucket.id, key: key.to_owned(), version };
    match call.ask(bucket, key, query).await? {
        (_, Answer::Object(record)) if record.delete_marker => Err(s3_error!(NoSuchKey)),
        (bucket, Answer::Object(record)) => Ok((bucket, record)),
        (_, other) => Err(error::answer(other)),
    }
}

/// The four conditions of a read.
pub(super) struct ReadConditions<'a> {
    pub(super) if_match: Option<&'a ETagCondition>,
    pub(super) if_none_match: Option<&'a ETagCondition>,
    pub(super) if_modified_since: Option<&'a Timestamp>,
    pub(super) if_unmodified_since: Option<&'a Timestamp>,
}

/// What the conditions of a read come to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Go,
    Failed,
    NotModified,
}

impl ReadConditions<'_> {
    /// Decides in the order of RFC 9110: an ETag condition beats the date condition of its kind.
    pub(super) fn decide(&self, etag: &str, modified_ms: u64) -> Verdict {
        let modified = i64::try_from(modified_ms / 1000).unwrap_or(i64::MAX);
        let is = |condition: &ETagCondition, weak: bool| match condition {
            ETagCondition::Any => true,
            ETagCondition::ETag(have) => have.value() == etag && (weak || have.as_strong().is_some()),
        };
        match (self.if_match, self.if_unmodified_since) {
            (Some(condition), _) if !is(condition, false) => return Verdict::Failed,
            (None, Some(since)) if modified > meta::seconds(since) => return Verdict::Failed,
            _ => {}
        }
        match (self.if_none_match, self.if_modified_since) {
            (Some(condition), _) if is(condition, true) => Verdict::NotModified,
            (None, Some(since)) if modified <= meta::seconds(since) => Verdict::NotModified,
            _ => Verdict::Go,
        }
    }

    fn check(&self, record: &ObjectRecord) -> S3Result<()> {
        match self.decide(&record.etag, record.modified_ms) {
            Verdict::Go => Ok(()),
            Verdict::Failed => Err(s3_error!(PreconditionFailed)),
            Verdict::NotModified => Err(not_modified(record)),
        }
    }
}

fn not_modified(record: &ObjectRecord) -> S3Error {
    let mut headers = HeaderMap::new();
    if let Ok(etag) = HeaderValue::from_str(&format!("\"{}\"", record.etag)) {
        headers.insert(header::ETAG, etag);
    }
    let mut date = Vec::new();
    if meta::timestamp(record.modified_ms).format(dto::TimestampFormat::HttpDate, &mut date).is_ok() {
        if let Ok(date) = HeaderValue::from_bytes(&date) {
            headers.insert(header::LAST_MODIFIED, date);
        }
    }
    let mut error = S3Error::new(S3ErrorCode::NotModified);
    error.set_status_code(StatusCode::NOT_MODIFIED);
    error.set_headers(headers);
    error
}

/// The range of an object that a request asks for.
#[derive(Debug, PartialEq, Eq)]
struct ServedRange {
    range: Range<u64>,
    partial: bool,
    parts: Option<i32>,
}

fn invalid_range(size: u64) -> S3Error {
    let mut error = s3_error!(InvalidRange);
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
        headers.insert(header::CONTENT_RANGE, value);
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    error.set_headers(headers);
    error
}

fn served_range(record: &ObjectRecord, range: Option<&dto::Range>, part_number: Option<i32>) -> S3Result<ServedRange> {
    let size = record.size_bytes;
    match (range, part_number) {
        (Some(_), Some(_)) => {
            Err(s3_error!(InvalidRequest, "Cannot specify both Range header and partNumber query parameter"))
        }
        (None, None) => Ok(ServedRange { range: 0..size, partial: false, parts: None }),
        (Some(range), None) => {
            if size == 0 {
                return Err(invalid_range(size));
            }
            let range = range.check(size).map_err(|_| invalid_range(size))?;
            Ok(ServedRange { range, partial: true, parts: None })
        }
        (None, Some(number)) => {
            let missing = || {
                error::custom(
                    "InvalidPartNumber",
                    StatusCode::RANGE_NOT_SATISFIABLE,
                    "The requested partnumber is not satisfiable",
                )
            };
            let index = usize::try_from(number).ok().and_then(|number| number.checked_sub(1)).ok_or_else(|| {
                s3_error!(InvalidArgument, "Part number must be an integer between 1 and 10000, inclusive")
            })?;
            if record.part_sizes.is_empty() {
                return if index == 0 {
                    Ok(ServedRange { range: 0..size, partial: size > 0, parts: None })
                } else {
                    Err(missing())
                };
            }
            let len = *record.part_sizes.get(index).ok_or_else(missing)?;
            let begin: u64 = record.part_sizes.iter().take(index).sum();
            let parts = i32::try_from(record.part_sizes.len()).ok();
            Ok(ServedRange { range: begin..begin + len, partial: size > 0 && len > 0, parts })
        }
    }
}

/// If-Range: the range holds only while the object is still the one meant.
fn range_still_holds(headers: &HeaderMap, record: &ObjectRecord) -> bool {
    let Some(value) = headers.get(header::IF_RANGE).and_then(|value| value.to_str().ok()) else { return true };
    if value.starts_with('"') || value.starts_with("W/") {
        return value == format!("\"{}\"", record.etag);
    }
    match Timestamp::parse(dto::TimestampFormat::HttpDate, value) {
        Ok(date) => i64::try_from(record.modified_ms / 1000).is_ok_and(|modified| modified == meta::seconds(&date)),
        Err(_) => value == record.etag,
    }
}

/// Fills what GET and HEAD have in common.
macro_rules! describe {
    ($output:ident, $record:expr, $served:expr, $with_checksum:expr) => {{
        let (record, served) = ($record, $served);
        let own = |name: &str| meta::kept(&record.meta, name).map(str::to_owned);
        $output {
            accept_ranges: Some("bytes".to_owned()),
            cache_control: own("cache-control"),
            content_disposition: own("content-disposition"),
            content_encoding: own("content-encoding"),
            content_language: own("content-language"),
            content_length: i64::try_from(served.range.end - served.range.start).ok(),
            content_range: served.partial.then(|| {
                format!("bytes {}-{}/{}", served.range.start, served.range.end.saturating_sub(1), record.size_bytes)
            }),
            content_type: Some(own("content-type").unwrap_or_else(|| "binary/octet-stream".to_owned())),
            e_tag: Some(ETag::Strong(record.etag.clone())),
            expires: own("expires"),
            last_modified: Some(meta::timestamp(record.modified_ms)),
            parts_count: served.parts,
            storage_class: meta::scheme_of(&record.meta).map(|name| name.to_owned().into()),
            tag_count: i32::try_from(record.meta.tags.len()).ok().filter(|count| *count > 0),
            website_redirect_location: own("x-amz-website-redirect-location"),
            ..with_checksum!($output, record, !served.partial && $with_checksum)
        }
    }};
}

macro_rules! with_checksum {
    ($output:ident, $record:expr, $wanted:expr) => {{
        let mut output = $output::default();
        if let (Some(checksum), true) = (&$record.checksum, $wanted) {
            put_checksum!(output, checksum.algorithm, checksums::text(checksum, $record.part_sizes.len()));
            output.checksum_type = Some(checksums::kind_name(checksum.kind).to_owned().into());
        }
        output
    }};
}

/// Reads an object, or a range of it.
pub(super) async fn get_object(call: &Call, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
    let S3Request { input, headers, .. } = req;
    let (_, record) = find(call, &input.bucket, &input.key, pick(input.version_id.as_deref())?).await?;
    let conditions = ReadConditions {
        if_match: input.if_match.as_ref(),
        if_none_match: input.if_none_match.as_ref(),
        if_modified_since: input.if_modified_since.as_ref(),
        if_unmodified_since: input.if_unmodified_since.as_ref(),
    };
    conditions.check(&record)?;
    let range = input.range.as_ref().filter(|_| range_still_holds(&headers, &record));
    let served = served_range(&record, range, input.part_number)?;
    let len_bytes = served.range.end - served.range.start;

    // The first bytes are fetched before the status is sent: an object that cannot be read is a 5xx, not a 200 that
    // breaks off.
    let mut reader = call.cx.objects.read(&record.data, served.range.clone());
    reader.open().await.map_err(error::read)?;

    let mut output = describe!(GetObjectOutput, &record, &served, input.checksum_mode.is_some());
    let body: s3s::stream::DynByteStream = Box::pin(ExactBody::new(reader, len_bytes));
    output.body = Some(body.into());
    Ok(S3Response::with_headers(output, meta::user_headers(&record.meta)))
}

/// Describes an object.
pub(super) async fn head_object(
    call: &Call,
    req: S3Request<HeadObjectInput>,
) -> S3Result<S3Response<HeadObjectOutput>> {
    let S3Request { input, headers, .. } = req;
    let (_, record) = find(call, &input.bucket, &input.key, pick(input.version_id.as_deref())?).await?;
    let conditions = ReadConditions {
        if_match: input.if_match.as_ref(),
        if_none_match: input.if_none_match.as_ref(),
        if_modified_since: input.if_modified_since.as_ref(),
        if_unmodified_since: input.if_unmodified_since.as_ref(),
    };
    conditions.check(&record)?;
    let range = input.range.as_ref().filter(|_| range_still_holds(&headers, &record));
    let served = served_range(&record, range, input.part_number)?;
    let mut output = describe!(HeadObjectOutput, &record, &served, input.checksum_mode.is_some());
    let replace = |own: &mut Option<String>, asked: Option<String>| {
        if asked.is_some() {
            *own = asked;
        }
    };
    replace(&mut output.content_type, input.response_content_type);
    replace(&mut output.content_language, input.response_content_language);
    replace(&mut output.cache_control, input.response_cache_control);
    replace(&mut output.content_disposition, input.response_content_disposition);
    replace(&mut output.content_encoding, input.response_content_encoding);
    Ok(S3Response::with_headers(output, meta::user_headers(&record.meta)))
}

/// Describes an object in XML.
pub(super) async fn get_object_attributes(
    call: &Call,
    req: S3Request<GetObjectAttributesInput>,
) -> S3Result<S3Response<GetObjectAttributesOutput>> {
    let input = req.input;
    let (_, record) = find(call, &input.bucket, &input.key, pick(input.version_id.as_deref())?).await?;
    // The names come as one list or as several headers.
    let wants = |name: &str| {
        input.object_attributes.iter().any(|asked| asked.as_str().split(',').any(|asked| asked.trim() == name))
    };
    let mut output =
        GetObjectAttributesOutput { last_modified: Some(meta::timestamp(record.modified_ms)), ..Default::default() };
    if wants(ObjectAttributes::ETAG) {
        output.e_tag = Some(ETag::Strong(record.etag.clone()));
    }
    if wants(ObjectAttributes::OBJECT_SIZE) {
        output.object_size = i64::try_from(record.size_bytes).ok();
    }
    if wants(ObjectAttributes::STORAGE_CLASS) {
        output.storage_class = Some(meta::scheme_of(&record.meta).unwrap_or("STANDARD").to_owned().into());
    }
    if let (Some(checksum), true) = (&record.checksum, wants(ObjectAttributes::CHECKSUM)) {
        let mut sum = dto::Checksum {
            checksum_type: Some(checksums::kind_name(checksum.kind).to_owned().into()),
            ..Default::default()
        };
        put_checksum!(sum, checksum.algorithm, checksums::text(checksum, record.part_sizes.len()));
        output.checksum = Some(sum);
    }
    if wants(ObjectAttributes::OBJECT_PARTS) && !record.part_sizes.is_empty() {
        output.object_parts = Some(attribute_parts(&record, input.part_number_marker, input.max_parts));
    }
    Ok(S3Response::new(output))
}

fn attribute_parts(
    record: &ObjectRecord,
    marker: Option<i32>,
    max_parts: Option<i32>,
) -> dto::GetObjectAttributesParts {
    let marker = marker.unwrap_or(0).max(0);
    let max_parts = max_parts.unwrap_or(1000).clamp(0, 1000);
    let all = record.part_sizes.iter().enumerate();
    let (from, most) = (usize::try_from(marker).unwrap_or(0), usize::try_from(max_parts).unwrap_or(0));
    let mut parts: Vec<dto::ObjectPart> = Vec::new();
    // Checksums are shown only for parts whose checksums make up the object's.
    let composite = record.checksum.as_ref().filter(|checksum| checksum.kind == ChecksumKind::Composite);
    for (index, size) in all.skip(from).take(most) {
        let mut part = dto::ObjectPart {
            part_number: i32::try_from(index + 1).ok(),
            size: i64::try_from(*size).ok(),
            ..Default::default()
        };
        if let (Some(checksum), Some(value)) = (composite, record.part_checksums.get(index)) {
            let whole = granary_meta::record::Checksum {
                algorithm: checksum.algorithm,
                kind: ChecksumKind::FullObject,
                value: value.clone(),
            };
            put_checksum!(part, checksum.algorithm, checksums::text(&whole, 0));
        }
        parts.push(part);
    }
    let truncated = from + parts.len() < record.part_sizes.len();
    dto::GetObjectAttributesParts {
        is_truncated: Some(truncated),
        max_parts: Some(max_parts),
        next_part_number_marker: i32::try_from(from + parts.len()).ok(),
        part_number_marker: Some(marker),
        total_parts_count: i32::try_from(record.part_sizes.len()).ok(),
        parts: composite.is_some().then_some(parts),
    }
}

/// The tags an object was uploaded with.
pub(super) async fn get_object_tagging(
    call: &Call,
    req: S3Request<GetObjectTaggingInput>,
) -> S3Result<S3Response<GetObjectTaggingOutput>> {
    let input = req.input;
    let (_, record) = find(call, &input.bucket, &input.key, pick(input.version_id.as_deref())?).await?;
    let tag_set = record
        .meta
        .tags
        .iter()
        .map(|(key, value)| dto::Tag { key: Some(key.clone()), value: Some(value.clone()) })
        .collect();
    Ok(S3Response::new(GetObjectTaggingOutput { tag_set, version_id: None }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn an_etag_condition_beats_the_date_condition_of_its_kind() {
        let etag = |text: &str| ETagCondition::ETag(ETag::Strong(text.to_owned()));
        let (same, other) = (etag("e"), etag("f"));
        let (before, at, after) = (meta::timestamp(9_000), meta::timestamp(10_000), meta::timestamp(11_000));
        let decide = |m: Option<&ETagCondition>,
                      n: Option<&ETagCondition>,
                      modified: Option<&Timestamp>,
                      unmodified: Option<&Timestamp>| {
            ReadConditions {
                if_match: m,
                if_none_match: n,
                if_modified_since: modified,
                if_unmodified_since: unmodified,
            }
            .decide("e", 10_500)
        };
        assert_eq!(decide(None, None, None, None), Verdict::Go);
        assert_eq!(decide(Some(&same), None, None, Some(&before)), Verdict::Go);
        assert_eq!(decide(Some(&other), None, None, Some(&after)), Verdict::Failed);
        assert_eq!(decide(Some(&ETagCondition::Any), None, None, None), Verdict::Go);
        assert_eq!(decide(None, None, None, Some(&before)), Verdict::Failed);
        assert_eq!(decide(None, None, None, Some(&at)), Verdict::Go);
        assert_eq!(decide(None, Some(&same), None, None), Verdict::NotModified);
        assert_eq!(decide(None, Some(&other), Some(&after), None), Verdict::Go);
        assert_eq!(decide(None, None, Some(&at), None), Verdict::NotModified);
        assert_eq!(decide(None, None, Some(&before), None), Verdict::Go);
    }
}
