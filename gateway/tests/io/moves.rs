//! Slots that get another disk, and what is written and read meanwhile.

use crate::cluster::{body, payload, seed, Cluster, UNIT};
use crate::heal::{chunk, contents, counter, fill, heal, heal_by, key_in, now_ms, objects_of, settings, small};
use crate::meta::Meta;
use crate::node::Damage;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use granary_gateway::background::heal::HealSettings;
use granary_gateway::object::choose::Draw;
use granary_gateway::object::{chunk_id, ReadError, StageError, Staged};
use granary_meta::record::{ExtentRecord, ExtentRef};
use granary_meta::{ChunkRef, Reply};
use granary_placement::id::{DiskId, Epoch, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{DiskState, GroupSlot};
use granary_wire::chunk::ChunkId;
use std::sync::atomic::Ordering;
use std::time::Duration;

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

/// Until a move has settled, a healer finds nothing to do; it must not rest meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_takes_long_to_settle_goes_on_as_soon_as_it_has() {
    let mut draw = seed("a_move_that_takes_long_to_settle_goes_on_as_soon_as_it_has");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let interval = Duration::from_millis(20);
    let slow = HealSettings { interval, move_settle: interval * 100, ..settings() };
    let (healer, _stop) = heal_by(&cluster, meta.shards.clone(), slow);
    // A walk that ends would wake the healer.
    cluster.until("all disks are walked", || healer.status().walks_done >= 6).await;
    let before = contents(&cluster.disks[2]);
    give_slot_to(&cluster, 7);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    assert!(contents(&cluster.disks[6]) == before);
}

/// A disk that was away gets back a slot whose chunks it still has by name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lay_on_the_new_disk_before_the_slot_came_is_read_before_the_previous_one_loses_its_own() {
    let mut draw = seed("what_lay_on_the_new_disk_before_the_slot_came_is_read_before_the_previous_one_loses_its_own");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(2);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let before = contents(&cluster.disks[2]);
    let old: Vec<_> =
        cluster.disks[2].chunks.lock().unwrap().iter().map(|(id, stored)| (*id, stored.clone())).collect();
    let rotten = old[1].0;
    cluster.disks[6].chunks.lock().unwrap().extend(old);
    cluster.disks[6].damage.lock().unwrap().insert((rotten, 0), Damage::Noticed);
    give_slot_to(&cluster, 7);
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    assert!(cluster.disks[6].damage.lock().unwrap().is_empty(), "the good one is gone, and this one is rotten");
    assert!(contents(&cluster.disks[6]) == before);
    // The others that are not needed may die now.
    cluster.kill(0).await;
    cluster.kill(1).await;
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
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
    let in_slot = |record: &ExtentRecord| {
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
async fn a_move_does_not_end_on_the_word_of_a_cursor_from_before() {
    let mut draw = seed("a_move_does_not_end_on_the_word_of_a_cursor_from_before");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let before = contents(&cluster.disks[2]);
    // Somebody had looked through the slot to its end, when it was another disk's.
    for shard in [1, 2] {
        meta.looked_through(ShardId(shard), (PlacementGroupId(1), 2), ExtentId([0xff; 16]), 0);
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
