//! The bytes that are kept: a change here is a change of docs/formats/metadata.md, a new version, and a way to read the old one.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{inline, record};
use granary_meta::apply::apply;
use granary_meta::codec::{encode, ObjectHead};
use granary_meta::kv::{MemoryKv, Overlay};
use granary_meta::record::{AccountId, BucketId, ExtentRef, ObjectData};
use granary_meta::{ChunkRef, Command, Conditions, MetaRequest};
use granary_placement::id::{ExtentId, PlacementGroupId, ShardId};
use granary_placement::scheme::CodecId;

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
        conditions: Conditions::default(),
        rule_epoch: 0,
    }
}

fn fixed_requests() -> Vec<MetaRequest> {
    let commands = [
        put("a/b", ObjectData::Extents(vec![extent(1)]), 300),
        Command::ReportMissing {
            chunks: vec![ChunkRef { group: PlacementGroupId(7), extent: ExtentId([1; 16]), index: 2 }],
        },
        put("c", ObjectData::Extents(vec![extent(2)]), 300),
        put("c", inline(b"small"), 5),
    ];
    let numbered = commands.into_iter().zip(1u8..);
    numbered
        .map(|(command, n)| MetaRequest {
            request_id: [n; 16],
            now_ms: 1_000 + u64::from(n),
            account: AccountId::ROOT,
            command,
        })
        .collect()
}

/// `key value` in hex, a line each.
fn dump(kv: &MemoryKv) -> String {
    kv.entries.iter().map(|(key, value)| format!("{} {}\n", hex::encode(key), hex::encode(value))).collect()
}

#[test]
fn state_entries_lie_as_they_did_in_version_1() {
    let mut kv = MemoryKv::default();
    let mut overlay = Overlay::new(&kv);
    for request in fixed_requests() {
        apply(ShardId(3), &mut overlay, &request).unwrap();
    }
    let writes = overlay.into_writes();
    kv.write(writes);
    assert_golden("state-v1.txt", &dump(&kv));
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
fn object_head_is_a_prefix_of_object_record() {
    let mut whole = record(inline(b"payload"), 7, "etag");
    whole.part_sizes = vec![1, 2, 3];
    whole.meta.storage_class = "COLD".to_owned();
    whole.meta.user = vec![("a".to_owned(), "b".to_owned())];
    let head = ObjectHead::decode(&encode(&whole).unwrap()).unwrap();
    let read = (head.etag, head.size_bytes, head.part_sizes, head.meta, head.owner);
    assert_eq!(read, (whole.etag, whole.size_bytes, whole.part_sizes, whole.meta, whole.owner));
}
