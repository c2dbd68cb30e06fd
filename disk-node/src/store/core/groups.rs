//! Groups of requests: records are written and synced, the index gets one batch, and then they are answered.

use super::{Allocation, Core, Done, Op};
use crate::store::device::is_full;
use crate::store::format::{header_region_bytes, record_bytes, RecordHeader};
use crate::store::index::{Batch, Hole, Location, SegmentState};
use crate::store::StoreError;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::time::Instant;

/// A record that was written, or a deletion, before the group's sync.
enum Step {
    Stored { id: ChunkId, at: Location },
    Delete { ids: Vec<ChunkId> },
}

impl Core {
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
    pub(super) fn write_index(&mut self, batch: Batch) -> Result<(), StoreError> {
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
}
