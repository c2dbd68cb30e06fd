//! Chunks between "durable on disks" and "named by a committed record".
//!
//! Chunks whose commit never came are deleted in the background, so that a broken upload leaves nothing behind. The one
//! mistake to avoid is the other way round: deleting chunks of a commit that did happen. So whoever sends the commit
//! first says [`Staged::committing`]: from then on a dropped future (a client that hung up) leaves the chunks alone.

use super::counters::{add, ObjectCounters};
use crate::disks::{DiskHealth, Disks};
use futures::stream::{self, StreamExt};
use granary_meta::record::ObjectData;
use granary_meta::ChunkRef;
use granary_placement::id::{DiskId, Epoch};
use granary_wire::chunk::ChunkId;
use granary_wire::control::{ControlRequest, ControlResponse};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

/// Batches waiting for deletion; more are abandoned (a sweep by age finds them), never waited for.
const QUEUED_BATCHES: usize = 1024;
/// Batches deleted at once.
const BATCHES_AT_ONCE: usize = 8;
/// Tries per disk; the pause between them doubles from half a second.
const TRIES: u32 = 6;
/// Chunks per request.
const CHUNKS_PER_REQUEST: usize = 1000;
/// How long one deletion may take.
const DELETE_DEADLINE: Duration = Duration::from_secs(10);
/// How long writers of a failed upload may take to end before their chunks are deleted all the same.
const WRITERS_DEADLINE: Duration = Duration::from_secs(30);

/// A payload that is durable on disks, or ready to ride in a record, and not yet named by any record.
///
/// Dropped as it is, its chunks are deleted in the background. In this order:
/// 1. [`Staged::committing`] just before the commit is sent: from then on a drop deletes nothing;
/// 2. [`Staged::committed`], or [`Staged::unknown`] when no answer came, or [`Staged::refused`] when the shard said no.
#[derive(Debug)]
pub struct Staged {
    /// What the record is to carry.
    pub data: ObjectData,
    /// Chunks that are not on the disk of their slot; they go into the same commit.
    pub missing: Vec<ChunkRef>,
    /// Epoch of the map by which that is so; it goes into the commit too. Of no meaning for a payload on no disk.
    pub map_epoch: Epoch,
    /// The payload, in bytes.
    pub size_bytes: u64,
    pub(super) uncommitted: Uncommitted,
}

impl Staged {
    /// What the commit says of where the payload lies.
    pub fn placement(&self) -> Placement {
        Placement { missing: self.missing.clone(), map_epoch: self.map_epoch }
    }

    /// The commit is about to be sent: from now on, dropping this deletes nothing, because the commit may have
    /// happened.
    pub fn committing(&mut self) {
        self.uncommitted.armed = false;
    }

    /// The commit happened: the chunks stay.
    pub fn committed(mut self) {
        self.uncommitted.armed = false;
    }

    /// Nobody knows whether the commit happened: the chunks stay. If it did not, a sweep by age finds them.
    pub fn unknown(mut self) {
        self.uncommitted.armed = false;
    }

    /// The shard refused the commit, for certain: the chunks are deleted.
    pub fn refused(mut self) {
        self.uncommitted.armed = true;
    }
}

/// What a commit says of where a payload lies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// See [`Staged::missing`].
    pub missing: Vec<ChunkRef>,
    /// See [`Staged::map_epoch`].
    pub map_epoch: Epoch,
}

/// Chunks on disks that no record names; deleted in the background when dropped while armed.
#[derive(Debug)]
pub(super) struct Uncommitted {
    batch: Batch,
    armed: bool,
    cleaner: Cleaner,
}

/// One batch of chunks, and the tasks that may still be writing them.
#[derive(Debug, Default)]
struct Batch {
    chunks: Vec<(DiskId, ChunkId)>,
    writers: Vec<TaskTracker>,
}

impl Uncommitted {
    pub(super) fn new(cleaner: &Cleaner) -> Uncommitted {
        Uncommitted { batch: Batch::default(), armed: true, cleaner: cleaner.clone() }
    }

    /// Adds a chunk; called before its first byte is sent.
    pub(super) fn add_chunk(&mut self, disk: DiskId, chunk: ChunkId) {
        self.batch.chunks.push((disk, chunk));
    }

    /// Deletion waits for these tasks.
    pub(super) fn add_writers(&mut self, writers: &TaskTracker) {
        self.batch.writers.push(writers.clone());
    }

    /// Where chunks were written, also those of attempts that were given up.
    pub(super) fn chunks(&self) -> &[(DiskId, ChunkId)] {
        &self.batch.chunks
    }

    /// Takes over what another one holds.
    pub(super) fn absorb(&mut self, mut other: Uncommitted) {
        other.armed = false;
        self.batch.chunks.append(&mut other.batch.chunks);
        // Its writers are all done: it was a success.
    }
}

impl Drop for Uncommitted {
    fn drop(&mut self) {
        if self.armed && !self.batch.chunks.is_empty() {
            self.cleaner.delete(std::mem::take(&mut self.batch));
        }
    }
}

/// Deletes chunks of uploads that came to nothing. One task; it ends when all handles are gone and its queue is empty.
#[derive(Debug, Clone)]
pub(super) struct Cleaner {
    queue: mpsc::Sender<Batch>,
    counters: Arc<ObjectCounters>,
}

impl Cleaner {
    pub(super) fn start(disks: Disks, counters: Arc<ObjectCounters>) -> Cleaner {
        let (queue, batches) = mpsc::channel(QUEUED_BATCHES);
        let counted = counters.clone();
        tokio::spawn(async move {
            let (disks, counters) = (&disks, &counted);
            stream::unfold(batches, |mut batches| async { batches.recv().await.map(|batch| (batch, batches)) })
                .for_each_concurrent(BATCHES_AT_ONCE, |batch: Batch| clean(disks, counters, batch))
                .await;
        });
        Cleaner { queue, counters }
    }

    fn delete(&self, batch: Batch) {
        let count = u64::try_from(batch.chunks.len()).unwrap_or(u64::MAX);
        add(&self.counters.staged_chunks_dropped, count);
        if self.queue.try_send(batch).is_err() {
            add(&self.counters.staged_chunks_abandoned, count);
        }
    }
}

async fn clean(disks: &Disks, counters: &ObjectCounters, batch: Batch) {
    for writers in &batch.writers {
        writers.close();
        // A writer that outlives this may leave its chunk behind: an orphan, which costs space until the sweep, never
        // data.
        let _ = tokio::time::timeout(WRITERS_DEADLINE, writers.wait()).await;
    }
    let mut by_disk: BTreeMap<DiskId, Vec<ChunkId>> = BTreeMap::new();
    for (disk, chunk) in batch.chunks {
        by_disk.entry(disk).or_default().push(chunk);
    }
    stream::iter(by_disk)
        .for_each_concurrent(None, |(disk, chunks)| async move {
            for part in chunks.chunks(CHUNKS_PER_REQUEST) {
                let count = u64::try_from(part.len()).unwrap_or(0);
                let deleted = delete_with_retries(disks, disk, part).await;
                add(if deleted { &counters.staged_chunks_deleted } else { &counters.staged_chunks_abandoned }, count);
            }
        })
        .await;
}

async fn delete_with_retries(disks: &Disks, disk: DiskId, chunks: &[ChunkId]) -> bool {
    let mut pause = Duration::from_millis(500);
    for attempt in 0..TRIES {
        if attempt > 0 {
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        if disks.health(disk) == DiskHealth::Down && attempt + 1 < TRIES {
            continue;
        }
        let Some(client) = disks.client(disk) else { return false };
        match client
            .control(ControlRequest::DeleteChunks { chunks: chunks.to_vec(), lease: None }, DELETE_DEADLINE)
            .await
        {
            Ok(ControlResponse::Deleted(_)) => return true,
            Ok(other) => tracing::debug!(%disk, answer = ?other, "staged chunks could not be deleted"),
            Err(error) => tracing::debug!(%disk, %error, "staged chunks could not be deleted"),
        }
    }
    tracing::warn!(%disk, chunks = chunks.len(), "chunks of an upload that came to nothing stay behind");
    false
}
