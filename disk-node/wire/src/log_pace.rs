//! Log lines that others can provoke.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// At most one line in this time.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps lines of one kind to one a second, whoever provokes them.
#[derive(Debug, Default)]
pub struct LogPace(Mutex<(Option<Instant>, u64)>);

impl LogPace {
    /// How many lines were left out since the last one, when it is time for another; else None, and this one is left
    /// out.
    pub fn turn(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, left_out) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            *left_out += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_says_how_many_were_left_out() {
        let (pace, begin) = (LogPace::default(), Instant::now());
        let at = |ms| pace.turn(begin + Duration::from_millis(ms));
        assert_eq!(
            [at(0), at(0), at(999), at(1000), at(1001), at(2000), at(2500)],
            [Some(0), None, None, Some(2), None, Some(1), None]
        );
    }
}
