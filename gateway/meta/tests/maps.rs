//! The cluster map in the root shard goes out as a difference to who has one of the last maps.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::maps::KEPT_DIFFS;
use granary_meta::memory::MemoryShard;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, PlacementGroupId, ShardId};
use granary_placement::map::{
    apply_diff, deal_hash_slots, ClusterMap, Disk, DiskState, GroupSlot, Location, PlacementGroup, Roles, ShardReplicas,
};
use granary_placement::scheme::{FailureDomain, Scheme};
use scenery::{request, Random};
use std::collections::BTreeMap;

/// A valid map of `disks` servers with one disk each, and forty groups on the first three.
fn first_map(disks: u32) -> ClusterMap {
    let disk = |number: u32| Disk {
        id: DiskId(number),
        uuid: DiskUuid(u128::from(number).to_be_bytes()),
        address: format!("10.0.0.1:{}", 9000 + number),
        location: Location { zone: "z".into(), rack: "r".into(), server: format!("s{number}") },
        weight: 100,
        roles: Roles { storage: true, metadata: true },
        state: DiskState::In,
    };
    let slots: Vec<GroupSlot> = (1..=3).map(|number| GroupSlot::new(DiskId(number))).collect();
    let group = PlacementGroup { scheme: "2+1".into(), slots };
    let map = ClusterMap {
        cluster_id: ClusterId([0xc1; 16]),
        epoch: Epoch(1),
        next_disk_id: disks + 1,
        disks: (1..=disks).map(|number| (DiskId(number), disk(number))).collect(),
        schemes: BTreeMap::from([("2+1".into(), Scheme::new(2, 1, FailureDomain::Server).unwrap())]),
        default_scheme: "2+1".into(),
        groups: (0..40).map(|number| (PlacementGroupId(number), group.clone())).collect(),
        shards: vec![ShardReplicas { members: vec![DiskId(1)] }; 3],
        slot_shards: deal_hash_slots(2),
    };
    map.validate().unwrap();
    map
}

/// Some weights and slots change.
fn changed(map: &ClusterMap, random: &mut Random) -> ClusterMap {
    let mut next = map.clone();
    next.epoch = Epoch(map.epoch.0 + 1);
    for _ in 0..1 + random.below(2) {
        let disk = DiskId(1 + random.below(4) as u32);
        next.disks.get_mut(&disk).unwrap().weight = random.below(500) as u32;
        let group = next.groups.get_mut(&PlacementGroupId(random.below(40) as u32)).unwrap();
        let free = (1..=4).map(DiskId).find(|disk| group.slots.iter().all(|slot| slot.current != *disk)).unwrap();
        group.slots[random.below(3) as usize] = GroupSlot::new(free);
    }
    next.validate().unwrap();
    next
}

struct Root {
    shard: MemoryShard,
    random: Random,
}

impl Root {
    fn new(seed: u64) -> Root {
        Root { shard: MemoryShard::new(ShardId::ROOT), random: Random(seed) }
    }

    fn set(&mut self, map: &ClusterMap) -> Reply {
        let sent = request(&mut self.random, 1, Command::SetMap { map: Box::new(map.clone()) });
        self.shard.apply(&sent).unwrap()
    }

    fn get(&self, newer_than: u64) -> Answer {
        self.shard.answer(&Query::GetMap { newer_than: Epoch(newer_than) }).unwrap()
    }
}

#[test]
fn every_older_map_leads_to_the_newest_by_differences_or_the_whole() {
    let seed = scenery::seed("every_older_map_leads_to_the_newest_by_differences_or_the_whole");
    let mut root = Root::new(seed);
    let mut random = Random(seed);
    assert_eq!(root.get(0), Answer::NoMap);
    let mut maps = vec![first_map(4)];
    assert_eq!(root.set(&maps[0]), Reply::Done);
    for _ in 0..100 {
        let next = changed(maps.last().unwrap(), &mut random);
        assert_eq!(root.set(&next), Reply::Done);
        maps.push(next);
    }
    let newest = maps.last().unwrap();
    let (mut by_diffs, mut whole) = (0, 0);
    for known in &maps[..100] {
        match root.get(known.epoch.0) {
            Answer::MapDiffs(diffs) => {
                by_diffs += 1;
                assert_eq!(diffs.len() as u64, newest.epoch.0 - known.epoch.0, "seed {seed}");
                let reached = diffs.iter().fold(known.clone(), |map, diff| apply_diff(&map, diff).unwrap());
                assert_eq!(reached, *newest, "seed {seed}");
            }
            Answer::Map(map) => {
                whole += 1;
                assert_eq!(*map, *newest, "seed {seed}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(by_diffs >= 5 && whole as u64 >= 100 - KEPT_DIFFS, "{by_diffs} by differences, {whole} whole");
    assert_eq!(root.get(0), Answer::Map(Box::new(newest.clone())), "0 asks for the whole");
    assert_eq!(root.get(101), Answer::MapUnchanged);
    assert_eq!(root.get(200), Answer::MapUnchanged);
}

#[test]
fn differences_are_kept_for_the_last_epochs_only() {
    let mut root = Root::new(5);
    let mut map = first_map(4);
    root.set(&map);
    for _ in 0..80 {
        map.epoch = Epoch(map.epoch.0 + 1);
        root.set(&map);
    }
    let kept = root.shard.kv.entries.keys().filter(|key| key.get(2) == Some(&b'X')).count();
    assert_eq!(kept as u64, KEPT_DIFFS);
    // Of a large map whose changes are nothing: differences as far back as there are any.
    let mut root = Root::new(6);
    let mut map = first_map(60);
    root.set(&map);
    for _ in 0..80 {
        map.epoch = Epoch(map.epoch.0 + 1);
        root.set(&map);
    }
    assert!(matches!(root.get(81 - KEPT_DIFFS), Answer::MapDiffs(diffs) if diffs.len() as u64 == KEPT_DIFFS));
    assert!(matches!(root.get(80 - KEPT_DIFFS), Answer::Map(_)));
    let mut other = map.clone();
    other.epoch = Epoch(90);
    assert_eq!(root.set(&other), Reply::EpochConflict { current: Epoch(81) });
    other.cluster_id = ClusterId([9; 16]);
    assert!(matches!(root.set(&other), Reply::Refused(_)));
}
