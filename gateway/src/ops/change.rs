//! Pure: a map and a wish become the next map, at the next epoch and valid, or a reason why not.

use granary_placement::id::{DiskId, DiskUuid, Epoch, PlacementGroupId};
use granary_placement::map::{ClusterMap, Disk, DiskState, GroupSlot};
use granary_placement::place::{rebalance, replace_disk, PlaceError};

/// Why a change is refused. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The disks cannot keep the rules afterwards, or there is no such disk.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Without it the others cannot keep the rules.
    #[error("disk {disk} cannot leave: {why}; `granary disk replace` gives its place to a new disk")]
    Needed {
        /// Which disk.
        disk: DiskId,
        /// The rule, and what it lacks.
        why: String,
    },
    /// The new disk was formatted with another number than the map would give it.
    #[error(
        "the new disk's label says disk {labelled}, but the new one must be disk {next}: format it with --disk {next}"
    )]
    OtherNumber {
        /// On its label.
        labelled: DiskId,
        /// The next free one.
        next: DiskId,
    },
    /// It is out of service.
    #[error("disk {0} is out of service already")]
    Out(DiskId),
    /// It is draining or away, and not empty yet.
    #[error("disk {disk} is not empty yet: {slots} slots and {replicas} shard replicas are still on it")]
    StillHolds {
        /// Which disk.
        disk: DiskId,
        /// Slots of placement groups whose chunks it holds.
        slots: usize,
        /// Shards it is a member of.
        replicas: usize,
    },
    /// It is draining: a weight would mean nothing.
    #[error("disk {0} is draining and takes no share of the data")]
    Draining(DiskId),
    /// The weight it has.
    #[error("disk {disk} has the weight {weight} already")]
    SameWeight {
        /// Which disk.
        disk: DiskId,
        /// Its weight.
        weight: u32,
    },
    /// Slots are on their way already: the disk in the middle of two moves holds what was written since the first.
    #[error("{0} slots are moving from earlier changes; wait until they have arrived, see `granary status`")]
    MovesUnderWay(usize),
    /// No slot of these is on its way from and to these disks: the map changed since the move was looked at.
    #[error("none of these moves is under way any more")]
    NotMoving,
    /// The highest epoch is reached.
    #[error("the epochs are used up")]
    EpochsUsedUp,
}

/// A new disk for the place of an old one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// The disk that goes.
    pub old: DiskId,
    /// UUID on the new disk's label.
    pub uuid: DiskUuid,
    /// The number on the new disk's label; None: whatever the map gives it.
    pub number: Option<DiskId>,
    /// `host:port` of the new disk's node; None: the old one's.
    pub address: Option<String>,
}

/// The number that the next new disk gets.
pub fn new_disk_id(map: &ClusterMap) -> DiskId {
    DiskId(map.next_disk_id)
}

/// Gives place, weight, roles, slots and shard replicas of a disk to a new one. The old disk is out for good.
///
/// # Errors
/// [`ChangeError::OtherNumber`]; [`ChangeError::Place`] when there is no such disk, it is out, or UUID or address are
/// taken.
pub fn replace(map: &ClusterMap, new: &Replacement) -> Result<ClusterMap, ChangeError> {
    let (next, id) = replace_disk(map, new.old, new.uuid, new.address.clone())?;
    match new.number {
        Some(labelled) if labelled != id => Err(ChangeError::OtherNumber { labelled, next: id }),
        _ => Ok(next),
    }
}

/// Takes a disk out of service in order. Of one in service, all slots and replicas go to other disks, which get its
/// chunks; it serves what it has until they have them. A disk that is draining or away and holds nothing any more goes
/// out for good.
///
/// # Errors
/// [`ChangeError::MovesUnderWay`]; [`ChangeError::StillHolds`] while it is not empty; [`ChangeError::Out`];
/// [`ChangeError::Needed`] when the others cannot keep the scheme or the replicas; [`ChangeError::Place`] when there is
/// no such disk.
pub fn drain(map: &ClusterMap, disk: DiskId) -> Result<ClusterMap, ChangeError> {
    let mut next = map.clone();
    let held = held_by(map, disk);
    let entry = disk_mut(&mut next, disk)?;
    match (entry.state, held) {
        (DiskState::Out, _) => Err(ChangeError::Out(disk)),
        (DiskState::In, _) => {
            none_moving(map)?;
            entry.state = DiskState::Draining;
            let next = rebalance(&next).map_err(|why| needed(map, disk, why))?;
            match held_by(&next, disk) {
                (_, 0) => Ok(next),
                // Replicas that find no other disk stay where they are: the disk would never be empty.
                (_, _) => Err(needed(map, disk, too_few_for_replicas(map))),
            }
        }
        (DiskState::Draining | DiskState::Away, (0, 0)) => {
            entry.state = DiskState::Out;
            next.epoch = next_epoch(map)?;
            next.validate().map_err(PlaceError::from)?;
            Ok(next)
        }
        (DiskState::Draining | DiskState::Away, (slots, replicas)) => {
            Err(ChangeError::StillHolds { disk, slots, replicas })
        }
    }
}

/// Gives a disk another share of the data; slots move to it or away from it.
///
/// # Errors
/// [`ChangeError::Out`], [`ChangeError::Draining`], [`ChangeError::SameWeight`], [`ChangeError::MovesUnderWay`];
/// [`ChangeError::Place`] when there is no such disk, or the scheme cannot be kept with a weight of zero.
pub fn set_weight(map: &ClusterMap, disk: DiskId, weight: u32) -> Result<ClusterMap, ChangeError> {
    let mut next = map.clone();
    let entry = disk_mut(&mut next, disk)?;
    match entry.state {
        DiskState::Out => return Err(ChangeError::Out(disk)),
        DiskState::Draining => return Err(ChangeError::Draining(disk)),
        DiskState::In | DiskState::Away if entry.weight == weight => {
            return Err(ChangeError::SameWeight { disk, weight })
        }
        DiskState::In | DiskState::Away => entry.weight = weight,
    }
    none_moving(map)?;
    Ok(rebalance(&next)?)
}

/// A move that came to its end: every chunk of the slot was found on its current disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FinishedMove {
    /// The group.
    pub group: PlacementGroupId,
    /// Index into its slots.
    pub slot: usize,
    /// What the slot was when its chunks were looked for.
    pub was: GroupSlot,
}

/// Drops the previous disk of slots whose chunks were all found on the current one. A slot that is not any more as it
/// was when its chunks were looked for keeps its previous disk: they were found elsewhere.
///
/// # Errors
/// [`ChangeError::NotMoving`] when none is as it was.
pub fn finish_moves(map: &ClusterMap, moves: &[FinishedMove]) -> Result<ClusterMap, ChangeError> {
    let mut next = map.clone();
    let mut done = 0usize;
    for finished in moves {
        let slot = next.groups.get_mut(&finished.group).and_then(|group| group.slots.get_mut(finished.slot));
        if let Some(slot) = slot.filter(|slot| slot.previous.is_some() && **slot == finished.was) {
            slot.previous = None;
            done += 1;
        }
    }
    if done == 0 {
        return Err(ChangeError::NotMoving);
    }
    next.epoch = next_epoch(map)?;
    next.validate().map_err(PlaceError::from)?;
    Ok(next)
}

/// Slots whose chunks are on their way to another disk.
pub fn slots_moving(map: &ClusterMap) -> usize {
    map.groups.values().flat_map(|group| &group.slots).filter(|slot| slot.previous.is_some()).count()
}

/// Slots whose chunks are or may be on the disk, and shards it is a member of.
pub fn held_by(map: &ClusterMap, disk: DiskId) -> (usize, usize) {
    let slots = map.groups.values().flat_map(|group| &group.slots);
    let replicas = map.shards.iter().filter(|shard| shard.members.contains(&disk)).count();
    (slots.filter(|slot| slot.disks().any(|named| named == disk)).count(), replicas)
}

/// A slot remembers one previous disk. Taken from its current disk in the middle of a move, it would forget that one,
/// which holds what was written since the move began. Only a disk that is gone is replaced all the same.
fn none_moving(map: &ClusterMap) -> Result<(), ChangeError> {
    match slots_moving(map) {
        0 => Ok(()),
        moving => Err(ChangeError::MovesUnderWay(moving)),
    }
}

fn too_few_for_replicas(map: &ClusterMap) -> PlaceError {
    let members = map.shards.iter().map(|shard| shard.members.len()).max().unwrap_or(0);
    let present = map.disks.values().filter(|disk| disk.state == DiskState::In && disk.roles.metadata).count();
    PlaceError::TooFewMetadataDisks { members, present }
}

/// Why a disk cannot give away what it holds.
fn needed(map: &ClusterMap, disk: DiskId, why: PlaceError) -> ChangeError {
    let why = match why {
        PlaceError::TooFewMetadataDisks { members, .. } => {
            let others = map.disks.values().filter(|other| other.id != disk && other.state == DiskState::In);
            let others = others.filter(|other| other.roles.metadata).count();
            format!(
                "each shard has {members} replicas on different disks, and only {others} other disks in service have the \
                 metadata role"
            )
        }
        PlaceError::TooFewDisks { scheme, needed, present, .. } => format!(
            "scheme `{scheme}` puts {needed} chunks on {needed} different disks, and only {present} other disks can take \
             chunks (in service, storage role, weight above zero)"
        ),
        other => other.to_string(),
    };
    ChangeError::Needed { disk, why }
}

fn disk_mut(map: &mut ClusterMap, disk: DiskId) -> Result<&mut Disk, ChangeError> {
    map.disks.get_mut(&disk).ok_or(ChangeError::Place(PlaceError::NoSuchDisk(disk)))
}

fn next_epoch(map: &ClusterMap) -> Result<Epoch, ChangeError> {
    map.epoch.0.checked_add(1).map(Epoch).ok_or(ChangeError::EpochsUsedUp)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::form::tests::cluster;
    use super::*;
    use granary_placement::moves::moves;

    const DISK: DiskId = DiskId(3);
    const NOBODY: DiskId = DiskId(99);

    /// The map with every move under way ended.
    fn settled(map: &ClusterMap) -> ClusterMap {
        let done: Vec<FinishedMove> = (map.groups.iter())
            .flat_map(|(group, slots)| {
                let slots = slots.slots.iter().copied().enumerate();
                slots.map(|(slot, was)| FinishedMove { group: *group, slot, was })
            })
            .collect();
        finish_moves(map, &done).unwrap()
    }

    #[test]
    fn what_is_refused_says_why_and_what_is_done_is_one_epoch_further_and_valid() {
        let map = cluster(8);
        let draining = drain(&map, DISK).unwrap();
        let out = drain(&settled(&draining), DISK).unwrap();
        let held = held_by(&draining, DISK);
        let uuid = DiskUuid([0xee; 16]);
        let new = |old, number| Replacement { old, uuid, number, address: None };
        let no_disk = || Err(ChangeError::Place(PlaceError::NoSuchDisk(NOBODY)));
        let other = ChangeError::OtherNumber { labelled: DiskId(7), next: DiskId(9) };
        let still = ChangeError::StillHolds { disk: DISK, slots: held.0, replicas: held.1 };
        // (what, before, after, what is expected of it)
        let table = [
            ("replace", &map, replace(&map, &new(DISK, None)), Ok(())),
            ("replace with the right label", &map, replace(&map, &new(DISK, Some(DiskId(9)))), Ok(())),
            ("replace with another label", &map, replace(&map, &new(DISK, Some(DiskId(7)))), Err(other)),
            ("replace nobody", &map, replace(&map, &new(NOBODY, None)), no_disk()),
            (
                "replace what is out",
                &out,
                replace(&out, &new(DISK, None)),
                Err(ChangeError::Place(PlaceError::AlreadyOut(DISK))),
            ),
            ("drain", &map, drain(&map, DISK), Ok(())),
            ("drain again while it holds something", &draining, drain(&draining, DISK), Err(still)),
            ("drain what is out", &out, drain(&out, DISK), Err(ChangeError::Out(DISK))),
            ("drain nobody", &map, drain(&map, NOBODY), no_disk()),
            ("weight", &map, set_weight(&map, DISK, 250), Ok(())),
            ("weight zero", &map, set_weight(&map, DISK, 0), Ok(())),
            (
                "the same weight",
                &map,
                set_weight(&map, DISK, 1000),
                Err(ChangeError::SameWeight { disk: DISK, weight: 1000 }),
            ),
            ("weight of a draining disk", &draining, set_weight(&draining, DISK, 1), Err(ChangeError::Draining(DISK))),
            ("weight of what is out", &out, set_weight(&out, DISK, 1), Err(ChangeError::Out(DISK))),
            ("weight of nobody", &map, set_weight(&map, NOBODY, 1), no_disk()),
            (
                "drain while slots move",
                &draining,
                drain(&draining, DiskId(1)),
                Err(ChangeError::MovesUnderWay(slots_moving(&draining))),
            ),
            (
                "weight while slots move",
                &draining,
                set_weight(&draining, DiskId(1), 1),
                Err(ChangeError::MovesUnderWay(slots_moving(&draining))),
            ),
            ("replace while slots move", &draining, replace(&draining, &new(DiskId(1), None)), Ok(())),
            ("finish nothing", &map, finish_moves(&map, &[]), Err(ChangeError::NotMoving)),
        ];
        for (what, before, after, expected) in table {
            assert_eq!(after.as_ref().map(|_| &()), expected.as_ref(), "{what}");
            let Ok(after) = after else { continue };
            assert_eq!(after.epoch.0, before.epoch.0 + 1, "{what}");
            after.validate().unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }

    #[test]
    fn a_drained_disk_keeps_its_chunks_as_previous_and_leaves_when_all_were_found_elsewhere() {
        let map = cluster(8);
        let draining = drain(&map, DISK).unwrap();
        for slots in map.groups.values().zip(draining.groups.values()).map(|(a, b)| a.slots.iter().zip(&b.slots)) {
            for (before, after) in slots.filter(|(before, _)| before.current == DISK) {
                assert_ne!(after.current, DISK);
                assert_eq!(after.previous, Some(DISK), "{before:?} {after:?}");
            }
        }
        assert!(draining.shards.iter().all(|shard| !shard.members.contains(&DISK)));
        assert_eq!(slots_moving(&draining), moves(&map, &draining).len());
        let empty = settled(&draining);
        assert_eq!((held_by(&empty, DISK), slots_moving(&empty)), ((0, 0), 0));
        let out = drain(&empty, DISK).unwrap();
        assert_eq!(out.disk(DISK).unwrap().state, DiskState::Out);
        assert_eq!(out.groups, empty.groups, "no slot moves when an empty disk leaves");
    }

    #[test]
    fn a_drain_that_would_leave_too_few_disks_is_refused() {
        let refused = drain(&cluster(6), DISK).unwrap_err().to_string();
        assert_eq!(
            refused,
            "disk 3 cannot leave: scheme `4+2` puts 6 chunks on 6 different disks, and only 5 other disks can take chunks \
             (in service, storage role, weight above zero); `granary disk replace` gives its place to a new disk"
        );
        let mut map = cluster(8);
        let members = map.shards[0].members.clone();
        for disk in map.disks.values_mut() {
            disk.roles.metadata = members.contains(&disk.id);
        }
        for shard in &mut map.shards {
            shard.members.clone_from(&members);
        }
        map.validate().unwrap();
        assert_eq!(
            drain(&map, members[0]).unwrap_err().to_string(),
            format!(
                "disk {} cannot leave: each shard has 5 replicas on different disks, and only 4 other disks in service have \
                 the metadata role; `granary disk replace` gives its place to a new disk",
                members[0]
            )
        );
    }

    #[test]
    fn weights_move_slots_to_the_heavier_disk() {
        let map = cluster(8);
        let heavier = set_weight(&map, DISK, 2000).unwrap();
        let on = |map: &ClusterMap| {
            map.groups.values().flat_map(|group| &group.slots).filter(|slot| slot.current == DISK).count()
        };
        assert!(on(&heavier) > on(&map), "{} {}", on(&heavier), on(&map));
        let moved = moves(&map, &heavier);
        assert!(!moved.is_empty() && moved.len() == slots_moving(&heavier));
    }

    #[test]
    fn a_move_ends_only_if_the_slot_is_still_what_was_looked_at() {
        let map = drain(&cluster(8), DISK).unwrap();
        let (group, slot, was) = (map.groups.iter())
            .find_map(|(group, slots)| {
                let slot = slots.slots.iter().position(|slot| slot.previous.is_some())?;
                Some((*group, slot, slots.slots[slot]))
            })
            .unwrap();
        let finished = FinishedMove { group, slot, was };
        // The disk that took the slot died meanwhile and was replaced: what was found on it is not on the new one.
        let replacement = Replacement { old: was.current, uuid: DiskUuid([0xee; 16]), number: None, address: None };
        let replaced = replace(&map, &replacement).unwrap();
        assert_eq!(finish_moves(&replaced, &[finished]), Err(ChangeError::NotMoving));
        assert_eq!(replaced.groups[&group].slots[slot].previous, Some(DISK), "the previous disk stays");
        let done = finish_moves(&map, &[finished, FinishedMove { slot: 999, ..finished }]).unwrap();
        assert_eq!(done.groups[&group].slots[slot], GroupSlot::new(was.current));
        assert_eq!(slots_moving(&done) + 1, slots_moving(&map));
    }
}
