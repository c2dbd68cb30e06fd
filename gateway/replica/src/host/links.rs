//! Exchanges the heartbeats of links with the other disks, and does what [`crate::sleep`] decides.

use super::{lock, MetaHost};
use crate::message::{decode_message, encode_message, LinkBeat};
use crate::sleep::{Action, Facts, SleepTiming, Sleepers};
use granary_placement::id::DiskId;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use std::time::Instant;
use tokio::time::MissedTickBehavior;

/// The links of a disk.
pub(super) struct Links {
    sleepers: Mutex<Sleepers>,
    /// Disks that a beat is on its way to: one at a time.
    asking: Mutex<BTreeSet<DiskId>>,
    /// Beats sent or answered.
    pub(super) beats: AtomicU64,
}

impl Links {
    pub(super) fn new(timing: SleepTiming) -> Links {
        Links { sleepers: Mutex::new(Sleepers::new(timing)), asking: Mutex::default(), beats: AtomicU64::new(0) }
    }
}

/// Sends beats until the host ends. Of two disks the one with the lower id sends and the other answers.
pub(super) async fn run(host: MetaHost) {
    let (links, me, stop) = (&host.inner.links, host.inner.config.disk, &host.inner.stop);
    let mut beat = tokio::time::interval(host.inner.config.timing.link_beat());
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = beat.tick() => {}
        }
        let facts = host.facts();
        act(&host, lock(&links.sleepers).observe(Instant::now(), &facts));
        for peer in Sleepers::peers(&facts).into_iter().filter(|peer| me < *peer) {
            if !lock(&links.asking).insert(peer) {
                continue;
            }
            let (host, stop) = (host.clone(), stop.clone());
            host.clone().inner.tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = exchange(&host, peer) => {}
                }
                lock(&host.inner.links.asking).remove(&peer);
            });
        }
    }
}

/// One beat there and one back. Without an answer nothing is done: the link is lost when none comes for long.
async fn exchange(host: &MetaHost, peer: DiskId) {
    let inner = &host.inner;
    let facts = host.facts();
    let beat = lock(&inner.links.sleepers).beat_for(peer, &facts);
    let Ok(message) = encode_message(&beat) else { return };
    inner.links.beats.fetch_add(1, Ordering::Relaxed);
    let deadline = inner.config.timing.link_beat();
    let answer = tokio::time::timeout(deadline, inner.peers.transport.link_beat(peer, message, deadline)).await;
    match answer {
        Ok(Ok(answer)) => match decode_message::<LinkBeat>(&answer) {
            Ok(beat) => take(host, peer, &beat, &host.facts()),
            Err(error) => tracing::warn!(%peer, %error, "a link heartbeat cannot be read"),
        },
        Ok(Err(error)) => tracing::debug!(%peer, %error, "no answer to a link heartbeat"),
        Err(_) => tracing::debug!(%peer, "no answer to a link heartbeat in time"),
    }
}

fn take(host: &MetaHost, from: DiskId, beat: &LinkBeat, facts: &[Facts]) {
    let actions = lock(&host.inner.links.sleepers).take(Instant::now(), from, beat, facts);
    act(host, actions);
}

/// Takes a beat that another disk sent; gives what to answer.
pub(super) fn answer(host: &MetaHost, from: DiskId, beat: &LinkBeat) -> LinkBeat {
    host.inner.links.beats.fetch_add(1, Ordering::Relaxed);
    let facts = host.facts();
    if host.inner.config.timing.sleep_after_ms > 0 {
        take(host, from, beat, &facts);
    }
    let answer = lock(&host.inner.links.sleepers).beat_for(from, &facts);
    answer
}

fn act(host: &MetaHost, actions: Vec<Action>) {
    for action in actions {
        let shard = match &action {
            Action::SleepAsLeader(at, _) | Action::SleepAsFollower(at, _) => at.shard,
            Action::Wake(shard, _) => *shard,
        };
        let Ok(batcher) = host.batcher(shard) else { continue };
        match action {
            Action::SleepAsLeader(at, commands) => batcher.replica.sleep_as_leader(&at, commands),
            Action::SleepAsFollower(at, leader) => batcher.replica.sleep_as_follower(&at, leader),
            Action::Wake(_, why) => batcher.replica.wake(why),
        }
    }
}
