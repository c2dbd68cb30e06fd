//! Placement at the size of a data centre: time, fairness, movement.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState, PlacementGroup};
use granary_placement::moves::moves;
use granary_placement::place::rebalance;
use granary_placement::scheme::FailureDomain;
use place_support::{add_disk, broken_rule, cluster, loads, most_in_one, new_disk, place, scheme, set_state, uniform};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Equal weights and no cap that binds: the fair share is the mean.
fn worst_share(map: &ClusterMap) -> f64 {
    let loads: Vec<usize> = loads(map).into_values().filter(|load| *load > 0).collect();
    let mean = loads.iter().sum::<usize>() as f64 / loads.len() as f64;
    loads.iter().map(|load| (*load as f64 - mean).abs() / mean).fold(0.0, f64::max)
}

fn timed<T>(what: &str, limit: Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    let took = start.elapsed();
    println!("{what}: {took:?}");
    assert!(took < limit, "{what} took {took:?}, allowed are {limit:?}");
    result
}

#[test]
fn a_thousand_disks_lose_a_disk_a_server_and_grow_by_a_rack() {
    let limit = Duration::from_secs(5);
    let map =
        timed("lay out 1,000 disks", limit, || cluster(uniform(1, 5, 4, 50), scheme(8, 4, FailureDomain::Server)));
    assert_eq!((map.disks.len(), map.groups.len()), (1000, 4167));
    assert_eq!((most_in_one(&map, FailureDomain::Rack), most_in_one(&map, FailureDomain::Server)), (3, 1));
    assert!(worst_share(&map) <= 0.05);

    let mut lost = map.clone();
    set_state(&mut lost, DiskId(500), DiskState::Out);
    let healed = timed("lose a disk", limit, || rebalance(&lost).unwrap());
    let moved = moves(&map, &healed);
    assert_eq!(moved.len(), loads(&map)[&DiskId(500)]);
    assert_eq!(
        moved.iter().map(|one| one.to).collect::<BTreeSet<_>>().len(),
        moved.len(),
        "one slot for each receiver"
    );
    assert!(worst_share(&healed) <= 0.05);

    let mut lost = map.clone();
    for disk in 1..=50 {
        set_state(&mut lost, DiskId(disk), DiskState::Out);
    }
    let must: usize = loads(&map).into_iter().filter(|(disk, _)| disk.0 <= 50).map(|(_, load)| load).sum();
    let healed = timed("lose a server", limit, || rebalance(&lost).unwrap());
    assert_eq!(broken_rule(&healed), None);
    let moved = moves(&map, &healed);
    assert!(moved.len() as f64 <= 1.1 * must as f64, "moved {} for {must}", moved.len());
    assert_eq!(moved.iter().map(|one| one.to).collect::<BTreeSet<_>>().len(), 950, "every survivor takes part");
    assert!(worst_share(&healed) <= 0.05);

    let mut grown = map.clone();
    for number in 0..200 {
        add_disk(&mut grown, new_disk(2000 + number, place(0, 5, number as usize / 50), 1000));
    }
    let spread = timed("add a rack", limit, || rebalance(&grown).unwrap());
    assert_eq!(broken_rule(&spread), None);
    let must = map.groups.len() * 12 / 6;
    let moved = moves(&map, &spread).len();
    assert!(moved as f64 <= 1.1 * must as f64, "moved {moved} for {must}");
    assert_eq!(most_in_one(&spread, FailureDomain::Rack), 2, "six racks hold two chunks each");
    assert!(worst_share(&spread) <= 0.05, "{}", worst_share(&spread));
}

#[test]
fn ten_thousand_disks_are_laid_out_and_lose_a_disk_within_seconds() {
    let map = timed("lay out 10,000 disks", Duration::from_secs(30), || {
        cluster(uniform(2, 10, 20, 25), scheme(8, 4, FailureDomain::Server))
    });
    assert_eq!((map.disks.len(), map.groups.len()), (10_000, 41_667));
    assert!(worst_share(&map) <= 0.05);
    assert_eq!((most_in_one(&map, FailureDomain::Zone), most_in_one(&map, FailureDomain::Rack)), (6, 1));
    let mut lost = map.clone();
    set_state(&mut lost, DiskId(5_000), DiskState::Out);
    let healed = timed("lose a disk", Duration::from_secs(10), || rebalance(&lost).unwrap());
    assert_eq!(moves(&map, &healed).len(), loads(&map)[&DiskId(5_000)]);
    assert!(worst_share(&healed) <= 0.05);

    let mut lost = map.clone();
    for disk in 1..=500 {
        set_state(&mut lost, DiskId(disk), DiskState::Draining);
    }
    let drained = timed("drain a rack", Duration::from_secs(30), || rebalance(&lost).unwrap());
    let must: usize = loads(&map).into_iter().filter(|(disk, _)| disk.0 <= 500).map(|(_, load)| load).sum();
    let moved = moves(&map, &drained).len();
    assert!(moved as f64 <= 1.1 * must as f64, "moved {moved} for {must}");
    assert!(worst_share(&drained) <= 0.05, "{}", worst_share(&drained));
}

#[test]
fn doubling_five_thousand_disks_takes_seconds_and_moves_half() {
    let map = cluster(uniform(1, 10, 20, 25), scheme(8, 4, FailureDomain::Server));
    let mut grown = map.clone();
    for number in 0..5_000 {
        let location = place(1, number as usize / 500, number as usize % 500 / 25);
        add_disk(&mut grown, new_disk(10_000 + number, location, 1000));
    }
    let spread = timed("double 5,000 disks", Duration::from_secs(60), || rebalance(&grown).unwrap());
    let (moved, half) = (moves(&map, &spread).len(), map.groups.len() * 6);
    assert!(moved as f64 <= 1.1 * half as f64, "moved {moved} for {half}");
    let in_zone = |group: &PlacementGroup| group.slots.iter().filter(|slot| slot.current.0 <= 5_000).count();
    let crowded = spread.groups.values().filter(|group| in_zone(group) != 6).count();
    println!(
        "{moved} of {half} moved, {crowded} groups not half and half, at most {}",
        most_in_one(&spread, FailureDomain::Zone)
    );
    assert_eq!(most_in_one(&spread, FailureDomain::Zone), 6);
    assert!(worst_share(&spread) <= 0.05, "{}", worst_share(&spread));
}

#[test]
fn five_thousand_servers_in_one_rack_are_no_harder() {
    // The flattest tree there is: every choice among all servers.
    let map = timed("lay out 5,000 flat servers", Duration::from_secs(30), || {
        cluster(uniform(1, 1, 5_000, 2), scheme(8, 4, FailureDomain::Server))
    });
    let mut lost = map.clone();
    for disk in 1..=100 {
        set_state(&mut lost, DiskId(disk), DiskState::Out);
    }
    let healed = timed("lose 100 disks", Duration::from_secs(20), || rebalance(&lost).unwrap());
    assert!(worst_share(&healed) <= 0.05);
}
