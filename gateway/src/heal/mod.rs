//! The healer: brings every extent back to K+M good chunks, and takes away what nobody owns any more.
//!
//! Reading order:
//! - this file: the seam to the metadata shards, settings, the tasks and how they stop;
//! - [`look`]: what is missing? Reports of readers, and walks over the groups of a disk that is new or was away, into the durable
//!   repair queues of the shards;
//! - [`plan`]: pure; what to rebuild first;
//! - [`rebuild`]: one extent: read K, decode, write, verify; [`pace`]: how much of that at a time;
//! - [`garbage`]: chunks of extents that their shard says are dead;
//! - [`census`]: counts chunks by reading their bytes, never by trusting a job's word.
//!
//! Everything here is idempotent: several gateways may heal at once, and a healer may stop at any point. What is to be done stands in
//! the shards' queues, never only here.
//!
//! **Invariant:** a chunk leaves the repair queue only after its bytes were read back from its disk and verified.
//! **Invariant:** nothing of an extent that its shard owns is ever deleted, but for a corrupt chunk whose replacement is at hand.

pub mod census;
mod garbage;
mod look;
pub mod pace;
pub mod plan;
mod rebuild;

pub use census::{Census, CensusProgress};

use crate::object::{ObjectCounters, ObjectStore};
use crate::shards::Shards;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::{DiskId, ExtentId, ShardId};
use granary_placement::lease::LeaseStamp;
use granary_placement::settings::Values;
use look::Walked;
use pace::Pace;
use plan::Backoff;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{watch, Notify};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A metadata shard did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shard {shard}: {detail}")]
pub struct MetaClientError {
    /// Which shard.
    pub shard: ShardId,
    /// What happened.
    pub detail: String,
}

/// The way to the metadata shards, as far as the healer needs it.
#[async_trait::async_trait]
pub trait MetaClient: Send + Sync + 'static {
    /// Applies a command to a shard.
    async fn command(&self, shard: ShardId, command: Command) -> Result<Reply, MetaClientError>;
    /// Reads from a shard, linearizably.
    async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, MetaClientError>;
    /// The shards that hold objects.
    fn shards(&self) -> Vec<ShardId>;
}

#[async_trait::async_trait]
impl MetaClient for Shards {
    async fn command(&self, shard: ShardId, command: Command) -> Result<Reply, MetaClientError> {
        Shards::command(self, shard, command)
            .await
            .map_err(|error| MetaClientError { shard, detail: error.to_string() })
    }

    async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, MetaClientError> {
        Shards::query(self, shard, query).await.map_err(|error| MetaClientError { shard, detail: error.to_string() })
    }

    fn shards(&self) -> Vec<ShardId> {
        self.object_shards()
    }
}

/// How the healer works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealSettings {
    /// Time between two looks at the queues.
    pub interval: Duration,
    /// Extents rebuilt at once.
    pub extents_at_once: usize,
    /// Bytes per second read and written for rebuilding; 0 for no ceiling.
    pub bytes_per_s: u64,
    /// Bytes of each chunk in memory per extent that is being rebuilt.
    pub window_bytes: u64,
    /// Extents rebuilt between two looks at the queues.
    pub extents_per_pass: usize,
    /// Pages of 1,000 looked at per shard and pass.
    pub pages_per_pass: usize,
    /// First pause before a failed rebuild is tried again; doubles up to `longest_backoff`.
    pub first_backoff: Duration,
    /// Longest such pause.
    pub longest_backoff: Duration,
    /// Garbage younger than this stays: readers may be in the middle of it.
    pub garbage_grace: Duration,
    /// Pause after garbage could not be deleted everywhere.
    pub garbage_backoff: Duration,
    /// How long a control request without disk reads may take.
    pub control_deadline: Duration,
    /// How long the verification of a batch of chunks may take.
    pub verify_deadline: Duration,
}

impl HealSettings {
    /// From the settings `heal.*`.
    pub fn from_settings(values: &Values) -> HealSettings {
        HealSettings {
            interval: values.time("heal.interval"),
            extents_at_once: values.size("heal.extents_at_once"),
            bytes_per_s: values.number("heal.rate"),
            window_bytes: values.number("heal.window"),
            extents_per_pass: values.size("heal.extents_per_pass"),
            pages_per_pass: values.size("heal.pages_per_pass"),
            first_backoff: values.time("heal.first_backoff"),
            longest_backoff: values.time("heal.longest_backoff"),
            garbage_grace: values.time("heal.garbage_grace"),
            garbage_backoff: values.time("heal.garbage_backoff"),
            control_deadline: values.time("heal.control_deadline"),
            verify_deadline: values.time("heal.verify_deadline"),
        }
    }
}

impl Default for HealSettings {
    fn default() -> HealSettings {
        HealSettings::from_settings(&Values::default())
    }
}

/// How healing stands, for status pages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealStatus {
    /// Chunks in the repair queues at the last look.
    pub queued_chunks: u64,
    /// Extents of them by the failures they can still bear; negative: more missing than coding chunks.
    pub extents_by_failures_left: BTreeMap<i32, u64>,
    /// Extents that wait because a rebuild failed or their disk does not answer.
    pub waiting_extents: u64,
    /// Disks whose chunks are still to be looked at, or are being looked at.
    pub disks_to_walk: Vec<DiskId>,
    /// Walks over disks that came to their end since the start.
    pub walks_done: u64,
    /// Bytes per second allowed; 0 for no ceiling.
    pub bytes_per_s: u64,
    /// Healing is paused.
    pub paused: bool,
}

/// Heals in the background. Cheap to clone.
#[derive(Clone)]
pub struct Healer {
    inner: Arc<Inner>,
}

struct Inner {
    store: ObjectStore,
    meta: Arc<dyn MetaClient>,
    settings: watch::Receiver<HealSettings>,
    pace: Pace,
    poke: Notify,
    tasks: TaskTracker,
    stop: CancellationToken,
    backoff: Mutex<Backoff>,
    walked: Mutex<HashMap<DiskId, Walked>>,
    /// Where the next look at a repair queue that is longer than one pass goes on.
    cursors: Mutex<HashMap<ShardId, granary_meta::ChunkRef>>,
    status: Mutex<HealStatus>,
}

impl Healer {
    /// Starts the tasks; they end when `stop` is cancelled. Must be called inside a tokio runtime. Every pass works by the settings
    /// that are in force when it begins.
    pub fn start(
        store: ObjectStore,
        meta: Arc<dyn MetaClient>,
        settings: watch::Receiver<HealSettings>,
        stop: CancellationToken,
    ) -> Healer {
        let pace = Pace::new(settings.borrow().bytes_per_s);
        let inner = Arc::new(Inner {
            pace,
            store,
            meta,
            settings,
            poke: Notify::new(),
            tasks: TaskTracker::new(),
            stop: stop.clone(),
            backoff: Mutex::default(),
            walked: Mutex::default(),
            cursors: Mutex::default(),
            status: Mutex::default(),
        });
        let healer = Healer { inner };
        let repair = healer.inner.clone();
        healer.spawn(async move { repair.repair_loop().await });
        let reports = healer.inner.clone();
        healer.spawn(async move { reports.report_loop().await });
        let walks = healer.inner.clone();
        healer.spawn(async move { walks.walk_loop().await });
        let garbage = healer.inner.clone();
        healer.spawn(async move { garbage.garbage_loop().await });
        healer.inner.tasks.close();
        healer
    }

    fn spawn(&self, work: impl std::future::Future<Output = ()> + Send + 'static) {
        let stop = self.inner.stop.clone();
        self.inner.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    /// Looks at the repair queues now. Called after a commit that named missing chunks.
    pub fn poke(&self) {
        self.inner.poke.notify_one();
    }

    /// How it stands.
    pub fn status(&self) -> HealStatus {
        let mut status = lock(&self.inner.status).clone();
        status.bytes_per_s = self.inner.pace.bytes_per_s();
        status.paused = self.inner.pace.is_paused();
        status
    }

    /// The ceiling and the pause, both changeable while it runs.
    pub fn pace(&self) -> &Pace {
        &self.inner.pace
    }

    /// Counts the chunks of the cluster by having every one read and checked on its disk. `progress` is called after each page.
    ///
    /// # Errors
    /// A shard that does not answer: a census with holes is none. A disk that does not answer is part of the count.
    pub async fn census(&self, progress: impl FnMut(&CensusProgress) + Send) -> Result<Census, MetaClientError> {
        let inner = &self.inner;
        census::census(&inner.store, &*inner.meta, inner.settings().verify_deadline, progress).await
    }

    /// Waits until all tasks have ended after `stop`.
    pub async fn stopped(&self) {
        self.inner.tasks.wait().await;
    }
}

impl Inner {
    fn settings(&self) -> HealSettings {
        self.settings.borrow().clone()
    }

    fn counters(&self) -> &ObjectCounters {
        self.store.counters()
    }

    /// Which of these extents their shard owns, by a linearizable read.
    async fn alive(
        &self,
        shard: ShardId,
        extents: Vec<(granary_placement::id::PlacementGroupId, ExtentId)>,
    ) -> Result<Vec<bool>, MetaClientError> {
        let asked = extents.len();
        match self.meta.query(shard, Query::ExtentsAlive { extents }).await? {
            Answer::Alive(alive) if alive.len() == asked => Ok(alive),
            other => Err(unexpected(shard, &other)),
        }
    }
}

/// Returns when the settings become others than those seen last, or never.
async fn settings_change(seen: &mut watch::Receiver<HealSettings>) {
    if seen.changed().await.is_err() {
        std::future::pending().await
    }
}

fn unexpected(shard: ShardId, answer: &impl std::fmt::Debug) -> MetaClientError {
    let text: String = format!("{answer:?}").chars().take(80).collect();
    MetaClientError { shard, detail: format!("unexpected answer: {text}") }
}

/// The stamp of a healer that holds no lease: shards refuse it once they hear of a holder of the task.
fn stamp() -> LeaseStamp {
    LeaseStamp { task: "heal".to_owned(), epoch: 0 }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
