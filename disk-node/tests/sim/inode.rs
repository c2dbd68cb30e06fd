//! One file of the simulated disk: what the disk holds, what the page cache shows, and what may become of the
//! difference.

use super::PAGE;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

pub type Page = Arc<[u8; PAGE]>;

/// What a page was given over time; None stands for a hole.
type Versions = Vec<Option<Page>>;

/// What reached the disk of the pages that a failed sync was to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailedSync {
    /// Nothing of them.
    Nothing,
    /// All but one, counted from the first of the file.
    AllBut(usize),
    /// For each page a draw: its old contents, any later ones, or those torn.
    Drawn(u64),
}

#[derive(Debug, Clone, Default)]
pub struct Inode {
    pub length: u64,
    pub durable_length: u64,
    /// Pages that take space, whether or not they were ever written.
    allocated: Vec<bool>,
    durable_allocated: Vec<bool>,
    /// What is certain to be on the disk; absent pages are zeros.
    durable: BTreeMap<u64, Page>,
    /// What a reader sees; absent pages are zeros.
    now: BTreeMap<u64, Page>,
    /// Dirty: for each page written or punched since the last sync, its contents over time.
    unsynced: BTreeMap<u64, Versions>,
    /// Clean, and yet perhaps not on the disk: the sync that was to write them failed. The kernel writes them no more,
    /// and a reader sees them until they are dropped from the cache.
    failed: BTreeMap<u64, Versions>,
}

fn zeros() -> Page {
    Arc::new([0; PAGE])
}

impl Inode {
    pub fn allocate(&mut self, length: u64) {
        self.length = length;
        self.allocated = vec![true; length as usize / PAGE];
    }

    /// Space that it takes, in bytes.
    pub fn used(&self) -> u64 {
        self.allocated.iter().filter(|taken| **taken).count() as u64 * PAGE as u64
    }

    fn touch(&mut self, page: u64, contents: Option<Page>) {
        let earlier = self.failed.remove(&page).unwrap_or_default();
        let versions = self.unsynced.entry(page).or_default();
        versions.splice(0..0, earlier);
        versions.push(contents);
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= self.length, "the store wrote beyond a segment");
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (page, begin) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let length = (PAGE - begin).min(data.len() - done);
            let mut bytes = self.now.get(&page).map_or([0; PAGE], |page| **page);
            bytes[begin..begin + length].copy_from_slice(&data[done..done + length]);
            let bytes = Arc::new(bytes);
            self.now.insert(page, bytes.clone());
            self.allocated[page as usize] = true;
            self.touch(page, Some(bytes));
            done += length;
        }
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let (page, begin) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let length = (PAGE - begin).min(buffer.len() - done);
            match self.now.get(&page) {
                Some(bytes) => buffer[done..done + length].copy_from_slice(&bytes[begin..begin + length]),
                None => buffer[done..done + length].fill(0),
            }
            done += length;
        }
    }

    pub fn punch(&mut self, offset: u64, len_bytes: u64) {
        for page in offset / PAGE as u64..(offset + len_bytes) / PAGE as u64 {
            if !std::mem::take(&mut self.allocated[page as usize]) {
                continue;
            }
            self.now.remove(&page);
            // A hole over zeros changes nothing that a crash could take back.
            let touched = self.unsynced.contains_key(&page)
                || self.failed.contains_key(&page)
                || self.durable.get(&page).is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0));
            if touched {
                self.touch(page, None);
            }
        }
    }

    /// Writes what is dirty. What an earlier sync failed to write is clean and stays where it is.
    pub fn sync(&mut self) {
        for page in std::mem::take(&mut self.unsynced).into_keys() {
            match self.now.get(&page) {
                Some(bytes) => self.durable.insert(page, bytes.clone()),
                None => self.durable.remove(&page),
            };
        }
        self.durable_length = self.length;
        self.durable_allocated.clone_from(&self.allocated);
    }

    /// The sync fails: what was dirty is clean, and nobody knows what of it is on the disk. Holes are no pages of the
    /// cache: a later sync makes them durable.
    pub fn fail_sync(&mut self) {
        let (holes, pages) = std::mem::take(&mut self.unsynced)
            .into_iter()
            .partition(|(_, versions)| matches!(versions.last(), Some(None)));
        self.unsynced = holes;
        for (page, versions) in pages {
            self.failed.entry(page).or_default().extend(versions);
        }
    }

    /// Drops clean pages: of those that a sync failed to write, a reader sees from now on what the disk has. Dirty
    /// pages stay.
    pub fn drop_clean(&mut self, reached: FailedSync) {
        let mut random = super::Random(match reached {
            FailedSync::Drawn(seed) => seed,
            _ => 0,
        });
        for (place, (page, versions)) in std::mem::take(&mut self.failed).into_iter().enumerate() {
            let newest = 2 * versions.len() as u64 - 1;
            let chosen = match reached {
                FailedSync::Nothing => 0,
                FailedSync::AllBut(lost) => {
                    if place == lost {
                        0
                    } else {
                        newest
                    }
                }
                FailedSync::Drawn(_) => random.below(newest + 2),
            };
            let bytes = self.outcome(page, &versions, chosen);
            self.now.insert(page, bytes.clone());
            self.durable.insert(page, bytes);
        }
    }

    /// Changes a byte on the disk and in the cache.
    pub fn corrupt(&mut self, offset: u64, change: impl Fn(u8) -> u8) {
        let (page, at) = (offset / PAGE as u64, (offset % PAGE as u64) as usize);
        for pages in [&mut self.now, &mut self.durable] {
            let mut bytes = pages.get(&page).map_or([0; PAGE], |page| **page);
            bytes[at] = change(bytes[at]);
            pages.insert(page, Arc::new(bytes));
        }
    }

    /// Pages of which a power loss decides what they hold, and in how many ways: the old contents, each version since,
    /// and each version torn in the middle over what was there before it.
    pub fn open_pages(&self) -> BTreeMap<u64, u64> {
        self.failed
            .iter()
            .chain(&self.unsynced)
            .map(|(page, versions)| (*page, 1 + 2 * versions.len() as u64))
            .collect()
    }

    /// The contents of a page of which the `chosen`th possibility came true.
    fn outcome(&self, page: u64, versions: &Versions, chosen: u64) -> Page {
        let before = || self.durable.get(&page).cloned().unwrap_or_else(zeros);
        let Some(written) = chosen.checked_sub(1) else { return before() };
        let (version, torn) = ((written / 2) as usize, written % 2 == 1);
        let new = versions[version].clone().unwrap_or_else(zeros);
        if !torn {
            return new;
        }
        let old = match version.checked_sub(1) {
            None => before(),
            Some(earlier) => versions[earlier].clone().unwrap_or_else(zeros),
        };
        let mut bytes = *new;
        bytes[PAGE / 2..].copy_from_slice(&old[PAGE / 2..]);
        Arc::new(bytes)
    }

    /// What is certain to be there after a power loss.
    pub fn after_crash(&self) -> Inode {
        Inode {
            length: self.durable_length,
            durable_length: self.durable_length,
            allocated: self.durable_allocated.clone(),
            durable_allocated: self.durable_allocated.clone(),
            durable: self.durable.clone(),
            now: self.durable.clone(),
            ..Inode::default()
        }
    }

    /// In `after`, which came out of a power loss, this page has the `chosen`th of its possibilities.
    pub fn settle_page(&self, after: &mut Inode, page: u64, chosen: u64) {
        if chosen == 0 {
            return;
        }
        let Some(versions) = self.failed.get(&page).or_else(|| self.unsynced.get(&page)) else { return };
        let bytes = self.outcome(page, versions, chosen);
        after.durable.insert(page, bytes.clone());
        after.now.insert(page, bytes);
        let least = page as usize + 1;
        if after.allocated.len() < least {
            after.allocated.resize(least, false);
        }
        after.allocated[page as usize] = true;
        after.durable_allocated.clone_from(&after.allocated);
    }

    /// In `after`, the length that was not synced is there all the same.
    pub fn settle_length(&self, after: &mut Inode) {
        (after.length, after.durable_length) = (self.length, self.length);
        after.allocated.resize(self.length as usize / PAGE, false);
        after.durable_allocated.clone_from(&after.allocated);
    }

    /// # Errors
    /// When the file ends before.
    pub fn check_end(&self, end: u64) -> io::Result<()> {
        if end > self.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}
