//! The bytes of a segment file. docs/formats/chunk-store.md shows the same tables for readers without the source.
//!
//! All numbers are big-endian. A page is 4 KiB; every part of a segment begins at a page.
//!
//! ```text
//! segment:  | segment header, 1 page | seal, 1 page | record | record | ... | never written, reads as zeros |
//!
//! segment header                             seal (written once, after the last record was synced)
//!  0  8  magic "GRNYSEG\0"                    0  8  magic "GRNYSEAL"
//!  8  2  version                              8  2  version
//! 10  2  zero                                10  2  zero
//! 12  4  segment number                      12  4  segment number
//! 16 16  segment UUID, random                16 16  segment UUID
//! 32 16  disk UUID                           32  8  end of the last record
//! 48  8  length of the file                  40  4  CRC-32 of all before
//! 56  4  CRC-32 of all before
//!
//! record:   | header region, 1 or 2 pages | payload, padded with zeros to a page |
//!
//! record header
//!   0  8  magic "GRNYREC\0"
//!   8  2  version
//!  10  2  zero
//!  12  4  number of blocks, n
//!  16 16  segment UUID        } an attacker's payload cannot pose as a header: he does not know the UUID,
//!  32  8  own offset          } and a header copied elsewhere with its payload disagrees with its place
//!  40  8  sequence            higher wins among records of one chunk
//!  48 25  chunk id            as in ChunkId::to_bytes
//!  73  1  codec
//!  74  1  K
//!  75  1  M
//!  76  4  unit, bytes
//!  80  8  payload of the extent, bytes
//!  88  8  payload of the chunk, bytes
//!  96  2  hash slot of the owner's key
//!  98  2  zero
//! 100  8  created, Unix milliseconds
//! 108 4n  CRC-32 of each 64 KiB block, seeded with chunk id and block number
//!      4  CRC-32 of all before
//! ```
//!
//! The header region comes first so that a scan finds it, but it is written last: it holds the checksums of a payload
//! that streams in.

use granary_placement::id::{DiskUuid, HashSlot};
use granary_placement::scheme::CodecId;
use granary_wire::chunk::{block_count, ChunkId, ChunkSpec, CHUNK_ID_BYTES, MAX_CHUNK_BYTES};
use std::fmt;

/// Grain of everything on the disk, in bytes: records begin at multiples of it and holes are punched in it.
pub const PAGE_BYTES: u64 = 4096;

/// Version of the segment format this build writes and reads. 1: the first.
pub const SEGMENT_VERSION: u16 = 1;

const SEGMENT_MAGIC: &[u8; 8] = b"GRNYSEG\0";
const SEAL_MAGIC: &[u8; 8] = b"GRNYSEAL";
const RECORD_MAGIC: &[u8; 8] = b"GRNYREC\0";

/// Where the seal lies in a segment.
pub const SEAL_AT: u64 = PAGE_BYTES;
/// Where the first record lies in a segment.
pub const RECORDS_AT: u64 = SEAL_AT + PAGE_BYTES;

const VERSION_AT: usize = 8;
const COUNT_AT: usize = 12;
const UUID_AT: usize = 16;
const AFTER_UUID: usize = UUID_AT + 16;

const OFFSET_AT: usize = AFTER_UUID;
const SEQUENCE_AT: usize = OFFSET_AT + 8;
const CHUNK_AT: usize = SEQUENCE_AT + 8;
const CODEC_AT: usize = CHUNK_AT + CHUNK_ID_BYTES;
const K_AT: usize = CODEC_AT + 1;
const M_AT: usize = K_AT + 1;
const UNIT_AT: usize = M_AT + 1;
const EXTENT_LEN_AT: usize = UNIT_AT + 4;
const LEN_AT: usize = EXTENT_LEN_AT + 8;
const OWNER_AT: usize = LEN_AT + 8;
const CREATED_AT: usize = OWNER_AT + 4;
const TABLE_AT: usize = CREATED_AT + 8;

/// A segment's random identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SegmentUuid(pub [u8; 16]);

impl fmt::Debug for SegmentUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Bytes that are not what should stand there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// No such thing here: another magic. What empty space looks like.
    #[error("no {0} here")]
    Absent(&'static str),
    /// Written by a newer build; it must not be guessed at.
    #[error("{what} of version {version}; this build knows up to {SEGMENT_VERSION}")]
    Version {
        /// Of what.
        what: &'static str,
        /// The version found.
        version: u16,
    },
    /// The checksum disagrees, or a field has a value nobody writes.
    #[error("damaged {what}: {why}")]
    Damaged {
        /// What is damaged.
        what: &'static str,
        /// In which way.
        why: &'static str,
    },
}

/// Rounds up to a whole page.
pub fn page_up(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES) * PAGE_BYTES
}

/// Length of the header region of a record with this much payload, in bytes.
pub fn header_region_bytes(len_bytes: u64) -> u64 {
    page_up(TABLE_AT as u64 + 4 * block_count(len_bytes) + 4)
}

/// Length of a whole record with this much payload, in bytes.
pub fn record_bytes(len_bytes: u64) -> u64 {
    header_region_bytes(len_bytes) + page_up(len_bytes)
}

/// First page of a segment: which segment of which disk it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Its number, also its file name.
    pub number: u32,
    /// Its random identity.
    pub uuid: SegmentUuid,
    /// The disk it was made on.
    pub disk: DiskUuid,
    /// Length of the file, in bytes.
    pub length_bytes: u64,
}

/// Second page of a segment that takes no more records: all of them were synced before it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// The segment's number.
    pub number: u32,
    /// The segment's identity.
    pub uuid: SegmentUuid,
    /// Where the last record ends.
    pub end: u64,
}

/// Header of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordHeader {
    /// The segment it was written to.
    pub segment: SegmentUuid,
    /// Where in that segment it begins.
    pub offset: u64,
    /// Rises with every record of a disk.
    pub sequence: u64,
    /// The chunk.
    pub id: ChunkId,
    /// What the chunk is part of; its `len_bytes` is the payload.
    pub spec: ChunkSpec,
    /// Seeded CRC-32 of each block.
    pub crcs: Vec<u32>,
}

/// Reads fields out of bytes that may be too short or wrong.
struct Fields<'a>(&'a [u8], &'static str);

impl<'a> Fields<'a> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], FormatError> {
        let short = FormatError::Damaged { what: self.1, why: "cut short" };
        let slice = self.0.get(at..at + N).ok_or(short.clone())?;
        slice.try_into().map_err(|_| short)
    }

    fn u8(&self, at: usize) -> Result<u8, FormatError> {
        self.bytes::<1>(at).map(|[byte]| byte)
    }

    fn u16(&self, at: usize) -> Result<u16, FormatError> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32, FormatError> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, FormatError> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    /// Magic and checksum first, then the version: a version nobody checked means nothing.
    fn check(&self, magic: &[u8; 8], crc_at: usize) -> Result<(), FormatError> {
        if &self.bytes::<8>(0)? != magic {
            return Err(FormatError::Absent(self.1));
        }
        let damaged = |why| FormatError::Damaged { what: self.1, why };
        let covered = self.0.get(..crc_at).ok_or(damaged("cut short"))?;
        if crc32fast::hash(covered) != self.u32(crc_at)? {
            return Err(damaged("checksum"));
        }
        match self.u16(VERSION_AT)? {
            SEGMENT_VERSION => Ok(()),
            version => Err(FormatError::Version { what: self.1, version }),
        }
    }
}

fn begin(magic: &[u8; 8], number: u32, uuid: &SegmentUuid) -> Vec<u8> {
    let mut out = Vec::with_capacity(PAGE_BYTES as usize);
    out.extend_from_slice(magic);
    out.extend_from_slice(&SEGMENT_VERSION.to_be_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&uuid.0);
    out
}

/// Appends the checksum of all so far, then zeros to the next page.
fn close(mut out: Vec<u8>) -> Vec<u8> {
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_be_bytes());
    let whole = page_up(out.len() as u64) as usize;
    out.resize(whole, 0);
    out
}

const SEGMENT_LENGTH_AT: usize = AFTER_UUID + 16;
const SEGMENT_CRC_AT: usize = SEGMENT_LENGTH_AT + 8;
const SEAL_CRC_AT: usize = AFTER_UUID + 8;

impl SegmentHeader {
    /// One page.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = begin(SEGMENT_MAGIC, self.number, &self.uuid);
        out.extend_from_slice(&self.disk.0);
        out.extend_from_slice(&self.length_bytes.to_be_bytes());
        close(out)
    }

    /// Reads it back.
    ///
    /// # Errors
    /// When it is not there, damaged, or of a newer version.
    pub fn decode(page: &[u8]) -> Result<SegmentHeader, FormatError> {
        let fields = Fields(page, "segment header");
        fields.check(SEGMENT_MAGIC, SEGMENT_CRC_AT)?;
        Ok(SegmentHeader {
            number: fields.u32(COUNT_AT)?,
            uuid: SegmentUuid(fields.bytes(UUID_AT)?),
            disk: DiskUuid(fields.bytes(AFTER_UUID)?),
            length_bytes: fields.u64(SEGMENT_LENGTH_AT)?,
        })
    }
}

impl Seal {
    /// One page.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = begin(SEAL_MAGIC, self.number, &self.uuid);
        out.extend_from_slice(&self.end.to_be_bytes());
        close(out)
    }

    /// Reads it back.
    ///
    /// # Errors
    /// When it is not there, damaged, or of a newer version.
    pub fn decode(page: &[u8]) -> Result<Seal, FormatError> {
        let fields = Fields(page, "seal");
        fields.check(SEAL_MAGIC, SEAL_CRC_AT)?;
        Ok(Seal {
            number: fields.u32(COUNT_AT)?,
            uuid: SegmentUuid(fields.bytes(UUID_AT)?),
            end: fields.u64(AFTER_UUID)?,
        })
    }
}

impl RecordHeader {
    /// The whole header region, padded.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert_eq!(self.crcs.len() as u64, block_count(self.spec.len_bytes));
        let mut out = begin(RECORD_MAGIC, self.crcs.len() as u32, &self.segment);
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.sequence.to_be_bytes());
        out.extend_from_slice(&self.id.to_bytes());
        out.extend_from_slice(&[self.spec.codec.number(), self.spec.k, self.spec.m]);
        out.extend_from_slice(&self.spec.unit_bytes.to_be_bytes());
        out.extend_from_slice(&self.spec.extent_len_bytes.to_be_bytes());
        out.extend_from_slice(&self.spec.len_bytes.to_be_bytes());
        out.extend_from_slice(&self.spec.owner.0.to_be_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.spec.created_ms.to_be_bytes());
        debug_assert_eq!(out.len(), TABLE_AT);
        for crc in &self.crcs {
            out.extend_from_slice(&crc.to_be_bytes());
        }
        close(out)
    }

    /// How long the header region that begins with this page is, if the page can begin one. Only says how much to read:
    /// nothing in it was checked yet.
    pub fn region_hint(page: &[u8]) -> Option<u64> {
        let fields = Fields(page, "record header");
        if &fields.bytes::<8>(0).ok()? != RECORD_MAGIC {
            return None;
        }
        let blocks = u64::from(fields.u32(COUNT_AT).ok()?);
        (blocks >= 1 && blocks <= block_count(MAX_CHUNK_BYTES)).then(|| page_up(TABLE_AT as u64 + 4 * blocks + 4))
    }

    /// Reads a header out of its region (or more).
    ///
    /// # Errors
    /// When there is none, or it is damaged. Whether it belongs where it lies is for [`RecordHeader::belongs`].
    pub fn decode(region: &[u8]) -> Result<RecordHeader, FormatError> {
        let fields = Fields(region, "record header");
        if &fields.bytes::<8>(0)? != RECORD_MAGIC {
            return Err(FormatError::Absent("record header"));
        }
        let damaged = |why| FormatError::Damaged { what: "record header", why };
        let blocks = u64::from(fields.u32(COUNT_AT)?);
        if blocks == 0 || blocks > block_count(MAX_CHUNK_BYTES) {
            return Err(damaged("number of blocks"));
        }
        let crc_at = TABLE_AT + 4 * blocks as usize;
        fields.check(RECORD_MAGIC, crc_at)?;
        let spec = ChunkSpec {
            codec: CodecId::from_number(fields.u8(CODEC_AT)?).ok_or(damaged("codec"))?,
            k: fields.u8(K_AT)?,
            m: fields.u8(M_AT)?,
            unit_bytes: fields.u32(UNIT_AT)?,
            extent_len_bytes: fields.u64(EXTENT_LEN_AT)?,
            len_bytes: fields.u64(LEN_AT)?,
            owner: HashSlot(fields.u16(OWNER_AT)?),
            created_ms: fields.u64(CREATED_AT)?,
        };
        if spec.len_bytes == 0 || spec.len_bytes > MAX_CHUNK_BYTES || block_count(spec.len_bytes) != blocks {
            return Err(damaged("payload length"));
        }
        let crcs = (0..blocks as usize).map(|block| fields.u32(TABLE_AT + 4 * block)).collect::<Result<_, _>>()?;
        Ok(RecordHeader {
            segment: SegmentUuid(fields.bytes(UUID_AT)?),
            offset: fields.u64(OFFSET_AT)?,
            sequence: fields.u64(SEQUENCE_AT)?,
            id: ChunkId::from_bytes(&fields.bytes(CHUNK_AT)?),
            spec,
            crcs,
        })
    }

    /// Was it written right here?
    pub fn belongs(&self, segment: &SegmentUuid, offset: u64) -> bool {
        self.segment == *segment && self.offset == offset
    }

    /// Where the payload begins in the segment.
    pub fn payload_at(&self) -> u64 {
        self.offset + header_region_bytes(self.spec.len_bytes)
    }

    /// Where the record ends in the segment.
    pub fn end(&self) -> u64 {
        self.offset + record_bytes(self.spec.len_bytes)
    }
}
