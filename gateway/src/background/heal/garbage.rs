//! The garbage queues' worker: deletes the chunks of extents that lost their last reference.
//!
//! An extent is deleted only when it waited out the grace and its shard, asked by a linearizable read, does not own it.
//! It leaves the queue only when every disk that may hold a chunk of it has answered; a disk that is down keeps it
//! queued.

use super::Inner;
use crate::background::command_under;
use crate::background::leases::Held;
use crate::background::reads::Readers;
use crate::object::{add, chunk_id, slot_of};
use crate::shards::buckets::odd_answer;
use crate::shards::{now_ms, ShardError};
use futures::stream::{self, StreamExt};
use granary_meta::record::ExtentRef;
use granary_meta::{Answer, Command, Query};
use granary_placement::id::{DiskId, ExtentId, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::chunk::ChunkId;
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

/// Extents per page.
const PAGE: u32 = 500;
/// Chunks per request.
const CHUNKS_PER_REQUEST: usize = 1000;
/// Looks at the queues within the time that garbage has to wait.
const LOOKS_PER_GRACE: u32 = 20;
/// Disks deleting at once.
const DISKS_AT_ONCE: usize = 16;

impl Inner {
    pub(super) async fn garbage_loop(&self, held: &Held) {
        let mut not_before: HashMap<ShardId, Instant> = HashMap::new();
        let mut cursors: HashMap<ShardId, Option<(u64, ExtentId)>> = HashMap::new();
        let mut readers = Readers::default();
        loop {
            // One moment for all shards, before it is asked what is read: a read that is not known of then is younger.
            let grace_ms = u64::try_from(self.settings().garbage_grace.as_millis()).unwrap_or(u64::MAX);
            let after_grace_ms = now_ms().saturating_sub(grace_ms);
            let until_ms = match self.oldest_read_ms(&mut readers).await {
                Ok(oldest_ms) => after_grace_ms.min(oldest_ms),
                Err(error) => {
                    tracing::debug!(%error, "it is not known what is being read, and no garbage is collected");
                    tokio::time::sleep(self.settings().garbage_backoff).await;
                    continue;
                }
            };
            for shard in self.meta.object_shards() {
                if not_before.get(&shard).is_some_and(|at| Instant::now() < *at) {
                    continue;
                }
                match self.collect(shard, until_ms, cursors.entry(shard).or_default(), held).await {
                    Ok(true) => {
                        not_before.remove(&shard);
                    }
                    Ok(false) => {
                        not_before.insert(shard, Instant::now() + self.settings().garbage_backoff);
                    }
                    Err(error) => {
                        tracing::debug!(%error, "garbage could not be collected");
                        not_before.insert(shard, Instant::now() + self.settings().garbage_backoff);
                    }
                }
            }
            // What waited out the grace may wait a little more, and every look asks each shard.
            let settings = self.settings();
            tokio::time::sleep(settings.interval.max(settings.garbage_grace / LOOKS_PER_GRACE)).await;
        }
    }

    /// Garbage that was queued after this time may be read by a gateway somewhere. Reads longer than
    /// `heal.longest_read` are not waited for: one client that reads a byte now and then must not stop deletions
    /// everywhere.
    async fn oldest_read_ms(&self, readers: &mut Readers) -> Result<u64, ShardError> {
        match self.meta.query(ShardId::ROOT, Query::ListLeases).await? {
            Answer::Leases(leases) => {
                let settings = self.settings();
                let oldest_ms = readers.oldest_ms(&leases, tokio::time::Instant::now(), settings.lease.ttl);
                let longest_ms = u64::try_from(settings.longest_read.as_millis()).unwrap_or(u64::MAX);
                Ok(oldest_ms.max(now_ms().saturating_sub(longest_ms)))
            }
            other => Err(odd_answer(ShardId::ROOT, &other)),
        }
    }

    /// Goes through a shard's queue of what was queued until then, from `after` on, for so many pages at most. What has
    /// to stay is passed over: one disk that is away must not hold up the space of all others. `after` is then where to
    /// go on, None at the end of the queue. False when something had to stay.
    async fn collect(
        &self,
        shard: ShardId,
        until_ms: u64,
        after: &mut Option<(u64, ExtentId)>,
        held: &Held,
    ) -> Result<bool, ShardError> {
        let mut all_went = after.is_none();
        for _ in 0..self.settings().pages_per_pass.max(1) {
            let query = Query::ListGarbage { until_ms, after: *after, limit: PAGE };
            let (queued, more) = match self.meta.query(shard, query).await? {
                Answer::Garbage { extents, more } => (extents, more),
                other => return Err(odd_answer(shard, &other)),
            };
            *after = queued.last().map(|(queued_ms, extent)| (*queued_ms, extent.extent)).filter(|_| more);
            // The shard was asked not to list younger ones; it is cheap to see to it.
            let queued: Vec<(u64, ExtentRef)> =
                queued.into_iter().filter(|(queued_ms, _)| *queued_ms <= until_ms).collect();
            let Some(map) = self.store.disks().map().filter(|_| !queued.is_empty()) else {
                return Ok(all_went && queued.is_empty());
            };
            let asked = queued.iter().map(|(_, extent)| (extent.group, extent.extent)).collect();
            let alive = self.alive(shard, asked).await?;
            let mut dead = Vec::with_capacity(queued.len());
            for ((queued_ms, extent), alive) in queued.into_iter().zip(alive) {
                if alive {
                    all_went = false;
                    add(&self.counters().garbage_extents_alive, 1);
                    tracing::error!(%shard, extent = %extent.extent, "an extent that is alive is queued as garbage; it stays");
                } else {
                    dead.push((queued_ms, extent));
                }
            }
            let failed = self.delete(&map, &dead, held).await;
            all_went &= failed.is_empty();
            let done: Vec<(u64, ExtentId)> = dead
                .iter()
                .map(|(queued_ms, extent)| (*queued_ms, extent.extent))
                .filter(|(_, extent)| !failed.contains(extent))
                .collect();
            let count = done.len();
            if count > 0 {
                let done = Command::GarbageDone { extents: done, lease: held.stamp().clone() };
                command_under(&self.meta, held, shard, done).await?;
                add(&self.counters().garbage_extents_deleted, u64::try_from(count).unwrap_or(0));
            }
            if after.is_none() {
                return Ok(all_went);
            }
        }
        // There is more, and it is gone on with at the next look.
        Ok(true)
    }

    /// Deletes all chunks of these extents; answers the extents of which some disk did not confirm it.
    async fn delete(&self, map: &ClusterMap, extents: &[(u64, ExtentRef)], held: &Held) -> BTreeSet<ExtentId> {
        let mut failed = BTreeSet::new();
        let mut by_disk: BTreeMap<DiskId, Vec<ChunkId>> = BTreeMap::new();
        for (_, extent) in extents {
            for index in (0..u8::MAX).take(extent.slots.len()) {
                let Some(slot) = slot_of(map, extent, index) else {
                    failed.insert(extent.extent);
                    continue;
                };
                // While a slot moves, its chunks may lie on either disk. One that left for good took its chunks with
                // it.
                let serves = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.state != DiskState::Out);
                for disk in slot.disks().filter(serves) {
                    by_disk.entry(disk).or_default().push(chunk_id(extent, index));
                }
            }
        }
        let unconfirmed: Vec<Vec<ChunkId>> = stream::iter(by_disk)
            .map(|(disk, chunks)| self.delete_on(disk, chunks, held))
            .buffer_unordered(DISKS_AT_ONCE)
            .collect()
            .await;
        failed.extend(unconfirmed.into_iter().flatten().map(|chunk| chunk.extent));
        failed
    }

    /// Deletes chunks on one disk; answers those it did not confirm.
    pub(super) async fn delete_on(&self, disk: DiskId, mut chunks: Vec<ChunkId>, held: &Held) -> Vec<ChunkId> {
        let Some(client) = self.store.disks().client(disk) else { return chunks };
        while !chunks.is_empty() {
            let part: Vec<ChunkId> = chunks.iter().take(CHUNKS_PER_REQUEST).copied().collect();
            let count = part.len();
            let request = ControlRequest::DeleteChunks { chunks: part, lease: Some(held.stamp().clone()) };
            match client.control(request, self.settings().control_deadline).await {
                Ok(ControlResponse::Error(ControlError::StaleLease { current })) => {
                    held.refused(current);
                    return chunks;
                }
                Ok(ControlResponse::Deleted(_)) => {
                    chunks.drain(..count);
                }
                Ok(answer) => {
                    tracing::debug!(%disk, ?answer, "garbage could not be deleted");
                    return chunks;
                }
                Err(error) => {
                    tracing::debug!(%disk, %error, "garbage could not be deleted");
                    return chunks;
                }
            }
        }
        chunks
    }
}
