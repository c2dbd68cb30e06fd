//! How groups lie on disks and servers, in numbers: what a map says, or what a well mixed one would.

use super::input::{within, DurabilityError};
use crate::id::DiskId;
use crate::map::{ClusterMap, Location};
use std::collections::{BTreeMap, BTreeSet};

/// Most disks that are accepted.
const MAX_DISKS: f64 = 1e7;

/// A layout in numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// Disks that hold slots.
    pub disks: u64,
    /// Servers that they stand in.
    pub servers: u64,
    /// Placement groups.
    pub groups: u64,
    /// Slots of each group.
    pub width: usize,
    /// Distinct pairs of disks that share a group: how many different disks help to rebuild one, and with how many
    /// others a disk must not be lost.
    pub pairs: u64,
    /// Most chunks of one group on one server.
    pub chunks_per_server: usize,
}

impl Layout {
    /// A layout in which who shares a group with whom is mixed as by chance.
    pub fn mixed(disks: u64, servers: u64, groups: u64, width: usize, chunks_per_server: usize) -> Layout {
        let all = choose(disks as f64, 2);
        let pairs = distinct(groups as f64 * choose(width as f64, 2), all);
        Layout { disks, servers, groups, width, pairs: pairs.round() as u64, chunks_per_server }
    }

    /// Slots of an average disk.
    pub fn slots_per_disk(&self) -> f64 {
        self.groups as f64 * self.width as f64 / self.disks as f64
    }

    /// Part of a disk's slots whose group holds another given disk too, if the two share a group at all.
    pub fn overlap(&self) -> f64 {
        let shared = self.disks as f64 * (self.width as f64 - 1.0) / (2.0 * self.pairs as f64);
        shared.clamp(0.0, 1.0)
    }

    /// In how many groups an average set of `disks` single disks and `servers` whole servers lies that lies in one at
    /// all. By chance, when there are many more such sets than groups have them, it is one.
    pub(super) fn sharing(&self, disks: usize, servers: usize) -> f64 {
        let per_server = self.chunks_per_server;
        let rest = self.width.saturating_sub(servers * per_server);
        let in_group = choose(self.width as f64 / per_server as f64, servers) * choose(rest as f64, disks);
        let covered = self.groups as f64 * in_group;
        let different = distinct(covered, choose(self.disks as f64, disks) * choose(self.servers as f64, servers));
        if different > 0.0 {
            (covered / different).max(1.0)
        } else {
            1.0
        }
    }

    pub(super) fn validate(&self, width: usize) -> Result<(), DurabilityError> {
        if self.width != width {
            return Err(DurabilityError::Layout("its groups are not as wide as the scheme"));
        }
        within("the number of disks", self.disks as f64, self.width as f64, MAX_DISKS)?;
        within("the number of servers", self.servers as f64, 1.0, self.disks as f64)?;
        within("the number of groups", self.groups as f64, 1.0, f64::from(u32::MAX))?;
        within("the chunks of a group on one server", self.chunks_per_server as f64, 1.0, self.width as f64)?;
        if (self.servers as f64) * (self.chunks_per_server as f64) < self.width as f64 {
            return Err(DurabilityError::Layout("a group does not fit on its servers"));
        }
        let most = choose(self.disks as f64, 2).min(self.groups as f64 * choose(self.width as f64, 2));
        within("the pairs of disks that share a group", self.pairs as f64, choose(self.width as f64, 2), most)
    }
}

/// Groups and servers by number of disk: what the simulation runs on. Disks are numbered from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// Disks of each group.
    pub groups: Vec<Vec<usize>>,
    /// Server of each disk.
    pub server_of: Vec<usize>,
}

impl Groups {
    /// The current disks of all groups of that scheme.
    ///
    /// # Errors
    /// [`DurabilityError::Layout`] when the map names a disk that it has not.
    pub fn of_map(map: &ClusterMap, scheme: &str) -> Result<Groups, DurabilityError> {
        let chosen = || map.groups.values().filter(|group| group.scheme == scheme);
        let ids: BTreeSet<DiskId> = chosen().flat_map(|group| &group.slots).map(|slot| slot.current).collect();
        let number: BTreeMap<DiskId, usize> = ids.iter().copied().zip(0..).collect();
        let mut servers: BTreeMap<&Location, usize> = BTreeMap::new();
        let mut server_of = Vec::with_capacity(ids.len());
        for id in &ids {
            let disk = map.disk(*id).ok_or(DurabilityError::Layout("a group names a disk that there is not"))?;
            let next = servers.len();
            server_of.push(*servers.entry(&disk.location).or_insert(next));
        }
        let disks = |slots: &[crate::map::GroupSlot]| {
            slots.iter().filter_map(|slot| number.get(&slot.current).copied()).collect::<Vec<usize>>()
        };
        Ok(Groups { groups: chosen().map(|group| disks(&group.slots)).collect(), server_of })
    }

    /// The numbers of this layout.
    ///
    /// # Errors
    /// [`DurabilityError::Layout`] when there are no groups, when they are not equally wide, or a disk has no server.
    pub fn layout(&self) -> Result<Layout, DurabilityError> {
        let width = self.groups.first().map_or(0, Vec::len);
        if width == 0 || self.groups.iter().any(|group| group.len() != width) {
            return Err(DurabilityError::Layout("groups must be there and equally wide"));
        }
        let mut groups_of: Vec<Vec<usize>> = vec![Vec::new(); self.server_of.len()];
        let mut chunks_per_server = 1;
        for (number, group) in self.groups.iter().enumerate() {
            let mut servers: Vec<usize> = Vec::with_capacity(width);
            for &disk in group {
                let of_disk = groups_of.get_mut(disk).ok_or(DurabilityError::Layout("a disk stands in no server"))?;
                of_disk.push(number);
                servers.extend(self.server_of.get(disk));
            }
            let together = |server: &usize| servers.iter().filter(|other| *other == server).count();
            chunks_per_server = chunks_per_server.max(servers.iter().map(together).max().unwrap_or(1));
        }
        // Disk by disk, with a mark on those it has met already: no table of all pairs.
        let mut met = vec![usize::MAX; self.server_of.len()];
        let mut twice = 0u64;
        for (disk, of_disk) in groups_of.iter().enumerate() {
            for other in of_disk.iter().filter_map(|group| self.groups.get(*group)).flatten() {
                if let Some(mark) = met.get_mut(*other).filter(|mark| **mark != disk && *other != disk) {
                    *mark = disk;
                    twice += 1;
                }
            }
        }
        let servers = self.server_of.iter().collect::<BTreeSet<_>>().len() as u64;
        let (disks, groups) = (self.server_of.len() as u64, self.groups.len() as u64);
        Ok(Layout { disks, servers, groups, width, pairs: twice / 2, chunks_per_server })
    }
}

/// How many different ones are drawn when `drawn` are drawn from `all` by chance.
fn distinct(drawn: f64, all: f64) -> f64 {
    if all > 0.0 {
        -(-drawn / all).exp_m1() * all
    } else {
        0.0
    }
}

/// Ways to choose `k` of `n`; zero when there are fewer.
pub(super) fn choose(n: f64, k: usize) -> f64 {
    (0..k).map(|i| (n - i as f64).max(0.0) / (i as f64 + 1.0)).product()
}
