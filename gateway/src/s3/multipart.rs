//! Multipart uploads but for their completion: create, parts, copied parts, abort, and the two listings.

use super::access::account_text;
use super::call::Call;
use super::checksums::{self, put_checksum, PromisedChecksums};
use super::commit::{settle, stage, StageSpec};
use super::copy;
use super::get::ReadConditions;
use super::list::{self, url_encode};
use super::put::{self, DEFAULT_ALGORITHM, MAX_PUT_BYTES};
use super::upload_body::Source;
use super::{error, meta};
use crate::digest::Digests;
use crate::object::{Placement, Staged};
use crate::shards::list::ListedUpload;
use crate::shards::{now_ms, ShardError};
use granary_meta::record::{
    BucketRecord, Checksum, ChecksumAlgorithm, ChecksumKind, PartRecord, UploadId, UploadRecord,
};
use granary_meta::{Answer, Command, Query, Reply};
use s3s::dto::{
    self, AbortMultipartUploadInput, AbortMultipartUploadOutput, CommonPrefix, CopyPartResult,
    CreateMultipartUploadInput, CreateMultipartUploadOutput, ETag, EncodingType, Initiator, ListMultipartUploadsInput,
    ListMultipartUploadsOutput, ListPartsInput, ListPartsOutput, MultipartUpload, Owner, UploadPartCopyInput,
    UploadPartCopyOutput, UploadPartInput, UploadPartOutput,
};
use s3s::{s3_error, S3Request, S3Response, S3Result};
use std::ops::Range;

/// Highest part number.
pub(super) const MAX_PARTS: u16 = 10_000;
/// Uploads asked for at a time.
const QUERY_UPLOADS: u32 = 1000;
/// Pages that one listing of uploads may read; the rest comes with its next page.
const MAX_ROUNDS: usize = 20;

/// An upload id as clients see it: 32 hex digits.
pub(super) fn upload_text(upload: UploadId) -> String {
    hex::encode(upload.0)
}

/// An upload id from a client.
///
/// # Errors
/// NoSuchUpload for what is none of ours.
pub(super) fn parse_upload(text: &str) -> S3Result<UploadId> {
    let mut id = [0u8; 16];
    hex::decode_to_slice(text, &mut id).map_err(|_| error::no_such_upload())?;
    Ok(UploadId(id))
}

fn part_number(number: i32) -> S3Result<u16> {
    u16::try_from(number)
        .ok()
        .filter(|number| (1..=MAX_PARTS).contains(number))
        .ok_or_else(|| s3_error!(InvalidArgument, "Part number must be an integer between 1 and 10000, inclusive"))
}

/// Begins an upload.
pub(super) async fn create_multipart_upload(
    call: &Call,
    req: S3Request<CreateMultipartUploadInput>,
) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
    let S3Request { input, headers, .. } = req;
    meta::check_key(&input.key)?;
    let object_meta = meta::read(&headers, |name| call.cx.has_scheme(name))?;
    let kind = input.checksum_type.as_ref().map(|kind| kind.as_str());
    let checksum = match &input.checksum_algorithm {
        Some(name) => {
            let algorithm = checksums::parse_name(name.as_str())?;
            Some((algorithm, checksums::kind_of(algorithm, kind)?))
        }
        None if kind.is_some() => {
            return Err(s3_error!(
                InvalidRequest,
                "The x-amz-checksum-type header can only be used with the x-amz-checksum-algorithm header."
            ));
        }
        None => None,
    };
    let mut id = [0u8; 16];
    getrandom::fill(&mut id).map_err(error::internal)?;
    let upload = UploadId(id);
    let record = UploadRecord { initiated_ms: now_ms(), meta: object_meta, checksum, owner: call.caller.account };
    let bucket = call.bucket(&input.bucket).await?;
    let key = input.key.clone();
    let command = move |bucket: &BucketRecord, _: &Placement| Command::CreateUpload {
        bucket: bucket.id,
        key: key.clone(),
        upload,
        record: record.clone(),
        rule_epoch: bucket.rule.epoch,
    };
    settle(call, bucket, input.key.clone(), command, None, |reply| matches!(reply, Reply::Done)).await?;
    let output = CreateMultipartUploadOutput {
        bucket: Some(input.bucket),
        key: meta::xml_key(&input.key),
        upload_id: Some(upload_text(upload)),
        checksum_algorithm: checksum.map(|(algorithm, _)| checksums::name(algorithm).to_owned().into()),
        checksum_type: checksum.map(|(_, kind)| checksums::kind_name(kind).to_owned().into()),
        ..Default::default()
    };
    Ok(S3Response::new(output))
}

/// The checksum algorithm of a part: the upload's, else the part's own, else ours, so that the object gets a
/// checksum anyway.
fn part_algorithm(upload: &UploadRecord, sent: Option<ChecksumAlgorithm>) -> S3Result<ChecksumAlgorithm> {
    match (upload.checksum, sent) {
        (Some((named, _)), Some(sent)) if named != sent => Err(s3_error!(
            InvalidRequest,
            "Checksum Type mismatch occurred, expected checksum Type: {}, actual checksum Type: {}",
            checksums::name(named).to_ascii_lowercase(),
            checksums::name(sent).to_ascii_lowercase()
        )),
        (Some((named, _)), _) => Ok(named),
        (None, Some(sent)) => Ok(sent),
        (None, None) => Ok(DEFAULT_ALGORITHM),
    }
}

/// Where a part belongs.
struct PartOf {
    bucket: BucketRecord,
    key: String,
    upload: UploadId,
    number: u16,
}

async fn commit_part(
    call: &Call,
    of: PartOf,
    size_bytes: u64,
    algorithm: ChecksumAlgorithm,
    digests: &Digests,
    staged: Staged,
) -> S3Result<PartRecord> {
    let checksum = digests.checksum(algorithm).map(|value| Checksum {
        algorithm,
        kind: ChecksumKind::FullObject,
        value: value.to_vec(),
    });
    let part = PartRecord {
        number: of.number,
        size_bytes,
        etag: hex::encode(digests.md5),
        modified_ms: now_ms(),
        checksum,
        data: staged.data.clone(),
    };
    let PartOf { bucket, key, upload, .. } = of;
    let (named, sent) = (key.clone(), part.clone());
    let command = move |bucket: &BucketRecord, placement: &Placement| Command::PutPart {
        bucket: bucket.id,
        key: named.clone(),
        upload,
        part: sent.clone(),
        missing: placement.missing.clone(),
        map_epoch: placement.map_epoch,
        rule_epoch: bucket.rule.epoch,
    };
    settle(call, bucket, key, command, Some(staged), |reply| matches!(reply, Reply::Done)).await?;
    Ok(part)
}

/// Stores a part; the last one of a number wins.
pub(super) async fn upload_part(
    call: &Call,
    req: S3Request<UploadPartInput>,
) -> S3Result<S3Response<UploadPartOutput>> {
    let S3Request { input, headers, trailing_headers, .. } = req;
    meta::check_key(&input.key)?;
    let number = part_number(input.part_number)?;
    let upload = parse_upload(&input.upload_id)?;
    let promised = PromisedChecksums::from_headers(&headers)?;
    let sent = promised.algorithm(&headers)?;
    let len_bytes = put::body_len(input.content_length)?;

    let mut source = Source::of_request(input.body);
    source.send_continue();
    let (bucket, record) = call.upload(&input.bucket, &input.key, upload).await?;
    let algorithm = part_algorithm(&record, sent)?;

    let scheme = meta::scheme_of(&record.meta);
    let spec = StageSpec { scheme, bucket: bucket.id, key: &input.key, len_bytes, is_part: true };
    let (staged, digests) = stage(call, spec, source, algorithm).await?;
    promised.verify(&digests, trailing_headers.as_ref())?;
    let part =
        commit_part(call, PartOf { bucket, key: input.key, upload, number }, len_bytes, algorithm, &digests, staged)
            .await?;

    let mut output = UploadPartOutput { e_tag: Some(ETag::Strong(part.etag)), ..Default::default() };
    // A checksum of our own choice is not shown: the client did not ask for it, and may expect another kind.
    if let (Some(checksum), true) = (&part.checksum, sent.is_some() || record.checksum.is_some()) {
        put_checksum!(output, checksum.algorithm, checksums::text(checksum, 0));
    }
    Ok(S3Response::new(output))
}

fn copy_range(text: Option<&str>, size: u64) -> S3Result<Range<u64>> {
    let Some(text) = text else { return Ok(0..size) };
    let bad = || {
        s3_error!(
            InvalidArgument,
            "The x-amz-copy-source-range value must be of the form bytes=first-last where first and last are the zero-based offsets of the first and last bytes to copy"
        )
    };
    let (first, last) = text.strip_prefix("bytes=").and_then(|range| range.split_once('-')).ok_or_else(bad)?;
    let digits = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten().ok_or_else(bad)
    };
    let (first, last) = (digits(first)?, digits(last)?);
    if first > last {
        return Err(bad());
    }
    if last >= size {
        return Err(s3_error!(InvalidRange, "Range specified is not valid for source object of size: {size}"));
    }
    Ok(first..last + 1)
}

/// Stores a part that is a range of another object.
pub(super) async fn upload_part_copy(
    call: &Call,
    req: S3Request<UploadPartCopyInput>,
) -> S3Result<S3Response<UploadPartCopyOutput>> {
    let input = req.input;
    meta::check_key(&input.key)?;
    let number = part_number(input.part_number)?;
    let upload = parse_upload(&input.upload_id)?;
    let (bucket, record) = call.upload(&input.bucket, &input.key, upload).await?;
    let conditions = ReadConditions {
        if_match: input.copy_source_if_match.as_ref(),
        if_none_match: input.copy_source_if_none_match.as_ref(),
        if_modified_since: input.copy_source_if_modified_since.as_ref(),
        if_unmodified_since: input.copy_source_if_unmodified_since.as_ref(),
    };
    let (_, _, source) = copy::find_source(call, &input.copy_source, &conditions).await?;
    let range = copy_range(input.copy_source_range.as_deref(), source.size_bytes)?;
    let len_bytes = range.end - range.start;
    if len_bytes > MAX_PUT_BYTES {
        return Err(s3_error!(
            InvalidRequest,
            "The specified copy source is larger than the maximum allowable size for a copy source: 5368709120"
        ));
    }
    let algorithm = part_algorithm(&record, None)?;
    let scheme = meta::scheme_of(&record.meta);
    let spec = StageSpec { scheme, bucket: bucket.id, key: &input.key, len_bytes, is_part: true };
    let (staged, digests) = copy::stage_copy(call, &source, range, spec, algorithm).await?;
    let part =
        commit_part(call, PartOf { bucket, key: input.key, upload, number }, len_bytes, algorithm, &digests, staged)
            .await?;

    let mut result = CopyPartResult {
        e_tag: Some(ETag::Strong(part.etag)),
        last_modified: Some(meta::timestamp(part.modified_ms)),
        ..Default::default()
    };
    if let (Some(checksum), true) = (&part.checksum, record.checksum.is_some()) {
        put_checksum!(result, checksum.algorithm, checksums::text(checksum, 0));
    }
    Ok(S3Response::new(UploadPartCopyOutput { copy_part_result: Some(result), ..Default::default() }))
}

/// Gives an upload up; its parts become garbage.
pub(super) async fn abort_multipart_upload(
    call: &Call,
    req: S3Request<AbortMultipartUploadInput>,
) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
    let input = req.input;
    meta::check_key(&input.key)?;
    if input.if_match_initiated_time.is_some() {
        return Err(error::not_implemented("An abort on the condition of a time"));
    }
    let upload = parse_upload(&input.upload_id)?;
    let bucket = call.bucket(&input.bucket).await?;
    let key = input.key.clone();
    let command = move |bucket: &BucketRecord, _: &Placement| Command::AbortUpload {
        bucket: bucket.id,
        key: key.clone(),
        upload,
    };
    call.forget_upload(&bucket, &input.key, upload);
    settle(call, bucket, input.key, command, None, |reply| matches!(reply, Reply::Done)).await?;
    Ok(S3Response::new(AbortMultipartUploadOutput::default()))
}

/// The parts of an upload, in order of their numbers.
pub(super) async fn list_parts(call: &Call, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
    let input = req.input;
    meta::check_key(&input.key)?;
    let upload = parse_upload(&input.upload_id)?;
    let max_parts = list::page_size(input.max_parts)?;
    let marker = input.part_number_marker.unwrap_or(0);
    let after = u16::try_from(marker.clamp(0, i32::from(MAX_PARTS))).unwrap_or(MAX_PARTS);
    let limit = u32::try_from(max_parts.max(1)).unwrap_or(1);
    let query =
        |bucket: &BucketRecord| Query::ListParts { bucket: bucket.id, key: input.key.clone(), upload, after, limit };
    let (record, mut parts, more) = match call.ask(&input.bucket, &input.key, query).await? {
        (_, Answer::Parts { upload, parts, more }) => (upload, parts, more),
        (_, other) => return Err(error::answer(other)),
    };
    if max_parts == 0 {
        parts.clear();
    }
    let next = parts.last().map_or(after, |part| part.number);
    let parts = parts
        .into_iter()
        .map(|part| {
            let mut out = dto::Part {
                part_number: Some(i32::from(part.number)),
                size: i64::try_from(part.size_bytes).ok(),
                e_tag: Some(ETag::Strong(part.etag)),
                last_modified: Some(meta::timestamp(part.modified_ms)),
                ..Default::default()
            };
            if let (Some(checksum), true) = (&part.checksum, record.checksum.is_some()) {
                put_checksum!(out, checksum.algorithm, checksums::text(checksum, 0));
            }
            out
        })
        .collect();
    let owner = account_text(record.owner);
    let output = ListPartsOutput {
        bucket: Some(input.bucket),
        key: meta::xml_key(&input.key),
        upload_id: Some(input.upload_id),
        part_number_marker: Some(marker),
        next_part_number_marker: Some(i32::from(next)),
        max_parts: Some(max_parts),
        is_truncated: Some(more && max_parts > 0),
        parts: Some(parts),
        storage_class: Some(meta::scheme_of(&record.meta).unwrap_or("STANDARD").to_owned().into()),
        checksum_algorithm: record.checksum.map(|(algorithm, _)| checksums::name(algorithm).to_owned().into()),
        checksum_type: record.checksum.map(|(_, kind)| checksums::kind_name(kind).to_owned().into()),
        owner: Some(Owner { id: Some(owner.clone()), display_name: None }),
        initiator: Some(Initiator { id: Some(owner), display_name: None }),
        ..Default::default()
    };
    Ok(S3Response::new(output))
}

/// Where a listing of uploads goes on: after this upload of the key, or after all uploads of it.
type UploadsAfter = Option<(String, Option<UploadId>)>;

/// The next uploads in order of (key, id), and whether there are more.
async fn next_uploads(
    call: &Call,
    bucket: &mut BucketRecord,
    prefix: &str,
    after: UploadsAfter,
) -> S3Result<(Vec<ListedUpload>, bool)> {
    let mut tries = 0;
    loop {
        match call.cx.shards.list_uploads(bucket.id, prefix, after.clone(), QUERY_UPLOADS).await {
            Ok(page) => return Ok((page.uploads, page.more)),
            Err(ShardError::BucketFenced) => tries += 1,
            Err(cause) => return Err(error::query(cause)),
        }
        *bucket = call.after_fence(bucket, tries).await?;
    }
}

/// Uploads in progress, in order of key and id.
pub(super) async fn list_multipart_uploads(
    call: &Call,
    req: S3Request<ListMultipartUploadsInput>,
) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
    let input = req.input;
    let mut url = list::wants_url(input.encoding_type.as_ref())?;
    let max_uploads = list::page_size(input.max_uploads)?;
    let most = usize::try_from(max_uploads).unwrap_or(0);
    let (prefix, delimiter) = (input.prefix.unwrap_or_default(), input.delimiter.unwrap_or_default());
    let key_marker = input.key_marker.unwrap_or_default();
    // An upload id counts only beside a key, and one that is none of ours is after nothing in particular: the key's
    // end.
    let id_marker =
        input.upload_id_marker.as_deref().filter(|text| !text.is_empty()).and_then(|text| parse_upload(text).ok());
    let mut after = (!key_marker.is_empty()).then(|| (key_marker.clone(), id_marker));
    let mut bucket = call.bucket_now(&input.bucket).await?;

    let (mut uploads, mut prefixes): (Vec<ListedUpload>, Vec<String>) = (Vec::new(), Vec::new());
    let skipped = |key: &str, prefixes: &[String]| {
        let marker_prefix = !delimiter.is_empty()
            && !key_marker.is_empty()
            && key_marker.ends_with(&delimiter)
            && key.starts_with(&key_marker);
        marker_prefix || prefixes.last().is_some_and(|prefix| key.starts_with(prefix.as_str()))
    };
    let mut truncated = false;
    let mut last: UploadsAfter = None;
    'rounds: for round in 0.. {
        if most == 0 {
            break;
        }
        let (page, more) = next_uploads(call, &mut bucket, &prefix, after.clone()).await?;
        for (key, id, record) in page {
            after = Some((key.clone(), Some(id)));
            if skipped(&key, &prefixes) {
                continue;
            }
            if uploads.len() + prefixes.len() == most {
                truncated = true;
                break 'rounds;
            }
            let folded = key.get(prefix.len()..).filter(|_| !delimiter.is_empty()).and_then(|rest| {
                let end = rest.find(&delimiter)? + delimiter.len();
                Some(format!("{prefix}{}", rest.get(..end)?))
            });
            match folded {
                Some(folded) => {
                    last = Some((folded.clone(), None));
                    prefixes.push(folded);
                }
                None => {
                    last = Some((key.clone(), Some(id)));
                    uploads.push((key, id, record));
                }
            }
        }
        if !more {
            break;
        }
        if round + 1 == MAX_ROUNDS {
            truncated = true;
            last = after.clone();
            break;
        }
    }

    url |= !uploads.iter().map(|(key, ..)| key).chain(&prefixes).all(|text| meta::fits_xml(text));
    let encode = |text: &str| if url { url_encode(text) } else { text.to_owned() };
    let one = |(key, id, record): &ListedUpload| MultipartUpload {
        key: Some(encode(key)),
        upload_id: Some(upload_text(*id)),
        initiated: Some(meta::timestamp(record.initiated_ms)),
        storage_class: Some(meta::scheme_of(&record.meta).unwrap_or("STANDARD").to_owned().into()),
        checksum_algorithm: record.checksum.map(|(algorithm, _)| checksums::name(algorithm).to_owned().into()),
        checksum_type: record.checksum.map(|(_, kind)| checksums::kind_name(kind).to_owned().into()),
        owner: Some(Owner { id: Some(account_text(record.owner)), display_name: None }),
        initiator: Some(Initiator { id: Some(account_text(record.owner)), display_name: None }),
    };
    let next = last.filter(|_| truncated);
    let output = ListMultipartUploadsOutput {
        bucket: Some(input.bucket),
        prefix: Some(encode(&prefix)),
        delimiter: Some(delimiter.as_str()).filter(|text| !text.is_empty()).map(encode),
        key_marker: Some(encode(&key_marker)),
        upload_id_marker: input.upload_id_marker,
        max_uploads: Some(max_uploads),
        is_truncated: Some(truncated),
        next_key_marker: next.as_ref().map(|(key, _)| encode(key)),
        next_upload_id_marker: next.and_then(|(_, id)| id).map(upload_text),
        encoding_type: url.then(|| EncodingType::from_static(EncodingType::URL)),
        uploads: Some(uploads.iter().map(one).collect()),
        common_prefixes: Some(prefixes.iter().map(|prefix| CommonPrefix { prefix: Some(encode(prefix)) }).collect()),
        ..Default::default()
    };
    Ok(S3Response::new(output))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_copy_range_names_both_ends_inside_the_source() {
        assert_eq!(copy_range(None, 10).unwrap(), 0..10);
        assert_eq!(copy_range(Some("bytes=0-9"), 10).unwrap(), 0..10);
        assert_eq!(copy_range(Some("bytes=3-3"), 10).unwrap(), 3..4);
        for bad in [
            "bytes=0-10",
            "bytes=-3",
            "bytes=3-",
            "bytes=5-4",
            "0-3",
            "bytes=+1-3",
            "bytes=0-18446744073709551615",
            "bytes=0-99999999999999999999",
        ] {
            assert!(copy_range(Some(bad), 10).is_err(), "{bad}");
        }
    }
}
