//! CopyObject, and the reading of a copy's source that it shares with UploadPartCopy.

use super::backend::{ReadError, StageError, StageSpec, StagedPayload};
use super::context::S3Context;
use super::get::{self, ReadConditions, Verdict};
use super::intake::{self, Intake};
use super::put::{self, DEFAULT_ALGORITHM, MAX_PUT_BYTES};
use super::sums::{self, put_sum};
use super::{error, meta};
use crate::digest::Digests;
use granary_meta::record::{BucketRecord, Checksum, ChecksumAlgorithm, ChecksumKind, ObjectRecord, VersionSeq};
use s3s::dto::{CopyObjectInput, CopyObjectOutput, CopyObjectResult, CopySource, ETag};
use s3s::{s3_error, S3Request, S3Response, S3Result};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// Finds the source of a copy and decides its conditions.
///
/// # Errors
/// NoSuchBucket, NoSuchKey, NoSuchVersion, PreconditionFailed, InvalidArgument.
pub(super) async fn find_source(
    cx: &S3Context,
    source: &CopySource,
    conditions: &ReadConditions<'_>,
) -> S3Result<(BucketRecord, String, Box<ObjectRecord>)> {
    let CopySource::Bucket { bucket, key, version_id } = source else {
        return Err(s3_error!(
            InvalidArgument,
            "Copy Source must mention the source bucket and key: sourcebucket/sourcekey"
        ));
    };
    let (bucket, record) = get::find(cx, bucket, key, get::pick(version_id.as_deref())?).await?;
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
    cx: &S3Context,
    source: &ObjectRecord,
    range: Range<u64>,
    spec: StageSpec<'_>,
    algorithm: ChecksumAlgorithm,
) -> S3Result<(Box<dyn StagedPayload>, Digests)> {
    let whole = range.start == 0 && range.end == source.size_bytes;
    let (stream, read_error) = intake::copy_source(cx.backend.read(&source.data, range));
    let (body, verdict) = Intake::start(stream, spec.len_bytes, &[algorithm]);
    let staged = match cx.backend.stage(spec, body).await {
        Ok(staged) => staged,
        Err(StageError::Body) => {
            let cause = read_error.lock().unwrap_or_else(PoisonError::into_inner).take();
            return Err(error::read(
                cause.unwrap_or_else(|| ReadError::Internal("a copy's source has the wrong length".to_owned())),
            ));
        }
        Err(cause) => return Err(error::stage(cause)),
    };
    let digests = verdict.digests()?;
    // What was read must be what was once written: a copy never launders a wrong payload into a fresh ETag.
    if whole && !source.etag.contains('-') && source.etag != hex::encode(digests.md5) {
        return Err(error::internal("the source of a copy does not have the MD5 of its ETag"));
    }
    Ok((staged, digests))
}

/// Copies an object, also onto itself.
pub(super) async fn copy_object(
    cx: &Arc<S3Context>,
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
    let given = meta::read(&headers, |name| cx.backend.has_scheme(name))?;
    let asked = input.checksum_algorithm.as_ref().map(|name| sums::parse_name(name.as_str())).transpose()?;

    let bucket = cx.bucket(&input.bucket).await?;
    let source_conditions = ReadConditions {
        if_match: input.copy_source_if_match.as_ref(),
        if_none_match: input.copy_source_if_none_match.as_ref(),
        if_modified_since: input.copy_source_if_modified_since.as_ref(),
        if_unmodified_since: input.copy_source_if_unmodified_since.as_ref(),
    };
    let (source_bucket, source_key, source) = find_source(cx, &input.copy_source, &source_conditions).await?;
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
    let spec =
        StageSpec { scheme: meta::scheme_of(&object_meta), bucket: bucket.id, key: &key, len_bytes, inline: true };
    let (staged, digests) = stage_copy(cx, &source, 0..len_bytes, spec, algorithm).await?;

    let checksum = digests.sum(algorithm).map(|value| Checksum {
        algorithm,
        kind: ChecksumKind::FullObject,
        value: value.to_vec(),
    });
    let modified_ms = meta::now_ms();
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
        owner: cx.owner,
        data: staged.data(),
    };
    let etag = put::commit(cx, bucket, key, record, conditions, staged).await?;
    let mut result = CopyObjectResult {
        e_tag: Some(ETag::Strong(etag)),
        last_modified: Some(meta::timestamp(modified_ms)),
        ..Default::default()
    };
    if let Some(checksum) = checksum {
        put_sum!(result, checksum.algorithm, sums::text(&checksum, 0));
        result.checksum_type = Some(sums::kind_name(checksum.kind).to_owned().into());
    }
    Ok(S3Response::new(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() }))
}
