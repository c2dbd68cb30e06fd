//! PutObject, and the commit that PutObject and CopyObject share.

use super::backend::{BackendError, StageError, StageSpec, StagedPayload};
use super::context::S3Context;
use super::intake::{Intake, Source};
use super::sums::{self, put_sum, Promised};
use super::{error, meta};
use granary_meta::record::{
    BucketRecord, Checksum, ChecksumAlgorithm, ChecksumKind, ObjectData, ObjectRecord, VersionSeq,
};
use granary_meta::{Command, Conditions, Reply};
use s3s::dto::{ETag, PutObjectInput, PutObjectOutput};
use s3s::{s3_error, S3Request, S3Response, S3Result};
use std::sync::Arc;
use std::time::Duration;

/// Longest body of one PUT, in bytes.
pub(super) const MAX_PUT_BYTES: u64 = 5 * 1024 * 1024 * 1024;
/// What is computed when the client sends no checksum of its own, as S3 does.
pub(super) const DEFAULT_ALGORITHM: ChecksumAlgorithm = ChecksumAlgorithm::Crc64Nvme;
/// How often a fenced bucket is asked again, and how long to wait in between: a fence is taken back when the bucket was not empty.
const FENCE_RETRIES: u32 = 5;
const FENCE_WAIT: Duration = Duration::from_millis(200);

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
pub(super) async fn put_object(
    cx: &Arc<S3Context>,
    req: S3Request<PutObjectInput>,
) -> S3Result<S3Response<PutObjectOutput>> {
    let S3Request { input, headers, trailing_headers, .. } = req;
    let key = input.key;
    meta::check_key(&key)?;
    let conditions = meta::write_conditions(input.if_match.as_ref(), input.if_none_match.as_ref())?;
    let object_meta = meta::read(&headers, |name| cx.backend.has_scheme(name))?;
    let promised = Promised::from_headers(&headers)?;
    let algorithm = promised.algorithm(&headers)?.unwrap_or(DEFAULT_ALGORITHM);
    let len_bytes = body_len(input.content_length)?;

    let mut source = Source::new(input.body);
    source.kick();
    let bucket = cx.bucket(&input.bucket).await?;

    let (body, verdict) = Intake::start(source, len_bytes, &[algorithm]);
    let spec =
        StageSpec { scheme: meta::scheme_of(&object_meta), bucket: bucket.id, key: &key, len_bytes, inline: true };
    let staged = match cx.backend.stage(spec, body).await {
        Ok(staged) => staged,
        Err(StageError::Body) => return Err(verdict.fault().unwrap_or_else(|| error::stage(StageError::Body))),
        Err(cause) => return Err(error::stage(cause)),
    };
    let digests = verdict.digests()?;
    promised.verify(&digests, trailing_headers.as_ref())?;

    let checksum = digests.sum(algorithm).map(|value| Checksum {
        algorithm,
        kind: ChecksumKind::FullObject,
        value: value.to_vec(),
    });
    let record = ObjectRecord {
        version: VersionSeq(0),
        null_version: true,
        delete_marker: false,
        modified_ms: meta::now_ms(),
        size_bytes: len_bytes,
        etag: hex::encode(digests.md5),
        part_sizes: Vec::new(),
        checksum: checksum.clone(),
        part_checksums: Vec::new(),
        meta: object_meta,
        owner: cx.owner,
        data: staged.data(),
    };
    let etag = commit(cx, bucket, key, record, conditions, staged).await?;

    let mut output = PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() };
    if let Some(checksum) = checksum {
        put_sum!(output, checksum.algorithm, sums::text(&checksum, 0));
        output.checksum_type = Some(sums::kind_name(checksum.kind).to_owned().into());
    }
    Ok(S3Response::new(output))
}

/// A staged payload while its commit is under way. Whatever happens to the task, its chunks stay: deleting what may have been
/// committed is the one thing that must not happen.
struct UnderWay(Option<Box<dyn StagedPayload>>);

impl UnderWay {
    fn committed(mut self) {
        if let Some(staged) = self.0.take() {
            staged.committed();
        }
    }

    /// Surely not committed: dropping the payload deletes it.
    fn refused(mut self) {
        drop(self.0.take());
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(staged) = self.0.take() {
            staged.unknown();
        }
    }
}

/// Sends a command that owns a staged payload, and settles what becomes of the payload. It runs on a task of its own: a client that
/// goes away must not leave the payload in doubt. `accepted` says which reply means that the payload belongs to a record now.
pub(super) async fn settle(
    cx: &Arc<S3Context>,
    bucket: BucketRecord,
    key: String,
    command: Command,
    staged: Option<Box<dyn StagedPayload>>,
    accepted: fn(&Reply) -> bool,
) -> S3Result<Reply> {
    let cx = cx.clone();
    let task = tokio::spawn(async move {
        let under_way = UnderWay(staged);
        let mut tries = 0;
        loop {
            match cx.backend.command_for(bucket.id, &key, command.clone()).await {
                Ok(reply) if accepted(&reply) => {
                    under_way.committed();
                    return Ok(reply);
                }
                Ok(Reply::BucketFenced) => {
                    tries += 1;
                    if let Err(error) = fenced(&cx, &bucket, tries).await {
                        under_way.refused();
                        return Err(error);
                    }
                }
                Ok(reply) => {
                    under_way.refused();
                    return Err(error::reply(reply));
                }
                Err(cause @ BackendError::OutcomeUnknown(_)) => return Err(error::backend(cause)),
                Err(cause) => {
                    under_way.refused();
                    return Err(error::backend(cause));
                }
            }
        }
    });
    task.await.map_err(error::internal)?
}

/// What to do when a shard says that a bucket is fenced: look its name up again, and wait while it still has the same number.
///
/// # Errors
/// NoSuchBucket when it is gone; 503 when another bucket has the name now, or when the fence stays.
pub(super) async fn fenced(cx: &S3Context, bucket: &BucketRecord, tries: u32) -> S3Result<()> {
    let now = cx.bucket_now(&bucket.name).await?;
    if now.id != bucket.id {
        return Err(error::unavailable("The bucket was made again."));
    }
    if tries >= FENCE_RETRIES {
        return Err(error::unavailable("The bucket is being deleted."));
    }
    tokio::time::sleep(FENCE_WAIT).await;
    Ok(())
}

/// Commits an object and gives the ETag that was stored.
///
/// # Errors
/// The condition that failed, the bucket that is gone, or 503 when the outcome is not known.
pub(super) async fn commit(
    cx: &Arc<S3Context>,
    bucket: BucketRecord,
    key: String,
    record: ObjectRecord,
    conditions: Conditions,
    staged: Box<dyn StagedPayload>,
) -> S3Result<String> {
    debug_assert!(
        matches!(record.data, ObjectData::Inline { .. }) || !record.data.extents().is_empty() || record.size_bytes == 0
    );
    let command = Command::PutObject {
        bucket: bucket.id,
        key: key.clone(),
        record,
        missing: staged.missing(),
        conditions,
        rule_epoch: bucket.rule.epoch,
    };
    match settle(cx, bucket, key, command, Some(staged), |reply| matches!(reply, Reply::Put { .. })).await? {
        Reply::Put { etag, .. } => Ok(etag),
        other => Err(error::reply(other)),
    }
}
