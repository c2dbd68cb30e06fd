//! Chunks that readers found missing or corrupt, on their way to the repair queues of their shards.

use granary_meta::ChunkRef;
use granary_placement::id::ShardId;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Reports that wait. What does not fit is dropped: the next reader finds it again, and so does the scrub.
const WAITING: usize = 4096;
/// A chunk is reported once in this time.
const ONCE_PER: Duration = Duration::from_secs(60);

/// One report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The chunk.
    pub chunk: ChunkRef,
    /// The shard that owns the extent, where a good chunk told; None: ask all of them, those that do not own it ignore
    /// it.
    pub owner: Option<ShardId>,
}

/// A bounded queue without repetitions.
#[derive(Debug, Default)]
pub struct Reports {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Report>,
    seen: HashMap<ChunkRef, Instant>,
}

impl Reports {
    /// Takes a report, unless it is known or there is no room. Answers whether it was taken.
    pub fn push(&self, chunk: ChunkRef, owner: Option<ShardId>) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.waiting.len() >= WAITING || state.seen.get(&chunk).is_some_and(|at| now.duration_since(*at) < ONCE_PER)
        {
            return false;
        }
        if state.seen.len() >= WAITING * 4 {
            state.seen.retain(|_, at| now.duration_since(*at) < ONCE_PER);
        }
        if state.seen.len() < WAITING * 4 {
            state.seen.insert(chunk, now);
        }
        state.waiting.push_back(Report { chunk, owner });
        drop(state);
        self.arrived.notify_one();
        true
    }

    /// Takes up to `limit` reports out.
    pub fn take(&self, limit: usize) -> Vec<Report> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let count = limit.min(state.waiting.len());
        state.waiting.drain(..count).collect()
    }

    /// Puts reports back that could not be delivered, as far as there is room.
    pub fn put_back(&self, reports: Vec<Report>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let room = WAITING.saturating_sub(state.waiting.len());
        state.waiting.extend(reports.into_iter().take(room));
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).waiting.len()
    }

    /// Ends when a report has arrived since the last call.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use granary_placement::id::{ExtentId, PlacementGroupId};

    fn chunk(number: usize) -> ChunkRef {
        let mut extent = [0; 16];
        extent[..8].copy_from_slice(&number.to_be_bytes());
        ChunkRef { group: PlacementGroupId(1), extent: ExtentId(extent), index: 0 }
    }

    #[test]
    fn a_chunk_is_reported_once_and_the_queue_has_an_end() {
        let reports = Reports::default();
        assert!(reports.push(chunk(0), None));
        assert!(!reports.push(chunk(0), Some(ShardId(1))));
        (1..WAITING).for_each(|number| assert!(reports.push(chunk(number), None)));
        assert!(!reports.push(chunk(WAITING), None), "full");
        let taken = reports.take(10);
        assert_eq!(taken.len(), 10);
        assert!(reports.push(chunk(WAITING), None));
        reports.put_back(taken);
        assert_eq!(reports.waiting(), WAITING);
    }
}
