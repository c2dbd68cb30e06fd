//! Helpers of the tests: random numbers from a printed seed, commands, a map.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use bytes::Bytes;
use granary_meta::record::{AccountId, BucketId, ExtentRef, ObjectData, ObjectMeta, ObjectRecord, VersionSeq};
use granary_meta::{Command, Conditions, MetaRequest};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ExtentId, PlacementGroupId};
use granary_placement::map::{ClusterMap, Disk, DiskState, Location, Roles, ShardReplicas};
use granary_placement::scheme::CodecId;
use std::collections::BTreeMap;

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    pub fn id(&mut self) -> [u8; 16] {
        (u128::from(self.next()) << 64 | u128::from(self.next())).to_be_bytes()
    }
}

/// The seed of a run: from GRANARY_SEED to replay one, else of the clock; printed.
pub fn seed(test: &str) -> u64 {
    let seed = std::env::var("GRANARY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("{test}: GRANARY_SEED={seed}");
    seed
}

pub fn extent(random: &mut Random, len_bytes: u64) -> ExtentRef {
    ExtentRef {
        extent: ExtentId(random.id()),
        group: PlacementGroupId(random.below(4) as u32),
        codec: CodecId::Np16,
        k: 2,
        m: 2,
        unit_bytes: 131_072,
        len_bytes,
        generation: 1,
        slots: vec![0, 1, 2, 3],
    }
}

pub fn inline(bytes: &[u8]) -> ObjectData {
    ObjectData::Inline { bytes: Bytes::copy_from_slice(bytes), crc32: crc32fast::hash(bytes) }
}

pub fn record(data: ObjectData, size_bytes: u64, etag: &str) -> ObjectRecord {
    ObjectRecord {
        version: VersionSeq(0),
        null_version: false,
        delete_marker: false,
        modified_ms: 0,
        size_bytes,
        etag: etag.to_owned(),
        part_sizes: Vec::new(),
        checksum: None,
        part_checksums: Vec::new(),
        meta: ObjectMeta::default(),
        owner: AccountId::ROOT,
        data,
    }
}

pub fn request(random: &mut Random, now_ms: u64, command: Command) -> MetaRequest {
    MetaRequest { request_id: random.id(), now_ms, stamp_ms: Some(now_ms), account: AccountId::ROOT, command }
}

/// A plain PUT of a few inline bytes.
pub fn put(bucket: u64, key: &str, body: &[u8]) -> Command {
    Command::PutObject {
        bucket: BucketId(bucket),
        key: key.to_owned(),
        record: record(inline(body), body.len() as u64, &format!("{:08x}", crc32fast::hash(body))),
        missing: Vec::new(),
        map_epoch: Epoch(1),
        conditions: Conditions::default(),
        rule_epoch: 0,
    }
}

/// A map of the root shard and two object shards, with little else in it.
pub fn map() -> ClusterMap {
    ClusterMap {
        cluster_id: ClusterId([0xc1; 16]),
        epoch: Epoch(12),
        next_disk_id: 7,
        disks: BTreeMap::new(),
        schemes: BTreeMap::new(),
        default_scheme: "4+2".into(),
        groups: BTreeMap::new(),
        shards: vec![ShardReplicas { members: vec![DiskId(1), DiskId(2)] }; 3],
        slot_shards: granary_placement::map::deal_hash_slots(2),
    }
}

/// The map of the next epoch: the second shard has one member.
/// The map after that one, in which a disk is away.
pub fn away_map(map: &ClusterMap) -> ClusterMap {
    let mut next = map.clone();
    next.epoch = Epoch(map.epoch.0 + 1);
    let disk = Disk {
        id: DiskId(3),
        uuid: DiskUuid([0xd3; 16]),
        address: "d3:7".into(),
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 300,
        roles: Roles { storage: true, metadata: false },
        state: DiskState::Away,
    };
    next.disks.insert(disk.id, disk);
    next
}

pub fn next_map(map: &ClusterMap) -> ClusterMap {
    let mut next = map.clone();
    next.epoch = Epoch(map.epoch.0 + 1);
    next.shards[1] = ShardReplicas { members: vec![DiskId(1 + (map.epoch.0 % 2) as u32)] };
    next
}
