use super::super::map_watch::MapSet;
use super::super::Shards;
use super::{cluster, map, HURRY, OBJECT_SHARDS};
use crate::metrics::Metrics;
use granary_meta::{Command, Reply};
use granary_placement::id::{ClusterId, DiskId, Epoch, ShardId};
use granary_placement::map::ClusterMap;
use std::sync::Arc;
use tokio::sync::watch;

#[tokio::test]
async fn a_newer_map_is_taken_confirmed_and_offered_to_disks_that_lag() {
    let (peers, shards) = cluster();
    assert!(!*shards.confirmed().borrow());
    assert!(!shards.refresh_map().await.unwrap());
    assert!(*shards.confirmed().borrow());
    assert_eq!(shards.set_map(map(5, OBJECT_SHARDS + 1, 2)).await.unwrap(), MapSet::Done);
    assert_eq!(shards.set_map(map(5, OBJECT_SHARDS + 1, 2)).await.unwrap(), MapSet::Conflict { current: Epoch(2) });
    assert_eq!(shards.current_map().unwrap().epoch, Epoch(2));
    let all_at = |epoch| {
        let state = peers.state();
        assert!((1..=5).all(|disk| state.epochs.get(&DiskId(disk)) == Some(&Epoch(epoch))), "{:?}", state.epochs);
        state.diffs_taken
    };
    // They knew nothing, so they were told the whole; from then on what changes.
    assert_eq!(all_at(2), 0);
    let third = Command::SetMap { map: Box::new(map(5, OBJECT_SHARDS + 1, 3)) };
    assert_eq!(peers.command(ShardId::ROOT, third), Reply::Done);
    assert!(shards.refresh_map().await.unwrap());
    peers.state().epochs.insert(DiskId(4), Epoch(1));
    shards.offer_map().await;
    assert_eq!(all_at(3), 6, "two steps for the disk that lags by two");
    // One that is further behind than anybody remembers is told the whole.
    peers.state().epochs.insert(DiskId(4), Epoch(0));
    shards.offer_map().await;
    assert_eq!(all_at(3), 6);
}

#[tokio::test]
async fn a_map_given_at_start_gives_way_to_the_root_shards_whatever_its_epoch() {
    for epoch in [1, 2, 9] {
        let (peers, _) = cluster();
        let next = Command::SetMap { map: Box::new(map(5, OBJECT_SHARDS + 1, 2)) };
        assert_eq!(peers.command(ShardId::ROOT, next), Reply::Done);
        // What the file at hand says of a disk is not so.
        let mut given = map(5, OBJECT_SHARDS + 1, epoch);
        given.disks.get_mut(&DiskId(3)).unwrap().weight += 7;
        let shards = Shards::with_timing(
            peers.clone(),
            watch::Sender::new(Some(Arc::new(given))),
            Metrics::new().unwrap(),
            HURRY,
        );
        assert!(shards.refresh_map().await.unwrap());
        assert_eq!(*shards.current_map().unwrap(), map(5, OBJECT_SHARDS + 1, 2), "epoch {epoch}");
        // And what is new is a difference to that.
        let mut third = map(5, OBJECT_SHARDS + 1, 3);
        third.disks.get_mut(&DiskId(2)).unwrap().weight += 1;
        assert_eq!(peers.command(ShardId::ROOT, Command::SetMap { map: Box::new(third.clone()) }), Reply::Done);
        assert!(shards.refresh_map().await.unwrap());
        assert_eq!(*shards.current_map().unwrap(), third);
        assert!(!shards.refresh_map().await.unwrap());
    }
}

#[tokio::test]
async fn a_map_of_another_cluster_is_never_confirmed() {
    let (peers, _) = cluster();
    let given = ClusterMap { cluster_id: ClusterId([9; 16]), ..map(5, OBJECT_SHARDS + 1, 1) };
    let known = watch::Sender::new(Some(Arc::new(given.clone())));
    let shards = Shards::with_timing(peers, known, Metrics::new().unwrap(), HURRY);
    assert!(shards.refresh_map().await.is_err());
    assert!(!*shards.confirmed().borrow());
    assert_eq!(*shards.current_map().unwrap(), given);
}
