//! How much healing at a time: a ceiling in bytes per second and a pause, both changeable while it runs.
//!
//! The pause of an operator lies in the root shard as the moment of its end (`heal.paused_until`), so that whichever
//! gateway heals honours it, and that it ends by itself. It stops what moves bytes or gives disks other slots:
//! rebuilding, moves, disks going out. Looking, counting, reporting, leases and garbage go on.

use super::HealSettings;
use crate::shards::now_ms;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(7 * 24 * 3600);
/// What the clocks of two gateways may differ by: one of them said when the pause ends.
const CLOCKS: Duration = Duration::from_secs(600);

/// How long a pause until `until_ms` still lasts at `now_ms`, both Unix milliseconds. None: it is over, or it would
/// last longer than any pause may, so that it is a mistake or one of the clocks is wrong.
pub fn paused_for(until_ms: u64, now_ms: u64) -> Option<Duration> {
    let left = Duration::from_millis(until_ms.saturating_sub(now_ms));
    (!left.is_zero() && left <= LONGEST_PAUSE + CLOCKS).then_some(left)
}

/// The pace of all rebuilds of this gateway.
#[derive(Debug)]
pub struct Pace {
    settings: watch::Receiver<HealSettings>,
    /// When the bytes handed out so far are paid for, at which ceiling.
    paid_at: Mutex<Option<(u64, Instant)>>,
    /// A pause of this process alone.
    paused_until: Mutex<Option<Instant>>,
}

impl Pace {
    /// By these settings, as they are whenever it is asked.
    pub fn new(settings: watch::Receiver<HealSettings>) -> Pace {
        Pace { settings, paid_at: Mutex::new(None), paused_until: Mutex::new(None) }
    }

    /// The ceiling in bytes per second; 0 for none.
    pub fn bytes_per_s(&self) -> u64 {
        self.settings.borrow().bytes_per_s
    }

    /// No new rebuilds by this process for that long. A pause always ends by itself; zero ends one at once.
    pub fn pause(&self, time: Duration) {
        *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + time);
    }

    /// Whether a pause is in force.
    pub fn is_paused(&self) -> bool {
        let alone =
            self.paused_until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| Instant::now() < at);
        alone || self.paused_until_ms().is_some()
    }

    /// When the pause of the cluster ends, Unix milliseconds; None when there is none.
    pub fn paused_until_ms(&self) -> Option<u64> {
        let until_ms = self.settings.borrow().paused_until_ms;
        paused_for(until_ms, now_ms()).map(|_| until_ms)
    }

    /// Waits until so many bytes may be moved. When the ceiling changes, what was to be paid for by the one before is
    /// forgotten, also by those that wait.
    pub async fn take(&self, bytes: u64) {
        let mut settings = self.settings.clone();
        loop {
            let rate = settings.borrow_and_update().bytes_per_s;
            if rate == 0 {
                return;
            }
            let cost = Duration::try_from_secs_f64(bytes as f64 / rate as f64).unwrap_or(LONGEST_PAUSE);
            let start = {
                let now = Instant::now();
                let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
                let start = paid_at.filter(|(at_rate, _)| *at_rate == rate).map_or(now, |(_, at)| at.max(now));
                *paid_at = start.checked_add(cost).map(|at| (rate, at));
                start
            };
            let due = tokio::time::sleep_until(start);
            tokio::pin!(due);
            loop {
                let changed = tokio::select! {
                    () = &mut due => return,
                    changed = settings.changed() => changed,
                };
                match changed {
                    Ok(()) if settings.borrow_and_update().bytes_per_s != rate => break,
                    Ok(()) => {}
                    Err(_) => return due.await,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(settings: HealSettings) -> (Pace, watch::Sender<HealSettings>) {
        let (sender, settings) = watch::channel(settings);
        (Pace::new(settings), sender)
    }

    #[tokio::test]
    async fn many_small_takes_keep_to_the_ceiling_that_is_in_force() {
        let (pace, settings) = pace(HealSettings { bytes_per_s: 1_000_000, ..HealSettings::default() });
        let begun = Instant::now();
        for _ in 0..20 {
            pace.take(10_000).await;
        }
        // The last take is let through when the ones before are paid for.
        assert!(begun.elapsed() >= Duration::from_millis(190));
        settings.send_modify(|settings| settings.bytes_per_s = 0);
        pace.take(u64::MAX).await;
    }

    #[tokio::test]
    async fn a_ceiling_that_was_far_too_low_holds_up_nothing_once_it_is_raised() {
        let (pace, settings) = pace(HealSettings { bytes_per_s: 1, ..HealSettings::default() });
        pace.take(1_000_000).await;
        let raise = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            settings.send_modify(|settings| settings.interval *= 2);
            tokio::time::sleep(Duration::from_millis(20)).await;
            settings.send_modify(|settings| settings.bytes_per_s = 1_000_000_000);
        };
        let both = async { tokio::join!(pace.take(1_000_000), raise) };
        // By the old ceiling it would take days.
        assert!(tokio::time::timeout(Duration::from_secs(60), both).await.is_ok());
        assert!(tokio::time::timeout(Duration::from_secs(60), pace.take(1)).await.is_ok());
    }

    #[tokio::test]
    async fn a_pause_ends_by_itself() {
        let (pace, _settings) = pace(HealSettings::default());
        pace.pause(Duration::from_millis(30));
        assert!(pace.is_paused());
        tokio::time::sleep(Duration::from_millis(40)).await;
        assert!(!pace.is_paused());
    }

    #[test]
    fn the_pause_of_the_cluster_lasts_until_its_end_and_is_never_longer_than_a_pause_may_be() {
        let (now, longest) = (1_700_000_000_000, 7 * 24 * 3600 * 1000);
        for (until, left) in [
            (0, None),
            (now - 1, None),
            (now, None),
            (now + 1, Some(1)),
            (now + longest, Some(longest)),
            (now + longest + 600_000, Some(longest + 600_000)),
            (now + longest + 600_001, None),
            (u64::MAX, None),
        ] {
            assert_eq!(paused_for(until, now), left.map(Duration::from_millis), "until {until}");
        }
        let (pace, settings) = pace(HealSettings::default());
        let until_ms = now_ms() + 3_600_000;
        settings.send_modify(|settings| settings.paused_until_ms = until_ms);
        assert_eq!((pace.is_paused(), pace.paused_until_ms()), (true, Some(until_ms)));
        settings.send_modify(|settings| settings.paused_until_ms = 0);
        assert_eq!((pace.is_paused(), pace.paused_until_ms()), (false, None));
    }
}
