//! Each rule of the cluster map is refused with its own error, and the message says what to do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::id::{DiskId, Epoch, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, DiskState, GroupSlot, MapError, SlotRange};
use granary_placement::scheme::FailureDomain;
use place_support::{cluster, place, scheme, uniform};

fn good() -> ClusterMap {
    cluster(uniform(1, 1, 6, 2), scheme(4, 2, FailureDomain::Server))
}

fn disk(map: &mut ClusterMap, id: u32) -> &mut granary_placement::map::Disk {
    map.disks.get_mut(&DiskId(id)).unwrap()
}

fn slots(map: &mut ClusterMap) -> &mut Vec<GroupSlot> {
    &mut map.groups.get_mut(&PlacementGroupId(0)).unwrap().slots
}

/// A way to break a map, the name of the rule that must notice, and what the message must say.
type Case = (fn(&mut ClusterMap), fn(&MapError) -> bool, &'static str);

#[test]
fn every_broken_rule_is_named() {
    let cases: Vec<Case> = vec![
        (|map| map.epoch = Epoch(0), |e| matches!(e, MapError::EpochZero), "epoch 1"),
        (|map| disk(map, 3).id = DiskId(4), |e| matches!(e, MapError::DiskKey { .. }), "must be the same"),
        (|map| map.next_disk_id = 12, |e| matches!(e, MapError::NextDiskId { .. }), "above all ids"),
        (|map| disk(map, 3).uuid = disk(map, 1).uuid, |e| matches!(e, MapError::SameUuid { .. }), "disks 1 and 3"),
        (
            |map| disk(map, 3).address = disk(map, 1).address.clone(),
            |e| matches!(e, MapError::SameAddress { .. }),
            "disks 1 and 3",
        ),
        (|map| disk(map, 3).address = "10.0.0.1".into(), |e| matches!(e, MapError::BadAddress { .. }), "host:port"),
        (|map| disk(map, 3).address = "h:0".into(), |e| matches!(e, MapError::BadAddress { .. }), "host:port"),
        (|map| disk(map, 3).address = "::1:9100".into(), |e| matches!(e, MapError::BadAddress { .. }), "host:port"),
        (
            |map| disk(map, 3).location.rack = " ".into(),
            |e| matches!(e, MapError::EmptyName { domain: "rack", .. }),
            "give it any name",
        ),
        (
            |map| {
                let scheme = map.schemes["standard"];
                map.schemes.insert(String::new(), scheme);
            },
            |e| matches!(e, MapError::EmptySchemeName),
            "empty name",
        ),
        (
            |map| map.schemes.get_mut("standard").unwrap().unit_bytes = 1,
            |e| matches!(e, MapError::BadScheme { .. }),
            "65536",
        ),
        (|map| map.default_scheme = "gone".into(), |e| matches!(e, MapError::NoSuchScheme(_)), "`gone`"),
        (
            |map| map.groups.get_mut(&PlacementGroupId(0)).unwrap().scheme = "gone".into(),
            |e| matches!(e, MapError::NoSuchScheme(_)),
            "`gone`",
        ),
        (|map| map.groups.clear(), |e| matches!(e, MapError::NoGroups(_)), "lay it out"),
        (|map| slots(map).truncate(5), |e| matches!(e, MapError::Width { slots: 5, width: 6, .. }), "has 5 slots"),
        (
            |map| slots(map)[2].current = DiskId(99),
            |e| matches!(e, MapError::SlotWithoutDisk { slot: 2, .. }),
            "not in the map",
        ),
        (
            |map| {
                let id = slots(map)[2].current.0;
                disk(map, id).state = DiskState::Out;
            },
            |e| matches!(e, MapError::SlotOnOutDisk { slot: 2, .. }),
            "rebalance or replace",
        ),
        (
            |map| {
                let id = slots(map)[2].current.0;
                disk(map, id).state = DiskState::Away;
            },
            |e| matches!(e, MapError::SlotOnOutDisk { slot: 2, .. }),
            "out or away",
        ),
        (
            |map| {
                let id = slots(map)[2].current.0;
                disk(map, id).roles.storage = false;
            },
            |e| matches!(e, MapError::SlotWithoutRole { slot: 2, .. }),
            "storage role",
        ),
        (|map| slots(map)[2] = slots(map)[0], |e| matches!(e, MapError::SameDisk { .. }), "two slots"),
        (
            |map| {
                for slot in 0..3 {
                    let id = slots(map)[slot].current.0;
                    disk(map, id).location = place(0, 0, 9);
                }
            },
            |e| matches!(e, MapError::Domain { chunks: 3, limit: 2, .. }),
            "3 chunks in server zone-0/rack-0/server-9",
        ),
        (|map| map.shards.truncate(1), |e| matches!(e, MapError::NoObjectShard(1)), "at least one shard for objects"),
        (
            |map| map.shards[1].members.clear(),
            |e| matches!(e, MapError::Replicas { shard: ShardId(1), members: 0 }),
            "1, 3 or 5",
        ),
        (
            |map| map.shards[1].members = vec![DiskId(1), DiskId(2)],
            |e| matches!(e, MapError::Replicas { .. }),
            "1, 3 or 5",
        ),
        (
            |map| map.shards[1].members = vec![DiskId(1), DiskId(2), DiskId(1)],
            |e| matches!(e, MapError::SameReplica { disk: DiskId(1), .. }),
            "twice",
        ),
        (
            |map| map.shards[1].members = vec![DiskId(99)],
            |e| matches!(e, MapError::ReplicaWithoutDisk { .. }),
            "not in the map",
        ),
        (
            |map| {
                let id = map.shards[1].members[0].0;
                disk(map, id).roles.metadata = false;
            },
            |e| matches!(e, MapError::ReplicaWithoutRole { .. }),
            "metadata role",
        ),
        (
            |map| slots(map)[2].previous = Some(DiskId(99)),
            |e| matches!(e, MapError::SlotWithoutDisk { slot: 2, disk: DiskId(99), .. }),
            "not in the map",
        ),
        (
            |map| slots(map)[2].previous = Some(slots(map)[0].current),
            |e| matches!(e, MapError::PreviousInUse { slot: 2, .. }),
            "finish that move first",
        ),
        (
            |map| slots(map)[2].previous = Some(slots(map)[2].current),
            |e| matches!(e, MapError::PreviousInUse { slot: 2, .. }),
            "another slot",
        ),
        (|map| map.slot_shards.clear(), |e| matches!(e, MapError::HashSlotZero), "must begin with it"),
        (|map| map.slot_shards[0].first = HashSlot(1), |e| matches!(e, MapError::HashSlotZero), "hash slot 0"),
        (
            |map| map.slot_shards.push(SlotRange { first: HashSlot(4096), shard: ShardId(1) }),
            |e| matches!(e, MapError::HashSlotOrder(HashSlot(4096))),
            "below 4096",
        ),
        (
            |map| {
                let first = map.slot_shards[1].first;
                map.slot_shards.push(SlotRange { first, shard: ShardId(1) });
            },
            |e| matches!(e, MapError::HashSlotOrder(_)),
            "above the range before",
        ),
        (
            |map| map.slot_shards[0].shard = ShardId::ROOT,
            |e| matches!(e, MapError::HashSlotShard { shard: ShardId::ROOT, .. }),
            "no object shard",
        ),
        (
            |map| map.slot_shards[0].shard = ShardId(99),
            |e| matches!(e, MapError::HashSlotShard { shard: ShardId(99), .. }),
            "no object shard",
        ),
        (
            |map| {
                map.slot_shards.push(SlotRange { first: HashSlot(4000), shard: map.slot_shards.last().unwrap().shard })
            },
            |e| matches!(e, MapError::HashSlotSplit(HashSlot(4000))),
            "make them one",
        ),
    ];
    assert_eq!(good().validate(), Ok(()));
    for (number, (break_it, expected, message)) in cases.into_iter().enumerate() {
        let mut map = good();
        break_it(&mut map);
        let error = map.validate().expect_err(&format!("case {number} ({message}) was accepted"));
        assert!(expected(&error), "case {number}: {error:?}");
        assert!(error.to_string().contains(message), "case {number}: `{error}` does not say `{message}`");
    }
}

#[test]
fn the_domain_limit_is_of_the_kind_that_the_scheme_names() {
    let crowd = |kind, location: fn(usize) -> granary_placement::map::Location| {
        let mut map = cluster(uniform(1, 1, 1, 8), scheme(4, 2, FailureDomain::Disk));
        for (number, disk) in map.disks.values_mut().enumerate() {
            disk.location = location(number);
        }
        map.schemes.get_mut("standard").unwrap().failure_domain = kind;
        map.validate()
    };
    // Eight servers in two racks of one zone.
    let location = |number| place(0, number % 2, number);
    assert_eq!(crowd(FailureDomain::Disk, location), Ok(()));
    assert_eq!(crowd(FailureDomain::Server, location), Ok(()));
    assert!(matches!(crowd(FailureDomain::Rack, location), Err(MapError::Domain { kind: "rack", .. })));
    assert!(matches!(crowd(FailureDomain::Zone, location), Err(MapError::Domain { kind: "zone", .. })));
    // The same names in another zone are other racks and servers.
    assert_eq!(crowd(FailureDomain::Rack, |number| place(number, 0, 0)), Ok(()));
}

#[test]
fn a_disk_that_is_out_leaves_its_address_free_and_keeps_its_uuid() {
    let mut map = good();
    let (next, _) = granary_placement::place::replace_disk(&map, DiskId(1), place_support::uuid(500), None).unwrap();
    assert_eq!(next.validate(), Ok(()));
    disk(&mut map, 1).state = DiskState::Draining;
    assert_eq!(map.validate(), Ok(()), "a draining disk still holds its slots");
}
