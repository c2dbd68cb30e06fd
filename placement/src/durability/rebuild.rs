//! How long it takes to rebuild what lay on lost disks: as long as the busiest disk that helps.

use crate::id::{DiskId, PlacementGroupId};
use crate::map::ClusterMap;
use crate::moves::{moves, Move};
use std::collections::{BTreeMap, BTreeSet};

/// What the disk of a rebuilt chunk does with it: it writes it, and reads it back before the chunk counts.
const PASSES_AT_TAKER: f64 = 2.0;

/// The work of rebuilding lost disks, in slots: how many slots' worth of chunks are read or written.
#[derive(Debug, Clone, PartialEq)]
pub struct Rebuild {
    /// Disks that were lost.
    pub lost: usize,
    /// Slots that get another disk because theirs is gone.
    pub slots: usize,
    /// Slots that change their disk although theirs is not gone.
    pub other_moves: usize,
    /// Disks that take slots over.
    pub takers: usize,
    /// Disks that read or write.
    pub helpers: usize,
    /// What the busiest disk reads and writes.
    pub busiest: f64,
    /// What all disks read and write.
    pub total: f64,
}

impl Rebuild {
    /// From the map before `lost` went out to the one after. What a group lost is computed from K of its chunks, all
    /// that it lost at once; each extent takes another K of those that are left, so that all are read equally much.
    pub fn between(before: &ClusterMap, after: &ClusterMap, lost: &BTreeSet<DiskId>) -> Rebuild {
        let moved = moves(before, after);
        let (slots, others): (Vec<Move>, Vec<Move>) = moved.into_iter().partition(|one| lost.contains(&one.from));
        let takers: BTreeSet<DiskId> = slots.iter().map(|one| one.to).collect();
        let mut work: BTreeMap<DiskId, f64> = BTreeMap::new();
        let mut by_group: BTreeMap<PlacementGroupId, BTreeSet<DiskId>> = BTreeMap::new();
        for one in &slots {
            *work.entry(one.to).or_default() += PASSES_AT_TAKER;
            by_group.entry(one.group).or_default().insert(one.to);
        }
        for (group, takers) in by_group {
            let Some(group) = after.group(group) else { continue };
            let Some(scheme) = after.schemes.get(&group.scheme) else { continue };
            let disks = group.slots.iter().map(|slot| slot.current);
            let left: Vec<DiskId> = disks.filter(|disk| !takers.contains(disk)).collect();
            for disk in &left {
                *work.entry(*disk).or_default() += f64::from(scheme.k) / left.len() as f64;
            }
        }
        Rebuild {
            lost: lost.len(),
            slots: slots.len(),
            other_moves: others.len(),
            takers: takers.len(),
            helpers: work.len(),
            busiest: work.values().copied().fold(0.0, f64::max),
            total: work.values().sum(),
        }
    }

    /// Hours until the busiest disk is done, when each lost disk held so much and each disk reads and writes so fast.
    pub fn hours(&self, disk_bytes: f64, bytes_per_second: f64) -> f64 {
        self.busiest * self.slot_bytes(disk_bytes) / bytes_per_second / 3600.0
    }

    /// The same if the work were shared out evenly among so many disks: no placement does better.
    pub fn even_hours(&self, disk_bytes: f64, bytes_per_second: f64, disks: usize) -> f64 {
        self.total * self.slot_bytes(disk_bytes) / disks as f64 / bytes_per_second / 3600.0
    }

    /// Hours for one slot when there is nothing else to do: its new disk writes it and reads it back.
    pub fn slot_hours(&self, disk_bytes: f64, bytes_per_second: f64) -> f64 {
        PASSES_AT_TAKER * self.slot_bytes(disk_bytes) / bytes_per_second / 3600.0
    }

    /// The fewest slots on a lost disk with which its rebuild can take no longer than so many hours: with fewer, the
    /// new disk of a single slot takes longer than that.
    pub fn fewest_slots(hours: f64, disk_bytes: f64, bytes_per_second: f64) -> f64 {
        (PASSES_AT_TAKER * disk_bytes / bytes_per_second / 3600.0 / hours).ceil()
    }

    fn slot_bytes(&self, disk_bytes: f64) -> f64 {
        disk_bytes * self.lost as f64 / self.slots.max(1) as f64
    }
}
