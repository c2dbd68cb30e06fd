//! The index engine of the daemon. The only file that knows RocksDB.
//!
//! Its write-ahead log is off: the segments are the log. Batches live in the memtable until a flush, and a crash
//! forgets the newest of them, never one in the middle: there is one column family, and memtables are flushed in order.

use super::index::{Batch, Engine, IndexError, Pair};
use rocksdb::{
    BlockBasedOptions, Cache, Direction, ErrorKind, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions, DB,
};
use std::path::{Path, PathBuf};

const WRITE_BUFFER_BYTES: usize = 8 * 1024 * 1024;
const WRITE_BUFFERS: i32 = 3;
const BLOCK_CACHE_BYTES: usize = 32 * 1024 * 1024;
const OPEN_FILES: i32 = 256;
const BLOOM_BITS: f64 = 10.0;

/// RocksDB in a folder of its own.
pub struct RocksEngine {
    db: DB,
    write: WriteOptions,
    rebuild_mark: PathBuf,
}

fn error(error: rocksdb::Error) -> IndexError {
    match error.kind() {
        ErrorKind::Corruption => IndexError::Damaged(error.into_string()),
        _ => IndexError::Io(error.into_string()),
    }
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    table.set_bloom_filter(BLOOM_BITS, false);
    // Filters and index blocks count against the cache too: memory stays bounded however many chunks the disk holds.
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(WRITE_BUFFERS);
    options.set_max_open_files(OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_paranoid_checks(true);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1024 * 1024);
    options
}

impl RocksEngine {
    /// Opens the index in `folder`. A damaged one, or one marked for a rebuild, is moved aside (the last such copy is
    /// kept for study) and an empty one is made: an index without a disk entry is rebuilt by recovery.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn open(folder: &Path) -> Result<RocksEngine, IndexError> {
        let rebuild_mark = folder.with_extension("rebuild");
        if rebuild_mark.exists() {
            tracing::error!(folder = %folder.display(), "the index was found damaged while in use; it will be rebuilt from the segments");
            RocksEngine::set_aside(folder)?;
            std::fs::remove_file(&rebuild_mark).map_err(|error| IndexError::Io(error.to_string()))?;
        }
        let db = match DB::open(&options(), folder) {
            Ok(db) => db,
            Err(reason) if RocksEngine::is_lost(&reason) => {
                tracing::error!(folder = %folder.display(), %reason, "the index cannot be opened; it will be rebuilt from the segments");
                RocksEngine::set_aside(folder)?;
                DB::open(&options(), folder).map_err(error)?
            }
            Err(reason) => return Err(error(reason)),
        };
        let mut write = WriteOptions::default();
        write.disable_wal(true);
        Ok(RocksEngine { db, write, rebuild_mark })
    }

    /// True when its files are wrong or missing; false when the disk cannot be read at the moment.
    fn is_lost(reason: &rocksdb::Error) -> bool {
        let text = reason.to_string();
        matches!(reason.kind(), ErrorKind::Corruption | ErrorKind::InvalidArgument)
            || (reason.kind() == ErrorKind::IOError && text.contains("No such file or directory"))
    }

    fn set_aside(folder: &Path) -> Result<(), IndexError> {
        let io = |error: std::io::Error| IndexError::Io(error.to_string());
        let aside = folder.with_extension("damaged");
        if aside.exists() {
            std::fs::remove_dir_all(&aside).map_err(io)?;
        }
        if folder.exists() {
            std::fs::rename(folder, &aside).map_err(io)?;
        }
        match folder.parent() {
            Some(parent) => super::file_device::sync_folder(parent).map_err(io),
            None => Ok(()),
        }
    }
}

impl Engine for RocksEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.db.get(key).map_err(error)
    }

    fn scan(&self, from: &[u8], until: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        let mut read = ReadOptions::default();
        read.set_iterate_upper_bound(until.to_vec());
        let pairs = self.db.iterator_opt(IteratorMode::From(from, Direction::Forward), read);
        pairs
            .take(limit)
            .map(|pair| pair.map(|(key, value)| (key.into_vec(), value.into_vec())).map_err(error))
            .collect()
    }

    fn write(&self, batch: Batch) -> Result<(), IndexError> {
        let mut changes = WriteBatch::default();
        for (key, value) in batch.changes {
            match value {
                Some(value) => changes.put(key, value),
                None => changes.delete(key),
            }
        }
        self.db.write_opt(changes, &self.write).map_err(error)
    }

    fn flush(&self) -> Result<(), IndexError> {
        self.db.flush().map_err(error)
    }

    fn mark_damaged(&self) {
        // The disk may be failing, so this may not work: then the next start finds the damage by itself.
        if let Err(reason) = std::fs::write(&self.rebuild_mark, b"") {
            tracing::error!(%reason, "cannot mark the index as damaged");
        }
    }
}
