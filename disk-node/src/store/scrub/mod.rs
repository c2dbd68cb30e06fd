//! The scrub: every chunk of the disk is read and checked, pass after pass, whether or not anybody asks for it.
//!
//! A pass goes through the chunks of the index in the order in which they lie on the disk, and reads header and blocks
//! of each past the page cache. What fails is read a second time; what fails again goes on the list of [`findings`],
//! which the healer reads. How far it has come is kept in the index (`index/scrubbed.rs`): a process that starts goes
//! on there. [`budget`] says how fast it goes.
//!
//! [`Scrub`] has no thread and no clock of its own: each [`Scrub::step`] does one read. `crate::scrub` is the task
//! around it.
//!
//! **Invariant:** a scrub changes nothing but its own entries of the index. Nothing is removed because of what it
//! finds.
//!
//! **Invariant:** what the disk does not give counts as damaged, never as absent.

pub mod budget;
pub mod findings;

use super::format::{header_region_bytes, RecordHeader};
use super::index::{Batch, Location, Pass, Place, ScrubState};
use super::shared::Shared;
use super::StoreError;
use findings::MAX_FINDINGS;
use granary_wire::chunk::{block_count, block_crc, ChunkId, BLOCK_BYTES};
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Blocks per read.
const BLOCKS: u32 = 16;
/// Chunks whose places are in memory at once. When they are read the whole index is gone through for the next ones.
const PLACES: usize = 256 * 1024;
/// Index entries looked at together for these.
const PAGE: usize = 1000;
/// The cursor is made durable this often: so much is read twice after a crash.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// About what an entry of the index takes, in bytes.
const ENTRY_BYTES: u64 = 64;

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// There was a read of so many bytes.
    Read {
        /// Headers and payload, in bytes.
        bytes: u64,
    },
    /// Some of the index was read, to know what comes next.
    Looked {
        /// About so much, in bytes.
        bytes: u64,
    },
    /// There is nothing to do for so long.
    Rest(Duration),
}

/// A record that is being read.
struct Reading {
    id: ChunkId,
    at: Location,
    header: Option<RecordHeader>,
    next_block: u32,
    /// The read before failed; this one decides.
    again: bool,
}

/// What comes next in a pass.
enum Next {
    /// A record, or one that is gone.
    Record,
    /// Maybe a record: some of the index was read for it, about so many bytes.
    Looked { bytes: u64 },
    /// Nothing.
    End,
}

/// A walk through the index for the records that come next.
#[derive(Default)]
struct Walk {
    /// Where it is.
    after: Option<ChunkId>,
    /// The first ones so far.
    nearest: BinaryHeap<(Place, ChunkId)>,
    /// There are others behind these.
    more: bool,
}

/// The scrub of one store.
pub struct Scrub {
    shared: Arc<Shared>,
    interval: Duration,
    state: ScrubState,
    /// The next records of the pass, in order.
    places: VecDeque<(Place, ChunkId)>,
    /// Behind these there are others.
    more: bool,
    walk: Option<Walk>,
    reading: Option<Reading>,
    saved_ms: u64,
    buffer: Vec<u8>,
    told_full: bool,
}

impl Scrub {
    /// Goes on where the process before it was. Blocking.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn open(shared: Arc<Shared>, interval: Duration, now_ms: u64) -> Result<Scrub, StoreError> {
        let kept = shared.index.scrub_state().map_err(|error| shared.fail_index(&error))?;
        if kept == Some(None) {
            tracing::error!("how far the scrub had come cannot be read: the pass starts over");
        }
        let state = kept.flatten().unwrap_or_default();
        shared.count_findings()?;
        let scrub = Scrub {
            shared,
            interval,
            state,
            places: VecDeque::new(),
            more: true,
            walk: None,
            reading: None,
            saved_ms: now_ms,
            buffer: Vec::new(),
            told_full: false,
        };
        scrub.publish();
        Ok(scrub)
    }

    /// How far it has come.
    pub fn state(&self) -> &ScrubState {
        &self.state
    }

    /// About how many bytes the pass has before it, and since when it is under way.
    pub fn left(&self, now_ms: u64) -> (u64, Duration) {
        let Some(pass) = self.state.current else { return (0, Duration::ZERO) };
        (self.bytes_of_disk().saturating_sub(pass.bytes), Duration::from_millis(now_ms.saturating_sub(pass.started_ms)))
    }

    fn bytes_of_disk(&self) -> u64 {
        use std::sync::atomic::Ordering::Relaxed;
        let headers = self.shared.chunks.load(Relaxed).saturating_mul(super::format::PAGE_BYTES);
        self.shared.chunk_bytes.load(Relaxed).saturating_add(headers)
    }

    /// Does one read, or says how long there is nothing to do. Blocking.
    ///
    /// # Errors
    /// [`StoreError::Failed`]: the store does nothing any more.
    pub fn step(&mut self, now_ms: u64) -> Result<Step, StoreError> {
        self.shared.check_running()?;
        if self.state.current.is_none() {
            if let Some(wait) = self.rest(now_ms) {
                return Ok(Step::Rest(wait));
            }
            self.begin(now_ms)?;
        }
        while self.reading.is_none() {
            match self.next()? {
                Next::Record => {}
                Next::Looked { bytes } => return Ok(Step::Looked { bytes }),
                Next::End => {
                    self.end(now_ms)?;
                    return Ok(Step::Rest(Duration::ZERO));
                }
            }
        }
        let bytes = self.read()?;
        if now_ms.abs_diff(self.saved_ms) >= SAVE_EVERY.as_millis() as u64 {
            self.save(now_ms)?;
        }
        self.publish();
        Ok(Step::Read { bytes })
    }

    /// How long the next pass is not due; None when it is. A clock that was put back does not put it off.
    fn rest(&self, now_ms: u64) -> Option<Duration> {
        let age = Duration::from_millis(now_ms.checked_sub(self.state.last?.started_ms)?);
        self.interval.checked_sub(age).filter(|wait| !wait.is_zero())
    }

    fn begin(&mut self, now_ms: u64) -> Result<(), StoreError> {
        let disk = self.shared.index.disk().map_err(|error| self.shared.fail_index(&error))?;
        let pass = Pass {
            number: self.state.last.map_or(0, |last| last.number) + 1,
            started_ms: now_ms,
            until_sequence: disk.map_or(0, |disk| disk.next_sequence),
            ..Pass::default()
        };
        self.state = ScrubState { current: Some(pass), cursor: Place::default(), ..self.state };
        (self.places, self.more, self.walk) = (VecDeque::new(), true, None);
        self.shared.count_findings()?;
        tracing::info!(pass = pass.number, bytes = self.bytes_of_disk(), "a scrub begins");
        self.save(now_ms)
    }

    fn end(&mut self, now_ms: u64) -> Result<(), StoreError> {
        if let Some(pass) = self.state.current.take() {
            let Pass { number, bytes, chunks, findings, .. } = pass;
            tracing::info!(pass = number, bytes, chunks, findings, "a scrub ended");
            self.state.last = Some(Pass { ended_ms: now_ms, ..pass });
        }
        self.save(now_ms)?;
        self.publish();
        Ok(())
    }

    /// Makes durable how far it has come. Called by itself now and then, and before the process ends.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn save(&mut self, now_ms: u64) -> Result<(), StoreError> {
        self.shared.check_running()?;
        let mut batch = Batch::default();
        batch.put_scrub_state(&self.state);
        let saved = self.shared.index.write(batch).and_then(|()| self.shared.index.flush());
        self.saved_ms = now_ms;
        saved.map_err(|error| self.shared.fail_index(&error))
    }

    /// Takes up the next record, if it still is one, or looks at a page of the index for those that come next.
    fn next(&mut self) -> Result<Next, StoreError> {
        let Some((place, id)) = self.places.pop_front() else {
            return if self.more { self.look_for_places() } else { Ok(Next::End) };
        };
        let now = self.shared.index.chunk(&id).map_err(|error| self.shared.fail_index(&error))?;
        match now.filter(|at| (Place { segment: at.segment, offset: at.offset }) == place) {
            Some(at) => self.reading = Some(Reading { id, at, header: None, next_block: 0, again: false }),
            // Deleted or replaced since.
            None => self.state.cursor = place,
        }
        Ok(Next::Record)
    }

    /// Looks at one page of the index for the records that come next. They are known when it is the last one.
    fn look_for_places(&mut self) -> Result<Next, StoreError> {
        let until = self.state.current.map_or(0, |pass| pass.until_sequence);
        let mut walk = self.walk.take().unwrap_or_default();
        let page =
            self.shared.index.chunks(walk.after.as_ref(), PAGE).map_err(|error| self.shared.fail_index(&error))?;
        let (looked, bytes) = (page.len(), page.len() as u64 * ENTRY_BYTES);
        walk.after = page.last().map(|(id, _)| *id);
        for (id, at) in page {
            let place = Place { segment: at.segment, offset: at.offset };
            if place <= self.state.cursor || at.sequence >= until {
                continue;
            }
            walk.nearest.push((place, id));
            if walk.nearest.len() > PLACES {
                walk.nearest.pop();
                walk.more = true;
            }
        }
        if looked == PAGE {
            self.walk = Some(walk);
        } else {
            (self.more, self.places) = (walk.more, walk.nearest.into_sorted_vec().into());
        }
        Ok(Next::Looked { bytes })
    }

    /// One read of the record at hand. Gives its length in bytes.
    fn read(&mut self) -> Result<u64, StoreError> {
        let Some(mut reading) = self.reading.take() else { return Ok(0) };
        let (bytes, good) = self.read_blocks(&mut reading);
        self.shared.metrics.scrub_bytes.inc_by(bytes);
        let again = std::mem::replace(&mut reading.again, !good);
        match (good, again) {
            (true, again) => {
                self.shared.metrics.scrub_second_reads_good.inc_by(u64::from(again));
                let is_last = u64::from(reading.next_block) >= block_count(reading.at.spec.len_bytes);
                if is_last {
                    self.shared.drop_finding(&reading.id, reading.at.sequence)?;
                    self.count(&reading, false);
                } else {
                    self.reading = Some(reading);
                }
            }
            (false, false) => self.reading = Some(reading),
            // The list is full: it is counted, and the next pass finds it again.
            (false, true) if self.is_list_full()? => self.count(&reading, true),
            (false, true) => {
                if self.shared.add_finding(&reading.id, &reading.at)? {
                    let Location { segment, offset, .. } = reading.at;
                    tracing::error!(chunk = %reading.id, segment, offset, "the scrub found a chunk that is damaged");
                    self.shared.metrics.scrub_findings.inc();
                    self.count(&reading, true);
                } else {
                    // Replaced or deleted while it was read.
                    self.state.cursor = Place { segment: reading.at.segment, offset: reading.at.offset };
                }
            }
        }
        if let Some(pass) = &mut self.state.current {
            pass.bytes += if again { 0 } else { bytes };
        }
        Ok(bytes)
    }

    fn is_list_full(&mut self) -> Result<bool, StoreError> {
        if self.shared.findings_count() < MAX_FINDINGS || self.shared.count_findings()? < MAX_FINDINGS {
            return Ok(false);
        }
        if !self.told_full {
            tracing::error!(
                listed = MAX_FINDINGS,
                "so many chunks of this disk are damaged and not repaired that no more are listed: replace the disk"
            );
        }
        self.told_full = true;
        Ok(true)
    }

    fn count(&mut self, reading: &Reading, damaged: bool) {
        self.state.cursor = Place { segment: reading.at.segment, offset: reading.at.offset };
        if let Some(pass) = &mut self.state.current {
            pass.chunks += 1;
            pass.findings += u64::from(damaged);
        }
    }

    /// Reads header and first blocks, or the next blocks. How many bytes that were, and whether all are as written.
    fn read_blocks(&mut self, reading: &mut Reading) -> (u64, bool) {
        let Reading { id, at, header, next_block, .. } = reading;
        let region = header_region_bytes(at.spec.len_bytes);
        let last = (*next_block + BLOCKS).min(block_count(at.spec.len_bytes) as u32);
        let until = (u64::from(last) * BLOCK_BYTES).min(at.spec.len_bytes);
        // The header lies right before the first block.
        let from = if header.is_some() { region + u64::from(*next_block) * BLOCK_BYTES } else { 0 };
        let bytes = region + until - from;
        let Ok(file) = self.shared.files.get(at.segment) else { return (0, false) };
        if file.pread_from_disk(at.offset + from, bytes as usize, &mut self.buffer).is_err() {
            return (bytes, false);
        }
        let mut payload = self.buffer.as_slice();
        if header.is_none() {
            let (before, blocks) = payload.split_at((region as usize).min(payload.len()));
            let Some(decoded) = header_of(before, id, at) else { return (bytes, false) };
            *header = Some(decoded);
            payload = blocks;
        }
        let crcs = header.as_ref().map(|header| header.crcs.as_slice()).unwrap_or_default();
        let wanted = crcs.get(*next_block as usize..last as usize).unwrap_or_default();
        let blocks = payload.chunks(BLOCK_BYTES as usize);
        let good = blocks.len() == wanted.len()
            && (*next_block..)
                .zip(blocks.zip(wanted))
                .all(|(number, (block, crc))| block_crc(id, number, block) == *crc);
        if good {
            *next_block = last;
        }
        (bytes, good)
    }

    fn publish(&self) {
        let metrics = &self.shared.metrics;
        let all = self.bytes_of_disk().max(1);
        let per_mille =
            self.state.current.map_or(1000, |pass| (u128::from(pass.bytes) * 1000 / u128::from(all)).min(999));
        metrics.scrub_position.set(i64::try_from(per_mille).unwrap_or(0));
        metrics.scrub_pass_findings.set(self.state.current.or(self.state.last).map_or(0, |pass| pass.findings as i64));
        let since = self.state.last.map(|last| last.ended_ms);
        metrics.note_scrub(since.or(self.state.current.map(|pass| pass.started_ms)));
    }
}

/// The header that lies there, if it is that of this record.
fn header_of(region: &[u8], id: &ChunkId, at: &Location) -> Option<RecordHeader> {
    let header = RecordHeader::decode(region).ok()?;
    let is_its =
        header.id == *id && header.sequence == at.sequence && header.offset == at.offset && header.spec == at.spec;
    is_its.then_some(header)
}
