//! Slots that lack much: brings everything that belongs into a slot of a placement group to the slot's current disk.
//!
//! A slot whose disk changed names the disk before as `previous`; one whose disk came back without its chunks has none
//! (`look` finds that). Either is queued once in every shard, durably, with a cursor: the shard's extents of the group
//! are taken in order, what the current disk lacks is brought there, and the cursor follows; another holder of the
//! lease goes on from it, and then looks once more from the beginning, since nobody noted what could not be brought.
//! When no shard has a moving slot queued any more, its current disk is looked through once more, from the beginning,
//! and what it has is deleted on the previous one; then a change of the map drops that.
//!
//! Before slots are looked at, the shard is told to take no payload any more that was placed by an older map: a gateway
//! that has not heard of the move places it anew, and names what lies elsewhere.
//!
//! Looks ask without a stamp. So before the last one, the current disk is told of the lease: what an earlier holder,
//! who was paused, still wants deleted there is refused from then on, and is seen by the look if it came first.
//!
//! **Invariant:** a slot's previous disk is dropped only after every extent of its group was looked for on the current
//! disk, under this very pair of disks, whatever the cursors say: the last look is made by the map that the change is
//! made on.

use super::census::verify_on;
use super::look::BATCH;
use super::plan::{absent_slots, Task};
use super::rest::Looked;
use super::{lock, Inner};
use crate::background::command_under;
use crate::background::leases::Held;
use crate::backoff::Backoff;
use crate::disks::DiskHealth;
use crate::object::{add, chunk_id};
use crate::ops::change::FinishedMove;
use crate::ops::{commit, finish_moves, ChangeError, CommitError};
use crate::shards::buckets::odd_answer;
use crate::shards::random_per_mille;
use crate::shards::ShardError;
use futures::stream::{self, StreamExt};
use granary_meta::record::{ExtentRecord, RepairSlotRecord};
use granary_meta::{Answer, ChunkRef, Command, Query};
use granary_placement::id::{DiskId, Epoch, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, DiskState, GroupSlot};
use granary_wire::chunk::{ChunkHealth, ChunkId};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Extents looked at between two notes of the cursor.
const PAGE: u32 = 256;
/// Queued slots per page of a shard's queue.
const SLOTS_PER_PAGE: u32 = 1000;
/// Slots queued by one command.
const SLOTS_PER_COMMAND: usize = 1000;

/// A slot of a placement group.
type SlotId = (PlacementGroupId, u8);

/// Which moves were queued, by which map. Kept by whoever holds the lease, for as long as it does.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// The map whose moves are looked after, and since when.
    epoch: Option<(Epoch, Instant)>,
    /// What each shard was told.
    queued: BTreeMap<ShardId, BTreeMap<SlotId, GroupSlot>>,
    /// The oldest map that each shard takes payloads by.
    required: BTreeMap<ShardId, Epoch>,
    /// Queued slots of which something could not be brought.
    failed: HashMap<(ShardId, SlotId), Failed>,
    /// Queued slots that are being looked through since their beginning. Of others it is not known what could not be
    /// brought before the cursor: an earlier holder of the lease was there.
    begun: HashSet<(ShardId, SlotId)>,
}

/// What is known of a sweep over a slot that did not bring everything.
#[derive(Debug, Default)]
struct Failed {
    /// In the sweep under way something failed.
    now: bool,
    /// Sweeps in which something failed, one after the other.
    sweeps: u32,
    /// Before this the next sweep does not begin.
    not_before: Option<Instant>,
}

/// What came of a look at one queued slot.
enum Look {
    /// Everything in it is on the current disk.
    Done,
    /// A page of it is; there is more.
    Further,
    /// Nothing can be done just now.
    Waits,
}

/// The slots of a map that move.
pub(super) fn moving(map: &ClusterMap) -> BTreeMap<SlotId, GroupSlot> {
    let slots = map.groups.iter().flat_map(|(group, entry)| (0u8..).zip(&entry.slots).map(|slot| (*group, slot)));
    let moving = slots.filter(|(_, (_, slot))| slot.previous.is_some());
    moving.map(|(group, (number, slot))| ((group, number), *slot)).collect()
}

impl Inner {
    /// One round over the slots that are queued. What is done is counted in pages.
    pub(super) async fn slots_pass(&self, moves: &mut Moves, held: &Held) -> Looked {
        let Some(map) = self.store.disks().map() else { return Looked::NOT };
        match self.try_slots_pass(&map, moves, held).await {
            Ok(looked) => looked,
            Err(error) => {
                tracing::debug!(%error, "slots that move could not be looked after");
                Looked::NOT
            }
        }
    }

    async fn try_slots_pass(&self, map: &ClusterMap, moves: &mut Moves, held: &Held) -> Result<Looked, ShardError> {
        let moving = moving(map);
        let moves_wait = !moving.is_empty();
        moves.failed.retain(|(_, (group, _)), _| map.group(*group).is_some());
        moves.begun.retain(|(_, (group, _))| map.group(*group).is_some());
        if moves.epoch.is_none_or(|(epoch, _)| epoch != map.epoch) {
            moves.epoch = Some((map.epoch, Instant::now()));
        }
        // One shard that does not answer keeps moves from ending, but nothing from being brought for the others.
        let (mut told, mut all_looked_at) = (Vec::new(), true);
        for shard in self.meta.object_shards() {
            match self.queue_moves(shard, &moving, moves, held).await {
                Ok(()) => told.push(shard),
                Err(error) => {
                    tracing::debug!(%shard, %error, "slots that move could not be queued");
                    all_looked_at = false;
                }
            }
        }
        // Gateways that have not heard of the map yet may still write to the disks that it took slots from. They are
        // given time to hear of it, and refused from then on: what comes late is seen below, or is placed anew.
        if moves.epoch.is_none_or(|(_, since)| since.elapsed() < self.settings().move_settle) {
            self.tell_flow(map, moving.len(), moving.len());
            // They are waited for as the others are.
            lock(&self.status).queued_slots = u64::try_from(moving.len()).unwrap_or(u64::MAX);
            return Ok(Looked::NOT);
        }
        let (mut progress, mut left) = (0, BTreeSet::new());
        for shard in told {
            if let Err(error) = self.require_map(shard, map.epoch, moves, held).await {
                tracing::debug!(%shard, %error, "a shard could not be told which map payloads must be placed by");
                all_looked_at = false;
                continue;
            }
            match self.look_at_shard(map, shard, moves, held, &mut left).await {
                Ok(further) => progress += further,
                Err(error) => {
                    tracing::debug!(%shard, %error, "slots that move could not be looked after");
                    all_looked_at = false;
                }
            }
        }
        lock(&self.status).queued_slots = u64::try_from(left.len()).unwrap_or(u64::MAX);
        let open = moves_wait || !left.is_empty() || !all_looked_at;
        self.tell_flow(map, moving.len(), left.len());
        let mut done = moving;
        done.retain(|id, _| !left.contains(id));
        if all_looked_at && !done.is_empty() && self.clear_previous(map, &mut done, held).await? {
            let finished: Vec<FinishedMove> = (done.iter())
                .map(|((group, slot), was)| FinishedMove { group: *group, slot: usize::from(*slot), was: *was })
                .collect();
            // On the map that was looked at, or not at all: when another was installed since, that one is looked at.
            let made = commit(&self.meta, |newest| {
                (newest.epoch == map.epoch).then_some(()).ok_or(ChangeError::NotMoving)?;
                finish_moves(newest, &finished)
            });
            match made.await {
                Ok(made) => {
                    tracing::info!(slots = finished.len(), epoch = made.after.epoch.0, "moves of slots are done");
                }
                Err(CommitError::Refused(ChangeError::NotMoving)) => {}
                Err(error) => tracing::warn!(%error, "moves of slots are done, but the map does not say so yet"),
            }
        }
        Ok(Looked { done: progress, open })
    }

    /// Notes for status pages how much is still to be brought, and how fast that goes.
    fn tell_flow(&self, map: &ClusterMap, slots: usize, left: usize) {
        let views = self.store.disks().view();
        let held: HashMap<DiskId, u64> =
            views.iter().filter_map(|view| Some((view.id, view.status.as_ref()?.chunk_bytes))).collect();
        let known = map.groups.values().flat_map(|group| &group.slots).filter(|slot| held.contains_key(&slot.current));
        let per_slot = held.values().sum::<u64>() / u64::try_from(known.count()).unwrap_or(u64::MAX).max(1);
        let rebuilt = self.counters().bytes_rebuilt.load(Ordering::Relaxed);
        lock(&self.flow).pass((slots, left), per_slot, rebuilt);
    }

    /// Queues in a shard what moves and what it was not told yet. At first, what an earlier holder of the lease had
    /// queued goes on where it stopped; a slot that moves again meanwhile begins anew.
    async fn queue_moves(
        &self,
        shard: ShardId,
        moving: &BTreeMap<SlotId, GroupSlot>,
        moves: &mut Moves,
        held: &Held,
    ) -> Result<(), ShardError> {
        let known = moves.queued.get(&shard);
        let untold = |(id, slot): &(&SlotId, &GroupSlot)| known.and_then(|known| known.get(*id)) != Some(*slot);
        let untold: Vec<SlotId> = moving.iter().filter(untold).map(|(id, _)| *id).collect();
        self.queue_slots(shard, &untold, known.is_none(), held).await?;
        moves.queued.insert(shard, moving.clone());
        Ok(())
    }

    /// Has a shard take no payload any more that was placed by an older map.
    async fn require_map(
        &self,
        shard: ShardId,
        epoch: Epoch,
        moves: &mut Moves,
        held: &Held,
    ) -> Result<(), ShardError> {
        if moves.required.get(&shard).is_none_or(|required| *required < epoch) {
            let require = Command::RequireMap { epoch, lease: held.stamp().clone() };
            command_under(&self.meta, held, shard, require).await?;
            moves.required.insert(shard, epoch);
        }
        Ok(())
    }

    /// Queues slots in a shard. `keep`: those that are queued go on where they stopped.
    pub(super) async fn queue_slots(
        &self,
        shard: ShardId,
        slots: &[SlotId],
        keep: bool,
        held: &Held,
    ) -> Result<(), ShardError> {
        for slots in slots.chunks(SLOTS_PER_COMMAND) {
            let queue = Command::QueueRepair { slots: slots.to_vec(), keep, lease: held.stamp().clone() };
            command_under(&self.meta, held, shard, queue).await?;
        }
        Ok(())
    }

    /// One page of each slot that is queued in a shard. Answers how many came further; `left` gets those that are not
    /// done.
    async fn look_at_shard(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        moves: &mut Moves,
        held: &Held,
        left: &mut BTreeSet<SlotId>,
    ) -> Result<usize, ShardError> {
        let mut progress = 0;
        let mut queued = self.queued_slots(shard).await?;
        let answers = |disk| self.store.disks().health(disk) == DiskHealth::Up;
        queued.sort_by_key(|(group, slot, _)| (std::cmp::Reverse(absent_slots(map, *group, answers)), *group, *slot));
        let mut most = None;
        for (group, slot, record) in queued {
            // The rest waits while something of those in the most danger can be brought.
            let absent = absent_slots(map, group, answers);
            if progress > 0 && most.is_some_and(|most| absent < most) {
                left.insert((group, slot));
                continue;
            }
            most = Some(absent);
            match self.look_at_slot(map, shard, (group, slot), &record, moves, held).await? {
                Look::Done => progress += 1,
                Look::Further => {
                    progress += 1;
                    left.insert((group, slot));
                }
                Look::Waits => {
                    left.insert((group, slot));
                }
            }
        }
        Ok(progress)
    }

    async fn queued_slots(&self, shard: ShardId) -> Result<Vec<(PlacementGroupId, u8, RepairSlotRecord)>, ShardError> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let query = Query::ListRepairSlots { after, limit: SLOTS_PER_PAGE };
            let (slots, more) = match self.meta.query(shard, query).await? {
                Answer::RepairSlots { slots, more } => (slots, more),
                other => return Err(odd_answer(shard, &other)),
            };
            after = slots.last().map(|(group, slot, _)| (*group, *slot));
            all.extend(slots);
            if !more || after.is_none() {
                return Ok(all);
            }
        }
    }

    /// Brings one page of a queued slot to its current disk.
    async fn look_at_slot(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        (group, slot): SlotId,
        record: &RepairSlotRecord,
        moves: &mut Moves,
        held: &Held,
    ) -> Result<Look, ShardError> {
        let Some(entry) = map.group(group).and_then(|entry| entry.slots.get(usize::from(slot))) else {
            return Ok(Look::Waits);
        };
        if self.pace.is_paused() || !self.store.disks().repairable(entry.current) {
            return Ok(Look::Waits);
        }
        let key = (shard, (group, slot));
        if record.cursor.is_none() {
            if let Some(failed) = moves.failed.get_mut(&key) {
                if failed.not_before.is_some_and(|not_before| Instant::now() < not_before) {
                    return Ok(Look::Waits);
                }
                failed.now = false;
            }
            moves.begun.insert(key);
        }
        let after = record.cursor.map(|extent| (group, extent));
        let (extents, more) = self.extents_of(shard, group, after, PAGE).await?;
        let chunks: Vec<(ChunkId, ChunkRef, &ExtentRecord)> = in_slot(&extents, slot).collect();
        let asked: Vec<(ChunkId, ChunkRef)> = chunks.iter().map(|(id, chunk, _)| (*id, *chunk)).collect();
        let Some(absent) = self.absent(entry.current, &asked).await else { return Ok(Look::Waits) };
        add(&self.counters().chunks_found_absent, u64::try_from(absent.len()).unwrap_or(0));
        let absent: HashSet<ChunkRef> = absent.into_iter().collect();
        // What lay there before the slot came may be rotten, and the copy on the previous disk is deleted for it. What
        // this move brings is read back when it is brought.
        let present = chunks.iter().filter(|(_, chunk, _)| !absent.contains(chunk));
        let Some(bad) = self.bad_on(entry.current, present).await else { return Ok(Look::Waits) };
        let lost = |(id, chunk, _): &&(ChunkId, ChunkRef, &ExtentRecord)| absent.contains(chunk) || bad.contains(id);
        let tasks = chunks.iter().filter(lost).map(|(_, chunk, record)| Task {
            shard,
            owner: HashSlot::of(record.bucket.0, &record.key),
            extent: record.extent.clone(),
            key: record.key.clone(),
            rebuild: vec![chunk.index],
            generations: BTreeMap::new(),
            failures_left: i32::from(record.extent.m) - 1,
            queued_ms: 0,
        });
        let tasks: Vec<Task> = tasks.collect();
        let count = tasks.len();
        let brought = stream::iter(tasks)
            .map(|task| async move {
                if self.pace.is_paused() {
                    return 0;
                }
                let (good, error) = self.repair(&task, held).await;
                if let Some(error) = &error {
                    tracing::debug!(extent = %task.extent.extent, %error, "a chunk could not be brought to its new disk");
                }
                usize::from(error.is_none() && good == task.rebuild)
            })
            .buffer_unordered(self.settings().extents_at_once.max(1))
            .fold(0, |sum, one| async move { sum + one })
            .await;
        // What a pause has left out is no failure: the page is looked at again after it.
        if brought < count && self.pace.is_paused() {
            return Ok(Look::Waits);
        }
        // What cannot be brought keeps the move from ending, but not what comes behind it from being brought. What was
        // deleted meanwhile is not listed any more the next time.
        if brought < count {
            moves.failed.entry(key).or_default().now = true;
        }
        let (generation, lease) = (record.generation, held.stamp().clone());
        match extents.last() {
            Some(last) if more => {
                let cursor = last.extent.extent;
                let advance = Command::AdvanceRepair { group, slot, generation, cursor, lease };
                command_under(&self.meta, held, shard, advance).await?;
                Ok(Look::Further)
            }
            _ if moves.failed.get(&key).is_some_and(|failed| failed.now) => {
                self.queue_slots(shard, &[(group, slot)], false, held).await?;
                let failed = moves.failed.entry(key).or_default();
                failed.sweeps = failed.sweeps.saturating_add(1);
                let settings = self.settings();
                let backoff = Backoff { first: settings.first_backoff, longest: settings.longest_backoff };
                failed.not_before = Some(Instant::now() + backoff.delay(failed.sweeps, random_per_mille()));

                Ok(Look::Waits)
            }
            _ if !moves.begun.contains(&key) => {
                self.queue_slots(shard, &[(group, slot)], false, held).await?;
                Ok(Look::Further)
            }
            _ => {
                moves.failed.remove(&key);
                moves.begun.remove(&key);
                let done = Command::RepairSlotDone { group, slot, generation, lease };
                command_under(&self.meta, held, shard, done).await?;
                Ok(Look::Done)
            }
        }
    }

    /// Has a disk read these chunks; answers those that are not good. None when it does not say so of all of them.
    async fn bad_on<'a>(
        &self,
        disk: DiskId,
        chunks: impl Iterator<Item = &'a (ChunkId, ChunkRef, &'a ExtentRecord)>,
    ) -> Option<HashSet<ChunkId>> {
        let chunks: Vec<(ChunkId, u64)> =
            chunks.map(|(id, _, record)| (*id, record.extent.layout().chunk_len())).collect();
        let count = chunks.len();
        self.pace.take(chunks.iter().map(|(_, len_bytes)| *len_bytes).sum()).await;
        let healths = verify_on(&self.store, disk, chunks, self.settings().verify_deadline).await;
        let bad = healths.iter().filter(|(_, health)| *health != ChunkHealth::Good).map(|(id, _)| *id);
        (healths.len() == count).then(|| bad.collect())
    }

    pub(super) async fn extents_of(
        &self,
        shard: ShardId,
        group: PlacementGroupId,
        after: Option<(PlacementGroupId, ExtentId)>,
        limit: u32,
    ) -> Result<(Vec<ExtentRecord>, bool), ShardError> {
        let query = Query::ExtentsOfGroup { group: Some(group), after, limit };
        match self.meta.query(shard, query).await? {
            Answer::Extents { extents, more } => Ok((extents, more)),
            other => Err(odd_answer(shard, &other)),
        }
    }

    /// Has a disk refuse earlier holders of the lease from now on, by a deletion of nothing. False when it does not
    /// answer.
    pub(super) async fn tell_of_lease(&self, disk: DiskId, held: &Held) -> bool {
        let Some(client) = self.store.disks().client(disk) else { return false };
        let request = ControlRequest::DeleteChunks { chunks: Vec::new(), lease: Some(held.stamp().clone()) };
        match client.control(request, self.settings().control_deadline).await {
            Ok(ControlResponse::Deleted(_)) => true,
            Ok(ControlResponse::Error(ControlError::StaleLease { current })) => {
                held.refused(current);
                false
            }
            Ok(answer) => {
                tracing::debug!(%disk, ?answer, "a disk could not be told of a lease");
                false
            }
            Err(error) => {
                tracing::debug!(%disk, %error, "a disk could not be told of a lease");
                false
            }
        }
    }

    /// Looks once more that the current disks have every chunk of these slots, and deletes what they have on the
    /// previous ones, which nobody would ask for it again. A slot where one is lacking is queued again. A slot whose
    /// previous disk does not answer stays as it is until it does, or is out or away. False when none is left.
    async fn clear_previous(
        &self,
        map: &ClusterMap,
        done: &mut BTreeMap<SlotId, GroupSlot>,
        held: &Held,
    ) -> Result<bool, ShardError> {
        // One that is away takes its chunks along, unless it answers again: its leftovers are cleared when it comes
        // back.
        let serves = |disk: DiskId| match map.disk(disk).map(|disk| disk.state) {
            None | Some(DiskState::Out) => false,
            Some(DiskState::Away) => self.store.disks().health(disk) == DiskHealth::Up,
            Some(DiskState::In | DiskState::Draining) => true,
        };
        for ((group, slot), entry) in done.clone() {
            let previous = entry.previous.filter(|disk| serves(*disk));
            if !self.tell_of_lease(entry.current, held).await {
                done.remove(&(group, slot));
                continue;
            }
            'shards: for shard in self.meta.object_shards() {
                let mut after = None;
                loop {
                    let (extents, more) =
                        self.extents_of(shard, group, after, u32::try_from(BATCH).unwrap_or(1)).await?;
                    let chunks: Vec<(ChunkId, ChunkRef)> =
                        in_slot(&extents, slot).map(|(id, chunk, _)| (id, chunk)).collect();
                    // Nothing goes from the previous disk that is not on the current one.
                    let absent = self.absent(entry.current, &chunks).await;
                    if absent.as_ref().is_none_or(|absent| !absent.is_empty()) {
                        if absent.is_some() {
                            self.queue_slots(shard, &[(group, slot)], false, held).await?;
                        }
                        done.remove(&(group, slot));
                        break 'shards;
                    }
                    let chunks: Vec<ChunkId> = chunks.into_iter().map(|(id, _)| id).collect();
                    // Another map may have given the slot to a third disk meanwhile, which is filled from this one.
                    let newest = self.store.disks().map();
                    let of_newest = newest.as_ref().and_then(|map| map.group(group)?.slots.get(usize::from(slot)));
                    if of_newest != Some(&entry) {
                        done.remove(&(group, slot));
                        break 'shards;
                    }
                    if let Some(previous) = previous {
                        if !self.delete_on(previous, chunks, held).await.is_empty() {
                            done.remove(&(group, slot));
                            break 'shards;
                        }
                    }
                    after = extents.last().map(|record| (group, record.extent.extent));
                    if !more || after.is_none() {
                        break;
                    }
                }
            }
        }
        Ok(!done.is_empty() && !held.is_lost())
    }
}

/// The chunks of these extents that belong into a slot.
fn in_slot(extents: &[ExtentRecord], slot: u8) -> impl Iterator<Item = (ChunkId, ChunkRef, &ExtentRecord)> {
    extents.iter().flat_map(move |record| {
        let extent = &record.extent;
        let indices = (0u8..).zip(&extent.slots).filter(move |(_, of)| **of == slot);
        indices.map(move |(index, _)| {
            let chunk = ChunkRef { group: extent.group, extent: extent.extent, index };
            (chunk_id(extent, index), chunk, record)
        })
    })
}
