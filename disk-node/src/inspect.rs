//! `inspect`: reads a disk that no process serves, with the format code of the daemon and without its index. Writes
//! nothing.

use crate::label::{self, Label, LabelError};
use crate::store::device::{Device, SegmentFile};
use crate::store::file_device::FileDevice;
use crate::store::format::{RecordHeader, Seal, SegmentHeader, SegmentUuid, PAGE_BYTES, RECORDS_AT, SEAL_AT};
use crate::store::index::{SegmentInfo, SegmentState};
use crate::store::read::{verify_payload, BadPayload};
use crate::store::recover::Scan;
use serde::Serialize;
use std::io;
use std::path::Path;

/// Why a disk cannot be inspected.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It is no disk, or in use.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// The folder of segments cannot be read.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A record as it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordReport {
    /// Where in its segment, in bytes.
    pub offset: u64,
    /// Its sequence number.
    pub sequence: u64,
    /// The chunk, 50 hex digits.
    pub chunk: String,
    /// Payload, in bytes.
    pub len_bytes: u64,
    /// Codec, K+M and shard that owns the extent.
    pub codec: u8,
    /// K.
    pub k: u8,
    /// M.
    pub m: u8,
    /// Owner shard.
    pub owner: u16,
    /// Number of the first bad block; none when good, or not verified.
    pub bad_block: Option<u32>,
}

/// A segment as it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SegmentReport {
    /// Its number.
    pub number: u32,
    /// Its UUID, hex; empty when unknown.
    pub uuid: String,
    /// Length of the file, in bytes.
    pub length_bytes: u64,
    /// Whether it takes no more records. The tail of one that is not sealed may hold torn records after a crash.
    pub sealed: bool,
    /// What is wrong with its header, if anything.
    pub header_damage: Option<String>,
    /// Whole records.
    pub records: u64,
    /// Their payload, in bytes.
    pub payload_bytes: u64,
    /// Pages that begin like a record header and are none. Damage in a sealed segment, a torn write otherwise.
    pub bad_headers: u64,
    /// Records with a block that is not what was written (with `--verify`).
    pub bad_records: u64,
    /// Pages the disk does not give back.
    pub unreadable_pages: u64,
    /// Each record, when asked for, and bad ones always.
    pub details: Vec<RecordReport>,
}

impl SegmentReport {
    /// Is anything wrong that no crash explains?
    pub fn damaged(&self) -> bool {
        let torn = self.bad_headers + self.bad_records;
        self.header_damage.is_some() || self.unreadable_pages > 0 || (self.sealed && torn > 0)
    }
}

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskReport {
    /// Its label.
    pub label: Label,
    /// Its segments, by number.
    pub segments: Vec<SegmentReport>,
    /// Were payloads read and checked?
    pub verified: bool,
    /// Is anything wrong?
    pub damaged: bool,
}

/// Reads a disk. `chunks` lists every record, `verify` reads and checks every block.
///
/// # Errors
/// [`InspectError`]; damage is in the report.
pub fn inspect(dir: &Path, chunks: bool, verify: bool) -> Result<DiskReport, InspectError> {
    let label = label::read(dir)?;
    let _lock = label::lock_for_reading(dir)?;
    let folder = dir.join("segments");
    let device = FileDevice::open_read_only(&folder);
    let mut numbers = match device.list() {
        Ok(numbers) => numbers,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(InspectError::Io { what: folder.display().to_string(), source }),
    };
    numbers.sort_unstable();
    let mut segments = Vec::with_capacity(numbers.len());
    for number in numbers {
        let open = || -> io::Result<_> {
            let file = device.open(number)?;
            let length = file.length()?;
            Ok((file, length))
        };
        let (file, length) =
            open().map_err(|source| InspectError::Io { what: device.path(number).display().to_string(), source })?;
        segments.push(segment(number, &*file, length, &label, chunks, verify));
    }
    let damaged = segments.iter().any(SegmentReport::damaged);
    Ok(DiskReport { label, segments, verified: verify, damaged })
}

fn segment(
    number: u32,
    file: &dyn SegmentFile,
    length: u64,
    label: &Label,
    chunks: bool,
    verify: bool,
) -> SegmentReport {
    let mut page = Vec::new();
    let header = file.pread(0, PAGE_BYTES as usize, &mut page).map_err(|error| error.to_string());
    let header = header.and_then(|()| SegmentHeader::decode(&page).map_err(|error| error.to_string()));
    let header = header.and_then(|header| match header {
        header if header.number != number => Err(format!("says it is segment {}", header.number)),
        header if header.disk != label.uuid => Err(format!("belongs to disk {}", header.disk)),
        header => Ok(header),
    });
    let sealed = file.pread(SEAL_AT, PAGE_BYTES as usize, &mut page).is_ok() && Seal::decode(&page).is_ok();
    let uuid = header.as_ref().ok().map(|header| header.uuid);
    // Born and never written to, when the power went: no damage, and the next start removes it.
    let unborn = length == 0 || (header.is_err() && !sealed && empty(file, length));
    let mut report = SegmentReport {
        number,
        uuid: uuid.map(|uuid| hex::encode(uuid.0)).unwrap_or_default(),
        length_bytes: length,
        sealed,
        header_damage: header.err().filter(|_| !unborn),
        records: 0,
        payload_bytes: 0,
        bad_headers: 0,
        bad_records: 0,
        unreadable_pages: 0,
        details: Vec::new(),
    };
    let mut scan = Scan { number, file, at: RECORDS_AT, end: length, damage: 0 };
    let mut from = RECORDS_AT;
    // Without a header of its own the first record tells which segment this is.
    let mut identity = uuid;
    while let Some(record) = next(&mut scan, &mut identity, length) {
        report.bad_headers += bad_headers(file, from, record.offset);
        report.records += 1;
        report.payload_bytes += record.spec.len_bytes;
        let bad_block = if verify { verify_payload(file, &record).err().map(BadPayload::block) } else { None };
        report.bad_records += u64::from(bad_block.is_some());
        if chunks || bad_block.is_some() {
            report.details.push(describe(&record, bad_block));
        }
        scan.at = record.end();
        from = record.end();
    }
    report.bad_headers += bad_headers(file, from, length);
    report.unreadable_pages = scan.damage;
    report
}

fn next(scan: &mut Scan<'_>, identity: &mut Option<SegmentUuid>, length_bytes: u64) -> Option<RecordHeader> {
    match identity {
        Some(uuid) => {
            let info = SegmentInfo {
                uuid: *uuid,
                length_bytes,
                watermark: RECORDS_AT,
                state: SegmentState::Open,
                live_records: 0,
                live_bytes: 0,
            };
            scan.next(&info)
        }
        None => {
            let record = scan.next_of_any()?;
            *identity = Some(record.segment);
            Some(record)
        }
    }
}

/// Pages between two places that begin like a record header. What lies there is no record, or it would have been found.
fn bad_headers(file: &dyn SegmentFile, from: u64, until: u64) -> u64 {
    let mut page = Vec::new();
    let pages = (from..until).step_by(PAGE_BYTES as usize);
    pages
        .filter(|at| {
            file.pread(*at, PAGE_BYTES as usize, &mut page).is_ok() && RecordHeader::region_hint(&page).is_some()
        })
        .count() as u64
}

fn empty(file: &dyn SegmentFile, length: u64) -> bool {
    let mut page = Vec::new();
    (RECORDS_AT..length).step_by(PAGE_BYTES as usize).all(|at| {
        file.pread(at, PAGE_BYTES.min(length - at) as usize, &mut page).is_ok() && page.iter().all(|byte| *byte == 0)
    })
}

fn describe(record: &RecordHeader, bad_block: Option<u32>) -> RecordReport {
    RecordReport {
        offset: record.offset,
        sequence: record.sequence,
        chunk: record.id.to_string(),
        len_bytes: record.spec.len_bytes,
        codec: record.spec.codec.number(),
        k: record.spec.k,
        m: record.spec.m,
        owner: record.spec.owner.0,
        bad_block,
    }
}

impl DiskReport {
    /// For people.
    pub fn text(&self) -> String {
        let mut out = format!(
            "disk {} ({}) of cluster {}, formatted {} ms after 1970\n",
            self.label.disk, self.label.uuid, self.label.cluster, self.label.created_ms
        );
        for segment in &self.segments {
            out += &format!(
                "segment {:08}  {}  {} bytes  {} records  {} bytes of payload",
                segment.number,
                if segment.sealed { "sealed" } else { "open  " },
                segment.length_bytes,
                segment.records,
                segment.payload_bytes
            );
            for (count, what) in [
                (segment.bad_headers, "pages that begin like a record and are none"),
                (segment.bad_records, "records with a bad block"),
                (segment.unreadable_pages, "unreadable pages"),
            ] {
                if count > 0 {
                    out += &format!("  {count} {what}");
                }
            }
            if let Some(damage) = &segment.header_damage {
                out += &format!("  header: {damage}");
            }
            out.push('\n');
            for record in &segment.details {
                let state = record.bad_block.map_or(String::new(), |block| format!("  block {block} is bad"));
                out += &format!(
                    "  {:>10}  sequence {}  chunk {}  {} bytes  {}+{}  shard {}{state}\n",
                    record.offset, record.sequence, record.chunk, record.len_bytes, record.k, record.m, record.owner
                );
            }
        }
        let checked =
            if self.verified { "every block was read" } else { "payloads were not read (--verify reads them)" };
        out += &format!("{}; {checked}\n", if self.damaged { "DAMAGED" } else { "no damage found" });
        out
    }
}
