//! What the writer and the readers of one store share: the device, the index, bounded caches, and the failure that ends
//! the store.

use super::device::Device;
use super::format::RecordHeader;
use super::index::{Index, IndexError};
use super::open_files::OpenFiles;
use super::{StoreError, StoreSettings};
use crate::metrics::Metrics;
use granary_placement::id::DiskUuid;
use granary_wire::chunk::ChunkId;
use quick_cache::sync::Cache;
use quick_cache::Weighter;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Called once, with the reason, when the store has failed.
pub type OnFatal = Arc<dyn Fn(&str) + Send + Sync>;

/// State shared by all parts of a store.
pub struct Shared {
    /// The disk.
    pub device: Arc<dyn Device>,
    /// Where chunks lie.
    pub index: Index,
    /// The disk's UUID; segments carry it.
    pub disk: DiskUuid,
    /// Settings.
    pub settings: StoreSettings,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Chunks in the index.
    pub chunks: AtomicU64,
    /// Their payload, in bytes.
    pub chunk_bytes: AtomicU64,
    /// Room left in the segment being filled, in bytes.
    pub open_bytes: AtomicU64,
    /// The same for repairs, which may use a segment that clients may not.
    pub open_repair_bytes: AtomicU64,
    /// Headers by chunk and sequence number of the record.
    pub(super) headers: Cache<(ChunkId, u64), Arc<RecordHeader>, HeaderWeight>,
    pub(super) buffers: Arc<BufferPool>,
    /// Its segment files.
    pub(super) files: OpenFiles,
    /// How many chunks the scrub has found damaged; held while their list is changed.
    pub(super) findings: Mutex<u64>,
    failed: OnceLock<String>,
    on_fatal: OnFatal,
}

/// Memory of cached headers, in bytes.
const HEADER_CACHE_BYTES: u64 = 16 * 1024 * 1024;
/// About how many headers that is, when chunks are long; the cache remembers half as many that it dropped.
const HEADERS_EXPECTED: usize = 16 * 1024;
/// Read buffers kept for the next read.
const POOLED_BUFFERS: usize = 16;

impl Shared {
    /// Shared state over a device and an index; nothing is read yet.
    pub fn new(
        device: Arc<dyn Device>,
        index: Index,
        disk: DiskUuid,
        settings: StoreSettings,
        metrics: Arc<Metrics>,
        on_fatal: OnFatal,
    ) -> Shared {
        let files = OpenFiles::new(device.clone());
        Shared {
            device,
            index,
            disk,
            settings,
            metrics,
            chunks: AtomicU64::new(0),
            chunk_bytes: AtomicU64::new(0),
            open_bytes: AtomicU64::new(0),
            open_repair_bytes: AtomicU64::new(0),
            headers: Cache::with_weighter(HEADERS_EXPECTED, HEADER_CACHE_BYTES, HeaderWeight),
            buffers: Arc::new(BufferPool::default()),
            files,
            findings: Mutex::new(0),
            failed: OnceLock::new(),
            on_fatal,
        }
    }

    /// Refuses every request once the store has failed.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn check_running(&self) -> Result<(), StoreError> {
        match self.failed.get() {
            None => Ok(()),
            Some(reason) => Err(StoreError::Failed(reason.clone())),
        }
    }

    /// Ends the store, and calls `on_fatal` the first time. Gives the error of the first reason.
    pub fn fail(&self, reason: String) -> StoreError {
        let mut first = false;
        let reason = self.failed.get_or_init(|| {
            first = true;
            reason
        });
        if first {
            (self.on_fatal)(reason);
        }
        StoreError::Failed(reason.clone())
    }

    /// An index error ends the store; a damaged index is marked, so that the next start rebuilds it.
    pub fn fail_index(&self, error: &IndexError) -> StoreError {
        if matches!(error, IndexError::Damaged(_)) {
            self.index.mark_damaged();
        }
        self.fail(error.to_string())
    }
}

/// Weighs a cached header by its memory, in bytes: its fields, and four for the checksum of each block.
#[derive(Clone)]
pub(super) struct HeaderWeight;

impl Weighter<(ChunkId, u64), Arc<RecordHeader>> for HeaderWeight {
    fn weight(&self, _: &(ChunkId, u64), header: &Arc<RecordHeader>) -> u64 {
        256 + 4 * header.crcs.len() as u64
    }
}

/// A panic elsewhere leaves nothing half done behind these locks.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Read buffers that come back when the last slice of them is sent. Saves the kernel from mapping and zeroing megabytes
/// for each read.
#[derive(Default)]
pub struct BufferPool(Mutex<Vec<Vec<u8>>>);

/// A buffer on loan.
pub struct PooledBuffer {
    /// Its bytes.
    pub bytes: Vec<u8>,
    pool: Arc<BufferPool>,
}

impl BufferPool {
    /// An empty buffer, if possible one that was used before.
    pub fn take(self: &Arc<Self>) -> PooledBuffer {
        PooledBuffer { bytes: lock(&self.0).pop().unwrap_or_default(), pool: self.clone() }
    }
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let mut free = lock(&self.pool.0);
        if free.len() < POOLED_BUFFERS {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}
