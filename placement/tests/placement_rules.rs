//! Fresh layouts keep every rule, are refused exactly when nobody could keep them, and are the same every time.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::place::{add_scheme, lay_out, new_map, PlaceError};
use granary_placement::scheme::FailureDomain;
use place_support::{
    bare, broken_rule, cluster, fair_shares, loads, most_in_one, naive_group_exists, order, random_disks,
    random_domain, scheme, seeds, unfair_disk, uniform, with_groups, Random,
};
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn a_layout_exists_exactly_when_trying_every_set_of_disks_finds_a_group() {
    let (mut made, mut refused) = (0, 0);
    for seed in seeds(3000) {
        let mut random = Random::new(seed);
        let mut disks = random_disks(&mut random, [3, 2, 2, 3]);
        disks.truncate(9);
        let (k, m) = (random.between(1, 4) as u8, random.between(1, 3) as u8);
        let scheme = scheme(k, m, random_domain(&mut random));
        let map = bare(disks, scheme);
        let naive = naive_group_exists(&map, &scheme);
        match lay_out(&map, "standard", 10) {
            Ok(groups) => {
                assert!(naive, "seed {seed}: laid out what the naive search calls impossible");
                let map = with_groups(map, groups);
                assert_eq!(broken_rule(&map), None, "seed {seed}: {scheme} {:?}", scheme.failure_domain);
                made += 1;
            }
            Err(error) => {
                assert!(!naive, "seed {seed}: refused a cluster that has a legal group: {error}");
                refused += 1;
            }
        }
    }
    assert!(made > 500 && refused > 500, "the seeds must cover both: {made} made, {refused} refused");
}

#[test]
fn every_disk_holds_its_weights_share_within_5_percent() {
    let mut checked = 0;
    for seed in seeds(400) {
        let mut random = Random::new(seed);
        let disks = random_disks(&mut random, [3, 3, 4, 8]);
        let (k, m) = *random.pick(&[(2, 1), (4, 2), (6, 3), (8, 3), (8, 4), (17, 3)]);
        let scheme = scheme(k, m, random_domain(&mut random));
        let map = bare(disks, scheme);
        let Ok(groups) = lay_out(&map, "standard", 50) else {
            assert!(fair_shares(&map, &scheme).is_none(), "seed {seed}: refused although there is room");
            continue;
        };
        let map = with_groups(map, groups);
        assert_eq!(broken_rule(&map), None, "seed {seed}");
        assert_eq!(
            unfair_disk(&map),
            None,
            "seed {seed}: {scheme} {:?} on {} disks",
            scheme.failure_domain,
            map.disks.len()
        );
        checked += 1;
    }
    assert!(checked > 100, "only {checked} clusters had room");
}

#[test]
fn chunks_of_a_group_lie_as_far_apart_as_the_topology_allows() {
    // Zones, racks a zone, servers a rack, disks a server; K, M; most chunks in one zone, rack, server.
    let cases = [
        ([1, 1, 6, 4], (4, 2), [6, 6, 1]),
        ([1, 1, 3, 8], (4, 2), [6, 6, 2]),
        ([1, 1, 4, 4], (4, 2), [6, 6, 2]),
        ([3, 1, 2, 4], (4, 2), [2, 2, 1]),
        ([1, 3, 4, 5], (8, 4), [12, 4, 1]),
        ([2, 3, 4, 2], (8, 3), [6, 2, 1]),
        ([1, 5, 4, 6], (8, 4), [12, 3, 1]),
        ([5, 1, 1, 10], (10, 4), [3, 3, 3]),
    ];
    for ([zones, racks, servers, disks], (k, m), [zone, rack, server]) in cases {
        let map = cluster(uniform(zones, racks, servers, disks), scheme(k, m, FailureDomain::Server));
        let found =
            [FailureDomain::Zone, FailureDomain::Rack, FailureDomain::Server].map(|kind| most_in_one(&map, kind));
        assert_eq!(found, [zone, rack, server], "{k}+{m} on {zones}x{racks}x{servers}x{disks}");
        assert_eq!(unfair_disk(&map), None);
    }
}

#[test]
fn a_slightly_bigger_rack_does_not_get_more_chunks_of_a_group() {
    let mut disks = uniform(1, 2, 4, 10);
    disks.pop();
    let map = cluster(disks, scheme(4, 2, FailureDomain::Server));
    assert_eq!(most_in_one(&map, FailureDomain::Rack), 3);
    assert_eq!(unfair_disk(&map), None);
}

#[test]
fn there_are_about_50_slots_a_disk() {
    for (disks, k, m, groups) in [(6, 4, 2, 50), (7, 4, 2, 58), (12, 8, 4, 50), (3, 2, 1, 50)] {
        let map = cluster(uniform(1, 1, 1, disks), scheme(k, m, FailureDomain::Disk));
        assert_eq!(map.groups.len(), groups);
    }
}

#[test]
fn every_disk_shares_groups_with_most_others_so_that_all_take_part_in_a_rebuild() {
    for mixed in [false, true] {
        let mut disks = uniform(1, 4, 5, 5);
        for (number, disk) in disks.iter_mut().enumerate().filter(|_| mixed) {
            disk.weight = [1000, 2000, 4000][number % 3];
        }
        let map = cluster(disks, scheme(4, 2, FailureDomain::Server));
        let mut peers: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for group in map.groups.values() {
            for disk in group.slots.iter().map(|slot| slot.current) {
                peers.entry(disk).or_default().extend(group.slots.iter().map(|slot| slot.current));
            }
        }
        let loads = loads(&map);
        for (disk, peers) in peers {
            // 5 peers in each of about 50 groups, drawn from 95 disks of other servers: about 88 different ones.
            let expected = 95.0 * (1.0 - (1.0f64 - 5.0 / 95.0).powi(loads[&disk] as i32));
            let tolerated = if mixed { 0.7 } else { 0.8 };
            assert!(
                peers.len() as f64 > tolerated * expected,
                "disk {disk}: {} peers, expected {expected}",
                peers.len()
            );
        }
    }
}

#[test]
fn data_chunks_are_not_tied_to_a_zone() {
    let map = cluster(uniform(3, 1, 4, 5), scheme(4, 2, FailureDomain::Server));
    for slot in 0..6 {
        let in_first =
            map.groups.values().filter(|group| map.disks[&group.slots[slot].current].location.zone == "zone-0").count();
        let share = in_first as f64 / map.groups.len() as f64;
        assert!((0.25..0.42).contains(&share), "slot {slot} is in zone 0 in {share} of the groups");
    }
}

#[test]
fn the_same_map_gives_the_same_layout_and_the_order_of_listing_only_the_ids() {
    let disks = uniform(2, 2, 3, 4);
    let scheme = scheme(4, 2, FailureDomain::Server);
    let first = new_map(order(disks.clone(), scheme, 50)).unwrap();
    assert_eq!(first, new_map(order(disks.clone(), scheme, 50)).unwrap());
    let mut backwards = disks;
    backwards.reverse();
    let second = new_map(order(backwards, scheme, 50)).unwrap();
    assert_eq!(broken_rule(&second), None);
}

#[test]
fn a_scheme_that_cannot_be_kept_is_refused_with_what_it_needs() {
    let refusal = |disks, k, m, domain| new_map(order(disks, scheme(k, m, domain), 50)).unwrap_err();
    let two_servers = refusal(uniform(1, 1, 2, 12), 4, 2, FailureDomain::Server);
    assert_eq!(
        two_servers.to_string(),
        "scheme `standard` keeps at most 2 of its 6 chunks in one server, so it needs 3 servers with 2 disks each; the 2 servers in \
         service have room for 4 chunks: add servers or disks to the smaller ones, choose a scheme with more coding chunks or a \
         smaller failure domain"
    );
    let two_racks = refusal(uniform(1, 2, 6, 2), 4, 2, FailureDomain::Rack);
    assert!(
        matches!(two_racks, PlaceError::NoRoom { kind: "rack", needed: 3, present: 2, room: 4, .. }),
        "{two_racks}"
    );
    let few = refusal(uniform(1, 1, 1, 5), 4, 2, FailureDomain::Disk);
    assert_eq!(
        few.to_string(),
        "scheme `standard` puts 6 chunks on 6 different disks, but only 5 disks can take chunks (state in, storage role, weight above \
         zero): add 1 or choose a narrower scheme"
    );
    assert!(lay_out(&bare(uniform(1, 1, 1, 6), scheme(4, 2, FailureDomain::Disk)), "standard", 0).is_err());
    assert!(lay_out(&bare(uniform(1, 1, 1, 6), scheme(4, 2, FailureDomain::Disk)), "other", 50).is_err());
}

#[test]
fn disks_without_storage_role_or_weight_get_no_slots() {
    let mut disks = uniform(1, 1, 1, 9);
    disks[2].roles.storage = false;
    disks[5].weight = 0;
    let map = cluster(disks, scheme(4, 2, FailureDomain::Disk));
    let idle: Vec<u32> = loads(&map).into_iter().filter(|(_, load)| *load == 0).map(|(disk, _)| disk.0).collect();
    assert_eq!(idle, [3, 6]);
}

#[test]
fn weights_a_billion_times_apart_are_shared_as_far_as_one_chunk_a_disk_allows() {
    let mut disks = uniform(1, 1, 4, 3);
    for (number, disk) in disks.iter_mut().enumerate() {
        disk.weight = [1, 1_000, u32::MAX][number % 3];
    }
    let map = cluster(disks, scheme(4, 2, FailureDomain::Server));
    assert_eq!((broken_rule(&map), unfair_disk(&map)), (None, None));
    // The four giants are in every group; the two chunks left go to the thousands, and a handful to the ones.
    let loads: Vec<usize> = loads(&map).into_values().collect();
    assert!(loads.chunks(3).all(|server| server[2] == map.groups.len() && server[0] <= 1), "{loads:?}");
}

#[test]
fn a_second_scheme_gets_groups_of_its_own_and_leaves_the_first_alone() {
    let map = cluster(uniform(1, 1, 12, 3), scheme(4, 2, FailureDomain::Server));
    let wide = add_scheme(&map, "wide", scheme(8, 4, FailureDomain::Server), 50).unwrap();
    assert_eq!(wide.epoch.0, 2);
    assert_eq!(wide.groups.len(), 300 + 150);
    assert!(map.groups.iter().all(|(id, group)| wide.groups.get(id) == Some(group)));
    assert_eq!(broken_rule(&wide), None);
    assert!(matches!(
        add_scheme(&wide, "wide", scheme(2, 1, FailureDomain::Disk), 50),
        Err(PlaceError::SchemeExists(_))
    ));
}
