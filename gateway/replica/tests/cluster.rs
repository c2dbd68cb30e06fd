//! Shards on several disks: leaders die, networks are cut, disks are replaced; acknowledged commands stay and replicas
//! stay equal.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::{AccountId, BucketId};
use granary_meta::{Answer, Command, Query, Reply, VersionPick};
use granary_placement::id::{DiskId, Epoch, ShardId};
use granary_placement::map::DiskState;
use granary_replica::message::{encode_message, PeerMessage, PeerRequest, ReplicaId};
use granary_wire::control::ControlError;
use scenery::cluster::{disk, map, noop, Cluster};
use scenery::{put, request, Random};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SHARD: ShardId = ShardId(1);

fn get(key: &str) -> Query {
    Query::GetObject { bucket: BucketId(1), key: key.to_owned(), version: VersionPick::Current }
}

fn etag(answer: Answer) -> String {
    match answer {
        Answer::Object(record) => record.etag,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_member_serves_and_reopens() {
    let cluster = Cluster::new();
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    cluster.init(SHARD, &[1]).await;
    let mut random = Random(1);
    for i in 0..100 {
        cluster.put(&mut random, SHARD, &format!("key-{i}"), b"body").await;
    }
    let before = cluster.same_state(SHARD, &[1]).await;
    cluster.stop_all().await;
    cluster.start(1).await;
    assert_eq!(cluster.leader(SHARD).await, disk(1));
    etag(cluster.query(SHARD, &get("key-99")).await);
    // A new leadership applies one blank entry, so only the applied index differs; the objects are the same.
    let Answer::Usage(usage) = cluster.query(SHARD, &Query::BucketUsage { bucket: BucketId(1) }).await else {
        panic!()
    };
    assert_eq!((usage.objects, usage.bytes), (100, 400));
    assert_ne!(before, 0);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_survive_the_loss_of_each_leader_in_turn() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(2);
    for round in 0..3 {
        let leader = cluster.leader(SHARD).await;
        for i in 0..20 {
            cluster.put(&mut random, SHARD, &format!("round-{round}-{i}"), b"x").await;
        }
        cluster.stop(leader.0).await;
        cluster.put(&mut random, SHARD, &format!("round-{round}-after"), b"y").await;
        cluster.start(leader.0).await;
    }
    for round in 0..3 {
        etag(cluster.query(SHARD, &get(&format!("round-{round}-19"))).await);
        etag(cluster.query(SHARD, &get(&format!("round-{round}-after"))).await);
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    assert!(cluster.fatal.lock().unwrap().is_empty());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_five_may_die_and_a_minority_refuses() {
    let cluster = Cluster::new();
    let ids = [1, 2, 3, 4, 5];
    cluster.start_all(&ids).await;
    cluster.init(SHARD, &ids).await;
    let mut random = Random(3);
    cluster.put(&mut random, SHARD, "a", b"1").await;
    let leader = cluster.leader(SHARD).await;
    let other = ids.iter().copied().find(|id| *id != leader.0).unwrap();
    cluster.stop(leader.0).await;
    cluster.stop(other).await;
    cluster.put(&mut random, SHARD, "b", b"2").await;
    etag(cluster.query(SHARD, &get("a")).await);

    let third = cluster.leader(SHARD).await;
    cluster.stop(third.0).await;
    let left: Vec<u32> = ids.iter().copied().filter(|id| ![leader.0, other, third.0].contains(id)).collect();
    let sent = request(&mut random, 1, put(1, "c", b"3"));
    for id in &left {
        let host = cluster.host(*id);
        assert!(host.command(SHARD, sent.clone()).await.is_err(), "a minority took a command");
        assert!(host.query(SHARD, get("a")).await.is_err(), "a minority answered a read");
    }
    cluster.start(third.0).await;
    assert!(matches!(cluster.command(SHARD, &sent).await, Reply::Put { .. }));
    cluster.start(leader.0).await;
    cluster.start(other).await;
    cluster.same_state(SHARD, &ids).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_off_leader_gives_no_stale_reads_and_its_commands_are_not_acknowledged() {
    let cluster = Cluster::new();
    let all = [disk(1), disk(2), disk(3)];
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(4);
    cluster.put(&mut random, SHARD, "k", b"old").await;
    let old = cluster.leader(SHARD).await;
    cluster.network.isolate(old, &all);
    let lost = request(&mut random, 1, put(1, "lost", b"x"));
    let cut_off = cluster.host(old.0);
    let refused = tokio::spawn({
        let (host, lost) = (cut_off.clone(), lost.clone());
        async move { host.command(SHARD, lost).await }
    });
    cluster.put(&mut random, SHARD, "k", b"new").await;
    let read = cut_off.query(SHARD, get("k")).await;
    assert!(read.is_err(), "a leader without a majority answered a read: {read:?}");
    assert!(matches!(refused.await.unwrap(), Err(ControlError::Unavailable(_) | ControlError::NotLeader { .. })));
    cluster.network.heal();
    // Retried under its id, it applies once, whatever became of the first try.
    let first = cluster.command(SHARD, &lost).await;
    assert_eq!(cluster.command(SHARD, &lost).await, first);
    let expected = format!("{:08x}", crc32fast::hash(b"new"));
    assert_eq!(etag(cluster.query(SHARD, &get("k")).await), expected);
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retried_creates_apply_once_under_leader_changes() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(ShardId::ROOT, &[1, 2, 3]).await;
    let mut random = Random(5);
    let mut ids = BTreeSet::new();
    for i in 0..30 {
        let create = Command::CreateBucket { name: format!("bucket-{i}"), owner: AccountId::ROOT };
        let sent = request(&mut random, 1, create);
        if i % 10 == 5 {
            let leader = cluster.leader(ShardId::ROOT).await;
            cluster.stop(leader.0).await;
            cluster.start(leader.0).await;
        }
        let first = cluster.command(ShardId::ROOT, &sent).await;
        assert_eq!(cluster.command(ShardId::ROOT, &sent).await, first);
        let Reply::Bucket(bucket) = first else { panic!("{first:?}") };
        assert!(ids.insert(bucket.id.0), "a bucket id was given twice");
    }
    assert_eq!(ids.last(), Some(&30), "a create was applied twice");
    cluster.same_state(ShardId::ROOT, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flapping_and_one_way_cuts_heal_by_themselves() {
    let cluster = Cluster::new();
    let all = [disk(1), disk(2), disk(3)];
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let seed = scenery::seed("flapping_and_one_way_cuts_heal_by_themselves");
    let mut random = Random(seed);
    // Until the first election only the first member knows of the shard; cut off before, it can form nothing. That is
    // the next test.
    cluster.leader(SHARD).await;
    for round in 0..8 {
        let victim = *random.pick(&all);
        let other = *random.pick(&all);
        if random.chance(2) {
            cluster.network.isolate(victim, &all);
        } else if victim != other {
            cluster.network.cut_one_way(victim, other);
        }
        for i in 0..3 {
            cluster.put(&mut random, SHARD, &format!("flap-{round}-{i}"), b"x").await;
        }
        cluster.network.heal();
    }
    for round in 0..8 {
        etag(cluster.query(SHARD, &get(&format!("flap-{round}-2"))).await);
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_whose_first_member_is_cut_off_at_birth_forms_when_the_network_heals() {
    let cluster = Cluster::new();
    let all = [disk(1), disk(2), disk(3)];
    cluster.start_all(&[1, 2, 3]).await;
    cluster.network.isolate(disk(1), &all);
    cluster.name(SHARD, &[1, 2, 3]);
    let refused = cluster.try_init(SHARD, &[1, 2, 3]).await;
    assert!(matches!(refused, Err(ControlError::Unavailable(_))), "{refused:?}");
    let mut random = Random(24);
    let sent = request(&mut random, 1, put(1, "early", b"x"));
    assert!(cluster.host(1).command(SHARD, sent.clone()).await.is_err(), "one of three took a command");
    cluster.network.heal();
    cluster.init(SHARD, &[1, 2, 3]).await;
    assert!(matches!(cluster.command(SHARD, &sent).await, Reply::Put { .. }));
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_disk_catches_up_by_snapshot_and_the_old_one_is_let_go() {
    let cluster = Cluster::new();
    cluster.map.send_replace(Some(Arc::new(map(1, vec![vec![1, 2, 3], vec![1, 2, 3]]))));
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(6);
    for i in 0..150 {
        cluster.put(&mut random, SHARD, &format!("key-{i}"), &[i as u8; 2_000]).await;
    }
    cluster.stop(3).await;
    for i in 0..150 {
        cluster.put(&mut random, SHARD, &format!("more-{i}"), &[i as u8; 100]).await;
    }
    cluster.start(4).await;
    cluster.map.send_replace(Some(Arc::new(map(2, vec![vec![1, 2, 4], vec![1, 2, 4]]))));
    let until = Instant::now() + Duration::from_secs(30);
    let wanted = vec![disk(1), disk(2), disk(4)];
    loop {
        let leader = cluster.leader(SHARD).await;
        let status = cluster.host(leader.0).status().into_iter().find(|status| status.shard == SHARD).unwrap();
        if status.voters == wanted {
            break;
        }
        assert!(Instant::now() < until, "{:?}", cluster.statuses());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(cluster.host(4).counters().snapshots_installed > 0, "the log still had everything; the test shows nothing");
    cluster.same_state(SHARD, &[1, 2, 4]).await;

    // The old disk comes back: it is no member, disturbs nobody and is stopped.
    cluster.start(3).await;
    let until = Instant::now() + Duration::from_secs(30);
    while !cluster.host(3).status().is_empty() {
        assert!(Instant::now() < until, "{:?}", cluster.host(3).status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Two of the three new members carry on.
    cluster.stop(1).await;
    cluster.put(&mut random, SHARD, "last", b"x").await;
    cluster.same_state(SHARD, &[2, 4]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lagging_replica_is_brought_back_by_snapshot() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(7);
    let leader = cluster.leader(SHARD).await;
    let lagging = [1, 2, 3].into_iter().find(|id| *id != leader.0).unwrap();
    cluster.put(&mut random, SHARD, "before", b"x").await;
    cluster.stop(lagging).await;
    // The log must not grow for as long as a disk is dead: a leader that may not purge hands over, and purges as a
    // follower. Were it kept, the replica would catch up from it and install nothing.
    for i in 0..800 {
        cluster.put(&mut random, SHARD, &format!("key-{i}"), b"body").await;
        if i % 20 == 0 {
            cluster.leader(SHARD).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    cluster.start(lagging).await;
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    assert!(cluster.host(lagging).counters().snapshots_installed > 0);
    // And it can lead: what it installed is whole.
    for id in [1, 2, 3].into_iter().filter(|id| *id != lagging) {
        cluster.stop(id).await;
        cluster.put(&mut random, SHARD, "after", b"y").await;
        cluster.start(id).await;
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_proposals_of_many_shards_share_syncs_and_reads_share_barriers() {
    let cluster = Cluster::new();
    cluster.start(1).await;
    let host = cluster.host(1);
    for shard in 1..=8 {
        cluster.init(ShardId(shard), &[1]).await;
    }
    for shard in 1..=8 {
        cluster.leader(ShardId(shard)).await;
    }
    let before = host.counters();
    let mut tasks = Vec::new();
    for task in 0..256u64 {
        let host = host.clone();
        tasks.push(tokio::spawn(async move {
            let mut random = Random(task);
            let shard = ShardId(1 + (task % 8) as u16);
            for i in 0..8 {
                let sent = request(&mut random, 1, put(1, &format!("{task}-{i}"), b"x"));
                assert!(matches!(host.command(shard, sent).await.unwrap(), Reply::Put { .. }));
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    // All of them are asked before the first is answered, however busy the machine is.
    let queries =
        (0..256u64).flat_map(|task| (0..8).map(move |i| (ShardId(1 + (task % 8) as u16), format!("{task}-{i}"))));
    let queries: Vec<_> = queries.collect();
    let answers = futures::future::join_all(queries.iter().map(|(shard, key)| host.query(*shard, get(key)))).await;
    assert!(answers.into_iter().all(|answer| matches!(answer.unwrap(), Answer::Object(_))));
    let after = host.counters();
    let commands = after.commands - before.commands;
    let syncs = after.log_syncs - before.log_syncs;
    let entries = after.proposals - before.proposals;
    let barriers = after.read_barriers - before.read_barriers;
    println!(
        "{commands} commands, {entries} entries, {syncs} syncs, {} queries, {barriers} barriers",
        after.queries - before.queries
    );
    assert_eq!(commands, 2_048);
    assert!(syncs * 4 < commands, "{syncs} syncs for {commands} commands");
    assert!(entries * 2 < commands, "{entries} entries for {commands} commands");
    assert!(barriers * 2 < commands, "{barriers} barriers for {commands} queries");
    cluster.stop_all().await;
}

/// Below the level no replica is handed it, for an older build could not even read the entry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_in_which_a_disk_is_away_does_not_enter_the_log_below_its_feature_level() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(ShardId::ROOT, &[1, 2, 3]).await;
    let mut random = Random(9);
    let set = |epoch, state| {
        let mut map = map(epoch, vec![vec![1, 2, 3], vec![4]]);
        map.disks.values_mut().filter(|disk| disk.id.0 > 3).for_each(|disk| disk.state = state);
        Command::SetMap { map: Box::new(map) }
    };
    let first = request(&mut random, 1, set(1, DiskState::In));
    assert_eq!(cluster.command(ShardId::ROOT, &first).await, Reply::Done);
    let leader = cluster.host(cluster.leader(ShardId::ROOT).await.0);
    let proposals = leader.counters().proposals;
    let away = request(&mut random, 2, set(2, DiskState::Away));
    let refused = leader.command(ShardId::ROOT, away.clone()).await;
    assert!(matches!(&refused, Err(ControlError::BadRequest(why)) if why.contains("--raise")), "{refused:?}");
    assert_eq!((leader.counters().proposals, leader.level(ShardId::ROOT)), (proposals, Ok(1)));
    let raise = request(&mut random, 3, Command::SetFeatureLevel { level: 2 });
    assert_eq!(cluster.command(ShardId::ROOT, &raise).await, Reply::Done);
    assert_eq!(cluster.command(ShardId::ROOT, &away).await, Reply::Done);
    cluster.same_state(ShardId::ROOT, &[1, 2, 3]).await;
    assert!((1..=3).all(|id| cluster.host(id).level(ShardId::ROOT) == Ok(2)));
    assert_eq!(cluster.host(1).level(ShardId(1)), Ok(1), "it is not there");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_shard_publishes_its_map_also_after_a_restart() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(ShardId::ROOT, &[1, 2, 3]).await;
    let mut random = Random(8);
    let set = |epoch| Command::SetMap { map: Box::new(map(epoch, vec![vec![1, 2, 3]])) };
    let first = request(&mut random, 1, set(7));
    assert_eq!(cluster.command(ShardId::ROOT, &first).await, Reply::Done);
    let skip = request(&mut random, 2, set(9));
    assert!(matches!(cluster.command(ShardId::ROOT, &skip).await, Reply::EpochConflict { .. }));
    let next = request(&mut random, 3, set(8));
    assert_eq!(cluster.command(ShardId::ROOT, &next).await, Reply::Done);
    cluster.same_state(ShardId::ROOT, &[1, 2, 3]).await;
    for id in 1..=3 {
        let mut seen = cluster.host(id).root_map();
        let known = seen.wait_for(|map| map.as_ref().is_some_and(|map| map.epoch.0 == 8));
        tokio::time::timeout(Duration::from_secs(5), known).await.unwrap().unwrap();
    }
    cluster.stop_all().await;
    cluster.start_all(&[1, 2, 3]).await;
    assert!(
        matches!(cluster.query(ShardId::ROOT, &Query::GetMap { newer_than: Epoch(0) }).await, Answer::Map(map) if map.epoch.0 == 8)
    );
    cluster.stop_all().await;
}

/// No gateway finds them there, and while one of them leads nobody else does. Two of three: they must not pass the
/// shard to and fro between each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_at_whose_addresses_other_disks_answer_give_way() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(9);
    cluster.put(&mut random, SHARD, "before", b"body").await;
    for found in [3, 1, 2].map(disk) {
        for id in [1, 2, 3].map(disk) {
            cluster.network.displace(id, id != found);
        }
        let until = Instant::now() + Duration::from_secs(30);
        while cluster.leader(SHARD).await != found {
            assert!(Instant::now() < until, "disk {found} does not lead: {:?}", cluster.statuses());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The others vote and keep entries as before.
        cluster.put(&mut random, SHARD, &format!("while only {found} is found"), b"body").await;
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_shard_is_refused_when_the_map_does_not_name_this_disk() {
    let cluster = Cluster::new();
    cluster.map.send_replace(Some(Arc::new(map(1, vec![vec![2], vec![2]]))));
    let host = cluster.start(1).await;
    let from = ReplicaId { disk: disk(2), incarnation: 1 };
    let message = PeerMessage { from, to: None, request: PeerRequest::Identify };
    let message = encode_message(&message).unwrap();
    assert!(matches!(host.raft(SHARD, DiskId(2), message).await, Err(ControlError::NoSuchShard(_))));
    assert!(matches!(
        host.raft(SHARD, DiskId(2), bytes::Bytes::from_static(b"junk")).await,
        Err(ControlError::BadRequest(_))
    ));
    assert!(matches!(host.command(SHARD, noop(&mut Random(1))).await, Err(ControlError::NoSuchShard(_))));
    assert!(host.status().is_empty());
    cluster.stop_all().await;
}
