//! How long a lost disk takes to rebuild, by its busiest helper, on maps that placement itself makes and changes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::durability::{Groups, Rebuild};
use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
use granary_placement::place::{new_map, substitute};
use granary_placement::scheme::FailureDomain;
use place_support::{loads, order, scheme, set_state, uniform};
use std::collections::BTreeSet;

const TB: f64 = 1e12;
const MB: f64 = 1e6;

/// 8+3 on so many servers of 20 disks, 25 servers a rack.
fn map(racks: usize, slots_per_disk: u32) -> ClusterMap {
    new_map(order(uniform(1, racks, 25, 20), scheme(8, 3, FailureDomain::Server), slots_per_disk)).unwrap()
}

/// The fullest disk goes away, as the healer takes it out.
fn lose_fullest(map: &ClusterMap) -> Rebuild {
    let fullest = loads(map).into_iter().max_by_key(|(disk, load)| (*load, *disk)).unwrap().0;
    let mut away = map.clone();
    set_state(&mut away, fullest, DiskState::Away);
    let after = substitute(&away, &BTreeSet::new()).unwrap();
    Rebuild::between(map, &after, &BTreeSet::from([fullest]))
}

#[test]
fn ten_thousand_disks_share_evenly_and_each_slot_of_a_lost_one_goes_to_another() {
    let map = map(20, 50);
    assert_eq!((map.disks.len(), map.groups.len()), (10_000, 45_455));
    let (loads, mean) = (loads(&map), map.groups.len() as f64 * 11.0 / 10_000.0);
    let off = loads.values().map(|load| (*load as f64 - mean).abs() / mean).fold(0.0, f64::max);
    assert!(off <= 0.05, "a disk is {off} from its share");

    let rebuild = lose_fullest(&map);
    let most = *loads.values().max().unwrap();
    assert_eq!((rebuild.slots, rebuild.other_moves, rebuild.takers), (most, 0, most), "{rebuild:?}");
    assert!(rebuild.helpers > 10 * most, "{rebuild:?}");
    // Written and read back on its new disk, and eight read: ten slots' worth for each.
    assert!((rebuild.total - 10.0 * most as f64).abs() < 1e-6, "{rebuild:?}");
    // The busiest disk takes one slot over and reads for a few others.
    assert!(rebuild.busiest <= 2.0 + 4.0 * 0.8, "{rebuild:?}");
    // With 16 TB, 60 MB/s and 50 slots that single slot takes hours, however many disks there are: what limits it is
    // the number of slots, not of disks.
    let hours = rebuild.hours(16.0 * TB, 60.0 * MB);
    assert!((2.9..7.8).contains(&hours), "{hours}");
    assert!(rebuild.even_hours(16.0 * TB, 60.0 * MB, 9_999) < 0.08, "{rebuild:?}");
    assert_eq!(Rebuild::fewest_slots(0.5, 16.0 * TB, 60.0 * MB), 297.0);
    // What 50 slots can do in half an hour by this arithmetic: 2 TB a disk.
    let half_hour = 0.5 / rebuild.hours(1.0, 60.0 * MB);
    assert!(half_hour > 1.0 * TB, "{half_hour:e}");
}

#[test]
fn more_slots_bring_the_busiest_disk_nearer_to_the_mean() {
    let times_the_mean = |slots| {
        let rebuild = lose_fullest(&map(2, slots));
        rebuild.busiest / (rebuild.total / 999.0)
    };
    let (few, many) = (times_the_mean(50), times_the_mean(400));
    assert!(few < 12.0 && many < 3.5, "{few} and {many} times the mean");
}

#[test]
fn a_server_that_is_lost_is_read_once_for_all_chunks_that_a_group_had_on_it() {
    // Ten servers: some groups have two chunks on one.
    let map = new_map(order(uniform(1, 1, 10, 10), scheme(8, 3, FailureDomain::Server), 50)).unwrap();
    let layout = Groups::of_map(&map, "standard").unwrap().layout().unwrap();
    assert_eq!((layout.disks, layout.servers, layout.groups, layout.chunks_per_server), (100, 10, 455, 2));
    let lost: BTreeSet<DiskId> = (1..=10).map(DiskId).collect();
    let mut away = map.clone();
    lost.iter().for_each(|disk| set_state(&mut away, *disk, DiskState::Away));
    let after = substitute(&away, &BTreeSet::new()).unwrap();
    let rebuild = Rebuild::between(&map, &after, &lost);
    let chunks_lost = |group: &&granary_placement::map::PlacementGroup| {
        group.slots.iter().filter(|slot| lost.contains(&slot.current)).count()
    };
    let concerned = map.groups.values().filter(|group| chunks_lost(group) > 0).count();
    let slots: usize = map.groups.values().map(|group| chunks_lost(&group)).sum();
    assert!(slots > concerned, "{slots} slots in {concerned} groups");
    assert_eq!((rebuild.slots, rebuild.other_moves, rebuild.lost), (slots, 0, 10));
    assert!((rebuild.total - (2 * slots + 8 * concerned) as f64).abs() < 1e-6, "{rebuild:?}");
}

#[test]
fn pairs_that_share_a_group_are_counted_one_by_one() {
    let map = map(2, 50);
    let mut pairs = BTreeSet::new();
    for group in map.groups.values() {
        for one in &group.slots {
            pairs.extend(
                group.slots.iter().map(|other| (one.current, other.current)).filter(|(one, other)| one < other),
            );
        }
    }
    let layout = Groups::of_map(&map, "standard").unwrap().layout().unwrap();
    assert_eq!(layout.pairs, pairs.len() as u64);
    // As many as chance would give, within three percent.
    let mixed = granary_placement::durability::Layout::mixed(1_000, 50, layout.groups, 11, 1);
    assert!((layout.pairs as f64 / mixed.pairs as f64 - 1.0).abs() < 0.03, "{} and {}", layout.pairs, mixed.pairs);
}
