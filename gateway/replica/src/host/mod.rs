//! All shard replicas of one metadata disk: opens them, routes commands, queries and Raft messages to them, and keeps
//! their members as the cluster map says.
//!
//! ```text
//! DIR/meta/state       the state database of all shards          DIR/meta/log   the Raft log of all shards
//! DIR/meta/snapshots   snapshot files on their way; what is left there from before is removed at start
//! ```
//! A replica that the map does not name any more is stopped once the shard's leader, asked by it, says that it is no
//! member. Its data stays; should the map name this disk again, it begins from there. One that a panic ended is opened
//! again after a pause (`failures.rs`), unless it is no member either.

mod durable;
mod failures;
mod identity;
mod links;
mod reclaim;
mod reconcile;
mod replicas;
#[cfg(test)]
mod tests;

use crate::batching::{BatchCounters, Batcher};
use crate::clock::{ahead_ms, is_agreed, off_by, OtherClocks, WallClock, MAX_OFF_MS};
use crate::counters::MetaCounters;
use crate::fatal::{Fatal, OnFatal};
use crate::message::{decode_message, encode_message, MetadataIdentity, ReplicaId};
use crate::raft::heartbeats::Heartbeats;
use crate::raft::machine::{blocking, ApplyCounters, MapSender};
use crate::raft::members::{out_of_service, Phase};
use crate::raft::network::{PeerTransport, Peers};
use crate::raft::{Replica, Timing};
use crate::room::{Room, Space};
use crate::sleep::{Facts, Rest, SleepTiming};
use crate::snapshot;
use crate::store::lock;
use crate::store::{Buffers, LogDb, StateDb, Wait};
use crate::writer::LogWriter;
use bytes::Bytes;
use failures::Failures;
use granary_meta::answer::answer;
use granary_meta::apply::is_kept;
use granary_meta::check::check_level;
use granary_meta::kv::StateError;
use granary_meta::level::{level_of, FIRST_FEATURE_LEVEL};
use granary_meta::nature::TakenBy;
use granary_meta::{Answer, Command, MetaRequest, Query, Reply, ShardRequest, ShardResponse};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::control::{ControlError, ShardStatus};
use granary_wire::LogPace;
use identity::{identify, replicas_here};
use links::Links;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{watch, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a stop waits for what holds the databases.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// For how long a clock that was told counts. Clocks drift little; whoever leads hears of a majority all the time.
const CLOCK_COUNTS: Duration = Duration::from_secs(300);
/// Longest heartbeat of a link, in bytes: all shards that a cluster can have, both ways, fit in.
const MAX_BEAT_BYTES: usize = 512 * 1024;

/// How a host is set up.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Its directory, `DIR/meta`. Made when it is not there.
    pub dir: PathBuf,
    /// The disk it is on.
    pub disk: DiskId,
    /// The number of the directory, as the disk's label has it; None when it has none yet. See [`MetaHost::number`].
    pub number: Option<u64>,
    /// Heartbeats, elections, deadlines.
    pub timing: Timing,
    /// What stamps commands.
    pub clock: WallClock,
    /// The file system that the directory is on.
    pub space: Space,
}

/// Why a host cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The directory or a thread cannot be made.
    #[error("metadata directory: {0}")]
    Directory(#[from] std::io::Error),
    /// A database cannot be opened.
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
    /// The directory is not the one that the disk's label knows: an older one, perhaps, or a copy.
    #[error("metadata directory {found:016x} is not the one on this disk's label, {expected:016x}: put that one back; or, if this is the right one, write its number as `metadata` into label.json")]
    OtherDirectory {
        /// The number in it.
        found: u64,
        /// The number on the label.
        expected: u64,
    },
}

impl MetaError {
    /// Is what lies there damaged, so that trying again is of no use? What another release wrote is not.
    pub fn is_damage(&self) -> bool {
        // RocksDB's own word for it begins its messages.
        matches!(self, MetaError::State(StateError::Database(why)) if why.starts_with("Corruption"))
    }
}

enum ReplicaState {
    Running(Arc<Batcher>),
    /// Its data cannot be used.
    Broken {
        /// Which it is, if that can be read.
        id: Option<ReplicaId>,
        /// The reason.
        why: String,
    },
    /// A panic ended it, or an error of its storage; it is opened again after a pause.
    Failed {
        /// Which it is.
        id: ReplicaId,
        /// The reason.
        why: String,
    },
    /// It is no member any more, and its tasks may not have ended yet: another one on its log would be one too many.
    Ending,
    /// It is no member any more.
    Removed,
}

impl ReplicaState {
    /// None for one that is no member.
    fn phase(&self) -> Option<Phase> {
        match self {
            ReplicaState::Running(batcher) => Some(batcher.replica.phase()),
            ReplicaState::Broken { .. } => Some(Phase::Stopped),
            ReplicaState::Failed { .. } => Some(Phase::Failed),
            ReplicaState::Ending | ReplicaState::Removed => None,
        }
    }

    /// Which it is, of one that does not run but should.
    fn id(&self) -> Option<ReplicaId> {
        match self {
            ReplicaState::Failed { id, .. } => Some(*id),
            ReplicaState::Broken { id, .. } => *id,
            ReplicaState::Running(_) | ReplicaState::Ending | ReplicaState::Removed => None,
        }
    }
}

struct Inner {
    config: HostConfig,
    identity: MetadataIdentity,
    state: Arc<StateDb>,
    log: Arc<LogDb>,
    writer: Mutex<Option<LogWriter>>,
    writer_thread: Mutex<Option<JoinHandle<()>>>,
    fatal: Fatal,
    peers: Arc<Peers>,
    map: watch::Receiver<Option<Arc<ClusterMap>>>,
    root_map: MapSender,
    replicas: Mutex<BTreeMap<ShardId, ReplicaState>>,
    /// One replica is opened at a time.
    opening: tokio::sync::Mutex<()>,
    applies: Arc<ApplyCounters>,
    /// Damaged replicas that began anew.
    rebuilt: AtomicU64,
    failures: Failures,
    batches: Arc<BatchCounters>,
    links: Links,
    clocks: OtherClocks,
    room: Room,
    /// Most that a merge writes before what it replaces goes, in bytes.
    step_bytes: u64,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// All shard replicas of one metadata disk. Cheap to clone.
#[derive(Clone)]
pub struct MetaHost {
    inner: Arc<Inner>,
}

fn bad_request(error: granary_meta::BadBytes) -> ControlError {
    ControlError::BadRequest(error.to_string())
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
    /// Opens the databases and starts every replica that lives here. `map` is the newest map the disk node knows;
    /// `on_fatal` is told the first write error and is to end the process. A replica whose data is damaged does not
    /// keep the others from running: its status is `stopped`.
    ///
    /// # Errors
    /// [`MetaError`].
    pub async fn open(
        config: HostConfig,
        transport: Arc<dyn PeerTransport>,
        map: watch::Receiver<Option<Arc<ClusterMap>>>,
        on_fatal: OnFatal,
    ) -> Result<MetaHost, MetaError> {
        let fatal = Fatal::new(on_fatal);
        let snapshot_dir = config.dir.join("snapshots");
        let (dir, disk, on_label) = (config.dir.clone(), config.disk, config.number);
        let buffers = Buffers::within(config.space.share_bytes());
        let room = Room::new(config.space.clone(), buffers.memory_bytes());
        let by_itself = !config.space.is_full();
        let (opened_fatal, clean_dir) = (fatal.clone(), snapshot_dir.clone());
        let open = move || -> Result<_, MetaError> {
            std::fs::create_dir_all(&clean_dir)?;
            clean_snapshots(&clean_dir)?;
            let log = Arc::new(LogDb::open_with(&dir.join("log"), &buffers, by_itself)?);
            let identity = identify(&log, disk, on_label)?;
            let state = Arc::new(StateDb::open_with(&dir.join("state"), opened_fatal.clone(), &buffers, by_itself)?);
            // The directories themselves must survive a power loss before anything in them is relied on.
            for path in [&dir, &clean_dir] {
                std::fs::File::open(path)?.sync_all()?;
            }
            let (writer, thread) = LogWriter::start(log.clone(), opened_fatal)?;
            let replicas = replicas_here(&log)?;
            Ok((log, identity, state, writer, thread, replicas))
        };
        let opened =
            tokio::task::spawn_blocking(open).await.map_err(|error| std::io::Error::other(error.to_string()))?;
        let (log, identity, state, writer, thread, replicas) = opened?;
        if let Some(lost) = identity.replaces.filter(|lost| on_label == Some(*lost)) {
            tracing::error!(
                lost = format!("{lost:016x}"),
                "the metadata of this disk are gone; its replicas begin anew, empty, and learn from the others"
            );
        }
        let message_deadline = Duration::from_millis(config.timing.election_min_ms);
        let peers = Arc::new(Peers {
            transport: transport.clone(),
            space: config.space.clone(),
            heard: Mutex::default(),
            complaints: LogPace::default(),
            snapshot_dir,
            transfers: AtomicU64::new(1),
            sending: Semaphore::new(1),
            heartbeats: Heartbeats::new(transport.clone(), config.timing.heartbeat_window(), message_deadline),
            message_deadline,
        });
        let sleep = SleepTiming {
            after: Duration::from_millis(config.timing.sleep_after_ms),
            lost: config.timing.link_beat() * 2,
        };
        let clocks = OtherClocks::new(CLOCK_COUNTS);
        let inner = Arc::new(Inner {
            config,
            identity,
            state,
            log,
            writer: Mutex::new(Some(writer)),
            writer_thread: Mutex::new(Some(thread)),
            fatal,
            peers,
            map,
            root_map: watch::Sender::new(None),
            replicas: Mutex::default(),
            opening: tokio::sync::Mutex::new(()),
            applies: Arc::default(),
            rebuilt: AtomicU64::new(0),
            failures: Failures::default(),
            batches: Arc::default(),
            links: Links::new(sleep),
            clocks,
            room,
            step_bytes: buffers.step_bytes(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let host = MetaHost { inner };
        for shard in replicas {
            if let Err(error) = host.open_replica(shard).await {
                tracing::error!(%shard, %error, "replica stays stopped");
            }
        }
        host.inner.tasks.spawn(reconcile::run(host.clone()));
        host.inner.tasks.spawn(links::run(host.clone()));
        host.inner.tasks.spawn(links::look_at_home(host.clone()));
        host.inner.tasks.spawn(reclaim::run(host.clone(), by_itself));
        Ok(host)
    }

    /// The number of the directory, which belongs on the disk's label: a label with a number and no directory tells of
    /// one that was lost.
    pub fn number(&self) -> u64 {
        self.inner.identity.number
    }

    /// The running replica of a shard.
    fn batcher(&self, shard: ShardId) -> Result<Arc<Batcher>, ControlError> {
        self.inner.fatal.check().map_err(ControlError::Disk)?;
        match lock(&self.inner.replicas).get(&shard) {
            Some(ReplicaState::Running(batcher)) => {
                batcher.replica.check()?;
                Ok(batcher.clone())
            }
            Some(ReplicaState::Broken { why, .. }) => Err(ControlError::Disk(why.clone())),
            Some(ReplicaState::Failed { why, .. }) => Err(ControlError::Unavailable(why.clone())),
            Some(ReplicaState::Ending) => Err(replicas::unavailable("the replica that was here is ending")),
            Some(ReplicaState::Removed) | None => Err(ControlError::NoSuchShard(shard)),
        }
    }

    /// Does what the bytes of a [`ShardRequest`] ask, and gives the bytes of the [`ShardResponse`].
    ///
    /// # Errors
    /// As [`MetaHost::command`] and [`MetaHost::query`]; BadRequest for bytes that are no request.
    pub async fn serve(&self, shard: ShardId, request: &[u8]) -> Result<Bytes, ControlError> {
        let response = match ShardRequest::decode(request).map_err(bad_request)? {
            ShardRequest::Command(mut request) => {
                self.stamp(shard, &mut request)?;
                if let Some(refusal) = self.too_few_chunks(shard, &request)? {
                    return refusal?.encode().map_err(bad_request);
                }
                ShardResponse::Reply(self.command(shard, request).await?)
            }
            ShardRequest::Query(query) => ShardResponse::Answer(self.query(shard, query).await?),
        };
        response.encode().map_err(bad_request)
    }

    /// Puts this disk's clock on a command that a gateway sent, if it may: see [`crate::clock`].
    fn stamp(&self, shard: ShardId, request: &mut MetaRequest) -> Result<(), ControlError> {
        let status = self.batcher(shard)?.replica.status();
        let now_ms = self.inner.config.clock.now_ms();
        self.inner.clocks.look(now_ms);
        if !is_agreed(status.voters.len(), &self.ahead_of(&status)) {
            return Err(ControlError::NotLeader { leader: None });
        }
        let ahead_ms = ahead_ms(request.stamp_ms.unwrap_or_default(), now_ms);
        if status.leader == Some(self.inner.config.disk) && ahead_ms.unsigned_abs() > MAX_OFF_MS.unsigned_abs() {
            return Err(ControlError::ClockOff { ahead_ms });
        }
        request.stamp_ms = Some(now_ms);
        Ok(())
    }

    /// The leader's refusal of a payload that would not bear the loss of a failure domain: see [`durable`].
    fn too_few_chunks(
        &self,
        shard: ShardId,
        request: &MetaRequest,
    ) -> Result<Option<Result<ShardResponse, ControlError>>, ControlError> {
        // Most commands place nothing.
        let Some(payload) = request.command.nature().payload.filter(|payload| !payload.extents.is_empty()) else {
            return Ok(None);
        };
        let batcher = self.batcher(shard)?;
        if !batcher.replica.is_leader() {
            return Ok(None);
        }
        let Some(refusal) = self.newest_map().and_then(|map| durable::refusal(&map, &payload)) else {
            return Ok(None);
        };
        let kept = batcher.replica.contain(|| is_kept(shard, &self.inner.state.view(), &request.request_id))?;
        Ok((!kept.map_err(|error| ControlError::Disk(error.to_string()))?).then_some(refusal))
    }

    /// How far this disk's clock is ahead of those of a shard's other voters, as far as they were heard of.
    fn ahead_of(&self, status: &ShardStatus) -> Vec<i64> {
        let others = status.voters.iter().filter(|voter| **voter != self.inner.config.disk);
        others.filter_map(|voter| self.inner.clocks.ahead_of(*voter)).collect()
    }

    /// How far this disk's clock is ahead of the median of a shard's voters, when that is too far.
    fn clock_off(&self, status: &ShardStatus) -> Option<i64> {
        off_by(status.voters.len(), &self.ahead_of(status))
    }

    /// Applies a command: returns when a majority has it on disk and it was applied here.
    ///
    /// # Errors
    /// [`ControlError`]. After Unavailable the command may have been applied: retry it under the same request id.
    pub async fn command(&self, shard: ShardId, request: MetaRequest) -> Result<Reply, ControlError> {
        let level = match &request.command {
            Command::SetMap { .. } => self.level(shard)?,
            _ => FIRST_FEATURE_LEVEL,
        };
        check_level(&request.command, level).map_err(ControlError::BadRequest)?;
        let batcher = self.batcher(shard)?;
        let nature = request.command.nature();
        let room = &self.inner.room;
        if room.is_low()
            && (room.is_out() || nature.taken_by == TakenBy::Objects && nature.lease.is_none())
            && batcher.replica.is_leader()
        {
            return Err(ControlError::NoRoom { disk: self.inner.config.disk });
        }
        if room.any_full() && nature.grows && batcher.replica.is_leader() {
            let voters = batcher.replica.status().voters;
            let full = room.full_one_of(self.inner.config.disk, voters.into_iter(), Instant::now());
            if let Some(disk) = full {
                return Err(ControlError::NoRoom { disk });
            }
        }
        batcher.command(request).await
    }

    /// The feature level of a shard as far as it was applied here; the first one when there is no replica of it.
    ///
    /// # Errors
    /// [`ControlError::Disk`] when it cannot be read.
    pub fn level(&self, shard: ShardId) -> Result<u32, ControlError> {
        level_of(&self.inner.state.view(), shard).map_err(|error| ControlError::Disk(error.to_string()))
    }

    /// Answers a query from a state that includes every command acknowledged before this call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, ControlError> {
        let batcher = self.batcher(shard)?;
        batcher.read_barrier().await?;
        let state = &self.inner.state;
        let look = |wait| {
            batcher.replica.contain(|| -> Result<_, StateError> {
                let view = state.view_by(wait);
                let found = answer(shard, &view, &query)?;
                Ok((found, snapshot::is_being_replaced(&view, shard)?))
            })
        };
        // A point read is mostly in memory. What may wait for the disk, or is long, makes room for other tasks first.
        let point = matches!(
            &query,
            Query::GetObject { .. }
                | Query::GetBucket { .. }
                | Query::BucketUsage { .. }
                | Query::CompletedUpload { .. }
        );
        let found = match point.then(|| look(Wait::Never)) {
            None | Some(Ok(Err(StateError::WouldWait))) => blocking(|| look(Wait::Allowed))?,
            Some(found) => found?,
        };
        // Much may have happened since the barrier, when this process was paused: what a failed replica found confirmed
        // need not be so, one that was let go has lost its state, and one that fell far behind gets another's.
        if !Arc::ptr_eq(&self.batcher(shard)?, &batcher) {
            return Err(replicas::unavailable("the replica has changed meanwhile"));
        }
        match found.map_err(|error| ControlError::Disk(error.to_string()))? {
            (_, true) => Err(replicas::unavailable("the state of the replica is being replaced")),
            (answer, false) => Ok(answer),
        }
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

    /// The running replicas.
    fn running(&self) -> Vec<(ShardId, Arc<Batcher>)> {
        let running = |(shard, replica): (&ShardId, &ReplicaState)| match replica {
            ReplicaState::Running(batcher) => Some((*shard, batcher.clone())),
            _ => None,
        };
        lock(&self.inner.replicas).iter().filter_map(running).collect()
    }

    /// Shards whose replica here has data that cannot be used.
    fn broken(&self) -> Vec<ShardId> {
        let is_broken = |replica: &ReplicaState| matches!(replica, ReplicaState::Broken { .. });
        lock(&self.inner.replicas).iter().filter(|(_, replica)| is_broken(replica)).map(|(shard, _)| *shard).collect()
    }

    fn facts(&self) -> Vec<Facts> {
        self.running().iter().map(|(_, batcher)| batcher.replica.facts()).collect()
    }

    /// Takes the heartbeat of the link to another disk, authenticated by the caller, and gives this end's. See
    /// [`crate::sleep`].
    ///
    /// # Errors
    /// BadRequest for bytes that are no heartbeat; Disk when this disk failed.
    pub fn link_beat(&self, from: DiskId, message: &[u8]) -> Result<Bytes, ControlError> {
        self.inner.fatal.check().map_err(ControlError::Disk)?;
        if message.len() > MAX_BEAT_BYTES {
            return Err(ControlError::BadRequest(format!("a heartbeat of {} bytes", message.len())));
        }
        let beat = decode_message(message).map_err(bad_request)?;
        encode_message(&links::answer(self, from, &beat)).map_err(bad_request)
    }

    /// How the replicas here stand.
    pub fn status(&self) -> Vec<ShardStatus> {
        lock(&self.inner.replicas)
            .iter()
            .filter_map(|(shard, replica)| match replica {
                ReplicaState::Running(batcher) => Some(batcher.replica.status()),
                replica => replica.phase().map(|phase| out_of_service(*shard, phase)),
            })
            .collect()
    }

    /// How many replicas do not run that should, and how many have not ended that should.
    fn stopped(&self) -> usize {
        let replicas = lock(&self.inner.replicas);
        let is_stopped = |replica: &&ReplicaState| match replica {
            ReplicaState::Ending => true,
            replica => replica.phase().is_some_and(|phase| !phase.runs()),
        };
        replicas.values().filter(is_stopped).count()
    }

    /// The map as applied in the root replica here, if there is one.
    pub fn root_map(&self) -> watch::Receiver<Option<Arc<ClusterMap>>> {
        self.inner.root_map.subscribe()
    }

    /// What the replicas did since they were opened.
    pub fn counters(&self) -> MetaCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (batches, applies) = (&self.inner.batches, &self.inner.applies);
        let writer = lock(&self.inner.writer).as_ref().map(|writer| writer.counters.clone()).unwrap_or_default();
        let heartbeats = &self.inner.peers.heartbeats.counters;
        MetaCounters {
            commands: read(&batches.requests),
            proposals: read(&batches.entries),
            queries: read(&batches.reads),
            read_barriers: read(&batches.barriers),
            late_barriers: read(&heartbeats.late_barriers),
            log_syncs: read(&writer.syncs),
            log_writes: read(&writer.jobs),
            log_bytes: read(&writer.bytes),
            entries_applied: read(&applies.entries),
            requests_applied: read(&applies.requests),
            apply_batches: read(&applies.batches),
            apply_waits: read(&applies.waited),
            snapshots_installed: read(&applies.installs),
            heartbeats: read(&heartbeats.heartbeats),
            heartbeat_messages: read(&heartbeats.messages),
            link_beats: read(&self.inner.links.beats),
            is_full: self.inner.room.is_full(),
            is_displaced: self.inner.links.is_displaced(),
            log_kept_bytes: self.running().iter().map(|(_, batcher)| batcher.replica.log_bytes()).sum(),
            replicas_stopped: self.stopped() as u64,
            replica_failures: self.inner.failures.total(),
            replicas_rebuilt: read(&self.inner.rebuilt),
            replicas_asleep: self.facts().iter().filter(|facts| facts.rest != Rest::Awake).count() as u64,
        }
    }

    /// Digest of a shard's whole state here: equal on replicas that applied the same entries. Reads everything; for
    /// tests and audits.
    ///
    /// # Errors
    /// Disk.
    pub async fn state_hash(&self, shard: ShardId) -> Result<u64, ControlError> {
        let state = self.inner.state.clone();
        let hash = tokio::task::spawn_blocking(move || snapshot::state_hash(&state.view(), shard)).await;
        hash.map_err(|error| ControlError::Unavailable(error.to_string()))?
            .map_err(|error| ControlError::Disk(error.to_string()))
    }

    /// Ends the replicas. What blocks for longer than a stop may take is left to itself.
    async fn end_replicas(&self) {
        let replicas = std::mem::take(&mut *lock(&self.inner.replicas));
        let running = replicas.into_values().filter_map(|replica| match replica {
            ReplicaState::Running(batcher) => Some(batcher),
            _ => None,
        });
        let ends = running.map(|batcher| async move { self.end(&batcher.replica).await });
        futures::future::join_all(ends).await;
    }

    /// Ends a replica; false when it has not ended in time once the host is stopping.
    async fn end(&self, replica: &Replica) -> bool {
        let too_late = async {
            self.inner.stop.cancelled().await;
            tokio::time::sleep(STOP_WAIT).await;
        };
        tokio::select! {
            () = replica.shutdown() => true,
            () = too_late => {
                tracing::warn!(shard = %replica.shard, "a metadata replica did not end in time");
                false
            }
        }
    }

    /// Ends all tasks, also those that open a replica, and makes the state durable. The databases close when the last
    /// clone is dropped. What hangs is waited for by a bounded time.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        inner.stop.cancel();
        self.end_replicas().await;
        inner.tasks.close();
        if tokio::time::timeout(STOP_WAIT, inner.tasks.wait()).await.is_err() {
            tracing::warn!("tasks of metadata replicas did not end in time");
        }
        // One that was being opened meanwhile.
        self.end_replicas().await;
        let state = inner.state.clone();
        let flushed = tokio::task::spawn_blocking(move || state.flush());
        let flushed = tokio::time::timeout(STOP_WAIT, flushed).await;
        if !matches!(flushed, Ok(Ok(Ok(())))) {
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
