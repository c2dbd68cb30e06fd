//! An index engine that fails at a chosen call.

use granary_disk_node::store::index::{Batch, Engine, IndexError, Pair};
use granary_disk_node::store::index_memory::MemoryEngine;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// Those that look something up.
    Reads,
    /// Batches and flushes.
    Writes,
}

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The disk fails under the engine, and nothing was done.
    Io,
    /// The disk fails, but what was asked was done.
    IoAfterwards,
    /// The engine finds its own bytes damaged.
    Damaged,
}

#[derive(Debug, Default)]
struct State {
    armed: Option<(Calls, u64, Failure)>,
    reads: u64,
    writes: u64,
    failed: bool,
    calls_after: u64,
    marked_damaged: bool,
}

/// Whether, when and how the engine fails: once. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct EngineFaults(Arc<Mutex<State>>);

impl EngineFaults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of these calls the n-th fails, counted from zero.
    pub fn arm(&self, calls: Calls, number: u64, failure: Failure) {
        self.state().armed = Some((calls, number, failure));
    }

    /// How many of them there were.
    pub fn count(&self, calls: Calls) -> u64 {
        match calls {
            Calls::Reads => self.state().reads,
            Calls::Writes => self.state().writes,
        }
    }

    /// Whether the call has failed.
    pub fn has_failed(&self) -> bool {
        self.state().failed
    }

    /// Batches and flushes since the call failed.
    pub fn writes_after(&self) -> u64 {
        self.state().calls_after
    }

    /// Whether the store said that the index is damaged.
    pub fn marked_damaged(&self) -> bool {
        self.state().marked_damaged
    }

    fn call(&self, kind: Calls) -> Option<Failure> {
        let mut state = self.state();
        if kind == Calls::Writes && state.failed {
            state.calls_after += 1;
        }
        let count = match kind {
            Calls::Reads => &mut state.reads,
            Calls::Writes => &mut state.writes,
        };
        let number = *count;
        *count += 1;
        let failure =
            state.armed.filter(|(calls, at, _)| (*calls, *at) == (kind, number)).map(|(_, _, failure)| failure);
        state.failed |= failure.is_some();
        failure
    }
}

fn error(failure: Failure) -> IndexError {
    match failure {
        Failure::Damaged => IndexError::Damaged("a block of it".to_owned()),
        Failure::Io | Failure::IoAfterwards => IndexError::Io("input/output error".to_owned()),
    }
}

/// The engine.
#[derive(Clone)]
pub struct FailingEngine {
    pub inner: MemoryEngine,
    pub faults: EngineFaults,
}

impl FailingEngine {
    fn read<T>(&self, done: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
        match self.faults.call(Calls::Reads) {
            None => done(),
            Some(failure) => Err(error(failure)),
        }
    }

    fn change(&self, done: impl FnOnce() -> Result<(), IndexError>) -> Result<(), IndexError> {
        match self.faults.call(Calls::Writes) {
            None => done(),
            Some(failure) => {
                if failure == Failure::IoAfterwards {
                    done()?;
                }
                Err(error(failure))
            }
        }
    }
}

impl Engine for FailingEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.read(|| self.inner.get(key))
    }

    fn scan(&self, from: &[u8], until: &[u8], limit: usize) -> Result<Vec<Pair>, IndexError> {
        self.read(|| self.inner.scan(from, until, limit))
    }

    fn write(&self, batch: Batch) -> Result<(), IndexError> {
        self.change(|| self.inner.write(batch))
    }

    fn flush(&self) -> Result<(), IndexError> {
        self.change(|| self.inner.flush())
    }

    fn mark_damaged(&self) {
        self.faults.state().marked_damaged = true;
    }
}
