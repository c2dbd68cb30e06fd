//! Keeps one disk-node process per disk directory running.
//!
//! Each directory has a task that owns its process: it makes the disk ready ([`super::ready`]), starts the node, waits
//! for its end, and starts it again after a pause, or waits for an order under `--no-restart`. The task ends when the
//! cluster stops.

use super::child::{Program, Spawner};
use super::layout::Slot;
use super::ready::{Identity, Readier};
use granary_placement::id::{DiskId, DiskUuid};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A node that ran this long is not in a loop of crashes: the next pause is short again.
const STEADY: Duration = Duration::from_secs(30);
/// How often a running node's directory is looked at, and how often its label must be missed before it counts as gone.
const LABEL_LOOK: Duration = Duration::from_secs(1);
const LABEL_LOOKS: u32 = 2;
/// How long a node may take to stop in peace.
const STOP: Duration = Duration::from_secs(20);
/// How long an order may take: a start may include a replacement, which waits for the root shard.
const ORDER: Duration = Duration::from_secs(90);

/// What a directory's process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Being made ready: label, address, perhaps a replacement.
    Preparing,
    /// The process runs.
    Running,
    /// It ended or could not be started, and will be started again.
    Waiting,
    /// It ended and waits for an order.
    Stopped,
}

impl Phase {
    /// The word in `cluster.json`.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Preparing => "preparing",
            Phase::Running => "running",
            Phase::Waiting => "waiting",
            Phase::Stopped => "stopped",
        }
    }
}

/// A directory's disk and process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// What it is doing.
    pub phase: Phase,
    /// The disk that lives there, once known.
    pub disk: Option<DiskId>,
    /// Its UUID.
    pub uuid: Option<DiskUuid>,
    /// Where its node listens.
    pub address: String,
    /// The process, while it runs.
    pub pid: Option<u32>,
    /// Starts since `granary dev` began.
    pub starts: u64,
    /// What went wrong last.
    pub detail: Option<String>,
    /// Disks that lived here since `granary dev` began.
    pub past: BTreeSet<DiskId>,
}

/// An order to a directory's task; answered when it is carried out.
#[derive(Debug)]
enum Order {
    Start(oneshot::Sender<Result<(), String>>),
    Stop(oneshot::Sender<Result<(), String>>),
    /// Of this disk: a directory that has another one by now is left alone.
    Replace(DiskId, oneshot::Sender<Result<(), String>>),
}

/// How nodes are started.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// The `granary-disk-node` executable.
    pub program: PathBuf,
    /// File of the cluster secret.
    pub secret_file: PathBuf,
    /// File of addresses that replace those of the map.
    pub addresses_file: PathBuf,
    /// `NAME=VALUE` of the settings that were given for disk nodes.
    pub set: Vec<String>,
    /// Start a node again when it ends.
    pub restart: bool,
}

/// One directory, seen from outside its task.
#[derive(Debug)]
pub struct SlotHandle {
    /// The directory.
    pub slot: Slot,
    /// Its path.
    pub dir: PathBuf,
    /// Its log.
    pub log: PathBuf,
    orders: mpsc::Sender<Order>,
    state: watch::Receiver<SlotState>,
}

impl SlotHandle {
    /// How it stands.
    pub fn state(&self) -> SlotState {
        self.state.borrow().clone()
    }

    /// News of it.
    pub fn watch(&self) -> watch::Receiver<SlotState> {
        self.state.clone()
    }

    /// Starts the node unless it runs. An empty directory becomes a new disk first, but not where the others can take
    /// over what the lost one held: that is for [`SlotHandle::replace`].
    ///
    /// # Errors
    /// Why it does not run, in words for the operator.
    pub async fn start(&self) -> Result<(), String> {
        self.order(Order::Start).await
    }

    /// Stops the node and leaves it stopped.
    ///
    /// # Errors
    /// The cluster is stopping.
    pub async fn stop(&self) -> Result<(), String> {
        self.order(Order::Stop).await
    }

    /// Stops the node of the disk, puts its directory aside and starts a new disk in its place.
    ///
    /// # Errors
    /// Why that failed; another disk lives there by now.
    pub async fn replace(&self, disk: DiskId) -> Result<(), String> {
        self.order(|reply| Order::Replace(disk, reply)).await
    }

    async fn order(&self, order: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Order) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        self.orders
            .try_send(order(reply))
            .map_err(|_| "the disk has too many orders waiting, or is stopping".to_owned())?;
        match tokio::time::timeout(ORDER, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("the cluster is stopping".to_owned()),
            Err(_) => {
                Err(self.state().detail.unwrap_or_else(|| format!("not done after {} s; it goes on", ORDER.as_secs())))
            }
        }
    }
}

/// The task of one directory.
pub struct SlotTask {
    slot: Slot,
    dir: PathBuf,
    log: PathBuf,
    settings: NodeSettings,
    spawner: Spawner,
    readier: Arc<Readier>,
    orders: mpsc::Receiver<Order>,
    state: watch::Sender<SlotState>,
    /// Who waits for the node to run.
    waiting: Vec<oneshot::Sender<Result<(), String>>>,
    /// One of them has ordered a new disk.
    replaces: bool,
}

enum Ended {
    ByItself(String),
    Ordered(Order),
    Stopping,
}

impl SlotTask {
    /// A directory's task and the handle of it.
    pub fn new(
        slot: Slot,
        dir: PathBuf,
        log: PathBuf,
        settings: NodeSettings,
        spawner: Spawner,
        readier: Arc<Readier>,
    ) -> (SlotTask, SlotHandle) {
        let (orders_in, orders) = mpsc::channel(16);
        let first = SlotState {
            phase: Phase::Preparing,
            disk: None,
            uuid: None,
            address: slot.map_address.clone(),
            pid: None,
            starts: 0,
            detail: None,
            past: BTreeSet::new(),
        };
        let state = watch::Sender::new(first);
        let handle = SlotHandle {
            slot: slot.clone(),
            dir: dir.clone(),
            log: log.clone(),
            orders: orders_in,
            state: state.subscribe(),
        };
        (
            SlotTask {
                slot,
                dir,
                log,
                settings,
                spawner,
                readier,
                orders,
                state,
                waiting: Vec::new(),
                replaces: false,
            },
            handle,
        )
    }

    /// Runs until `stop`; the node has ended when this returns.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut wanted = true;
        let mut pause = FIRST_PAUSE;
        while !stop.is_cancelled() {
            if !wanted {
                self.state.send_modify(|state| (state.phase, state.pid) = (Phase::Stopped, None));
                let order = tokio::select! {
                    order = self.orders.recv() => order,
                    () = stop.cancelled() => return,
                };
                let Some(order) = order else { return };
                wanted = self.take_idle(order).await;
                pause = FIRST_PAUSE;
                continue;
            }
            self.state.send_modify(|state| (state.phase, state.pid) = (Phase::Preparing, None));
            let started = tokio::select! {
                started = self.start() => started,
                () = stop.cancelled() => return,
            };
            let began = Instant::now();
            let trouble = match started {
                Ok(mut child) => match self.watch_child(&mut child, &stop).await {
                    Ended::Stopping => return,
                    Ended::Ordered(order) => {
                        wanted = self.take_idle(order).await;
                        continue;
                    }
                    Ended::ByItself(how) => {
                        wanted = self.settings.restart;
                        how
                    }
                },
                Err(why) => {
                    self.answer(&Err(why.clone()));
                    why
                }
            };
            if self.state.borrow().detail.as_ref() == Some(&trouble) {
                tracing::debug!(disk = %self.slot.name, %trouble, restart = wanted, "disk node still does not run");
            } else {
                tracing::warn!(disk = %self.slot.name, %trouble, restart = wanted, "disk node does not run");
            }
            self.state.send_modify(|state| {
                state.detail = Some(trouble);
                (state.phase, state.pid) = (Phase::Waiting, None);
            });
            if wanted {
                if began.elapsed() >= STEADY {
                    pause = FIRST_PAUSE;
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                    order = self.orders.recv() => match order {
                        Some(order) => {
                            let lives = self.state.borrow().disk;
                            if let Some(order) = meant(order, lives) {
                                wanted = self.take_idle(order).await;
                            }
                        }
                        None => return,
                    },
                    () = stop.cancelled() => return,
                }
            }
        }
    }

    /// An order while nothing runs; true: start.
    async fn take_idle(&mut self, order: Order) -> bool {
        match order {
            Order::Start(reply) => {
                self.waiting.push(reply);
                true
            }
            Order::Stop(reply) => {
                self.answer(&Err("stopped by another order".to_owned()));
                let _ = reply.send(Ok(()));
                false
            }
            Order::Replace(_, reply) => match self.readier.set_aside(&self.dir).await {
                Ok(()) => {
                    self.waiting.push(reply);
                    self.replaces = true;
                    true
                }
                Err(error) => {
                    let _ = reply.send(Err(error.to_string()));
                    true
                }
            },
        }
    }

    async fn start(&mut self) -> Result<Child, String> {
        let ready = self.readier.make_ready(&self.slot, &self.dir, self.replaces).await;
        let Identity { disk, uuid, address } = ready.map_err(|error| error.to_string())?;
        let mut args: Vec<OsString> = vec!["serve".into()];
        let settings = &self.settings;
        for (name, value) in [
            ("--dir", self.dir.as_os_str()),
            ("--listen", address.as_ref()),
            ("--secret-file", settings.secret_file.as_os_str()),
            ("--addresses", settings.addresses_file.as_os_str()),
        ] {
            args.extend([name.into(), value.to_owned()]);
        }
        args.extend(settings.set.iter().flat_map(|given| ["--set".into(), given.into()]));
        let program = Program { path: settings.program.clone(), args, log: self.log.clone() };
        let child =
            self.spawner.start(program).await.map_err(|error| format!("{}: {error}", settings.program.display()))?;
        let pid = child.id();
        tracing::info!(disk = disk.0, name = %self.slot.name, pid, %address, log = %self.log.display(), "disk node started");
        self.readier.metrics().disk_node_starts.with_label_values(&[&disk.0.to_string()]).inc();
        self.state.send_modify(|state| {
            state.past.extend(state.disk);
            state.past.insert(disk);
            (state.phase, state.pid, state.starts) = (Phase::Running, pid, state.starts + 1);
            (state.disk, state.uuid, state.address, state.detail) = (Some(disk), Some(uuid), address, None);
        });
        self.answer(&Ok(()));
        Ok(child)
    }

    /// Answers all who wait.
    fn answer(&mut self, result: &Result<(), String>) {
        self.replaces = false;
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(result.clone());
        }
    }

    async fn watch_child(&mut self, child: &mut Child, stop: &CancellationToken) -> Ended {
        let mut looks = tokio::time::interval(LABEL_LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut gone = 0u32;
        loop {
            let order = tokio::select! {
                _ = looks.tick() => {
                    gone = if matches!(super::label::read(&self.dir), Ok(None)) { gone + 1 } else { 0 };
                    if gone < LABEL_LOOKS {
                        continue;
                    }
                    // A process may live on for long with files that have no names any more; what it says is stored
                    // would be lost with it. There is nothing left to stop in peace.
                    if let Err(error) = child.kill().await {
                        tracing::warn!(disk = %self.slot.name, %error, "disk node could not be killed");
                    }
                    return Ended::ByItself(format!("{} or its label was removed; the disk node was killed", self.dir.display()));
                }
                ended = child.wait() => return Ended::ByItself(match ended {
                    Ok(status) => format!("the disk node ended: {status}; its log: {}", self.log.display()),
                    Err(error) => format!("the disk node's end is not known: {error}"),
                }),
                order = self.orders.recv() => order,
                () = stop.cancelled() => None,
            };
            match order {
                Some(Order::Start(reply)) => {
                    let _ = reply.send(Ok(()));
                }
                Some(order) => {
                    let lives = self.state.borrow().disk;
                    let Some(order) = meant(order, lives) else { continue };
                    stop_child(child, &self.slot.name).await;
                    return Ended::Ordered(order);
                }
                None => {
                    stop_child(child, &self.slot.name).await;
                    return Ended::Stopping;
                }
            }
        }
    }
}

/// The order, unless it is to replace a disk whose place another has taken: asked twice, for want of an answer, it must
/// not take the new disk away too. That is answered here.
fn meant(order: Order, lives: Option<DiskId>) -> Option<Order> {
    match (order, lives) {
        (Order::Replace(disk, reply), Some(lives)) if lives != disk => {
            let why = format!("disk {disk} has been replaced already: disk {lives} is in its place");
            let _ = reply.send(Err(why));
            None
        }
        (order, _) => Some(order),
    }
}

/// SIGTERM, some time, SIGKILL. The process is gone afterwards.
async fn stop_child(child: &mut Child, name: &str) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // The child is not reaped yet, so the id is still its own.
        if let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::TERM) {
            tracing::debug!(disk = %name, %error, "SIGTERM not delivered");
        }
    }
    if tokio::time::timeout(STOP, child.wait()).await.is_err() {
        tracing::warn!(disk = %name, "disk node did not stop in {} s and is killed", STOP.as_secs());
        if let Err(error) = child.kill().await {
            tracing::warn!(disk = %name, %error, "disk node could not be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::ready::tests::{all_lost, take_away};
    use super::*;

    #[test]
    fn a_disk_that_was_replaced_is_not_replaced_again_by_its_old_number() {
        for (asked, lives, refused) in [(2, Some(2), false), (2, Some(8), true), (8, Some(8), false), (2, None, false)]
        {
            let (reply, mut answer) = oneshot::channel();
            let order = meant(Order::Replace(DiskId(asked), reply), lives.map(DiskId));
            assert_eq!(order.is_none(), refused, "disk {asked} where {lives:?} lives");
            if refused {
                let why = answer.try_recv().unwrap().unwrap_err();
                assert_eq!(why, "disk 2 has been replaced already: disk 8 is in its place");
            }
        }
        let (reply, _answer) = oneshot::channel();
        assert!(meant(Order::Stop(reply), Some(DiskId(8))).is_some());
    }

    #[tokio::test]
    async fn only_an_order_to_replace_puts_a_new_disk_where_the_others_take_over() {
        let directory = tempfile::tempdir().unwrap();
        let (readier, peers, map) = all_lost(directory.path()).await;
        let disk = map.disk(DiskId(3)).unwrap();
        take_away(&peers, &map, disk.id);
        let slot = Slot { name: "disk-3".to_owned(), map_address: disk.address.clone() };
        let settings = NodeSettings {
            program: "no-such-program".into(),
            secret_file: "none".into(),
            addresses_file: "none".into(),
            set: Vec::new(),
            restart: true,
        };
        let dir = directory.path().join("disks/disk-3");
        let spawner = Spawner::new().unwrap();
        let (mut task, _handle) = SlotTask::new(slot, dir, "none".into(), settings, spawner, Arc::new(readier));
        let left = "disk 3 is gone: the others take over what it held";
        for (order, said) in [("none", left), ("start", left), ("replace", "no-such-program"), ("start", left)] {
            let (reply, mut answer) = oneshot::channel();
            match order {
                "start" => assert!(task.take_idle(Order::Start(reply)).await),
                "replace" => assert!(task.take_idle(Order::Replace(DiskId(3), reply)).await),
                _ => drop(reply),
            }
            let why = task.start().await.unwrap_err();
            assert!(why.contains(said), "{order}: {why}");
            task.answer(&Err(why));
            assert_eq!(answer.try_recv().is_ok(), order != "none", "{order}");
        }
    }
}
