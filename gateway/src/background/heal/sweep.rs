//! The sweep: what lies on disks and belongs to nobody.
//!
//! Writes whose outcome stayed unknown, gateways that died in the middle of one, and uploads given up while a disk was
//! away leave chunks that no shard knows. Now and then every disk is listed, and the shard that a chunk's owner slot
//! names is asked for each by a linearizable read. A chunk is an orphan when
//!
//! - its shard does not know its extent, not even as garbage, or
//! - its disk does not serve the slot that it belongs into, and the disk of that slot has it (see
//!   [`home`](super::home)).
//!
//! An orphan older than the longest upload goes into quarantine, which is a mark on its disk and nothing else. What is
//! still an orphan when its time in quarantine is over is deleted; what turns out to be owned is taken out of it. To
//! list a disk takes long, and slots may move meanwhile: right before a page of chunks is deleted, it is asked again
//! whether they are orphans, by the newest map. A chunk that its shard owns, and that the disk of its slot has with a
//! bad block, is brought there then, and stays for the next sweep.
//!
//! So many orphans that they are rather a fault of the metadata than leftovers wait for an operator. But what is known
//! not to be needed does not: a chunk that its shard owns and that was found at home, and one of an extent of which no
//! other disk of the group has a chunk ([`remnants`](super::remnants)). A disk that was out of service has many of
//! both. These go into quarantine and out of it like all orphans, but count for no limit.
//!
//! **Invariant:** of a disk with more other orphans than the limit these are left alone until an operator raises the
//! limit.

use super::home::{Stray, Verified};
use super::Inner;
use crate::background::leases::Held;
use crate::disks::DiskHealth;
use crate::object::add;
use crate::shards::ShardError;
use granary_placement::id::{DiskId, ExtentId, PlacementGroupId, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::chunk::{ChunkId, ChunkInfo};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

/// Chunks per page of a listing, and per request.
pub(super) const PAGE: u32 = 1000;
/// So many orphans on a disk are no reason to wait for an operator, however few chunks it has.
const ALWAYS_ALLOWED: u64 = 16;
/// Most chunks that nobody needs which one sweep of a disk marks, and deletes: bounds its memory.
const SURE_AT_ONCE: usize = 250_000;
/// Pause between two pages: a sweep is in no hurry, clients are.
pub(super) const PAGE_PAUSE: Duration = Duration::from_millis(5);
/// The first sweep of a new holder of the lease waits so long: gateways that start have other things to do.
const FIRST: Duration = Duration::from_secs(60);

/// What a disk holds that nobody owns.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// Chunks on the disk.
    pub(super) chunks: u64,
    /// Orphans of any age.
    pub(super) orphans: u64,
    /// Of these, in quarantine.
    pub(super) quarantined: u64,
    /// Orphans that are old enough to be judged, and of which it is not known that nobody needs them.
    old: u64,
    /// What is to be done with these; nothing when there are more than the limit.
    doubtful: Acts,
    /// What is to be done with old orphans that nobody needs; no more of each kind than [`SURE_AT_ONCE`].
    sure: Acts,
}

/// What a sweep does to orphans of a disk.
#[derive(Debug, Default)]
struct Acts {
    /// Those without the mark.
    to_mark: Vec<ChunkId>,
    /// Those whose time in quarantine is over.
    to_delete: Vec<ChunkInfo>,
}

impl Acts {
    fn take(&mut self, chunk: &ChunkInfo, quarantine: Duration, at_most: usize) {
        match chunk.quarantined_ms {
            None if self.to_mark.len() < at_most => self.to_mark.push(chunk.id),
            Some(ms) if Duration::from_millis(ms) >= quarantine && self.to_delete.len() < at_most => {
                self.to_delete.push(*chunk);
            }
            _ => {}
        }
    }
}

/// So many old orphans may be on a disk with so many chunks.
fn allowed(chunks: u64, limit_percent: u64) -> u64 {
    ALWAYS_ALLOWED.max(chunks.saturating_mul(limit_percent) / 100)
}

impl Swept {
    fn is_beyond(&self, limit_percent: u64) -> bool {
        self.old > allowed(self.chunks, limit_percent)
    }

    /// Takes in an orphan. `needless`: it is known that nobody needs it. `at_most`: of others so many are remembered by
    /// name.
    fn orphan(&mut self, chunk: &ChunkInfo, needless: bool, age: Duration, quarantine: Duration, at_most: u64) {
        self.orphans += 1;
        self.quarantined += u64::from(chunk.quarantined_ms.is_some());
        if Duration::from_millis(chunk.age_ms) < age {
            return;
        }
        if needless {
            return self.sure.take(chunk, quarantine, SURE_AT_ONCE);
        }
        self.old += 1;
        if self.old > at_most {
            self.doubtful = Acts::default();
        } else {
            self.doubtful.take(chunk, quarantine, usize::MAX);
        }
    }
}

impl Inner {
    pub(super) async fn sweep_loop(&self, held: &Held) {
        let mut settings = self.settings.clone();
        let mut wait = self.settings().sweep_interval.min(FIRST);
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // A shorter interval counts at once.
                () = super::change(&mut settings) => {
                    wait = wait.min(self.settings().sweep_interval);
                    continue;
                }
            }
            self.sweep(held).await;
            wait = self.settings().sweep_interval;
        }
    }

    /// Looks at all disks that answer, and acts on what is found.
    async fn sweep(&self, held: &Held) {
        let (mut orphans, mut quarantined, mut beyond) = (0, 0, Vec::new());
        for disk in self.store.disks().view().into_iter().filter(|disk| disk.health == DiskHealth::Up) {
            let swept = match self.look_for_orphans(disk.id, Some(held)).await {
                Ok(Some(swept)) => swept,
                Ok(None) if held.is_lost() => return,
                Ok(None) => continue,
                Err(error) => {
                    tracing::debug!(disk = %disk.id, %error, "a sweep was broken off");
                    continue;
                }
            };
            orphans += swept.orphans;
            quarantined += swept.quarantined;
            let limit = self.settings().orphan_limit_percent;
            if swept.is_beyond(limit) {
                tracing::error!(
                    disk = %disk.id, orphans = swept.old, chunks = swept.chunks, limit_percent = limit,
                    "too many chunks belong to nobody: they stay until `granary config set heal.orphan_limit` allows more"
                );
                beyond.push(disk.id);
            }
            self.act(disk.id, &swept, held).await;
            if held.is_lost() {
                return;
            }
        }
        let mut status = super::lock(&self.status);
        status.orphans = orphans;
        status.orphans_quarantined = quarantined;
        status.disks_beyond_orphan_limit = beyond;
        status.sweeps_done += 1;
    }

    /// Lists a disk and asks the shards for what lies there. None: the disk does not answer. Under a lease, what is
    /// owned is looked after page by page: what was in quarantine is taken out, and the shards are told of what the
    /// disks of their slots lack, and it is brought there.
    pub(super) async fn look_for_orphans(
        &self,
        disk: DiskId,
        held: Option<&Held>,
    ) -> Result<Option<Swept>, ShardError> {
        let settings = self.settings();
        let mut swept = Swept::default();
        let Some(client) = self.store.disks().client(disk) else { return Ok(None) };
        let at_most = match client.control(ControlRequest::Status, settings.control_deadline).await {
            Ok(ControlResponse::Status(status)) => allowed(status.chunks, settings.orphan_limit_percent),
            _ => return Ok(None),
        };
        let mut after = None;
        loop {
            let Some(map) = self.store.disks().map() else { return Ok(None) };
            let request = ControlRequest::ListChunks { after, limit: PAGE };
            let (chunks, more) = match client.control(request, settings.control_deadline).await {
                Ok(ControlResponse::Chunks { chunks, more }) => (chunks, more),
                Ok(answer) => {
                    tracing::debug!(%disk, ?answer, "a disk could not be swept");
                    return Ok(None);
                }
                Err(error) => {
                    tracing::debug!(%disk, %error, "a disk could not be swept");
                    return Ok(None);
                }
            };
            after = chunks.last().map(|chunk| chunk.id);
            swept.chunks += u64::try_from(chunks.len()).unwrap_or(0);
            let owned = self.owned(&map, &chunks).await?;
            let strays = self.strays(&map, disk, &chunks, &owned).await?;
            let at_home: HashSet<ChunkId> = strays.at_home.iter().map(|stray| stray.id).collect();
            let mut to_release = Vec::new();
            let is_unknown = |chunk: &&ChunkInfo| {
                let owned = owned.get(&(chunk.id.group, chunk.id.extent)).map(|(_, owned)| *owned);
                owned == Some(false) && Duration::from_millis(chunk.age_ms) >= settings.orphan_age
            };
            let unknown: Vec<ChunkInfo> = chunks.iter().filter(is_unknown).copied().collect();
            let remnants = self.remnants(&map, disk, &unknown).await;
            for chunk in &chunks {
                match owned.get(&(chunk.id.group, chunk.id.extent)) {
                    // Its shard cannot be named by this map: nobody was asked.
                    None => {}
                    Some((_, true)) if !at_home.contains(&chunk.id) => {
                        to_release.extend(chunk.quarantined_ms.map(|_| chunk.id));
                    }
                    Some((_, is_owned)) => {
                        // One that is owned is a stray here: its home has it.
                        let needless = *is_owned || remnants.contains(&(chunk.id.group, chunk.id.extent));
                        swept.orphan(chunk, needless, settings.orphan_age, settings.quarantine, at_most);
                    }
                }
            }
            if let Some(held) = held {
                self.mark(disk, &to_release, false, held).await;
                self.tell_missing(&strays.absent).await;
                self.bring_home(disk, strays.absent, held).await;
                if held.is_lost() {
                    return Ok(None);
                }
            }
            if !more || after.is_none() {
                return Ok(Some(swept));
            }
            tokio::time::sleep(PAGE_PAUSE).await;
        }
    }

    /// Which extents of a page their shards own, with the shards.
    pub(super) async fn owned(&self, map: &ClusterMap, chunks: &[ChunkInfo]) -> Result<Owned, ShardError> {
        let mut by_shard: BTreeMap<ShardId, HashSet<(PlacementGroupId, ExtentId)>> = BTreeMap::new();
        for chunk in chunks {
            if let Some(shard) = map.shard_of_slot(chunk.spec.owner) {
                by_shard.entry(shard).or_default().insert((chunk.id.group, chunk.id.extent));
            }
        }
        let mut owned = Owned::new();
        for (shard, extents) in by_shard {
            let extents: Vec<(PlacementGroupId, ExtentId)> = extents.into_iter().collect();
            // What was deleted a moment ago is garbage collection's.
            let alive = self.known(shard, extents.clone(), true).await?;
            owned.extend(extents.into_iter().zip(alive.into_iter().map(|alive| (shard, alive))));
        }
        Ok(owned)
    }

    async fn act(&self, disk: DiskId, swept: &Swept, held: &Held) {
        let acts = [&swept.sure, &swept.doubtful];
        for acts in acts {
            self.mark(disk, &acts.to_mark, true, held).await;
        }
        let mut deleted = 0;
        for page in acts.iter().flat_map(|acts| acts.to_delete.chunks(usize::try_from(PAGE).unwrap_or(1))) {
            let (orphans, bad_at_home) = match self.still_orphans(disk, page).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::debug!(%disk, %error, "it could not be asked again for orphans, and they stay");
                    break;
                }
            };
            let count = orphans.len();
            let left = self.delete_on(disk, orphans, held).await.len();
            deleted += count.saturating_sub(left);
            self.tell_missing(&bad_at_home).await;
            self.bring_home(disk, bad_at_home, held).await;
            if left > 0 {
                break;
            }
        }
        if deleted > 0 {
            add(&self.counters().orphans_deleted, u64::try_from(deleted).unwrap_or(0));
            tracing::info!(%disk, chunks = deleted, "deleted chunks that belonged to nobody all their time in quarantine");
        }
    }

    /// Which of these chunks on a disk are orphans by the newest map. Of those that their shards own, only what the
    /// disk of their slot has read just now and found good. And what that does not have, or with a bad block.
    async fn still_orphans(
        &self,
        disk: DiskId,
        chunks: &[ChunkInfo],
    ) -> Result<(Vec<ChunkId>, Vec<Stray>), ShardError> {
        let Some(map) = self.store.disks().map() else { return Ok(Default::default()) };
        let owned = self.owned(&map, chunks).await?;
        let strays = self.strays(&map, disk, chunks, &owned).await?;
        let Verified { good, bad, .. } = self.verified(strays.at_home).await;
        let good: HashSet<ChunkId> = good.iter().map(|stray| stray.id).collect();
        let is_orphan = |id: &ChunkId| match owned.get(&(id.group, id.extent)) {
            Some((_, is_owned)) => !is_owned || good.contains(id),
            None => false,
        };
        // A map that came while the answers did is another matter: the next sweep asks by that one.
        if self.store.disks().map().is_none_or(|newest| newest.epoch != map.epoch) {
            return Ok(Default::default());
        }
        Ok((chunks.iter().map(|chunk| chunk.id).filter(is_orphan).collect(), bad))
    }

    /// Puts chunks into quarantine, or takes them out.
    async fn mark(&self, disk: DiskId, chunks: &[ChunkId], into: bool, held: &Held) {
        let Some(client) = self.store.disks().client(disk) else { return };
        if into && !chunks.is_empty() {
            tracing::warn!(%disk, chunks = chunks.len(), "chunks that belong to nobody go into quarantine");
        }
        for part in chunks.chunks(usize::try_from(PAGE).unwrap_or(1)) {
            let request = ControlRequest::Quarantine { chunks: part.to_vec(), into, lease: held.stamp().clone() };
            match client.control(request, self.settings().control_deadline).await {
                Ok(ControlResponse::Done) => {}
                Ok(ControlResponse::Error(ControlError::StaleLease { current })) => return held.refused(current),
                Ok(answer) => return tracing::debug!(%disk, ?answer, "quarantine could not be set"),
                Err(error) => return tracing::debug!(%disk, %error, "quarantine could not be set"),
            }
        }
    }
}

/// Extents with the shards that were asked for them, and whether these own them.
pub(super) type Owned = HashMap<(PlacementGroupId, ExtentId), (ShardId, bool)>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_with_too_many_orphans_is_left_alone() {
        assert_eq!((allowed(0, 1), allowed(1600, 1), allowed(1700, 1), allowed(50, 100)), (16, 16, 17, 50));
        let chunk = |number: u128, age_s: u64, quarantined_s: Option<u64>| ChunkInfo {
            id: ChunkId { group: PlacementGroupId(1), extent: ExtentId(number.to_be_bytes()), index: 0, generation: 1 },
            spec: granary_wire::chunk::ChunkSpec {
                codec: granary_placement::scheme::CodecId::Np16,
                k: 4,
                m: 2,
                unit_bytes: 65536,
                extent_len_bytes: 4,
                len_bytes: 1,
                owner: granary_placement::id::HashSlot(1),
                created_ms: 1,
            },
            age_ms: age_s * 1000,
            quarantined_ms: quarantined_s.map(|s| s * 1000),
        };
        let (age, quarantine) = (Duration::from_secs(100), Duration::from_secs(1000));
        let mut swept = Swept { chunks: 60, ..Swept::default() };
        swept.orphan(&chunk(1, 99, None), false, age, quarantine, 3);
        swept.orphan(&chunk(2, 100, None), false, age, quarantine, 3);
        swept.orphan(&chunk(3, 100, Some(999)), false, age, quarantine, 3);
        swept.orphan(&chunk(4, 100, Some(1000)), false, age, quarantine, 3);
        assert_eq!((swept.orphans, swept.old, swept.quarantined), (4, 3, 2));
        assert_eq!((swept.doubtful.to_mark.len(), swept.doubtful.to_delete.len()), (1, 1));
        for more in 5..20 {
            swept.orphan(&chunk(more, 100, None), false, age, quarantine, 3);
        }
        let nothing = |acts: &Acts| acts.to_mark.is_empty() && acts.to_delete.is_empty();
        assert!(nothing(&swept.doubtful), "beyond the limit nothing is touched");
        // What nobody needs is dealt with all the same, when it is old enough, and counts for no limit.
        swept.orphan(&chunk(20, 99, None), true, age, quarantine, 3);
        swept.orphan(&chunk(21, 100, None), true, age, quarantine, 3);
        swept.orphan(&chunk(22, 100, Some(1000)), true, age, quarantine, 3);
        assert_eq!((swept.sure.to_mark.len(), swept.sure.to_delete.len()), (1, 1));
        assert!(nothing(&swept.doubtful));
        assert_eq!((swept.orphans, swept.old), (22, 18));
        assert!(swept.is_beyond(1) && !swept.is_beyond(50));
    }
}
