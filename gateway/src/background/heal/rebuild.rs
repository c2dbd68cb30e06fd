//! The repair queue's worker: rebuilds what is queued, verifies it, and only then takes it off the queue.
//!
//! A chunk is rebuilt block by block from whatever can be read, its own good blocks and those of other damaged chunks
//! among it. A corrupt chunk stays on its disk until the new one is whole there: a disk replaces one by the other in
//! one step, so that a healer or a disk that dies in the middle takes nothing away.

use super::plan::{Planner, Target, Task};
use super::rest::{Looked, Rest};
use super::slots::Moves;
use super::{lock, Inner};
use crate::background::command_under;
use crate::background::leases::Held;
use crate::backoff::Backoff;
use crate::disks::DiskHealth;
use crate::object::fetch::{block_len, fetch, Avoid, Blocks, Wanted};
use crate::object::{add, chunk_id, disk_of, slot_of, ReadError};
use crate::shards::buckets::odd_answer;
use crate::shards::{now_ms, ShardError};
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use granary_meta::record::ExtentRef;
use granary_meta::{Answer, ChunkRef, Command, Query};
use granary_placement::codec::{ChunkSet, Codec};
use granary_placement::id::{DiskId, HashSlot};
use granary_wire::chunk::{block_count, ChunkHealth, ChunkId, ChunkSpec, BLOCK_BYTES};
use granary_wire::client::{ChunkWriter, NodeClient};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::{ChunkError, LinkError};
use std::time::{Duration, Instant};

/// Entries of a repair queue per request.
const PAGE: u32 = 1000;
/// How long one write of a rebuilt window may take.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// Why a chunk was not rebuilt. All are tried again later.
#[derive(Debug, thiserror::Error)]
pub(super) enum RebuildError {
    #[error("cannot read enough of it: {0}")]
    Read(#[from] ReadError),
    #[error("disk {disk}: {error}")]
    Disk { disk: DiskId, error: ChunkError },
    #[error("decoding back gave other bytes: chunk {index}, block {block}")]
    Refuted { index: u8, block: u32 },
    #[error("what was written is not there: chunk {index} is {health:?}")]
    NotThere { index: u8, health: ChunkHealth },
    #[error("{0}")]
    Meta(#[from] ShardError),
    #[error("{0}")]
    Record(String),
}

/// A chunk to be rebuilt and the disk it goes to.
pub(super) struct Lost {
    pub(super) index: u8,
    pub(super) disk: DiskId,
    pub(super) client: NodeClient,
    pub(super) id: ChunkId,
    /// It lies there and some of its blocks are bad; the others serve.
    pub(super) corrupt: bool,
}

/// After so many passes that rebuilt chunks, slots have their turn.
const SLOTS_TURN: u64 = 4;

impl Inner {
    pub(super) async fn repair_loop(&self, held: &Held) {
        let mut moves = Moves::default();
        let mut busy_passes = 0u64;
        let mut rest = Rest::new(self.settings.clone(), self.store.disks().changes(), self.meta.map());
        loop {
            // Seen from here on: a change of them ends a rest.
            drop(rest.settings());
            // Single chunks first: an extent that lost several is in more danger than one whose slot moves. But chunks
            // that are queued without end must not keep slots from moving.
            // While healing is paused the queues are still looked at, for the status.
            let mut looked = self.repair_pass(held).await;
            busy_passes = if looked.done == 0 { 0 } else { busy_passes + 1 };
            if busy_passes.is_multiple_of(SLOTS_TURN) {
                looked = looked.and(self.slots_pass(&mut moves, held).await);
            }
            if let Some(pause) = rest.after(looked, self.settings().interval) {
                rest.until(tokio::time::sleep(pause), &self.poke).await;
            }
        }
    }

    /// One look at all queues and the most urgent rebuilds.
    async fn repair_pass(&self, held: &Held) -> Looked {
        let Some(map) = self.store.disks().map() else { return Looked::NOT };
        let now = Instant::now();
        let disks = self.store.disks();
        let target = |extent: &ExtentRef, index: u8| match disk_of(&map, extent, index) {
            Some(disk) if disks.repairable(disk) => Target::Up,
            Some(disk) if disks.health(disk) != DiskHealth::Down => Target::Busy,
            _ => Target::Down,
        };
        let ready = |extent| lock(&self.backoff).is_ready(extent, now);
        let mut planner = Planner::new(self.settings().extents_per_pass.max(1), target, ready);
        let (mut ends, mut unread) = (Vec::new(), false);
        for shard in self.meta.object_shards() {
            match self.read_queue(shard, &mut planner).await {
                Ok(end) => ends.push((shard, end)),
                Err(error) => {
                    tracing::debug!(%error, "a repair queue cannot be read");
                    unread = true;
                }
            }
        }
        let tasks = planner.finish();
        // A queue longer than a pass is read on from where this one ended, once what is urgent in it is done.
        let all_taken = planner.runnable == u64::try_from(tasks.len()).unwrap_or(u64::MAX);
        if all_taken {
            let mut cursors = lock(&self.cursors);
            for (shard, end) in ends {
                match end {
                    Some(end) => cursors.insert(shard, end),
                    None => cursors.remove(&shard),
                };
            }
        }
        {
            let mut status = lock(&self.status);
            status.queued_chunks = planner.queued_chunks;
            status.extents_by_failures_left = std::mem::take(&mut planner.by_failures_left);
            status.waiting_extents = planner.waiting;
        }
        let open = unread || planner.queued_chunks > 0;
        drop(planner);
        let done = stream::iter(tasks)
            .map(|task| self.run(task, held))
            .buffer_unordered(self.settings().extents_at_once.max(1))
            .fold(0, |sum, done| async move { sum + done })
            .await;
        Looked { done, open }
    }

    /// Hands a shard's queue to the planner; answers where the next pass goes on when it is longer than one pass.
    async fn read_queue(
        &self,
        shard: granary_placement::id::ShardId,
        planner: &mut Planner<'_>,
    ) -> Result<Option<ChunkRef>, ShardError> {
        let mut after = lock(&self.cursors).get(&shard).copied();
        for _ in 0..self.settings().pages_per_pass.max(1) {
            let (chunks, more) = match self.meta.query(shard, Query::ListMissing { after, limit: PAGE }).await? {
                Answer::Missing { chunks, more } => (chunks, more),
                other => return Err(odd_answer(shard, &other)),
            };
            let last = chunks.last().map(|(chunk, _, _)| *chunk);
            for (chunk, queued, record) in chunks {
                planner.offer(shard, chunk, queued, record);
            }
            match last {
                Some(last) if more => after = Some(last),
                _ => return Ok(None),
            }
        }
        Ok(after)
    }

    /// Repairs one extent and tells its shard; answers how many chunks left the queue.
    async fn run(&self, task: Task, held: &Held) -> usize {
        // A pause counts for what is left of a pass, too.
        if self.pace.is_paused() {
            return 0;
        }
        let extent = task.extent.extent;
        let (done, error) = self.repair(&task, held).await;
        let mut finished = done.len();
        let chunk = |index: u8| ChunkRef { group: task.extent.group, extent, index };
        if !done.is_empty() {
            // One that was reported since the queue was read stays: the report may be of what came after the repair.
            let generation = |index| task.generations.get(index).copied().unwrap_or_default();
            let chunks = done.iter().map(|index| (chunk(*index), generation(index))).collect();
            let done = Command::RepairDone { chunks, lease: held.stamp().clone() };
            if let Err(error) = command_under(&self.meta, held, task.shard, done).await {
                // They stay queued, and the next look finds them good.
                tracing::debug!(%error, "a repair could not be taken off its queue");
                finished = 0;
            }
        }
        match error {
            Some(error) => {
                add(&self.counters().rebuilds_failed, 1);
                if matches!(error, RebuildError::Refuted { .. }) {
                    add(&self.counters().rebuilds_refuted, 1);
                }
                tracing::warn!(%extent, key = %task.key, failures_left = task.failures_left, %error, "an extent could not be repaired");
                let settings = self.settings();
                let backoff = Backoff { first: settings.first_backoff, longest: settings.longest_backoff };
                lock(&self.backoff).failed(extent, Instant::now(), &backoff);
            }
            None => lock(&self.backoff).done(extent),
        }
        finished
    }

    /// Brings the chunks of a task back. Answers the indices that are good on their disks now, and what stopped the
    /// others.
    pub(super) async fn repair(&self, task: &Task, held: &Held) -> (Vec<u8>, Option<RebuildError>) {
        let (mut good, mut lost, mut trouble) = (Vec::new(), Vec::new(), None);
        let Some(map) = self.store.disks().map() else { return (good, None) };
        for &index in &task.rebuild {
            let found =
                disk_of(&map, &task.extent, index).and_then(|disk| Some((disk, self.store.disks().client(disk)?)));
            let Some((disk, client)) = found else { continue };
            let id = chunk_id(&task.extent, index);
            match self.verify(&client, disk, id).await {
                Ok(ChunkHealth::Good) => {
                    add(&self.counters().chunks_found_good, 1);
                    good.push(index);
                }
                Ok(health) => lost.push(Lost { index, disk, client, id, corrupt: health == ChunkHealth::Corrupt }),
                Err(error) => trouble = Some(error),
            }
        }
        if !lost.is_empty() {
            match self.rebuild(task, &lost, held).await {
                Ok((mut done, rest)) => {
                    good.append(&mut done);
                    trouble = rest.or(trouble);
                }
                Err(error) => trouble = Some(error),
            }
        }
        (good, trouble)
    }

    /// Rebuilds chunks of one extent together, reading its other chunks once.
    async fn rebuild(
        &self,
        task: &Task,
        lost: &[Lost],
        held: &Held,
    ) -> Result<(Vec<u8>, Option<RebuildError>), RebuildError> {
        let extent = &task.extent;
        crate::object::check_extent(extent).map_err(RebuildError::Record)?;
        let codec = self.store.codec(extent.k, extent.m).map_err(ReadError::Codec)?;
        let chunk_len = extent.layout().chunk_len();
        let spec = spec_of(extent, task.owner);
        let mut sinks: Vec<(&Lost, ChunkWriter)> = Vec::with_capacity(lost.len());
        let mut trouble = None;
        for lost in lost {
            match within(lost.client.begin_chunk_under(held.stamp(), lost.id, spec)).await {
                Ok(writer) => sinks.push((lost, writer)),
                Err(error) => trouble = Some(self.disk_failed(lost, error, held)),
            }
        }

        // While a slot moves its chunk may still be read where it was; else what is lost can only be computed.
        let map = self.store.disks().map();
        let moves = |index| {
            map.as_ref().and_then(|map| slot_of(map, extent, index)).is_some_and(|slot| slot.previous.is_some())
        };
        let absent = lost.iter().filter(|lost| !lost.corrupt).map(|lost| lost.index);
        let exclude: ChunkSet = absent.filter(|index| !moves(*index)).collect();
        let avoid = Avoid::default();
        let blocks = u32::try_from(block_count(chunk_len)).map_err(|error| RebuildError::Record(error.to_string()))?;
        let step = u32::try_from(self.settings().window_bytes / BLOCK_BYTES).unwrap_or(1).clamp(1, 64);
        // One block of each chunk is read back at the end; which one changes from extent to extent.
        let sampled = u32::from(extent.extent.0[0]) % blocks.max(1);
        let mut samples: Vec<(u8, Bytes)> = Vec::new();
        for start in (0..blocks).step_by(usize::try_from(step).unwrap_or(1)) {
            if sinks.is_empty() {
                break;
            }
            let window = start..blocks.min(start + step);
            let chunks = u64::from(extent.k) + u64::try_from(sinks.len()).unwrap_or(0);
            self.pace.take(chunks * u64::from(window.end - window.start) * BLOCK_BYTES).await;
            let wanted: Vec<Wanted> =
                sinks.iter().map(|(lost, _)| Wanted { chunk: lost.index, blocks: window.clone() }).collect();
            let got = fetch(&self.store, extent, &wanted, exclude, &avoid).await?;
            let mut going = Vec::with_capacity(sinks.len());
            for (lost, mut sink) in sinks {
                let mut written = Ok(());
                for block in window.clone() {
                    let bytes = if got.sources(block).contains(lost.index) {
                        // Read and verified, not computed.
                        got.get(lost.index, block).cloned().unwrap_or_default()
                    } else {
                        decode_back(&codec, &got, lost.index, block, block_len(chunk_len, block))?
                    };
                    if block == sampled {
                        samples.push((lost.index, bytes.clone()));
                    }
                    written = within(sink.write(bytes)).await;
                    if written.is_err() {
                        break;
                    }
                }
                match written {
                    Ok(()) => going.push((lost, sink)),
                    Err(error) => trouble = Some(self.disk_failed(lost, error, held)),
                }
            }
            sinks = going;
        }

        let mut done = Vec::with_capacity(sinks.len());
        for (lost, sink) in sinks {
            let sample = samples.iter().find(|(index, _)| *index == lost.index).map(|(_, bytes)| bytes.clone());
            match self.finish(lost, sink, (sampled, sample), held).await {
                Ok(()) => {
                    add(&self.counters().chunks_rebuilt, 1);
                    add(&self.counters().bytes_rebuilt, chunk_len);
                    done.push(lost);
                }
                Err(error) => trouble = Some(error),
            }
        }
        // An extent that was deleted meanwhile must not be left with chunks nobody knows of.
        if !done.is_empty() && self.alive(task.shard, vec![(extent.group, extent.extent)]).await? == [false] {
            for lost in &done {
                let _ = self.delete_on(lost.disk, vec![lost.id], held).await;
            }
        }
        Ok((done.iter().map(|lost| lost.index).collect(), trouble))
    }

    /// Makes a rebuilt chunk durable, has it read back on its disk, and holds one of its blocks against what was
    /// decoded.
    pub(super) async fn finish(
        &self,
        lost: &Lost,
        sink: ChunkWriter,
        (sampled, sample): (u32, Option<Bytes>),
        held: &Held,
    ) -> Result<(), RebuildError> {
        within(sink.finish()).await.map_err(|error| self.disk_failed(lost, error, held))?;
        match self.verify(&lost.client, lost.disk, lost.id).await? {
            ChunkHealth::Good => {}
            health => return Err(RebuildError::NotThere { index: lost.index, health }),
        }
        let read = within(lost.client.read_blocks(lost.id, sampled, 1))
            .await
            .map_err(|error| self.disk_failed(lost, error, held))?;
        if read.data.first() != sample.as_ref() {
            return Err(RebuildError::Refuted { index: lost.index, block: sampled });
        }
        Ok(())
    }

    async fn verify(&self, client: &NodeClient, disk: DiskId, id: ChunkId) -> Result<ChunkHealth, RebuildError> {
        let answer = client.control(ControlRequest::VerifyChunks(vec![id]), self.settings().verify_deadline).await;
        let error = match answer {
            Ok(ControlResponse::Health(health)) => match health.first() {
                Some(health) => return Ok(*health),
                None => ChunkError::Disk("an empty answer".to_owned()),
            },
            Ok(other) => ChunkError::Disk(format!("{other:?}").chars().take(100).collect()),
            Err(error) => ChunkError::Link(error),
        };
        self.store.disks().failed(disk, &error);
        Err(RebuildError::Disk { disk, error })
    }

    pub(super) fn disk_failed(&self, lost: &Lost, error: ChunkError, held: &Held) -> RebuildError {
        if let ChunkError::StaleLease { current } = error {
            held.refused(current);
        }
        self.store.disks().failed(lost.disk, &error);
        RebuildError::Disk { disk: lost.disk, error }
    }
}

/// The header of a chunk of this extent that is written now.
pub(super) fn spec_of(extent: &ExtentRef, owner: HashSlot) -> ChunkSpec {
    ChunkSpec {
        codec: extent.codec,
        k: extent.k,
        m: extent.m,
        unit_bytes: extent.unit_bytes,
        extent_len_bytes: extent.len_bytes,
        len_bytes: extent.layout().chunk_len(),
        owner,
        created_ms: now_ms(),
    }
}

pub(super) async fn within<T>(work: impl std::future::Future<Output = Result<T, ChunkError>>) -> Result<T, ChunkError> {
    tokio::time::timeout(WRITE_DEADLINE, work).await.unwrap_or(Err(ChunkError::Link(LinkError::Timeout)))
}

/// A rebuilt block, checked by decoding back: one of the blocks it was made from is computed anew from it and the
/// others, and must come out as it was read. A fault of memory, of a kernel or of a plan is found here, before anything
/// relies on the chunk.
fn decode_back(codec: &Codec, got: &Blocks, index: u8, block: u32, len_bytes: u64) -> Result<Bytes, RebuildError> {
    let hole = || RebuildError::Record(format!("no block {block} of chunk {index}"));
    let rebuilt = got.get(index, block).filter(|bytes| u64::try_from(bytes.len()) == Ok(len_bytes)).ok_or_else(hole)?;
    let sources = got.sources(block);
    let count = u32::from(sources.len()).max(1);
    let checked = sources.iter().nth(usize::try_from(block % count).unwrap_or(0)).ok_or_else(hole)?;
    let others = sources.without(checked).iter().take(usize::from(codec.k()).saturating_sub(1));
    let present = others.collect::<ChunkSet>().with(index);
    let plan = codec.plan(present, ChunkSet::from_indices([checked])).map_err(ReadError::Codec)?;
    let inputs: Vec<&[u8]> =
        plan.sources().iter().filter_map(|chunk| got.get(*chunk, block).map(|bytes| &bytes[..])).collect();
    let mut out = vec![0u8; rebuilt.len()];
    plan.apply(&inputs, &mut [&mut out]).map_err(ReadError::Codec)?;
    if got.get(checked, block).is_none_or(|read| read[..] != out[..]) {
        return Err(RebuildError::Refuted { index, block });
    }
    Ok(rebuilt.clone())
}
