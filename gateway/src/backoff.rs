//! How long to wait before something is tried again. Pure: attempts and jitter in, a duration out.

use std::time::Duration;

/// Pauses that double with each failed attempt, up to a longest one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The pause after the first failed attempt.
    pub first: Duration,
    /// The longest pause.
    pub longest: Duration,
}

impl Backoff {
    /// The pause after `failed` failed attempts, at least one; without jitter.
    pub fn base(&self, failed: u32) -> Duration {
        let doublings = failed.saturating_sub(1).min(31);
        self.first.saturating_mul(1 << doublings).min(self.longest)
    }

    /// The pause after `failed` failed attempts, spread so that many who failed together do not come back together:
    /// `jitter`, 0 to 1,000, gives between half of the base and one and a half of it.
    pub fn delay(&self, failed: u32, jitter: u32) -> Duration {
        let base = self.base(failed);
        base / 2 + base.saturating_mul(jitter.min(1000)) / 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_jitter_stays_within_a_half() {
        let backoff = Backoff { first: Duration::from_millis(100), longest: Duration::from_millis(700) };
        let base: Vec<u128> = [0, 1, 2, 3, 4, 5, 1000, u32::MAX].map(|failed| backoff.base(failed).as_millis()).into();
        assert_eq!(base, [100, 100, 200, 400, 700, 700, 700, 700]);
        let spread = [0, 250, 500, 1000, 2000].map(|jitter| backoff.delay(2, jitter).as_millis());
        assert_eq!(spread, [100, 150, 200, 300, 300]);
        let longest = Backoff { first: Duration::MAX, longest: Duration::MAX };
        assert!(longest.delay(u32::MAX, 1000) >= Duration::MAX / 2);
    }
}
