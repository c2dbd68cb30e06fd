//! Where a record goes: in the segment being filled, or in a new one while the disk has room.

use super::{Allocation, Core, Segment, Whose};
use crate::store::device::{is_full, SegmentFile};
use crate::store::format::{page_up, record_bytes, SegmentHeader, SegmentUuid, PAGE_BYTES, RECORDS_AT};
use crate::store::index::{Batch, Hole, SegmentInfo, SegmentState};
use crate::store::StoreError;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

/// A new segment takes at most one part in this many of the free space, so that the first one does not fill a small
/// disk.
const SEGMENT_SHARE: u64 = 8;

impl Core {
    /// Reserves space for a record, in a new segment when the present one has no room.
    pub(super) fn allocate(&mut self, len_bytes: u64, whose: Whose) -> Result<Allocation, StoreError> {
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

    pub(super) fn file(&self, number: u32) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let file = self.segments.get(&number).and_then(|segment| segment.file.clone());
        file.ok_or_else(|| self.fail("writer", format!("segment {number} is not open")))
    }

    /// Gives a dead piece of a segment back: recorded as a hole in the batch, punched once that batch is flushed.
    pub(super) fn free_piece(&mut self, batch: &mut Batch, hole: Hole) {
        if self.segments.contains_key(&hole.segment) {
            batch.put_hole(&hole);
            self.unflushed_holes.push(hole);
        }
    }
}
