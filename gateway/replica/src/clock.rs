//! Wall clocks: this disk's, and how far it is off those of the disks that share its shards.
//!
//! The leader of a shard stamps each command with its clock; the shard refuses what is too old by the highest stamp. A
//! leader whose clock runs ahead would expire everybody for as long. So nobody stamps whose clock a majority of the
//! shard's voters does not agree with, and whoever is off its majority's median gives its shards up. Disks tell each
//! other their clocks with the heartbeats of their links. That a command is applied once depends on none of this.

use granary_placement::id::DiskId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A clock further off than this is wrong, in milliseconds: a gateway's by its leader's, a leader's by its majority's.
pub const MAX_OFF_MS: i64 = 5_000;

/// This disk's clock. Clones are the same clock.
#[derive(Debug, Clone, Default)]
pub struct WallClock {
    ahead_ms: Arc<AtomicI64>,
}

impl WallClock {
    /// Unix milliseconds.
    pub fn now_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        now.saturating_add_signed(self.ahead_ms.load(Ordering::Relaxed))
    }

    /// Makes it run ahead of the system's clock, for tests of clocks that are off.
    pub fn run_ahead(&self, ms: i64) {
        self.ahead_ms.store(ms, Ordering::Relaxed);
    }
}

/// How far `a` is ahead of `b`, both Unix milliseconds.
pub fn ahead_ms(a: u64, b: u64) -> i64 {
    i64::try_from(i128::from(a) - i128::from(b)).unwrap_or(if a > b { i64::MAX } else { i64::MIN })
}

/// How far a disk is ahead of its majority's median, when that is too far; negative: it lags. `ahead_of` has how far it
/// is ahead of each voter that was heard of; one that was not counts as agreeing with it.
pub fn off_by(voters: usize, ahead_of: &[i64]) -> Option<i64> {
    let mut all: Vec<i64> = ahead_of.to_vec();
    all.resize(voters.max(ahead_of.len()), 0);
    all.sort_unstable();
    // Of an even number the middle nearer to the disk itself: half of the voters are no majority.
    let (low, high) = (all.get(all.len().saturating_sub(1) / 2)?, all.get(all.len() / 2)?);
    let median = if low.unsigned_abs() < high.unsigned_abs() { *low } else { *high };
    (median.unsigned_abs() > MAX_OFF_MS.unsigned_abs()).then_some(median)
}

/// Does a majority of the voters agree with a disk's clock, itself among them?
pub fn is_agreed(voters: usize, ahead_of: &[i64]) -> bool {
    let agree = ahead_of.iter().filter(|ahead| ahead.unsigned_abs() <= MAX_OFF_MS.unsigned_abs()).count();
    (agree + 1) * 2 > voters
}

/// What is known of other disks' clocks.
#[derive(Debug)]
pub struct OtherClocks {
    /// How far this disk is ahead of each, and when that was heard.
    heard: Mutex<BTreeMap<DiskId, (i64, Instant)>>,
    /// What was heard longer ago counts no more.
    recent: Duration,
    /// What this disk's clock showed when it was last compared with another.
    compared: Mutex<Option<(u64, Instant)>>,
    /// This disk's clock was off at the last look.
    off: AtomicBool,
}

impl OtherClocks {
    /// Nothing was heard yet.
    pub fn new(recent: Duration) -> OtherClocks {
        OtherClocks { heard: Mutex::default(), recent, compared: Mutex::default(), off: AtomicBool::new(false) }
    }

    fn heard(&self) -> MutexGuard<'_, BTreeMap<DiskId, (i64, Instant)>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was heard when this disk's clock was set since, as its monotonic clock tells.
    pub fn look(&self, mine_ms: u64) {
        let compared = *self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        let was_set = compared.is_some_and(|(then_ms, at)| {
            let elapsed_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
            ahead_ms(mine_ms, then_ms.saturating_add(elapsed_ms)).unsigned_abs() > MAX_OFF_MS.unsigned_abs()
        });
        if was_set {
            self.heard().clear();
        }
    }

    /// A disk told its clock when this one's showed `mine_ms`.
    pub fn hear(&self, from: DiskId, theirs_ms: u64, mine_ms: u64) {
        self.look(mine_ms);
        *self.compared.lock().unwrap_or_else(PoisonError::into_inner) = Some((mine_ms, Instant::now()));
        let mut heard = self.heard();
        heard.retain(|_, (_, at)| at.elapsed() < self.recent);
        heard.insert(from, (ahead_ms(mine_ms, theirs_ms), Instant::now()));
    }

    /// Notes whether this disk's clock is off. True when it was not so before.
    pub fn news(&self, off: bool) -> bool {
        self.off.swap(off, Ordering::Relaxed) != off
    }

    /// How far this disk is ahead of another; None when it was not heard of lately.
    pub fn ahead_of(&self, disk: DiskId) -> Option<i64> {
        self.heard().get(&disk).filter(|(_, at)| at.elapsed() < self.recent).map(|(ahead, _)| *ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_off_when_a_majority_says_so() {
        let hour = 3_600_000;
        for (voters, ahead_of, off) in [
            (1, &[] as &[i64], None),
            (3, &[], None),
            (3, &[hour, hour], Some(hour)),
            (3, &[-hour, -hour], Some(-hour)),
            (3, &[4_999, 4_999], None),
            (3, &[5_001, 6_000], Some(5_001)),
            // Another one is off, or nobody can say who is.
            (3, &[hour, 10], None),
            (3, &[hour], None),
            (3, &[hour, -hour], None),
            (2, &[hour], None),
            (4, &[hour, hour], None),
            (4, &[hour, hour, hour], Some(hour)),
            (5, &[hour, hour], None),
            (5, &[hour, hour, hour], Some(hour)),
            (5, &[hour, hour, hour, 0], Some(hour)),
        ] {
            let agreed = is_agreed(voters, ahead_of);
            assert!(!agreed || off.is_none(), "{voters} voters, {ahead_of:?}");
            // The disk itself is among the voters, and agrees with itself.
            assert_eq!(off_by(voters, ahead_of), off, "{voters} voters, {ahead_of:?}");
        }
    }

    #[test]
    fn nobody_stamps_without_a_majority_that_agrees() {
        let hour = 3_600_000;
        for (voters, ahead_of, agreed) in [
            (1, &[] as &[i64], true),
            (3, &[], false),
            (3, &[4_000], true),
            (3, &[hour], false),
            (3, &[hour, -3_000], true),
            (5, &[10], false),
            (5, &[10, 20, hour, hour], true),
            (2, &[0], true),
        ] {
            assert_eq!(is_agreed(voters, ahead_of), agreed, "{voters} voters, {ahead_of:?}");
        }
    }

    #[test]
    fn what_was_heard_before_the_clock_was_set_counts_no_more() {
        let clocks = OtherClocks::new(Duration::from_secs(300));
        clocks.hear(DiskId(2), 1_000_000, 1_000_010);
        clocks.look(1_000_500);
        assert_eq!(clocks.ahead_of(DiskId(2)), Some(10));
        clocks.look(1_000_000 + 3_600_000);
        assert_eq!(clocks.ahead_of(DiskId(2)), None);
    }
}
