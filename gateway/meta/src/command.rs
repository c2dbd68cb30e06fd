//! Commands that change a metadata shard.
//!
//! A shard is a deterministic state machine: time, ids and randomness arrive inside the command. A command that was
//! applied under a request id is not applied again: its first reply is given back.

use crate::record::{
    AccountId, BucketId, BucketRule, ObjectRecord, PartRecord, UploadId, UploadRecord, VersionSeq, Versioning,
};
use bytes::Bytes;
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::ClusterMap;
use serde::{Deserialize, Serialize};

/// A command and what makes it safe to send twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaRequest {
    /// Random, made once per client operation and kept over its retries.
    pub request_id: [u8; 16],
    /// When it was made, by the gateway's clock, Unix milliseconds; the same over all its retries.
    pub now_ms: u64,
    /// On its way, the gateway's clock when it was sent; in the log, the clock of the shard's leader when it was taken.
    /// Unix milliseconds. One without a stamp is a test's own, and never expires.
    pub stamp_ms: Option<u64>,
    /// Who acts. Until there are other accounts it is always the root account.
    pub account: AccountId,
    /// What to do.
    pub command: Command,
}

/// If-Match and If-None-Match of a write.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Conditions {
    /// The current object must have this ETag (without quotes), or just exist when `*`. A missing one is `NoSuchKey`.
    pub if_match: Option<String>,
    /// No current object may exist. (`If-None-Match: *`; other values are refused by the gateway.)
    pub if_none_match_any: bool,
}

/// One chunk of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkRef {
    /// The extent's group.
    pub group: PlacementGroupId,
    /// The extent that it is a chunk of.
    pub extent: ExtentId,
    /// The chunk's index.
    pub index: u8,
}

/// Which version a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VersionPick {
    /// The newest version, which may be a delete marker.
    Current,
    /// The version `null`.
    Null,
    /// That one.
    Seq(VersionSeq),
}

/// A change of a shard.
///
/// Writes into a bucket carry the epoch of the bucket's rule that the gateway went by. The shard decides by the rule it
/// holds itself, and only when the epochs agree: a lower one replies [`crate::Reply::StaleRule`], a higher one
/// [`crate::Reply::RuleBehind`], and nothing is written.
///
/// Payloads on disks carry the epoch of the cluster map that they were held against; one older than the shard was told
/// to require replies [`crate::Reply::StaleMap`], and nothing is written.
///
/// Background work carries the stamp of its lease; one that was taken over replies [`crate::Reply::StaleLease`], and
/// nothing is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Stores an object. Replies [`crate::Reply::Put`].
    PutObject {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// The record; its version is set when applied.
        record: ObjectRecord,
        /// Chunks that are not on their slot's disk by the map of `map_epoch`: enter the repair queue in the same
        /// commit.
        missing: Vec<ChunkRef>,
        /// Epoch of the cluster map that the payload was last held against.
        map_epoch: Epoch,
        /// Conditions, decided when applied.
        conditions: Conditions,
        /// Epoch of the bucket's rule by which the gateway decided.
        rule_epoch: u64,
    },
    /// Deletes an object, a version, or adds a delete marker. Replies [`crate::Reply::Deleted`], also when nothing was
    /// there.
    DeleteObject {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// The newest version, or one by its number.
        version: VersionPick,
        /// Conditions (If-Match only).
        conditions: Conditions,
        /// Epoch of the bucket's rule by which the gateway decided.
        rule_epoch: u64,
    },
    /// Begins a multipart upload. Replies [`crate::Reply::Done`].
    CreateUpload {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// A random id, made by the gateway.
        upload: UploadId,
        /// What it will become.
        record: UploadRecord,
        /// Epoch of the bucket's rule by which the gateway decided.
        rule_epoch: u64,
    },
    /// Stores a part; the last one of a number wins. Replies [`crate::Reply::Done`] or NoSuchUpload.
    PutPart {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// Which upload of the key: the id that began it.
        upload: UploadId,
        /// Its number, size, digest and where its bytes lie.
        part: PartRecord,
        /// Chunks that are not on their slot's disk by the map of `map_epoch`.
        missing: Vec<ChunkRef>,
        /// Epoch of the cluster map that the payload was last held against.
        map_epoch: Epoch,
        /// Epoch of the bucket's rule by which the gateway decided.
        rule_epoch: u64,
    },
    /// Turns parts into an object. The gateway has read the parts and made the record, without data; the shard takes
    /// the data of the parts named, if they are still the ones the gateway saw (same number and ETag), frees the parts
    /// not named, and answers as PutObject does. Repeated after success with the same parts, it gives the same answer
    /// again.
    CompleteUpload {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// Which upload of the key: the id that began it.
        upload: UploadId,
        /// (number, ETag) in ascending order.
        parts: Vec<(u16, String)>,
        /// The record; `data` is ignored.
        record: ObjectRecord,
        /// Conditions, decided when applied.
        conditions: Conditions,
        /// Epoch of the bucket's rule by which the gateway decided.
        rule_epoch: u64,
    },
    /// Gives a multipart upload up. Replies [`crate::Reply::Done`] or NoSuchUpload.
    AbortUpload {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The object's key: 1 to 1,024 bytes of UTF-8.
        key: String,
        /// Which upload of the key: the id that began it.
        upload: UploadId,
    },
    /// Stops all writes to a bucket in this shard, if it is empty here; a fence of an earlier attempt becomes this
    /// attempt's. Replies [`crate::Reply::Fenced`], or StaleAttempt when the shard saw a later attempt, or the end of
    /// this one.
    FenceBucket {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The attempt that BeginDeleteBucket gave.
        attempt: u64,
    },
    /// Takes a fence of this attempt or an earlier one back: the bucket was not empty somewhere else. Fences of these
    /// attempts are refused from then on. Replies [`crate::Reply::Done`], or StaleAttempt when the shard saw a later
    /// attempt.
    UnfenceBucket {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The attempt that BeginDeleteBucket gave.
        attempt: u64,
    },
    /// Queues chunks for repair that a reader found missing or corrupt; one that is queued gets another generation.
    /// Those of extents the shard does not own any more are ignored; so is an index the extent does not have. Replies
    /// [`crate::Reply::Done`].
    ReportMissing {
        /// Chunks of extents of this shard; those of others are passed over.
        chunks: Vec<ChunkRef>,
    },
    /// Takes chunks off the repair queue: they were rebuilt and verified. One that was reported again since the repair
    /// began has another generation and stays. Replies [`crate::Reply::Done`].
    RepairDone {
        /// Chunks, with the generations that were repaired, as listed.
        chunks: Vec<(ChunkRef, u64)>,
        /// The sender's lease.
        lease: LeaseStamp,
    },
    /// Takes extents off the garbage queue: all their chunks are deleted. Replies [`crate::Reply::Done`].
    GarbageDone {
        /// (time queued, extent) as listed.
        extents: Vec<(u64, ExtentId)>,
        /// The sender's lease.
        lease: LeaseStamp,
    },
    /// Root shard: makes a bucket. Replies [`crate::Reply::Bucket`], or BucketExists with the one that is there.
    CreateBucket {
        /// The bucket's name, 3 to 63 bytes by S3's rules.
        name: String,
        /// The account that it will belong to.
        owner: AccountId,
    },
    /// Root shard: marks a bucket as being deleted, and hands out the next attempt (`delete_attempt` of the reply). A
    /// deletion that is under way is taken over: it can neither remove the bucket nor take the mark back any more.
    /// Replies [`crate::Reply::Bucket`] or NoSuchBucket.
    BeginDeleteBucket {
        /// The bucket's name, 3 to 63 bytes by S3's rules.
        name: String,
        /// The bucket the caller means.
        bucket: BucketId,
    },
    /// Root shard: removes a bucket that is marked, and fenced everywhere by this attempt, or takes the mark back.
    /// Replies [`crate::Reply::Done`], NoSuchBucket, or StaleAttempt when another attempt was handed out since.
    EndDeleteBucket {
        /// The bucket's name, 3 to 63 bytes by S3's rules.
        name: String,
        /// The bucket the caller means.
        bucket: BucketId,
        /// The attempt that BeginDeleteBucket gave.
        attempt: u64,
        /// True: remove it. False: it was not empty, take the mark back.
        remove: bool,
    },
    /// Root shard: installs a map whose epoch is one above the present one (any epoch when there is none). Replies
    /// [`crate::Reply::Done`] or EpochConflict.
    SetMap {
        /// The map, valid.
        map: Box<ClusterMap>,
    },
    /// Does nothing; measures a round through the log.
    Noop,
    /// Root shard: takes a task's lease, by compare-and-set: there is none yet and (0, 0) was seen, or the one there
    /// still has the epoch and renewals that were seen. Its epoch rises by one and its renewals begin at 0. Replies
    /// [`crate::Reply::Lease`], LeaseHeld with the one that is there, or NoSuchLease when one was seen and there is
    /// none.
    ///
    /// No clock is asked: a candidate watches (epoch, renewals) by its own monotonic clock, and comes when they stood
    /// still for the time that holders promise to renew in. A holder that renews in between makes the compare fail.
    TakeLease {
        /// Name of the task, 1 to 64 bytes.
        task: String,
        /// Who takes it: random, made once per process.
        holder: [u8; 16],
        /// Where the holder can be reached, for status pages; at most 256 bytes.
        address: String,
        /// How long others wait after the last renewal before they take it over, in milliseconds.
        ttl_ms: u64,
        /// The epoch seen; 0 when there was no lease.
        seen_epoch: u64,
        /// The renewals seen.
        seen_renewals: u64,
    },
    /// Root shard: says that the holder is alive. Replies [`crate::Reply::Lease`] with one renewal more, LeaseHeld when
    /// the lease is another's or was released, or NoSuchLease.
    RenewLease {
        /// Name of the task.
        task: String,
        /// The random name under which it was taken.
        holder: [u8; 16],
        /// The epoch it took.
        epoch: u64,
        /// As in TakeLease, from now on.
        ttl_ms: u64,
        /// What status pages show, made by the holder (JSON); at most 4 KiB.
        progress: Bytes,
    },
    /// Root shard: gives a lease back; its epoch stays. Replies [`crate::Reply::Lease`] without a holder, LeaseHeld or
    /// NoSuchLease.
    ReleaseLease {
        /// Name of the task.
        task: String,
        /// The random name under which it was taken.
        holder: [u8; 16],
        /// The epoch it took.
        epoch: u64,
    },
    /// Root shard: sets a cluster setting. Replies [`crate::Reply::Settings`].
    ///
    /// Only the form of name and value is checked here. The table of settings differs between builds, and what `apply`
    /// does must not: the sender checks against the table, and who reads a setting that it does not know leaves it
    /// alone.
    SetSetting {
        /// Name, 1 to 64 of `a-z 0-9 _ .`.
        name: String,
        /// Value, at most 256 bytes; None: back to the default.
        value: Option<String>,
    },
    /// Root shard: gives a bucket another rule, under the next epoch. Every shard must then hear of it (SetBucketRule)
    /// before EndBucketRule. Replies [`crate::Reply::Bucket`] with the new rule pending, or NoSuchBucket; Refused what
    /// S3 forbids: versioning that was on cannot be off again, and a lock stays, and wants versioning.
    BeginBucketRule {
        /// The bucket's name, 3 to 63 bytes by S3's rules.
        name: String,
        /// The bucket the caller means.
        bucket: BucketId,
        /// Versioning from then on.
        versioning: Versioning,
        /// Are versions locked from then on?
        lock: bool,
        /// Epoch of the bucket's policy.
        policy_epoch: u64,
    },
    /// Root shard: every shard has the rule of that epoch. Replies [`crate::Reply::Done`], NoSuchBucket, or StaleRule
    /// when a later rule was begun.
    EndBucketRule {
        /// The bucket's name, 3 to 63 bytes by S3's rules.
        name: String,
        /// The bucket the caller means.
        bucket: BucketId,
        /// Epoch of the rule.
        epoch: u64,
    },
    /// Gives a shard a bucket's rule. Replies [`crate::Reply::Done`], also when it has it, or StaleRule when it has a
    /// later one.
    SetBucketRule {
        /// The bucket's id, as the root shard gave it when it was created.
        bucket: BucketId,
        /// The rule, as the root shard made it.
        rule: BucketRule,
    },
    /// Queues slots of placement groups for repair: everything this shard owns in the slot is to be looked for on the
    /// slot's disk and rebuilt where it is not. One that is queued begins anew, under another generation, unless it is
    /// to be kept. Replies [`crate::Reply::Done`].
    QueueRepair {
        /// The slots; at most 4,096.
        slots: Vec<(PlacementGroupId, u8)>,
        /// A slot that is queued stays as it is, and goes on where it stopped.
        keep: bool,
        /// The sender's lease.
        lease: LeaseStamp,
    },
    /// Notes how far the repair of a slot came. Nothing happens when the slot is queued under another generation, or
    /// not at all, or when it came further. Replies [`crate::Reply::Done`].
    AdvanceRepair {
        /// The placement group that the slot is of.
        group: PlacementGroupId,
        /// The slot's number within its group, below K+M.
        slot: u8,
        /// The generation that is being repaired.
        generation: u64,
        /// The last extent that is done; extents are taken in order of their ids.
        cursor: ExtentId,
        /// The sender's lease.
        lease: LeaseStamp,
    },
    /// Takes a slot off the queue: everything in it was found or rebuilt. Nothing happens when it is queued under
    /// another generation. Replies [`crate::Reply::Done`].
    RepairSlotDone {
        /// The placement group that the slot is of.
        group: PlacementGroupId,
        /// The slot's number within its group, below K+M.
        slot: u8,
        /// The generation that was repaired.
        generation: u64,
        /// The sender's lease.
        lease: LeaseStamp,
    },
    /// Any shard: lets its commands write what builds of that feature level know. Sent when every replica runs such a
    /// build, for there is no way back. One level at a time. Replies [`crate::Reply::Done`], also when the shard has
    /// that level; Refused otherwise.
    ///
    /// A replica whose build does not know the level stops there; the leader's host refuses the command before it is in
    /// the log ([`check_level`](crate::check::check_level)).
    SetFeatureLevel {
        /// The level after it: one above the present one.
        level: u32,
    },
    /// From now on the shard takes no payload that was placed by a map older than this. Sent before slots that moved
    /// are looked through: what an older map placed is there by then, or never comes. Nothing happens when a later one
    /// is required. Replies [`crate::Reply::Done`].
    RequireMap {
        /// Epoch of the map.
        epoch: Epoch,
        /// The sender's lease.
        lease: LeaseStamp,
    },
}
