//! How much is still to be brought to slots that move, and how fast that goes. Pure.

use std::time::{Duration, Instant};

/// How much is on its way and how fast, for people: an estimate.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// Slots that moved at the last pass, and bytes that those hold of which something was lacking then.
    slots: usize,
    in_slots: u64,
    /// About so many bytes were to be brought when the last move began, and what had been rebuilt by then.
    total: u64,
    rebuilt_then: u64,
    /// What had been rebuilt at the last sample.
    sample: Option<(Instant, u64)>,
    bytes_per_s: u64,
}

impl Flow {
    /// Between two samples of the rate.
    const SAMPLE: Duration = Duration::from_secs(2);

    /// After a pass: so many slots are moving, and of so many something is lacking still; each holds about that much.
    pub(super) fn pass(&mut self, (slots, left): (usize, usize), per_slot: u64, rebuilt: u64) {
        self.in_slots = per_slot.saturating_mul(u64::try_from(left).unwrap_or(u64::MAX));
        if slots == 0 {
            *self = Flow::default();
        } else if slots > self.slots {
            (self.total, self.rebuilt_then) = (self.in_slots, rebuilt);
        }
        self.slots = slots;
    }

    /// Bytes left and bytes per second, by what was rebuilt until now.
    pub(super) fn look(&mut self, rebuilt: u64, now: Instant) -> (u64, u64) {
        if self.slots == 0 {
            return (0, 0);
        }
        let (at, before) = *self.sample.get_or_insert((now, rebuilt));
        let past = now.saturating_duration_since(at);
        if past >= Flow::SAMPLE {
            self.bytes_per_s = (rebuilt.saturating_sub(before) as f64 / past.as_secs_f64()) as u64;
            self.sample = Some((now, rebuilt));
        }
        let brought = rebuilt.saturating_sub(self.rebuilt_then);
        (self.total.saturating_sub(brought).min(self.in_slots), self.bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_and_how_fast_it_goes_is_told_from_what_was_rebuilt() {
        let (mut flow, start) = (Flow::default(), Instant::now());
        // (slots that move and slots not all there, after a pass; bytes rebuilt ever, at which second; left, per
        // second)
        for (pass, rebuilt, at_s, expected) in [
            (None, 4000, 0, (0, 0)),
            (Some((10, 10)), 5000, 0, (1000, 0)),
            // Too soon for a rate.
            (None, 5100, 1, (900, 0)),
            (None, 5200, 2, (800, 100)),
            // Never more than the slots hold that are left.
            (Some((10, 2)), 5400, 4, (200, 100)),
            // Two more have begun to move.
            (Some((12, 4)), 5400, 6, (400, 0)),
            (Some((0, 0)), 5800, 8, (0, 0)),
        ] {
            if let Some(slots) = pass {
                flow.pass(slots, 100, rebuilt);
            }
            assert_eq!(flow.look(rebuilt, start + Duration::from_secs(at_s)), expected, "at {at_s} s");
        }
    }
}
