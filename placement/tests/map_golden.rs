//! The JSON form of the cluster map, docs/formats/cluster-map.md: what was written yesterday is read today.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
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
    assert_eq!(serde_json::to_string_pretty(&map).unwrap().trim(), GOLDEN.trim());
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
    let owners = |map: &ClusterMap| keys.map(|key| map.shard_of(7, key).unwrap().0);
    assert_eq!(owners(&map), [2, 1, 2, 2, 1]);
    map.shards.resize(17, map.shards[0].clone());
    assert_eq!(owners(&map), [9, 8, 13, 13, 7]);
}

#[test]
fn keys_spread_evenly_over_shards() {
    let mut map: ClusterMap = serde_json::from_str(GOLDEN).unwrap();
    map.shards.resize(17, map.shards[0].clone());
    let mut count = [0u32; 17];
    for number in 0..160_000 {
        count[usize::from(map.shard_of(7, &format!("vm-{}/disk-{number:08}.blk", number % 40)).unwrap().0)] += 1;
    }
    assert_eq!(count[0], 0, "the root shard holds no objects");
    assert!(count[1..].iter().all(|keys| (9_500..10_500).contains(keys)), "{count:?}");
}
