//! What follows a group: segments are sealed, the index is flushed, holes are punched, dead segments removed.

use super::Core;
use crate::store::device::SegmentFile;
use crate::store::format::{Seal, SEAL_AT};
use crate::store::index::{Batch, Hole, SegmentInfo, SegmentState};
use crate::store::StoreError;
use std::collections::btree_map::Entry;
use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

/// Holes punched in one round of housekeeping; writes wait while they are.
const HOLES_PER_ROUND: usize = 256;

impl Core {
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
    pub(super) fn punch(&mut self, at_most: usize) -> Result<(), StoreError> {
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
pub(in crate::store) fn seal(
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
