//! Which metadata disks hold which shard.
//!
//! Other than chunks, replicas are spread first and evened out second: a shard lives as long as a majority of its
//! members, and shards are small beside the data, so the metadata disk of a small zone may hold more of them than its
//! share.

use super::board::{Band, Board};
use super::deal::Dealer;
use super::settle::Allowance;
use super::tree::{mix, Caps, Item, Tree};
use super::PlaceError;
use crate::id::DiskId;
use crate::map::{ClusterMap, DiskState, ShardReplicas};
use std::collections::{BTreeMap, BTreeSet};

/// Replicas of a shard for a scheme with `m` coding chunks: 2M+1, so that metadata survives what data survives, at most
/// 5 and at most what `metadata_disks` disks can hold. 1, 3 or 5.
pub fn default_replicas(m: u8, metadata_disks: usize) -> usize {
    let wish = (2 * usize::from(m) + 1).min(5).min(metadata_disks);
    if wish >= 5 {
        5
    } else if wish >= 3 {
        3
    } else {
        1
    }
}

/// Members for `shards` shards, the root shard included: as far apart as the metadata disks stand, evenly many on each.
/// The first member of each shard is the one to lead it at first; those are spread too.
///
/// # Errors
/// [`PlaceError::Members`] unless `members` is 1, 3 or 5; [`PlaceError::TooFewMetadataDisks`].
pub fn choose_shard_replicas(map: &ClusterMap, shards: u16, members: usize) -> Result<Vec<ShardReplicas>, PlaceError> {
    if !matches!(members, 1 | 3 | 5) {
        return Err(PlaceError::Members(members));
    }
    let present = items(map).len();
    if present < members {
        return Err(PlaceError::TooFewMetadataDisks { members, present });
    }
    let tree = spread_tree(map, members);
    let shares = tree.shares(members, shards.into());
    let no_caps = hard_caps(&tree);
    let mut board = Board::new(&tree, &shares, no_caps, shards.into(), members, Band::Whole);
    let mut dealer = Dealer::new(&tree, &shares.quota);
    for shard in 0..usize::from(shards) {
        dealer.deal(&mut board, shard, members);
    }
    board.settle(Allowance::All);
    let mut chosen: Vec<ShardReplicas> = (0..usize::from(shards))
        .map(|shard| ShardReplicas { members: board.slots_of(shard).filter_map(|slot| board.disk_at(slot)).collect() })
        .collect();
    lead_evenly(&mut chosen);
    Ok(chosen)
}

/// Replaces members on disks that can no longer hold replicas, and unless only the vacant places are to be filled evens
/// replicas out over new metadata disks. Disks in `barred` keep what they have and get no more: where nobody else can
/// take over, the member that is gone stays named.
pub(super) fn settle(map: &mut ClusterMap, allowance: Allowance, barred: &BTreeSet<DiskId>) {
    let mut by_size: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (number, shard) in map.shards.iter().enumerate() {
        by_size.entry(shard.members.len()).or_default().push(number);
    }
    for (members, numbers) in by_size {
        settle_size(map, members, &numbers, allowance, barred);
    }
}

fn settle_size(
    map: &mut ClusterMap,
    members: usize,
    numbers: &[usize],
    allowance: Allowance,
    barred: &BTreeSet<DiskId>,
) {
    // With fewer disks than members some dead members stay; the live ones that are left take over what they can.
    let width = members.min(items(map).len());
    if width == 0 {
        return;
    }
    let tree = spread_tree(map, width);
    let shares = tree.shares(width, numbers.len());
    let mut board = Board::new(&tree, &shares, hard_caps(&tree), numbers.len(), width, Band::Whole);
    for (row, number) in numbers.iter().enumerate() {
        barred.iter().filter_map(|disk| tree.leaf(*disk)).for_each(|leaf| board.bar(row, leaf));
        let old = map.shards.get(*number).map(|shard| shard.members.clone()).unwrap_or_default();
        let alive: Vec<usize> = old.iter().filter_map(|disk| tree.leaf(*disk)).collect();
        for (slot, leaf) in board.slots_of(row).zip(alive) {
            board.place(slot, leaf);
        }
    }
    board.remember_origin();
    // Where only barred disks are left, a place stays vacant.
    board.settle(allowance);
    for (row, number) in numbers.iter().enumerate() {
        let Some(shard) = map.shards.get_mut(*number) else { continue };
        let chosen: Vec<DiskId> = board.slots_of(row).filter_map(|slot| board.disk_at(slot)).collect();
        let mut fresh =
            chosen.iter().filter(|disk| !shard.members.contains(disk)).copied().collect::<Vec<_>>().into_iter();
        // Living members that were moved give way first, dead ones next; whoever stays keeps its position.
        let moved = |disk: &DiskId| tree.leaf(*disk).is_some() && !chosen.contains(disk);
        let dead = |disk: &DiskId| tree.leaf(*disk).is_none();
        for leaves in [&moved as &dyn Fn(&DiskId) -> bool, &dead] {
            for member in shard.members.iter_mut().filter(|member| leaves(member)) {
                if let Some(new) = fresh.next() {
                    *member = new;
                }
            }
        }
    }
}

fn items(map: &ClusterMap) -> Vec<Item<'_>> {
    let holders = map.disks.values().filter(|disk| disk.state == DiskState::In && disk.roles.metadata);
    holders.map(|disk| Item { id: disk.id, location: &disk.location, weight: 1 }).collect()
}

/// The tree of metadata disks, with the tightest limits per zone, then rack, then server, that leave room for
/// `members`.
fn spread_tree(map: &ClusterMap, members: usize) -> Tree {
    let items = items(map);
    let tightest = |with: &dyn Fn(usize) -> Caps| {
        let limit = (1..members).find(|limit| Tree::build(&items, with(*limit)).room() >= members);
        limit.unwrap_or(members)
    };
    let zone = tightest(&|zone| Caps { zone, ..Caps::NONE });
    let rack = tightest(&|rack| Caps { zone, rack, ..Caps::NONE });
    let server = tightest(&|server| Caps { zone, rack, server });
    Tree::build(&items, Caps { zone, rack, server })
}

/// Spreading is a wish, not a condition: only "one replica a disk" holds always.
fn hard_caps(tree: &Tree) -> Vec<usize> {
    tree.nodes.iter().enumerate().map(|(v, _)| if tree.is_leaf(v) { 1 } else { usize::MAX }).collect()
}

/// Puts the member that leads fewest shards so far first.
fn lead_evenly(shards: &mut [ShardReplicas]) {
    let mut leads: BTreeMap<DiskId, usize> = BTreeMap::new();
    for (number, shard) in shards.iter_mut().enumerate() {
        shard
            .members
            .sort_by_key(|disk| (leads.get(disk).copied().unwrap_or(0), mix(u64::from(disk.0), number as u64)));
        if let Some(first) = shard.members.first() {
            *leads.entry(*first).or_default() += 1;
        }
    }
}
