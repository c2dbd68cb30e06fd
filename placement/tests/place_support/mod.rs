//! Clusters for placement tests, and slow, obvious checkers to hold the real code against.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod flow;

use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, PlacementGroupId};
use granary_placement::map::{
    deal_hash_slots, ClusterMap, Disk, DiskState, GroupSlot, Location, PlacementGroup, Roles,
};
use granary_placement::place::{new_map, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, Scheme};
use std::collections::BTreeMap;

/// Small, seeded, the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % bound
    }

    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// The seeds of a random test: the first `count`, or as many as PLACEMENT_SEEDS says for a longer search.
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    0..std::env::var("PLACEMENT_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(count)
}

pub fn place(zone: usize, rack: usize, server: usize) -> Location {
    Location { zone: format!("zone-{zone}"), rack: format!("rack-{rack}"), server: format!("server-{server}") }
}

pub fn both_roles() -> Roles {
    Roles { storage: true, metadata: true }
}

pub fn uuid(number: u32) -> DiskUuid {
    let mut bytes = [0xd1; 16];
    bytes[12..].copy_from_slice(&number.to_be_bytes());
    DiskUuid(bytes)
}

pub fn new_disk(number: u32, location: Location, weight: u32) -> NewDisk {
    let address = format!("10.0.{}.{}:9100", number / 250, number % 250);
    NewDisk { uuid: uuid(number), address, location, weight, roles: both_roles() }
}

/// `zones` zones with `racks` racks each, and so on; all disks alike.
pub fn uniform(zones: usize, racks: usize, servers: usize, disks: usize) -> Vec<NewDisk> {
    let mut all = Vec::new();
    for zone in 0..zones {
        for rack in 0..racks {
            for server in 0..servers {
                for _ in 0..disks {
                    all.push(new_disk(all.len() as u32, place(zone, rack, server), 1000));
                }
            }
        }
    }
    all
}

pub fn scheme(k: u8, m: u8, domain: FailureDomain) -> Scheme {
    Scheme::new(k, m, domain).unwrap()
}

pub fn order(disks: Vec<NewDisk>, scheme: Scheme, groups_per_disk: u32) -> NewCluster {
    NewCluster {
        cluster_id: ClusterId([7; 16]),
        disks,
        scheme_name: "standard".to_owned(),
        scheme,
        object_shards: 4,
        replicas: Some(1),
        groups_per_disk,
    }
}

pub fn cluster(disks: Vec<NewDisk>, scheme: Scheme) -> ClusterMap {
    new_map(order(disks, scheme, 50)).unwrap()
}

/// A map without groups and shards, for `lay_out` alone.
pub fn bare(disks: Vec<NewDisk>, scheme: Scheme) -> ClusterMap {
    let mut map = ClusterMap {
        cluster_id: ClusterId([7; 16]),
        epoch: Epoch(1),
        next_disk_id: 1,
        disks: BTreeMap::new(),
        schemes: BTreeMap::from([("standard".to_owned(), scheme)]),
        default_scheme: "standard".to_owned(),
        groups: BTreeMap::new(),
        shards: Vec::new(),
        slot_shards: deal_hash_slots(1),
    };
    for disk in disks {
        add_disk(&mut map, disk);
    }
    map
}

pub fn add_disk(map: &mut ClusterMap, disk: NewDisk) -> DiskId {
    let id = DiskId(map.next_disk_id);
    map.next_disk_id += 1;
    let NewDisk { uuid, address, location, weight, roles } = disk;
    map.disks.insert(id, Disk { id, uuid, address, location, weight, roles, state: DiskState::In });
    id
}

pub fn set_state(map: &mut ClusterMap, id: DiskId, state: DiskState) {
    map.disks.get_mut(&id).unwrap().state = state;
}

pub fn with_groups(mut map: ClusterMap, groups: Vec<PlacementGroup>) -> ClusterMap {
    map.groups = (0..).map(PlacementGroupId).zip(groups).collect();
    map
}

/// Slots of each disk.
pub fn loads(map: &ClusterMap) -> BTreeMap<DiskId, usize> {
    let mut loads: BTreeMap<DiskId, usize> = map.disks.keys().map(|id| (*id, 0)).collect();
    for slot in map.groups.values().flat_map(|group| &group.slots) {
        *loads.get_mut(&slot.current).unwrap() += 1;
    }
    loads
}

/// The map as it is once all moves are done.
pub fn settled(mut map: ClusterMap) -> ClusterMap {
    map.groups.values_mut().flat_map(|group| &mut group.slots).for_each(|slot| slot.previous = None);
    map
}

pub fn takes_slots(disk: &Disk) -> bool {
    disk.state == DiskState::In && disk.roles.storage && disk.weight > 0
}

/// Name of the domain of that kind.
pub fn domain(location: &Location, kind: FailureDomain) -> Option<String> {
    let Location { zone, rack, server } = location;
    match kind {
        FailureDomain::Disk => None,
        FailureDomain::Server => Some(format!("{zone}/{rack}/{server}")),
        FailureDomain::Rack => Some(format!("{zone}/{rack}")),
        FailureDomain::Zone => Some(zone.clone()),
    }
}

/// Most chunks that any group has in one domain of that kind.
pub fn most_in_one(map: &ClusterMap, kind: FailureDomain) -> usize {
    let most = |group: &PlacementGroup| {
        let mut count: BTreeMap<String, usize> = BTreeMap::new();
        for slot in &group.slots {
            *count.entry(domain(&map.disk(slot.current).unwrap().location, kind).unwrap()).or_default() += 1;
        }
        count.into_values().max().unwrap()
    };
    map.groups.values().map(most).max().unwrap()
}

/// The hard rules, checked without any code of the crate.
pub fn broken_rule(map: &ClusterMap) -> Option<String> {
    let kinds = [FailureDomain::Server, FailureDomain::Rack, FailureDomain::Zone];
    let home_of = |disk: &Disk| kinds.map(|kind| domain(&disk.location, kind));
    let homes: BTreeMap<DiskId, _> = map.disks.values().map(|disk| (disk.id, home_of(disk))).collect();
    for (id, group) in &map.groups {
        let scheme = &map.schemes[&group.scheme];
        if group.slots.len() != usize::from(scheme.k + scheme.m) {
            return Some(format!("group {id} has {} slots", group.slots.len()));
        }
        let disks: Vec<DiskId> = group.slots.iter().map(|slot| slot.current).collect();
        for (number, disk) in disks.iter().enumerate() {
            if !takes_slots(&map.disks[disk]) {
                return Some(format!("group {id} uses disk {disk}"));
            }
            if disks[..number].contains(disk) {
                return Some(format!("group {id} has disk {disk} twice"));
            }
            for (level, kind) in kinds.iter().enumerate() {
                if *kind > scheme.failure_domain {
                    continue;
                }
                let home = &homes[disk][level];
                let chunks = disks.iter().filter(|other| homes[*other][level] == *home).count();
                if chunks > usize::from(scheme.m) {
                    return Some(format!("group {id} has {chunks} chunks in {home:?}"));
                }
            }
        }
    }
    None
}

/// Max-min fair shares of a group by progressive filling: all disks rise by weight; at each step the first disk or
/// domain to fill up stops rising. None when the cluster has no room for a group.
pub fn fair_shares(map: &ClusterMap, scheme: &Scheme) -> Option<BTreeMap<DiskId, f64>> {
    let mut share: BTreeMap<DiskId, f64> = BTreeMap::new();
    let mut rising: Vec<&Disk> = map.disks.values().filter(|disk| takes_slots(disk)).collect();
    share.extend(rising.iter().map(|disk| (disk.id, 0.0)));
    let width = f64::from(scheme.k) + f64::from(scheme.m);
    let kinds = [FailureDomain::Server, FailureDomain::Rack, FailureDomain::Zone];
    let kinds: Vec<FailureDomain> = kinds.into_iter().filter(|kind| *kind <= scheme.failure_domain).collect();
    loop {
        let total: f64 = share.values().sum();
        if width - total < 1e-9 {
            return Some(share);
        }
        let speed: f64 = rising.iter().map(|disk| f64::from(disk.weight)).sum();
        if rising.is_empty() {
            return None;
        }
        let mut step = (width - total) / speed;
        let mut room: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for disk in map.disks.values().filter(|disk| share.contains_key(&disk.id)) {
            for kind in &kinds {
                let entry = room
                    .entry(format!("{kind:?} {:?}", domain(&disk.location, *kind)))
                    .or_insert((f64::from(scheme.m), 0.0));
                entry.0 -= share[&disk.id];
            }
        }
        for disk in &rising {
            step = step.min((1.0 - share[&disk.id]) / f64::from(disk.weight));
            for kind in &kinds {
                room.get_mut(&format!("{kind:?} {:?}", domain(&disk.location, *kind))).unwrap().1 +=
                    f64::from(disk.weight);
            }
        }
        for (left, speed) in room.values().filter(|(_, speed)| *speed > 0.0) {
            step = step.min(left / speed);
        }
        for disk in &rising {
            *share.get_mut(&disk.id).unwrap() += step.max(0.0) * f64::from(disk.weight);
        }
        rising.retain(|disk| {
            let full = kinds.iter().any(|kind| {
                let (left, speed) = room[&format!("{kind:?} {:?}", domain(&disk.location, *kind))];
                left - speed * step < 1e-9
            });
            !full && 1.0 - share[&disk.id] > 1e-9
        });
    }
}

/// Fair slots of each disk for the groups of the map's default scheme.
pub fn fair_slots(map: &ClusterMap) -> BTreeMap<DiskId, f64> {
    let groups = map.groups.values().filter(|group| group.scheme == map.default_scheme).count() as f64;
    let shares = fair_shares(map, &map.schemes[&map.default_scheme]).expect("room for a group");
    shares.into_iter().map(|(disk, share)| (disk, share * groups)).collect()
}

/// A disk farther from its fair share than 5 % and than rounding to whole slots explains.
pub fn unfair_disk(map: &ClusterMap) -> Option<String> {
    let loads = loads(map);
    fair_slots(map).into_iter().find_map(|(disk, fair)| {
        let off = (loads[&disk] as f64 - fair).abs();
        (off >= 1.0 + 1e-6 && off > 0.05 * fair + 1e-6)
            .then(|| format!("disk {disk} holds {} slots, fair are {fair:.2}", loads[&disk]))
    })
}

/// Does any legal group exist? By trying every set of disks.
pub fn naive_group_exists(map: &ClusterMap, scheme: &Scheme) -> bool {
    let disks: Vec<&Disk> = map.disks.values().filter(|disk| takes_slots(disk)).collect();
    (0u32..1 << disks.len()).filter(|set| set.count_ones() as usize == scheme.width()).any(|set| {
        let chosen: Vec<GroupSlot> = disks
            .iter()
            .enumerate()
            .filter(|(bit, _)| set >> bit & 1 == 1)
            .map(|(_, disk)| GroupSlot::new(disk.id))
            .collect();
        let group = PlacementGroup { scheme: map.default_scheme.clone(), slots: chosen };
        let mut one = map.clone();
        one.groups = BTreeMap::from([(PlacementGroupId(0), group)]);
        broken_rule(&one).is_none()
    })
}

/// A random cluster: up to `limits` zones, racks a zone, servers a rack, disks a server; weights as a real one has
/// them.
pub fn random_disks(random: &mut Random, limits: [u64; 4]) -> Vec<NewDisk> {
    let mixed = random.below(2) == 0;
    let mut all = Vec::new();
    for zone in 0..random.between(1, limits[0]) as usize {
        for rack in 0..random.between(1, limits[1]) as usize {
            for server in 0..random.between(1, limits[2]) as usize {
                for _ in 0..random.between(1, limits[3]) {
                    let weight = if mixed { *random.pick(&[1000, 1000, 2000, 4000]) } else { 1000 };
                    all.push(new_disk(all.len() as u32, place(zone, rack, server), weight));
                }
            }
        }
    }
    all
}

pub fn random_domain(random: &mut Random) -> FailureDomain {
    *random.pick(&[
        FailureDomain::Disk,
        FailureDomain::Server,
        FailureDomain::Server,
        FailureDomain::Rack,
        FailureDomain::Zone,
    ])
}
