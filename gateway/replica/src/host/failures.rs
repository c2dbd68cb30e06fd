//! Replicas that failed: by an assertion of the Raft library, by a panic of ours inside of it, by an error of their
//! storage. Each is ended whole, and opened again from its log after a pause, as after a crash of the process.
//!
//! 1. From the panic on it answers nothing ([`crate::raft::containment`]).
//! 2. Its tasks are ended and awaited, those on other threads too: nothing of it writes any more.
//! 3. What it had queued at the log's writer is done: a vote or an entry is then on the disk, or was never handed over.
//!    Nobody was told of it in either case, for it answers nothing.
//! 4. After the pause it is opened, and reads its log and its state anew.
//!
//! Whatever ends it each time makes the pauses longer, and never ends the attempts while it is a member of its shard.

use super::{lock, reconcile, MetaHost, ReplicaState};
use crate::batching::Batcher;
use futures::future::BoxFuture;
use granary_placement::id::ShardId;
use granary_wire::control::ControlError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
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
    /// Counts one.
    pub(super) fn count(&self) {
        lock(&self.0).total += 1;
    }

    /// The pause before the next opening, which is longer each time.
    fn pause(&self, shard: ShardId, now: Instant) -> Duration {
        let mut known = lock(&self.0);
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
        replicas.insert(shard, ReplicaState::Failed { id: batcher.replica.me, why });
    }
    host.inner.failures.count();
    batcher.stop.cancel();
    if !host.end(&batcher.replica).await {
        return;
    }
    drop(batcher);
    open_again(host, shard).await;
}

/// Opens a failed replica, of which nothing runs any more, after a pause. One that fails while it is opened comes here
/// again.
pub(super) fn open_again(host: MetaHost, shard: ShardId) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let inner = &host.inner;
        let pause = inner.failures.pause(shard, Instant::now());
        tracing::error!(%shard, pause_s = pause.as_secs(), "a failed metadata replica is opened again after a pause");
        tokio::select! {
            () = inner.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let Some(writer) = lock(&inner.writer).clone() else { return };
        let flushed = tokio::select! {
            () = inner.stop.cancelled() => return,
            flushed = writer.flush() => flushed,
        };
        if let Err(why) = flushed {
            // The disk failed: the process is ending.
            tracing::error!(%shard, why, "what a failed metadata replica had written is not known");
            return;
        }
        let is_let_go = tokio::select! {
            () = inner.stop.cancelled() => return,
            is_let_go = host.let_failed_go(shard) => is_let_go,
        };
        if is_let_go {
            return;
        }
        match host.open_failed(shard).await {
            Ok(()) => tracing::warn!(%shard, "a failed metadata replica was opened again"),
            Err(error) => {
                tracing::error!(%shard, %error, "a failed metadata replica could not be opened");
                inner.tasks.spawn(open_again(host.clone(), shard));
            }
        }
    })
}

impl MetaHost {
    /// Lets a failed or broken replica go that is no member of its shard any more, as [`MetaHost::let_go`] does with
    /// one that runs: its data stays, and it begins from there should the map name this disk again. True when it did.
    pub(super) async fn let_failed_go(&self, shard: ShardId) -> bool {
        let look = |replica: &ReplicaState| replica.id().map(|id| (id, matches!(replica, ReplicaState::Broken { .. })));
        let Some(found) = lock(&self.inner.replicas).get(&shard).and_then(look) else { return false };
        let (id, _) = found;
        let Some(map) = self.newest_map() else { return false };
        // While its leader counts on it, it is opened: its vote may be the one that is needed to change the members.
        if self.named_by(&map, shard) || !reconcile::is_no_member(self, &map, shard, id).await {
            return false;
        }
        match lock(&self.inner.replicas).get_mut(&shard) {
            // Another one may have been opened in its place while the leader was asked.
            Some(replica) if look(replica) == Some(found) => *replica = ReplicaState::Removed,
            _ => return false,
        }
        tracing::info!(%shard, "a failed or broken metadata replica is no member any more; it stays stopped, its data stays");
        true
    }

    /// Opens a replica that is marked as failed. What comes of it takes the place of the mark.
    async fn open_failed(&self, shard: ShardId) -> Result<(), ControlError> {
        let _one = self.inner.opening.lock().await;
        if !matches!(lock(&self.inner.replicas).get(&shard), Some(ReplicaState::Failed { .. })) {
            return Ok(());
        }
        self.open_now(shard).await
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
            let pause = failures.pause(one, now);
            seconds.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        assert_eq!(failures.pause(ShardId(2), now).as_secs(), 1, "another shard's");
        now += FORGIVEN_AFTER - Duration::from_secs(1);
        let pause = failures.pause(one, now);
        assert_eq!(pause.as_secs(), 120, "the time was not long enough");
        now += pause + FORGIVEN_AFTER;
        assert_eq!(failures.pause(one, now).as_secs(), 1);
    }
}
