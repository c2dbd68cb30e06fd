//! The metadata role: shard replicas on this disk. The only file that knows granary-replica.
//!
//! A disk without the role has no `DIR/meta` and opens nothing. The host is opened at start when the folder is there,
//! and otherwise when the map gives this disk the role.

use crate::label::{self, LabelError};
use crate::maps::Maps;
use crate::neighbours;
use crate::peers::Peers;
use crate::store::file_device::sync_folder;
use crate::store::shared::lock;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::FutureExt;
use granary_placement::id::{DiskId, ShardId};
use granary_placement::settings::Values;
use granary_replica::{HostConfig, MetaHost, PeerTransport, Space, Timing, TransportError, WallClock, AWAY_LEVEL};
pub use granary_replica::{MetaCounters, MetaError}; // for metrics and the errors of `serve`
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, Reach, ShardStatus};
use granary_wire::{AuthError, LinkError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const META_FOLDER: &str = "meta";
/// Between two attempts to open metadata.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// For the panic hook: see [`granary_replica::raft::containment::note_panic`].
pub fn note_panic(panic: &std::panic::PanicHookInfo<'_>) -> bool {
    granary_replica::raft::containment::note_panic(panic)
}

/// Called with the reason when the metadata of this disk can no longer be trusted; ends the process.
pub type OnFatal = Arc<dyn Fn(String) + Send + Sync>;

/// Shard replicas of this disk, if it has the role.
pub struct Roles {
    dir: PathBuf,
    folder: PathBuf,
    peers: Arc<Peers>,
    maps: Arc<Maps>,
    timing: Timing,
    reserve_bytes: u64,
    on_fatal: OnFatal,
    host: OnceCell<MetaHost>,
    /// The root shard was seen here at a level at which disks may be away. Levels only rise.
    has_away_level: AtomicBool,
    /// Why the host could not be opened at the last attempt.
    why_closed: Mutex<Option<String>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Carries Raft messages over the control connections.
struct Transport(Arc<Peers>);

impl Transport {
    /// Asks disk `to`; `take` picks the expected answer out.
    fn ask<T: Send + 'static>(
        &self,
        to: DiskId,
        request: ControlRequest,
        deadline: Duration,
        take: fn(ControlResponse) -> Option<T>,
    ) -> BoxFuture<'static, Result<T, TransportError>> {
        let peers = self.0.clone();
        async move {
            let client = peers
                .client(to)
                .ok_or_else(|| TransportError::Unreachable(format!("disk {to} has no known address")))?;
            match client.control(request, deadline).await {
                Ok(ControlResponse::Error(error)) => Err(TransportError::Refused(error.to_string())),
                Ok(answer) => {
                    take(answer).ok_or_else(|| TransportError::Refused("an answer to another question".to_owned()))
                }
                Err(LinkError::Timeout) => Err(TransportError::Timeout),
                Err(error) => Err(TransportError::Unreachable(error.to_string())),
            }
        }
        .boxed()
    }
}

/// A node without a map does not know who is who, and takes part in no shard.
pub fn no_map() -> ControlError {
    ControlError::Unavailable("no cluster map is known here yet".to_owned())
}

impl PeerTransport for Transport {
    fn raft(
        &self,
        to: DiskId,
        shard: ShardId,
        message: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        let request = ControlRequest::Raft { shard, from: self.0.me(), message };
        self.ask(to, request, deadline, |answer| match answer {
            ControlResponse::Raft(answer) => Some(answer),
            _ => None,
        })
    }

    fn raft_batch(
        &self,
        to: DiskId,
        messages: Vec<(ShardId, Bytes)>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<Result<Bytes, TransportError>>, TransportError>> {
        let request = ControlRequest::RaftBatch { from: self.0.me(), messages };
        self.ask(to, request, deadline, |answer| match answer {
            ControlResponse::RaftBatch(answers) => Some(
                answers
                    .into_iter()
                    .map(|answer| answer.map_err(|error| TransportError::Refused(error.to_string())))
                    .collect(),
            ),
            _ => None,
        })
    }

    fn link_beat(
        &self,
        to: DiskId,
        message: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        let request = ControlRequest::LinkBeat { from: self.0.me(), message };
        self.ask(to, request, deadline, |answer| match answer {
            ControlResponse::LinkBeat(answer) => Some(answer),
            _ => None,
        })
    }

    fn is_displaced(&self, deadline: Duration) -> BoxFuture<'static, Option<bool>> {
        let peers = self.0.clone();
        async move {
            if peers.gateway_finds_it() {
                return Some(false);
            }
            match peers.client_of_own()?.control(ControlRequest::Status, deadline).await {
                Ok(_) => Some(false),
                Err(LinkError::Auth(AuthError::Disk)) => Some(true),
                // Nobody there, or somebody who does not know this cluster, tells of a network and not of another disk.
                Err(_) => None,
            }
        }
        .boxed()
    }
}

impl Roles {
    /// The highest feature level that this build of the shards' state machine knows, whether or not the disk has the
    /// role.
    pub fn feature_level(&self) -> u32 {
        granary_replica::MAX_FEATURE_LEVEL
    }

    /// May a disk be away in the map of the root shard, by the feature level that it has here? False when it is not
    /// here.
    pub fn root_may_have_away(&self) -> bool {
        // Asked for each stranger's handshake: read from the database only until it is so.
        if self.has_away_level.load(Ordering::Relaxed) {
            return true;
        }
        // One that cannot be read cannot answer either.
        let level = self.host.get().and_then(|host| host.level(ShardId::ROOT).ok());
        let has = level.is_some_and(|level| level >= AWAY_LEVEL);
        self.has_away_level.store(has, Ordering::Relaxed);
        has
    }

    /// A gateway asked this disk something.
    pub fn note_gateway(&self) {
        self.peers.note_gateway();
    }

    /// Which of these disks answer this one right now.
    pub async fn reaches(&self, disks: &[DiskId]) -> Vec<Reach> {
        self.peers.reaches(disks).await
    }

    /// Nothing is opened yet. `reserve_bytes`: free space that metadata do not grow into.
    pub fn new(
        dir: &std::path::Path,
        values: &Values,
        reserve_bytes: u64,
        peers: Arc<Peers>,
        maps: Arc<Maps>,
        on_fatal: OnFatal,
        stop: CancellationToken,
    ) -> Arc<Roles> {
        let folder = dir.join(META_FOLDER);
        let timing = Timing::from_settings(values);
        Arc::new(Roles {
            dir: dir.to_owned(),
            folder,
            peers,
            maps,
            timing,
            reserve_bytes,
            on_fatal,
            host: OnceCell::new(),
            has_away_level: AtomicBool::new(false),
            why_closed: Mutex::default(),
            tasks: TaskTracker::new(),
            stop,
        })
    }

    /// Opens the replicas that are here, and from now on whenever the map gives this disk the role. Metadata that
    /// cannot be opened keep nothing else from being served: they are tried again, or, damaged, put aside.
    pub async fn start(self: &Arc<Self>) {
        if self.try_open().await {
            return;
        }
        let roles = self.clone();
        let mut map = self.maps.watch();
        self.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = roles.stop.cancelled() => return,
                    changed = map.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(TRY_AGAIN) => {}
                }
                if roles.try_open().await {
                    return;
                }
            }
        });
    }

    /// Opens the host if there is something to open, or the map wants it. True when it is open.
    async fn try_open(&self) -> bool {
        if self.host.initialized() {
            return true;
        }
        if !self.folder.exists() && self.granted() != Some(true) {
            return false;
        }
        let Err(error) = self.open().await else { return true };
        let mut why = error.to_string();
        if error.is_damage() {
            match self.put_aside() {
                Ok(aside) => {
                    tracing::error!(why, aside = %aside.display(), "damaged metadata were put aside");
                    match self.open().await {
                        Ok(_) => return true,
                        Err(error) => why = error.to_string(),
                    }
                }
                Err(error) => why = format!("{why}; it cannot be put aside: {error}"),
            }
        }
        self.stays_closed(why);
        false
    }

    fn stays_closed(&self, why: String) {
        let mut known = lock(&self.why_closed);
        if known.as_ref() != Some(&why) {
            tracing::error!(why, "the metadata of this disk cannot be opened; its chunks are served");
        }
        *known = Some(why);
    }

    /// Moves damaged metadata out of the way: the replicas begin anew, empty, and learn from the others, who know them
    /// for new ones. Once only: what was put aside before is not overwritten.
    fn put_aside(&self) -> std::io::Result<PathBuf> {
        let aside = self.folder.with_extension("damaged");
        if aside.exists() {
            let why = format!("{} is there already: look at it, then move it away", aside.display());
            return Err(std::io::Error::other(why));
        }
        std::fs::rename(&self.folder, &aside)?;
        aside.parent().map_or(Ok(()), sync_folder)?;
        Ok(aside)
    }

    /// Does the map give this disk the role? None while no map is known.
    fn granted(&self) -> Option<bool> {
        let map = self.maps.newest()?;
        Some(map.disk(self.peers.me()).is_some_and(|disk| disk.roles.metadata))
    }

    async fn open(&self) -> Result<&MetaHost, MetaError> {
        self.host
            .get_or_try_init(|| async {
                let (dir, disk, timing) = (self.folder.clone(), self.peers.me(), self.timing.clone());
                let number = self.label(label::read)?.metadata;
                let folder = self.dir.clone();
                let free_bytes = Arc::new(move || {
                    let stat = rustix::fs::statvfs(&folder)?;
                    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
                });
                let beside = tokio::task::spawn_blocking({
                    let dir = self.dir.clone();
                    move || neighbours::look(&dir)
                });
                let beside = beside.await.map_err(io::Error::other)?;
                if beside.disks > 1 {
                    tracing::info!(disks = beside.disks, "disks that lie side by side share the reserve for metadata");
                }
                let space =
                    Space { reserve_bytes: self.reserve_bytes, nodes: beside.disks, turns: beside.above, free_bytes };
                let config = HostConfig { dir, disk, number, timing, clock: WallClock::default(), space };
                let host = MetaHost::open(
                    config,
                    Arc::new(Transport(self.peers.clone())),
                    self.maps.watch(),
                    self.on_fatal.clone(),
                )
                .await?;
                let number = host.number();
                if let Err(error) = self.label(|dir| label::set_metadata(dir, number)) {
                    host.shutdown().await;
                    return Err(error);
                }
                *lock(&self.why_closed) = None;
                tracing::info!(folder = %self.folder.display(), "holding metadata replicas");
                // A root replica here learns of new maps before anyone can ask for them.
                let (mut applied, maps, stop) = (host.root_map(), self.maps.clone(), self.stop.clone());
                self.tasks.spawn(async move {
                    loop {
                        let newest = applied.borrow_and_update().clone();
                        if let Some(map) = newest {
                            if let Err(error) = maps.offer(map).await {
                                tracing::error!(%error, "the root shard's map was refused");
                            }
                        }
                        tokio::select! {
                            () = stop.cancelled() => return,
                            changed = applied.changed() => if changed.is_err() { return },
                        }
                    }
                });
                Ok(host)
            })
            .await
    }

    fn label<T>(&self, work: impl FnOnce(&Path) -> Result<T, LabelError>) -> Result<T, MetaError> {
        work(&self.dir).map_err(|error| MetaError::Directory(std::io::Error::other(error)))
    }

    fn host(&self, shard: ShardId) -> Result<&MetaHost, ControlError> {
        match (self.host.get(), &*lock(&self.why_closed)) {
            (Some(host), _) => Ok(host),
            (None, Some(why)) => Err(ControlError::Disk(format!("metadata: {why}"))),
            (None, None) => Err(ControlError::NoSuchShard(shard)),
        }
    }

    /// For requests that may make a replica: opens the host if the map gives this disk the role.
    async fn host_for_new(&self, shard: ShardId) -> Result<&MetaHost, ControlError> {
        if self.host.initialized() || lock(&self.why_closed).is_some() {
            return self.host(shard);
        }
        match self.granted() {
            None => return Err(no_map()),
            Some(false) => return Err(ControlError::NoSuchShard(shard)),
            Some(true) => {}
        }
        self.open().await.map_err(|error| ControlError::Disk(error.to_string()))
    }

    /// See [`MetaHost::serve`].
    ///
    /// # Errors
    /// As there.
    pub async fn serve_shard(&self, shard: ShardId, request: &[u8]) -> Result<Bytes, ControlError> {
        self.host(shard)?.serve(shard, request).await
    }

    /// See [`MetaHost::raft`].
    ///
    /// # Errors
    /// As there.
    pub async fn raft(&self, shard: ShardId, from: DiskId, message: Bytes) -> Result<Bytes, ControlError> {
        self.host_for_new(shard).await?.raft(shard, from, message).await
    }

    /// Answers each message as [`Roles::raft`] does.
    pub async fn raft_batch(&self, from: DiskId, messages: Vec<(ShardId, Bytes)>) -> Vec<Result<Bytes, ControlError>> {
        let answers = messages.into_iter().map(|(shard, message)| self.raft(shard, from, message));
        futures::future::join_all(answers).await
    }

    /// See [`MetaHost::link_beat`].
    ///
    /// # Errors
    /// As there; NoSuchShard when no replica is here.
    pub async fn link_beat(&self, from: DiskId, message: Bytes) -> Result<Bytes, ControlError> {
        self.host(ShardId::ROOT)?.link_beat(from, &message)
    }

    /// What the replicas here did since they were opened; None when there are none.
    pub fn counters(&self) -> Option<MetaCounters> {
        self.host.get().map(MetaHost::counters)
    }

    /// Are there metadata here that cannot be opened?
    pub fn cannot_be_opened(&self) -> bool {
        !self.host.initialized() && lock(&self.why_closed).is_some()
    }

    /// See [`MetaHost::init_shard`].
    ///
    /// # Errors
    /// As there.
    pub async fn init_shard(&self, shard: ShardId, members: Vec<DiskId>) -> Result<(), ControlError> {
        self.host_for_new(shard).await?.init_shard(shard, members).await
    }

    /// How the replicas here stand.
    pub fn status(&self) -> Vec<ShardStatus> {
        self.host.get().map(MetaHost::status).unwrap_or_default()
    }

    /// Stops the replicas. The stop signal has been given.
    pub async fn shutdown(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        if let Some(host) = self.host.get() {
            host.shutdown().await;
        }
    }
}
