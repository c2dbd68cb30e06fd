//! What a payload is worth by the map that is in force when it is whole. Pure.
//!
//! A body may take minutes, and slots may move meanwhile. What is committed must lie where the map looks for it: a
//! chunk on a slot's previous disk counts and is to be brought to the current one; a chunk on a disk that the slot does
//! not name any more is as good as lost.

use super::slot_of;
use granary_meta::record::ExtentRef;
use granary_meta::ChunkRef;
use granary_placement::id::{DiskId, ExtentId};
use granary_placement::map::ClusterMap;
use granary_wire::chunk::ChunkId;
use std::collections::{HashMap, HashSet};

/// Adds to `missing` the chunks that are not on the current disk of their slot. `written` is where chunks were written;
/// those of other extents are ignored.
///
/// # Errors
/// An extent of which no spare chunk is left in reach: it must not be acknowledged.
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
        let mut in_reach = 0usize;
        for index in (0..u8::MAX).take(extent.slots.len()) {
            let chunk = ChunkRef { group: extent.group, extent: extent.extent, index };
            if known.contains(&chunk) {
                continue;
            }
            let disk = on.get(&(extent.extent, index)).copied();
            match (slot_of(map, extent, index), disk) {
                (Some(slot), Some(disk)) if slot.current == disk => in_reach += 1,
                (Some(slot), Some(disk)) if slot.previous == Some(disk) => {
                    in_reach += 1;
                    missing.push(chunk);
                }
                _ => missing.push(chunk),
            }
        }
        if in_reach <= usize::from(extent.k) {
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
    use granary_placement::id::{ClusterId, DiskUuid};
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

        let mut moving = map.clone();
        for (slot, to) in [0, 1].into_iter().zip(&others) {
            moving.groups.get_mut(&group).unwrap().slots[slot].give_to(*to);
        }
        assert_eq!(check(&moving, &[]), Ok(vec![chunk(0), chunk(1)]), "on the previous disks: they count");

        let mut moved = moving.clone();
        moved.groups.get_mut(&group).unwrap().slots[0].previous = None;
        assert_eq!(check(&moved, &[]), Ok(vec![chunk(0), chunk(1)]), "one is out of reach, five are left");
        assert_eq!(check(&moved, &[2]), Err(extent.extent), "four of six");
        moved.groups.get_mut(&group).unwrap().slots[1].previous = None;
        assert_eq!(check(&moved, &[]), Err(extent.extent));
    }
}
