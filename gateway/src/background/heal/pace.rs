//! How much healing at a time: a ceiling in bytes per second and a pause, both changeable while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A ceiling shared by all rebuilds of this gateway.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: AtomicU64,
    /// When the bytes handed out so far are paid for.
    paid_at: Mutex<Option<Instant>>,
    paused_until: Mutex<Option<Instant>>,
}

impl Pace {
    /// At most so many bytes per second; 0 for no ceiling.
    pub fn new(bytes_per_s: u64) -> Pace {
        Pace { bytes_per_s: AtomicU64::new(bytes_per_s), paid_at: Mutex::new(None), paused_until: Mutex::new(None) }
    }

    /// The ceiling; 0 for none.
    pub fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s.load(Ordering::Relaxed)
    }

    /// Another ceiling, from now on; 0 for none.
    pub fn set_bytes_per_s(&self, bytes_per_s: u64) {
        self.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }

    /// No new rebuilds for that long. A pause always ends by itself; zero ends one at once.
    pub fn pause(&self, time: Duration) {
        *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + time);
    }

    /// Whether a pause is in force.
    pub fn is_paused(&self) -> bool {
        self.paused_until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| Instant::now() < until)
    }

    /// Waits until so many bytes may be moved.
    pub async fn take(&self, bytes: u64) {
        let rate = self.bytes_per_s();
        if rate == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let start = {
            let now = Instant::now();
            let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
            let start = paid_at.map_or(now, |at| at.max(now));
            *paid_at = Some(start + cost);
            start
        };
        tokio::time::sleep_until(start).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_small_takes_keep_to_the_ceiling() {
        let pace = Pace::new(1_000_000);
        let begun = Instant::now();
        for _ in 0..20 {
            pace.take(10_000).await;
        }
        // The last take is let through when the ones before are paid for.
        assert!(begun.elapsed() >= Duration::from_millis(190));
        pace.set_bytes_per_s(0);
        pace.take(u64::MAX).await;
    }

    #[tokio::test]
    async fn a_pause_ends_by_itself() {
        let pace = Pace::new(0);
        pace.pause(Duration::from_millis(30));
        assert!(pace.is_paused());
        tokio::time::sleep(Duration::from_millis(40)).await;
        assert!(!pace.is_paused());
    }
}
