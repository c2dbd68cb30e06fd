//! Strays: chunks on a disk that does not serve their slot, so that no reader looks for them there. Their *home* is the
//! current disk of their slot.
//!
//! A disk that went out of service and comes back is full of them. Most have been rebuilt at home meanwhile. But a disk
//! that died in the middle of a move, when slots were on their way to it, may hold what was written since the move
//! began, and when others are dead too nobody can rebuild that: it is copied from the stray.
//!
//! - [`Inner::strays`]: which chunks of a page are strays, and whether their homes have them;
//! - [`Inner::bring_home`]: copies what a home lacks;
//! - [`Inner::verified`]: which strays their homes have read and found good;
//! - [`Inner::clear_leftovers`]: all of that, and the deletion, for a disk that is to be let back in;
//! - [`Inner::bring_rest`]: all of that but the deletion, for a disk that was let in with something left.
//!
//! **Invariant:** no stray is deleted before its home was asked to read its own copy and found every block good.

use super::census::verify_on;
use super::rebuild::{spec_of, within, Lost, RebuildError};
use super::sweep::{Owned, PAGE, PAGE_PAUSE};
use super::Inner;
use crate::background::leases::Held;
use crate::disks::DiskHealth;
use crate::object::{add, chunk_id};
use crate::shards::ShardError;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use granary_meta::record::ExtentRecord;
use granary_meta::ChunkRef;
use granary_placement::id::{DiskId, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::chunk::{block_count, ChunkHealth, ChunkId, ChunkInfo, ChunkSpec, BLOCK_BYTES};
use granary_wire::client::NodeClient;
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::ChunkError;
use granary_wire::LogPace;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Mutex;
use std::time::Instant;

/// Records of extents per request, when the slots of narrow ones are looked up.
const RECORDS: u32 = 100;
/// Homes that read at once.
const HOMES_AT_ONCE: usize = 16;

/// A chunk that its shard owns, on a disk that does not serve its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stray {
    pub(super) id: ChunkId,
    pub(super) len_bytes: u64,
    /// Its slot.
    pub(super) slot: u8,
    /// The current disk of that.
    pub(super) home: DiskId,
    /// The shard that owns it.
    pub(super) shard: ShardId,
}

impl Stray {
    fn named(&self) -> ChunkRef {
        ChunkRef { group: self.id.group, extent: self.id.extent, index: self.id.index }
    }

    /// Is its home the same by this map, and does `disk` still not serve its slot?
    fn is_stray_by(&self, map: &ClusterMap, disk: DiskId) -> bool {
        let slot = map.group(self.id.group).and_then(|group| group.slots.get(usize::from(self.slot)));
        slot.is_some_and(|slot| slot.current == self.home && slot.disks().all(|serving| serving != disk))
    }
}

/// Strays of a page, by what their homes say of them.
#[derive(Debug, Default)]
pub(super) struct Strays {
    /// Their homes have them, or something by that name.
    pub(super) at_home: Vec<Stray>,
    /// Their homes lack them. That another disk of the group has such a chunk means nothing: no reader looks there.
    pub(super) absent: Vec<Stray>,
    /// Their homes do not answer.
    pub(super) unasked: Vec<Stray>,
}

/// Strays by what their homes found when they read what they have of them.
#[derive(Debug, Default)]
pub(super) struct Verified {
    /// Every block is good.
    pub(super) good: Vec<Stray>,
    /// They are gone or have a bad block.
    pub(super) bad: Vec<Stray>,
    /// Their homes did not answer.
    pub(super) unread: Vec<Stray>,
}

/// What came of bringing strays home.
#[derive(Debug, Default)]
pub(super) struct Brought {
    /// They are good there now.
    pub(super) home: Vec<Stray>,
    /// So many are not, though their homes take chunks: to be tried again.
    pub(super) waits: usize,
    /// The homes of so many take none now.
    pub(super) left: usize,
}

/// What came of a page of strays.
#[derive(Debug)]
struct Settled {
    /// Their homes have read them just now, and found them good.
    good: Vec<Stray>,
    /// They were copied there.
    brought: Vec<Stray>,
    /// So many are not good at home, though their homes take chunks or answer others.
    waits: usize,
    /// The homes of so many do not answer, or take no chunks now.
    left: usize,
    /// Homes that did not answer, or had a bad block.
    unsettled: BTreeSet<DiskId>,
}

/// Of each disk that was let in with chunks left to be copied: homes that have read all that they have of its strays,
/// and found it good.
pub(super) type SettledHomes = Mutex<BTreeMap<DiskId, BTreeSet<DiskId>>>;

/// What came of clearing a disk that is to be let back in.
#[derive(Debug, Default)]
pub(super) struct Cleared {
    /// Chunks deleted.
    pub(super) deleted: usize,
    /// So many are not known to be good at home yet, though their homes are up and take chunks.
    pub(super) waits: usize,
    /// So many are left, for their homes are not up or take no chunks.
    pub(super) left: usize,
}

impl Inner {
    /// The strays among chunks that a disk has listed.
    pub(super) async fn strays(
        &self,
        map: &ClusterMap,
        disk: DiskId,
        chunks: &[ChunkInfo],
        owned: &Owned,
    ) -> Result<Strays, ShardError> {
        let narrow = self.slots_of_narrow(map, chunks, owned).await?;
        let mut by_home: BTreeMap<DiskId, Vec<Stray>> = BTreeMap::new();
        for chunk in chunks {
            let id = chunk.id;
            let Some((shard, true)) = owned.get(&(id.group, id.extent)).copied() else { continue };
            let Some(group) = map.group(id.group) else { continue };
            let slot = match is_wide(chunk, map) {
                true => Some(id.index),
                false => narrow.get(&(id.group, id.extent)).and_then(|slots| slots.get(usize::from(id.index)).copied()),
            };
            let Some(slot) = slot else { continue };
            let Some(entry) = group.slots.get(usize::from(slot)) else { continue };
            if entry.disks().all(|serving| serving != disk) {
                let (len_bytes, home) = (chunk.spec.len_bytes, entry.current);
                by_home.entry(home).or_default().push(Stray { id, len_bytes, slot, home, shard });
            }
        }
        let mut strays = Strays::default();
        for (home, of_home) in by_home {
            let asked: Vec<(ChunkId, ChunkRef)> = of_home.iter().map(|stray| (stray.id, stray.named())).collect();
            let Some(absent) = self.absent(home, &asked).await else {
                strays.unasked.extend(of_home);
                continue;
            };
            let absent: HashSet<ChunkRef> = absent.into_iter().collect();
            let (absent, at_home) = of_home.into_iter().partition(|stray: &Stray| absent.contains(&stray.named()));
            strays.absent.extend::<Vec<Stray>>(absent);
            strays.at_home.extend::<Vec<Stray>>(at_home);
        }
        Ok(strays)
    }

    /// The slots of owned extents that are narrower than their group, as their shards have them. An extent as wide as
    /// its group has chunk i in slot i.
    async fn slots_of_narrow(
        &self,
        map: &ClusterMap,
        chunks: &[ChunkInfo],
        owned: &Owned,
    ) -> Result<HashMap<(PlacementGroupId, ExtentId), Vec<u8>>, ShardError> {
        let mut wanted: BTreeMap<(ShardId, PlacementGroupId), BTreeSet<ExtentId>> = BTreeMap::new();
        for chunk in chunks.iter().filter(|chunk| !is_wide(chunk, map)) {
            let id = chunk.id;
            if let Some((shard, true)) = owned.get(&(id.group, id.extent)) {
                wanted.entry((*shard, id.group)).or_default().insert(id.extent);
            }
        }
        let mut slots = HashMap::new();
        for ((shard, group), mut extents) in wanted {
            while let Some(first) = extents.pop_first() {
                let (found, _) = self.extents_of(shard, group, before(group, first), RECORDS).await?;
                if let Some(last) = found.last() {
                    extents = extents.split_off(&last.extent.extent);
                    extents.remove(&last.extent.extent);
                }
                slots.extend(found.into_iter().map(|record| ((group, record.extent.extent), record.extent.slots)));
            }
        }
        Ok(slots)
    }

    /// Has homes read what they have of strays.
    pub(super) async fn verified(&self, strays: Vec<Stray>) -> Verified {
        let mut by_home: BTreeMap<DiskId, Vec<(ChunkId, u64)>> = BTreeMap::new();
        for stray in &strays {
            by_home.entry(stray.home).or_default().push((stray.id, stray.len_bytes));
        }
        let answers: Vec<Vec<(ChunkId, ChunkHealth)>> = stream::iter(by_home)
            .map(|(home, chunks)| async move {
                self.pace.take(chunks.iter().map(|(_, len_bytes)| *len_bytes).sum()).await;
                verify_on(&self.store, home, chunks, self.settings().verify_deadline).await
            })
            .buffer_unordered(HOMES_AT_ONCE)
            .collect()
            .await;
        let healths: HashMap<ChunkId, ChunkHealth> = answers.into_iter().flatten().collect();
        let mut verified = Verified::default();
        for stray in strays {
            match healths.get(&stray.id) {
                Some(ChunkHealth::Good) => verified.good.push(stray),
                Some(_) => verified.bad.push(stray),
                None => verified.unread.push(stray),
            }
        }
        verified
    }

    /// Copies strays from a disk to their homes. While healing is paused they wait.
    pub(super) async fn bring_home(&self, from: DiskId, strays: Vec<Stray>, held: &Held) -> Brought {
        let (mut brought, complaints) = (Brought::default(), LogPace::default());
        let Some(client) = self.store.disks().client(from) else {
            brought.waits = strays.len();
            return brought;
        };
        let mut results = stream::iter(strays)
            .map(|stray| {
                let client = &client;
                async move {
                    if self.pace.is_paused() || held.is_lost() {
                        brought_later(stray)
                    } else {
                        (stray, Some(self.bring(from, client, &stray, held).await))
                    }
                }
            })
            .buffer_unordered(self.settings().extents_at_once.max(1));
        while let Some((stray, result)) = results.next().await {
            let error = match result {
                Some(Ok(true)) => {
                    add(&self.counters().strays_brought_home, 1);
                    brought.home.push(stray);
                    continue;
                }
                // Nobody's by now.
                Some(Ok(false)) => continue,
                Some(Err(error)) => error,
                None => {
                    brought.waits += 1;
                    continue;
                }
            };
            if let Some(left_out) = complaints.turn(Instant::now()) {
                tracing::warn!(
                    %from, home = %stray.home, extent = %stray.id.extent, chunk = stray.id.index, %error, left_out,
                    "a chunk could not be copied to the disk of its slot"
                );
            }
            match after_failure(&error, from, self.store.disks().repairable(stray.home)) {
                Failed::Nothing => {}
                Failed::Waits => brought.waits += 1,
                Failed::Left => brought.left += 1,
            }
        }
        brought
    }

    /// Copies a stray to its home. False: its extent is not what its shard has by that name.
    async fn bring(&self, from: DiskId, source: &NodeClient, stray: &Stray, held: &Held) -> Result<bool, RebuildError> {
        let Stray { id, slot, home, shard, .. } = *stray;
        let (records, _) = self.extents_of(shard, id.group, before(id.group, id.extent), 1).await?;
        let is_its = |record: &&ExtentRecord| {
            chunk_id(&record.extent, id.index) == id && record.extent.slots.get(usize::from(id.index)) == Some(&slot)
        };
        let Some(record) = records.iter().find(is_its) else { return Ok(false) };
        crate::object::check_extent(&record.extent).map_err(RebuildError::Record)?;
        let spec = spec_of(&record.extent, HashSlot::of(record.bucket.0, &record.key));
        let gone = || RebuildError::Record(format!("disk {home} is not in the map any more"));
        let client = self.store.disks().client(home).ok_or_else(gone)?;
        let to = Lost { index: id.index, disk: home, client, id, corrupt: true };
        let sink = within(to.client.begin_chunk_under(held.stamp(), id, spec)).await;
        let mut sink = sink.map_err(|error| self.disk_failed(&to, error, held))?;
        let blocks =
            u32::try_from(block_count(spec.len_bytes)).map_err(|error| RebuildError::Record(error.to_string()))?;
        let step = u32::try_from(self.settings().window_bytes / BLOCK_BYTES).unwrap_or(1).clamp(1, 64);
        let sampled = u32::from(id.extent.0[0]) % blocks.max(1);
        let mut sample: Option<Bytes> = None;
        for first in (0..blocks).step_by(usize::try_from(step).unwrap_or(1)) {
            let count = step.min(blocks - first);
            self.pace.take(2 * u64::from(count) * BLOCK_BYTES).await;
            // Checked against its checksums on the way in.
            let got = within(source.read_blocks(id, first, count)).await;
            let got = got.map_err(|error| self.source_failed(from, error))?;
            let whole = got.first_block == first && u32::try_from(got.data.len()) == Ok(count);
            if !whole || !is_same(&got.spec, &spec) {
                return Err(RebuildError::Disk { disk: from, error: ChunkError::Corrupt { block: first } });
            }
            for (block, bytes) in (first..).zip(got.data) {
                if block == sampled {
                    sample = Some(bytes.clone());
                }
                within(sink.write(bytes)).await.map_err(|error| self.disk_failed(&to, error, held))?;
            }
        }
        self.finish(&to, sink, (sampled, sample), held).await?;
        // An extent that was deleted meanwhile must not be left with chunks nobody knows of.
        if self.alive(shard, vec![(id.group, id.extent)]).await? == [false] {
            let _ = self.delete_on(home, vec![id], held).await;
            return Ok(false);
        }
        Ok(true)
    }

    fn source_failed(&self, from: DiskId, error: ChunkError) -> RebuildError {
        self.store.disks().failed(from, &error);
        RebuildError::Disk { disk: from, error }
    }

    /// Rids a disk that comes back after having been out of what other disks have in its place by now, after they have
    /// read it and found it good. What they lack, or have with a bad block, is copied to them first. None: it could not
    /// be looked through. What no shard knows any more stays for the sweep, and so does what is not at home in the end.
    pub(super) async fn clear_leftovers(&self, disk: DiskId, held: &Held) -> Result<Option<Cleared>, ShardError> {
        let Some(client) = self.store.disks().client(disk) else { return Ok(None) };
        // What was found good there the last time says nothing of what lies here now.
        super::lock(&self.settled).remove(&disk);
        let mut told = HashSet::new();
        let (mut after, mut cleared) = (None, Cleared::default());
        loop {
            let Some(map) = self.store.disks().map() else { return Ok(None) };
            // In service it may get slots, and with them what lies here.
            if map.disk(disk).is_none_or(|disk| disk.state != DiskState::Away) {
                return Ok(None);
            }
            let request = ControlRequest::ListChunks { after, limit: PAGE };
            let Ok(ControlResponse::Chunks { chunks, more }) =
                client.control(request, self.settings().control_deadline).await
            else {
                return Ok(None);
            };
            let owned = self.owned(&map, &chunks).await?;
            let mut strays = self.strays(&map, disk, &chunks, &owned).await?;
            // An earlier holder of the lease, who was paused, must not delete what homes are asked to read here.
            let homes: BTreeSet<DiskId> = strays.at_home.iter().map(|stray| stray.home).collect();
            for home in homes {
                if !told.contains(&home) && self.tell_of_lease(home, held).await {
                    told.insert(home);
                }
            }
            let (at_home, untold) = strays.at_home.into_iter().partition(|stray| told.contains(&stray.home));
            (strays.at_home, strays.unasked) = (at_home, [strays.unasked, untold].concat());
            let settled = self.settle(disk, strays, held).await;
            cleared.waits += settled.waits;
            cleared.left += settled.left;
            let mut good = settled.good;
            good.extend(settled.brought);
            // By a map that came meanwhile they may have another home, or belong here.
            let Some(newest) = self.store.disks().map() else { return Ok(None) };
            let leftover: Vec<ChunkId> =
                good.iter().filter(|stray| stray.is_stray_by(&newest, disk)).map(|stray| stray.id).collect();
            let count = leftover.len();
            if !self.delete_on(disk, leftover, held).await.is_empty() {
                return Ok(None);
            }
            cleared.deleted += count;
            add(&self.counters().leftovers_deleted, u64::try_from(count).unwrap_or(0));
            after = chunks.last().map(|chunk| chunk.id);
            if !more || after.is_none() {
                return Ok(Some(cleared));
            }
            tokio::time::sleep(PAGE_PAUSE).await;
        }
    }

    /// Has the homes of strays read what they have, and copies to them what they lack, or have with a bad block.
    async fn settle(&self, disk: DiskId, strays: Strays, held: &Held) -> Settled {
        let Verified { good, bad, unread } = self.verified(strays.at_home).await;
        let silent = [strays.unasked, unread].concat();
        let unsettled = bad.iter().chain(&silent).map(|stray| stray.home).collect();
        let lacking = [bad, strays.absent].concat();
        self.tell_missing(&lacking).await;
        let brought = self.bring_home(disk, lacking, held).await;
        let is_up = |stray: &&Stray| self.store.disks().health(stray.home) == DiskHealth::Up;
        let waits = silent.iter().filter(is_up).count();
        let left = brought.left + silent.len() - waits;
        Settled { good, brought: brought.home, waits: brought.waits + waits, left, unsettled }
    }

    /// Goes on with a disk that was let back in when the homes of some of its strays took no chunks. True when there is
    /// none left. A home that has read all that it has of the strays, and found it good, does not read it again.
    pub(super) async fn bring_rest(&self, disk: DiskId, held: &Held) -> Result<bool, ShardError> {
        let Some(client) = self.store.disks().client(disk) else { return Ok(false) };
        let before = super::lock(&self.settled).get(&disk).cloned().unwrap_or_default();
        let (mut homes, mut unsettled) = (BTreeSet::new(), BTreeSet::new());
        let (mut after, mut rest) = (None, 0);
        loop {
            let Some(map) = self.store.disks().map() else { return Ok(false) };
            let request = ControlRequest::ListChunks { after, limit: PAGE };
            let Ok(ControlResponse::Chunks { chunks, more }) =
                client.control(request, self.settings().control_deadline).await
            else {
                return Ok(false);
            };
            let owned = self.owned(&map, &chunks).await?;
            let mut strays = self.strays(&map, disk, &chunks, &owned).await?;
            strays.at_home.retain(|stray| !before.contains(&stray.home));
            homes.extend(strays.at_home.iter().map(|stray| stray.home));
            let settled = self.settle(disk, strays, held).await;
            unsettled.extend(settled.unsettled);
            rest += settled.waits + settled.left;
            after = chunks.last().map(|chunk| chunk.id);
            if !more || after.is_none() {
                break;
            }
            tokio::time::sleep(PAGE_PAUSE).await;
        }
        let mut settled = super::lock(&self.settled);
        if rest == 0 {
            settled.remove(&disk);
        } else {
            settled.entry(disk).or_default().extend(homes.difference(&unsettled));
        }
        Ok(rest == 0)
    }

    /// Tells the shards of strays that are not good at home.
    pub(super) async fn tell_missing(&self, strays: &[Stray]) {
        let mut told: HashMap<ShardId, Vec<ChunkRef>> = HashMap::new();
        strays.iter().for_each(|stray| told.entry(stray.shard).or_default().push(stray.named()));
        for (shard, chunks) in told {
            for part in chunks.chunks(super::look::BATCH) {
                if let Err(error) = self.report(shard, part.to_vec()).await {
                    tracing::debug!(%error, "chunks that the disk of their slot lacks could not be reported as missing");
                }
            }
        }
    }
}

/// What becomes of a stray that could not be brought home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failed {
    /// There is nothing to be copied.
    Nothing,
    /// It is to be tried again before its disk is let in.
    Waits,
    /// Its disk is let in without that.
    Left,
}

/// A stray on `from` met an error. `home_takes`: its home takes chunks.
fn after_failure(error: &RebuildError, from: DiskId, home_takes: bool) -> Failed {
    match error {
        RebuildError::Disk { disk, error: ChunkError::NotFound | ChunkError::Corrupt { .. } } if *disk == from => {
            Failed::Nothing
        }
        // No other attempt finds another record: for this a disk would wait for ever.
        RebuildError::Record(_) | RebuildError::Disk { error: ChunkError::DiskFull, .. } => Failed::Left,
        _ if home_takes => Failed::Waits,
        _ => Failed::Left,
    }
}

/// Is the extent of a chunk as wide as its group?
fn is_wide(chunk: &ChunkInfo, map: &ClusterMap) -> bool {
    let width = map.group(chunk.id.group).map(|group| group.slots.len());
    width == Some(usize::from(chunk.spec.k) + usize::from(chunk.spec.m))
}

/// Where a listing of extents begins with this one.
fn before(group: PlacementGroupId, extent: ExtentId) -> Option<(PlacementGroupId, ExtentId)> {
    u128::from_be_bytes(extent.0).checked_sub(1).map(|id| (group, ExtentId(id.to_be_bytes())))
}

/// Are these headers of the same chunk of the same extent?
fn is_same(one: &ChunkSpec, other: &ChunkSpec) -> bool {
    *one == ChunkSpec { owner: one.owner, created_ms: one.created_ms, ..*other }
}

/// It is not tried now.
fn brought_later(stray: Stray) -> (Stray, Option<Result<bool, RebuildError>>) {
    (stray, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_another_attempt_may_bring_home_keeps_a_returned_disk_out() {
        let (from, home) = (DiskId(3), DiskId(7));
        let disk = |disk, error| RebuildError::Disk { disk, error };
        // (what was met, when the home takes chunks, when it does not)
        for (error, takes, takes_none) in [
            (disk(from, ChunkError::NotFound), Failed::Nothing, Failed::Nothing),
            (disk(from, ChunkError::Corrupt { block: 1 }), Failed::Nothing, Failed::Nothing),
            (disk(from, ChunkError::Overloaded), Failed::Waits, Failed::Left),
            (disk(home, ChunkError::Overloaded), Failed::Waits, Failed::Left),
            (disk(home, ChunkError::DiskFull), Failed::Left, Failed::Left),
            (RebuildError::Refuted { index: 1, block: 2 }, Failed::Waits, Failed::Left),
            (RebuildError::Record("2 slots for 4+2".to_owned()), Failed::Left, Failed::Left),
        ] {
            let found = [true, false].map(|home_takes| after_failure(&error, from, home_takes));
            assert_eq!(found, [takes, takes_none], "{error}");
        }
    }
}
