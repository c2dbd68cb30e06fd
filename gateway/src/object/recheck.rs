//! What a payload is worth by the map that is in force when it is committed. Pure.
//!
//! A body may take minutes, and slots may move meanwhile. A chunk counts when it lies on the disk that its slot has
//! now; any other is missing. One on the slot's previous disk is read there, and the repair may even find it, but that
//! disk is given up when the move ends: no extent is committed that would be lost by then.

use super::slot_of;
use granary_meta::record::ExtentRef;
use granary_meta::ChunkRef;
use granary_placement::codec::ChunkSet;
use granary_placement::durable::is_durable;
use granary_placement::id::{DiskId, ExtentId};
use granary_placement::map::ClusterMap;
use granary_wire::chunk::ChunkId;
use std::collections::{HashMap, HashSet};

/// Adds to `missing` the chunks that are not on the current disk of their slot. `written` is where chunks were written;
/// those of other extents are ignored.
///
/// # Errors
/// An extent that does not bear the loss of one more failure domain: it must not be acknowledged.
pub(super) fn recheck(
    map: &ClusterMap,
    extents: &[ExtentRef],
    written: &[(DiskId, ChunkId)],
    missing: &mut Vec<ChunkRef>,
) -> Result<(), ExtentId> {
    let on: HashMap<(ExtentId, u8), DiskId> =
        written.iter().map(|(disk, chunk)| ((chunk.extent, chunk.index), *disk)).collect();
    let known: HashSet<ChunkRef> = missing.iter().copied().collect();
    for extent in extents {
        let mut in_place = ChunkSet::EMPTY;
        for index in (0..u8::MAX).take(extent.slots.len()) {
            let chunk = ChunkRef { group: extent.group, extent: extent.extent, index };
            if known.contains(&chunk) {
                continue;
            }
            let disk = on.get(&(extent.extent, index)).copied();
            if disk.is_some() && slot_of(map, extent, index).map(|slot| slot.current) == disk {
                in_place = in_place.with(index);
            } else {
                missing.push(chunk);
            }
        }
        if !is_durable(map, extent.group, extent.k, &extent.slots, in_place) {
            return Err(extent.extent);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::object::chunk_id;
    use granary_meta::memory::MemoryShard;
    use granary_meta::record::{AccountId, BucketId, ObjectData, ObjectMeta, ObjectRecord, VersionSeq};
    use granary_meta::{Answer, Command, Conditions, MetaRequest, Query, Reply};
    use granary_placement::id::{ClusterId, DiskUuid, ShardId};
    use granary_placement::lease::LeaseStamp;
    use granary_placement::map::{Location, Roles};
    use granary_placement::place::{new_map, NewCluster, NewDisk};
    use granary_placement::scheme::{CodecId, FailureDomain, Scheme};

    /// A cluster of that many disks, each in a server of its own, 4+2.
    fn cluster(disks: u8) -> ClusterMap {
        let name = |server: u8| Location { zone: "a".into(), rack: "1".into(), server: server.to_string() };
        let disk = |number: u8| NewDisk {
            uuid: DiskUuid([number; 16]),
            address: format!("10.0.0.{number}:7300"),
            location: name(number),
            weight: 1000,
            roles: Roles { storage: true, metadata: true },
        };
        new_map(NewCluster {
            cluster_id: ClusterId([7; 16]),
            disks: (1..=disks).map(disk).collect(),
            scheme_name: "4+2".into(),
            scheme: Scheme::new(4, 2, FailureDomain::Disk).unwrap(),
            object_shards: 4,
            replicas: None,
            groups_per_disk: 8,
        })
        .unwrap()
    }

    #[test]
    fn what_moved_while_the_body_came_is_named_missing_and_an_extent_without_a_spare_is_refused() {
        let map = cluster(8);
        let (group, slots) = map.groups.iter().next().map(|(id, group)| (*id, group.slots.clone())).unwrap();
        let extent = ExtentRef {
            extent: ExtentId([7; 16]),
            group,
            codec: CodecId::Np16,
            k: 4,
            m: 2,
            unit_bytes: 131_072,
            len_bytes: 1,
            generation: 1,
            slots: (0..6).collect(),
        };
        let written: Vec<(DiskId, ChunkId)> =
            (0u8..6).zip(&slots).map(|(index, slot)| (slot.current, chunk_id(&extent, index))).collect();
        let chunk = |index| ChunkRef { group, extent: extent.extent, index };
        // Disks that stand in no slot of the group.
        let others: Vec<DiskId> =
            map.disks.keys().copied().filter(|disk| slots.iter().all(|slot| slot.current != *disk)).collect();
        let extents = [extent.clone()];
        let check = |map: &ClusterMap, known: &[u8]| {
            let mut missing: Vec<ChunkRef> = known.iter().map(|index| chunk(*index)).collect();
            recheck(map, &extents, &written, &mut missing).map(|()| missing)
        };
        assert_eq!(check(&map, &[]), Ok(vec![]));
        assert_eq!(check(&map, &[2]), Ok(vec![chunk(2)]), "known before, and named once");

        let give = |map: &ClusterMap, slot: usize| {
            let mut next = map.clone();
            next.groups.get_mut(&group).unwrap().slots[slot].give_to(others[slot]);
            next
        };
        let one = give(&map, 0);
        let both = give(&one, 1);
        assert_eq!(check(&one, &[]), Ok(vec![chunk(0)]), "on the previous disk: to be brought");
        assert_eq!(check(&one, &[0]), Ok(vec![chunk(0)]));
        assert_eq!(check(&one, &[2]), Err(extent.extent), "four of six");
        assert_eq!(check(&both, &[]), Err(extent.extent), "both previous disks are given up at the end of the move");
        let mut moved = one.clone();
        moved.groups.get_mut(&group).unwrap().slots[0].previous = None;
        assert_eq!(check(&moved, &[]), Ok(vec![chunk(0)]));
    }

    /// One order of a write and of a move of its first slot, against a real shard. The gateway hears of maps when told.
    struct Order {
        shard: MemoryShard,
        requests: u8,
        /// Maps of epochs 1 (before), 2 (slot 0 moves), 3 (it has moved).
        maps: [ClusterMap; 3],
        newest: usize,
        known: usize,
        extent: ExtentRef,
        /// Disks with the chunk of slot 0.
        chunk_on: HashSet<DiskId>,
        written: Vec<(DiskId, ChunkId)>,
        /// Was the last look clean? Only then the move ends.
        clean: bool,
        requires: bool,
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Step {
        Write,
        Commit,
        Move,
        Require,
        Bring,
        LastLook,
        End,
        Hear,
    }

    impl Order {
        fn command(&mut self, command: Command) -> Reply {
            self.requests += 1;
            let request_id = [self.requests; 16];
            self.shard
                .apply(&MetaRequest { request_id, now_ms: 1, stamp_ms: None, account: AccountId::ROOT, command })
                .unwrap()
        }

        fn current(&self, map: usize) -> DiskId {
            self.maps[map].groups[&self.extent.group].slots[0].current
        }

        fn put(&mut self, map: usize) -> Option<Reply> {
            let mut missing = Vec::new();
            recheck(&self.maps[map], std::slice::from_ref(&self.extent), &self.written, &mut missing).ok()?;
            let data = ObjectData::Extents(vec![self.extent.clone()]);
            let record = ObjectRecord {
                version: VersionSeq(0),
                null_version: true,
                delete_marker: false,
                modified_ms: 1,
                size_bytes: self.extent.len_bytes,
                etag: String::new(),
                part_sizes: Vec::new(),
                checksum: None,
                part_checksums: Vec::new(),
                meta: ObjectMeta::default(),
                owner: AccountId::ROOT,
                data,
            };
            Some(self.command(Command::PutObject {
                bucket: BucketId(1),
                key: "k".into(),
                record,
                missing,
                map_epoch: self.maps[map].epoch,
                conditions: Conditions::default(),
                rule_epoch: 0,
            }))
        }

        /// Does the shard own the extent, and is the chunk of slot 0 queued for repair?
        fn owned(&self) -> Option<bool> {
            let extents = vec![(self.extent.group, self.extent.extent)];
            let Answer::Alive(alive) = self.shard.answer(&Query::ExtentsAlive { extents, or_garbage: false }).unwrap()
            else {
                panic!()
            };
            let Answer::Missing { chunks, .. } =
                self.shard.answer(&Query::ListMissing { after: None, limit: 9 }).unwrap()
            else {
                panic!()
            };
            alive[0].then(|| chunks.iter().any(|(chunk, ..)| chunk.index == 0))
        }

        fn step(&mut self, step: Step) {
            let (old, new) = (self.current(0), self.current(1));
            match step {
                Step::Hear => self.known = self.newest,
                Step::Write => {
                    let slots = self.maps[self.known].groups[&self.extent.group].slots.clone();
                    let id = |index| chunk_id(&self.extent, index);
                    self.written = (0u8..).zip(&slots).map(|(index, slot)| (slot.current, id(index))).collect();
                    self.chunk_on.insert(slots[0].current);
                }
                Step::Commit => {
                    if let Some(Reply::StaleMap { .. }) = self.put(self.known) {
                        self.known = self.newest;
                        let again = self.put(self.known);
                        assert!(matches!(again, Some(Reply::Put { .. })), "{again:?}");
                    }
                }
                Step::Move => self.newest = 1,
                Step::Require if self.requires => {
                    let lease = LeaseStamp { task: "heal".into(), epoch: 1 };
                    self.command(Command::RequireMap { epoch: self.maps[1].epoch, lease });
                }
                Step::Require => {}
                Step::Bring => {
                    if self.owned().is_some() {
                        self.chunk_on.insert(new);
                    }
                }
                Step::LastLook => {
                    self.clean = self.owned().is_none() || self.chunk_on.contains(&new);
                    if self.clean && self.owned().is_some() {
                        self.chunk_on.remove(&old);
                    }
                }
                Step::End => {
                    if self.clean {
                        self.newest = 2;
                    }
                }
            }
        }

        /// No chunk is where nobody looks for it without the shard knowing.
        fn is_safe(&self) -> bool {
            let there = self.chunk_on.contains(&self.current(1));
            self.newest != 2 || self.owned().is_none_or(|queued| queued || there)
        }
    }

    /// All orders of three sequences.
    fn orders(left: [&[Step]; 3], so_far: &mut Vec<Step>, all: &mut Vec<Vec<Step>>) {
        if left.iter().all(|steps| steps.is_empty()) {
            all.push(so_far.clone());
        }
        for at in 0..3 {
            if let Some((first, rest)) = left[at].split_first() {
                let mut left = left;
                left[at] = rest;
                so_far.push(*first);
                orders(left, so_far, all);
                so_far.pop();
            }
        }
    }

    #[test]
    fn no_order_of_a_write_and_a_move_leaves_a_chunk_where_nobody_looks() {
        let before = cluster(8);
        let (group, slots) = before.groups.iter().next().map(|(id, group)| (*id, group.slots.clone())).unwrap();
        let free = before.disks.keys().copied().find(|disk| slots.iter().all(|slot| slot.current != *disk)).unwrap();
        let mut moving = before.clone();
        moving.epoch.0 += 1;
        moving.groups.get_mut(&group).unwrap().slots[0].give_to(free);
        let mut moved = moving.clone();
        moved.epoch.0 += 1;
        moved.groups.get_mut(&group).unwrap().slots[0].previous = None;
        let extent = ExtentRef {
            extent: ExtentId([7; 16]),
            group,
            codec: CodecId::Np16,
            k: 4,
            m: 2,
            unit_bytes: 131_072,
            len_bytes: 1,
            generation: 1,
            slots: (0..6).collect(),
        };
        let mut all = Vec::new();
        let writer = [Step::Write, Step::Commit];
        let mover = [Step::Move, Step::Require, Step::Bring, Step::LastLook, Step::End];
        orders([&writer, &mover, &[Step::Hear, Step::Hear]], &mut Vec::new(), &mut all);
        assert_eq!(all.len(), 756);
        // Without the shard requiring the map, some orders lose the chunk: the test can fail.
        for (requires, expected_bad) in [(true, false), (false, true)] {
            let bad = all.iter().find(|steps| {
                let mut order = Order {
                    shard: MemoryShard::new(ShardId(1)),
                    requests: 0,
                    maps: [before.clone(), moving.clone(), moved.clone()],
                    newest: 0,
                    known: 0,
                    extent: extent.clone(),
                    chunk_on: HashSet::new(),
                    written: Vec::new(),
                    clean: false,
                    requires,
                };
                steps.iter().for_each(|step| order.step(*step));
                !order.is_safe()
            });
            assert_eq!(bad.is_some(), expected_bad, "{requires}: {bad:?}");
        }
    }
}
