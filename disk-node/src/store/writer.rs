//! The writer thread and the bounded queue in front of it.
//!
//! The thread owns the [`Core`]. It takes what is waiting, writes pieces as they come, and carries out all finished
//! requests as one group, so that they share one sync: the longer a sync takes, the more requests the next one serves.
//! It ends on a stop message.

use super::core::{Core, Done, Op, Ticket, Whose};
use super::shared::Shared;
use super::StoreError;
use bytes::Bytes;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, OwnedSemaphorePermit, Semaphore};

/// Requests that share one sync at most.
const GROUP_REQUESTS: usize = 1024;

/// What waits in the queue. Permits ride along, so that a message leaves the bound when it is done.
enum Message {
    Reserve {
        id: ChunkId,
        spec: ChunkSpec,
        whose: Whose,
        reply: oneshot::Sender<Result<Reserved, StoreError>>,
        _permit: OwnedSemaphorePermit,
    },
    Piece {
        ticket: Ticket,
        at: u64,
        data: Vec<Bytes>,
        _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    },
    Op {
        op: Op,
        reply: oneshot::Sender<Result<Done, StoreError>>,
        permits: Permits,
    },
    /// Without a permit: there is at most one for each reservation.
    Abort(Ticket),
    Flush(oneshot::Sender<Result<(), StoreError>>),
    Stop(oneshot::Sender<Result<(), StoreError>>),
}

type Permits = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

/// The queue's sending end.
#[derive(Clone)]
pub(super) struct Queue {
    sender: mpsc::Sender<Message>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    queue_bytes: u64,
    queue_requests: usize,
}

/// A reservation; dropped without [`Reserved::commit`] its space is freed, also when the caller has gone.
pub(super) struct Reserved {
    ticket: Ticket,
    queue: Queue,
    committed: bool,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.committed {
            // A writer that is gone has no space to free.
            let _ = self.queue.sender.send(Message::Abort(self.ticket));
        }
    }
}

fn stopped() -> StoreError {
    StoreError::Failed("the store is stopped".to_owned())
}

impl Queue {
    async fn request_permit(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        self.requests.clone().acquire_owned().await.map_err(|_| stopped())
    }

    /// Waits until so many bytes may be waiting for the writer.
    pub(super) async fn byte_permit(&self, len_bytes: u64) -> Result<OwnedSemaphorePermit, StoreError> {
        // One message is always let in, however small the queue was set.
        let permits = u32::try_from(len_bytes.min(self.queue_bytes)).unwrap_or(u32::MAX);
        self.bytes.clone().acquire_many_owned(permits).await.map_err(|_| stopped())
    }

    /// Whether a request waits for the writer or is being carried out.
    pub(super) fn is_busy(&self) -> bool {
        self.requests.available_permits() < self.queue_requests
    }

    fn send(&self, message: Message) -> Result<(), StoreError> {
        self.sender.send(message).map_err(|_| stopped())
    }

    pub(super) async fn reserve(&self, id: ChunkId, spec: ChunkSpec, whose: Whose) -> Result<Reserved, StoreError> {
        let permit = self.request_permit().await?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::Reserve { id, spec, whose, reply, _permit: permit })?;
        answer.await.map_err(|_| stopped())?
    }

    /// Carries out one request; `bytes` is the permit of its payload.
    pub(super) async fn submit(&self, op: Op, bytes: Option<OwnedSemaphorePermit>) -> Result<Done, StoreError> {
        let permit = self.request_permit().await?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::Op { op, reply, permits: (permit, bytes) })?;
        answer.await.map_err(|_| stopped())?
    }

    pub(super) async fn flush(&self) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Flush(reply))?;
        answer.await.map_err(|_| stopped())?
    }

    /// Tells the thread to end, without waiting.
    pub(super) fn request_stop(&self) {
        let (reply, _) = oneshot::channel();
        let _ = self.send(Message::Stop(reply));
    }

    pub(super) async fn stop(&self) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Stop(reply))?;
        answer.await.map_err(|_| stopped())?
    }
}

impl Reserved {
    pub(super) async fn write(&self, at: u64, data: Vec<Bytes>, len_bytes: u64) -> Result<(), StoreError> {
        let bytes = self.queue.byte_permit(len_bytes).await?;
        let permit = self.queue.request_permit().await?;
        self.queue.send(Message::Piece { ticket: self.ticket, at, data, _permits: (permit, bytes) })
    }

    pub(super) async fn commit(mut self, crcs: Vec<u32>) -> Result<Done, StoreError> {
        let permit = self.queue.request_permit().await?;
        let (reply, answer) = oneshot::channel();
        self.committed = true;
        self.queue.send(Message::Op {
            op: Op::Commit { ticket: self.ticket, crcs },
            reply,
            permits: (permit, None),
        })?;
        answer.await.map_err(|_| stopped())?
    }
}

/// Starts the thread.
pub(super) fn start(core: Core, shared: Arc<Shared>) -> std::io::Result<(Queue, std::thread::JoinHandle<()>)> {
    let settings = shared.settings;
    let (sender, receiver) = mpsc::channel();
    let queue_bytes = settings.queue_bytes.max(settings.piece_bytes).max(settings.whole_bytes).min(u64::from(u32::MAX));
    let queue = Queue {
        sender,
        requests: Arc::new(Semaphore::new(settings.queue_requests)),
        bytes: Arc::new(Semaphore::new(usize::try_from(queue_bytes).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS))),
        queue_bytes,
        queue_requests: settings.queue_requests,
    };
    // The thread holds a sending end too, for the reservations it hands out: it is ended by Stop, which the handle
    // sends when dropped.
    let own = queue.clone();
    let thread = std::thread::Builder::new()
        .name("writer".to_owned())
        .spawn(move || Writer { core, shared, queue: own }.run(&receiver))?;
    Ok((queue, thread))
}

struct Writer {
    core: Core,
    shared: Arc<Shared>,
    queue: Queue,
}

struct Waiting {
    reply: oneshot::Sender<Result<Done, StoreError>>,
    _permits: Permits,
    stored_bytes: u64,
}

impl Writer {
    fn run(mut self, receiver: &mpsc::Receiver<Message>) {
        let mut more = false;
        loop {
            let timeout = if more { Duration::ZERO } else { self.shared.settings.punch_interval };
            let first = match receiver.recv_timeout(timeout) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (mut group, mut waiting) = (Vec::new(), Vec::new());
            let mut next = first;
            let mut stop = None;
            while let Some(message) = next {
                match message {
                    Message::Stop(reply) => {
                        stop = Some(reply);
                        break;
                    }
                    Message::Op { op, reply, permits } => {
                        let stored_bytes = self.stored_bytes(&op);
                        group.push(op);
                        waiting.push(Some(Waiting { reply, _permits: permits, stored_bytes }));
                    }
                    other => self.handle_unbatched(other),
                }
                if group.len() >= GROUP_REQUESTS {
                    break;
                }
                next = receiver.try_recv().ok();
            }
            self.commit(group, waiting);
            if let Some(reply) = stop {
                let _ = reply.send(self.core.flush());
                return;
            }
            // A failed store goes on answering, with its failure, until the process ends.
            more = self.core.housekeep(Instant::now()).unwrap_or(false);
        }
    }

    fn stored_bytes(&self, op: &Op) -> u64 {
        match op {
            Op::Put { spec, .. } => spec.len_bytes,
            Op::Commit { ticket, .. } => self.core.upload_bytes(*ticket),
            Op::Delete { .. } => 0,
        }
    }

    fn handle_unbatched(&mut self, message: Message) {
        match message {
            Message::Reserve { id, spec, whose, reply, _permit } => {
                let reserved = self.core.reserve(id, spec, whose);
                if reserved == Err(StoreError::DiskFull) {
                    self.shared.metrics.refused_full.inc();
                }
                // If nobody waits any more the reservation is dropped here and its abort comes back through the queue.
                let _ =
                    reply.send(reserved.map(|ticket| Reserved { ticket, queue: self.queue.clone(), committed: false }));
            }
            Message::Piece { ticket, at, data, _permits } => {
                // A failure reaches the sender with the commit: the store has ended.
                let _ = self.core.write_piece(ticket, at, &data);
            }
            Message::Abort(ticket) => self.core.abort(ticket),
            Message::Flush(reply) => {
                let _ = reply.send(self.core.flush());
            }
            Message::Op { .. } | Message::Stop(_) => {}
        }
    }

    fn commit(&mut self, group: Vec<Op>, mut waiting: Vec<Option<Waiting>>) {
        if group.is_empty() {
            return;
        }
        let metrics = self.shared.metrics.clone();
        metrics.group_requests.observe(group.len() as f64);
        self.core.commit(group, &mut |place, outcome| {
            let Some(waiting) = waiting.get_mut(place).and_then(Option::take) else { return };
            match &outcome {
                Ok(Done::Stored) => {
                    metrics.puts.inc();
                    metrics.put_bytes.inc_by(waiting.stored_bytes);
                }
                Ok(Done::Deleted(count)) => metrics.deletes.inc_by(u64::from(*count)),
                Err(StoreError::DiskFull) => metrics.refused_full.inc(),
                Err(_) => {}
            }
            // Whoever asked may be gone; what was done stays done.
            let _ = waiting.reply.send(outcome);
        });
    }
}
