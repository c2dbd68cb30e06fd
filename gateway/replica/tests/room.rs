//! Disks that fill up, and logs that would fill them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::BucketId;
use granary_meta::{Command, Conditions, Reply, VersionPick};
use granary_placement::id::ShardId;
use granary_wire::control::ControlError;
use scenery::cluster::{disk, Cluster, RESERVE_BYTES};
use scenery::{put, request, Random};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const SHARD: ShardId = ShardId(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// Puts until the answer is as wanted.
async fn puts_until(
    cluster: &Cluster,
    random: &mut Random,
    shard: ShardId,
    wanted: impl Fn(&Result<Reply, ControlError>) -> bool,
) {
    let until = Instant::now() + PATIENCE;
    loop {
        let leader = cluster.leader(shard).await;
        let sent = request(random, 1, put(1, "grows", b"x"));
        let answer = cluster.host(leader.0).command(shard, sent).await;
        if wanted(&answer) {
            return;
        }
        assert!(Instant::now() < until, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_whose_disk_is_full_takes_deletes_only_until_it_has_room() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(41);
    cluster.put(&mut random, SHARD, "k", b"x").await;
    let leader = cluster.leader(SHARD).await;
    let follower = [1, 2, 3].into_iter().map(disk).find(|id| *id != leader).unwrap();
    for full in [leader, follower] {
        cluster.free(full).store(RESERVE_BYTES - 1, Ordering::Relaxed);
        puts_until(&cluster, &mut random, SHARD, |answer| *answer == Err(ControlError::NoRoom { disk: full })).await;
        let delete = Command::DeleteObject {
            bucket: BucketId(1),
            key: "grows".to_owned(),
            version: VersionPick::Current,
            conditions: Conditions::default(),
            rule_epoch: 0,
        };
        let deleted = cluster.command(SHARD, &request(&mut random, 1, delete)).await;
        assert!(!matches!(deleted, Reply::Refused(_)), "{deleted:?}");
        let noop = cluster.command(SHARD, &request(&mut random, 1, Command::Noop)).await;
        assert_eq!(noop, Reply::Done);
        cluster.free(full).store(2 * RESERVE_BYTES, Ordering::Relaxed);
        puts_until(&cluster, &mut random, SHARD, Result::is_ok).await;
    }
    // A disk that has nothing to do with the shard does not concern it, though it is known to be full.
    cluster.start(4).await;
    cluster.init(ShardId(2), &[1, 2, 4]).await;
    cluster.put(&mut random, ShardId(2), "k", b"x").await;
    cluster.free(disk(4)).store(0, Ordering::Relaxed);
    puts_until(&cluster, &mut random, ShardId(2), |answer| *answer == Err(ControlError::NoRoom { disk: disk(4) }))
        .await;
    cluster.put(&mut random, SHARD, "k", b"y").await;
    cluster.stop_all().await;
}

/// Deletes are written too before they free anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_needs_what_is_left_takes_no_commands_and_leads_nobody_who_has_room() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(43);
    cluster.put(&mut random, SHARD, "k", b"x").await;
    let all = [1, 2, 3].map(disk);
    let exhausted = cluster.leader(SHARD).await;
    let delete = || Command::DeleteObject {
        bucket: BucketId(1),
        key: "k".to_owned(),
        version: VersionPick::Current,
        conditions: Conditions::default(),
        rule_epoch: 0,
    };
    cluster.free(exhausted).store(RESERVE_BYTES / 16 - 1, Ordering::Relaxed);
    // The others are a majority, and lead; it gets nothing that takes room until it has some.
    let until = Instant::now() + PATIENCE;
    while cluster.leader(SHARD).await == exhausted {
        assert!(Instant::now() < until, "it leads on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let kept = || cluster.host(exhausted.0).counters().log_kept_bytes;
    let before = kept();
    for _ in 0..40 {
        let deleted = cluster.command(SHARD, &request(&mut random, 1, delete())).await;
        assert!(!matches!(deleted, Reply::Refused(_)), "{deleted:?}");
    }
    assert!(kept() <= before + 1_000, "it took commands: {} bytes after {before}", kept());
    cluster.free(exhausted).store(2 * RESERVE_BYTES, Ordering::Relaxed);
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    // None has room: deletes are refused as well, and in words.
    for id in all {
        cluster.free(id).store(RESERVE_BYTES / 16 - 1, Ordering::Relaxed);
    }
    let until = Instant::now() + PATIENCE;
    loop {
        let leader = cluster.leader(SHARD).await;
        let answer = cluster.host(leader.0).command(SHARD, request(&mut random, 1, delete())).await;
        if answer == Err(ControlError::NoRoom { disk: leader }) {
            break;
        }
        assert!(Instant::now() < until, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for id in all {
        cluster.free(id).store(2 * RESERVE_BYTES, Ordering::Relaxed);
    }
    puts_until(&cluster, &mut random, SHARD, Result::is_ok).await;
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_raft_log_is_bounded_by_bytes_also_while_a_voter_is_dead() {
    let mut cluster = Cluster::new();
    // No number of entries would bound it.
    (cluster.timing.snapshot_entries, cluster.timing.keep_entries) = (1_000_000, 1_000_000);
    cluster.timing.log_bytes = 4 << 20;
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(42);
    let body = vec![7; 100_000];
    for round in 0..2 {
        for i in 0..250 {
            cluster.put(&mut random, SHARD, &format!("key-{}", i % 20), &body).await;
        }
        let alive: &[u32] = if round == 0 { &[1, 2, 3] } else { &[1, 2] };
        let until = Instant::now() + PATIENCE;
        loop {
            let kept: Vec<u64> = alive.iter().map(|id| cluster.host(*id).counters().log_kept_bytes).collect();
            if kept.iter().all(|kept| *kept <= 5 << 20) {
                break;
            }
            // A dead voter holds up the leader's purge until leaders have taken turns.
            assert!(
                Instant::now() < until,
                "25 MB were written, and the logs keep {kept:?} bytes: {:?}",
                cluster.statuses()
            );
            cluster.put(&mut random, SHARD, "on", b"x").await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        cluster.stop(3).await;
    }
    cluster.start(3).await;
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    assert!(cluster.host(3).counters().snapshots_installed > 0);
    cluster.stop_all().await;
}
