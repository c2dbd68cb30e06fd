use crate::cluster::{payload, seed, Cluster, UNIT};
use crate::heal::{fill, now_ms, objects_of, settings, small};
use crate::meta::Meta;
use crate::moves::give_slot_to;
use crate::node::Damage;
use granary_gateway::background::heal::{HealSettings, Healer};
use granary_gateway::object::{chunk_id, Placement};
use granary_meta::record::ExtentRef;
use granary_placement::id::{DiskId, Epoch, PlacementGroupId, ShardId};
use granary_placement::map::GroupSlot;
use granary_wire::chunk::ChunkId;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Sweeps all the time.
fn sweeping() -> HealSettings {
    HealSettings { sweep_interval: Duration::from_millis(20), ..settings() }
}

async fn sweeps(cluster: &Cluster, healer: &Healer, more: u64) {
    let seen = healer.status().sweeps_done;
    cluster.until("it was swept again", || healer.status().sweeps_done >= seen + more).await;
}

fn all(cluster: &Cluster, value: u64) {
    cluster.disks.iter().for_each(|disk| disk.age_ms.store(value, Ordering::SeqCst));
}

fn quarantined(cluster: &Cluster) -> usize {
    cluster.disks.iter().map(|disk| disk.quarantine.lock().unwrap().len()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_owns_goes_after_its_age_and_its_quarantine_and_nothing_else_ever_does() {
    let mut draw = seed("what_nobody_owns_goes_after_its_age_and_its_quarantine_and_nothing_else_ever_does");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let owned = cluster.chunks();
    // A gateway that dies between writing and committing, twice.
    let lost = payload(UNIT * 4, &mut draw);
    let (_orphan, later) = (cluster.put(&lost, &mut draw).await, cluster.put(&lost, &mut draw).await);
    let all_chunks = cluster.chunks();
    let orphans = all_chunks - owned;
    let stop = CancellationToken::new();
    let healer = Healer::start(
        cluster.store.clone(),
        meta.shards.clone(),
        watch::channel(sweeping()).1,
        String::new(),
        stop.clone(),
    );
    let _stop = stop.drop_guard();

    // Too young: it may be an upload under way.
    all(&cluster, 47 * 3600 * 1000);
    sweeps(&cluster, &healer, 3).await;
    assert_eq!((healer.status().orphans, quarantined(&cluster)), (orphans as u64, 0));
    all(&cluster, 49 * 3600 * 1000);
    cluster.until("they are in quarantine", || quarantined(&cluster) == orphans).await;
    // What is deleted is garbage, and no orphan.
    meta.delete(ShardId(1 + (8193 % 2)), &objects[0].0.extents()[0], now_ms());
    sweeps(&cluster, &healer, 3).await;
    assert_eq!((healer.status().orphans, quarantined(&cluster)), (orphans as u64, orphans));
    // One of the two was committed after all.
    meta.commit(ShardId(1), "late", &later, &Placement { missing: Vec::new(), map_epoch: Epoch(1) });
    cluster.until("it is out of quarantine", || quarantined(&cluster) == orphans / 2).await;
    let census = healer.census(|_| {}).await.unwrap();
    assert_eq!((census.orphans, census.orphans_quarantined), (orphans as u64 / 2, orphans as u64 / 2));

    let in_quarantine = |time: Duration| {
        for disk in &cluster.disks {
            disk.quarantine.lock().unwrap().values_mut().for_each(|ms| *ms = time.as_millis() as u64);
        }
    };
    in_quarantine(DAY * 7 - Duration::from_secs(1));
    sweeps(&cluster, &healer, 3).await;
    assert_eq!(cluster.chunks(), all_chunks, "its time is not over");
    in_quarantine(DAY * 7);
    cluster.until("the orphans are gone", || cluster.chunks() == all_chunks - orphans / 2).await;
    sweeps(&cluster, &healer, 3).await;
    let census = healer.census(|_| {}).await.unwrap();
    assert!(census.is_complete(), "{census:?}");
    assert_eq!((census.orphans, quarantined(&cluster)), (0, 0));
    for (data, payload) in objects.iter().skip(1).chain([&(later, lost)]) {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_full_of_orphans_waits_for_an_operator_and_a_silent_shard_condemns_nothing() {
    let mut draw = seed("a_disk_full_of_orphans_waits_for_an_operator_and_a_silent_shard_condemns_nothing");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    for _ in 0..17 {
        cluster.put(&payload(UNIT, &mut draw), &mut draw).await;
    }
    all(&cluster, 49 * 3600 * 1000);
    meta.silence(ShardId(1), true);
    let (change, settings) = watch::channel(sweeping());
    let stop = CancellationToken::new();
    let healer = Healer::start(cluster.store.clone(), meta.shards.clone(), settings, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    sweeps(&cluster, &healer, 3).await;
    assert_eq!((healer.status().orphans, quarantined(&cluster)), (0, 0), "who did not answer denied nothing");
    meta.silence(ShardId(1), false);
    cluster.until("they are seen", || healer.status().orphans == 17 * 6).await;
    sweeps(&cluster, &healer, 3).await;
    assert_eq!((healer.status().disks_beyond_orphan_limit.len(), quarantined(&cluster)), (6, 0));
    change.send_modify(|settings| settings.orphan_limit_percent = 100);
    cluster.until("the operator's word counts", || quarantined(&cluster) == 17 * 6).await;
    sweeps(&cluster, &healer, 1).await;
    assert!(healer.status().disks_beyond_orphan_limit.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_others_have_deleted_meanwhile_waits_for_no_operator() {
    let mut draw = seed("what_the_others_have_deleted_meanwhile_waits_for_no_operator");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    // More than the limit of either kind: as wide as the group, and narrower, with chunk 3 in slot 4.
    let mut wide = Vec::new();
    for _ in 0..17 {
        wide.push(cluster.put(&payload(UNIT, &mut draw), &mut draw).await.extents()[0].clone());
    }
    cluster.kill(3).await;
    cluster.kill(5).await;
    let mut narrow = Vec::new();
    for _ in 0..17 {
        let staged = cluster.stage(&payload(UNIT, &mut draw), &mut draw).await.unwrap();
        narrow.push(staged.data.extents()[0].clone());
        staged.committed();
    }
    assert!(narrow.iter().all(|extent| extent.slots == [0, 1, 2, 4]), "{:?}", narrow[0]);
    cluster.revive(3).await;
    cluster.revive(5).await;
    all(&cluster, 49 * 3600 * 1000);
    // All of them are gone, but on one disk.
    let kept = cluster.disks[2].chunks.lock().unwrap().clone();
    cluster.disks.iter().for_each(|disk| disk.chunks.lock().unwrap().clear());
    *cluster.disks[2].chunks.lock().unwrap() = kept.clone();
    let copy = |extent: &ExtentRef, index: u8| (chunk_id(extent, index), kept[&chunk_id(extent, 2)].clone());
    // A disk of the group that is silent may have the rest of everything.
    cluster.kill(1).await;
    let (settings, stop) = (watch::channel(sweeping()).1, CancellationToken::new());
    let healer = Healer::start(cluster.store.clone(), meta.shards.clone(), settings, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    sweeps(&cluster, &healer, 3).await;
    let beyond = |disks: &[u32]| {
        let beyond = healer.status().disks_beyond_orphan_limit;
        beyond.iter().map(|disk| disk.0).eq(disks.iter().copied())
    };
    assert!(beyond(&[3]) && quarantined(&cluster) == 0, "{:?}", healer.status());
    cluster.revive(1).await;
    cluster.until("they are in quarantine", || quarantined(&cluster) == 34).await;
    sweeps(&cluster, &healer, 2).await;
    assert!(beyond(&[]), "{:?}", healer.status());
    // Where another disk has more of them, they count again.
    for (extents, index, place) in [(&wide, 5, 5), (&narrow, 3, 4)] {
        let there = extents.iter().map(|extent| copy(extent, index)).collect();
        *cluster.disks[place].chunks.lock().unwrap() = there;
        let both = [3, cluster.disks[place].id.0];
        cluster.until("they count", || beyond(&both)).await;
        cluster.disks[place].chunks.lock().unwrap().clear();
        cluster.until("they count no more", || beyond(&[])).await;
    }
    // Their time in quarantine is over.
    cluster.disks[2].quarantine.lock().unwrap().values_mut().for_each(|ms| *ms = DAY.as_millis() as u64 * 7);
    cluster.until("they are gone", || cluster.chunks() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_disk_keeps_of_a_slot_it_left_goes_only_when_it_lies_at_home() {
    let mut draw = seed("what_a_disk_keeps_of_a_slot_it_left_goes_only_when_it_lies_at_home");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    let mut objects = fill(&cluster, &meta, &mut draw).await;
    // More than the limit, which does not matter: it is known where they are.
    let more: Vec<u64> = (9000..9015).collect();
    objects.extend(objects_of(&cluster, &meta, &mut draw, &more).await);
    let left: Vec<_> =
        cluster.disks[2].chunks.lock().unwrap().iter().map(|(id, stored)| (*id, stored.clone())).collect();
    assert!(left.len() > 17, "{}", left.len());
    all(&cluster, 49 * 3600 * 1000);
    let stop = CancellationToken::new();
    let healer = Healer::start(
        cluster.store.clone(),
        meta.shards.clone(),
        watch::channel(sweeping()).1,
        String::new(),
        stop.clone(),
    );
    let _stop = stop.drop_guard();
    give_slot_to(&cluster, 7);
    let over = || cluster.map.borrow().as_ref().is_some_and(|map| map.epoch == Epoch(3));
    cluster.until("the move is over", || over() && cluster.disks[2].count() == 0).await;
    // All of it comes back, as when the old disk was away while it was emptied; the new one loses one chunk.
    cluster.disks[2].chunks.lock().unwrap().extend(left.iter().cloned());
    cluster.until("strays are in quarantine", || quarantined(&cluster) == left.len()).await;
    healer.pace().pause(DAY);
    let lost = left[0].0;
    // A disk of the group that has it where no reader looks is not its home.
    cluster.disks[0].chunks.lock().unwrap().insert(lost, left[0].1.clone());
    cluster.disks[6].chunks.lock().unwrap().remove(&lost);
    // Another one lies at home and is rotten.
    cluster.disks[6].damage.lock().unwrap().insert((left[1].0, 0), Damage::Noticed);
    cluster.until("it is out of quarantine again", || quarantined(&cluster) == left.len() - 1).await;
    cluster.disks[2].quarantine.lock().unwrap().values_mut().for_each(|ms| *ms = DAY.as_millis() as u64 * 8);
    cluster.until("the other strays are gone", || cluster.disks[2].count() == 2).await;
    sweeps(&cluster, &healer, 3).await;
    let has_it = |disk: usize, id: &ChunkId| cluster.disks[disk].chunks.lock().unwrap().contains_key(id);
    let has = |disk: usize| has_it(disk, &lost);
    assert!(has(2) && has_it(2, &left[1].0), "the only good copies stay");
    assert_eq!(meta.missing(), 2, "and their shards know that they are missing at home");
    healer.pace().pause(Duration::ZERO);
    cluster.until("it is rebuilt at home", || has(6)).await;
    // And so do the last strays, the one in the wrong slot among them, when their time in quarantine is over.
    let end_quarantine = |disk: usize| {
        cluster.disks[disk].quarantine.lock().unwrap().values_mut().for_each(|ms| *ms = DAY.as_millis() as u64 * 8);
    };
    let gone = || cluster.disks[2].count() == 0 && !has(0);
    cluster.until("they are gone", || [0, 2].map(end_quarantine).len() == 2 && gone()).await;
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stray_whose_slot_comes_back_while_its_disk_is_swept_stays() {
    let mut draw = seed("a_stray_whose_slot_comes_back_while_its_disk_is_swept_stays");
    let cluster = Arc::new(Cluster::with_disks(4, 2, 7, small()).await);
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let left: Vec<_> =
        cluster.disks[2].chunks.lock().unwrap().iter().map(|(id, stored)| (*id, stored.clone())).collect();
    all(&cluster, 49 * 3600 * 1000);
    let stop = CancellationToken::new();
    let settings = watch::channel(sweeping()).1;
    let healer = Healer::start(cluster.store.clone(), meta.shards.clone(), settings, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    give_slot_to(&cluster, 7);
    let epoch = || cluster.map.borrow().as_ref().unwrap().epoch;
    cluster.until("the move is over", || epoch() == Epoch(3) && cluster.disks[2].count() == 0).await;
    // The old disk has all of it again, at the end of its time in quarantine. When that is seen, and while it is asked
    // whether the new disk has it, the slot comes back.
    let seen = Arc::new(AtomicBool::new(false));
    let (disk, armed) = (cluster.disks[2].clone(), seen.clone());
    *cluster.disks[2].at_step.lock().unwrap() = Some(Arc::new(move |step| {
        if step == "list" && disk.count() > 0 {
            let ended = DAY.as_millis() as u64 * 8;
            *disk.quarantine.lock().unwrap() = disk.chunks.lock().unwrap().keys().map(|id| (*id, ended)).collect();
            armed.store(true, Ordering::SeqCst);
        }
    }));
    let (moves, armed) = (Arc::downgrade(&cluster), seen.clone());
    *cluster.disks[6].at_step.lock().unwrap() = Some(Arc::new(move |step| {
        if step == "have" && armed.load(Ordering::SeqCst) {
            let cluster = moves.upgrade().unwrap();
            if cluster.map.borrow().as_ref().unwrap().epoch == Epoch(3) {
                cluster.change_map(|next| {
                    next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots[2] = GroupSlot::new(DiskId(3));
                });
            }
        }
    }));
    cluster.disks[2].spoiled.lock().unwrap().clear();
    cluster.disks[2].chunks.lock().unwrap().extend(left.iter().cloned());
    cluster.until("the slot comes back", || epoch() == Epoch(4)).await;
    sweeps(&cluster, &healer, 3).await;
    assert!(cluster.disks[2].spoiled.lock().unwrap().is_empty(), "what lies at home is no stray");
    assert_eq!(cluster.disks[2].count(), left.len());
}
