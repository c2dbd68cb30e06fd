//! Start-up: from whatever a clean stop or a crash left to a store that may be written to.
//!
//! Segments that were open are read from their watermark on, straight from the disk. A whole record that is newer than
//! what the index has for its chunk is indexed; a torn one is dropped: no put was acknowledged for it. Then the unused
//! space of the segment is freed and it is sealed: no segment is ever appended to by a second process, so a new record
//! never lies over bytes of an earlier process.
//!
//! Every step leaves a state from which recovery can begin again; each record is indexed by one batch, which has the
//! counts too.
//!
//! An index without a disk entry is empty or half rebuilt, and is rebuilt from all segments. Records of sealed segments
//! are trusted by their headers then (a seal is written after all records were synced; reads verify anyway), so a
//! rebuild reads headers and not payloads. What a rebuild cannot know are deletions whose holes were not yet synced:
//! such chunks come back, and the owner shard says that they are garbage.
//!
//! **Invariant:** nothing is removed or punched that could not be read. A page that the disk does not give may hold an
//! acknowledged record; it may give it the next time.

use super::core::{seal, Core, Segment};
use super::device::SegmentFile;
use super::format::{FormatError, RecordHeader, Seal, SegmentHeader, PAGE_BYTES, RECORDS_AT, SEAL_AT};
use super::index::{Batch, DiskInfo, Hole, IndexError, Location, SegmentInfo, SegmentState};
use super::read::{verify_payload, BadPayload};
use super::shared::Shared;
use super::OpenError;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::sync::Arc;

/// What recovery found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovered {
    /// The index was lost and rebuilt from all segments.
    pub rebuilt: bool,
    /// Segments that were read.
    pub segments_scanned: u64,
    /// Records the index did not know.
    pub records_indexed: u64,
    /// Records that were not whole.
    pub records_torn: u64,
    /// Holes that were punched again.
    pub holes_punched: u64,
    /// Segments the index knows and the folder does not have: their chunks are lost on this disk.
    pub segments_missing: u64,
    /// Chunks of missing segments that were taken out of the index.
    pub chunks_forgotten: u64,
    /// Pages that could not be read, or headers of segments that are damaged.
    pub damage: u64,
}

/// Index entries looked at together for those of missing segments.
const FORGET_PAGE: usize = 1000;

/// How much a scan reads at a time, in bytes.
const SCAN_BYTES: u64 = 1024 * 1024;

fn device_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> OpenError {
    let what = what.into();
    move |source| OpenError::Device { what, source }
}

/// What is to become of a record's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Record {
    /// The index points to it.
    Kept,
    /// Nobody needs them: torn, deleted, or of an older version of the chunk.
    Dead,
    /// Not known before the disk gives them.
    Unreadable,
}

struct Recovery {
    shared: Arc<Shared>,
    disk: DiskInfo,
    segments: BTreeMap<u32, SegmentInfo>,
    holes: BTreeSet<Hole>,
    report: Recovered,
}

fn try_recover(shared: Arc<Shared>) -> Result<(Core, Recovered), OpenError> {
    let known = shared.index.disk()?;
    let rebuilt = known.is_none();
    if rebuilt {
        shared.index.clear()?;
    }
    let disk = known.unwrap_or(DiskInfo { disk: shared.disk, ..DiskInfo::default() });
    if disk.disk != shared.disk {
        return Err(OpenError::Foreign { segment: 0, found: disk.disk, expected: shared.disk });
    }
    let segments = shared.index.segments()?.into_iter().collect();
    let holes = shared.index.holes()?.into_iter().collect();
    let report = Recovered { rebuilt, ..Recovered::default() };
    Recovery { shared, disk, segments, holes, report }.run()
}

/// Recovers a store, and marks an index that is found damaged on the way, so that the next start rebuilds it.
///
/// # Errors
/// [`OpenError`]; nothing may be written then.
pub fn recover(shared: Arc<Shared>) -> Result<(Core, Recovered), OpenError> {
    let recovered = try_recover(shared.clone());
    if let Err(OpenError::Index(IndexError::Damaged(_))) = &recovered {
        shared.index.mark_damaged();
    }
    recovered
}

impl Recovery {
    fn run(mut self) -> Result<(Core, Recovered), OpenError> {
        let files: BTreeSet<u32> =
            self.shared.device.list().map_err(device_error("list segments"))?.into_iter().collect();
        if let Some(last) = files.last() {
            self.disk.next_segment = self.disk.next_segment.max(last + 1);
        }
        let known: Vec<u32> = self.segments.keys().copied().collect();
        let mut removed = Vec::new();
        let mut batch = Batch::default();
        let mut missing = HashSet::new();
        for number in known {
            let Some(info) = self.segments.get(&number).copied() else { continue };
            match (files.contains(&number), info.state) {
                (true, SegmentState::Dead) => {
                    self.unlink(number)?;
                    removed.push(number);
                }
                (false, state) if state == SegmentState::Dead || info.live_records == 0 => removed.push(number),
                (false, _) => {
                    tracing::error!(
                        segment = number,
                        chunks = info.live_records,
                        "a segment file is missing: its chunks are lost on this disk"
                    );
                    self.report.segments_missing += 1;
                    missing.insert(number);
                }
                (true, _) => {}
            }
        }
        for number in files {
            if !removed.contains(&number) {
                self.segment(number)?;
            }
        }
        // The folder first: a segment may leave the index only when the removal of its file is durable.
        self.shared.device.sync_dir().map_err(device_error("sync of the segment folder"))?;
        for number in removed {
            self.segments.remove(&number);
            batch.remove_segment(number);
        }
        self.forget_missing(&missing, &mut batch)?;
        self.punch_recorded_holes(&missing, &mut batch)?;
        batch.put_disk(&self.disk);
        self.shared.index.write(batch)?;
        self.shared.index.flush()?;
        let segments = self.segments.into_iter().map(|(number, info)| (number, Segment::of_before(info))).collect();
        Ok((Core::new(self.shared, self.disk, segments), self.report))
    }

    /// Takes the chunks of missing segments out of the index: who asks for them must be told that they are not there.
    /// Should the files come back, their records are found like those of any unknown segment.
    fn forget_missing(&mut self, missing: &HashSet<u32>, batch: &mut Batch) -> Result<(), OpenError> {
        if missing.is_empty() {
            return Ok(());
        }
        let mut after = None;
        loop {
            let page = self.shared.index.chunks(after.as_ref(), FORGET_PAGE)?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            let mut gone = Batch::default();
            for (id, at) in page.iter().filter(|(_, at)| missing.contains(&at.segment)) {
                gone.remove_chunk(id);
                self.disk.chunks = self.disk.chunks.saturating_sub(1);
                self.disk.chunk_bytes = self.disk.chunk_bytes.saturating_sub(at.spec.len_bytes);
                self.report.chunks_forgotten += 1;
            }
            if !gone.is_empty() {
                if !self.report.rebuilt {
                    gone.put_disk(&self.disk);
                }
                self.shared.index.write(gone)?;
            }
        }
        for number in missing {
            self.segments.remove(number);
            batch.remove_segment(*number);
        }
        Ok(())
    }

    fn unlink(&self, number: u32) -> Result<(), OpenError> {
        self.shared.device.unlink(number).map_err(device_error(format!("remove segment {number}")))
    }

    /// One segment file.
    fn segment(&mut self, number: u32) -> Result<(), OpenError> {
        let known = self.segments.get(&number).copied();
        if known.is_some_and(|info| info.state == SegmentState::Sealed) {
            return Ok(());
        }
        let context = |what: &str| device_error(format!("{what} segment {number}"));
        let file = self.shared.device.open(number).map_err(context("open"))?;
        // What an earlier process wrote and did not sync is synced now; what its failed sync left in the page cache is
        // dropped.
        file.fdatasync().map_err(context("sync"))?;
        file.drop_cache().map_err(context("drop the cache of"))?;
        let length = file.length().map_err(context("measure"))?;
        let Some(mut info) = self.read_identity(number, &*file, length, known)? else {
            // Its creation was not finished: no record in it was ever acknowledged.
            return self.unlink(number);
        };
        info.length_bytes = info.length_bytes.min(length);
        let sealed = self.report.rebuilt && read_seal(&*file, number, &info).is_some();
        self.segments.insert(number, info);
        self.report.segments_scanned += 1;
        let mut scan =
            Scan { number, file: &*file, at: info.watermark.max(RECORDS_AT), end: info.length_bytes, damage: 0 };
        let mut used: Vec<(u64, u64)> = Vec::new();
        while let Some(header) = scan.next(&info) {
            let at = Location { segment: number, offset: header.offset, sequence: header.sequence, spec: header.spec };
            let kept = self.index_record(&header, &at, &*file, sealed)?;
            if kept == Record::Unreadable {
                scan.damage += 1;
            }
            if kept == Record::Kept {
                used.push((header.offset, header.end()));
                scan.at = header.end();
            } else if sealed {
                scan.at = header.end();
            } else {
                scan.at = header.offset + PAGE_BYTES;
            }
        }
        self.report.damage += scan.damage;
        if scan.damage > 0 {
            // It is not written to, and not sealed either: what could not be read now is looked for again at the next
            // start.
            return Ok(());
        }
        let mut unused = Vec::new();
        let mut from = info.watermark.max(RECORDS_AT);
        for (begin, end) in used {
            unused.push((from, begin));
            from = end;
        }
        let end = from;
        unused.push((from, info.length_bytes));
        if sealed {
            // Records were trusted unread: dead bytes are kept rather than punched.
            unused.clear();
        }
        if !sealed {
            seal(&*file, number, &info, end, &unused).map_err(context("seal"))?;
        }
        if let Some(info) = self.segments.get_mut(&number) {
            info.state = SegmentState::Sealed;
            info.watermark = info.length_bytes;
            let mut batch = Batch::default();
            batch.put_segment(number, info);
            self.shared.index.write(batch)?;
        }
        Ok(())
    }

    /// Reads which segment a file is. None for a file whose creation was not finished.
    fn read_identity(
        &mut self,
        number: u32,
        file: &dyn SegmentFile,
        length: u64,
        known: Option<SegmentInfo>,
    ) -> Result<Option<SegmentInfo>, OpenError> {
        let mut page = Vec::new();
        let mut unreadable = None;
        let header = match file.pread(0, PAGE_BYTES as usize, &mut page) {
            Ok(()) => SegmentHeader::decode(&page),
            Err(error) => {
                // Too short for a header: its creation was not finished. Anything else may be readable the next time.
                unreadable = Some(error).filter(|error| error.kind() != io::ErrorKind::UnexpectedEof);
                Err(FormatError::Damaged { what: "segment header", why: "unreadable" })
            }
        };
        let fresh = |uuid, length_bytes| SegmentInfo {
            uuid,
            length_bytes,
            watermark: RECORDS_AT,
            state: SegmentState::Open,
            live_records: 0,
            live_bytes: 0,
        };
        match header {
            Ok(header) if header.disk != self.shared.disk => {
                Err(OpenError::Foreign { segment: number, found: header.disk, expected: self.shared.disk })
            }
            Ok(header) if header.number == number => Ok(Some(known.unwrap_or(fresh(header.uuid, header.length_bytes)))),
            Err(source @ FormatError::Version { .. }) => Err(OpenError::Version { segment: number, source }),
            wrong => {
                // A known segment with a bad header keeps its records: they carry the identity too. So does an unknown
                // one that has any.
                let mut scan = Scan { number, file, at: RECORDS_AT, end: length, damage: 0 };
                let found = known.or_else(|| scan.next_of_any().map(|record| fresh(record.segment, length)));
                if found.is_none() && scan.damage > 0 {
                    unreadable = unreadable.or_else(|| Some(io::Error::other("pages cannot be read")));
                }
                if let (None, Some(source)) = (found, unreadable) {
                    let what =
                        format!("read segment {number}, which may hold chunks and cannot be told from an empty one");
                    return Err(OpenError::Device { what, source });
                }
                if found.is_some() {
                    self.report.damage += 1;
                    tracing::error!(segment = number, header = ?wrong, "the segment header is damaged; its records are read without it");
                }
                Ok(found)
            }
        }
    }

    /// Indexes one record, unless the index has a newer one of its chunk.
    fn index_record(
        &mut self,
        header: &RecordHeader,
        at: &Location,
        file: &dyn SegmentFile,
        trusted: bool,
    ) -> Result<Record, OpenError> {
        let piece = Hole { segment: at.segment, offset: at.offset, len_bytes: at.record_bytes() };
        self.disk.next_sequence = self.disk.next_sequence.max(at.sequence + 1);
        if self.holes.contains(&piece) {
            return Ok(Record::Dead);
        }
        let before = self.shared.index.chunk(&header.id)?;
        match before {
            Some(before) if before.sequence == at.sequence => return Ok(Record::Kept),
            Some(before) if before.sequence > at.sequence => {
                if trusted {
                    self.record_hole(piece)?;
                }
                return Ok(Record::Dead);
            }
            _ => {}
        }
        if !trusted {
            match verify_payload(file, header) {
                Ok(()) => {}
                Err(BadPayload::Unreadable { block }) => {
                    tracing::error!(segment = at.segment, offset = at.offset, chunk = %header.id, block, "a record cannot be read; it stays and is not served");
                    return Ok(Record::Unreadable);
                }
                Err(BadPayload::Wrong { block }) => {
                    self.report.records_torn += 1;
                    tracing::warn!(segment = at.segment, offset = at.offset, chunk = %header.id, block, "dropped a record that was not whole");
                    return Ok(Record::Dead);
                }
            }
        }
        let mut batch = Batch::default();
        if let Some(before) = before {
            self.disk.chunks = self.disk.chunks.saturating_sub(1);
            self.disk.chunk_bytes = self.disk.chunk_bytes.saturating_sub(before.spec.len_bytes);
            if let Some(segment) = self.segments.get_mut(&before.segment) {
                segment.live_records = segment.live_records.saturating_sub(1);
                segment.live_bytes = segment.live_bytes.saturating_sub(before.record_bytes());
                batch.put_segment(before.segment, segment);
                let hole = Hole { segment: before.segment, offset: before.offset, len_bytes: before.record_bytes() };
                batch.put_hole(&hole);
                self.holes.insert(hole);
            }
        }
        self.disk.chunks += 1;
        self.disk.chunk_bytes += at.spec.len_bytes;
        if let Some(segment) = self.segments.get_mut(&at.segment) {
            segment.live_records += 1;
            segment.live_bytes += at.record_bytes();
            batch.put_segment(at.segment, segment);
        }
        batch.put_chunk(&header.id, at);
        if !self.report.rebuilt {
            // A rebuild writes the disk entry last: until then the index counts as lost.
            batch.put_disk(&self.disk);
        }
        self.shared.index.write(batch)?;
        self.report.records_indexed += 1;
        Ok(Record::Kept)
    }

    fn record_hole(&mut self, hole: Hole) -> Result<(), OpenError> {
        self.holes.insert(hole);
        let mut batch = Batch::default();
        batch.put_hole(&hole);
        Ok(self.shared.index.write(batch)?)
    }

    /// Punches every hole that the index records, whether or not it was punched before. The index is flushed first: a
    /// hole may only be punched when no crash can bring back the entry of the chunk that lay there.
    fn punch_recorded_holes(&mut self, missing: &HashSet<u32>, batch: &mut Batch) -> Result<(), OpenError> {
        if self.holes.is_empty() {
            return Ok(());
        }
        self.shared.index.flush()?;
        let mut files: BTreeMap<u32, Arc<dyn SegmentFile>> = BTreeMap::new();
        for hole in &self.holes {
            batch.remove_hole(hole);
            if missing.contains(&hole.segment) || !self.segments.contains_key(&hole.segment) {
                continue;
            }
            let context = device_error(format!("punch segment {}", hole.segment));
            let file = match files.get(&hole.segment) {
                Some(file) => file.clone(),
                None => {
                    let file = self.shared.device.open(hole.segment).map_err(device_error("open segment"))?;
                    // At most 64 open files: a rebuild may find holes in thousands of segments.
                    if files.len() >= 64 {
                        for file in std::mem::take(&mut files).values() {
                            file.fdatasync().map_err(device_error("sync of holes"))?;
                        }
                    }
                    files.insert(hole.segment, file.clone());
                    file
                }
            };
            file.punch(hole.offset, hole.len_bytes).map_err(context)?;
            self.report.holes_punched += 1;
        }
        for file in files.values() {
            file.fdatasync().map_err(device_error("sync of holes"))?;
        }
        Ok(())
    }
}

fn read_seal(file: &dyn SegmentFile, number: u32, info: &SegmentInfo) -> Option<Seal> {
    let mut page = Vec::new();
    file.pread(SEAL_AT, PAGE_BYTES as usize, &mut page).ok()?;
    Seal::decode(&page).ok().filter(|seal| seal.number == number && seal.uuid == info.uuid)
}

/// Walks over a segment page by page and finds record headers. Also what `inspect` walks with.
pub struct Scan<'a> {
    /// Segment number, for the log.
    pub number: u32,
    /// The segment.
    pub file: &'a dyn SegmentFile,
    /// Where to look next, as an offset. The caller moves it behind a record that it indexed.
    pub at: u64,
    /// Where to stop.
    pub end: u64,
    /// Pages that could not be read.
    pub damage: u64,
}

impl Scan<'_> {
    /// The next header that belongs to this segment and lies where it says; `at` then stands on it.
    pub fn next(&mut self, info: &SegmentInfo) -> Option<RecordHeader> {
        let end = self.end;
        self.find(|header, at| header.belongs(&info.uuid, at) && header.end() <= end)
    }

    /// The next header that lies where it says, whatever segment it names.
    pub fn next_of_any(&mut self) -> Option<RecordHeader> {
        let end = self.end;
        self.find(|header, at| header.offset == at && header.end() <= end)
    }

    fn find(&mut self, wanted: impl Fn(&RecordHeader, u64) -> bool) -> Option<RecordHeader> {
        let mut window = Vec::new();
        let mut region = Vec::new();
        while self.at < self.end {
            let length = SCAN_BYTES.min(self.end - self.at);
            let step = match self.file.pread(self.at, length as usize, &mut window) {
                Ok(()) => PAGE_BYTES as usize,
                Err(_) => {
                    // Somewhere in here the disk cannot be read: go on page by page.
                    if self.file.pread(self.at, PAGE_BYTES.min(length) as usize, &mut window).is_err() {
                        self.damage += 1;
                        tracing::error!(segment = self.number, offset = self.at, "a page cannot be read");
                        self.at += PAGE_BYTES;
                        continue;
                    }
                    PAGE_BYTES as usize
                }
            };
            for page in window.chunks(step) {
                if let Some(region_bytes) = RecordHeader::region_hint(page) {
                    match self.file.pread(self.at, region_bytes as usize, &mut region) {
                        Ok(()) => match RecordHeader::decode(&region) {
                            Ok(header) if wanted(&header, self.at) => return Some(header),
                            _ => {}
                        },
                        // What looks like a header may name any length.
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                        Err(error) => {
                            self.damage += 1;
                            tracing::error!(segment = self.number, offset = self.at, %error, "a header cannot be read");
                        }
                    }
                }
                self.at += PAGE_BYTES;
            }
        }
        None
    }
}
