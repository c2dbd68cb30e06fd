//! The rules of a cluster map, each with a sentence for the operator whose map breaks it.

use super::{ClusterMap, Disk, DiskState, GroupSlot, Location};
use crate::id::{DiskId, DiskUuid, Epoch, HashSlot, PlacementGroupId, ShardId, HASH_SLOTS};
use crate::scheme::{FailureDomain, Scheme, SchemeError};
use std::collections::{BTreeMap, BTreeSet};

/// A rule that a map breaks, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Epoch zero.
    #[error("the map has epoch 0; the first map of a cluster has epoch 1")]
    EpochZero,
    /// A key that is not the id of its disk.
    #[error("disk {inside} stands under the key {key}; key and id must be the same")]
    DiskKey {
        /// Key in `disks`.
        key: DiskId,
        /// The id inside.
        inside: DiskId,
    },
    /// An id that would be handed out again.
    #[error(
        "next_disk_id is {next}, but disk {highest} exists; it must be above all ids, or an id would be used twice"
    )]
    NextDiskId {
        /// `next_disk_id`.
        next: u32,
        /// The highest id in the map.
        highest: DiskId,
    },
    /// Two disks with one label.
    #[error("disks {first} and {second} have the same UUID {uuid}; each disk has its own: relabel the newer one")]
    SameUuid {
        /// The UUID that both have.
        uuid: DiskUuid,
        /// One disk.
        first: DiskId,
        /// The disk with the higher number of the two.
        second: DiskId,
    },
    /// Two disks in service at one address.
    #[error("disks {first} and {second} are both at {address}; every disk in service needs its own port")]
    SameAddress {
        /// What stands in the map.
        address: String,
        /// One disk.
        first: DiskId,
        /// The disk with the higher number of the two.
        second: DiskId,
    },
    /// Not a `host:port`.
    #[error(
        "disk {disk} has the address `{address}`; it must be host:port, for example 10.0.0.7:9100 or [fd00::7]:9100"
    )]
    BadAddress {
        /// The number of the disk in question.
        disk: DiskId,
        /// What stands in the map.
        address: String,
    },
    /// A disk in no zone, rack or server.
    #[error("disk {disk} has no {domain} name; where a cluster has only one {domain}, give it any name")]
    EmptyName {
        /// The number of the disk in question.
        disk: DiskId,
        /// `zone`, `rack` or `server`.
        domain: &'static str,
    },
    /// A scheme without a name.
    #[error("a scheme has an empty name; storage classes name schemes, so give it one")]
    EmptySchemeName,
    /// A scheme that cannot be.
    #[error("scheme `{name}` is not valid: {source}")]
    BadScheme {
        /// What stands in the map.
        name: String,
        /// What is wrong with it.
        source: SchemeError,
    },
    /// A name that no scheme has.
    #[error("there is no scheme `{0}` in the cluster map; add it or name one that is there")]
    NoSuchScheme(String),
    /// Nowhere to put an upload.
    #[error("the default scheme `{0}` has no placement groups, so uploads would have nowhere to go; lay it out first")]
    NoGroups(String),
    /// A group with the wrong number of slots.
    #[error("placement group {group} has {slots} slots, but its scheme `{scheme}` has {width} chunks")]
    Width {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// The scheme that the group names.
        scheme: String,
        /// Slots it has.
        slots: usize,
        /// Slots it should have.
        width: usize,
    },
    /// A slot that names no disk.
    #[error("slot {slot} of placement group {group} names disk {disk}, which is not in the map")]
    SlotWithoutDisk {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// Index of the slot.
        slot: usize,
        /// The id it names.
        disk: DiskId,
    },
    /// A slot on a disk that is out or away.
    #[error(
        "slot {slot} of placement group {group} names disk {disk}, which is out or away; rebalance or replace the disk"
    )]
    SlotOnOutDisk {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// Index of the slot.
        slot: usize,
        /// The number of the disk in question.
        disk: DiskId,
    },
    /// A slot on a disk that stores no chunks.
    #[error("slot {slot} of placement group {group} names disk {disk}, which lacks the storage role; rebalance or give it the role")]
    SlotWithoutRole {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// Index of the slot.
        slot: usize,
        /// The number of the disk in question.
        disk: DiskId,
    },
    /// Two chunks on one disk.
    #[error("placement group {group} has disk {disk} in two slots; one failed disk would cost two chunks: rebalance")]
    SameDisk {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// The number of the disk in question.
        disk: DiskId,
    },
    /// A disk that a slot's chunks come from stands in another slot too.
    #[error(
        "slot {slot} of placement group {group} moves away from disk {disk}, which stands in another slot of the group: \
         finish that move first"
    )]
    PreviousInUse {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// Index of the slot that moves.
        slot: usize,
        /// The disk it comes from.
        disk: DiskId,
    },
    /// Too many chunks that fail as one.
    #[error(
        "placement group {group} has {chunks} chunks in {kind} {name}, but its scheme `{scheme}` survives the loss of {limit}: \
         rebalance, and add {kind}s if that is refused"
    )]
    Domain {
        /// The placement group in which it was found.
        group: PlacementGroupId,
        /// The scheme that the group names.
        scheme: String,
        /// `zone`, `rack` or `server`.
        kind: &'static str,
        /// Full name of the domain, from the zone down.
        name: String,
        /// Chunks there.
        chunks: usize,
        /// Most allowed: M.
        limit: usize,
    },
    /// A difference that was made from another map.
    #[error(
        "the difference is from the map of epoch {from}, but the map here has epoch {have}: ask for the whole map"
    )]
    DiffBase {
        /// What it was made from.
        from: Epoch,
        /// What it was to be applied to.
        have: Epoch,
    },
    /// A difference that does not fit the map.
    #[error("the difference between two maps {0}: ask for the whole map")]
    Diff(&'static str),
    /// No shard for objects.
    #[error("the map has {0} shards; it needs the root shard and at least one shard for objects")]
    NoObjectShard(usize),
    /// More shards than numbers.
    #[error("the map has {0} shards; there can be at most 4096 besides the root shard, one for each hash slot")]
    TooManyShards(usize),
    /// Hash slots that no range covers.
    #[error("hash slot 0 belongs to no shard; the first range of slot_shards must begin with it")]
    HashSlotZero,
    /// A range out of order.
    #[error(
        "a range of slot_shards begins with hash slot {0}; it must be above the range before and below {HASH_SLOTS}"
    )]
    HashSlotOrder(HashSlot),
    /// A range of a shard that holds no objects.
    #[error(
        "the range of slot_shards from hash slot {first} names shard {shard}, which is no object shard of this map"
    )]
    HashSlotShard {
        /// Its first slot.
        first: HashSlot,
        /// The shard it names.
        shard: ShardId,
    },
    /// Two ranges that are one.
    #[error("the range of slot_shards from hash slot {0} names the same shard as the one before; make them one")]
    HashSlotSplit(HashSlot),
    /// A number of replicas other than 1, 3 or 5.
    #[error("shard {shard} has {members} replicas; it must have 1, 3 or 5, so that a majority is clear")]
    Replicas {
        /// The metadata shard in question.
        shard: ShardId,
        /// Members it has.
        members: usize,
    },
    /// One disk twice in a shard.
    #[error("shard {shard} names disk {disk} twice; each replica needs its own disk")]
    SameReplica {
        /// The metadata shard in question.
        shard: ShardId,
        /// The number of the disk in question.
        disk: DiskId,
    },
    /// A replica that names no disk.
    #[error("shard {shard} names disk {disk}, which is not in the map")]
    ReplicaWithoutDisk {
        /// The metadata shard in question.
        shard: ShardId,
        /// The id it names.
        disk: DiskId,
    },
    /// A replica on a disk that holds no metadata.
    #[error("shard {shard} names disk {disk}, which lacks the metadata role; rebalance or give it the role")]
    ReplicaWithoutRole {
        /// The metadata shard in question.
        shard: ShardId,
        /// The number of the disk in question.
        disk: DiskId,
    },
}

impl ClusterMap {
    /// Checks every rule; docs/formats/cluster-map.md lists them. A map passes here before it is committed and after it
    /// is read. How evenly slots are shared is no rule: rebalancing sees to it.
    ///
    /// A replica may be on a disk that is out or away, when no other disk could take it over; the shard lives on its
    /// majority.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), MapError> {
        self.validate_structure()?;
        for (id, group) in &self.groups {
            let scheme = self.schemes.get(&group.scheme).ok_or_else(|| MapError::NoSuchScheme(group.scheme.clone()))?;
            self.validate_slots(*id, &group.slots, &group.scheme, scheme)?;
        }
        for (shard, replicas) in shard_ids().zip(&self.shards) {
            for disk in &replicas.members {
                if self.disk(*disk).is_some_and(|disk| !disk.roles.metadata) {
                    return Err(MapError::ReplicaWithoutRole { shard, disk: *disk });
                }
            }
        }
        Ok(())
    }

    /// The rules that moving slots and replicas does not change. A map between a change of its disks and the rebalance
    /// that follows keeps these.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate_structure(&self) -> Result<(), MapError> {
        if self.epoch.0 == 0 {
            return Err(MapError::EpochZero);
        }
        self.validate_disks()?;
        for (name, scheme) in &self.schemes {
            if name.is_empty() {
                return Err(MapError::EmptySchemeName);
            }
            scheme.validate().map_err(|source| MapError::BadScheme { name: name.clone(), source })?;
        }
        if !self.schemes.contains_key(&self.default_scheme) {
            return Err(MapError::NoSuchScheme(self.default_scheme.clone()));
        }
        if !self.groups.values().any(|group| group.scheme == self.default_scheme) {
            return Err(MapError::NoGroups(self.default_scheme.clone()));
        }
        for (id, group) in &self.groups {
            let scheme = self.schemes.get(&group.scheme).ok_or_else(|| MapError::NoSuchScheme(group.scheme.clone()))?;
            if group.slots.len() != scheme.width() {
                let (slots, width) = (group.slots.len(), scheme.width());
                return Err(MapError::Width { group: *id, scheme: group.scheme.clone(), slots, width });
            }
            for (slot, entry) in group.slots.iter().enumerate() {
                if let Some(disk) = entry.disks().find(|disk| !self.disks.contains_key(disk)) {
                    return Err(MapError::SlotWithoutDisk { group: *id, slot, disk });
                }
                let Some(disk) = entry.previous else { continue };
                let named = group.slots.iter().flat_map(GroupSlot::disks).filter(|named| *named == disk).count();
                if named > 1 {
                    return Err(MapError::PreviousInUse { group: *id, slot, disk });
                }
            }
        }
        self.validate_shards()?;
        self.validate_hash_slots()
    }

    fn validate_hash_slots(&self) -> Result<(), MapError> {
        if self.slot_shards.first().is_none_or(|range| range.first != HashSlot(0)) {
            return Err(MapError::HashSlotZero);
        }
        for range in &self.slot_shards {
            let (first, shard) = (range.first, range.shard);
            if shard == ShardId::ROOT || usize::from(shard.0) >= self.shards.len() {
                return Err(MapError::HashSlotShard { first, shard });
            }
            if first.0 >= HASH_SLOTS {
                return Err(MapError::HashSlotOrder(first));
            }
        }
        for (before, range) in self.slot_shards.iter().zip(self.slot_shards.iter().skip(1)) {
            if range.first <= before.first {
                return Err(MapError::HashSlotOrder(range.first));
            }
            if range.shard == before.shard {
                return Err(MapError::HashSlotSplit(range.first));
            }
        }
        Ok(())
    }

    fn validate_disks(&self) -> Result<(), MapError> {
        let mut uuids: BTreeMap<DiskUuid, DiskId> = BTreeMap::new();
        let mut addresses: BTreeMap<&str, DiskId> = BTreeMap::new();
        for (&key, disk) in &self.disks {
            if key != disk.id {
                return Err(MapError::DiskKey { key, inside: disk.id });
            }
            let Location { zone, rack, server } = &disk.location;
            for (domain, name) in [("zone", zone), ("rack", rack), ("server", server)] {
                if name.trim().is_empty() {
                    return Err(MapError::EmptyName { disk: key, domain });
                }
            }
            if !is_host_and_port(&disk.address) {
                return Err(MapError::BadAddress { disk: key, address: disk.address.clone() });
            }
            if let Some(first) = uuids.insert(disk.uuid, key) {
                return Err(MapError::SameUuid { uuid: disk.uuid, first, second: key });
            }
            // A disk that is out has left its address to the one that replaced it.
            if disk.state != DiskState::Out {
                if let Some(first) = addresses.insert(&disk.address, key) {
                    return Err(MapError::SameAddress { address: disk.address.clone(), first, second: key });
                }
            }
        }
        match self.disks.last_key_value() {
            Some((&highest, _)) if highest.0 >= self.next_disk_id => {
                Err(MapError::NextDiskId { next: self.next_disk_id, highest })
            }
            _ => Ok(()),
        }
    }

    fn validate_shards(&self) -> Result<(), MapError> {
        if self.shards.len() < 2 {
            return Err(MapError::NoObjectShard(self.shards.len()));
        }
        if self.shards.len() > usize::from(HASH_SLOTS) + 1 {
            return Err(MapError::TooManyShards(self.shards.len()));
        }
        for (shard, replicas) in shard_ids().zip(&self.shards) {
            let members = replicas.members.len();
            if !matches!(members, 1 | 3 | 5) {
                return Err(MapError::Replicas { shard, members });
            }
            let mut seen = BTreeSet::new();
            for &disk in &replicas.members {
                if !self.disks.contains_key(&disk) {
                    return Err(MapError::ReplicaWithoutDisk { shard, disk });
                }
                if !seen.insert(disk) {
                    return Err(MapError::SameReplica { shard, disk });
                }
            }
        }
        Ok(())
    }

    fn validate_slots(
        &self,
        group: PlacementGroupId,
        slots: &[GroupSlot],
        name: &str,
        scheme: &Scheme,
    ) -> Result<(), MapError> {
        let mut disks: Vec<&Disk> = Vec::with_capacity(slots.len());
        for (slot, id) in slots.iter().map(|slot| &slot.current).enumerate() {
            let disk = self.disk(*id).ok_or(MapError::SlotWithoutDisk { group, slot, disk: *id })?;
            if !disk.state.holds_slots() {
                return Err(MapError::SlotOnOutDisk { group, slot, disk: *id });
            }
            if !disk.roles.storage {
                return Err(MapError::SlotWithoutRole { group, slot, disk: *id });
            }
            if disks.iter().any(|other| other.id == *id) {
                return Err(MapError::SameDisk { group, disk: *id });
            }
            disks.push(disk);
        }
        let limit = usize::from(scheme.m);
        // Outermost first: a domain within the limit holds only domains within it.
        let kind = scheme.failure_domain;
        for disk in &disks {
            let chunks = disks.iter().filter(|other| same_domain(&disk.location, &other.location, kind)).count();
            if chunks > limit && kind != FailureDomain::Disk {
                let (kind, name_of) = describe(&disk.location, kind);
                let scheme = name.to_owned();
                return Err(MapError::Domain { group, scheme, kind, name: name_of, chunks, limit });
            }
        }
        Ok(())
    }
}

fn shard_ids() -> impl Iterator<Item = ShardId> {
    (0..=u16::MAX).map(ShardId)
}

fn same_domain(a: &Location, b: &Location, kind: FailureDomain) -> bool {
    match kind {
        FailureDomain::Disk => false,
        FailureDomain::Server => a == b,
        FailureDomain::Rack => a.zone == b.zone && a.rack == b.rack,
        FailureDomain::Zone => a.zone == b.zone,
    }
}

fn describe(location: &Location, kind: FailureDomain) -> (&'static str, String) {
    let Location { zone, rack, server } = location;
    match kind {
        FailureDomain::Disk | FailureDomain::Server => ("server", format!("{zone}/{rack}/{server}")),
        FailureDomain::Rack => ("rack", format!("{zone}/{rack}")),
        FailureDomain::Zone => ("zone", zone.clone()),
    }
}

fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let plain = !host.is_empty() && !host.contains([':', '[', ']', '/', ' ']);
    (bracketed || plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
}
