//! What a census counts.

use crate::cluster::{seed, Cluster};
use crate::heal::{fill, settings, small};
use crate::meta::Meta;
use crate::moves::give_slot_to;
use crate::node::Damage;
use granary_gateway::background::heal::{HealSettings, Healer};
use granary_gateway::object::chunk_id;
use granary_meta::record::ExtentRef;
use granary_placement::id::{DiskId, Epoch};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

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
