//! The first map of a cluster.

use super::{choose_shard_replicas, default_replicas, lay_out, PlaceError};
use crate::id::{ClusterId, DiskId, DiskUuid, Epoch, PlacementGroupId};
use crate::map::{deal_hash_slots, ClusterMap, Disk, DiskState, Location, Roles};
use crate::scheme::Scheme;
use std::collections::BTreeMap;

/// One disk of a cluster to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDisk {
    /// The UUID on its label.
    pub uuid: DiskUuid,
    /// `host:port` of its daemon.
    pub address: String,
    /// Where it stands.
    pub location: Location,
    /// Share of the data, by convention its capacity in GiB.
    pub weight: u32,
    /// What it does.
    pub roles: Roles,
}

/// A cluster to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCluster {
    /// Its id, made by the caller.
    pub cluster_id: ClusterId,
    /// Its disks; they get the ids 1, 2, 3, ... in this order.
    pub disks: Vec<NewDisk>,
    /// Name of the first scheme, which becomes the default.
    pub scheme_name: String,
    /// The first scheme.
    pub scheme: Scheme,
    /// Shards that hold objects; the root shard comes on top. At least 1, at most 4,096.
    pub object_shards: u16,
    /// Replicas of each shard: 1, 3 or 5. None for [`default_replicas`].
    pub replicas: Option<usize>,
    /// Slots of placement groups per disk; [`DEFAULT_GROUPS_PER_DISK`](super::DEFAULT_GROUPS_PER_DISK) suits most.
    pub groups_per_disk: u32,
}

/// The map of a new cluster at epoch 1, laid out and valid.
///
/// # Errors
/// [`PlaceError`] when the disks cannot keep the scheme or the replicas, or when what was given is not a valid map.
pub fn new_map(new: NewCluster) -> Result<ClusterMap, PlaceError> {
    let mut map = ClusterMap {
        cluster_id: new.cluster_id,
        epoch: Epoch(1),
        next_disk_id: 1,
        disks: BTreeMap::new(),
        schemes: BTreeMap::from([(new.scheme_name.clone(), new.scheme)]),
        default_scheme: new.scheme_name,
        groups: BTreeMap::new(),
        shards: Vec::new(),
        slot_shards: deal_hash_slots(new.object_shards),
    };
    for disk in new.disks {
        let id = DiskId(map.next_disk_id);
        map.next_disk_id = map.next_disk_id.checked_add(1).ok_or(PlaceError::IdsExhausted)?;
        let NewDisk { uuid, address, location, weight, roles } = disk;
        map.disks.insert(id, Disk { id, uuid, address, location, weight, roles, state: DiskState::In });
    }
    let groups = lay_out(&map, &map.default_scheme, new.groups_per_disk)?;
    map.groups = (0..).map(PlacementGroupId).zip(groups).collect();
    let metadata = map.disks.values().filter(|disk| disk.roles.metadata).count();
    let members = new.replicas.unwrap_or_else(|| default_replicas(new.scheme.m, metadata));
    let shards = new.object_shards.checked_add(1).ok_or(PlaceError::IdsExhausted)?;
    map.shards = choose_shard_replicas(&map, shards, members)?;
    map.validate()?;
    Ok(map)
}
