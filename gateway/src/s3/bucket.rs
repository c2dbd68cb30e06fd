//! Verbs on buckets: create, head, list, delete, location.

use super::access::account_text;
use super::call::Call;
use super::error;
use crate::shards::buckets::{Created, Removed};
use s3s::dto::{
    Bucket, BucketLocationConstraint, CreateBucketInput, CreateBucketOutput, DeleteBucketInput, DeleteBucketOutput,
    GetBucketLocationInput, GetBucketLocationOutput, HeadBucketInput, HeadBucketOutput, ListBucketsInput,
    ListBucketsOutput, Owner,
};
use s3s::path::check_bucket_name;
use s3s::{s3_error, S3Request, S3Response, S3Result};

/// Region that S3 does not name in its answers.
const UNNAMED_REGION: &str = "us-east-1";
/// Buckets of one query.
const QUERY_BUCKETS: u32 = 1000;
/// Most buckets of one answer.
const MAX_BUCKETS: usize = 10_000;

/// Makes a bucket.
pub(super) async fn create_bucket(
    call: &Call,
    req: S3Request<CreateBucketInput>,
) -> S3Result<S3Response<CreateBucketOutput>> {
    let input = req.input;
    if !check_bucket_name(&input.bucket) {
        return Err(s3_error!(InvalidBucketName));
    }
    let region = call.cx.settings.region.as_str();
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
    match call.cx.shards.create_bucket(&input.bucket, call.caller.account).await.map_err(error::command)? {
        Created::New(_) => {}
        Created::Exists(bucket) if bucket.deleting => {
            return Err(s3_error!(OperationAborted, "The bucket of this name is being deleted."));
        }
        Created::Exists(bucket) if bucket.owner != call.caller.account => return Err(s3_error!(BucketAlreadyExists)),
        // As S3 does: making one's own bucket again is harmless where it all began, and an error elsewhere.
        Created::Exists(_) if region == UNNAMED_REGION => {}
        Created::Exists(_) => return Err(s3_error!(BucketAlreadyOwnedByYou)),
    }
    Ok(S3Response::new(CreateBucketOutput { location, ..Default::default() }))
}

/// Does a bucket exist, and in which region?
pub(super) async fn head_bucket(
    call: &Call,
    req: S3Request<HeadBucketInput>,
) -> S3Result<S3Response<HeadBucketOutput>> {
    let bucket = call.bucket_now(&req.input.bucket).await?;
    if bucket.deleting {
        return Err(s3_error!(NoSuchBucket));
    }
    Ok(S3Response::new(HeadBucketOutput { bucket_region: Some(call.cx.settings.region.clone()), ..Default::default() }))
}

/// The region of a bucket; empty for the first of all regions.
pub(super) async fn get_bucket_location(
    call: &Call,
    req: S3Request<GetBucketLocationInput>,
) -> S3Result<S3Response<GetBucketLocationOutput>> {
    call.bucket_now(&req.input.bucket).await?;
    let region = Some(call.cx.settings.region.clone()).filter(|region| region != UNNAMED_REGION);
    Ok(S3Response::new(GetBucketLocationOutput { location_constraint: region.map(BucketLocationConstraint::from) }))
}

/// The buckets of the caller, in order of name.
pub(super) async fn list_buckets(
    call: &Call,
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
        let owner = Some(call.caller.account);
        let page = call.cx.shards.list_buckets(owner, &prefix, &after, QUERY_BUCKETS).await.map_err(error::query)?;
        for bucket in page.buckets {
            if buckets.len() == most {
                continuation_token = Some(after);
                break 'pages;
            }
            buckets.push(Bucket {
                name: Some(bucket.name.clone()),
                creation_date: Some(super::meta::timestamp(bucket.created_ms)),
                bucket_region: Some(call.cx.settings.region.clone()),
                ..Default::default()
            });
            after = bucket.name;
        }
        if !page.more {
            break;
        }
    }
    let owner = Some(Owner { id: Some(account_text(call.caller.account)), display_name: None });
    Ok(S3Response::new(ListBucketsOutput { buckets: Some(buckets), owner, continuation_token, prefix: input.prefix }))
}

/// Deletes an empty bucket.
pub(super) async fn delete_bucket(
    call: &Call,
    req: S3Request<DeleteBucketInput>,
) -> S3Result<S3Response<DeleteBucketOutput>> {
    let name = req.input.bucket;
    let call = call.clone();
    // In a task of its own: a client that goes away must not leave the bucket half deleted.
    let removed = tokio::spawn(async move { call.cx.shards.delete_bucket(&name, call.caller.account).await })
        .await
        .map_err(error::internal)?;
    match removed.map_err(error::command)? {
        Removed::Done => Ok(S3Response::new(DeleteBucketOutput::default())),
        Removed::NoSuchBucket => Err(s3_error!(NoSuchBucket)),
        Removed::NotEmpty => Err(s3_error!(BucketNotEmpty)),
        Removed::OtherOwner => Err(error::other_owner()),
    }
}
