//! Which placement group an extent goes to, and how wide it is written while disks are down. Pure.
//!
//! A group whose slots' disks are all up takes the extent as its scheme says. When there is none, the group with the
//! most disks up is taken: where enough of them are up the extent keeps its K+M and names the missing chunks; with
//! fewer it is written narrower, so that as many further disks may still fail as the scheme promises (4+2 with two of
//! six disks dead: 2+2 on the four left).
//!
//! How many are enough, [`granary_placement::durable`] says: 4+2 on three servers of two disks each is written as 3+2
//! while a disk is down. Where not even one domain can be spared, nothing is written.

use granary_placement::codec::ChunkSet;
use granary_placement::durable::{bears, domains_of, most_left};
use granary_placement::id::{DiskId, PlacementGroupId};
use granary_placement::map::{ClusterMap, DiskState, GroupSlot};
use granary_placement::scheme::Scheme;
use std::collections::HashMap;

/// Groups tried at random before all are looked at.
const PROBES: u64 = 16;

/// Whether a slot's disk can take a chunk now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usable {
    /// Yes.
    Yes,
    /// It may work; only if there are not enough others.
    Maybe,
    /// No.
    No,
}

/// The groups of each scheme, by one map.
#[derive(Debug)]
pub struct GroupIndex {
    by_scheme: HashMap<String, Vec<PlacementGroupId>>,
}

impl GroupIndex {
    /// The groups of that map.
    pub fn new(map: &ClusterMap) -> GroupIndex {
        let mut by_scheme: HashMap<String, Vec<PlacementGroupId>> = HashMap::new();
        for (id, group) in &map.groups {
            by_scheme.entry(group.scheme.clone()).or_default().push(*id);
        }
        GroupIndex { by_scheme }
    }
}

/// Where one extent is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The group.
    pub group: PlacementGroupId,
    /// The scheme, with K and M as they will be written.
    pub scheme: Scheme,
    /// Whether K and M are those of the group's scheme.
    pub narrow: bool,
    /// `slots[i]` holds chunk index i.
    pub slots: Vec<u8>,
    /// The disk of chunk index i; None when it is down and the chunk is missing from the start.
    pub disks: Vec<Option<DiskId>>,
    /// The failure domain of chunk index i, by numbers that mean nothing outside this choice.
    domains: Vec<u8>,
    /// So many chunks must be left when the fullest domain is gone.
    left_over: usize,
}

impl Choice {
    /// Whether an extent of which these chunks are durable may be acknowledged: at least K+1 of them, and K when the
    /// fullest failure domain is gone.
    pub fn is_durable(&self, chunks: ChunkSet) -> bool {
        let domains = chunks.iter().filter_map(|index| self.domains.get(usize::from(index)).copied());
        bears(usize::from(self.scheme.k), self.left_over, domains)
    }
}

/// Why nothing can be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChooseError {
    /// The map does not have that scheme.
    #[error("no scheme `{0}` in the cluster map")]
    UnknownScheme(String),
    /// No group of the scheme has two disks that answer.
    #[error("no placement group of scheme {scheme} has enough disks up (best: {best_up} of {width})")]
    Unavailable {
        /// The scheme.
        scheme: String,
        /// The most disks up in any group.
        best_up: usize,
        /// Slots of a group.
        width: usize,
    },
}

/// Chooses. `usable` is asked per disk, `draw` gives random numbers.
///
/// # Errors
/// See [`ChooseError`].
pub fn choose(
    map: &ClusterMap,
    index: &GroupIndex,
    scheme: Option<&str>,
    usable: impl Fn(DiskId) -> Usable,
    mut draw: impl FnMut() -> u64,
) -> Result<Choice, ChooseError> {
    let name = scheme.unwrap_or(&map.default_scheme);
    let unknown = || ChooseError::UnknownScheme(name.to_owned());
    let scheme = *map.schemes.get(name).ok_or_else(unknown)?;
    let none = |best_up| ChooseError::Unavailable { scheme: name.to_owned(), best_up, width: scheme.width() };
    let groups = index.by_scheme.get(name).map(Vec::as_slice).unwrap_or_default();
    let count = u64::try_from(groups.len()).unwrap_or(0);
    if count == 0 {
        return Err(none(0));
    }
    let state_of = |disk: DiskId| match map.disk(disk) {
        Some(entry) if entry.state != DiskState::Out => usable(disk),
        _ => Usable::No,
    };
    let slots_of = |id: PlacementGroupId| map.group(id).map(|group| group.slots.as_slice()).unwrap_or_default();

    for _ in 0..PROBES.min(count * 2) {
        let Some(&id) = groups.get(usize::try_from(draw() % count).unwrap_or(0)) else { continue };
        let slots = slots_of(id);
        if slots.len() == scheme.width() && slots.iter().all(|slot| state_of(slot.current) == Usable::Yes) {
            return shape(map, scheme, id, slots, |_| true).ok_or_else(|| none(0));
        }
    }

    // No luck: look at all. Most disks that surely work first, then most that may; ties are broken at random. The first
    // of them that takes the extent, for one may have its disks in too few domains.
    let mut by_score: Vec<((usize, usize), u64, PlacementGroupId)> = Vec::with_capacity(groups.len());
    for &id in groups {
        let slots = slots_of(id);
        if slots.len() != scheme.width() {
            continue;
        }
        let yes = slots.iter().filter(|slot| state_of(slot.current) == Usable::Yes).count();
        let maybe = slots.iter().filter(|slot| state_of(slot.current) == Usable::Maybe).count();
        by_score.push(((yes, maybe), draw(), id));
    }
    by_score.sort_unstable_by(|a, b| b.cmp(a));
    for (_, _, id) in &by_score {
        // Doubtful disks are asked only when those that surely work cannot carry the scheme's own K.
        let sure = shape(map, scheme, *id, slots_of(*id), |disk| state_of(disk) == Usable::Yes);
        let found = match sure.filter(|choice| !choice.narrow) {
            Some(choice) => Some(choice),
            None => shape(map, scheme, *id, slots_of(*id), |disk| state_of(disk) != Usable::No),
        };
        if let Some(choice) = found {
            return Ok(choice);
        }
    }
    Err(none(by_score.first().map_or(0, |((yes, maybe), _, _)| yes + maybe)))
}

/// The shape of an extent in a group some of whose disks take chunks. None when fewer than two do, or when they are in
/// one failure domain.
fn shape(
    map: &ClusterMap,
    scheme: Scheme,
    group: PlacementGroupId,
    slots: &[GroupSlot],
    takes: impl Fn(DiskId) -> bool,
) -> Option<Choice> {
    // Chunks are only ever written to the disk that a slot has now.
    let all = domains_of(map, scheme.failure_domain, slots);
    let places = || (0u8..).zip(slots.iter().map(|slot| slot.current)).zip(all.iter().copied());
    let up: Vec<u8> = places().filter(|((_, disk), _)| takes(*disk)).map(|(_, domain)| domain).collect();
    let (k, m) = (usize::from(scheme.k), usize::from(scheme.m));
    let most = most_left(k, &all);
    let left_over = |k: usize| k.min(most);
    if bears(k, left_over(k), up.iter().copied()) {
        let (slots, disks) = places().map(|((slot, disk), _)| (slot, takes(disk).then_some(disk))).unzip();
        return Some(Choice { group, scheme, narrow: false, slots, disks, domains: all, left_over: left_over(k) });
    }
    // Narrower, and no less safe: as many coding chunks as the scheme has while that leaves a data chunk.
    let widest = up.len().checked_sub(m).filter(|k| *k > 0).unwrap_or(1).min(k);
    let narrow_k = (1..=widest).rev().find(|k| bears(*k, left_over(*k), up.iter().copied()))?;
    let narrow_m = up.len().checked_sub(narrow_k).filter(|m| *m > 0)?;
    let scheme = Scheme { k: u8::try_from(narrow_k).ok()?, m: u8::try_from(narrow_m).ok()?, ..scheme };
    let taking = || places().filter(|((_, disk), _)| takes(*disk));
    let (slots, disks) = taking().map(|((slot, disk), _)| (slot, Some(disk))).unzip();
    let domains = taking().map(|(_, domain)| domain).collect();
    Some(Choice { group, scheme, narrow: true, slots, disks, domains, left_over: left_over(narrow_k) })
}

/// A small generator for choices that only need to be fair: splitmix64. Not for ids, not for secrets.
#[derive(Debug, Clone)]
pub struct Draw(pub u64);

impl Draw {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_placement::id::{ClusterId, DiskUuid, Epoch};
    use granary_placement::map::{Disk, Location, PlacementGroup, Roles};
    use granary_placement::scheme::FailureDomain;
    use std::collections::BTreeMap;

    fn map(k: u8, m: u8, groups: &[&[u32]]) -> ClusterMap {
        let disk = |id: u32| Disk {
            id: DiskId(id),
            uuid: DiskUuid([id as u8; 16]),
            address: String::new(),
            location: Location { zone: String::new(), rack: String::new(), server: String::new() },
            weight: 1,
            roles: Roles { storage: true, metadata: false },
            state: DiskState::In,
        };
        ClusterMap {
            cluster_id: ClusterId::default(),
            epoch: Epoch(1),
            next_disk_id: 100,
            disks: (0..20).map(|id| (DiskId(id), disk(id))).collect(),
            schemes: BTreeMap::from([("s".to_owned(), Scheme::new(k, m, FailureDomain::Disk).unwrap())]),
            default_scheme: "s".to_owned(),
            groups: (0u32..)
                .zip(groups)
                .map(|(id, slots)| {
                    let slots = slots.iter().map(|disk| GroupSlot::new(DiskId(*disk))).collect();
                    (PlacementGroupId(id), PlacementGroup { scheme: "s".to_owned(), slots })
                })
                .collect(),
            shards: Vec::new(),
            slot_shards: Vec::new(),
        }
    }

    fn choose_with(map: &ClusterMap, down: &[u32], maybe: &[u32], seed: u64) -> Result<Choice, ChooseError> {
        let mut draw = Draw(seed);
        let usable = |disk: DiskId| match disk.0 {
            id if down.contains(&id) => Usable::No,
            id if maybe.contains(&id) => Usable::Maybe,
            _ => Usable::Yes,
        };
        choose(map, &GroupIndex::new(map), None, usable, || draw.number())
    }

    #[test]
    fn a_group_with_all_disks_up_is_preferred_and_all_such_groups_are_used() {
        let map = map(2, 1, &[&[0, 1, 2], &[3, 4, 5], &[6, 7, 8]]);
        let mut used = [0; 3];
        for seed in 0..300 {
            let choice = choose_with(&map, &[4], &[], seed).unwrap();
            assert!(!choice.narrow && choice.disks.iter().all(Option::is_some));
            used[choice.group.0 as usize] += 1;
        }
        assert_eq!(used[1], 0);
        assert!(used[0] > 75 && used[2] > 75, "{used:?}");
    }

    #[test]
    fn four_plus_two_keeps_its_promise_for_every_number_of_disks_down() {
        let map = map(4, 2, &[&[0, 1, 2, 3, 4, 5]]);
        let shape = |down: &[u32]| {
            let choice = choose_with(&map, down, &[], 1).unwrap();
            assert!(choice.disks.iter().flatten().all(|disk| !down.contains(&disk.0)));
            assert_eq!(choice.slots.len(), choice.scheme.width());
            let missing = choice.disks.iter().filter(|disk| disk.is_none()).count();
            let durable = |count: u8| choice.is_durable((0..count).collect());
            let quorum = (0..=choice.scheme.k + choice.scheme.m).find(|count| durable(*count)).unwrap();
            (choice.scheme.k, choice.scheme.m, missing, quorum)
        };
        assert_eq!(shape(&[]), (4, 2, 0, 5));
        assert_eq!(shape(&[3]), (4, 2, 1, 5));
        assert_eq!(shape(&[0, 3]), (2, 2, 0, 3));
        assert_eq!(shape(&[0, 3, 4]), (1, 2, 0, 2));
        assert_eq!(shape(&[0, 3, 4, 5]), (1, 1, 0, 2));
        assert!(matches!(
            choose_with(&map, &[0, 1, 2, 3, 4], &[], 1),
            Err(ChooseError::Unavailable { best_up: 1, .. })
        ));
    }

    #[test]
    fn a_domain_more_may_fail_after_what_is_down() {
        // Three servers of two disks.
        let mut three = map(4, 2, &[&[0, 1, 2, 3, 4, 5]]);
        for disk in three.disks.values_mut() {
            disk.location.server = format!("server-{}", disk.id.0 / 2);
        }
        three.schemes = BTreeMap::from([("s".to_owned(), Scheme::new(4, 2, FailureDomain::Server).unwrap())]);
        let shape = |down: &[u32]| choose_with(&three, down, &[], 1).map(|choice| (choice.scheme.k, choice.scheme.m));
        assert_eq!(shape(&[]), Ok((4, 2)));
        assert_eq!(shape(&[3]), Ok((3, 2)), "five chunks, of which a server takes two");
        assert_eq!(shape(&[2, 3]), Ok((2, 2)));
        assert_eq!(shape(&[1, 3]), Ok((2, 2)));
        assert_eq!(shape(&[1, 3, 5]), Ok((1, 2)), "one disk on each server");
        assert_eq!(shape(&[0, 2, 3]), Ok((1, 2)));
        assert!(shape(&[2, 3, 4, 5]).is_err(), "all that is left is one server");
        // All up when it began; what fails on the way counts in the same way.
        let whole = choose_with(&three, &[], &[], 1).unwrap();
        let durable = |chunks: &[u8]| whole.is_durable(chunks.iter().copied().collect());
        assert!(durable(&[0, 1, 2, 3, 4, 5]) && !durable(&[0, 1, 2, 3, 4]) && !durable(&[0, 1, 2, 3]));
        // One server of six disks cannot be spared at all: then a disk can.
        let mut one = three.clone();
        one.disks.values_mut().for_each(|disk| disk.location.server = "only".to_owned());
        let choice = choose_with(&one, &[3], &[], 1).unwrap();
        assert_eq!((choice.scheme.k, choice.scheme.m), (4, 2));
        // Of two groups the one whose disks are in several servers takes it.
        let mut two = map(2, 2, &[&[0, 1, 2, 3], &[10, 11, 12, 13]]);
        for disk in two.disks.values_mut() {
            disk.location.server = format!("server-{}", disk.id.0 / 2);
        }
        two.schemes = BTreeMap::from([("s".to_owned(), Scheme::new(2, 2, FailureDomain::Server).unwrap())]);
        let choice = choose_with(&two, &[2, 3, 11, 13], &[], 1).unwrap();
        assert_eq!((choice.group, choice.scheme.k, choice.scheme.m), (PlacementGroupId(1), 1, 1));
    }

    #[test]
    fn narrow_extents_name_the_slots_of_the_disks_that_are_left() {
        let map = map(4, 2, &[&[10, 11, 12, 13, 14, 15]]);
        let choice = choose_with(&map, &[10, 13], &[], 1).unwrap();
        assert_eq!(choice.slots, [1, 2, 4, 5]);
        assert_eq!(choice.disks, [11, 12, 14, 15].map(|disk| Some(DiskId(disk))));
    }

    #[test]
    fn doubtful_disks_are_left_out_while_there_are_enough_others_and_used_when_not() {
        let map = map(4, 2, &[&[0, 1, 2, 3, 4, 5]]);
        let choice = choose_with(&map, &[], &[2], 1).unwrap();
        assert_eq!(choice.disks.iter().filter(|disk| disk.is_none()).count(), 1);
        let choice = choose_with(&map, &[], &[0, 1, 2, 3, 4, 5], 1).unwrap();
        assert!(
            choice.disks.iter().all(Option::is_some) && !choice.narrow,
            "before the first ping all disks are doubtful"
        );
        let choice = choose_with(&map, &[0, 1], &[2], 1).unwrap();
        assert_eq!((choice.scheme.k, choice.scheme.m), (2, 2));
    }

    #[test]
    fn a_disk_that_is_out_of_the_map_takes_nothing() {
        let mut map = map(4, 2, &[&[0, 1, 2, 3, 4, 5]]);
        map.disks.get_mut(&DiskId(5)).unwrap().state = DiskState::Out;
        let choice = choose_with(&map, &[], &[], 1).unwrap();
        assert_eq!(choice.disks.last(), Some(&None));
    }
}
