//! The cluster map: disks, domains, weights, states, roles, schemes, placement groups and shard replicas.
//!
//! One value, versioned by epoch, owned by the root shard; everyone else holds a copy and asks for a newer one when a
//! peer names a higher epoch. A map is checked by [`ClusterMap::validate`] before it is committed and after it is read.

mod diff;
mod validate;

pub use diff::{apply_diff, diff, Changes, MapDiff, SlotChange};
pub use validate::MapError;

use crate::id::{ClusterId, DiskId, DiskUuid, Epoch, HashSlot, PlacementGroupId, ShardId, HASH_SLOTS};
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
    /// Taken out of service by the healer, because it did not answer for long. It holds no slots, but may still be the
    /// `previous` of some; when it answers again it is let back in.
    Away,
}

impl DiskState {
    /// May slots have a disk of this state as their current one?
    pub fn holds_slots(self) -> bool {
        matches!(self, DiskState::In | DiskState::Draining)
    }
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
    /// Share of the data it is to hold, relative to the other disks; by convention its capacity in GiB. Zero takes
    /// none.
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
    /// As many as the scheme is wide; no disk stands in two of them.
    pub slots: Vec<GroupSlot>,
}

/// One slot of a placement group: the disk that takes its chunks, and while they move the disk that they come from.
///
/// Writers write to `current` only; readers and garbage ask both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupSlot {
    /// The disk of the slot.
    pub current: DiskId,
    /// The disk that was `current` before, from the change until all chunks of the slot were found on `current`.
    pub previous: Option<DiskId>,
}

impl GroupSlot {
    /// A slot whose chunks all lie on that disk.
    pub fn new(current: DiskId) -> GroupSlot {
        GroupSlot { current, previous: None }
    }

    /// Gives the slot to another disk. A slot that is on its way already keeps its `previous`: that one holds the
    /// chunks from before the move, and what only the disk between the two holds is rebuilt.
    pub fn give_to(&mut self, disk: DiskId) {
        if disk != self.current {
            self.previous.get_or_insert(self.current);
            self.current = disk;
        }
    }

    /// Gives a slot that is on its way back to the disk that it comes from. The other one stays as its `previous`: it
    /// may hold what was written since the move began.
    pub fn turn_back(&mut self) {
        if let Some(previous) = self.previous {
            *self = GroupSlot { current: previous, previous: Some(self.current) };
        }
    }

    /// `current`, then `previous` if there is one: where a chunk of this slot may lie.
    pub fn disks(&self) -> impl Iterator<Item = DiskId> {
        std::iter::once(self.current).chain(self.previous)
    }
}

/// Hash slots of one shard: from `first` up to the next range's first, or to the last slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SlotRange {
    /// The first of them.
    pub first: HashSlot,
    /// The shard that owns them; never the root shard.
    pub shard: ShardId,
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
    /// Replicas by shard number; the first is the root shard, the others hold objects.
    pub shards: Vec<ShardReplicas>,
    /// Which object shard owns which hash slots: ranges in order, the first from slot 0, neighbours of different
    /// shards.
    pub slot_shards: Vec<SlotRange>,
}

impl ClusterMap {
    /// The disk of that id.
    pub fn disk(&self, id: DiskId) -> Option<&Disk> {
        self.disks.get(&id)
    }

    /// Does it say of a disk that it is away? Releases that do not know this state cannot read such a map.
    pub fn has_away(&self) -> bool {
        self.disks.values().any(|disk| disk.state == DiskState::Away)
    }

    /// The group of that id.
    pub fn group(&self, id: PlacementGroupId) -> Option<&PlacementGroup> {
        self.groups.get(&id)
    }

    /// How many shards hold objects.
    pub fn object_shards(&self) -> u16 {
        u16::try_from(self.shards.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// The shard that owns a hash slot. None when the map is not valid.
    pub fn shard_of_slot(&self, slot: HashSlot) -> Option<ShardId> {
        let after = self.slot_shards.partition_point(|range| range.first <= slot);
        self.slot_shards.get(after.checked_sub(1)?).map(|range| range.shard)
    }

    /// The shard that owns (bucket, key): the owner of its [hash slot](HashSlot::of). None when the map is not valid.
    pub fn shard_of(&self, bucket: u64, key: &str) -> Option<ShardId> {
        self.shard_of_slot(HashSlot::of(bucket, key))
    }
}

/// All hash slots dealt to object shards 1 to `shards` in contiguous ranges that differ by one slot at most.
pub fn deal_hash_slots(shards: u16) -> Vec<SlotRange> {
    let first = |shard: u16| u32::from(shard) * u32::from(HASH_SLOTS) / u32::from(shards.max(1));
    // Never above HASH_SLOTS, so the number fits.
    let range = |shard: u16| SlotRange { first: HashSlot(first(shard) as u16), shard: ShardId(shard + 1) };
    (0..shards.min(HASH_SLOTS)).map(range).collect()
}
