//! Whether what a command has placed bears the loss of a failure domain, by the leader's own cluster map.
//!
//! The gateway that wrote the chunks has decided so before; this is a second pair of eyes, as it is for the number of
//! missing chunks in [`granary_meta::check`]. It cannot be part of `apply`, for replicas learn of maps at different
//! times. So it comes before it is known whether the command was applied before: the caller lets a command go on whose
//! reply is kept, and a gateway takes any refusal for unknown that follows an attempt in doubt.

use granary_meta::nature::Payload;
use granary_meta::{ChunkRef, Reply, ShardResponse};
use granary_placement::codec::ChunkSet;
use granary_placement::durable::is_durable;
use granary_placement::map::ClusterMap;
use granary_wire::control::ControlError;
use std::cmp::Ordering;
use std::collections::HashSet;

/// None when a command with this payload may go on, by this map.
///
/// The answer otherwise depends on who knows more. A gateway with an older map is to hold its payload against the
/// newest one and to come again; one with a newer map is to come again when this disk has heard of it; and one with the
/// same map is wrong.
pub(super) fn refusal(map: &ClusterMap, payload: &Payload<'_>) -> Option<Result<ShardResponse, ControlError>> {
    let Payload { extents, missing, placed_by } = payload;
    // Most payloads are one extent, and most lack nothing: a set is made for long ones only.
    let is_long = extents.len() > 1 && !missing.is_empty();
    let lost: Option<HashSet<&ChunkRef>> = is_long.then(|| missing.iter().collect());
    let is_lost = |chunk: &ChunkRef| lost.as_ref().map_or_else(|| missing.contains(chunk), |lost| lost.contains(chunk));
    let weak = extents.iter().find(|extent| {
        let chunk = |index| ChunkRef { group: extent.group, extent: extent.extent, index };
        let width = u8::try_from(extent.slots.len()).unwrap_or(u8::MAX);
        let in_place: ChunkSet = (0..width).filter(|index| !is_lost(&chunk(*index))).collect();
        !is_durable(map, extent.group, extent.k, &extent.slots, in_place)
    })?;
    Some(match placed_by.cmp(&map.epoch) {
        Ordering::Less => Ok(ShardResponse::Reply(Reply::StaleMap { oldest: map.epoch })),
        Ordering::Greater => {
            tracing::debug!(here = %map.epoch, %placed_by, "a payload was placed by a map that is not here yet");
            // Nothing was done: it is sent again, and the map comes meanwhile.
            Err(ControlError::Overloaded)
        }
        Ordering::Equal => {
            let why = format!("extent {}: too few chunks are left when a failure domain fails", weak.extent);
            Err(ControlError::BadRequest(why))
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use granary_meta::record::{AccountId, BucketId, ExtentRef, ObjectData, ObjectMeta, ObjectRecord, VersionSeq};
    use granary_meta::{Command, Conditions};
    use granary_placement::id::{ClusterId, DiskUuid, Epoch, ExtentId, PlacementGroupId};
    use granary_placement::map::{Location, Roles};
    use granary_placement::place::{new_map, NewCluster, NewDisk};
    use granary_placement::scheme::{CodecId, FailureDomain, Scheme};

    /// 4+2 over servers of that many disks each, at epoch 7.
    fn cluster(servers: u8, disks_each: u8) -> ClusterMap {
        let disk = |number: u8| NewDisk {
            uuid: DiskUuid([number + 1; 16]),
            address: format!("10.0.0.{number}:7300"),
            location: Location { zone: "a".into(), rack: "1".into(), server: (number / disks_each).to_string() },
            weight: 1000,
            roles: Roles { storage: true, metadata: true },
        };
        let mut map = new_map(NewCluster {
            cluster_id: ClusterId([7; 16]),
            disks: (0..servers * disks_each).map(disk).collect(),
            scheme_name: "4+2".into(),
            scheme: Scheme::new(4, 2, FailureDomain::Server).unwrap(),
            object_shards: 1,
            replicas: None,
            groups_per_disk: 4,
        })
        .unwrap();
        map.epoch = Epoch(7);
        map
    }

    fn put(group: PlacementGroupId, k: u8, slots: &[u8], missing: &[u8], by: u64) -> Command {
        let id = ExtentId([9; 16]);
        let extent = ExtentRef {
            extent: id,
            group,
            codec: CodecId::Np16,
            k,
            m: slots.len() as u8 - k,
            unit_bytes: 131_072,
            len_bytes: 1,
            generation: 1,
            slots: slots.to_vec(),
        };
        let record = ObjectRecord {
            version: VersionSeq(0),
            null_version: true,
            delete_marker: false,
            modified_ms: 1,
            size_bytes: 1,
            etag: String::new(),
            part_sizes: Vec::new(),
            checksum: None,
            part_checksums: Vec::new(),
            meta: ObjectMeta::default(),
            owner: AccountId::ROOT,
            data: ObjectData::Extents(vec![extent]),
        };
        Command::PutObject {
            bucket: BucketId(1),
            key: "k".into(),
            record,
            missing: missing.iter().map(|index| ChunkRef { group, extent: id, index: *index }).collect(),
            map_epoch: Epoch(by),
            conditions: Conditions::default(),
            rule_epoch: 0,
        }
    }

    /// What is answered, in a word.
    fn word(map: &ClusterMap, command: &Command) -> &'static str {
        match command.nature().payload.and_then(|payload| refusal(map, &payload)) {
            None => "goes on",
            Some(Ok(ShardResponse::Reply(Reply::StaleMap { oldest }))) if oldest == map.epoch => "stale map",
            Some(Err(ControlError::Overloaded)) => "behind",
            Some(Err(ControlError::BadRequest(_))) => "wrong",
            Some(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn five_chunks_of_six_on_three_servers_are_too_few_and_so_are_none_known() {
        let (three, six) = (cluster(3, 2), cluster(6, 1));
        let of = |map: &ClusterMap| *map.groups.keys().next().unwrap();
        let all = [0, 1, 2, 3, 4, 5];
        // Chunks, those missing, the epoch that they were placed by.
        let on_three = |k, slots: &[u8], missing: &[u8], by| word(&three, &put(of(&three), k, slots, missing, by));
        assert_eq!(on_three(4, &all, &[], 7), "goes on");
        assert_eq!(on_three(4, &all, &[3], 7), "wrong", "another server lost leaves three of four");
        assert_eq!(on_three(4, &all, &[3], 6), "stale map");
        assert_eq!(on_three(4, &all, &[3], 8), "behind");
        assert_eq!(on_three(3, &[0, 1, 2, 4, 5], &[], 7), "goes on", "narrower, and it bears a server");
        let on_six = |missing: &[u8]| word(&six, &put(of(&six), 4, &all, missing, 7));
        assert_eq!(on_six(&[3]), "goes on", "every chunk on a server of its own");
        assert_eq!(on_six(&[3, 4]), "wrong");
        let nowhere = PlacementGroupId(60_000);
        assert_eq!(word(&six, &put(nowhere, 4, &all, &[], 7)), "wrong", "a group that nobody knows");
        assert_eq!(word(&six, &put(nowhere, 4, &all, &[], 8)), "behind", "a group of a newer map");
        assert_eq!(word(&six, &Command::Noop), "goes on");
    }
}
