//! Verbs on buckets: create, head, list, delete, location.

use super::access::account_text;
use super::backend::{Created, Removed};
use super::context::S3Context;
use super::error;
use s3s::dto::{
    Bucket, BucketLocationConstraint, CreateBucketInput, CreateBucketOutput, DeleteBucketInput, DeleteBucketOutput,
    GetBucketLocationInput, GetBucketLocationOutput, HeadBucketInput, HeadBucketOutput, ListBucketsInput,
    ListBucketsOutput, Owner,
};
use s3s::path::check_bucket_name;
use s3s::{s3_error, S3Request, S3Response, S3Result};
use std::sync::Arc;

/// Region that S3 does not name in its answers.
const UNNAMED_REGION: &str = "us-east-1";
/// Buckets of one query.
const QUERY_BUCKETS: u32 = 1000;
/// Most buckets of one answer.
const MAX_BUCKETS: usize = 10_000;

/// Makes a bucket.
pub(super) async fn create_bucket(
    cx: &Arc<S3Context>,
    req: S3Request<CreateBucketInput>,
) -> S3Result<S3Response<CreateBucketOutput>> {
    let input = req.input;
    if !check_bucket_name(&input.bucket) {
        return Err(s3_error!(InvalidBucketName));
    }
    let region = cx.settings.region.as_str();
    if let Some(asked) =
        input.create_bucket_configuration.as_ref().and_then(|config| config.location_constraint.as_ref())
    {
        if !asked.as_str().is_empty() && asked.as_str() != region {
            return Err(s3_error!(
                InvalidLocationConstraint,
                "The specified location-constraint is not valid: this server is in {region}"
            ));
        }
    }
    let location = Some(format!("/{}", input.bucket));
    match cx.backend.create_bucket(&input.bucket, cx.owner).await.map_err(error::backend)? {
        Created::New(_) => {}
        Created::Exists(bucket) if bucket.deleting => {
            return Err(s3_error!(OperationAborted, "The bucket of this name is being deleted."));
        }
        Created::Exists(bucket) if bucket.owner != cx.owner => return Err(s3_error!(BucketAlreadyExists)),
        // As S3 does: making one's own bucket again is harmless where it all began, and an error elsewhere.
        Created::Exists(_) if region == UNNAMED_REGION => {}
        Created::Exists(_) => return Err(s3_error!(BucketAlreadyOwnedByYou)),
    }
    Ok(S3Response::new(CreateBucketOutput { location, ..Default::default() }))
}

/// Does a bucket exist, and in which region?
pub(super) async fn head_bucket(
    cx: &Arc<S3Context>,
    req: S3Request<HeadBucketInput>,
) -> S3Result<S3Response<HeadBucketOutput>> {
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
pub(super) async fn list_buckets(
    cx: &Arc<S3Context>,
    req: S3Request<ListBucketsInput>,
) -> S3Result<S3Response<ListBucketsOutput>> {
    let input = req.input;
    let prefix = input.prefix.clone().unwrap_or_default();
    let most = match input.max_buckets {
        None => MAX_BUCKETS,
        Some(most) => usize::try_from(most)
            .ok()
            .filter(|most| (1..=MAX_BUCKETS).contains(most))
            .ok_or_else(|| s3_error!(InvalidArgument, "Argument max-buckets must be an integer between 1 and 10000"))?,
    };
    let mut after = input.continuation_token.clone().unwrap_or_default();
    let mut buckets = Vec::new();
    let mut continuation_token = None;
    'pages: loop {
        let (page, more) = cx.backend.list_buckets(&after, QUERY_BUCKETS).await.map_err(error::backend)?;
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

/// Deletes an empty bucket.
pub(super) async fn delete_bucket(
    cx: &Arc<S3Context>,
    req: S3Request<DeleteBucketInput>,
) -> S3Result<S3Response<DeleteBucketOutput>> {
    let name = req.input.bucket;
    let cx = cx.clone();
    // On a task of its own: a client that goes away must not leave the bucket half deleted.
    let removed = tokio::spawn(async move { cx.backend.delete_bucket(&name).await }).await.map_err(error::internal)?;
    match removed.map_err(error::backend)? {
        Removed::Done => Ok(S3Response::new(DeleteBucketOutput::default())),
        Removed::NoSuchBucket => Err(s3_error!(NoSuchBucket)),
        Removed::NotEmpty => Err(s3_error!(BucketNotEmpty)),
    }
}
