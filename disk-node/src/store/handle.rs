//! The store as the daemon sees it: uploads, reads, deletions, listings. Cheap to clone; the last clone ends the
//! threads.

use super::core::{Done, Op, Whose};
use super::device::Device;
use super::format::{record_bytes, RECORDS_AT};
use super::index::{Batch, Engine, Index};
use super::read::Blocks;
use super::recover::{recover, Recovered};
use super::shared::lock;
use super::shared::{OnFatal, Shared};
use super::writer::{self, Queue, Reserved};
use super::{OpenError, StoreError, StoreSettings};
use crate::label::now_ms;
use crate::metrics::Metrics;
use bytes::{Bytes, BytesMut};
use granary_placement::id::DiskUuid;
use granary_wire::chunk::{BlockCrc, ChunkHealth, ChunkId, ChunkInfo, ChunkSpec, BLOCK_BYTES, MAX_CHUNK_BYTES};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tokio::sync::{oneshot, OwnedSemaphorePermit, Semaphore};

/// A chunk store.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    queue: Queue,
    readers: Readers,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.request_stop();
    }
}

/// How full a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Size of the file system, in bytes.
    pub capacity_bytes: u64,
    /// What new chunks may still take, in bytes.
    pub free_bytes: u64,
    /// Chunks held.
    pub chunks: u64,
    /// Payload of them, in bytes.
    pub chunk_bytes: u64,
}

type Job = Box<dyn FnOnce(&Shared) + Send>;

/// A few threads that read, behind a bounded queue.
struct Readers {
    /// None when the store is closed.
    jobs: Mutex<Option<mpsc::Sender<(Job, OwnedSemaphorePermit)>>>,
    room: Arc<Semaphore>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Readers {
    fn start(shared: &Arc<Shared>) -> std::io::Result<Readers> {
        let (jobs, receiver) = mpsc::channel::<(Job, OwnedSemaphorePermit)>();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut threads = Vec::new();
        for number in 0..shared.settings.read_threads.max(1) {
            let (receiver, shared) = (receiver.clone(), shared.clone());
            let thread = std::thread::Builder::new().name(format!("reader-{number}")).spawn(move || loop {
                let next = lock(&receiver).recv();
                match next {
                    Ok((job, permit)) => {
                        job(&shared);
                        drop(permit);
                    }
                    Err(_) => return,
                }
            })?;
            threads.push(thread);
        }
        let room = Arc::new(Semaphore::new(shared.settings.read_queue.max(1)));
        Ok(Readers { jobs: Mutex::new(Some(jobs)), room, threads: Mutex::new(threads) })
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.room.clone().try_acquire_owned().map_err(|_| StoreError::Overloaded)?;
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |shared| {
            // Nobody waits any more: the client is gone, spare the disk.
            if !reply.is_closed() {
                let _ = reply.send(job(shared));
            }
        });
        let stopped = || StoreError::Failed("the store is stopped".to_owned());
        lock(&self.jobs).as_ref().ok_or_else(stopped)?.send((job, permit)).map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}

impl Store {
    /// Recovers what is on the disk and starts the threads. Blocking: reads the tail of the segments, or all headers
    /// when the index is lost.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        device: Arc<dyn Device>,
        engine: Box<dyn Engine>,
        disk: DiskUuid,
        settings: StoreSettings,
        metrics: Arc<Metrics>,
        on_fatal: OnFatal,
    ) -> Result<(Store, Recovered), OpenError> {
        let shared = Arc::new(Shared::new(device, Index::new(engine), disk, settings, metrics, on_fatal));
        let (core, recovered) = recover(shared.clone())?;
        shared.metrics.recovered_records.set(recovered.records_indexed as i64);
        shared.metrics.torn_records.set(recovered.records_torn as i64);
        shared.count_findings().map_err(|error| OpenError::Device {
            what: "list damaged chunks".to_owned(),
            source: std::io::Error::other(error),
        })?;
        let threads = |source| OpenError::Device { what: "start threads".to_owned(), source };
        let readers = Readers::start(&shared).map_err(threads)?;
        let (queue, thread) = writer::start(core, shared.clone()).map_err(threads)?;
        Ok((Store(Arc::new(Inner { shared, queue, readers, writer: Mutex::new(Some(thread)) })), recovered))
    }

    /// Begins an upload; refuses early what cannot succeed.
    ///
    /// # Errors
    /// [`StoreError::Rejected`], [`StoreError::DiskFull`], [`StoreError::Failed`].
    pub async fn begin(&self, id: ChunkId, spec: ChunkSpec, whose: Whose) -> Result<Upload, StoreError> {
        let inner = &self.0;
        inner.shared.check_running()?;
        check_spec(&id, &spec)?;
        let room = if spec.len_bytes <= inner.shared.settings.whole_bytes {
            self.check_room(&spec, whose)?;
            Room::Whole
        } else {
            Room::Reserved(inner.queue.reserve(id, spec, whose).await?)
        };
        Ok(Upload {
            store: self.clone(),
            id,
            spec,
            whose,
            room,
            received_bytes: 0,
            sent_bytes: 0,
            crc: None,
            crcs: Vec::new(),
            pieces: Vec::new(),
            small: BytesMut::new(),
            gathered_bytes: 0,
        })
    }

    /// A small chunk gets its space when it is written; on a full disk it is refused before its payload is received.
    fn check_room(&self, spec: &ChunkSpec, whose: Whose) -> Result<(), StoreError> {
        let shared = &self.0.shared;
        let need = record_bytes(spec.len_bytes);
        let open = match whose {
            Whose::Client => &shared.open_bytes,
            Whose::Repair => &shared.open_repair_bytes,
        };
        if open.load(Ordering::Relaxed) >= need {
            return Ok(());
        }
        let space = shared.device.space().map_err(|error| StoreError::Unreadable(error.to_string()))?;
        if space.free_bytes.saturating_sub(whose.leaves_bytes(&shared.settings)) < RECORDS_AT + need {
            shared.metrics.refused_full.inc();
            return Err(StoreError::DiskFull);
        }
        Ok(())
    }

    /// Reads and verifies blocks; see [`Shared::read_blocks`].
    ///
    /// # Errors
    /// As there, and [`StoreError::Overloaded`].
    pub async fn read_blocks(&self, id: ChunkId, first_block: u32, blocks: u32) -> Result<Blocks, StoreError> {
        let read = self.0.readers.run(move |shared| shared.read_blocks(&id, first_block, blocks)).await?;
        let metrics = &self.0.shared.metrics;
        metrics.reads.inc();
        metrics.read_bytes.inc_by(read.data.iter().map(|block| block.len() as u64).sum());
        Ok(read)
    }

    /// Deletes chunks. Returns how many of them were there, once their removal is durable.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub async fn delete(&self, ids: Vec<ChunkId>) -> Result<u32, StoreError> {
        match self.0.queue.submit(Op::Delete { ids }, None).await? {
            Done::Deleted(count) => Ok(count),
            Done::Stored => Ok(0),
        }
    }

    /// Says for each of these chunks whether it is in the index.
    ///
    /// # Errors
    /// [`StoreError::Overloaded`], [`StoreError::Failed`].
    pub async fn have(&self, ids: Vec<ChunkId>) -> Result<Vec<bool>, StoreError> {
        let look = move |shared: &Shared| {
            shared.check_running()?;
            ids.iter()
                .map(|id| shared.index.chunk(id).map(|at| at.is_some()))
                .collect::<Result<_, _>>()
                .map_err(|error| shared.fail_index(&error))
        };
        self.0.readers.run(look).await
    }

    /// Reads one chunk whole and checks every block.
    ///
    /// # Errors
    /// [`StoreError::Overloaded`], [`StoreError::Failed`].
    pub async fn verify(&self, id: ChunkId) -> Result<ChunkHealth, StoreError> {
        self.0.readers.run(move |shared| shared.verify(&id)).await
    }

    /// Chunks in order of their ids, after that one; whether there are more.
    ///
    /// # Errors
    /// [`StoreError::Overloaded`], [`StoreError::Failed`].
    pub async fn list(&self, after: Option<ChunkId>, limit: usize) -> Result<(Vec<ChunkInfo>, bool), StoreError> {
        let look = move |shared: &Shared| {
            shared.check_running()?;
            let found = shared.index.chunks(after.as_ref(), limit + 1).map_err(|error| shared.fail_index(&error))?;
            let more = found.len() > limit;
            let now_ms = now_ms();
            let chunks = found.into_iter().take(limit).map(|(id, at)| {
                let since_ms = shared.index.quarantined_ms(&id).map_err(|error| shared.fail_index(&error))?;
                let quarantined_ms = since_ms.map(|since_ms| now_ms.saturating_sub(since_ms));
                let age_ms = now_ms.saturating_sub(at.spec.created_ms);
                Ok(ChunkInfo { id, spec: at.spec, age_ms, quarantined_ms })
            });
            Ok((chunks.collect::<Result<_, _>>()?, more))
        };
        self.0.readers.run(look).await
    }

    /// Chunks that the scrub found damaged, in order of their ids, after that one; whether there are more.
    ///
    /// # Errors
    /// [`StoreError::Overloaded`], [`StoreError::Failed`].
    pub async fn damaged(&self, after: Option<ChunkId>, limit: usize) -> Result<(Vec<ChunkInfo>, bool), StoreError> {
        self.0.readers.run(move |shared| shared.damaged_chunks(after, limit)).await
    }

    /// What readers and the writer share, for the scrub.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    /// Whether somebody reads or writes, or waits to.
    pub fn is_busy(&self) -> bool {
        let Inner { shared, queue, readers, .. } = &*self.0;
        readers.room.available_permits() < shared.settings.read_queue.max(1) || queue.is_busy()
    }

    /// Puts chunks into quarantine, or takes them out. The mark lies in the index alone: when that is lost, or written
    /// and not flushed yet when the power fails, the time begins anew.
    ///
    /// # Errors
    /// [`StoreError::Overloaded`], [`StoreError::Failed`].
    pub async fn quarantine(&self, ids: Vec<ChunkId>, into: bool) -> Result<(), StoreError> {
        let mark = move |shared: &Shared| {
            shared.check_running()?;
            let there = |id| Ok(shared.index.chunk(id).map_err(|error| shared.fail_index(&error))?.is_some());
            let mut batch = Batch::default();
            for id in &ids {
                let marked = shared.index.quarantined_ms(id).map_err(|error| shared.fail_index(&error))?.is_some();
                if !into && marked {
                    batch.remove_quarantine(id);
                } else if into && !marked && there(id)? {
                    batch.put_quarantine(id, now_ms());
                }
            }
            shared.index.write(batch).map_err(|error| shared.fail_index(&error))
        };
        self.0.readers.run(mark).await
    }

    /// What it was opened with.
    pub fn settings(&self) -> &StoreSettings {
        &self.0.shared.settings
    }

    /// How full the store is.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`] when the file system does not say.
    pub fn fill(&self) -> Result<Fill, StoreError> {
        let shared = &self.0.shared;
        shared.check_running()?;
        let space = shared.device.space().map_err(|error| StoreError::Unreadable(error.to_string()))?;
        let fill = Fill {
            capacity_bytes: space.capacity_bytes,
            free_bytes: space.free_bytes.saturating_sub(shared.settings.reserve_bytes)
                + shared.open_bytes.load(Ordering::Relaxed),
            chunks: shared.chunks.load(Ordering::Relaxed),
            chunk_bytes: shared.chunk_bytes.load(Ordering::Relaxed),
        };
        shared.metrics.free_bytes.set(fill.free_bytes as i64);
        shared.metrics.chunks.set(fill.chunks as i64);
        shared.metrics.chunk_bytes.set(fill.chunk_bytes as i64);
        Ok(fill)
    }

    /// Makes the index durable.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.0.queue.flush().await
    }

    /// Finishes what is queued, makes the index durable and ends the threads. Everything after that fails. The disk is
    /// let go when the last clone is dropped.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub async fn close(&self) -> Result<(), StoreError> {
        let outcome = self.0.queue.stop().await;
        lock(&self.0.readers.jobs).take();
        let mut threads = std::mem::take(&mut *lock(&self.0.readers.threads));
        threads.extend(lock(&self.0.writer).take());
        // A thread that panicked has ended the process, so that there is no result to look at.
        let _ = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join()))).await;
        outcome
    }
}

/// Refuses what cannot be a chunk.
fn check_spec(id: &ChunkId, spec: &ChunkSpec) -> Result<(), StoreError> {
    let rejected = |why: &str| Err(StoreError::Rejected(why.to_owned()));
    if spec.len_bytes == 0 || spec.len_bytes > MAX_CHUNK_BYTES {
        return rejected("a chunk has 1 byte to 64 MiB of payload");
    }
    if spec.k == 0 || u16::from(id.index) >= u16::from(spec.k) + u16::from(spec.m) {
        return rejected("the chunk's index is not below K+M");
    }
    Ok(())
}

enum Room {
    /// The payload is gathered here, and its space taken when it is written. It waits for the writer only once it is
    /// whole: a sender that stalls in the middle holds up nobody else.
    Whole,
    /// Space on the disk; pieces are sent as they fill.
    Reserved(Reserved),
}

/// A chunk on its way in. Dropped before [`Upload::finish`] it leaves nothing behind.
pub struct Upload {
    store: Store,
    id: ChunkId,
    spec: ChunkSpec,
    whose: Whose,
    room: Room,
    received_bytes: u64,
    sent_bytes: u64,
    crc: Option<BlockCrc>,
    crcs: Vec<u32>,
    pieces: Vec<Bytes>,
    small: BytesMut,
    gathered_bytes: u64,
}

/// Shorter buffers are copied together: a list of thousands of tiny ones would cost more memory than their bytes.
const SMALL_BYTES: usize = 4096;

impl Upload {
    /// Takes the next bytes; waits while the writer's queue is full.
    ///
    /// # Errors
    /// [`StoreError::Rejected`] for more bytes than were announced; [`StoreError::Failed`].
    pub async fn write(&mut self, data: Bytes) -> Result<(), StoreError> {
        if data.len() as u64 > self.spec.len_bytes - self.received_bytes {
            return Err(StoreError::Rejected("more payload than was announced".to_owned()));
        }
        self.checksum(&data);
        self.gathered_bytes += data.len() as u64;
        if data.len() < SMALL_BYTES {
            self.small.extend_from_slice(&data);
        } else {
            self.flush_small();
            self.pieces.push(data);
        }
        if self.gathered_bytes >= self.store.0.shared.settings.piece_bytes {
            self.send().await?;
        }
        Ok(())
    }

    fn flush_small(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push(self.small.split().freeze());
        }
    }

    fn checksum(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let block = (self.received_bytes / BLOCK_BYTES) as u32;
            let room = (BLOCK_BYTES - self.received_bytes % BLOCK_BYTES) as usize;
            let (now, later) = data.split_at(room.min(data.len()));
            let mut crc = self.crc.take().unwrap_or_else(|| BlockCrc::new(&self.id, block));
            crc.update(now);
            self.received_bytes += now.len() as u64;
            if self.received_bytes.is_multiple_of(BLOCK_BYTES) || self.received_bytes == self.spec.len_bytes {
                self.crcs.push(crc.finish());
            } else {
                self.crc = Some(crc);
            }
            data = later;
        }
    }

    /// Sends what was gathered to the writer; keeps it when the chunk goes whole.
    async fn send(&mut self) -> Result<(), StoreError> {
        if let Room::Reserved(reserved) = &self.room {
            if !self.small.is_empty() {
                self.pieces.push(self.small.split().freeze());
            }
            let (data, len_bytes) = (std::mem::take(&mut self.pieces), std::mem::take(&mut self.gathered_bytes));
            if len_bytes > 0 {
                reserved.write(self.sent_bytes, data, len_bytes).await?;
                self.sent_bytes += len_bytes;
            }
        }
        Ok(())
    }

    /// Ends the upload. `crcs` are the sender's checksums, block by block. Ok when the chunk is durable; an
    /// earlier chunk of that id is replaced.
    ///
    /// # Errors
    /// [`StoreError::Rejected`] for fewer bytes than were announced, [`StoreError::Corrupt`] for the first block whose
    /// checksum is not the sender's, [`StoreError::DiskFull`], [`StoreError::Failed`].
    pub async fn finish(mut self, crcs: Vec<u32>) -> Result<(), StoreError> {
        if self.received_bytes != self.spec.len_bytes {
            return Err(StoreError::Rejected("less payload than was announced".to_owned()));
        }
        if crcs.len() != self.crcs.len() {
            return Err(StoreError::Rejected("as many checksums as blocks are needed".to_owned()));
        }
        if let Some(block) = self.crcs.iter().zip(&crcs).position(|(ours, theirs)| ours != theirs) {
            return Err(StoreError::Corrupt { block: block as u32 });
        }
        self.send().await?;
        self.flush_small();
        let Upload { store, id, spec, whose, room, pieces, .. } = self;
        match room {
            Room::Whole => {
                let queue = &store.0.queue;
                let permit = queue.byte_permit(spec.len_bytes).await?;
                queue.submit(Op::Put { id, spec, whose, payload: pieces, crcs }, Some(permit)).await?
            }
            Room::Reserved(reserved) => reserved.commit(crcs).await?,
        };
        Ok(())
    }
}
