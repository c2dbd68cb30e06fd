//! Hosts in one process over a network that can be cut.

use super::{put, Random};
use bytes::Bytes;
use futures::future::BoxFuture;
use granary_meta::{Answer, Command, MetaRequest, Query, Reply};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::{ClusterMap, Disk, DiskState, Location, Roles, ShardReplicas};
use granary_replica::raft::containment::Containment;
use granary_replica::{HostConfig, MetaHost, PeerTransport, Space, Timing, TransportError, WallClock};
use granary_wire::control::ControlError;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// The network: who runs, and which directions are cut.
#[derive(Default)]
pub struct Network {
    hosts: Mutex<BTreeMap<DiskId, (MetaHost, Handle)>>,
    cut: Mutex<BTreeSet<(DiskId, DiskId)>>,
    displaced: Mutex<BTreeSet<DiskId>>,
    questions: Mutex<BTreeMap<(DiskId, DiskId), usize>>,
    planted: Mutex<BTreeSet<(DiskId, ShardId)>>,
}

impl Network {
    /// The next message that the replica of a shard on that disk sends panics, in the Raft task that sends it.
    pub fn plant_panic(&self, disk: DiskId, shard: ShardId) {
        self.planted.lock().unwrap().insert((disk, shard));
    }

    /// Is it still to come?
    pub fn is_planted(&self, disk: DiskId, shard: ShardId) -> bool {
        self.planted.lock().unwrap().contains(&(disk, shard))
    }

    pub fn cut(&self, a: DiskId, b: DiskId) {
        self.cut.lock().unwrap().extend([(a, b), (b, a)]);
    }

    pub fn cut_one_way(&self, from: DiskId, to: DiskId) {
        self.cut.lock().unwrap().insert((from, to));
    }

    /// Lets another disk answer at this disk's address, or no longer. Its own messages still reach all others.
    pub fn displace(&self, disk: DiskId, is_displaced: bool) {
        let mut displaced = self.displaced.lock().unwrap();
        let _ = if is_displaced { displaced.insert(disk) } else { displaced.remove(&disk) };
    }

    /// How many questions one disk has asked another.
    pub fn questions(&self, from: DiskId, to: DiskId) -> usize {
        self.questions.lock().unwrap().get(&(from, to)).copied().unwrap_or_default()
    }

    pub fn isolate(&self, disk: DiskId, others: &[DiskId]) {
        for other in others {
            if *other != disk {
                self.cut(disk, *other);
            }
        }
    }

    pub fn heal(&self) {
        self.cut.lock().unwrap().clear();
    }
}

/// One disk's end of it.
pub struct Wire {
    pub me: DiskId,
    pub network: Arc<Network>,
}

impl Wire {
    /// Asks the host of disk `to`, if the network lets the question there and the answer back.
    fn ask<T, F>(
        &self,
        to: DiskId,
        ask: impl FnOnce(MetaHost, DiskId) -> F + Send + 'static,
    ) -> BoxFuture<'static, Result<T, TransportError>>
    where
        F: Future<Output = Result<T, ControlError>> + Send + 'static,
        T: Send + 'static,
    {
        let (me, network) = (self.me, self.network.clone());
        *network.questions.lock().unwrap().entry((me, to)).or_default() += 1;
        Box::pin(async move {
            let is_cut = |from, to| network.cut.lock().unwrap().contains(&(from, to));
            if is_cut(me, to) {
                return Err(TransportError::Unreachable("cut".to_owned()));
            }
            let host = network.hosts.lock().unwrap().get(&to).cloned();
            let (host, runtime) = host.ok_or_else(|| TransportError::Unreachable("down".to_owned()))?;
            // What it starts for the question belongs to the one who is asked.
            let answer = runtime.spawn(ask(host, me)).await.map_err(|_| TransportError::Timeout)?;
            let answer = answer.map_err(|error| TransportError::Refused(error.to_string()))?;
            if is_cut(to, me) {
                return Err(TransportError::Timeout);
            }
            Ok(answer)
        })
    }
}

impl PeerTransport for Wire {
    fn raft(
        &self,
        to: DiskId,
        shard: ShardId,
        message: Bytes,
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        let (me, network) = (self.me, self.network.clone());
        let asked = self.ask(to, move |host, me| async move { host.raft(shard, me, message).await });
        Box::pin(async move {
            // Other senders than its tasks may carry its message, too.
            if Containment::current().is_some() && network.planted.lock().unwrap().remove(&(me, shard)) {
                panic!("planted in a Raft task");
            }
            asked.await
        })
    }

    fn raft_batch(
        &self,
        to: DiskId,
        messages: Vec<(ShardId, Bytes)>,
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<Result<Bytes, TransportError>>, TransportError>> {
        self.ask(to, move |host, me| async move {
            let answers = messages.into_iter().map(|(shard, message)| host.raft(shard, me, message));
            let answers = futures::future::join_all(answers).await;
            Ok(answers.into_iter().map(|answer| answer.map_err(|e| TransportError::Refused(e.to_string()))).collect())
        })
    }

    fn link_beat(
        &self,
        to: DiskId,
        message: Bytes,
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        self.ask(to, move |host, me| async move { host.link_beat(me, &message) })
    }

    fn is_displaced(&self, _deadline: Duration) -> BoxFuture<'static, Option<bool>> {
        let is_displaced = self.network.displaced.lock().unwrap().contains(&self.me);
        Box::pin(async move { Some(is_displaced) })
    }
}

/// Free space that metadata do not grow into.
pub const RESERVE_BYTES: u64 = 1 << 30;

pub fn fast() -> Timing {
    Timing {
        heartbeat_ms: 60,
        election_min_ms: 300,
        election_max_ms: 600,
        request_ms: 2_000,
        snapshot_entries: 40,
        keep_entries: 10,
        log_bytes: 64 << 20,
        read_hedge_ms: 10,
        sleep_after_ms: 500,
    }
}

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub network: Arc<Network>,
    pub map: watch::Sender<Option<Arc<ClusterMap>>>,
    pub timing: Timing,
    pub fatal: Arc<Mutex<Vec<String>>>,
    clocks: Mutex<BTreeMap<DiskId, WallClock>>,
    free: Mutex<BTreeMap<DiskId, Arc<AtomicU64>>>,
    /// The numbers on the disks' labels.
    pub labels: Mutex<BTreeMap<DiskId, u64>>,
}

pub fn disk(id: u32) -> DiskId {
    DiskId(id)
}

pub fn map(epoch: u64, shards: Vec<Vec<u32>>) -> ClusterMap {
    let ids: BTreeSet<u32> = shards.iter().flatten().copied().collect();
    let disk = |id: u32| Disk {
        id: DiskId(id),
        uuid: DiskUuid([id as u8; 16]),
        address: format!("127.0.0.1:{id}"),
        location: Location { zone: "z".to_owned(), rack: "r".to_owned(), server: format!("s{id}") },
        weight: 1,
        roles: Roles { storage: true, metadata: true },
        state: DiskState::In,
    };
    ClusterMap {
        cluster_id: ClusterId([1; 16]),
        epoch: Epoch(epoch),
        next_disk_id: 100,
        disks: ids.iter().map(|id| (DiskId(*id), disk(*id))).collect(),
        schemes: BTreeMap::new(),
        default_scheme: "4+2".to_owned(),
        groups: BTreeMap::new(),
        shards: shards
            .into_iter()
            .map(|members| ShardReplicas { members: members.into_iter().map(DiskId).collect() })
            .collect(),
        slot_shards: Vec::new(),
    }
}

impl Cluster {
    pub fn new() -> Cluster {
        Cluster {
            dir: tempfile::tempdir().unwrap(),
            network: Arc::default(),
            map: watch::Sender::new(None),
            timing: fast(),
            fatal: Arc::default(),
            clocks: Mutex::default(),
            free: Mutex::default(),
            labels: Mutex::default(),
        }
    }

    /// How much is free on a disk, in bytes.
    pub fn free(&self, disk: DiskId) -> Arc<AtomicU64> {
        let mut all = self.free.lock().unwrap();
        all.entry(disk).or_insert_with(|| Arc::new(AtomicU64::new(1 << 40))).clone()
    }

    /// The clock of a disk.
    pub fn clock(&self, disk: DiskId) -> WallClock {
        self.clocks.lock().unwrap().entry(disk).or_default().clone()
    }

    pub fn path(&self, id: u32) -> PathBuf {
        self.dir.path().join(format!("disk-{id}"))
    }

    pub async fn start(&self, id: u32) -> MetaHost {
        self.start_on(id, &Handle::current()).await
    }

    /// Starts a host whose tasks run in that runtime.
    pub async fn start_on(&self, id: u32, runtime: &Handle) -> MetaHost {
        let me = DiskId(id);
        let number = self.labels.lock().unwrap().get(&me).copied();
        let (dir, timing, clock) = (self.path(id), self.timing.clone(), self.clock(me));
        let free = self.free(me);
        let free_bytes = Arc::new(move || Ok(free.load(Ordering::Relaxed)));
        let space = Space { reserve_bytes: RESERVE_BYTES, nodes: 1, turns: None, free_bytes };
        let config = HostConfig { dir, disk: me, number, timing, clock, space };
        let fatal = self.fatal.clone();
        let wire = Arc::new(Wire { me, network: self.network.clone() });
        let on_fatal = Arc::new(move |why| fatal.lock().unwrap().push(why));
        let opening = MetaHost::open(config, wire, self.map.subscribe(), on_fatal);
        let host = runtime.spawn(opening).await.unwrap().unwrap();
        self.labels.lock().unwrap().insert(me, host.number());
        self.network.hosts.lock().unwrap().insert(me, (host.clone(), runtime.clone()));
        host
    }

    pub async fn start_all(&self, ids: &[u32]) {
        for id in ids {
            self.start(*id).await;
        }
    }

    pub fn host(&self, id: u32) -> MetaHost {
        self.network.hosts.lock().unwrap().get(&DiskId(id)).cloned().unwrap().0
    }

    /// Takes a host off the network and ends it.
    pub async fn stop(&self, id: u32) {
        let host = self.network.hosts.lock().unwrap().remove(&DiskId(id));
        if let Some((host, _)) = host {
            host.shutdown().await;
        }
    }

    pub async fn stop_all(&self) {
        let ids: Vec<DiskId> = self.network.hosts.lock().unwrap().keys().copied().collect();
        for id in ids {
            self.stop(id.0).await;
        }
    }

    fn running(&self) -> Vec<(DiskId, MetaHost)> {
        self.network.hosts.lock().unwrap().iter().map(|(id, (host, _))| (*id, host.clone())).collect()
    }

    /// Who leads, asked by a linearizable read.
    pub async fn leader(&self, shard: ShardId) -> DiskId {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            for (id, host) in self.running() {
                let leads = host.status().iter().any(|status| status.shard == shard && status.state == "leader");
                if leads && host.query(shard, probe(shard)).await.is_ok() {
                    return id;
                }
            }
            assert!(Instant::now() < until, "no leader: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn statuses(&self) -> Vec<(DiskId, Vec<granary_wire::control::ShardStatus>)> {
        self.running().into_iter().map(|(id, host)| (id, host.status())).collect()
    }

    /// Sends a command as a gateway does: to whoever leads, again under the same id until it is answered.
    pub async fn command(&self, shard: ShardId, request: &MetaRequest) -> Reply {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            for (_, host) in self.running() {
                match host.command(shard, request.clone()).await {
                    Ok(reply) => return reply,
                    Err(
                        ControlError::NotLeader { .. } | ControlError::Unavailable(_) | ControlError::NoSuchShard(_),
                    ) => {}
                    Err(ControlError::Overloaded) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            assert!(Instant::now() < until, "no answer: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn query(&self, shard: ShardId, query: &Query) -> Answer {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            for (_, host) in self.running() {
                if let Ok(answer) = host.query(shard, query.clone()).await {
                    return answer;
                }
            }
            assert!(Instant::now() < until, "no answer: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn put(&self, random: &mut Random, shard: ShardId, key: &str, body: &[u8]) {
        let request = super::request(random, 1, put(1, key, body));
        let reply = self.command(shard, &request).await;
        assert!(matches!(reply, Reply::Put { .. }), "{reply:?}");
    }

    /// Waits until these replicas have applied the same entries, and compares their whole state.
    pub async fn same_state(&self, shard: ShardId, ids: &[u32]) -> u64 {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let mut applied = BTreeSet::new();
            for id in ids {
                let status = self.host(*id).status().into_iter().find(|status| status.shard == shard);
                applied.insert(status.map(|status| (status.applied_index, status.last_log_index)));
            }
            let settled = applied.len() == 1
                && applied.iter().all(|at| at.is_some_and(|(applied, last)| applied == last && applied > 0));
            if settled {
                break;
            }
            assert!(Instant::now() < until, "replicas do not meet: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut hashes = BTreeSet::new();
        for id in ids {
            hashes.insert(self.host(*id).state_hash(shard).await.unwrap());
        }
        assert_eq!(hashes.len(), 1, "replicas of shard {shard} differ");
        hashes.pop_first().unwrap()
    }

    /// Waits until every replica of these disks sleeps.
    pub async fn asleep(&self, ids: &[u32], replicas_each: u64) {
        let until = Instant::now() + Duration::from_secs(30);
        while !ids.iter().all(|id| self.host(*id).counters().replicas_asleep == replicas_each) {
            assert!(Instant::now() < until, "no sleep: {:?}", self.statuses());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Forms a shard on these disks, after the map has named them for it.
    pub async fn init(&self, shard: ShardId, ids: &[u32]) {
        self.name(shard, ids);
        self.try_init(shard, ids).await.unwrap();
    }

    pub async fn try_init(&self, shard: ShardId, ids: &[u32]) -> Result<(), ControlError> {
        let members: Vec<DiskId> = ids.iter().map(|id| DiskId(*id)).collect();
        let (host, runtime) = self.network.hosts.lock().unwrap().get(&DiskId(ids[0])).cloned().unwrap();
        runtime.spawn(async move { host.init_shard(shard, members).await }).await.unwrap()
    }

    /// Makes the map name these disks for a shard, and for those before it that it does not have yet.
    pub fn name(&self, shard: ShardId, ids: &[u32]) {
        let known = self.map.borrow().clone();
        let (epoch, mut shards) = known.map_or((0, Vec::new()), |map| {
            let members = |shard: &ShardReplicas| shard.members.iter().map(|disk| disk.0).collect::<Vec<u32>>();
            (map.epoch.0, map.shards.iter().map(members).collect())
        });
        let number = usize::from(shard.0);
        shards.resize(shards.len().max(number + 1), ids.to_vec());
        shards[number] = ids.to_vec();
        self.map.send_replace(Some(Arc::new(map(epoch + 1, shards))));
    }
}

fn probe(shard: ShardId) -> Query {
    if shard == ShardId::ROOT {
        Query::GetMap { newer_than: Epoch(0) }
    } else {
        Query::ListGarbage { until_ms: 0, after: None, limit: 1 }
    }
}

pub fn noop(random: &mut Random) -> MetaRequest {
    super::request(random, 1, Command::Noop)
}
