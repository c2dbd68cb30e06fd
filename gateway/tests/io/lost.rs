//! Which keys cannot be read now, and what a pause of the cluster holds back.

use crate::cluster::{body, payload, seed, Cluster, UNIT};
use crate::heal::{chunk, counter, fill, heal_by, key_in, now_ms, settings, small};
use crate::meta::Meta;
use crate::moves::give_slot_to;
use crate::node::Damage;
use granary_gateway::background::heal::lost::LostKey;
use granary_gateway::background::heal::{HealSettings, Healer};
use granary_gateway::object::chunk_id;
use granary_meta::record::ExtentRef;
use granary_meta::Command;
use granary_placement::id::{DiskId, Epoch, ShardId};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Repair is paused in all of these tests.
fn paused() -> HealSettings {
    HealSettings { paused_until_ms: now_ms() + 3_600_000, move_settle: Duration::from_secs(3600), ..settings() }
}

/// All pages.
async fn lost(healer: &Healer, read: bool) -> Vec<LostKey> {
    let (mut keys, mut from) = (Vec::new(), None);
    loop {
        let page = healer.lost(None, from, read).await;
        assert!(page.unknown_shards.is_empty() && page.unasked_disks.is_empty(), "{page:?}");
        keys.extend(page.keys);
        match page.next {
            Some(next) => from = Some(next),
            None => return keys,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_lost_once_however_many_of_its_extents_are_and_disks_that_return_bring_it_back() {
    let mut draw = seed("a_key_is_lost_once_however_many_of_its_extents_are_and_disks_that_return_bring_it_back");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    // Extents of one key come on several pages.
    meta.page(2);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (healer, _stop) = heal_by(&cluster, meta.shards.clone(), paused());
    assert!(lost(&healer, false).await.is_empty() && lost(&healer, true).await.is_empty());
    cluster.kill(0).await;
    cluster.kill(1).await;
    assert!(lost(&healer, false).await.is_empty(), "two of six may be dead");
    cluster.kill(2).await;
    let keys = lost(&healer, false).await;
    assert_eq!(keys.len(), objects.len(), "{keys:?}");
    for ((data, payload), size) in objects.iter().map(|object| (object, object.1.len() as u64)) {
        let key = keys.iter().find(|key| key.size_bytes == size).unwrap();
        let extents = data.extents().len() as u64;
        assert_eq!((key.extents, key.extents_lost, key.back_with_all), (extents, extents, true), "{}", payload.len());
        assert_eq!(key.back_with, [1, 2, 3].map(DiskId), "each of them is enough");
    }
    // One more disk lacks a chunk of one extent: no disk alone brings that key back.
    let extents = objects[3].0.extents();
    let index = extents[0].slots.iter().position(|slot| *slot == 3).unwrap() as u8;
    cluster.holder(&extents[0], index).chunks.lock().unwrap().remove(&chunk_id(&extents[0], index));
    let keys = lost(&healer, false).await;
    let key = keys.iter().find(|key| key.size_bytes == UNIT * 25 + 1000).unwrap();
    assert_eq!((key.back_with.as_slice(), key.back_with_all), (&[][..], true), "{key:?}");
    cluster.revive(0).await;
    cluster.until("one is back", || cluster.store.disks().writable(DiskId(1))).await;
    let keys = lost(&healer, false).await;
    assert_eq!(keys.iter().map(|key| (key.size_bytes, key.extents_lost)).collect::<Vec<_>>(), [(UNIT * 25 + 1000, 1)]);
    assert_eq!(keys[0].back_with, [2, 3].map(DiskId));
    cluster.revive(1).await;
    cluster.until("two are back", || cluster.store.disks().writable(DiskId(2))).await;
    assert!(lost(&healer, false).await.is_empty());
}

/// The upload's extent comes first, and is lost as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_of_the_same_key_hides_no_lost_object() {
    let mut draw = seed("an_upload_of_the_same_key_hides_no_lost_object");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let (shard, len) = (ShardId(1), UNIT * 4);
    let (key, slot) = key_in(&cluster, shard, len);
    let mut staged = Vec::new();
    for _ in 0..2 {
        let payload = payload(len, &mut draw);
        staged.push(cluster.store.stage(None, slot, len, body(&payload, &mut draw)).await.unwrap());
    }
    staged.sort_by_key(|staged| staged.data.extents().iter().map(|extent| (extent.group, extent.extent)).min());
    let (object, part) = (staged.pop().unwrap(), staged.pop().unwrap());
    meta.commit(shard, &key, &object.data, &object.placement());
    meta.part(shard, &key, &part.data, &part.placement());
    object.committed();
    part.committed();
    let (healer, _stop) = heal_by(&cluster, meta.shards.clone(), paused());
    assert!(lost(&healer, false).await.is_empty());
    for disk in 0..3 {
        cluster.kill(disk).await;
    }
    let keys: Vec<String> = lost(&healer, false).await.into_iter().map(|lost| lost.key).collect();
    assert_eq!(keys, [key]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_was_reported_as_damaged_is_read_and_any_other_only_when_all_are() {
    let mut draw = seed("a_chunk_that_was_reported_as_damaged_is_read_and_any_other_only_when_all_are");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    meta.page(2);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (healer, _stop) = heal_by(&cluster, meta.shards.clone(), paused());
    cluster.kill(0).await;
    cluster.kill(1).await;
    let extent: &ExtentRef = &objects[1].0.extents()[0];
    let on = |slot: u8| extent.slots.iter().position(|other| *other == slot).unwrap() as u8;
    cluster.damage(extent, on(4), 0, Damage::Misplaced);
    assert!(lost(&healer, false).await.is_empty(), "nobody has met the damage");
    let sizes = |keys: Vec<LostKey>| keys.into_iter().map(|key| key.size_bytes).collect::<Vec<_>>();
    assert_eq!(sizes(lost(&healer, true).await), [UNIT * 4]);
    // What is good after all is no loss, though it was reported, too.
    let shard = ShardId(1 + (UNIT * 4 % 2) as u16);
    let chunks = vec![chunk(extent, on(4)), chunk(extent, on(5))];
    meta.shards.command(shard, Command::ReportMissing { chunks }).await.unwrap();
    let keys = lost(&healer, false).await;
    assert_eq!(keys.iter().map(|key| key.back_with.clone()).collect::<Vec<_>>(), [[1, 2].map(DiskId)]);
    assert_eq!(sizes(keys), [UNIT * 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_on_the_disk_that_a_slot_leaves_is_not_lost_and_either_disk_may_bring_it_back() {
    let mut draw = seed("what_lies_on_the_disk_that_a_slot_leaves_is_not_lost_and_either_disk_may_bring_it_back");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (healer, _stop) = heal_by(&cluster, meta.shards.clone(), paused());
    give_slot_to(&cluster, 7);
    let known = || cluster.store.disks().map().is_some_and(|map| map.epoch == Epoch(2));
    cluster.until("the new disk is up", || known() && cluster.store.disks().writable(DiskId(7))).await;
    cluster.kill(0).await;
    cluster.kill(1).await;
    assert!(lost(&healer, false).await.is_empty(), "disk 3 still has them");
    // The disk that the slot leaves is silent; the new one says that it has nothing.
    cluster.kill(2).await;
    let keys = lost(&healer, false).await;
    assert_eq!(keys.len(), objects.len());
    assert!(keys.iter().all(|key| key.back_with == [1, 2, 3].map(DiskId)), "{keys:?}");
    cluster.kill(6).await;
    let keys = lost(&healer, false).await;
    assert!(
        keys.len() == objects.len() && keys.iter().all(|key| key.back_with == [1, 2, 3, 7].map(DiskId)),
        "{keys:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_cluster_is_paused_the_queue_is_counted_and_nothing_of_it_is_rebuilt() {
    let mut draw = seed("while_the_cluster_is_paused_the_queue_is_counted_and_nothing_of_it_is_rebuilt");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (sender, receiver) = watch::channel(paused());
    let stop = CancellationToken::new();
    let healer = Healer::start(cluster.store.clone(), meta.shards.clone(), receiver, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    let until_ms = sender.borrow().paused_until_ms;
    assert_eq!((healer.status().paused, healer.status().paused_until_ms), (true, until_ms));
    let rebuilt = || counter(&cluster.store.counters().chunks_rebuilt);
    // The pass that counts a further chunk began after the one before had ended.
    for (number, (data, _)) in (1..).zip(&objects[..3]) {
        let extent = &data.extents()[0];
        cluster.holder(extent, 2).chunks.lock().unwrap().remove(&chunk_id(extent, 2));
        assert_eq!(healer.census(|_| {}).await.unwrap().missing, number);
        cluster.until("it is counted", || healer.status().queued_chunks == number).await;
        assert_eq!((rebuilt(), meta.missing() as u64), (0, number));
    }
    sender.send_modify(|settings| settings.paused_until_ms = 0);
    cluster.until("all is rebuilt", || meta.missing() == 0).await;
    assert_eq!((rebuilt(), healer.status().paused, healer.status().paused_until_ms), (3, false, 0));
}
