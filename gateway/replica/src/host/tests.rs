#![allow(clippy::unwrap_used)]
use super::identity::replica_key;
use super::*;
use crate::fake_peers::FakePeers;
use crate::message::WireVote;
use crate::store::LogWrite;
use crate::writer::LogJob;
use granary_meta::codec::encode;
use std::collections::BTreeSet;

async fn open(dir: &Path) -> MetaHost {
    let config = HostConfig {
        dir: dir.to_owned(),
        disk: DiskId(1),
        number: None,
        timing: Timing::default(),
        clock: WallClock::default(),
        space: Space::without_reserve(),
    };
    let map = watch::Sender::new(None);
    MetaHost::open(config, Arc::new(FakePeers::nobody()), map.subscribe(), Arc::new(|why| panic!("{why}")))
        .await
        .unwrap()
}

/// It is known which replica is to be emptied, also when its own record cannot be read at the second look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_replica_whose_name_cannot_be_read_any_more_is_still_rebuilt() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = host.open_replica(shard).await.unwrap();
    let id = batcher.replica.me;
    batcher.stop.cancel();
    batcher.replica.shutdown().await;
    drop(batcher);
    let broken = ReplicaState::Broken { id: Some(id), why: "a read failed".to_owned() };
    lock(&host.inner.replicas).insert(shard, broken);
    let writer = lock(&host.inner.writer).clone().unwrap();
    writer.write(vec![LogWrite::Put(replica_key(shard), b"no record".to_vec())]).await.unwrap();
    drop(writer);

    let other = ReplicaId { incarnation: id.incarnation ^ 1, ..id };
    assert!(host.rebuild(shard, other).await.is_err(), "another replica was meant");
    let rebuilt = host.rebuild(shard, id).await.unwrap();
    assert_ne!(rebuilt.replica.me, id);
    assert!(rebuilt.replica.is_empty());
    drop(rebuilt);
    assert_eq!((host.counters().replicas_rebuilt, host.counters().replicas_stopped), (1, 0));
    host.shutdown().await;
}

/// A failed replica has left a vote in the writer's queue, and the disk is slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_replica_is_opened_after_all_that_it_had_queued_is_on_disk() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = host.open_replica(shard).await.unwrap();
    assert!(batcher.replica.is_empty());
    let me = batcher.replica.me;
    batcher.stop.cancel();
    batcher.replica.shutdown().await;
    drop(batcher);
    lock(&host.inner.replicas).insert(shard, ReplicaState::Failed { why: "planted".to_owned() });
    let writer = lock(&host.inner.writer).clone().unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let on_durable = Box::new(move |_| held.recv().unwrap());
    writer.submit(LogJob { writes: Vec::new(), on_durable }).await.unwrap();
    let vote = encode(&WireVote { term: 5, node: me, committed: false }).unwrap();
    let vote = LogWrite::Put([&shard.0.to_be_bytes()[..], b"V"].concat(), vote);
    writer.submit(LogJob { writes: vec![vote], on_durable: Box::new(|_| ()) }).await.unwrap();
    drop(writer);

    let opening = failures::open_again(host.clone(), shard);
    tokio::pin!(opening);
    let early = tokio::time::timeout(4 * failures::FIRST_PAUSE, &mut opening).await;
    release.send(()).unwrap();
    assert!(early.is_err(), "it was opened before");
    opening.await;
    assert!(!host.batcher(shard).unwrap().replica.is_empty(), "the vote is not there");
    host.shutdown().await;
}

/// A leader was paused between its barrier and its look at the state, and the next leader's snapshot is half there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_in_the_middle_of_an_install_is_not_answered() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = host.open_replica(shard).await.unwrap();
    batcher.replica.initialize(BTreeSet::from([batcher.replica.me])).await.unwrap();
    drop(batcher);
    let look = || host.query(shard, Query::ListGarbage { until_ms: 0, after: None, limit: 1 });
    let until = Instant::now() + Duration::from_secs(20);
    while look().await.is_err() {
        assert!(Instant::now() < until, "no leader: {:?}", host.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    snapshot::plant_marker(&host.inner.state, shard, true);
    assert!(matches!(look().await, Err(ControlError::Unavailable(_))));
    snapshot::plant_marker(&host.inner.state, shard, false);
    look().await.unwrap();
    host.shutdown().await;
}

/// While members were asked whether the replica is one of them, it failed, and was opened again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_took_the_place_of_another_is_not_let_go_for_it() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let first = host.open_replica(shard).await.unwrap();
    assert!(first.replica.contain(|| panic!("planted")).is_err());
    let until = Instant::now() + Duration::from_secs(20);
    let second = loop {
        match host.batcher(shard) {
            Ok(second) if !Arc::ptr_eq(&first, &second) => break second,
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
        assert!(Instant::now() < until, "it is not opened again: {:?}", host.status());
    };
    host.let_go(&first).await;
    assert!(Arc::ptr_eq(&host.batcher(shard).unwrap(), &second), "two of it on one log");
    host.let_go(&second).await;
    assert!(matches!(host.batcher(shard), Err(ControlError::NoSuchShard(_))));
    drop((first, second));
    host.shutdown().await;
}
