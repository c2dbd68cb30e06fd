//! CopyObject, and the reading of a copy's source that it shares with UploadPartCopy.

use super::call::Call;
use super::checksums::{self, put_checksum};
use super::commit::{commit, stage, StageSpec};
use super::get::{self, ReadConditions, Verdict};
use super::put::{DEFAULT_ALGORITHM, MAX_PUT_BYTES};
use super::upload_body::Source;
use super::{error, meta};
use crate::digest::Digests;
use crate::object::Staged;
use crate::shards::now_ms;
use granary_meta::record::{BucketRecord, Checksum, ChecksumAlgorithm, ChecksumKind, ObjectRecord, VersionSeq};
use s3s::dto::{CopyObjectInput, CopyObjectOutput, CopyObjectResult, CopySource, ETag};
use s3s::{s3_error, S3Request, S3Response, S3Result};
use std::ops::Range;

/// Finds the source of a copy and decides its conditions.
///
/// # Errors
/// NoSuchBucket, NoSuchKey, NoSuchVersion, PreconditionFailed, InvalidArgument.
pub(super) async fn find_source(
    call: &Call,
    source: &CopySource,
    conditions: &ReadConditions<'_>,
) -> S3Result<(BucketRecord, String, Box<ObjectRecord>)> {
    let CopySource::Bucket { bucket, key, version_id } = source else {
        return Err(s3_error!(
            InvalidArgument,
            "Copy Source must mention the source bucket and key: sourcebucket/sourcekey"
        ));
    };
    let (bucket, record) = get::find(call, bucket, key, get::pick(version_id.as_deref())?).await?;
    match conditions.decide(&record.etag, record.modified_ms) {
        Verdict::Go => Ok((bucket, key.to_string(), record)),
        Verdict::Failed | Verdict::NotModified => Err(s3_error!(PreconditionFailed)),
    }
}

/// Streams a range of one object into a new payload.
///
/// # Errors
/// 5xx: the source cannot be read, or the payload not stored.
pub(super) async fn stage_copy(
    call: &Call,
    source: &ObjectRecord,
    range: Range<u64>,
    spec: StageSpec<'_>,
    algorithm: ChecksumAlgorithm,
) -> S3Result<(Staged, Digests)> {
    let whole = range.start == 0 && range.end == source.size_bytes;
    let bytes = Source::of_object(call.cx.objects.read(&source.data, range));
    let (staged, digests) = stage(call, spec, bytes, algorithm).await?;
    // What was read must be what was once written: a copy must not give a wrong payload a fresh ETag.
    if whole && !source.etag.contains('-') && source.etag != hex::encode(digests.md5) {
        return Err(error::internal("the source of a copy does not have the MD5 of its ETag"));
    }
    Ok((staged, digests))
}

/// Copies an object, also onto itself.
pub(super) async fn copy_object(
    call: &Call,
    req: S3Request<CopyObjectInput>,
) -> S3Result<S3Response<CopyObjectOutput>> {
    let S3Request { input, headers, .. } = req;
    let key = input.key;
    meta::check_key(&key)?;
    let conditions = meta::write_conditions(input.if_match.as_ref(), input.if_none_match.as_ref())?;
    let replace = match input.metadata_directive.as_ref().map(|directive| directive.as_str()) {
        None | Some("COPY") => false,
        Some("REPLACE") => true,
        Some(_) => return Err(s3_error!(InvalidArgument, "Unknown metadata directive.")),
    };
    let replace_tags = match input.tagging_directive.as_ref().map(|directive| directive.as_str()) {
        None | Some("COPY") => false,
        Some("REPLACE") => true,
        Some(_) => return Err(s3_error!(InvalidArgument, "Unknown tagging directive.")),
    };
    let given = meta::read(&headers, |name| call.cx.has_scheme(name))?;
    let asked = input.checksum_algorithm.as_ref().map(|name| checksums::parse_name(name.as_str())).transpose()?;

    let bucket = call.bucket(&input.bucket).await?;
    let source_conditions = ReadConditions {
        if_match: input.copy_source_if_match.as_ref(),
        if_none_match: input.copy_source_if_none_match.as_ref(),
        if_modified_since: input.copy_source_if_modified_since.as_ref(),
        if_unmodified_since: input.copy_source_if_unmodified_since.as_ref(),
    };
    let (source_bucket, source_key, source) = find_source(call, &input.copy_source, &source_conditions).await?;
    if source.size_bytes > MAX_PUT_BYTES {
        return Err(s3_error!(
            InvalidRequest,
            "The specified copy source is larger than the maximum allowable size for a copy source: 5368709120"
        ));
    }

    let mut object_meta = if replace { given.clone() } else { source.meta.clone() };
    object_meta.tags = if replace_tags { given.tags.clone() } else { source.meta.tags.clone() };
    // A storage class is never copied along: none named means STANDARD, as for a PUT.
    let redirect = meta::kept(&given, "x-amz-website-redirect-location").is_some();
    object_meta.storage_class = given.storage_class;
    let unchanged = !replace && !redirect && object_meta.storage_class == source.meta.storage_class;
    if unchanged && source_bucket.id == bucket.id && source_key == key {
        return Err(s3_error!(
            InvalidRequest,
            "This copy request is illegal because it is trying to copy an object to itself without changing the object's metadata, storage class, website redirect location or encryption attributes."
        ));
    }

    let algorithm = asked.or(source.checksum.as_ref().map(|checksum| checksum.algorithm)).unwrap_or(DEFAULT_ALGORITHM);
    let len_bytes = source.size_bytes;
    let scheme = meta::scheme_of(&object_meta);
    let spec = StageSpec { scheme, bucket: bucket.id, key: &key, len_bytes, is_part: false };
    let (staged, digests) = stage_copy(call, &source, 0..len_bytes, spec, algorithm).await?;

    let checksum = digests.checksum(algorithm).map(|value| Checksum {
        algorithm,
        kind: ChecksumKind::FullObject,
        value: value.to_vec(),
    });
    let modified_ms = now_ms();
    let record = ObjectRecord {
        version: VersionSeq(0),
        null_version: true,
        delete_marker: false,
        modified_ms,
        size_bytes: len_bytes,
        etag: hex::encode(digests.md5),
        part_sizes: Vec::new(),
        checksum: checksum.clone(),
        part_checksums: Vec::new(),
        meta: object_meta,
        owner: call.caller.account,
        data: staged.data.clone(),
    };
    let etag = commit(call, bucket, key, record, conditions, staged).await?;
    let mut result = CopyObjectResult {
        e_tag: Some(ETag::Strong(etag)),
        last_modified: Some(meta::timestamp(modified_ms)),
        ..Default::default()
    };
    if let Some(checksum) = checksum {
        put_checksum!(result, checksum.algorithm, checksums::text(&checksum, 0));
        result.checksum_type = Some(checksums::kind_name(checksum.kind).to_owned().into());
    }
    Ok(S3Response::new(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() }))
}
