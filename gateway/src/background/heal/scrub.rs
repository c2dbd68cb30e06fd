//! What the disks find wrong by themselves: every disk node reads all of its chunks now and then, and lists those that
//! are damaged. They are asked for these lists, and what is on them goes into the repair queues of its shards.
//!
//! A report says nothing but that a look is due: before a chunk is rebuilt its disk reads it once more, which takes
//! off the list what turns out to be good. One that was rebuilt has left the list by itself. What stays on it all the
//! same, since no shard owns it, it does not lie where its slot is, or too little of its extent is left, is told again
//! now and then only.
//!
//! **Invariant:** nothing is deleted because it is on such a list.

use super::{lock, Inner};
use crate::background::leases::Held;
use crate::disks::DiskHealth;
use crate::object::add;
use granary_meta::ChunkRef;
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::chunk::{ChunkId, ChunkInfo};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::{AuthError, LinkError};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// The disks are asked once in so many times `heal.interval`, but at least once a minute.
const INTERVALS: u32 = 30;
const LONGEST: Duration = Duration::from_secs(60);
/// What stays on a list is told again after so many looks.
const TELL_AGAIN: u32 = 60;
/// Chunks per page of a list. A list is short; see the disk node's bound.
const PAGE: u32 = 500;
/// No list is longer.
const MOST: u64 = 20_000;

/// The chunks on the lists of the disks that the shards were told of, and when.
type Told = HashMap<(DiskId, ChunkId), Instant>;

impl Inner {
    /// Asks all disks that answer, again and again.
    pub(super) async fn scrub_loop(&self, held: &Held) {
        let mut told = Told::new();
        loop {
            let pause = (self.settings().interval * INTERVALS).min(LONGEST);
            tokio::time::sleep(pause).await;
            let (mut listed, mut still, mut silent) = (0, Told::new(), BTreeSet::new());
            for disk in self.store.disks().view() {
                if held.is_lost() {
                    return;
                }
                let known: Vec<((DiskId, ChunkId), Instant)> =
                    told.iter().filter(|((of, _), _)| *of == disk.id).map(|(key, at)| (*key, *at)).collect();
                if disk.health != DiskHealth::Up {
                    still.extend(known);
                    continue;
                }
                match self.take_findings(disk.id, &told, pause * TELL_AGAIN, &mut silent).await {
                    Ok((count, those)) => {
                        listed += count;
                        still.extend(those);
                    }
                    Err(error) => {
                        tracing::debug!(disk = %disk.id, %error, "what the disk found damaged could not be queued");
                        still.extend(known);
                    }
                }
            }
            told = still;
            lock(&self.status).scrub_findings = listed;
        }
    }

    /// Reads the list of one disk, and tells the shards of what they were not told lately. How many chunks are on it,
    /// and when each of them was told. A shard that does not answer becomes `silent`, holds up no other, and is told at
    /// the next look.
    async fn take_findings(
        &self,
        disk: DiskId,
        told: &Told,
        again: Duration,
        silent: &mut BTreeSet<ShardId>,
    ) -> Result<(u64, Told), FindingsError> {
        let Some(client) = self.store.disks().client(disk) else { return Ok((0, Told::new())) };
        let Some(map) = self.store.disks().map() else { return Ok((0, Told::new())) };
        let (mut after, mut listed, mut those) = (None, 0, Told::new());
        loop {
            let request = ControlRequest::ListDamaged { after, limit: PAGE };
            let (chunks, more) = match client.control(request, self.settings().control_deadline).await {
                Ok(ControlResponse::Chunks { chunks, more }) => (chunks, more),
                Ok(answer) => return Err(FindingsError::Answer(format!("{answer:?}").chars().take(100).collect())),
                // A node of a release before: it has no list.
                Err(LinkError::Auth(AuthError::Version { .. })) => return Ok((0, Told::new())),
                Err(error) => return Err(error.into()),
            };
            listed += u64::try_from(chunks.len()).unwrap_or(0);
            let goes_on = chunks.first().is_none_or(|first| Some(first.id) > after);
            if listed > MOST || !goes_on {
                return Err(FindingsError::Answer("a list without end".to_owned()));
            }
            after = chunks.last().map(|chunk| chunk.id);
            let now = Instant::now();
            let was_told = |id: &ChunkId| told.get(&(disk, *id)).filter(|at| now.duration_since(**at) < again);
            let (known, news): (Vec<ChunkInfo>, Vec<ChunkInfo>) =
                chunks.into_iter().partition(|chunk| was_told(&chunk.id).is_some());
            those.extend(known.iter().filter_map(|chunk| Some(((disk, chunk.id), *was_told(&chunk.id)?))));
            if !news.is_empty() {
                tracing::warn!(%disk, chunks = news.len(), "a disk found chunks damaged: they are queued for repair");
            }
            for (shard, chunks) in by_shard(&map, &news) {
                let count = u64::try_from(chunks.len()).unwrap_or(0);
                if silent.contains(&shard) {
                    continue;
                }
                if let Err(error) = self.report(shard, chunks).await {
                    tracing::warn!(%shard, %error, count, "chunks that a disk found damaged could not be queued yet");
                    silent.insert(shard);
                    continue;
                }
                add(&self.counters().chunks_found_damaged, count);
                self.poke.notify_one();
            }
            let is_told =
                |chunk: &&ChunkInfo| map.shard_of_slot(chunk.spec.owner).is_none_or(|shard| !silent.contains(&shard));
            those.extend(news.iter().filter(is_told).map(|chunk| ((disk, chunk.id), now)));
            if !more || after.is_none() {
                return Ok((listed, those));
            }
        }
    }
}

/// Why a list was not dealt with. The next look begins anew.
#[derive(Debug, thiserror::Error)]
enum FindingsError {
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("an odd answer: {0}")]
    Answer(String),
}

/// By the shard that owns the extent, if the map knows one.
fn by_shard(map: &ClusterMap, chunks: &[ChunkInfo]) -> BTreeMap<ShardId, Vec<ChunkRef>> {
    let mut by_shard: BTreeMap<ShardId, Vec<ChunkRef>> = BTreeMap::new();
    for chunk in chunks {
        if let Some(shard) = map.shard_of_slot(chunk.spec.owner) {
            let ChunkId { group, extent, index, .. } = chunk.id;
            by_shard.entry(shard).or_default().push(ChunkRef { group, extent, index });
        }
    }
    by_shard
}
