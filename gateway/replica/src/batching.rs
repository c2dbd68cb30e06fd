//! The two queues into a shard: proposals share log entries, reads share read barriers.
//!
//! - Proposals: a task takes what waits, up to a number and a size, into one log entry. A few entries are under way at
//!   a time, so a lone command goes at once, and under load the next entry fills while those are replicated.
//! - Reads: a barrier under way may have begun before a later read arrived, so that one waits for the next; one barrier
//!   then serves all that wait.

use crate::raft::{Batch, Replica};
use granary_meta::message::{encode_batch, encode_request};
use granary_meta::{MetaRequest, Reply};
use granary_wire::control::ControlError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most requests that wait in a queue; more are told Overloaded.
const QUEUE: usize = 1_024;
/// Most requests of one log entry.
const BATCH_REQUESTS: usize = 64;
/// An entry is closed at this size, in bytes.
const BATCH_BYTES: usize = 1024 * 1024;
/// Longest single request, in bytes: a CompleteUpload of 10,000 parts has room.
pub const MAX_REQUEST_BYTES: usize = 6 * 1024 * 1024;
/// Entries of a shard under way at a time.
const IN_FLIGHT: usize = 4;

/// What the batchers of a disk did since they began.
#[derive(Debug, Default)]
pub struct BatchCounters {
    /// Requests taken.
    pub requests: AtomicU64,
    /// Log entries they became.
    pub entries: AtomicU64,
    /// Reads taken.
    pub reads: AtomicU64,
    /// Barriers they shared.
    pub barriers: AtomicU64,
}

struct Proposal {
    request: MetaRequest,
    encoded: Vec<u8>,
    reply: oneshot::Sender<Result<Reply, ControlError>>,
}

type ReadTicket = oneshot::Sender<Result<(), ControlError>>;

/// A running replica and the queues into it.
pub struct Batcher {
    /// The replica.
    pub replica: Arc<Replica>,
    proposals: mpsc::Sender<Proposal>,
    reads: mpsc::Sender<ReadTicket>,
    /// Ends its tasks.
    pub stop: CancellationToken,
}

fn gone() -> ControlError {
    ControlError::Unavailable("the replica is stopping".to_owned())
}

fn full<T>(error: mpsc::error::TrySendError<T>) -> ControlError {
    match error {
        mpsc::error::TrySendError::Full(_) => ControlError::Overloaded,
        mpsc::error::TrySendError::Closed(_) => gone(),
    }
}

impl Batcher {
    /// Starts the tasks that empty the queues.
    pub fn start(
        replica: Arc<Replica>,
        counters: Arc<BatchCounters>,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Batcher {
        let (proposals, proposed) = mpsc::channel(QUEUE);
        let (reads, asked) = mpsc::channel(QUEUE);
        tasks.spawn(propose(replica.clone(), proposed, counters.clone(), stop.clone(), tasks.clone()));
        tasks.spawn(serve_reads(replica.clone(), asked, counters, stop.clone()));
        Batcher { replica, proposals, reads, stop }
    }

    /// Puts a request through the log.
    ///
    /// # Errors
    /// As [`Replica::propose`]; Overloaded; BadRequest for one that is too long.
    pub async fn command(&self, request: MetaRequest) -> Result<Reply, ControlError> {
        let encoded = encode_request(&request).map_err(|error| ControlError::BadRequest(error.to_string()))?;
        if encoded.len() > MAX_REQUEST_BYTES {
            return Err(ControlError::BadRequest(format!("a command of {} bytes", encoded.len())));
        }
        let (reply, wait) = oneshot::channel();
        self.proposals.try_send(Proposal { request, encoded, reply }).map_err(full)?;
        wait.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Waits for a read barrier that begins after this call.
    ///
    /// # Errors
    /// As [`Replica::read_barrier`]; Overloaded.
    pub async fn read_barrier(&self) -> Result<(), ControlError> {
        let (ticket, wait) = oneshot::channel();
        self.reads.try_send(ticket).map_err(full)?;
        wait.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn propose(
    replica: Arc<Replica>,
    mut queue: mpsc::Receiver<Proposal>,
    counters: Arc<BatchCounters>,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut held: Option<Proposal> = None;
    loop {
        let first = match held.take() {
            Some(proposal) => proposal,
            None => tokio::select! {
                () = stop.cancelled() => return,
                next = queue.recv() => match next {
                    Some(proposal) => proposal,
                    None => return,
                },
            },
        };
        // The place is taken before the batch is: what arrives while all are busy shares the next entry.
        let permit = tokio::select! {
            () = stop.cancelled() => return,
            permit = in_flight.clone().acquire_owned() => match permit {
                Ok(permit) => permit,
                Err(_) => return,
            },
        };
        let mut bytes = first.encoded.len();
        let mut batch = vec![first];
        while batch.len() < BATCH_REQUESTS {
            let Ok(next) = queue.try_recv() else { break };
            if bytes + next.encoded.len() > BATCH_BYTES {
                held = Some(next);
                break;
            }
            bytes += next.encoded.len();
            batch.push(next);
        }
        counters.requests.fetch_add(batch.len() as u64, Ordering::Relaxed);
        counters.entries.fetch_add(1, Ordering::Relaxed);
        let (replica, stop) = (replica.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = put_through(&replica, batch) => {}
            }
            drop(permit);
        });
    }
}

async fn put_through(replica: &Replica, batch: Vec<Proposal>) {
    let encoded = encode_batch(batch.iter().map(|proposal| proposal.encoded.as_slice()));
    let mut requests = Vec::with_capacity(batch.len());
    let mut waiting = Vec::with_capacity(batch.len());
    for proposal in batch {
        requests.push(proposal.request);
        waiting.push(proposal.reply);
    }
    match replica.propose(Batch { requests: Arc::new(requests), encoded }).await {
        Ok(replies) if replies.len() == waiting.len() => {
            for (waiting, reply) in waiting.into_iter().zip(replies) {
                let _ = waiting.send(Ok(reply));
            }
        }
        Ok(_) => {
            for waiting in waiting {
                let _ = waiting.send(Err(ControlError::Unavailable("replies do not match requests".to_owned())));
            }
        }
        Err(error) => {
            for waiting in waiting {
                let _ = waiting.send(Err(error.clone()));
            }
        }
    }
}

async fn serve_reads(
    replica: Arc<Replica>,
    mut queue: mpsc::Receiver<ReadTicket>,
    counters: Arc<BatchCounters>,
    stop: CancellationToken,
) {
    loop {
        let first = tokio::select! {
            () = stop.cancelled() => return,
            next = queue.recv() => match next {
                Some(ticket) => ticket,
                None => return,
            },
        };
        let mut waiting = vec![first];
        while let Ok(next) = queue.try_recv() {
            waiting.push(next);
        }
        counters.reads.fetch_add(waiting.len() as u64, Ordering::Relaxed);
        counters.barriers.fetch_add(1, Ordering::Relaxed);
        let result = tokio::select! {
            () = stop.cancelled() => return,
            result = replica.read_barrier() => result,
        };
        for ticket in waiting {
            let _ = ticket.send(result.clone());
        }
    }
}
