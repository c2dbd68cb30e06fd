//! Chunks that arrive in pieces: space is taken when they begin, and given back when they are given up.

use super::{Allocation, Core, Reservation, Ticket, Whose};
use crate::store::device::is_full;
use crate::store::format::{header_region_bytes, record_bytes};
use crate::store::index::Hole;
use crate::store::StoreError;
use bytes::Bytes;
use granary_wire::chunk::{ChunkId, ChunkSpec};

impl Core {
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

    pub(super) fn release(&mut self, space: Allocation, len_bytes: u64) {
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
}
