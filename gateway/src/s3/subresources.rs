//! Verbs that clients use to find out what a server can do: ACLs, versioning, lock, lifecycle and the like. What is not
//! configured answers with the code of exactly that sub-resource, as S3 does.

use super::access::account_text;
use super::call::Call;
use super::error;
use super::get;
use http::StatusCode;
use s3s::dto::{
    AccessControlPolicy, GetBucketAclInput, GetBucketAclOutput, GetBucketVersioningInput, GetBucketVersioningOutput,
    GetObjectAclInput, GetObjectAclOutput, Grant, Grantee, Owner, Permission, PutBucketAclInput, PutBucketAclOutput,
    PutObjectAclInput, PutObjectAclOutput, Type,
};
use s3s::{s3_error, S3Error, S3Request, S3Response, S3Result};

fn owner(call: &Call) -> Owner {
    Owner { id: Some(account_text(call.caller.account)), display_name: None }
}

/// The only ACL there is: the owner may do everything.
fn grants(call: &Call) -> Vec<Grant> {
    let grantee = Grantee {
        display_name: None,
        email_address: None,
        id: Some(account_text(call.caller.account)),
        type_: Type::from_static(Type::CANONICAL_USER),
        uri: None,
    };
    vec![Grant { grantee: Some(grantee), permission: Some(Permission::from_static(Permission::FULL_CONTROL)) }]
}

/// A policy in the body of a PUT must be the one there is.
fn check_policy(call: &Call, policy: Option<&AccessControlPolicy>) -> S3Result<()> {
    let Some(policy) = policy else { return Ok(()) };
    let own = account_text(call.caller.account);
    let fine = policy.grants.iter().flatten().all(|grant| {
        grant.grantee.as_ref().is_some_and(|grantee| grantee.id.as_deref() == Some(own.as_str()))
            && grant.permission.as_ref().is_some_and(|permission| permission.as_str() == Permission::FULL_CONTROL)
    });
    if fine {
        Ok(())
    } else {
        Err(s3_error!(AccessControlListNotSupported, "The bucket does not allow ACLs"))
    }
}

/// The ACL of a bucket.
pub(super) async fn get_bucket_acl(
    call: &Call,
    req: S3Request<GetBucketAclInput>,
) -> S3Result<S3Response<GetBucketAclOutput>> {
    call.bucket_now(&req.input.bucket).await?;
    Ok(S3Response::new(GetBucketAclOutput { grants: Some(grants(call)), owner: Some(owner(call)) }))
}

/// Takes the ACL there is; canned ones in headers were checked in `access`.
pub(super) async fn put_bucket_acl(
    call: &Call,
    req: S3Request<PutBucketAclInput>,
) -> S3Result<S3Response<PutBucketAclOutput>> {
    call.bucket_now(&req.input.bucket).await?;
    check_policy(call, req.input.access_control_policy.as_ref())?;
    Ok(S3Response::new(PutBucketAclOutput::default()))
}

/// The ACL of an object.
pub(super) async fn get_object_acl(
    call: &Call,
    req: S3Request<GetObjectAclInput>,
) -> S3Result<S3Response<GetObjectAclOutput>> {
    let input = req.input;
    get::find(call, &input.bucket, &input.key, get::pick(input.version_id.as_deref())?).await?;
    let output = GetObjectAclOutput { grants: Some(grants(call)), owner: Some(owner(call)), ..Default::default() };
    Ok(S3Response::new(output))
}

/// Takes the ACL there is.
pub(super) async fn put_object_acl(
    call: &Call,
    req: S3Request<PutObjectAclInput>,
) -> S3Result<S3Response<PutObjectAclOutput>> {
    let input = req.input;
    get::find(call, &input.bucket, &input.key, get::pick(input.version_id.as_deref())?).await?;
    check_policy(call, input.access_control_policy.as_ref())?;
    Ok(S3Response::new(PutObjectAclOutput::default()))
}

/// Versioning was never switched on.
pub(super) async fn get_bucket_versioning(
    call: &Call,
    req: S3Request<GetBucketVersioningInput>,
) -> S3Result<S3Response<GetBucketVersioningOutput>> {
    call.bucket_now(&req.input.bucket).await?;
    Ok(S3Response::new(GetBucketVersioningOutput::default()))
}

/// A sub-resource that a bucket does not have.
///
/// # Errors
/// Always: NoSuchBucket, or the code of the sub-resource.
pub(super) async fn absent<T>(call: &Call, bucket: &str, error: impl FnOnce() -> S3Error) -> S3Result<T> {
    call.bucket_now(bucket).await?;
    Err(error())
}

/// No lifecycle rules.
pub(super) fn no_lifecycle() -> S3Error {
    s3_error!(NoSuchLifecycleConfiguration, "The lifecycle configuration does not exist")
}

/// No policy.
pub(super) fn no_policy() -> S3Error {
    s3_error!(NoSuchBucketPolicy, "The bucket policy does not exist")
}

/// No CORS rules.
pub(super) fn no_cors() -> S3Error {
    s3_error!(NoSuchCORSConfiguration, "The CORS configuration does not exist")
}

/// No tags.
pub(super) fn no_tags() -> S3Error {
    s3_error!(NoSuchTagSet, "The TagSet does not exist")
}

/// No default encryption.
pub(super) fn no_encryption() -> S3Error {
    let message = "The server side encryption configuration was not found";
    error::custom("ServerSideEncryptionConfigurationNotFoundError", StatusCode::NOT_FOUND, message)
}

/// No object lock.
pub(super) fn no_lock() -> S3Error {
    error::custom(
        "ObjectLockConfigurationNotFoundError",
        StatusCode::NOT_FOUND,
        "Object Lock configuration does not exist for this bucket",
    )
}
