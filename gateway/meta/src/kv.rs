//! The seam between the state machine and its database: a small ordered map, and a batch of writes that reads its own.
//!
//! `apply` sees an [`Overlay`]: reads go through the writes made so far, so many commands become one atomic batch.

use std::collections::BTreeMap;
use std::ops::Bound;

/// What goes wrong below the state machine. All but [`StateError::WouldWait`] stop the replica: it can neither go on
/// nor skip a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The database failed.
    #[error("state database: {0}")]
    Database(String),
    /// A value in it makes no sense.
    #[error("bad value in the state database: {0}")]
    Value(String),
    /// It takes the disk, and who asked does not want to wait for that. Nothing was changed.
    #[error("not without waiting for the disk")]
    WouldWait,
    /// The shard has a feature level that a newer release brought.
    #[error("the shard has feature level {level}, and this build knows {known}: run the newer release")]
    Level {
        /// The shard's.
        level: u32,
        /// The highest that the build knows.
        known: u32,
    },
}

/// An ordered map to read from.
pub trait Kv {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError>;
    /// A cursor over the keys below `end`. It stands nowhere until the first seek.
    fn cursor<'a>(&'a self, end: &[u8]) -> Box<dyn Cursor + 'a>;
}

/// Walks up the keys.
pub trait Cursor {
    /// Goes to the first entry at or after `key`.
    fn seek(&mut self, key: &[u8]) -> Result<(), StateError>;
    /// The entry it stands on; None at the end.
    fn entry(&self) -> Option<(&[u8], &[u8])>;
    /// Goes to the next entry.
    fn next(&mut self) -> Result<(), StateError>;
}

/// The writes of a batch; None deletes.
pub type Writes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// A database and the writes that will go into it as one batch.
pub struct Overlay<'a, K: Kv + ?Sized> {
    base: &'a K,
    writes: Writes,
}

/// Entries as a scan gives them.
pub type Entries = Vec<(Vec<u8>, Vec<u8>)>;

impl<'a, K: Kv + ?Sized> Overlay<'a, K> {
    /// No writes yet.
    pub fn new(base: &'a K) -> Overlay<'a, K> {
        Overlay { base, writes: Writes::new() }
    }

    /// The value as the batch leaves it.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        match self.writes.get(key) {
            Some(written) => Ok(written.clone()),
            None => self.base.get(key),
        }
    }

    /// Writes a value.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.writes.insert(key, Some(value));
    }

    /// Deletes a value.
    pub fn delete(&mut self, key: Vec<u8>) {
        self.writes.insert(key, None);
    }

    /// At most `limit` entries with `from <= key < to`, as the batch leaves them.
    pub fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Entries, StateError> {
        let mut found = Entries::new();
        if from >= to || limit == 0 {
            return Ok(found);
        }
        let mut cursor = self.base.cursor(to);
        cursor.seek(from)?;
        let mut writes = self.writes.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))).peekable();
        while found.len() < limit {
            let base = cursor.entry();
            // The smaller key comes first; a write to the same key hides the entry below it.
            let take_write = match (&base, writes.peek()) {
                (None, None) => break,
                (None, Some(_)) => true,
                (Some(_), None) => false,
                (Some((key, _)), Some((written, _))) => written.as_slice() <= *key,
            };
            if !take_write {
                if let Some((key, value)) = base {
                    found.push((key.to_vec(), value.to_vec()));
                }
                cursor.next()?;
                continue;
            }
            if let Some((key, value)) = writes.next() {
                if base.is_some_and(|(base_key, _)| base_key == key.as_slice()) {
                    cursor.next()?;
                }
                if let Some(value) = value {
                    found.push((key.clone(), value.clone()));
                }
            }
        }
        Ok(found)
    }

    /// The batch.
    pub fn into_writes(self) -> Writes {
        self.writes
    }

    /// The batch as it stands.
    pub fn writes(&self) -> &Writes {
        &self.writes
    }
}

/// A map in memory: what tests apply to, and what an offline tool loads a shard into.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryKv {
    /// The entries.
    pub entries: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl MemoryKv {
    /// Takes a batch.
    pub fn write(&mut self, writes: Writes) {
        for (key, value) in writes {
            match value {
                Some(value) => self.entries.insert(key, value),
                None => self.entries.remove(&key),
            };
        }
    }
}

struct MemoryCursor<'a> {
    entries: &'a BTreeMap<Vec<u8>, Vec<u8>>,
    end: Vec<u8>,
    at: Option<(&'a [u8], &'a [u8])>,
}

impl MemoryCursor<'_> {
    fn go(&mut self, from: Bound<&[u8]>) {
        let below_start = match from {
            Bound::Included(key) | Bound::Excluded(key) => key >= self.end.as_slice(),
            Bound::Unbounded => false,
        };
        self.at = if below_start {
            None
        } else {
            let mut range = self.entries.range::<[u8], _>((from, Bound::Excluded(self.end.as_slice())));
            range.next().map(|(key, value)| (key.as_slice(), value.as_slice()))
        };
    }
}

impl Cursor for MemoryCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), StateError> {
        self.go(Bound::Included(key));
        Ok(())
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.at
    }

    fn next(&mut self) -> Result<(), StateError> {
        if let Some((key, _)) = self.at {
            self.go(Bound::Excluded(key));
        }
        Ok(())
    }
}

impl Kv for MemoryKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.entries.get(key).cloned())
    }

    fn cursor<'a>(&'a self, end: &[u8]) -> Box<dyn Cursor + 'a> {
        Box::new(MemoryCursor { entries: &self.entries, end: end.to_vec(), at: None })
    }
}
