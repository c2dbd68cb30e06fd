//! The real binary: label, lock, serving, stopping, and the end of the process at the first failed sync.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "answers/rows.rs"]
mod answers;

use bytes::Bytes;
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::{
    deal_hash_slots, ClusterMap, Disk as MapDisk, DiskState, GroupSlot, Location, PlacementGroup, Roles, ShardReplicas,
};
use granary_placement::scheme::{CodecId, FailureDomain, Scheme};
use granary_replica::message::{
    decode_message, encode_message, PeerMessage, PeerRequest, PeerResponse, ReplicaId, WireVote,
};
use granary_wire::chunk::{ChunkHealth, ChunkId, ChunkSpec};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use granary_wire::error::{AuthError, LinkError};
use granary_wire::{ChunkError, ClientLimits, ClusterSecret, Credentials, Ends, NodeClient};
use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_granary-disk-node");
const CLUSTER: ClusterId = ClusterId([0x11; 16]);
const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn disk_node(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

struct Disk {
    root: tempfile::TempDir,
}

impl Disk {
    fn new() -> Disk {
        let root = tempfile::tempdir().unwrap();
        let secret = root.path().join("secret");
        std::fs::write(&secret, SECRET).unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
        let disk = Disk { root };
        let done = disk.format();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        disk
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join("disk")
    }

    fn format(&self) -> Output {
        disk_node(&["format", "--dir", self.dir().to_str().unwrap(), "--cluster", &CLUSTER.to_string(), "--disk", "4"])
    }

    /// The arguments of `serve`.
    fn serve_args(&self) -> Vec<String> {
        let secret = self.root.path().join("secret");
        let dir = self.dir();
        let words = [
            "serve",
            "--dir",
            dir.to_str().unwrap(),
            "--listen",
            "127.0.0.1:0",
            "--secret-file",
            secret.to_str().unwrap(),
        ];
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn start(&self, command: &mut Command) -> Running {
        let _ = std::fs::remove_file(self.dir().join("address"));
        let child =
            command.stdout(Stdio::null()).stderr(std::fs::File::create(self.root.path().join("log")).unwrap()).spawn();
        let mut running = Running { child: child.unwrap(), address: String::new() };
        let begun = Instant::now();
        while running.address.is_empty() {
            if let Ok(Some(status)) = running.child.try_wait() {
                panic!("ended at once with {status}: {}", self.log());
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "did not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
            running.address = std::fs::read_to_string(self.dir().join("address")).unwrap_or_default().trim().to_owned();
        }
        running
    }

    fn serve(&self) -> Running {
        self.start(Command::new(BINARY).args(self.serve_args()))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.root.path().join("log")).unwrap_or_default()
    }
}

struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn client(&self) -> NodeClient {
        self.client_as(Ends::default())
    }

    fn client_as(&self, ends: Ends) -> NodeClient {
        let credentials = Credentials { cluster: CLUSTER, secret: ClusterSecret::from_hex(SECRET).unwrap() };
        NodeClient::new(self.address.clone(), ends, credentials, ClientLimits::default())
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap()
            .success());
    }

    fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "did not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn chunk(number: u8) -> ChunkId {
    ChunkId { group: PlacementGroupId(1), extent: ExtentId([number; 16]), index: 2, generation: 1 }
}

fn spec(len_bytes: u64) -> ChunkSpec {
    let owner = HashSlot(3);
    ChunkSpec {
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 65536,
        extent_len_bytes: len_bytes * 4,
        len_bytes,
        owner,
        created_ms: 5,
    }
}

fn payload(number: u8, len: usize) -> Bytes {
    (0..len)
        .map(|at| (at as u32).wrapping_mul(2_654_435_761).wrapping_add(u32::from(number)).to_be_bytes()[0])
        .collect()
}

async fn put(client: &NodeClient, number: u8, len: usize) -> Result<(), ChunkError> {
    client.put_chunk(chunk(number), spec(len as u64), vec![payload(number, len)]).await
}

async fn get(client: &NodeClient, number: u8) -> Result<Bytes, ChunkError> {
    Ok(client.read_blocks(chunk(number), 0, 64).await?.data.concat().into())
}

async fn ask(client: &NodeClient, request: ControlRequest) -> ControlResponse {
    client.control(request, Duration::from_secs(10)).await.unwrap()
}

async fn delete(client: &NodeClient, numbers: &[u8], lease: Option<LeaseStamp>) -> ControlResponse {
    let chunks = numbers.iter().map(|number| chunk(*number)).collect();
    ask(client, ControlRequest::DeleteChunks { chunks, lease }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_whose_lease_was_taken_over_can_neither_write_nor_delete_also_after_a_kill() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    let lease = |epoch| LeaseStamp { task: "heal".to_owned(), epoch };
    let put_under = |client: NodeClient, lease: LeaseStamp, number: u8| async move {
        client.put_chunk_under(&lease, chunk(number), spec(70_000), vec![payload(number, 70_000)]).await
    };
    put_under(client.clone(), lease(4), 1).await.unwrap();
    // The old holder is in the middle of a chunk when the new one acts for the first time.
    let mut half = client.begin_chunk_under(&lease(4), chunk(2), spec(70_000)).await.unwrap();
    half.write(payload(2, 70_000).slice(..1000)).await.unwrap();
    assert_eq!(delete(&client, &[9], Some(lease(5))).await, ControlResponse::Deleted(0));
    let stale = ChunkError::StaleLease { current: 5 };
    let rest = async move {
        half.write(payload(2, 70_000).slice(1000..)).await?;
        half.finish().await
    };
    assert_eq!(rest.await, Err(stale.clone()));
    assert_eq!(get(&client, 2).await, Err(ChunkError::NotFound));
    node.signal("KILL");
    node.wait();

    let node = disk.serve();
    let client = node.client();
    assert_eq!(put_under(client.clone(), lease(4), 3).await, Err(stale));
    let refused = ControlResponse::Error(ControlError::StaleLease { current: 5 });
    assert_eq!(delete(&client, &[1], Some(lease(4))).await, refused);
    assert_eq!(get(&client, 1).await.unwrap(), payload(1, 70_000));
    assert_eq!(get(&client, 3).await, Err(ChunkError::NotFound));
    // The holder, and what is no background work, go on.
    put_under(client.clone(), lease(5), 3).await.unwrap();
    assert_eq!(delete(&client, &[1], None).await, ControlResponse::Deleted(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_node_stores_reads_verifies_lists_and_deletes_over_kill_and_stop() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    for (number, len) in [(1, 5), (2, 70_000), (3, 3_000_000)] {
        put(&client, number, len).await.unwrap();
        assert_eq!(get(&client, number).await.unwrap(), payload(number, len));
    }
    let all = vec![chunk(1), chunk(9), chunk(3)];
    assert_eq!(
        ask(&client, ControlRequest::HaveChunks(all.clone())).await,
        ControlResponse::Have(vec![true, false, true])
    );
    let health = vec![ChunkHealth::Good, ChunkHealth::Missing, ChunkHealth::Good];
    assert_eq!(ask(&client, ControlRequest::VerifyChunks(all)).await, ControlResponse::Health(health));
    assert_eq!(delete(&client, &[1, 9], None).await, ControlResponse::Deleted(1));
    node.signal("KILL");
    node.wait();

    let mut node = disk.serve();
    let client = node.client();
    assert_eq!(get(&client, 1).await, Err(ChunkError::NotFound));
    assert_eq!(get(&client, 2).await.unwrap(), payload(2, 70_000));
    assert_eq!(get(&client, 3).await.unwrap(), payload(3, 3_000_000));
    let ControlResponse::Chunks { chunks, more } =
        ask(&client, ControlRequest::ListChunks { after: None, limit: 10 }).await
    else {
        panic!()
    };
    assert_eq!((chunks.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), more), (vec![chunk(2), chunk(3)], false));
    assert!(chunks.iter().all(|chunk| chunk.quarantined_ms.is_none()));
    let quarantine = async |ids: &[u8], into: bool, epoch: u64| {
        let lease = LeaseStamp { task: "heal".to_owned(), epoch };
        let chunks = ids.iter().map(|id| chunk(*id)).collect();
        ask(&client, ControlRequest::Quarantine { chunks, into, lease }).await
    };
    let marked = async || {
        let answer = ask(&client, ControlRequest::ListChunks { after: None, limit: 10 }).await;
        let ControlResponse::Chunks { chunks, .. } = answer else { panic!("{answer:?}") };
        chunks.iter().filter(|chunk| chunk.quarantined_ms.is_some()).map(|chunk| chunk.id).collect::<Vec<_>>()
    };
    assert_eq!(quarantine(&[2, 3, 9], true, 9).await, ControlResponse::Done);
    assert_eq!(marked().await, [chunk(2), chunk(3)]);
    assert_eq!(get(&client, 2).await.unwrap(), payload(2, 70_000));
    let refused = ControlResponse::Error(ControlError::StaleLease { current: 9 });
    assert_eq!(quarantine(&[2], false, 8).await, refused);
    assert_eq!(quarantine(&[2], false, 9).await, ControlResponse::Done);
    assert_eq!(marked().await, [chunk(3)]);
    let ControlResponse::Status(status) = ask(&client, ControlRequest::Status).await else { panic!() };
    assert_eq!((status.chunks, status.chunk_bytes), (2, 3_070_000));
    assert!(status.free_bytes > 0 && status.free_bytes < status.capacity_bytes);
    assert_eq!(ask(&client, ControlRequest::GetMap).await, ControlResponse::Map(None));
    node.signal("TERM");
    assert_eq!(node.wait().code(), Some(0), "{}", disk.log());
    assert!(!disk.log().contains(&SECRET[..16]), "the secret is in the log");

    let report = disk_node(&["inspect", "--dir", disk.dir().to_str().unwrap(), "--verify", "--chunks"]);
    let text = String::from_utf8_lossy(&report.stdout).into_owned();
    assert_eq!(report.status.code(), Some(0), "{text}");
    assert!(text.contains(&chunk(3).to_string()) && text.contains("no damage found"), "{text}");
    flip_a_payload_byte(&disk.dir());
    let report = disk_node(&["inspect", "--dir", disk.dir().to_str().unwrap(), "--verify", "--json"]);
    assert_eq!(report.status.code(), Some(1), "{}", String::from_utf8_lossy(&report.stdout));
    let json: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(json["damaged"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_found_damaged_at_the_start_is_rebuilt_in_the_same_start() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    for number in 1..40 {
        put(&client, number, 20_000).await.unwrap();
    }
    node.signal("TERM");
    assert_eq!(node.wait().code(), Some(0));
    // The first bytes of each table are entries; what says where entries lie stands at its end and stays good, so that
    // the index opens.
    let mut damaged = 0;
    for entry in std::fs::read_dir(disk.dir().join("index")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "sst") {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.iter_mut().take(64).for_each(|byte| *byte ^= 0x5a);
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0);
    let node = disk.serve();
    let client = node.client();
    for number in 1..40 {
        assert_eq!(get(&client, number).await.unwrap(), payload(number, 20_000), "{number}");
    }
    assert!(disk.log().contains("the index was found damaged at the start"), "{}", disk.log());
}

/// In a sealed segment, so that no crash explains it.
fn flip_a_payload_byte(dir: &Path) {
    for entry in std::fs::read_dir(dir.join("segments")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let Some(record) = (8192..bytes.len()).step_by(4096).find(|at| bytes[*at..].starts_with(b"GRNYREC\0")) else {
            continue;
        };
        if bytes[4096..].starts_with(b"GRNYSEAL") {
            bytes[record + 4096] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            return;
        }
    }
    panic!("no sealed segment with a record");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_this_nodes_disk_is_refused_in_words() {
    let disk = Disk::new();
    let said = |output: Output| (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
    let (code, text) = said(disk.format());
    assert!(code == Some(2) && text.contains("already disk 4"), "{text}");
    let serve = |extra: &[&str]| {
        let mut args = disk.serve_args();
        args.extend(extra.iter().map(|word| (*word).to_owned()));
        said(Command::new(BINARY).args(args).output().unwrap())
    };
    let (code, text) = serve(&["--cluster", &ClusterId([0x22; 16]).to_string()]);
    assert!(code == Some(2) && text.contains("belongs to cluster"), "{text}");
    let node = disk.serve();
    let (code, text) = serve(&[]);
    assert!(code == Some(2) && text.contains("in use by another process"), "{text}");
    let (code, text) = said(disk_node(&["inspect", "--dir", disk.dir().to_str().unwrap()]));
    assert!(code == Some(2) && text.contains("in use by another process"), "{text}");
    drop(node);
    let stranger = disk.root.path().join("stranger");
    std::fs::create_dir(&stranger).unwrap();
    std::fs::write(stranger.join("holiday.jpg"), b"x").unwrap();
    let format = ["format", "--dir", stranger.to_str().unwrap(), "--cluster", &CLUSTER.to_string(), "--disk", "5"];
    let (code, text) = said(disk_node(&format));
    assert!(code == Some(2) && text.contains("holiday.jpg"), "{text}");
    std::fs::write(disk.dir().join("label.json"), b"{\"version\": 1}").unwrap();
    let (code, text) = serve(&[]);
    assert!(code == Some(2) && text.contains("damaged"), "{text}");
}

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
async fn a_node_takes_nothing_that_is_meant_for_another_disk() {
    let disk = Disk::new();
    let node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let right = node.client_as(Ends { to: Some(status.uuid), from: None });
    // It may open as many sockets as the system allows.
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", node.child.id())).unwrap();
    let files: Vec<&str> =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(files[3], files[4], "{limits}");
    put(&right, 1, 1000).await.unwrap();

    let wrong = node.client_as(Ends { to: Some(DiskUuid([9; 16])), from: None });
    assert_eq!(put(&wrong, 2, 1000).await, Err(ChunkError::Link(LinkError::Auth(AuthError::Disk))));
    assert_eq!(get(&wrong, 1).await, Err(ChunkError::Link(LinkError::Auth(AuthError::Disk))));
    let deletion = ControlRequest::DeleteChunks { chunks: vec![chunk(1)], lease: None };
    let deleted = wrong.control(deletion, Duration::from_secs(10)).await;
    assert_eq!(deleted, Err(LinkError::Auth(AuthError::Disk)));
    assert_eq!(ask(&right, ControlRequest::HaveChunks(vec![chunk(1), chunk(2)])).await, {
        ControlResponse::Have(vec![true, false])
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_listen_to_the_disks_of_the_map_and_to_nobody_before_there_is_one() {
    let disk = Disk::new();
    let node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let caller = |from| node.client_as(Ends { to: Some(status.uuid), from });
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
async fn metadata_that_ended_the_process_twice_stay_closed_for_a_while_and_chunks_are_served() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let map = ControlRequest::OfferMap(Box::new(map_of_one(status.uuid)));
    assert_eq!(ask(&node.client(), map).await, ControlResponse::Done);
    let init = || ControlRequest::InitShard { shard: ShardId(1), members: vec![DiskId(4)] };
    assert_eq!(ask(&node.client(), init()).await, ControlResponse::Done);
    put(&node.client(), 1, 1000).await.unwrap();
    let panics = disk.dir().join("meta.panics");
    for (noted, age_s, open) in [("!", 0, true), ("!!", 0, false), ("!!", 601, true)] {
        node.signal("TERM");
        assert!(node.wait().success());
        std::fs::write(&panics, noted).unwrap();
        let then = std::time::SystemTime::now() - Duration::from_secs(age_s);
        std::fs::File::options().write(true).open(&panics).unwrap().set_modified(then).unwrap();
        node = disk.serve();
        let answer = ask(&node.client(), init()).await;
        if open {
            assert_eq!(answer, ControlResponse::Done, "{noted} {age_s}");
        } else {
            assert!(matches!(&answer, ControlResponse::Error(ControlError::Disk(why)) if why.contains("assertion")));
        }
        assert_eq!(get(&node.client(), 1).await.unwrap(), payload(1, 1000));
    }
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

/// The kernel refuses one sync; the process must end without an answer, and a fresh one must hold what was acknowledged
/// before.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_failed_sync_ends_the_process() {
    let strace = Command::new("strace").arg("-V").output();
    assert!(
        strace.is_ok_and(|done| done.status.success()),
        "this test needs strace (a failing sync cannot be had otherwise): install it"
    );
    let disk = Disk::new();
    let mut node = disk.serve();
    put(&node.client(), 1, 100_000).await.unwrap();
    node.signal("TERM");
    node.wait();
    // The tracer counts per thread: past what the opening thread needs, so that it is the writer's sync that fails, at
    // its birth of a segment or for a group.
    for when in [16, 25, 40] {
        let trace = disk.root.path().join("trace");
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", trace.to_str().unwrap(), "-e", "trace=fdatasync", "-e"]);
        command.arg(format!("inject=fdatasync:error=EIO:when={when}")).arg(BINARY).args(disk.serve_args());
        let mut node = disk.start(&mut command);
        let client = node.client();
        let mut acknowledged = Vec::new();
        let begun = Instant::now();
        for number in 10..60 {
            match put(&client, number, 3000).await {
                Ok(()) => acknowledged.push(number),
                Err(_) => break,
            }
        }
        assert!(acknowledged.len() < 50, "no sync failed: {}", std::fs::read_to_string(&trace).unwrap());
        assert!(!node.wait().success());
        assert!(begun.elapsed() < Duration::from_secs(10));
        let traced = std::fs::read_to_string(&trace).unwrap();
        assert!(traced.contains("INJECTED"), "{traced}");
        assert!(disk.log().contains("can no longer be trusted"), "{}", disk.log());
        let mut node = disk.serve();
        let client = node.client();
        assert_eq!(get(&client, 1).await.unwrap(), payload(1, 100_000));
        for number in acknowledged {
            assert_eq!(get(&client, number).await.unwrap(), payload(number, 3000));
        }
        node.signal("TERM");
        assert!(node.wait().success());
    }
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
    let ends = Ends { to: Some(status.uuid), from: Some(DiskUuid([3; 16])) };
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

/// Many long uploads and reads at once; what is not written yet must wait in the clients, not in the node.
#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_bounded_under_load() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    let tasks: Vec<_> = (0..32u8)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move {
                let len = if number % 2 == 0 { 24 << 20 } else { 900_000 };
                put(&client, number, len).await.unwrap();
                let blocks = (len as u32).div_ceil(65536);
                for first in (0..blocks).step_by(64) {
                    client.read_blocks(chunk(number), first, 64).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("peak memory {} MiB", peak_kib / 1024);
    assert!(peak_kib < 400 * 1024, "{peak_kib} KiB");
    node.signal("TERM");
    assert!(node.wait().success());
}

/// The real node, for the table of answers.
struct Asked {
    disk: Disk,
    running: Running,
}

impl answers::Node for Asked {
    fn client(&self) -> NodeClient {
        self.running.client()
    }

    fn damage(&mut self, _: ChunkId, _: u32, bytes: &[u8]) {
        let mut found = 0;
        for entry in std::fs::read_dir(self.disk.dir().join("segments")).unwrap() {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.unwrap().path()).unwrap();
            let mut begin = vec![0; 16 << 20];
            let len = file.read_at(&mut begin, 0).unwrap();
            for at in
                begin[..len].windows(64).enumerate().filter(|(_, window)| *window == &bytes[..64]).map(|(at, _)| at)
            {
                file.write_all_at(&[!bytes[0]], at as u64).unwrap();
                found += 1;
            }
        }
        assert_eq!(found, 1);
    }

    async fn kill(&mut self) {
        self.running.signal("KILL");
        self.running.wait();
        self.running = self.disk.serve();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_node_answers_as_the_table_says() {
    let disk = Disk::new();
    let running = disk.serve();
    answers::ask_all(&mut Asked { disk, running }).await;
}
