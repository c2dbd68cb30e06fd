//! A count of chunks made by reading their bytes, never by trusting a job's word.
//!
//! Every shard lists its extents, and every chunk of them is read and checked by the disk node that holds it. While a
//! slot moves, what its current disk does not have may lie on the previous one: that is asked too. What is missing or
//! corrupt it queues for repair. Memory: a page of extents, whatever the size of the cluster.

use crate::disks::DiskHealth;
use crate::object::{chunk_id, slot_of, ObjectStore};
use crate::shards::buckets::odd_answer;
use crate::shards::{ShardError, Shards};
use futures::stream::{self, StreamExt};
use granary_meta::record::ExtentRecord;
use granary_meta::{Answer, ChunkRef, Command, Query};
use granary_placement::id::{DiskId, ExtentId, PlacementGroupId, ShardId};
use granary_placement::map::DiskState;
use granary_wire::chunk::{ChunkHealth, ChunkId};
use granary_wire::control::{ControlRequest, ControlResponse};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Extents per page.
const PAGE: u32 = 256;
/// Payload verified by one request, at most: what a disk reads well within the deadline.
const BYTES_PER_REQUEST: u64 = 256 * 1024 * 1024;
/// Chunks verified by one request, at most.
const CHUNKS_PER_REQUEST: usize = 256;
/// Disks verifying at once.
const DISKS_AT_ONCE: usize = 32;
/// Damaged chunks told to a shard in one command, at most.
const REPORTS_PER_COMMAND: usize = 500;
/// Lost extents named in the report.
const NAMED: usize = 100;

/// What a census found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// Extents the shards own.
    pub extents: u64,
    /// Payload of them, in bytes.
    pub bytes: u64,
    /// Chunks there should be.
    pub chunks_expected: u64,
    /// Chunks read from their disk with every checksum right.
    pub good: u64,
    /// Of the good ones, those that still lie on the disk that their slot leaves only.
    #[serde(default)]
    pub good_on_previous: u64,
    /// Chunks that are not on their disk.
    pub missing: u64,
    /// Chunks with a wrong checksum or that cannot be read.
    pub corrupt: u64,
    /// Chunks on disks that did not answer.
    pub unreachable: u64,
    /// Missing and corrupt chunks that the census put on the repair queue.
    pub queued_for_repair: u64,
    /// Chunks on disks that no shard knows, of uploads under way among others.
    #[serde(default)]
    pub orphans: u64,
    /// Of these, in quarantine.
    #[serde(default)]
    pub orphans_quarantined: u64,
    /// Extents with fewer than K good chunks.
    pub extents_lost: u64,
    /// Of these, such that chunks on disks that did not answer may bring them back.
    pub extents_lost_unless_disks_return: u64,
    /// Extents by the failures they can still bear: good chunks beyond K; negative for lost ones.
    pub extents_by_failures_left: BTreeMap<i32, u64>,
    /// Payload bytes by the same.
    pub bytes_by_failures_left: BTreeMap<i32, u64>,
    /// The first lost extents, with their keys.
    pub lost: Vec<LostExtent>,
}

/// A lost extent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostExtent {
    /// Which.
    pub extent: ExtentId,
    /// Its group.
    pub group: PlacementGroupId,
    /// The bucket of its object.
    pub bucket: u64,
    /// The key of its object.
    pub key: String,
    /// Good chunks.
    pub good: u8,
    /// Chunks needed.
    pub needed: u8,
}

impl Census {
    /// Whether every chunk there should be is good.
    pub fn is_complete(&self) -> bool {
        self.good == self.chunks_expected
    }
}

/// How far a census is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CensusProgress {
    /// Shards counted.
    pub shards_done: usize,
    /// Shards in all.
    pub shards: usize,
    /// Extents counted.
    pub extents: u64,
    /// Good chunks found.
    pub good: u64,
}

/// Counts. See [`Healer::census`](super::Healer::census).
///
/// # Errors
/// A shard that does not answer.
pub async fn census(
    store: &ObjectStore,
    meta: &Shards,
    verify_deadline: Duration,
    mut progress: impl FnMut(&CensusProgress) + Send,
) -> Result<Census, ShardError> {
    let mut census = Census::default();
    let shards = meta.object_shards();
    for (shards_done, shard) in shards.iter().copied().enumerate() {
        let mut after = None;
        loop {
            let (extents, more) =
                match meta.query(shard, Query::ExtentsOfGroup { group: None, after, limit: PAGE }).await? {
                    Answer::Extents { extents, more } => (extents, more),
                    other => return Err(odd_answer(shard, &other)),
                };
            after = extents.last().map(|record| (record.extent.group, record.extent.extent));
            let found = verify(store, &extents, verify_deadline).await;
            extents.iter().for_each(|record| count(&mut census, record, &found));
            census.queued_for_repair += queue_damage(meta, shard, &extents, &found).await;
            progress(&CensusProgress { shards_done, shards: shards.len(), extents: census.extents, good: census.good });
            if !more || after.is_none() {
                break;
            }
        }
    }
    Ok(census)
}

/// Puts what is missing or corrupt on the shard's repair queue: nobody may ever read it, so nobody else may find it.
/// Gives how many. Failing to does not fail the census, whose first duty is the count.
async fn queue_damage(meta: &Shards, shard: ShardId, extents: &[ExtentRecord], found: &HashMap<ChunkId, Found>) -> u64 {
    let mut damaged = Vec::new();
    for ExtentRecord { extent, .. } in extents {
        for index in 0..extent.k.saturating_add(extent.m) {
            if found.get(&chunk_id(extent, index)).is_some_and(|found| found.to_repair()) {
                damaged.push(ChunkRef { group: extent.group, extent: extent.extent, index });
            }
        }
    }
    let mut queued = 0;
    for chunks in damaged.chunks(REPORTS_PER_COMMAND) {
        match meta.command(shard, Command::ReportMissing { chunks: chunks.to_vec() }).await {
            Ok(_) => queued += chunks.len() as u64,
            Err(error) => tracing::warn!(%shard, %error, "damage found by a census could not be queued for repair"),
        }
    }
    queued
}

/// Adds one extent.
fn count(census: &mut Census, record: &ExtentRecord, found: &HashMap<ChunkId, Found>) {
    let extent = &record.extent;
    let (mut good, mut unreachable) = (0u8, 0u8);
    census.extents += 1;
    census.bytes = census.bytes.saturating_add(extent.len_bytes);
    for index in 0..extent.k.saturating_add(extent.m) {
        census.chunks_expected += 1;
        let found = found.get(&chunk_id(extent, index)).copied().unwrap_or_default();
        match found.verdict() {
            Some(ChunkHealth::Good) => {
                census.good += 1;
                census.good_on_previous += u64::from(found.current != Some(ChunkHealth::Good));
                good += 1;
            }
            Some(ChunkHealth::Missing) => census.missing += 1,
            Some(ChunkHealth::Corrupt) => census.corrupt += 1,
            None => {
                census.unreachable += 1;
                unreachable += 1;
            }
        }
    }
    let failures_left = i32::from(good) - i32::from(extent.k);
    *census.extents_by_failures_left.entry(failures_left).or_default() += 1;
    *census.bytes_by_failures_left.entry(failures_left).or_default() += extent.len_bytes;
    if failures_left < 0 {
        census.extents_lost += 1;
        census.extents_lost_unless_disks_return += u64::from(good.saturating_add(unreachable) >= extent.k);
        if census.lost.len() < NAMED {
            census.lost.push(LostExtent {
                extent: extent.extent,
                group: extent.group,
                bucket: record.bucket.0,
                key: record.key.clone(),
                good,
                needed: extent.k,
            });
        }
    }
}

/// What the disks of a chunk's slot say of it. None: such a disk did not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Found {
    /// The current one.
    current: Option<ChunkHealth>,
    /// The previous one, where the slot moves and it was asked: only when the current one does not have the chunk.
    previous: Option<Option<ChunkHealth>>,
}

impl Found {
    /// How the chunk is; None when nobody can tell before a disk answers that did not.
    fn verdict(self) -> Option<ChunkHealth> {
        use ChunkHealth::{Corrupt, Good, Missing};
        match (self.current, self.previous) {
            (current, None) => current,
            (Some(Good), _) | (_, Some(Some(Good))) => Some(Good),
            (None, _) | (_, Some(None)) => None,
            (Some(Corrupt), _) | (_, Some(Some(Corrupt))) => Some(Corrupt),
            (Some(Missing), Some(Some(Missing))) => Some(Missing),
        }
    }

    /// Is it to be rebuilt? What merely has not come to its new disk yet is brought there by the move.
    fn to_repair(self) -> bool {
        self.current == Some(ChunkHealth::Corrupt)
            || matches!(self.verdict(), Some(ChunkHealth::Missing | ChunkHealth::Corrupt))
    }
}

/// Has the chunks of a page read by their disks. A chunk without an entry could not be asked for.
async fn verify(store: &ObjectStore, extents: &[ExtentRecord], deadline: Duration) -> HashMap<ChunkId, Found> {
    let Some(map) = store.disks().map() else { return HashMap::new() };
    let (mut on_current, mut on_previous) = (ByDisk::new(), HashMap::new());
    for record in extents {
        let len_bytes = record.extent.layout().chunk_len();
        for index in 0..record.extent.k.saturating_add(record.extent.m) {
            let Some(slot) = slot_of(&map, &record.extent, index) else { continue };
            let chunk = (chunk_id(&record.extent, index), len_bytes);
            on_current.entry(slot.current).or_default().push(chunk);
            // One that left for good took its chunks with it.
            let serves = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.state != DiskState::Out);
            if let Some(previous) = slot.previous.filter(serves) {
                on_previous.insert(chunk.0, (previous, len_bytes));
            }
        }
    }
    let mut found: HashMap<ChunkId, Found> = HashMap::new();
    for (id, health) in verify_all(store, on_current, deadline).await {
        found.entry(id).or_default().current = Some(health);
    }
    let mut second = ByDisk::new();
    for (id, (disk, len_bytes)) in on_previous {
        let found = found.entry(id).or_default();
        if found.current != Some(ChunkHealth::Good) {
            found.previous = Some(None);
            second.entry(disk).or_default().push((id, len_bytes));
        }
    }
    for (id, health) in verify_all(store, second, deadline).await {
        found.entry(id).or_default().previous = Some(Some(health));
    }
    found
}

/// Chunks with their lengths in bytes, by the disk that is asked for them.
type ByDisk = BTreeMap<DiskId, Vec<(ChunkId, u64)>>;

async fn verify_all(store: &ObjectStore, by_disk: ByDisk, deadline: Duration) -> Vec<(ChunkId, ChunkHealth)> {
    let answers: Vec<Vec<(ChunkId, ChunkHealth)>> = stream::iter(by_disk)
        .map(|(disk, chunks)| verify_on(store, disk, chunks, deadline))
        .buffer_unordered(DISKS_AT_ONCE)
        .collect()
        .await;
    answers.into_iter().flatten().collect()
}

/// Has chunks read by one disk, in requests of bounded size. What it does not answer is left out.
pub(super) async fn verify_on(
    store: &ObjectStore,
    disk: DiskId,
    chunks: Vec<(ChunkId, u64)>,
    deadline: Duration,
) -> Vec<(ChunkId, ChunkHealth)> {
    let mut answers = Vec::with_capacity(chunks.len());
    let Some(client) = store.disks().client(disk) else { return answers };
    let mut rest = &chunks[..];
    while !rest.is_empty() {
        if store.disks().health(disk) == DiskHealth::Down {
            break;
        }
        let mut bytes = 0u64;
        let fitting = rest
            .iter()
            .take(CHUNKS_PER_REQUEST)
            .take_while(|(_, len_bytes)| {
                bytes = bytes.saturating_add(*len_bytes);
                bytes <= BYTES_PER_REQUEST
            })
            .count();
        let (part, later) = rest.split_at(fitting.clamp(1, rest.len()));
        rest = later;
        let ids: Vec<ChunkId> = part.iter().map(|(id, _)| *id).collect();
        match client.control(ControlRequest::VerifyChunks(ids.clone()), deadline).await {
            Ok(ControlResponse::Health(health)) if health.len() == ids.len() => {
                answers.extend(ids.into_iter().zip(health))
            }
            Ok(answer) => tracing::warn!(%disk, ?answer, "a disk could not verify its chunks"),
            Err(error) => tracing::warn!(%disk, %error, "a disk did not verify its chunks"),
        }
    }
    answers
}
