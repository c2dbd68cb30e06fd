//! Repairs and garbage, one healer at a time; what tests of healing share.

use crate::cluster::{body, payload, seed, Cluster, UNIT};
use crate::meta::Meta;
use crate::node::{Damage, Disk};
use crate::peers::Kind;
use bytes::Bytes;
use granary_gateway::background::heal::{HealSettings, Healer, HEAL_TASK};
use granary_gateway::background::leases::LeaseSettings;
use granary_gateway::disks::DiskHealth;
use granary_gateway::metrics::Metrics;
use granary_gateway::object::choose::Draw;
use granary_gateway::object::{chunk_id, ObjectSettings};
use granary_gateway::shards::{Shards, Timing};
use granary_meta::record::{ExtentRef, ObjectData};
use granary_meta::{ChunkRef, Query};
use granary_placement::id::{ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_wire::chunk::{ChunkId, ChunkSpec};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

pub fn settings() -> HealSettings {
    HealSettings {
        interval: Duration::from_millis(50),
        move_settle: Duration::from_millis(100),
        window_bytes: 2 * UNIT,
        first_backoff: Duration::from_millis(200),
        garbage_grace: Duration::from_secs(60),
        garbage_backoff: Duration::from_millis(100),
        ..HealSettings::default()
    }
}

pub fn small() -> ObjectSettings {
    ObjectSettings { extent_bytes: 11 * UNIT + 77, ..ObjectSettings::default() }
}

pub fn heal(cluster: &Cluster, meta: &Meta) -> (Healer, DropGuard) {
    heal_by(cluster, meta.shards.clone(), settings())
}

/// Heals, with this way to the shards.
pub fn heal_by(cluster: &Cluster, shards: Shards, settings: HealSettings) -> (Healer, DropGuard) {
    let (stop, settings) = (CancellationToken::new(), watch::channel(settings).1);
    let healer = Healer::start(cluster.store.clone(), shards, settings, String::new(), stop.clone());
    (healer, stop.drop_guard())
}

/// Objects in both shards, with what they hold.
pub async fn fill(cluster: &Cluster, meta: &Meta, draw: &mut Draw) -> Vec<(ObjectData, Bytes)> {
    objects_of(cluster, meta, draw, &[8193, UNIT * 4, UNIT * 9 + 5, UNIT * 25 + 1000]).await
}

pub async fn objects_of(cluster: &Cluster, meta: &Meta, draw: &mut Draw, lens: &[u64]) -> Vec<(ObjectData, Bytes)> {
    let mut objects = Vec::new();
    for &len in lens {
        let payload = payload(len, draw);
        let shard = ShardId(1 + (len % 2) as u16);
        let (key, slot) = key_in(cluster, shard, len);
        let staged = cluster.store.stage(None, slot, len, body(&payload, draw)).await.unwrap();
        meta.commit(shard, &key, &staged.data, &staged.placement());
        objects.push((staged.data.clone(), payload));
        staged.committed();
    }
    objects
}

/// A key of the shard, in the bucket that all objects here are in.
pub fn key_in(cluster: &Cluster, shard: ShardId, len: u64) -> (String, HashSlot) {
    let map = cluster.map.borrow().clone().unwrap();
    let keys = (0..).map(|number| format!("key-{len}-{number}")).map(|key| (HashSlot::of(1, &key), key));
    let mut keys = keys.filter(|(slot, _)| map.shard_of_slot(*slot) == Some(shard));
    keys.next().map(|(slot, key)| (key, slot)).unwrap()
}

pub type Contents = BTreeMap<ChunkId, (Bytes, Vec<u32>, ChunkSpec)>;

/// What lies on a disk, without when it was written.
pub fn contents(disk: &Disk) -> Contents {
    let chunks = disk.chunks.lock().unwrap();
    let plain = |spec: ChunkSpec| ChunkSpec { created_ms: 0, ..spec };
    chunks.iter().map(|(id, stored)| (*id, (stored.bytes.clone(), stored.crcs.clone(), plain(stored.spec)))).collect()
}

pub fn all_contents(cluster: &Cluster) -> Vec<Contents> {
    cluster.disks.iter().map(|disk| contents(disk)).collect()
}

pub fn chunk(extent: &ExtentRef, index: u8) -> ChunkRef {
    ChunkRef { group: extent.group, extent: extent.extent, index }
}

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64
}

pub fn counter(value: &AtomicU64) -> u64 {
    value.load(Ordering::Relaxed)
}

/// A healer that finds nothing for a while rests for half a minute. One that cannot know what there is must not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_cannot_be_read_is_asked_for_again_and_again() {
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let timing = Timing { deadline: Duration::from_millis(40), ..Timing::default() };
    let (peers, map) = (cluster.peers.clone(), cluster.map.clone());
    let shards = Shards::with_timing(peers, map, Metrics::new().unwrap(), timing);
    let (healer, _stop) = heal_by(&cluster, shards, settings());
    // A walk that ends would wake the healer.
    cluster.until("all disks were walked", || healer.status().walks_done >= 6).await;
    let chunks: Kind = |query| matches!(query, Query::ListMissing { .. });
    let slots: Kind = |query| matches!(query, Query::ListRepairSlots { .. });
    for (what, queue) in [("chunks", chunks), ("slots", slots)] {
        meta.lose_queries(Some((ShardId(1), queue)));
        healer.poke();
        // More often than a healer looks that finds nothing, before it rests.
        let before = meta.looks(ShardId(2));
        cluster.until(&format!("{what} are looked for on and on"), || meta.looks(ShardId(2)) >= before + 20).await;
        meta.lose_queries(None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_and_corrupt_chunks_come_back_byte_for_byte() {
    let mut draw = seed("missing_and_corrupt_chunks_come_back_byte_for_byte");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(3);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let before = all_contents(&cluster);
    let mut broken = 0;
    for (data, _) in &objects {
        for extent in data.extents() {
            let (first, second) = ((draw.number() % 6) as u8, (draw.number() % 6) as u8);
            cluster.holder(extent, first).chunks.lock().unwrap().remove(&chunk_id(extent, first));
            let block = draw.number() % extent.layout().chunk_len().div_ceil(UNIT);
            if second != first {
                cluster.damage(extent, second, block as u32, Damage::Flip);
            }
            for index in [first, second] {
                [1, 2].into_iter().for_each(|shard| meta.report(ShardId(shard), chunk(extent, index)));
            }
            broken += if first == second { 1 } else { 2 };
        }
    }
    let (healer, _stop) = heal(&cluster, &meta);
    cluster.until("the queues are empty", || meta.missing() == 0).await;
    assert!(all_contents(&cluster) == before);
    assert!(cluster.disks.iter().all(|disk| disk.damage.lock().unwrap().is_empty()));
    assert_eq!(counter(&cluster.store.counters().chunks_rebuilt), broken);
    let census = healer.census(|_| {}).await.unwrap();
    assert!(census.is_complete());
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_comes_back_empty_is_filled_again() {
    let mut draw = seed("a_disk_that_comes_back_empty_is_filled_again");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let (healer, _stop) = heal(&cluster, &meta);
    let before = contents(&cluster.disks[4]);
    // The walks at the start must be over, or they would find it empty.
    cluster.until("all disks are walked", || healer.status().walks_done == 6).await;
    cluster.kill(4).await;
    cluster.disks[4].chunks.lock().unwrap().clear();
    cluster.revive(4).await;
    cluster.until("it is full again", || contents(&cluster.disks[4]) == before && meta.missing() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_comes_back_empty_is_queued_by_its_slot_and_not_by_its_chunks() {
    let mut draw = seed("a_disk_that_comes_back_empty_is_queued_by_its_slot_and_not_by_its_chunks");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let lens: Vec<u64> = (9000..9090).collect();
    let objects = objects_of(&cluster, &meta, &mut draw, &lens).await;
    let (healer, stop) = heal(&cluster, &meta);
    let before = contents(&cluster.disks[4]);
    cluster.until("all disks are walked", || healer.status().walks_done == 6).await;
    healer.pace().pause(Duration::from_secs(3600));
    cluster.kill(4).await;
    cluster.disks[4].chunks.lock().unwrap().clear();
    cluster.revive(4).await;
    let queued = || [1, 2].map(|shard| meta.queued_slots(ShardId(shard)).len());
    cluster.until("its slot is queued in both shards", || queued() == [1, 1]).await;
    cluster.until("it is walked", || healer.status().walks_done == 7).await;
    assert_eq!((queued(), meta.missing()), ([1, 1], 0), "45 chunks in each shard are one entry");
    // The gateway that healed goes; another goes on.
    drop(stop);
    healer.stopped().await;
    let (_other, _stop) = heal(&cluster, &meta);
    cluster.until("it is full again", || contents(&cluster.disks[4]) == before && queued() == [0, 0]).await;
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_holder_could_not_bring_into_a_slot_is_brought_by_the_next() {
    let mut draw = seed("what_an_earlier_holder_could_not_bring_into_a_slot_is_brought_by_the_next");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let before = contents(&cluster.disks[4]);
    let quick = HealSettings { lease: LeaseSettings { ttl: Duration::from_millis(200) }, ..settings() };
    let stop = CancellationToken::new();
    let quick = watch::channel(quick).1;
    let healer = Healer::start(cluster.store.clone(), meta.shards.clone(), quick, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    cluster.until("all disks are walked", || healer.status().walks_done == 6).await;
    // The disk lost chunks, its slot was queued and looked through, and one chunk could not be brought: the cursor is
    // past it. Then the holder loses its lease, and with it what it remembers of that.
    healer.pace().pause(Duration::from_secs(3600));
    cluster.peers.cut_off(true);
    let epoch = || meta.leases().iter().find(|lease| lease.task == HEAL_TASK).map_or(0, |lease| lease.epoch);
    let held = epoch();
    cluster.disks[4].chunks.lock().unwrap().pop_first();
    for shard in [1, 2] {
        meta.looked_through(ShardId(shard), (PlacementGroupId(1), 4), ExtentId([0xff; 16]), held);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.peers.cut_off(false);
    cluster.until("the lease is taken again", || epoch() > held).await;
    healer.pace().pause(Duration::ZERO);
    let queued = || [1, 2].map(|shard| meta.queued_slots(ShardId(shard)).len());
    cluster.until("the slot is done", || queued() == [0, 0]).await;
    assert!(contents(&cluster.disks[4]) == before, "nobody else would look for it again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_write_could_not_place_is_placed_when_the_disk_is_back() {
    let mut draw = seed("what_a_write_could_not_place_is_placed_when_the_disk_is_back");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let (healer, _stop) = heal(&cluster, &meta);
    cluster.kill(3).await;
    fill(&cluster, &meta, &mut draw).await;
    let queued = meta.missing();
    assert!(queued > 0 && cluster.disks[3].count() == 0);
    cluster.until("the status shows it", || healer.status().queued_chunks == queued as u64).await;
    assert_eq!(healer.status().extents_by_failures_left, BTreeMap::from([(1, queued as u64)]));
    cluster.revive(3).await;
    cluster.until("the queues are empty", || meta.missing() == 0).await;
    assert_eq!(cluster.disks[3].count(), queued);
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_reader_finds_is_repaired_and_what_is_good_is_left_alone() {
    let mut draw = seed("what_a_reader_finds_is_repaired_and_what_is_good_is_left_alone");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let before = all_contents(&cluster);
    let (healer, _stop) = heal(&cluster, &meta);
    let (data, payload) = &objects[3];
    let extent = &data.extents()[1];
    // The walks at the start must be over, or they would find the missing chunk.
    cluster.until("all disks are walked", || healer.status().walks_done == 6).await;
    cluster.holder(extent, 1).chunks.lock().unwrap().remove(&chunk_id(extent, 1));
    cluster.damage(extent, 3, 0, Damage::Noticed);
    meta.report(ShardId(1), chunk(&objects[1].0.extents()[0], 0));
    cluster.check(data, payload, 0..payload.len() as u64).await;
    let counters = cluster.store.counters();
    cluster.until("both are rebuilt", || counter(&counters.chunks_rebuilt) == 2 && meta.missing() == 0).await;
    assert!(all_contents(&cluster) == before);
    assert_eq!(counter(&counters.chunks_found_good), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extent_beyond_repair_stays_queued_and_untouched_and_is_not_tried_all_the_time() {
    let mut draw = seed("an_extent_beyond_repair_stays_queued_and_untouched_and_is_not_tried_all_the_time");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let extent = &objects[1].0.extents()[0];
    for index in [0, 2, 4] {
        cluster.damage(extent, index, 0, Damage::Flip);
        meta.report(ShardId(1), chunk(extent, index));
    }
    let before = all_contents(&cluster);
    let (healer, _stop) = heal(&cluster, &meta);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(meta.missing(), 3);
    assert!(all_contents(&cluster) == before, "a corrupt chunk is not deleted before its replacement is at hand");
    let failed = counter(&cluster.store.counters().rebuilds_failed);
    assert!((1..=6).contains(&failed), "{failed} tries in a second of backing off");
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!((census.extents_lost, census.corrupt, census.lost[0].good), (1, 3, 3));
    // One of the three comes back: two can be rebuilt.
    cluster.holder(extent, 2).damage.lock().unwrap().clear();
    cluster.until("the queue is empty", || meta.missing() == 0).await;
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_with_bad_blocks_in_different_places_are_repaired_block_by_block() {
    let mut draw = seed("chunks_with_bad_blocks_in_different_places_are_repaired_block_by_block");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = objects_of(&cluster, &meta, &mut draw, &[UNIT * 11]).await;
    let before = all_contents(&cluster);
    let (data, payload) = &objects[0];
    let extent = &data.extents()[0];
    let blocks = extent.layout().chunk_len().div_ceil(UNIT) as u32;
    assert!(blocks >= 2);
    // Four of six chunks are corrupt and one is gone: one chunk whole is left, and yet four good blocks of each row.
    for (index, block) in [(0, 0), (1, 1), (2, 2 % blocks)] {
        cluster.damage(extent, index, block, if index == 1 { Damage::Flip } else { Damage::Noticed });
    }
    cluster.holder(extent, 5).chunks.lock().unwrap().remove(&chunk_id(extent, 5));
    for index in [0, 1, 2, 5] {
        meta.report(ShardId(1 + (UNIT * 11 % 2) as u16), chunk(extent, index));
    }
    let (healer, _stop) = heal(&cluster, &meta);
    cluster.until("the queue is empty", || meta.missing() == 0).await;
    assert!(all_contents(&cluster) == before);
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
    cluster.check(data, payload, 0..payload.len() as u64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_chunk_stays_until_the_whole_of_its_replacement_is_there() {
    let mut draw = seed("a_corrupt_chunk_stays_until_the_whole_of_its_replacement_is_there");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = objects_of(&cluster, &meta, &mut draw, &[UNIT * 11]).await;
    let extent = &objects[0].0.extents()[0];
    cluster.damage(extent, 1, 0, Damage::Noticed);
    let place = cluster.disks.iter().position(|disk| disk.id == cluster.holder(extent, 1).id).unwrap();
    let before = contents(&cluster.disks[place]);
    // The disk dies when the replacement is half written.
    cluster.disks[place].die_after_bytes.store(UNIT, Ordering::SeqCst);
    meta.report(ShardId(1 + (UNIT * 11 % 2) as u16), chunk(extent, 1));
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster
        .until("the disk is down", || cluster.store.disks().health(cluster.disks[place].id) == DiskHealth::Down)
        .await;
    assert!(contents(&cluster.disks[place]) == before, "its other blocks are still there");
    cluster.disks[place].die_after_bytes.store(u64::MAX, Ordering::SeqCst);
    cluster.revive(place).await;
    cluster.until("the queue is empty", || meta.missing() == 0).await;
    assert!(contents(&cluster.disks[place]) == before && cluster.disks[place].damage.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_that_waits_for_a_disk_holds_up_no_other() {
    let mut draw = seed("garbage_that_waits_for_a_disk_holds_up_no_other");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(1);
    let shard = ShardId(2);
    // Three over all six disks; then two are down, and the next is written to the four others.
    let wide = objects_of(&cluster, &meta, &mut draw, &[UNIT + 1, UNIT + 3, UNIT + 5]).await;
    for place in [4, 5] {
        cluster.kill(place).await;
        let id = cluster.disks[place].id;
        cluster.until("the disk is down", || cluster.store.disks().health(id) == DiskHealth::Down).await;
    }
    let narrow = objects_of(&cluster, &meta, &mut draw, &[UNIT + 7]).await;
    let (wide, narrow): (Vec<_>, _) =
        (wide.iter().map(|(data, _)| data.extents()[0].clone()).collect(), narrow[0].0.extents()[0].clone());
    assert_eq!(narrow.slots, [0, 1, 2, 3]);
    for (extent, age_ms) in wide.iter().chain([&narrow]).zip([64_000, 63_000, 62_000, 61_000]) {
        meta.delete(shard, extent, now_ms() - age_ms);
    }
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.until("what needs no dead disk is gone", || !meta.is_garbage(shard, &narrow)).await;
    cluster.revive(4).await;
    cluster.revive(5).await;
    cluster.until("all is gone", || cluster.chunks() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_goes_after_its_grace_and_nothing_that_is_alive_ever_does() {
    let mut draw = seed("garbage_goes_after_its_grace_and_nothing_that_is_alive_ever_does");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (old, young, alive) = (&objects[0].0, &objects[1].0, &objects[3].0);
    let shard_of =
        |data: &ObjectData| ShardId(1 + (data.extents().iter().map(|extent| extent.len_bytes).sum::<u64>() % 2) as u16);
    cluster.kill(5).await;
    meta.delete(shard_of(old), &old.extents()[0], now_ms() - 61_000);
    meta.delete(shard_of(young), &young.extents()[0], now_ms());
    // Queued and alive at once: a fault somewhere else, which must not become a loss.
    for extent in alive.extents() {
        meta.condemn(shard_of(alive), 1, extent);
    }
    let old_id = chunk_id(&old.extents()[0], 0);
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.until("it is gone from the disks that answer", || !contents(&cluster.disks[0]).contains_key(&old_id)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(meta.is_garbage(shard_of(old), &old.extents()[0]), "one disk has not answered");
    cluster.revive(5).await;
    let gone = || !meta.is_garbage(shard_of(old), &old.extents()[0]);
    cluster.until("it is gone", gone).await;
    let left: usize = objects[1..].iter().map(|(data, _)| data.extents().len() * 6).sum();
    assert_eq!(cluster.chunks(), left, "the young and the living are all there");
    assert!(counter(&cluster.store.counters().garbage_extents_alive) > 0);
    cluster.check(alive, &objects[3].1, 0..objects[3].1.len() as u64).await;
}
