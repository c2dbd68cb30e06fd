//! Makes a disk directory ready for its node: a label that the cluster map agrees with, and an address to listen on.
//!
//! What a directory is to become follows from its label and the map ([`decide`], a pure function):
//!
//! | label | map | what is done |
//! |---|---|---|
//! | the disk at this address | any | start |
//! | none | first start | format as the map says |
//! | none | any later start | the disk was lost: a new disk takes its slots, if nobody else can or it is ordered |
//! | a disk the map has never heard of | any | a replacement was broken off: finish it |
//! | of another cluster, or a disk that is out | any | leave alone, say so |
//!
//! A new disk is formatted before the map names it, so a crash between the two leaves a label that says what was meant.
//! The node of a disk that the map does not name is never started, so such a label never has data behind it.

use super::layout::{disk_at, free_addresses, is_free, random16, write_json, Layout, LayoutError, Plan, Slot};
use super::others::{take_over, Rules};
use crate::background::heal::{takers, HealSettings};
use crate::disks::Disks;
use crate::gateway::Gateway;
use crate::metrics::Metrics;
use crate::ops::away::Takers;
use crate::ops::{self, levels, settings, CommitError, Replacement};
use crate::shards::{ShardError, Shards};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_placement::place::{replace_disk, PlaceError};
use granary_placement::settings::Values;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a directory waits for the root shard's word at a time.
const ROOT_WAIT: Duration = Duration::from_secs(60);
/// How often a replacement starts again because another changed the map first.
const CONFLICTS: usize = 10;
/// How long to wait for the address of a node that has just ended.
const ADDRESS_WAIT: Duration = Duration::from_secs(1);
/// How long others that could take over have to answer: they may just be starting.
const OTHERS_WAIT: Duration = Duration::from_secs(10);

/// Why a directory is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// A file.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A directory that cannot be used.
    #[error("{dir}: {source}", dir = dir.display())]
    Dir {
        /// Which one.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It needs the map of the root shard, which does not answer.
    #[error("the root shard does not answer yet: {0}")]
    Root(String),
    /// The map names no disk for this directory.
    #[error("the cluster map has no disk in service at {0}")]
    NoDisk(String),
    /// The disk was lost, and nobody has ordered another.
    #[error(
        "disk {disk} is gone: the others take over what it held, see `granary status`; `granary disk replace {disk} --yes` \
         puts a new disk there"
    )]
    Left {
        /// The disk that was here.
        disk: DiskId,
    },
    /// The label is of something else.
    #[error("{dir} {why}", dir = dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// Whose it is, and what to do.
        why: String,
    },
    /// The disk cannot be replaced.
    #[error("the disk cannot be replaced: {0}")]
    Place(#[from] PlaceError),
    /// `granary-disk-node format` failed.
    #[error("granary-disk-node format: {0}")]
    Format(String),
}

/// Who lives in a directory, and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its number.
    pub disk: DiskId,
    /// Its UUID.
    pub uuid: DiskUuid,
    /// `host:port`.
    pub address: String,
}

/// What a label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Which cluster.
    pub cluster: ClusterId,
    /// Which disk.
    pub disk: DiskId,
    /// Its UUID.
    pub uuid: DiskUuid,
}

/// What is to be done with a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Its node can be started.
    Start(DiskId, DiskUuid),
    /// Format it as this disk.
    Format(DiskId, DiskUuid),
    /// The disk of this number was lost.
    Replace(DiskId),
    /// Finish the replacement of this disk by the one on the label.
    Finish(DiskId, Label),
    /// Put what lies there aside, then look again.
    SetAside,
    /// Leave it alone; the reason.
    Leave(String),
    /// No disk of the map belongs here.
    NoDisk,
}

/// Decides by the label, the map, and whether all disks were formatted once. `map` should be the root shard's when the
/// label does not fit an older one.
pub fn decide(label: Option<Label>, map: &ClusterMap, map_address: &str, formatted: bool) -> Step {
    let Some(here) = disk_at(map, map_address) else { return Step::NoDisk };
    let Some(label) = label else {
        return if formatted { Step::Replace(here.id) } else { Step::Format(here.id, here.uuid) };
    };
    if label.cluster != map.cluster_id {
        return Step::Leave(format!("holds a disk of another cluster ({}); move it away", label.cluster));
    }
    if (label.disk, label.uuid) == (here.id, here.uuid) {
        return Step::Start(here.id, here.uuid);
    }
    match map.disk(label.disk) {
        Some(known) if known.uuid == label.uuid => Step::Leave(format!(
            "holds disk {}, which is not the one in service here (disk {}); move it away to have a new disk put in its place",
            label.disk, here.id
        )),
        None if label.disk.0 == map.next_disk_id => Step::Finish(here.id, label),
        // The number went to another disk, or never will be given: nothing was ever stored under this label.
        _ => Step::SetAside,
    }
}

/// Makes directories ready. One for all directories: replacements go one after the other.
pub struct Readier {
    layout: Layout,
    program: PathBuf,
    shards: Shards,
    disks: Disks,
    values: watch::Receiver<Arc<Values>>,
    metrics: Metrics,
    /// All disk directories.
    slots: Vec<Slot>,
    formatted: AtomicBool,
    /// [`OTHERS_WAIT`]; tests are in more of a hurry.
    others_wait: Duration,
    /// Held while a replacement is made, and while the addresses file is changed.
    turn: tokio::sync::Mutex<()>,
}

impl Readier {
    /// `program`: the `granary-disk-node` executable.
    pub fn new(layout: Layout, program: PathBuf, gateway: &Gateway, plan: &Plan) -> Readier {
        Readier {
            layout,
            program,
            shards: gateway.shards.clone(),
            disks: gateway.disks.clone(),
            values: gateway.values.subscribe(),
            metrics: gateway.metrics.clone(),
            slots: plan.disks.clone(),
            formatted: AtomicBool::new(plan.formatted),
            others_wait: OTHERS_WAIT,
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// The gateway's metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// From now on an empty directory is a lost disk.
    pub fn set_formatted(&self) {
        self.formatted.store(true, Ordering::Release);
    }

    /// Does what [`decide`] says until the directory's node can be started.
    ///
    /// `ordered`: somebody has asked for a new disk; else none is put where the others can take over.
    ///
    /// # Errors
    /// Why not yet; trying again later is right for all but [`ReadyError::Foreign`].
    pub async fn make_ready(&self, slot: &Slot, dir: &Path, ordered: bool) -> Result<Identity, ReadyError> {
        let step =
            |map: &ClusterMap, label| decide(label, map, &slot.map_address, self.formatted.load(Ordering::Acquire));
        let no_map = || ReadyError::Root("no cluster map".to_owned());
        for _ in 0..CONFLICTS {
            let map = self.shards.current_map().ok_or_else(no_map)?;
            let found = self.read_label(dir)?;
            let first = step(&map, found);
            if let Step::Start(disk, uuid) = first {
                let address = self.address(disk, &slot.map_address).await?;
                return Ok(Identity { disk, uuid, address });
            }
            if let Step::Format(disk, uuid) = first {
                self.format(dir, map.cluster_id, disk, uuid).await?;
                continue;
            }
            // Everything else changes the cluster: by the root shard's map only, and one at a time.
            let _turn = self.turn.lock().await;
            self.wait_for_root().await?;
            let map = self.shards.current_map().ok_or_else(no_map)?;
            match step(&map, self.read_label(dir)?) {
                Step::Start(..) | Step::Format(..) => {}
                Step::SetAside => self.set_aside(dir).await?,
                Step::Replace(lost) if !ordered && self.others_take_over(&map, lost).await? => {
                    return Err(ReadyError::Left { disk: lost });
                }
                Step::Replace(lost) => self.replace(dir, &map, lost).await?,
                Step::Finish(lost, label) => {
                    self.install(dir, &map, lost, label.uuid).await?;
                }
                Step::Leave(why) => return Err(ReadyError::Foreign { dir: dir.to_owned(), why }),
                Step::NoDisk => return Err(ReadyError::NoDisk(slot.map_address.clone())),
            }
        }
        Err(ReadyError::Root("the cluster map changes all the time".to_owned()))
    }

    /// Has a lost disk gone out of service, or will it, by the rules of the gateway that heals? All that are lost count
    /// together: each alone might be taken over where all are not.
    async fn others_take_over(&self, map: &ClusterMap, disk: DiskId) -> Result<bool, ReadyError> {
        if map.disk(disk).is_some_and(|disk| disk.state == DiskState::Away) {
            return Ok(true);
        }
        let (rules, ceiling_percent) =
            self.rules().await.map_err(|error: ShardError| ReadyError::Root(error.to_string()))?;
        let deadline = tokio::time::Instant::now() + self.others_wait;
        loop {
            let mut lost = self.lost(map);
            lost.insert(disk);
            let mut now = takers(map, &self.disks.view(), ceiling_percent);
            // The gateway may not have noticed yet that they are gone.
            now.unwell.extend(&lost);
            if take_over(map, &lost, &now, &rules) {
                return Ok(true);
            }
            let all_answer = Takers { unwell: lost.clone(), ..now };
            if !take_over(map, &lost, &all_answer, &rules) || tokio::time::Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// By what the others take over, and how full they may become: as the root shard says now.
    async fn rules(&self) -> Result<(Rules, u64), ShardError> {
        let level = levels::of_shard(&self.shards, ShardId::ROOT).await?;
        let (_, cluster) = settings::fetch(&self.shards, 0).await?.unwrap_or_default();
        let heal = HealSettings::from_settings(&self.values.borrow().with_cluster(&cluster).0);
        Ok((Rules { level, limit_percent: heal.out_limit_percent }, heal.fill_ceiling_percent))
    }

    /// Disks in service whose directories have no label any more.
    fn lost(&self, map: &ClusterMap) -> BTreeSet<DiskId> {
        let empty = |slot: &&Slot| matches!(super::label::read(&self.layout.disk(&slot.name)), Ok(None));
        let here = self.slots.iter().filter(empty).filter_map(|slot| disk_at(map, &slot.map_address));
        here.filter(|disk| disk.state.holds_slots()).map(|disk| disk.id).collect()
    }

    async fn wait_for_root(&self) -> Result<(), ReadyError> {
        let mut confirmed = self.shards.confirmed();
        let known = async { confirmed.wait_for(|confirmed| *confirmed).await.is_ok() };
        if !tokio::time::timeout(ROOT_WAIT, known).await.unwrap_or(false) {
            return Err(ReadyError::Root(format!("nothing for {} s", ROOT_WAIT.as_secs())));
        }
        self.shards.refresh_map().await.map(|_| ()).map_err(|error| ReadyError::Root(error.to_string()))
    }

    async fn replace(&self, dir: &Path, map: &ClusterMap, lost: DiskId) -> Result<(), ReadyError> {
        let uuid = DiskUuid(random16()?);
        let (_, new) = replace_disk(map, lost, uuid, None)?;
        tracing::warn!(lost = lost.0, new = new.0, dir = %dir.display(), "the disk is gone; a new one takes its place");
        self.set_aside(dir).await?;
        self.format(dir, map.cluster_id, new, uuid).await?;
        self.install(dir, map, lost, uuid).await
    }

    /// Gives the new disk, formatted already, the slots of the lost one.
    async fn install(&self, dir: &Path, map: &ClusterMap, lost: DiskId, uuid: DiskUuid) -> Result<(), ReadyError> {
        let new = ops::new_disk_id(map);
        // The new disk listens where the old one did, also when that is not where the map says.
        let mut addresses = self.layout.read_addresses()?;
        if let Some(address) = addresses.remove(&lost) {
            addresses.insert(new, address);
            write_json(&self.layout.file("addresses.json"), &addresses)?;
        }
        let replacement = Replacement { old: lost, uuid, number: Some(new), address: None };
        match ops::commit(&self.shards, |map| ops::replace(map, &replacement)).await {
            Ok(_) => {
                tracing::info!(lost = lost.0, new = new.0, dir = %dir.display(), "the new disk is in the cluster map");
                Ok(())
            }
            Err(CommitError::Refused(why)) => {
                tracing::info!(%why, "the cluster map changed meanwhile; looking again");
                Ok(())
            }
            Err(error) => Err(ReadyError::Root(error.to_string())),
        }
    }

    /// Moves what lies in a directory away, unless there is nothing; nothing is ever deleted.
    ///
    /// # Errors
    /// It cannot be moved.
    pub async fn set_aside(&self, dir: &Path) -> Result<(), ReadyError> {
        let failed = |source| ReadyError::Dir { dir: dir.to_owned(), source };
        match std::fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        let mut name = dir.as_os_str().to_owned();
        name.push(format!(".aside-{}", crate::shards::now_ms()));
        tracing::warn!(from = %dir.display(), to = %Path::new(&name).display(), "what lies in the disk directory is put aside");
        std::fs::rename(dir, &name).map_err(failed)
    }

    async fn format(&self, dir: &Path, cluster: ClusterId, disk: DiskId, uuid: DiskUuid) -> Result<(), ReadyError> {
        std::fs::create_dir_all(dir).map_err(|source| ReadyError::Dir { dir: dir.to_owned(), source })?;
        let mut command = tokio::process::Command::new(&self.program);
        command.arg("format").arg("--dir").arg(dir).args(["--cluster", &cluster.to_string()]);
        command.args(["--disk", &disk.to_string(), "--uuid", &uuid.to_string()]).kill_on_drop(true);
        let output = command
            .output()
            .await
            .map_err(|error| ReadyError::Format(format!("{}: {error}", self.program.display())))?;
        if !output.status.success() {
            let said: String = String::from_utf8_lossy(&output.stderr).chars().take(500).collect();
            return Err(ReadyError::Format(format!("{}: {}", output.status, said.trim())));
        }
        Ok(())
    }

    fn read_label(&self, dir: &Path) -> Result<Option<Label>, ReadyError> {
        super::label::read(dir).map_err(|why| ReadyError::Foreign { dir: dir.to_owned(), why })
    }

    /// Where the disk's node listens: the address in use so far if it is free, else a new one, which everyone learns
    /// from the addresses file.
    async fn address(&self, disk: DiskId, map_address: &str) -> Result<String, ReadyError> {
        let known = self.layout.read_addresses()?.get(&disk).cloned().unwrap_or_else(|| map_address.to_owned());
        let deadline = tokio::time::Instant::now() + ADDRESS_WAIT;
        loop {
            if is_free(&known) {
                return Ok(known);
            }
            if tokio::time::Instant::now() >= deadline {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let no_port = |source| ReadyError::Dir { dir: self.layout.dir.clone(), source };
        let new = free_addresses(1)
            .map_err(no_port)?
            .into_iter()
            .next()
            .ok_or_else(|| no_port(std::io::ErrorKind::AddrInUse.into()))?;
        tracing::warn!(disk = disk.0, taken = %known, %new, "the disk node's address is taken by another program; it gets a new one");
        let _turn = self.turn.lock().await;
        let mut addresses = self.layout.read_addresses()?;
        addresses.insert(disk, new.clone());
        write_json(&self.layout.file("addresses.json"), &addresses)?;
        Ok(new)
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::dev::layout::Shape;
    use crate::disks::DiskSettings;
    use crate::ops::away::take_out;
    use crate::shards::memory::MemoryPeers;
    use granary_meta::{Command, Reply};
    use granary_wire::auth::{ClusterSecret, Credentials};

    /// A cluster of eight disks in which every directory is a lost disk, no disk node answers, and the root shard does.
    pub(in crate::dev) async fn all_lost(dir: &Path) -> (Readier, Arc<MemoryPeers>, ClusterMap) {
        let layout = Layout::open(dir).unwrap();
        let (plan, map) = layout.plan(&Shape { shards: Some(1), ..Shape::default() }).unwrap();
        let (peers, metrics) = (MemoryPeers::new(&map), Metrics::new().unwrap());
        let known = watch::Sender::new(Some(Arc::new(map.clone())));
        let credentials = Credentials { cluster: plan.cluster_id, secret: ClusterSecret::generate().unwrap() };
        let readier = Readier {
            layout,
            // Nothing is forked for it: a child would hold the locks of other tests for a moment.
            program: "no-such-program\0".into(),
            disks: Disks::new(known.subscribe(), credentials, None, DiskSettings::default()),
            shards: Shards::new(peers.clone(), known, metrics.clone()),
            values: watch::Sender::new(Arc::default()).subscribe(),
            metrics,
            slots: plan.disks.clone(),
            formatted: AtomicBool::new(true),
            others_wait: Duration::from_millis(1),
            turn: tokio::sync::Mutex::new(()),
        };
        readier.shards.refresh_map().await.unwrap();
        (readier, peers, map)
    }

    /// The disk goes out of service.
    pub(in crate::dev) fn take_away(peers: &MemoryPeers, map: &ClusterMap, disk: DiskId) -> ClusterMap {
        let _ = peers.command(ShardId::ROOT, Command::SetFeatureLevel { level: 2 });
        let out = take_out(map, disk, &Takers { ceiling_percent: 100, ..Takers::default() }).unwrap();
        let reply = peers.command(ShardId::ROOT, Command::SetMap { map: Box::new(out.clone()) });
        assert_eq!(reply, Reply::Done);
        out
    }

    #[tokio::test]
    async fn a_lost_disk_is_left_alone_by_what_the_root_shard_says_and_what_the_directories_show() {
        let directory = tempfile::tempdir().unwrap();
        let (readier, peers, map) = all_lost(directory.path()).await;
        for slot in readier.slots.iter().filter(|slot| !["disk-3", "disk-7"].contains(&slot.name.as_str())) {
            let disk = disk_at(&map, &slot.map_address).unwrap();
            let dir = readier.layout.disk(&slot.name);
            std::fs::create_dir_all(&dir).unwrap();
            let label = serde_json::json!({
                "version": 1, "cluster": map.cluster_id, "disk": disk.id, "uuid": disk.uuid,
            });
            std::fs::write(dir.join("label.json"), label.to_string()).unwrap();
        }
        assert_eq!(readier.lost(&map), BTreeSet::from([DiskId(3), DiskId(7)]));
        assert_eq!(readier.rules().await.unwrap(), (Rules { level: 1, limit_percent: None }, 90));

        let _ = peers.command(ShardId::ROOT, Command::SetFeatureLevel { level: 2 });
        assert!(!readier.others_take_over(&map, DiskId(3)).await.unwrap(), "no disk answers");
        for (name, value) in [("heal.out_limit", "0%"), ("heal.fill_ceiling", "70%")] {
            settings::set(&readier.shards, name, Some(value)).await.unwrap();
        }
        assert_eq!(readier.rules().await.unwrap(), (Rules { level: 2, limit_percent: Some(0) }, 70));

        let out = take_away(&peers, &map, DiskId(3));
        assert_eq!(readier.lost(&out), BTreeSet::from([DiskId(7)]));
        assert!(readier.others_take_over(&out, DiskId(3)).await.unwrap(), "it has gone out");
    }

    #[test]
    fn a_directory_becomes_what_its_label_and_the_map_say() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open(directory.path()).unwrap();
        let (plan, map) = layout.plan(&Shape { shards: Some(1), ..Shape::default() }).unwrap();
        let address = &plan.disks[2].map_address;
        let disk = disk_at(&map, address).unwrap().clone();
        let label = Label { cluster: map.cluster_id, disk: disk.id, uuid: disk.uuid };
        let other = DiskUuid([9; 16]);

        assert_eq!(decide(Some(label), &map, address, true), Step::Start(disk.id, disk.uuid));
        assert_eq!(decide(None, &map, address, false), Step::Format(disk.id, disk.uuid));
        assert_eq!(decide(None, &map, address, true), Step::Replace(disk.id));
        assert_eq!(decide(None, &map, "127.0.0.1:1", true), Step::NoDisk);
        let foreign = Label { cluster: ClusterId([1; 16]), ..label };
        assert!(matches!(decide(Some(foreign), &map, address, true), Step::Leave(_)));

        // Formatted for a replacement that the map did not take yet, then taken, then retired.
        let new = Label { disk: DiskId(map.next_disk_id), uuid: other, ..label };
        assert_eq!(decide(Some(new), &map, address, true), Step::Finish(disk.id, new));
        let (next, id) = replace_disk(&map, disk.id, other, None).unwrap();
        assert_eq!(id, new.disk);
        assert_eq!(decide(Some(new), &next, address, true), Step::Start(id, other));
        assert!(matches!(decide(Some(label), &next, address, true), Step::Leave(_)), "a retired disk is not touched");
        // Another replacement took the number first.
        let late = Label { uuid: DiskUuid([8; 16]), ..new };
        assert_eq!(decide(Some(late), &next, address, true), Step::SetAside);
    }

    #[test]
    fn every_disk_keeps_one_address_through_replacements() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open(directory.path()).unwrap();
        let (plan, mut map) = layout.plan(&Shape { shards: Some(1), ..Shape::default() }).unwrap();
        for round in 0..12u8 {
            let slot = &plan.disks[usize::from(round) % plan.disks.len()];
            let lost = disk_at(&map, &slot.map_address).unwrap().id;
            (map, _) = replace_disk(&map, lost, DiskUuid([100 + round; 16]), None).unwrap();
            map.validate().unwrap();
            for slot in &plan.disks {
                let here = map.disks.values().filter(|disk| disk.state != DiskState::Out);
                assert_eq!(here.filter(|disk| disk.address == slot.map_address).count(), 1);
            }
        }
    }
}
