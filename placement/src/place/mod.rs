//! Placement: lay groups and shard replicas out over failure domains, and change a layout as little as possible.
//!
//! Everything here is a function from values to values, and the same map always gives the same answer. The rules, in
//! order of rank:
//!
//! 1. no two chunks of a group on one disk; at most M in one domain of the scheme's kind and in those nested in it. A
//!    layout that cannot keep this is refused;
//! 2. every disk holds its weight's share of the slots, within 5 % or rounding, as far as rule 1 allows;
//! 3. a group has as few chunks in one zone, rack and server as rule 2 allows;
//! 4. a change moves no more than 1.1 times the slots that rules 1 and 2 demand.
//!
//! How: `tree` says what share of an average group each domain is to hold, `deal` lays fresh groups out by those
//! shares, and `settle` repairs an existing layout on a `board`. Why so: docs/decisions/0002-placement.md.

mod board;
mod deal;
mod error;
mod fresh;
mod replicas;
mod settle;
mod tree;

pub use error::PlaceError;
pub use fresh::{new_map, NewCluster, NewDisk};
pub use replicas::{choose_shard_replicas, default_replicas};

use crate::id::{DiskId, DiskUuid, Epoch, PlacementGroupId};
use crate::map::{ClusterMap, Disk, DiskState, GroupSlot, MapError, PlacementGroup};
use crate::scheme::{FailureDomain, Scheme};
use board::{Band, Board};
use deal::Dealer;
use settle::Allowance;
use std::collections::{BTreeMap, BTreeSet};
use tree::{Caps, Item, Tree};

/// Slots of placement groups per disk, unless a cluster is made with another number: fine enough to share a disk's data
/// out to 50 others and to hold weights within 2 %, few enough that groups are full of extents and the map stays small.
pub const DEFAULT_GROUPS_PER_DISK: u32 = 50;

/// Placement groups of a scheme for disks that hold none of it yet: about `groups_per_disk` slots a disk.
///
/// Reads the map's disks and the named scheme, nothing else; the caller gives the groups their ids.
///
/// # Errors
/// [`PlaceError`] when the scheme is unknown or invalid, when the disks in service cannot keep it, or when
/// `groups_per_disk` is zero or gives more groups than ids.
pub fn lay_out(map: &ClusterMap, scheme_name: &str, groups_per_disk: u32) -> Result<Vec<PlacementGroup>, PlaceError> {
    let scheme = scheme_of(map, scheme_name)?;
    let tree = storage_tree(map, scheme_name, scheme)?;
    let width = scheme.width();
    let groups = group_count(storage_disks(map).count(), width, groups_per_disk)?;
    let shares = tree.shares(width, groups);
    let mut board = Board::new(&tree, &shares, tree.caps.clone(), groups, width, Band::Whole);
    let mut dealer = Dealer::new(&tree, &shares.quota);
    for group in 0..groups {
        dealer.deal(&mut board, group, width);
    }
    board.settle(Allowance::All);
    let group = |group| -> Option<PlacementGroup> {
        let slots =
            board.slots_of(group).map(|slot| board.disk_at(slot).map(GroupSlot::new)).collect::<Option<Vec<_>>>()?;
        Some(PlacementGroup { scheme: scheme_name.to_owned(), slots })
    };
    // A tree with room for a group fills every slot, so None would be a defect here; refuse rather than commit it.
    (0..groups).map(group).collect::<Option<Vec<_>>>().ok_or_else(|| PlaceError::no_room(scheme_name, scheme, &tree))
}

/// The map at the next epoch with groups and replicas changed as little as possible, so that every rule holds for the
/// disks as they are in `map`: after a disk was added, set draining or out, or given another weight, place or role.
///
/// A shard replica on a disk out of service for which there is no substitute stays named in its shard: a smaller group
/// would not survive more. It moves as soon as a metadata disk is added.
///
/// # Errors
/// [`PlaceError::TooFewDisks`] or [`PlaceError::NoRoom`] when the disks left cannot keep a scheme that has groups: the
/// change is refused as a whole. [`PlaceError::MovesUnderWay`] when they only cannot because disks that chunks are
/// still moving away from may not take other slots of the same groups. [`PlaceError::Map`] when the map breaks a rule
/// that moving slots does not repair.
pub fn rebalance(map: &ClusterMap) -> Result<ClusterMap, PlaceError> {
    settle_all(map, Allowance::Few, &BTreeSet::new())
}

/// Like [`rebalance`], but disks in `barred` take no further slots and no further shard replicas.
///
/// # Errors
/// Those of [`rebalance`]; [`PlaceError::MovesUnderWay`] also when there are only barred disks left to take a slot.
pub fn rebalance_around(map: &ClusterMap, barred: &BTreeSet<DiskId>) -> Result<ClusterMap, PlaceError> {
    settle_all(map, Allowance::Few, barred)
}

/// The map at the next epoch with other disks for the slots whose disk may hold none any more, and no other slot moved:
/// for disks that died, perhaps in the middle of moves. What a living disk took in since a move began is on no other
/// disk, so its slot is not taken from it to even out shares. Disks in `barred` take no further slots and
/// no further shard replicas. Replicas on living disks stay where they are, too.
///
/// # Errors
/// Those of [`rebalance`]; [`PlaceError::MovesUnderWay`] also when there are only barred disks left to take a slot.
pub fn substitute(map: &ClusterMap, barred: &BTreeSet<DiskId>) -> Result<ClusterMap, PlaceError> {
    settle_all(map, Allowance::Vacant, barred)
}

/// Like [`rebalance`], but moves as many slots as it takes to have as few chunks of a group in one zone, rack and
/// server as the shares allow. For an operator after growth: [`rebalance`] mends only what it can for a few moves more.
///
/// # Errors
/// Those of [`rebalance`].
pub fn spread(map: &ClusterMap) -> Result<ClusterMap, PlaceError> {
    settle_all(map, Allowance::All, &BTreeSet::new())
}

fn settle_all(map: &ClusterMap, allowance: Allowance, barred: &BTreeSet<DiskId>) -> Result<ClusterMap, PlaceError> {
    map.validate_structure()?;
    let mut next = map.clone();
    let mut by_scheme: BTreeMap<&str, Vec<PlacementGroupId>> = BTreeMap::new();
    for (id, group) in &map.groups {
        by_scheme.entry(&group.scheme).or_default().push(*id);
    }
    for (name, ids) in by_scheme {
        let scheme = scheme_of(map, name)?;
        let tree = storage_tree(map, name, scheme)?;
        if !settle_groups(&mut next, &ids, &tree, (scheme.width(), allowance), barred) {
            return Err(PlaceError::MovesUnderWay { scheme: name.to_owned() });
        }
    }
    let replicas = if allowance == Allowance::Vacant { Allowance::Vacant } else { Allowance::All };
    replicas::settle(&mut next, replicas, barred);
    next.epoch = next_epoch(map)?;
    next.validate()?;
    Ok(next)
}

/// The map at the next epoch with a new disk in the place of `old`: same location, weight, roles and slots under a new
/// id, and the same address unless another is given. `old` is out of service; its slots name it as `previous` until the
/// new disk has everything.
///
/// # Errors
/// [`PlaceError::NoSuchDisk`], [`PlaceError::AlreadyOut`]; [`PlaceError::Map`] when the new UUID or address is taken.
pub fn replace_disk(
    map: &ClusterMap,
    old: DiskId,
    new_uuid: DiskUuid,
    address: Option<String>,
) -> Result<(ClusterMap, DiskId), PlaceError> {
    let was = map.disk(old).ok_or(PlaceError::NoSuchDisk(old))?;
    if was.state == DiskState::Out {
        return Err(PlaceError::AlreadyOut(old));
    }
    let id = DiskId(map.next_disk_id);
    let new = Disk {
        id,
        uuid: new_uuid,
        address: address.unwrap_or_else(|| was.address.clone()),
        state: DiskState::In,
        ..was.clone()
    };
    let mut next = map.clone();
    next.next_disk_id = map.next_disk_id.checked_add(1).ok_or(PlaceError::IdsExhausted)?;
    if let Some(disk) = next.disks.get_mut(&old) {
        disk.state = DiskState::Out;
    }
    next.disks.insert(id, new);
    for slot in next.groups.values_mut().flat_map(|group| &mut group.slots).filter(|slot| slot.current == old) {
        slot.give_to(id);
    }
    for member in next.shards.iter_mut().flat_map(|shard| &mut shard.members).filter(|member| **member == old) {
        *member = id;
    }
    next.epoch = next_epoch(map)?;
    next.validate()?;
    Ok((next, id))
}

/// The map at the next epoch with one more scheme and its groups, ids following the highest in use. No verb offers it
/// yet; tests lay out a second scheme by it.
///
/// # Errors
/// [`PlaceError::SchemeExists`], and those of [`lay_out`].
pub fn add_scheme(
    map: &ClusterMap,
    name: &str,
    scheme: Scheme,
    groups_per_disk: u32,
) -> Result<ClusterMap, PlaceError> {
    if map.schemes.contains_key(name) {
        return Err(PlaceError::SchemeExists(name.to_owned()));
    }
    let mut next = map.clone();
    next.schemes.insert(name.to_owned(), scheme);
    let groups = lay_out(&next, name, groups_per_disk)?;
    let first = next.groups.last_key_value().map_or(0, |(id, _)| u64::from(id.0) + 1);
    for (number, group) in (first..).zip(groups) {
        let id = u32::try_from(number).map_err(|_| PlaceError::IdsExhausted)?;
        next.groups.insert(PlacementGroupId(id), group);
    }
    next.epoch = next_epoch(map)?;
    next.validate()?;
    Ok(next)
}

/// Returns false when slots stay without a disk.
fn settle_groups(
    map: &mut ClusterMap,
    ids: &[PlacementGroupId],
    tree: &Tree,
    (width, allowance): (usize, Allowance),
    barred: &BTreeSet<DiskId>,
) -> bool {
    let shares = tree.shares(width, ids.len());
    let mut board = Board::new(tree, &shares, tree.caps.clone(), ids.len(), width, Band::FivePercent);
    for (group, id) in ids.iter().enumerate() {
        let Some(existing) = map.groups.get(id) else { continue };
        for disk in existing.slots.iter().filter_map(|slot| slot.previous).chain(barred.iter().copied()) {
            if let Some(leaf) = tree.leaf(disk) {
                board.bar(group, leaf);
            }
        }
        for (slot, disk) in board.slots_of(group).zip(existing.slots.iter().map(|slot| &slot.current)) {
            // A disk that is not in the tree can hold no slot, and a disk named twice keeps the first.
            let leaf =
                tree.leaf(*disk).filter(|leaf| !board.slots_of(group).any(|other| board.at(other) == Some(*leaf)));
            if let Some(leaf) = leaf {
                board.place(slot, leaf);
            }
        }
    }
    board.remember_origin();
    if !board.settle(allowance) {
        return false;
    }
    for (group, id) in ids.iter().enumerate() {
        let Some(existing) = map.groups.get_mut(id) else { continue };
        let new: Vec<DiskId> = board.slots_of(group).filter_map(|slot| board.disk_at(slot)).collect();
        deal_to_slots(&mut existing.slots, &new);
    }
    true
}

/// Gives a group's slots these disks. Which slot gets which does not matter to the rules, so that no disk changes its
/// slot: what lies on it stays where it is, and no slot's `previous` is another's `current`.
fn deal_to_slots(slots: &mut [GroupSlot], disks: &[DiskId]) {
    let mut joining = disks.to_vec();
    let mut leaving = Vec::new();
    for slot in slots {
        match joining.iter().position(|disk| *disk == slot.current) {
            Some(stays) => {
                joining.remove(stays);
            }
            None => leaving.push(slot),
        }
    }
    for (slot, disk) in leaving.into_iter().zip(joining) {
        slot.give_to(disk);
        // A group that named one disk twice: the other of the two slots keeps it.
        slot.previous = slot.previous.filter(|previous| !disks.contains(previous));
    }
}

/// The disks that can take slots.
fn storage_disks(map: &ClusterMap) -> impl Iterator<Item = &Disk> {
    map.disks.values().filter(|disk| disk.state == DiskState::In && disk.roles.storage && disk.weight > 0)
}

fn storage_tree(map: &ClusterMap, name: &str, scheme: Scheme) -> Result<Tree, PlaceError> {
    let items: Vec<Item<'_>> =
        storage_disks(map).map(|disk| Item { id: disk.id, location: &disk.location, weight: disk.weight }).collect();
    if items.len() < scheme.width() {
        return Err(PlaceError::TooFewDisks { scheme: name.to_owned(), needed: scheme.width(), present: items.len() });
    }
    let tree = Tree::build(&items, caps_of(scheme));
    if tree.room() < scheme.width() {
        return Err(PlaceError::no_room(name, scheme, &tree));
    }
    Ok(tree)
}

fn caps_of(scheme: Scheme) -> Caps {
    let m = usize::from(scheme.m);
    // A domain inside one that keeps the limit keeps it too.
    match scheme.failure_domain {
        FailureDomain::Disk => Caps::NONE,
        FailureDomain::Server => Caps { server: m, ..Caps::NONE },
        FailureDomain::Rack => Caps { server: m, rack: m, ..Caps::NONE },
        FailureDomain::Zone => Caps { server: m, rack: m, zone: m },
    }
}

fn scheme_of(map: &ClusterMap, name: &str) -> Result<Scheme, PlaceError> {
    let scheme = *map.schemes.get(name).ok_or_else(|| MapError::NoSuchScheme(name.to_owned()))?;
    scheme.validate().map_err(|source| MapError::BadScheme { name: name.to_owned(), source })?;
    Ok(scheme)
}

fn group_count(disks: usize, width: usize, groups_per_disk: u32) -> Result<usize, PlaceError> {
    if groups_per_disk == 0 {
        return Err(PlaceError::NoGroupsPerDisk);
    }
    let (slots, width) = (disks as u64 * u64::from(groups_per_disk), width as u64);
    let groups = ((slots + width / 2) / width).max(1);
    u32::try_from(groups).map(|groups| groups as usize).map_err(|_| PlaceError::IdsExhausted)
}

fn next_epoch(map: &ClusterMap) -> Result<Epoch, PlaceError> {
    map.epoch.0.checked_add(1).map(Epoch).ok_or(PlaceError::IdsExhausted)
}
