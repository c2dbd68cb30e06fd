//! Disks that go out of service, or may not yet; and those that come back: what only they hold, and what they have left
//! over.

use crate::cluster::{seed, Cluster, UNIT};
use crate::heal::{contents, counter, fill, heal_by, objects_of, settings, small, Contents};
use crate::meta::Meta;
use crate::moves::give_slot_to;
use crate::node::{Damage, Disk};
use bytes::Bytes;
use granary_gateway::background::heal::{HealSettings, Healer};
use granary_gateway::object::choose::Draw;
use granary_gateway::object::{chunk_id, ReadError};
use granary_meta::level::MAX_FEATURE_LEVEL;
use granary_meta::record::{ExtentRef, ObjectData};
use granary_meta::{Command, Reply};
use granary_placement::id::{DiskId, PlacementGroupId, ShardId};
use granary_placement::map::{DiskState, GroupSlot};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

fn quick() -> HealSettings {
    let quick = Duration::from_millis(200);
    HealSettings { well_after: quick, longest_backoff: quick, ..settings() }
}

fn heal(cluster: &Cluster, meta: &Meta) -> (Healer, DropGuard) {
    heal_by(cluster, meta.shards.clone(), quick())
}

/// Sweeps all the time.
fn sweep(cluster: &Cluster, meta: &Meta) -> (Healer, DropGuard) {
    let settings = HealSettings { sweep_interval: Duration::from_millis(20), ..quick() };
    heal_by(cluster, meta.shards.clone(), settings)
}

fn state(cluster: &Cluster, disk: u32) -> DiskState {
    cluster.map.borrow().as_ref().unwrap().disks[&DiskId(disk)].state
}

fn slot(cluster: &Cluster) -> GroupSlot {
    cluster.map.borrow().as_ref().unwrap().groups[&PlacementGroupId(1)].slots[2]
}

/// A disk is taken out of service, and slot 2 is another's.
fn take_out(cluster: &Cluster, disk: u32, substitute: u32) {
    let raise = Command::SetFeatureLevel { level: MAX_FEATURE_LEVEL };
    assert_eq!(cluster.peers.command(ShardId::ROOT, raise), Reply::Done);
    cluster.change_map(|next| {
        next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots[2].give_to(DiskId(substitute));
        next.disks.get_mut(&DiskId(disk)).unwrap().state = DiskState::Away;
    });
}

type Objects = Vec<(ObjectData, Bytes)>;

/// Slot 2 was on its way from disk 3 to disk 7, which took in what was written meanwhile, died and went out; disk 8 is
/// in its place. Two others are dead, so that what was written in the middle of the move cannot be rebuilt. Answers
/// that, and what lies on disk 7.
async fn died_in_the_middle_of_a_move(cluster: &Cluster, meta: &Meta, draw: &mut Draw) -> (Objects, Contents) {
    fill(cluster, meta, draw).await;
    give_slot_to(cluster, 7);
    cluster.until("the new disk takes chunks", || cluster.store.disks().writable(DiskId(7))).await;
    let new = objects_of(cluster, meta, draw, &[UNIT * 7, UNIT * 25 + 3]).await;
    let on_seven = contents(&cluster.disks[6]);
    assert!(on_seven.len() >= 4);
    cluster.kill(6).await;
    take_out(cluster, 7, 8);
    assert_eq!(slot(cluster), GroupSlot { current: DiskId(8), previous: Some(DiskId(3)) });
    cluster.kill(0).await;
    cluster.kill(1).await;
    let (data, payload) = &new[0];
    let error = cluster.read(data, 0..payload.len() as u64).await.unwrap_err();
    assert!(matches!(error, ReadError::Unreachable { .. } | ReadError::Lost { .. }), "{error:?}");
    (new, on_seven)
}

async fn check_all(cluster: &Cluster, objects: &Objects) {
    for (data, payload) in objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_returned_disk_holds_is_brought_home_before_it_is_let_in() {
    let mut draw = seed("what_only_a_returned_disk_holds_is_brought_home_before_it_is_let_in");
    let cluster = Cluster::with_disks(4, 2, 8, small()).await;
    let meta = Meta::of(&cluster);
    let (new, on_seven) = died_in_the_middle_of_a_move(&cluster, &meta, &mut draw).await;
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.revive(6).await;
    cluster.until("the disk is back in service", || state(&cluster, 7) == DiskState::In).await;
    let at_home = contents(&cluster.disks[7]);
    assert!(on_seven.iter().all(|(id, chunk)| at_home.get(id) == Some(chunk)), "all of it lies at home by then");
    check_all(&cluster, &new).await;
    assert_eq!(cluster.disks[6].count(), 0, "and is left nowhere else");
    assert_eq!(counter(&cluster.store.counters().strays_brought_home), on_seven.len() as u64);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(8))).await;
    check_all(&cluster, &new).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_home_keeps_no_returned_disk_out_and_gets_what_is_its_later() {
    let mut draw = seed("a_silent_home_keeps_no_returned_disk_out_and_gets_what_is_its_later");
    let cluster = Cluster::with_disks(4, 2, 8, small()).await;
    let meta = Meta::of(&cluster);
    let (new, on_seven) = died_in_the_middle_of_a_move(&cluster, &meta, &mut draw).await;
    cluster.kill(7).await;
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.revive(6).await;
    cluster.until("the disk is back in service", || state(&cluster, 7) == DiskState::In).await;
    assert!(contents(&cluster.disks[6]) == on_seven, "nothing of it is gone");
    // It takes another slot of the group, and what it holds of slot 2 is no less a stray.
    cluster.change_map(|next| next.groups.get_mut(&PlacementGroupId(1)).unwrap().slots[0].give_to(DiskId(7)));
    cluster.revive(7).await;
    let at_home = |cluster: &Cluster| {
        let at_home = contents(&cluster.disks[7]);
        on_seven.iter().all(|(id, chunk)| at_home.get(id) == Some(chunk))
    };
    cluster.until("all of it lies at home", || at_home(&cluster)).await;
    check_all(&cluster, &new).await;
}

/// Disk 3 died, and what it held was rebuilt on disk 7. Then one extent loses two chunks, and the one on disk 7 is
/// there, but rotten: nobody can rebuild it without what disk 3 holds. No healer runs.
async fn rotten_at_home(cluster: &Cluster, meta: &Meta, draw: &mut Draw) -> Objects {
    let objects = fill(cluster, meta, draw).await;
    let left = cluster.disks[2].count();
    cluster.kill(2).await;
    take_out(cluster, 3, 7);
    let (healer, stop) = heal(cluster, meta);
    cluster.until("the move is done", || slot(cluster) == GroupSlot::new(DiskId(7))).await;
    drop(stop);
    healer.stopped().await;
    let extent: &ExtentRef = &objects[3].0.extents()[0];
    for index in [0u8, 1] {
        cluster.holder(extent, index).chunks.lock().unwrap().remove(&chunk_id(extent, index));
    }
    cluster.damage(extent, 2, 0, Damage::Noticed);
    assert_eq!(cluster.disks[6].count(), left);
    objects
}

fn is_whole(disk: &Disk) -> bool {
    disk.damage.lock().unwrap().is_empty()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_that_cannot_be_told_of_the_lease_or_does_not_read_its_own_is_asked_again() {
    let mut draw = seed("a_home_that_cannot_be_told_of_the_lease_or_does_not_read_its_own_is_asked_again");
    // A deletion of nothing tells of the lease.
    for refused in ["delete", "verify"] {
        let cluster = Cluster::with_disks(4, 2, 7, small()).await;
        let meta = Meta::of(&cluster);
        let objects = rotten_at_home(&cluster, &meta, &mut draw).await;
        let home = &cluster.disks[6];
        home.refuses.lock().unwrap().insert(refused);
        let before = home.asked(refused);
        let (_healer, _stop) = heal(&cluster, &meta);
        cluster.revive(2).await;
        cluster.until("it is asked again", || home.asked(refused) >= before + 2).await;
        home.refuses.lock().unwrap().clear();
        cluster.until("the disk is back in service", || state(&cluster, 3) == DiskState::In).await;
        cluster.until("all is good at home", || is_whole(home)).await;
        check_all(&cluster, &objects).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_rotten_at_a_silent_home_is_brought_there_later_and_what_is_good_is_read_once() {
    let mut draw = seed("what_is_rotten_at_a_silent_home_is_brought_there_later_and_what_is_good_is_read_once");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    let objects = rotten_at_home(&cluster, &meta, &mut draw).await;
    // The returned disk holds something of another home too, and that stays away: so there is always something left.
    let (id, stored) = cluster.disks[5].chunks.lock().unwrap().iter().next().map(|(id, s)| (*id, s.clone())).unwrap();
    cluster.disks[2].chunks.lock().unwrap().insert(id, stored);
    cluster.kill(5).await;
    cluster.kill(6).await;
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.revive(2).await;
    cluster.until("the disk is back in service", || state(&cluster, 3) == DiskState::In).await;
    cluster.revive(6).await;
    let (returned, home) = (&cluster.disks[2], &cluster.disks[6]);
    cluster.until("it is good at home", || is_whole(home)).await;
    // One more pass has read all of it there, and found it good.
    let passes = returned.asked("list");
    cluster.until("it was looked through again", || returned.asked("list") >= passes + 2).await;
    let (read, passes) = (home.asked("verify"), returned.asked("list"));
    cluster.until("it was looked through again", || returned.asked("list") >= passes + 3).await;
    assert_eq!(home.asked("verify"), read);
    assert!(home.spoiled.lock().unwrap().is_empty());
    cluster.revive(5).await;
    check_all(&cluster, &objects).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_brings_home_what_its_home_has_with_a_bad_block() {
    let mut draw = seed("a_sweep_brings_home_what_its_home_has_with_a_bad_block");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    let objects = rotten_at_home(&cluster, &meta, &mut draw).await;
    // It was let in by a holder of the lease that is gone.
    cluster.change_map(|next| next.disks.get_mut(&DiskId(3)).unwrap().state = DiskState::In);
    cluster.revive(2).await;
    let (returned, home) = (&cluster.disks[2], &cluster.disks[6]);
    const DAY_MS: u64 = 24 * 3600 * 1000;
    returned.age_ms.store(3 * DAY_MS, Ordering::SeqCst);
    let left = returned.chunks.lock().unwrap().keys().copied().collect::<Vec<_>>();
    returned.quarantine.lock().unwrap().extend(left.into_iter().map(|id| (id, 8 * DAY_MS)));
    let (_healer, _stop) = sweep(&cluster, &meta);
    cluster.until("all of it is good at home", || is_whole(home) && returned.count() == 0).await;
    assert!(home.spoiled.lock().unwrap().is_empty());
    check_all(&cluster, &objects).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_brought_home_goes_there_page_by_page() {
    let mut draw = seed("what_is_brought_home_goes_there_page_by_page");
    // By the holder of the lease that let the disk in, and by a sweep of the next one.
    for by_sweep in [false, true] {
        let cluster = Cluster::with_disks(4, 2, 8, small()).await;
        let meta = Meta::of(&cluster);
        let (new, on_seven) = died_in_the_middle_of_a_move(&cluster, &meta, &mut draw).await;
        cluster.kill(7).await;
        let (mut healer, mut stop) = heal(&cluster, &meta);
        cluster.revive(6).await;
        cluster.until("the disk is back in service", || state(&cluster, 7) == DiskState::In).await;
        if by_sweep {
            drop(stop);
            healer.stopped().await;
            (healer, stop) = sweep(&cluster, &meta);
        }
        // How many chunks lie at home when a page is asked for.
        let at_home = Arc::new(Mutex::new(BTreeSet::new()));
        let (home, seen, wanted) = (cluster.disks[7].clone(), at_home.clone(), on_seven.clone());
        cluster.disks[6].longest_page.store(1, Ordering::SeqCst);
        *cluster.disks[6].at_step.lock().unwrap() = Some(Arc::new(move |step| {
            if step == "list" {
                let there = home.chunks.lock().unwrap();
                seen.lock().unwrap().insert(wanted.keys().filter(|id| there.contains_key(id)).count());
            }
        }));
        cluster.revive(7).await;
        let lies_at_home = || on_seven.keys().all(|id| cluster.disks[7].chunks.lock().unwrap().contains_key(id));
        cluster.until("all of it lies at home", lies_at_home).await;
        let seen: Vec<usize> = at_home.lock().unwrap().iter().copied().collect();
        assert!(seen.starts_with(&[0, 1, 2]), "{seen:?}, by a sweep: {by_sweep}");
        check_all(&cluster, &new).await;
        drop((healer, stop));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_returned_disk_has_left_over_goes_only_after_its_home_has_read_its_own() {
    let mut draw = seed("what_a_returned_disk_has_left_over_goes_only_after_its_home_has_read_its_own");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    let objects = rotten_at_home(&cluster, &meta, &mut draw).await;
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.revive(2).await;
    cluster.until("the disk is back in service", || state(&cluster, 3) == DiskState::In).await;
    assert_eq!(cluster.disks[2].count(), 0, "all of it is good elsewhere");
    assert_eq!(counter(&cluster.store.counters().strays_brought_home), 1);
    assert!(cluster.disks[6].damage.lock().unwrap().is_empty());
    check_all(&cluster, &objects).await;
    assert!(cluster.disks[6].spoiled.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_home_cannot_read_its_own_nothing_is_deleted_on_a_returned_disk() {
    let mut draw = seed("while_a_home_cannot_read_its_own_nothing_is_deleted_on_a_returned_disk");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let left = contents(&cluster.disks[2]);
    cluster.kill(2).await;
    take_out(&cluster, 3, 7);
    let (_healer, _stop) = heal(&cluster, &meta);
    cluster.until("the move is done", || slot(&cluster) == GroupSlot::new(DiskId(7))).await;
    // It has all of them by name, reads none of them, and takes none.
    cluster.disks[6].blind.store(true, Ordering::SeqCst);
    cluster.disks[6].full.store(true, Ordering::SeqCst);
    cluster.revive(2).await;
    cluster.until("the disk is back in service", || state(&cluster, 3) == DiskState::In).await;
    assert!(contents(&cluster.disks[2]) == left);
    cluster.disks[6].blind.store(false, Ordering::SeqCst);
    cluster.disks[6].full.store(false, Ordering::SeqCst);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_the_level_of_the_release_a_dead_disk_stays_and_it_is_said_why() {
    let mut draw = seed("below_the_level_of_the_release_a_dead_disk_stays_and_it_is_said_why");
    let cluster = Cluster::with_disks(4, 2, 8, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let quick =
        HealSettings { out_after: Duration::from_secs(1), well_after: Duration::from_millis(400), ..settings() };
    let stop = CancellationToken::new();
    let healer =
        Healer::start(cluster.store.clone(), meta.shards.clone(), watch::channel(quick).1, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    let dead = DiskId(3);
    cluster.kill(2).await;
    cluster.disks.iter().for_each(|disk| disk.unreached.lock().unwrap().extend([dead]));
    let said = || {
        let dead_disks = healer.status().dead_disks;
        dead_disks.iter().any(|row| row.disk == dead && row.stays.as_ref().is_some_and(|why| why.contains("--raise")))
    };
    cluster.until("it is said what keeps it in service", said).await;
    let state = || cluster.shards.current_map().unwrap().disk(dead).unwrap().state;
    assert_eq!(state(), DiskState::In);
    assert_eq!(cluster.peers.command(ShardId::ROOT, Command::SetFeatureLevel { level: 2 }), Reply::Done);
    cluster.until("it goes out", || state() == DiskState::Away).await;
    let map = || cluster.shards.current_map().unwrap();
    let moving = || map().groups.values().flat_map(|group| &group.slots).any(|slot| slot.previous.is_some());
    cluster.until("what it held is on others", || !moving()).await;
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}
