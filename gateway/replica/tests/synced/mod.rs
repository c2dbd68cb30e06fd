//! What a power cut leaves of the files of this process: what was synced, and of the rest nothing, or a part by chance.
//!
//! A test binary with this module has functions of its own in the place of libc's `fsync` and `fdatasync`. The linker
//! takes a program's own functions first, so RocksDB (linked into it) and Rust's standard library call these. They ask
//! the kernel, and when it has synced, they note what is certain from then on:
//!
//! - of a file, the bytes that it had when the sync began. Nothing here rewrites a file in place, and a checksum
//!   notices if something ever does;
//! - of a folder, the names in it when the sync began. A new file, or a rename, whose folder was not synced afterwards
//!   is not certain, and neither is a removal: the file may come back.
//!
//! What is noted holds the files open: they are still there when they were removed meanwhile, and no other file gets
//! their inode number. `sync_file_range` promises nothing for a power cut and is not counted. On btrfs RocksDB syncs no
//! folders; temporary folders on it are no place for these tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use super::scenery::Random;
use crc32fast::Hasher;
use rustix::fs::FileType;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{c_int, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
}

/// Takes the place of libc's function of this name.
#[no_mangle]
pub extern "C" fn fsync(fd: c_int) -> c_int {
    sync(fd, |fd| rustix::fs::fsync(fd))
}

/// Takes the place of libc's function of this name.
#[no_mangle]
pub extern "C" fn fdatasync(fd: c_int) -> c_int {
    sync(fd, |fd| rustix::fs::fdatasync(fd))
}

/// rustix makes the system call itself and does not come back to the two functions above.
fn sync(fd: c_int, ask_kernel: impl Fn(BorrowedFd<'_>) -> Result<(), Errno>) -> c_int {
    let done = if fd < 0 {
        Err(Errno::BADF)
    } else {
        // SAFETY: whoever calls has it open until this returns, as libc's functions ask for, too.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let seen = known().look(fd);
        let refused = seen.as_ref().and_then(|seen| known().refuse(seen));
        refused.map_or_else(|| ask_kernel(fd), Err).map(|()| {
            if let Some(seen) = seen {
                known().note(seen);
            }
        })
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            // SAFETY: libc gives the place of this thread's error number, which is always there.
            unsafe { *__errno_location() = error.raw_os_error() };
            -1
        }
    }
}

/// Device and number.
type Inode = (u64, u64);

#[derive(Clone)]
struct Entry {
    inode: Inode,
    handle: Arc<File>,
    is_folder: bool,
}

type Names = BTreeMap<OsString, Entry>;

struct KnownFile {
    handle: Arc<File>,
    ticket: u64,
    synced_bytes: u64,
    /// Of those bytes.
    crc: Hasher,
    /// A sync of it failed. The kernel forgets then what it could not write, and says that all is well from then on.
    is_lost: bool,
}

struct KnownFolder {
    handle: Arc<File>,
    ticket: u64,
    names: Names,
}

/// What a sync found when it began.
struct Seen {
    path: PathBuf,
    /// Of two syncs of one file at a time, the one that began later has seen more.
    ticket: u64,
    entry: Entry,
    len_bytes: u64,
    names: Names,
}

struct Refusal {
    matches: Box<dyn Fn(&Path) -> bool + Send>,
    happened: Arc<AtomicBool>,
}

struct Recording {
    number: u64,
    roots: Vec<PathBuf>,
    tell: Box<dyn Fn() -> u64 + Send>,
    moments: Vec<Moment>,
}

#[derive(Default)]
struct Known {
    tickets: u64,
    files: BTreeMap<Inode, KnownFile>,
    folders: BTreeMap<Inode, KnownFolder>,
    refusals: Vec<Refusal>,
    recordings: Vec<Recording>,
}

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

struct Guard(MutexGuard<'static, Option<Known>>);

impl std::ops::Deref for Guard {
    type Target = Known;
    fn deref(&self) -> &Known {
        self.0.as_ref().unwrap()
    }
}

impl std::ops::DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Known {
        self.0.as_mut().unwrap()
    }
}

fn known() -> Guard {
    let mut guard = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_default();
    Guard(guard)
}

fn path_of(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

impl Known {
    /// What is open there; None for what is neither a file nor a folder.
    fn look(&mut self, fd: BorrowedFd<'_>) -> Option<Seen> {
        let stat = rustix::fs::fstat(fd).ok()?;
        let is_folder = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::Directory => true,
            _ => return None,
        };
        self.tickets += 1;
        let entry = self.entry((stat.st_dev, stat.st_ino), is_folder, &path_of(&fd))?;
        let names = if is_folder { self.names(&entry.handle)? } else { Names::new() };
        let path = std::fs::read_link(path_of(&fd)).ok()?;
        Some(Seen { path, ticket: self.tickets, entry, len_bytes: stat.st_size as u64, names })
    }

    fn entry(&self, inode: Inode, is_folder: bool, path: &Path) -> Option<Entry> {
        let known = match is_folder {
            true => self.folders.get(&inode).map(|folder| folder.handle.clone()),
            false => self.files.get(&inode).map(|file| file.handle.clone()),
        };
        let handle = match known {
            Some(handle) => handle,
            None => Arc::new(File::open(path).ok()?),
        };
        Some(Entry { inode, handle, is_folder })
    }

    /// The names in a folder now. What vanishes meanwhile is left out.
    fn names(&self, folder: &File) -> Option<Names> {
        let device = folder.metadata().ok()?.dev();
        let mut names = Names::new();
        for entry in std::fs::read_dir(path_of(folder)).ok()? {
            let entry = entry.ok()?;
            let Ok(is_folder) = entry.file_type().map(|kind| kind.is_dir()) else { continue };
            if let Some(found) = self.entry((device, entry.ino()), is_folder, &entry.path()) {
                names.insert(entry.file_name(), found);
            }
        }
        Some(names)
    }

    fn refuse(&mut self, seen: &Seen) -> Option<Errno> {
        let at = self.refusals.iter().position(|refusal| (refusal.matches)(&seen.path))?;
        self.refusals.remove(at).happened.store(true, Ordering::SeqCst);
        if !seen.entry.is_folder {
            self.file(&seen.entry).is_lost = true;
        }
        Some(Errno::IO)
    }

    fn file(&mut self, entry: &Entry) -> &mut KnownFile {
        self.files.entry(entry.inode).or_insert_with(|| KnownFile {
            handle: entry.handle.clone(),
            ticket: 0,
            synced_bytes: 0,
            crc: Hasher::new(),
            is_lost: false,
        })
    }

    /// What was seen is certain now. Recordings are told, before and after.
    fn note(&mut self, seen: Seen) {
        let path = seen.path.clone();
        let concerned = |recording: &Recording| recording.roots.iter().any(|root| path.starts_with(root));
        for recording in self.recordings.iter_mut().filter(|recording| concerned(recording)) {
            let told = (recording.tell)();
            recording.moments.last_mut().unwrap().told_until = told;
        }
        if seen.entry.is_folder {
            self.note_folder(seen);
        } else {
            self.note_file(seen);
        }
        let mut recordings = std::mem::take(&mut self.recordings);
        for recording in recordings.iter_mut().filter(|recording| concerned(recording)) {
            let cuts = recording.roots.iter().map(|root| self.cut(root)).collect();
            recording.moments.push(Moment { after_sync_of: path.clone(), told_until: 0, cuts });
        }
        self.recordings = recordings;
    }

    fn note_file(&mut self, seen: Seen) {
        let file = self.file(&seen.entry);
        if file.is_lost || file.ticket > seen.ticket {
            return;
        }
        if seen.len_bytes < file.synced_bytes {
            (file.synced_bytes, file.crc) = (0, Hasher::new());
        }
        let mut bytes = vec![0; (seen.len_bytes - file.synced_bytes) as usize];
        if file.handle.read_exact_at(&mut bytes, file.synced_bytes).is_ok() {
            file.crc.update(&bytes);
            (file.ticket, file.synced_bytes) = (seen.ticket, seen.len_bytes);
        }
    }

    fn note_folder(&mut self, seen: Seen) {
        let folder = self.folders.entry(seen.entry.inode).or_insert_with(|| KnownFolder {
            handle: seen.entry.handle.clone(),
            ticket: 0,
            names: Names::new(),
        });
        if folder.ticket < seen.ticket {
            (folder.ticket, folder.names) = (seen.ticket, seen.names);
        }
        // What has no name any more, and no folder that would give it back.
        let is_needed = |handle: &Arc<File>| {
            Arc::strong_count(handle) > 1 || handle.metadata().is_ok_and(|about| about.nlink() > 0)
        };
        self.folders.retain(|_, folder| is_needed(&folder.handle));
        self.files.retain(|_, file| is_needed(&file.handle));
    }

    fn cut(&self, root: &Path) -> Cut {
        let handle = Arc::new(File::open(root).unwrap());
        let about = handle.metadata().unwrap();
        Cut(self.node(&Entry { inode: (about.dev(), about.ino()), handle, is_folder: true }))
    }

    fn node(&self, entry: &Entry) -> Arc<Node> {
        if !entry.is_folder {
            let known = self.files.get(&entry.inode);
            return Arc::new(Node::File {
                handle: entry.handle.clone(),
                synced_bytes: known.map_or(0, |file| file.synced_bytes),
                crc: known.map_or(0, |file| file.crc.clone().finalize()),
                now_bytes: entry.handle.metadata().unwrap().len(),
            });
        }
        let none = Names::new();
        let synced = self.folders.get(&entry.inode).map_or(&none, |folder| &folder.names);
        let mut nodes = BTreeMap::new();
        let mut named = |names: &Names| -> BTreeMap<OsString, Arc<Node>> {
            let node = |entry: &Entry| nodes.entry(entry.inode).or_insert_with(|| self.node(entry)).clone();
            let mut node = node;
            names.iter().map(|(name, entry)| (name.clone(), node(entry))).collect()
        };
        let now = self.names(&entry.handle).unwrap_or_default();
        Arc::new(Node::Folder { synced: named(synced), now: named(&now) })
    }

    /// Takes what lies there as synced: it came through a power cut.
    fn adopt(&mut self, path: &Path) {
        self.tickets += 1;
        let ticket = self.tickets;
        let about = std::fs::metadata(path).unwrap();
        let entry = self.entry((about.dev(), about.ino()), about.is_dir(), path).unwrap();
        if !about.is_dir() {
            let names = Names::new();
            self.note_file(Seen { path: path.to_owned(), ticket, entry, len_bytes: about.len(), names });
            return;
        }
        for inside in std::fs::read_dir(path).unwrap() {
            self.adopt(&inside.unwrap().path());
        }
        let names = self.names(&entry.handle).unwrap();
        self.note_folder(Seen { path: path.to_owned(), ticket, entry, len_bytes: 0, names });
    }
}

enum Node {
    Folder { synced: BTreeMap<OsString, Arc<Node>>, now: BTreeMap<OsString, Arc<Node>> },
    File { handle: Arc<File>, synced_bytes: u64, crc: u32, now_bytes: u64 },
}

/// What a power cut leaves of what was not synced.
pub enum Keep {
    /// Nothing: names as at the last sync of their folder, bytes as at the last sync of their file.
    Nothing,
    /// What chance wants: of each folder the names as at its last sync or as they were at the cut, of each file's other
    /// bytes none, some, all, or zeros in their place.
    SomeOf(Random),
}

impl Keep {
    fn chance(&mut self, of: u64) -> u64 {
        match self {
            Keep::Nothing => 0,
            Keep::SomeOf(random) => random.below(of),
        }
    }
}

/// A folder at one moment, as it was and as far as it was synced.
pub struct Cut(Arc<Node>);

impl Cut {
    /// Writes what is left of it to `to`, which is not there yet and whose name is certain.
    pub fn write(&self, to: &Path, mut keep: Keep) {
        write_node(&self.0, to, &mut keep);
        known().adopt(to);
    }
}

fn write_node(node: &Node, to: &Path, keep: &mut Keep) {
    match node {
        Node::Folder { synced, now } => {
            std::fs::create_dir(to).unwrap();
            for (name, node) in if keep.chance(2) == 0 { synced } else { now } {
                write_node(node, &to.join(name), keep);
            }
        }
        Node::File { handle, synced_bytes, crc, now_bytes } => {
            let mut bytes = vec![0; *synced_bytes as usize];
            handle.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(crc32fast::hash(&bytes), *crc, "{} was changed in place after a sync", to.display());
            let more_bytes = now_bytes.saturating_sub(*synced_bytes);
            let (kept_bytes, is_zeros) = match keep.chance(5) {
                0 | 1 => (0, false),
                2 => (more_bytes, false),
                3 => (more_bytes, true),
                _ => (keep.chance(more_bytes + 1), false),
            };
            let mut more = vec![0; kept_bytes as usize];
            if !is_zeros {
                handle.read_exact_at(&mut more, *synced_bytes).unwrap();
            }
            bytes.extend_from_slice(&more);
            std::fs::write(to, bytes).unwrap();
        }
    }
}

/// Cuts the power of these folders at one moment. Whoever writes to them goes on and does not notice.
pub fn cut(roots: &[PathBuf]) -> Vec<Cut> {
    let known = known();
    roots.iter().map(|root| known.cut(root)).collect()
}

/// Writes to `to` what a power cut would leave of `from` now, and nothing that was not synced.
pub fn copy_what_was_synced(from: &Path, to: &Path) {
    // The lock is given back before the copy is written.
    let cut = known().cut(from);
    cut.write(to, Keep::Nothing);
}

/// How many bytes of a file are certain; None when it was never synced.
pub fn synced_bytes(path: &Path) -> Option<u64> {
    let about = std::fs::metadata(path).unwrap();
    known().files.get(&(about.dev(), about.ino())).map(|file| file.synced_bytes)
}

/// The next sync below `root` of a file or folder whose name contains `name` fails with EIO, and what it was to make
/// durable is lost. Says whether that has happened.
pub fn fail_next_sync(root: &Path, name: &'static str) -> Arc<AtomicBool> {
    let root = root.canonicalize().unwrap();
    let happened = Arc::<AtomicBool>::default();
    let matches = move |path: &Path| {
        path.starts_with(&root) && path.file_name().is_some_and(|file| file.to_string_lossy().contains(name))
    };
    known().refusals.push(Refusal { matches: Box::new(matches), happened: happened.clone() });
    happened
}

/// The time between two syncs: the power could have gone at any point of it.
pub struct Moment {
    /// What the first of the two has synced; the folder that is recorded, when it is the beginning.
    pub after_sync_of: PathBuf,
    /// What `tell` said at the end of it.
    pub told_until: u64,
    /// The folders, in the order in which they were named.
    pub cuts: Vec<Cut>,
}

/// Records every moment of these folders until it is ended. `tell` counts what was promised to somebody so far.
pub struct Record(u64);

pub fn record(roots: &[PathBuf], tell: impl Fn() -> u64 + Send + 'static) -> Record {
    let roots: Vec<PathBuf> = roots.iter().map(|root| root.canonicalize().unwrap()).collect();
    let mut known = known();
    known.tickets += 1;
    let number = known.tickets;
    let cuts = roots.iter().map(|root| known.cut(root)).collect();
    let moments = vec![Moment { after_sync_of: roots[0].clone(), told_until: 0, cuts }];
    known.recordings.push(Recording { number, roots, tell: Box::new(tell), moments });
    Record(number)
}

impl Record {
    /// Everything that was recorded, in order.
    pub fn end(self) -> Vec<Moment> {
        let mut known = known();
        let at = known.recordings.iter().position(|recording| recording.number == self.0).unwrap();
        let mut recording = known.recordings.remove(at);
        let told = (recording.tell)();
        recording.moments.last_mut().unwrap().told_until = told;
        recording.moments
    }
}
