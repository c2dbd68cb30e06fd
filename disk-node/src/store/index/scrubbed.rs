//! What the index keeps for the scrub: how far it has come, and which chunks it found damaged.
//!
//! | key | value |
//! |---|---|
//! | `d` chunk id (25) | sequence (8) of the record that is damaged, and when that was found (8) |
//! | `x` | the pass under way (56), the last whole one (56), the place of the record read last (12), CRC-32 of all before (4) |
//!
//! A pass is its number, when it began, when it ended (zero: not yet), the first sequence number that it leaves to the
//! next one, payload and headers read in bytes, chunks read, and chunks found damaged: seven numbers of 8 bytes. One
//! with the number zero is none.
//!
//! None of it has to be kept: what is lost is found again by the next pass.

use super::{damaged, Batch, Index, IndexError, ValueReader, ValueWriter};
use granary_wire::chunk::{ChunkId, CHUNK_ID_BYTES};

const STATE_KEY: &[u8] = b"x";

/// Where a record lies. Passes go from place to place in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Place {
    /// Segment.
    pub segment: u32,
    /// Where in it the record begins. Zero is before all records.
    pub offset: u64,
}

/// One pass over all chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    /// Its number, from one on.
    pub number: u64,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// When it came to its end, in milliseconds since 1970; zero while it is under way.
    pub ended_ms: u64,
    /// Records with this sequence number and higher ones are younger than the pass: the next one reads them.
    pub until_sequence: u64,
    /// Headers and payload that were read, in bytes.
    pub bytes: u64,
    /// Chunks that were read.
    pub chunks: u64,
    /// Of these, how many are damaged.
    pub findings: u64,
}

/// How far the scrub has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubState {
    /// The pass under way.
    pub current: Option<Pass>,
    /// The last one that came to its end.
    pub last: Option<Pass>,
    /// All records up to here were read in the pass under way.
    pub cursor: Place,
}

/// A record that is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// Its sequence number: another record of the chunk is another matter.
    pub sequence: u64,
    /// When it was found, in milliseconds since 1970.
    pub found_ms: u64,
}

fn finding_key(id: &ChunkId) -> Vec<u8> {
    let mut key = vec![b'd'];
    key.extend_from_slice(&id.to_bytes());
    key
}

impl Pass {
    fn write(self, value: ValueWriter) -> ValueWriter {
        let Pass { number, started_ms, ended_ms, until_sequence, bytes, chunks, findings } = self;
        let numbers = [number, started_ms, ended_ms, until_sequence, bytes, chunks, findings];
        numbers.into_iter().fold(value, ValueWriter::u64)
    }

    fn read(reader: &mut ValueReader<'_>) -> Option<Option<Pass>> {
        let pass = Pass {
            number: reader.u64()?,
            started_ms: reader.u64()?,
            ended_ms: reader.u64()?,
            until_sequence: reader.u64()?,
            bytes: reader.u64()?,
            chunks: reader.u64()?,
            findings: reader.u64()?,
        };
        Some((pass.number > 0).then_some(pass))
    }
}

impl ScrubState {
    /// As it is kept.
    pub fn encode(&self) -> Vec<u8> {
        let value = self.current.unwrap_or_default().write(ValueWriter::new());
        let value = self.last.unwrap_or_default().write(value);
        let value = value.u32(self.cursor.segment).u64(self.cursor.offset);
        let crc = crc32fast::hash(&value.0);
        value.u32(crc).0
    }

    /// Reads it back; None when it is damaged or of another version.
    pub fn decode(value: &[u8]) -> Option<ScrubState> {
        let (covered, crc) = value.split_last_chunk::<4>()?;
        let mut reader = ValueReader::new(covered)?;
        let state = ScrubState {
            current: Pass::read(&mut reader)?,
            last: Pass::read(&mut reader)?,
            cursor: Place { segment: reader.u32()?, offset: reader.u64()? },
        };
        (reader.0.is_empty() && crc32fast::hash(covered) == u32::from_be_bytes(*crc)).then_some(state)
    }
}

impl Finding {
    /// As it is kept.
    pub fn encode(&self) -> Vec<u8> {
        ValueWriter::new().u64(self.sequence).u64(self.found_ms).0
    }

    /// Reads it back; None when it is damaged or of another version.
    pub fn decode(value: &[u8]) -> Option<Finding> {
        let mut reader = ValueReader::new(value)?;
        Some(Finding { sequence: reader.u64()?, found_ms: reader.u64()? })
    }
}

impl Batch {
    /// The scrub has come so far.
    pub fn put_scrub_state(&mut self, state: &ScrubState) {
        self.changes.push((STATE_KEY.to_vec(), Some(state.encode())));
    }

    /// A record of this chunk is damaged.
    pub fn put_finding(&mut self, id: &ChunkId, finding: &Finding) {
        self.changes.push((finding_key(id), Some(finding.encode())));
    }

    /// It is not damaged any more, or not there.
    pub fn remove_finding(&mut self, id: &ChunkId) {
        self.changes.push((finding_key(id), None));
    }
}

impl Index {
    /// How far the scrub has come: None when there is no entry, `Some(None)` when it cannot be read.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn scrub_state(&self) -> Result<Option<Option<ScrubState>>, IndexError> {
        Ok(self.engine.get(STATE_KEY)?.map(|value| ScrubState::decode(&value)))
    }

    /// What was found of a chunk.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn finding(&self, id: &ChunkId) -> Result<Option<Finding>, IndexError> {
        let Some(value) = self.engine.get(&finding_key(id))? else { return Ok(None) };
        Finding::decode(&value).map(Some).ok_or_else(|| damaged("finding"))
    }

    /// Findings in order of their chunks' ids, after that one, at most `limit`.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn findings(&self, after: Option<&ChunkId>, limit: usize) -> Result<Vec<(ChunkId, Finding)>, IndexError> {
        let mut from = after.map_or_else(|| vec![b'd'], finding_key);
        if after.is_some() {
            from.push(0);
        }
        let read = |(key, value): (Vec<u8>, Vec<u8>)| {
            let id: Option<&[u8; CHUNK_ID_BYTES]> = key.get(1..).and_then(|id| id.try_into().ok());
            Some((ChunkId::from_bytes(id?), Finding::decode(&value)?))
        };
        let pairs = self.engine.scan(&from, b"e", limit)?;
        pairs.into_iter().map(read).collect::<Option<Vec<_>>>().ok_or_else(|| damaged("finding"))
    }
}
