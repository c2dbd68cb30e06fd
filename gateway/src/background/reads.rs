//! Reads that last longer than garbage waits.
//!
//! Chunks of an object that was overwritten or deleted stay for the grace (`heal.garbage_grace`), because a reader may
//! be in the middle of them. One that takes longer would find them gone. So a gateway with a read that has been open
//! for half of the grace says so: it holds one of a few leases, and publishes with each renewal since when its oldest
//! read has been open. Whoever collects garbage leaves everything that was queued after that. A gateway without such
//! reads says nothing, and no read costs a commit.
//!
//! A gateway that died does not renew; after the time to live of its lease nobody waits for it.

use super::leases::{Holder, LeaseSettings, Watch};
use crate::object::OpenReads;
use crate::shards::{now_ms, random_below, Shards};
use bytes::Bytes;
use granary_meta::record::LeaseRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Names of the leases: this and a number below [`PLACES`]. Leases are never removed, so there is a fixed number; a
/// gateway that finds its place taken draws another.
const TASK: &str = "reads-";
/// Longest time between two looks, however long the grace is: it may be made shorter meanwhile.
const LOOK: Duration = Duration::from_secs(30);
/// Gateways that can have long reads at once.
const PLACES: u64 = 64;
/// Clocks of gateways and shards are this far apart at most: gateways further off their shards are refused, and so are
/// leaders that are off each other.
const CLOCKS_MS: u64 = 15_000;

/// What is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Published {
    /// Since when the oldest read has been open, Unix milliseconds.
    oldest_ms: u64,
}

/// Publishes long reads of this gateway until `stop`. `timing` gives the grace and how leases are timed; `address` is
/// where operators find this gateway.
pub async fn publish(
    reads: OpenReads,
    shards: Shards,
    timing: impl Fn() -> (Duration, LeaseSettings) + Clone + Send + Sync + 'static,
    address: String,
    stop: CancellationToken,
) {
    publish_in(PLACES, reads, shards, timing, address, stop).await;
}

async fn publish_in(
    places: u64,
    reads: OpenReads,
    shards: Shards,
    timing: impl Fn() -> (Duration, LeaseSettings) + Clone + Send + Sync + 'static,
    address: String,
    stop: CancellationToken,
) {
    let is_long = |grace: Duration| {
        let half_ms = u64::try_from(grace.as_millis() / 2).unwrap_or(u64::MAX);
        reads.oldest_ms().is_some_and(|oldest_ms| now_ms().saturating_sub(oldest_ms) >= half_ms)
    };
    loop {
        let (grace, _) = timing();
        if !is_long(grace) {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep((grace / 8).min(LOOK)) => {}
            }
            continue;
        }
        if stop.is_cancelled() {
            return;
        }
        let (task, lease) = (format!("{TASK}{}", random_below(places)), timing.clone());
        let holder = Holder::new(shards.clone(), move || lease().1, &task, address.clone());
        let (over, held) = (stop.child_token(), holder.held());
        let watching = async {
            loop {
                tokio::select! {
                    () = over.cancelled() => return,
                    () = tokio::time::sleep(grace / 16) => {}
                }
                // Without the place it is another gateway's, or the way to the root shard is cut: another is drawn.
                if !is_long(grace) || held.borrow().is_none() {
                    over.cancel();
                }
            }
        };
        let progress = || {
            let published = Published { oldest_ms: reads.oldest_ms().unwrap_or_else(now_ms) };
            Bytes::from(serde_json::to_vec(&published).unwrap_or_default())
        };
        tokio::join!(watching, holder.run(progress, |held| async move { held.lost().await }, over.clone()));
    }
}

/// What a collector of garbage has seen of the leases of readers.
#[derive(Debug, Default)]
pub struct Readers(BTreeMap<String, Watch>);

impl Readers {
    /// Garbage queued after this time, Unix milliseconds, may be read somewhere. `ttl` is how long an own lease lives.
    pub fn oldest_ms(&mut self, leases: &[LeaseRecord], now: Instant, ttl: Duration) -> u64 {
        let held = leases.iter().filter(|lease| lease.task.starts_with(TASK) && lease.holder.is_some());
        let oldest = held.filter_map(|lease| {
            let is_over = self.0.entry(lease.task.clone()).or_default().look(Some(lease), now, ttl).is_some();
            // Just taken, it may show what its holder before published, or nothing yet.
            let published = serde_json::from_slice::<Published>(&lease.progress);
            (!is_over).then(|| published.map_or(0, |published| published.oldest_ms))
        });
        oldest.min().map_or(u64::MAX, |oldest_ms| oldest_ms.saturating_sub(CLOCKS_MS))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TTL: Duration = Duration::from_secs(15);

    fn lease(task: &str, renewals: u64, progress: &str) -> LeaseRecord {
        LeaseRecord {
            task: task.to_owned(),
            epoch: 1,
            renewals,
            holder: Some([1; 16]),
            address: String::new(),
            ttl_ms: 15_000,
            taken_ms: 0,
            renewed_ms: 0,
            progress: Bytes::from(progress.to_owned()),
        }
    }

    #[test]
    fn garbage_waits_for_the_oldest_read_of_gateways_that_are_alive() {
        let (mut readers, start) = (Readers::default(), Instant::now());
        let mut look =
            |leases: &[LeaseRecord], at_s: u64| readers.oldest_ms(leases, start + Duration::from_secs(at_s), TTL);
        let (one, two) = (r#"{"oldest_ms":100000}"#, r#"{"oldest_ms":70000}"#);
        assert_eq!(look(&[lease("heal", 0, "{}")], 0), u64::MAX);
        assert_eq!(look(&[lease("reads-1", 1, one), lease("reads-2", 1, two)], 0), 55_000);
        assert_eq!(look(&[lease("reads-1", 1, one), lease("reads-2", 2, two)], 14), 55_000);
        assert_eq!(look(&[lease("reads-1", 1, one), lease("reads-2", 3, two)], 15), 55_000);
        assert_eq!(look(&[lease("reads-1", 2, one), lease("reads-2", 3, two)], 31), 85_000, "the second is dead");
        assert_eq!(look(&[lease("reads-1", 3, "")], 32), 0, "it has not said yet");
        let given_back = LeaseRecord { holder: None, ..lease("reads-1", 4, one) };
        assert_eq!(look(&[given_back], 33), u64::MAX);
    }
}
