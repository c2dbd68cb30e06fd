//! The bytes of messages are a format: other nodes speak them. A value of every variant, encoded, must
//! be what it was. A line that changes means that a variant or field moved, which needs a new version
//! (docs/formats/wire.md); new variants go to the end of their enum and of the fixture.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::{
    diff, ClusterMap, Disk, DiskState, GroupSlot, Location, MapDiff, PlacementGroup, Roles, ShardReplicas, SlotRange,
};
use granary_placement::scheme::CodecId;
use granary_wire::chunk::{ChunkHealth, ChunkId, ChunkInfo, ChunkSpec};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus, Reach, ShardStatus};
use granary_wire::PROTOCOL_VERSIONS;
use serde::de::DeserializeOwned;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fmt::Write as _;
use std::path::Path;

/// Written anew when GRANARY_WRITE_GOLDEN is set: for a new version, never for an old one.
const FIXTURE_PATH: &str = "tests/fixtures/messages-v4.txt";
/// What the versions before could say, the oldest first.
const FIXTURES_BEFORE: [(u16, &str); 2] =
    [(2, "tests/fixtures/messages-v2.txt"), (3, "tests/fixtures/messages-v3.txt")];

/// Every value's line; checks on the way that it comes back.
struct Lines(String);

impl Lines {
    fn add<T: Serialize + DeserializeOwned + PartialEq + Debug>(&mut self, name: &str, values: Vec<T>) {
        for (number, value) in values.into_iter().enumerate() {
            let bytes = postcard::to_stdvec(&value).unwrap();
            assert_eq!(postcard::from_bytes::<T>(&bytes).unwrap(), value);
            writeln!(self.0, "{name} {number} {}", hex::encode(bytes)).unwrap();
        }
    }
}

const GROUP: PlacementGroupId = PlacementGroupId(300);
const EXTENT: ExtentId = ExtentId([0xe1; 16]);
fn chunk() -> ChunkId {
    ChunkId { group: GROUP, extent: EXTENT, index: 5, generation: 2 }
}

fn spec() -> ChunkSpec {
    ChunkSpec {
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 262_144,
        extent_len_bytes: 1_000_000,
        len_bytes: 250_000,
        owner: HashSlot(3),
        created_ms: 1_700_000_000_000,
    }
}

fn map() -> ClusterMap {
    ClusterMap {
        cluster_id: ClusterId([0xc1; 16]),
        epoch: Epoch(12),
        next_disk_id: 7,
        disks: BTreeMap::new(),
        schemes: BTreeMap::new(),
        default_scheme: "4+2".into(),
        groups: BTreeMap::from([(
            GROUP,
            PlacementGroup {
                scheme: "4+2".into(),
                slots: vec![GroupSlot::new(DiskId(1)), GroupSlot { current: DiskId(2), previous: Some(DiskId(3)) }],
            },
        )]),
        shards: vec![ShardReplicas { members: vec![DiskId(1), DiskId(2)] }],
        slot_shards: vec![SlotRange { first: HashSlot(0), shard: ShardId(1) }],
    }
}

/// A later one, of which the version before cannot read the state of a disk.
fn map_with_away() -> ClusterMap {
    let disk = Disk {
        id: DiskId(3),
        uuid: DiskUuid([0xd3; 16]),
        address: "d3:7".into(),
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 300,
        roles: Roles { storage: true, metadata: false },
        state: DiskState::Away,
    };
    ClusterMap { epoch: Epoch(13), disks: BTreeMap::from([(disk.id, disk)]), ..map() }
}

fn lease() -> LeaseStamp {
    LeaseStamp { task: "heal".into(), epoch: 300 }
}

fn map_diff() -> MapDiff {
    let (old, mut new) = (map(), map());
    new.epoch = Epoch(13);
    if let Some(group) = new.groups.get_mut(&GROUP) {
        group.slots[1].previous = None;
    }
    new.slot_shards.push(SlotRange { first: HashSlot(2048), shard: ShardId(2) });
    diff(&old, &new)
}

fn shard_status() -> ShardStatus {
    ShardStatus {
        shard: ShardId(3),
        state: "leader".into(),
        term: 4,
        leader: Some(DiskId(2)),
        last_log_index: 1000,
        applied_index: 999,
        voters: vec![DiskId(1), DiskId(2), DiskId(3)],
    }
}

fn requests() -> Vec<ControlRequest> {
    vec![
        ControlRequest::Status,
        ControlRequest::DeleteChunks { chunks: vec![chunk()], lease: Some(lease()) },
        ControlRequest::HaveChunks(vec![chunk()]),
        ControlRequest::VerifyChunks(vec![chunk()]),
        ControlRequest::ListChunks { after: Some(chunk()), limit: 1000 },
        ControlRequest::Shard { shard: ShardId(3), request: Bytes::from_static(b"shard") },
        ControlRequest::Raft { shard: ShardId(3), from: DiskId(2), message: Bytes::from_static(b"raft") },
        ControlRequest::InitShard { shard: ShardId(3), members: vec![DiskId(1), DiskId(2)] },
        ControlRequest::OfferMap(Box::new(map())),
        ControlRequest::GetMap,
        ControlRequest::ShardStatus,
        ControlRequest::OfferMapDiff(Box::new(map_diff())),
        ControlRequest::RaftBatch { from: DiskId(2), messages: vec![(ShardId(3), Bytes::from_static(b"raft"))] },
        ControlRequest::LinkBeat { from: DiskId(2), message: Bytes::from_static(b"beat") },
        ControlRequest::Quarantine { chunks: vec![chunk()], into: true, lease: lease() },
        ControlRequest::GetMapSince(Epoch(11)),
        ControlRequest::Reach(vec![DiskId(2), DiskId(300)]),
        ControlRequest::OfferMap(Box::new(map_with_away())),
        ControlRequest::OfferMapDiff(Box::new(diff(&map(), &map_with_away()))),
        ControlRequest::ListDamaged { after: Some(chunk()), limit: 1000 },
    ]
}

fn responses() -> Vec<ControlResponse> {
    let status = NodeStatus {
        disk: Some(DiskId(2)),
        uuid: DiskUuid([0xd1; 16]),
        epoch: Epoch(12),
        capacity_bytes: 1 << 40,
        free_bytes: 1 << 39,
        chunks: 6,
        chunk_bytes: 7,
        feature_level: 1,
        data_connections: 170,
    };
    vec![
        ControlResponse::Done,
        ControlResponse::Status(status),
        ControlResponse::Deleted(3),
        ControlResponse::Have(vec![true, false]),
        ControlResponse::Health(vec![ChunkHealth::Good, ChunkHealth::Missing, ChunkHealth::Corrupt]),
        ControlResponse::Chunks {
            chunks: vec![ChunkInfo { id: chunk(), spec: spec(), age_ms: 8, quarantined_ms: Some(9) }],
            more: true,
        },
        ControlResponse::Shard(Bytes::from_static(b"shard")),
        ControlResponse::Raft(Bytes::from_static(b"raft")),
        ControlResponse::Map(Some(Box::new(map()))),
        ControlResponse::Shards(vec![shard_status()]),
        ControlResponse::Error(ControlError::Overloaded),
        ControlResponse::RaftBatch(vec![Ok(Bytes::from_static(b"raft")), Err(ControlError::NoSuchShard(ShardId(3)))]),
        ControlResponse::LinkBeat(Bytes::from_static(b"beat")),
        ControlResponse::MapDiffs(vec![map_diff()]),
        ControlResponse::Reached(vec![Reach::Reached, Reach::Unreached, Reach::Unknown]),
        ControlResponse::Map(Some(Box::new(map_with_away()))),
        ControlResponse::MapDiffs(vec![map_diff(), diff(&map(), &map_with_away())]),
    ]
}

fn errors() -> Vec<ControlError> {
    vec![
        ControlError::NotLeader { leader: Some(DiskId(2)) },
        ControlError::Unavailable("x".into()),
        ControlError::NoSuchShard(ShardId(3)),
        ControlError::Overloaded,
        ControlError::BadRequest("x".into()),
        ControlError::Disk("x".into()),
        ControlError::EpochMismatch { known: Epoch(12) },
        ControlError::StaleLease { current: 301 },
        ControlError::ClockOff { ahead_ms: -300 },
        ControlError::NoRoom { disk: DiskId(3) },
    ]
}

#[test]
fn messages_are_the_golden_bytes() {
    let mut lines = Lines(String::new());
    lines.add("request", requests());
    lines.add("response", responses());
    lines.add("error", errors());

    if std::env::var_os("GRANARY_WRITE_GOLDEN").is_some() {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE_PATH), &lines.0).unwrap();
    }
    let fixture = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE_PATH)).unwrap();
    for (expected, found) in fixture.lines().zip(lines.0.lines()) {
        assert_eq!(expected, found, "a message does not have the bytes it had");
    }
    assert_eq!(
        fixture.lines().count(),
        lines.0.lines().count(),
        "messages without golden bytes, or the other way round:\n{}",
        lines.0
    );
}

#[test]
fn what_the_versions_before_cannot_say_is_known_as_such_and_all_else_is_as_it_was() {
    let before = FIXTURES_BEFORE.map(|(version, path)| {
        (version, std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap())
    });
    let mut lines = Lines(String::new());
    lines.add("request", requests());
    lines.add("response", responses());
    lines.add("error", errors());
    let requests = requests().into_iter().map(|request| request.since());
    let responses = responses().into_iter().map(|response| response.since());
    let mut since_of: BTreeMap<u16, usize> = BTreeMap::new();
    for (line, since) in lines.0.lines().zip(requests.chain(responses)) {
        let known = before.iter().find(|(_, said)| said.lines().any(|said| said == line));
        assert_eq!(since, known.map_or(PROTOCOL_VERSIONS.max, |(version, _)| *version), "{line}");
        *since_of.entry(since).or_default() += 1;
    }
    for (version, said) in &before {
        let known: usize = since_of.range(..=*version).map(|(_, count)| count).sum();
        assert_eq!(known + errors().len(), said.lines().count(), "all that version {version} said is said yet");
    }
}
