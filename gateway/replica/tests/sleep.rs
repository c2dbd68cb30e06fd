//! Shards that nobody uses sleep: their timers stand still, and whatever happens then, they serve as if they had been
//! awake.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::BucketId;
use granary_meta::{Answer, Query, VersionPick};
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::ControlError;
use scenery::cluster::{disk, Cluster};
use scenery::{put, request, Random};
use std::time::{Duration, Instant};

const SHARD: ShardId = ShardId(1);
const IDS: [u32; 3] = [1, 2, 3];

fn get(key: &str) -> Query {
    Query::GetObject { bucket: BucketId(1), key: key.to_owned(), version: VersionPick::Current }
}

fn etag(body: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(body))
}

fn found(answer: Answer) -> String {
    match answer {
        Answer::Object(record) => record.etag,
        other => panic!("{other:?}"),
    }
}

/// A shard of three members that has taken one object and fallen asleep; its leader.
async fn sleeping(random: &mut Random) -> (Cluster, DiskId) {
    let cluster = Cluster::new();
    cluster.start_all(&IDS).await;
    cluster.init(SHARD, &IDS).await;
    cluster.put(random, SHARD, "k", b"before").await;
    let leader = cluster.leader(SHARD).await;
    cluster.asleep(&IDS, 1).await;
    (cluster, leader)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_shard_sends_no_heartbeats_reads_without_waking_and_writes_at_once() {
    let mut random = Random(31);
    let (cluster, leader) = sleeping(&mut random).await;
    let host = cluster.host(leader.0);
    let before = host.counters();
    let term = host.status()[0].term;
    // Longer than any election timeout: with no heartbeat, only sleep keeps the followers from an election.
    tokio::time::sleep(Duration::from_millis(2 * cluster.timing.election_max_ms)).await;
    assert_eq!(host.counters().heartbeats, before.heartbeats, "a sleeping shard sent heartbeats");
    assert_eq!(found(host.query(SHARD, get("k")).await.unwrap()), etag(b"before"));
    cluster.asleep(&IDS, 1).await;
    assert_eq!(host.status()[0].term, term, "an election in a sleeping shard");
    let begun = Instant::now();
    host.command(SHARD, request(&mut random, 1, put(1, "k", b"after"))).await.unwrap();
    println!("the first write after sleep took {:?}", begun.elapsed());
    assert_eq!(found(host.query(SHARD, get("k")).await.unwrap()), etag(b"after"));
    assert_eq!(host.status()[0].term, term, "the write needed an election");
    assert_eq!(host.counters().replicas_asleep, 0);
    // And it falls asleep again.
    cluster.asleep(&IDS, 1).await;
    cluster.same_state(SHARD, &IDS).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_shard_does_not_sleep() {
    let cluster = Cluster::new();
    cluster.start_all(&IDS).await;
    cluster.init(ShardId::ROOT, &IDS).await;
    cluster.init(SHARD, &IDS).await;
    cluster.leader(ShardId::ROOT).await;
    cluster.leader(SHARD).await;
    cluster.asleep(&IDS, 1).await;
    tokio::time::sleep(Duration::from_millis(2 * cluster.timing.sleep_after_ms)).await;
    cluster.asleep(&IDS, 1).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sleeping_leader_that_dies_is_replaced() {
    let mut random = Random(32);
    let (cluster, leader) = sleeping(&mut random).await;
    cluster.stop(leader.0).await;
    let next = cluster.leader(SHARD).await;
    assert_ne!(next, leader);
    assert_eq!(found(cluster.query(SHARD, &get("k")).await), etag(b"before"));
    cluster.put(&mut random, SHARD, "k", b"after").await;
    cluster.start(leader.0).await;
    cluster.same_state(SHARD, &IDS).await;
    cluster.asleep(&IDS, 1).await;
    assert_eq!(found(cluster.query(SHARD, &get("k")).await), etag(b"after"));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sleeping_leader_that_is_cut_off_is_replaced_and_answers_no_read() {
    let mut random = Random(33);
    let (cluster, leader) = sleeping(&mut random).await;
    let host = cluster.host(leader.0);
    cluster.network.isolate(leader, &[disk(1), disk(2), disk(3)]);
    cluster.put(&mut random, SHARD, "k", b"after").await;
    let read = host.query(SHARD, get("k")).await;
    assert!(read.is_err(), "a leader that was cut off asleep answered a read: {read:?}");
    let lost = request(&mut random, 1, put(1, "lost", b"x"));
    assert!(host.command(SHARD, lost).await.is_err(), "it acknowledged a command");
    cluster.network.heal();
    assert_eq!(found(cluster.query(SHARD, &get("k")).await), etag(b"after"));
    cluster.same_state(SHARD, &IDS).await;
    cluster.asleep(&IDS, 1).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_paused_asleep_and_comes_back_after_another_was_elected_answers_no_read() {
    let mut random = Random(34);
    let cluster = Cluster::new();
    // Each host in a runtime with one thread, so that one of them can be stopped as a process can.
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let runtimes: Vec<tokio::runtime::Runtime> = IDS.iter().map(|_| runtime()).collect();
    for (id, runtime) in IDS.iter().zip(&runtimes) {
        cluster.start_on(*id, runtime.handle()).await;
    }
    cluster.init(SHARD, &IDS).await;
    cluster.put(&mut random, SHARD, "k", b"before").await;
    let leader = cluster.leader(SHARD).await;
    cluster.asleep(&IDS, 1).await;
    let host = cluster.host(leader.0);

    let (resume, resumed) = std::sync::mpsc::channel::<()>();
    let (paused, is_paused) = tokio::sync::oneshot::channel();
    runtimes[leader.0 as usize - 1].spawn(async move {
        paused.send(()).unwrap();
        let _ = resumed.recv();
    });
    is_paused.await.unwrap();
    // Cut as well, so that nothing waits in its queues when it goes on: it must find out by itself.
    cluster.network.isolate(leader, &[disk(1), disk(2), disk(3)]);
    let [a, b] = IDS.iter().copied().filter(|id| disk(*id) != leader).collect::<Vec<_>>()[..] else { panic!() };
    let sent = request(&mut random, 1, put(1, "k", b"after"));
    let until = Instant::now() + Duration::from_secs(20);
    while !matches!(
        (cluster.host(a).command(SHARD, sent.clone()).await, cluster.host(b).command(SHARD, sent.clone()).await),
        (Ok(_), _) | (_, Ok(_))
    ) {
        assert!(Instant::now() < until, "no new leader: {:?}", cluster.statuses());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(host.counters().replicas_asleep, 1, "it was not paused");
    assert_eq!(host.status()[0].state, "leader", "it was not paused");

    let read = tokio::spawn({
        let host = host.clone();
        async move { host.query(SHARD, get("k")).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.network.heal();
    resume.send(()).unwrap();
    let read = read.await.unwrap();
    assert!(
        matches!(read, Err(ControlError::NotLeader { .. } | ControlError::Unavailable(_))),
        "a leader that was paused asleep answered a read: {read:?}"
    );
    cluster.same_state(SHARD, &IDS).await;
    assert_eq!(found(cluster.query(SHARD, &get("k")).await), etag(b"after"));
    cluster.stop_all().await;
    for runtime in runtimes {
        runtime.shutdown_background();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_between_sleeps_cuts_and_crashes_are_all_kept() {
    let seed = scenery::seed("commands_between_sleeps_cuts_and_crashes_are_all_kept");
    let mut random = Random(seed);
    let (cluster, _) = sleeping(&mut random).await;
    let all = [disk(1), disk(2), disk(3)];
    for round in 0..6 {
        let victim = *random.pick(&all);
        let other = *random.pick(&all);
        let crash = random.chance(3);
        match random.below(3) {
            _ if crash => cluster.stop(victim.0).await,
            0 => cluster.network.isolate(victim, &all),
            1 if victim != other => cluster.network.cut(victim, other),
            _ => cluster.network.cut_one_way(victim, other),
        }
        cluster.put(&mut random, SHARD, &format!("key-{round}"), &[round as u8]).await;
        cluster.network.heal();
        if crash {
            cluster.start(victim.0).await;
        }
        if random.chance(2) {
            cluster.asleep(&IDS, 1).await;
        }
    }
    cluster.asleep(&IDS, 1).await;
    for round in 0..6 {
        assert_eq!(found(cluster.query(SHARD, &get(&format!("key-{round}"))).await), etag(&[round as u8]));
    }
    cluster.same_state(SHARD, &IDS).await;
    assert!(cluster.fatal.lock().unwrap().is_empty());
    cluster.stop_all().await;
}
