//! The table of verbs: which function answers which S3 operation. What is not here answers 501 NotImplemented.

use super::call::Call;
use super::context::S3Context;
use super::{bucket, complete, copy, delete, get, list, multipart, put, subresources};
use async_trait::async_trait;
use s3s::dto;
use s3s::{S3Request, S3Response, S3Result, S3};
use std::sync::Arc;

/// The S3 service over a context.
pub(super) struct Verbs(pub(super) Arc<S3Context>);

/// What the body of a verb's request is. It decides who verifies the checksums that its headers promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyKind {
    /// XML, or nothing: verified as it is read.
    Xml,
    /// XML, while the x-amz-checksum-* headers speak of the object that the verb makes: the verb compares them.
    XmlOfObject,
    /// The bytes of an object or part: the verb verifies them.
    Payload,
}

/// What is known of a verb before it runs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verb {
    /// Name of its input type: the name of the S3 operation, then `Input`.
    input: &'static str,
    pub(super) body: BodyKind,
    /// It does what it says; the others answer that there is nothing, or that it is not implemented.
    #[cfg(test)]
    present: bool,
}

impl Verb {
    /// The S3 operation: `PutObject`. Stands in logs and metrics.
    pub(super) fn name(&self) -> &'static str {
        self.input.strip_suffix("Input").unwrap_or(self.input)
    }
}

/// All operations that are not in the table.
static OTHER: Verb = Verb {
    input: "other",
    body: BodyKind::Xml,
    #[cfg(test)]
    present: false,
};

/// The verb of that S3 operation.
pub(super) fn verb(operation: &str) -> &'static Verb {
    TABLE.iter().find(|verb| verb.name() == operation).unwrap_or(&OTHER)
}

/// The verbs that do something, by name.
#[cfg(test)]
pub(super) fn implemented() -> impl Iterator<Item = &'static str> {
    TABLE.iter().filter(|verb| verb.present).map(Verb::name)
}

macro_rules! body_kind {
    () => {
        BodyKind::Xml
    };
    ($kind:ident) => {
        BodyKind::$kind
    };
}

macro_rules! verbs {
    (
        present { $($name:ident($input:ident $(, $body:ident)?) -> $output:ident = $module:ident;)* }
        absent { $($absent:ident($absent_input:ident) -> $absent_output:ident = $error:path;)* }
        refused { $($refused:ident;)* }
    ) => {
        static TABLE: &[Verb] = &[
            $(Verb {
                input: stringify!($input),
                body: body_kind!($($body)?),
                #[cfg(test)]
                present: true,
            },)*
            $(Verb {
                input: stringify!($absent_input),
                body: BodyKind::Xml,
                #[cfg(test)]
                present: false,
            },)*
            $(Verb {
                input: stringify!($refused),
                body: BodyKind::Xml,
                #[cfg(test)]
                present: false,
            },)*
        ];

        #[async_trait]
        impl S3 for Verbs {
            $(
                async fn $name(&self, req: S3Request<dto::$input>) -> S3Result<S3Response<dto::$output>> {
                    let call = Call::begin(&self.0, &req.extensions)?;
                    $module::$name(&call, req).await
                }
            )*
            $(
                async fn $absent(&self, req: S3Request<dto::$absent_input>) -> S3Result<S3Response<dto::$absent_output>> {
                    let call = Call::begin(&self.0, &req.extensions)?;
                    subresources::absent(&call, &req.input.bucket, $error).await
                }
            )*
        }
    };
}

// A row: the method of s3s's trait, its input (and what its body is, when it is not plain XML), its output, and the
// module with the function of the same name.
verbs! {
    present {
        abort_multipart_upload(AbortMultipartUploadInput) -> AbortMultipartUploadOutput = multipart;
        complete_multipart_upload(CompleteMultipartUploadInput, XmlOfObject) -> CompleteMultipartUploadOutput = complete;
        copy_object(CopyObjectInput) -> CopyObjectOutput = copy;
        create_bucket(CreateBucketInput) -> CreateBucketOutput = bucket;
        create_multipart_upload(CreateMultipartUploadInput) -> CreateMultipartUploadOutput = multipart;
        delete_bucket(DeleteBucketInput) -> DeleteBucketOutput = bucket;
        delete_object(DeleteObjectInput) -> DeleteObjectOutput = delete;
        delete_objects(DeleteObjectsInput) -> DeleteObjectsOutput = delete;
        get_bucket_acl(GetBucketAclInput) -> GetBucketAclOutput = subresources;
        get_bucket_location(GetBucketLocationInput) -> GetBucketLocationOutput = bucket;
        get_bucket_versioning(GetBucketVersioningInput) -> GetBucketVersioningOutput = subresources;
        get_object(GetObjectInput) -> GetObjectOutput = get;
        get_object_acl(GetObjectAclInput) -> GetObjectAclOutput = subresources;
        get_object_attributes(GetObjectAttributesInput) -> GetObjectAttributesOutput = get;
        get_object_tagging(GetObjectTaggingInput) -> GetObjectTaggingOutput = get;
        head_bucket(HeadBucketInput) -> HeadBucketOutput = bucket;
        head_object(HeadObjectInput) -> HeadObjectOutput = get;
        list_buckets(ListBucketsInput) -> ListBucketsOutput = bucket;
        list_multipart_uploads(ListMultipartUploadsInput) -> ListMultipartUploadsOutput = multipart;
        list_objects(ListObjectsInput) -> ListObjectsOutput = list;
        list_objects_v2(ListObjectsV2Input) -> ListObjectsV2Output = list;
        list_parts(ListPartsInput) -> ListPartsOutput = multipart;
        put_bucket_acl(PutBucketAclInput) -> PutBucketAclOutput = subresources;
        put_object(PutObjectInput, Payload) -> PutObjectOutput = put;
        put_object_acl(PutObjectAclInput) -> PutObjectAclOutput = subresources;
        upload_part(UploadPartInput, Payload) -> UploadPartOutput = multipart;
        upload_part_copy(UploadPartCopyInput) -> UploadPartCopyOutput = multipart;
    }
    absent {
        get_bucket_cors(GetBucketCorsInput) -> GetBucketCorsOutput = subresources::no_cors;
        get_bucket_encryption(GetBucketEncryptionInput) -> GetBucketEncryptionOutput = subresources::no_encryption;
        get_bucket_lifecycle_configuration(GetBucketLifecycleConfigurationInput) -> GetBucketLifecycleConfigurationOutput = subresources::no_lifecycle;
        get_bucket_policy(GetBucketPolicyInput) -> GetBucketPolicyOutput = subresources::no_policy;
        get_bucket_tagging(GetBucketTaggingInput) -> GetBucketTaggingOutput = subresources::no_tags;
        get_object_lock_configuration(GetObjectLockConfigurationInput) -> GetObjectLockConfigurationOutput = subresources::no_lock;
    }
    // 501 NotImplemented; named here because clients ask for them, so that logs and metrics name them.
    refused {
        DeleteObjectTagging;
        GetBucketLogging;
        ListObjectVersions;
        PutBucketVersioning;
        PutObjectTagging;
    }
}
