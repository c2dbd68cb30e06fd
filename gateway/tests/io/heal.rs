use crate::cluster::{body, payload, seed, Cluster, UNIT};
use crate::meta::Meta;
use crate::node::{Damage, Disk};
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use granary_gateway::background::heal::{HealSettings, Healer, HEAL_TASK};
use granary_gateway::background::leases::{Held, Holder, LeaseSettings};
use granary_gateway::disks::DiskHealth;
use granary_gateway::object::choose::Draw;
use granary_gateway::object::{chunk_id, ObjectSettings, ReadError, StageError, Staged};
use granary_meta::record::{ExtentRef, ObjectData};
use granary_meta::{ChunkRef, Command, Reply};
use granary_placement::id::{DiskId, Epoch, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{DiskState, GroupSlot};
use granary_wire::chunk::{ChunkId, ChunkSpec};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use granary_wire::error::ChunkError;
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

fn heal(cluster: &Cluster, meta: &Meta) -> (Healer, DropGuard) {
    let stop = CancellationToken::new();
    (
        Healer::start(
            cluster.store.clone(),
            meta.shards.clone(),
            watch::channel(settings()).1,
            String::new(),
            stop.clone(),
        ),
        stop.drop_guard(),
    )
}

/// Objects in both shards, with what they hold.
pub async fn fill(cluster: &Cluster, meta: &Meta, draw: &mut Draw) -> Vec<(ObjectData, Bytes)> {
    objects_of(cluster, meta, draw, &[8193, UNIT * 4, UNIT * 9 + 5, UNIT * 25 + 1000]).await
}

async fn objects_of(cluster: &Cluster, meta: &Meta, draw: &mut Draw, lens: &[u64]) -> Vec<(ObjectData, Bytes)> {
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
fn key_in(cluster: &Cluster, shard: ShardId, len: u64) -> (String, HashSlot) {
    let map = cluster.map.borrow().clone().unwrap();
    let keys = (0..).map(|number| format!("key-{len}-{number}")).map(|key| (HashSlot::of(1, &key), key));
    let mut keys = keys.filter(|(slot, _)| map.shard_of_slot(*slot) == Some(shard));
    keys.next().map(|(slot, key)| (key, slot)).unwrap()
}

type Contents = BTreeMap<ChunkId, (Bytes, Vec<u32>, ChunkSpec)>;

/// What lies on a disk, without when it was written.
fn contents(disk: &Disk) -> Contents {
    let chunks = disk.chunks.lock().unwrap();
    let plain = |spec: ChunkSpec| ChunkSpec { created_ms: 0, ..spec };
    chunks.iter().map(|(id, stored)| (*id, (stored.bytes.clone(), stored.crcs.clone(), plain(stored.spec)))).collect()
}

fn all_contents(cluster: &Cluster) -> Vec<Contents> {
    cluster.disks.iter().map(|disk| contents(disk)).collect()
}

fn chunk(extent: &ExtentRef, index: u8) -> ChunkRef {
    ChunkRef { group: extent.group, extent: extent.extent, index }
}

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64
}

fn counter(value: &AtomicU64) -> u64 {
    value.load(Ordering::Relaxed)
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
async fn a_substitute_disk_is_filled_without_being_told() {
    let mut draw = seed("a_substitute_disk_is_filled_without_being_told");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(2);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (healer, _stop) = heal(&cluster, &meta);
    cluster.until("all disks are walked", || healer.status().walks_done >= 6).await;
    let before = contents(&cluster.disks[2]);
    cluster.kill(2).await;
    cluster.change_map(|next| {
        next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots[2].give_to(DiskId(7));
        next.disks.get_mut(&DiskId(3)).unwrap().state = DiskState::Out;
    });
    cluster.until("the substitute holds all", || cluster.disks[6].count() == before.len() && meta.missing() == 0).await;
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    assert!(contents(&cluster.disks[6]) == before);
    // The old ones may die now.
    cluster.kill(0).await;
    cluster.kill(1).await;
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

/// The slot that moves in these tests.
fn slot(cluster: &Cluster) -> GroupSlot {
    cluster.map.borrow().as_ref().unwrap().groups[&PlacementGroupId(1)].slots[2]
}

pub fn give_slot_to(cluster: &Cluster, disk: u32) {
    cluster.change_map(|next| next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots[2].give_to(DiskId(disk)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_is_read_from_its_previous_disk_until_all_is_on_the_new_one() {
    let mut draw = seed("a_slot_that_moves_is_read_from_its_previous_disk_until_all_is_on_the_new_one");
    let cluster = Cluster::with_disks(4, 2, 8, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(2);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let before = contents(&cluster.disks[2]);
    give_slot_to(&cluster, 7);
    let known = || cluster.store.disks().map().is_some_and(|map| map.epoch == Epoch(2));
    cluster.until("the new disk is up", || known() && cluster.store.disks().writable(DiskId(7))).await;
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
    assert_eq!(counter(&cluster.store.counters().chunks_reported), 0, "what has not moved yet is not missing");
    // What is written now goes to the new disk.
    let new = objects_of(&cluster, &meta, &mut draw, &[UNIT * 7]).await;
    assert!(contents(&cluster.disks[2]) == before && cluster.disks[6].count() > 0);
    // The new disk dies on the way: the slot goes on to a third, and the first stays the previous one.
    cluster.kill(6).await;
    give_slot_to(&cluster, 8);
    assert_eq!(slot(&cluster), GroupSlot { current: DiskId(8), previous: Some(DiskId(3)) });
    let (healer, _stop) = heal(&cluster, &meta);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(8))).await;
    let on_new = contents(&cluster.disks[7]);
    assert!(before.iter().all(|(id, chunk)| on_new.get(id) == Some(chunk)), "all of it is there");
    assert_eq!(on_new.len(), before.len() + cluster.disks[6].count(), "and what the dead disk had taken");
    assert_eq!(cluster.disks[2].count(), 0, "nothing stays behind on the disk it came from");
    cluster.until("the queues are empty", || healer.status().queued_slots == 0 && meta.missing() == 0).await;
    // Two more may die now.
    cluster.kill(0).await;
    cluster.kill(1).await;
    for (data, payload) in objects.iter().chain(&new) {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_census_calls_nothing_missing_that_lies_on_the_disk_its_slot_leaves() {
    let mut draw = seed("a_census_calls_nothing_missing_that_lies_on_the_disk_its_slot_leaves");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let waits = HealSettings { move_settle: Duration::from_secs(3600), ..settings() };
    let stop = CancellationToken::new();
    let healer =
        Healer::start(cluster.store.clone(), meta.shards.clone(), watch::channel(waits).1, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    give_slot_to(&cluster, 7);
    let known = || cluster.store.disks().map().is_some_and(|map| map.epoch == Epoch(2));
    cluster.until("the new disk is up", || known() && cluster.store.disks().writable(DiskId(7))).await;
    let moving = cluster.disks[2].count() as u64;
    let census = healer.census(|_| {}).await.unwrap();
    assert!(census.is_complete() && moving > 2, "{census:?}");
    assert_eq!((census.good_on_previous, census.queued_for_repair, meta.missing()), (moving, 0, 0));
    // What is on neither is missing; one of each kind that a disk does not answer for is not.
    let extent = &objects[3].0.extents()[0];
    let index = extent.slots.iter().position(|slot| *slot == 2).unwrap() as u8;
    cluster.disks[2].chunks.lock().unwrap().remove(&chunk_id(extent, index));
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!((census.missing, census.good_on_previous, census.queued_for_repair), (1, moving - 1, 1));
    cluster.kill(6).await;
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!((census.missing, census.unreachable, census.good_on_previous), (0, 1, moving - 1));
    cluster.kill(2).await;
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!((census.missing, census.unreachable, census.extents_lost), (0, moving, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_silent_new_disk_may_have_is_not_called_lost() {
    let mut draw = seed("what_a_silent_new_disk_may_have_is_not_called_lost");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    give_slot_to(&cluster, 7);
    let known = || cluster.store.disks().map().is_some_and(|map| map.epoch == Epoch(2));
    cluster.until("the new disk is up", || known() && cluster.store.disks().writable(DiskId(7))).await;
    let objects = objects_of(&cluster, &meta, &mut draw, &[UNIT * 4]).await;
    assert!(cluster.disks[6].count() > 0, "it was written to the new disk");
    let (data, payload) = &objects[0];
    // Two chunks are away for certain, and the third is on the new disk, which dies without anybody noticing yet.
    let places = [0, 1];
    places.iter().for_each(|place| cluster.disks[*place].blind.store(true, Ordering::SeqCst));
    for wait in [false, true] {
        cluster.disks[6].kill();
        if wait {
            cluster.kill(6).await;
        }
        let error = cluster.read(data, 0..payload.len() as u64).await.unwrap_err();
        assert!(matches!(error, ReadError::Unreachable { .. }), "{error:?}");
        let reported = cluster.store.reports().take(1000);
        let of_slot = |chunk: u8| data.extents()[0].slots[usize::from(chunk)] == 2;
        assert!(reported.iter().all(|report| !of_slot(report.chunk.index)), "{reported:?}");
        cluster.revive(6).await;
    }
    cluster.check(data, payload, 0..payload.len() as u64).await;
}

/// Stages a payload of three extents; after the first, `change` is made and known to the gateway.
async fn stage_while_the_map_changes(
    cluster: &Cluster,
    draw: &mut Draw,
    change: impl Fn() + Send + Sync,
) -> Result<Staged, StageError> {
    let len = 25 * UNIT;
    let payload = payload(len, draw);
    let pieces: Vec<Bytes> = (0..25).map(|at| payload.slice(at * UNIT as usize..(at + 1) * UNIT as usize)).collect();
    let epoch = || cluster.store.disks().map().map(|map| map.epoch);
    let (before, change) = (epoch(), &change);
    let body = stream::iter(pieces).enumerate().then(|(at, piece)| async move {
        if at == 15 {
            change();
            while epoch() == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(piece)
    });
    cluster.store.stage(None, HashSlot::of(1, "k"), len, body).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_came_while_its_slots_moved_names_what_lies_elsewhere_or_is_refused() {
    let mut draw = seed("a_payload_that_came_while_its_slots_moved_names_what_lies_elsewhere_or_is_refused");
    let cluster = Cluster::with_disks(4, 2, 9, small()).await;
    let staged = stage_while_the_map_changes(&cluster, &mut draw, || give_slot_to(&cluster, 7)).await.unwrap();
    let first = &staged.data.extents()[0];
    assert!(staged.missing.contains(&chunk(first, 2)), "{:?}", staged.missing);
    drop(staged);
    // Three slots move, and their moves are over before the body is.
    let leave_three = || {
        cluster.change_map(|next| {
            let slots = &mut next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots;
            for (slot, disk) in [(0, 8), (1, 9), (2, 3)] {
                slots[slot] = GroupSlot::new(DiskId(disk));
            }
        });
    };
    let refused = stage_while_the_map_changes(&cluster, &mut draw, leave_three).await;
    assert!(matches!(refused, Err(StageError::Unavailable(_))), "{refused:?}");
    cluster.until("its chunks are gone", || cluster.chunks() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_with_an_old_map_commits_nothing_where_a_move_is_over() {
    let mut draw = seed("a_gateway_with_an_old_map_commits_nothing_where_a_move_is_over");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let stale = cluster.stale_gateway().await;
    let payload = payload(UNIT * 9 + 5, &mut draw);
    let (key, slot) = key_in(&cluster, ShardId(1), 77);
    let mut staged = stale.stage(None, slot, payload.len() as u64, body(&payload, &mut draw)).await.unwrap();
    assert_eq!((staged.map_epoch, staged.missing.len()), (Epoch(1), 0));
    give_slot_to(&cluster, 7);
    let (healer, _stop) = heal(&cluster, &meta);
    cluster.until("the move is done", || self::slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    let refused = meta.try_commit(ShardId(1), &key, &staged.data, &staged.placement());
    assert_eq!(refused, Reply::StaleMap { oldest: Epoch(2) });

    // Held against the newest map, what lies on the old disk is named, and brought to the new one.
    let newest = cluster.map.borrow().clone().unwrap();
    stale.hold_against(&newest, &mut staged).unwrap();
    let index = |extent: &ExtentRef| extent.slots.iter().position(|slot| *slot == 2).unwrap() as u8;
    let lost: Vec<ChunkRef> = staged.data.extents().iter().map(|extent| chunk(extent, index(extent))).collect();
    assert_eq!((&staged.missing, staged.map_epoch), (&lost, Epoch(3)));
    meta.commit(ShardId(1), &key, &staged.data, &staged.placement());
    let data = staged.data.clone();
    staged.committed();
    let here = |chunk: &ChunkRef| cluster.disks[6].chunks.lock().unwrap().keys().any(|id| id.extent == chunk.extent);
    cluster.until("the new disk has it", || lost.iter().all(here) && meta.missing() == 0).await;
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
    cluster.kill(0).await;
    cluster.kill(1).await;
    cluster.check(&data, &payload, 0..payload.len() as u64).await;
}

/// The chunks of a shard's extents that belong into the slot that moves.
fn chunks_in_slot(meta: &Meta, shard: u16) -> Vec<ChunkId> {
    let in_slot = |record: &granary_meta::record::ExtentRecord| {
        let index = record.extent.slots.iter().position(|slot| *slot == 2)?;
        Some(chunk_id(&record.extent, index as u8))
    };
    meta.extents(ShardId(shard)).iter().filter_map(in_slot).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extent_beyond_repair_keeps_no_other_from_its_new_disk_and_the_move_does_not_end() {
    let mut draw = seed("an_extent_beyond_repair_keeps_no_other_from_its_new_disk_and_the_move_does_not_end");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(2);
    fill(&cluster, &meta, &mut draw).await;
    // The first extent of the busier shard, so that others come behind it, loses three chunks.
    let shard = if chunks_in_slot(&meta, 1).len() > chunks_in_slot(&meta, 2).len() { 1 } else { 2 };
    let wanted: Vec<ChunkId> = [1, 2].into_iter().flat_map(|shard| chunks_in_slot(&meta, shard)).collect();
    let lost = meta.extents(ShardId(shard))[0].extent.clone();
    for index in [0u8, 1, 2] {
        cluster.holder(&lost, index).chunks.lock().unwrap().remove(&chunk_id(&lost, index));
    }
    give_slot_to(&cluster, 7);
    let (healer, _stop) = heal(&cluster, &meta);
    let here = |id: &ChunkId| cluster.disks[6].chunks.lock().unwrap().contains_key(id);
    let rest: Vec<&ChunkId> = wanted.iter().filter(|id| id.extent != lost.extent).collect();
    assert!(rest.len() >= 3);
    cluster.until("all others are on the new disk", || rest.iter().all(|id| here(id))).await;
    cluster.until("one slot is left", || healer.status().queued_slots == 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(slot(&cluster), GroupSlot { current: DiskId(7), previous: Some(DiskId(3)) }, "the move is not over");
    // It is deleted: then nothing keeps the move from ending.
    meta.delete(ShardId(shard), &lost, now_ms());
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_does_not_answer_keeps_only_its_own_extents_waiting() {
    let mut draw = seed("a_shard_that_does_not_answer_keeps_only_its_own_extents_waiting");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    meta.silence(ShardId(1), true);
    give_slot_to(&cluster, 7);
    let (_healer, _stop) = heal(&cluster, &meta);
    let (silent, others) = (chunks_in_slot(&meta, 1), chunks_in_slot(&meta, 2));
    assert!(!silent.is_empty() && !others.is_empty());
    let here =
        |ids: &[ChunkId]| ids.iter().filter(|id| cluster.disks[6].chunks.lock().unwrap().contains_key(id)).count();
    cluster.until("those of the other shard are there", || here(&others) == others.len()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(here(&silent), 0);
    assert_eq!(slot(&cluster), GroupSlot { current: DiskId(7), previous: Some(DiskId(3)) }, "the move is not over");
    meta.silence(ShardId(1), false);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    assert_eq!(here(&silent), silent.len());
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
async fn a_move_does_not_end_on_the_word_of_a_cursor_from_before() {
    let mut draw = seed("a_move_does_not_end_on_the_word_of_a_cursor_from_before");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let before = contents(&cluster.disks[2]);
    // Somebody had looked through the slot to its end, when it was another disk's.
    for shard in [1, 2] {
        meta.looked_through(ShardId(shard), PlacementGroupId(1), 2, ExtentId([0xff; 16]));
    }
    cluster.kill(2).await;
    cluster.change_map(|next| {
        next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots[2].give_to(DiskId(7));
        next.disks.get_mut(&DiskId(3)).unwrap().state = DiskState::Out;
    });
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    assert!(contents(&cluster.disks[6]) == before, "everything was brought");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_census_counts_what_is_there() {
    let mut draw = seed("a_census_counts_what_is_there");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(2);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let stop = CancellationToken::new();
    // A paused healer: the census must not see it at work.
    let healer = Healer::start(
        cluster.store.clone(),
        meta.shards.clone(),
        watch::channel(settings()).1,
        String::new(),
        stop.clone(),
    );
    healer.pace().pause(Duration::from_secs(600));
    let extents: Vec<ExtentRef> = objects.iter().flat_map(|(data, _)| data.extents().to_vec()).collect();
    let expected = extents.len() as u64 * 6;
    let mut pages = 0;
    let census = healer.census(|_| pages += 1).await.unwrap();
    assert_eq!((census.chunks_expected, census.good, census.is_complete()), (expected, expected, true));
    assert_eq!(census.bytes, objects.iter().map(|(_, payload)| payload.len() as u64).sum::<u64>());
    assert!(pages > 2);

    let spoil = |extent: &ExtentRef, missing: &[u8], corrupt: &[u8]| {
        for index in missing {
            cluster.holder(extent, *index).chunks.lock().unwrap().remove(&chunk_id(extent, *index));
        }
        corrupt.iter().for_each(|index| cluster.damage(extent, *index, 0, Damage::Misplaced));
    };
    spoil(&extents[0], &[1], &[]);
    spoil(&extents[1], &[0], &[2]);
    spoil(&extents[2], &[0, 1], &[2]);
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!((census.missing, census.corrupt, census.unreachable), (4, 2, 0));
    assert_eq!(census.queued_for_repair, 6, "what a census finds damaged is queued for repair");
    assert_eq!(census.good, expected - 6);
    assert_eq!((census.extents_lost, census.extents_lost_unless_disks_return), (1, 0));
    let whole = extents.len() as u64 - 3;
    assert_eq!(census.extents_by_failures_left, BTreeMap::from([(-1, 1), (0, 1), (1, 1), (2, whole)]));

    cluster.kill(5).await;
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!(
        (census.unreachable, census.extents_lost, census.extents_lost_unless_disks_return),
        (extents.len() as u64, 2, 1)
    );
    assert!(serde_json::to_string(&census).unwrap().contains("\"extents_lost\":2"));
    stop.cancel();
    healer.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_holder_whose_lease_was_taken_over_can_neither_delete_nor_write() {
    let mut draw = seed("a_paused_holder_whose_lease_was_taken_over_can_neither_delete_nor_write");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let ttl = Duration::from_millis(200);
    let holder =
        |name: &str| Holder::new(meta.shards.clone(), move || LeaseSettings { ttl }, HEAL_TASK, name.to_owned());
    // The first takes the lease and is paused from then on: it renews nothing, and does not know what happens.
    let paused = holder("paused").acquire().await;
    let successor = holder("successor").acquire().await;
    assert_eq!((paused.stamp().epoch, successor.stamp().epoch, paused.is_lost()), (1, 2, false));

    let extent = &objects[1].0.extents()[0];
    let (id, disk) = (chunk_id(extent, 0), cluster.holder(extent, 0));
    let client = cluster.store.disks().client(disk.id).unwrap();
    let delete = |held: &Held, id: ChunkId| {
        let (client, lease) = (client.clone(), Some(held.stamp().clone()));
        async move {
            let request = ControlRequest::DeleteChunks { chunks: vec![id], lease };
            client.control(request, Duration::from_secs(10)).await.unwrap()
        }
    };
    let (spec, bytes) = disk.chunks.lock().unwrap().get(&id).map(|stored| (stored.spec, stored.bytes.clone())).unwrap();
    let other = ChunkId { extent: granary_placement::id::ExtentId([9; 16]), ..id };
    meta.report(ShardId(1), chunk(extent, 0));
    let queued = (chunk(extent, 0), meta.generation(ShardId(1), chunk(extent, 0)));
    let repaired = |held: &Held| Command::RepairDone { chunks: vec![queued], lease: held.stamp().clone() };

    // As long as the successor has not acted, nobody knows of it; then the paused one is refused everywhere it acted.
    assert_eq!(delete(&successor, other).await, ControlResponse::Deleted(0));
    let noted =
        meta.shards.command(ShardId(1), Command::GarbageDone { extents: vec![], lease: successor.stamp().clone() });
    assert_eq!(noted.await.unwrap(), Reply::Done);
    let before = all_contents(&cluster);
    let refused = ControlResponse::Error(ControlError::StaleLease { current: 2 });
    assert_eq!(delete(&paused, id).await, refused);
    let write = client.put_chunk_under(paused.stamp(), other, spec, vec![bytes]).await;
    assert_eq!(write, Err(ChunkError::StaleLease { current: 2 }));
    assert_eq!(meta.shards.command(ShardId(1), repaired(&paused)).await.unwrap(), Reply::StaleLease { current: 2 });
    assert!(all_contents(&cluster) == before && meta.missing() == 1);
    assert_eq!(meta.shards.command(ShardId(1), repaired(&successor)).await.unwrap(), Reply::Done);
    assert_eq!(meta.missing(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_healers_do_no_harm_to_each_other() {
    let mut draw = seed("several_healers_do_no_harm_to_each_other");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let before = all_contents(&cluster);
    let _healers = [heal(&cluster, &meta), heal(&cluster, &meta), heal(&cluster, &meta)];
    for round in 0..3 {
        let place = (round + draw.number() as usize % 2) % 6;
        cluster.kill(place).await;
        cluster.disks[place].chunks.lock().unwrap().clear();
        cluster.revive(place).await;
        cluster
            .until("it is full again", || contents(&cluster.disks[place]) == before[place] && meta.missing() == 0)
            .await;
    }
    assert!(all_contents(&cluster) == before);
}
