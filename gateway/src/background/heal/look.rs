//! What is missing? Finds it and puts it into the durable repair queues.
//!
//! Readers report what they meet. Beyond that, every disk is walked once when the gateway starts, when it takes over
//! slots, and when it comes back after having been away: it may have come back empty, or with less than it had. A walk
//! compares what the shards say should lie on the disk with the disk's index; it reads no payload. Where a few chunks
//! of a slot are absent, each is queued; where many are, the slot is, as one entry with a cursor, and the walk leaves
//! the rest of it to [`slots`](super::slots).

use super::{lock, Inner};
use crate::background::leases::Held;
use crate::disks::DiskHealth;
use crate::object::reports::Report;
use crate::object::{add, chunk_id};
use crate::shards::buckets::odd_answer;
use crate::shards::ShardError;
use granary_meta::{Answer, ChunkRef, Command, Query};
use granary_placement::id::{DiskId, ExtentId, PlacementGroupId, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::chunk::ChunkId;
use granary_wire::control::{ControlRequest, ControlResponse};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// Reports or chunks per request.
pub(super) const BATCH: usize = 1000;
/// Pause between two pages of a walk: it is in no hurry, clients are.
const PAGE_PAUSE: Duration = Duration::from_millis(5);

/// So many absent chunks of a slot on one page of a walk are queued one by one.
const FEW: usize = 32;

/// What a walk has seen of a disk.
#[derive(Debug, Default)]
pub(super) struct Walked {
    times_up: u64,
    slots: BTreeSet<(PlacementGroupId, u8)>,
}

/// Slots to be walked, by disk.
type Due = BTreeMap<DiskId, BTreeSet<(PlacementGroupId, u8)>>;
/// Chunks that should lie on a disk, waiting to be asked for.
type Batch = Vec<(ChunkId, ChunkRef)>;

impl Inner {
    /// Brings reports of readers to the shards.
    pub(super) async fn report_loop(&self) {
        let reports = self.store.reports();
        loop {
            reports.arrived().await;
            loop {
                let batch = reports.take(BATCH);
                if batch.is_empty() {
                    break;
                }
                let undelivered = self.deliver(batch).await;
                let failed = !undelivered.is_empty();
                reports.put_back(undelivered);
                self.poke.notify_one();
                if failed {
                    tokio::time::sleep(self.settings().interval).await;
                }
            }
        }
    }

    /// Sends reports to their shards, or to all where the owner is not known; answers those that could not be
    /// delivered.
    async fn deliver(&self, reports: Vec<Report>) -> Vec<Report> {
        let all = self.meta.object_shards();
        let mut by_shard: BTreeMap<ShardId, Vec<ChunkRef>> = BTreeMap::new();
        for report in reports {
            match report.owner {
                Some(owner) => by_shard.entry(owner).or_default().push(report.chunk),
                None => all.iter().for_each(|shard| by_shard.entry(*shard).or_default().push(report.chunk)),
            }
        }
        let mut undelivered = Vec::new();
        for (shard, chunks) in by_shard {
            if let Err(error) = self.report(shard, chunks.clone()).await {
                tracing::debug!(%error, "reports of missing chunks could not be delivered");
                undelivered.extend(chunks.into_iter().map(|chunk| Report { chunk, owner: Some(shard) }));
            }
        }
        undelivered
    }

    pub(super) async fn report(&self, shard: ShardId, chunks: Vec<ChunkRef>) -> Result<(), ShardError> {
        if chunks.is_empty() {
            return Ok(());
        }
        self.meta.command(shard, Command::ReportMissing { chunks }).await.map(|_| ())
    }

    pub(super) async fn walk_loop(&self, held: &Held) {
        let mut changes = self.store.disks().changes();
        let mut seen_epoch = None;
        loop {
            let map = self.store.disks().map();
            let epoch = map.as_ref().map(|map| map.epoch);
            let due = map.as_ref().map(|map| self.due(map)).unwrap_or_default();
            lock(&self.status).disks_to_walk = due.keys().copied().collect();
            if let (Some(map), false) = (map, due.is_empty()) {
                self.walk(&map, due, held).await;
                lock(&self.status).disks_to_walk.clear();
            }
            // Nothing new without a change of health or map; what failed is tried again after a while.
            let retry = if seen_epoch == epoch { self.settings().interval * 5 } else { self.settings().interval };
            seen_epoch = epoch;
            tokio::select! {
                () = tokio::time::sleep(retry) => {}
                _ = changes.changed() => tokio::time::sleep(self.settings().interval / 4).await,
            }
        }
    }

    /// Slots on disks that answer and were not walked since they last came up, or since the disk took them over.
    fn due(&self, map: &ClusterMap) -> Due {
        let up: HashMap<DiskId, u64> = self
            .store
            .disks()
            .view()
            .into_iter()
            .filter(|disk| disk.health == DiskHealth::Up)
            .map(|disk| (disk.id, disk.times_up))
            .collect();
        let mut walked = lock(&self.walked);
        walked.retain(|disk, _| map.disk(*disk).is_some());
        let mut due = Due::new();
        for (id, group) in &map.groups {
            // Slots that move are looked after by their own queue.
            let resting = group.slots.iter().enumerate().filter(|(_, slot)| slot.previous.is_none());
            for (slot, disk) in resting.map(|(number, slot)| (number, &slot.current)) {
                let (Some(times_up), Ok(slot)) = (up.get(disk), u8::try_from(slot)) else { continue };
                let known = walked
                    .get(disk)
                    .is_some_and(|walked| walked.times_up == *times_up && walked.slots.contains(&(*id, slot)));
                if !known {
                    due.entry(*disk).or_default().insert((*id, slot));
                }
            }
        }
        due
    }

    /// Walks the extents of the groups that have a slot due. Disks that fail on the way stay due.
    async fn walk(&self, map: &ClusterMap, mut due: Due, held: &Held) {
        let times_up: HashMap<DiskId, u64> =
            self.store.disks().view().into_iter().map(|disk| (disk.id, disk.times_up)).collect();
        let groups: BTreeSet<PlacementGroupId> = due.values().flatten().map(|(group, _)| *group).collect();
        // One pass over everything is cheaper than many over most groups.
        let passes: Vec<Option<PlacementGroupId>> =
            if groups.len() * 2 >= map.groups.len() { vec![None] } else { groups.into_iter().map(Some).collect() };
        for shard in self.meta.object_shards() {
            for group in &passes {
                if due.is_empty() {
                    return;
                }
                if let Err(error) = self.walk_pages(map, shard, *group, &mut due, held).await {
                    tracing::debug!(%error, "a walk over extents was broken off");
                    return;
                }
            }
        }
        lock(&self.status).walks_done += u64::try_from(due.len()).unwrap_or(0);
        let mut walked = lock(&self.walked);
        for (disk, slots) in due {
            let times_up = times_up.get(&disk).copied().unwrap_or_default();
            let entry = walked.entry(disk).or_default();
            if entry.times_up != times_up {
                *entry = Walked { times_up, slots: BTreeSet::new() };
            }
            entry.slots.extend(slots);
        }
        drop(walked);
        self.poke.notify_one();
    }

    async fn walk_pages(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        group: Option<PlacementGroupId>,
        due: &mut Due,
        held: &Held,
    ) -> Result<(), ShardError> {
        let mut queued: BTreeSet<(PlacementGroupId, u8)> = BTreeSet::new();
        let mut after: Option<(PlacementGroupId, ExtentId)> = None;
        loop {
            let limit = u32::try_from(BATCH).unwrap_or(1);
            let (extents, more) = match self.meta.query(shard, Query::ExtentsOfGroup { group, after, limit }).await? {
                Answer::Extents { extents, more } => (extents, more),
                other => return Err(odd_answer(shard, &other)),
            };
            after = extents.last().map(|record| (record.extent.group, record.extent.extent));
            let mut batches: BTreeMap<DiskId, Batch> = BTreeMap::new();
            let mut slot_of: HashMap<ChunkRef, u8> = HashMap::new();
            for record in &extents {
                let extent = &record.extent;
                let Some(slots) = map.group(extent.group).map(|group| &group.slots) else { continue };
                for (index, slot) in (0u8..).zip(&extent.slots) {
                    let Some(disk) = slots.get(usize::from(*slot)).map(|slot| &slot.current) else { continue };
                    let wanted = due.get(disk).is_some_and(|due| due.contains(&(extent.group, *slot)));
                    if wanted && !queued.contains(&(extent.group, *slot)) {
                        let chunk = ChunkRef { group: extent.group, extent: extent.extent, index };
                        batches.entry(*disk).or_default().push((chunk_id(extent, index), chunk));
                        slot_of.insert(chunk, *slot);
                    }
                }
            }
            for (disk, batch) in batches {
                match self.absent(disk, &batch).await {
                    Some(absent) => {
                        add(&self.counters().chunks_found_absent, u64::try_from(absent.len()).unwrap_or(0));
                        let mut by_slot: BTreeMap<(PlacementGroupId, u8), Vec<ChunkRef>> = BTreeMap::new();
                        for chunk in absent {
                            let slot = slot_of.get(&chunk).copied().unwrap_or_default();
                            by_slot.entry((chunk.group, slot)).or_default().push(chunk);
                        }
                        let many: Vec<(PlacementGroupId, u8)> =
                            by_slot.iter().filter(|(_, chunks)| chunks.len() > FEW).map(|(slot, _)| *slot).collect();
                        by_slot.retain(|slot, _| !many.contains(slot));
                        // From the beginning: the disk may have lost what was brought to it before.
                        self.queue_slots(shard, &many, false, held).await?;
                        queued.extend(many);
                        let few: Vec<ChunkRef> = by_slot.into_values().flatten().collect();
                        for part in few.chunks(BATCH) {
                            self.report(shard, part.to_vec()).await?;
                        }
                    }
                    None => {
                        due.remove(&disk);
                    }
                }
            }
            if !more || after.is_none() || due.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(PAGE_PAUSE).await;
        }
    }

    /// Which of these chunks a disk does not have; None when it does not answer.
    pub(super) async fn absent(&self, disk: DiskId, batch: &[(ChunkId, ChunkRef)]) -> Option<Vec<ChunkRef>> {
        let client = self.store.disks().client(disk)?;
        let mut absent = Vec::new();
        for part in batch.chunks(BATCH) {
            let ids = part.iter().map(|(id, _)| *id).collect();
            match client.control(ControlRequest::HaveChunks(ids), self.settings().control_deadline).await {
                Ok(ControlResponse::Have(have)) if have.len() == part.len() => {
                    absent.extend(part.iter().zip(have).filter(|(_, have)| !have).map(|((_, chunk), _)| *chunk));
                }
                Ok(_) => return None,
                Err(error) => {
                    tracing::debug!(%disk, %error, "a disk could not be walked");
                    return None;
                }
            }
        }
        Some(absent)
    }
}
