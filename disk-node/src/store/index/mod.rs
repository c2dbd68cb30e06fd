//! The index: where each chunk lies. A cache of the segments with a watermark, which may lose entries: what it lost is
//! read back from the segments, if need be all of it.
//!
//! | key | value |
//! |---|---|
//! | `c` chunk id (25) | where the chunk's record lies and what the chunk is |
//! | `p` segment (4) offset (8) | length (8): a dead piece of a segment whose hole is not yet synced |
//! | `s` segment (4) | what is known of the segment: identity, watermark, state, live records |
//! | `q` chunk id (25) | since when the chunk is in quarantine |
//! | `m` | whose index this is, next sequence and segment number, totals |
//! | `d`, `x` | what the scrub found, and how far it has come: see `index/scrubbed.rs` |
//!
//! Every batch carries the watermarks, counts and totals that follow from it. The engine may lose batches until a
//! flush, but only the newest ones: whatever survives is the state after some batch.

mod scrubbed;

pub use scrubbed::{Finding, Pass, Place, ScrubState};

use super::format::{record_bytes, SegmentUuid};
use granary_placement::id::{DiskUuid, HashSlot};
use granary_placement::scheme::CodecId;
use granary_wire::chunk::{ChunkId, ChunkSpec, CHUNK_ID_BYTES};

/// Why the index could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Its bytes are wrong: it is to be thrown away and rebuilt.
    #[error("index is damaged: {0}")]
    Damaged(String),
    /// The disk failed under it.
    #[error("index: {0}")]
    Io(String),
}

/// Changes, in order, that become visible together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Key, and its new value or None to remove it.
    pub changes: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// The engine under the index.
pub trait Engine: Send + Sync {
    /// The value of a key.
    ///
    /// # Errors
    /// When the engine fails.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError>;

    /// At most `limit` pairs with `from <= key < until`, in order.
    ///
    /// # Errors
    /// When the engine fails.
    fn scan(&self, from: &[u8], until: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError>;

    /// Applies a batch. Until a flush a crash may undo it and all batches after it, never one before it.
    ///
    /// # Errors
    /// When the engine fails; the caller stops for good.
    fn write(&self, batch: Batch) -> Result<(), IndexError>;

    /// Makes all batches durable.
    ///
    /// # Errors
    /// When the engine fails; the caller stops for good.
    fn flush(&self) -> Result<(), IndexError>;

    /// Marks the index as damaged, so that the next start rebuilds it.
    fn mark_damaged(&self);
}

/// Where a chunk's record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Segment.
    pub segment: u32,
    /// Where in it the record begins.
    pub offset: u64,
    /// The record's sequence number.
    pub sequence: u64,
    /// What the chunk is part of.
    pub spec: ChunkSpec,
}

impl Location {
    /// Length of the record, in bytes.
    pub fn record_bytes(&self) -> u64 {
        record_bytes(self.spec.len_bytes)
    }
}

/// Whether a segment takes records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentState {
    /// It does, or did when the process died.
    Open,
    /// No more; all it holds is indexed.
    Sealed,
    /// Nothing in it is alive; the file is to be removed.
    Dead,
}

/// What the index knows of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Its identity.
    pub uuid: SegmentUuid,
    /// Length of the file, in bytes.
    pub length_bytes: u64,
    /// **Invariant:** every record that begins below is committed or abandoned, and the index knows which.
    pub watermark: u64,
    /// Whether it takes records.
    pub state: SegmentState,
    /// Records in it that chunks of the index point to.
    pub live_records: u64,
    /// Bytes of those, headers and padding included.
    pub live_bytes: u64,
}

/// What the index knows of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskInfo {
    /// The disk.
    pub disk: DiskUuid,
    /// The next record's sequence number.
    pub next_sequence: u64,
    /// The next segment's number.
    pub next_segment: u32,
    /// Chunks in the index.
    pub chunks: u64,
    /// Payload of them, in bytes.
    pub chunk_bytes: u64,
}

/// A dead piece of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hole {
    /// Segment.
    pub segment: u32,
    /// Where it begins.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len_bytes: u64,
}

const VERSION: u8 = 1;

/// Writes values; the counterpart of [`ValueReader`].
struct ValueWriter(Vec<u8>);

impl ValueWriter {
    fn new() -> ValueWriter {
        ValueWriter(vec![VERSION])
    }
    fn bytes(mut self, bytes: &[u8]) -> ValueWriter {
        self.0.extend_from_slice(bytes);
        self
    }
    fn u8(self, value: u8) -> ValueWriter {
        self.bytes(&[value])
    }
    fn u16(self, value: u16) -> ValueWriter {
        self.bytes(&value.to_be_bytes())
    }
    fn u32(self, value: u32) -> ValueWriter {
        self.bytes(&value.to_be_bytes())
    }
    fn u64(self, value: u64) -> ValueWriter {
        self.bytes(&value.to_be_bytes())
    }
}

/// Reads values; None when they are too short or of another version.
struct ValueReader<'a>(&'a [u8]);

impl<'a> ValueReader<'a> {
    fn new(value: &'a [u8]) -> Option<ValueReader<'a>> {
        let mut reader = ValueReader(value);
        (reader.u8()? == VERSION).then_some(reader)
    }
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
    fn u8(&mut self) -> Option<u8> {
        self.bytes::<1>().map(|[byte]| byte)
    }
    fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_be_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_be_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_be_bytes)
    }
}

fn chunk_key(id: &ChunkId) -> Vec<u8> {
    let mut key = vec![b'c'];
    key.extend_from_slice(&id.to_bytes());
    key
}

fn hole_key(segment: u32, offset: u64) -> Vec<u8> {
    let mut key = vec![b'p'];
    key.extend_from_slice(&segment.to_be_bytes());
    key.extend_from_slice(&offset.to_be_bytes());
    key
}

fn segment_key(segment: u32) -> Vec<u8> {
    let mut key = vec![b's'];
    key.extend_from_slice(&segment.to_be_bytes());
    key
}

/// When a chunk was put into quarantine.
fn quarantine_key(id: &ChunkId) -> Vec<u8> {
    let mut key = vec![b'q'];
    key.extend_from_slice(&id.to_bytes());
    key
}

const DISK_KEY: &[u8] = b"m";

fn encode_location(at: &Location) -> Vec<u8> {
    let spec = &at.spec;
    ValueWriter::new()
        .u32(at.segment)
        .u64(at.offset)
        .u64(at.sequence)
        .u8(spec.codec.number())
        .u8(spec.k)
        .u8(spec.m)
        .u32(spec.unit_bytes)
        .u64(spec.extent_len_bytes)
        .u64(spec.len_bytes)
        .u16(spec.owner.0)
        .u64(spec.created_ms)
        .0
}

fn decode_location(value: &[u8]) -> Option<Location> {
    let mut reader = ValueReader::new(value)?;
    Some(Location {
        segment: reader.u32()?,
        offset: reader.u64()?,
        sequence: reader.u64()?,
        spec: ChunkSpec {
            codec: CodecId::from_number(reader.u8()?)?,
            k: reader.u8()?,
            m: reader.u8()?,
            unit_bytes: reader.u32()?,
            extent_len_bytes: reader.u64()?,
            len_bytes: reader.u64()?,
            owner: HashSlot(reader.u16()?),
            created_ms: reader.u64()?,
        },
    })
}

fn decode_segment(value: &[u8]) -> Option<SegmentInfo> {
    let mut reader = ValueReader::new(value)?;
    Some(SegmentInfo {
        uuid: SegmentUuid(reader.bytes()?),
        length_bytes: reader.u64()?,
        watermark: reader.u64()?,
        state: match reader.u8()? {
            0 => SegmentState::Open,
            1 => SegmentState::Sealed,
            2 => SegmentState::Dead,
            _ => return None,
        },
        live_records: reader.u64()?,
        live_bytes: reader.u64()?,
    })
}

fn decode_disk(value: &[u8]) -> Option<DiskInfo> {
    let mut reader = ValueReader::new(value)?;
    Some(DiskInfo {
        disk: DiskUuid(reader.bytes()?),
        next_sequence: reader.u64()?,
        next_segment: reader.u32()?,
        chunks: reader.u64()?,
        chunk_bytes: reader.u64()?,
    })
}

impl Batch {
    /// The chunk lies there now.
    pub fn put_chunk(&mut self, id: &ChunkId, at: &Location) {
        self.changes.push((chunk_key(id), Some(encode_location(at))));
    }

    /// The chunk is gone.
    pub fn remove_chunk(&mut self, id: &ChunkId) {
        self.changes.push((chunk_key(id), None));
        self.changes.push((quarantine_key(id), None));
    }

    /// The chunk is in quarantine since then, in milliseconds since 1970.
    pub fn put_quarantine(&mut self, id: &ChunkId, since_ms: u64) {
        self.changes.push((quarantine_key(id), Some(ValueWriter::new().u64(since_ms).0)));
    }

    /// The chunk is out of quarantine.
    pub fn remove_quarantine(&mut self, id: &ChunkId) {
        self.changes.push((quarantine_key(id), None));
    }

    /// This piece is dead; its hole is to be punched.
    pub fn put_hole(&mut self, hole: &Hole) {
        self.changes.push((hole_key(hole.segment, hole.offset), Some(ValueWriter::new().u64(hole.len_bytes).0)));
    }

    /// Its hole is punched and synced.
    pub fn remove_hole(&mut self, hole: &Hole) {
        self.changes.push((hole_key(hole.segment, hole.offset), None));
    }

    /// What is known of a segment.
    pub fn put_segment(&mut self, number: u32, info: &SegmentInfo) {
        let state = match info.state {
            SegmentState::Open => 0,
            SegmentState::Sealed => 1,
            SegmentState::Dead => 2,
        };
        let value = ValueWriter::new().bytes(&info.uuid.0).u64(info.length_bytes).u64(info.watermark).u8(state);
        self.changes.push((segment_key(number), Some(value.u64(info.live_records).u64(info.live_bytes).0)));
    }

    /// The segment's file is removed, and the folder synced.
    pub fn remove_segment(&mut self, number: u32) {
        self.changes.push((segment_key(number), None));
    }

    /// What is known of the disk.
    pub fn put_disk(&mut self, info: &DiskInfo) {
        let value = ValueWriter::new()
            .bytes(&info.disk.0)
            .u64(info.next_sequence)
            .u32(info.next_segment)
            .u64(info.chunks)
            .u64(info.chunk_bytes);
        self.changes.push((DISK_KEY.to_vec(), Some(value.0)));
    }

    /// True when it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

/// The index: chunks, segments and holes, as keys and values of an engine.
pub struct Index {
    engine: Box<dyn Engine>,
}

fn damaged(what: &str) -> IndexError {
    IndexError::Damaged(format!("value of a {what} entry cannot be read"))
}

/// Pairs fetched at a time by the walks below.
const PAGE: usize = 1000;

impl Index {
    /// Over an engine.
    pub fn new(engine: Box<dyn Engine>) -> Index {
        Index { engine }
    }

    /// Where a chunk lies.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn chunk(&self, id: &ChunkId) -> Result<Option<Location>, IndexError> {
        match self.engine.get(&chunk_key(id))? {
            None => Ok(None),
            Some(value) => decode_location(&value).map(Some).ok_or_else(|| damaged("chunk")),
        }
    }

    /// Chunks in order of their ids, after that one, at most `limit`.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn chunks(&self, after: Option<&ChunkId>, limit: usize) -> Result<Vec<(ChunkId, Location)>, IndexError> {
        let mut from = after.map_or_else(|| vec![b'c'], chunk_key);
        if after.is_some() {
            from.push(0);
        }
        let pairs = self.engine.scan(&from, b"d", limit)?;
        pairs
            .into_iter()
            .map(|(key, value)| {
                let id: Option<&[u8; CHUNK_ID_BYTES]> = key.get(1..).and_then(|id| id.try_into().ok());
                Some((ChunkId::from_bytes(id?), decode_location(&value)?))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| damaged("chunk"))
    }

    /// Since when a chunk is in quarantine, in milliseconds since 1970.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn quarantined_ms(&self, id: &ChunkId) -> Result<Option<u64>, IndexError> {
        let Some(value) = self.engine.get(&quarantine_key(id))? else { return Ok(None) };
        let since = ValueReader::new(&value).and_then(|mut reader| reader.u64());
        since.map(Some).ok_or_else(|| damaged("quarantine"))
    }

    fn walk(&self, prefix: u8, mut each: impl FnMut(&[u8], &[u8]) -> Option<()>) -> Result<(), IndexError> {
        let mut from = vec![prefix];
        loop {
            let pairs = self.engine.scan(&from, &[prefix + 1], PAGE)?;
            for (key, value) in &pairs {
                each(key.get(1..).unwrap_or_default(), value).ok_or_else(|| damaged("housekeeping"))?;
            }
            match pairs.into_iter().nth(PAGE - 1) {
                None => return Ok(()),
                Some((last, _)) => {
                    from = last;
                    from.push(0);
                }
            }
        }
    }

    /// All holes whose punching is not known to be synced.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn holes(&self) -> Result<Vec<Hole>, IndexError> {
        let mut holes = Vec::new();
        self.walk(b'p', |key, value| {
            let (segment, offset) = key.split_first_chunk::<4>()?;
            holes.push(Hole {
                segment: u32::from_be_bytes(*segment),
                offset: u64::from_be_bytes(offset.try_into().ok()?),
                len_bytes: ValueReader::new(value)?.u64()?,
            });
            Some(())
        })?;
        Ok(holes)
    }

    /// All segments.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn segments(&self) -> Result<Vec<(u32, SegmentInfo)>, IndexError> {
        let mut segments = Vec::new();
        self.walk(b's', |key, value| {
            segments.push((u32::from_be_bytes(key.try_into().ok()?), decode_segment(value)?));
            Some(())
        })?;
        Ok(segments)
    }

    /// What is known of the disk; None when the index is new, or was being rebuilt when the process died.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn disk(&self) -> Result<Option<DiskInfo>, IndexError> {
        match self.engine.get(DISK_KEY)? {
            None => Ok(None),
            Some(value) => decode_disk(&value).map(Some).ok_or_else(|| damaged("disk")),
        }
    }

    /// Removes everything, before a rebuild.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn clear(&self) -> Result<(), IndexError> {
        loop {
            let pairs = self.engine.scan(&[], &[0xff], PAGE)?;
            if pairs.is_empty() {
                return Ok(());
            }
            self.engine.write(Batch { changes: pairs.into_iter().map(|(key, _)| (key, None)).collect() })?;
        }
    }

    /// See [`Engine::write`].
    ///
    /// # Errors
    /// When the engine fails; the caller stops for good.
    pub fn write(&self, batch: Batch) -> Result<(), IndexError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.engine.write(batch)
    }

    /// See [`Engine::flush`].
    ///
    /// # Errors
    /// When the engine fails; the caller stops for good.
    pub fn flush(&self) -> Result<(), IndexError> {
        self.engine.flush()
    }

    /// See [`Engine::mark_damaged`].
    pub fn mark_damaged(&self) {
        self.engine.mark_damaged();
    }
}
