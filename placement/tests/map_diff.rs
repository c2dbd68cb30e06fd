//! A difference between two maps leads from the one to the other and nowhere else.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::id::{ClusterId, DiskId, Epoch, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{apply_diff, diff, ClusterMap, DiskState, MapError, SlotChange, SlotRange};
use granary_placement::place::{add_scheme, rebalance, replace_disk};
use granary_placement::scheme::FailureDomain;
use place_support::{add_disk, cluster, new_disk, place, scheme, seeds, set_state, settled, uniform, uuid, Random};

/// A change as operators and healers make them; None when there is no room for it.
fn changed(random: &mut Random, map: &ClusterMap, step: u32) -> Option<ClusterMap> {
    let disks: Vec<DiskId> =
        map.disks.values().filter(|disk| disk.state == DiskState::In).map(|disk| disk.id).collect();
    let any = *random.pick(&disks);
    let mut next = map.clone();
    match random.below(8) {
        0 => return replace_disk(map, any, uuid(5000 + step), None).ok().map(|(map, _)| map),
        1 => return add_scheme(map, &format!("more-{step}"), scheme(2, 1, FailureDomain::Disk), 3).ok(),
        2 => set_state(&mut next, any, *random.pick(&[DiskState::Out, DiskState::Draining])),
        3 => {
            add_disk(&mut next, new_disk(1000 + step, place(0, 0, 50 + step as usize), 1000));
        }
        4 => {
            next = settled(next);
            next.epoch.0 += 1;
            return Some(next);
        }
        5 => {
            // The upper half of a shard's hash slots goes to another shard.
            let place = random.below(next.slot_shards.len() as u64) as usize;
            let (first, shard) = (next.slot_shards[place].first.0, next.slot_shards[place].shard);
            let end = next.slot_shards.get(place + 1).map_or(4096, |range| range.first.0);
            let other = (1..next.shards.len() as u16).map(ShardId).find(|other| *other != shard).unwrap();
            if end - first > 1 {
                next.slot_shards.insert(place + 1, SlotRange { first: HashSlot((first + end) / 2), shard: other });
                next.slot_shards.dedup_by_key(|range| range.shard);
            }
            next.epoch.0 += 1;
            return Some(next);
        }
        6 => {
            let shards = random.between(2, 6) as usize;
            let last = next.shards.last().unwrap().clone();
            next.shards.resize(shards + 1, last);
            next.slot_shards = granary_placement::map::deal_hash_slots(shards as u16);
            // Several changes in one difference.
            next.epoch.0 += random.between(1, 5);
            next.schemes.retain(|name, _| next.groups.values().any(|group| group.scheme == *name));
            return Some(next);
        }
        _ => next.disks.get_mut(&any).unwrap().weight = *random.pick(&[500, 1500]),
    }
    rebalance(&next).ok()
}

#[test]
fn a_difference_leads_from_the_old_map_to_the_new_one() {
    let mut differences = 0;
    for seed in seeds(20) {
        let mut random = Random::new(seed);
        let mut map = cluster(uniform(1, 2, 4, 3), scheme(4, 2, FailureDomain::Server));
        let first = map.clone();
        for step in 0..10 {
            let Some(next) = changed(&mut random, &map, step) else { continue };
            if next.validate().is_err() {
                continue;
            }
            let scene = format!("seed {seed} step {step}");
            let step = diff(&map, &next);
            assert_eq!(apply_diff(&map, &step).as_ref(), Ok(&next), "{scene}");
            assert_eq!(apply_diff(&first, &diff(&first, &next)).as_ref(), Ok(&next), "{scene}: from the first");
            // What travels is what was made.
            let bytes = postcard::to_stdvec(&step).unwrap();
            assert_eq!(postcard::from_bytes::<granary_placement::map::MapDiff>(&bytes).unwrap(), step, "{scene}");
            if map != first {
                let wrong = apply_diff(&first, &step);
                assert_eq!(wrong, Err(MapError::DiffBase { from: map.epoch, have: first.epoch }), "{scene}");
            }
            map = next;
            differences += 1;
        }
    }
    assert!(differences > 80, "{differences} differences");
}

#[test]
fn a_change_of_few_slots_is_a_small_difference() {
    let map = cluster(uniform(1, 5, 5, 4), scheme(8, 4, FailureDomain::Server));
    let (next, new) = replace_disk(&map, DiskId(17), uuid(900), None).unwrap();
    let small = diff(&map, &next);
    let held = map.groups.values().flat_map(|group| &group.slots).filter(|slot| slot.current == DiskId(17)).count();
    assert_eq!((small.slots.len(), small.groups.set.len(), small.disks.set.len()), (held, 0, 2));
    assert!(small.slots.iter().all(|change| change.to.current == new && change.to.previous == Some(DiskId(17))));
    let (small, whole) = (postcard::to_stdvec(&small).unwrap().len(), postcard::to_stdvec(&next).unwrap().len());
    assert!(small * 10 < whole, "{small} of {whole} bytes");
}

#[test]
fn a_difference_that_does_not_fit_is_refused() {
    let old = cluster(uniform(1, 1, 6, 2), scheme(4, 2, FailureDomain::Server));
    let (new, _) = replace_disk(&old, DiskId(3), uuid(900), None).unwrap();
    let good = diff(&old, &new);
    assert_eq!(apply_diff(&old, &good).as_ref(), Ok(&new));
    let refused = |change: fn(&mut granary_placement::map::MapDiff)| {
        let mut bad = good.clone();
        change(&mut bad);
        apply_diff(&old, &bad).unwrap_err()
    };
    assert_eq!(refused(|diff| diff.cluster_id = ClusterId([9; 16])), MapError::Diff("is of another cluster"));
    assert_eq!(refused(|diff| diff.from = Epoch(7)), MapError::DiffBase { from: Epoch(7), have: Epoch(1) });
    assert_eq!(refused(|diff| diff.to = Epoch(1)), MapError::Diff("does not lead to a newer map"));
    let unknown = |diff: &mut granary_placement::map::MapDiff| {
        let to = diff.slots[0].to;
        diff.slots.push(SlotChange { group: PlacementGroupId(99_999), slot: 0, to });
    };
    assert_eq!(refused(unknown), MapError::Diff("changes a slot that the map does not have"));
    assert_eq!(
        refused(|diff| diff.disks.gone.push(DiskId(99))),
        MapError::Diff("takes away what the map does not have")
    );
    assert_eq!(refused(|diff| diff.shard_count += 1), MapError::Diff("has another number of shards than it says"));
    assert_eq!(refused(|diff| diff.shard_count = u32::MAX), MapError::TooManyShards(u32::MAX as usize));
    // It fits, and what comes out is no valid map.
    assert!(matches!(refused(|diff| diff.slots.truncate(1)), MapError::SlotOnOutDisk { .. }));
}
