//! The newest cluster map this node knows: kept in a file, offered by peers, asked for from time to time.

use crate::label::{replace_file, Label};
use granary_placement::id::Epoch;
use granary_placement::map::{apply_diff, diff, ClusterMap, DiskState, MapDiff, MapError};
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

const MAP_FILE: &str = "map.json";

/// Longest map file, in bytes: 10,000 disks need about a tenth of it.
const MAX_MAP_BYTES: u64 = 256 * 1024 * 1024;

/// Differences kept for peers that ask: a disk that was away longer takes the whole map.
const KEPT_DIFFS: usize = 16;

/// What a peer that asks is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// It knows all that is known here.
    None,
    /// The differences that lead from its map to the newest, in order.
    Diffs(Vec<MapDiff>),
    /// The newest map.
    Whole(Arc<ClusterMap>),
}

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
    /// The last differences, each from the map that the one before leads to; the last one leads to the newest map.
    diffs: Mutex<VecDeque<Arc<MapDiff>>>,
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
        Ok(Maps {
            label,
            path,
            newest: watch::Sender::new(kept.map(Arc::new)),
            diffs: Mutex::default(),
            writing: Arc::default(),
        })
    }

    /// The newest map.
    pub fn newest(&self) -> Option<Arc<ClusterMap>> {
        self.newest.borrow().clone()
    }

    /// Its epoch; zero for none.
    pub fn epoch(&self) -> Epoch {
        self.newest.borrow().as_ref().map_or(Epoch(0), |map| map.epoch)
    }

    /// What changed since the map of that epoch.
    pub fn since(&self, known: Epoch) -> News {
        let Some(newest) = self.newest().filter(|newest| newest.epoch > known) else { return News::None };
        let diffs = self.diffs.lock().unwrap_or_else(PoisonError::into_inner);
        let leading: Vec<MapDiff> =
            diffs.iter().skip_while(|diff| diff.from != known).map(|diff| (**diff).clone()).collect();
        match leading.last() {
            Some(last) if last.to == newest.epoch => News::Diffs(leading),
            _ => News::Whole(newest),
        }
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
        if let Some(before) = self.newest() {
            let mut diffs = self.diffs.lock().unwrap_or_else(PoisonError::into_inner);
            diffs.push_back(Arc::new(diff(&before, &map)));
            while diffs.len() > KEPT_DIFFS {
                diffs.pop_front();
            }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_placement::id::{ClusterId, DiskId, DiskUuid, PlacementGroupId};
    use granary_placement::map::{deal_hash_slots, Disk, GroupSlot, Location, PlacementGroup, Roles, ShardReplicas};
    use granary_placement::scheme::{FailureDomain, Scheme};
    use std::collections::BTreeMap;

    fn map(epoch: u64) -> Arc<ClusterMap> {
        let disk = |id: u32| Disk {
            id: DiskId(id),
            uuid: DiskUuid([id as u8; 16]),
            address: format!("disk-{id}:{epoch}"),
            location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
            weight: 1,
            roles: Roles { storage: true, metadata: true },
            state: DiskState::In,
        };
        let slots = (1..=6).map(|id| GroupSlot::new(DiskId(id))).collect();
        Arc::new(ClusterMap {
            cluster_id: ClusterId([7; 16]),
            epoch: Epoch(epoch),
            next_disk_id: 7,
            disks: (1..=6).map(|id| (DiskId(id), disk(id))).collect(),
            schemes: BTreeMap::from([("s".to_owned(), Scheme::new(4, 2, FailureDomain::Disk).unwrap())]),
            default_scheme: "s".to_owned(),
            groups: BTreeMap::from([(PlacementGroupId(1), PlacementGroup { scheme: "s".to_owned(), slots })]),
            shards: vec![ShardReplicas { members: vec![DiskId(1)] }; 2],
            slot_shards: deal_hash_slots(1),
        })
    }

    #[tokio::test]
    async fn a_peer_gets_the_differences_that_lead_to_the_newest_map_or_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let label = Label {
            version: 1,
            cluster: ClusterId([7; 16]),
            uuid: DiskUuid([9; 16]),
            disk: DiskId(9),
            created_ms: 1,
            metadata: None,
        };
        let maps = Maps::open(dir.path(), label.clone()).unwrap();
        assert_eq!(maps.since(Epoch(0)), News::None);
        assert!(maps.offer(map(3)).await.unwrap());
        assert_eq!((maps.since(Epoch(2)), maps.since(Epoch(3))), (News::Whole(map(3)), News::None));
        for epoch in [4, 6, 7] {
            assert!(maps.offer(map(epoch)).await.unwrap());
        }
        for known in [3, 4, 6] {
            let News::Diffs(diffs) = maps.since(Epoch(known)) else { panic!("{known}") };
            let reached = diffs.iter().fold((*map(known)).clone(), |map, diff| apply_diff(&map, diff).unwrap());
            assert_eq!(reached, *map(7), "from {known}");
        }
        assert_eq!(maps.since(Epoch(5)), News::Whole(map(7)), "a map that was never here");
        for epoch in 8..8 + KEPT_DIFFS as u64 {
            maps.offer(map(epoch)).await.unwrap();
        }
        assert!(matches!(maps.since(Epoch(7)), News::Diffs(diffs) if diffs.len() == KEPT_DIFFS));
        assert!(matches!(maps.since(Epoch(6)), News::Whole(_)), "too long ago");
        drop(maps);
        let again = Maps::open(dir.path(), label).unwrap();
        assert!(matches!(again.since(Epoch(7)), News::Whole(_)), "differences are not kept over a restart");
    }
}
