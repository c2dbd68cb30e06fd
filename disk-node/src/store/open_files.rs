//! Segment files kept open, and how one is removed.
//!
//! **Invariant:** a file that was removed is not kept open: its space would stay taken until the process ends. A reader
//! that opens a segment while it is being removed either puts it into the cache before it is taken out, or does not
//! find it.

use super::device::{Device, SegmentFile};
use quick_cache::sync::Cache;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

/// Files kept open.
const OPEN_FILES: usize = 256;

pub(super) struct OpenFiles {
    device: Arc<dyn Device>,
    files: Cache<u32, Arc<dyn SegmentFile>>,
    /// Read-locked from the opening of a file until it is in the cache; write-locked while one is removed.
    removal: RwLock<()>,
}

impl OpenFiles {
    pub(super) fn new(device: Arc<dyn Device>) -> OpenFiles {
        OpenFiles { device, files: Cache::new(OPEN_FILES), removal: RwLock::new(()) }
    }

    /// An open segment, from the cache or the disk.
    ///
    /// # Errors
    /// `NotFound` when the segment is gone.
    pub(super) fn get(&self, number: u32) -> io::Result<Arc<dyn SegmentFile>> {
        if let Some(file) = self.files.get(&number) {
            return Ok(file);
        }
        let _no_removal = self.removal.read().unwrap_or_else(PoisonError::into_inner);
        let file = self.device.open(number)?;
        self.files.insert(number, file.clone());
        Ok(file)
    }

    /// Takes in a segment that was just created.
    pub(super) fn insert(&self, number: u32, file: Arc<dyn SegmentFile>) {
        self.files.insert(number, file);
    }

    /// Removes a segment from the disk and from here. One that is not there any more counts as removed.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub(super) fn unlink(&self, number: u32) -> io::Result<()> {
        let _no_opening = self.removal.write().unwrap_or_else(PoisonError::into_inner);
        self.files.remove(&number);
        match self.device.unlink(number) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::store::device::Space;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::Barrier;

    struct File;

    impl SegmentFile for File {
        fn length(&self) -> io::Result<u64> {
            Ok(0)
        }
        fn pread(&self, _: u64, _: usize, _: &mut Vec<u8>) -> io::Result<()> {
            Ok(())
        }
        fn pwrite(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn punch(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn fdatasync(&self) -> io::Result<()> {
            Ok(())
        }
        fn drop_cache(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// One segment; its opening stops between having the file and giving it.
    struct Slow {
        there: AtomicBool,
        opened: Barrier,
        removal_begun: Barrier,
    }

    impl Device for Slow {
        fn list(&self) -> io::Result<Vec<u32>> {
            Ok(Vec::new())
        }
        fn create(&self, _: u32, _: u64) -> io::Result<Arc<dyn SegmentFile>> {
            Ok(Arc::new(File))
        }
        fn open(&self, _: u32) -> io::Result<Arc<dyn SegmentFile>> {
            if !self.there.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.opened.wait();
            self.removal_begun.wait();
            // The removal goes as far as it can meanwhile.
            std::thread::sleep(std::time::Duration::from_millis(50));
            Ok(Arc::new(File))
        }
        fn unlink(&self, _: u32) -> io::Result<()> {
            self.there.store(false, Ordering::SeqCst);
            Ok(())
        }
        fn sync_dir(&self) -> io::Result<()> {
            Ok(())
        }
        fn space(&self) -> io::Result<Space> {
            Ok(Space { capacity_bytes: 0, free_bytes: 0 })
        }
    }

    #[test]
    fn a_segment_that_is_removed_while_a_reader_opens_it_is_not_kept_open() {
        let (opened, removal_begun) = (Barrier::new(2), Barrier::new(2));
        let device = Arc::new(Slow { there: AtomicBool::new(true), opened, removal_begun });
        let files = OpenFiles::new(device.clone());
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| files.get(1).map(drop));
            device.opened.wait();
            let removal = scope.spawn(|| {
                device.removal_begun.wait();
                files.unlink(1)
            });
            reader.join().unwrap().unwrap();
            removal.join().unwrap().unwrap();
        });
        assert_eq!(files.get(1).err().map(|error| error.kind()), Some(io::ErrorKind::NotFound));
    }
}
