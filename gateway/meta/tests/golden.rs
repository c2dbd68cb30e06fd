//! The bytes of messages and records are a format: other nodes and old disks hold them. A value of every variant,
//! encoded, must be what it was. A line that changes means that a variant or field moved, which needs a new version
//! (docs/formats/wire.md); new variants go to the end of their enum and of the fixture.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scenery;

use bytes::Bytes;
use granary_meta::record::{
    AccountId, BucketId, BucketRecord, BucketRule, Checksum, ChecksumAlgorithm, ChecksumKind, ExtentRecord, ExtentRef,
    LeaseRecord, MissingRecord, ObjectData, ObjectMeta, ObjectRecord, PartRecord, RepairSlotRecord, UploadId,
    UploadRecord, Usage, VersionSeq, Versioning,
};
use granary_meta::{
    Answer, ChunkRef, Command, Conditions, ListFrom, ListItem, MetaRequest, ObjectSummary, Query, Reply, ShardRequest,
    ShardResponse, VersionPick,
};
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::diff;
use granary_placement::scheme::CodecId;
use scenery::{away_map, map, next_map};
use serde::de::DeserializeOwned;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fmt::Write as _;
use std::path::Path;

/// Written anew when GRANARY_WRITE_GOLDEN is set: for a new version, never for an old one.
const FIXTURE_PATH: &str = "tests/golden/values-v1.txt";

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
const BUCKET: BucketId = BucketId(5);
const HOLDER: [u8; 16] = [0xd1; 16];
const UPLOAD: UploadId = UploadId([0xb1; 16]);

fn key() -> String {
    "k/1".to_owned()
}

fn etag() -> String {
    "e7".to_owned()
}

fn chunk_ref() -> ChunkRef {
    ChunkRef { group: GROUP, extent: EXTENT, index: 5 }
}

fn extent() -> ExtentRef {
    ExtentRef {
        extent: EXTENT,
        group: GROUP,
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 262_144,
        len_bytes: 1_000_000,
        generation: 1,
        slots: vec![0, 1, 2, 3, 4, 5],
    }
}

fn extent_record() -> ExtentRecord {
    ExtentRecord { extent: extent(), bucket: BUCKET, key: key() }
}

fn meta() -> ObjectMeta {
    ObjectMeta {
        headers: vec![("content-type".into(), "text/plain".into())],
        user: vec![("a".into(), "b".into())],
        storage_class: "STANDARD".into(),
        tags: vec![("t".into(), "u".into())],
    }
}

fn checksum(algorithm: ChecksumAlgorithm, kind: ChecksumKind) -> Checksum {
    Checksum { algorithm, kind, value: vec![1, 2, 3, 4] }
}

fn object(data: ObjectData) -> ObjectRecord {
    ObjectRecord {
        version: VersionSeq(9),
        null_version: true,
        delete_marker: false,
        modified_ms: 1_700_000_000_001,
        size_bytes: 1_000_000,
        etag: etag(),
        part_sizes: vec![600_000, 400_000],
        checksum: Some(checksum(ChecksumAlgorithm::Crc64Nvme, ChecksumKind::FullObject)),
        part_checksums: vec![vec![1], vec![2]],
        meta: meta(),
        owner: AccountId::ROOT,
        data,
    }
}

fn inline() -> ObjectRecord {
    object(ObjectData::Inline { bytes: Bytes::from_static(b"hello"), crc32: 0xdead_beef })
}

fn upload() -> UploadRecord {
    UploadRecord {
        initiated_ms: 17,
        meta: meta(),
        checksum: Some((ChecksumAlgorithm::Sha256, ChecksumKind::Composite)),
        owner: AccountId::ROOT,
    }
}

fn part() -> PartRecord {
    PartRecord {
        number: 7,
        size_bytes: 5,
        etag: etag(),
        modified_ms: 18,
        checksum: None,
        data: ObjectData::Extents(vec![extent()]),
    }
}

fn bucket() -> BucketRecord {
    BucketRecord {
        id: BUCKET,
        name: "photos".into(),
        created_ms: 16,
        owner: AccountId::ROOT,
        deleting: true,
        delete_attempt: 300,
        rule: rule(),
        rule_pending: true,
    }
}

fn rule() -> BucketRule {
    BucketRule { epoch: 300, versioning: Versioning::Enabled, lock: true, policy_epoch: 301 }
}

fn stamp() -> LeaseStamp {
    LeaseStamp { task: task(), epoch: 300 }
}

fn task() -> String {
    "heal".to_owned()
}

fn missing() -> MissingRecord {
    MissingRecord { queued_ms: 17, generation: 300 }
}

fn lease(holder: Option<[u8; 16]>) -> LeaseRecord {
    LeaseRecord {
        task: task(),
        epoch: 300,
        renewals: 7,
        holder,
        address: "gateway:9000".into(),
        ttl_ms: 15_000,
        taken_ms: 20,
        renewed_ms: 21,
        progress: Bytes::from_static(b"{}"),
    }
}

fn conditions() -> Conditions {
    Conditions { if_match: Some("*".into()), if_none_match_any: true }
}

fn commands() -> Vec<Command> {
    vec![
        Command::PutObject {
            bucket: BUCKET,
            key: key(),
            record: inline(),
            missing: vec![chunk_ref()],
            map_epoch: Epoch(301),
            conditions: conditions(),
            rule_epoch: 300,
        },
        Command::DeleteObject {
            bucket: BUCKET,
            key: key(),
            version: VersionPick::Seq(VersionSeq(9)),
            conditions: conditions(),
            rule_epoch: 300,
        },
        Command::CreateUpload { bucket: BUCKET, key: key(), upload: UPLOAD, record: upload(), rule_epoch: 300 },
        Command::PutPart {
            bucket: BUCKET,
            key: key(),
            upload: UPLOAD,
            part: part(),
            missing: vec![chunk_ref()],
            map_epoch: Epoch(301),
            rule_epoch: 300,
        },
        Command::CompleteUpload {
            bucket: BUCKET,
            key: key(),
            upload: UPLOAD,
            parts: vec![(7, etag())],
            record: object(ObjectData::Extents(vec![])),
            conditions: conditions(),
            rule_epoch: 300,
        },
        Command::AbortUpload { bucket: BUCKET, key: key(), upload: UPLOAD },
        Command::FenceBucket { bucket: BUCKET, attempt: 300 },
        Command::UnfenceBucket { bucket: BUCKET, attempt: 300 },
        Command::ReportMissing { chunks: vec![chunk_ref()] },
        Command::RepairDone { chunks: vec![(chunk_ref(), 300)], lease: stamp() },
        Command::GarbageDone { extents: vec![(17, EXTENT)], lease: stamp() },
        Command::CreateBucket { name: "photos".into(), owner: AccountId::ROOT },
        Command::BeginDeleteBucket { name: "photos".into(), bucket: BUCKET },
        Command::EndDeleteBucket { name: "photos".into(), bucket: BUCKET, attempt: 300, remove: true },
        Command::SetMap { map: Box::new(map()) },
        Command::Noop,
        Command::TakeLease {
            task: task(),
            holder: HOLDER,
            address: "gateway:9000".into(),
            ttl_ms: 15_000,
            seen_epoch: 300,
            seen_renewals: 7,
        },
        Command::RenewLease {
            task: task(),
            holder: HOLDER,
            epoch: 300,
            ttl_ms: 15_000,
            progress: Bytes::from_static(b"{}"),
        },
        Command::ReleaseLease { task: task(), holder: HOLDER, epoch: 300 },
        Command::SetSetting { name: "heal.out_after".into(), value: Some("15s".into()) },
        Command::BeginBucketRule {
            name: "photos".into(),
            bucket: BUCKET,
            versioning: Versioning::Enabled,
            lock: true,
            policy_epoch: 301,
        },
        Command::EndBucketRule { name: "photos".into(), bucket: BUCKET, epoch: 300 },
        Command::SetBucketRule { bucket: BUCKET, rule: rule() },
        Command::QueueRepair { slots: vec![(GROUP, 5)], keep: true, lease: stamp() },
        Command::AdvanceRepair { group: GROUP, slot: 5, generation: 301, cursor: EXTENT, lease: stamp() },
        Command::RepairSlotDone { group: GROUP, slot: 5, generation: 301, lease: stamp() },
        Command::SetFeatureLevel { level: 2 },
        Command::RequireMap { epoch: Epoch(301), lease: stamp() },
        Command::SetMap { map: Box::new(away_map(&map())) },
    ]
}

fn queries() -> Vec<Query> {
    vec![
        Query::GetObject { bucket: BUCKET, key: key(), version: VersionPick::Current },
        Query::ListObjects {
            bucket: BUCKET,
            prefix: "k".into(),
            delimiter: "/".into(),
            from: ListFrom::After(key()),
            limit: 1001,
        },
        Query::ListUploads { bucket: BUCKET, prefix: "k".into(), after: Some((key(), Some(UPLOAD))), limit: 1001 },
        Query::ListParts { bucket: BUCKET, key: key(), upload: UPLOAD, after: 7, limit: 1000 },
        Query::CompletedUpload { bucket: BUCKET, key: key(), upload: UPLOAD },
        Query::ExtentsOfGroup { group: Some(GROUP), after: Some((GROUP, EXTENT)), limit: 1000 },
        Query::ExtentsAlive { extents: vec![(GROUP, EXTENT)], or_garbage: true },
        Query::ListMissing { after: Some(chunk_ref()), limit: 1000 },
        Query::ListGarbage { until_ms: 17, after: Some((16, EXTENT)), limit: 1000 },
        Query::BucketUsage { bucket: BUCKET },
        Query::GetBucket { name: "photos".into() },
        Query::ListBuckets { owner: Some(AccountId::ROOT), prefix: "p".into(), after: "photos".into(), limit: 1000 },
        Query::GetMap { newer_than: Epoch(12) },
        Query::ListLeases,
        Query::GetSettings { newer_than: 300 },
        Query::ListRepairSlots { after: Some((GROUP, 5)), limit: 1000 },
        Query::FeatureLevel,
    ]
}

fn replies() -> Vec<Reply> {
    vec![
        Reply::Done,
        Reply::Put { version: VersionSeq(9), etag: etag() },
        Reply::Deleted { existed: true, marker: Some(VersionSeq(10)) },
        Reply::Bucket(bucket()),
        Reply::Fenced { empty: true },
        Reply::BucketExists(bucket()),
        Reply::NoSuchBucket,
        Reply::BucketFenced,
        Reply::NoSuchKey,
        Reply::PreconditionFailed,
        Reply::NoSuchUpload,
        Reply::InvalidPart { number: 7 },
        Reply::EpochConflict { current: Epoch(12) },
        Reply::Refused("no".into()),
        Reply::StaleAttempt { current: 300 },
        Reply::Lease(lease(Some(HOLDER))),
        Reply::LeaseHeld(lease(None)),
        Reply::NoSuchLease,
        Reply::StaleLease { current: 300 },
        Reply::Settings { epoch: 300 },
        Reply::StaleRule { current: 300 },
        Reply::RuleBehind { known: 300 },
        Reply::Expired { age_ms: -300 },
        Reply::StaleMap { oldest: Epoch(300) },
    ]
}

fn answers() -> Vec<Answer> {
    let summary = ObjectSummary {
        key: key(),
        size_bytes: 5,
        etag: etag(),
        modified_ms: 18,
        storage_class: String::new(),
        owner: AccountId::ROOT,
        checksum: Some((ChecksumAlgorithm::Crc32, ChecksumKind::FullObject)),
    };
    vec![
        Answer::Object(Box::new(object(ObjectData::Extents(vec![extent()])))),
        Answer::NoSuchKey,
        Answer::BucketFenced,
        Answer::NoSuchUpload,
        Answer::NoSuchBucket,
        Answer::Listing { items: vec![ListItem::Object(summary), ListItem::Prefix("k/".into())], more: true },
        Answer::Uploads { uploads: vec![(key(), UPLOAD, upload())], more: false },
        Answer::Parts { upload: upload(), parts: vec![part()], more: true },
        Answer::Completed { version: VersionSeq(9), etag: etag(), parts: vec![(7, etag())] },
        Answer::Extents { extents: vec![extent_record()], more: true },
        Answer::Alive(vec![true, false]),
        Answer::Missing { chunks: vec![(chunk_ref(), missing(), extent_record())], more: false },
        Answer::Garbage { extents: vec![(17, extent())], more: true },
        Answer::Usage(Usage { objects: 1, versions: 2, bytes: 3, uploads: 4, upload_bytes: 5 }),
        Answer::Bucket(bucket()),
        Answer::Buckets { buckets: vec![bucket()], more: false },
        Answer::Map(Box::new(map())),
        Answer::NoMap,
        Answer::Refused("no".into()),
        Answer::Leases(vec![lease(Some(HOLDER))]),
        Answer::SettingsUnchanged,
        Answer::Settings { epoch: 300, values: BTreeMap::from([("heal.out_after".into(), "15s".into())]) },
        Answer::RepairSlots {
            slots: vec![(GROUP, 5, RepairSlotRecord { queued_ms: 17, generation: 301, cursor: Some(EXTENT) })],
            more: true,
        },
        Answer::MapUnchanged,
        Answer::MapDiffs(vec![diff(&map(), &next_map(&map()))]),
        Answer::FeatureLevel(2),
    ]
}

fn shard_requests() -> Vec<ShardRequest> {
    let command = MetaRequest {
        request_id: [0xa1; 16],
        now_ms: 19,
        stamp_ms: Some(300),
        account: AccountId::ROOT,
        command: Command::Noop,
    };
    vec![ShardRequest::Command(command), ShardRequest::Query(Query::GetMap { newer_than: Epoch(0) })]
}

#[test]
fn messages_and_records_are_the_golden_bytes() {
    let mut lines = Lines(String::new());
    lines.add("shard-request", shard_requests());
    lines.add("shard-response", vec![ShardResponse::Reply(Reply::Done), ShardResponse::Answer(Answer::NoMap)]);
    lines.add("command", commands());
    lines.add("query", queries());
    lines.add("reply", replies());
    lines.add("answer", answers());
    lines.add("object", vec![inline(), object(ObjectData::Extents(vec![extent()]))]);
    lines.add("version-pick", vec![VersionPick::Current, VersionPick::Null, VersionPick::Seq(VersionSeq(9))]);
    lines.add("versioning", vec![Versioning::Off, Versioning::Enabled, Versioning::Suspended]);
    lines.add("lease-stamp", vec![stamp()]);
    lines.add("list-from", vec![ListFrom::Start, ListFrom::After(key())]);
    let algorithms = [
        ChecksumAlgorithm::Crc32,
        ChecksumAlgorithm::Crc32c,
        ChecksumAlgorithm::Crc64Nvme,
        ChecksumAlgorithm::Sha1,
        ChecksumAlgorithm::Sha256,
    ];
    lines.add("checksum", algorithms.map(|algorithm| checksum(algorithm, ChecksumKind::Composite)).to_vec());
    lines.add("checksum-kind", vec![ChecksumKind::FullObject, ChecksumKind::Composite]);

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
