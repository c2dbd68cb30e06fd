//! A cluster inside the test process: the metadata shards are the real state machine in memory, the disks are disk
//! nodes on loopback whose chunks lie in memory.

use super::node::Disk;
use crate::disks::{DiskSettings, Disks};
use crate::metrics::Metrics;
use crate::object::{ObjectSettings, ObjectStore};
use crate::shards::peers::{PeerError, Peers};
use crate::shards::{Shards, Timing};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::TryStreamExt;
use granary_meta::memory::MemoryShards;
use granary_meta::record::{AccountId, BucketRecord, ObjectRecord, Versioning};
use granary_meta::{Answer, Command, MetaRequest, Query, Reply, ShardRequest, VersionPick};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::{ClusterSecret, Credentials};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

const DISKS: u32 = 4;

/// All shards of a cluster, reached through whichever disk is asked.
pub struct MemoryPeers {
    pub shards: Mutex<MemoryShards>,
    /// Requests are served, and their answers lost.
    pub lose_answers: AtomicBool,
    /// Commands are applied, and answered with this instead of their reply.
    pub garbled_reply: Mutex<Option<Bytes>>,
    /// The commands that arrived, in order.
    pub commands: Arc<Mutex<Vec<MetaRequest>>>,
    /// Every request waits this long before it is served.
    pub delay_ms: AtomicU64,
}

impl Peers for MemoryPeers {
    fn control(
        &self,
        _: DiskId,
        request: ControlRequest,
        _: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, PeerError>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(self.delay_ms.load(Ordering::SeqCst))).await;
            let ControlRequest::Shard { shard, request } = request else { panic!("an S3 request asks shards only") };
            let answer = self.shards.lock().unwrap().serve(shard, &request).unwrap();
            let is_command = matches!(ShardRequest::decode(&request), Ok(ShardRequest::Command(_)));
            if let Some(garbled) = self.garbled_reply.lock().unwrap().clone().filter(|_| is_command) {
                return Ok(ControlResponse::Shard(garbled));
            }
            if self.lose_answers.load(Ordering::SeqCst) {
                return Err(PeerError::Lost("the answer was lost on purpose".to_owned()));
            }
            Ok(ControlResponse::Shard(answer))
        })
    }
}

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
        let mut shards = MemoryShards::new(&map).unwrap();
        let commands: Arc<Mutex<Vec<MetaRequest>>> = Arc::default();
        let seen = commands.clone();
        shards.observe(Box::new(move |_: ShardId, request: &MetaRequest, _: &Reply| {
            seen.lock().unwrap().push(request.clone());
        }));
        let peers = Arc::new(MemoryPeers {
            shards: Mutex::new(shards),
            garbled_reply: Mutex::default(),
            commands,
            lose_answers: AtomicBool::new(false),
            delay_ms: AtomicU64::new(0),
        });
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
        for bucket in self.shards.list_buckets("", 1000).await.unwrap().buckets {
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
        self.peers.shards.lock().unwrap().command(ShardId::ROOT, 1, command).unwrap()
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
        std::mem::take(&mut *self.peers.commands.lock().unwrap())
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
