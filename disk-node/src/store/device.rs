//! The seam between the store and the disk: a handful of calls, each of them one system call or two.
//!
//! The daemon uses [`super::file_device::FileDevice`]; the crash tests bring a device that forgets what was not synced,
//! tears pages and fails on demand. What the store may rely on, and nothing more:
//!
//! - bytes written are durable after a successful [`SegmentFile::fdatasync`] that began later; before that any page may
//!   be old, new or torn;
//! - a created or removed file is durably so after [`Device::sync_dir`];
//! - after a failed sync nothing is known about what was written since the sync before. It is never repeated.

use std::io;
use std::sync::Arc;

/// How full the file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Its size, in bytes.
    pub capacity_bytes: u64,
    /// What may still be allocated, in bytes.
    pub free_bytes: u64,
}

/// The folder of segments of one disk.
pub trait Device: Send + Sync {
    /// Numbers of the segments that are there, in any order.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn list(&self) -> io::Result<Vec<u32>>;

    /// Makes a segment file and allocates all its bytes, which read as zeros.
    ///
    /// # Errors
    /// `StorageFull` or `QuotaExceeded` when there is no room; the file may be left behind. `AlreadyExists`.
    fn create(&self, number: u32, length_bytes: u64) -> io::Result<Arc<dyn SegmentFile>>;

    /// Opens a segment.
    ///
    /// # Errors
    /// `NotFound` when it is not there.
    fn open(&self, number: u32) -> io::Result<Arc<dyn SegmentFile>>;

    /// Removes a segment.
    ///
    /// # Errors
    /// `NotFound` when it is not there.
    fn unlink(&self, number: u32) -> io::Result<()>;

    /// Makes creations and removals durable.
    ///
    /// # Errors
    /// The caller stops for good.
    fn sync_dir(&self) -> io::Result<()>;

    /// How full the file system is.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn space(&self) -> io::Result<Space>;
}

/// One open segment.
pub trait SegmentFile: Send + Sync {
    /// Length of the file, in bytes.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn length(&self) -> io::Result<u64>;

    /// Replaces `buffer` by exactly `len_bytes` bytes from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends earlier; what the disk says when it cannot be read.
    fn pread(&self, offset: u64, len_bytes: usize, buffer: &mut Vec<u8>) -> io::Result<()>;

    /// As [`SegmentFile::pread`], past the page cache where the device can do that: shows what the disk holds now, and
    /// takes no page from those that others read often.
    ///
    /// # Errors
    /// As there.
    fn pread_from_disk(&self, offset: u64, len_bytes: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        self.pread(offset, len_bytes, buffer)
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// After one, any part may have been written.
    fn pwrite(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Gives these bytes back to the file system; they read as zeros from now on. Multiples of a page.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()>;

    /// Makes everything written and punched durable.
    ///
    /// # Errors
    /// The caller stops for good.
    fn fdatasync(&self) -> io::Result<()>;

    /// Forgets cached pages, so that the next read shows what the disk holds. After a failed sync the kernel marks
    /// pages clean that never reached the disk; a process that starts again must not read them.
    ///
    /// # Errors
    /// Whatever the file system says.
    fn drop_cache(&self) -> io::Result<()>;
}

/// True for "no room", which is an answer; false for a broken disk, which stops the process.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
