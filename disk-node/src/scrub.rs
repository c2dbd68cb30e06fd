//! The task around the store's [`Scrub`]: one read after the other, clients first, no faster than the budget.

use crate::label::now_ms;
use crate::store::handle::Store;
use crate::store::scrub::budget::{Pace, ScrubSettings};
use crate::store::scrub::{Scrub, Step};
use crate::store::StoreError;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// While clients read or write, a read of the scrub waits for them, looking this often.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// And so often at most: on a disk that is always busy the scrub still comes to its end.
const LOOKS: u32 = 10;
/// Longest rest between two looks whether a pass is due: clocks may be set.
const LONGEST_REST: Duration = Duration::from_secs(600);

/// Scrubs until `stop`. A store that has failed ends it, which ends the process anyway.
pub async fn run(store: Store, settings: ScrubSettings, stop: CancellationToken) {
    if settings.interval.is_zero() {
        tracing::warn!("node.scrub_interval is 0: nobody looks for chunks that rot");
        return;
    }
    let shared = store.shared().clone();
    let opened = blocking(move || Scrub::open(shared, settings.interval, now_ms())).await;
    let mut scrub = match opened {
        Ok(scrub) => scrub,
        Err(error) => return tracing::error!(%error, "the scrub cannot begin"),
    };
    let (mut pace, clock) = (Pace::default(), Instant::now());
    loop {
        clients_first(&store, &stop).await;
        if stop.is_cancelled() {
            break;
        }
        let stepped = blocking(move || {
            let step = scrub.step(now_ms())?;
            Ok((scrub, step))
        });
        let step;
        (scrub, step) = match stepped.await {
            Ok(done) => done,
            Err(error) => return tracing::error!(%error, "the scrub ends"),
        };
        let wait = match step {
            Step::Rest(wait) => wait.min(LONGEST_REST),
            Step::Read { bytes } | Step::Looked { bytes } => {
                let (left_bytes, age) = scrub.left(now_ms());
                pace.after(bytes, settings.bytes_per_s(left_bytes, age), clock.elapsed())
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => break,
        }
    }
    if let Err(error) = blocking(move || scrub.save(now_ms())).await {
        tracing::error!(%error, "how far the scrub has come could not be kept");
    }
}

async fn clients_first(store: &Store, stop: &CancellationToken) {
    for _ in 0..LOOKS {
        if !store.is_busy() || stop.is_cancelled() {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// On a thread of its own: readers' threads are for clients.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(StoreError::Failed(error.to_string())))
}
