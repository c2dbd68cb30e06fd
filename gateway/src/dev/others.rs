//! Pure: can the others take over what lost disks held?
//!
//! Where they can, an empty directory is left alone until its disk goes out of service. That is decided by the gateway
//! that heals (docs/decisions/0010), so the same rules are asked here: a directory that is left alone while its disk
//! cannot go out would stay empty for ever.

use crate::background::heal::judge::{limit, observers};
use crate::ops::away::{take_out, Takers};
use granary_meta::level::AWAY_LEVEL;
use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
use std::collections::BTreeSet;

/// What decides beside the map and the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Feature level of the root shard: below [`AWAY_LEVEL`] it takes no map in which a disk is away.
    pub level: u32,
    /// `heal.out_limit`, as in [`limit`].
    pub limit_percent: Option<u64>,
}

/// Will all `lost` disks go out of service, one after the other? They are in service by the map. `takers.unwell`: all
/// disks that do not answer as they should, the lost ones among them.
pub fn take_over(map: &ClusterMap, lost: &BTreeSet<DiskId>, takers: &Takers, rules: &Rules) -> bool {
    let answers = |disk: &DiskId| !takers.unwell.contains(disk);
    let serving = || map.disks.values().filter(|disk| disk.state.holds_slots()).map(|disk| disk.id);
    let more_than_half = |answering: usize, of: usize| answering * 2 > of;
    // What is away may have gone out within the hour, and counts for the limit then.
    let away = map.disks.values().filter(|disk| disk.state == DiskState::Away).count();
    rules.level >= AWAY_LEVEL
        && more_than_half(serving().filter(answers).count(), serving().count())
        && more_than_half(observers(map).filter(answers).count(), observers(map).count())
        && away + lost.len() <= limit(map, rules.limit_percent)
        && lost.iter().try_fold(map.clone(), |map, disk| take_out(&map, *disk, takers)).is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::dev::layout::{Layout, Shape};
    use crate::ops::away::Room;

    const RULES: Rules = Rules { level: AWAY_LEVEL, limit_percent: None };

    fn map(disks: u16, servers: u16) -> ClusterMap {
        let directory = tempfile::tempdir().unwrap();
        let shape = Shape { disks: Some(disks), servers: Some(servers), shards: Some(1), ..Shape::default() };
        Layout::open(directory.path()).unwrap().plan(&shape).unwrap().1
    }

    fn disks(ids: impl IntoIterator<Item = u32>) -> BTreeSet<DiskId> {
        ids.into_iter().map(DiskId).collect()
    }

    fn silent(unwell: &BTreeSet<DiskId>) -> Takers {
        Takers { unwell: unwell.clone(), ceiling_percent: 100, ..Takers::default() }
    }

    #[test]
    fn lost_disks_are_left_to_the_others_only_where_all_of_them_will_go_out() {
        // Those that are lost are the last ones, of which the first five hold the metadata.
        for (of, lost, rules, left) in [
            (6, 1, RULES, false),
            (7, 1, RULES, true),
            (7, 2, RULES, false),
            (8, 1, RULES, true),
            (8, 2, RULES, true),
            (8, 3, RULES, false),
            (8, 4, RULES, false),
            (8, 1, Rules { level: 1, ..RULES }, false),
            (8, 1, Rules { limit_percent: Some(0), ..RULES }, false),
            (8, 1, Rules { limit_percent: Some(10), ..RULES }, true),
            (8, 2, Rules { limit_percent: Some(10), ..RULES }, false),
            (8, 2, Rules { limit_percent: Some(100), ..RULES }, true),
        ] {
            let gone = disks(u32::from(of) + 1 - lost..=u32::from(of));
            assert_eq!(take_over(&map(of, 1), &gone, &silent(&gone), &rules), left, "{of} disks, {gone:?}, {rules:?}");
        }
    }

    #[test]
    fn disks_that_do_not_answer_take_over_nothing_and_count_as_not_up() {
        // (disks, lost, do not answer either, are the lost ones left to the others)
        for (of, lost, mute, left) in [
            (8, &[8][..], &[7][..], true),
            (8, &[8], &[6, 7], false),
            (8, &[7, 8], &[6], false),
            // With room enough it is half of the disks, and half of those with metadata, that must answer.
            (14, &[14], &[8, 9, 10, 11, 12], true),
            (14, &[14], &[8, 9, 10, 11, 12, 13], false),
            (14, &[1], &[2], true),
            (14, &[1], &[2, 3], false),
        ] {
            let (lost, mute) = (disks(lost.iter().copied()), disks(mute.iter().copied()));
            let takers = silent(&lost.union(&mute).copied().collect());
            assert_eq!(take_over(&map(of, 1), &lost, &takers, &RULES), left, "{of} disks, {lost:?}, {mute:?}");
        }
    }

    #[test]
    fn what_went_out_before_counts_for_the_limit() {
        let (map, one) = (map(18, 9), disks([18]));
        let out = take_out(&map, DiskId(1), &silent(&disks([1]))).unwrap();
        let takers = silent(&disks([1, 18]));
        assert!(take_over(&out, &one, &takers, &RULES), "two of a server may go");
        let both = disks([17, 18]);
        assert!(!take_over(&out, &both, &silent(&disks([1, 17, 18])), &RULES));
        assert!(take_over(&map, &both, &silent(&both), &RULES));
    }

    #[test]
    fn there_must_be_room_for_what_all_lost_disks_held_together() {
        let (map, both) = (map(8, 1), disks([7, 8]));
        // Each of the six others gets about a sixth of what a disk held: 35 % after the first, 40 % after the second.
        let room = Room { capacity_bytes: 100 << 30, free_bytes: 70 << 30, chunk_bytes: 30 << 30 };
        let rooms = map.disks.keys().map(|disk| (*disk, room)).collect();
        let takers = Takers { rooms, ceiling_percent: 37, ..silent(&both) };
        assert!(take_over(&map, &disks([8]), &takers, &RULES));
        assert!(!take_over(&map, &both, &takers, &RULES));
        assert!(take_over(&map, &both, &Takers { ceiling_percent: 50, ..takers }, &RULES));
    }
}
