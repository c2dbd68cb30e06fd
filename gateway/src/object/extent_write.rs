//! One attempt to bring one extent onto the disks of one group.
//!
//! Stripe by stripe: gather K units of payload into one buffer (the only copy), encode M units into another, hand
//! slices of both to the chunk writes. One that fails is left behind while enough go on ([`Choice::is_durable`]); its
//! chunk is named as missing.

use super::budget::Grant;
use super::choose::Choice;
use super::chunk_write::{ChunkTarget, ChunkWrite, HEALTH_LOOK};
use super::counters::add;
use super::staged::Uncommitted;
use super::write::{Source, StageError};
use super::{chunk_id, ObjectStore};
use crate::disks::DiskHealth;
use crate::shards::now_ms;
use bytes::{Bytes, BytesMut};
use futures::stream::{FuturesUnordered, Stream, StreamExt};
use granary_meta::record::ExtentRef;
use granary_meta::ChunkRef;
use granary_placement::codec::{ChunkSet, Codec};
use granary_placement::extent::Stripe;
use granary_placement::id::{DiskId, ExtentId, HashSlot};
use granary_wire::chunk::{ChunkSpec, FIRST_GENERATION};
use granary_wire::error::{ChunkError, LinkError};
use std::sync::Arc;
use tokio_util::task::TaskTracker;

/// Payload bytes coded in one go; a longer stripe lets other tasks run in between.
const CODE_AT_ONCE_BYTES: usize = 1024 * 1024;

/// What one attempt needs to know.
pub(super) struct Attempt<'a> {
    pub(super) store: &'a ObjectStore,
    pub(super) choice: &'a Choice,
    pub(super) extent: ExtentId,
    pub(super) owner: HashSlot,
    pub(super) len_bytes: u64,
    /// The last extent of the object: the body must end with it, before any chunk is finished.
    pub(super) last: bool,
}

/// An extent with enough durable chunks.
pub(super) struct Written {
    pub(super) extent: ExtentRef,
    pub(super) missing: Vec<ChunkRef>,
    pub(super) uncommitted: Uncommitted,
}

/// These disks failed, and too few are left: worth another attempt without them.
pub(super) struct TooFew {
    pub(super) failed: Vec<DiskId>,
    pub(super) why: String,
}

impl Attempt<'_> {
    /// Runs it. When it comes to nothing the chunks written so far are deleted in the background.
    ///
    /// # Errors
    /// What is not the disks' fault: the body, or the codec. Not to be tried again.
    pub(super) async fn run<S>(&self, source: &mut Source<'_, S>) -> Result<Result<Written, TooFew>, StageError>
    where
        S: Stream<Item = Result<Bytes, super::BodyError>> + Send,
    {
        let scheme = self.choice.scheme;
        let extent = ExtentRef {
            extent: self.extent,
            group: self.choice.group,
            codec: scheme.codec,
            k: scheme.k,
            m: scheme.m,
            unit_bytes: scheme.unit_bytes,
            len_bytes: self.len_bytes,
            generation: FIRST_GENERATION,
            slots: self.choice.slots.clone(),
        };
        let layout = extent.layout();
        let codec = self.store.codec(scheme.k, scheme.m).map_err(StageError::Codec)?;
        let spec = ChunkSpec {
            codec: scheme.codec,
            k: scheme.k,
            m: scheme.m,
            unit_bytes: scheme.unit_bytes,
            extent_len_bytes: self.len_bytes,
            len_bytes: layout.chunk_len(),
            owner: self.owner,
            created_ms: now_ms(),
        };
        let tasks = TaskTracker::new();
        let mut uncommitted = Uncommitted::new(&self.store.inner.cleaner);
        uncommitted.add_writers(&tasks);
        let mut targets = Vec::with_capacity(scheme.width());
        for (index, disk) in (0u8..).zip(&self.choice.disks) {
            let Some((disk, client)) = disk.and_then(|disk| Some((disk, self.store.disks().client(disk)?))) else {
                continue;
            };
            let id = chunk_id(&extent, index);
            uncommitted.add_chunk(disk, id);
            targets.push(ChunkTarget { index, disk, client, id });
        }
        let deadline = self.store.settings().write_deadline;
        let mut failed = Vec::new();

        let writes = if layout.chunk_len() <= self.store.settings().whole_chunk_bytes {
            let mut chunks: Vec<Vec<Bytes>> = vec![Vec::new(); scheme.width()];
            // All of it at once: a stripe in hand must not wait for the next one's memory.
            let width = u64::try_from(scheme.width()).unwrap_or(u64::MAX);
            let grant = source.grant(layout.chunk_len().saturating_mul(width)).await?;
            for number in 0..layout.stripes() {
                let Some(stripe) = layout.stripe(number) else { break };
                for (chunk, unit) in chunks.iter_mut().zip(self.stripe(&stripe, &codec, source, grant.as_ref()).await?)
                {
                    chunk.push(unit);
                }
            }
            if self.last {
                source.end().await?;
            }
            let whole = |target: ChunkTarget| {
                let units = chunks.get_mut(usize::from(target.index)).map(std::mem::take).unwrap_or_default();
                ChunkWrite::whole(target, spec, units, deadline, &tasks)
            };
            targets.into_iter().map(whole).collect()
        } else {
            let writes = targets.into_iter().map(|target| ChunkWrite::stream(target, spec, deadline, &tasks)).collect();
            match self.feed(writes, &mut failed, source, &codec, &layout).await? {
                Ok(writes) => writes,
                Err(too_few) => return Ok(Err(too_few)),
            }
        };
        tasks.close();
        let durable = match self.settle(writes, &mut failed).await {
            Ok(durable) => durable,
            Err(too_few) => return Ok(Err(too_few)),
        };

        let missing: Vec<ChunkRef> = (0..u8::try_from(scheme.width()).unwrap_or(u8::MAX))
            .filter(|index| !durable.contains(index))
            .map(|index| ChunkRef { group: extent.group, extent: extent.extent, index })
            .collect();
        let counters = self.store.counters();
        add(&counters.extents_written, 1);
        add(&counters.extents_narrow, u64::from(self.choice.narrow));
        add(&counters.chunks_missing_at_write, u64::try_from(missing.len()).unwrap_or(0));
        Ok(Ok(Written { extent, missing, uncommitted }))
    }

    /// Gathers and codes one stripe: K+M units in order of their chunk indices, which hold the grant for their memory.
    async fn stripe<S>(
        &self,
        stripe: &Stripe,
        codec: &Codec,
        source: &mut Source<'_, S>,
        grant: Option<&Arc<Grant>>,
    ) -> Result<Vec<Bytes>, StageError>
    where
        S: Stream<Item = Result<Bytes, super::BodyError>> + Send,
    {
        let (k, m) = (usize::from(codec.k()), usize::from(codec.m()));
        let bad = |_| StageError::Unavailable("a stripe does not fit into memory".to_owned());
        let unit_len = usize::try_from(stripe.unit_len).map_err(bad)?;
        let payload_len = usize::try_from(stripe.payload_len).map_err(bad)?;
        let mut payload = BytesMut::with_capacity(k * unit_len);
        source.take(&mut payload, payload_len).await?;
        payload.resize(k * unit_len, 0);
        let held = |bytes: Bytes| match grant {
            Some(grant) => Grant::with(grant, bytes),
            None => bytes,
        };
        let payload = held(payload.freeze());
        source.keep(payload.slice(..payload_len));

        let mut coding = BytesMut::zeroed(m * unit_len);
        let step = (CODE_AT_ONCE_BYTES / k / 128 * 128).max(128);
        for start in (0..unit_len).step_by(step) {
            let end = unit_len.min(start + step);
            let data: Vec<&[u8]> = payload.chunks_exact(unit_len).filter_map(|unit| unit.get(start..end)).collect();
            let mut out: Vec<&mut [u8]> =
                coding.chunks_exact_mut(unit_len).filter_map(|unit| unit.get_mut(start..end)).collect();
            codec.encode(&data, &mut out).map_err(StageError::Codec)?;
            if end < unit_len {
                tokio::task::yield_now().await;
            }
        }
        let coding = held(coding.freeze());
        let units = |buffer: &Bytes, count: usize| {
            (0..count).map(|j| buffer.slice(j * unit_len..(j + 1) * unit_len)).collect::<Vec<_>>()
        };
        let mut all = units(&payload, k);
        all.append(&mut units(&coding, m));
        Ok(all)
    }

    /// Sends all stripes; gives back the writes that still run, their last unit handed over.
    async fn feed<S>(
        &self,
        mut writes: Vec<ChunkWrite>,
        failed: &mut Vec<DiskId>,
        source: &mut Source<'_, S>,
        codec: &Codec,
        layout: &granary_placement::extent::ExtentLayout,
    ) -> Result<Result<Vec<ChunkWrite>, TooFew>, StageError>
    where
        S: Stream<Item = Result<Bytes, super::BodyError>> + Send,
    {
        let mut alive: ChunkSet = writes.iter().map(|write| write.index).collect();
        let spare = |alive: ChunkSet, index: u8| self.choice.is_durable(alive.without(index));
        for number in 0..layout.stripes() {
            let Some(stripe) = layout.stripe(number) else { break };
            let width = u64::from(codec.k()) + u64::from(codec.m());
            let grant = source.grant(stripe.unit_len.saturating_mul(width)).await?;
            let units = self.stripe(&stripe, codec, source, grant.as_ref()).await?;
            drop(grant);
            let mut going = Vec::with_capacity(writes.len());
            for write in writes {
                let unit = units.get(usize::from(write.index)).cloned().unwrap_or_default();
                if write.send(unit, self.store.disks(), spare(alive, write.index)).await {
                    going.push(write);
                } else {
                    alive = alive.without(write.index);
                    self.write_failed(write, failed).await;
                }
            }
            writes = going;
            if !self.choice.is_durable(alive) {
                return Ok(Err(self.too_few(writes.len(), failed)));
            }
        }
        if self.last {
            // Before any chunk is finished: a body that turns out wrong at its very end leaves nothing on the disks.
            source.end().await?;
        }
        let mut going = Vec::with_capacity(writes.len());
        for write in writes {
            if write.finish(self.store.disks(), spare(alive, write.index)).await {
                going.push(write);
            } else {
                alive = alive.without(write.index);
                self.write_failed(write, failed).await;
            }
        }
        Ok(Ok(going))
    }

    /// Waits until every write has ended; gives back the indices of the durable chunks, enough of them. Once they are
    /// enough, writes whose disk is not up are waited for no longer.
    async fn settle(&self, writes: Vec<ChunkWrite>, failed: &mut Vec<DiskId>) -> Result<Vec<u8>, TooFew> {
        let mut durable = ChunkSet::EMPTY;
        let mut hoped: ChunkSet = writes.iter().map(|write| write.index).collect();
        let mut waiting: Vec<(DiskId, tokio::task::AbortHandle)> =
            writes.iter().map(|write| (write.disk, write.task.abort_handle())).collect();
        let mut ends: FuturesUnordered<_> =
            writes.into_iter().map(|write| async move { (write.index, write.disk, write.task.await) }).collect();
        while !ends.is_empty() {
            if !self.choice.is_durable(hoped) {
                break;
            }
            tokio::select! {
                Some((index, disk, end)) = ends.next() => {
                    waiting.retain(|(waiting, _)| *waiting != disk);
                    match end {
                        Ok(Ok(())) => durable = durable.with(index),
                        Ok(Err(error)) => {
                            hoped = hoped.without(index);
                            self.disk_failed(disk, &error, failed);
                        }
                        Err(_) => {
                            hoped = hoped.without(index);
                            self.disk_failed(disk, &ChunkError::Link(LinkError::Timeout), failed);
                        }
                    }
                }
                () = tokio::time::sleep(HEALTH_LOOK) => {
                    let all_sick = waiting.iter().all(|(disk, _)| self.store.disks().health(*disk) != DiskHealth::Up);
                    if self.choice.is_durable(durable) && all_sick {
                        waiting.iter().for_each(|(_, task)| task.abort());
                        break;
                    }
                }
            }
        }
        if !self.choice.is_durable(durable) {
            return Err(self.too_few(usize::from(durable.len()), failed));
        }
        Ok(durable.iter().collect())
    }

    /// A write that takes nothing more: what it says of itself if it has ended, a timeout if it had to be left behind.
    async fn write_failed(&self, write: ChunkWrite, failed: &mut Vec<DiskId>) {
        let disk = write.disk;
        let error = if write.task.is_finished() {
            match write.task.await {
                Ok(Err(error)) => error,
                _ => ChunkError::Link(LinkError::Closed("the writer ended early".to_owned())),
            }
        } else {
            // Its queue may have closed a moment before the task is seen as finished; it gets that moment.
            let abort = write.task.abort_handle();
            match tokio::time::timeout(std::time::Duration::from_millis(20), write.task).await {
                Ok(Ok(Err(error))) => error,
                _ => {
                    abort.abort();
                    ChunkError::Link(LinkError::Timeout)
                }
            }
        };
        self.disk_failed(disk, &error, failed);
    }

    fn disk_failed(&self, disk: DiskId, error: &ChunkError, failed: &mut Vec<DiskId>) {
        tracing::debug!(%disk, extent = %self.extent, %error, "a chunk could not be written");
        self.store.disks().failed(disk, error);
        failed.push(disk);
    }

    fn too_few(&self, good: usize, failed: &mut Vec<DiskId>) -> TooFew {
        let scheme = self.choice.scheme;
        let why = format!(
            "{good} of {} chunks could be written; {} are needed, and {} when one more failure domain is gone",
            scheme.width(),
            usize::from(scheme.k) + 1,
            scheme.k
        );
        TooFew { failed: std::mem::take(failed), why }
    }
}
