//! The real binary as a keeper of metadata: whom its replicas listen to, what becomes of damaged, lost and older
//! metadata, and a vote whose sync fails. Chunks are served all the while.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scenery;

use bytes::Bytes;
use granary_placement::id::{DiskId, DiskUuid, Epoch, PlacementGroupId, ShardId};
use granary_placement::map::{
    deal_hash_slots, ClusterMap, Disk as MapDisk, DiskState, GroupSlot, Location, PlacementGroup, Roles, ShardReplicas,
};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_replica::message::{
    decode_message, encode_message, AppliedState, PeerMessage, PeerRequest, PeerResponse, ReplicaId, WireLogId,
    WireMembership, WireVote,
};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, ShardStatus};
use granary_wire::error::LinkError;
use granary_wire::{Ends, NodeClient};
use scenery::{ask, get, payload, put, Disk, Running, BINARY, CLUSTER};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Three disks, of which the second is `second`; the metadata lie on the first, which is not this node.
fn map(second: DiskUuid) -> ClusterMap {
    let disk = |id: u32| MapDisk {
        id: DiskId(id),
        uuid: if id == 4 { second } else { DiskUuid([id as u8; 16]) },
        address: format!("127.0.0.1:{id}"),
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 1,
        roles: Roles { storage: true, metadata: id == 3 },
        state: DiskState::In,
    };
    let slots = (3..6).map(|id| GroupSlot::new(DiskId(id))).collect();
    ClusterMap {
        cluster_id: CLUSTER,
        epoch: Epoch(1),
        next_disk_id: 7,
        disks: (3..6).map(|id| (DiskId(id), disk(id))).collect(),
        schemes: BTreeMap::from([("s".to_owned(), Scheme::new(2, 1, FailureDomain::Disk).unwrap())]),
        default_scheme: "s".to_owned(),
        groups: BTreeMap::from([(PlacementGroupId(1), PlacementGroup { scheme: "s".to_owned(), slots })]),
        shards: vec![ShardReplicas { members: vec![DiskId(3)] }; 2],
        slot_shards: deal_hash_slots(1),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_listen_to_the_disks_of_the_map_and_to_nobody_before_there_is_one() {
    let disk = Disk::new();
    let node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let caller = |from| node.client_as(Ends { to: Some(status.uuid), from, gateway: None });
    let third = caller(Some(DiskUuid([3; 16])));
    let messages = || {
        let (shard, from, message) = (ShardId::ROOT, DiskId(3), Bytes::from_static(b"\x01"));
        [
            ControlRequest::Raft { shard, from, message: message.clone() },
            ControlRequest::RaftBatch { from, messages: vec![(shard, message.clone())] },
            ControlRequest::LinkBeat { from, message },
        ]
    };
    for message in messages() {
        let answer = ask(&third, message).await;
        assert!(matches!(answer, ControlResponse::Error(ControlError::Unavailable(_))), "{answer:?}");
    }
    let init = ControlRequest::InitShard { shard: ShardId::ROOT, members: vec![DiskId(4)] };
    let answer = ask(&third, init).await;
    assert!(matches!(answer, ControlResponse::Error(ControlError::Unavailable(_))), "{answer:?}");
    assert!(!disk.dir().join("meta").exists(), "nothing was made for them");

    assert_eq!(ask(&third, ControlRequest::OfferMap(Box::new(map(status.uuid)))).await, ControlResponse::Done);
    for stranger in [None, Some(DiskUuid([5; 16])), Some(DiskUuid([9; 16]))] {
        for message in messages() {
            let answer = ask(&caller(stranger), message).await;
            assert!(matches!(answer, ControlResponse::Error(ControlError::BadRequest(_))), "{answer:?}");
        }
    }
    // The third disk is heard: this node holds no replica, and says so.
    let [message, ..] = messages();
    let answer = ask(&third, message).await;
    assert_eq!(answer, ControlResponse::Error(ControlError::NoSuchShard(ShardId::ROOT)));
}

/// This disk holds all metadata.
fn map_of_one(me: DiskUuid) -> ClusterMap {
    let mut map = map(me);
    for disk in map.disks.values_mut() {
        disk.roles.metadata = disk.id == DiskId(4);
    }
    map.shards = vec![ShardReplicas { members: vec![DiskId(4)] }; 2];
    map
}

/// What the node says to a client that speaks version 2 of the node protocol and no other: the verdict in its hello.
fn verdict_on_version_2(node: &Running, me: DiskUuid) -> u8 {
    let mut stream = std::net::TcpStream::connect(&node.address).unwrap();
    let hello = [b"granary\0\x00\x02\x02\x00", CLUSTER.0.as_slice(), &me.0, &[0; 32], &[9; 32]].concat();
    stream.write_all(&hello).unwrap();
    let mut prefix = [0; 12];
    stream.read_exact(&mut prefix).unwrap();
    assert_eq!(&prefix[..10], b"granary\0\x00\x04");
    prefix[10]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_release_before_is_refused_as_long_as_the_map_says_what_it_cannot_read() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let offer = |epoch, state| {
        let mut map = ClusterMap { epoch: Epoch(epoch), ..map(status.uuid) };
        let away = MapDisk {
            id: DiskId(6),
            uuid: DiskUuid([6; 16]),
            address: "127.0.0.1:6".into(),
            state,
            ..map.disks[&DiskId(5)].clone()
        };
        map.disks.insert(away.id, away);
        ControlRequest::OfferMap(Box::new(map))
    };
    for (epoch, state, verdict) in
        [(1, DiskState::In, 0), (2, DiskState::Away, 1), (3, DiskState::In, 0), (4, DiskState::Away, 1)]
    {
        assert_eq!(ask(&node.client(), offer(epoch, state)).await, ControlResponse::Done);
        assert_eq!(verdict_on_version_2(&node, status.uuid), verdict, "{state:?}");
    }
    node.signal("KILL");
    node.wait();
    let node = disk.serve();
    assert_eq!(verdict_on_version_2(&node, status.uuid), 1, "it knows its map");
    ask(&node.client(), ControlRequest::Status).await;
}

/// Overwrites the beginning of every file in a folder whose name begins so.
fn damage(folder: &Path, named: &str) {
    let mut files = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with(named) {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.iter_mut().take(64).for_each(|byte| *byte ^= 0x5a);
            std::fs::write(&path, bytes).unwrap();
            files += 1;
        }
    }
    assert!(files > 0, "no file {named} in {}", folder.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_metadata_are_put_aside_once_and_chunks_are_served_all_the_while() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    let ControlResponse::Status(status) = ask(&client, ControlRequest::Status).await else { panic!() };
    let label = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(disk.dir().join("label.json")).unwrap()).unwrap()
    };
    assert!(label().get("metadata").is_none());
    assert_eq!(ask(&client, ControlRequest::OfferMap(Box::new(map_of_one(status.uuid)))).await, ControlResponse::Done);
    let init = || ControlRequest::InitShard { shard: ShardId(1), members: vec![DiskId(4)] };
    assert_eq!(ask(&client, init()).await, ControlResponse::Done);
    put(&client, 1, 100_000).await.unwrap();
    let first = label()["metadata"].clone();
    node.signal("TERM");
    assert!(node.wait().success());

    damage(&disk.dir().join("meta/state"), "MANIFEST");
    let mut node = disk.serve();
    let client = node.client();
    assert_eq!(get(&client, 1).await.unwrap(), payload(1, 100_000));
    put(&client, 2, 100_000).await.unwrap();
    assert!(disk.dir().join("meta.damaged/state").exists() && disk.dir().join("meta/state").exists(), "{}", disk.log());
    assert_ne!(label()["metadata"], first);
    // The only replica is lost. It is not begun again, empty, as if nothing had been there.
    let again = ask(&client, init()).await;
    assert!(matches!(&again, ControlResponse::Error(ControlError::Disk(why)) if why.contains("lost")), "{again:?}");
    node.signal("TERM");
    assert!(node.wait().success());

    damage(&disk.dir().join("meta/log"), "MANIFEST");
    let node = disk.serve();
    let client = node.client();
    assert_eq!(get(&client, 2).await.unwrap(), payload(2, 100_000));
    let again = ask(&client, init()).await;
    assert!(
        matches!(&again, ControlResponse::Error(ControlError::Disk(why)) if why.contains("Corruption")),
        "{again:?}"
    );
    assert!(disk.log().contains("meta.damaged is there already"), "{}", disk.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_metadata_folder_is_refused_and_the_chunks_are_served() {
    let disk = Disk::new();
    let node = disk.serve();
    let client = node.client();
    let ControlResponse::Status(status) = ask(&client, ControlRequest::Status).await else { panic!() };
    put(&client, 1, 1000).await.unwrap();
    assert_eq!(ask(&client, ControlRequest::OfferMap(Box::new(map_of_one(status.uuid)))).await, ControlResponse::Done);
    let init = || ControlRequest::InitShard { shard: ShardId(1), members: vec![DiskId(4)] };
    assert_eq!(ask(&client, init()).await, ControlResponse::Done);
    drop(node);
    let (meta, older) = (disk.dir().join("meta"), disk.root.path().join("older"));
    std::fs::rename(&meta, &older).unwrap();
    let node = disk.serve();
    assert!(matches!(ask(&node.client(), init()).await, ControlResponse::Error(ControlError::Disk(_))));
    drop(node);
    std::fs::remove_dir_all(&meta).unwrap();
    std::fs::rename(&older, &meta).unwrap();
    let node = disk.serve();
    let client = node.client();
    let again = ask(&client, init()).await;
    assert!(matches!(&again, ControlResponse::Error(ControlError::Disk(why)) if why.contains("label")), "{again:?}");
    assert_eq!(get(&client, 1).await.unwrap(), payload(1, 1000));
    assert!(!disk.dir().join("meta.damaged").exists(), "it is sound, only not the newest");
}

/// What the replica of shard 1 answers to a replica of disk 3.
async fn say(client: &NodeClient, to: Option<ReplicaId>, request: PeerRequest) -> Result<PeerResponse, LinkError> {
    let from = candidate(1);
    let message = encode_message(&PeerMessage { from, to, request }).unwrap();
    let raft = ControlRequest::Raft { shard: ShardId(1), from: from.disk, message };
    match client.control(raft, Duration::from_secs(5)).await? {
        ControlResponse::Raft(answer) => Ok(decode_message(&answer).unwrap()),
        other => Err(LinkError::Protocol(format!("{other:?}"))),
    }
}

fn candidate(incarnation: u64) -> ReplicaId {
    ReplicaId { disk: DiskId(3), incarnation }
}

/// The kernel refuses the sync of a vote: it is not given, and those given before are kept. The tests of the replica
/// copy files of a live process, and would not notice that nothing is synced.
#[tokio::test(flavor = "multi_thread")]
async fn no_vote_is_given_whose_sync_failed() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    assert_eq!(
        ask(&node.client(), ControlRequest::OfferMap(Box::new(map_of_one(status.uuid)))).await,
        ControlResponse::Done
    );
    let ends = Ends { to: Some(status.uuid), from: Some(DiskUuid([3; 16])), gateway: None };
    let PeerResponse::Identity { me, .. } = say(&node.client_as(ends), None, PeerRequest::Identify).await.unwrap()
    else {
        panic!()
    };
    node.signal("TERM");
    node.wait();
    let vote = |term, node| {
        let vote = WireVote { term, node, committed: false };
        PeerRequest::Vote { vote, last: None, transfer: false, pre_vote: false }
    };
    let trace = disk.root.path().join("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", trace.to_str().unwrap(), "-e", "trace=fdatasync", "-e"]);
    // Counted per thread: past what opening needs.
    command.arg("inject=fdatasync:error=EIO:when=30").arg(BINARY).args(disk.serve_args());
    let mut node = disk.start(&mut command);
    let client = node.client_as(ends);
    let mut given = 0;
    for term in 1..100 {
        match say(&client, Some(me), vote(term, candidate(1))).await {
            Ok(PeerResponse::Voted { granted: true, .. }) => given = term,
            _ => break,
        }
    }
    assert!((1..99).contains(&given), "no sync failed: {}", std::fs::read_to_string(&trace).unwrap());
    assert!(!node.wait().success());
    assert!(disk.log().contains("can no longer be trusted"), "{}", disk.log());
    let node = disk.serve();
    let another = say(&node.client_as(ends), Some(me), vote(given, candidate(1))).await.unwrap();
    assert!(matches!(another, PeerResponse::Voted { vote, .. } if vote.term >= given), "{another:?}");
}

/// A whole snapshot in one piece, from a leader of term 7, that ends in this entry. It begins with the members.
fn snapshot(last: WireLogId) -> PeerRequest {
    let (shard, nothing) = (1u16.to_be_bytes(), 0u64.to_be_bytes());
    let first = WireLogId { index: 0, ..last };
    let membership = WireMembership { configs: vec![vec![candidate(1)]], nodes: vec![candidate(1)] };
    let applied = AppliedState { last: Some(last), membership_at: Some(first), membership };
    // The first byte is the version of messages.
    let applied = encode_message(&applied).unwrap().slice(1..);
    let mut file = [&b"GRNSNAP1"[..], &shard, &(applied.len() as u32).to_be_bytes(), &applied].concat();
    file.extend(crc32fast::hash(&file).to_be_bytes());
    let end = crc32fast::hash(&[&shard[..], &0u32.to_be_bytes(), &nothing].concat());
    file.extend([&0u32.to_be_bytes()[..], &end.to_be_bytes(), &nothing].concat());
    let vote = WireVote { term: 7, node: candidate(1), committed: true };
    PeerRequest::SnapshotPiece { vote, transfer: 1, offset: 0, data: Bytes::from(file), last: true }
}

fn entry(term: u64, index: u64) -> WireLogId {
    WireLogId { term, node: candidate(1), index }
}

/// A disk that leads the root shard and shard 1 alone, and a connection to it of disk 3, which the map knows.
async fn sole_leader(disk: &Disk) -> (Running, NodeClient, ReplicaId) {
    let node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let client = node.client_as(Ends { to: Some(status.uuid), from: Some(DiskUuid([3; 16])), gateway: None });
    assert_eq!(ask(&client, ControlRequest::OfferMap(Box::new(map_of_one(status.uuid)))).await, ControlResponse::Done);
    for shard in [ShardId::ROOT, ShardId(1)] {
        let init = ControlRequest::InitShard { shard, members: vec![DiskId(4)] };
        assert_eq!(ask(&client, init).await, ControlResponse::Done);
    }
    let until = Instant::now() + Duration::from_secs(30);
    while shards(&client).await.iter().any(|shard| shard.state != "leader" || shard.applied_index == 0) {
        assert!(Instant::now() < until, "{:?}", shards(&client).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let me = identity(&client).await;
    (node, client, me)
}

async fn shards(client: &NodeClient) -> Vec<ShardStatus> {
    let ControlResponse::Shards(shards) = ask(client, ControlRequest::ShardStatus).await else { panic!() };
    shards
}

async fn identity(client: &NodeClient) -> ReplicaId {
    match say(client, None, PeerRequest::Identify).await.unwrap() {
        PeerResponse::Identity { me, .. } => me,
        other => panic!("{other:?}"),
    }
}

/// Sends the command that does nothing to shard 1: docs/formats/metadata.md draws it. Its reply says that it was done.
async fn write(client: &NodeClient, number: u8) {
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let (command, root_account, noop) = (0u8, 1u8, 15u8);
    let request = encode_message(&(command, [number; 16], now_ms, Some(now_ms), root_account, noop)).unwrap();
    let answer = ask(client, ControlRequest::Shard { shard: ShardId(1), request }).await;
    assert_eq!(answer, ControlResponse::Shard(Bytes::from_static(&[1, 0, 0])));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raft_message_that_no_replica_sends_is_refused_and_the_shard_goes_on() {
    let disk = Disk::new();
    let (mut node, client, me) = sole_leader(&disk).await;
    write(&client, 1).await;
    let stand = async || shards(&client).await.into_iter().map(|shard| (shard.state, shard.term)).collect::<Vec<_>>();
    let before = stand().await;
    let leads = |term| WireVote { term, node: candidate(1), committed: true };
    let append =
        |term, previous, committed| PeerRequest::Append { vote: leads(term), previous, entries: Vec::new(), committed };
    let asks = |term, pre_vote| PeerRequest::Vote {
        vote: WireVote { committed: false, ..leads(term) },
        last: Some(entry(term, 1_000_000)),
        transfer: true,
        pre_vote,
    };
    for what in [
        append(u64::MAX, None, None),
        append(7, Some(entry(8, 5)), None),
        append(7, Some(entry(6, 5)), Some(entry(0, 1_000_000))),
        asks(u64::MAX, false),
        asks(1 << 40, true),
        snapshot(entry(1_000_000, 1_000_000)),
        snapshot(entry(7, u64::MAX)),
    ] {
        let answer = say(&client, Some(me), what.clone()).await;
        assert!(matches!(answer, Ok(PeerResponse::Failed(_))), "{what:?}: {answer:?}");
    }
    // Not even a term was believed, and the shard takes writes, also after a restart.
    assert_eq!(stand().await, before);
    write(&client, 2).await;
    assert!(!disk.log().contains("panicked at"), "{}", disk.log());
    node.signal("TERM");
    assert!(node.wait().success(), "{}", disk.log());
    let (_node, client, again) = sole_leader(&disk).await;
    assert_eq!(again, me);
    write(&client, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assertion_of_the_raft_library_ends_one_replica_and_not_the_process() {
    let disk = Disk::new();
    let (mut node, client, me) = sole_leader(&disk).await;
    put(&client, 1, 100_000).await.unwrap();
    let until = Instant::now() + Duration::from_secs(30);

    // It contradicts what was committed here: it ends in the first entry, which another leader wrote.
    let answer = say(&client, Some(me), snapshot(entry(7, 0))).await;
    assert!(answer.is_err(), "it took what cannot be: {answer:?}");
    assert!(disk.log().contains("the snapshot contradicts locally committed logs"), "{}", disk.log());
    // Chunks and the other shard are served meanwhile, and it comes back by itself.
    loop {
        let now: Vec<String> = shards(&client).await.into_iter().map(|shard| shard.state).collect();
        assert_eq!(now[0], "leader", "{now:?}");
        assert_eq!(get(&client, 1).await.unwrap(), payload(1, 100_000));
        if now == ["leader", "leader"] && disk.log().contains("a failed metadata replica was opened again") {
            break;
        }
        assert!(Instant::now() < until, "{now:?} {}", disk.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    put(&client, 2, 100_000).await.unwrap();
    assert_eq!(identity(&client).await, me);
    assert_eq!(node.child.try_wait().unwrap(), None, "the process ended");
    node.signal("TERM");
    assert!(node.wait().success(), "{}", disk.log());
}
