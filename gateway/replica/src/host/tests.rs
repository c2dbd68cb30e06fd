#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::identity::replica_key;
use super::*;
use crate::fake_peers::FakePeers;
use crate::message::{PeerMessage, PeerRequest, PeerResponse, WireMembership, WireVote};
use crate::raft::containment::{spawn_blocking, Containment};
use crate::store::LogWrite;
use crate::writer::LogJob;
use granary_meta::codec::encode;
use granary_placement::id::{ClusterId, Epoch};
use granary_placement::map::ShardReplicas;
use std::collections::BTreeSet;

/// A host on disk 1. The map is the one that is sent, if one is.
async fn open_among(dir: &Path, others: FakePeers, map: &watch::Sender<Option<Arc<ClusterMap>>>) -> MetaHost {
    let config = HostConfig {
        dir: dir.to_owned(),
        disk: DiskId(1),
        number: None,
        timing: Timing::default(),
        clock: WallClock::default(),
        space: Space::without_reserve(),
    };
    MetaHost::open(config, Arc::new(others), map.subscribe(), Arc::new(|why| panic!("{why}"))).await.unwrap()
}

async fn open(dir: &Path) -> MetaHost {
    open_among(dir, FakePeers::nobody(), &watch::Sender::new(None)).await
}

/// Two shards on these disks.
fn map_on(disks: &[u32]) -> Option<Arc<ClusterMap>> {
    let members = disks.iter().copied().map(DiskId).collect();
    Some(Arc::new(ClusterMap {
        cluster_id: ClusterId([1; 16]),
        epoch: Epoch(1),
        next_disk_id: 100,
        disks: BTreeMap::new(),
        schemes: BTreeMap::new(),
        default_scheme: "4+2".to_owned(),
        groups: BTreeMap::new(),
        shards: vec![ShardReplicas { members }; 2],
        slot_shards: Vec::new(),
    }))
}

async fn eventually(what: &str, host: &MetaHost, look: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !look() {
        assert!(Instant::now() < until, "{what}: {:?}", host.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Opens a replica, ends it, and enters this in its place.
async fn plant(host: &MetaHost, shard: ShardId, state: impl FnOnce(ReplicaId) -> ReplicaState) -> ReplicaId {
    let batcher = host.open_replica(shard).await.unwrap();
    let id = batcher.replica.me;
    batcher.stop.cancel();
    batcher.replica.shutdown().await;
    lock(&host.inner.replicas).insert(shard, state(id));
    id
}

fn failed(id: ReplicaId) -> ReplicaState {
    ReplicaState::Failed { id, why: "planted".to_owned() }
}

/// The log's writer does nothing until this is dropped.
async fn hold_writer(host: &MetaHost) -> std::sync::mpsc::Sender<()> {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let on_durable = Box::new(move |_| assert!(held.recv().is_err()));
    let writer = lock(&host.inner.writer).clone().unwrap();
    writer.submit(LogJob { writes: Vec::new(), on_durable }).await.unwrap();
    release
}

/// It is known which replica is to be emptied, also when its own record cannot be read at the second look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_replica_whose_name_cannot_be_read_any_more_is_still_rebuilt() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let broken = |id| ReplicaState::Broken { id: Some(id), why: "a read failed".to_owned() };
    let id = plant(&host, shard, broken).await;
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
    let me = plant(&host, shard, failed).await;
    let release = hold_writer(&host).await;
    let writer = lock(&host.inner.writer).clone().unwrap();
    let vote = encode(&WireVote { term: 5, node: me, committed: false }).unwrap();
    let vote = LogWrite::Put([&shard.0.to_be_bytes()[..], b"V"].concat(), vote);
    writer.submit(LogJob { writes: vec![vote], on_durable: Box::new(|_| ()) }).await.unwrap();
    drop(writer);

    let opening = failures::open_again(host.clone(), shard);
    tokio::pin!(opening);
    let early = tokio::time::timeout(4 * failures::FIRST_PAUSE, &mut opening).await;
    drop(release);
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
    eventually("it leads", &host, || host.status()[0].applied_index > 0).await;
    look().await.unwrap();
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
    let is_another = || host.batcher(shard).is_ok_and(|second| !Arc::ptr_eq(&first, &second));
    eventually("it is opened again", &host, is_another).await;
    let second = host.batcher(shard).unwrap();
    host.let_go(&first);
    assert!(Arc::ptr_eq(&host.batcher(shard).unwrap(), &second), "two of it on one log");
    host.let_go(&second);
    let is_gone = || matches!(host.batcher(shard), Err(ControlError::NoSuchShard(_)));
    eventually("it ends", &host, is_gone).await;
    assert!(host.status().is_empty());
    // Its data stay: should the map name this disk again, it begins from there.
    assert_eq!(host.open_replica(shard).await.unwrap().replica.me, second.replica.me);
    drop((first, second));
    host.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_let_go_is_not_opened_before_all_that_it_had_queued_is_on_disk() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = host.open_replica(shard).await.unwrap();
    let release = hold_writer(&host).await;
    host.let_go(&batcher);
    drop(batcher);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let early = host.open_replica(shard).await.err();
    drop(release);
    assert!(matches!(early, Some(ControlError::Unavailable(_))), "it was opened before");
    let is_gone = || matches!(host.batcher(shard), Err(ControlError::NoSuchShard(_)));
    eventually("it ends", &host, is_gone).await;
    host.shutdown().await;
}

/// Its disk hangs in the middle of something.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_hangs_while_it_is_let_go_holds_up_no_opening_and_no_stop() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = host.open_replica(shard).await.unwrap();
    let inside = batcher.replica.contain(|| Containment::current().unwrap()).unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let work = spawn_blocking(move || {
        begun.send(()).unwrap();
        assert!(held.recv().is_err());
    });
    let hanging = tokio::spawn(async move { inside.contain(work).await.map(drop) });
    has_begun.await.unwrap();

    let patience = Duration::from_secs(60);
    host.let_go(&batcher);
    let beside = tokio::time::timeout(patience, host.open_replica(ShardId(2))).await;
    drop(beside.expect("another opening waits for it").unwrap());
    let again = tokio::time::timeout(patience, host.open_replica(shard)).await.expect("an opening waits for it");
    assert!(matches!(again, Err(ControlError::Unavailable(_))), "two of it on one log");
    tokio::time::timeout(patience, host.shutdown()).await.expect("the stop waits for it");
    drop(release);
    assert!(hanging.await.unwrap().is_err());
}

/// The map has given its place to another disk while it was down. As long as the leader counts on it, it is opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_replica_is_let_go_when_it_is_no_member_any_more() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let members = Arc::new(Mutex::new(Vec::new()));
    let known = members.clone();
    let leader = FakePeers::new(move |_, _, message| {
        let nodes = lock(&known).clone();
        let membership = WireMembership { configs: vec![nodes.clone()], nodes };
        (message.request == PeerRequest::Members).then_some(PeerResponse::Members { leads: true, membership })
    });
    let map = watch::Sender::new(map_on(&[2]));
    let host = open_among(folder.path(), leader, &map).await;
    let id = plant(&host, shard, failed).await;
    let other = ReplicaId { disk: DiskId(2), incarnation: 7 };

    *lock(&members) = vec![id, other];
    failures::open_again(host.clone(), shard).await;
    assert_eq!(host.batcher(shard).unwrap().replica.me, id, "a member was let go");
    plant(&host, shard, failed).await;
    *lock(&members) = vec![other];
    map.send_replace(map_on(&[1, 2]));
    failures::open_again(host.clone(), shard).await;
    assert_eq!(host.batcher(shard).unwrap().replica.me, id, "one that the map names was let go");
    plant(&host, shard, failed).await;
    map.send_replace(map_on(&[2]));
    assert_eq!(host.counters().replicas_stopped, 1);
    failures::open_again(host.clone(), shard).await;
    assert!(matches!(host.batcher(shard), Err(ControlError::NoSuchShard(_))), "it is opened again and again");
    assert_eq!((host.counters().replicas_stopped, host.status()), (0, Vec::new()));
    // Its data stay.
    assert_eq!(host.open_replica(shard).await.unwrap().replica.me, id);

    // One whose data cannot be used is not opened again, and let go by itself.
    let broken = |id| ReplicaState::Broken { id: Some(id), why: "a read failed".to_owned() };
    *lock(&members) = vec![id, other];
    plant(&host, shard, broken).await;
    assert!(!host.let_failed_go(shard).await, "a member was let go");
    assert_eq!(host.counters().replicas_stopped, 1);
    *lock(&members) = vec![other];
    eventually("it stays stopped", &host, || host.counters().replicas_stopped == 0).await;
    assert!(matches!(host.batcher(shard), Err(ControlError::NoSuchShard(_))));
    host.shutdown().await;
}

/// As [`MetaHost::open_now`] starts it; it is not entered.
async fn started(host: &MetaHost, shard: ShardId) -> Arc<Batcher> {
    let id = plant(host, shard, |_| ReplicaState::Removed).await;
    let containment = Containment::new(shard);
    let writer = lock(&host.inner.writer).clone().unwrap();
    let starting = host.start_replica(id, shard, writer, containment.clone());
    let replica = Arc::new(containment.contain(starting).await.unwrap().unwrap());
    let stop = host.inner.stop.child_token();
    Arc::new(Batcher::start(replica, host.inner.batches.clone(), &host.inner.tasks, stop))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_failed_before_it_was_entered_is_opened_again() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = started(&host, shard).await;
    assert!(batcher.replica.contain(|| panic!("planted")).is_err());
    host.enter(batcher.clone()).await;
    let is_another = || host.batcher(shard).is_ok_and(|second| !Arc::ptr_eq(&batcher, &second));
    eventually("it is opened again", &host, is_another).await;
    assert_eq!(host.counters().replica_failures, 1);
    host.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_what_is_being_opened_and_leaves_nothing_running() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let map = watch::Sender::new(map_on(&[1]));
    let host = open_among(folder.path(), FakePeers::nobody(), &map).await;
    let late = started(&host, ShardId(2)).await;
    // A new replica is written down before it runs, and the disk is slow.
    let release = hold_writer(&host).await;
    let asked = {
        let (host, from) = (host.clone(), ReplicaId { disk: DiskId(2), incarnation: 7 });
        let message = PeerMessage { from, to: None, request: PeerRequest::Identify };
        tokio::spawn(async move { host.raft(shard, from.disk, encode_message(&message).unwrap()).await })
    };
    eventually("it is being opened", &host, || host.inner.opening.try_lock().is_err()).await;
    // Time to get past its look whether the host is stopping.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let stop = {
        let host = host.clone();
        tokio::spawn(async move { host.shutdown().await })
    };
    host.inner.stop.cancelled().await;
    // The caller's connection breaks.
    asked.abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(lock(&host.inner.writer).is_some(), "the stop has gone on without it");
    drop(release);
    stop.await.unwrap();
    // One that was started before the stop and is entered after it.
    host.enter(late.clone()).await;
    assert!(host.running().is_empty());
    eventually("all tasks end", &host, || host.inner.tasks.is_empty()).await;
    assert!(late.replica.initialize(BTreeSet::from([late.replica.me])).await.is_err(), "it runs");
    drop((late, host));
    // Nothing holds the databases any more.
    open(folder.path()).await.shutdown().await;
}

/// What RocksDB does when it is closed does not count: the process may end before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_is_durable_when_a_stop_is_done() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let host = open(folder.path()).await;
    let batcher = host.open_replica(shard).await.unwrap();
    batcher.replica.initialize(BTreeSet::from([batcher.replica.me])).await.unwrap();
    drop(batcher);
    eventually("it leads", &host, || host.status()[0].applied_index > 0).await;
    host.shutdown().await;
    let applied = snapshot::applied_state(&*host.inner.state, shard).unwrap();
    assert!(applied.last.is_some_and(|last| last.index > 0));
    let copy = folder.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(folder.path().join("state")).unwrap() {
        let file = file.unwrap();
        match std::fs::copy(file.path(), copy.join(file.file_name())) {
            // The database removes files that it does not need any more.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            copied => drop(copied.unwrap()),
        }
    }
    let copy = StateDb::open(&copy, host.inner.fatal.clone()).unwrap();
    assert_eq!(snapshot::applied_state(&copy, shard).unwrap(), applied);
}
