//! Every decision of the one writer of a disk: where a record goes, what is synced before what, when space is freed.
//!
//! No threads, no queue and no clock of its own, so that the crash tests can stop it at any call to the device.
//! [`super::writer`] is the thread around it.
//!
//! The order of a group: records are written, each segment written to gets one `fdatasync`, the index gets one batch,
//! puts are answered. When something was deleted, the index is flushed and deletes are answered. Then comes
//! housekeeping: seals, flushes, holes, removal of dead segments.
//!
//! [`space`] gives records their place, [`uploads`] fill it piece by piece, [`groups`] carry requests out, and
//! [`housekeeping`] follows.

mod groups;
mod housekeeping;
mod space;
mod uploads;

pub(super) use housekeeping::seal;

use super::device::SegmentFile;
use super::index::{Batch, DiskInfo, Hole, SegmentInfo, SegmentState};
use super::shared::Shared;
use super::{StoreError, StoreSettings};
use bytes::Bytes;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

/// One request of a group.
#[derive(Debug)]
pub enum Op {
    /// A whole chunk.
    Put {
        /// Which.
        id: ChunkId,
        /// What it is part of.
        spec: ChunkSpec,
        /// For whom.
        whose: Whose,
        /// Its payload, in order.
        payload: Vec<Bytes>,
        /// Checksum of each block.
        crcs: Vec<u32>,
    },
    /// An upload whose pieces are all written.
    Commit {
        /// Which upload.
        ticket: Ticket,
        /// Checksum of each block.
        crcs: Vec<u32>,
    },
    /// Chunks to remove.
    Delete {
        /// Which.
        ids: Vec<ChunkId>,
    },
}

/// For whom a chunk is written, which says how far it may fill the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// A client's: it leaves the reserve.
    Client,
    /// Background work's, such as a repair: it may take a quarter of the reserve, so that chunks that are missing
    /// somewhere can be made again when clients have filled all disks.
    Repair,
}

impl Whose {
    /// Free space that such a chunk leaves, in bytes.
    pub fn leaves_bytes(self, settings: &StoreSettings) -> u64 {
        match self {
            Whose::Client => settings.reserve_bytes,
            Whose::Repair => settings.reserve_bytes - settings.reserve_bytes / 4,
        }
    }
}

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// The chunk is durable.
    Stored,
    /// This many of them were there; their removal is durable.
    Deleted(u32),
}

/// An upload in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Space of one record in a segment.
#[derive(Debug, Clone, Copy)]
struct Allocation {
    segment: u32,
    offset: u64,
}

struct Reservation {
    id: ChunkId,
    spec: ChunkSpec,
    space: Allocation,
    /// A piece found no room; the upload cannot be committed.
    full: bool,
}

/// A segment as the writer knows it.
pub(super) struct Segment {
    pub(super) info: SegmentInfo,
    /// Open while the segment takes records or waits for uploads.
    file: Option<Arc<dyn SegmentFile>>,
    /// Where the next record goes.
    tail: u64,
    /// Offsets of records that are being written.
    in_flight: BTreeSet<u64>,
}

impl Segment {
    /// One of an earlier process, which nothing is appended to. It is still open where recovery could not read all of
    /// it: then its watermark stays, so that the next recovery reads it again.
    pub(super) fn of_before(info: SegmentInfo) -> Segment {
        let tail = if info.state == SegmentState::Open { info.watermark } else { info.length_bytes };
        Segment { info, file: None, tail, in_flight: BTreeSet::new() }
    }
}

/// The writer's state.
pub struct Core {
    shared: Arc<Shared>,
    segments: BTreeMap<u32, Segment>,
    active: Option<u32>,
    /// For whom `active` was made: clients get no room in one that repairs made of the reserve.
    active_for: Whose,
    // Sets of segment numbers, so that a group never walks over all segments of a large disk.
    /// Segments that take no new records and are sealed when their last upload ends.
    closing: BTreeSet<u32>,
    /// Segments with a record that was finished since their last sync.
    unsynced: BTreeSet<u32>,
    /// Segments whose `info` changed since the last batch.
    dirty: BTreeSet<u32>,
    /// Sealed segments without a live record.
    dead: BTreeSet<u32>,
    uploads: HashMap<Ticket, Reservation>,
    next_ticket: u64,
    disk: DiskInfo,
    /// Changes that are written with the next batch.
    next_batch: Batch,
    /// Dead pieces whose index entry is not flushed yet: a crash may bring back a chunk that lies there.
    unflushed_holes: Vec<Hole>,
    /// Dead pieces whose index entry is flushed: they may be punched.
    flushed_holes: Vec<Hole>,
    unflushed: bool,
    appended_bytes: u64,
    last_flush: Instant,
}

impl Core {
    pub(super) fn new(shared: Arc<Shared>, disk: DiskInfo, segments: BTreeMap<u32, Segment>) -> Core {
        let is_dead = |segment: &Segment| segment.info.state == SegmentState::Sealed && segment.info.live_records == 0;
        let dead = segments.iter().filter(|(_, segment)| is_dead(segment)).map(|(number, _)| *number).collect();
        let core = Core {
            shared,
            segments,
            active: None,
            active_for: Whose::Client,
            closing: BTreeSet::new(),
            unsynced: BTreeSet::new(),
            dirty: BTreeSet::new(),
            dead,
            uploads: HashMap::new(),
            next_ticket: 0,
            disk,
            next_batch: Batch::default(),
            unflushed_holes: Vec::new(),
            flushed_holes: Vec::new(),
            unflushed: false,
            appended_bytes: 0,
            last_flush: Instant::now(),
        };
        core.publish();
        core
    }

    /// Shows totals and room to readers and the status.
    fn publish(&self) {
        self.shared.chunks.store(self.disk.chunks, Ordering::Relaxed);
        self.shared.chunk_bytes.store(self.disk.chunk_bytes, Ordering::Relaxed);
        let open = self.active.and_then(|number| self.segments.get(&number));
        let open = open.map_or(0, |segment| segment.info.length_bytes.saturating_sub(segment.tail));
        self.shared.open_repair_bytes.store(open, Ordering::Relaxed);
        let for_clients = if self.active_for == Whose::Client { open } else { 0 };
        self.shared.open_bytes.store(for_clients, Ordering::Relaxed);
    }

    fn fail(&self, what: &str, why: impl Display) -> StoreError {
        self.shared.fail(format!("{what}: {why}"))
    }
}
