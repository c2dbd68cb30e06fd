//! Some disks, a map of them, and an object store on top.

use crate::node::{Damage, Disk};
use crate::peers::MemoryPeers;
use bytes::{Bytes, BytesMut};
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use granary_gateway::disks::{DiskHealth, DiskSettings, Disks};
use granary_gateway::metrics::Metrics;
use granary_gateway::object::choose::Draw;
use granary_gateway::object::{chunk_id, BodyError, ObjectSettings, ObjectStore, ReadError, StageError, Staged};
use granary_gateway::shards::{Shards, Timing};
use granary_meta::record::{ExtentRef, ObjectData};
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::{ClusterId, DiskId, Epoch, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{
    deal_hash_slots, ClusterMap, Disk as MapDisk, DiskState, GroupSlot, Location, PlacementGroup, Roles, ShardReplicas,
};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_wire::{ClusterSecret, Credentials};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub const UNIT: u64 = 65536;
pub const OWNER: HashSlot = HashSlot(7);

pub struct Cluster {
    pub disks: Vec<Arc<Disk>>,
    pub store: ObjectStore,
    pub peers: Arc<MemoryPeers>,
    /// The way of the gateway to the shards.
    pub shards: Shards,
    pub map: watch::Sender<Option<Arc<ClusterMap>>>,
    addresses: Vec<SocketAddr>,
    pub credentials: Credentials,
}

/// A seed from the clock, or from GRANARY_SEED to replay; printed, so that a failure can be replayed.
pub fn seed(test: &str) -> Draw {
    let given = std::env::var("GRANARY_SEED").ok().and_then(|text| text.parse().ok());
    let seed =
        given.unwrap_or_else(|| SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64);
    println!("{test}: GRANARY_SEED={seed}");
    Draw(seed)
}

/// Bytes in which every place differs from its neighbours and from the same place elsewhere.
pub fn payload(len: u64, draw: &mut Draw) -> Bytes {
    let mut bytes = BytesMut::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(&draw.number().to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes.freeze()
}

/// The payload in pieces of random lengths.
pub fn body(payload: &Bytes, draw: &mut Draw) -> impl Stream<Item = Result<Bytes, BodyError>> + Send + 'static {
    let mut pieces = Vec::new();
    let mut rest = payload.clone();
    while !rest.is_empty() {
        let len = (draw.number() % 150_000 + 1).min(rest.len() as u64);
        pieces.push(Ok(rest.split_to(len as usize)));
    }
    stream::iter(pieces)
}

pub fn quick_disks() -> DiskSettings {
    DiskSettings {
        ping_interval: Duration::from_millis(100),
        ping_deadline: Duration::from_millis(400),
        down_after: Duration::from_millis(600),
        suspect_hold: Duration::from_millis(200),
        unwritable_hold: Duration::from_millis(500),
        ..DiskSettings::default()
    }
}

impl Cluster {
    pub async fn start(k: u8, m: u8, settings: ObjectSettings) -> Cluster {
        Cluster::with_disks(k, m, k + m, settings).await
    }

    /// One group on the first K+M disks, and spare disks behind them.
    pub async fn with_disks(k: u8, m: u8, count: u8, settings: ObjectSettings) -> Cluster {
        let credentials = Credentials { cluster: ClusterId([7; 16]), secret: ClusterSecret::generate().unwrap() };
        let (mut disks, mut addresses) = (Vec::new(), Vec::new());
        for id in 1..=u32::from(count) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap());
            let disk = Disk::new(id);
            disk.serve(listener, credentials.clone());
            disks.push(disk);
        }
        let scheme = Scheme { unit_bytes: UNIT as u32, ..Scheme::new(k, m, FailureDomain::Disk).unwrap() };
        let in_map = |disk: &Arc<Disk>, address: &SocketAddr| MapDisk {
            id: disk.id,
            uuid: disk.uuid,
            address: address.to_string(),
            location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
            weight: 1,
            roles: Roles { storage: true, metadata: true },
            state: DiskState::In,
        };
        let slots = disks.iter().take(scheme.width()).map(|disk| GroupSlot::new(disk.id)).collect();
        let map = ClusterMap {
            cluster_id: credentials.cluster,
            epoch: Epoch(1),
            next_disk_id: 100,
            disks: disks.iter().zip(&addresses).map(|(disk, address)| (disk.id, in_map(disk, address))).collect(),
            schemes: BTreeMap::from([("s".to_owned(), scheme)]),
            default_scheme: "s".to_owned(),
            groups: BTreeMap::from([(PlacementGroupId(1), PlacementGroup { scheme: "s".to_owned(), slots })]),
            shards: vec![ShardReplicas { members: vec![DiskId(1)] }; 3],
            slot_shards: deal_hash_slots(2),
        };
        let peers = MemoryPeers::new(&map);
        let (sender, receiver) = watch::channel(Some(Arc::new(map)));
        let timing = Timing { deadline: Duration::from_millis(300), ..Timing::default() };
        let shards = Shards::with_timing(peers.clone(), sender.clone(), Metrics::new().unwrap(), timing);
        let watched = Disks::new(receiver, credentials.clone(), None, quick_disks());
        assert!(watched.wait_ready(Duration::from_secs(10)).await);
        Cluster {
            disks,
            store: ObjectStore::new(watched, settings),
            peers,
            shards,
            map: sender,
            addresses,
            credentials,
        }
    }

    /// Another gateway, which hears of no new map.
    pub async fn stale_gateway(&self) -> ObjectStore {
        let (_, map) = watch::channel(self.map.borrow().clone());
        let watched = Disks::new(map, self.credentials.clone(), None, quick_disks());
        assert!(watched.wait_ready(Duration::from_secs(10)).await);
        ObjectStore::new(watched, self.store.settings().clone())
    }

    /// Changes the map in the root shard, and tells the gateway at once.
    pub fn change_map(&self, change: impl Fn(&mut ClusterMap)) {
        loop {
            let Answer::Map(mut next) = self.peers.query(ShardId::ROOT, &Query::GetMap { newer_than: Epoch(0) }) else {
                panic!("the root shard has a map")
            };
            next.epoch.0 += 1;
            change(&mut next);
            match self.peers.command(ShardId::ROOT, Command::SetMap { map: next.clone() }) {
                Reply::Done => {
                    self.map.send_replace(Some(next.into()));
                    return;
                }
                // The healer ended a move meanwhile.
                Reply::EpochConflict { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn disk(&self, id: DiskId) -> &Arc<Disk> {
        self.disks.iter().find(|disk| disk.id == id).unwrap()
    }

    /// The disk that holds chunk `index`.
    pub fn holder(&self, extent: &ExtentRef, index: u8) -> &Arc<Disk> {
        let map = self.map.borrow().clone().unwrap();
        self.disk(map.groups[&extent.group].slots[extent.slots[usize::from(index)] as usize].current)
    }

    pub fn damage(&self, extent: &ExtentRef, index: u8, block: u32, damage: Damage) {
        self.holder(extent, index).damage.lock().unwrap().insert((chunk_id(extent, index), block), damage);
    }

    pub async fn kill(&self, place: usize) {
        self.disks[place].kill();
        self.until("the disk is seen as down", || self.store.disks().health(self.disks[place].id) == DiskHealth::Down)
            .await;
    }

    pub async fn revive(&self, place: usize) {
        self.revive_at_once(place).await;
        self.until("the disk is up again", || self.store.disks().health(self.disks[place].id) == DiskHealth::Up).await;
    }

    /// Starts a disk node again, whether or not anybody has seen it die.
    pub async fn revive_at_once(&self, place: usize) {
        let listener = loop {
            match TcpListener::bind(self.addresses[place]).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        self.disks[place].serve(listener, self.credentials.clone());
    }

    /// Waits for something that must come about by itself.
    pub async fn until(&self, what: &str, done: impl Fn() -> bool) {
        for _ in 0..1500 {
            if done() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come about that {what}");
    }

    pub fn chunks(&self) -> usize {
        self.disks.iter().map(|disk| disk.count()).sum()
    }

    pub async fn stage(&self, payload: &Bytes, draw: &mut Draw) -> Result<Staged, StageError> {
        self.store.stage(None, OWNER, payload.len() as u64, body(payload, draw)).await
    }

    /// Stages and commits: the chunks stay.
    pub async fn put(&self, payload: &Bytes, draw: &mut Draw) -> ObjectData {
        let staged = self.stage(payload, draw).await.unwrap();
        assert!(staged.missing.is_empty(), "{:?}", staged.missing);
        let data = staged.data.clone();
        staged.committed();
        data
    }

    pub async fn read(&self, data: &ObjectData, range: Range<u64>) -> Result<Bytes, ReadError> {
        let mut reader = self.store.read(data, range);
        reader.open().await?;
        let pieces: Vec<Bytes> = reader.by_ref().try_collect().await?;
        assert_eq!(reader.left_bytes(), 0);
        Ok(pieces.concat().into())
    }

    /// Reads the range and holds it against the payload.
    pub async fn check(&self, data: &ObjectData, payload: &Bytes, range: Range<u64>) {
        let got = self
            .read(data, range.clone())
            .await
            .unwrap_or_else(|error| panic!("{range:?} of {}: {error}", payload.len()));
        let expected = &payload[range.start as usize..range.end as usize];
        assert_eq!(got.len(), expected.len(), "{range:?} of {}", payload.len());
        assert!(got == expected, "wrong bytes in {range:?} of {}", payload.len());
    }
}

pub fn random_range(len: u64, draw: &mut Draw) -> Range<u64> {
    let start = draw.number() % len;
    let longest = if draw.number().is_multiple_of(2) { len - start } else { (len - start).min(5000) };
    start..start + 1 + draw.number() % longest
}

/// All sets of one or two of `width` places.
pub fn losses(width: usize) -> Vec<Vec<usize>> {
    let single = (0..width).map(|a| vec![a]);
    single.chain((0..width).flat_map(move |a| (a + 1..width).map(move |b| vec![a, b]))).collect()
}
