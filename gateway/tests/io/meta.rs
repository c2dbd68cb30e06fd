//! What tests do in the shards of their cluster behind the backs of its gateways, and what they look up there.

use crate::cluster::Cluster;
use crate::peers::{Kind, MemoryPeers};
use granary_gateway::background::heal::HEAL_TASK;
use granary_gateway::object::Placement;
use granary_gateway::shards::Shards;
use granary_meta::codec::encode;
use granary_meta::keys::Keys;
use granary_meta::record::{
    AccountId, BucketId, ExtentRecord, ExtentRef, LeaseRecord, ObjectData, ObjectMeta, ObjectRecord, PartRecord,
    RepairSlotRecord, UploadId, UploadRecord, VersionSeq,
};
use granary_meta::{Answer, ChunkRef, Command, Conditions, Query, Reply, VersionPick};
use granary_placement::id::{ExtentId, PlacementGroupId, ShardId};
use granary_placement::lease::LeaseStamp;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The bucket that all objects here are in.
pub const BUCKET: BucketId = BucketId(1);

/// Shards 1 and 2 of a cluster.
#[derive(Clone)]
pub struct Meta {
    peers: Arc<MemoryPeers>,
    /// The gateway's way to them.
    pub shards: Shards,
}

impl Meta {
    pub fn of(cluster: &Cluster) -> Meta {
        Meta { peers: cluster.peers.clone(), shards: cluster.shards.clone() }
    }

    /// Pages of queries are no longer than this.
    pub fn page(&self, limit: u32) {
        self.peers.state().page = Some(limit);
    }

    /// This shard does not answer.
    pub fn silence(&self, shard: ShardId, silent: bool) {
        let mut state = self.peers.state();
        if silent {
            state.silent.insert(shard);
        } else {
            state.silent.remove(&shard);
        }
    }

    /// Queries of this kind to this shard are lost from now on; None: no others are.
    pub fn lose_queries(&self, unheard: Option<(ShardId, Kind)>) {
        self.peers.state().unheard = unheard;
    }

    /// How often this shard was asked for its repair queue, and answered.
    pub fn looks(&self, shard: ShardId) -> usize {
        self.peers.state().looks.get(&shard).copied().unwrap_or_default()
    }

    /// As the PUT of a payload that was staged.
    pub fn commit(&self, shard: ShardId, key: &str, data: &ObjectData, placement: &Placement) {
        let reply = self.try_commit(shard, key, data, placement);
        assert!(matches!(reply, Reply::Put { .. }), "{reply:?}");
    }

    /// As the PUT of a payload that was staged; what the shard says of it.
    pub fn try_commit(&self, shard: ShardId, key: &str, data: &ObjectData, placement: &Placement) -> Reply {
        let record = ObjectRecord {
            version: VersionSeq(0),
            null_version: true,
            delete_marker: false,
            modified_ms: 1,
            size_bytes: data.extents().iter().map(|extent| extent.len_bytes).sum(),
            etag: String::new(),
            part_sizes: Vec::new(),
            checksum: None,
            part_checksums: Vec::new(),
            meta: ObjectMeta::default(),
            owner: AccountId::ROOT,
            data: data.clone(),
        };
        let put = Command::PutObject {
            bucket: BUCKET,
            key: key.to_owned(),
            record,
            missing: placement.missing.clone(),
            map_epoch: placement.map_epoch,
            conditions: Conditions::default(),
            rule_epoch: 0,
        };
        self.peers.command(shard, put)
    }

    /// As a part of an upload of that key that is begun with it, and stays open.
    pub fn part(&self, shard: ShardId, key: &str, data: &ObjectData, placement: &Placement) {
        let (bucket, key, upload) = (BUCKET, key.to_owned(), UploadId([7; 16]));
        let record =
            UploadRecord { initiated_ms: 1, meta: ObjectMeta::default(), checksum: None, owner: AccountId::ROOT };
        let create = Command::CreateUpload { bucket, key: key.clone(), upload, record, rule_epoch: 0 };
        assert_eq!(self.peers.command(shard, create), Reply::Done);
        let part = PartRecord {
            number: 1,
            size_bytes: data.extents().iter().map(|extent| extent.len_bytes).sum(),
            etag: String::new(),
            modified_ms: 1,
            checksum: None,
            data: data.clone(),
        };
        let (missing, map_epoch) = (placement.missing.clone(), placement.map_epoch);
        let put = Command::PutPart { bucket, key, upload, part, missing, map_epoch, rule_epoch: 0 };
        assert_eq!(self.peers.command(shard, put), Reply::Done);
    }

    /// As the DELETE of the object that an extent is of.
    pub fn delete(&self, shard: ShardId, extent: &ExtentRef, now_ms: u64) {
        let key = self.extents(shard).into_iter().find(|record| record.extent == *extent).unwrap().key;
        let (version, conditions) = (VersionPick::Current, Conditions::default());
        let delete = Command::DeleteObject { bucket: BUCKET, key, version, conditions, rule_epoch: 0 };
        let reply = self.peers.command_at(shard, now_ms, delete);
        assert!(matches!(reply, Reply::Deleted { existed: true, .. }), "{reply:?}");
    }

    /// As a reader that found a chunk missing, of whose extent the shard is perhaps not the owner.
    pub fn report(&self, shard: ShardId, chunk: ChunkRef) {
        assert_eq!(self.peers.command(shard, Command::ReportMissing { chunks: vec![chunk] }), Reply::Done);
    }

    /// Puts an extent that is alive on the garbage queue: a fault somewhere else.
    pub fn condemn(&self, shard: ShardId, queued_ms: u64, extent: &ExtentRef) {
        let mut state = self.peers.state();
        let key = Keys::new(shard).garbage(queued_ms, extent.extent);
        let write = BTreeMap::from([(key, Some(encode(extent).unwrap()))]);
        state.shards.shard(shard).unwrap().kv.write(write);
    }

    pub fn extents(&self, shard: ShardId) -> Vec<ExtentRecord> {
        match self.peers.query(shard, &Query::ExtentsOfGroup { group: None, after: None, limit: 1000 }) {
            Answer::Extents { extents, more: false } => extents,
            other => panic!("{other:?}"),
        }
    }

    /// The generation under which a chunk is queued.
    pub fn generation(&self, shard: ShardId, chunk: ChunkRef) -> u64 {
        match self.peers.query(shard, &Query::ListMissing { after: None, limit: 1000 }) {
            Answer::Missing { chunks, .. } => chunks.iter().find(|(queued, ..)| *queued == chunk).unwrap().1.generation,
            other => panic!("{other:?}"),
        }
    }

    /// The chunks on the repair queues of both shards.
    pub fn missing(&self) -> usize {
        let queued = |shard| match self.peers.query(ShardId(shard), &Query::ListMissing { after: None, limit: 1000 }) {
            Answer::Missing { chunks, more: false } => chunks.len(),
            other => panic!("{other:?}"),
        };
        queued(1) + queued(2)
    }

    /// The slots on the repair queue of a shard.
    pub fn queued_slots(&self, shard: ShardId) -> Vec<(PlacementGroupId, u8, RepairSlotRecord)> {
        match self.peers.query(shard, &Query::ListRepairSlots { after: None, limit: 1000 }) {
            Answer::RepairSlots { slots, more: false } => slots,
            other => panic!("{other:?}"),
        }
    }

    /// As the holder of the heal lease of that epoch, which stopped there: the slot was looked through up to that
    /// extent.
    pub fn looked_through(&self, shard: ShardId, (group, slot): (PlacementGroupId, u8), cursor: ExtentId, epoch: u64) {
        let lease = LeaseStamp { task: HEAL_TASK.to_owned(), epoch };
        let queue = Command::QueueRepair { slots: vec![(group, slot)], keep: false, lease: lease.clone() };
        assert_eq!(self.peers.command(shard, queue), Reply::Done);
        let generation = self.queued_slots(shard)[0].2.generation;
        let advance = Command::AdvanceRepair { group, slot, generation, cursor, lease };
        assert_eq!(self.peers.command(shard, advance), Reply::Done);
    }

    /// All leases.
    pub fn leases(&self) -> Vec<LeaseRecord> {
        match self.peers.query(ShardId::ROOT, &Query::ListLeases) {
            Answer::Leases(leases) => leases,
            other => panic!("{other:?}"),
        }
    }

    pub fn is_garbage(&self, shard: ShardId, extent: &ExtentRef) -> bool {
        match self.peers.query(shard, &Query::ListGarbage { until_ms: u64::MAX, after: None, limit: 1000 }) {
            Answer::Garbage { extents, more: false } => extents.iter().any(|(_, queued)| queued == extent),
            other => panic!("{other:?}"),
        }
    }
}
