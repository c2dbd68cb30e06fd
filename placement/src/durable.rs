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
