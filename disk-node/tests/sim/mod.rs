//! A disk that lies as far as a real one may: it forgets what was not synced, page by page, tears pages, loses and
//! resurrects names, fails or stops at a chosen call, and has a page cache that outlives a process and a failed sync.
//!
//! [`inode`] is one file of it, [`engine`] an index that fails, [`scene`] the store above both and what is done to it,
//! [`check`] what must hold then, [`explore`] the ways it may break.

#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod check;
pub mod engine;
pub mod explore;
mod inode;
pub mod scene;

use granary_disk_node::store::device::{Device, SegmentFile, Space};
pub use inode::FailedSync;
use inode::Inode;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4096;

/// Numbers that a seed decides.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// What happens at the n-th call that writes, syncs or changes names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The power goes: the call does not happen, and neither does any after it.
    PowerLoss,
    /// The call fails with EIO, once.
    Io,
    /// The call fails for want of room, once.
    Full,
}

#[derive(Debug)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<u32, u64>,
    durable_names: BTreeMap<u32, u64>,
    next_inode: u64,
    reads: u64,
    failing_reads: std::ops::Range<u64>,
    calls: u64,
    fault: Option<(u64, Fault)>,
    /// The next sync of a file fails.
    fail_sync: bool,
    /// What failed syncs write all the same.
    failed_syncs: FailedSync,
    dead: bool,
    capacity: u64,
    unreadable: BTreeSet<(u64, u64)>,
    kinds: Vec<&'static str>,
}

/// The disk. Clones share it.
#[derive(Debug, Clone)]
pub struct SimDevice(Arc<Mutex<State>>);

struct SimFile {
    disk: SimDevice,
    inode: u64,
}

/// One thing a crash decides by itself.
#[derive(Debug, Clone, Copy)]
enum Choice {
    /// Which contents the page has; so many possibilities.
    Page { inode: u64, page: u64, ways: u64 },
    /// A length that was not synced: kept or lost.
    Length { inode: u64 },
    /// A name that was made or removed without a sync of the folder: kept or lost.
    Name { number: u32 },
}

impl SimDevice {
    pub fn new(capacity: u64) -> SimDevice {
        SimDevice(Arc::new(Mutex::new(State::new(capacity))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms a fault at the n-th call from now, counted from zero.
    pub fn arm(&self, after: u64, fault: Fault) {
        let mut state = self.state();
        state.fault = Some((state.calls + after, fault));
    }

    /// The next sync of a file fails with EIO, once, and so much of it reaches the disk all the same.
    pub fn fail_next_sync(&self, reached: FailedSync) {
        let mut state = self.state();
        (state.fail_sync, state.failed_syncs) = (true, reached);
    }

    /// The power is gone: nothing works any more.
    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// So many reads fail with EIO, after so many more that do not; later ones of the same bytes do not either.
    pub fn fail_reads(&self, after: u64, count: u64) {
        let mut state = self.state();
        let first = state.reads + after;
        state.failing_reads = first..first.saturating_add(count);
    }

    /// Reads so far.
    pub fn reads(&self) -> u64 {
        self.state().reads
    }

    /// Takes the file of a segment away.
    pub fn lose(&self, segment: u32) {
        let mut state = self.state();
        state.names.remove(&segment);
        state.durable_names.remove(&segment);
    }

    /// Calls so far that change or sync something.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// What kind each call was.
    pub fn kinds(&self) -> Vec<&'static str> {
        self.state().kinds.clone()
    }

    /// Reading any byte of this page of this segment fails from now on.
    pub fn make_unreadable(&self, segment: u32, page: u64) {
        let mut state = self.state();
        let inode = state.names[&segment];
        state.unreadable.insert((inode, page));
    }

    /// Changes bytes on the disk behind the store's back.
    pub fn corrupt(&self, segment: u32, offset: u64, change: impl Fn(u8) -> u8) {
        let mut state = self.state();
        let inode = state.names[&segment];
        state.inodes.get_mut(&inode).unwrap().corrupt(offset, change);
    }

    /// Cuts the file of a segment off behind the store's back.
    pub fn truncate(&self, segment: u32, length: u64) {
        let mut state = self.state();
        let inode = state.names[&segment];
        state.inodes.get_mut(&inode).unwrap().length = length;
    }

    /// Bytes that files take, holes left out.
    pub fn used(&self) -> u64 {
        used(&self.state())
    }

    pub fn segments(&self) -> Vec<u32> {
        self.state().names.keys().copied().collect()
    }

    fn choices(state: &State) -> Vec<Choice> {
        let mut choices = Vec::new();
        let named: BTreeSet<u64> = state.names.values().chain(state.durable_names.values()).copied().collect();
        for (number, inode) in state.names.iter().chain(&state.durable_names) {
            let (now, before) =
                (state.names.get(number) == Some(inode), state.durable_names.get(number) == Some(inode));
            if now != before {
                choices.push(Choice::Name { number: *number });
            }
        }
        for (number, inode) in state.inodes.iter().filter(|(number, _)| named.contains(number)) {
            if inode.durable_length != inode.length {
                choices.push(Choice::Length { inode: *number });
            }
            let pages = inode.open_pages().into_iter();
            choices.extend(pages.map(|(page, ways)| Choice::Page { inode: *number, page, ways }));
        }
        choices
    }

    /// In how many ways a power loss now may leave the disk (at most `u64::MAX`).
    pub fn crash_states(&self) -> u64 {
        let state = self.state();
        SimDevice::choices(&state).iter().fold(1u64, |all, choice| {
            all.saturating_mul(match choice {
                Choice::Page { ways, .. } => *ways,
                _ => 2,
            })
        })
    }

    /// Of how many pages a power loss now decides what they hold.
    pub fn open_pages(&self) -> u64 {
        let choices = SimDevice::choices(&self.state());
        choices.iter().filter(|choice| matches!(choice, Choice::Page { .. })).count() as u64
    }

    /// The disk after a power loss, in the way that `pick` chooses: it is called with the number of possibilities of
    /// each decision.
    pub fn after_crash(&self, pick: &mut dyn FnMut(u64) -> u64) -> SimDevice {
        let state = self.state();
        let mut after = State::new(state.capacity);
        after.next_inode = state.next_inode;
        after.names = state.durable_names.clone();
        after.inodes = state.inodes.iter().map(|(number, inode)| (*number, inode.after_crash())).collect();
        for choice in SimDevice::choices(&state) {
            match choice {
                Choice::Name { number } => {
                    if pick(2) == 1 {
                        match state.names.get(&number) {
                            Some(inode) => after.names.insert(number, *inode),
                            None => after.names.remove(&number),
                        };
                    }
                }
                Choice::Length { inode } => {
                    if pick(2) == 1 {
                        state.inodes[&inode].settle_length(after.inodes.get_mut(&inode).unwrap());
                    }
                }
                Choice::Page { inode, page, ways } => {
                    state.inodes[&inode].settle_page(after.inodes.get_mut(&inode).unwrap(), page, pick(ways));
                }
            }
        }
        after.durable_names = after.names.clone();
        SimDevice(Arc::new(Mutex::new(after)))
    }
}

fn used(state: &State) -> u64 {
    // Preallocated bytes count until they are punched.
    state.names.values().map(|inode| state.inodes[inode].used()).sum()
}

fn power_loss() -> io::Error {
    io::Error::other("power loss")
}

impl State {
    fn new(capacity: u64) -> State {
        State {
            inodes: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            next_inode: 0,
            reads: 0,
            failing_reads: 0..0,
            calls: 0,
            fault: None,
            fail_sync: false,
            failed_syncs: FailedSync::Nothing,
            dead: false,
            capacity,
            unreadable: BTreeSet::new(),
            kinds: Vec::new(),
        }
    }

    fn call(&mut self, kind: &'static str) -> io::Result<()> {
        if self.dead {
            return Err(power_loss());
        }
        let number = self.calls;
        self.calls += 1;
        self.kinds.push(kind);
        match self.fault {
            Some((at, fault)) if at == number => match fault {
                Fault::PowerLoss => {
                    self.dead = true;
                    Err(power_loss())
                }
                Fault::Io => Err(io::Error::from_raw_os_error(5)),
                Fault::Full => Err(io::Error::from_raw_os_error(28)),
            },
            _ => Ok(()),
        }
    }
}

impl Device for SimDevice {
    fn list(&self) -> io::Result<Vec<u32>> {
        Ok(self.segments())
    }

    fn create(&self, number: u32, length_bytes: u64) -> io::Result<Arc<dyn SegmentFile>> {
        let mut state = self.state();
        if state.names.contains_key(&number) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = state.next_inode;
        state.next_inode += 1;
        state.call("create")?;
        state.names.insert(number, inode);
        state.inodes.insert(inode, Inode::default());
        state.call("fallocate")?;
        if used(&state) + length_bytes > state.capacity {
            return Err(io::Error::from_raw_os_error(28));
        }
        state.inodes.get_mut(&inode).unwrap().allocate(length_bytes);
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn open(&self, number: u32) -> io::Result<Arc<dyn SegmentFile>> {
        let inode = *self.state().names.get(&number).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn unlink(&self, number: u32) -> io::Result<()> {
        let mut state = self.state();
        state.call("unlink")?;
        state.names.remove(&number).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        state.call("sync_dir")?;
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let state = self.state();
        Ok(Space { capacity_bytes: state.capacity, free_bytes: state.capacity.saturating_sub(used(&state)) })
    }
}

impl SegmentFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.state().inodes[&self.inode].length)
    }

    fn pread(&self, offset: u64, len_bytes: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.dead {
            return Err(power_loss());
        }
        state.reads += 1;
        if state.failing_reads.contains(&(state.reads - 1)) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let inode = &state.inodes[&self.inode];
        let end = offset + len_bytes as u64;
        inode.check_end(end)?;
        if state
            .unreadable
            .range((self.inode, offset / PAGE as u64)..(self.inode, end.div_ceil(PAGE as u64)))
            .next()
            .is_some()
        {
            return Err(io::Error::from_raw_os_error(5));
        }
        buffer.resize(len_bytes, 0);
        inode.read(offset, buffer);
        Ok(())
    }

    fn pwrite(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.disk.state();
        state.call("pwrite")?;
        state.inodes.get_mut(&self.inode).unwrap().write(offset, data);
        Ok(())
    }

    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE as u64) && len_bytes.is_multiple_of(PAGE as u64));
        let mut state = self.disk.state();
        state.call("punch")?;
        state.inodes.get_mut(&self.inode).unwrap().punch(offset, len_bytes);
        Ok(())
    }

    fn fdatasync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        let mut called = state.call("fdatasync");
        if called.is_ok() && std::mem::take(&mut state.fail_sync) {
            called = Err(io::Error::from_raw_os_error(5));
        }
        let dead = state.dead;
        let inode = state.inodes.get_mut(&self.inode).unwrap();
        match called {
            Ok(()) => inode.sync(),
            Err(_) if !dead => inode.fail_sync(),
            Err(_) => {}
        }
        called
    }

    fn drop_cache(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.dead {
            return Err(power_loss());
        }
        let reached = state.failed_syncs;
        state.inodes.get_mut(&self.inode).unwrap().drop_clean(reached);
        Ok(())
    }
}
