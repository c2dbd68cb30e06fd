//! An index engine in memory for crash tests: a crash loses what was not flushed, as with RocksDB.
//!
//! It keeps the promise of [`Engine`] and no more: a crash leaves the flushed state plus any number of the batches
//! after it, in order.

use super::index::{Batch, Engine, IndexError, Pair};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default, Clone)]
struct State {
    flushed: Pairs,
    since: Vec<Batch>,
    now: Pairs,
}

fn apply(pairs: &mut Pairs, batch: &Batch) {
    for (key, value) in &batch.changes {
        match value {
            Some(value) => pairs.insert(key.clone(), value.clone()),
            None => pairs.remove(key),
        };
    }
}

/// Pairs in memory. Clones share them.
#[derive(Debug, Default, Clone)]
pub struct MemoryEngine(Arc<Mutex<State>>);

impl MemoryEngine {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many batches a crash may take back.
    pub fn unflushed(&self) -> usize {
        self.state().since.len()
    }

    /// What a crash leaves that takes back all but the first `survive` batches since the last flush.
    pub fn after_crash(&self, survive: usize) -> MemoryEngine {
        let state = self.state();
        let mut pairs = state.flushed.clone();
        for batch in state.since.iter().take(survive) {
            apply(&mut pairs, batch);
        }
        MemoryEngine(Arc::new(Mutex::new(State { flushed: pairs.clone(), since: Vec::new(), now: pairs })))
    }

    /// The process dies and takes all but the first `survive` batches since the last flush with it.
    pub fn crash(&self, survive: usize) {
        let after = self.after_crash(survive).state().clone();
        *self.state() = after;
    }

    /// All pairs as a reader sees them.
    pub fn pairs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.state().now.clone()
    }
}

impl Engine for MemoryEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        Ok(self.state().now.get(key).cloned())
    }

    fn scan(&self, from: &[u8], until: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        let state = self.state();
        let range = state.now.range(from.to_vec()..until.to_vec());
        Ok(range.take(limit).map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn write(&self, batch: Batch) -> Result<(), IndexError> {
        let mut state = self.state();
        apply(&mut state.now, &batch);
        state.since.push(batch);
        Ok(())
    }

    fn flush(&self) -> Result<(), IndexError> {
        let mut state = self.state();
        state.flushed = state.now.clone();
        state.since.clear();
        Ok(())
    }

    fn mark_damaged(&self) {}
}
