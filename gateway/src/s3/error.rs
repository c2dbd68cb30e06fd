//! The one edge where anything becomes an S3 error code.

use super::backend::{BackendError, ReadError, StageError};
use granary_meta::{Answer, Reply};
use http::StatusCode;
use s3s::{s3_error, S3Error, S3ErrorCode};

/// An error whose code s3s has no name for, or whose status we know better.
pub(super) fn custom(code: &'static str, status: StatusCode, message: impl Into<String>) -> S3Error {
    let mut error = S3Error::with_message(S3ErrorCode::Custom(code.into()), message.into());
    error.set_status_code(status);
    error
}

/// 501: a header or verb that would change what is stored, and that we do not do, is never ignored.
pub(super) fn not_implemented(what: &str) -> S3Error {
    s3_error!(NotImplemented, "{what} is not implemented by this server")
}

/// 503 that every client retries.
pub(super) fn unavailable(what: &str) -> S3Error {
    s3_error!(ServiceUnavailable, "{what} Please try again.")
}

/// Our own defect: the cause goes to the log, not to the client.
pub(super) fn internal(cause: impl std::fmt::Display) -> S3Error {
    tracing::error!(%cause, "internal error");
    s3_error!(InternalError)
}

/// An upload id that is not, or not any more.
pub(super) fn no_such_upload() -> S3Error {
    s3_error!(NoSuchUpload)
}

/// A shard gave no answer.
pub(super) fn backend(error: BackendError) -> S3Error {
    match error {
        BackendError::Unavailable(cause) => {
            tracing::warn!(%cause, "a shard is not available");
            unavailable("The metadata of this object is not available at the moment.")
        }
        BackendError::OutcomeUnknown(cause) => {
            tracing::warn!(%cause, "the outcome of a command is not known");
            unavailable("It is not known whether the request took effect.")
        }
        BackendError::Refused(cause) => internal(cause),
    }
}

/// A payload was not staged, for another reason than its body (see [`super::intake::BodyFault`] for those).
pub(super) fn stage(error: StageError) -> S3Error {
    match error {
        StageError::Body => s3_error!(IncompleteBody),
        StageError::Unavailable(cause) => {
            tracing::warn!(%cause, "a payload cannot be stored now");
            unavailable("Too few disks take writes at the moment.")
        }
        StageError::Full(cause) => {
            tracing::error!(%cause, "no space left");
            custom("InsufficientStorage", StatusCode::INSUFFICIENT_STORAGE, "There is no space left for this object.")
        }
        StageError::Internal(cause) => internal(cause),
    }
}

/// A payload cannot be read, and no byte has left yet.
pub(super) fn read(error: ReadError) -> S3Error {
    match error {
        ReadError::Unavailable(cause) => {
            tracing::error!(%cause, "a payload cannot be read now");
            unavailable("Too few disks that hold this object answer at the moment.")
        }
        ReadError::Internal(cause) => internal(cause),
    }
}

/// A reply that refuses a write, or one that makes no sense here.
pub(super) fn reply(reply: Reply) -> S3Error {
    match reply {
        Reply::NoSuchBucket => s3_error!(NoSuchBucket),
        Reply::NoSuchKey => s3_error!(NoSuchKey),
        Reply::PreconditionFailed => s3_error!(PreconditionFailed),
        Reply::NoSuchUpload => no_such_upload(),
        Reply::InvalidPart { number } => {
            s3_error!(InvalidPart, "Part {number} could not be found, or its ETag is another one.")
        }
        Reply::BucketFenced => unavailable("The bucket is being deleted."),
        Reply::StaleRule { .. } | Reply::RuleBehind { .. } => unavailable("The bucket is being changed."),
        other => internal(format!("unexpected reply {}", name_of(&other))),
    }
}

/// An answer that refuses a read, or one that makes no sense here.
pub(super) fn answer(answer: Answer) -> S3Error {
    match answer {
        Answer::NoSuchBucket => s3_error!(NoSuchBucket),
        Answer::NoSuchKey => s3_error!(NoSuchKey),
        Answer::NoSuchUpload => no_such_upload(),
        Answer::BucketFenced => unavailable("The bucket is being deleted."),
        Answer::Refused(cause) => internal(cause),
        _ => internal("unexpected answer of a shard"),
    }
}

/// The variant, without what is in it: replies carry users' data.
fn name_of(reply: &Reply) -> String {
    match reply {
        Reply::Refused(cause) => format!("Refused: {cause}"),
        other => format!("{other:?}").split([' ', '(', '{']).next().unwrap_or_default().to_owned(),
    }
}
