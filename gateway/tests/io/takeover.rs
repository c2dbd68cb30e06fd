//! Gateways that are paused or killed while they repair damaged chunks, and disks that are killed under them.
//!
//! A gateway here is a thread with a runtime of its own, so that it can be stopped as a whole, timers and all, and does
//! not know how long it was stopped. Each disk node counts its requests step by step (`Disk::at_step`); at random steps
//! somebody is paused or killed. Whatever happens, no request may take a good block away from a disk (`Disk::spoiled`,
//! looked at under the lock of every change), and in the end every chunk is whole.

use crate::cluster::{seed, Cluster, UNIT};
use crate::heal::{all_contents, chunk, objects_of, settings, small};
use crate::meta::Meta;
use crate::node::{AtStep, Damage};
use granary_gateway::background::heal::{HealSettings, Healer, HEAL_TASK};
use granary_gateway::background::leases::LeaseSettings;
use granary_gateway::disks::{DiskSettings, Disks};
use granary_gateway::metrics::Metrics;
use granary_gateway::object::choose::Draw;
use granary_gateway::object::{chunk_id, ObjectStore};
use granary_gateway::shards::{Shards, Timing};
use granary_meta::record::ExtentRef;
use granary_placement::id::ShardId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const TTL: Duration = Duration::from_millis(60);
/// Pauses are up to three times as long as a lease lives.
const LONGEST_PAUSE_MS: u64 = 180;

fn hasty() -> HealSettings {
    HealSettings {
        interval: Duration::from_millis(5),
        // A block at a time: many steps in which a gateway can be stopped.
        window_bytes: UNIT,
        first_backoff: Duration::from_millis(5),
        longest_backoff: Duration::from_millis(40),
        lease: LeaseSettings { ttl: TTL },
        ..settings()
    }
}

fn hasty_disks() -> DiskSettings {
    DiskSettings {
        ping_interval: Duration::from_millis(10),
        suspect_hold: Duration::from_millis(5),
        unwritable_hold: Duration::from_millis(5),
        ..crate::cluster::quick_disks()
    }
}

/// A gateway that heals.
struct Gateway {
    runtime: Handle,
    killed: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl Gateway {
    fn start(cluster: &Cluster, name: String) -> Gateway {
        let (map, credentials) = (cluster.map.clone(), cluster.credentials.clone());
        let (peers, settings) = (cluster.peers.another_way(), cluster.store.settings().clone());
        let killed = CancellationToken::new();
        let until = killed.clone();
        let (tell, runtime) = mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            tell.send(runtime.handle().clone()).unwrap();
            runtime.block_on(async move {
                let timing = Timing { deadline: Duration::from_millis(300), ..Timing::default() };
                let shards = Shards::with_timing(peers, map.clone(), Metrics::new().unwrap(), timing);
                let store = ObjectStore::new(Disks::new(map.subscribe(), credentials, None, hasty_disks()), settings);
                let hasty = watch::channel(hasty()).1;
                let _healer = Healer::start(store, shards, hasty, name, CancellationToken::new());
                until.cancelled().await;
            });
            // What is left of it goes with the runtime, in the middle of whatever it did. No lease is given back.
            runtime.shutdown_background();
        });
        Gateway { runtime: runtime.recv().unwrap(), killed, thread: Some(thread) }
    }

    /// Stops everything in it for a while.
    fn pause(&self, time: Duration) {
        self.runtime.spawn(async move { thread::sleep(time) });
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.killed.cancel();
        self.thread.take().unwrap().join().unwrap();
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    PauseHolder(Duration),
    KillHolder,
    KillDisk(usize),
}

/// Damages chunks of an extent so that four good blocks of each row are left. Gives the chunks.
fn damage(cluster: &Cluster, extent: &ExtentRef, draw: &mut Draw) -> BTreeSet<u8> {
    let rows = extent.layout().chunk_len().div_ceil(UNIT) as u32;
    let mut damaged = BTreeSet::new();
    let gone = draw.number().is_multiple_of(3).then(|| (draw.number() % 6) as u8);
    if let Some(gone) = gone {
        cluster.holder(extent, gone).chunks.lock().unwrap().remove(&chunk_id(extent, gone));
        damaged.insert(gone);
    }
    for row in 0..rows {
        let bad: BTreeSet<u8> = (0..2).map(|_| (draw.number() % 6) as u8).chain(gone).collect();
        for index in bad.into_iter().filter(|index| Some(*index) != gone).take(2 - usize::from(gone.is_some())) {
            let kind = [Damage::Flip, Damage::Noticed, Damage::Misplaced][(draw.number() % 3) as usize];
            cluster.damage(extent, index, row, kind);
            damaged.insert(index);
        }
    }
    damaged
}

fn holder(meta: &Meta) -> Option<usize> {
    let held = meta.leases().into_iter().find(|lease| lease.task == HEAL_TASK && lease.holder.is_some())?;
    held.address.parse().ok()
}

fn nothing_is_spoiled(cluster: &Cluster, shown: &str) {
    for disk in &cluster.disks {
        let spoiled = disk.spoiled.lock().unwrap().clone();
        assert!(spoiled.is_empty(), "good blocks were taken away from {spoiled:?} on disk {}: {shown}", disk.id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_pause_and_no_kill_of_healers_and_disks_takes_a_good_block_away() {
    let mut draw = seed("no_pause_and_no_kill_of_healers_and_disks_takes_a_good_block_away");
    let rounds = std::env::var("GRANARY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = objects_of(&cluster, &meta, &mut draw, &[UNIT * 11, UNIT * 9 + 5, UNIT * 10]).await;
    let extents: Vec<ExtentRef> = objects.iter().flat_map(|(data, _)| data.extents().to_vec()).collect();
    let before = all_contents(&cluster);
    let gateways: Mutex<Vec<Gateway>> =
        Mutex::new((0..2).map(|name: usize| Gateway::start(&cluster, name.to_string())).collect());
    let (mut events_met, mut killed_gateways) = (0, 0);
    for round in 0..rounds {
        let mut plan: BTreeMap<u64, Event> = BTreeMap::new();
        for _ in 0..draw.number() % 4 {
            let event = match draw.number() % 4 {
                0 | 1 => Event::PauseHolder(Duration::from_millis(20 + draw.number() % LONGEST_PAUSE_MS)),
                2 => Event::KillHolder,
                _ => Event::KillDisk((draw.number() % 6) as usize),
            };
            plan.insert(draw.number() % 200, event);
        }
        let shown = format!("round {round}: {plan:?}");
        let (steps, (happened, mut happens)) = (AtomicU64::new(0), tokio::sync::mpsc::unbounded_channel());
        let at_step: AtStep = Arc::new(move |_| {
            if let Some(event) = plan.get(&steps.fetch_add(1, Ordering::SeqCst)) {
                let _ = happened.send(*event);
            }
        });
        for disk in &cluster.disks {
            *disk.at_step.lock().unwrap() = Some(at_step.clone());
        }
        drop(at_step);
        for extent in &extents {
            for index in damage(&cluster, extent, &mut draw) {
                [1, 2].into_iter().for_each(|shard| meta.report(ShardId(shard), chunk(extent, index)));
            }
        }
        let begun = Instant::now();
        let whole = || meta.missing() == 0 && cluster.disks.iter().all(|disk| disk.damage.lock().unwrap().is_empty());
        while !whole() || all_contents(&cluster) != before {
            nothing_is_spoiled(&cluster, &shown);
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not become whole: {shown}");
            let event = tokio::time::timeout(Duration::from_millis(2), happens.recv()).await;
            let Ok(Some(event)) = event else { continue };
            events_met += 1;
            let at = holder(&meta).unwrap_or_default();
            match event {
                Event::PauseHolder(time) => gateways.lock().unwrap()[at].pause(time),
                Event::KillHolder => {
                    killed_gateways += 1;
                    let another = Gateway::start(&cluster, at.to_string());
                    let old = std::mem::replace(&mut gateways.lock().unwrap()[at], another);
                    tokio::task::spawn_blocking(move || drop(old)).await.unwrap();
                }
                Event::KillDisk(place) => {
                    cluster.disks[place].kill();
                    tokio::time::sleep(Duration::from_millis(draw.number() % 40)).await;
                    cluster.revive_at_once(place).await;
                }
            }
        }
        cluster.disks.iter().for_each(|disk| *disk.at_step.lock().unwrap() = None);
        nothing_is_spoiled(&cluster, &shown);
    }
    let refused: u64 = cluster.disks.iter().map(|disk| disk.refused_stale.load(Ordering::SeqCst)).sum();
    assert!(refused > 0 || rounds < 200, "no paused gateway met its successor: nothing was shown");
    println!("{rounds} rounds, {events_met} events, {killed_gateways} gateways killed, {refused} requests refused");
}
