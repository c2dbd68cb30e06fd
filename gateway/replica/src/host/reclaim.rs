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
        match room.look() {
            Some(true) => {
                tracing::error!("less than node.meta_reserve is free on this disk's file system: shards with a voter here take deletes and repairs only; delete objects, or remove what else fills it")
            }
            Some(false) => tracing::info!("there is room for metadata again"),
            None => {}
        }
        if room.is_full() && merged.is_none_or(|merged| merged.elapsed() >= MERGE_EVERY) {
            let (state, log) = (host.inner.state.clone(), host.inner.log.clone());
            // The log first: it was purged, so next to nothing of it is written anew.
            let may_merge = room.may_merge();
            let merging = tokio::task::spawn_blocking(move || {
                log.merge();
                if may_merge {
                    state.merge();
                }
            });
            tokio::select! {
                () = stop.cancelled() => {
                    host.inner.state.end_merging();
                    host.inner.log.end_merging();
                    return;
                }
                done = merging => if let Err(error) = done {
                    tracing::warn!(%error, "old metadata could not be merged");
                }
            }
            merged = Some(Instant::now());
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(if room.is_near() { LOOK_NEAR } else { LOOK }) => {}
        }
    }
}
