//! Verbs on buckets: create, head, list, delete, location.

use super::access::account_text;
use super::context::S3Context;
use super::error;
use futures::StreamExt;
use granary_placement::id::ShardId;
use granary_wire::meta::{Answer, Command, Query, Reply};
use granary_wire::record::BucketId;
use s3s::dto::{
    Bucket, BucketLocationConstraint, CreateBucketInput, CreateBucketOutput, DeleteBucketInput, DeleteBucketOutput, GetBucketLocationInput,
    GetBucketLocationOutput, HeadBucketInput, HeadBucketOutput, ListBucketsInput, ListBucketsOutput, Owner,
};
use s3s::path::check_bucket_name;
use s3s::{s3_error, S3ErrorCode, S3Request, S3Response, S3Result};
use std::sync::Arc;

/// Region that S3 does not name in its answers.
const UNNAMED_REGION: &str = "us-east-1";
/// Buckets of one query.
const QUERY_BUCKETS: u32 = 1000;
/// Most buckets of one answer.
const MAX_BUCKETS: usize = 10_000;
/// Shards that are fenced at the same time.
const PARALLEL_FENCES: usize = 16;

/// Makes a bucket.
pub(super) async fn create_bucket(cx: &Arc<S3Context>, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
    let input = req.input;
    if !check_bucket_name(&input.bucket) {
        return Err(s3_error!(InvalidBucketName));
    }
    let region = cx.settings.region.as_str();
    if let Some(asked) = input.create_bucket_configuration.as_ref().and_then(|config| config.location_constraint.as_ref()) {
        if !asked.as_str().is_empty() && asked.as_str() != region {
            return Err(s3_error!(InvalidLocationConstraint, "The specified location-constraint is not valid: this server is in {region}"));
        }
    }
    let command = Command::CreateBucket { name: input.bucket.clone(), owner: cx.owner };
    let location = Some(format!("/{}", input.bucket));
    match cx.backend.command(ShardId::ROOT, command).await.map_err(error::backend)? {
        Reply::Bucket(_) => {}
        Reply::BucketExists(bucket) if bucket.deleting => {
            return Err(s3_error!(OperationAborted, "The bucket of this name is being deleted."));
        }
        Reply::BucketExists(bucket) if bucket.owner != cx.owner => return Err(s3_error!(BucketAlreadyExists)),
        // As S3 does: making one's own bucket again is harmless where it all began, and an error elsewhere.
        Reply::BucketExists(_) if region == UNNAMED_REGION => {}
        Reply::BucketExists(_) => return Err(s3_error!(BucketAlreadyOwnedByYou)),
        other => return Err(error::reply(other)),
    }
    Ok(S3Response::new(CreateBucketOutput { location, ..Default::default() }))
}

/// Does a bucket exist, and in which region?
pub(super) async fn head_bucket(cx: &Arc<S3Context>, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
    let bucket = cx.bucket_now(&req.input.bucket).await?;
    if bucket.deleting {
        return Err(s3_error!(NoSuchBucket));
    }
    Ok(S3Response::new(HeadBucketOutput { bucket_region: Some(cx.settings.region.clone()), ..Default::default() }))
}

/// The region of a bucket; empty for the first of all regions.
pub(super) async fn get_bucket_location(
    cx: &Arc<S3Context>,
    req: S3Request<GetBucketLocationInput>,
) -> S3Result<S3Response<GetBucketLocationOutput>> {
    cx.bucket_now(&req.input.bucket).await?;
    let region = Some(cx.settings.region.clone()).filter(|region| region != UNNAMED_REGION);
    Ok(S3Response::new(GetBucketLocationOutput { location_constraint: region.map(BucketLocationConstraint::from) }))
}

/// All buckets, in order of name.
pub(super) async fn list_buckets(cx: &Arc<S3Context>, req: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
    let input = req.input;
    let prefix = input.prefix.clone().unwrap_or_default();
    let most = match input.max_buckets {
        None => MAX_BUCKETS,
        Some(most) => usize::try_from(most).ok().filter(|most| (1..=MAX_BUCKETS).contains(most)).ok_or_else(|| {
            s3_error!(InvalidArgument, "Argument max-buckets must be an integer between 1 and 10000")
        })?,
    };
    let mut after = input.continuation_token.clone().unwrap_or_default();
    let mut buckets = Vec::new();
    let mut continuation_token = None;
    'pages: loop {
        let query = Query::ListBuckets { after: after.clone(), limit: QUERY_BUCKETS };
        let (page, more) = match cx.backend.query(ShardId::ROOT, query).await.map_err(error::backend)? {
            Answer::Buckets { buckets, more } => (buckets, more),
            other => return Err(error::answer(other)),
        };
        for bucket in page {
            if bucket.name.starts_with(&prefix) {
                if buckets.len() == most {
                    continuation_token = Some(after);
                    break 'pages;
                }
                buckets.push(Bucket {
                    name: Some(bucket.name.clone()),
                    creation_date: Some(super::meta::timestamp(bucket.created_ms)),
                    bucket_region: Some(cx.settings.region.clone()),
                    ..Default::default()
                });
            }
            after = bucket.name;
        }
        if !more {
            break;
        }
    }
    let owner = Some(Owner { id: Some(account_text(cx.owner)), display_name: None });
    Ok(S3Response::new(ListBucketsOutput { buckets: Some(buckets), owner, continuation_token, prefix: input.prefix }))
}

/// Deletes an empty bucket: it is marked, fenced in every shard, and only then removed, so that no acknowledged upload lands in a
/// bucket that is gone. A deletion that broke off is finished, or taken back, by the next one.
pub(super) async fn delete_bucket(cx: &Arc<S3Context>, req: S3Request<DeleteBucketInput>) -> S3Result<S3Response<DeleteBucketOutput>> {
    let name = req.input.bucket;
    let cx = cx.clone();
    // On a task of its own: a client that goes away must not leave the bucket half deleted.
    tokio::spawn(async move { delete(&cx, name).await }).await.map_err(error::internal)??;
    Ok(S3Response::new(DeleteBucketOutput::default()))
}

async fn delete(cx: &S3Context, name: String) -> S3Result<()> {
    let bucket = cx.bucket_now(&name).await?;
    let begin = Command::BeginDeleteBucket { name: name.clone(), bucket: bucket.id };
    match cx.backend.command(ShardId::ROOT, begin).await.map_err(error::backend)? {
        Reply::Bucket(_) => {}
        other => return Err(error::reply(other)),
    }
    let shards = cx.backend.object_shards();
    if shards.is_empty() {
        return Err(error::unavailable("The cluster map is not known yet."));
    }
    let fence = |shard: ShardId| async move {
        let reply = cx.backend.command(shard, Command::FenceBucket { bucket: bucket.id }).await.map_err(error::backend)?;
        match reply {
            Reply::Fenced { empty } => Ok(empty),
            other => Err(error::reply(other)),
        }
    };
    let fenced: Vec<S3Result<bool>> = futures::stream::iter(shards.iter().copied()).map(fence).buffered(PARALLEL_FENCES).collect().await;
    let empty = fenced.iter().all(|outcome| matches!(outcome, Ok(true)));
    let end = Command::EndDeleteBucket { name: name.clone(), bucket: bucket.id, remove: empty };
    if empty {
        match cx.backend.command(ShardId::ROOT, end).await.map_err(error::backend)? {
            Reply::Done => {}
            other => return Err(error::reply(other)),
        }
        cx.forget_bucket(&name);
        return Ok(());
    }
    // Not empty, or not known to be: the fences go first, so that the bucket never looks well while a shard still refuses it.
    unfence(cx, bucket.id, &shards).await?;
    match cx.backend.command(ShardId::ROOT, end).await.map_err(error::backend)? {
        Reply::Done => {}
        other => return Err(error::reply(other)),
    }
    match fenced.into_iter().find_map(Result::err) {
        Some(error) if *error.code() != S3ErrorCode::InternalError => Err(error),
        _ => Err(s3_error!(BucketNotEmpty)),
    }
}

async fn unfence(cx: &S3Context, bucket: BucketId, shards: &[ShardId]) -> S3Result<()> {
    let unfence = |shard: ShardId| async move {
        match cx.backend.command(shard, Command::UnfenceBucket { bucket }).await.map_err(error::backend)? {
            Reply::Done => Ok(()),
            other => Err(error::reply(other)),
        }
    };
    let outcomes: Vec<S3Result<()>> = futures::stream::iter(shards.iter().copied()).map(unfence).buffered(PARALLEL_FENCES).collect().await;
    outcomes.into_iter().collect()
}
