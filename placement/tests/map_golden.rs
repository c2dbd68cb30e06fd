//! The JSON form of the cluster map, docs/formats/cluster-map.md: what was written yesterday is read today.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::id::{DiskId, HashSlot, HASH_SLOTS};
use granary_placement::map::{deal_hash_slots, ClusterMap, DiskState};
use granary_placement::place::replace_disk;
use granary_placement::scheme::FailureDomain;
use place_support::{order, scheme, uniform, uuid};

const GOLDEN: &str = include_str!("fixtures/cluster-map.json");

#[test]
fn the_golden_map_reads_validates_and_writes_back_the_same() {
    let map: ClusterMap = serde_json::from_str(GOLDEN).unwrap();
    assert_eq!(map.validate(), Ok(()));
    assert_eq!(serde_json::to_string_pretty(&map).unwrap().trim(), GOLDEN.trim());
    assert_eq!((map.epoch.0, map.next_disk_id, map.disks.len()), (2, 5, 4));
    assert_eq!(map.disks[&DiskId(2)].state, DiskState::Out);
    assert_eq!(map.schemes["standard"].failure_domain, FailureDomain::Server);
}

#[test]
fn placement_still_makes_the_golden_map() {
    // Placement may be improved, and then this fixture changes; a change nobody meant shows here.
    let mut new = order(uniform(1, 1, 3, 1), scheme(2, 1, FailureDomain::Server), 4);
    (new.replicas, new.object_shards) = (Some(3), 2);
    let map = granary_placement::place::new_map(new).unwrap();
    let (map, _) = replace_disk(&map, DiskId(2), uuid(9), None).unwrap();
    let text = serde_json::to_string_pretty(&map).unwrap();
    if std::env::var_os("GRANARY_WRITE_GOLDEN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/cluster-map.json");
        std::fs::write(path, format!("{text}\n")).unwrap();
    }
    assert_eq!(text.trim(), GOLDEN.trim());
}

#[test]
fn unknown_states_and_bad_ids_are_refused() {
    for (from, to) in
        [("\"out\"", "\"retired\""), ("\"np16\"", "\"rs8\""), ("\"2\": {", "\"two\": {"), ("\"07070707", "\"xx070707")]
    {
        assert!(GOLDEN.contains(from), "{from}");
        assert!(serde_json::from_str::<ClusterMap>(&GOLDEN.replace(from, to)).is_err(), "{to} was accepted");
    }
}

#[test]
fn keys_keep_their_shard() {
    // The table in docs/formats/cluster-map.md, computed by an independent script. A change would lose every object.
    let mut map: ClusterMap = serde_json::from_str(GOLDEN).unwrap();
    let keys = ["", "a", "b", "backup/2026-01-01.vbk", "\u{e9}"];
    assert_eq!(keys.map(|key| HashSlot::of(7, key).0), [2089, 2046, 3123, 3196, 1783]);
    let owners = |map: &ClusterMap| keys.map(|key| map.shard_of(7, key).unwrap().0);
    assert_eq!(owners(&map), [2, 1, 2, 2, 1]);
    map.shards.resize(17, map.shards[0].clone());
    map.slot_shards = deal_hash_slots(16);
    assert_eq!(owners(&map), [9, 8, 13, 13, 7]);
}

#[test]
fn hash_slots_are_dealt_evenly_and_in_order_and_every_slot_has_its_shard() {
    let mut map: ClusterMap = serde_json::from_str(GOLDEN).unwrap();
    for shards in [1, 2, 3, 7, 16, 100, 4095, HASH_SLOTS] {
        map.shards.resize(usize::from(shards) + 1, map.shards[0].clone());
        map.slot_shards = deal_hash_slots(shards);
        assert_eq!(map.validate(), Ok(()), "{shards} shards");
        let mut slots = vec![0u16; usize::from(shards) + 1];
        let owners: Vec<u16> = (0..HASH_SLOTS).map(|slot| map.shard_of_slot(HashSlot(slot)).unwrap().0).collect();
        owners.iter().for_each(|shard| slots[usize::from(*shard)] += 1);
        assert!(owners.is_sorted() && slots[0] == 0, "{shards} shards");
        let (least, most) = (slots[1..].iter().min().unwrap(), slots[1..].iter().max().unwrap());
        assert!(*least > 0 && most - least <= 1, "{shards} shards: {least} to {most} slots");
    }
}

#[test]
fn keys_spread_evenly_over_shards() {
    let mut map: ClusterMap = serde_json::from_str(GOLDEN).unwrap();
    map.shards.resize(17, map.shards[0].clone());
    map.slot_shards = deal_hash_slots(16);
    let mut count = [0u32; 17];
    for number in 0..160_000 {
        count[usize::from(map.shard_of(7, &format!("vm-{}/disk-{number:08}.blk", number % 40)).unwrap().0)] += 1;
    }
    assert_eq!(count[0], 0, "the root shard holds no objects");
    assert!(count[1..].iter().all(|keys| (9_500..10_500).contains(keys)), "{count:?}");
}
