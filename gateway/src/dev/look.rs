//! Looks at DIR before anything is started or written, and says in one line why `granary dev` cannot use it.
//!
//! What stands in the way follows from a few facts ([`judge`], a pure function):
//!
//! | DIR | said |
//! |---|---|
//! | is no folder | that it is a file |
//! | is used by a `granary dev` that runs | which process |
//! | holds data of another format | which format, and who wrote it |
//! | holds something, but no `dev.json` | one thing that is not ours |
//! | may not be written | whether the file system or its owner forbids it |
//! | has too little room | how much there is, and how much is needed |

use super::layout::{version_of, Layout, LayoutError, Shape, DATA_VERSION, DEFAULT_DISKS};
use crate::settings::SettingsError;
use rustix::fs::{access, flock, statvfs, Access, FlockOperation};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Room that a new cluster needs for each disk, in bytes: its first segments, index and Raft log.
const NEW_DISK_BYTES: u64 = 32 << 20;
/// Room that any start needs, in bytes. What a full store keeps in reserve is more.
const START_BYTES: u64 = 8 << 20;
/// What a first start that was broken off may have left. The folders are empty until `dev.json` is there.
const OURS: [&str; 10] = [
    "lock",
    "disks",
    "logs",
    "map.json",
    "map.json.new",
    "dev.json.new",
    "root-credentials",
    "cluster-secret",
    "admin-token",
    "addresses.json",
];
/// Left by mkfs.
const OF_THE_FILE_SYSTEM: &str = "lost+found";

/// What is known of DIR without changing anything.
#[derive(Debug)]
struct Facts {
    /// It is there, and no folder.
    is_file: bool,
    /// The process that runs on it, empty when it is not known.
    locked_by: Option<String>,
    /// Format and maker by `dev.json`, if that is there.
    plan: Option<(u64, String)>,
    /// Something in it that no first start leaves.
    stranger: Option<String>,
    /// Why it may not be written.
    denied: Option<ErrorKind>,
    /// Room for an ordinary user, in bytes.
    free_bytes: u64,
}

/// Says why DIR cannot be used, if so. Changes nothing.
///
/// # Errors
/// [`LayoutError`], in one line.
pub fn look(layout: &Layout, shape: &Shape) -> Result<(), LayoutError> {
    let facts = gather(&layout.dir)?;
    let disks = shape.disks.unwrap_or(DEFAULT_DISKS);
    judge(&layout.dir, &facts, disks)?;
    layout.check(shape)
}

fn judge(dir: &Path, facts: &Facts, disks: u16) -> Result<(), LayoutError> {
    let refused = |why: String| Err(LayoutError::Unusable { dir: dir.to_owned(), why });
    if facts.is_file {
        return refused("is a file, not a folder".to_owned());
    }
    if let Some(by) = &facts.locked_by {
        return Err(LayoutError::Locked { dir: dir.to_owned(), by: by.clone() });
    }
    match (&facts.plan, &facts.stranger) {
        (Some((version, maker)), _) if *version != u64::from(DATA_VERSION) => {
            return refused(format!(
                "holds data of format {version}, made by granary {maker}; this granary {} uses format {DATA_VERSION}. \
                 Start the one that made it, or use another --dir",
                env!("CARGO_PKG_VERSION")
            ));
        }
        (None, Some(stranger)) => {
            return refused(format!(
                "is not empty and holds no Granary cluster (it has `{stranger}`); use an empty folder, or a new one"
            ));
        }
        _ => {}
    }
    match facts.denied {
        Some(ErrorKind::ReadOnlyFilesystem) => {
            return refused("is on a file system that is mounted read-only".to_owned())
        }
        Some(ErrorKind::PermissionDenied) => return refused("may not be written by this user".to_owned()),
        Some(other) => return refused(format!("may not be written: {other}")),
        None => {}
    }
    let (needed, who) = match facts.plan {
        None => (NEW_DISK_BYTES * u64::from(disks), format!("a new cluster of {disks} disks")),
        Some(_) => (START_BYTES, "a start".to_owned()),
    };
    if facts.free_bytes < needed {
        return refused(format!("has {} MiB free; {who} needs at least {} MiB", facts.free_bytes >> 20, needed >> 20));
    }
    Ok(())
}

fn gather(dir: &Path) -> Result<Facts, LayoutError> {
    let failed = |error| SettingsError::file(dir, error);
    let mut facts =
        Facts { is_file: false, locked_by: None, plan: None, stranger: None, denied: None, free_bytes: u64::MAX };
    match fs::metadata(dir) {
        Ok(found) if !found.is_dir() => {
            facts.is_file = true;
            return Ok(facts);
        }
        Ok(_) => {
            facts.locked_by = locked_by(&dir.join("lock"));
            facts.plan = version_of(&dir.join("dev.json"))?;
            facts.stranger = stranger(dir).map_err(failed)?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error).into()),
    }
    // Where it is not there, it is made in the nearest folder above that is.
    let Some(place) = dir.ancestors().find(|place| place.exists()) else { return Ok(facts) };
    facts.denied = access(place, Access::WRITE_OK | Access::EXEC_OK).err().map(|error| io::Error::from(error).kind());
    let space = statvfs(place).map_err(|error| failed(error.into()))?;
    facts.free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    Ok(facts)
}

/// The process number in a lock that is held.
fn locked_by(path: &PathBuf) -> Option<String> {
    let file = File::open(path).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => Some(super::layout::holder(path)),
        _ => None,
    }
}

fn stranger(dir: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !OURS.contains(&name.as_str()) && name != OF_THE_FILE_SYSTEM {
            return Ok(Some(name));
        }
        if ["disks", "logs"].contains(&name.as_str()) {
            if let Some(inside) = fs::read_dir(entry.path())?.next() {
                return Ok(Some(format!("{name}/{}", inside?.file_name().to_string_lossy())));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn each_thing_in_the_way_is_told_in_one_line_and_the_first_one_only() {
        let nothing =
            || Facts { is_file: false, locked_by: None, plan: None, stranger: None, denied: None, free_bytes: 1 << 40 };
        let ours =
            || Facts { plan: Some((u64::from(DATA_VERSION), "0.1.0".into())), stranger: Some("x".into()), ..nothing() };
        assert!(judge(Path::new("/d"), &nothing(), 6).is_ok());
        assert!(judge(Path::new("/d"), &ours(), 6).is_ok(), "what else lies beside a cluster is nobody's business");
        assert!(judge(Path::new("/d"), &Facts { free_bytes: 8 << 20, ..ours() }, 6).is_ok());
        for (facts, said) in [
            (Facts { is_file: true, ..nothing() }, "/d is a file, not a folder"),
            (
                Facts { locked_by: Some(" (process 7)".into()), ..ours() },
                "another granary dev (process 7) is running on /d",
            ),
            (
                Facts { plan: Some((1, "0.1.0".into())), ..nothing() },
                "/d holds data of format 1, made by granary 0.1.0; this",
            ),
            (
                Facts { stranger: Some("letters".into()), ..nothing() },
                "/d is not empty and holds no Granary cluster (it has `letters`)",
            ),
            (
                Facts { denied: Some(ErrorKind::ReadOnlyFilesystem), ..ours() },
                "/d is on a file system that is mounted read-only",
            ),
            (Facts { denied: Some(ErrorKind::PermissionDenied), ..nothing() }, "/d may not be written by this user"),
            (
                Facts { free_bytes: 100 << 20, ..nothing() },
                "/d has 100 MiB free; a new cluster of 6 disks needs at least 192 MiB",
            ),
            (Facts { free_bytes: 7 << 20, ..ours() }, "/d has 7 MiB free; a start needs at least 8 MiB"),
        ] {
            let error = judge(Path::new("/d"), &facts, 6).unwrap_err().to_string();
            assert!(error.starts_with(said) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_first_start_that_was_broken_off_is_ours_and_a_folder_with_files_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::at(directory.path()).unwrap();
        let look = || look(&layout, &Shape::default()).map_err(|error| error.to_string());
        look().unwrap();
        Layout::open(directory.path()).unwrap();
        std::fs::write(layout.file("root-credentials"), "{}").unwrap();
        look().unwrap();
        std::fs::write(layout.dir.join("disks/image.qcow2"), "").unwrap();
        assert!(look().unwrap_err().contains("it has `disks/image.qcow2`"));
        std::fs::remove_file(layout.dir.join("disks/image.qcow2")).unwrap();
        // Made to the end, and then by another version.
        layout.plan(&Shape::default()).unwrap();
        look().unwrap();
        let text = std::fs::read_to_string(layout.file("dev.json")).unwrap();
        let other = text.replacen(&format!("\"version\": {DATA_VERSION}"), "\"version\": 99", 1);
        assert_ne!(text, other);
        std::fs::write(layout.file("dev.json"), other).unwrap();
        assert!(look().unwrap_err().contains("holds data of format 99, made by granary"));
        std::fs::write(layout.file("dev.json"), "no JSON").unwrap();
        assert!(look().unwrap_err().contains("dev.json"));
    }
}
