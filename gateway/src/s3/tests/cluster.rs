//! A cluster inside the test process: the metadata shards are the real state machine in memory, the disks are disk
//! nodes on loopback whose chunks lie in memory.

use super::node::Disk;
use crate::disks::{DiskSettings, Disks};
use crate::metrics::Metrics;
use crate::object::{ObjectSettings, ObjectStore};
use crate::shards::memory::MemoryPeers;
use crate::shards::{Shards, Timing};
use futures::TryStreamExt;
use granary_meta::record::{AccountId, BucketRecord, ObjectRecord, Versioning};
use granary_meta::{Answer, Command, MetaRequest, Query, Reply, VersionPick};
use granary_placement::id::{ClusterId, DiskUuid, Epoch, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_wire::{ClusterSecret, Credentials};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

const DISKS: u32 = 4;

pub struct Cluster {
    pub peers: Arc<MemoryPeers>,
    pub disks: Vec<Arc<Disk>>,
    pub objects: ObjectStore,
    /// For the test's own looks; each gateway has another, with its own caches.
    pub shards: Shards,
    map: watch::Receiver<Option<Arc<ClusterMap>>>,
}

/// Objects are stored 2+1; the scheme `wide` has 3+1.
fn map_of(addresses: &[String]) -> ClusterMap {
    let with_scheme = |name: &str, k: u8| {
        let disk = |(id, address): (u8, &String)| NewDisk {
            uuid: DiskUuid([id; 16]),
            address: address.clone(),
            location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
            weight: 1,
            roles: Roles { storage: true, metadata: true },
        };
        let cluster = NewCluster {
            cluster_id: ClusterId([7; 16]),
            disks: (1u8..).zip(addresses).map(disk).collect(),
            scheme_name: name.to_owned(),
            scheme: Scheme::new(k, 1, FailureDomain::Disk).unwrap(),
            object_shards: 3,
            replicas: Some(1),
            groups_per_disk: 4,
        };
        new_map(cluster).unwrap()
    };
    let (mut map, wide) = (with_scheme("narrow", 2), with_scheme("wide", 3));
    let first = map.groups.keys().next_back().unwrap().0 + 1;
    map.groups.extend((first..).map(PlacementGroupId).zip(wide.groups.into_values()));
    map.schemes.extend(wide.schemes);
    map
}

impl Cluster {
    pub async fn start() -> Arc<Cluster> {
        let credentials = Credentials { cluster: ClusterId([7; 16]), secret: ClusterSecret::generate().unwrap() };
        let (mut disks, mut addresses) = (Vec::new(), Vec::new());
        for id in 1..=DISKS {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap().to_string());
            let disk = Disk::new(id);
            disk.serve(listener, credentials.clone());
            disks.push(disk);
        }
        let map = map_of(&addresses);
        let peers = MemoryPeers::new(&map);
        let (_, map) = watch::channel(Some(Arc::new(map)));
        let watched = Disks::new(map.clone(), credentials, None, DiskSettings::default());
        assert!(watched.wait_ready(Duration::from_secs(10)).await);
        let shards = shards_over(&peers, &map);
        Arc::new(Cluster { objects: ObjectStore::new(watched, ObjectSettings::default()), peers, disks, shards, map })
    }

    /// The shards as one more gateway sees them: nothing is in its caches.
    pub fn more_shards(&self) -> Shards {
        shards_over(&self.peers, &self.map)
    }

    /// Objects in all buckets.
    pub async fn object_count(&self) -> u64 {
        let mut count = 0;
        for bucket in self.shards.list_buckets(None, "", "", 1000).await.unwrap().buckets {
            count += self.shards.bucket_usage(bucket.id).await.unwrap().objects;
        }
        count
    }

    /// Payload and record of an object.
    pub async fn object(&self, bucket: &str, key: &str) -> (Vec<u8>, ObjectRecord) {
        let id = self.shards.fresh_bucket(bucket).await.unwrap().unwrap().id;
        let query = Query::GetObject { bucket: id, key: key.to_owned(), version: VersionPick::Current };
        match self.shards.query_for(id, key, query).await.unwrap() {
            Answer::Object(record) => {
                let pieces: Vec<_> = self.objects.read(&record.data, 0..record.size_bytes).try_collect().await.unwrap();
                (pieces.concat(), *record)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Sends a command to the root shard, behind the back of all gateways.
    pub fn command_root(&self, command: Command) -> Reply {
        self.peers.command(ShardId::ROOT, command)
    }

    /// Switches versioning on in the root shard. No object shard hears of it.
    pub async fn begin_versioning(&self, bucket: &str) -> BucketRecord {
        let id = self.shards.fresh_bucket(bucket).await.unwrap().unwrap().id;
        let name = bucket.to_owned();
        let versioning = Versioning::Enabled;
        let begin = Command::BeginBucketRule { name, bucket: id, versioning, lock: false, policy_epoch: 0 };
        match self.command_root(begin) {
            Reply::Bucket(bucket) => bucket,
            other => panic!("{other:?}"),
        }
    }

    /// The commands that arrived since the last call.
    pub fn take_commands(&self) -> Vec<MetaRequest> {
        std::mem::take(&mut self.peers.state().commands).into_iter().map(|(_, request)| request).collect()
    }

    /// Gives an object that lies in its record another time of writing.
    pub async fn touch(&self, bucket: &str, key: &str, modified_ms: u64) {
        let id = self.shards.fresh_bucket(bucket).await.unwrap().unwrap().id;
        let (_, mut record) = self.object(bucket, key).await;
        assert!(record.data.extents().is_empty());
        record.modified_ms = modified_ms;
        let command = Command::PutObject {
            bucket: id,
            key: key.to_owned(),
            record,
            missing: Vec::new(),
            map_epoch: Epoch(1),
            conditions: granary_meta::Conditions::default(),
            rule_epoch: 0,
        };
        self.shards.command_for(AccountId::ROOT, id, key, command).await.unwrap();
    }

    /// Chunks on all disks.
    pub fn chunk_count(&self) -> usize {
        self.disks.iter().map(|disk| disk.count()).sum()
    }

    /// Chunks of payloads that were staged and surely came to nothing.
    pub fn dropped_chunks(&self) -> u64 {
        self.objects.counters().staged_chunks_dropped.load(Ordering::Relaxed)
    }

    /// Waits until only so many chunks lie on the disks: what came to nothing is deleted in the background.
    pub async fn until_chunks(&self, count: usize) {
        for _ in 0..3000 {
            if self.chunk_count() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} chunks lie on the disks, not {count}", self.chunk_count());
    }
}

fn shards_over(peers: &Arc<MemoryPeers>, map: &watch::Receiver<Option<Arc<ClusterMap>>>) -> Shards {
    let timing = Timing { deadline: Duration::from_secs(2), ..Timing::default() };
    let map = watch::Sender::new(map.borrow().clone());
    Shards::with_timing(peers.clone(), map, Metrics::new().unwrap(), timing)
}
