//! Every decision of the one writer of a disk: where a record goes, what is synced before what, when space is freed.
//!
//! No threads, no queue and no clock of its own, so that the crash tests can stop it at any call to the device.
//! [`super::writer`] is the thread around it.
//!
//! The order of a group: records are written, each segment written to gets one `fdatasync`, the index gets one batch,
//! puts are answered. When something was deleted, the index is flushed and deletes are answered. Then comes
//! housekeeping: seals, flushes, holes, removal of dead segments.

use super::device::{is_full, SegmentFile};
use super::format::{
    header_region_bytes, page_up, record_bytes, RecordHeader, Seal, SegmentHeader, SegmentUuid, PAGE_BYTES, RECORDS_AT,
    SEAL_AT,
};
use super::index::{Batch, DiskInfo, Hole, Location, SegmentInfo, SegmentState};
use super::shared::Shared;
use super::{StoreError, StoreSettings};
use bytes::Bytes;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::io;
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

/// Holes punched in one round of housekeeping; writes wait while they are.
const HOLES_PER_ROUND: usize = 256;

/// A new segment takes at most one part in this many of the free space, so that the first one does not fill a small
/// disk.
const SEGMENT_SHARE: u64 = 8;

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

/// A record that was written, or a deletion, before the group's sync.
enum Step {
    Stored { id: ChunkId, at: Location },
    Delete { ids: Vec<ChunkId> },
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

    // --- Space -----------------------------------------------------------------------------------------------------

    /// Reserves space for a record, in a new segment when the present one has no room.
    fn allocate(&mut self, len_bytes: u64, whose: Whose) -> Result<Allocation, StoreError> {
        let need = record_bytes(len_bytes);
        let fits = |segment: &Segment| segment.tail + need <= segment.info.length_bytes;
        let number = match self.active {
            Some(number)
                if (whose == Whose::Repair || self.active_for == Whose::Client)
                    && self.segments.get(&number).is_some_and(fits) =>
            {
                number
            }
            before => {
                let number = match self.create_segment(need, whose) {
                    Err(StoreError::DiskFull)
                        if !(self.unflushed_holes.is_empty() && self.flushed_holes.is_empty()) =>
                    {
                        self.flush()?;
                        self.punch(usize::MAX)?;
                        self.create_segment(need, whose)?
                    }
                    other => other?,
                };
                // Not before: when there is no room for a new segment, shorter records may still fit into the old one.
                self.closing.extend(before);
                self.active = Some(number);
                self.active_for = whose;
                number
            }
        };
        let shared = self.shared.clone();
        let segment =
            self.segments.get_mut(&number).ok_or_else(|| shared.fail(format!("segment {number} vanished")))?;
        let offset = segment.tail;
        segment.tail += need;
        segment.in_flight.insert(offset);
        Ok(Allocation { segment: number, offset })
    }

    /// Creates a segment that holds a record of `need` bytes, and syncs its header and name before any record is
    /// written to it.
    fn create_segment(&mut self, need: u64, whose: Whose) -> Result<u32, StoreError> {
        let settings = self.shared.settings;
        let device = self.shared.device.clone();
        let space = device.space().map_err(|error| self.fail("free space", error))?;
        let least = (RECORDS_AT + need).max(settings.min_segment_bytes.min(settings.segment_bytes));
        let available = space.free_bytes.saturating_sub(whose.leaves_bytes(&settings));
        if available < least {
            return Err(StoreError::DiskFull);
        }
        let wanted = settings.segment_bytes.min(available / SEGMENT_SHARE).max(least);
        let length_bytes = (wanted / PAGE_BYTES * PAGE_BYTES).max(page_up(least));
        let number = self.disk.next_segment;
        self.disk.next_segment += 1;
        let mut uuid = SegmentUuid::default();
        getrandom::fill(&mut uuid.0).map_err(|error| self.fail("random numbers", error))?;
        let header = SegmentHeader { number, uuid, disk: self.shared.disk, length_bytes };
        let made = device.create(number, length_bytes).and_then(|file| {
            file.pwrite(0, &header.encode())?;
            Ok(file)
        });
        let file = match made {
            Ok(file) => file,
            Err(error) if is_full(&error) => {
                return match device.unlink(number) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.fail("remove segment", error)),
                    _ => Err(StoreError::DiskFull),
                };
            }
            Err(error) => return Err(self.fail("create segment", error)),
        };
        file.fdatasync().map_err(|error| self.fail("sync of a new segment", error))?;
        device.sync_dir().map_err(|error| self.fail("sync of the segment folder", error))?;
        self.shared.files.insert(number, file.clone());
        let info = SegmentInfo {
            uuid,
            length_bytes,
            watermark: RECORDS_AT,
            state: SegmentState::Open,
            live_records: 0,
            live_bytes: 0,
        };
        self.segments.insert(number, Segment { info, file: Some(file), tail: RECORDS_AT, in_flight: BTreeSet::new() });
        self.dirty.insert(number);
        Ok(number)
    }

    fn file(&self, number: u32) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let file = self.segments.get(&number).and_then(|segment| segment.file.clone());
        file.ok_or_else(|| self.fail("writer", format!("segment {number} is not open")))
    }

    /// Gives a dead piece of a segment back: recorded as a hole in the batch, punched once that batch is flushed.
    fn free_piece(&mut self, batch: &mut Batch, hole: Hole) {
        if self.segments.contains_key(&hole.segment) {
            batch.put_hole(&hole);
            self.unflushed_holes.push(hole);
        }
    }

    // --- Uploads ---------------------------------------------------------------------------------------------------

    /// Reserves space for a chunk that arrives in pieces.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`]; [`StoreError::Failed`].
    pub fn reserve(&mut self, id: ChunkId, spec: ChunkSpec, whose: Whose) -> Result<Ticket, StoreError> {
        self.shared.check_running()?;
        let space = self.allocate(spec.len_bytes, whose)?;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.uploads.insert(ticket, Reservation { id, spec, space, full: false });
        self.publish();
        Ok(ticket)
    }

    /// Writes a piece of an upload's payload. An upload whose piece found no room says so when it is committed.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn write_piece(&mut self, ticket: Ticket, at: u64, pieces: &[Bytes]) -> Result<(), StoreError> {
        self.shared.check_running()?;
        let Some(upload) = self.uploads.get(&ticket) else { return Ok(()) };
        let (space, len_bytes) = (upload.space, upload.spec.len_bytes);
        let file = self.file(space.segment)?;
        let mut offset = space.offset + header_region_bytes(len_bytes) + at;
        let end = space.offset + header_region_bytes(len_bytes) + len_bytes;
        for piece in pieces {
            if offset + piece.len() as u64 > end {
                return Err(self.fail("writer", "a piece reaches beyond its chunk"));
            }
            match file.pwrite(offset, piece) {
                Ok(()) => offset += piece.len() as u64,
                Err(error) if is_full(&error) => {
                    if let Some(upload) = self.uploads.get_mut(&ticket) {
                        upload.full = true;
                    }
                    return Ok(());
                }
                Err(error) => return Err(self.fail("write", error)),
            }
        }
        Ok(())
    }

    /// Payload of an upload, in bytes; zero for one that is not there.
    pub fn upload_bytes(&self, ticket: Ticket) -> u64 {
        self.uploads.get(&ticket).map_or(0, |upload| upload.spec.len_bytes)
    }

    /// Ends an upload without a chunk and frees its space.
    pub fn abort(&mut self, ticket: Ticket) {
        if let Some(upload) = self.uploads.remove(&ticket) {
            self.release(upload.space, upload.spec.len_bytes);
        }
    }

    fn release(&mut self, space: Allocation, len_bytes: u64) {
        if let Some(segment) = self.segments.get_mut(&space.segment) {
            segment.in_flight.remove(&space.offset);
            self.dirty.insert(space.segment);
        }
        let mut next_batch = std::mem::take(&mut self.next_batch);
        self.free_piece(
            &mut next_batch,
            Hole { segment: space.segment, offset: space.offset, len_bytes: record_bytes(len_bytes) },
        );
        self.next_batch = next_batch;
    }

    // --- Groups ----------------------------------------------------------------------------------------------------

    /// Carries out a group of requests. `answer` is called once for each, with its position in the group, as soon as
    /// what it says is durable.
    pub fn commit(&mut self, group: Vec<Op>, answer: &mut dyn FnMut(usize, Result<Done, StoreError>)) {
        let mut open: BTreeSet<usize> = (0..group.len()).collect();
        let mut close = |position: usize, outcome: Result<Done, StoreError>| {
            open.remove(&position);
            answer(position, outcome);
        };
        if let Err(error) = self.commit_inner(group, &mut close) {
            for position in open {
                answer(position, Err(error.clone()));
            }
        }
        self.publish();
    }

    fn commit_inner(
        &mut self,
        group: Vec<Op>,
        answer: &mut dyn FnMut(usize, Result<Done, StoreError>),
    ) -> Result<(), StoreError> {
        self.shared.check_running()?;
        let mut steps = Vec::with_capacity(group.len());
        for (number, op) in group.into_iter().enumerate() {
            match self.write_op(op) {
                Ok(step) => steps.push((number, step)),
                Err(error @ StoreError::Failed(_)) => return Err(error),
                Err(error) => answer(number, Err(error)),
            }
        }
        self.sync_records()?;
        let deleted = self.index_steps(&steps)?;
        for (number, step) in &steps {
            if matches!(step, Step::Stored { .. }) {
                answer(*number, Ok(Done::Stored));
            }
        }
        if deleted.values().any(|count| *count > 0) {
            self.flush()?;
        }
        for (number, count) in deleted {
            answer(number, Ok(Done::Deleted(count)));
        }
        Ok(())
    }

    fn write_op(&mut self, op: Op) -> Result<Step, StoreError> {
        match op {
            Op::Delete { ids } => Ok(Step::Delete { ids }),
            Op::Put { id, spec, whose, payload, crcs } => {
                let space = self.allocate(spec.len_bytes, whose)?;
                let file = self.file(space.segment)?;
                let mut offset = space.offset + header_region_bytes(spec.len_bytes);
                for piece in &payload {
                    if let Err(error) = file.pwrite(offset, piece) {
                        return Err(self.write_failed(space, spec.len_bytes, &error));
                    }
                    offset += piece.len() as u64;
                }
                self.finish_record(id, spec, space, crcs)
            }
            Op::Commit { ticket, crcs } => {
                let upload =
                    self.uploads.remove(&ticket).ok_or_else(|| StoreError::Rejected("no such upload".to_owned()))?;
                if upload.full {
                    self.release(upload.space, upload.spec.len_bytes);
                    return Err(StoreError::DiskFull);
                }
                self.finish_record(upload.id, upload.spec, upload.space, crcs)
            }
        }
    }

    fn write_failed(&mut self, space: Allocation, len_bytes: u64, error: &io::Error) -> StoreError {
        if is_full(error) {
            self.release(space, len_bytes);
            return StoreError::DiskFull;
        }
        self.fail("write", error)
    }

    /// Writes the header of a record whose payload is written.
    fn finish_record(
        &mut self,
        id: ChunkId,
        spec: ChunkSpec,
        space: Allocation,
        crcs: Vec<u32>,
    ) -> Result<Step, StoreError> {
        let file = self.file(space.segment)?;
        let uuid = self.segments.get(&space.segment).map(|segment| segment.info.uuid).unwrap_or_default();
        let sequence = self.disk.next_sequence;
        self.disk.next_sequence += 1;
        let header = RecordHeader { segment: uuid, offset: space.offset, sequence, id, spec, crcs };
        if let Err(error) = file.pwrite(space.offset, &header.encode()) {
            return Err(self.write_failed(space, spec.len_bytes, &error));
        }
        // It stays in flight until the batch that indexes it: a flush in between (to make room for another record of
        // the group) must not move the watermark past it.
        self.unsynced.insert(space.segment);
        self.appended_bytes += record_bytes(spec.len_bytes);
        Ok(Step::Stored { id, at: Location { segment: space.segment, offset: space.offset, sequence, spec } })
    }

    fn sync_records(&mut self) -> Result<(), StoreError> {
        for number in std::mem::take(&mut self.unsynced) {
            let file = self.file(number)?;
            let begun = Instant::now();
            file.fdatasync().map_err(|error| self.fail("sync", error))?;
            self.shared.metrics.sync_seconds.observe(begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// One batch for the whole group. Returns, for each deletion, how many chunks were there.
    fn index_steps(&mut self, steps: &[(usize, Step)]) -> Result<BTreeMap<usize, u32>, StoreError> {
        let mut batch = Batch::default();
        // What earlier steps of this group did to a chunk: the index does not show it yet.
        let mut group: HashMap<ChunkId, Option<Location>> = HashMap::new();
        let mut deleted = BTreeMap::new();
        for (number, step) in steps {
            match step {
                Step::Stored { id, at } => {
                    let before = self.lookup(&group, id)?;
                    self.free_record(&mut batch, before);
                    if let Some(segment) = self.segments.get_mut(&at.segment) {
                        segment.in_flight.remove(&at.offset);
                    }
                    batch.put_chunk(id, at);
                    self.add_to_totals(at, 1);
                    group.insert(*id, Some(*at));
                }
                Step::Delete { ids } => {
                    let mut count = 0;
                    for id in ids {
                        let before = self.lookup(&group, id)?;
                        if before.is_some() {
                            count += 1;
                            self.free_record(&mut batch, before);
                            batch.remove_chunk(id);
                            group.insert(*id, None);
                        }
                    }
                    deleted.insert(*number, count);
                }
            }
        }
        if !group.is_empty() {
            self.write_index(batch)?;
        }
        Ok(deleted)
    }

    fn lookup(&self, group: &HashMap<ChunkId, Option<Location>>, id: &ChunkId) -> Result<Option<Location>, StoreError> {
        match group.get(id) {
            Some(known) => Ok(*known),
            None => self.shared.index.chunk(id).map_err(|error| self.shared.fail_index(&error)),
        }
    }

    fn free_record(&mut self, batch: &mut Batch, before: Option<Location>) {
        if let Some(at) = before {
            self.add_to_totals(&at, -1);
            self.free_piece(batch, Hole { segment: at.segment, offset: at.offset, len_bytes: at.record_bytes() });
        }
    }

    /// Adds a record to the totals of disk and segment (`records` 1) or subtracts it (-1).
    fn add_to_totals(&mut self, at: &Location, records: i64) {
        let step = |value: &mut u64, by: u64| *value = if records > 0 { *value + by } else { value.saturating_sub(by) };
        step(&mut self.disk.chunks, 1);
        step(&mut self.disk.chunk_bytes, at.spec.len_bytes);
        if let Some(segment) = self.segments.get_mut(&at.segment) {
            step(&mut segment.info.live_records, 1);
            step(&mut segment.info.live_bytes, at.record_bytes());
            if segment.info.state == SegmentState::Sealed && segment.info.live_records == 0 {
                self.dead.insert(at.segment);
            }
            self.dirty.insert(at.segment);
        }
    }

    /// Writes a batch, together with the changes that waited for one, and the watermarks, counts and totals that
    /// follow.
    fn write_index(&mut self, batch: Batch) -> Result<(), StoreError> {
        let mut all = std::mem::take(&mut self.next_batch);
        all.changes.extend(batch.changes);
        for number in std::mem::take(&mut self.dirty) {
            let Some(segment) = self.segments.get_mut(&number) else { continue };
            if segment.info.state == SegmentState::Open {
                segment.info.watermark = segment.in_flight.first().copied().unwrap_or(segment.tail);
            }
            all.put_segment(number, &segment.info);
        }
        all.put_disk(&self.disk);
        self.unflushed = true;
        self.shared.index.write(all).map_err(|error| self.shared.fail_index(&error))
    }

    // --- Housekeeping ----------------------------------------------------------------------------------------------

    /// Makes everything that was written to the index durable.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.shared.check_running()?;
        if !self.next_batch.is_empty() || !self.dirty.is_empty() {
            self.write_index(Batch::default())?;
        }
        if self.unflushed {
            self.shared.index.flush().map_err(|error| self.shared.fail_index(&error))?;
            self.unflushed = false;
        }
        self.appended_bytes = 0;
        self.last_flush = Instant::now();
        self.flushed_holes.append(&mut self.unflushed_holes);
        Ok(())
    }

    /// Seals what is to be sealed, flushes what is due, punches holes, removes dead segments. Called after each group
    /// and from time to time. True when holes are left for the next round.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn housekeep(&mut self, now: Instant) -> Result<bool, StoreError> {
        self.shared.check_running()?;
        let sealed = self.seal_closed()?;
        let settings = self.shared.settings;
        let age = now.saturating_duration_since(self.last_flush);
        let pending = self.unflushed || !self.next_batch.is_empty();
        if sealed
            || self.appended_bytes >= settings.flush_bytes
            || (pending && age >= settings.flush_interval)
            || (!self.unflushed_holes.is_empty() && age >= settings.punch_interval)
        {
            self.flush()?;
        }
        self.remove_dead()?;
        self.punch(HOLES_PER_ROUND)?;
        self.publish();
        Ok(!self.flushed_holes.is_empty())
    }

    /// Seals segments that take no more records. Their records are synced already, so recovery may trust every header
    /// of a sealed segment.
    fn seal_closed(&mut self) -> Result<bool, StoreError> {
        let mut any = false;
        for number in self.closing.clone() {
            let Some(segment) = self.segments.get_mut(&number) else { continue };
            if !segment.in_flight.is_empty() || self.unsynced.contains(&number) {
                continue;
            }
            let Some(file) = segment.file.take() else { continue };
            if let Err(error) =
                seal(&*file, number, &segment.info, segment.tail, &[(segment.tail, segment.info.length_bytes)])
            {
                return Err(self.shared.fail(format!("seal: {error}")));
            }
            segment.info.state = SegmentState::Sealed;
            segment.info.watermark = segment.info.length_bytes;
            if segment.info.live_records == 0 {
                self.dead.insert(number);
            }
            self.closing.remove(&number);
            self.dirty.insert(number);
            any = true;
        }
        Ok(any)
    }

    /// Punches holes that are in the flushed index, syncs them, and only then removes them from the index.
    fn punch(&mut self, at_most: usize) -> Result<(), StoreError> {
        let take = self.flushed_holes.len().min(at_most);
        if take == 0 {
            return Ok(());
        }
        let holes: Vec<Hole> = self.flushed_holes.drain(..take).collect();
        let mut files = BTreeMap::new();
        for hole in &holes {
            if !self.segments.contains_key(&hole.segment) {
                continue;
            }
            let file = match files.entry(hole.segment) {
                Entry::Occupied(open) => open.into_mut(),
                Entry::Vacant(place) => {
                    place.insert(self.shared.files.get(hole.segment).map_err(|error| self.fail("open segment", error))?)
                }
            };
            file.punch(hole.offset, hole.len_bytes).map_err(|error| self.fail("punch", error))?;
        }
        for file in files.values() {
            file.fdatasync().map_err(|error| self.fail("sync of holes", error))?;
        }
        for hole in &holes {
            self.next_batch.remove_hole(hole);
        }
        Ok(())
    }

    /// Removes sealed segments with nothing alive in them: marked dead in the flushed index first, so that a file that
    /// comes back after a crash is not taken for an unknown one and read.
    fn remove_dead(&mut self) -> Result<(), StoreError> {
        let dead = std::mem::take(&mut self.dead);
        if dead.is_empty() {
            return Ok(());
        }
        for number in &dead {
            if let Some(segment) = self.segments.get_mut(number) {
                segment.info.state = SegmentState::Dead;
                self.dirty.insert(*number);
            }
        }
        for holes in [&mut self.unflushed_holes, &mut self.flushed_holes] {
            holes.retain(|hole| {
                let keep = !dead.contains(&hole.segment);
                if !keep {
                    self.next_batch.remove_hole(hole);
                }
                keep
            });
        }
        self.flush()?;
        for number in &dead {
            self.shared.files.unlink(*number).map_err(|error| self.fail("remove segment", error))?;
        }
        self.shared.device.sync_dir().map_err(|error| self.fail("sync of the segment folder", error))?;
        for number in &dead {
            self.segments.remove(number);
            self.next_batch.remove_segment(*number);
        }
        Ok(())
    }
}

/// Frees the unused pieces of a segment, writes its seal and syncs both. Its records are synced before, or by this
/// sync.
pub(super) fn seal(
    file: &dyn SegmentFile,
    number: u32,
    info: &SegmentInfo,
    end: u64,
    unused: &[(u64, u64)],
) -> io::Result<()> {
    for (from, until) in unused {
        if from < until {
            file.punch(*from, until - from)?;
        }
    }
    file.pwrite(SEAL_AT, &Seal { number, uuid: info.uuid, end }.encode())?;
    file.fdatasync()
}
