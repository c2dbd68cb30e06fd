//! Shard replicas: far apart, evenly many, and still named when their disk is gone and nobody can take over.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod place_support;

use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
use granary_placement::moves::replica_moves;
use granary_placement::place::{choose_shard_replicas, default_replicas, new_map, rebalance, PlaceError};
use granary_placement::scheme::FailureDomain;
use place_support::{
    add_disk, bare, domain, new_disk, order, place, random_disks, scheme, seeds, set_state, uniform, Random,
};
use std::collections::BTreeMap;

fn replicas(map: &ClusterMap) -> BTreeMap<DiskId, (usize, usize)> {
    let mut held: BTreeMap<DiskId, (usize, usize)> = BTreeMap::new();
    for shard in &map.shards {
        for (position, disk) in shard.members.iter().enumerate() {
            let entry = held.entry(*disk).or_default();
            entry.0 += 1;
            entry.1 += usize::from(position == 0);
        }
    }
    held
}

fn most_in_one(map: &ClusterMap, kind: FailureDomain) -> usize {
    let most = |members: &[DiskId]| {
        let mut count: BTreeMap<String, usize> = BTreeMap::new();
        for disk in members {
            *count.entry(domain(&map.disks[disk].location, kind).unwrap()).or_default() += 1;
        }
        count.into_values().max().unwrap()
    };
    map.shards.iter().map(|shard| most(&shard.members)).max().unwrap()
}

#[test]
fn metadata_survives_what_data_survives_as_far_as_there_are_disks() {
    let table = [(1, 10, 3), (2, 10, 5), (4, 10, 5), (2, 5, 5), (2, 4, 3), (2, 3, 3), (2, 2, 1), (1, 1, 1), (2, 0, 1)];
    for (m, disks, expected) in table {
        assert_eq!(default_replicas(m, disks), expected, "M={m} with {disks} metadata disks");
    }
}

#[test]
fn replicas_lie_in_different_domains_and_are_even() {
    // Zones, racks a zone, servers a rack, disks a server; members; most in one zone, rack, server.
    let cases = [
        ([1, 1, 5, 2], 5, [5, 5, 1]),
        ([3, 1, 2, 2], 3, [1, 1, 1]),
        ([3, 2, 2, 1], 5, [2, 1, 1]),
        ([1, 3, 3, 2], 5, [5, 2, 1]),
        ([1, 1, 2, 6], 3, [3, 3, 2]),
        ([1, 1, 1, 6], 5, [5, 5, 5]),
    ];
    for ([zones, racks, servers, disks], members, expected) in cases {
        let mut new = order(uniform(zones, racks, servers, disks), scheme(2, 1, FailureDomain::Disk), 50);
        (new.replicas, new.object_shards) = (Some(members), 16);
        let map = new_map(new).unwrap();
        assert_eq!(map.shards.len(), 17, "the root shard and 16 for objects");
        let found =
            [FailureDomain::Zone, FailureDomain::Rack, FailureDomain::Server].map(|kind| most_in_one(&map, kind));
        assert_eq!(found, expected, "{members} members on {zones}x{racks}x{servers}x{disks}");
        let (held, count) = (replicas(&map), map.disks.len());
        let (most, least) =
            (held.values().map(|held| held.0).max().unwrap(), held.values().map(|held| held.0).min().unwrap());
        assert_eq!((most, least.max(1)), ((17 * members).div_ceil(count), (17 * members / count).max(1)), "{held:?}");
        let leads = held.values().map(|held| held.1).max().unwrap();
        assert!(leads <= 17usize.div_ceil(count) + 1, "one disk leads {leads} shards: {held:?}");
    }
}

#[test]
fn only_metadata_disks_hold_replicas() {
    let mut disks = uniform(1, 1, 6, 2);
    for disk in disks.iter_mut().skip(5) {
        disk.roles.metadata = false;
    }
    let mut new = order(disks.clone(), scheme(4, 2, FailureDomain::Server), 50);
    new.replicas = None;
    let map = new_map(new).unwrap();
    assert!(replicas(&map).keys().all(|disk| disk.0 <= 5));
    assert!(map.shards.iter().all(|shard| shard.members.len() == 5));
    let bare = bare(disks, scheme(4, 2, FailureDomain::Server));
    let too_few = bare.disks.keys().copied().take(3).fold(bare.clone(), |mut map, disk| {
        set_state(&mut map, disk, DiskState::Draining);
        map
    });
    assert_eq!(choose_shard_replicas(&too_few, 5, 3), Err(PlaceError::TooFewMetadataDisks { members: 3, present: 2 }));
    assert_eq!(choose_shard_replicas(&bare, 5, 4), Err(PlaceError::Members(4)));
}

#[test]
fn a_lost_metadata_disk_is_replaced_in_its_shards_alone() {
    let mut new = order(uniform(1, 1, 8, 2), scheme(4, 2, FailureDomain::Server), 50);
    (new.replicas, new.object_shards) = (Some(3), 16);
    let before = new_map(new).unwrap();
    let mut changed = before.clone();
    set_state(&mut changed, DiskId(4), DiskState::Out);
    let after = rebalance(&changed).unwrap();
    let moves = replica_moves(&before, &after);
    assert_eq!(moves.len(), replicas(&before)[&DiskId(4)].0);
    assert!(moves.iter().all(|one| one.from == Some(DiskId(4)) && one.to.is_some()), "{moves:?}");
    assert_eq!(most_in_one(&after, FailureDomain::Server), 1);
}

#[test]
fn a_dead_member_stays_named_until_there_is_a_substitute() {
    let mut disks = uniform(1, 1, 8, 1);
    for disk in disks.iter_mut().skip(5) {
        disk.roles.metadata = false;
    }
    let mut new = order(disks, scheme(4, 2, FailureDomain::Server), 50);
    new.replicas = Some(5);
    let mut map = new_map(new).unwrap();
    set_state(&mut map, DiskId(2), DiskState::Out);
    let waiting = rebalance(&map).unwrap();
    assert_eq!(replica_moves(&map, &waiting), []);
    let mut grown = waiting.clone();
    let new = add_disk(&mut grown, new_disk(50, place(0, 0, 7), 1000));
    let whole = rebalance(&grown).unwrap();
    let moves = replica_moves(&waiting, &whole);
    assert_eq!(moves.len(), map.shards.len());
    assert!(moves.iter().all(|one| (one.from, one.to) == (Some(DiskId(2)), Some(new))));
}

#[test]
fn random_clusters_keep_replicas_distinct_and_change_no_more_than_the_lost_ones() {
    let mut checked = 0;
    for seed in seeds(300) {
        let mut random = Random::new(seed);
        let disks = random_disks(&mut random, [3, 2, 3, 3]);
        let members = *random.pick(&[1, 3, 5]);
        if disks.len() < members + 3 {
            continue;
        }
        let mut new = order(disks, scheme(1, 1, FailureDomain::Disk), 20);
        (new.replicas, new.object_shards) = (Some(members), random.between(1, 20) as u16);
        let before = new_map(new).unwrap();
        let mut changed = before.clone();
        let lost = DiskId(random.between(1, before.disks.len() as u64) as u32);
        set_state(&mut changed, lost, DiskState::Out);
        let after = rebalance(&changed).unwrap();
        after.validate().unwrap();
        assert!(after.shards.iter().all(|shard| !shard.members.contains(&lost)), "seed {seed}");
        for (was, is) in before.shards.iter().zip(&after.shards) {
            let kept = was.members.iter().filter(|disk| is.members.contains(disk)).count();
            assert!(
                kept * 2 >= members - 1,
                "seed {seed}: {was:?} became {is:?}, which share no majority of the living"
            );
        }
        checked += 1;
    }
    assert!(checked > 100);
}
