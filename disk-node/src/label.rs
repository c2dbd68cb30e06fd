//! The label of a disk: which disk of which cluster this is. Written by `format`; what is added later is the number of
//! its metadata folder.
//!
//! ```text
//! DIR/label.json   the label            DIR/segments/  chunks
//! DIR/lock         held while in use    DIR/index/     where chunks lie; can be lost
//! DIR/map.json     newest map known     DIR/meta/      shard replicas, if the disk has any
//! DIR/address      where it listens, for scripts that let the system pick a port
//! ```
//!
//! A disk that comes back in another slot is still itself; a disk of another cluster, a wiped one and a folder full of
//! somebody's files are refused, each with words that say what to do.

use crate::store::file_device::sync_folder;
use granary_placement::id::{ClusterId, DiskId, DiskUuid};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Version of the label this build writes and reads. 1: the first.
pub const LABEL_VERSION: u32 = 1;

pub(crate) const LABEL_FILE: &str = "label.json";
const LOCK_FILE: &str = "lock";

/// Longest label, in bytes: guards against being pointed at something else.
const MAX_LABEL_BYTES: u64 = 64 * 1024;

/// A disk's label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// Version of this file.
    pub version: u32,
    /// The cluster the disk belongs to.
    pub cluster: ClusterId,
    /// The disk's own identity.
    pub uuid: DiskUuid,
    /// Its number in the cluster map.
    pub disk: DiskId,
    /// When it was formatted, Unix milliseconds.
    pub created_ms: u64,
    /// The number of the metadata folder, once the disk has had one. A label that has it and a disk without the folder
    /// tell of metadata that were lost.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "number")]
    pub metadata: Option<u64>,
}

/// As 16 hex digits: a JSON number would be rounded by some readers.
mod number {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(number: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&number.map(|number| format!("{number:016x}")).unwrap_or_default())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Some).map_err(serde::de::Error::custom)
    }
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// No label, and nothing else either.
    #[error("{0} is not formatted: run `granary-disk-node format` first")]
    Unlabelled(PathBuf),
    /// No label, but files.
    #[error("{dir} has no label but is not empty (it has `{found}`): refusing to use somebody else's folder")]
    NotEmpty {
        /// Which folder.
        dir: PathBuf,
        /// One of the files.
        found: String,
    },
    /// It has a label already.
    #[error("{dir} is already disk {disk} ({uuid}) of cluster {cluster}: refusing to format it again")]
    Labelled {
        /// Which folder.
        dir: PathBuf,
        /// Its disk id.
        disk: DiskId,
        /// Its UUID.
        uuid: DiskUuid,
        /// Its cluster.
        cluster: ClusterId,
    },
    /// It belongs to another cluster.
    #[error("this disk ({uuid}) belongs to cluster {found}, not to cluster {expected}: refusing to serve it")]
    Foreign {
        /// The disk.
        uuid: DiskUuid,
        /// The cluster on its label.
        found: ClusterId,
        /// The cluster it was to serve.
        expected: ClusterId,
    },
    /// The label cannot be understood.
    #[error("the label {path} is damaged: {why}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// In which way.
        why: String,
    },
    /// A newer build wrote it.
    #[error("the label {path} has version {version}; this build knows up to {LABEL_VERSION}")]
    Version {
        /// Which file.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
    /// Another process uses the disk.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LabelError + '_ {
    move |source| LabelError::Io { path: path.to_owned(), source }
}

/// Replaces a small file for certain: whoever reads it sees the old bytes or the new ones, whenever the power goes.
///
/// # Errors
/// Whatever the file system says; the old file is then still there.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Now, in Unix milliseconds.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Something in a folder that is not ours, if anything.
fn stranger(dir: &Path) -> io::Result<Option<String>> {
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // Left by mkfs; by a `format` that was interrupted; by the lock that `format` takes.
        if !["lost+found", "label.tmp", LOCK_FILE].contains(&name.as_str()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Makes a folder (which must be empty) a disk.
///
/// # Errors
/// [`LabelError`]; nothing was changed.
pub fn format(dir: &Path, cluster: ClusterId, disk: DiskId, uuid: DiskUuid) -> Result<Label, LabelError> {
    if !dir.exists() {
        std::fs::create_dir(dir).map_err(failed(dir))?;
        if let Some(parent) = dir.canonicalize().map_err(failed(dir))?.parent() {
            sync_folder(parent).map_err(failed(parent))?;
        }
    }
    let _lock = lock(dir)?;
    match read(dir) {
        Err(LabelError::Unlabelled(_)) => {}
        Err(other) => return Err(other),
        Ok(Label { disk, uuid, cluster, .. }) => {
            return Err(LabelError::Labelled { dir: dir.to_owned(), disk, uuid, cluster })
        }
    }
    let label = Label { version: LABEL_VERSION, cluster, uuid, disk, created_ms: now_ms(), metadata: None };
    write(dir, &label)?;
    Ok(label)
}

/// Writes the number of the metadata folder on the label, if it has another. The caller holds the disk's lock.
///
/// # Errors
/// [`LabelError`]; the old label is then still there.
pub fn set_metadata(dir: &Path, number: u64) -> Result<(), LabelError> {
    let label = read(dir)?;
    if label.metadata == Some(number) {
        return Ok(());
    }
    write(dir, &Label { metadata: Some(number), ..label })
}

fn write(dir: &Path, label: &Label) -> Result<(), LabelError> {
    let path = dir.join(LABEL_FILE);
    let damaged = |error: serde_json::Error| LabelError::Damaged { path: path.clone(), why: error.to_string() };
    let mut text = serde_json::to_vec_pretty(label).map_err(damaged)?;
    text.push(b'\n');
    replace_file(&path, &text).map_err(failed(&path))
}

/// Reads the label of a disk.
///
/// # Errors
/// [`LabelError`].
pub fn read(dir: &Path) -> Result<Label, LabelError> {
    let path = dir.join(LABEL_FILE);
    let damaged = |why: String| LabelError::Damaged { path: path.clone(), why };
    match std::fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_LABEL_BYTES => return Err(damaged(format!("{} bytes long", meta.len()))),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(match stranger(dir).map_err(failed(dir))? {
                Some(found) => LabelError::NotEmpty { dir: dir.to_owned(), found },
                None => LabelError::Unlabelled(dir.to_owned()),
            });
        }
        Err(error) => return Err(failed(&path)(error)),
    }
    let text = std::fs::read(&path).map_err(failed(&path))?;
    // The version first: a newer label may have fields this build would call damage.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(LABEL_VERSION) => {}
        Some(version) if version > u64::from(LABEL_VERSION) => {
            return Err(LabelError::Version { path, version: u32::try_from(version).unwrap_or(u32::MAX) });
        }
        _ => return Err(damaged("no version".to_owned())),
    }
    serde_json::from_value(value).map_err(|error| damaged(error.to_string()))
}

impl Label {
    /// Is this a disk of that cluster?
    ///
    /// # Errors
    /// [`LabelError::Foreign`].
    pub fn check_cluster(&self, expected: ClusterId) -> Result<(), LabelError> {
        if self.cluster != expected {
            return Err(LabelError::Foreign { uuid: self.uuid, found: self.cluster, expected });
        }
        Ok(())
    }
}

/// Held while a process uses a disk; let go when dropped, or when the process ends in whatever way.
#[derive(Debug)]
pub struct DiskLock {
    _file: File,
}

/// Takes a disk for this process.
///
/// # Errors
/// [`LabelError::InUse`] when another one has it.
pub fn lock(dir: &Path) -> Result<DiskLock, LabelError> {
    let path = dir.join(LOCK_FILE);
    let file = File::options().create(true).append(true).open(&path).map_err(failed(&path))?;
    take(dir, file, FlockOperation::NonBlockingLockExclusive)
}

/// Makes sure that no process serves the disk while it is looked at. Writes nothing. None when it was never served.
///
/// # Errors
/// [`LabelError::InUse`] when another one has it.
pub fn lock_for_reading(dir: &Path) -> Result<Option<DiskLock>, LabelError> {
    let path = dir.join(LOCK_FILE);
    match File::open(&path) {
        Ok(file) => take(dir, file, FlockOperation::NonBlockingLockShared).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(&path)(error)),
    }
}

fn take(dir: &Path, file: File, how: FlockOperation) -> Result<DiskLock, LabelError> {
    match rustix::fs::flock(&file, how) {
        Ok(()) => Ok(DiskLock { _file: file }),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(LabelError::InUse(dir.to_owned())),
        Err(error) => Err(failed(dir)(error.into())),
    }
}
