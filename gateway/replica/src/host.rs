//! All shard replicas of one metadata disk: opens them, routes commands, queries and Raft messages to them, and keeps their members as
//! the cluster map says.
//!
//! ```text
//! DIR/meta/state       the state database of all shards          DIR/meta/log   the Raft log of all shards
//! DIR/meta/snapshots   snapshot files on their way; what is left there from before is removed at start
//! ```
//! A replica that the map does not name any more is stopped once the shard's leader, asked by it, says that it is no member. Its data
//! stays; should the map name this disk again, it begins from there.

use crate::batching::{LaneCounters, Lanes};
use crate::fatal::{Fatal, OnFatal};
use crate::log::ShardLog;
use crate::message::{decode_message, encode_message, DiskIdentity, PeerRequest, PeerResponse};
use crate::raft::machine::{blocking, ApplyCounters, Machine, MapSender};
use crate::raft::network::{PeerTransport, Peers};
use crate::raft::{Replica, Timing};
use crate::snapshot;
use crate::store::{LogDb, LogWrite, StateDb};
use crate::writer::LogWriter;
use bytes::Bytes;
use granary_meta::answer::answer;
use granary_meta::check::check_level;
use granary_meta::keys::after_prefix;
use granary_meta::kv::StateError;
use granary_meta::{Answer, MetaRequest, Query, Reply, ShardRequest, ShardResponse};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::control::{ControlError, ShardStatus};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{watch, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How often members are compared with the map.
const RECONCILE_EVERY: Duration = Duration::from_millis(500);
/// How many of those rounds pass between two questions of a replica that the map does not name.
const ASK_EVERY_ROUNDS: u64 = 10;
/// How long such a question may take.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// How long a stop waits for what holds the databases.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// Log-database keys that belong to no shard: `0xFFFF | 'I'` the disk's id, `0xFFFF | 'G' | shard` a replica that lives here.
const IDENTITY_KEY: &[u8] = &[0xff, 0xff, b'I'];
const REPLICA_PREFIX: &[u8] = &[0xff, 0xff, b'G'];
/// Version of the value under `'G'`, which has nothing else in it.
const REPLICA_VERSION: u8 = 1;

/// How a host is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    /// Its directory, `DIR/meta`. Made when it is not there.
    pub dir: PathBuf,
    /// The disk it is on; also the Raft node id of its replicas.
    pub disk: DiskId,
    /// Heartbeats, elections, deadlines.
    pub timing: Timing,
}

/// Why a host cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The directory or a thread cannot be made.
    #[error("metadata directory: {0}")]
    Directory(#[from] std::io::Error),
    /// A database cannot be opened: the disk's metadata replicas are lost and come back from their peers under a new disk id.
    #[error(transparent)]
    State(#[from] StateError),
    /// The directory belongs to another disk.
    #[error("metadata directory belongs to disk {found}, not to disk {expected}")]
    OtherDisk {
        /// Whose it is.
        found: DiskId,
        /// Whose it should be.
        expected: DiskId,
    },
}

/// What the replicas of a disk did since they were opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MetaCounters {
    /// Commands taken.
    pub commands: u64,
    /// Log entries they became.
    pub proposals: u64,
    /// Queries taken.
    pub queries: u64,
    /// Read barriers (rounds of heartbeats) they shared.
    pub read_barriers: u64,
    /// Syncs of the Raft log.
    pub log_syncs: u64,
    /// Appends, votes, truncations and purges those made durable; divided by `log_syncs`: the effect of group commit.
    pub log_writes: u64,
    /// Bytes written to the Raft log.
    pub log_bytes: u64,
    /// Log entries applied.
    pub entries_applied: u64,
    /// Requests in them.
    pub requests_applied: u64,
    /// Batches written to the state database.
    pub apply_batches: u64,
    /// Snapshots installed.
    pub snapshots_installed: u64,
}

enum Slot {
    Running(Arc<Lanes>),
    /// Its data cannot be used; the reason.
    Broken(String),
    /// It is no member any more.
    Removed,
}

struct Inner {
    config: HostConfig,
    state: Arc<StateDb>,
    log: Arc<LogDb>,
    writer: Mutex<Option<LogWriter>>,
    writer_thread: Mutex<Option<JoinHandle<()>>>,
    fatal: Fatal,
    peers: Arc<Peers>,
    map: watch::Receiver<Option<Arc<ClusterMap>>>,
    root_map: MapSender,
    slots: Mutex<BTreeMap<ShardId, Slot>>,
    /// One replica is opened at a time.
    opening: tokio::sync::Mutex<()>,
    applies: Arc<ApplyCounters>,
    lanes: Arc<LaneCounters>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All shard replicas of one metadata disk. Cheap to clone.
#[derive(Clone)]
pub struct MetaHost {
    inner: Arc<Inner>,
}

fn bad_request(error: granary_meta::BadBytes) -> ControlError {
    ControlError::BadRequest(error.to_string())
}

fn replica_key(shard: ShardId) -> Vec<u8> {
    [REPLICA_PREFIX, &shard.0.to_be_bytes()].concat()
}

/// Checks or sets whose directory this is. Blocks.
fn check_identity(log: &LogDb, disk: DiskId) -> Result<(), MetaError> {
    match log.get(IDENTITY_KEY)? {
        Some(bytes) => {
            let found = DiskId(granary_meta::codec::decode::<DiskIdentity>(&bytes)?.0);
            if found != disk {
                return Err(MetaError::OtherDisk { found, expected: disk });
            }
        }
        None => log.write_synced(&[LogWrite::Put(
            IDENTITY_KEY.to_vec(),
            granary_meta::codec::encode(&DiskIdentity(disk.0))?,
        )])?,
    }
    Ok(())
}

fn replicas_here(log: &LogDb) -> Result<Vec<ShardId>, StateError> {
    let mut found = Vec::new();
    let end = after_prefix(REPLICA_PREFIX).unwrap_or_default();
    log.scan(REPLICA_PREFIX, &end, |key, _| {
        if let Some(shard) = key.last_chunk::<2>() {
            found.push(ShardId(u16::from_be_bytes(*shard)));
        }
        Ok(true)
    })?;
    Ok(found)
}

/// Removes files of transfers that a stop cut off; an interrupted install keeps its file.
fn clean_snapshots(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with("install-") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl MetaHost {
    /// Opens the databases and starts every replica that lives here. `map` is the newest map the disk node knows; `on_fatal` is told the
    /// first write error and is to end the process. A replica whose data is damaged does not keep the others from running: its status
    /// is `stopped`.
    ///
    /// # Errors
    /// [`MetaError`].
    pub async fn open(
        config: HostConfig,
        peers: Arc<dyn PeerTransport>,
        map: watch::Receiver<Option<Arc<ClusterMap>>>,
        on_fatal: OnFatal,
    ) -> Result<MetaHost, MetaError> {
        let fatal = Fatal::new(on_fatal);
        let snapshot_dir = config.dir.join("snapshots");
        let (dir, disk, opened_fatal, clean_dir) =
            (config.dir.clone(), config.disk, fatal.clone(), snapshot_dir.clone());
        let open = move || -> Result<_, MetaError> {
            std::fs::create_dir_all(&clean_dir)?;
            clean_snapshots(&clean_dir)?;
            let log = Arc::new(LogDb::open(&dir.join("log"))?);
            check_identity(&log, disk)?;
            let state = Arc::new(StateDb::open(&dir.join("state"), opened_fatal.clone())?);
            // The directories themselves must survive a power loss before anything in them is relied on.
            for path in [&dir, &clean_dir] {
                std::fs::File::open(path)?.sync_all()?;
            }
            let (writer, thread) = LogWriter::start(log.clone(), opened_fatal)?;
            let replicas = replicas_here(&log)?;
            Ok((log, state, writer, thread, replicas))
        };
        let opened =
            tokio::task::spawn_blocking(open).await.map_err(|error| std::io::Error::other(error.to_string()))?;
        let (log, state, writer, thread, replicas) = opened?;
        let peers = Arc::new(Peers {
            me: config.disk,
            transport: peers,
            snapshot_dir,
            transfers: AtomicU64::new(1),
            sending: Semaphore::new(1),
            message_deadline: Duration::from_millis(config.timing.election_min_ms),
        });
        let inner = Arc::new(Inner {
            config,
            state,
            log,
            writer: Mutex::new(Some(writer)),
            writer_thread: Mutex::new(Some(thread)),
            fatal,
            peers,
            map,
            root_map: watch::Sender::new(None),
            slots: Mutex::default(),
            opening: tokio::sync::Mutex::new(()),
            applies: Arc::default(),
            lanes: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let host = MetaHost { inner };
        for shard in replicas {
            if let Err(error) = host.open_replica(shard).await {
                tracing::error!(%shard, %error, "replica stays stopped");
            }
        }
        host.inner.tasks.spawn(reconcile_members(host.clone()));
        Ok(host)
    }

    /// The running replica of a shard.
    fn lanes(&self, shard: ShardId) -> Result<Arc<Lanes>, ControlError> {
        self.inner.fatal.check().map_err(ControlError::Disk)?;
        match lock(&self.inner.slots).get(&shard) {
            Some(Slot::Running(lanes)) => Ok(lanes.clone()),
            Some(Slot::Broken(why)) => Err(ControlError::Disk(why.clone())),
            Some(Slot::Removed) | None => Err(ControlError::NoSuchShard(shard)),
        }
    }

    /// The running replica of a shard; made, empty, when there is none.
    async fn open_replica(&self, shard: ShardId) -> Result<Arc<Lanes>, ControlError> {
        let inner = &self.inner;
        let _one = inner.opening.lock().await;
        match self.lanes(shard) {
            Err(ControlError::NoSuchShard(_)) => {}
            known => return known,
        }
        let writer = lock(&inner.writer).clone().ok_or_else(|| ControlError::Unavailable("stopping".to_owned()))?;
        writer
            .write(vec![LogWrite::Put(replica_key(shard), vec![REPLICA_VERSION])])
            .await
            .map_err(ControlError::Disk)?;
        let (log, state, dir) = (inner.log.clone(), inner.state.clone(), inner.peers.snapshot_dir.clone());
        let map = (shard == ShardId::ROOT).then(|| inner.root_map.clone());
        let applies = inner.applies.clone();
        let opened = tokio::task::spawn_blocking(move || -> std::io::Result<(ShardLog, Machine)> {
            let machine = Machine::open(shard, state.clone(), dir, map, applies)?;
            Ok((ShardLog::open(shard, log, writer, state)?, machine))
        });
        let opened = match opened.await {
            Ok(Ok((log, machine))) => {
                Replica::open(inner.peers.clone(), inner.config.timing.clone(), log, machine).await
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let slot = match opened {
            Ok(replica) => {
                let replica = Arc::new(replica);
                replica.elect_if_alone().await;
                let lanes = Lanes::start(replica, inner.lanes.clone(), &inner.tasks, inner.stop.child_token());
                Slot::Running(Arc::new(lanes))
            }
            Err(why) => Slot::Broken(why),
        };
        lock(&inner.slots).insert(shard, slot);
        self.lanes(shard)
    }

    /// Makes this disk the first of a new shard with these members, itself among them. Repeated, it does nothing.
    ///
    /// # Errors
    /// BadRequest when this disk is no member; Unavailable; Disk.
    pub async fn init_shard(&self, shard: ShardId, members: Vec<DiskId>) -> Result<(), ControlError> {
        if !members.contains(&self.inner.config.disk) || shard.0 == u16::MAX {
            return Err(ControlError::BadRequest(format!(
                "disk {} is no member of shard {shard}",
                self.inner.config.disk
            )));
        }
        let lanes = self.open_replica(shard).await?;
        lanes.replica.initialize(&members).await
    }

    /// Does what the bytes of a [`ShardRequest`] ask, and gives the bytes of the [`ShardResponse`].
    ///
    /// # Errors
    /// As [`MetaHost::command`] and [`MetaHost::query`]; BadRequest for bytes that are no request.
    pub async fn serve(&self, shard: ShardId, request: &[u8]) -> Result<Bytes, ControlError> {
        let response = match ShardRequest::decode(request).map_err(bad_request)? {
            ShardRequest::Command(request) => ShardResponse::Reply(self.command(shard, request).await?),
            ShardRequest::Query(query) => ShardResponse::Answer(self.query(shard, query).await?),
        };
        response.encode().map_err(bad_request)
    }

    /// Applies a command: returns when a majority has it on disk and it was applied here.
    ///
    /// # Errors
    /// [`ControlError`]. After Unavailable the command may have been applied: retry it under the same request id.
    pub async fn command(&self, shard: ShardId, request: MetaRequest) -> Result<Reply, ControlError> {
        check_level(&request.command).map_err(ControlError::BadRequest)?;
        self.lanes(shard)?.command(request).await
    }

    /// Answers a query from a state that includes every command acknowledged before this call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, ControlError> {
        self.lanes(shard)?.read_barrier().await?;
        let state = &self.inner.state;
        // A point read is mostly in memory; a scan may wait for the disk and makes room for other tasks first.
        let answer = match &query {
            Query::GetObject { .. }
            | Query::GetBucket { .. }
            | Query::BucketUsage { .. }
            | Query::CompletedUpload { .. } => answer(shard, &state.view(), &query),
            _ => blocking(|| answer(shard, &state.view(), &query)),
        };
        answer.map_err(|error| ControlError::Disk(error.to_string()))
    }

    fn newest_map(&self) -> Option<Arc<ClusterMap>> {
        let known = self.inner.map.borrow().clone();
        let applied = self.inner.root_map.borrow().clone();
        match (known, applied) {
            (Some(known), Some(applied)) if applied.epoch > known.epoch => Some(applied),
            (Some(known), _) => Some(known),
            (None, applied) => applied,
        }
    }

    fn named_by(&self, map: &ClusterMap, shard: ShardId) -> bool {
        map.shards.get(usize::from(shard.0)).is_some_and(|replicas| replicas.members.contains(&self.inner.config.disk))
    }

    /// Takes a message of another replica, authenticated by the caller, and gives the answer. Makes an empty replica for a shard that
    /// is not here when the map names this disk for it, or no map is known yet.
    ///
    /// # Errors
    /// NoSuchShard; BadRequest for bytes that are no message; Disk.
    pub async fn raft(&self, shard: ShardId, from: DiskId, message: Bytes) -> Result<Bytes, ControlError> {
        let request: PeerRequest = decode_message(&message).map_err(bad_request)?;
        let lanes = match self.lanes(shard) {
            Err(ControlError::NoSuchShard(_)) if request != PeerRequest::Members && shard.0 != u16::MAX => {
                if self.newest_map().is_some_and(|map| !self.named_by(&map, shard)) {
                    return Err(ControlError::NoSuchShard(shard));
                }
                self.open_replica(shard).await?
            }
            known => known?,
        };
        let response: PeerResponse = lanes.replica.handle(from, request).await;
        encode_message(&response).map_err(bad_request)
    }

    /// How the replicas here stand.
    pub fn status(&self) -> Vec<ShardStatus> {
        let stopped = |shard: ShardId| ShardStatus {
            shard,
            state: "stopped".to_owned(),
            term: 0,
            leader: None,
            last_log_index: 0,
            applied_index: 0,
            voters: Vec::new(),
        };
        lock(&self.inner.slots)
            .iter()
            .filter_map(|(shard, slot)| match slot {
                Slot::Running(lanes) => Some(lanes.replica.status()),
                Slot::Broken(_) => Some(stopped(*shard)),
                Slot::Removed => None,
            })
            .collect()
    }

    /// The map as applied in the root replica here, if there is one.
    pub fn root_map(&self) -> watch::Receiver<Option<Arc<ClusterMap>>> {
        self.inner.root_map.subscribe()
    }

    /// What the replicas did since they were opened.
    pub fn counters(&self) -> MetaCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (lanes, applies) = (&self.inner.lanes, &self.inner.applies);
        let writer = lock(&self.inner.writer).as_ref().map(|writer| writer.counters.clone()).unwrap_or_default();
        MetaCounters {
            commands: read(&lanes.requests),
            proposals: read(&lanes.entries),
            queries: read(&lanes.reads),
            read_barriers: read(&lanes.barriers),
            log_syncs: read(&writer.syncs),
            log_writes: read(&writer.jobs),
            log_bytes: read(&writer.bytes),
            entries_applied: read(&applies.entries),
            requests_applied: read(&applies.requests),
            apply_batches: read(&applies.batches),
            snapshots_installed: read(&applies.installs),
        }
    }

    /// Digest of a shard's whole state here: equal on replicas that applied the same entries. Reads everything; for tests and audits.
    ///
    /// # Errors
    /// Disk.
    pub async fn state_hash(&self, shard: ShardId) -> Result<u64, ControlError> {
        let state = self.inner.state.clone();
        let hash = tokio::task::spawn_blocking(move || snapshot::state_hash(&state.view(), shard)).await;
        hash.map_err(|error| ControlError::Unavailable(error.to_string()))?
            .map_err(|error| ControlError::Disk(error.to_string()))
    }

    /// Makes a shard's state durable here and lets its log be purged, as happens by itself every [`Timing::snapshot_entries`].
    ///
    /// # Errors
    /// NoSuchShard; Disk.
    pub async fn snapshot_shard(&self, shard: ShardId) -> Result<(), ControlError> {
        self.lanes(shard)?.replica.trigger_snapshot().await;
        Ok(())
    }

    /// Ends all tasks and makes the state durable. The databases close when the last clone is dropped.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        inner.stop.cancel();
        let running: Vec<Arc<Lanes>> = {
            let slots = std::mem::take(&mut *lock(&inner.slots));
            slots
                .into_values()
                .filter_map(|slot| if let Slot::Running(lanes) = slot { Some(lanes) } else { None })
                .collect()
        };
        for lanes in &running {
            lanes.replica.shutdown().await;
        }
        drop(running);
        inner.tasks.close();
        inner.tasks.wait().await;
        let state = inner.state.clone();
        let flushed = tokio::task::spawn_blocking(move || state.flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!(?flushed, "metadata state was not flushed at the stop; the Raft log has it");
        }
        drop(lock(&inner.writer).take());
        let thread = lock(&inner.writer_thread).take();
        let until = tokio::time::Instant::now() + STOP_WAIT;
        if let Some(thread) = thread {
            while !thread.is_finished() && tokio::time::Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// Keeps the members of led shards as the map says, stops replicas that are no members any more, and keeps logs short. Ends with the host.
async fn reconcile_members(host: MetaHost) {
    let stop = host.inner.stop.clone();
    let mut round = 0u64;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RECONCILE_EVERY) => {}
        }
        round += 1;
        let map = host.newest_map();
        let running: Vec<(ShardId, Arc<Lanes>)> = {
            let slots = lock(&host.inner.slots);
            let running = |(shard, slot): (&ShardId, &Slot)| match slot {
                Slot::Running(lanes) => Some((*shard, lanes.clone())),
                _ => None,
            };
            slots.iter().filter_map(running).collect()
        };
        for (shard, lanes) in running {
            let work = async {
                lanes.replica.hand_over_long_log().await;
                if let Some(map) = &map {
                    reconcile_shard(&host, map, shard, &lanes, round).await;
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = work => {}
            }
        }
    }
}

async fn reconcile_shard(host: &MetaHost, map: &ClusterMap, shard: ShardId, lanes: &Lanes, round: u64) {
    let Some(wanted) = map.shards.get(usize::from(shard.0)) else { return };
    if lanes.replica.is_leader() {
        let step = lanes.replica.reconcile(&wanted.members);
        match tokio::time::timeout(Duration::from_secs(5), step).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%shard, %error, "members not changed yet"),
            Err(_) => tracing::warn!(%shard, "changing members takes long"),
        }
        return;
    }
    if host.named_by(map, shard) || !round.is_multiple_of(ASK_EVERY_ROUNDS) {
        return;
    }
    let me = host.inner.config.disk;
    for member in &wanted.members {
        let answer = host.inner.peers.ask(*member, shard, &PeerRequest::Members, ASK_DEADLINE).await;
        if let Ok(PeerResponse::Members { leads: true, membership }) = answer {
            if !membership.nodes.is_empty() && !membership.nodes.contains(&u64::from(me.0)) {
                tracing::info!(%shard, "this replica is no member any more; stopping it, its data stays");
                lanes.stop.cancel();
                lanes.replica.shutdown().await;
                lock(&host.inner.slots).insert(shard, Slot::Removed);
            }
            return;
        }
    }
}
