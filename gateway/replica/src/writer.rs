//! The log writer: one thread, one queue and one sync for the appends, votes, truncations and purges of all shards of a
//! disk.
//!
//! It drains the queue, merges what it finds into one batch, writes and syncs that once, and answers all (group
//! commit). The queue is first in, first out, so the writes of a shard, votes among them, reach the disk in the order
//! in which Raft made them.

use crate::fatal::Fatal;
use crate::store::{LogDb, LogWrite};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::mpsc;

/// Most writes that wait. A shard has a handful under way, so this only bounds a disk that hangs.
const QUEUE: usize = 4_096;
/// A batch is closed at this size, in bytes.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Or at this many writes.
const BATCH_WRITES: usize = 1_024;

/// Told when a write is durable, or why it is not.
pub type OnDurable = Box<dyn FnOnce(Result<(), String>) + Send>;

/// Writes that belong together, and who waits for them.
pub struct LogJob {
    /// Written in one batch, in this order.
    pub writes: Vec<LogWrite>,
    /// Called by the writer thread; must not block.
    pub on_durable: OnDurable,
}

impl LogJob {
    fn len_bytes(&self) -> usize {
        self.writes
            .iter()
            .map(|write| match write {
                LogWrite::Put(key, value) => key.len() + value.len(),
                LogWrite::DeleteRange(from, to) => from.len() + to.len(),
            })
            .sum()
    }
}

/// What the writer did since it began.
#[derive(Debug, Default)]
pub struct WriterCounters {
    /// Syncs of the Raft log.
    pub syncs: AtomicU64,
    /// Jobs those made durable.
    pub jobs: AtomicU64,
    /// Bytes written.
    pub bytes: AtomicU64,
}

/// Hands jobs to the writer thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct LogWriter {
    queue: mpsc::Sender<LogJob>,
    /// Its counters.
    pub counters: Arc<WriterCounters>,
}

/// The writer is gone: the disk failed, or the process is stopping.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the log writer has stopped")]
pub struct WriterStopped;

impl LogWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(db: Arc<LogDb>, fatal: Fatal) -> std::io::Result<(LogWriter, JoinHandle<()>)> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let counters = Arc::new(WriterCounters::default());
        let counted = counters.clone();
        let thread =
            std::thread::Builder::new().name("raft-log".to_owned()).spawn(move || run(&db, jobs, &fatal, &counted))?;
        Ok((LogWriter { queue, counters }, thread))
    }

    /// Queues a job; waits while the queue is full.
    ///
    /// # Errors
    /// [`WriterStopped`]; the job was not taken.
    pub async fn submit(&self, job: LogJob) -> Result<(), WriterStopped> {
        self.queue.send(job).await.map_err(|_| WriterStopped)
    }

    /// Waits until everything that was queued before is durable.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn flush(&self) -> Result<(), String> {
        self.write(Vec::new()).await
    }

    /// Queues writes and waits until they are durable.
    ///
    /// # Errors
    /// Why they are not.
    pub async fn write(&self, writes: Vec<LogWrite>) -> Result<(), String> {
        let (done, wait) = tokio::sync::oneshot::channel();
        let on_durable: OnDurable = Box::new(move |result| {
            let _ = done.send(result);
        });
        self.submit(LogJob { writes, on_durable }).await.map_err(|stopped| stopped.to_string())?;
        wait.await.unwrap_or_else(|_| Err(WriterStopped.to_string()))
    }
}

fn run(db: &LogDb, mut jobs: mpsc::Receiver<LogJob>, fatal: &Fatal, counters: &WriterCounters) {
    let _whole = fatal.at_a_panic("writing the Raft log");
    while let Some(first) = jobs.blocking_recv() {
        let mut bytes = first.len_bytes();
        let mut writes = first.writes;
        let mut waiting = vec![first.on_durable];
        while bytes < BATCH_BYTES && writes.len() < BATCH_WRITES {
            let Ok(job) = jobs.try_recv() else { break };
            bytes += job.len_bytes();
            writes.extend(job.writes);
            waiting.push(job.on_durable);
        }
        let result = fatal.check().and_then(|()| {
            db.write_synced(&writes).map_err(|error| {
                fatal.raise(format!("writing the Raft log: {error}"));
                error.to_string()
            })
        });
        counters.syncs.fetch_add(1, Ordering::Relaxed);
        counters.jobs.fetch_add(waiting.len() as u64, Ordering::Relaxed);
        counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        for on_durable in waiting {
            on_durable(result.clone());
        }
    }
}
