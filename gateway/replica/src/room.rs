//! Room for metadata: what is left on the disks of a shard, and which has too little.
//!
//! Metadata share their file system with chunks. New chunks leave a reserve; metadata, which are small and must go on,
//! may use the first half of it. Below that nothing is taken that makes them grow, by the leader of a shard of which
//! any voter's disk is that full: a disk without any room fails its next write, and with that its node ends. Deletes
//! and repairs go on, and what they free brings the disk back. They write too, before they free anything, and what the
//! databases hold in memory must find room: with four times as much left, or a quarter of the reserve, a disk takes
//! only what the cluster does for itself, which frees chunks; with half of that nothing; and what other leaders took it
//! takes until half of that again is left.
//!
//! Several nodes may have their folders on one file system. The reserve is for all of them: each holds back in memory
//! its part only, and they merge in turn.

use granary_placement::id::DiskId;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, TryLockError};
use std::io;
use std::path::PathBuf;
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
    /// Disk nodes that keep their folders on it, this one included.
    pub nodes: u64,
    /// What those nodes lock when they take turns: a folder above theirs. None: there is nobody else.
    pub turns: Option<PathBuf>,
    /// Asks how much is free now, in bytes.
    pub free_bytes: Arc<dyn Fn() -> io::Result<u64> + Send + Sync>,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Space({} bytes in reserve)", self.reserve_bytes)
    }
}

/// The turn at work that takes room for a while, until it is dropped.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "it is held, not read")] Option<File>);

impl Space {
    /// This node's part of the reserve, in bytes; 0: there is none.
    pub fn share_bytes(&self) -> u64 {
        match self.reserve_bytes {
            0 => 0,
            reserve_bytes => (reserve_bytes / self.nodes.max(1)).max(1),
        }
    }

    /// Is less than the reserve free?
    pub fn is_full(&self) -> bool {
        (self.free_bytes)().is_ok_and(|free_bytes| free_bytes < self.reserve_bytes)
    }

    /// The turn among the nodes of the file system; None while another has it. On a file system that knows no locks
    /// it is always this node's.
    pub fn turn(&self) -> Option<Turn> {
        let Some(path) = &self.turns else { return Some(Turn(None)) };
        let locked = File::open(path).map_err(TryLockError::Error).and_then(|file| file.try_lock().map(|()| file));
        match locked {
            Ok(file) => Some(Turn(Some(file))),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(error)) => {
                tracing::debug!(%error, path = %path.display(), "no turns are taken");
                Some(Turn(None))
            }
        }
    }

    /// Are so many bytes free beyond half of the reserve? The other half is for what replicas must write in any case.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        self.reserve_bytes == 0
            || (self.free_bytes)().is_ok_and(|free| free >= (self.reserve_bytes / 2).saturating_add(bytes))
    }

    /// For tests: without a reserve.
    pub fn without_reserve() -> Space {
        Space { reserve_bytes: 0, nodes: 1, turns: None, free_bytes: Arc::new(|| Ok(u64::MAX)) }
    }
}

/// Which disks are full, as this one knows.
#[derive(Debug)]
pub struct Room {
    space: Space,
    is_full: AtomicBool,
    is_near: AtomicBool,
    is_low: AtomicBool,
    is_out: AtomicBool,
    is_at_its_end: AtomicBool,
    /// Below this, in bytes, it is low; below half of it it is out.
    low_bytes: u64,
    others: Mutex<BTreeMap<DiskId, Said>>,
}

/// What another disk said of itself.
#[derive(Debug, Clone, Copy)]
struct Said {
    is_full: bool,
    at: Instant,
}

impl Room {
    /// All have room, until it is looked. `memory_bytes`: most that the databases of a node hold in memory.
    pub fn new(space: Space, memory_bytes: u64) -> Room {
        let needed_bytes = memory_bytes.saturating_mul(space.nodes).saturating_mul(4);
        Room {
            low_bytes: (space.reserve_bytes / 4).min(needed_bytes),
            space,
            is_full: AtomicBool::new(false),
            is_near: AtomicBool::new(false),
            is_low: AtomicBool::new(false),
            is_out: AtomicBool::new(false),
            is_at_its_end: AtomicBool::new(false),
            others: Mutex::default(),
        }
    }

    fn others(&self) -> MutexGuard<'_, BTreeMap<DiskId, Said>> {
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
        self.is_low.store(free_bytes < self.low_bytes, Ordering::Relaxed);
        self.is_out.store(free_bytes < self.low_bytes / 2, Ordering::Relaxed);
        self.is_at_its_end.store(free_bytes < self.low_bytes / 4, Ordering::Relaxed);
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

    /// Is so little left that only what the cluster does for itself is taken?
    pub fn is_low(&self) -> bool {
        self.is_low.load(Ordering::Relaxed)
    }

    /// Is so little left that nothing is taken?
    pub fn is_out(&self) -> bool {
        self.is_out.load(Ordering::Relaxed)
    }

    /// Is what is left needed for what the databases hold in memory? What another leader took, for it had room then, is
    /// taken until here: a new leader must be able to finish it.
    pub fn is_at_its_end(&self) -> bool {
        self.is_at_its_end.load(Ordering::Relaxed)
    }

    /// The turn among the nodes of the file system; see [`Space::turn`].
    pub fn turn(&self) -> Option<Turn> {
        self.space.turn()
    }

    /// May old data be merged now, when so many bytes at most are written before the old ones go? What the databases
    /// hold in memory must find room meanwhile. It may where commands are refused already: it is the way back.
    pub fn may_merge(&self, step_bytes: u64) -> bool {
        (self.space.free_bytes)().is_ok_and(|free| free > (self.low_bytes / 2).saturating_add(step_bytes))
    }

    /// Notes what another disk said of itself.
    pub fn hear(&self, disk: DiskId, is_full: bool, now: Instant) {
        self.others().insert(disk, Said { is_full, at: now });
    }

    /// One of these disks that is full. `me` is this one.
    pub fn full_one_of(&self, me: DiskId, disks: impl Iterator<Item = DiskId>, now: Instant) -> Option<DiskId> {
        let others = self.others();
        let mut disks = disks;
        disks.find(|disk| match others.get(disk) {
            _ if *disk == me => self.is_full(),
            Some(said) => said.is_full && now.saturating_duration_since(said.at) < COUNTS,
            None => false,
        })
    }

    /// Did one of these other disks say of late that it has room?
    pub fn has_another_room(&self, disks: &[DiskId], now: Instant) -> bool {
        let others = self.others();
        let said = |disk| others.get(disk).filter(|said| now.saturating_duration_since(said.at) < COUNTS);
        disks.iter().any(|disk| said(disk).is_some_and(|said| !said.is_full))
    }

    /// Is it worth asking [`Room::full_one_of`]?
    pub fn any_full(&self) -> bool {
        self.is_full() || self.others().values().any(|said| said.is_full)
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
        let room =
            Room::new(Space { reserve_bytes: 1_000, nodes: 1, turns: None, free_bytes: free_bytes.clone() }, u64::MAX);
        let look = |bytes| {
            free.store(bytes, Ordering::Relaxed);
            (room.look(), [room.is_full(), room.is_low(), room.is_out(), room.is_at_its_end()], room.may_merge(300))
        };
        let [not, full, low, out, end] = [0, 1, 2, 3, 4].map(|so_many| [1, 2, 3, 4].map(|place| place <= so_many));
        assert_eq!(look(1_000), (None, not, true));
        assert_eq!(look(999), (Some(true), full, true));
        assert_eq!(look(426), (None, full, true));
        assert_eq!(look(425), (None, full, false), "a step of a merge needs room");
        assert_eq!(look(249), (None, low, false));
        assert!(room.may_merge(100));
        assert_eq!(look(124), (None, out, false));
        assert!(!room.may_merge(0), "what is in memory needs room");
        assert_eq!(look(61), (None, end, false));
        assert_eq!(look(1_249), (None, full, true));
        assert_eq!(look(1_250), (Some(false), not, true));
        assert_eq!(look(1_000), (None, not, true));
        // A reserve that is larger than it need be leaves deletes alone.
        let room = Room::new(Space { reserve_bytes: 1_000, nodes: 3, turns: None, free_bytes }, 10);
        for (bytes, is_low) in [(120, false), (119, true)] {
            free.store(bytes, Ordering::Relaxed);
            room.look();
            assert_eq!(room.is_low(), is_low);
        }
    }

    #[test]
    fn nodes_on_one_file_system_share_the_reserve_and_take_turns() {
        let dir = tempfile::tempdir().unwrap();
        let turns = Some(dir.path().to_owned());
        let space = Space { reserve_bytes: 1_000, nodes: 3, turns, ..Space::without_reserve() };
        assert_eq!(space.share_bytes(), 333);
        assert_eq!(Space { nodes: 5_000, ..space.clone() }.share_bytes(), 1, "0 would be no bound");
        assert_eq!(Space { reserve_bytes: 0, ..space.clone() }.share_bytes(), 0);
        let turn = space.turn().unwrap();
        let beside = Space { nodes: 3, ..space.clone() };
        assert!(beside.turn().is_none());
        assert!(Space { turns: None, ..space.clone() }.turn().is_some(), "a node alone waits for nobody");
        drop(turn);
        assert!(beside.turn().is_some());
        assert!(Space { turns: Some(dir.path().join("gone")), ..space }.turn().is_some());
    }

    #[test]
    fn a_full_disk_counts_for_the_shards_it_votes_in_while_it_says_so() {
        let (room, now) = (Room::new(Space::without_reserve(), 0), Instant::now());
        let full = |now| room.full_one_of(DiskId(1), [1, 2, 3].map(DiskId).into_iter(), now);
        assert!(!room.any_full());
        room.hear(DiskId(4), true, now);
        assert_eq!((room.any_full(), full(now)), (true, None));
        room.hear(DiskId(3), true, now);
        assert_eq!(full(now), Some(DiskId(3)));
        assert_eq!(full(now + COUNTS), None);
        let has_room =
            |disks: &[u32], now| room.has_another_room(&disks.iter().copied().map(DiskId).collect::<Vec<_>>(), now);
        room.hear(DiskId(2), false, now);
        assert!(has_room(&[1, 2, 3], now) && !has_room(&[1, 3], now), "of 1 nothing was heard, and 3 is full");
        assert!(!has_room(&[2], now + COUNTS));
        room.hear(DiskId(3), false, now);
        assert_eq!(full(now), None);
    }
}
