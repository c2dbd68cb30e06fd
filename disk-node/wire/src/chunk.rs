//! Chunks: what one disk stores of one extent, and the checksums that travel with their bytes.
//!
//! A chunk is immutable: its bytes follow from its extent's payload and its index. Its payload is cut into 64 KiB
//! blocks (the last may be short), each with a CRC-32 that is seeded with the chunk's id and the block's number, so
//! that a misplaced, stale or swapped block fails as a flipped one does. The checksum is made by the gateway, kept by
//! the disk, and checked on both sides of the wire each time the bytes move.

use granary_placement::id::{ExtentId, HashSlot, PlacementGroupId};
use granary_placement::scheme::CodecId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Length of a block, in bytes. Part of the format of chunks on disk and on the wire.
pub const BLOCK_BYTES: u64 = 64 * 1024;

/// Longest chunk, in bytes: an extent of 64 MiB at K = 1.
pub const MAX_CHUNK_BYTES: u64 = 64 * 1024 * 1024;

/// Generation of chunks that an upload writes.
pub const FIRST_GENERATION: u32 = 1;

/// Names one chunk. Orders by group first, so that all chunks of a group on a disk are one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId {
    /// Its placement group.
    pub group: PlacementGroupId,
    /// Its extent.
    pub extent: ExtentId,
    /// Its index in the extent's code: data below K, coding from K on.
    pub index: u8,
    /// Raised when the same extent is coded anew in place.
    pub generation: u32,
}

/// Bytes of a [`ChunkId`] in binary headers and keys: group (4), extent (16), index (1), generation (4), all
/// big-endian.
pub const CHUNK_ID_BYTES: usize = 25;

impl ChunkId {
    /// The id as it stands in headers and keys; orders as the id does.
    pub fn to_bytes(&self) -> [u8; CHUNK_ID_BYTES] {
        let mut bytes = [0u8; CHUNK_ID_BYTES];
        bytes[0..4].copy_from_slice(&self.group.0.to_be_bytes());
        bytes[4..20].copy_from_slice(&self.extent.0);
        bytes[20] = self.index;
        bytes[21..25].copy_from_slice(&self.generation.to_be_bytes());
        bytes
    }

    /// The id in those bytes.
    pub fn from_bytes(bytes: &[u8; CHUNK_ID_BYTES]) -> ChunkId {
        let mut extent = [0u8; 16];
        extent.copy_from_slice(&bytes[4..20]);
        ChunkId {
            group: PlacementGroupId(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
            extent: ExtentId(extent),
            index: bytes[20],
            generation: u32::from_be_bytes([bytes[21], bytes[22], bytes[23], bytes[24]]),
        }
    }
}

impl fmt::Display for ChunkId {
    /// 50 hex digits: the form in request paths and logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.to_bytes()))
    }
}

/// Text that is not a chunk id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a chunk id (50 hex digits)")]
pub struct ParseChunkIdError;

impl FromStr for ChunkId {
    type Err = ParseChunkIdError;
    fn from_str(text: &str) -> Result<ChunkId, ParseChunkIdError> {
        let mut bytes = [0u8; CHUNK_ID_BYTES];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| ParseChunkIdError)?;
        Ok(ChunkId::from_bytes(&bytes))
    }
}

/// What a chunk is part of; stands in its header, so that a disk explains itself without the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkSpec {
    /// The code.
    pub codec: CodecId,
    /// Data chunks of the extent.
    pub k: u8,
    /// Coding chunks of the extent.
    pub m: u8,
    /// Unit of a full stripe, in bytes.
    pub unit_bytes: u32,
    /// Payload of the whole extent, in bytes.
    pub extent_len_bytes: u64,
    /// Payload of this chunk, in bytes: at least 1, at most [`MAX_CHUNK_BYTES`].
    pub len_bytes: u64,
    /// The hash slot of the key that the extent belongs to: the shard that owns the slot, by the cluster map, is asked
    /// whether the chunk is garbage.
    pub owner: HashSlot,
    /// When the upload that made it began, in Unix milliseconds by the gateway's clock. For ages only, never for order.
    pub created_ms: u64,
}

/// How many blocks `len_bytes` of chunk payload are.
pub fn block_count(len_bytes: u64) -> u64 {
    len_bytes.div_ceil(BLOCK_BYTES)
}

/// A running CRC-32 of one block. Seed: CRC-32 of the chunk id's 25 bytes and the block number (4 bytes, big-endian).
#[derive(Debug, Clone)]
pub struct BlockCrc(crc32fast::Hasher);

impl BlockCrc {
    /// Begins block `block` of `chunk`.
    pub fn new(chunk: &ChunkId, block: u32) -> BlockCrc {
        let mut seed = crc32fast::Hasher::new();
        seed.update(&chunk.to_bytes());
        seed.update(&block.to_be_bytes());
        BlockCrc(crc32fast::Hasher::new_with_initial(seed.finalize()))
    }

    /// Takes the next bytes of the block.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum.
    pub fn finish(self) -> u32 {
        self.0.finalize()
    }
}

/// The checksum of one whole block.
pub fn block_crc(chunk: &ChunkId, block: u32, bytes: &[u8]) -> u32 {
    let mut crc = BlockCrc::new(chunk, block);
    crc.update(bytes);
    crc.finish()
}

/// What a disk says of one of its chunks after reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkHealth {
    /// Every block agrees with its checksum.
    Good,
    /// Not on this disk.
    Missing,
    /// A block or the header is wrong or cannot be read.
    Corrupt,
}

/// One entry of a listing of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkInfo {
    /// Which chunk.
    pub id: ChunkId,
    /// What it is part of.
    pub spec: ChunkSpec,
    /// Milliseconds since it was written, by the clocks of its writer and of the disk's server.
    pub age_ms: u64,
    /// Milliseconds since it was put into quarantine, by the clock of the disk's server; None when it is not in it.
    pub quarantined_ms: Option<u64>,
}
