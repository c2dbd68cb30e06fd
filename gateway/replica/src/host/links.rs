//! Exchanges the heartbeats of links with the other disks, and does what [`crate::sleep`] and [`crate::clock`] decide.

use super::{lock, MetaHost};
use crate::batching::Batcher;
use crate::message::{decode_message, encode_message, LinkBeat};
use crate::sleep::{Action, Facts, SleepTiming, Sleepers};
use granary_placement::id::DiskId;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// How often a disk that leads looks whether it is the one that answers at its own address.
const LOOK_AT_HOME: Duration = Duration::from_secs(5);

/// The links of a disk.
pub(super) struct Links {
    sleepers: Mutex<Sleepers>,
    /// Disks that a beat is on its way to: one at a time.
    asking: Mutex<BTreeSet<DiskId>>,
    /// Beats sent or answered.
    pub(super) beats: AtomicU64,
    /// Another disk answers at this disk's address.
    displaced: AtomicBool,
}

impl Links {
    pub(super) fn new(timing: SleepTiming) -> Links {
        Links {
            sleepers: Mutex::new(Sleepers::new(timing)),
            asking: Mutex::default(),
            beats: AtomicU64::new(0),
            displaced: AtomicBool::new(false),
        }
    }

    pub(super) fn is_displaced(&self) -> bool {
        self.displaced.load(Ordering::Relaxed)
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
        if host.may_sleep() {
            act(&host, lock(&links.sleepers).observe(Instant::now(), &facts));
        }
        give_way(&host).await;
        let running = facts.iter().filter(|facts| facts.running);
        let peers: BTreeSet<DiskId> = running.flat_map(|facts| facts.others.iter().copied()).collect();
        for peer in peers.into_iter().filter(|peer| me < *peer) {
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
    let beat = host.beat_for(peer, &facts);
    let Ok(message) = encode_message(&beat) else { return };
    inner.links.beats.fetch_add(1, Ordering::Relaxed);
    let (deadline, asked_ms) = (inner.config.timing.link_beat(), inner.config.clock.now_ms());
    let answer = tokio::time::timeout(deadline, inner.peers.transport.link_beat(peer, message, deadline)).await;
    match answer {
        Ok(Ok(answer)) => match decode_message::<LinkBeat>(&answer) {
            Ok(beat) => {
                // It was told between these two moments.
                let mine_ms = asked_ms / 2 + inner.config.clock.now_ms() / 2;
                inner.clocks.hear(peer, beat.clock_ms, mine_ms);
                inner.room.hear(peer, beat.is_full, Instant::now());
                take(host, peer, &beat, &host.facts());
            }
            Err(error) => tracing::warn!(%peer, %error, "a link heartbeat cannot be read"),
        },
        Ok(Err(error)) => tracing::debug!(%peer, %error, "no answer to a link heartbeat"),
        Err(_) => tracing::debug!(%peer, "no answer to a link heartbeat in time"),
    }
}

impl MetaHost {
    fn may_sleep(&self) -> bool {
        self.inner.config.timing.sleep_after_ms > 0
    }

    fn beat_for(&self, peer: DiskId, facts: &[Facts]) -> LinkBeat {
        let beat = lock(&self.inner.links.sleepers).beat_for(peer, facts);
        LinkBeat { clock_ms: self.inner.config.clock.now_ms(), is_full: self.inner.room.is_full(), ..beat }
    }
}

/// Looks, until the host ends, whether another disk answers at this disk's address. Two disks that were started on each
/// other's addresses still reach all others and can be elected, but gateways look for them where they are not.
pub(super) async fn look_at_home(host: MetaHost) {
    let (inner, links) = (&host.inner, &host.inner.links);
    let mut look = tokio::time::interval(LOOK_AT_HOME);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = inner.stop.cancelled() => return,
            _ = look.tick() => {}
        }
        let leads = |batcher: &Batcher| batcher.replica.status().leader == Some(inner.config.disk);
        let was = links.is_displaced();
        if !was && !host.running().iter().any(|(_, batcher)| leads(batcher)) {
            continue;
        }
        let is = tokio::select! {
            () = inner.stop.cancelled() => return,
            is = inner.peers.transport.is_displaced(LOOK_AT_HOME) => is.unwrap_or(was),
        };
        links.displaced.store(is, Ordering::Relaxed);
        match (was, is) {
            (false, true) => {
                tracing::error!(
                    "another disk answers at this disk's address: it leads no shard until it is found there"
                )
            }
            (true, false) => tracing::info!("this disk is found at its address again"),
            _ => {}
        }
    }
}

/// Hands over what is led here while the clock of this disk is off, no gateway finds it, or it has no room for
/// commands and another voter has.
async fn give_way(host: &MetaHost) {
    let mut off = None;
    let displaced = host.inner.links.is_displaced();
    let is_low = host.inner.room.is_low();
    for (_, batcher) in host.running() {
        let status = batcher.replica.status();
        let ahead_ms = host.clock_off(&status);
        off = ahead_ms.or(off);
        if is_low && status.leader == Some(host.inner.config.disk) {
            let now = Instant::now();
            batcher.replica.hand_over_to(|disk| host.inner.room.has_another_room(&[disk], now)).await;
        }
        if (ahead_ms.is_some() || displaced) && status.leader == Some(host.inner.config.disk) {
            batcher.replica.hand_over().await;
        }
    }
    if host.inner.clocks.news(off.is_some()) {
        match off {
            Some(ahead_ms) => {
                tracing::warn!(ahead_ms, "this disk's clock is off its majority's: it leads no shard until it is set")
            }
            None => tracing::info!("this disk's clock agrees with its majority's again"),
        }
    }
}

fn take(host: &MetaHost, from: DiskId, beat: &LinkBeat, facts: &[Facts]) {
    if !host.may_sleep() {
        return;
    }
    let actions = lock(&host.inner.links.sleepers).take(Instant::now(), from, beat, facts);
    act(host, actions);
}

/// Takes a beat that another disk sent; gives what to answer.
pub(super) fn answer(host: &MetaHost, from: DiskId, beat: &LinkBeat) -> LinkBeat {
    host.inner.links.beats.fetch_add(1, Ordering::Relaxed);
    host.inner.clocks.hear(from, beat.clock_ms, host.inner.config.clock.now_ms());
    host.inner.room.hear(from, beat.is_full, Instant::now());
    let facts = host.facts();
    take(host, from, beat, &facts);
    host.beat_for(from, &facts)
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
