//! A sync that fails: nothing is promised on it, the host ends, and what was promised before is there.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;
mod synced;

use granary_meta::record::BucketId;
use granary_meta::{Answer, Query, Reply, VersionPick};
use granary_placement::id::{DiskId, ShardId};
use granary_replica::message::{
    decode_message, encode_message, PeerMessage, PeerRequest, PeerResponse, ReplicaId, WireVote,
};
use granary_replica::MetaHost;
use scenery::cluster::{noop, Cluster};
use scenery::{put, request, Random};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use synced::{copy_what_was_synced, fail_next_sync};

const SHARD: ShardId = ShardId(1);
const PATIENCE: Duration = Duration::from_secs(30);

async fn has(cluster: &Cluster, key: &str) -> bool {
    let key = key.to_owned();
    let get = Query::GetObject { bucket: BucketId(1), key, version: VersionPick::Current };
    matches!(cluster.query(SHARD, &get).await, Answer::Object(_))
}

/// Ends a host that runs, as its process would, with the power, and starts it from what it had synced.
async fn lose_power(cluster: &Cluster, id: u32) {
    let (path, copy) = (cluster.path(id), cluster.path(id + 100));
    copy_what_was_synced(&path, &copy);
    cluster.stop(id).await;
    std::fs::remove_dir_all(&path).unwrap();
    std::fs::rename(copy, path).unwrap();
    cluster.start(id).await;
}

async fn until_fatal(cluster: &Cluster) {
    let until = Instant::now() + PATIENCE;
    while cluster.fatal.lock().unwrap().is_empty() {
        assert!(Instant::now() < until, "the host goes on after a failed sync: {:?}", cluster.statuses());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asks for the vote of term 5 for that candidate.
async fn is_vote_given(host: &MetaHost, candidate: u32) -> bool {
    let from = ReplicaId { disk: DiskId(candidate), incarnation: 1 };
    let vote = WireVote { term: 5, node: from, committed: false };
    let vote = PeerRequest::Vote { vote, last: None, transfer: false, pre_vote: false };
    let mut to = None;
    for request in [PeerRequest::Identify, vote] {
        let message = encode_message(&PeerMessage { from, to, request }).unwrap();
        match host.raft(SHARD, from.disk, message).await.map(|answer| decode_message(&answer).unwrap()) {
            Ok(PeerResponse::Identity { me, .. }) => to = Some(me),
            Ok(PeerResponse::Voted { granted, .. }) => return granted,
            Ok(PeerResponse::Failed(_)) | Err(_) => return false,
            Ok(other) => panic!("{other:?}"),
        }
    }
    panic!("no answer")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vote_whose_sync_fails_is_not_given_and_nothing_is_from_then_on() {
    let cluster = Cluster::new();
    let host = cluster.start(1).await;
    cluster.name(SHARD, &[1, 2, 3]);
    // The replica is made first, so that the vote is what fails.
    assert!(host.raft(SHARD, DiskId(3), identify()).await.is_ok());
    let failed = fail_next_sync(&cluster.path(1).join("log"), ".log");
    assert!(!is_vote_given(&host, 3).await, "a vote that is not on the disk");
    assert!(failed.load(Ordering::SeqCst));
    assert_eq!(cluster.fatal.lock().unwrap().len(), 1);
    for candidate in [3, 2] {
        assert!(!is_vote_given(&host, candidate).await, "a vote after a failed sync");
    }
    drop(host);
    // Nobody was told of it: another candidate may have it.
    lose_power(&cluster, 1).await;
    assert!(is_vote_given(&cluster.host(1), 2).await);
    cluster.stop_all().await;
}

fn identify() -> bytes::Bytes {
    let from = ReplicaId { disk: DiskId(3), incarnation: 1 };
    encode_message(&PeerMessage { from, to: None, request: PeerRequest::Identify }).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_whose_sync_fails_are_not_acknowledged_and_none_is_afterwards() {
    let cluster = Cluster::new();
    let host = cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    let mut random = Random(51);
    for number in 0..10 {
        cluster.put(&mut random, SHARD, &format!("before-{number}"), b"x").await;
    }
    let failed = fail_next_sync(&cluster.path(1).join("log"), ".log");
    let during = (0..10).map(|number| {
        let command = put(1, &format!("during-{number}"), b"x");
        host.command(SHARD, request(&mut random, 1, command))
    });
    for answer in futures::future::join_all(during).await {
        assert!(answer.is_err(), "acknowledged without a sync: {answer:?}");
    }
    assert!(failed.load(Ordering::SeqCst));
    assert_eq!(cluster.fatal.lock().unwrap().len(), 1);
    let after = host.command(SHARD, noop(&mut random)).await;
    assert!(after.is_err(), "acknowledged after a failed sync: {after:?}");
    drop(host);
    lose_power(&cluster, 1).await;
    for number in 0..10 {
        assert!(has(&cluster, &format!("before-{number}")).await);
        assert!(!has(&cluster, &format!("during-{number}")).await, "the failed sync was none");
    }
    cluster.put(&mut random, SHARD, "after", b"x").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_sync_fails_does_not_count_for_the_majority() {
    for leader_fails in [true, false] {
        let cluster = Cluster::new();
        cluster.start_all(&[1, 2, 3]).await;
        cluster.init(SHARD, &[1, 2, 3]).await;
        let mut random = Random(52);
        cluster.put(&mut random, SHARD, "before", b"x").await;
        cluster.same_state(SHARD, &[1, 2, 3]).await;
        let leader = cluster.leader(SHARD).await.0;
        let others: Vec<u32> = [1, 2, 3].into_iter().filter(|id| *id != leader).collect();
        // The third is away, so the one that fails is needed.
        let (fails, away) = if leader_fails { (leader, others[0]) } else { (others[0], others[1]) };
        cluster.stop(away).await;
        let failed = fail_next_sync(&cluster.path(fails).join("log"), ".log");
        let command = request(&mut random, 1, put(1, "needs-both", b"x"));
        let answer = cluster.host(leader).command(SHARD, command.clone()).await;
        assert!(answer.is_err(), "one of three is no majority: {answer:?}");
        assert!(failed.load(Ordering::SeqCst));
        assert_eq!(cluster.fatal.lock().unwrap().len(), 1);
        // It comes back without what failed, and the same command is taken once.
        lose_power(&cluster, fails).await;
        let reply = cluster.command(SHARD, &command).await;
        assert!(matches!(reply, Reply::Put { .. }), "{reply:?}");
        cluster.start(away).await;
        cluster.same_state(SHARD, &[1, 2, 3]).await;
        assert!(has(&cluster, "before").await && has(&cluster, "needs-both").await);
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_fails_purges_nothing_and_ends_the_host() {
    // The new file, the folder that names it, and the manifest that makes it part of the database.
    for name in [".sst", "state", "MANIFEST"] {
        let mut cluster = Cluster::new();
        // The first flush is one that a purge waits for.
        (cluster.timing.snapshot_entries, cluster.timing.keep_entries) = (100, 2);
        let host = cluster.start(1).await;
        cluster.init(SHARD, &[1]).await;
        let mut random = Random(53);
        for number in 0..80 {
            cluster.put(&mut random, SHARD, &format!("before-{number}"), b"x").await;
        }
        let failed = fail_next_sync(&cluster.path(1).join("state"), name);
        let mut acked = 0;
        while acked < 100 {
            let command = put(1, &format!("after-{acked}"), b"x");
            match host.command(SHARD, request(&mut random, 1, command)).await {
                Ok(_) => acked += 1,
                Err(_) => break,
            }
        }
        until_fatal(&cluster).await;
        assert!(failed.load(Ordering::SeqCst));
        drop(host);
        lose_power(&cluster, 1).await;
        for number in 0..80 {
            assert!(has(&cluster, &format!("before-{number}")).await, "{name}: {number} of 80");
        }
        for number in 0..acked {
            assert!(has(&cluster, &format!("after-{number}")).await, "{name}: {number} of {acked}");
        }
        cluster.stop_all().await;
    }
}
