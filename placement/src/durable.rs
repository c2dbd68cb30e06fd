//! Whether the chunks that are on their disks are enough to acknowledge an extent.
//!
//! Enough are those that leave K when one more chunk goes, and also when one more failure domain of the scheme's kind
//! goes, the fullest: 4+2 on three servers of two disks each bears no disk down as 4+2, for five chunks less a server's
//! two are three. A group whose whole width cannot bear the loss of a domain is not asked for more than it can give.
//! The gateway writes by this, and the leader of the metadata shard holds what it is told against its own map.

use crate::codec::ChunkSet;
use crate::id::PlacementGroupId;
use crate::map::{ClusterMap, GroupSlot};
use crate::scheme::FailureDomain;

/// Whether an extent of K data chunks may be acknowledged of which these chunks are in their places by that map.
/// `slots[i]` is the slot of chunk index i in its group. False for a group that the map does not have.
pub fn is_durable(map: &ClusterMap, group: PlacementGroupId, k: u8, slots: &[u8], chunks: ChunkSet) -> bool {
    let Some(group) = map.group(group) else { return false };
    let Some(scheme) = map.schemes.get(&group.scheme) else { return false };
    let all = domains_of(map, scheme.failure_domain, &group.slots);
    let k = usize::from(k);
    let slots = chunks.iter().filter_map(|index| slots.get(usize::from(index)));
    let domains = slots.filter_map(|slot| all.get(usize::from(*slot)).copied());
    bears(k, k.min(most_left(usize::from(scheme.k), &all)), domains)
}

/// So many chunks of a whole group are left when its fullest domain is gone, at most K: more cannot be asked for. `all`
/// are the domains of its slots, see [`domains_of`].
pub fn most_left(k: usize, all: &[u8]) -> usize {
    (0..=k).rev().find(|left| bears(0, *left, all.iter().copied())).unwrap_or_default()
}

/// Whether chunks in these domains are more than K, and at least `left_over` without the fullest domain.
pub fn bears(k: usize, left_over: usize, domains: impl Iterator<Item = u8>) -> bool {
    let mut sizes = [0usize; 256];
    let mut all = 0;
    for domain in domains {
        all += 1;
        if let Some(size) = sizes.get_mut(usize::from(domain)) {
            *size += 1;
        }
    }
    let fullest = sizes.iter().copied().max().unwrap_or_default();
    all > k && all - fullest >= left_over
}

/// Numbers of the failure domains of these slots' current disks, which mean nothing beyond this list; a disk that the
/// map does not have is one of its own.
pub fn domains_of(map: &ClusterMap, kind: FailureDomain, slots: &[GroupSlot]) -> Vec<u8> {
    let mut known: Vec<(&str, &str, &str)> = Vec::new();
    let mut number = |at: usize, slot: &GroupSlot| {
        // Places are numbered from below and single disks from above: a group has far fewer than 128 slots.
        let own = u8::MAX - u8::try_from(at).unwrap_or(u8::MAX);
        let Some(place) = map.disk(slot.current).map(|disk| &disk.location) else { return own };
        let (zone, rack, server) = (place.zone.as_str(), place.rack.as_str(), place.server.as_str());
        let domain = match kind {
            FailureDomain::Disk => return own,
            FailureDomain::Server => (zone, rack, server),
            FailureDomain::Rack => (zone, rack, ""),
            FailureDomain::Zone => (zone, "", ""),
        };
        let place = known.iter().position(|there| *there == domain).unwrap_or_else(|| {
            known.push(domain);
            known.len() - 1
        });
        u8::try_from(place).unwrap_or(u8::MAX)
    };
    slots.iter().enumerate().map(|(at, slot)| number(at, slot)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::id::{ClusterId, DiskUuid};
    use crate::map::{Location, Roles};
    use crate::place::{new_map, NewCluster, NewDisk};
    use crate::scheme::Scheme;

    /// 4+2 over servers of that many disks each.
    fn cluster(servers: u8, disks_each: u8, kind: FailureDomain) -> ClusterMap {
        let disk = |number: u8| NewDisk {
            uuid: DiskUuid([number + 1; 16]),
            address: format!("10.0.0.{number}:7300"),
            location: Location { zone: "a".into(), rack: "1".into(), server: (number / disks_each).to_string() },
            weight: 1000,
            roles: Roles { storage: true, metadata: true },
        };
        new_map(NewCluster {
            cluster_id: ClusterId([7; 16]),
            disks: (0..servers * disks_each).map(disk).collect(),
            scheme_name: "4+2".into(),
            scheme: Scheme::new(4, 2, kind).unwrap(),
            object_shards: 1,
            replicas: None,
            groups_per_disk: 4,
        })
        .unwrap()
    }

    /// What it is, the map, K, the slots of its chunks, those missing, and whether it may be acknowledged.
    type Row<'a> = (&'a str, &'a ClusterMap, u8, &'a [u8], &'a [u8], bool);

    #[test]
    fn what_is_left_must_bear_one_more_chunk_and_the_fullest_domain() {
        let (disks, six, three) = (
            cluster(1, 6, FailureDomain::Disk),
            cluster(6, 1, FailureDomain::Server),
            cluster(3, 2, FailureDomain::Server),
        );
        let all = [0, 1, 2, 3, 4, 5];
        let rows: [Row; 9] = [
            ("whole", &three, 4, &all, &[], true),
            ("a server more leaves three of four", &three, 4, &all, &[3], false),
            ("each in a server of its own", &six, 4, &all, &[3], true),
            ("no spare", &six, 4, &all, &[3, 4], false),
            ("one server with all disks, by disks", &disks, 4, &all, &[3], true),
            ("no spare, by disks", &disks, 4, &all, &[3, 4], false),
            ("narrower: 3+2 bears a server", &three, 3, &[0, 1, 2, 4, 5], &[], true),
            ("narrower, and no spare", &three, 4, &[0, 1, 2, 4], &[], false),
            ("nothing", &six, 4, &all, &all, false),
        ];
        for (what, map, k, slots, missing, expected) in rows {
            let group = *map.groups.keys().next().unwrap();
            let width = u8::try_from(slots.len()).unwrap();
            let chunks = (0..width).filter(|index| !missing.contains(index)).collect();
            assert_eq!(is_durable(map, group, k, slots, chunks), expected, "{what}");
        }
        let all_there = (0..6).collect();
        assert!(!is_durable(&six, PlacementGroupId(60_000), 4, &all, all_there), "a group that the map does not have");
    }

    #[test]
    fn a_disk_that_the_map_does_not_have_is_a_domain_of_its_own() {
        let mut map = cluster(3, 2, FailureDomain::Server);
        let group = map.groups.values().next().unwrap().slots.clone();
        let unknown = group[1].current;
        map.disks.remove(&unknown);
        let domains = domains_of(&map, FailureDomain::Server, &group);
        let alone = domains.iter().filter(|domain| **domain == domains[1]).count();
        assert_eq!(alone, 1, "{domains:?}");
    }
}
