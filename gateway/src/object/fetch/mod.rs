//! Blocks of one extent, from whichever disks can give them.
//!
//! The code is linear and works byte by byte, so block b of any chunk follows from block b of any K others: a window of
//! an extent is a grid of cells, one row per chunk, one column per 64 KiB block, and every column is settled on its
//! own. Cells are read from the disks that the payload lies on; where one is missing, corrupt, refused or late, its
//! column is topped up to K cells from other disks and decoded. A cell whose checksum failed is an absent cell.
//!
//! [`fetch`] serves readers and the healer alike.

mod cells;
mod pulse;

pub use cells::Blocks;
pub use pulse::{Avoid, Pulse};

use super::counters::add;
use super::read::ReadError;
use super::{check_extent, chunk_id, slot_of, ObjectStore};
use crate::disks::DiskHealth;
use cells::{Cell, Grid};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use granary_meta::record::ExtentRef;
use granary_meta::ChunkRef;
use granary_placement::codec::ChunkSet;
use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::chunk::{ChunkId, BLOCK_BYTES};
use granary_wire::client::NodeClient;
use granary_wire::error::{ChunkError, LinkError};
use granary_wire::server::{ChunkBlocks, MAX_READ_BLOCKS};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A chunk with more corrupt blocks than this in one window is read directly no further, only to make up K.
const CORRUPT_BLOCKS_WORTH_SKIPPING: u32 = 2;
/// The rank of a chunk whose disk does not answer.
const RANK_DOWN: u8 = 3;

/// Blocks of one chunk that are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Chunk index, data or coding.
    pub chunk: u8,
    /// Block numbers in the chunk; not empty.
    pub blocks: Range<u32>,
}

/// What came of one read request.
struct ReadDone {
    chunk: u8,
    disk: DiskId,
    blocks: Range<u32>,
    took: Duration,
    result: Result<ChunkBlocks, ChunkError>,
}

/// Gets the wanted blocks, read or decoded. Chunks in `exclude` are not read.
///
/// # Errors
/// [`ReadError::Lost`] when fewer than K chunks have a wanted block for certain, [`ReadError::Unreachable`] when it may
/// be more but they do not answer, [`ReadError::BadRecord`], [`ReadError::Codec`].
pub async fn fetch(
    store: &ObjectStore,
    extent: &ExtentRef,
    wanted: &[Wanted],
    exclude: ChunkSet,
    avoid: &Avoid,
) -> Result<Blocks, ReadError> {
    check_extent(extent).map_err(ReadError::BadRecord)?;
    let map = store.disks().map().ok_or(ReadError::Unreachable { extent: extent.extent, good: 0, needed: extent.k })?;
    let grid = Grid::new(extent, wanted, exclude).map_err(ReadError::BadRecord)?;
    let mut fetch = Fetch {
        store,
        extent,
        map,
        avoid,
        grid,
        reads: FuturesUnordered::new(),
        corrupt: vec![0; extent.slots.len()],
        at_previous: ChunkSet::EMPTY,
        unasked_at_current: ChunkSet::EMPTY,
        bad: ChunkSet::EMPTY,
        owner: None,
    };
    let result = fetch.run().await;
    for chunk in fetch.bad.iter() {
        let chunk = ChunkRef { group: extent.group, extent: extent.extent, index: chunk };
        if store.reports().push(chunk, fetch.owner) {
            add(&store.counters().chunks_reported, 1);
        }
    }
    match &result {
        Err(ReadError::Lost { good, needed, .. }) => {
            add(&store.counters().extents_lost_seen, 1);
            tracing::error!(extent = %extent.extent, group = %extent.group, good, needed, "extent has too few good chunks");
        }
        Err(ReadError::Unreachable { good, needed, .. }) => {
            add(&store.counters().extents_unreachable_seen, 1);
            tracing::warn!(extent = %extent.extent, group = %extent.group, good, needed, "extent cannot be reached");
        }
        _ => {}
    }
    result?;
    fetch.grid.decode(&store.codec(extent.k, extent.m).map_err(ReadError::Codec)?, store.counters()).await
}

struct Fetch<'a> {
    store: &'a ObjectStore,
    extent: &'a ExtentRef,
    map: Arc<ClusterMap>,
    avoid: &'a Avoid,
    grid: Grid,
    reads: FuturesUnordered<BoxFuture<'static, ReadDone>>,
    /// Corrupt blocks seen, by chunk.
    corrupt: Vec<u32>,
    /// Chunks whose slot moves and that are read from its previous disk, because the current one did not give them.
    at_previous: ChunkSet,
    /// Of these, the ones whose current disk did not answer: they may lie there, whatever the previous disk says.
    unasked_at_current: ChunkSet,
    /// Chunks to be reported.
    bad: ChunkSet,
    /// The shard that owns the extent, by the hash slot that good chunks name.
    owner: Option<granary_placement::id::ShardId>,
}

impl Fetch<'_> {
    async fn run(&mut self) -> Result<(), ReadError> {
        // A current disk that does not answer is not waited for while the previous one does.
        for chunk in self.grid.chunks() {
            let down = self.disk_of(chunk).is_some_and(|disk| self.store.disks().health(disk) == DiskHealth::Down);
            if down && self.turn_to_previous(chunk) {
                self.unasked_at_current.insert(chunk);
            }
        }
        self.read_directly();
        self.top_up(false);
        let mut patience = self.store.inner.pulse.hedge_delay(self.store.settings().hedge_floor);
        let mut hedge_at = tokio::time::Instant::now() + patience;
        loop {
            if self.grid.is_settled() {
                self.remember_the_slow();
                return Ok(());
            }
            if let Some((good, gone)) = self.grid.dead_column() {
                return Err(self.too_few(good, gone));
            }
            tokio::select! {
                Some(done) = self.reads.next() => {
                    self.take(done);
                    self.top_up(false);
                }
                () = tokio::time::sleep_until(hedge_at) => {
                    self.hedge();
                    patience *= 2;
                    hedge_at = tokio::time::Instant::now() + patience;
                }
            }
        }
    }

    /// Asks the disks that the wanted blocks lie on, where they can be expected to answer.
    fn read_directly(&mut self) {
        for chunk in self.grid.chunks() {
            if self.rank(chunk) < 2 {
                let blocks: Vec<u32> = self.grid.wanted_untried(chunk).collect();
                self.launch(chunk, &blocks, false);
            }
        }
    }

    /// Brings every column that cannot be had directly up to K cells that are there or on their way.
    fn top_up(&mut self, hedged: bool) {
        let mut order: Vec<(u8, u8)> = self.grid.chunks().map(|chunk| (self.rank(chunk), chunk)).collect();
        order.sort_unstable();
        let mut launches: Vec<(u8, Vec<u32>)> = order.iter().map(|(_, chunk)| (*chunk, Vec::new())).collect();
        for block in self.grid.columns() {
            let mut lacking = self.grid.lacking(block);
            for (chunk, blocks) in &mut launches {
                if lacking == 0 {
                    break;
                }
                if self.grid.is_untried(*chunk, block) {
                    blocks.push(block);
                    lacking -= 1;
                }
            }
        }
        for (chunk, blocks) in launches {
            self.launch(chunk, &blocks, hedged);
        }
    }

    /// How little is to be expected of a chunk's disk: 0 it answers, 1 doubtful, 2 it does not answer or was trouble
    /// just now, [`RANK_DOWN`] it is down.
    fn rank(&self, chunk: u8) -> u8 {
        let Some(disk) = self.disk_of(chunk) else { return RANK_DOWN };
        let trouble =
            self.avoid.contains(disk) || self.corrupt.get(usize::from(chunk)).is_some_and(|blocks| *blocks > 0);
        match self.store.disks().health(disk) {
            DiskHealth::Down => RANK_DOWN,
            _ if trouble => 2,
            DiskHealth::Suspect => 1,
            DiskHealth::Up => 0,
        }
    }

    /// Sends requests for these blocks, in ascending order, of one chunk: one per run of neighbours.
    fn launch(&mut self, chunk: u8, blocks: &[u32], hedged: bool) {
        let mut rest = blocks;
        while let Some(&first) = rest.first() {
            let run = rest.iter().zip(first..).take_while(|(block, expected)| *block == expected).count();
            let run = run.min(usize::try_from(MAX_READ_BLOCKS).unwrap_or(1)).max(1);
            let count = u32::try_from(run).unwrap_or(1);
            rest = rest.get(run..).unwrap_or_default();
            self.request(chunk, first..first.saturating_add(count), hedged);
        }
    }

    fn request(&mut self, chunk: u8, blocks: Range<u32>, hedged: bool) {
        let target = self.disk_of(chunk).and_then(|disk| Some((disk, self.store.disks().client(disk)?)));
        let Some((disk, client)) = target else {
            self.grid.set(chunk, blocks, || Cell::Away);
            return;
        };
        let counters = self.store.counters();
        add(&counters.chunk_reads, 1);
        add(&counters.chunk_reads_hedged, u64::from(hedged));
        self.store.inner.pulse.count(hedged);
        self.grid.set(chunk, blocks.clone(), || Cell::Pending { slow: false });
        let deadline = self.store.settings().read_deadline;
        self.reads.push(Box::pin(read(client, chunk, disk, chunk_id(self.extent, chunk), blocks, deadline)));
    }

    /// The disk that a chunk is read from: the current one of its slot, or the previous one while the slot moves.
    fn disk_of(&self, chunk: u8) -> Option<DiskId> {
        let slot = slot_of(&self.map, self.extent, chunk)?;
        if self.at_previous.contains(chunk) {
            slot.previous
        } else {
            Some(slot.current)
        }
    }

    /// From now on reads a chunk from the previous disk of its slot. False when there is none, or it was turned to
    /// already.
    fn turn_to_previous(&mut self, chunk: u8) -> bool {
        let previous = slot_of(&self.map, self.extent, chunk).and_then(|slot| slot.previous);
        // One that left for good took its chunks with it, and its address may be another's now.
        let serves = |disk| self.map.disk(disk).is_some_and(|disk| disk.state != DiskState::Out);
        if self.at_previous.contains(chunk) || !previous.is_some_and(serves) {
            return false;
        }
        self.at_previous.insert(chunk);
        true
    }

    /// Takes in what a request brought.
    fn take(&mut self, done: ReadDone) {
        let ReadDone { chunk, disk, blocks, took, result } = done;
        let error = match result {
            Ok(got) if self.is_as_expected(&got, &blocks) => {
                self.store.inner.pulse.record(took);
                self.owner = self.map.shard_of_slot(got.spec.owner);
                for (block, bytes) in blocks.zip(got.data) {
                    self.grid.set(chunk, block..block + 1, || Cell::Read(bytes.clone()));
                }
                return;
            }
            // Its checksums are right and yet it is not this extent's chunk: as good as not there.
            Ok(_) => ChunkError::Corrupt { block: u32::MAX },
            Err(error) => error,
        };
        add(&self.store.counters().chunk_reads_failed, 1);
        tracing::debug!(%disk, extent = %self.extent.extent, chunk, %error, "a chunk could not be read");
        if self.disk_of(chunk) != Some(disk) {
            // Asked of the current disk before its chunk was turned to the previous one.
            self.read_again(chunk, blocks);
            return;
        }
        if self.turn_to_previous(chunk) {
            // Not there yet: the slot moves, and what is missing on its new disk is being brought there already.
            if !matches!(error, ChunkError::NotFound | ChunkError::Corrupt { .. }) {
                self.store.disks().failed(disk, &error);
                self.unasked_at_current.insert(chunk);
            }
            self.read_again(chunk, blocks);
            return;
        }
        match error {
            // What the previous disk lacks may lie on the current one, which did not answer: away, not gone.
            ChunkError::NotFound if self.unasked_at_current.contains(chunk) => {
                self.grid.set_untried(chunk, || Cell::Away);
                self.grid.set(chunk, blocks, || Cell::Away);
            }
            ChunkError::Corrupt { .. } if self.unasked_at_current.contains(chunk) => {
                self.grid.set(chunk, blocks, || Cell::Away);
            }
            ChunkError::NotFound => {
                self.bad.insert(chunk);
                self.grid.set_untried(chunk, || Cell::Gone);
                self.grid.set(chunk, blocks, || Cell::Gone);
            }
            ChunkError::Corrupt { block } if blocks.contains(&block) => {
                self.bad.insert(chunk);
                // Only that block is bad for certain; the others of the request are worth another look.
                self.grid.set(chunk, blocks, || Cell::Untried);
                self.grid.set(chunk, block..block + 1, || Cell::Gone);
                let seen = self.corrupt.get_mut(usize::from(chunk)).map_or(0, |seen| {
                    *seen += 1;
                    *seen
                });
                if seen <= CORRUPT_BLOCKS_WORTH_SKIPPING {
                    let again: Vec<u32> = self.grid.wanted_untried(chunk).collect();
                    self.launch(chunk, &again, false);
                }
            }
            ChunkError::Corrupt { .. } => {
                self.bad.insert(chunk);
                self.grid.set(chunk, blocks, || Cell::Gone);
            }
            other => {
                self.store.disks().failed(disk, &other);
                self.avoid.add(disk, Avoid::AFTER_ERROR);
                self.grid.set(chunk, blocks, || Cell::Away);
            }
        }
    }

    fn read_again(&mut self, chunk: u8, blocks: Range<u32>) {
        self.grid.set(chunk, blocks.clone(), || Cell::Untried);
        // One that is down is asked only when the others do not suffice.
        if self.rank(chunk) >= RANK_DOWN {
            return;
        }
        let again: Vec<u32> = blocks.collect();
        self.launch(chunk, &again, false);
    }

    /// Whether an answer is what was asked for, of the extent that was meant.
    fn is_as_expected(&self, got: &ChunkBlocks, blocks: &Range<u32>) -> bool {
        let (spec, extent) = (&got.spec, self.extent);
        let chunk_len = extent.layout().chunk_len();
        let same = (spec.codec, spec.k, spec.m, spec.unit_bytes, spec.extent_len_bytes, spec.len_bytes)
            == (extent.codec, extent.k, extent.m, extent.unit_bytes, extent.len_bytes, chunk_len);
        same && got.first_block == blocks.start
            && got.data.len() == blocks.len()
            && blocks
                .clone()
                .zip(&got.data)
                .all(|(block, bytes)| u64::try_from(bytes.len()).is_ok_and(|len| len == block_len(chunk_len, block)))
    }

    /// Time is up for what is under way: its columns are topped up from other disks, within the budget.
    fn hedge(&mut self) {
        let budget = self.store.inner.pulse.may_hedge(self.store.settings().hedge_percent);
        let mut denied = false;
        for chunk in self.grid.chunks() {
            let sick = self.disk_of(chunk).is_none_or(|disk| self.store.disks().health(disk) != DiskHealth::Up);
            if budget || sick {
                self.grid.set_slow(chunk);
            } else {
                denied |= self.grid.is_waiting(chunk);
            }
        }
        add(&self.store.counters().hedges_denied, u64::from(denied));
        self.top_up(true);
    }

    /// Disks that others were faster than: the next windows of this reader go without them.
    fn remember_the_slow(&self) {
        for chunk in self.grid.chunks().filter(|chunk| self.grid.is_slow(*chunk)) {
            if let Some(disk) = self.disk_of(chunk) {
                self.avoid.add(disk, Avoid::AFTER_SLOW);
            }
        }
    }

    fn too_few(&self, good: u8, gone: u8) -> ReadError {
        let (extent, needed) = (self.extent.extent, self.extent.k);
        if gone > self.extent.m {
            ReadError::Lost { extent, good, needed }
        } else {
            ReadError::Unreachable { extent, good, needed }
        }
    }
}

async fn read(
    client: NodeClient,
    chunk: u8,
    disk: DiskId,
    id: ChunkId,
    blocks: Range<u32>,
    deadline: Duration,
) -> ReadDone {
    let begun = Instant::now();
    let count = blocks.end.saturating_sub(blocks.start);
    let result = tokio::time::timeout(deadline, client.read_blocks(id, blocks.start, count)).await;
    let result = result.unwrap_or(Err(ChunkError::Link(LinkError::Timeout)));
    ReadDone { chunk, disk, blocks, took: begun.elapsed(), result }
}

/// Length of a block of a chunk: the last one may be short.
pub(crate) fn block_len(chunk_len_bytes: u64, block: u32) -> u64 {
    chunk_len_bytes.saturating_sub(u64::from(block) * BLOCK_BYTES).min(BLOCK_BYTES)
}
