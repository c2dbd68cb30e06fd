//! The healer: brings every extent back to K+M good chunks, and takes away what nobody owns any more.
//!
//! Reading order:
//! - this file: settings, status, the tasks and how they stop;
//! - [`scrub`]: what the disks found damaged by themselves, into the same queues;
//! - [`look`]: what is missing? Reports of readers, and walks over the groups of a disk that is new or was away, into
//!   the durable repair queues of the shards;
//! - [`judge`]: pure; which disks are dead, and which of them go out of service; [`away`]: looks, asks others, and has
//!   it done, and lets disks back in that answer again;
//! - [`slots`]: slots that got another disk: everything in them is brought there, before the old disk is forgotten;
//!   [`flow`]: how fast that goes;
//! - [`plan`]: pure; what to rebuild first;
//! - [`rebuild`]: one extent: read K, decode, write, verify; [`pace`]: how much of that at a time; [`rest`]: how
//!   long nobody looks;
//! - [`garbage`]: chunks of extents that their shard says are dead;
//! - [`sweep`]: chunks on disks that no shard knows; [`remnants`]: those that the other disks have deleted long ago;
//!   [`home`]: chunks on disks that do not serve their slot;
//! - [`lost`]: which keys cannot be read now;
//! - [`census`]: counts chunks by reading their bytes, never by trusting a job's word.
//!
//! One gateway at a time heals, and one collects garbage (see [`leases`](super::leases)); reports of readers go out
//! from every gateway. Everything here is idempotent all the same, and a healer may stop at any point: what is to be
//! done stands in the shards' queues, never only here.
//!
//! **Invariant:** a chunk leaves the repair queue only after its bytes were read back from its disk and verified.
//! **Invariant:** nothing of an extent that its shard owns is ever deleted; a corrupt chunk is replaced in one step.

mod away;
pub mod census;
mod flow;
mod garbage;
mod home;
pub mod judge;
mod look;
pub mod lost;
pub mod pace;
pub mod plan;
mod rebuild;
mod remnants;
mod rest;
mod scrub;
mod slots;
mod sweep;

pub(crate) use away::takers;
pub use census::{Census, CensusProgress};

use super::leases::{Held, Holder, LeaseSettings};
use super::reads::publish;
use crate::object::{ObjectCounters, ObjectStore};
use crate::shards::buckets::odd_answer;
use crate::shards::{ShardError, Shards};
use bytes::Bytes;
use granary_meta::record::BucketRecord;
use granary_meta::{Answer, Query};
use granary_placement::id::{DiskId, ExtentId, PlacementGroupId, ShardId};
use granary_placement::settings::Values;
use look::Walked;
use lost::{LostCursor, LostPage};
use pace::Pace;
use plan::Retries;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{watch, Notify};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How the healer works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealSettings {
    /// Time between two looks at the queues.
    pub interval: Duration,
    /// Extents rebuilt at once.
    pub extents_at_once: usize,
    /// Bytes per second read and written for rebuilding; 0 for no ceiling.
    pub bytes_per_s: u64,
    /// Repair is paused until then, Unix milliseconds; see [`pace::paused_for`].
    pub paused_until_ms: u64,
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
    /// Garbage waits for reads up to this long.
    pub longest_read: Duration,
    /// Pause after garbage could not be deleted everywhere.
    pub garbage_backoff: Duration,
    /// Time between two sweeps over all disks.
    pub sweep_interval: Duration,
    /// Younger chunks that no shard knows are left alone: they may belong to an upload.
    pub orphan_age: Duration,
    /// How long a chunk that no shard knows stays before it is deleted.
    pub quarantine: Duration,
    /// A disk with more orphans than this part of its chunks is left alone, in percent.
    pub orphan_limit_percent: u64,
    /// How long a slot that got another disk is left alone: by then every gateway writes to the new one.
    pub move_settle: Duration,
    /// A disk that is dead for so long goes out.
    pub out_after: Duration,
    /// No more disks go out within an hour than this part of all; zero: none. None: than the largest server has.
    pub out_limit_percent: Option<u64>,
    /// A disk is well again once it has answered for so long.
    pub well_after: Duration,
    /// A disk that would be fuller than this takes over nothing, in percent.
    pub fill_ceiling_percent: u64,
    /// How long a control request without disk reads may take.
    pub control_deadline: Duration,
    /// How long the verification of a batch of chunks may take.
    pub verify_deadline: Duration,
    /// Leases of the tasks.
    pub lease: LeaseSettings,
}

impl HealSettings {
    /// From the settings `heal.*`.
    pub fn from_settings(values: &Values) -> HealSettings {
        HealSettings {
            interval: values.time("heal.interval"),
            extents_at_once: values.size("heal.extents_at_once"),
            bytes_per_s: values.number("heal.rate"),
            paused_until_ms: values.number("heal.paused_until"),
            window_bytes: values.number("heal.window"),
            extents_per_pass: values.size("heal.extents_per_pass"),
            pages_per_pass: values.size("heal.pages_per_pass"),
            first_backoff: values.time("heal.first_backoff"),
            longest_backoff: values.time("heal.longest_backoff"),
            garbage_grace: values.time("heal.garbage_grace"),
            longest_read: values.time("heal.longest_read"),
            garbage_backoff: values.time("heal.garbage_backoff"),
            control_deadline: values.time("heal.control_deadline"),
            verify_deadline: values.time("heal.verify_deadline"),
            sweep_interval: values.time("heal.sweep_interval"),
            orphan_age: values.time("heal.orphan_age"),
            quarantine: values.time("heal.quarantine"),
            orphan_limit_percent: values.number("heal.orphan_limit"),
            move_settle: values.time("heal.move_settle"),
            out_after: values.time("heal.out_after"),
            out_limit_percent: values.number_or_auto("heal.out_limit"),
            well_after: values.time("heal.well_after"),
            fill_ceiling_percent: values.number("heal.fill_ceiling"),
            lease: LeaseSettings { ttl: values.time("heal.lease_ttl") },
        }
    }
}

impl Default for HealSettings {
    fn default() -> HealSettings {
        HealSettings::from_settings(&Values::default())
    }
}

/// The task of repairs and walks: one lease for both, since walks fill the queues that repairs empty.
pub const HEAL_TASK: &str = "heal";
/// The task of collecting garbage.
pub const GARBAGE_TASK: &str = "garbage";

/// Longest progress in a lease, in bytes; the root shard takes no longer one.
const MAX_PROGRESS_BYTES: usize = 4096;

/// How healing stands, for status pages. Its holder publishes it with its lease, as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealStatus {
    /// Chunks in the repair queues at the last look.
    pub queued_chunks: u64,
    /// Extents of them by the failures they can still bear; negative: more missing than coding chunks.
    pub extents_by_failures_left: BTreeMap<i32, u64>,
    /// Slots that move and are not all on their new disks yet.
    pub queued_slots: u64,
    /// Extents that wait because a rebuild failed or their disk does not answer.
    pub waiting_extents: u64,
    /// Disks whose chunks are still to be looked at, or are being looked at.
    pub disks_to_walk: Vec<DiskId>,
    /// Walks over disks that came to their end since the start.
    pub walks_done: u64,
    /// Chunks on disks that no shard knows, at the last sweep.
    pub orphans: u64,
    /// Of these, in quarantine before that sweep.
    pub orphans_quarantined: u64,
    /// Disks with more orphans than `heal.orphan_limit`: an operator is to look.
    pub disks_beyond_orphan_limit: Vec<DiskId>,
    /// Sweeps that came to their end since the start.
    pub sweeps_done: u64,
    /// Chunks that disks found damaged by themselves and that were not repaired yet, at the last look.
    pub scrub_findings: u64,
    /// Disks in service that do not answer, and have not been well since.
    pub dead_disks: Vec<DeadDisk>,
    /// After so many seconds they go out, if they may.
    pub out_after_s: u64,
    /// Disks that went out of service and are away, or went out within the hour.
    pub away_disks: Vec<AwayDisk>,
    /// About so many bytes are still to be brought to slots that move.
    pub move_bytes_left: u64,
    /// Bytes per second that were rebuilt or copied lately.
    pub bytes_per_s_now: u64,
    /// Bytes per second allowed; 0 for no ceiling.
    pub bytes_per_s: u64,
    /// Healing is paused.
    pub paused: bool,
    /// Until then, Unix milliseconds; 0 when it is not paused by the setting `heal.paused_until`.
    pub paused_until_ms: u64,
}

/// A disk in service that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadDisk {
    /// Which.
    pub disk: DiskId,
    /// For how long it was seen dead since it was well, in seconds.
    pub dead_s: u64,
    /// It has been dead for long enough to go out, and stays for this reason.
    pub stays: Option<String>,
}

/// A disk that went out of service because it was dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwayDisk {
    /// Which.
    pub disk: DiskId,
    /// How long ago, in seconds.
    pub out_s: u64,
    /// It answers again, and is not let back in yet for this reason.
    #[serde(default)]
    pub waits: Option<String>,
}

/// Heals in the background. Cheap to clone.
#[derive(Clone)]
pub struct Healer {
    inner: Arc<Inner>,
}

struct Inner {
    store: ObjectStore,
    meta: Shards,
    settings: watch::Receiver<HealSettings>,
    /// Where this gateway is found, for the status pages of others.
    address: String,
    pace: Pace,
    poke: Notify,
    tasks: TaskTracker,
    stop: CancellationToken,
    backoff: Mutex<Retries>,
    walked: Mutex<HashMap<DiskId, Walked>>,
    /// Where the next look at a repair queue that is longer than one pass goes on.
    cursors: Mutex<HashMap<ShardId, granary_meta::ChunkRef>>,
    settled: home::SettledHomes,
    heals: AtomicBool,
    flow: Mutex<flow::Flow>,
    status: Mutex<HealStatus>,
}

impl Healer {
    /// Starts the tasks; they end when `stop` is cancelled. Must be called inside a tokio runtime. Every pass works by
    /// the settings that are in force when it begins. `address` is where operators
    /// find this gateway.
    pub fn start(
        store: ObjectStore,
        meta: Shards,
        settings: watch::Receiver<HealSettings>,
        address: String,
        stop: CancellationToken,
    ) -> Healer {
        let pace = Pace::new(settings.clone());
        let inner = Arc::new(Inner {
            pace,
            store,
            meta,
            settings,
            address,
            poke: Notify::new(),
            tasks: TaskTracker::new(),
            stop: stop.clone(),
            backoff: Mutex::default(),
            settled: Mutex::default(),
            walked: Mutex::default(),
            cursors: Mutex::default(),
            heals: AtomicBool::new(false),
            flow: Mutex::default(),
            status: Mutex::default(),
        });
        let healer = Healer { inner };
        let reports = healer.inner.clone();
        healer.spawn(async move { reports.report_loop().await });
        healer.own(HEAL_TASK, |inner, held| async move {
            let _heals = Heals::begin(&inner.heals);
            let returned = away::Returned::default();
            tokio::join!(
                inner.repair_loop(&held),
                inner.walk_loop(&held),
                inner.sweep_loop(&held),
                inner.scrub_loop(&held),
                inner.away_loop(&returned, &held),
                inner.return_loop(&returned, &held)
            );
        });
        let (timing, reads) = (healer.inner.settings.clone(), healer.inner.store.open_reads().clone());
        let timing = move || {
            let settings = timing.borrow();
            (settings.garbage_grace, settings.lease)
        };
        let (shards, address) = (healer.inner.meta.clone(), healer.inner.address.clone());
        healer.inner.tasks.spawn(publish(reads, shards, timing, address, healer.inner.stop.clone()));
        healer.own(GARBAGE_TASK, |inner, held| async move { inner.garbage_loop(&held).await });
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

    /// Does a task whenever this gateway holds its lease.
    fn own<F: Future<Output = ()> + Send + 'static>(
        &self,
        task: &'static str,
        work: impl Fn(Arc<Inner>, Held) -> F + Send + Sync + 'static,
    ) {
        let (inner, stop) = (self.inner.clone(), self.inner.stop.clone());
        let timing = inner.settings.clone();
        let holder = Holder::new(inner.meta.clone(), move || timing.borrow().lease, task, inner.address.clone());
        self.inner.tasks.spawn(async move {
            let progress = || inner.progress(task);
            holder.run(progress, |held| work(inner.clone(), held), stop).await;
        });
    }

    /// Looks at the repair queues now. Called after a commit that named missing chunks.
    pub fn poke(&self) {
        self.inner.poke.notify_one();
    }

    /// Does this gateway hold the lease?
    pub fn heals(&self) -> bool {
        self.inner.heals.load(Ordering::SeqCst)
    }

    /// How it stands as far as this gateway knows, which is all there is to know only while it holds the lease.
    pub fn status(&self) -> HealStatus {
        self.inner.status()
    }

    /// The ceiling and the pause, both changeable while it runs.
    pub fn pace(&self) -> &Pace {
        &self.inner.pace
    }

    /// Counts the chunks of the cluster by having every one read and checked on its disk. `progress` is called after
    /// each page.
    ///
    /// # Errors
    /// A shard that does not answer: a census with holes is none. A disk that does not answer is part of the count.
    pub async fn census(&self, progress: impl FnMut(&CensusProgress) + Send) -> Result<Census, ShardError> {
        let inner = &self.inner;
        let deadline = inner.settings().verify_deadline;
        let mut census = census::census(&inner.store, &inner.meta, deadline, progress).await?;
        for disk in inner.store.disks().view() {
            if let Some(swept) = inner.look_for_orphans(disk.id, None).await? {
                census.orphans += swept.orphans;
                census.orphans_quarantined += swept.quarantined;
            }
        }
        Ok(census)
    }

    /// A page of the keys that cannot be read now; see [`lost::page`].
    pub async fn lost(&self, bucket: Option<BucketRecord>, from: Option<LostCursor>, read: bool) -> LostPage {
        let Inner { store, meta, .. } = &*self.inner;
        let settings = self.inner.settings();
        let deadlines = (settings.control_deadline, settings.verify_deadline);
        lost::page(&lost::Sources { store, meta, deadlines, read }, bucket, from).await
    }

    /// Waits until all tasks have ended after `stop`.
    pub async fn stopped(&self) {
        self.inner.tasks.wait().await;
    }
}

/// Set for as long as this lives.
struct Heals<'a>(&'a AtomicBool);

impl Heals<'_> {
    fn begin(flag: &AtomicBool) -> Heals<'_> {
        flag.store(true, Ordering::SeqCst);
        Heals(flag)
    }
}

impl Drop for Heals<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Inner {
    /// What is published with the lease of a task.
    fn progress(&self, task: &str) -> Bytes {
        if task != HEAL_TASK {
            return Bytes::from_static(b"{}");
        }
        to_publish(self.status())
    }

    fn status(&self) -> HealStatus {
        let mut status = lock(&self.status).clone();
        status.bytes_per_s = self.pace.bytes_per_s();
        status.paused = self.pace.is_paused();
        status.paused_until_ms = self.pace.paused_until_ms().unwrap_or_default();
        let rebuilt = self.counters().bytes_rebuilt.load(Ordering::Relaxed);
        (status.move_bytes_left, status.bytes_per_s_now) = lock(&self.flow).look(rebuilt, Instant::now());
        status
    }

    fn settings(&self) -> HealSettings {
        self.settings.borrow().clone()
    }

    fn counters(&self) -> &ObjectCounters {
        self.store.counters()
    }

    /// Which of these extents their shard owns, by a linearizable read.
    async fn alive(&self, shard: ShardId, extents: Vec<(PlacementGroupId, ExtentId)>) -> Result<Vec<bool>, ShardError> {
        self.known(shard, extents, false).await
    }

    /// Which of these extents their shard owns, or with `or_garbage` has on its garbage queue, by a linearizable read.
    async fn known(
        &self,
        shard: ShardId,
        extents: Vec<(PlacementGroupId, ExtentId)>,
        or_garbage: bool,
    ) -> Result<Vec<bool>, ShardError> {
        let asked = extents.len();
        match self.meta.query(shard, Query::ExtentsAlive { extents, or_garbage }).await? {
            Answer::Alive(alive) if alive.len() == asked => Ok(alive),
            other => Err(odd_answer(shard, &other)),
        }
    }
}

/// A status as the root shard takes it. Of lists of disks that are too long, the longest is cut by half until it fits:
/// a lease that cannot be renewed is lost.
fn to_publish(mut status: HealStatus) -> Bytes {
    fn length<T: Serialize>(list: &[T]) -> usize {
        if list.is_empty() {
            0
        } else {
            serde_json::to_vec(list).map_or(0, |text| text.len())
        }
    }
    fn halve<T>(list: &mut Vec<T>) {
        list.truncate(list.len() / 2);
    }
    loop {
        let text = serde_json::to_vec(&status).unwrap_or_default();
        let lengths = [
            length(&status.disks_to_walk),
            length(&status.disks_beyond_orphan_limit),
            length(&status.dead_disks),
            length(&status.away_disks),
        ];
        // Which disks went out counts for the next holder, and why they wait does not.
        if text.len() > MAX_PROGRESS_BYTES && status.away_disks.iter().any(|away| away.waits.is_some()) {
            status.away_disks.iter_mut().for_each(|away| away.waits = None);
            continue;
        }
        let (longest, length) = (0usize..).zip(lengths).max_by_key(|(_, length)| *length).unwrap_or_default();
        if text.len() <= MAX_PROGRESS_BYTES || length == 0 {
            return text.into();
        }
        match longest {
            0 => halve(&mut status.disks_to_walk),
            1 => halve(&mut status.disks_beyond_orphan_limit),
            2 => halve(&mut status.dead_disks),
            _ => halve(&mut status.away_disks),
        }
    }
}

/// Returns when what is watched becomes another than was seen last, or never.
async fn change<T>(seen: &mut watch::Receiver<T>) {
    if seen.changed().await.is_err() {
        std::future::pending().await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_status_of_many_disks_is_cut_to_what_a_lease_takes() {
        let disks = |count: u32| (1..=count).map(DiskId).collect::<Vec<_>>();
        for (walk, beyond, dead) in [(0, 0, 0), (3, 2, 2), (3000, 0, 0), (0, 3000, 2000), (3000, 2000, 9), (9, 9, 3000)]
        {
            let (disks_to_walk, disks_beyond_orphan_limit) = (disks(walk), disks(beyond));
            let row = |disk| DeadDisk { disk, dead_s: 1000, stays: Some("nobody can take over".to_owned()) };
            let status = HealStatus {
                disks_to_walk,
                disks_beyond_orphan_limit,
                dead_disks: disks(dead).into_iter().map(row).collect(),
                away_disks: disks(dead).into_iter().map(|disk| AwayDisk { disk, out_s: 4000, waits: None }).collect(),
                ..HealStatus::default()
            };
            let published = to_publish(status.clone());
            assert!(published.len() <= MAX_PROGRESS_BYTES, "{} bytes", published.len());
            let read: HealStatus = serde_json::from_slice(&published).unwrap();
            assert!(walk + beyond + dead > 100 || read == status, "short lists are whole");
        }
        // Why disks wait goes before any of them does.
        let row = |disk| AwayDisk { disk, out_s: 4000, waits: Some("chunks are not on their disks".repeat(3)) };
        let away_disks: Vec<AwayDisk> = disks(60).into_iter().map(row).collect();
        let published = to_publish(HealStatus { away_disks, ..HealStatus::default() });
        let read: HealStatus = serde_json::from_slice(&published).unwrap();
        assert_eq!(read.away_disks.iter().map(|row| row.disk).collect::<Vec<_>>(), disks(60));
    }
}
