//! The bytes of version 1, pinned: what an earlier build wrote must be read for ever.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use granary_disk_node::store::format::{
    record_bytes, FormatError, RecordHeader, Seal, SegmentHeader, SegmentUuid, PAGE_BYTES,
};
use granary_placement::id::{DiskUuid, ExtentId, HashSlot, PlacementGroupId};
use granary_placement::scheme::CodecId;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

fn segment() -> SegmentHeader {
    SegmentHeader {
        number: 0x0102_0304,
        uuid: SegmentUuid([0xaa; 16]),
        disk: DiskUuid([0xbb; 16]),
        length_bytes: 0x1000_0000,
    }
}

fn seal() -> Seal {
    Seal { number: 0x0102_0304, uuid: SegmentUuid([0xaa; 16]), end: 0x0fff_f000 }
}

fn record() -> RecordHeader {
    let id = ChunkId { group: PlacementGroupId(0x0a0b_0c0d), extent: ExtentId([0xcc; 16]), index: 5, generation: 0x11 };
    let spec = ChunkSpec {
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 131_072,
        extent_len_bytes: 280_000,
        len_bytes: 70_016,
        owner: HashSlot(0x0709),
        created_ms: 0x0001_9000_0000_0000,
    };
    RecordHeader {
        segment: SegmentUuid([0xaa; 16]),
        offset: 0x2000,
        sequence: 77,
        id,
        spec,
        crcs: vec![0xdead_beef, 0x0123_4567],
    }
}

/// Everything up to the padding, as hex.
fn hex_of(page: &[u8]) -> String {
    let end = page.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    hex::encode(&page[..end])
}

#[test]
fn bytes_of_version_1_are_read_and_written_as_on_the_first_day() {
    let fixture = include_str!("fixtures/segment-v1.txt");
    let lines: Vec<&str> = fixture.lines().filter(|line| !line.starts_with('#')).collect();
    let page = |hex: &str| {
        let mut bytes = hex::decode(hex).unwrap();
        bytes.resize(PAGE_BYTES as usize, 0);
        bytes
    };
    let written = [hex_of(&segment().encode()), hex_of(&seal().encode()), hex_of(&record().encode())];
    assert_eq!(lines, written);
    assert_eq!(SegmentHeader::decode(&page(lines[0])), Ok(segment()));
    assert_eq!(Seal::decode(&page(lines[1])), Ok(seal()));
    assert_eq!(RecordHeader::decode(&page(lines[2])), Ok(record()));
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed() {
    let good = record().encode();
    let used = hex_of(&good).len() / 2;
    for byte in 0..used {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            assert!(RecordHeader::decode(&bad).is_err(), "byte {byte} bit {bit}");
        }
    }
    let good = segment().encode();
    for byte in 0..hex_of(&good).len() / 2 {
        let mut bad = good.clone();
        bad[byte] ^= 0x10;
        assert!(SegmentHeader::decode(&bad).is_err(), "byte {byte}");
    }
}

#[test]
fn a_newer_version_is_named_and_not_guessed_at() {
    let mut page = segment().encode();
    page[9] = 2;
    let crc = crc32fast::hash(&page[..56]);
    page[56..60].copy_from_slice(&crc.to_be_bytes());
    assert_eq!(SegmentHeader::decode(&page), Err(FormatError::Version { what: "segment header", version: 2 }));
}

#[test]
fn a_header_in_another_place_does_not_belong() {
    let header = record();
    assert!(header.belongs(&SegmentUuid([0xaa; 16]), 0x2000));
    assert!(!header.belongs(&SegmentUuid([0xaa; 16]), 0x3000));
    assert!(!header.belongs(&SegmentUuid([0xab; 16]), 0x2000));
    assert_eq!(header.end() - header.offset, record_bytes(70_016));
}

proptest! {
    #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]
    #[test]
    fn junk_is_an_error_and_never_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), magic in any::<bool>()) {
        if magic && bytes.len() > 16 {
            bytes[..8].copy_from_slice(b"GRNYREC\0");
            bytes[12..16].copy_from_slice(&2u32.to_be_bytes());
        }
        prop_assert!(RecordHeader::decode(&bytes).is_err());
        prop_assert!(SegmentHeader::decode(&bytes).is_err());
        prop_assert!(Seal::decode(&bytes).is_err());
        let _ = RecordHeader::region_hint(&bytes);
    }

    #[test]
    fn what_is_written_is_read_back(len in 1u64..4_000_000, sequence in any::<u64>(), index in any::<u8>()) {
        let mut header = record();
        header.spec.len_bytes = len;
        header.sequence = sequence;
        header.id.index = index;
        header.crcs = (0..len.div_ceil(65536) as u32).collect();
        prop_assert_eq!(RecordHeader::decode(&header.encode()), Ok(header));
    }
}
