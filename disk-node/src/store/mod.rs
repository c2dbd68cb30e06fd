//! The chunk store of one disk: segments that are only ever appended to, an index that can be rebuilt from them, and
//! holes where deleted chunks were.
//!
//! Reading order:
//! 1. [`format`]: the bytes of a segment;
//! 2. [`device`]: what the store asks of the disk, and what it may rely on; [`file_device`] is the real one;
//! 3. [`index`]: where each chunk lies; [`index_rocksdb`] is its engine in the daemon, [`index_memory`] the one of the
//!    crash tests, which loses what was not flushed;
//! 4. [`core`]: every decision of the one writer: where a record goes, what is synced before what, when space is freed;
//! 5. [`recover`]: what happens at start-up, after a clean stop or a crash;
//! 6. [`read`]: verified reads; [`scrub`]: reads everything now and then; [`writer`]: the thread around the core, its
//!    bounded queue, uploads; [`handle`]: the store as the daemon sees it.
//!
//! **Invariant:** a put is acknowledged only after its record was synced and its index entry written; a deletion only
//! after the index entry's removal was synced; a hole is punched only after that.
//!
//! **Invariant:** bytes of a segment are written once. Space of dead records goes back to the file system, never to
//! another record, so a hole may be punched twice, and old bytes are never taken for a new record.

pub mod core;
pub mod device;
pub mod file_device;
pub mod format;
pub mod handle;
pub mod index;
pub mod index_memory;
pub mod index_rocksdb;
mod open_files;
pub mod read;
pub mod recover;
pub mod scrub;
pub mod shared;
pub mod writer;

use granary_placement::settings::Values;
use std::time::Duration;

const MIB: u64 = 1024 * 1024;

/// Why the store refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such chunk.
    #[error("no such chunk")]
    NotFound,
    /// This block is not what was written (or, on a write, not what the sender meant).
    #[error("block {block} is corrupt")]
    Corrupt {
        /// The first such block.
        block: u32,
    },
    /// No room for new chunks. Reads and deletes work.
    #[error("disk full")]
    DiskFull,
    /// The queue is full; nothing was done.
    #[error("overloaded")]
    Overloaded,
    /// The request makes no sense.
    #[error("rejected: {0}")]
    Rejected(String),
    /// The disk did not give these bytes back. The rest of it may be well.
    #[error("unreadable: {0}")]
    Unreadable(String),
    /// A write, a sync or the index failed. The store answers nothing any more and the process ends.
    #[error("disk failed: {0}")]
    Failed(String),
}

/// Why a store does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A segment was made on another disk.
    #[error("segment {segment} belongs to disk {found}, not to this disk {expected}")]
    Foreign {
        /// Which segment.
        segment: u32,
        /// The disk in its header.
        found: granary_placement::id::DiskUuid,
        /// The disk on the label.
        expected: granary_placement::id::DiskUuid,
    },
    /// A newer build wrote this disk.
    #[error("segment {segment}: {source}")]
    Version {
        /// Which segment.
        segment: u32,
        /// The version.
        source: format::FormatError,
    },
    /// The disk failed.
    #[error("{what}: {source}")]
    Device {
        /// During what.
        what: String,
        /// What it said.
        source: std::io::Error,
    },
    /// The index failed.
    #[error(transparent)]
    Index(#[from] index::IndexError),
}

/// Settings of a store.
#[derive(Debug, Clone, Copy)]
pub struct StoreSettings {
    /// Length of a segment, in bytes. A longer record gets a segment of its own; on a filling disk segments are
    /// shorter.
    pub segment_bytes: u64,
    /// Shortest segment worth making, in bytes.
    pub min_segment_bytes: u64,
    /// Free space that new chunks never take, in bytes: for deletes, the index and the metadata of a full disk.
    pub reserve_bytes: u64,
    /// Free space that metadata do not grow into, in bytes.
    pub meta_reserve_bytes: u64,
    /// Chunks up to this long are handed to the writer whole, in bytes.
    pub whole_bytes: u64,
    /// Longer ones come in pieces of this size, in bytes.
    pub piece_bytes: u64,
    /// Payload waiting for the writer, in bytes.
    pub queue_bytes: u64,
    /// Requests waiting for the writer.
    pub queue_requests: usize,
    /// Threads that read.
    pub read_threads: usize,
    /// Requests waiting for them.
    pub read_queue: usize,
    /// The index is flushed after this much was written, in bytes; bounds what recovery reads.
    pub flush_bytes: u64,
    /// And after this long.
    pub flush_interval: Duration,
    /// Space of dead chunks comes back within about this time.
    pub punch_interval: Duration,
}

impl StoreSettings {
    /// From the settings `node.*`, for a file system of so many bytes.
    pub fn from_settings(values: &Values, capacity_bytes: u64) -> StoreSettings {
        let reserve_bytes =
            values.number_or_auto("node.reserve").unwrap_or_else(|| default_reserve_bytes(capacity_bytes));
        StoreSettings {
            segment_bytes: values.number("node.segment"),
            min_segment_bytes: values.number("node.min_segment"),
            reserve_bytes,
            meta_reserve_bytes: values.number_or_auto("node.meta_reserve").unwrap_or(reserve_bytes / 2),
            whole_bytes: values.number("node.whole"),
            piece_bytes: values.number("node.piece"),
            queue_bytes: values.number("node.queue"),
            queue_requests: values.size("node.queue_requests"),
            read_threads: values.size("node.read_threads"),
            read_queue: values.size("node.read_queue"),
            flush_bytes: values.number("node.flush"),
            flush_interval: values.time("node.flush_interval"),
            punch_interval: values.time("node.punch_interval"),
        }
    }
}

/// For a file system whose size is not known: without a reserve.
impl Default for StoreSettings {
    fn default() -> StoreSettings {
        StoreSettings::from_settings(&Values::default(), 0)
    }
}

/// The reserve unless a setting says otherwise, in bytes: 1 % of the file system, at least 64 MiB and at most 8 GiB,
/// but never more than an eighth of a small one.
pub fn default_reserve_bytes(capacity_bytes: u64) -> u64 {
    (capacity_bytes / 100).clamp(64 * MIB, 8192 * MIB).min(capacity_bytes / 8)
}
