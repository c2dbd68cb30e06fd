//! Which keys cannot be read now? The operator's first question after more than M losses.
//!
//! Every object shard lists its extents page by page, and the disks are asked which of the chunks they have: by their
//! index, but what waits in the shard's repair queue and is there all the same is read, for it was reported as damaged.
//! A key is lost when an extent of its newest version has fewer than K good chunks; it comes back when disks that are
//! silent now return. A shard that does not answer is named, and nothing is said of its keys.
//!
//! A call looks for some seconds and says where to go on, so that neither it nor a gateway holds more than a page. The
//! keys come in the order of their extents. A key with several lost extents is told where the first of them is met,
//! which needs no memory of what was told before; it presumes that the disks stay as they are, and each page says how
//! they were, so that whoever asks can tell.

use super::census::verify_on;
use super::look::BATCH;
use crate::disks::DiskHealth;
use crate::object::{chunk_id, slot_of, ObjectStore};
use crate::shards::buckets::odd_answer;
use crate::shards::{ShardError, Shards};
use futures::stream::{self, StreamExt};
use granary_meta::record::{BucketId, BucketRecord, ExtentRecord, ExtentRef};
use granary_meta::{Answer, ChunkRef, Query, VersionPick};
use granary_placement::id::{DiskId, Epoch, ExtentId, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::chunk::{ChunkHealth, ChunkId};
use granary_wire::control::{ControlRequest, ControlResponse};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Extents per page of a shard, and of one object looked at together.
const PAGE: u32 = 256;
const EXTENTS_OF_OBJECT: usize = 64;
/// Entries of a repair queue per request; more than an extent has chunks.
const MARKS: u32 = 1000;
/// A call ends after this many lost keys, or this long, whichever comes first.
const KEYS: usize = 500;
const LOOK: Duration = Duration::from_secs(5);
/// Disks asked, and objects looked at, at once.
const DISKS_AT_ONCE: usize = 32;
const OBJECTS_AT_ONCE: usize = 16;

/// Where the next call goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostCursor {
    /// In this shard.
    pub shard: ShardId,
    /// After this extent; None: at the shard's beginning.
    #[serde(default)]
    pub after: Option<(PlacementGroupId, ExtentId)>,
}

/// What one call found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LostPage {
    /// Keys that cannot be read now.
    pub keys: Vec<LostKey>,
    /// Where to go on; None: everything was looked at.
    pub next: Option<LostCursor>,
    /// Shards that did not answer: nothing is known of their keys. The root shard: names of buckets are not known.
    pub unknown_shards: Vec<ShardId>,
    /// Disks that are not down and did not answer all the same: keys may be listed for their silence.
    pub unasked_disks: Vec<DiskId>,
    /// How the disks were when the call began.
    pub seen: Seen,
    /// They were otherwise at its end.
    pub changed: bool,
    /// Extents looked at.
    pub extents: u64,
}

/// What the answers depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Seen {
    /// Of the cluster map.
    pub epoch: Epoch,
    /// Disks that do not answer, those that went out of service because they were dead among them.
    pub down: Vec<DiskId>,
}

/// A key that cannot be read now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LostKey {
    /// Its bucket's name; None: not known, see [`LostPage::unknown_shards`].
    pub bucket: Option<String>,
    /// Its bucket's number.
    pub bucket_id: u64,
    /// The key.
    pub key: String,
    /// Payload, in bytes.
    pub size_bytes: u64,
    /// Extents that it lies in.
    pub extents: u64,
    /// Of these, such that have too few good chunks.
    pub extents_lost: u64,
    /// Disks of which each alone would bring it back if it returned with what it had.
    pub back_with: Vec<DiskId>,
    /// All silent disks together would.
    pub back_with_all: bool,
}

/// What is asked, and how.
pub(super) struct Sources<'a> {
    pub(super) store: &'a ObjectStore,
    pub(super) meta: &'a Shards,
    /// For questions without disk reads, and for reading chunks.
    pub(super) deadlines: (Duration, Duration),
    /// Read every chunk.
    pub(super) read: bool,
}

/// One chunk of an extent, as the disks of its slot tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Chunk {
    good: bool,
    /// Disks that may have it and do not answer.
    silent: [Option<DiskId>; 2],
}

/// What would bring back an extent, or an object, that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Loss {
    /// Each of these disks alone.
    back_with: BTreeSet<DiskId>,
    /// All silent disks together.
    back_with_all: bool,
}

/// Is an extent lost that needs `k` chunks?
fn loss(k: u8, chunks: &[Chunk]) -> Option<Loss> {
    let k = usize::from(k);
    let enough = |with: &dyn Fn(&Chunk) -> bool| chunks.iter().filter(|chunk| chunk.good || with(chunk)).count() >= k;
    if enough(&|_| false) {
        return None;
    }
    let silent: BTreeSet<DiskId> = chunks.iter().flat_map(|chunk| chunk.silent).flatten().collect();
    let back_with = silent.into_iter().filter(|disk| enough(&|chunk| chunk.silent.contains(&Some(*disk))));
    Some(Loss {
        back_with: back_with.collect(),
        back_with_all: enough(&|chunk| chunk.silent.iter().any(Option::is_some)),
    })
}

/// Looks for lost keys of a bucket, or of all, from there on. See the head of this file.
pub(super) async fn page(sources: &Sources<'_>, bucket: Option<BucketRecord>, from: Option<LostCursor>) -> LostPage {
    let mut page = LostPage { seen: sources.seen(), ..LostPage::default() };
    let shards = sources.meta.object_shards();
    let Some(map) = sources.store.disks().map() else {
        return LostPage { unknown_shards: shards, ..page };
    };
    let look = Look { sources, map: &map, unasked: Mutex::default() };
    let (begun, only) = (Instant::now(), bucket.as_ref().map(|bucket| bucket.id));
    let mut after = from.and_then(|from| from.after);
    for shard in shards.into_iter().filter(|shard| from.is_none_or(|from| *shard >= from.shard)) {
        // The extent belongs to the shard that was broken off.
        let mut after = after.take().filter(|_| from.is_some_and(|from| from.shard == shard));
        loop {
            if page.keys.len() >= KEYS || begun.elapsed() >= LOOK {
                page.next = Some(LostCursor { shard, after });
                break;
            }
            match look.extents(shard, after, only, &mut page).await {
                Ok(Some(last)) => after = Some(last),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%shard, %error, "lost keys could not be looked for in a shard");
                    page.unknown_shards.push(shard);
                    break;
                }
            }
        }
        if page.next.is_some() {
            break;
        }
    }
    page.unasked_disks = super::lock(&look.unasked).iter().copied().collect();
    if let Err(error) = name_buckets(sources.meta, bucket, &mut page.keys).await {
        tracing::warn!(%error, "buckets of lost keys could not be named");
        page.unknown_shards.push(ShardId::ROOT);
    }
    page.changed = page.seen != sources.seen();
    page
}

/// Fills in the names of buckets.
async fn name_buckets(meta: &Shards, only: Option<BucketRecord>, keys: &mut [LostKey]) -> Result<(), ShardError> {
    let mut names: HashMap<u64, Option<String>> = keys.iter().map(|key| (key.bucket_id, None)).collect();
    let mut after = String::new();
    if let Some(bucket) = only {
        names.insert(bucket.id.0, Some(bucket.name));
    }
    while names.values().any(Option::is_none) {
        let listed = meta.list_buckets(None, "", &after, 1000).await?;
        for bucket in &listed.buckets {
            if let Some(name) = names.get_mut(&bucket.id.0) {
                *name = Some(bucket.name.clone());
            }
        }
        match listed.buckets.last() {
            Some(last) if listed.more => after.clone_from(&last.name),
            // Those that are left are being deleted.
            _ => break,
        }
    }
    for key in keys {
        key.bucket = names.get(&key.bucket_id).cloned().flatten();
    }
    Ok(())
}

impl Sources<'_> {
    fn seen(&self) -> Seen {
        let disks = self.store.disks();
        let down = disks.view().into_iter().filter(|view| view.health == DiskHealth::Down).map(|view| view.id);
        let mut down: Vec<DiskId> = down.collect();
        down.sort_unstable();
        Seen { epoch: disks.map().map_or(Epoch(0), |map| map.epoch), down }
    }
}

/// Chunks with their lengths in bytes, by the disk that is asked for them.
type ByDisk = BTreeMap<DiskId, Vec<(ChunkId, u64)>>;

struct Look<'a> {
    sources: &'a Sources<'a>,
    map: &'a ClusterMap,
    /// Disks that are not down and did not answer.
    unasked: Mutex<BTreeSet<DiskId>>,
}

impl Look<'_> {
    /// Looks at one page of a shard's extents. Answers the last one when there are more.
    async fn extents(
        &self,
        shard: ShardId,
        after: Option<(PlacementGroupId, ExtentId)>,
        only: Option<BucketId>,
        page: &mut LostPage,
    ) -> Result<Option<(PlacementGroupId, ExtentId)>, ShardError> {
        let query = Query::ExtentsOfGroup { group: None, after, limit: PAGE };
        let (records, more) = match self.sources.meta.query(shard, query).await? {
            Answer::Extents { extents, more } => (extents, more),
            other => return Err(odd_answer(shard, &other)),
        };
        let last = records.last().filter(|_| more).map(|record| place(&record.extent));
        let records: Vec<ExtentRecord> =
            records.into_iter().filter(|record| only.is_none_or(|only| only == record.bucket)).collect();
        let extents: Vec<ExtentRef> = records.iter().map(|record| record.extent.clone()).collect();
        let losses = self.judge(shard, &extents).await?;
        page.extents += records.len() as u64;
        // In the order of their places, by key.
        let mut lost: BTreeMap<(BucketId, String), Vec<(ExtentRef, Loss)>> = BTreeMap::new();
        for (record, loss) in records.into_iter().zip(losses) {
            if let Some(loss) = loss {
                lost.entry((record.bucket, record.key)).or_default().push((record.extent, loss));
            }
        }
        let mut found = stream::iter(lost).map(|(key, lost)| self.object(shard, key, lost)).buffered(OBJECTS_AT_ONCE);
        let mut keys = Vec::new();
        while let Some(key) = found.next().await {
            keys.extend(key?);
        }
        page.keys.extend(keys);
        Ok(last)
    }

    /// The key of lost extents, in the order of their places. None: none of them is of the newest version of an object
    /// but of an upload, say, or the key is told where an earlier extent of it is met.
    async fn object(
        &self,
        shard: ShardId,
        (bucket, key): (BucketId, String),
        lost: Vec<(ExtentRef, Loss)>,
    ) -> Result<Option<LostKey>, ShardError> {
        let query = Query::GetObject { bucket, key: key.clone(), version: VersionPick::Current };
        let object = match self.sources.meta.query(shard, query).await? {
            Answer::Object(object) => object,
            Answer::NoSuchKey | Answer::BucketFenced => return Ok(None),
            other => return Err(odd_answer(shard, &other)),
        };
        let mut extents = object.data.extents().to_vec();
        extents.sort_by_key(place);
        let is_its = |found: &ExtentRef| extents.iter().any(|extent| place(extent) == place(found));
        let Some((first, loss)) = lost.into_iter().find(|(extent, _)| is_its(extent)) else { return Ok(None) };
        let (mut whole, mut extents_lost, mut is_still) = (loss, 0, false);
        for part in extents.chunks(EXTENTS_OF_OBJECT) {
            let losses = match part {
                [one] if extents.len() == 1 && place(one) == place(&first) => vec![Some(whole.clone())],
                part => self.judge(shard, part).await?,
            };
            for (extent, loss) in part.iter().zip(losses) {
                let Some(loss) = loss else { continue };
                if place(extent) < place(&first) {
                    return Ok(None);
                }
                extents_lost += 1;
                is_still |= place(extent) == place(&first);
                whole.back_with.retain(|disk| loss.back_with.contains(disk));
                whole.back_with_all &= loss.back_with_all;
            }
        }
        Ok(is_still.then(|| LostKey {
            bucket: None,
            bucket_id: bucket.0,
            key,
            size_bytes: object.size_bytes,
            extents: extents.len() as u64,
            extents_lost,
            back_with: whole.back_with.into_iter().collect(),
            back_with_all: whole.back_with_all,
        }))
    }

    /// Which of these extents, in the order of their places, are lost.
    async fn judge(&self, shard: ShardId, extents: &[ExtentRef]) -> Result<Vec<Option<Loss>>, ShardError> {
        let serves = |disk: &DiskId| self.map.disk(*disk).is_some_and(|disk| disk.state != DiskState::Out);
        let (mut current, mut previous) = (ByDisk::new(), ByDisk::new());
        for (extent, index, slot) in self.chunks(extents) {
            let chunk = (chunk_id(extent, index), extent.layout().chunk_len());
            current.entry(slot.current).or_default().push(chunk);
            if let Some(previous_disk) = slot.previous.filter(serves) {
                previous.entry(previous_disk).or_default().push(chunk);
            }
        }
        let mut on_current = self.ask(current, self.sources.read).await;
        if !self.sources.read {
            let marked = self.marked(shard, extents).await?;
            let mut doubtful = ByDisk::new();
            for (extent, index, slot) in self.chunks(extents) {
                let (id, chunk) = (chunk_id(extent, index), chunk_of(extent, index));
                if marked.contains(&chunk) && on_current.get(&id) == Some(&true) {
                    on_current.remove(&id);
                    doubtful.entry(slot.current).or_default().push((id, extent.layout().chunk_len()));
                }
            }
            on_current.extend(self.ask(doubtful, true).await);
        }
        previous.values_mut().for_each(|chunks| chunks.retain(|(id, _)| on_current.get(id) != Some(&true)));
        previous.retain(|_, chunks| !chunks.is_empty());
        let on_previous = self.ask(previous, self.sources.read).await;
        let judged = extents.iter().map(|extent| {
            let chunks: Vec<Chunk> = (self.chunks(std::slice::from_ref(extent)))
                .map(|(extent, index, slot)| {
                    let id = chunk_id(extent, index);
                    let (here, there) = (on_current.get(&id), on_previous.get(&id));
                    Chunk {
                        good: here == Some(&true) || there == Some(&true),
                        silent: [
                            Some(slot.current).filter(|_| here.is_none()),
                            slot.previous.filter(serves).filter(|_| there.is_none()),
                        ],
                    }
                })
                .collect();
            loss(extent.k, &chunks)
        });
        Ok(judged.collect())
    }

    /// The chunks of extents that have a slot, with it.
    fn chunks<'e>(
        &'e self,
        extents: &'e [ExtentRef],
    ) -> impl Iterator<Item = (&'e ExtentRef, u8, granary_placement::map::GroupSlot)> + 'e {
        let indices = |extent: &ExtentRef| 0..extent.k.saturating_add(extent.m);
        let all = extents.iter().flat_map(move |extent| indices(extent).map(move |index| (extent, index)));
        all.filter_map(|(extent, index)| Some((extent, index, slot_of(self.map, extent, index)?)))
    }

    /// Chunks of these extents, in the order of their places, that wait in the shard's repair queue one by one.
    async fn marked(&self, shard: ShardId, extents: &[ExtentRef]) -> Result<HashSet<ChunkRef>, ShardError> {
        let wanted: HashSet<_> = extents.iter().map(place).collect();
        let (mut marked, mut rest) = (HashSet::new(), extents);
        while let Some(first) = rest.first() {
            let query = Query::ListMissing { after: before(first), limit: MARKS };
            let (chunks, more) = match self.sources.meta.query(shard, query).await? {
                Answer::Missing { chunks, more } => (chunks, more),
                other => return Err(odd_answer(shard, &other)),
            };
            let chunks = chunks.into_iter().map(|(chunk, _, _)| chunk);
            let mut last = None;
            for chunk in chunks {
                last = Some((chunk.group, chunk.extent));
                if wanted.contains(&(chunk.group, chunk.extent)) {
                    marked.insert(chunk);
                }
            }
            let Some(last) = last.filter(|_| more) else { break };
            let known = rest.partition_point(|extent| place(extent) < last).max(1);
            rest = rest.get(known..).unwrap_or_default();
        }
        Ok(marked)
    }

    /// Which chunks the disks have, or with `read` have whole. What a disk does not answer for is left out.
    async fn ask(&self, by_disk: ByDisk, read: bool) -> HashMap<ChunkId, bool> {
        let answers: Vec<Vec<(ChunkId, bool)>> = stream::iter(by_disk)
            .map(|(disk, chunks)| async move {
                let asked = chunks.len();
                let answers = match read {
                    true => self.read_on(disk, chunks).await,
                    false => self.known_on(disk, chunks).await,
                };
                if answers.len() < asked && self.sources.store.disks().health(disk) != DiskHealth::Down {
                    super::lock(&self.unasked).insert(disk);
                }
                answers
            })
            .buffer_unordered(DISKS_AT_ONCE)
            .collect()
            .await;
        answers.into_iter().flatten().collect()
    }

    async fn read_on(&self, disk: DiskId, chunks: Vec<(ChunkId, u64)>) -> Vec<(ChunkId, bool)> {
        let found = verify_on(self.sources.store, disk, chunks, self.sources.deadlines.1).await;
        found.into_iter().map(|(id, health)| (id, health == ChunkHealth::Good)).collect()
    }

    async fn known_on(&self, disk: DiskId, chunks: Vec<(ChunkId, u64)>) -> Vec<(ChunkId, bool)> {
        let disks = self.sources.store.disks();
        let mut answers = Vec::with_capacity(chunks.len());
        let Some(client) = disks.client(disk) else { return answers };
        for part in chunks.chunks(BATCH) {
            if disks.health(disk) == DiskHealth::Down {
                break;
            }
            let ids: Vec<ChunkId> = part.iter().map(|(id, _)| *id).collect();
            match client.control(ControlRequest::HaveChunks(ids.clone()), self.sources.deadlines.0).await {
                Ok(ControlResponse::Have(have)) if have.len() == ids.len() => answers.extend(ids.into_iter().zip(have)),
                Ok(answer) => tracing::warn!(%disk, ?answer, "a disk could not tell which chunks it has"),
                Err(error) => tracing::debug!(%disk, %error, "a disk did not tell which chunks it has"),
            }
        }
        answers
    }
}

/// What extents are ordered by in a shard.
fn place(extent: &ExtentRef) -> (PlacementGroupId, ExtentId) {
    (extent.group, extent.extent)
}

fn chunk_of(extent: &ExtentRef, index: u8) -> ChunkRef {
    ChunkRef { group: extent.group, extent: extent.extent, index }
}

/// After what a repair queue is listed to begin with the chunks of this extent.
fn before(extent: &ExtentRef) -> Option<ChunkRef> {
    let chunk = |group, id: u128| ChunkRef { group, extent: ExtentId(id.to_be_bytes()), index: u8::MAX };
    match u128::from_be_bytes(extent.extent.0).checked_sub(1) {
        Some(id) => Some(chunk(extent.group, id)),
        None => extent.group.0.checked_sub(1).map(|group| chunk(PlacementGroupId(group), u128::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Chunk = Chunk { good: true, silent: [None, None] };
    const GONE: Chunk = Chunk { good: false, silent: [None, None] };

    fn on(disks: [u32; 2]) -> Chunk {
        Chunk { good: false, silent: disks.map(|disk| (disk > 0).then_some(DiskId(disk))) }
    }

    #[test]
    fn an_extent_is_lost_with_fewer_than_k_good_chunks_and_it_is_known_what_brings_it_back() {
        let (a, b, both) = (on([1, 0]), on([2, 0]), on([1, 2]));
        // (K, chunks; None: not lost; else the disks of which one is enough, and whether all of them are)
        for (k, chunks, expected) in [
            (2, &[GOOD, GOOD, GONE][..], None),
            (2, &[GOOD, GOOD, a], None),
            (2, &[GOOD, a, b], Some((&[1, 2][..], true))),
            (2, &[GOOD, a, GONE], Some((&[1], true))),
            (2, &[GOOD, GONE, GONE], Some((&[], false))),
            (2, &[a, b, GONE], Some((&[], true))),
            (2, &[a, a, GONE], Some((&[1], true))),
            // On its way from one silent disk to another: either may have it.
            (2, &[GOOD, both, GONE], Some((&[1, 2], true))),
            (2, &[both, a, GONE], Some((&[1], true))),
            (3, &[GOOD, a, GONE, GONE], Some((&[], false))),
            // No chunk has a slot.
            (1, &[], Some((&[], false))),
        ] {
            let expected = expected.map(|(disks, back_with_all)| Loss {
                back_with: disks.iter().copied().map(DiskId).collect(),
                back_with_all,
            });
            assert_eq!(loss(k, chunks), expected, "{k} of {chunks:?}");
        }
    }
}
