//! Replies to commands.

use crate::record::{BucketRecord, LeaseRecord, VersionSeq};
use granary_placement::id::Epoch;
use serde::{Deserialize, Serialize};

/// What a command came to. Refusals are replies, not errors: they are part of the replicated history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// Stored.
    Put {
        /// Version given.
        version: VersionSeq,
        /// ETag stored.
        etag: String,
    },
    /// Deleted, or nothing was there.
    Deleted {
        /// A version or object was removed, or a marker added.
        existed: bool,
        /// The delete marker's version, when one was added.
        marker: Option<VersionSeq>,
    },
    /// The bucket as it is now.
    Bucket(BucketRecord),
    /// FenceBucket: is the bucket empty in this shard (no versions, no uploads)? When false the fence was not set.
    Fenced {
        /// Nothing there.
        empty: bool,
    },
    /// A bucket of that name exists.
    BucketExists(BucketRecord),
    /// No such bucket.
    NoSuchBucket,
    /// The bucket is fenced: it is being or was deleted. Look its name up again.
    BucketFenced,
    /// No such object (If-Match on nothing).
    NoSuchKey,
    /// A condition is false.
    PreconditionFailed,
    /// No such upload.
    NoSuchUpload,
    /// A part named at Complete is not there or has another ETag.
    InvalidPart {
        /// Its number.
        number: u16,
    },
    /// Another map was installed first.
    EpochConflict {
        /// The epoch in force.
        current: Epoch,
    },
    /// The command does not belong to this shard, or is malformed.
    Refused(String),
    /// The attempt to delete a bucket is over: a later one has begun, or this one was ended. Nothing was done.
    StaleAttempt {
        /// The highest attempt known here.
        current: u64,
    },
    /// The lease as it is now: taken, renewed or released. Without its progress, as in LeaseHeld.
    Lease(LeaseRecord),
    /// The lease is not the caller's, or is not what the caller saw; this is what it is.
    LeaseHeld(LeaseRecord),
    /// There never was a lease of that task.
    NoSuchLease,
    /// Background work under a lease that was taken over. Nothing was done.
    StaleLease {
        /// The highest epoch of that task known here.
        current: u64,
    },
    /// The cluster settings have this epoch now.
    Settings {
        /// One more than before, or the same when the setting had that value.
        epoch: u64,
    },
    /// The bucket has a later rule. Nothing was written: look the bucket up again and decide by that.
    StaleRule {
        /// Epoch of the rule here.
        current: u64,
    },
    /// The shard has not heard of the bucket's rule yet. Nothing was written: send SetBucketRule, then the write again
    /// under another request id.
    RuleBehind {
        /// Epoch of the rule here.
        known: u64,
    },
    /// The command is too old by the shard's clock, or from too far ahead of it. Nothing was done.
    Expired {
        /// How long ago it was made, in milliseconds; negative: from ahead.
        age_ms: i64,
    },
    /// The payload was placed by too old a cluster map. Nothing was written: hold it against one of this epoch or a
    /// later one, and send the write again under another request id.
    StaleMap {
        /// The oldest map that the shard accepts.
        oldest: Epoch,
    },
}

impl Reply {
    /// Was the command done? Anything else is a refusal of some kind: nothing was changed by this attempt, which says
    /// nothing of earlier ones.
    pub fn is_success(&self) -> bool {
        match self {
            Reply::Done
            | Reply::Put { .. }
            | Reply::Deleted { .. }
            | Reply::Bucket(_)
            | Reply::Fenced { .. }
            | Reply::Lease(_)
            | Reply::Settings { .. } => true,
            Reply::BucketExists(_)
            | Reply::NoSuchBucket
            | Reply::BucketFenced
            | Reply::NoSuchKey
            | Reply::PreconditionFailed
            | Reply::NoSuchUpload
            | Reply::InvalidPart { .. }
            | Reply::EpochConflict { .. }
            | Reply::Refused(_)
            | Reply::StaleAttempt { .. }
            | Reply::LeaseHeld(_)
            | Reply::NoSuchLease
            | Reply::StaleLease { .. }
            | Reply::StaleRule { .. }
            | Reply::RuleBehind { .. }
            | Reply::StaleMap { .. }
            | Reply::Expired { .. } => false,
        }
    }
}
