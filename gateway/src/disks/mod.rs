//! The disks as this gateway sees them: one client per disk node, and whether it answers.
//!
//! What an operator decided about a disk stands in the cluster map; whether it answers right now is known here, from
//! two sources: errors that requests meet ([`Disks::failed`]) and a Status ping each second. One task owns the pings,
//! follows the map and re-reads the address override; it ends when the last [`Disks`] handle is dropped.
//!
//! **Invariant:** a disk node whose label is not the disk the map names at that address is never used.

mod health;
#[cfg(test)]
mod tests;

pub use health::DiskHealth;
use health::State;

use futures::stream::{self, StreamExt};
use granary_placement::id::{DiskId, DiskUuid, Epoch};
use granary_placement::map::{ClusterMap, DiskState};
use granary_placement::settings::Values;
use granary_wire::auth::{Credentials, Ends, GatewayId};
use granary_wire::client::{ClientLimits, NodeClient};
use granary_wire::control::{ControlRequest, ControlResponse, NodeStatus};
use granary_wire::error::{AuthError, ChunkError, LinkError};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{watch, Notify};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How disks are watched.
#[derive(Debug, Clone)]
pub struct DiskSettings {
    /// Time between two pings of a disk.
    pub ping_interval: Duration,
    /// How long a ping may take.
    pub ping_deadline: Duration,
    /// A disk that has failed for this long is Down. A refused connection is Down at once.
    pub down_after: Duration,
    /// After an error in service a disk stays Suspect this long, though it answers pings: a sick disk often does.
    pub suspect_hold: Duration,
    /// After DiskFull or Overloaded a disk gets no new chunks this long.
    pub unwritable_hold: Duration,
    /// Pings under way at once.
    pub pings_at_once: usize,
    /// Passed to each client.
    pub limits: ClientLimits,
}

impl DiskSettings {
    /// From the settings `disks.*`.
    pub fn from_settings(values: &Values) -> DiskSettings {
        DiskSettings {
            ping_interval: values.time("disks.ping_interval"),
            ping_deadline: values.time("disks.ping_deadline"),
            down_after: values.time("disks.down_after"),
            suspect_hold: values.time("disks.suspect_hold"),
            unwritable_hold: values.time("disks.unwritable_hold"),
            pings_at_once: values.size("disks.pings_at_once"),
            limits: ClientLimits::from_settings(values),
        }
    }
}

impl Default for DiskSettings {
    fn default() -> DiskSettings {
        DiskSettings::from_settings(&Values::default())
    }
}

/// One disk as it stands now, for status pages and the healer.
#[derive(Debug, Clone)]
pub struct DiskView {
    /// Which disk.
    pub id: DiskId,
    /// Where its daemon is called, override applied.
    pub address: String,
    /// Whether it answers.
    pub health: DiskHealth,
    /// How often it came Up, from the start or after having been Down: a higher number means "it may have changed
    /// meanwhile".
    pub times_up: u64,
    /// Its last answer to a ping.
    pub status: Option<NodeStatus>,
    /// The last error seen, for people.
    pub last_error: Option<String>,
}

/// A disk with less room than this may refuse the chunks of a whole extent, in bytes.
pub const FULL_BELOW_BYTES: u64 = 64 * 1024 * 1024;

impl DiskView {
    /// It answers, and has hardly any room for chunks.
    pub fn is_full(&self) -> bool {
        self.health == DiskHealth::Up && self.status.as_ref().is_some_and(|status| status.free_bytes < FULL_BELOW_BYTES)
    }
}

/// Counters of this module; they only grow.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Pings answered.
    pub pings_good: AtomicU64,
    /// Pings not answered, or answered by the wrong disk.
    pub pings_failed: AtomicU64,
    /// Errors that requests met and that speak against a disk.
    pub service_errors: AtomicU64,
    /// Changes of a disk to Down.
    pub downs: AtomicU64,
}

impl DiskCounters {
    /// (name, help, value) of each, for /metrics.
    pub fn samples(&self) -> Vec<(&'static str, &'static str, u64)> {
        [
            ("pings_good", "Pings that disk nodes answered", &self.pings_good),
            ("pings_failed", "Pings not answered, or answered by the wrong disk", &self.pings_failed),
            ("service_errors", "Errors of requests that speak against a disk", &self.service_errors),
            ("downs", "Changes of a disk to down", &self.downs),
        ]
        .map(|(name, help, value)| (name, help, value.load(Ordering::Relaxed)))
        .into()
    }
}

struct Entry {
    id: DiskId,
    uuid: DiskUuid,
    address: String,
    client: NodeClient,
    state: Mutex<State>,
}

struct Inner {
    settings: DiskSettings,
    /// What disk nodes count this gateway by.
    gateway: Option<GatewayId>,
    credentials: Credentials,
    overrides: Option<PathBuf>,
    map: watch::Receiver<Option<Arc<ClusterMap>>>,
    table: RwLock<HashMap<DiskId, Arc<Entry>>>,
    kick: Notify,
    changes: watch::Sender<u64>,
    heard: watch::Sender<Epoch>,
    counters: DiskCounters,
    clock: Clock,
}

/// By which it is judged how long a disk has failed.
type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// Clients and health of all disks in the map. Cheap to clone.
#[derive(Clone)]
pub struct Disks {
    inner: Arc<Inner>,
    _stop: Arc<DropGuard>,
}

impl Disks {
    /// Follows `map` and begins to ping. `overrides`: a JSON object `{"disk id": "host:port"}` whose addresses stand in
    /// for the map's; read again when it changes. Must be called inside a tokio runtime.
    pub fn new(
        map: watch::Receiver<Option<Arc<ClusterMap>>>,
        credentials: Credentials,
        overrides: Option<PathBuf>,
        settings: DiskSettings,
    ) -> Disks {
        Disks::with_clock(map, credentials, overrides, settings, Box::new(Instant::now))
    }

    fn with_clock(
        map: watch::Receiver<Option<Arc<ClusterMap>>>,
        credentials: Credentials,
        overrides: Option<PathBuf>,
        settings: DiskSettings,
        clock: Clock,
    ) -> Disks {
        let stop = CancellationToken::new();
        let inner = Arc::new(Inner {
            settings,
            gateway: GatewayId::random(),
            credentials,
            overrides,
            map,
            table: RwLock::default(),
            kick: Notify::new(),
            changes: watch::Sender::new(0),
            heard: watch::Sender::new(Epoch(0)),
            counters: DiskCounters::default(),
            clock,
        });
        let task = Watcher { inner: inner.clone(), addresses: BTreeMap::new(), read_at: None };
        // The map and the override are taken in before the first caller asks for a client.
        inner.take_map(&task.addresses);
        tokio::spawn(task.run(stop.clone()));
        Disks { inner, _stop: Arc::new(stop.drop_guard()) }
    }

    /// The newest map this gateway knows.
    pub fn map(&self) -> Option<Arc<ClusterMap>> {
        self.inner.map.borrow().clone()
    }

    /// The client of a disk that the map has In or Draining.
    pub fn client(&self, disk: DiskId) -> Option<NodeClient> {
        self.inner.entry(disk).map(|entry| entry.client.clone())
    }

    /// A client of a disk node that the map does not have yet, to see which disk it serves before the map names it.
    pub fn client_at(&self, address: &str) -> NodeClient {
        let inner = &self.inner;
        let ends = Ends { gateway: inner.gateway, ..Ends::default() };
        NodeClient::new(address.to_owned(), ends, inner.credentials.clone(), inner.settings.limits.clone())
    }

    /// Whether a disk answers. A disk the map does not have is Down.
    pub fn health(&self, disk: DiskId) -> DiskHealth {
        self.inner.entry(disk).map_or(DiskHealth::Down, |entry| entry.state().health())
    }

    /// Whether a disk should get new chunks: Up, not full, not overloaded a moment ago.
    pub fn writable(&self, disk: DiskId) -> bool {
        self.inner.entry(disk).is_some_and(|entry| {
            let state = entry.state();
            let now = (self.inner.clock)();
            state.health() == DiskHealth::Up && !state.is_unwritable(now) && !state.is_full_for_clients(now)
        })
    }

    /// Whether a disk should get chunks that a repair makes: as [`Disks::writable`], but one that is full for clients
    /// has room for those still.
    pub fn repairable(&self, disk: DiskId) -> bool {
        self.inner.entry(disk).is_some_and(|entry| {
            let state = entry.state();
            state.health() == DiskHealth::Up && !state.is_unwritable((self.inner.clock)())
        })
    }

    /// Tells of an error that a request to `disk` met. Only errors that speak against the disk or the way to it count;
    /// a chunk that is missing or corrupt does not.
    pub fn failed(&self, disk: DiskId, error: &ChunkError) {
        let Some(entry) = self.inner.entry(disk) else { return };
        let now = (self.inner.clock)();
        match error {
            ChunkError::DiskFull => {
                self.inner.change(&entry, |state, settings| state.full_until(now + settings.unwritable_hold));
            }
            ChunkError::Overloaded | ChunkError::Link(LinkError::Busy) => {
                self.inner.change(&entry, |state, settings| state.unwritable_until(now + settings.unwritable_hold));
            }
            ChunkError::Link(LinkError::TooLarge) => {}
            ChunkError::Link(link) => {
                self.inner.counters.service_errors.fetch_add(1, Ordering::Relaxed);
                let refused = nobody_there(link);
                self.inner.change(&entry, |state, settings| state.error(now, refused, &error.to_string(), settings));
                self.inner.kick.notify_one();
            }
            ChunkError::Disk(_) => {
                self.inner.counters.service_errors.fetch_add(1, Ordering::Relaxed);
                self.inner.change(&entry, |state, settings| state.error(now, false, &error.to_string(), settings));
                self.inner.kick.notify_one();
            }
            ChunkError::NotFound
            | ChunkError::Corrupt { .. }
            | ChunkError::Rejected(_)
            | ChunkError::StaleLease { .. } => {}
        }
    }

    /// All disks in order of their ids.
    pub fn view(&self) -> Vec<DiskView> {
        let table = self.inner.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut view: Vec<DiskView> = table
            .values()
            .map(|entry| {
                let state = entry.state();
                DiskView {
                    id: entry.id,
                    address: entry.address.clone(),
                    health: state.health(),
                    times_up: state.times_up(),
                    status: state.status().cloned(),
                    last_error: state.last_error().map(str::to_owned),
                }
            })
            .collect();
        view.sort_by_key(|disk| disk.id);
        view
    }

    /// Changes whenever a disk's health changes or the map brings other disks.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// The highest epoch of the cluster map that a disk node told with its status, since this gateway began.
    pub fn heard_epoch(&self) -> watch::Receiver<Epoch> {
        self.inner.heard.subscribe()
    }

    /// Counters.
    pub fn counters(&self) -> &DiskCounters {
        &self.inner.counters
    }

    /// Waits until the map is known and every disk in it was pinged once, at most `deadline`. Answers whether it came
    /// to that.
    pub async fn wait_ready(&self, deadline: Duration) -> bool {
        let ready = async {
            let mut changes = self.changes();
            loop {
                if self.map().is_some() && self.inner.all_pinged() {
                    return;
                }
                if changes.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        tokio::time::timeout(deadline, ready).await.is_ok()
    }
}

impl Entry {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn entry(&self, disk: DiskId) -> Option<Arc<Entry>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(&disk).cloned()
    }

    fn all_pinged(&self) -> bool {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        !table.is_empty() && table.values().all(|entry| entry.state().was_pinged())
    }

    /// Applies an event to a disk's state; tells and logs when its health changed.
    fn change(&self, entry: &Entry, event: impl FnOnce(&mut State, &DiskSettings)) {
        let (before, after, error, first) = {
            let mut state = entry.state();
            let (before, pinged) = (state.health(), state.was_pinged());
            event(&mut state, &self.settings);
            (before, state.health(), state.last_error().unwrap_or_default().to_owned(), pinged != state.was_pinged())
        };
        if before != after {
            match after {
                DiskHealth::Up => tracing::info!(disk = %entry.id, address = %entry.address, "disk is up"),
                DiskHealth::Suspect => {
                    tracing::warn!(disk = %entry.id, address = %entry.address, %error, "disk is suspect")
                }
                // Also one that is dead when the gateway starts: nothing else would ever tell of it.
                DiskHealth::Down => {
                    self.counters.downs.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(disk = %entry.id, address = %entry.address, %error, "disk is down");
                }
            }
        }
        if before != after || first {
            self.changes.send_modify(|version| *version = version.wrapping_add(1));
        }
    }

    /// Makes the table agree with the map and the override. Clients and health of disks that did not move are kept.
    fn take_map(&self, addresses: &BTreeMap<DiskId, String>) {
        let Some(map) = self.map.borrow().clone() else { return };
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = HashMap::with_capacity(map.disks.len());
        let mut changed = false;
        for disk in map.disks.values().filter(|disk| disk.state != DiskState::Out) {
            let address = addresses.get(&disk.id).unwrap_or(&disk.address);
            let kept = table.get(&disk.id).filter(|entry| entry.address == *address && entry.uuid == disk.uuid);
            let entry = kept.cloned().unwrap_or_else(|| {
                changed = true;
                let ends = Ends { to: Some(disk.uuid), from: None, gateway: self.gateway };
                let (credentials, limits) = (self.credentials.clone(), self.settings.limits.clone());
                Arc::new(Entry {
                    id: disk.id,
                    uuid: disk.uuid,
                    address: address.clone(),
                    client: NodeClient::new(address.clone(), ends, credentials, limits),
                    state: Mutex::new(State::default()),
                })
            });
            next.insert(disk.id, entry);
        }
        changed |= next.len() != table.len();
        *table = next;
        drop(table);
        if changed {
            self.changes.send_modify(|version| *version = version.wrapping_add(1));
            self.kick.notify_one();
        }
    }

    async fn ping(&self, entry: Arc<Entry>) {
        let answer = entry.client.control(ControlRequest::Status, self.settings.ping_deadline);
        let answer =
            tokio::time::timeout(self.settings.ping_deadline * 2, answer).await.unwrap_or(Err(LinkError::Timeout));
        let now = (self.clock)();
        let good = match answer {
            Ok(ControlResponse::Status(status))
                if status.uuid == entry.uuid && status.disk.is_none_or(|id| id == entry.id) =>
            {
                let told = status.epoch;
                self.heard.send_if_modified(|heard| {
                    let newer = told > *heard;
                    *heard = told.max(*heard);
                    newer
                });
                self.change(&entry, |state, settings| state.pinged(now, status, settings));
                true
            }
            Ok(ControlResponse::Status(status)) => {
                let error = format!("another disk answers there: uuid {}, disk {:?}", status.uuid, status.disk);
                self.change(&entry, |state, settings| state.error(now, true, &error, settings));
                false
            }
            Ok(ControlResponse::Error(error)) => {
                self.change(&entry, |state, settings| state.error(now, false, &error.to_string(), settings));
                false
            }
            Ok(_) => {
                self.change(&entry, |state, settings| {
                    state.error(now, false, "a ping was answered with something else", settings)
                });
                false
            }
            // Somebody is there, and has no place for another connection just now: that says nothing about the disk.
            Err(LinkError::Busy) => {
                self.change(&entry, |state, settings| state.busy(now, settings));
                false
            }
            Err(error) => {
                let refused = nobody_there(&error);
                self.change(&entry, |state, settings| state.error(now, refused, &error.to_string(), settings));
                false
            }
        };
        let counter = if good { &self.counters.pings_good } else { &self.counters.pings_failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Pings all disks, or only those that are Suspect or new.
    async fn ping_round(&self, only_suspect: bool) {
        let due: Vec<Arc<Entry>> = {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            table
                .values()
                .filter(|entry| !only_suspect || entry.state().health() == DiskHealth::Suspect)
                .cloned()
                .collect()
        };
        stream::iter(due).for_each_concurrent(self.settings.pings_at_once, |entry| self.ping(entry)).await;
    }
}

/// Does the error say that the disk that is meant is not there? Another one, or a stranger, may answer at its address.
fn nobody_there(error: &LinkError) -> bool {
    matches!(
        error,
        LinkError::Connect(_)
            | LinkError::Auth(AuthError::Magic | AuthError::Cluster | AuthError::Secret | AuthError::Disk)
    )
}

/// The one task of [`Disks`].
struct Watcher {
    inner: Arc<Inner>,
    addresses: BTreeMap<DiskId, String>,
    read_at: Option<SystemTime>,
}

impl Watcher {
    async fn run(mut self, stop: CancellationToken) {
        let mut map = self.inner.map.clone();
        let mut tick = tokio::time::interval(self.inner.settings.ping_interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut map_lives = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = map.changed(), if map_lives => {
                    map_lives = changed.is_ok();
                    self.inner.take_map(&self.addresses);
                }
                _ = tick.tick() => {
                    self.read_overrides().await;
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = self.inner.ping_round(false) => {}
                    }
                }
                () = self.inner.kick.notified() => {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = self.inner.ping_round(true) => {}
                    }
                    // Errors come in bursts; one extra ping per burst tells enough.
                    tokio::time::sleep(self.inner.settings.ping_interval / 10).await;
                }
            }
        }
    }

    async fn read_overrides(&mut self) {
        let Some(path) = &self.inner.overrides else { return };
        let modified = tokio::fs::metadata(path).await.ok().and_then(|meta| meta.modified().ok());
        if modified.is_none() || modified == self.read_at {
            return;
        }
        match tokio::fs::read(path).await.map_err(|error| error.to_string()).and_then(|text| {
            serde_json::from_slice::<BTreeMap<DiskId, String>>(&text).map_err(|error| error.to_string())
        }) {
            Ok(addresses) => {
                self.addresses = addresses;
                self.inner.take_map(&self.addresses);
            }
            // Half-written or wrong: the addresses known so far stay, and it is read again when it changes again.
            Err(error) => tracing::warn!(path = %path.display(), %error, "address override cannot be read"),
        }
        self.read_at = modified;
    }
}
