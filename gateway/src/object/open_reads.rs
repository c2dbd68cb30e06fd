//! The payload reads under way here, and since when. What they read must not be deleted while they last, however long
//! that is: see [`crate::background::reads`].

use crate::shards::now_ms;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct OpenReads(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// Since when, Unix milliseconds, in the order in which they were begun.
    since_ms: BTreeMap<u64, u64>,
}

/// One of them; over when it is dropped.
#[derive(Debug)]
pub struct OpenRead {
    all: OpenReads,
    number: u64,
}

impl OpenReads {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read begins.
    pub fn begin(&self) -> OpenRead {
        let mut open = self.open();
        let number = open.next;
        open.next += 1;
        open.since_ms.insert(number, now_ms());
        OpenRead { all: self.clone(), number }
    }

    /// Since when the oldest has been open, Unix milliseconds; None when there is none.
    pub fn oldest_ms(&self) -> Option<u64> {
        // A clock that was set back makes a later one look older; the first few are not all there is to look at then.
        self.open().since_ms.values().min().copied()
    }
}

impl Drop for OpenRead {
    fn drop(&mut self) {
        self.all.open().since_ms.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_read_counts_until_it_is_over() {
        let reads = OpenReads::default();
        assert_eq!(reads.oldest_ms(), None);
        let first = reads.begin();
        let begun = reads.oldest_ms();
        assert!(begun.is_some_and(|begun| begun <= now_ms()));
        std::thread::sleep(std::time::Duration::from_millis(3));
        let second = reads.begin();
        assert_eq!(reads.oldest_ms(), begun);
        drop(first);
        assert!(reads.oldest_ms() > begun);
        drop(second);
        assert_eq!(reads.oldest_ms(), None);
    }
}
