//! Replicas that failed: by an assertion of the Raft library, by a panic of ours inside of it, by an error of their
//! storage. Each is ended whole, and opened again from its log after a pause, as after a crash of the process.
//!
//! 1. From the panic on it answers nothing ([`crate::raft::containment`]).
//! 2. Its tasks are ended and awaited, those on other threads too: nothing of it writes any more.
//! 3. What it had queued at the log's writer is done: a vote or an entry is then on the disk, or was never handed over.
//!    Nobody was told of it in either case, for it answers nothing.
//! 4. After the pause it is opened, and reads its log and its state anew.
//!
//! Whatever ends it each time makes the pauses longer, and never ends the attempts.

use super::{lock, MetaHost, ReplicaState};
use crate::batching::Batcher;
use futures::future::BoxFuture;
use granary_placement::id::ShardId;
use granary_wire::control::ControlError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// A replica that ran for so long begins with the first pause again.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// How often replicas failed.
#[derive(Default)]
pub(super) struct Failures(Mutex<Known>);

#[derive(Default)]
struct Known {
    total: u64,
    lately: BTreeMap<ShardId, Lately>,
}

/// At most one for each shard that ever failed here.
struct Lately {
    pause: Duration,
    /// When the pause is over.
    until: Instant,
}

impl Failures {
    /// One more; gives the pause before the next opening.
    fn note(&self, shard: ShardId, now: Instant) -> Duration {
        let mut known = lock(&self.0);
        known.total += 1;
        let pause = match known.lately.get(&shard) {
            Some(lately) if now.saturating_duration_since(lately.until) < FORGIVEN_AFTER => {
                (lately.pause * 2).min(LONGEST_PAUSE)
            }
            _ => FIRST_PAUSE,
        };
        known.lately.insert(shard, Lately { pause, until: now + pause });
        pause
    }

    /// Since the host was opened.
    pub(super) fn total(&self) -> u64 {
        lock(&self.0).total
    }
}

/// Waits until a replica fails; then ends it and opens it again. Ends itself when the replica is stopped.
pub(super) async fn watch(host: MetaHost, batcher: Arc<Batcher>) {
    let shard = batcher.replica.shard;
    let why = tokio::select! {
        () = batcher.stop.cancelled() => return,
        why = batcher.replica.failed() => why,
    };
    {
        let mut replicas = lock(&host.inner.replicas);
        match replicas.get(&shard) {
            Some(ReplicaState::Running(known)) if Arc::ptr_eq(known, &batcher) => {}
            // A stop has taken it.
            _ => return,
        }
        replicas.insert(shard, ReplicaState::Failed { why });
    }
    batcher.stop.cancel();
    batcher.replica.shutdown().await;
    drop(batcher);
    open_again(host, shard).await;
}

/// Opens a failed replica, of which nothing runs any more, after a pause. One that fails while it is opened comes here
/// again.
pub(super) fn open_again(host: MetaHost, shard: ShardId) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let inner = &host.inner;
        let pause = inner.failures.note(shard, Instant::now());
        tracing::error!(%shard, pause_s = pause.as_secs(), "a failed metadata replica is opened again after a pause");
        tokio::select! {
            () = inner.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let Some(writer) = lock(&inner.writer).clone() else { return };
        if let Err(why) = writer.flush().await {
            // The disk failed: the process is ending.
            tracing::error!(%shard, why, "what a failed metadata replica had written is not known");
            return;
        }
        match host.open_failed(shard).await {
            Ok(_) => tracing::warn!(%shard, "a metadata replica that had failed runs again"),
            Err(error) => tracing::error!(%shard, %error, "a metadata replica that had failed does not run yet"),
        }
    })
}

impl MetaHost {
    async fn open_failed(&self, shard: ShardId) -> Result<Arc<Batcher>, ControlError> {
        {
            let _one = self.inner.opening.lock().await;
            let mut replicas = lock(&self.inner.replicas);
            if matches!(replicas.get(&shard), Some(ReplicaState::Failed { .. })) {
                replicas.remove(&shard);
            }
        }
        self.open_replica(shard).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_two_minutes_and_begin_anew_after_a_long_good_time() {
        let (failures, mut now) = (Failures::default(), Instant::now());
        let one = ShardId(1);
        let mut seconds = Vec::new();
        for _ in 0..9 {
            let pause = failures.note(one, now);
            seconds.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        assert_eq!(failures.note(ShardId(2), now).as_secs(), 1, "another shard's");
        now += FORGIVEN_AFTER - Duration::from_secs(1);
        let pause = failures.note(one, now);
        assert_eq!(pause.as_secs(), 120, "the time was not long enough");
        now += pause + FORGIVEN_AFTER;
        assert_eq!(failures.note(one, now).as_secs(), 1);
        assert_eq!(failures.total(), 12);
    }
}
