//! One shard's Raft log, as openraft wants it, over the shared log database and its writer thread. Beside `raft/` the
//! only place that knows openraft.
//!
//! Keys: `group (2, BE) | type (1) | index (8, BE)`; types: 'E' entries, 'V' the vote, 'P' the last purged entry.
//! Entries are readable from a cache the moment `append` returns; the writer makes them durable and then calls back.
//! **Invariant:** an entry leaves the cache only after it is in the database, and the entries in the cache are the tail
//! of the log without a hole.

use crate::log_bytes::LogBytes;
use crate::message::{decode_entry, encode_entry, WireLogId, WireVote};
use crate::raft::containment::{spawn_blocking, Containment};
use crate::raft::{entry_from_wire, entry_to_wire, log_id_from_wire, log_id_to_wire, vote_from_wire, vote_to_wire};
use crate::raft::{Entry, LogId, TypeConfig, Vote};
use crate::store::{LogDb, LogWrite, StateDb};
use crate::writer::{LogJob, LogWriter};
use futures::Stream;
use granary_placement::id::ShardId;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Entries kept in memory behind what is durable, in bytes per shard.
const CACHE_BYTES: usize = 2 * 1024 * 1024;
/// Most bytes of entries read in one step: replication sends one step in one message.
pub const READ_BYTES: usize = 1024 * 1024;

const ENTRY: u8 = b'E';
const VOTE: u8 = b'V';
const PURGED: u8 = b'P';

fn entry_key(group: u16, index: u64) -> Vec<u8> {
    let mut key = group.to_be_bytes().to_vec();
    key.push(ENTRY);
    key.extend_from_slice(&index.to_be_bytes());
    key
}

fn single_key(group: u16, kind: u8) -> Vec<u8> {
    let mut key = group.to_be_bytes().to_vec();
    key.push(kind);
    key
}

fn after_entries(group: u16) -> Vec<u8> {
    single_key(group, ENTRY + 1)
}

struct Cached {
    entry: Entry,
    len_bytes: usize,
}

#[derive(Default)]
struct Tail {
    cache: BTreeMap<u64, Cached>,
    cache_bytes: usize,
    /// Entries below this index are in the database.
    written_end: u64,
    /// First entry there is or was not purged yet; reads begin there, and a hole behind it is an error.
    first: u64,
    last: Option<LogId>,
    purged: Option<LogId>,
    /// Of the entries from `first` on.
    bytes: LogBytes,
    vote: Option<Vote>,
}

impl Tail {
    fn evict(&mut self) {
        while self.cache_bytes > CACHE_BYTES {
            match self.cache.first_key_value() {
                Some((index, _)) if *index < self.written_end => {}
                _ => break,
            }
            if let Some((_, cached)) = self.cache.pop_first() {
                self.cache_bytes -= cached.len_bytes;
            }
        }
    }
}

/// The log of one shard. Clones share it.
#[derive(Clone)]
pub struct ShardLog {
    shard: ShardId,
    db: Arc<LogDb>,
    writer: LogWriter,
    state: Arc<StateDb>,
    tail: Arc<Mutex<Tail>>,
}

fn lock(tail: &Mutex<Tail>) -> MutexGuard<'_, Tail> {
    tail.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: impl ToString) -> io::Error {
    io::Error::other(error.to_string())
}

impl ShardLog {
    /// Opens a shard's log and reads all of it: every entry must be whole and follow the one before. Blocks.
    ///
    /// # Errors
    /// A bad or missing entry. Nothing is cut away: the entry may have been acknowledged, so the replica must stay out
    /// of service.
    pub fn open(shard: ShardId, db: Arc<LogDb>, writer: LogWriter, state: Arc<StateDb>) -> io::Result<ShardLog> {
        let group = shard.0;
        let mut tail = Tail::default();
        if let Some(bytes) = db.get(&single_key(group, VOTE)).map_err(failed)? {
            let vote: WireVote = granary_meta::codec::decode(&bytes).map_err(failed)?;
            tail.vote = Some(vote_from_wire(vote));
        }
        if let Some(bytes) = db.get(&single_key(group, PURGED)).map_err(failed)? {
            let purged: WireLogId = granary_meta::codec::decode(&bytes).map_err(failed)?;
            tail.purged = Some(log_id_from_wire(purged));
        }
        tail.first = tail.purged.as_ref().map_or(0, |purged| purged.index + 1);
        let mut expected = tail.first;
        let mut last = None;
        db.scan(&entry_key(group, 0), &after_entries(group), |key, value| {
            let index = key.last_chunk::<8>().map(|index| u64::from_be_bytes(*index)).unwrap_or(u64::MAX);
            let bad = |why: String| granary_meta::kv::StateError::Value(why);
            if expected != index {
                return Err(bad(format!("log of shard {shard}: entry {index} where {expected} should be")));
            }
            let entry = decode_entry(group, index, value).map_err(|error| bad(error.to_string()))?;
            expected = index + 1;
            tail.bytes.push(index, value.len() as u64);
            last = Some(entry.id);
            Ok(true)
        })
        .map_err(failed)?;
        tail.last = last.map(log_id_from_wire).or(tail.purged);
        tail.written_end = tail.last.as_ref().map_or(0, |last| last.index + 1);
        Ok(ShardLog { shard, db, writer, state, tail: Arc::new(Mutex::new(tail)) })
    }

    /// Is there neither an entry, nor was there one, nor a vote?
    pub fn is_empty(&self) -> bool {
        let tail = lock(&self.tail);
        tail.last.is_none() && tail.purged.is_none() && tail.vote.is_none()
    }

    /// Is there an entry, or was there one?
    pub fn has_entries(&self) -> bool {
        let tail = lock(&self.tail);
        tail.last.is_some() || tail.purged.is_some()
    }

    /// Where the log begins: the entries before were purged.
    pub fn first_index(&self) -> u64 {
        lock(&self.tail).first
    }

    /// Bytes of the log, and the entry up to which it must be purged to be half of `most_bytes`, if it is longer than
    /// that.
    pub fn excess(&self, most_bytes: u64) -> (u64, Option<u64>) {
        let tail = lock(&self.tail);
        let total = tail.bytes.total();
        (total, if total > most_bytes { tail.bytes.purge_to_keep(most_bytes / 2) } else { None })
    }

    /// Entries from `start` on and below `end`, at least one if there is one, then up to `max_bytes`.
    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let (mut found, from_cache, start, end) = {
            let tail = lock(&self.tail);
            let start = start.max(tail.first);
            let end = end.min(tail.last.as_ref().map_or(0, |last| last.index + 1));
            if start >= end {
                return Ok(Vec::new());
            }
            let mut bytes = 0;
            let mut cached = Vec::new();
            for (index, entry) in tail.cache.range(start..end) {
                if bytes >= max_bytes && !cached.is_empty() {
                    break;
                }
                bytes += entry.len_bytes;
                cached.push((*index, entry.entry.clone()));
            }
            let first_cached = cached.first().map_or(end, |(index, _)| *index);
            if first_cached <= start {
                return Ok(cached.into_iter().map(|(_, entry)| entry).collect());
            }
            (Vec::new(), cached, start, first_cached)
        };
        let group = self.shard.0;
        let mut bytes = 0;
        self.db
            .scan(&entry_key(group, start), &entry_key(group, end), |key, value| {
                let index = key.last_chunk::<8>().map(|index| u64::from_be_bytes(*index)).unwrap_or(u64::MAX);
                let bad = |why: String| granary_meta::kv::StateError::Value(why);
                if index != start + found.len() as u64 {
                    return Err(bad(format!("log of shard {}: a hole before entry {index}", self.shard)));
                }
                let entry = decode_entry(group, index, value).map_err(|error| bad(error.to_string()))?;
                found.push(entry_from_wire(entry).map_err(|error| bad(error.to_string()))?);
                bytes += value.len();
                Ok(bytes < max_bytes)
            })
            .map_err(failed)?;
        let reached = start + found.len() as u64;
        if reached < end && bytes < max_bytes {
            // A purge may have come between; anything else is a hole.
            if lock(&self.tail).first <= start {
                return Err(failed(format!("log of shard {}: entry {reached} is missing", self.shard)));
            }
            return Ok(Vec::new());
        }
        if reached == end && bytes < max_bytes {
            found.extend(from_cache.into_iter().map(|(_, entry)| entry));
        }
        Ok(found)
    }

    async fn write(&self, writes: Vec<LogWrite>) -> io::Result<()> {
        self.writer.write(writes).await.map_err(failed)
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for ShardLog {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.read(start, end, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, READ_BYTES)
    }

    /// In steps, so that a replay of a long log does not hold all of it in memory.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let state = Some((self.clone(), start, end, Vec::new().into_iter()));
        futures::stream::unfold(state, |state| async move {
            let (log, start, end, mut step): (ShardLog, u64, u64, std::vec::IntoIter<Entry>) = state?;
            if step.len() == 0 && start < end {
                match log.read(start, end, READ_BYTES) {
                    Ok(entries) => step = entries.into_iter(),
                    Err(error) => return Some((Err(error), None)),
                }
            }
            let entry = step.next()?;
            let next = entry.log_id.index + 1;
            Some((Ok(entry), Some((log, next, end, step))))
        })
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(lock(&self.tail).vote)
    }
}

impl RaftLogStorage<TypeConfig> for ShardLog {
    type LogReader = ShardLog;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let tail = lock(&self.tail);
        Ok(LogState { last_purged_log_id: tail.purged, last_log_id: tail.last })
    }

    async fn get_log_reader(&mut self) -> ShardLog {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let value = granary_meta::codec::encode(&vote_to_wire(vote)).map_err(failed)?;
        self.write(vec![LogWrite::Put(single_key(self.shard.0, VOTE), value)]).await?;
        lock(&self.tail).vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let group = self.shard.0;
        let mut writes = Vec::new();
        let mut added = Vec::new();
        for entry in entries {
            let value = encode_entry(group, &entry_to_wire(&entry)).map_err(failed)?;
            added.push(Cached { len_bytes: value.len(), entry: entry.clone() });
            writes.push(LogWrite::Put(entry_key(group, entry.log_id.index), value));
        }
        let ends = added.first().zip(added.last()).map(|(first, last)| (first.entry.log_id, last.entry.log_id));
        let Some((first, last)) = ends else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        {
            let mut tail = lock(&self.tail);
            if tail.last.is_none() {
                tail.first = first.index;
            }
            for cached in added {
                tail.cache_bytes += cached.len_bytes;
                tail.bytes.push(cached.entry.log_id.index, cached.len_bytes as u64);
                tail.cache.insert(cached.entry.log_id.index, cached);
            }
            tail.last = Some(last);
        }
        let shared = self.tail.clone();
        let tell = move |result: Result<(), String>| {
            if result.is_ok() {
                let mut tail = lock(&shared);
                tail.written_end = tail.written_end.max(last.index + 1);
                tail.evict();
            }
            callback.io_completed(result.map_err(failed));
        };
        // The writer's thread is everybody's; what the library does in it for this replica is not.
        let owner = Containment::current();
        let on_durable = Box::new(move |result: Result<(), String>| match owner {
            Some(owner) => drop(owner.contain_now(|| tell(result))),
            None => tell(result),
        });
        self.writer.submit(LogJob { writes, on_durable }).await.map_err(failed)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let first_gone = last_log_id.as_ref().map_or(0, |last| last.index + 1);
        let group = self.shard.0;
        {
            let mut tail = lock(&self.tail);
            if tail.last.as_ref().is_none_or(|last| last.index < first_gone) {
                return Ok(());
            }
            let gone = tail.cache.split_off(&first_gone);
            tail.bytes.truncate(first_gone);
            tail.cache_bytes -= gone.values().map(|cached| cached.len_bytes).sum::<usize>();
            tail.last = last_log_id.max(tail.purged);
        }
        self.write(vec![LogWrite::DeleteRange(entry_key(group, first_gone), after_entries(group))]).await?;
        // Only now: appends that were still queued when this began have told their last index in the meantime.
        let mut tail = lock(&self.tail);
        tail.written_end = tail.written_end.min(first_gone);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let (group, shard, state) = (self.shard.0, self.shard, self.state.clone());
        // The state database has no log of its own: what the Raft log forgets must be flushed there first.
        spawn_blocking(move || state.make_durable(shard, log_id.index)).await?.map_err(failed)?;
        let value = granary_meta::codec::encode(&log_id_to_wire(&log_id)).map_err(failed)?;
        {
            let mut tail = lock(&self.tail);
            let kept = tail.cache.split_off(&(log_id.index + 1));
            let gone = std::mem::replace(&mut tail.cache, kept);
            tail.cache_bytes -= gone.values().map(|cached| cached.len_bytes).sum::<usize>();
            tail.bytes.purge(log_id.index);
            if tail.last.as_ref().is_none_or(|last| last.index <= log_id.index) {
                tail.bytes = LogBytes::default();
            }
            tail.purged = tail.purged.max(Some(log_id));
            tail.first = tail.first.max(log_id.index + 1);
            tail.last = tail.last.max(Some(log_id));
            tail.written_end = tail.written_end.max(log_id.index + 1);
        }
        self.write(vec![
            LogWrite::Put(single_key(group, PURGED), value),
            LogWrite::DeleteRange(entry_key(group, 0), entry_key(group, log_id.index + 1)),
        ])
        .await
    }
}
