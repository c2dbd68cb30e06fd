//! PutObject.

use super::call::Call;
use super::checksums::{self, put_checksum, PromisedChecksums};
use super::commit::{commit, stage, StageSpec};
use super::meta;
use super::upload_body::Source;
use crate::shards::now_ms;
use granary_meta::record::{Checksum, ChecksumAlgorithm, ChecksumKind, ObjectRecord, VersionSeq};
use s3s::dto::{ETag, PutObjectInput, PutObjectOutput};
use s3s::{s3_error, S3Request, S3Response, S3Result};

/// Longest body of one PUT, in bytes.
pub(super) const MAX_PUT_BYTES: u64 = 5 * 1024 * 1024 * 1024;
/// What is computed when the client sends no checksum of its own, as S3 does.
pub(super) const DEFAULT_ALGORITHM: ChecksumAlgorithm = ChecksumAlgorithm::Crc64Nvme;

/// Length of an upload's body: Content-Length, or the decoded length that s3s put in its place.
///
/// # Errors
/// MissingContentLength, EntityTooLarge.
pub(super) fn body_len(content_length: Option<i64>) -> S3Result<u64> {
    let len = content_length.and_then(|len| u64::try_from(len).ok()).ok_or_else(|| s3_error!(MissingContentLength))?;
    if len > MAX_PUT_BYTES {
        return Err(s3_error!(EntityTooLarge));
    }
    Ok(len)
}

/// Stores an object.
pub(super) async fn put_object(call: &Call, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
    let S3Request { input, headers, trailing_headers, .. } = req;
    let key = input.key;
    meta::check_key(&key)?;
    let conditions = meta::write_conditions(input.if_match.as_ref(), input.if_none_match.as_ref())?;
    let object_meta = meta::read(&headers, |name| call.cx.has_scheme(name))?;
    let promised = PromisedChecksums::from_headers(&headers)?;
    let algorithm = promised.algorithm(&headers)?.unwrap_or(DEFAULT_ALGORITHM);
    let len_bytes = body_len(input.content_length)?;

    let mut source = Source::of_request(input.body);
    source.send_continue();
    let bucket = call.bucket(&input.bucket).await?;

    let scheme = meta::scheme_of(&object_meta);
    let spec = StageSpec { scheme, bucket: bucket.id, key: &key, len_bytes, is_part: false };
    let (staged, digests) = stage(call, spec, source, algorithm).await?;
    promised.verify(&digests, trailing_headers.as_ref())?;

    let checksum = digests.checksum(algorithm).map(|value| Checksum {
        algorithm,
        kind: ChecksumKind::FullObject,
        value: value.to_vec(),
    });
    let record = ObjectRecord {
        version: VersionSeq(0),
        null_version: true,
        delete_marker: false,
        modified_ms: now_ms(),
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

    let mut output = PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() };
    if let Some(checksum) = checksum {
        put_checksum!(output, checksum.algorithm, checksums::text(&checksum, 0));
        output.checksum_type = Some(checksums::kind_name(checksum.kind).to_owned().into());
    }
    Ok(S3Response::new(output))
}
