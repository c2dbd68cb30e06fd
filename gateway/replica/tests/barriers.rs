//! Reads ask as many followers as they need, and others when those do not answer.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::BucketId;
use granary_meta::{Answer, Query, VersionPick};
use granary_placement::id::{DiskId, ShardId};
use scenery::cluster::{disk, Cluster};
use scenery::Random;

const SHARD: ShardId = ShardId(1);
const IDS: [u32; 5] = [1, 2, 3, 4, 5];
const READS: usize = 40;

/// A shard of five with one object. Heartbeats of timers are far apart and wait for others longer than a read may
/// take, so that what goes at once went for a read.
async fn five(read_hedge_ms: u64) -> (Cluster, DiskId) {
    let mut cluster = Cluster::new();
    cluster.timing.heartbeat_ms = 15_000;
    cluster.timing.read_hedge_ms = read_hedge_ms;
    cluster.timing.election_min_ms = 20_000;
    cluster.timing.election_max_ms = 40_000;
    cluster.start_all(&IDS).await;
    cluster.init(SHARD, &IDS).await;
    cluster.put(&mut Random(7), SHARD, "k", b"body").await;
    let leader = cluster.leader(SHARD).await;
    (cluster, leader)
}

async fn read(cluster: &Cluster, leader: DiskId) {
    let get = Query::GetObject { bucket: BucketId(1), key: "k".to_owned(), version: VersionPick::Current };
    let answer = cluster.host(leader.0).query(SHARD, get).await.unwrap();
    assert!(matches!(answer, Answer::Object(_)), "{answer:?}");
}

/// The others, in the order in which that leader asks them.
fn in_turn(leader: DiskId) -> Vec<DiskId> {
    (0..4).map(|step| disk((leader.0 + step) % 5 + 1)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_asks_two_of_four_followers() {
    let (cluster, leader) = five(60_000).await;
    let others = in_turn(leader);
    let asked = |other: DiskId| cluster.network.questions(leader, other);
    let before: Vec<usize> = others.iter().map(|other| asked(*other)).collect();
    for _ in 0..READS {
        read(&cluster, leader).await;
    }
    let each: Vec<usize> = others.iter().zip(before).map(|(other, before)| asked(*other) - before).collect();
    println!("questions to each: {each:?}");
    assert!(each[..2].iter().all(|asked| *asked >= READS), "those asked first: {each:?}");
    // The two others are asked by timers, which may have run once meanwhile.
    assert!(each[2..].iter().all(|asked| *asked <= READS / 2), "the others: {each:?}");
    assert_eq!(cluster.host(leader.0).counters().late_barriers, 0);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_go_on_when_those_asked_first_are_gone() {
    let (cluster, leader) = five(10).await;
    let term = cluster.host(leader.0).status()[0].term;
    let others = in_turn(leader);
    read(&cluster, leader).await;
    // One does not answer, the other cannot be reached.
    cluster.network.cut_one_way(others[0], leader);
    cluster.network.cut(others[1], leader);
    for _ in 0..READS {
        read(&cluster, leader).await;
    }
    assert_eq!(cluster.host(leader.0).status()[0].term, term, "an election for want of two of five");
    assert!(cluster.host(leader.0).counters().late_barriers > 0);
    // A third one is too much: what was true before is not said again.
    cluster.network.cut(others[2], leader);
    let get = Query::GetObject { bucket: BucketId(1), key: "k".to_owned(), version: VersionPick::Current };
    cluster.host(leader.0).query(SHARD, get).await.unwrap_err();
    cluster.stop_all().await;
}
