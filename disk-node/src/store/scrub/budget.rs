//! How fast a scrub reads. Pure: times are handed in.

use granary_placement::settings::Values;
use std::time::Duration;

/// The shortest interval.
const SHORTEST: Duration = Duration::from_secs(1);

/// Settings of the scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubSettings {
    /// A pass begins so long after the one before began; zero: never.
    pub interval: Duration,
    /// It reads no slower than this, in bytes per second.
    pub floor_bytes_per_s: u64,
    /// And no faster, in bytes per second.
    pub ceiling_bytes_per_s: u64,
}

impl ScrubSettings {
    /// From the settings `node.scrub_*`.
    pub fn from_settings(values: &Values) -> ScrubSettings {
        ScrubSettings {
            interval: Some(values.time("node.scrub_interval"))
                .filter(|interval| !interval.is_zero())
                .map_or(Duration::ZERO, |interval| interval.max(SHORTEST)),
            floor_bytes_per_s: values.number("node.scrub_floor"),
            ceiling_bytes_per_s: values.number("node.scrub_ceiling"),
        }
    }

    /// Bytes per second at which a pass of that age, with so many bytes before it, ends a tenth of the interval before
    /// the next one begins. One that is late does not try to make up for all of it at once.
    pub fn bytes_per_s(&self, left_bytes: u64, age: Duration) -> u64 {
        let aim = self.interval.saturating_sub(self.interval / 10).saturating_sub(age);
        let left_s = aim.max(self.interval / 16).as_secs_f64().max(0.001);
        let wanted = (left_bytes as f64 / left_s) as u64;
        wanted.max(self.floor_bytes_per_s).min(self.ceiling_bytes_per_s).max(1)
    }
}

/// When the next bytes may be read. What was not used is not saved up: there are no bursts beyond one read.
#[derive(Debug, Default)]
pub struct Pace {
    /// Until then what was read is paid for, since the beginning of the clock.
    paid_until: Duration,
}

impl Pace {
    /// So many bytes were read, and the read ended at `now`: how long to wait before the next one.
    pub fn after(&mut self, bytes: u64, bytes_per_s: u64, now: Duration) -> Duration {
        let cost = Duration::from_secs_f64(bytes as f64 / bytes_per_s.max(1) as f64);
        self.paid_until = self.paid_until.max(now) + cost;
        self.paid_until.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn settings() -> ScrubSettings {
        ScrubSettings { interval: 14 * DAY, floor_bytes_per_s: MIB, ceiling_bytes_per_s: 64 * MIB }
    }

    #[test]
    fn a_pass_is_as_fast_as_the_interval_asks_between_floor_and_ceiling() {
        // (bytes before the pass, its age, bytes per second)
        for (left_tib, age, expected) in [
            (0, Duration::ZERO, MIB),
            (1, Duration::ZERO, MIB),
            (12, Duration::ZERO, 12_119_837),
            (6, 14 * DAY * 9 / 20, 12_119_837),
            // Late: as if a sixteenth of the interval were left.
            (1, 13 * DAY, 14_543_804),
            (1, 40 * DAY, 14_543_804),
            (1000, Duration::ZERO, 64 * MIB),
        ] {
            let found = settings().bytes_per_s(left_tib << 40, age);
            assert!(found.abs_diff(expected) <= 1, "{left_tib} TiB left after {age:?}: {found}, not {expected}");
        }
    }
}
