//! How long it takes to rebuild what lay on a lost disk: as long as the busiest disk that helps.

use crate::id::DiskId;
use crate::map::ClusterMap;
use crate::moves::moves;
use std::collections::{BTreeMap, BTreeSet};

/// What the disk of a rebuilt chunk does with it: it writes it, and reads it back before the chunk counts.
const PASSES_AT_TAKER: f64 = 2.0;

/// The work of rebuilding one disk, in slots: how many of the lost disk's slots must be read or written.
#[derive(Debug, Clone, PartialEq)]
pub struct Rebuild {
    /// Slots that get another disk because theirs is gone.
    pub slots: usize,
    /// Slots that change their disk although theirs is not the lost one.
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
    /// From the map before `lost` went out to the one after. A chunk is computed from K others; each extent of a group
    /// takes another K of those that are left, so that all are read equally much.
    pub fn between(before: &ClusterMap, after: &ClusterMap, lost: DiskId) -> Rebuild {
        let mut work: BTreeMap<DiskId, f64> = BTreeMap::new();
        let mut takers = BTreeSet::new();
        let (mut slots, mut other_moves) = (0, 0);
        for one in moves(before, after) {
            if one.from != lost {
                other_moves += 1;
                continue;
            }
            slots += 1;
            takers.insert(one.to);
            *work.entry(one.to).or_default() += PASSES_AT_TAKER;
            let Some(group) = after.group(one.group) else { continue };
            let Some(scheme) = after.schemes.get(&group.scheme) else { continue };
            let left: Vec<DiskId> =
                group.slots.iter().map(|slot| slot.current).filter(|disk| *disk != one.to).collect();
            for disk in &left {
                *work.entry(*disk).or_default() += f64::from(scheme.k) / left.len() as f64;
            }
        }
        Rebuild {
            slots,
            other_moves,
            takers: takers.len(),
            helpers: work.len(),
            busiest: work.values().copied().fold(0.0, f64::max),
            total: work.values().sum(),
        }
    }

    /// Hours until the busiest disk is done, when the lost disk held so much and each disk gives so much of its time.
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

    fn slot_bytes(&self, disk_bytes: f64) -> f64 {
        disk_bytes / self.slots.max(1) as f64
    }
}
