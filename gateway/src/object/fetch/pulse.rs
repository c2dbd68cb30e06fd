//! How fast reads are, how many were doubled, and whom a reader had better not ask.

use granary_placement::id::DiskId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Reads the median is taken over.
const RECENT: usize = 64;
/// A new median is made after this many reads.
const RECOUNT_EVERY: usize = 16;
/// A read is late after this many medians.
const LATE_AFTER_MEDIANS: u64 = 3;
/// Nobody waits longer than this before asking somebody else.
const LONGEST_DELAY: Duration = Duration::from_secs(1);
/// Hedges allowed beyond the percentage, so that the first reads of a gateway may hedge too.
const FREE_HEDGES: u64 = 32;

/// Latency and hedges of all readers of one store.
#[derive(Debug, Default)]
pub struct Pulse {
    recent: Mutex<(Vec<u64>, usize)>,
    median_us: AtomicU64,
    reads: AtomicU64,
    hedges: AtomicU64,
}

impl Pulse {
    /// Takes in how long a good read took.
    pub(super) fn record(&self, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (ring, next) = &mut *recent;
        match ring.get_mut(*next % RECENT) {
            Some(place) => *place = took_us,
            None => ring.push(took_us),
        }
        *next = next.wrapping_add(1);
        if *next % RECOUNT_EVERY == 0 {
            let mut sorted = ring.clone();
            sorted.sort_unstable();
            if let Some(median) = sorted.get(sorted.len() / 2) {
                self.median_us.store(*median, Ordering::Relaxed);
            }
        }
    }

    /// How long to wait for a read before other disks are asked.
    pub(super) fn hedge_delay(&self, floor: Duration) -> Duration {
        let late_us = self.median_us.load(Ordering::Relaxed).saturating_mul(LATE_AFTER_MEDIANS);
        Duration::from_micros(late_us).min(LONGEST_DELAY).max(floor)
    }

    /// Counts a read request.
    pub(super) fn count(&self, hedged: bool) {
        let counter = if hedged { &self.hedges } else { &self.reads };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the budget has room for another hedge.
    pub(super) fn may_hedge(&self, percent: u64) -> bool {
        let allowed = self.reads.load(Ordering::Relaxed).saturating_mul(percent) / 100;
        self.hedges.load(Ordering::Relaxed) < allowed.saturating_add(FREE_HEDGES)
    }
}

/// Disks that one reader met trouble with a moment ago; asked last. At most as many entries as an object's disks.
#[derive(Debug, Default)]
pub struct Avoid(Mutex<BTreeMap<DiskId, Instant>>);

impl Avoid {
    /// After an error.
    pub(super) const AFTER_ERROR: Duration = Duration::from_secs(30);
    /// After others were faster. Short: one pause of a disk must not turn a long read into decoding.
    pub(super) const AFTER_SLOW: Duration = Duration::from_secs(2);

    pub(super) fn add(&self, disk: DiskId, time: Duration) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(disk, Instant::now() + time);
    }

    pub(super) fn contains(&self, disk: DiskId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&disk).is_some_and(|until| Instant::now() < *until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_the_median_between_its_bounds() {
        let pulse = Pulse::default();
        let floor = Duration::from_millis(30);
        assert_eq!(pulse.hedge_delay(floor), floor);
        for took_ms in (0..RECENT as u64).map(|i| if i % 8 == 0 { 5_000 } else { 20 }) {
            pulse.record(Duration::from_millis(took_ms));
        }
        assert_eq!(pulse.hedge_delay(floor), Duration::from_millis(60), "a few slow reads do not move it");
        for _ in 0..RECENT {
            pulse.record(Duration::from_secs(5));
        }
        assert_eq!(pulse.hedge_delay(floor), LONGEST_DELAY);
    }

    #[test]
    fn hedges_are_a_share_of_the_reads() {
        let pulse = Pulse::default();
        (0..FREE_HEDGES).for_each(|_| pulse.count(true));
        assert!(!pulse.may_hedge(10));
        (0..100).for_each(|_| pulse.count(false));
        assert!(pulse.may_hedge(10));
        (0..10).for_each(|_| pulse.count(true));
        assert!(!pulse.may_hedge(10));
    }
}
