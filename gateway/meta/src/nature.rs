//! What a command is, apart from what it does: one row each.

use crate::record::{ExtentRef, ObjectData};
use crate::{ChunkRef, Command};
use granary_placement::id::Epoch;
use granary_placement::lease::LeaseStamp;

/// Which shards take a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakenBy {
    /// The root shard only.
    Root,
    /// All but the root shard.
    Objects,
    /// Any.
    Any,
}

/// A payload on disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload<'a> {
    /// Its extents; none of a payload that lies in the record.
    pub extents: &'a [ExtentRef],
    /// Which of their chunks are missing.
    pub missing: &'a [ChunkRef],
    /// Epoch of the cluster map that they were placed by.
    pub placed_by: Epoch,
}

/// What a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nature<'a> {
    /// Which shards take it.
    pub taken_by: TakenBy,
    /// It makes the metadata grow, by the wish of a client: a shard on a full disk refuses it. Deletes, repairs and
    /// what the cluster does for itself are taken, though some of them add a record as well.
    pub grows: bool,
    /// It may be applied twice in a row, or late, without harm, as most of background work may. Its reply is not kept,
    /// so that it pushes no client's out of the window.
    pub repeatable: bool,
    /// The stamp of the lease under which it is sent: background work.
    pub lease: Option<&'a LeaseStamp>,
    /// The payload that it brings.
    pub payload: Option<Payload<'a>>,
}

impl Command {
    /// What it is.
    pub fn nature(&self) -> Nature<'_> {
        use TakenBy::{Any, Objects, Root};
        let plain = |taken_by| Nature { taken_by, grows: false, repeatable: false, lease: None, payload: None };
        let grows = |taken_by| Nature { grows: true, ..plain(taken_by) };
        let repeatable = |taken_by| Nature { repeatable: true, ..plain(taken_by) };
        let under = |lease| Nature { repeatable: true, lease: Some(lease), ..plain(Objects) };
        match self {
            Command::PutObject { record, missing, map_epoch, .. } => stores(&record.data, missing, *map_epoch),
            Command::DeleteObject { .. } => plain(Objects),
            Command::CreateUpload { .. } => grows(Objects),
            Command::PutPart { part, missing, map_epoch, .. } => stores(&part.data, missing, *map_epoch),
            Command::CompleteUpload { .. } => grows(Objects),
            Command::AbortUpload { .. } => plain(Objects),
            Command::FenceBucket { .. } => plain(Objects),
            Command::UnfenceBucket { .. } => plain(Objects),
            Command::ReportMissing { .. } => repeatable(Objects),
            Command::RepairDone { lease, .. } => under(lease),
            Command::GarbageDone { lease, .. } => under(lease),
            Command::CreateBucket { .. } => grows(Root),
            Command::BeginDeleteBucket { .. } => plain(Root),
            Command::EndDeleteBucket { .. } => plain(Root),
            Command::SetMap { .. } => plain(Root),
            Command::Noop => repeatable(Any),
            Command::TakeLease { .. } => plain(Root),
            Command::RenewLease { .. } => repeatable(Root),
            Command::ReleaseLease { .. } => repeatable(Root),
            Command::SetSetting { .. } => plain(Root),
            Command::BeginBucketRule { .. } => plain(Root),
            Command::EndBucketRule { .. } => plain(Root),
            Command::SetBucketRule { .. } => plain(Objects),
            Command::QueueRepair { lease, .. } => under(lease),
            Command::AdvanceRepair { lease, .. } => under(lease),
            Command::RepairSlotDone { lease, .. } => under(lease),
            Command::SetFeatureLevel { .. } => plain(Any),
            Command::RequireMap { lease, .. } => under(lease),
        }
    }
}

fn stores<'a>(data: &'a ObjectData, missing: &'a [ChunkRef], placed_by: Epoch) -> Nature<'a> {
    let payload = Some(Payload { extents: data.extents(), missing, placed_by });
    Nature { taken_by: TakenBy::Objects, grows: true, repeatable: false, lease: None, payload }
}
