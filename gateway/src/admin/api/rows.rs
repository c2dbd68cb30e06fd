//! The answers that list: readiness, the status and its rows.

use crate::background::heal::HealStatus;
use crate::disks::DiskHealth;
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::DiskState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The answer of `/readyz`: should this gateway get traffic?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// Reads and writes can be served.
    pub ready: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// What is not well, though requests are served.
    pub warnings: Vec<String>,
}

/// The cluster as this gateway sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When it was collected, Unix milliseconds; 0 for never.
    pub collected_ms: u64,
    /// Which cluster; None before the first collection.
    pub cluster_id: Option<ClusterId>,
    /// Epoch of the map in use.
    pub epoch: Epoch,
    /// Scheme of uploads that name no storage class.
    pub default_scheme: String,
    /// Placement groups.
    pub groups: usize,
    /// Groups of the default scheme by how many of their disks are up.
    pub groups_by_disks_up: BTreeMap<usize, usize>,
    /// Groups of all schemes by how many more disks each can lose: M, less the slots whose chunks no disk that answers
    /// has all of. Negative: more than M are lacking.
    #[serde(default)]
    pub groups_by_failures_left: BTreeMap<i32, usize>,
    /// Disks in service, and those that are away.
    pub disks: Vec<DiskRow>,
    /// Shards.
    pub shards: Vec<ShardRow>,
    /// Chunks waiting for repair.
    pub repair_queue: Count,
    /// How healing stands; None before it begins.
    pub heal: Option<HealStatus>,
    /// The admin address of the gateway that heals; None when none does.
    #[serde(default)]
    pub heals_at: Option<String>,
    /// Buckets, the first by name.
    pub buckets: Vec<BucketRow>,
    /// There are more buckets than shown.
    pub more_buckets: bool,
}

/// How many; `more` when counting stopped there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Counted.
    pub count: u64,
    /// There are more.
    pub more: bool,
    /// Some shards did not answer.
    pub partial: bool,
}

/// Whether a disk answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// It answers.
    Up,
    /// New, or an error was seen a moment ago.
    Suspect,
    /// It does not answer.
    Down,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

impl Health {
    /// All that a disk can be.
    pub const ALL: [Health; 3] = [Health::Up, Health::Suspect, Health::Down];

    /// As it stands in JSON, metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Health::Up => "up",
            Health::Suspect => "suspect",
            Health::Down => "down",
            Health::Unknown => "unknown",
        }
    }
}

impl From<DiskHealth> for Health {
    fn from(health: DiskHealth) -> Health {
        match health {
            DiskHealth::Up => Health::Up,
            DiskHealth::Suspect => Health::Suspect,
            DiskHealth::Down => Health::Down,
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Stores chunks.
    Storage,
    /// Holds shard replicas.
    Metadata,
    /// A word of a later release.
    #[serde(other)]
    Unknown,
}

impl Role {
    /// As it stands in JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Role::Storage => "storage",
            Role::Metadata => "metadata",
            Role::Unknown => "unknown",
        }
    }
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRow {
    /// Its number.
    pub disk: DiskId,
    /// On its label.
    pub uuid: DiskUuid,
    /// Where its node is called.
    pub address: String,
    /// zone/rack/server.
    pub location: String,
    /// in, draining or away.
    pub state: DiskState,
    /// Share of the data it is to hold.
    #[serde(default)]
    pub weight: u32,
    /// What it does.
    pub roles: Vec<Role>,
    /// Slots of placement groups whose chunks it holds or is being given.
    #[serde(default)]
    pub slots: usize,
    /// Slots whose chunks are on their way from it to another disk.
    #[serde(default)]
    pub slots_leaving: usize,
    /// Whether it answers.
    pub health: Health,
    /// Size of its file system, in bytes.
    pub capacity_bytes: Option<u64>,
    /// Free for chunks, in bytes.
    pub free_bytes: Option<u64>,
    /// Chunks on it.
    pub chunks: Option<u64>,
    /// Payload of them, in bytes.
    pub chunk_bytes: Option<u64>,
    /// Epoch of the map it knows.
    pub epoch: Option<Epoch>,
    /// The last error seen.
    pub last_error: Option<String>,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRow {
    /// Its number; 0 is the root shard.
    pub shard: ShardId,
    /// Members by the map.
    pub members: Vec<DiskId>,
    /// Who says to lead it.
    pub leader: Option<DiskId>,
    /// Term of that.
    pub term: Option<u64>,
    /// Voters by the leader's word.
    pub voters: Vec<DiskId>,
    /// Replicas that answered: disk, state, last applied index.
    pub replicas: Vec<ReplicaRow>,
}

impl ShardRow {
    /// Voters that answered. A replica that still learns, or is stopped, counts for nothing, whatever disk it is on.
    pub fn voters_answering(&self) -> usize {
        let votes = |replica: &&ReplicaRow| ["leader", "follower", "candidate"].contains(&replica.state.as_str());
        self.replicas.iter().filter(|replica| self.voters.contains(&replica.disk)).filter(votes).count()
    }
}

/// A replica of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRow {
    /// On which disk.
    pub disk: DiskId,
    /// leader, follower, ...
    pub state: String,
    /// Last applied index.
    pub applied_index: u64,
    /// Last index of its log.
    #[serde(default)]
    pub last_log_index: u64,
}

/// A bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketRow {
    /// Name.
    pub name: String,
    /// What lies in it; None when a shard did not answer.
    pub usage: Option<UsageRow>,
}

/// Usage of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRow {
    /// Current objects.
    pub objects: u64,
    /// Payload, uploads in progress included, in bytes.
    pub bytes: u64,
    /// Uploads in progress.
    pub uploads: u64,
}

/// The feature levels of the shards, and what the builds in the cluster know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureLevels {
    /// One row per shard.
    pub shards: Vec<ShardLevelRow>,
    /// The highest level that the node of each disk knows; nodes that do not answer are left out.
    pub disks: BTreeMap<DiskId, u32>,
    /// The highest level that the gateway that answers knows.
    pub gateway: u32,
    /// The level to which some shards can be raised now; None when there is nothing to raise, or it cannot be done now.
    pub can_raise_to: Option<u32>,
    /// Why no shard can be raised now; None when they can, or need not be.
    pub blocked: Option<String>,
}

/// The feature level of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardLevelRow {
    /// Its number; 0 is the root shard.
    pub shard: ShardId,
    /// Its level; None when it did not answer.
    pub level: Option<u32>,
}
