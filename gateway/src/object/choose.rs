//! Which placement group an extent goes to, and how wide it is written while disks are down. Pure.
//!
//! A group whose slots' disks are all up takes the extent as its scheme says. When there is none, the group with the
//! most disks up is taken: with at least K+1 of them the extent keeps its K+M and names the missing chunks; with fewer
//! it is written narrower, so that as many further disks may still fail as the scheme promises (4+2 with two of six
//! disks dead: 2+2 on the four left).

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
}

impl Choice {
    /// How many chunks must be durable before the write counts: K+1.
    pub fn quorum(&self) -> usize {
        usize::from(self.scheme.k) + 1
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
            return shape(scheme, id, slots, |_| true).ok_or_else(|| none(0));
        }
    }

    // No luck: look at all. Most disks that surely work first, then most that may; ties are broken at random.
    let mut best: Option<((usize, usize), u64, PlacementGroupId)> = None;
    for &id in groups {
        let slots = slots_of(id);
        if slots.len() != scheme.width() {
            continue;
        }
        let yes = slots.iter().filter(|slot| state_of(slot.current) == Usable::Yes).count();
        let maybe = slots.iter().filter(|slot| state_of(slot.current) == Usable::Maybe).count();
        let (score, tie) = ((yes, maybe), draw());
        if best.is_none_or(|(top, top_tie, _)| (score, tie) > (top, top_tie)) {
            best = Some((score, tie, id));
        }
    }
    let ((yes, maybe), _, id) = best.ok_or_else(|| none(0))?;
    let slots = slots_of(id);
    // Doubtful disks are asked only when those that surely work cannot carry the scheme's own K.
    let all = yes < usize::from(scheme.k) + 1;
    let takes = |disk: DiskId| match state_of(disk) {
        Usable::Yes => true,
        Usable::Maybe => all,
        Usable::No => false,
    };
    shape(scheme, id, slots, takes).ok_or_else(|| none(yes + maybe))
}

/// The shape of an extent in a group some of whose disks take chunks. None when fewer than two do.
fn shape(
    scheme: Scheme,
    group: PlacementGroupId,
    slots: &[GroupSlot],
    takes: impl Fn(DiskId) -> bool,
) -> Option<Choice> {
    // Chunks are only ever written to the disk that a slot has now.
    let disks = slots.iter().map(|slot| slot.current);
    let up = disks.clone().filter(|disk| takes(*disk)).count();
    let (k, m) = (usize::from(scheme.k), usize::from(scheme.m));
    let numbered = disks.enumerate().filter_map(|(slot, disk)| Some((u8::try_from(slot).ok()?, disk)));
    if up > k {
        let (slots, disks) = numbered.map(|(slot, disk)| (slot, takes(disk).then_some(disk))).unzip();
        return Some(Choice { group, scheme, narrow: false, slots, disks });
    }
    let narrow_k = up.checked_sub(m).filter(|k| *k > 0).unwrap_or(1);
    let narrow_m = up.checked_sub(narrow_k).filter(|m| *m > 0)?;
    let scheme = Scheme { k: u8::try_from(narrow_k).ok()?, m: u8::try_from(narrow_m).ok()?, ..scheme };
    let (slots, disks) = numbered.filter(|(_, disk)| takes(*disk)).map(|(slot, disk)| (slot, Some(disk))).unzip();
    Some(Choice { group, scheme, narrow: true, slots, disks })
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
            (choice.scheme.k, choice.scheme.m, missing, choice.quorum())
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
