//! Verified reads: no byte is returned that does not agree with its checksum.

use super::device::SegmentFile;
use super::format::{header_region_bytes, RecordHeader};
use super::index::Location;
use super::shared::Shared;
use super::StoreError;
use bytes::Bytes;
use granary_wire::chunk::{block_count, block_crc, ChunkHealth, ChunkId, ChunkSpec, BLOCK_BYTES};
use std::io;
use std::sync::Arc;

/// Blocks of a chunk, verified.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// What the chunk is part of.
    pub spec: ChunkSpec,
    /// Number of the first block.
    pub first_block: u32,
    /// Checksum of each block.
    pub crcs: Vec<u32>,
    /// The blocks.
    pub data: Vec<Bytes>,
}

/// Blocks read at a time when a whole chunk is verified.
const VERIFY_BLOCKS: u32 = 16;

/// A chunk that moves while it is read is looked up again; it moves only when it is replaced or deleted meanwhile.
const LOOKUPS: u32 = 4;

impl Shared {
    fn locate(&self, id: &ChunkId) -> Result<Location, StoreError> {
        self.check_running()?;
        let found = self.index.chunk(id).map_err(|error| self.fail_index(&error))?;
        found.ok_or(StoreError::NotFound)
    }

    /// Reads `blocks` blocks from `first_block`, clipped at the chunk's end. Blocking.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Corrupt`] for the first bad block, [`StoreError::Unreadable`] when the
    /// disk does not give them back, [`StoreError::Rejected`] for blocks the chunk does not have.
    pub fn read_blocks(&self, id: &ChunkId, first_block: u32, blocks: u32) -> Result<Blocks, StoreError> {
        let mut at = self.locate(id)?;
        for _ in 1..LOOKUPS {
            let error = match self.read_at(id, &at, first_block, blocks) {
                Ok(blocks) => return Ok(blocks),
                Err(error) => error,
            };
            // Its hole may have been punched between the look-up and the read.
            let now = self.locate(id)?;
            if now == at {
                if matches!(error, StoreError::Corrupt { .. } | StoreError::Unreadable(_)) {
                    self.metrics.corrupt_blocks.inc();
                    tracing::error!(chunk = %id, segment = at.segment, offset = at.offset, %error, "a chunk cannot be read");
                }
                return Err(error);
            }
            at = now;
        }
        self.read_at(id, &at, first_block, blocks)
    }

    fn read_at(&self, id: &ChunkId, at: &Location, first_block: u32, blocks: u32) -> Result<Blocks, StoreError> {
        let count = block_count(at.spec.len_bytes) as u32;
        if blocks == 0 || first_block >= count {
            return Err(StoreError::Rejected(format!("block {first_block} of a chunk of {count} blocks")));
        }
        let last = first_block.saturating_add(blocks).min(count);
        let corrupt = StoreError::Corrupt { block: first_block };
        let failed = |error: io::Error| match error.kind() {
            // The file is gone or shorter than the index believes: the bytes are not there, however well the disk
            // works.
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => corrupt.clone(),
            _ => StoreError::Unreadable(error.to_string()),
        };
        let file = self.files.get(at.segment).map_err(failed)?;
        let region = header_region_bytes(at.spec.len_bytes);
        let (from, until) =
            (u64::from(first_block) * BLOCK_BYTES, (u64::from(last) * BLOCK_BYTES).min(at.spec.len_bytes));
        let cached = self.headers.get(&(*id, at.sequence));
        let mut buffer = self.buffers.take();
        // The header lies right before the payload: a first read from the beginning takes both at once.
        let skip = match (&cached, first_block) {
            (None, 0) => {
                file.pread(at.offset, (region + until) as usize, &mut buffer.bytes).map_err(failed)?;
                region as usize
            }
            _ => {
                file.pread(at.offset + region + from, (until - from) as usize, &mut buffer.bytes).map_err(failed)?;
                0
            }
        };
        let header = match cached {
            Some(header) => header,
            None => {
                let decoded = if skip > 0 {
                    RecordHeader::decode(buffer.bytes.get(..skip).unwrap_or_default())
                } else {
                    let mut bytes = Vec::new();
                    file.pread(at.offset, region as usize, &mut bytes).map_err(failed)?;
                    RecordHeader::decode(&bytes)
                };
                let header = decoded.map_err(|_| corrupt.clone())?;
                if header.id != *id
                    || header.sequence != at.sequence
                    || header.offset != at.offset
                    || header.spec != at.spec
                {
                    return Err(corrupt);
                }
                let header = Arc::new(header);
                self.headers.insert((*id, at.sequence), header.clone());
                header
            }
        };
        let crcs = header.crcs.get(first_block as usize..last as usize).unwrap_or_default().to_vec();
        let whole = Bytes::from_owner(buffer).slice(skip..);
        let mut data = Vec::with_capacity(crcs.len());
        for (place, crc) in crcs.iter().enumerate() {
            let begin = place * BLOCK_BYTES as usize;
            let block = whole.slice(begin..(begin + BLOCK_BYTES as usize).min(whole.len()));
            let number = first_block + place as u32;
            if block_crc(id, number, &block) != *crc {
                return Err(StoreError::Corrupt { block: number });
            }
            data.push(block);
        }
        if data.len() as u32 != last - first_block {
            return Err(corrupt);
        }
        Ok(Blocks { spec: at.spec, first_block, crcs, data })
    }

    /// Reads a whole chunk and checks every block. Blocking. One that is good is damaged no more, whatever the scrub
    /// found.
    ///
    /// # Errors
    /// [`StoreError::Failed`] when the store has failed; a bad chunk is an answer.
    pub fn verify(&self, id: &ChunkId) -> Result<ChunkHealth, StoreError> {
        let mut block = 0;
        let sequence = match self.locate(id) {
            Ok(at) => at.sequence,
            Err(StoreError::NotFound) => return Ok(ChunkHealth::Missing),
            Err(other) => return Err(other),
        };
        loop {
            match self.read_blocks(id, block, VERIFY_BLOCKS) {
                Ok(blocks) => {
                    block += blocks.data.len() as u32;
                    if u64::from(block) >= block_count(blocks.spec.len_bytes) {
                        self.drop_finding(id, sequence)?;
                        return Ok(ChunkHealth::Good);
                    }
                }
                Err(StoreError::NotFound) => return Ok(ChunkHealth::Missing),
                // Replaced by a shorter one while it was read: look at that one.
                Err(StoreError::Rejected(_)) if block > 0 => block = 0,
                Err(StoreError::Corrupt { .. } | StoreError::Unreadable(_) | StoreError::Rejected(_)) => {
                    return Ok(ChunkHealth::Corrupt)
                }
                Err(other) => return Err(other),
            }
        }
    }
}

/// A block of a record that is not good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadPayload {
    /// Its bytes are not those that its checksum is of.
    Wrong {
        /// Its number.
        block: u32,
    },
    /// The disk does not give them.
    Unreadable {
        /// Its number.
        block: u32,
    },
}

impl BadPayload {
    /// The number of the block.
    pub fn block(self) -> u32 {
        match self {
            BadPayload::Wrong { block } | BadPayload::Unreadable { block } => block,
        }
    }
}

/// Checks every block of a record against its header.
///
/// # Errors
/// The first block that is not good.
pub fn verify_payload(file: &dyn SegmentFile, header: &RecordHeader) -> Result<(), BadPayload> {
    let mut buffer = Vec::new();
    let mut left = header.spec.len_bytes;
    let mut at = header.payload_at();
    for (number, crc) in header.crcs.iter().enumerate() {
        let number = number as u32;
        let length = left.min(BLOCK_BYTES);
        file.pread(at, length as usize, &mut buffer).map_err(|_| BadPayload::Unreadable { block: number })?;
        if block_crc(&header.id, number, &buffer) != *crc {
            return Err(BadPayload::Wrong { block: number });
        }
        at += length;
        left -= length;
    }
    Ok(())
}
