//! From a body to a committed record: a payload is staged on the disks, then a command names it in its shard.
//!
//! **Invariant:** the chunks of a payload whose commit may have happened are never deleted from here. They are deleted
//! only after the shard has certainly refused the command.

use super::call::{Call, BUCKET_RETRIES};
use super::error;
use super::upload_body::{upload_body, Source};
use crate::digest::Digests;
use crate::object::{BodyError, Placement, Staged};
use futures::TryStreamExt;
use granary_meta::record::{BucketId, BucketRecord, ChecksumAlgorithm, ObjectRecord};
use granary_meta::{Command, Conditions, Reply};
use granary_placement::id::{Epoch, HashSlot};
use s3s::{S3Error, S3Result};

/// Whose payload it is and how it is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct StageSpec<'a> {
    /// The scheme that a storage class names; None for the default.
    pub(super) scheme: Option<&'a str>,
    /// The bucket that will own it.
    pub(super) bucket: BucketId,
    /// The key that will own it.
    pub(super) key: &'a str,
    /// Exact length, in bytes.
    pub(super) len_bytes: u64,
    /// A part is never stored inline: the record of an object of many parts would become too large.
    pub(super) is_part: bool,
}

/// Streams a payload to the disks, and computes its digests as it passes. Durable when it returns. Dropping what it
/// returns deletes the chunks.
///
/// # Errors
/// What is wrong with the body; 503 or 507 when the disks cannot take it. Nothing stays.
pub(super) async fn stage(
    call: &Call,
    spec: StageSpec<'_>,
    source: Source,
    algorithm: ChecksumAlgorithm,
) -> S3Result<(Staged, Digests)> {
    let owner = HashSlot::of(spec.bucket.0, spec.key);
    let (body, mut digests) = upload_body(source, spec.len_bytes, algorithm);
    // As what the client is to be told: the object store hands it back untouched.
    let body = body.map_err(|fault| Box::new(S3Error::from(fault)) as BodyError);
    let objects = &call.cx.objects;
    let staged = if spec.is_part {
        objects.stage_part(spec.scheme, owner, spec.len_bytes, body).await
    } else {
        objects.stage(spec.scheme, owner, spec.len_bytes, body).await
    };
    let staged = staged.map_err(|cause| error::stage(cause, call.cx.disks_are_full()))?;
    match digests.try_recv() {
        Ok(digests) => Ok((staged, digests)),
        Err(_) => Err(error::internal("a body was staged without being read to its end")),
    }
}

/// Sends a command, and settles what becomes of the staged payload that it names. It runs in a task of its own: a
/// client that goes away must not leave the payload in doubt. `command` is made again for each attempt, by what is
/// known then of the bucket and of where the payload lies; `accepted` tells the replies that mean that the payload now
/// belongs to a record.
///
/// # Errors
/// What the shard refused, NoSuchBucket, or 503 when the outcome is not known.
pub(super) async fn settle(
    call: &Call,
    bucket: BucketRecord,
    key: String,
    command: impl Fn(&BucketRecord, &Placement) -> Command + Send + Sync + 'static,
    staged: Option<Staged>,
    accepted: fn(&Reply) -> bool,
) -> S3Result<Reply> {
    let call = call.clone();
    let task = tokio::spawn(async move {
        let mut staged = staged;
        // From here on a dropped payload stays on the disks, also when this task panics.
        staged.iter_mut().for_each(Staged::committing);
        let mut placement = staged.as_ref().map(Staged::placement).unwrap_or_default();
        let mut bucket = bucket;
        let mut tries = 0;
        let refusal = loop {
            match call.command(&bucket, &key, command(&bucket, &placement)).await {
                Ok(reply) if accepted(&reply) => {
                    staged.into_iter().for_each(Staged::committed);
                    return Ok(reply);
                }
                Ok(reply @ (Reply::BucketFenced | Reply::StaleRule { .. } | Reply::RuleBehind { .. })) => {
                    tries += 1;
                    match before_retry(&call, &bucket, &key, &reply, tries).await {
                        Ok(now) => bucket = now,
                        Err(error) => break error,
                    }
                }
                Ok(Reply::StaleMap { oldest }) if tries < BUCKET_RETRIES => {
                    tries += 1;
                    match place_anew(&call, staged.as_mut(), oldest).await {
                        Ok(now) => placement = now,
                        Err(error) => break error,
                    }
                }
                Ok(reply) if error::is_refusal(&reply) => break error::reply(reply),
                Ok(reply) => {
                    staged.into_iter().for_each(Staged::unknown);
                    return Err(error::reply(reply));
                }
                Err(cause) if cause.outcome_unknown() => {
                    staged.into_iter().for_each(Staged::unknown);
                    return Err(error::command(cause));
                }
                Err(cause) => break error::command(cause),
            }
        };
        staged.into_iter().for_each(Staged::refused);
        Err(refusal)
    });
    task.await.map_err(error::internal)?
}

/// Gives the bucket to send a write to again, after its shard refused the write because of what it knows of the bucket:
/// it is fenced, or its rule has another epoch there.
///
/// # Errors
/// NoSuchBucket when it is gone; 503 when another bucket has the name now, or when it was tried too often.
async fn before_retry(
    call: &Call,
    bucket: &BucketRecord,
    key: &str,
    reply: &Reply,
    tries: u32,
) -> S3Result<BucketRecord> {
    let now = match reply {
        Reply::BucketFenced => call.after_fence(bucket, tries).await?,
        _ if tries >= BUCKET_RETRIES => return Err(error::unavailable("The configuration of the bucket is changing.")),
        // The shard has not heard of the rule that the bucket was looked up with.
        Reply::RuleBehind { .. } => {
            let pushed = call.cx.shards.push_bucket_rule(call.caller.account, bucket, key).await;
            pushed.map_err(error::query)?;
            return Ok(bucket.clone());
        }
        _ => call.bucket_now(&bucket.name).await?,
    };
    // A write never moves on to another bucket of the same name.
    if now.id != bucket.id {
        return Err(error::unavailable("The bucket was made again."));
    }
    Ok(now)
}

/// Holds a payload against the newest map, after its shard refused it because slots have moved since it was placed.
///
/// # Errors
/// 503 when the map cannot be had, or too little of the payload is left in its place.
async fn place_anew(call: &Call, staged: Option<&mut Staged>, oldest: Epoch) -> S3Result<Placement> {
    call.cx.shards.refresh_map().await.map_err(error::query)?;
    let map = call.cx.shards.current_map().filter(|map| map.epoch >= oldest);
    let (Some(map), Some(staged)) = (map, staged) else {
        return Err(error::unavailable("The cluster is being changed."));
    };
    call.cx.objects.hold_against(&map, staged).map_err(|cause| error::stage(cause, call.cx.disks_are_full()))?;
    Ok(staged.placement())
}

/// Commits an object and gives the ETag that was stored.
///
/// # Errors
/// The condition that failed, the bucket that is gone, or 503 when the outcome is not known.
pub(super) async fn commit(
    call: &Call,
    bucket: BucketRecord,
    key: String,
    record: ObjectRecord,
    conditions: Conditions,
    staged: Staged,
) -> S3Result<String> {
    let named = key.clone();
    let command = move |bucket: &BucketRecord, placement: &Placement| Command::PutObject {
        bucket: bucket.id,
        key: named.clone(),
        record: record.clone(),
        missing: placement.missing.clone(),
        map_epoch: placement.map_epoch,
        conditions: conditions.clone(),
        rule_epoch: bucket.rule.epoch,
    };
    match settle(call, bucket, key, command, Some(staged), |reply| matches!(reply, Reply::Put { .. })).await? {
        Reply::Put { etag, .. } => Ok(etag),
        other => Err(error::reply(other)),
    }
}
