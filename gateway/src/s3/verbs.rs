//! The table of verbs: which function answers which S3 operation. What is not here answers 501 NotImplemented.

use super::context::S3Context;
use super::request::RequestInfo;
use super::{bucket, complete, copy, delete, get, list, multipart, probe, put};
use async_trait::async_trait;
use s3s::dto;
use s3s::{S3Request, S3Response, S3Result, S3};
use std::sync::Arc;

/// The S3 service over a context.
pub(super) struct Verbs(pub(super) Arc<S3Context>);

macro_rules! verbs {
    (
        present { $($name:ident($input:ident) -> $output:ident = $module:ident;)* }
        absent { $($absent:ident($absent_input:ident) -> $absent_output:ident = $error:path;)* }
    ) => {
        #[async_trait]
        impl S3 for Verbs {
            $(
                async fn $name(&self, req: S3Request<dto::$input>) -> S3Result<S3Response<dto::$output>> {
                    RequestInfo::enter(&req.extensions);
                    $module::$name(&self.0, req).await
                }
            )*
            $(
                async fn $absent(&self, req: S3Request<dto::$absent_input>) -> S3Result<S3Response<dto::$absent_output>> {
                    RequestInfo::enter(&req.extensions);
                    probe::absent(&self.0, &req.input.bucket, $error).await
                }
            )*
        }
    };
}

verbs! {
    present {
        abort_multipart_upload(AbortMultipartUploadInput) -> AbortMultipartUploadOutput = multipart;
        complete_multipart_upload(CompleteMultipartUploadInput) -> CompleteMultipartUploadOutput = complete;
        copy_object(CopyObjectInput) -> CopyObjectOutput = copy;
        create_bucket(CreateBucketInput) -> CreateBucketOutput = bucket;
        create_multipart_upload(CreateMultipartUploadInput) -> CreateMultipartUploadOutput = multipart;
        delete_bucket(DeleteBucketInput) -> DeleteBucketOutput = bucket;
        delete_object(DeleteObjectInput) -> DeleteObjectOutput = delete;
        delete_objects(DeleteObjectsInput) -> DeleteObjectsOutput = delete;
        get_bucket_acl(GetBucketAclInput) -> GetBucketAclOutput = probe;
        get_bucket_location(GetBucketLocationInput) -> GetBucketLocationOutput = bucket;
        get_bucket_versioning(GetBucketVersioningInput) -> GetBucketVersioningOutput = probe;
        get_object(GetObjectInput) -> GetObjectOutput = get;
        get_object_acl(GetObjectAclInput) -> GetObjectAclOutput = probe;
        get_object_attributes(GetObjectAttributesInput) -> GetObjectAttributesOutput = get;
        get_object_tagging(GetObjectTaggingInput) -> GetObjectTaggingOutput = get;
        head_bucket(HeadBucketInput) -> HeadBucketOutput = bucket;
        head_object(HeadObjectInput) -> HeadObjectOutput = get;
        list_buckets(ListBucketsInput) -> ListBucketsOutput = bucket;
        list_multipart_uploads(ListMultipartUploadsInput) -> ListMultipartUploadsOutput = multipart;
        list_objects(ListObjectsInput) -> ListObjectsOutput = list;
        list_objects_v2(ListObjectsV2Input) -> ListObjectsV2Output = list;
        list_parts(ListPartsInput) -> ListPartsOutput = multipart;
        put_bucket_acl(PutBucketAclInput) -> PutBucketAclOutput = probe;
        put_object(PutObjectInput) -> PutObjectOutput = put;
        put_object_acl(PutObjectAclInput) -> PutObjectAclOutput = probe;
        upload_part(UploadPartInput) -> UploadPartOutput = multipart;
        upload_part_copy(UploadPartCopyInput) -> UploadPartCopyOutput = multipart;
    }
    absent {
        get_bucket_cors(GetBucketCorsInput) -> GetBucketCorsOutput = probe::no_cors;
        get_bucket_encryption(GetBucketEncryptionInput) -> GetBucketEncryptionOutput = probe::no_encryption;
        get_bucket_lifecycle_configuration(GetBucketLifecycleConfigurationInput) -> GetBucketLifecycleConfigurationOutput = probe::no_lifecycle;
        get_bucket_policy(GetBucketPolicyInput) -> GetBucketPolicyOutput = probe::no_policy;
        get_bucket_tagging(GetBucketTaggingInput) -> GetBucketTaggingOutput = probe::no_tags;
        get_object_lock_configuration(GetObjectLockConfigurationInput) -> GetObjectLockConfigurationOutput = probe::no_lock;
    }
}
