//! Metadata that were lost or damaged: what comes back is another replica, never the one that voted and acknowledged.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::BucketId;
use granary_meta::{Answer, Query, VersionPick};
use granary_placement::id::ShardId;
use granary_replica::fatal::Fatal;
use granary_replica::message::{
    decode_message, encode_message, PeerMessage, PeerRequest, PeerResponse, ReplicaId, WireVote,
};
use granary_replica::store::{LogDb, LogWrite, StateDb};
use granary_replica::{snapshot, MetaHost, Space};
use granary_wire::control::{ControlError, ShardStatus};
use scenery::cluster::{disk, noop, Cluster};
use scenery::Random;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SHARD: ShardId = ShardId(1);
/// Long enough for several elections.
const ELECTIONS: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(30);

fn get(key: &str) -> Query {
    Query::GetObject { bucket: BucketId(1), key: key.to_owned(), version: VersionPick::Current }
}

async fn has(cluster: &Cluster, key: &str) -> bool {
    matches!(cluster.query(SHARD, &get(key)).await, Answer::Object(_))
}

async fn eventually(what: &str, cluster: &Cluster, look: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < until, "{what}: {:?}", cluster.statuses());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until these replicas have the same state and vote.
async fn whole(cluster: &Cluster, ids: &[u32]) {
    let votes = |id: &u32| {
        let all = cluster.host(*id).status();
        all.iter().any(|status| status.shard == SHARD && ["leader", "follower"].contains(&status.state.as_str()))
    };
    eventually("all vote", cluster, || ids.iter().all(votes)).await;
    cluster.same_state(SHARD, ids).await;
}

fn status(host: &MetaHost) -> ShardStatus {
    host.status().into_iter().find(|status| status.shard == SHARD).unwrap()
}

/// What the host of that disk answers to a message of disk 9.
async fn say(host: &MetaHost, to: Option<ReplicaId>, request: PeerRequest) -> Result<PeerResponse, ControlError> {
    let from = ReplicaId { disk: disk(9), incarnation: 9 };
    let message = encode_message(&PeerMessage { from, to, request }).unwrap();
    host.raft(SHARD, disk(9), message).await.map(|answer| decode_message(&answer).unwrap())
}

async fn identity(host: &MetaHost) -> ReplicaId {
    match say(host, None, PeerRequest::Identify).await.unwrap() {
        PeerResponse::Identity { me, .. } | PeerResponse::Broken { me, .. } => me,
        other => panic!("{other:?}"),
    }
}

/// Three members, of which the third was cut off when `acked` was acknowledged.
async fn third_lacks_acked() -> Cluster {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(31);
    cluster.put(&mut random, SHARD, "before", b"x").await;
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop(3).await;
    cluster.put(&mut random, SHARD, "acked", b"x").await;
    cluster.same_state(SHARD, &[1, 2]).await;
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_whose_metadata_were_lost_votes_as_nobody_and_learns_what_it_acknowledged() {
    let cluster = third_lacks_acked().await;
    let before = identity(&cluster.host(2)).await;
    cluster.stop(1).await;
    cluster.stop(2).await;
    std::fs::remove_dir_all(cluster.path(2)).unwrap();
    // The second is empty now, and the third lacks what the second had acknowledged: they are no majority.
    cluster.start_all(&[2, 3]).await;
    tokio::time::sleep(ELECTIONS).await;
    for id in [2, 3] {
        let answer = cluster.host(id).query(SHARD, get("before")).await;
        assert!(answer.is_err(), "disk {id} answered without a majority: {answer:?}");
    }
    let after = identity(&cluster.host(2)).await;
    assert!(after.disk == before.disk && after != before, "{before} {after}");

    cluster.start(1).await;
    assert!(has(&cluster, "acked").await);
    // The new replica is a voter in the old one's place: with the third it carries on.
    whole(&cluster, &[1, 2, 3]).await;
    cluster.stop(1).await;
    cluster.put(&mut Random(32), SHARD, "after", b"y").await;
    assert!(has(&cluster, "acked").await);
    cluster.same_state(SHARD, &[2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_is_not_begun_again_where_something_of_it_was() {
    let cluster = Cluster::new();
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    cluster.put(&mut Random(33), SHARD, "k", b"x").await;
    cluster.stop(1).await;
    std::fs::remove_dir_all(cluster.path(1)).unwrap();
    cluster.start(1).await;
    for round in 0..2 {
        let again = cluster.try_init(SHARD, &[1]).await;
        assert!(matches!(&again, Err(ControlError::Disk(why)) if why.contains("lost")), "{again:?}");
        assert!(cluster.host(1).query(SHARD, get("k")).await.is_err(), "an empty shard answered");
        assert!(cluster.host(1).command(SHARD, noop(&mut Random(34))).await.is_err());
        if round == 0 {
            // It is remembered: the label has the new number now.
            cluster.stop(1).await;
            cluster.start(1).await;
        }
    }
    cluster.stop_all().await;

    // A first disk that does not know that it lost anything meets the others, who know.
    let cluster = third_lacks_acked().await;
    cluster.start(3).await;
    cluster.stop(1).await;
    std::fs::remove_dir_all(cluster.path(1)).unwrap();
    cluster.labels.lock().unwrap().remove(&disk(1));
    cluster.network.isolate(disk(1), &[disk(2), disk(3)]);
    cluster.start(1).await;
    let again = cluster.try_init(SHARD, &[1, 2, 3]).await;
    assert!(matches!(again, Err(ControlError::Unavailable(_))), "not all members were there: {again:?}");
    cluster.network.heal();
    let again = cluster.try_init(SHARD, &[1, 2, 3]).await;
    assert!(matches!(&again, Ok(()) | Err(ControlError::BadRequest(_))), "{again:?}");
    assert!(has(&cluster, "acked").await);
    whole(&cluster, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_for_another_replica_or_in_anothers_name_change_nothing() {
    let cluster = Cluster::new();
    let host = cluster.start(1).await;
    assert!(matches!(say(&host, None, PeerRequest::Identify).await, Err(ControlError::Unavailable(_))), "no map");
    assert!(matches!(cluster.try_init(SHARD, &[1]).await, Err(ControlError::Unavailable(_))), "no map");
    assert!(host.status().is_empty(), "a replica was made");
    cluster.name(SHARD, &[1, 2, 3]);
    let me = identity(&host).await;
    let vote = |node| PeerRequest::Vote {
        vote: WireVote { term: 7, node, committed: false },
        last: None,
        transfer: false,
        pre_vote: false,
    };
    let nine = ReplicaId { disk: disk(9), incarnation: 9 };
    let other = ReplicaId { incarnation: me.incarnation ^ 1, ..me };
    assert_eq!(say(&host, Some(other), vote(nine)).await.unwrap(), PeerResponse::OtherReplica { me });
    assert!(matches!(say(&host, None, vote(nine)).await.unwrap(), PeerResponse::Failed(_)));
    let in_anothers_name = ReplicaId { disk: disk(2), incarnation: 9 };
    assert!(matches!(say(&host, Some(me), vote(in_anothers_name)).await.unwrap(), PeerResponse::Failed(_)));
    let message = encode_message(&PeerMessage { from: nine, to: Some(me), request: vote(nine) }).unwrap();
    assert!(matches!(host.raft(SHARD, disk(8), message).await, Err(ControlError::BadRequest(_))));
    assert_eq!(status(&host).term, 0);
    assert!(matches!(say(&host, Some(me), PeerRequest::Rebuild).await.unwrap(), PeerResponse::Failed(_)));
    assert!(matches!(say(&host, Some(me), vote(nine)).await.unwrap(), PeerResponse::Voted { granted: true, .. }));
    assert_eq!(identity(&host).await, me);
    // The library tells of its term a moment after it has answered.
    eventually("the vote shows", &cluster, || status(&host).term == 7).await;
    cluster.stop_all().await;
}

/// Cuts entries out of the middle of the shard's log on a disk that does not run.
fn tear(cluster: &Cluster, id: u32) {
    let log = LogDb::open(&cluster.path(id).join("log")).unwrap();
    let key = |index: u64| [&SHARD.0.to_be_bytes()[..], b"E", &index.to_be_bytes()].concat();
    let mut indexes = Vec::new();
    log.scan(&key(0), &key(u64::MAX), |key, _| {
        indexes.push(u64::from_be_bytes(*key.last_chunk::<8>().unwrap()));
        Ok(true)
    })
    .unwrap();
    let middle = indexes[indexes.len() / 2];
    assert!(indexes.len() > 2, "{indexes:?}");
    log.write_synced(&[LogWrite::DeleteRange(key(middle), key(middle + 1))]).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_replica_is_rebuilt_from_the_others_once_nothing_rests_on_it_alone() {
    // The third is behind: what was acknowledged is on the leader and on the other, and that one is torn.
    let cluster = third_lacks_acked().await;
    let leader = cluster.leader(SHARD).await.0;
    let other = 3 - leader;
    cluster.stop(other).await;
    tear(&cluster, other);
    cluster.start(other).await;
    let torn = identity(&cluster.host(other)).await;
    tokio::time::sleep(ELECTIONS).await;
    assert_eq!(status(&cluster.host(leader)).state, "leader", "nobody could have asked for anything");
    assert_eq!(status(&cluster.host(other)).state, "stopped");
    assert_eq!(identity(&cluster.host(other)).await, torn, "it was emptied while it was needed");
    assert!(cluster.host(leader).query(SHARD, get("acked")).await.is_err(), "one of three answered");

    cluster.start(3).await;
    assert!(has(&cluster, "acked").await);
    whole(&cluster, &[1, 2, 3]).await;
    assert_ne!(identity(&cluster.host(other)).await, torn);
    cluster.stop(leader).await;
    cluster.put(&mut Random(35), SHARD, "after", b"y").await;
    assert!(has(&cluster, "acked").await);
    cluster.same_state(SHARD, &[other, 3]).await;
    // And it stays so.
    cluster.stop(other).await;
    cluster.start(other).await;
    cluster.same_state(SHARD, &[other, 3]).await;
    cluster.stop_all().await;
}

/// What the leader remembers of the others' logs does not count: both are torn, and each would be emptied on the
/// other's acknowledgements.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_torn_replicas_of_three_are_both_left_as_they_are() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(37);
    for i in 0..5 {
        cluster.put(&mut random, SHARD, &format!("key-{i}"), b"x").await;
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    let leader = cluster.leader(SHARD).await.0;
    let torn: Vec<u32> = [1, 2, 3].into_iter().filter(|id| *id != leader).collect();
    let mut before = Vec::new();
    for id in &torn {
        before.push(identity(&cluster.host(*id)).await);
        cluster.stop(*id).await;
        tear(&cluster, *id);
    }
    cluster.start_all(&torn).await;
    tokio::time::sleep(ELECTIONS).await;
    for (id, before) in torn.iter().zip(before) {
        assert_eq!(status(&cluster.host(*id)).state, "stopped");
        assert_eq!(identity(&cluster.host(*id)).await, before, "disk {id} was emptied");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_state_is_behind_its_log_is_rebuilt() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(36);
    for i in 0..200 {
        cluster.put(&mut random, SHARD, &format!("key-{i}"), b"x").await;
    }
    whole(&cluster, &[1, 2, 3]).await;
    let before = identity(&cluster.host(3)).await;
    cluster.stop(3).await;
    std::fs::remove_dir_all(cluster.path(3).join("state")).unwrap();
    cluster.start(3).await;
    whole(&cluster, &[1, 2, 3]).await;
    assert_ne!(identity(&cluster.host(3)).await, before, "the log still had everything; the test shows nothing");

    // The other way round: the log is gone and the state is left.
    cluster.stop(2).await;
    std::fs::remove_dir_all(cluster.path(2).join("log")).unwrap();
    cluster.start(2).await;
    whole(&cluster, &[1, 2, 3]).await;
    assert!(has(&cluster, "key-199").await && cluster.fatal.lock().unwrap().is_empty());
    cluster.stop_all().await;
}

/// What keeps a replica from opening may pass: here a snapshot that a stop cut off finds no room at the start. Its
/// leader asks it to empty itself, and it is looked at once more before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_opens_at_the_second_look_is_not_emptied() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    cluster.put(&mut Random(38), SHARD, "k", b"x").await;
    whole(&cluster, &[1, 2, 3]).await;
    let before = identity(&cluster.host(3)).await;
    cluster.stop(3).await;
    {
        let path = cluster.path(3);
        let state = StateDb::open(&path.join("state"), Fatal::new(Arc::new(|why| panic!("{why}")))).unwrap();
        let file = path.join("snapshots").join(format!("install-{SHARD}"));
        snapshot::write_file(&state, SHARD, &file, &Space::without_reserve()).unwrap();
        let marker = [[0xff, 0xff], SHARD.0.to_be_bytes()].concat();
        state.write(SHARD, [(marker, Some(Vec::new()))].into_iter().collect(), None).unwrap();
        state.flush().unwrap();
    }
    // Nobody asks it to empty itself before it has been seen.
    cluster.network.isolate(disk(3), &[disk(1), disk(2)]);
    cluster.free(disk(3)).store(0, Ordering::Relaxed);
    cluster.start(3).await;
    assert_eq!(status(&cluster.host(3)).state, "stopped");
    cluster.free(disk(3)).store(1 << 40, Ordering::Relaxed);
    cluster.network.heal();
    whole(&cluster, &[1, 2, 3]).await;
    assert_eq!(identity(&cluster.host(3)).await, before);
    assert_eq!(cluster.host(3).counters().replicas_rebuilt, 0);
    cluster.stop_all().await;
}
