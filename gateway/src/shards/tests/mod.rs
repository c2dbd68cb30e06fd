//! The way to the shards, over real shards in memory.
//!
//! - here: one request to one shard; [`listings`], [`buckets`], [`maps`].
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod buckets;
mod listings;
mod maps;

use super::buckets::Created;
use super::memory::{Fault, MemoryPeers};
use super::{ShardError, Shards, Timing};
use crate::metrics::Metrics;
use bytes::Bytes;
use granary_meta::record::{AccountId, BucketId, ObjectData, ObjectMeta, ObjectRecord, VersionSeq};
use granary_meta::{Command, Conditions, Query, Reply};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::{ClusterMap, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_wire::control::ControlError;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const OBJECT_SHARDS: usize = 5;

/// The default times, twenty times as fast.
pub(crate) const HURRY: Timing = Timing {
    deadline: Duration::from_millis(1000),
    attempt: Duration::from_millis(200),
    silence: Duration::from_millis(100),
    first_pause: Duration::from_millis(1),
    longest_pause: Duration::from_millis(50),
    settle: Duration::from_millis(150),
    recent: Duration::from_millis(50),
};

/// A valid map: 3+2, every disk with both roles, every shard on five of them.
pub(crate) fn map(disks: u32, shards: usize, epoch: u64) -> ClusterMap {
    let disk = |id: u32| NewDisk {
        uuid: DiskUuid([u8::try_from(id).unwrap(); 16]),
        address: format!("127.0.0.1:{}", 4000 + id),
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 1,
        roles: Roles { storage: true, metadata: true },
    };
    let map = new_map(NewCluster {
        cluster_id: ClusterId([7; 16]),
        disks: (1..=disks).map(disk).collect(),
        scheme_name: "3+2".into(),
        scheme: Scheme::new(3, 2, FailureDomain::Disk).unwrap(),
        object_shards: u16::try_from(shards - 1).unwrap(),
        replicas: Some(5),
        groups_per_disk: 2,
    });
    ClusterMap { epoch: Epoch(epoch), ..map.unwrap() }
}

fn cluster() -> (Arc<MemoryPeers>, Shards) {
    let peers = MemoryPeers::new(&map(5, OBJECT_SHARDS + 1, 1));
    let shards = another_gateway(&peers);
    (peers, shards)
}

/// Knows the cluster, and nothing of other gateways.
fn another_gateway(peers: &Arc<MemoryPeers>) -> Shards {
    gateway(peers, HURRY)
}

fn gateway(peers: &Arc<MemoryPeers>, timing: Timing) -> Shards {
    let known = watch::Sender::new(Some(Arc::new(map(5, OBJECT_SHARDS + 1, 1))));
    Shards::with_timing(peers.clone(), known, Metrics::new().unwrap(), timing)
}

fn put_command(bucket: BucketId, key: &str) -> Command {
    let bytes = Bytes::from_static(b"1");
    let record = ObjectRecord {
        version: VersionSeq(0),
        null_version: true,
        delete_marker: false,
        modified_ms: 1,
        size_bytes: 1,
        etag: String::new(),
        part_sizes: Vec::new(),
        checksum: None,
        part_checksums: Vec::new(),
        meta: ObjectMeta::default(),
        owner: AccountId::ROOT,
        data: ObjectData::Inline { crc32: crc32fast::hash(&bytes), bytes },
    };
    let (key, missing, conditions) = (key.to_owned(), Vec::new(), Conditions::default());
    Command::PutObject { bucket, key, record, missing, map_epoch: Epoch(1), conditions, rule_epoch: 0 }
}

async fn put(shards: &Shards, bucket: BucketId, key: &str) -> Result<Reply, ShardError> {
    shards.command_for(AccountId::ROOT, bucket, key, put_command(bucket, key)).await
}

#[tokio::test]
async fn a_request_follows_the_leader_and_remembers_it() {
    let (peers, shards) = cluster();
    peers.state().leaders.insert(ShardId(2), DiskId(4));
    assert_eq!(shards.command(ShardId(2), Command::Noop).await.unwrap(), Reply::Done);
    let asked = peers.state().asked.len();
    assert!(asked <= 2, "a hint leads straight to the leader: {asked} requests");
    shards.command(ShardId(2), Command::Noop).await.unwrap();
    assert_eq!(peers.state().asked.len(), asked + 1);
    assert_eq!(shards.leader(ShardId(2)), Some(DiskId(4)));
}

#[tokio::test]
async fn a_command_whose_answer_is_lost_is_applied_once() {
    let (peers, shards) = cluster();
    // Learns who leads.
    shards.query(ShardId::ROOT, Query::ListLeases).await.unwrap();
    let faults = [
        Fault::LoseAnswer,
        Fault::LoseRequest,
        Fault::Answer(ControlError::Unavailable("election".into())),
        Fault::LoseAnswer,
    ];
    peers.state().faults.extend(faults);
    let created = shards.create_bucket("b", AccountId::ROOT).await.unwrap();
    assert!(matches!(created, Created::New(_)), "{created:?}");
    let state = peers.state();
    let ids: BTreeSet<[u8; 16]> = state.commands.iter().map(|(_, request)| request.request_id).collect();
    assert_eq!((state.commands.len(), ids.len()), (3, 1), "served three times, under one id: {:?}", state.commands);
}

#[tokio::test]
async fn a_hung_leader_that_the_others_still_name_costs_one_attempt_not_the_deadline() {
    let (peers, shards) = cluster();
    peers.state().leaders.insert(ShardId(1), DiskId(1));
    shards.command(ShardId(1), Command::Noop).await.unwrap();
    peers.state().hung.insert(DiskId(1));
    let begun = tokio::time::Instant::now();
    let moving = peers.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(225)).await;
        moving.state().leaders.insert(ShardId(1), DiskId(3));
    });
    shards.command(ShardId(1), Command::Noop).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn without_an_answer_the_deadline_ends_it_and_the_outcome_is_unknown() {
    let (peers, shards) = cluster();
    peers.state().leaders.remove(&ShardId(1));
    let begun = tokio::time::Instant::now();
    let error = shards.command(ShardId(1), Command::Noop).await.unwrap_err();
    assert!(error.outcome_unknown(), "{error}");
    assert!(
        (Duration::from_millis(750)..=Duration::from_millis(2000)).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    let asked = peers.state().asked.len();
    assert!(asked < 300, "backs off: {asked} requests");
}

#[tokio::test]
async fn a_senseless_request_is_refused_at_once() {
    let (peers, shards) = cluster();
    peers.state().faults.push_back(Fault::Answer(ControlError::BadRequest("no".into())));
    let error = shards.query(ShardId(1), Query::GetMap { newer_than: Epoch(0) }).await.unwrap_err();
    assert_eq!(error, ShardError::Refused { shard: ShardId(1), why: "no".into() });
    assert!(matches!(shards.command(ShardId(99), Command::Noop).await, Err(ShardError::NoMap(ShardId(99)))));
}

#[tokio::test]
async fn a_command_that_may_have_been_applied_is_not_called_refused_by_a_later_answer() {
    let (peers, shards) = cluster();
    // Learns who leads.
    shards.command(ShardId(1), Command::Noop).await.unwrap();
    let refusal = Fault::Answer(ControlError::BadRequest("not known to this build".into()));
    peers.state().faults.extend([Fault::LoseAnswer, refusal]);
    let error = shards.command(ShardId(1), Command::Noop).await.unwrap_err();
    assert_eq!(peers.state().commands.len(), 2);
    assert!(error.outcome_unknown(), "{error}");
}

#[tokio::test]
async fn a_clock_that_is_off_is_a_certain_refusal_unless_an_attempt_is_in_doubt() {
    let (peers, shards) = cluster();
    let off = || Fault::Answer(ControlError::ClockOff { ahead_ms: 3_600_000 });
    peers.state().faults.push_back(off());
    let error = shards.command(ShardId(1), Command::Noop).await.unwrap_err();
    assert_eq!(error, ShardError::ClockOff { shard: ShardId(1), ahead_ms: 3_600_000 });
    assert!(!error.outcome_unknown() && peers.state().commands.is_empty());
    // Tried again, as everything after an attempt that may have been taken.
    peers.state().faults.extend([Fault::LoseRequest, off()]);
    assert_eq!(shards.command(ShardId(1), Command::Noop).await.unwrap(), Reply::Done);
}

#[tokio::test]
async fn every_attempt_has_a_stamp_of_its_own_and_the_time_of_the_first() {
    let (peers, shards) = cluster();
    shards.query(ShardId::ROOT, Query::ListLeases).await.unwrap();
    peers.state().faults.extend([Fault::LoseAnswer]);
    shards.create_bucket("b", AccountId::ROOT).await.unwrap();
    let state = peers.state();
    let [(_, first), (_, second)] = &state.commands[..] else { panic!("{:?}", state.commands) };
    assert_eq!((first.request_id, first.now_ms), (second.request_id, second.now_ms));
    assert!(first.stamp_ms < second.stamp_ms, "{:?} {:?}", first.stamp_ms, second.stamp_ms);
}

#[tokio::test]
async fn a_refusal_after_an_attempt_in_doubt_leaves_the_outcome_unknown() {
    let (peers, shards) = cluster();
    let bucket = BucketId(7);
    let put = put_command(bucket, "k");
    let shard = shards.shard_of(bucket, "k").unwrap();
    // What the shard says of a bucket that is fenced is certain by itself.
    assert_eq!(peers.command(shard, Command::FenceBucket { bucket, attempt: 1 }), Reply::Fenced { empty: true });
    let refused = shards.command(shard, put.clone()).await;
    assert!(refused.as_ref().is_ok_and(|reply| !reply.is_success()), "{refused:?}");
    // So it is when an attempt before found no connection: that one was not sent.
    peers.state().faults.push_back(Fault::NoConnection);
    let refused = shards.command(shard, put.clone()).await;
    assert!(refused.as_ref().is_ok_and(|reply| !reply.is_success()), "{refused:?}");
    // After an attempt that may have been applied it says nothing of that attempt.
    peers.state().faults.push_back(Fault::LoseRequest);
    let refused = shards.command(shard, put).await.unwrap_err();
    assert!(refused.outcome_unknown(), "{refused:?}");
}
