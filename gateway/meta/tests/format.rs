//! The bytes that are kept: a change here is a change of docs/formats/metadata.md, a new version, and a way to read the
//! old one.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use bytes::Bytes;
use granary_meta::codec::{
    decode, encode, encode_at, CompletedUpload, Counters, Fence, KeptReply, LastBucketId, LeaseSeen, MapHead,
    ObjectHead, OldestMap, QueuedAt, Record,
};
use granary_meta::keys::kind;
use granary_meta::kv::{MemoryKv, StateError};
use granary_meta::level::MAX_FEATURE_LEVEL;
use granary_meta::memory::MemoryShard;
use granary_meta::record::{
    AccountId, BucketId, BucketRecord, BucketRule, ExtentRecord, ExtentRef, LeaseRecord, MissingRecord, ObjectData,
    ObjectMeta, ObjectRecord, PartRecord, RepairSlotRecord, SettingsRecord, UploadId, UploadRecord, Usage, Versioning,
};
use granary_meta::{ChunkRef, Command, Conditions, MetaRequest, Reply};
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId, ShardId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::{ClusterMap, MapDiff};
use granary_placement::scheme::CodecId;
use scenery::{away_map, inline, map, next_map, record};
use std::collections::BTreeSet;

fn extent(id: u8) -> ExtentRef {
    ExtentRef {
        extent: ExtentId([id; 16]),
        group: PlacementGroupId(7),
        codec: CodecId::Np16,
        k: 2,
        m: 1,
        unit_bytes: 131_072,
        len_bytes: 300,
        generation: 1,
        slots: vec![0, 1, 2],
    }
}

fn put(key: &str, data: ObjectData, size_bytes: u64) -> Command {
    Command::PutObject {
        bucket: BucketId(5),
        key: key.to_owned(),
        record: record(data, size_bytes, "etag"),
        missing: Vec::new(),
        map_epoch: Epoch(1),
        conditions: Conditions::default(),
        rule_epoch: 0,
    }
}

fn requests(commands: Vec<Command>) -> Vec<MetaRequest> {
    let numbered = commands.into_iter().zip(1u8..);
    numbered
        .map(|(command, n)| MetaRequest {
            request_id: [n; 16],
            now_ms: 1_000 + u64::from(n),
            stamp_ms: Some(2_000),
            account: AccountId::ROOT,
            command,
        })
        .collect()
}

fn stamp() -> LeaseStamp {
    LeaseStamp { task: "heal.3".to_owned(), epoch: 2 }
}

fn create_upload(id: u8) -> Command {
    let record = UploadRecord { initiated_ms: 7, meta: ObjectMeta::default(), checksum: None, owner: AccountId::ROOT };
    Command::CreateUpload {
        bucket: BucketId(5),
        key: "u".to_owned(),
        upload: UploadId([id; 16]),
        record,
        rule_epoch: 0,
    }
}

fn put_part(id: u8) -> Command {
    let (number, size_bytes, modified_ms, checksum) = (1, 300, 8, None);
    let data = ObjectData::Extents(vec![extent(id)]);
    Command::PutPart {
        bucket: BucketId(5),
        key: "u".to_owned(),
        upload: UploadId([id; 16]),
        part: PartRecord { number, size_bytes, etag: "part".to_owned(), modified_ms, checksum, data },
        missing: Vec::new(),
        map_epoch: Epoch(1),
        rule_epoch: 0,
    }
}

/// Commands that leave a value of every type in an object shard.
fn object_shard_requests() -> Vec<MetaRequest> {
    let rule = BucketRule { epoch: 1, versioning: Versioning::Enabled, lock: false, policy_epoch: 9 };
    let versioned = || {
        let mut command = put("v", inline(b"version"), 7);
        if let Command::PutObject { bucket, rule_epoch, .. } = &mut command {
            (*bucket, *rule_epoch) = (BucketId(6), 1);
        }
        command
    };
    let (group, slot) = (PlacementGroupId(7), 2);
    requests(vec![
        put("a/b", ObjectData::Extents(vec![extent(1)]), 300),
        Command::ReportMissing { chunks: vec![ChunkRef { group, extent: ExtentId([1; 16]), index: 2 }] },
        put("c", ObjectData::Extents(vec![extent(2)]), 300),
        put("c", inline(b"small"), 5),
        create_upload(3),
        put_part(3),
        create_upload(4),
        put_part(4),
        Command::CompleteUpload {
            bucket: BucketId(5),
            key: "u".to_owned(),
            upload: UploadId([4; 16]),
            parts: vec![(1, "part".to_owned())],
            record: record(ObjectData::Extents(Vec::new()), 300, "done"),
            conditions: Conditions::default(),
            rule_epoch: 0,
        },
        Command::SetBucketRule { bucket: BucketId(6), rule },
        versioned(),
        versioned(),
        Command::FenceBucket { bucket: BucketId(8), attempt: 3 },
        Command::QueueRepair { slots: vec![(group, slot), (group, 0)], keep: false, lease: stamp() },
        Command::AdvanceRepair { group, slot, generation: 14, cursor: ExtentId([9; 16]), lease: stamp() },
        Command::RequireMap { epoch: Epoch(13), lease: stamp() },
    ])
}

/// Commands that leave a value of every type in the root shard.
fn root_shard_requests() -> Vec<MetaRequest> {
    let (name, bucket, task, holder) = ("photos".to_owned(), BucketId(1), "heal.3".to_owned(), [0xd1; 16]);
    requests(vec![
        Command::CreateBucket { name: name.clone(), owner: AccountId::ROOT },
        Command::BeginBucketRule { name, bucket, versioning: Versioning::Enabled, lock: true, policy_epoch: 9 },
        Command::SetMap { map: Box::new(map()) },
        Command::SetMap { map: Box::new(next_map(&map())) },
        Command::TakeLease {
            task: task.clone(),
            holder,
            address: "gateway:9000".to_owned(),
            ttl_ms: 15_000,
            seen_epoch: 0,
            seen_renewals: 0,
        },
        Command::RenewLease { task, holder, epoch: 1, ttl_ms: 15_000, progress: Bytes::from_static(b"{}") },
        Command::SetSetting { name: "heal.out_after".to_owned(), value: Some("15s".to_owned()) },
    ])
}

/// `key value` in hex, a line each.
fn dump(kv: &MemoryKv) -> String {
    kv.entries.iter().map(|(key, value)| format!("{} {}\n", hex::encode(key), hex::encode(value))).collect()
}

#[test]
fn state_entries_lie_as_they_did_in_version_1() {
    let mut dumped = String::new();
    for (shard, requests) in [(ShardId::ROOT, root_shard_requests()), (ShardId(3), object_shard_requests())] {
        let mut state = MemoryShard::new(shard);
        for request in requests {
            let reply = state.apply(&request).unwrap();
            assert!(!matches!(reply, Reply::Refused(_)), "{request:?}: {reply:?}");
        }
        dumped += &dump(&state.kv);
    }
    assert_golden("state-v1.txt", &dumped);
}

/// What feature level 2 changes in the root shard.
#[test]
fn state_entries_of_feature_level_2_lie_as_they_did() {
    let mut state = MemoryShard::new(ShardId::ROOT);
    for request in requests(vec![
        Command::SetMap { map: Box::new(map()) },
        Command::SetMap { map: Box::new(next_map(&map())) },
        Command::SetFeatureLevel { level: 2 },
        Command::SetMap { map: Box::new(away_map(&next_map(&map()))) },
    ]) {
        assert_eq!(state.apply(&request).unwrap(), Reply::Done);
    }
    let kinds = [kind::MAP, kind::MAP_DIFF, kind::LEVEL];
    state.kv.entries.retain(|key, _| kinds.contains(&key[2]));
    assert_golden("state-v2.txt", &dump(&state.kv));
    let values = |of: u8| state.kv.entries.iter().filter(move |(key, _)| key[2] == of).map(|(_, value)| value);
    assert_eq!(values(kind::MAP).map(|value| value[0]).collect::<Vec<_>>(), [2]);
    assert_eq!(values(kind::MAP_DIFF).map(|value| value[0]).collect::<Vec<_>>(), [1, 2], "what was written stays");
    assert!(values(kind::MAP).all(|value| decode::<ClusterMap>(value).unwrap().has_away()));
    assert!(values(kind::MAP_DIFF).all(|value| decode::<MapDiff>(value).is_ok()));
}

/// Decodes an entry as what its kind says it is.
fn check_entry(key: &[u8], value: &[u8]) -> Result<(), StateError> {
    fn is<T: Record>(value: &[u8]) -> Result<(), StateError> {
        decode::<T>(value).map(|_| ())
    }
    match (key[2], key.get(3)) {
        (kind::OBJECT | kind::VERSION, _) => is::<ObjectRecord>(value),
        (kind::UPLOAD, _) => is::<UploadRecord>(value),
        (kind::PART, _) => is::<PartRecord>(value),
        (kind::COMPLETED, Some(0)) => is::<CompletedUpload>(value),
        (kind::EXTENT, _) => is::<ExtentRecord>(value),
        (kind::MISSING, _) => is::<MissingRecord>(value),
        (kind::GARBAGE, Some(1)) => is::<QueuedAt>(value),
        (kind::GARBAGE, Some(0)) => is::<ExtentRef>(value),
        (kind::FENCE, _) => is::<Fence>(value),
        (kind::USAGE, _) => is::<Usage>(value),
        (kind::REQUEST, Some(0)) => is::<KeptReply>(value),
        (kind::BUCKET, _) => is::<BucketRecord>(value),
        (kind::BUCKET_COUNTER, _) => is::<LastBucketId>(value),
        (kind::MAP, _) => is::<ClusterMap>(value),
        (kind::MAP_DIFF, _) => is::<MapDiff>(value),
        (kind::LEASE, _) => is::<LeaseRecord>(value),
        (kind::LEASE_SEEN, _) => is::<LeaseSeen>(value),
        (kind::RULE, _) => is::<BucketRule>(value),
        (kind::REPAIR_SLOT, _) => is::<RepairSlotRecord>(value),
        (kind::SETTINGS, _) => is::<SettingsRecord>(value),
        (kind::OLDEST_MAP, _) => is::<OldestMap>(value),
        (kind::COUNTERS, _) => is::<Counters>(value),
        (kind::BUCKET_OF, _) if value.is_empty() => Ok(()),
        // Orders: their values are ids and keys as they are.
        (kind::COMPLETED | kind::REQUEST, Some(1)) => Ok(()),
        (other, _) => panic!("no such kind: {other}"),
    }
}

#[test]
fn every_type_of_record_in_version_1_can_be_read() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/state-v1.txt");
    let mut kinds = BTreeSet::new();
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let (key, value) = line.split_once(' ').unwrap();
        let (key, value) = (hex::decode(key).unwrap(), hex::decode(value).unwrap());
        check_entry(&key, &value).unwrap_or_else(|error| panic!("{line}: {error}"));
        kinds.insert(key[2]);
    }
    // All but the level, which has its first value by not being there, and what the replica writes.
    assert_eq!(String::from_utf8(kinds.into_iter().collect()).unwrap(), "#BCDEFGIJKMNOPQRSTUVWXY");
}

/// The fixture is written when GRANARY_WRITE_GOLDEN is set: for a new version's file, never for an old one's.
fn assert_golden(name: &str, found: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("GRANARY_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    assert_eq!(found, std::fs::read_to_string(&path).unwrap(), "{name}");
}

#[test]
fn map_head_is_a_prefix_of_cluster_map() {
    for level in 1..=MAX_FEATURE_LEVEL {
        let head = MapHead::decode(&encode_at(level, &map()).unwrap()).unwrap();
        assert_eq!((head.cluster_id, head.epoch), (map().cluster_id, map().epoch));
    }
}

#[test]
fn object_head_is_a_prefix_of_object_record() {
    let mut whole = record(inline(b"payload"), 7, "etag");
    whole.part_sizes = vec![1, 2, 3];
    whole.meta.storage_class = "COLD".to_owned();
    whole.meta.user = vec![("a".to_owned(), "b".to_owned())];
    let head = ObjectHead::decode(&encode(&whole).unwrap()).unwrap();
    let read = (head.etag, head.size_bytes, head.part_sizes, head.meta, head.owner);
    assert_eq!(read, (whole.etag, whole.size_bytes, whole.part_sizes, whole.meta, whole.owner));
}
