//! A disk that lies as far as a real one may: it forgets what was not synced, page by page, tears pages, loses and
//! resurrects names, and fails or stops at a chosen call.

#![allow(dead_code)] // each test file uses its part

use granary_disk_node::store::device::{Device, SegmentFile, Space};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4096;

type Page = Arc<[u8; PAGE]>;

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

#[derive(Debug, Clone, Default)]
struct Inode {
    length: u64,
    /// What is certain; absent pages are zeros.
    durable: BTreeMap<u64, Page>,
    durable_length: u64,
    /// What the running system sees.
    now: BTreeMap<u64, Page>,
    /// For each page written since the last sync, its contents over time.
    unsynced: BTreeMap<u64, Vec<Option<Page>>>,
}

#[derive(Debug, Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<u32, u64>,
    durable_names: BTreeMap<u32, u64>,
    next_inode: u64,
    reads: u64,
    failing_reads: std::ops::Range<u64>,
    calls: u64,
    fault: Option<(u64, Fault)>,
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

fn zeros() -> Page {
    Arc::new([0; PAGE])
}

impl SimDevice {
    pub fn new(capacity: u64) -> SimDevice {
        SimDevice(Arc::new(Mutex::new(State { capacity, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms a fault at the n-th call from now, counted from zero.
    pub fn arm(&self, after: u64, fault: Fault) {
        let mut state = self.state();
        state.fault = Some((state.calls + after, fault));
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
        let inode = state.inodes.get_mut(&inode).unwrap();
        let (page, at) = (offset / PAGE as u64, (offset % PAGE as u64) as usize);
        for pages in [&mut inode.now, &mut inode.durable] {
            let mut bytes = pages.get(&page).map_or([0; PAGE], |page| **page);
            bytes[at] = change(bytes[at]);
            pages.insert(page, Arc::new(bytes));
        }
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
            for (page, versions) in &inode.unsynced {
                // The old contents, each version since, and each version torn in the middle over what was there before
                // it.
                choices.push(Choice::Page { inode: *number, page: *page, ways: 1 + 2 * versions.len() as u64 });
            }
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

    /// The disk after a power loss, in the way that `pick` chooses: it is called with the number of possibilities of
    /// each decision.
    pub fn after_crash(&self, pick: &mut dyn FnMut(u64) -> u64) -> SimDevice {
        let state = self.state();
        let mut after = State { capacity: state.capacity, next_inode: state.next_inode, ..State::default() };
        after.names = state.durable_names.clone();
        for (number, inode) in &state.inodes {
            let length = inode.durable_length;
            let kept = Inode { length, durable_length: length, durable: inode.durable.clone(), ..Inode::default() };
            after.inodes.insert(*number, kept);
        }
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
                        let length = state.inodes[&inode].length;
                        let inode = after.inodes.get_mut(&inode).unwrap();
                        (inode.length, inode.durable_length) = (length, length);
                    }
                }
                Choice::Page { inode, page, ways } => {
                    let chosen = pick(ways);
                    if chosen == 0 {
                        continue;
                    }
                    let source = &state.inodes[&inode];
                    let versions = &source.unsynced[&page];
                    let version = ((chosen - 1) / 2) as usize;
                    let torn = (chosen - 1) % 2 == 1;
                    let new = versions[version].clone().unwrap_or_else(zeros);
                    let old = match version.checked_sub(1) {
                        None => source.durable.get(&page).cloned().unwrap_or_else(zeros),
                        Some(before) => versions[before].clone().unwrap_or_else(zeros),
                    };
                    let mut bytes = *new;
                    if torn {
                        bytes[PAGE / 2..].copy_from_slice(&old[PAGE / 2..]);
                    }
                    after.inodes.get_mut(&inode).unwrap().durable.insert(page, Arc::new(bytes));
                }
            }
        }
        after.durable_names = after.names.clone();
        for inode in after.inodes.values_mut() {
            inode.now = inode.durable.clone();
        }
        SimDevice(Arc::new(Mutex::new(after)))
    }
}

fn used(state: &State) -> u64 {
    // Preallocated bytes count until they are punched; the double keeps a page for each of them.
    state.names.values().map(|inode| state.inodes[inode].now.len() as u64 * PAGE as u64).sum()
}

fn power_loss() -> io::Error {
    io::Error::other("power loss")
}

impl State {
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
        let file = state.inodes.get_mut(&inode).unwrap();
        file.length = length_bytes;
        let zero = zeros();
        file.now = (0..length_bytes / PAGE as u64).map(|page| (page, zero.clone())).collect();
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
        buffer.clear();
        if offset + len_bytes as u64 > inode.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.resize(len_bytes, 0);
        let mut done = 0;
        while done < len_bytes {
            let at = offset + done as u64;
            let (page, begin) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let length = (PAGE - begin).min(len_bytes - done);
            if state.unreadable.contains(&(self.inode, page)) {
                return Err(io::Error::from_raw_os_error(5));
            }
            if let Some(bytes) = inode.now.get(&page) {
                buffer[done..done + length].copy_from_slice(&bytes[begin..begin + length]);
            }
            done += length;
        }
        Ok(())
    }

    fn pwrite(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.disk.state();
        state.call("pwrite")?;
        let inode = state.inodes.get_mut(&self.inode).unwrap();
        assert!(offset + data.len() as u64 <= inode.length, "the store wrote beyond a segment");
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (page, begin) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let length = (PAGE - begin).min(data.len() - done);
            let mut bytes = inode.now.get(&page).map_or([0; PAGE], |page| **page);
            bytes[begin..begin + length].copy_from_slice(&data[done..done + length]);
            let bytes = Arc::new(bytes);
            inode.now.insert(page, bytes.clone());
            inode.unsynced.entry(page).or_default().push(Some(bytes));
            done += length;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE as u64) && len_bytes.is_multiple_of(PAGE as u64));
        let mut state = self.disk.state();
        state.call("punch")?;
        let inode = state.inodes.get_mut(&self.inode).unwrap();
        let pages: Vec<u64> =
            inode.now.range(offset / PAGE as u64..(offset + len_bytes) / PAGE as u64).map(|(page, _)| *page).collect();
        for page in pages {
            inode.now.remove(&page);
            // A hole over zeros changes nothing that a crash could take back.
            let touched = inode.unsynced.contains_key(&page)
                || inode.durable.get(&page).is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0));
            if touched {
                inode.unsynced.entry(page).or_default().push(None);
            }
        }
        Ok(())
    }

    fn fdatasync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        state.call("fdatasync")?;
        let inode = state.inodes.get_mut(&self.inode).unwrap();
        inode.durable = inode.now.clone();
        inode.durable_length = inode.length;
        inode.unsynced.clear();
        Ok(())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}
