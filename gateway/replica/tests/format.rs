//! The bytes that are kept: a change here is a change of docs/formats/metadata.md, a new version, and a way to read the
//! old one.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::codec::encode;
use granary_meta::message::{decode_batch, encode_batch, encode_request};
use granary_meta::record::{AccountId, BucketId, ExtentRef, ObjectData};
use granary_meta::{ChunkRef, Command, Conditions, MetaRequest};
use granary_placement::id::{DiskId, Epoch, ExtentId, PlacementGroupId};
use granary_placement::scheme::CodecId;
use granary_replica::message::{
    decode_entry, decode_message, encode_entry, encode_message, MetadataIdentity, PeerMessage, PeerRequest, ReplicaId,
    ReplicaRecord, WireEntry, WireLogId, WirePayload, WireVote,
};
use scenery::{inline, record, Random};

/// A replica of that disk.
fn id(disk: u32) -> ReplicaId {
    ReplicaId { disk: DiskId(disk), incarnation: 0x1122_3344_5566_7788 + u64::from(disk) }
}

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
            stamp_ms: Some(2_000),
            account: AccountId::ROOT,
            command,
        })
        .collect()
}

#[test]
fn log_entries_and_messages_lie_as_they_did_in_version_1() {
    let requests: Vec<Vec<u8>> = fixed_requests().iter().map(|request| encode_request(request).unwrap()).collect();
    let batch = encode_batch(requests.iter().map(Vec::as_slice));
    assert_eq!(decode_batch(&batch).unwrap(), fixed_requests());
    let entry = WireEntry { id: WireLogId { term: 2, node: id(4), index: 300 }, payload: WirePayload::Batch(batch) };
    let bytes = encode_entry(3, &entry).unwrap();
    assert_eq!(decode_entry(3, 300, &bytes).unwrap(), entry);
    let vote = PeerRequest::Vote {
        vote: WireVote { term: 9, node: id(2), committed: false },
        last: Some(WireLogId { term: 8, node: id(1), index: 77 }),
        transfer: false,
        pre_vote: true,
    };
    let message = PeerMessage { from: id(2), to: Some(id(3)), request: vote };
    let identity = MetadataIdentity { disk: DiskId(4), number: 0x0102_0304_0506_0708, replaces: Some(9) };
    let record = ReplicaRecord { incarnation: 0x0102_0304_0506_0708 };
    let lines =
        [bytes, encode_message(&message).unwrap().to_vec(), encode(&identity).unwrap(), encode(&record).unwrap()];
    let lines: String = lines.iter().map(|bytes| hex::encode(bytes) + "\n").collect();
    assert_golden("log-v1.txt", &lines);
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
fn damaged_log_entries_are_seen() {
    let entry = WireEntry { id: WireLogId { term: 2, node: id(4), index: 300 }, payload: WirePayload::Blank };
    let bytes = encode_entry(3, &entry).unwrap();
    assert!(decode_entry(4, 300, &bytes).is_err() && decode_entry(3, 301, &bytes).is_err());
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            assert!(decode_entry(3, 300, &bad).is_err(), "bit {bit} of byte {at}");
        }
        assert!(decode_entry(3, 300, &bytes[..at]).is_err());
    }
    let mut random = Random(1);
    for _ in 0..10_000 {
        let junk: Vec<u8> = (0..random.below(40)).map(|_| random.next() as u8).collect();
        let _ = decode_message::<PeerMessage>(&junk);
        let _ = decode_batch(&junk);
    }
}
