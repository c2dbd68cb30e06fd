//! Room for metadata: what is left on the disks of a shard, and which has too little.
//!
//! Metadata share their file system with chunks. New chunks leave a reserve; metadata, which are small and must go on,
//! may use the first half of it. Below that nothing is taken that makes them grow, by the leader of a shard of which
//! any voter's disk is that full: a disk without any room fails its next write, and with that its node ends. Deletes
//! and repairs go on, and what they free brings the disk back.

use granary_placement::id::DiskId;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// For how long it counts that another disk called itself full. It is said again with each heartbeat of the link.
const COUNTS: Duration = Duration::from_secs(30);

/// The file system that the metadata are on.
#[derive(Clone)]
pub struct Space {
    /// Free space that metadata do not grow into, in bytes; 0: they grow until there is none.
    pub reserve_bytes: u64,
    /// Asks how much is free now, in bytes.
    pub free_bytes: Arc<dyn Fn() -> io::Result<u64> + Send + Sync>,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Space({} bytes in reserve)", self.reserve_bytes)
    }
}

impl Space {
    /// Are so many bytes free beyond half of the reserve? The other half is for what replicas must write in any case.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        self.reserve_bytes == 0
            || (self.free_bytes)().is_ok_and(|free| free >= (self.reserve_bytes / 2).saturating_add(bytes))
    }

    /// For tests: without a reserve.
    pub fn without_reserve() -> Space {
        Space { reserve_bytes: 0, free_bytes: Arc::new(|| Ok(u64::MAX)) }
    }
}

/// Which disks are full, as this one knows.
#[derive(Debug)]
pub struct Room {
    space: Space,
    is_full: AtomicBool,
    is_near: AtomicBool,
    others: Mutex<BTreeMap<DiskId, Instant>>,
}

impl Room {
    /// All have room, until it is looked.
    pub fn new(space: Space) -> Room {
        Room { space, is_full: AtomicBool::new(false), is_near: AtomicBool::new(false), others: Mutex::default() }
    }

    fn others(&self) -> MutexGuard<'_, BTreeMap<DiskId, Instant>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the file system; the answer if it changed. A full disk has room again when a quarter more than the
    /// reserve is free, so that it does not change with every delete.
    pub fn look(&self) -> Option<bool> {
        let free_bytes = match (self.space.free_bytes)() {
            Ok(free_bytes) => free_bytes,
            Err(error) => {
                tracing::warn!(%error, "cannot see how much room is left");
                return None;
            }
        };
        let was_full = self.is_full.load(Ordering::Relaxed);
        let reserve_bytes = self.space.reserve_bytes;
        let wanted_bytes = if was_full { reserve_bytes.saturating_add(reserve_bytes / 4) } else { reserve_bytes };
        let is_full = free_bytes < wanted_bytes;
        self.is_full.store(is_full, Ordering::Relaxed);
        self.is_near.store(free_bytes < reserve_bytes.saturating_mul(4), Ordering::Relaxed);
        (is_full != was_full).then_some(is_full)
    }

    /// Is this disk full?
    pub fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Is it near enough to being full that it must be looked at often?
    pub fn is_near(&self) -> bool {
        self.is_near.load(Ordering::Relaxed)
    }

    /// May the state be merged now, which needs room for as much as is left of it, and gives back the rest?
    pub fn may_merge(&self) -> bool {
        self.is_full() && (self.space.free_bytes)().is_ok_and(|free_bytes| free_bytes > self.space.reserve_bytes / 2)
    }

    /// Notes what another disk said of itself.
    pub fn hear(&self, disk: DiskId, is_full: bool, now: Instant) {
        let mut others = self.others();
        if is_full {
            others.insert(disk, now);
        } else {
            others.remove(&disk);
        }
    }

    /// One of these disks that is full. `me` is this one.
    pub fn full_one_of(&self, me: DiskId, disks: impl Iterator<Item = DiskId>, now: Instant) -> Option<DiskId> {
        let others = self.others();
        let mut disks = disks;
        disks.find(|disk| match others.get(disk) {
            _ if *disk == me => self.is_full(),
            Some(said) => now.saturating_duration_since(*said) < COUNTS,
            None => false,
        })
    }

    /// Is it worth asking [`Room::full_one_of`]?
    pub fn any_full(&self) -> bool {
        self.is_full() || !self.others().is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn a_disk_is_full_below_its_reserve_and_has_room_a_quarter_above_it() {
        let free = Arc::new(AtomicU64::new(1_000));
        let asked = free.clone();
        let free_bytes = Arc::new(move || Ok(asked.load(Ordering::Relaxed)));
        let room = Room::new(Space { reserve_bytes: 1_000, free_bytes });
        let look = |bytes| {
            free.store(bytes, Ordering::Relaxed);
            (room.look(), room.is_full(), room.may_merge())
        };
        assert_eq!(look(1_000), (None, false, false));
        assert_eq!(look(999), (Some(true), true, true));
        assert_eq!(look(500), (None, true, false), "merging needs room");
        assert_eq!(look(1_249), (None, true, true));
        assert_eq!(look(1_250), (Some(false), false, false));
        assert_eq!(look(1_000), (None, false, false));
    }

    #[test]
    fn a_full_disk_counts_for_the_shards_it_votes_in_while_it_says_so() {
        let (room, now) = (Room::new(Space::without_reserve()), Instant::now());
        let full = |now| room.full_one_of(DiskId(1), [1, 2, 3].map(DiskId).into_iter(), now);
        assert!(!room.any_full());
        room.hear(DiskId(4), true, now);
        assert_eq!((room.any_full(), full(now)), (true, None));
        room.hear(DiskId(3), true, now);
        assert_eq!(full(now), Some(DiskId(3)));
        assert_eq!(full(now + COUNTS), None);
        room.hear(DiskId(3), false, now);
        assert_eq!(full(now), None);
    }
}
