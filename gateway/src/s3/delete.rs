//! DeleteObject and DeleteObjects.

use super::call::Call;
use super::commit::settle;
use super::{error, get, meta};
use crate::object::Placement;
use futures::StreamExt;
use granary_meta::record::BucketRecord;
use granary_meta::{Command, Conditions, Reply, VersionPick};
use s3s::dto::{
    DeleteObjectInput, DeleteObjectOutput, DeleteObjectsInput, DeleteObjectsOutput, DeletedObject, ObjectIdentifier,
};
use s3s::{s3_error, S3Request, S3Response, S3Result};

/// Most keys of one DeleteObjects.
const MAX_KEYS: usize = 1000;
/// Deletes of one request that are under way at the same time.
const PARALLEL: usize = 32;

/// Deletes an object; one that is not there counts as deleted.
pub(super) async fn delete_object(
    call: &Call,
    req: S3Request<DeleteObjectInput>,
) -> S3Result<S3Response<DeleteObjectOutput>> {
    let input = req.input;
    if input.if_match_last_modified_time.is_some() || input.if_match_size.is_some() {
        return Err(error::not_implemented("A delete on the condition of a size or a time"));
    }
    let conditions = meta::write_conditions(input.if_match.as_ref(), None)?;
    let bucket = call.bucket(&input.bucket).await?;
    delete(call, bucket, input.key, input.version_id.as_deref(), conditions).await?;
    Ok(S3Response::new(DeleteObjectOutput::default()))
}

async fn delete(
    call: &Call,
    bucket: BucketRecord,
    key: String,
    version: Option<&str>,
    conditions: Conditions,
) -> S3Result<()> {
    meta::check_key(&key)?;
    let version = match get::pick(version) {
        Ok(VersionPick::Current) => VersionPick::Current,
        Ok(version) => version,
        Err(_) => return Err(s3_error!(InvalidArgument, "Invalid version id specified")),
    };
    let named = key.clone();
    let command = move |bucket: &BucketRecord, _: &Placement| Command::DeleteObject {
        bucket: bucket.id,
        key: named.clone(),
        version,
        conditions: conditions.clone(),
        rule_epoch: bucket.rule.epoch,
    };
    settle(call, bucket, key, command, None, |reply| matches!(reply, Reply::Deleted { .. })).await?;
    Ok(())
}

/// Deletes up to 1,000 objects. Errors of single keys are told inside a 200.
pub(super) async fn delete_objects(
    call: &Call,
    req: S3Request<DeleteObjectsInput>,
) -> S3Result<S3Response<DeleteObjectsOutput>> {
    let input = req.input;
    let quiet = input.delete.quiet.unwrap_or(false);
    if input.delete.objects.is_empty() || input.delete.objects.len() > MAX_KEYS {
        return Err(s3_error!(MalformedXML));
    }
    let bucket = call.bucket_now(&input.bucket).await?;
    let one = |object: ObjectIdentifier| {
        let bucket = bucket.clone();
        async move {
            let conditions = Conditions {
                if_match: object.e_tag.as_ref().map(|etag| etag.value().to_owned()),
                if_none_match_any: false,
            };
            let unsupported = object.last_modified_time.is_some() || object.size.is_some();
            let outcome = if unsupported {
                Err(error::not_implemented("A delete on the condition of a size or a time"))
            } else {
                delete(call, bucket, object.key.clone(), object.version_id.as_deref(), conditions).await
            };
            (object, outcome)
        }
    };
    let outcomes: Vec<_> = futures::stream::iter(input.delete.objects).map(one).buffered(PARALLEL).collect().await;

    let mut output = DeleteObjectsOutput::default();
    let (mut deleted, mut errors) = (Vec::new(), Vec::new());
    for (object, outcome) in outcomes {
        let key = meta::xml_key(&object.key);
        match outcome {
            Ok(()) if quiet => {}
            Ok(()) => deleted.push(DeletedObject { key, version_id: object.version_id, ..Default::default() }),
            Err(cause) => errors.push(s3s::dto::Error {
                code: Some(cause.code().as_str().to_owned()),
                key,
                message: cause.message().map(str::to_owned),
                version_id: object.version_id,
            }),
        }
    }
    output.deleted = (!deleted.is_empty()).then_some(deleted);
    output.errors = (!errors.is_empty()).then_some(errors);
    Ok(S3Response::new(output))
}
