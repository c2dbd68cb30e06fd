//! The newest cluster map this node knows: kept in a file, offered by peers, asked for from time to time.

use crate::label::{replace_file, Label};
use granary_placement::id::Epoch;
use granary_placement::map::{apply_diff, ClusterMap, DiskState, MapDiff, MapError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

const MAP_FILE: &str = "map.json";

/// Longest map file, in bytes: 10,000 disks need about a tenth of it.
const MAX_MAP_BYTES: u64 = 256 * 1024 * 1024;

/// Why a map is not taken.
#[derive(Debug, thiserror::Error)]
pub enum MapRefused {
    /// A map of another cluster.
    #[error("the map is of cluster {found}, this disk belongs to cluster {expected}")]
    OtherCluster {
        /// The map's cluster.
        found: granary_placement::id::ClusterId,
        /// The label's.
        expected: granary_placement::id::ClusterId,
    },
    /// The map gives this disk's number to another disk.
    #[error("in the map disk {disk} is {found}, but this disk is {expected}: it was replaced, or belongs elsewhere")]
    OtherDisk {
        /// The number.
        disk: granary_placement::id::DiskId,
        /// The UUID in the map.
        found: granary_placement::id::DiskUuid,
        /// The UUID on the label.
        expected: granary_placement::id::DiskUuid,
    },
    /// The map breaks a rule.
    #[error("the map breaks a rule: {0}")]
    Rule(#[from] MapError),
    /// The file cannot be written or read.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

/// Holds the newest map.
pub struct Maps {
    label: Label,
    path: PathBuf,
    newest: watch::Sender<Option<Arc<ClusterMap>>>,
    /// One map is written at a time, so that an older one never replaces a newer one.
    writing: Arc<tokio::sync::Mutex<()>>,
}

impl Maps {
    /// Reads the map kept on the disk, if there is one. One that cannot be read is as good as none: peers have it.
    ///
    /// # Errors
    /// [`MapRefused`] when the map says that this is another disk or another cluster.
    pub fn open(dir: &Path, label: Label) -> Result<Maps, MapRefused> {
        let path = dir.join(MAP_FILE);
        let kept = match std::fs::metadata(&path) {
            Ok(meta) if meta.len() <= MAX_MAP_BYTES => std::fs::read(&path).map(Some),
            Ok(_) => Err(io::Error::other("far too long for a map")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let kept: Option<ClusterMap> = match kept {
            Ok(None) => None,
            Ok(Some(text)) => match serde_json::from_slice(&text) {
                Ok(map) => Some(map),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the kept map cannot be read; waiting for a peer's");
                    None
                }
            },
            Err(source) => return Err(MapRefused::File { path, source }),
        };
        let kept = match kept.map(|map| check(&map, &label).map(|()| map)).transpose() {
            Ok(kept) => kept,
            Err(MapRefused::Rule(error)) => {
                // Written by a build with other rules. A map that says this is another disk is refused.
                tracing::warn!(path = %path.display(), %error, "the kept map breaks a rule; waiting for a peer's");
                None
            }
            Err(other) => return Err(other),
        };
        Ok(Maps { label, path, newest: watch::Sender::new(kept.map(Arc::new)), writing: Arc::default() })
    }

    /// The newest map.
    pub fn newest(&self) -> Option<Arc<ClusterMap>> {
        self.newest.borrow().clone()
    }

    /// Its epoch; zero for none.
    pub fn epoch(&self) -> Epoch {
        self.newest.borrow().as_ref().map_or(Epoch(0), |map| map.epoch)
    }

    /// Tells of every newer map.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<ClusterMap>>> {
        self.newest.subscribe()
    }

    /// Takes what changed in the map; true when that led to a newer map than the one known.
    ///
    /// # Errors
    /// [`MapRefused::Rule`] with [`MapError::DiffBase`] when it was made from another map: the whole one is needed
    /// then.
    pub async fn offer_diff(&self, diff: &MapDiff) -> Result<bool, MapRefused> {
        let known = self.newest();
        match &known {
            Some(known) if known.cluster_id == diff.cluster_id && diff.to <= known.epoch => Ok(false),
            Some(known) => self.offer(Arc::new(apply_diff(known, diff)?)).await,
            None => Err(MapError::DiffBase { from: diff.from, have: Epoch(0) }.into()),
        }
    }

    /// Takes a map if it is newer than the one known; true when it was. It is kept on the disk first.
    ///
    /// # Errors
    /// [`MapRefused`].
    pub async fn offer(&self, map: Arc<ClusterMap>) -> Result<bool, MapRefused> {
        if map.epoch <= self.epoch() {
            return Ok(false);
        }
        check(&map, &self.label)?;
        let one = self.writing.clone().lock_owned().await;
        if map.epoch <= self.epoch() {
            return Ok(false);
        }
        let (path, kept) = (self.path.clone(), map.clone());
        // The lock goes along: the writing goes on when the connection of whoever offered the map breaks.
        let written = tokio::task::spawn_blocking(move || {
            let written = serde_json::to_vec(&*kept).map_err(io::Error::from);
            (written.and_then(|text| replace_file(&path, &text)), one)
        });
        let (written, _one) = written
            .await
            .map_err(|error| MapRefused::File { path: self.path.clone(), source: io::Error::other(error) })?;
        written.map_err(|source| MapRefused::File { path: self.path.clone(), source })?;
        tracing::info!(epoch = map.epoch.0, disks = map.disks.len(), "took a newer cluster map");
        if map.disk(self.label.disk).is_some_and(|disk| disk.state == DiskState::Out) {
            tracing::warn!(
                disk = self.label.disk.0,
                "this disk was taken out of the cluster: nothing will ask for it again"
            );
        }
        self.newest.send_replace(Some(map));
        Ok(true)
    }
}

fn check(map: &ClusterMap, label: &Label) -> Result<(), MapRefused> {
    if map.cluster_id != label.cluster {
        return Err(MapRefused::OtherCluster { found: map.cluster_id, expected: label.cluster });
    }
    if let Some(disk) = map.disk(label.disk).filter(|disk| disk.uuid != label.uuid) {
        return Err(MapRefused::OtherDisk { disk: label.disk, found: disk.uuid, expected: label.uuid });
    }
    Ok(map.validate()?)
}
