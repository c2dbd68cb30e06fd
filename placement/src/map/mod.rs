//! The cluster map: disks, domains, weights, states, roles, schemes, placement groups and shard replicas.
//!
//! One value, versioned by epoch, owned by the root shard; everyone else holds a copy and asks for a newer one when a peer
//! names a higher epoch. A map is checked by [`ClusterMap::validate`] before it is committed and after it is read.

mod validate;

pub use validate::MapError;

use crate::id::{ClusterId, DiskId, DiskUuid, Epoch, PlacementGroupId, ShardId};
use crate::scheme::Scheme;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a disk stands: nested failure domains, by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Location {
    /// Data centre or availability zone.
    pub zone: String,
    /// Rack inside the zone.
    pub rack: String,
    /// Server inside the rack.
    pub server: String,
}

/// What a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Roles {
    /// Stores chunks.
    pub storage: bool,
    /// Holds shard replicas.
    pub metadata: bool,
}

/// What an operator or the healer has decided about a disk. Whether it answers right now is not in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// In service.
    In,
    /// In service, but its slots are to be moved away.
    Draining,
    /// Out of service for good; it holds no slots. Kept so that its id is never used again.
    Out,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its number, never reused: a wiped disk comes back under a new one.
    pub id: DiskId,
    /// The UUID on its label.
    pub uuid: DiskUuid,
    /// `host:port` of its daemon.
    pub address: String,
    /// Where it stands.
    pub location: Location,
    /// Share of the data it is to hold, relative to the other disks; by convention its capacity in GiB. Zero takes none.
    pub weight: u32,
    /// What it does.
    pub roles: Roles,
    /// What was decided about it.
    pub state: DiskState,
}

/// K+M disks, one per slot. Chunk index i of an extent lies on the disk of the slot that the extent names for i.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementGroup {
    /// Name of the scheme in [`ClusterMap::schemes`].
    pub scheme: String,
    /// The disk of each slot; as many as the scheme is wide, all different.
    pub slots: Vec<DiskId>,
}

/// The metadata disks that hold one shard. One, three or five, all different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardReplicas {
    /// Raft members.
    pub members: Vec<DiskId>,
}

/// The cluster map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterMap {
    /// Which cluster.
    pub cluster_id: ClusterId,
    /// Version of this map.
    pub epoch: Epoch,
    /// The next disk id to hand out.
    pub next_disk_id: u32,
    /// All disks that ever were.
    pub disks: BTreeMap<DiskId, Disk>,
    /// Schemes by name; storage classes name them.
    pub schemes: BTreeMap<String, Scheme>,
    /// The scheme of an upload that names no storage class.
    pub default_scheme: String,
    /// All placement groups.
    pub groups: BTreeMap<PlacementGroupId, PlacementGroup>,
    /// Replicas by shard number; the first is the root shard, objects hash over the rest.
    pub shards: Vec<ShardReplicas>,
}

impl ClusterMap {
    /// The disk of that id.
    pub fn disk(&self, id: DiskId) -> Option<&Disk> {
        self.disks.get(&id)
    }

    /// The group of that id.
    pub fn group(&self, id: PlacementGroupId) -> Option<&PlacementGroup> {
        self.groups.get(&id)
    }

    /// How many shards hold objects.
    pub fn object_shards(&self) -> u16 {
        u16::try_from(self.shards.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// The shard that owns (bucket, key): FNV-1a 64 over the bucket number (big-endian) and the key's bytes, folded by a
    /// multiply-shift, over shards 1 to P. The number of shards is fixed when a cluster is made. None when the map has no object shard.
    pub fn shard_of(&self, bucket: u64, key: &str) -> Option<ShardId> {
        let shards = self.object_shards();
        if shards == 0 {
            return None;
        }
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in bucket.to_be_bytes().iter().chain(key.as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        // FNV's high bits mix poorly on short keys; one finalising round spreads them before the multiply-shift.
        hash ^= hash >> 32;
        hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
        let slot = ((u128::from(hash) * u128::from(shards)) >> 64) as u16;
        Some(ShardId(slot + 1))
    }
}
