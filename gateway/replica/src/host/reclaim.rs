//! Watches the room on the disk, and gives back what was deleted when there is little.

use super::MetaHost;
use std::time::{Duration, Instant};

/// Between two looks, and between two on a disk that is nearly full: in between it may fill by what it can write.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_NEAR: Duration = Duration::from_millis(50);
/// Between two merges of old data on a full disk.
const MERGE_EVERY: Duration = Duration::from_secs(10);

/// Does so until the host ends.
pub(super) async fn run(host: MetaHost) {
    let (room, stop) = (&host.inner.room, &host.inner.stop);
    let mut merged: Option<Instant> = None;
    loop {
        let looked = room.look();
        match looked {
            Some(true) => {
                tracing::error!("less than node.meta_reserve is free on this disk's file system: shards with a voter here take deletes and repairs only; delete objects, or remove what else fills it")
            }
            Some(false) => tracing::info!("there is room for metadata again"),
            None => {}
        }
        if let Some(is_full) = looked {
            // When a database merges by itself, it does not look whether there is room.
            host.inner.state.set_merging(!is_full);
            host.inner.log.set_merging(!is_full);
        }
        if room.is_full() && merged.is_none_or(|merged| merged.elapsed() >= MERGE_EVERY) {
            let merging = tokio::task::spawn_blocking({
                let host = host.clone();
                move || merge(&host)
            });
            let done = tokio::select! {
                () = stop.cancelled() => {
                    host.inner.state.end_merging();
                    host.inner.log.end_merging();
                    return;
                }
                done = merging => done,
            };
            match done {
                Ok(true) => merged = Some(Instant::now()),
                // It is another's turn.
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "old metadata could not be merged");
                    merged = Some(Instant::now());
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(if room.is_near() { LOOK_NEAR } else { LOOK }) => {}
        }
    }
}

/// Merges what there is room for, if it is this node's turn. Blocks.
fn merge(host: &MetaHost) -> bool {
    let inner = &host.inner;
    let Some(_turn) = inner.room.turn() else { return false };
    // The log first: it was purged, so little of it is written anew.
    let log_bytes = host.running().iter().map(|(_, batcher)| batcher.replica.log_bytes()).sum();
    if inner.room.may_merge(log_bytes) {
        inner.log.merge();
    }
    // What was deleted counts once it is in files. A failure is told by whoever writes.
    if !inner.room.is_exhausted() && inner.state.flush().is_ok() && inner.room.may_merge(inner.state.merged_bytes()) {
        inner.state.merge();
    }
    true
}
