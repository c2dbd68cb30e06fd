//! The only file that knows RocksDB: the state database and the Raft-log database of one metadata disk.
//!
//! | | state | Raft log |
//! |---|---|---|
//! | write-ahead log | off: the Raft log is it | on, synced by every batch |
//! | after a crash | older, but whole: each batch carries how far it applied, and memtables are flushed in order | as the last sync left it |
//!
//! One column family each, so that a flush is atomic over all shards. **Invariant:** the Raft log is purged only up to
//! what an explicit flush has made durable ([`StateDb::make_durable`]). Any write error ends the process: see
//! [`crate::fatal::Fatal`].

use crate::fatal::Fatal;
use granary_meta::keys::Keys;
use granary_meta::kv::{Cursor, Kv, StateError, Writes};
use granary_placement::id::ShardId;
use rocksdb::{
    BlockBasedOptions, Cache, DBCompressionType, DBRawIterator, DBRecoveryMode, ErrorKind, Options, ReadOptions,
    ReadTier, Snapshot, WriteBatch, WriteOptions, DB,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// No buffer is smaller, in bytes.
const MIN_BUFFER_BYTES: u64 = 256 * 1024;
/// A file of merged data, in bytes.
const FILE_BYTES: u64 = 64 * 1024 * 1024;
/// What is merged at once with what was flushed, in bytes.
const LEVEL_BYTES: u64 = 256 * 1024 * 1024;
/// What is merged at once otherwise, in bytes.
const STEP_BYTES: u64 = 25 * FILE_BYTES;
/// The file that lists the files grows in such pieces, in bytes.
const MANIFEST_PIECE_BYTES: usize = 64 * 1024;
/// Memtable of the state database, in bytes; two of them at most.
const STATE_BUFFER_BYTES: usize = 24 * 1024 * 1024;
/// Block cache of the state database, in bytes.
const STATE_CACHE_BYTES: usize = 64 * 1024 * 1024;
/// Memtable of the Raft log, in bytes.
const LOG_BUFFER_BYTES: usize = 16 * 1024 * 1024;
/// Block cache of the Raft log, in bytes: recent entries are cached above it.
const LOG_CACHE_BYTES: usize = 8 * 1024 * 1024;
/// Most write-ahead log of the Raft log kept before memtables are flushed, in bytes.
const LOG_WAL_BYTES: u64 = 64 * 1024 * 1024;

/// How much the databases hold back before they write it to files, and how much they write before what it replaces
/// goes, in bytes. On a disk with a small reserve it is less, for both must find room there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffers {
    state_bytes: usize,
    log_bytes: usize,
    log_wal_bytes: u64,
    file_bytes: u64,
    level_bytes: u64,
    step_bytes: u64,
}

impl Buffers {
    /// As much as is useful, within this node's share of the reserve: a quarter of it for what is in memory (two
    /// buffers of each at most; the write-ahead log has it as well), a quarter for a step of a merge. 0: no reserve, no
    /// bound.
    pub fn within(reserve_bytes: u64) -> Buffers {
        let share = |most: u64, part: u64| match reserve_bytes {
            0 => most,
            _ => (reserve_bytes / part).clamp(MIN_BUFFER_BYTES, most),
        };
        Buffers {
            state_bytes: share(STATE_BUFFER_BYTES as u64, 16) as usize,
            log_bytes: share(LOG_BUFFER_BYTES as u64, 16) as usize,
            log_wal_bytes: share(LOG_WAL_BYTES, 8),
            file_bytes: share(FILE_BYTES, 16),
            level_bytes: share(LEVEL_BYTES, 8),
            step_bytes: share(STEP_BYTES, 4),
        }
    }

    /// Most that both databases hold in memory, with what the log takes for its next file in advance, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        2 * self.state_bytes as u64 + 4 * self.log_bytes as u64
    }

    /// Most that a database writes in one step of a merge before what it replaces goes, in bytes.
    pub fn step_bytes(&self) -> u64 {
        self.step_bytes
    }
}

impl Default for Buffers {
    fn default() -> Buffers {
        Buffers::within(0)
    }
}

fn database(error: rocksdb::Error) -> StateError {
    StateError::Database(error.into_string())
}

/// Most reads of work that is not to wait, each about a microsecond: what is longer makes room for other tasks as well.
const READS_AT_ONCE: u32 = 1000;

/// May the work wait for the disk? A task that waits holds up the others of its thread, unless it makes room for them,
/// and that costs more than most work does which finds everything in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It ends with [`StateError::WouldWait`] instead.
    Never,
    /// As long as it takes.
    Allowed,
}

impl Wait {
    fn reads(self) -> ReadOptions {
        let mut options = ReadOptions::default();
        if self == Wait::Never {
            options.set_read_tier(ReadTier::BlockCache);
        }
        options
    }

    fn fault(self, error: rocksdb::Error) -> StateError {
        match (self, error.kind()) {
            (Wait::Never, ErrorKind::Incomplete) => StateError::WouldWait,
            _ => database(error),
        }
    }
}

/// A panic elsewhere leaves nothing half done behind these locks.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn common_options(cache_bytes: usize) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(cache_bytes));
    table.set_bloom_filter(10.0, false);
    table.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.create_if_missing(true);
    options.set_paranoid_checks(true);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_max_background_jobs(2);
    options.set_max_open_files(512);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(4 * 1024 * 1024);
    options.set_manifest_preallocation_size(MANIFEST_PIECE_BYTES);
    options
}

impl Buffers {
    fn set(&self, options: &mut Options, buffer_bytes: usize, may_merge: bool) {
        options.set_write_buffer_size(buffer_bytes);
        options.set_max_write_buffer_number(2);
        options.set_target_file_size_base(self.file_bytes);
        options.set_max_bytes_for_level_base(self.level_bytes);
        options.set_max_compaction_bytes(self.step_bytes);
        options.set_disable_auto_compactions(!may_merge);
    }
}

/// Lets a database merge old data by itself, or not.
fn set_merging(db: &DB, by_itself: bool) {
    let off = if by_itself { "false" } else { "true" };
    if let Err(error) = db.set_options(&[("disable_auto_compactions", off)]) {
        tracing::warn!(%error, by_itself, "whether metadata are merged by themselves cannot be changed");
    }
}

/// Bytes of the files of merged and flushed data.
fn file_bytes(db: &DB) -> u64 {
    match db.live_files() {
        Ok(files) => files.iter().map(|file| file.size as u64).sum(),
        Err(error) => {
            tracing::warn!(%error, "files of the metadata cannot be listed");
            u64::MAX
        }
    }
}

fn bounded(end: &[u8], wait: Wait) -> ReadOptions {
    let mut options = wait.reads();
    options.set_iterate_upper_bound(end.to_vec());
    options
}

struct RocksCursor<'a> {
    iterator: DBRawIterator<'a>,
    wait: Wait,
    budget: Option<&'a Budget>,
}

/// Reads that are left to work that is not to wait.
struct Budget(Cell<u32>);

impl Budget {
    fn spend(&self) -> Result<(), StateError> {
        self.0.set(self.0.get().checked_sub(1).ok_or(StateError::WouldWait)?);
        Ok(())
    }
}

impl RocksCursor<'_> {
    /// An iterator that is not valid is at its end, or failed.
    fn check(&self) -> Result<(), StateError> {
        if self.iterator.valid() {
            return self.budget.map_or(Ok(()), Budget::spend);
        }
        self.iterator.status().map_err(|error| self.wait.fault(error))
    }
}

impl Cursor for RocksCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), StateError> {
        self.iterator.seek(key);
        self.check()
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.iterator.item()
    }

    fn next(&mut self) -> Result<(), StateError> {
        if self.iterator.valid() {
            self.iterator.next();
        }
        self.check()
    }
}

/// One moment of the state database.
pub struct StateView<'a> {
    moment: Snapshot<'a>,
    wait: Wait,
}

impl Kv for StateView<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.moment.get_opt(key, self.wait.reads()).map_err(|error| self.wait.fault(error))
    }

    fn cursor<'a>(&'a self, end: &[u8]) -> Box<dyn Cursor + 'a> {
        let iterator = self.moment.raw_iterator_opt(bounded(end, self.wait));
        Box::new(RocksCursor { iterator, wait: self.wait, budget: None })
    }
}

/// The state database as it is at each read. What is not to wait is not to be long either.
pub struct StateNow<'a> {
    db: &'a DB,
    reads: ReadOptions,
    wait: Wait,
    budget: Option<Budget>,
}

impl Kv for StateNow<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.budget.as_ref().map_or(Ok(()), Budget::spend)?;
        self.db.get_opt(key, &self.reads).map_err(|error| self.wait.fault(error))
    }

    fn cursor<'a>(&'a self, end: &[u8]) -> Box<dyn Cursor + 'a> {
        let iterator = self.db.raw_iterator_opt(bounded(end, self.wait));
        Box::new(RocksCursor { iterator, wait: self.wait, budget: self.budget.as_ref() })
    }
}

/// The state of all shards of a disk.
pub struct StateDb {
    db: DB,
    fatal: Fatal,
    /// Index applied by shard, as written (not yet durable).
    applied: Mutex<BTreeMap<ShardId, u64>>,
    /// Index by shard up to which an explicit flush has made the state durable.
    durable: Mutex<BTreeMap<ShardId, u64>>,
    /// One flush at a time; who waits finds its index covered.
    flushing: Mutex<()>,
    /// A merge was ended for a stop: nothing is flushed any more, and that is no failure of the disk.
    ending: AtomicBool,
}

impl Kv for StateDb {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.db.get(key).map_err(database)
    }

    fn cursor<'a>(&'a self, end: &[u8]) -> Box<dyn Cursor + 'a> {
        let iterator = self.db.raw_iterator_opt(bounded(end, Wait::Allowed));
        Box::new(RocksCursor { iterator, wait: Wait::Allowed, budget: None })
    }
}

impl StateDb {
    /// Opens or creates it in `dir`.
    ///
    /// # Errors
    /// [`StateError::Database`], also when the files are damaged.
    pub fn open(dir: &Path, fatal: Fatal) -> Result<StateDb, StateError> {
        StateDb::open_with(dir, fatal, &Buffers::default(), true)
    }

    /// As [`StateDb::open`], with buffers of that size; merges old data `by_itself`, or not: see
    /// [`StateDb::set_merging`].
    ///
    /// # Errors
    /// As there.
    pub fn open_with(dir: &Path, fatal: Fatal, buffers: &Buffers, by_itself: bool) -> Result<StateDb, StateError> {
        let mut options = common_options(STATE_CACHE_BYTES);
        buffers.set(&mut options, buffers.state_bytes, by_itself);
        options.set_atomic_flush(true);
        let db = DB::open(&options, dir).map_err(database)?;
        Ok(StateDb {
            db,
            fatal,
            applied: Mutex::default(),
            durable: Mutex::default(),
            flushing: Mutex::default(),
            ending: AtomicBool::new(false),
        })
    }

    /// One consistent moment.
    pub fn view(&self) -> StateView<'_> {
        self.view_by(Wait::Allowed)
    }

    /// One consistent moment, from memory only if `wait` says so.
    pub fn view_by(&self, wait: Wait) -> StateView<'_> {
        StateView { moment: self.db.snapshot(), wait }
    }

    /// What it holds now, from memory only if `wait` says so.
    pub fn now(&self, wait: Wait) -> StateNow<'_> {
        let budget = (wait == Wait::Never).then(|| Budget(Cell::new(READS_AT_ONCE)));
        StateNow { db: &self.db, reads: wait.reads(), wait, budget }
    }

    /// Writes a batch of a shard that carries its state to log index `applied`. Atomic, not yet durable.
    ///
    /// # Errors
    /// [`StateError::Database`]; the process is ending then.
    pub fn write(&self, shard: ShardId, writes: Writes, applied: Option<u64>) -> Result<(), StateError> {
        self.write_by(Wait::Allowed, shard, writes, applied)
    }

    /// As [`StateDb::write`], but when buffers are full and it may not wait, nothing is written.
    ///
    /// # Errors
    /// As there, and [`StateError::WouldWait`].
    pub fn write_by(&self, wait: Wait, shard: ShardId, writes: Writes, applied: Option<u64>) -> Result<(), StateError> {
        let mut batch = WriteBatch::default();
        for (key, value) in &writes {
            match value {
                Some(value) => batch.put(key, value),
                None => batch.delete(key),
            }
        }
        self.commit(batch, wait)?;
        if let Some(applied) = applied {
            lock(&self.applied).insert(shard, applied);
        }
        Ok(())
    }

    /// Deletes everything of a shard.
    ///
    /// # Errors
    /// [`StateError::Database`]; the process is ending then.
    pub fn clear(&self, shard: ShardId) -> Result<(), StateError> {
        let range = Keys::new(shard).shard_range();
        let mut batch = WriteBatch::default();
        batch.delete_range(range.from, range.to);
        lock(&self.applied).remove(&shard);
        lock(&self.durable).remove(&shard);
        self.commit(batch, Wait::Allowed)
    }

    fn commit(&self, batch: WriteBatch, wait: Wait) -> Result<(), StateError> {
        self.fatal.check().map_err(StateError::Database)?;
        let _whole = self.fatal.at_a_panic("writing metadata state");
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        options.set_no_slowdown(wait == Wait::Never);
        self.db.write_opt(batch, &options).map_err(|error| {
            let error = wait.fault(error);
            if error != StateError::WouldWait {
                self.fatal.raise(format!("writing metadata state: {error}"));
            }
            error
        })
    }

    /// Ends a merge that is under way. Nothing is flushed afterwards: only for a stop.
    pub fn end_merging(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.db.cancel_all_background_work(false);
    }

    /// Merges old data, so that what was deleted gives its space back. Blocks, for long; needs room for a
    /// step: see [`Buffers::step_bytes`].
    pub fn merge(&self) {
        self.db.compact_range(None::<&[u8]>, None::<&[u8]>);
    }

    /// Bytes of its files.
    pub fn file_bytes(&self) -> u64 {
        file_bytes(&self.db)
    }

    /// Lets it merge old data by itself, or only by [`StateDb::merge`].
    pub fn set_merging(&self, by_itself: bool) {
        set_merging(&self.db, by_itself);
    }

    /// Tells what a shard found applied when it was opened. The first time it was read from disk, so it is durable; a
    /// replica that is opened again finds what it wrote before, flushed or not.
    pub fn opened_at(&self, shard: ShardId, applied: u64) {
        if lock(&self.applied).insert(shard, applied).is_none() {
            lock(&self.durable).insert(shard, applied);
        }
    }

    /// Makes the state of a shard durable up to `index`, which it has applied: by an explicit flush, unless one covered
    /// it already. A shard that never applied anything has nothing to make durable. Blocks.
    ///
    /// # Errors
    /// [`StateError::Database`]; the process is ending then.
    pub fn make_durable(&self, shard: ShardId, index: u64) -> Result<(), StateError> {
        let covered = |state: &StateDb| {
            lock(&state.durable).get(&shard).is_some_and(|durable| *durable >= index)
                || !lock(&state.applied).contains_key(&shard)
        };
        if covered(self) {
            return Ok(());
        }
        let _one = lock(&self.flushing);
        if covered(self) {
            return Ok(());
        }
        self.flush()?;
        if covered(self) {
            return Ok(());
        }
        Err(StateError::Database(format!("shard {shard} has not applied index {index}")))
    }

    /// Flushes all shards. What was applied before it begins is durable when it returns.
    ///
    /// # Errors
    /// [`StateError::Database`]; the process is ending then.
    pub fn flush(&self) -> Result<(), StateError> {
        self.fatal.check().map_err(StateError::Database)?;
        if self.ending.load(Ordering::SeqCst) {
            return Err(StateError::Database("stopping".to_owned()));
        }
        let _whole = self.fatal.at_a_panic("flushing metadata state");
        let before = lock(&self.applied).clone();
        self.db.flush().map_err(|error| {
            let error = database(error);
            // It was ended for a stop, and the disk has nothing to do with it.
            if self.ending.load(Ordering::SeqCst) {
                return error;
            }
            self.fatal.raise(format!("flushing metadata state: {error}"));
            error
        })?;
        let mut durable = lock(&self.durable);
        for (shard, applied) in before {
            let known = durable.entry(shard).or_insert(applied);
            *known = (*known).max(applied);
        }
        Ok(())
    }
}

/// One change of the Raft-log database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogWrite {
    /// Writes a value.
    Put(Vec<u8>, Vec<u8>),
    /// Deletes a range of keys, end excluded.
    DeleteRange(Vec<u8>, Vec<u8>),
}

/// The Raft log of all shards of a disk.
pub struct LogDb {
    db: DB,
}

impl LogDb {
    /// Opens or creates it in `dir`.
    ///
    /// # Errors
    /// [`StateError::Database`], also when the files are damaged: a bad record in the middle of the write-ahead log is
    /// an error, and only an unfinished record at its very end, which was never acknowledged, is dropped.
    pub fn open(dir: &Path) -> Result<LogDb, StateError> {
        LogDb::open_with(dir, &Buffers::default(), true)
    }

    /// As [`LogDb::open`], with buffers of that size; merges old data `by_itself`, or not: see [`LogDb::set_merging`].
    ///
    /// # Errors
    /// As there.
    pub fn open_with(dir: &Path, buffers: &Buffers, by_itself: bool) -> Result<LogDb, StateError> {
        let mut options = common_options(LOG_CACHE_BYTES);
        buffers.set(&mut options, buffers.log_bytes, by_itself);
        options.set_max_total_wal_size(buffers.log_wal_bytes);
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        DB::open(&options, dir).map(|db| LogDb { db }).map_err(database)
    }

    /// Ends a merge that is under way. Nothing is flushed afterwards: only for a stop.
    pub fn end_merging(&self) {
        self.db.cancel_all_background_work(false);
    }

    /// Merges old data, so that what was deleted gives its space back. Blocks; needs room for a step.
    pub fn merge(&self) {
        self.db.compact_range(None::<&[u8]>, None::<&[u8]>);
    }

    /// Bytes of its files.
    pub fn file_bytes(&self) -> u64 {
        file_bytes(&self.db)
    }

    /// Lets it merge old data by itself, or only by [`LogDb::merge`].
    pub fn set_merging(&self, by_itself: bool) {
        set_merging(&self.db, by_itself);
    }

    /// Writes a batch and syncs it. Blocks for the disk.
    ///
    /// # Errors
    /// [`StateError::Database`]. Never retry: what is on disk then is not known.
    pub fn write_synced(&self, writes: &[LogWrite]) -> Result<(), StateError> {
        let mut batch = WriteBatch::default();
        for write in writes {
            match write {
                LogWrite::Put(key, value) => batch.put(key, value),
                LogWrite::DeleteRange(from, to) => batch.delete_range(from, to),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db.write_opt(batch, &options).map_err(database)
    }

    /// A value.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.db.get(key).map_err(database)
    }

    /// Entries with `from <= key < to` in order, until `take` says false.
    ///
    /// # Errors
    /// [`StateError::Database`], or what `take` returned.
    pub fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        mut take: impl FnMut(&[u8], &[u8]) -> Result<bool, StateError>,
    ) -> Result<(), StateError> {
        let iterator = self.db.raw_iterator_opt(bounded(to, Wait::Allowed));
        let mut cursor = RocksCursor { iterator, wait: Wait::Allowed, budget: None };
        cursor.seek(from)?;
        while let Some((key, value)) = cursor.entry() {
            if !take(key, value)? {
                break;
            }
            cursor.next()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
