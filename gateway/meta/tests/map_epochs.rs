//! Cluster maps that payloads were placed by: once a shard requires a map, nothing that an older one placed comes in.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::memory::MemoryShards;
use granary_meta::record::{AccountId, BucketId, ObjectData, ObjectMeta, PartRecord, UploadId, UploadRecord};
use granary_meta::{Answer, ChunkRef, Command, Conditions, Query, Reply};
use granary_placement::id::{Epoch, ShardId};
use granary_placement::lease::LeaseStamp;
use scenery::{extent, map, put, record, Random};

const SHARD: ShardId = ShardId(1);
const BUCKET: BucketId = BucketId(1);
const UPLOAD: UploadId = UploadId([7; 16]);

struct Shard {
    shards: MemoryShards,
    random: Random,
}

impl Shard {
    fn new() -> Shard {
        let mut shard = Shard { shards: MemoryShards::new(&map()).unwrap(), random: Random(3) };
        let record =
            UploadRecord { initiated_ms: 1, meta: ObjectMeta::default(), checksum: None, owner: AccountId::ROOT };
        let create = Command::CreateUpload { bucket: BUCKET, key: "k".into(), upload: UPLOAD, record, rule_epoch: 0 };
        assert_eq!(shard.send(create), Reply::Done);
        shard
    }

    fn send(&mut self, command: Command) -> Reply {
        self.shards.command(SHARD, 1, command).unwrap()
    }

    fn require(&mut self, epoch: u64, lease_epoch: u64) -> Reply {
        let lease = LeaseStamp { task: "heal".into(), epoch: lease_epoch };
        self.send(Command::RequireMap { epoch: Epoch(epoch), lease })
    }

    /// An object in one extent of which a chunk is missing.
    fn put(&mut self, map_epoch: u64) -> Reply {
        let extent = extent(&mut self.random, 10);
        let missing = vec![ChunkRef { group: extent.group, extent: extent.extent, index: 2 }];
        self.send(Command::PutObject {
            bucket: BUCKET,
            key: "k".into(),
            record: record(ObjectData::Extents(vec![extent]), 10, "e"),
            missing,
            map_epoch: Epoch(map_epoch),
            conditions: Conditions::default(),
            rule_epoch: 0,
        })
    }

    fn put_part(&mut self, map_epoch: u64) -> Reply {
        let data = ObjectData::Extents(vec![extent(&mut self.random, 10)]);
        let part = PartRecord { number: 1, size_bytes: 10, etag: "e".into(), modified_ms: 1, checksum: None, data };
        self.send(Command::PutPart {
            bucket: BUCKET,
            key: "k".into(),
            upload: UPLOAD,
            part,
            missing: Vec::new(),
            map_epoch: Epoch(map_epoch),
            rule_epoch: 0,
        })
    }

    /// (extents, chunks to be repaired)
    fn holds(&self) -> (usize, usize) {
        let extents = Query::ExtentsOfGroup { group: None, after: None, limit: 1000 };
        let Answer::Extents { extents, .. } = self.shards.query(SHARD, &extents).unwrap() else { panic!() };
        let missing = Query::ListMissing { after: None, limit: 1000 };
        let Answer::Missing { chunks, .. } = self.shards.query(SHARD, &missing).unwrap() else { panic!() };
        (extents.len(), chunks.len())
    }
}

#[test]
fn a_payload_placed_by_a_map_older_than_the_shard_requires_changes_nothing() {
    let mut shard = Shard::new();
    assert!(matches!(shard.put(3), Reply::Put { .. }), "nothing is required yet");
    assert_eq!(shard.require(5, 1), Reply::Done);
    let before = shard.holds();
    for epoch in [0, 3, 4] {
        assert_eq!(shard.put(epoch), Reply::StaleMap { oldest: Epoch(5) });
        assert_eq!(shard.put_part(epoch), Reply::StaleMap { oldest: Epoch(5) });
    }
    assert_eq!(shard.holds(), before);
    // Late, and repeated: what is required never becomes less.
    assert_eq!((shard.require(4, 1), shard.require(5, 1)), (Reply::Done, Reply::Done));
    assert_eq!(shard.put(4), Reply::StaleMap { oldest: Epoch(5) });
    for epoch in [5, 6] {
        assert!(matches!(shard.put(epoch), Reply::Put { .. }));
        assert_eq!(shard.put_part(epoch), Reply::Done);
    }
    assert_eq!(shard.holds(), (2, 1), "the object's extent with its missing chunk, and the part's");
}

#[test]
fn what_lies_on_no_disk_asks_no_map() {
    let mut shard = Shard::new();
    shard.require(5, 1);
    let mut inline = put(1, "k", b"body");
    if let Command::PutObject { map_epoch, .. } = &mut inline {
        *map_epoch = Epoch(0);
    }
    assert!(matches!(shard.send(inline), Reply::Put { .. }));
}

#[test]
fn a_holder_whose_lease_was_taken_over_requires_nothing() {
    let mut shard = Shard::new();
    shard.require(2, 8);
    assert_eq!(shard.require(u64::MAX, 7), Reply::StaleLease { current: 8 });
    assert!(matches!(shard.put(2), Reply::Put { .. }));
}
