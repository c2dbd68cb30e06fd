//! Watches the room on the disk, and gives back what was deleted when there is little.

use super::{MetaHost, STOP_WAIT};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Between two looks, and between two on a disk that is nearly full: in between it may fill by what it can write.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_NEAR: Duration = Duration::from_millis(50);
/// Between two merges of old data on a full disk.
const MERGE_EVERY: Duration = Duration::from_secs(10);
/// Between two attempts.
const TRY_EVERY: Duration = Duration::from_secs(1);
/// How long others on the same file system are given their turn; who holds it longer is stuck, or a stranger.
const PATIENCE: Duration = Duration::from_secs(600);

/// Does so until the host ends. `by_itself`: whether the databases were opened to merge old data by themselves.
pub(super) async fn run(host: MetaHost, mut by_itself: bool) {
    let (room, stop) = (&host.inner.room, &host.inner.stop);
    let mut merging: Option<JoinHandle<Merged>> = None;
    let mut last = Instant::now().checked_sub(MERGE_EVERY);
    let mut refused: Option<Instant> = None;
    let mut tried: Option<Instant> = None;
    loop {
        match room.look() {
            Some(true) => {
                tracing::error!("less than node.meta_reserve is free on this disk's file system: shards with a voter here take deletes and repairs only; delete objects, or remove what else fills it")
            }
            Some(false) => tracing::info!("there is room for metadata again"),
            None => {}
        }
        if let Some(done) = merging.take_if(|merging| merging.is_finished()) {
            match done.await {
                Ok(done) => {
                    by_itself = done.by_itself;
                    refused = (!done.had_turn).then(|| refused.unwrap_or_else(Instant::now));
                    last = if done.had_turn { Some(Instant::now()) } else { last };
                }
                Err(error) => {
                    tracing::warn!(%error, "old metadata could not be merged");
                    last = Some(Instant::now());
                }
            }
        }
        let is_due = last.is_none_or(|last| last.elapsed() >= MERGE_EVERY);
        // When a database merges by itself, it does not look whether there is room. Before it does so again, what has
        // come together meanwhile is merged in turn.
        let may_try = merging.is_none() && tried.is_none_or(|tried| tried.elapsed() >= TRY_EVERY);
        if may_try && (room.is_full() && is_due || by_itself == room.is_full()) {
            tried = Some(Instant::now());
            let impatient = refused.is_some_and(|since| since.elapsed() >= PATIENCE);
            if impatient {
                tracing::warn!(
                    "the lock by which disks on one file system merge in turn is never free; not waiting for it"
                );
            }
            let host = host.clone();
            merging = Some(tokio::task::spawn_blocking(move || merge(&host, by_itself, impatient)));
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(if room.is_near() || merging.is_some() { LOOK_NEAR } else { LOOK }) => {}
        }
    }
    // Only a merge that is under way is ended: without one the state is flushed at the stop.
    if let Some(merging) = merging {
        let inner = host.inner.clone();
        let ended = tokio::task::spawn_blocking(move || {
            inner.state.end_merging();
            inner.log.end_merging();
        });
        let both = async { (ended.await, merging.await) };
        if tokio::time::timeout(STOP_WAIT, both).await.is_err() {
            tracing::warn!("a merge of old metadata does not end");
        }
    }
}

/// How an attempt went.
struct Merged {
    /// Do the databases merge by themselves now?
    by_itself: bool,
    /// Was it this node's turn?
    had_turn: bool,
}

/// Merges what there is room for, if it is this node's turn. Blocks.
fn merge(host: &MetaHost, by_itself: bool, impatient: bool) -> Merged {
    let inner = &host.inner;
    let is_full = inner.room.is_full();
    let set = |merges| {
        if merges != by_itself {
            inner.log.set_merging(merges);
            inner.state.set_merging(merges);
        }
    };
    if is_full {
        set(false);
    }
    let turn = inner.room.turn();
    if turn.is_none() && !impatient {
        return Merged { by_itself: by_itself && !is_full, had_turn: false };
    }
    // A step, or all there is. The log first: it was purged, so little of it is written anew.
    if inner.room.may_merge(inner.step_bytes.min(inner.log.file_bytes())) {
        inner.log.merge();
    }
    if !inner.stop.is_cancelled() && inner.room.may_merge(inner.step_bytes.min(inner.state.file_bytes())) {
        inner.state.merge();
    }
    if !is_full {
        set(true);
    }
    Merged { by_itself: !is_full, had_turn: true }
}
