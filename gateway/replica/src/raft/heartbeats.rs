//! Heartbeats of several shards to one disk, in one message.
//!
//! The heartbeat of a timer may wait a little for others to the same disk. One that a read barrier waits for does not:
//! it goes at once, and so does one of its shard to the same disk that waits already. Appends and votes never come
//! here.

use super::network::{PeerTransport, TransportError};
use bytes::Bytes;
use granary_placement::id::{DiskId, ShardId};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, Notify};

/// Most heartbeats of one message.
const BATCH_MESSAGES: usize = 1_000;

type Answer = Result<Bytes, TransportError>;

struct Waiting {
    shard: ShardId,
    message: Bytes,
    answer: oneshot::Sender<Answer>,
}

/// Heartbeats that wait to go to one disk. At most one for each shard: the Raft library sends none while it waits for
/// an answer.
#[derive(Default)]
struct Batch {
    waiting: Vec<Waiting>,
    hurry: Arc<Notify>,
}

/// What was sent.
#[derive(Debug, Default)]
pub struct HeartbeatCounters {
    /// Heartbeats that waited for others.
    pub heartbeats: AtomicU64,
    /// Messages they became.
    pub messages: AtomicU64,
    /// Read barriers that had to ask everybody.
    pub late_barriers: AtomicU64,
}

/// The heartbeats of all shards of a disk.
pub struct Heartbeats {
    transport: Arc<dyn PeerTransport>,
    /// How long one waits for others.
    window: Duration,
    deadline: Duration,
    batches: Mutex<BTreeMap<DiskId, Batch>>,
    /// What was sent.
    pub counters: HeartbeatCounters,
}

impl Heartbeats {
    /// `deadline` is that of each message.
    pub fn new(transport: Arc<dyn PeerTransport>, window: Duration, deadline: Duration) -> Arc<Heartbeats> {
        let counters = HeartbeatCounters::default();
        Arc::new(Heartbeats { transport, window, deadline, batches: Mutex::default(), counters })
    }

    fn batches(&self) -> MutexGuard<'_, BTreeMap<DiskId, Batch>> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a heartbeat, together with others that come soon unless `urgent` says yes.
    ///
    /// # Errors
    /// As [`PeerTransport::raft`].
    pub async fn send(
        self: &Arc<Self>,
        to: DiskId,
        shard: ShardId,
        message: Bytes,
        urgent: impl FnOnce() -> bool,
    ) -> Answer {
        let wait = {
            let mut batches = self.batches();
            // Asked under the lock: a barrier says that it is urgent first, and then looks for what waits.
            if urgent() {
                None
            } else {
                let batch = batches.entry(to).or_default();
                let (answer, wait) = oneshot::channel();
                batch.waiting.push(Waiting { shard, message: message.clone(), answer });
                if batch.waiting.len() == 1 {
                    tokio::spawn(self.clone().send_batch(to, batch.hurry.clone()));
                }
                Some(wait)
            }
        };
        match wait {
            None => self.transport.raft(to, shard, message, self.deadline).await,
            Some(wait) => wait.await.unwrap_or(Err(TransportError::Timeout)),
        }
    }

    /// Lets the heartbeats of a shard to these disks go at once.
    pub fn hurry(&self, shard: ShardId, to: impl Fn(DiskId) -> bool) {
        for (disk, batch) in self.batches().iter() {
            if to(*disk) && batch.waiting.iter().any(|waiting| waiting.shard == shard) {
                batch.hurry.notify_one();
            }
        }
    }

    async fn send_batch(self: Arc<Self>, to: DiskId, hurry: Arc<Notify>) {
        tokio::select! {
            () = tokio::time::sleep(self.window) => {}
            () = hurry.notified() => {}
        }
        let mut waiting = self.batches().remove(&to).unwrap_or_default().waiting;
        while !waiting.is_empty() {
            let rest = waiting.split_off(waiting.len().min(BATCH_MESSAGES));
            self.send_messages(to, std::mem::replace(&mut waiting, rest)).await;
        }
    }

    async fn send_messages(&self, to: DiskId, waiting: Vec<Waiting>) {
        self.counters.heartbeats.fetch_add(waiting.len() as u64, Ordering::Relaxed);
        self.counters.messages.fetch_add(1, Ordering::Relaxed);
        let (mut messages, mut answers) = (Vec::new(), Vec::new());
        for Waiting { shard, message, answer } in waiting {
            messages.push((shard, message));
            answers.push(answer);
        }
        let found = match messages.as_slice() {
            [(shard, message)] => {
                self.transport.raft(to, *shard, message.clone(), self.deadline).await.map(|one| vec![Ok(one)])
            }
            _ => self.transport.raft_batch(to, messages, self.deadline).await,
        };
        match found {
            Ok(found) => {
                // A sender that gets no answer of its own is told so when its channel closes.
                for (answer, found) in answers.into_iter().zip(found) {
                    let _ = answer.send(found);
                }
            }
            Err(error) => {
                for answer in answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }
}
