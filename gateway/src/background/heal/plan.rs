//! What to rebuild first. Pure.
//!
//! Extents that can bear the fewest further failures come first, then those that wait longest. Those that seem to be
//! lost come last: most of them wait for a disk, and however many there are, they must not keep others from being
//! saved. A look over a long queue keeps only the most urgent ones, so its memory does not grow with the queue.

use crate::backoff::Backoff;
use granary_meta::record::{ExtentRecord, ExtentRef, MissingRecord};
use granary_meta::ChunkRef;
use granary_placement::id::{DiskId, ExtentId, HashSlot, PlacementGroupId, ShardId};
use granary_placement::map::ClusterMap;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// Failed rebuilds remembered.
const REMEMBERED: usize = 16 * 1024;

/// An extent to be brought back to K+M chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The shard that owns it.
    pub shard: ShardId,
    /// The hash slot of its key, for the headers of its chunks.
    pub owner: HashSlot,
    /// Where and how it is coded.
    pub extent: ExtentRef,
    /// The key it belongs to, for the log.
    pub key: String,
    /// Queued chunk indices whose disk can take them now.
    pub rebuild: Vec<u8>,
    /// Generations of queued chunks, by index.
    pub generations: BTreeMap<u8, u64>,
    /// How many more chunks may fail before it is lost; negative when it seems to be lost now.
    pub failures_left: i32,
    /// When its first chunk was queued, Unix milliseconds.
    pub queued_ms: u64,
}

/// Where a chunk's disk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// It takes chunks.
    Up,
    /// It answers, but takes no chunks just now (full, overloaded), or is doubtful.
    Busy,
    /// It does not answer: its chunk counts as lost for the risk.
    Down,
}

/// Where the disk of an extent's chunk stands.
type TargetFn<'a> = Box<dyn Fn(&ExtentRef, u8) -> Target + Send + Sync + 'a>;

/// Collects the entries of repair queues and keeps the most urgent extents.
pub struct Planner<'a> {
    limit: usize,
    target: TargetFn<'a>,
    ready: Box<dyn Fn(ExtentId) -> bool + Send + Sync + 'a>,
    /// The extent whose entries are coming in: a queue is in order of extents.
    current: Option<Queued>,
    best: BTreeMap<(bool, i32, u64, ExtentId), Task>,
    /// Entries seen.
    pub queued_chunks: u64,
    /// Extents seen, by failures left.
    pub by_failures_left: BTreeMap<i32, u64>,
    /// Extents seen that nothing can be done for now.
    pub waiting: u64,
    /// Extents that could be worked on, kept or not.
    pub runnable: u64,
}

struct Queued {
    shard: ShardId,
    record: ExtentRecord,
    generations: BTreeMap<u8, u64>,
    queued_ms: u64,
}

impl<'a> Planner<'a> {
    /// Keeps at most `limit` extents. `target` tells where a chunk's disk stands, `ready` whether an extent may be
    /// tried (again).
    pub fn new(
        limit: usize,
        target: impl Fn(&ExtentRef, u8) -> Target + Send + Sync + 'a,
        ready: impl Fn(ExtentId) -> bool + Send + Sync + 'a,
    ) -> Planner<'a> {
        Planner {
            limit,
            target: Box::new(target),
            ready: Box::new(ready),
            current: None,
            best: BTreeMap::new(),
            queued_chunks: 0,
            by_failures_left: BTreeMap::new(),
            waiting: 0,
            runnable: 0,
        }
    }

    /// Takes the next entry of a shard's queue.
    pub fn offer(&mut self, shard: ShardId, chunk: ChunkRef, queued: MissingRecord, record: ExtentRecord) {
        let MissingRecord { queued_ms, generation } = queued;
        self.queued_chunks += 1;
        match &mut self.current {
            Some(current) if current.shard == shard && current.record.extent.extent == chunk.extent => {
                current.generations.insert(chunk.index, generation);
                current.queued_ms = current.queued_ms.min(queued_ms);
            }
            _ => {
                self.end_extent();
                self.current =
                    Some(Queued { shard, record, generations: BTreeMap::from([(chunk.index, generation)]), queued_ms });
            }
        }
    }

    fn end_extent(&mut self) {
        let Some(Queued { shard, record, generations, queued_ms }) = self.current.take() else { return };
        let extent = record.extent;
        let width = extent.k.saturating_add(extent.m);
        let lost = (0..width)
            .filter(|index| generations.contains_key(index) || (self.target)(&extent, *index) == Target::Down)
            .count();
        let failures_left = i32::from(extent.m) - i32::try_from(lost).unwrap_or(i32::MAX);
        *self.by_failures_left.entry(failures_left).or_default() += 1;
        let rebuild: Vec<u8> = generations
            .keys()
            .copied()
            .filter(|index| *index < width && (self.target)(&extent, *index) == Target::Up)
            .collect();
        if rebuild.is_empty() || !(self.ready)(extent.extent) {
            self.waiting += 1;
            return;
        }
        self.runnable += 1;
        let key = (failures_left < 0, failures_left, queued_ms, extent.extent);
        let owner = HashSlot::of(record.bucket.0, &record.key);
        let key_of = record.key;
        let task = Task { shard, owner, extent, key: key_of, rebuild, generations, failures_left, queued_ms };
        self.best.insert(key, task);
        if self.best.len() > self.limit {
            self.best.pop_last();
        }
    }

    /// The most urgent extents, most urgent first.
    pub fn finish(&mut self) -> Vec<Task> {
        self.end_extent();
        std::mem::take(&mut self.best).into_values().collect()
    }
}

/// When failed rebuilds may be tried again.
#[derive(Debug, Default)]
pub struct Retries {
    failed: HashMap<ExtentId, (u32, Instant)>,
}

impl Retries {
    /// Whether an extent may be tried now.
    pub fn is_ready(&self, extent: ExtentId, now: Instant) -> bool {
        self.failed.get(&extent).is_none_or(|(_, not_before)| now >= *not_before)
    }

    /// A rebuild failed: the next pause is twice the last. Beyond a bound new failures are not remembered, and tried at
    /// each pass.
    pub fn failed(&mut self, extent: ExtentId, now: Instant, backoff: &Backoff) {
        if self.failed.len() >= REMEMBERED && !self.failed.contains_key(&extent) {
            self.failed.retain(|_, (_, not_before)| *not_before > now);
            if self.failed.len() >= REMEMBERED {
                return;
            }
        }
        let (times, not_before) = self.failed.entry(extent).or_insert((0, now));
        *times = times.saturating_add(1);
        *not_before = now + backoff.base(*times);
    }

    /// It worked.
    pub fn done(&mut self, extent: ExtentId) {
        self.failed.remove(&extent);
    }
}

/// So many slots of a group have no disk that answers and holds their chunks: in how much danger its extents are. Of a
/// slot that moves the current disk has not all of them, so that its previous one counts.
pub(super) fn absent_slots(map: &ClusterMap, group: PlacementGroupId, answers: impl Fn(DiskId) -> bool) -> usize {
    let slots = map.group(group).map(|group| group.slots.as_slice()).unwrap_or_default();
    slots.iter().filter(|slot| !answers(slot.previous.unwrap_or(slot.current))).count()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ops::away::{take_out, Takers};
    use crate::ops::form::tests::cluster;
    use granary_meta::record::BucketId;
    use granary_placement::scheme::CodecId;
    use std::time::Duration;

    fn record(number: u8) -> ExtentRecord {
        let extent = ExtentRef {
            extent: ExtentId([number; 16]),
            group: PlacementGroupId(1),
            codec: CodecId::Np16,
            k: 4,
            m: 2,
            unit_bytes: 65536,
            len_bytes: 1,
            generation: 1,
            slots: (0..6).collect(),
        };
        ExtentRecord { extent, bucket: BucketId(1), key: String::new() }
    }

    fn offer(planner: &mut Planner<'_>, number: u8, index: u8, queued_ms: u64) {
        let record = record(number);
        let chunk = ChunkRef { group: PlacementGroupId(1), extent: record.extent.extent, index };
        planner.offer(ShardId(1), chunk, MissingRecord { queued_ms, generation: 1 }, record);
    }

    fn order(tasks: &[Task]) -> Vec<(u8, i32)> {
        tasks.iter().map(|task| (task.extent.extent.0[0], task.failures_left)).collect()
    }

    #[test]
    fn extents_with_the_fewest_failures_left_come_first_then_the_oldest() {
        let mut planner = Planner::new(10, |_, _| Target::Up, |_| true);
        for (number, indices, queued_ms) in [(1, &[0][..], 30), (2, &[1, 5], 40), (3, &[2], 10), (4, &[0, 1, 2], 50)] {
            indices.iter().for_each(|index| offer(&mut planner, number, *index, queued_ms));
        }
        assert_eq!(order(&planner.finish()), [(2, 0), (3, 1), (1, 1), (4, -1)]);
        assert_eq!(planner.by_failures_left, BTreeMap::from([(-1, 1), (0, 1), (1, 2)]));
        assert_eq!(planner.queued_chunks, 7);
    }

    #[test]
    fn only_the_most_urgent_are_kept() {
        let mut planner = Planner::new(2, |_, _| Target::Up, |_| true);
        for number in 1..=9 {
            offer(&mut planner, number, 0, 100);
        }
        offer(&mut planner, 10, 0, 100);
        offer(&mut planner, 10, 1, 100);
        let tasks = planner.finish();
        assert_eq!(order(&tasks), [(10, 0), (1, 1)]);
        assert_eq!(planner.runnable, 10);
    }

    #[test]
    fn chunks_on_dead_disks_count_for_the_risk_and_are_not_rebuilt_there() {
        let target = |_: &ExtentRef, index: u8| if index == 3 { Target::Down } else { Target::Up };
        let mut planner = Planner::new(10, target, |_| true);
        offer(&mut planner, 1, 0, 1);
        offer(&mut planner, 1, 3, 1);
        offer(&mut planner, 2, 3, 1);
        offer(&mut planner, 3, 5, 1);
        let tasks = planner.finish();
        assert_eq!(order(&tasks), [(1, 0), (3, 0)]);
        assert_eq!(tasks[0].rebuild, [0]);
        assert_eq!(planner.waiting, 1, "extent 2 waits for its disk");
    }

    #[test]
    fn a_failed_extent_waits_longer_each_time_and_is_forgotten_when_done() {
        let (mut backoff, start, extent) = (Retries::default(), Instant::now(), ExtentId([1; 16]));
        let pauses = Backoff { first: Duration::from_secs(5), longest: Duration::from_secs(12) };
        for wait_s in [5, 10, 12, 12] {
            backoff.failed(extent, start, &pauses);
            assert!(!backoff.is_ready(extent, start + Duration::from_secs(wait_s) - Duration::from_millis(1)));
            assert!(backoff.is_ready(extent, start + Duration::from_secs(wait_s)));
        }
        backoff.done(extent);
        assert!(backoff.is_ready(extent, start));
    }

    #[test]
    fn groups_with_more_slots_that_no_disk_holds_come_first() {
        let mut map = cluster(9);
        let dead = [DiskId(2), DiskId(3)];
        let lost: BTreeMap<PlacementGroupId, usize> = (map.groups.iter())
            .map(|(id, group)| (*id, group.slots.iter().filter(|slot| dead.contains(&slot.current)).count()))
            .collect();
        assert!((0..=2).all(|count| lost.values().any(|lost| *lost == count)));
        let answers = |disk| !dead.contains(&disk);
        // Before they go out, and while what they held is on its way to others.
        for step in 0..=2 {
            for (group, lost) in &lost {
                assert_eq!(absent_slots(&map, *group, answers), *lost, "{step} of them are out");
            }
            if let Some(disk) = dead.get(step) {
                map = take_out(&map, *disk, &Takers { ceiling_percent: 90, ..Takers::default() }).unwrap();
            }
        }
        // From a disk that answers again can be read.
        let least = lost.keys().map(|group| absent_slots(&map, *group, |_| true)).max();
        assert_eq!(least, Some(0));
    }
}
