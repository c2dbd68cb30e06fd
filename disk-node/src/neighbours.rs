//! Other disk nodes on the same file system, whose folders lie beside this one's: `granary dev` keeps all of its disks
//! so. They share what is free, and with it the reserve.

use crate::label::LABEL_FILE;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Most entries of the folder above that are looked at.
const MOST: usize = 4096;

/// In the name of a folder that `granary disk replace` has put aside.
const PUT_ASIDE: &[u8] = b".aside-";

/// Who shares a file system with a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbours {
    /// Folders of disks, this one included.
    pub disks: u64,
    /// The folder above them; None: this one is alone.
    pub above: Option<PathBuf>,
}

/// Looks beside the folder `dir` of a disk. Folders that are made later are found at the next start.
pub fn look(dir: &Path) -> Neighbours {
    look_at(dir).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot see whether other disks lie beside this one");
        Neighbours { disks: 1, above: None }
    })
}

fn look_at(dir: &Path) -> io::Result<Neighbours> {
    let dir = dir.canonicalize()?;
    let device = dir.metadata()?.dev();
    let above = match dir.parent() {
        Some(above) if above.metadata()?.dev() == device => above.to_owned(),
        _ => return Ok(Neighbours { disks: 1, above: None }),
    };
    let mut disks = 0;
    for entry in std::fs::read_dir(&above)?.take(MOST) {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().windows(PUT_ASIDE.len()).any(|part| part == PUT_ASIDE) {
            continue;
        }
        let path = entry.path();
        // What cannot be looked at is no disk of this user's.
        let is_disk = path.symlink_metadata().is_ok_and(|found| found.is_dir() && found.dev() == device)
            && path.join(LABEL_FILE).symlink_metadata().is_ok_and(|label| label.dev() == device);
        disks += u64::from(is_disk);
    }
    // Nobody waits for a disk alone, and it waits for nobody.
    Ok(Neighbours { disks: disks.max(1), above: (disks > 1).then_some(above) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn disks_beside_this_one_are_counted_and_other_folders_are_not() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().canonicalize().unwrap();
        let disk = |name: &str| {
            let dir = path.join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join(LABEL_FILE), "{}").unwrap();
            dir
        };
        let first = disk("disk-1");
        std::fs::create_dir(path.join("logs")).unwrap();
        std::fs::write(path.join(LABEL_FILE), "{}").unwrap();
        disk("disk-1.aside-1700000000");
        let alone = Neighbours { disks: 1, above: None };
        assert_eq!(look(&first), alone);
        disk("disk-2");
        let link = path.join("linked");
        std::os::unix::fs::symlink(&first, &link).unwrap();
        assert_eq!(look(&path.join("disk-2")), Neighbours { disks: 2, above: Some(path.clone()) }, "a link is none");
        assert_eq!(look(&link).above, Some(path.clone()), "it is looked where the folder is");
        assert_eq!(look(Path::new("/proc")), alone, "a mount point");
        assert_eq!(look(&path.join("gone")), alone);
    }
}
