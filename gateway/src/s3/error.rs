//! The one place where anything becomes an S3 error code.

use crate::object::{ReadError, StageError};
use crate::shards::ShardError;
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

/// A bucket that the caller may not use.
pub(super) fn other_owner() -> S3Error {
    s3_error!(AccessDenied, "The bucket belongs to another account.")
}

/// An upload id that is not, or not any more.
pub(super) fn no_such_upload() -> S3Error {
    s3_error!(NoSuchUpload)
}

/// A command got no reply.
pub(super) fn command(error: ShardError) -> S3Error {
    if error.outcome_unknown() {
        tracing::warn!(cause = %error, "the outcome of a command is not known");
        return unavailable("It is not known whether the request took effect.");
    }
    if let ShardError::NoRoom { .. } = error {
        tracing::error!(cause = %error, "no space left");
        return no_space();
    }
    query(error)
}

fn no_space() -> S3Error {
    custom("InsufficientStorage", StatusCode::INSUFFICIENT_STORAGE, "There is no space left for this object.")
}

/// A query got no answer.
pub(super) fn query(error: ShardError) -> S3Error {
    if matches!(error, ShardError::Refused { .. } | ShardError::Garbled { .. }) {
        return internal(error);
    }
    tracing::warn!(cause = %error, "a shard is not available");
    unavailable("The metadata of this object is not available at the moment.")
}

/// A payload was not staged. `disks_are_full`: see [`super::context::S3Context::disks_are_full`].
pub(super) fn stage(error: StageError, disks_are_full: bool) -> S3Error {
    match error {
        StageError::Body(cause) => match cause.downcast::<S3Error>() {
            Ok(error) => *error,
            Err(cause) => internal(cause),
        },
        StageError::TooShort { .. } | StageError::TooLong { .. } => s3_error!(IncompleteBody),
        StageError::Stalled => s3_error!(SlowDown, "Memory is short, and nothing of the body came for a while."),
        StageError::Unavailable(cause) if disks_are_full => {
            tracing::error!(%cause, "no space left");
            no_space()
        }
        StageError::Unavailable(cause) => {
            tracing::warn!(%cause, "a payload cannot be stored now");
            unavailable("Too few disks take writes at the moment.")
        }
        other => internal(other),
    }
}

/// A payload cannot be read, and no byte has left yet.
pub(super) fn read(error: ReadError) -> S3Error {
    match error {
        ReadError::Lost { .. } | ReadError::Unreachable { .. } => {
            tracing::error!(cause = %error, "a payload cannot be read now");
            unavailable("Too few disks that hold this object answer at the moment.")
        }
        other => internal(other),
    }
}

/// Whether a reply means for certain that a write was not applied.
pub(super) fn is_refusal(reply: &Reply) -> bool {
    matches!(
        reply,
        Reply::NoSuchBucket
            | Reply::NoSuchKey
            | Reply::PreconditionFailed
            | Reply::NoSuchUpload
            | Reply::InvalidPart { .. }
            | Reply::BucketFenced
            | Reply::StaleRule { .. }
            | Reply::RuleBehind { .. }
            | Reply::StaleMap { .. }
            | Reply::Expired { .. }
            | Reply::Refused(_)
    )
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
        Reply::StaleMap { .. } => unavailable("The cluster is being changed."),
        Reply::Expired { age_ms } => {
            tracing::warn!(age_ms, "a command came too long after it was made");
            unavailable("The request took too long.")
        }
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
