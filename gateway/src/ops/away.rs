//! Pure: disks that died go out of service without an operator, and come back when they answer again.
//!
//! A disk that goes *away* loses its slots to substitutes, which name it as `previous`: what can still be read there is
//! read, everything else is rebuilt from the others. Only its slots move, for others may be in the middle of a move
//! themselves. When it answers again it comes back without slots; once nothing moves any more, it gets its share.

use granary_placement::id::{DiskId, Epoch};
use granary_placement::map::{ClusterMap, Disk, DiskState};
use granary_placement::moves::moves;
use granary_placement::place::{rebalance_around, substitute, PlaceError};
use std::collections::{BTreeMap, BTreeSet};

/// Why a disk stays as it is. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AwayError {
    /// The others cannot keep the rules without it.
    #[error("{why}: add a disk, or give its place to a new one with `granary disk replace {disk}`")]
    NoSubstitute {
        /// Which disk.
        disk: DiskId,
        /// What is lacking.
        why: String,
    },
    /// Some could by the rules, but they have no room.
    #[error(
        "the disks that could take over what disk {disk} held would be fuller than {ceiling_percent} % \
         (heal.fill_ceiling): delete something, add a disk, or give its place to a new one with \
         `granary disk replace {disk}`"
    )]
    Full {
        /// Which disk.
        disk: DiskId,
        /// The setting.
        ceiling_percent: u64,
    },
    /// Disks that hold nothing would be too full with their share.
    #[error("with their share they would be fuller than {ceiling_percent} % (heal.fill_ceiling)")]
    NoRoom {
        /// The setting.
        ceiling_percent: u64,
    },
    /// The map changed, or too long ago was it looked at the disks: what was to be done is to be judged anew. Or
    /// nothing is to be done.
    #[error("the cluster map has changed: it is to be judged anew")]
    Changed,
    /// An operator wants it out, but it answers.
    #[error("disk {0} answers: `granary disk drain {0}` takes it out of service in order")]
    Answers(DiskId),
    /// It is out of service.
    #[error("disk {0} is out of service already")]
    NotInService(DiskId),
    /// Half of the disks in service or more do not answer.
    #[error(transparent)]
    Half(#[from] Half),
    /// A rule of the map.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// Half of the disks in service or more do not answer this gateway as they should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{silent} of {of} disks in service do not answer this gateway, which looks like the network or the power rather than \
     disks: none goes out until more than half answer"
)]
pub struct Half {
    /// So many do not.
    pub silent: usize,
    /// So many are in service.
    pub of: usize,
}

/// Are half of the disks in service or more silent? One that is draining counts like any other.
pub fn half_silent(map: &ClusterMap, answers: impl Fn(DiskId) -> bool) -> Option<Half> {
    let serving = || map.disks.values().filter(|disk| disk.state.holds_slots());
    let (silent, of) = (serving().filter(|disk| !answers(disk.id)).count(), serving().count());
    (silent * 2 >= of).then_some(Half { silent, of })
}

/// How full a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Size of its file system.
    pub capacity_bytes: u64,
    /// What new chunks may still take.
    pub free_bytes: u64,
    /// Payload of its chunks.
    pub chunk_bytes: u64,
}

/// Who may take over slots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Takers {
    /// Disks that do not answer as they should: they take nothing.
    pub unwell: BTreeSet<DiskId>,
    /// What is known of the room on disks, of dead ones as it was.
    pub rooms: BTreeMap<DiskId, Room>,
    /// No disk gets slots that would make it fuller than this.
    pub ceiling_percent: u64,
}

/// Takes a dead disk out of service: its slots go to substitutes. One that was draining has given its slots away
/// already; it is out for those whose chunks still came from it, and its weight is zero from then on.
///
/// # Errors
/// [`AwayError::NoSubstitute`], [`AwayError::Full`]; [`AwayError::Changed`] when it is not in service.
pub fn take_out(map: &ClusterMap, disk: DiskId, takers: &Takers) -> Result<ClusterMap, AwayError> {
    let mut changed = map.clone();
    let entry = changed.disks.get_mut(&disk).filter(|entry| entry.state.holds_slots()).ok_or(AwayError::Changed)?;
    if entry.state == DiskState::Draining {
        // What was to leave is not to be filled again when it comes back.
        entry.weight = 0;
    }
    entry.state = DiskState::Away;
    let unwell: BTreeSet<DiskId> = takers.unwell.iter().copied().filter(|other| *other != disk).collect();
    let by_rule = match substitute(&changed, &unwell) {
        // The disks that the slots of a group come from take no other slot of it. Where that is all that stands in the
        // way, slots that were on their way to the dead disk go back to where they come from.
        Err(PlaceError::MovesUnderWay { .. }) => {
            turn_back(&mut changed, disk, &unwell);
            substitute(&changed, &unwell)
        }
        other => other,
    };
    let mut next = by_rule.map_err(|why| AwayError::NoSubstitute { disk, why: lacking(map, disk, why) })?;
    // Disks that are or would be too full are left out, until none is, or nobody is left.
    let mut barred = unwell;
    loop {
        let full: Vec<DiskId> =
            too_full(map, &next, Some(disk), takers).filter(|full| !barred.contains(full)).collect();
        if full.is_empty() {
            return Ok(next);
        }
        barred.extend(full);
        let ceiling_percent = takers.ceiling_percent;
        next = substitute(&changed, &barred).map_err(|_| AwayError::Full { disk, ceiling_percent })?;
    }
}

/// As [`take_out`], by an operator's word: without waiting, and however many went out within the hour. `is_down`: it
/// does not answer.
///
/// # Errors
/// [`AwayError::Answers`], [`AwayError::NotInService`], [`AwayError::Half`], and those of [`take_out`].
pub fn take_out_now(map: &ClusterMap, disk: DiskId, takers: &Takers, is_down: bool) -> Result<ClusterMap, AwayError> {
    let state = map.disk(disk).ok_or(PlaceError::NoSuchDisk(disk))?.state;
    if !state.holds_slots() {
        return Err(AwayError::NotInService(disk));
    }
    if !is_down {
        return Err(AwayError::Answers(disk));
    }
    if let Some(half) = half_silent(map, |disk| !takers.unwell.contains(&disk)) {
        return Err(half.into());
    }
    take_out(map, disk, takers)
}

/// Lets a disk that answers again back in, without slots.
///
/// # Errors
/// [`AwayError::Changed`] when it is not away.
pub fn let_in(map: &ClusterMap, disk: DiskId) -> Result<ClusterMap, AwayError> {
    let mut next = map.clone();
    let entry = next.disks.get_mut(&disk).filter(|entry| entry.state == DiskState::Away).ok_or(AwayError::Changed)?;
    entry.state = DiskState::In;
    next.epoch = map.epoch.0.checked_add(1).map(Epoch).ok_or(AwayError::Changed)?;
    next.validate().map_err(PlaceError::from)?;
    Ok(next)
}

/// Gives disks in service that hold nothing their share: they were let back in, or took the place of one that was away.
/// A weight may be so small that its share is no slot at all: when none of them gets one, nothing is changed, for it
/// would be done again and again. No disk gets slots that would make it fuller than the ceiling.
///
/// # Errors
/// [`AwayError::Changed`] when there is none, none gets a slot, or slots are moving; [`AwayError::NoRoom`];
/// [`AwayError::Place`].
pub fn fill_empty(map: &ClusterMap, takers: &Takers) -> Result<ClusterMap, AwayError> {
    let empty = empty_disks(map).count();
    if super::slots_moving(map) > 0 || empty == 0 {
        return Err(AwayError::Changed);
    }
    let (mut barred, mut none) = (takers.unwell.clone(), AwayError::Changed);
    loop {
        let next = rebalance_around(map, &barred)?;
        if empty_disks(&next).count() >= empty {
            return Err(none);
        }
        let full: Vec<DiskId> = too_full(map, &next, None, takers).filter(|full| !barred.contains(full)).collect();
        if full.is_empty() {
            return Ok(next);
        }
        barred.extend(full);
        none = AwayError::NoRoom { ceiling_percent: takers.ceiling_percent };
    }
}

/// Disks in service that are to hold data and have no slot.
pub fn empty_disks(map: &ClusterMap) -> impl Iterator<Item = DiskId> + '_ {
    let holds: BTreeSet<DiskId> = map.groups.values().flat_map(|group| &group.slots).map(|slot| slot.current).collect();
    let takes = map.disks.values().filter(|disk| disk.state == DiskState::In && disk.roles.storage && disk.weight > 0);
    takes.map(|disk| disk.id).filter(move |disk| !holds.contains(disk))
}

/// Slots that were on their way to the dead disk from one that could keep them.
fn turn_back(map: &mut ClusterMap, dead: DiskId, unwell: &BTreeSet<DiskId>) {
    let keeps = |disk: DiskId| {
        let disk = map.disks.get(&disk);
        // One that takes no slots would lose it again at once, and be forgotten as the disk that its chunks come from.
        let takes = |disk: &Disk| disk.state == DiskState::In && disk.roles.storage && disk.weight > 0;
        disk.is_some_and(|disk| takes(disk) && !unwell.contains(&disk.id))
    };
    let keepers: BTreeSet<DiskId> = map.disks.keys().copied().filter(|disk| keeps(*disk)).collect();
    for slot in map.groups.values_mut().flat_map(|group| &mut group.slots) {
        if slot.current == dead && slot.previous.is_some_and(|previous| keepers.contains(&previous)) {
            slot.turn_back();
        }
    }
}

/// Disks that get slots by the change and would be above the ceiling once all is there that is on its way to them, by
/// this change and by those before.
fn too_full<'a>(
    before: &'a ClusterMap,
    after: &'a ClusterMap,
    dead: Option<DiskId>,
    takers: &'a Takers,
) -> impl Iterator<Item = DiskId> + 'a {
    let gain: BTreeSet<DiskId> = moves(before, after).iter().map(|one| one.to).collect();
    let mut coming: BTreeMap<DiskId, u64> = BTreeMap::new();
    for slot in after.groups.values().flat_map(|group| &group.slots).filter(|slot| slot.previous.is_some()) {
        *coming.entry(slot.current).or_default() += 1;
    }
    let per_slot = bytes_per_slot(before, dead, &takers.rooms);
    gain.into_iter().filter(move |disk| {
        let Some(room) = takers.rooms.get(disk) else { return false };
        let used = room.capacity_bytes.saturating_sub(room.free_bytes);
        let slots = coming.get(disk).copied().unwrap_or(0);
        let then = u128::from(used) + u128::from(slots) * u128::from(per_slot);
        then * 100 > u128::from(room.capacity_bytes) * u128::from(takers.ceiling_percent)
    })
}

/// About how much lies in a slot: of the dead disk, or of the disk in the middle if that is more. No disk holds more
/// than its capacity, and one that says something absurd of itself must not make all others look full.
fn bytes_per_slot(map: &ClusterMap, dead: Option<DiskId>, rooms: &BTreeMap<DiskId, Room>) -> u64 {
    let mut slots: BTreeMap<DiskId, u64> = BTreeMap::new();
    map.groups.values().flat_map(|group| &group.slots).for_each(|slot| *slots.entry(slot.current).or_default() += 1);
    let per_slot = |room: &Room, slots: u64| room.chunk_bytes.min(room.capacity_bytes) / slots.max(1);
    let known = rooms.iter().filter_map(|(disk, room)| Some((*disk, per_slot(room, *slots.get(disk)?))));
    let mut known: Vec<(DiskId, u64)> = known.collect();
    let of_dead = known.iter().find(|(disk, _)| Some(*disk) == dead).map_or(0, |(_, bytes)| *bytes);
    known.sort_unstable_by_key(|(_, bytes)| *bytes);
    of_dead.max(known.get(known.len() / 2).map_or(0, |(_, bytes)| *bytes))
}

/// What keeps the others from taking over, in words.
fn lacking(map: &ClusterMap, dead: DiskId, why: PlaceError) -> String {
    match why {
        PlaceError::TooFewDisks { scheme, needed, present } => format!(
            "nobody can take over what disk {dead} held: scheme `{scheme}` puts {needed} chunks on {needed} different disks, \
             and only {present} other disks are in service"
        ),
        PlaceError::MovesUnderWay { .. } => format!(
            "nobody can take over what disk {dead} held now: of the {} other disks in service some do not answer, or are \
             giving away slots of the same groups",
            map.disks.values().filter(|disk| disk.id != dead && disk.state == DiskState::In).count()
        ),
        other => format!("nobody can take over what disk {dead} held: {other}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::form::tests::cluster;
    use super::super::slots_moving;
    use super::*;
    use granary_placement::map::GroupSlot;
    use granary_placement::place::rebalance;

    const GIB: u64 = 1 << 30;

    fn takers() -> Takers {
        Takers { ceiling_percent: 90, ..Takers::default() }
    }

    fn slots_of(map: &ClusterMap, disk: DiskId) -> usize {
        map.groups.values().flat_map(|group| &group.slots).filter(|slot| slot.current == disk).count()
    }

    fn settled(map: &ClusterMap) -> ClusterMap {
        let mut map = map.clone();
        map.groups.values_mut().flat_map(|group| &mut group.slots).for_each(|slot| slot.previous = None);
        map
    }

    #[test]
    fn a_dead_disk_gives_its_slots_to_the_others_and_comes_back_without_any() {
        let (map, dead) = (cluster(8), DiskId(3));
        let out = take_out(&map, dead, &takers()).unwrap();
        assert_eq!((out.epoch.0, out.disk(dead).unwrap().state, slots_of(&out, dead)), (2, DiskState::Away, 0));
        for (before, after) in map.groups.values().zip(out.groups.values()) {
            for (before, after) in before.slots.iter().zip(&after.slots) {
                match before.current == dead {
                    true => assert_eq!((after.previous, after.current == dead), (Some(dead), false)),
                    false => assert_eq!(before, after, "nothing else moves"),
                }
            }
        }
        assert_eq!(take_out(&out, dead, &takers()), Err(AwayError::Changed));
        // In the middle of the moves it can come back, and gets nothing as long as anything moves.
        let back = let_in(&out, dead).unwrap();
        assert_eq!((back.disk(dead).unwrap().state, slots_of(&back, dead)), (DiskState::In, 0));
        assert_eq!(slots_moving(&back), slots_moving(&out), "moves go on");
        assert_eq!(fill_empty(&back, &takers()), Err(AwayError::Changed));
        let filled = fill_empty(&settled(&back), &takers()).unwrap();
        assert!(slots_of(&filled, dead).abs_diff(slots_of(&map, dead)) <= 3, "{}", slots_of(&filled, dead));
        assert_eq!(fill_empty(&settled(&filled), &takers()), Err(AwayError::Changed), "nobody is empty");
        assert_eq!(let_in(&back, dead), Err(AwayError::Changed));
    }

    #[test]
    fn a_disk_whose_share_is_less_than_a_slot_gets_none_and_makes_no_new_map() {
        let mut map = settled(&let_in(&take_out(&cluster(8), DiskId(3), &takers()).unwrap(), DiskId(3)).unwrap());
        map.disks.get_mut(&DiskId(3)).unwrap().weight = 1;
        assert_eq!(empty_disks(&map).collect::<Vec<_>>(), [DiskId(3)]);
        assert_eq!(rebalance(&map).unwrap().groups, map.groups, "its share is no slot");
        assert!(matches!(fill_empty(&map, &takers()), Err(AwayError::Changed)));
    }

    #[test]
    fn a_dead_disk_that_was_draining_goes_out_and_is_not_filled_again_when_it_comes_back() {
        let (disk, draining) = (DiskId(3), crate::ops::drain(&cluster(8), DiskId(3)).unwrap());
        let out = take_out(&draining, disk, &takers()).unwrap();
        assert_eq!((out.disk(disk).unwrap().state, out.disk(disk).unwrap().weight), (DiskState::Away, 0));
        assert_eq!(out.groups, draining.groups, "what left it goes on to where it was going");
        let back = settled(&let_in(&out, disk).unwrap());
        assert_eq!(back.disk(disk).unwrap().state, DiskState::In);
        assert_eq!(
            (fill_empty(&back, &takers()), slots_of(&rebalance(&back).unwrap(), disk)),
            (Err(AwayError::Changed), 0)
        );
    }

    #[test]
    fn an_operator_takes_out_what_is_dead_and_nothing_else() {
        let (map, disk) = (cluster(9), DiskId(3));
        let silent = |disks: &[u32]| Takers { unwell: disks.iter().copied().map(DiskId).collect(), ..takers() };
        let out = take_out(&map, disk, &silent(&[3])).unwrap();
        // (map, which, who does not answer, is it down, what comes of it)
        for (what, map, disk, takers, is_down, expected) in [
            ("it is dead", &map, disk, silent(&[3]), true, Ok(())),
            ("so are others", &map, disk, silent(&[3, 4, 5]), true, Ok(())),
            ("it answers", &map, disk, silent(&[]), false, Err(AwayError::Answers(disk))),
            ("it is out", &out, disk, silent(&[3]), true, Err(AwayError::NotInService(disk))),
            ("half are", &map, disk, silent(&[1, 2, 3, 4, 5]), true, Err(Half { silent: 5, of: 9 }.into())),
            ("no such disk", &map, DiskId(99), silent(&[]), true, Err(PlaceError::NoSuchDisk(DiskId(99)).into())),
        ] {
            let made = take_out_now(map, disk, &takers, is_down);
            assert_eq!(made.as_ref().map(|_| &()), expected.as_ref(), "{what}");
            if let Ok(made) = made {
                assert_eq!(made, take_out(map, disk, &takers).unwrap(), "{what}");
            }
        }
    }

    #[test]
    fn six_disks_at_four_and_two_have_no_substitute_and_it_is_said_what_to_do() {
        let refused = take_out(&cluster(6), DiskId(3), &takers()).unwrap_err().to_string();
        assert_eq!(
            refused,
            "nobody can take over what disk 3 held: scheme `4+2` puts 6 chunks on 6 different disks, and only 5 other disks \
             are in service: add a disk, or give its place to a new one with `granary disk replace 3`"
        );
        take_out(&cluster(7), DiskId(3), &takers()).unwrap();
    }

    #[test]
    fn disks_that_do_not_answer_take_nothing_over() {
        let unwell = BTreeSet::from([DiskId(3), DiskId(5)]);
        let out = take_out(&cluster(8), DiskId(3), &Takers { unwell: unwell.clone(), ..takers() }).unwrap();
        assert!(moves(&cluster(8), &out).iter().all(|one| one.from == DiskId(3) && one.to != DiskId(5)));
        let refused = take_out(&cluster(7), DiskId(3), &Takers { unwell, ..takers() }).unwrap_err();
        assert!(matches!(refused, AwayError::NoSubstitute { .. }), "{refused}");
    }

    #[test]
    fn disks_above_the_fill_ceiling_take_nothing_and_when_all_are_it_is_said() {
        let map = cluster(10);
        let room = |used_percent: u64, chunk_bytes: u64| Room {
            capacity_bytes: 100 * GIB,
            free_bytes: (100 - used_percent) * GIB,
            chunk_bytes,
        };
        let rooms = |full: std::ops::RangeInclusive<u32>, used: u64, bytes: u64| -> BTreeMap<DiskId, Room> {
            let rooms = (1..=10).map(|disk| (DiskId(disk), room(if full.contains(&disk) { used } else { 50 }, bytes)));
            rooms.collect()
        };
        let with = |rooms| Takers { rooms, ..takers() };
        // (who is full, how full, bytes on each disk, who takes something over; None: refused)
        for (full, used, bytes, refused) in [
            (0..=0, 0, 10 * GIB, false),
            (1..=2, 91, 10 * GIB, false),
            // Below the ceiling now, above it with what they would get.
            (1..=2, 89, 60 * GIB, false),
            (1..=10, 91, 10 * GIB, true),
            (1..=10, 89, 80 * GIB, true),
        ] {
            let out = take_out(&map, DiskId(7), &with(rooms(full.clone(), used, bytes)));
            if refused {
                assert_eq!(out, Err(AwayError::Full { disk: DiskId(7), ceiling_percent: 90 }), "{full:?} {used} %");
                continue;
            }
            let out = out.unwrap();
            assert!(moves(&map, &out).iter().all(|one| !full.contains(&one.to.0)), "{full:?} {used} %");
        }
    }

    #[test]
    fn a_disk_that_says_something_absurd_of_itself_makes_no_others_look_full() {
        let map = cluster(10);
        let room = Room { capacity_bytes: 100 * GIB, free_bytes: 50 * GIB, chunk_bytes: 10 * GIB };
        // (who says something absurd, what; each is to cost at most what a disk that is as full as it is large costs)
        for (absurd, capacity_bytes) in [(3, 100 * GIB), (3, u64::MAX), (7, 100 * GIB)] {
            let mut rooms: BTreeMap<DiskId, Room> = (1..=10).map(|disk| (DiskId(disk), room)).collect();
            rooms.insert(DiskId(absurd), Room { capacity_bytes, chunk_bytes: u64::MAX, ..room });
            let out = take_out(&map, DiskId(7), &Takers { rooms, ..takers() });
            assert!(out.is_ok(), "{absurd} {capacity_bytes}: {out:?}");
        }
    }

    #[test]
    fn what_is_still_on_its_way_to_a_disk_counts_for_the_ceiling() {
        // Each disk has 54 GiB in about as many slots and is to be no fuller than 65 %: one more death is borne, not
        // two.
        let map = cluster(10);
        let room = Room { capacity_bytes: 100 * GIB, free_bytes: 46 * GIB, chunk_bytes: 54 * GIB };
        let rooms: BTreeMap<DiskId, Room> = (1..=10).map(|disk| (DiskId(disk), room)).collect();
        let takers = Takers { rooms, ceiling_percent: 65, ..takers() };
        let once = take_out(&map, DiskId(7), &takers).unwrap();
        assert!(slots_moving(&once) > 40, "{}", slots_moving(&once));
        let refused = AwayError::Full { disk: DiskId(5), ceiling_percent: 65 };
        assert_eq!(take_out(&once, DiskId(5), &takers), Err(refused), "nothing has arrived yet");
    }

    #[test]
    fn disks_that_hold_nothing_get_no_share_that_would_make_them_too_full() {
        let map = settled(&let_in(&take_out(&cluster(8), DiskId(3), &takers()).unwrap(), DiskId(3)).unwrap());
        let rooms = |free_of_empty: u64| -> BTreeMap<DiskId, Room> {
            let room = |disk| {
                let (free, chunks) = if disk == DiskId(3) { (free_of_empty, 0) } else { (43, 57) };
                (disk, Room { capacity_bytes: 100 * GIB, free_bytes: free * GIB, chunk_bytes: chunks * GIB })
            };
            map.disks.keys().map(|disk| room(*disk)).collect()
        };
        // Its share is about 50 GiB; what it has left over of its own may be so much that there is no room for it.
        for (free, fits) in [(100, true), (65, true), (55, false), (5, false)] {
            let filled = fill_empty(&map, &Takers { rooms: rooms(free), ..takers() });
            match fits {
                true => assert!(slots_of(&filled.unwrap(), DiskId(3)) > 40, "{free}"),
                false => assert_eq!(filled, Err(AwayError::NoRoom { ceiling_percent: 90 }), "{free}"),
            }
        }
        let unwell = BTreeSet::from([DiskId(3)]);
        assert_eq!(fill_empty(&map, &Takers { unwell, ..takers() }), Err(AwayError::Changed), "it does not answer");
    }

    #[test]
    fn a_disk_that_takes_no_slots_is_not_forgotten_as_the_one_that_chunks_come_from() {
        // Disk 3 has the weight zero and is being emptied; disk 7 gives a slot away; both go to 5, which dies.
        let mut map = cluster(8);
        map.disks.get_mut(&DiskId(3)).unwrap().weight = 0;
        let groups: Vec<_> = map.groups.keys().copied().take(2).collect();
        map.groups.retain(|group, _| groups.contains(group));
        let (leaving, tight) = (GroupSlot { current: DiskId(5), previous: Some(DiskId(3)) }, groups[1]);
        let slots = |disks: [u32; 5], last: GroupSlot| {
            disks.iter().map(|disk| GroupSlot::new(DiskId(*disk))).chain([last]).collect::<Vec<_>>()
        };
        map.groups.get_mut(&groups[0]).unwrap().slots = slots([1, 2, 4, 6, 7], leaving);
        let from_seven = GroupSlot { current: DiskId(5), previous: Some(DiskId(7)) };
        map.groups.get_mut(&tight).unwrap().slots = slots([1, 2, 4, 6, 8], from_seven);
        map.validate().unwrap();
        let out = take_out(&map, DiskId(5), &takers()).unwrap();
        let turned = GroupSlot { current: DiskId(7), previous: Some(DiskId(5)) };
        assert_eq!(out.groups[&tight].slots[5], turned, "nobody but disk 7 can take it");
        let kept = GroupSlot { current: DiskId(8), previous: Some(DiskId(3)) };
        assert_eq!(out.groups[&groups[0]].slots[5], kept, "the chunks still come from disk 3");
    }

    #[test]
    fn a_second_death_in_the_middle_keeps_where_the_chunks_come_from() {
        let map = cluster(8);
        let once = take_out(&map, DiskId(3), &takers()).unwrap();
        let second = once.groups.values().flat_map(|group| &group.slots).find(|slot| slot.previous.is_some());
        let second = second.unwrap().current;
        let twice = take_out(&once, second, &takers()).unwrap();
        for (before, after) in once.groups.values().zip(twice.groups.values()) {
            for (before, after) in before.slots.iter().zip(&after.slots).filter(|(before, _)| before.current == second)
            {
                assert_eq!(after.previous, before.previous.or(Some(second)));
            }
        }
    }

    #[test]
    fn slots_go_back_to_a_disk_that_has_returned_when_nobody_else_can_take_them() {
        // Seven disks: 3 dies and everything of it is on its way to the others, then 5 dies, and 3 is back.
        let out = take_out(&cluster(7), DiskId(3), &takers()).unwrap();
        let refused = take_out(&out, DiskId(5), &takers()).unwrap_err();
        assert!(matches!(refused, AwayError::NoSubstitute { .. }), "{refused}");
        // What is on its way to living disks has to arrive first: until then disk 3 takes no other slot of those
        // groups.
        let mut back = let_in(&out, DiskId(3)).unwrap();
        let refused = take_out(&back, DiskId(5), &takers()).unwrap_err();
        assert!(refused.to_string().contains("giving away slots of the same groups"), "{refused}");
        for slot in back.groups.values_mut().flat_map(|group| &mut group.slots) {
            slot.previous = slot.previous.filter(|_| slot.current == DiskId(5));
        }
        let healed = take_out(&back, DiskId(5), &takers()).unwrap();
        let mut turned = 0;
        for (before, after) in back.groups.values().zip(healed.groups.values()) {
            for (before, after) in before.slots.iter().zip(&after.slots) {
                if *before == (GroupSlot { current: DiskId(5), previous: Some(DiskId(3)) }) {
                    assert_eq!(*after, GroupSlot { current: DiskId(3), previous: Some(DiskId(5)) });
                    turned += 1;
                }
            }
        }
        assert!(turned > 0);
    }
}
