//! The real device: a folder of files. The only file of the store that makes system calls.

use super::device::{Device, SegmentFile, Space};
use super::format::{page_up, PAGE_BYTES};
use rustix::fs::{Advice, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SUFFIX: &str = ".seg";
const PROBE: &str = "probe.tmp";
const PROBE_BYTES: u64 = 64 * 1024;

/// Segments as files `NNNNNNNN.seg` in one folder.
#[derive(Debug)]
pub struct FileDevice {
    folder: PathBuf,
    writable: bool,
}

impl FileDevice {
    /// Opens the folder, making it if needed, and checks that the file system can allocate and punch.
    ///
    /// # Errors
    /// `Unsupported`, with the reason in words, on a file system without `fallocate` or hole punching; what the file
    /// system says otherwise.
    pub fn open(folder: &Path) -> io::Result<FileDevice> {
        if !folder.exists() {
            std::fs::create_dir(folder)?;
            if let Some(parent) = folder.parent() {
                sync_folder(parent)?;
            }
        }
        let device = FileDevice { folder: folder.to_owned(), writable: true };
        device.check_support()?;
        Ok(device)
    }

    /// Opens the folder for looking only: nothing is ever written.
    pub fn open_read_only(folder: &Path) -> FileDevice {
        FileDevice { folder: folder.to_owned(), writable: false }
    }

    /// File of a segment.
    pub fn path(&self, number: u32) -> PathBuf {
        self.folder.join(format!("{number:08}{SUFFIX}"))
    }

    fn check_support(&self) -> io::Result<()> {
        let path = self.folder.join(PROBE);
        let file = create_file(&path, OFlags::TRUNC)?;
        let tried = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, PROBE_BYTES)
            .and_then(|()| punch_hole(&file, 0, PROBE_BYTES));
        std::fs::remove_file(&path)?;
        match tried {
            // A full disk must still start: deletes are what helps it.
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "the file system of {} cannot preallocate files and punch holes into them, without which deleted chunks would never \
                     give their space back; use ext4 or XFS",
                    self.folder.display()
                ),
            )),
            Err(other) => Err(other.into()),
        }
    }
}

fn create_file(path: &Path, extra: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | extra;
    Ok(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR | Mode::RGRP)?)
}

fn punch_hole(file: &OwnedFd, offset: u64, len_bytes: u64) -> rustix::io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len_bytes)
}

/// Syncs a folder: files created in it and removed from it stay so after a crash.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

impl Device for FileDevice {
    fn list(&self) -> io::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let number: Option<u32> =
                name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).and_then(|digits| digits.parse().ok());
            numbers.extend(number);
        }
        Ok(numbers)
    }

    fn create(&self, number: u32, length_bytes: u64) -> io::Result<Arc<dyn SegmentFile>> {
        let file = create_file(&self.path(number), OFlags::EXCL)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length_bytes)?;
        Ok(Arc::new(OpenSegment(file)))
    }

    fn open(&self, number: u32) -> io::Result<Arc<dyn SegmentFile>> {
        let access = if self.writable { OFlags::RDWR } else { OFlags::RDONLY };
        let file = rustix::fs::open(self.path(number), access | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Arc::new(OpenSegment(file)))
    }

    fn unlink(&self, number: u32) -> io::Result<()> {
        Ok(rustix::fs::unlink(self.path(number))?)
    }

    fn sync_dir(&self) -> io::Result<()> {
        sync_folder(&self.folder)
    }

    fn space(&self) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(&self.folder)?;
        Ok(Space {
            capacity_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

struct OpenSegment(OwnedFd);

impl SegmentFile for OpenSegment {
    fn length(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(&self.0)?;
        u64::try_from(stat.st_size).map_err(|_| io::Error::other("negative file size"))
    }

    fn pread(&self, offset: u64, len_bytes: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.clear();
        buffer.reserve(len_bytes);
        while buffer.len() < len_bytes {
            let (at, have) = (offset + buffer.len() as u64, buffer.len());
            // A pooled buffer may have far more room than is wanted: the kernel is asked for no byte more.
            let room = buffer.spare_capacity_mut().get_mut(..len_bytes - have).unwrap_or_default();
            match rustix::io::pread(&self.0, room, at) {
                Ok(([], _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((read, _)) => {
                    let length = have + read.len();
                    // SAFETY: the kernel has written the bytes from `have` to `length`, which lie within the capacity.
                    unsafe { buffer.set_len(length) };
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn pread_from_disk(&self, offset: u64, len_bytes: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        // Whole pages: what is cut off is not dropped.
        let begin = offset / PAGE_BYTES * PAGE_BYTES;
        let len = NonZeroU64::new(page_up(offset + len_bytes as u64) - begin);
        let drop_pages = || rustix::fs::fadvise(&self.0, begin, len, Advice::DontNeed);
        // One page at a time from the disk is slow; these are wanted all at once.
        // Advice that is not taken makes no read fail.
        let _ = drop_pages();
        let _ = rustix::fs::fadvise(&self.0, begin, len, Advice::WillNeed);
        let read = self.pread(offset, len_bytes, buffer);
        let _ = drop_pages();
        read
    }

    fn pwrite(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match rustix::io::pwrite(&self.0, data, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    data = data.get(written..).unwrap_or_default();
                    offset += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        Ok(punch_hole(&self.0, offset, len_bytes)?)
    }

    fn fdatasync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.0)?)
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.0, 0, None::<NonZeroU64>, Advice::DontNeed)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Bytes that this thread was given by reads so far, as the kernel counts them.
    fn bytes_read() -> u64 {
        let counts = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        counts.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
    }

    #[test]
    fn a_read_into_a_buffer_with_more_room_asks_for_what_is_wanted_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segment");
        let contents: Vec<u8> = (0..1u32 << 20).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &contents).unwrap();
        let segment = OpenSegment(std::fs::File::open(&path).unwrap().into());
        let mut buffer = Vec::with_capacity(contents.len());
        // The count itself is read from a file, as long as before.
        let own = (bytes_read(), bytes_read());
        for (offset, wanted) in [(0, 16_384), (70_001, 65_536), (contents.len() - 10, 10)] {
            let before = bytes_read();
            segment.pread(offset as u64, wanted, &mut buffer).unwrap();
            let read = bytes_read() - before;
            assert_eq!(buffer, contents[offset..offset + wanted]);
            let slack = own.1 - own.0 + 64;
            assert!(read <= wanted as u64 + slack, "{read} bytes for {wanted}");
        }
        let past_the_end = segment.pread(contents.len() as u64 - 10, 11, &mut buffer);
        assert_eq!(past_the_end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
