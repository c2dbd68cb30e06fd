//! Which disks are dead, and which of them go out of service now. Pure: the clock and all sightings are handed in.
//!
//! A disk is seen dead when the gateway that heals finds it down and more than half of all metadata disks say that they
//! do not reach it either. Who cannot be asked says nothing, so a gateway that is cut off, or the smaller part of a cut
//! network, finds nobody dead. Time counts only while the disk was seen dead at two looks one after the other, so what
//! passed while nobody looked counts for nothing, and a disk that comes and goes adds up; only when it has answered for
//! [`Rules::well_after`] without a break is it forgotten.
//!
//! Not all that is dead for long enough goes out. While half of the disks in service or more are dead or doubtful, it
//! is rather the network or the power: nobody does. And within an hour no more go out than the largest server has
//! disks, or another part of all disks that an operator has set: a fault that looks like many dead disks must not start
//! a storm of rebuilding. Only what went out counts, not what had to stay because nobody could take over.

use crate::ops::away::{half_silent, Half};
use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::control::Reach;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Disks that went out count for the limit this long.
pub const LIMIT_WINDOW: Duration = Duration::from_secs(3600);
/// Between two looks no more than this counts, or four times the usual pause if that is more.
const LONGEST_GAP: Duration = Duration::from_secs(15);

/// How a disk is seen at one look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// It answers this gateway.
    Up,
    /// One of both: it answers this gateway badly or not at all, but not enough others say the same.
    Doubtful,
    /// Neither this gateway nor a majority of the observers reach it.
    Dead,
}

/// What the observers said of a disk that this gateway does not reach. One that does not know has no vote.
pub fn sight_of_down(said: impl IntoIterator<Item = Reach>, observers: usize) -> Sight {
    let unreached = said.into_iter().filter(|said| *said == Reach::Unreached).count();
    if observers > 0 && unreached * 2 > observers {
        Sight::Dead
    } else {
        Sight::Doubtful
    }
}

/// The metadata disks in service: they hold the map, and they are connected to each other anyway. Those that have gone
/// out were judged by a majority once; to go on counting them would leave no majority after a few deaths. That the part
/// of a cut network that they are in does nothing is seen to by the root shard, which needs a majority of its members.
pub fn observers(map: &ClusterMap) -> impl Iterator<Item = DiskId> + '_ {
    map.disks.values().filter(|disk| disk.roles.metadata && disk.state.holds_slots()).map(|disk| disk.id)
}

/// What is known of a disk from looking again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Clock {
    last: Sight,
    /// For how long it was seen dead since it was well.
    dead: Duration,
    /// For how long it has answered without a break.
    up: Duration,
}

/// The clocks of all disks.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Clocks {
    looked: Option<Instant>,
    disks: BTreeMap<DiskId, Clock>,
}

impl Clocks {
    /// Goes on from what the holder of the lease before had counted. What passed between the two counts for nothing.
    pub fn inherit(dead: impl IntoIterator<Item = (DiskId, Duration)>) -> Clocks {
        let clock = |dead| Clock { last: Sight::Doubtful, dead, up: Duration::ZERO };
        Clocks { looked: None, disks: dead.into_iter().map(|(disk, dead)| (disk, clock(dead))).collect() }
    }

    /// Takes in one look at all disks. `pause`: the usual time between two. Answers the time since the last look if it
    /// was too long to count.
    pub fn look(
        &mut self,
        sights: &BTreeMap<DiskId, Sight>,
        now: Instant,
        pause: Duration,
        well_after: Duration,
    ) -> Option<Duration> {
        let longest = LONGEST_GAP.max(pause * 4);
        let passed = self.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        // Nobody looked for long: this process slept, perhaps with all others.
        let gap = if passed > longest { Duration::ZERO } else { passed };
        self.looked = Some(now);
        self.disks.retain(|disk, _| sights.contains_key(disk));
        for (disk, sight) in sights {
            let new = Clock { last: Sight::Doubtful, dead: Duration::ZERO, up: Duration::ZERO };
            let clock = self.disks.entry(*disk).or_insert(new);
            let again = if clock.last == *sight { gap } else { Duration::ZERO };
            match sight {
                Sight::Up => {
                    clock.up += again;
                    if clock.up >= well_after {
                        clock.dead = Duration::ZERO;
                    }
                }
                Sight::Doubtful => clock.up = Duration::ZERO,
                Sight::Dead => {
                    clock.up = Duration::ZERO;
                    clock.dead += again;
                }
            }
            clock.last = *sight;
        }
        (passed > longest).then_some(passed)
    }

    /// Disks that are not well: for how long each was seen dead, and how it was seen last.
    pub fn unwell(&self) -> impl Iterator<Item = (DiskId, Duration, Sight)> + '_ {
        let unwell = self.disks.iter().filter(|(_, clock)| clock.last != Sight::Up || clock.dead > Duration::ZERO);
        unwell.map(|(disk, clock)| (*disk, clock.dead, clock.last))
    }

    fn get(&self, disk: DiskId) -> Option<&Clock> {
        self.disks.get(&disk)
    }
}

/// The settings it is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// `heal.out_after`.
    pub out_after: Duration,
    /// `heal.out_limit`, in percent of all disks; zero: no disk goes out by itself; None: as many as the largest server
    /// has.
    pub limit_percent: Option<u64>,
    /// `heal.well_after`.
    pub well_after: Duration,
}

/// Why a disk that has been dead for long enough stays in service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stays {
    /// As many as may have gone out within the hour.
    #[error(
        "{limit} disks may go out within an hour (heal.out_limit), and {recent} have: raise the limit if the others are \
         dead, too"
    )]
    Limit {
        /// So many may.
        limit: usize,
        /// So many have.
        recent: usize,
    },
    /// Half of the disks in service or more do not answer as they should.
    #[error(transparent)]
    Half(#[from] Half),
}

/// What is to be done.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Disks to be taken out, as far as the limit goes.
    pub out: Turns,
    /// Disks that are dead for long enough and stay all the same.
    pub stays: Vec<(DiskId, Stays)>,
    /// Disks to be let back in.
    pub back: Vec<DiskId>,
}

/// Disks that are to go out one after the other, the one that is dead for longest first. One that cannot go, because
/// nobody can take over, leaves its turn to the next.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Turns {
    waiting: VecDeque<DiskId>,
    limit: usize,
    recent: usize,
}

impl Turns {
    /// The next one, and why it stays if as many have gone as may.
    pub fn take(&mut self) -> Option<(DiskId, Option<Stays>)> {
        let disk = self.waiting.pop_front()?;
        let (limit, recent) = (self.limit, self.recent);
        Some((disk, (recent >= limit).then_some(Stays::Limit { limit, recent })))
    }

    /// The last one has gone out.
    pub fn went(&mut self) {
        self.recent += 1;
    }
}

/// So many disks may go out within an hour: as many as the largest server has, or a part of all, rounded up.
pub fn limit(map: &ClusterMap, percent: Option<u64>) -> usize {
    let known = || map.disks.values().filter(|disk| disk.state != DiskState::Out);
    let Some(percent) = percent else {
        let mut servers: BTreeMap<_, usize> = BTreeMap::new();
        known().for_each(|disk| *servers.entry(&disk.location).or_default() += 1);
        return servers.into_values().max().unwrap_or(0);
    };
    known().count().saturating_mul(usize::try_from(percent).unwrap_or(usize::MAX)).div_ceil(100)
}

/// Judges by the map and the clocks. `recent`: disks that went out within the hour.
pub fn judge(map: &ClusterMap, clocks: &Clocks, recent: usize, rules: &Rules) -> Verdict {
    let disks = |is: fn(DiskState) -> bool| map.disks.values().filter(move |disk| is(disk.state)).map(|disk| disk.id);
    let dead = || {
        let clocks = disks(DiskState::holds_slots).filter_map(|disk| Some((disk, clocks.get(disk)?)));
        clocks.filter(|(_, clock)| clock.last == Sight::Dead)
    };
    // Whatever is not up: while nobody can say of many disks how they are, it is as little known that others are dead
    // alone.
    let half = half_silent(map, |disk| clocks.get(disk).is_some_and(|clock| clock.last == Sight::Up));
    let mut due: Vec<(Duration, DiskId)> =
        dead().filter(|(_, clock)| clock.dead >= rules.out_after).map(|(disk, clock)| (clock.dead, disk)).collect();
    due.sort_by_key(|(dead, disk)| (std::cmp::Reverse(*dead), *disk));
    let mut verdict = Verdict::default();
    (verdict.out.limit, verdict.out.recent) = (limit(map, rules.limit_percent), recent);
    for (_, disk) in due {
        match half {
            Some(half) => verdict.stays.push((disk, half.into())),
            None => verdict.out.waiting.push_back(disk),
        }
    }
    let well =
        |disk: &DiskId| clocks.get(*disk).is_some_and(|clock| clock.last == Sight::Up && clock.up >= rules.well_after);
    verdict.back = disks(|state| state == DiskState::Away).filter(well).collect();
    verdict
}

/// Does the judgement that a disk goes out hold for the newest map, too? It was made by what was `seen` of the disks of
/// another. `recent`: disks that went out within the hour, by the newest map.
pub fn holds(
    disk: DiskId,
    seen: &ClusterMap,
    newest: &ClusterMap,
    (clocks, recent): (&Clocks, usize),
    rules: &Rules,
) -> bool {
    // One with another address, or that was let in or taken out meanwhile, is not the one that was seen.
    if newest.disk(disk) != seen.disk(disk) {
        return false;
    }
    let out = judge(newest, clocks, recent, rules).out;
    out.recent < out.limit && out.waiting.contains(&disk)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::object::choose::Draw;
    use crate::ops::away::{let_in, take_out, Takers};
    use crate::ops::form::{first_map, ClusterConfig};
    use serde_json::json;

    const SECOND: Duration = Duration::from_secs(1);
    const RULES: Rules =
        Rules { out_after: Duration::from_secs(600), limit_percent: None, well_after: Duration::from_secs(60) };

    /// So many servers with so many disks each, the first five disks with metadata.
    fn map(servers: usize, disks: usize) -> ClusterMap {
        let disk = |number: usize| {
            json!({
                "uuid": format!("{number:032x}"), "address": format!("10.0.0.1:{}", 7000 + number), "zone": "a", "rack": "1",
                "server": format!("s{}", number / disks), "weight": 100, "metadata": number < 5
            })
        };
        let disks: Vec<_> = (0..servers * disks).map(disk).collect();
        let config = json!({
            "cluster_id": format!("{:032x}", 7), "scheme": "4+2", "failure_domain": "disk", "shards": 2, "disks": disks
        });
        first_map(serde_json::from_value::<ClusterConfig>(config).unwrap()).unwrap()
    }

    fn sights(map: &ClusterMap, of: impl Fn(u32) -> Sight) -> BTreeMap<DiskId, Sight> {
        map.disks.keys().map(|disk| (*disk, of(disk.0))).collect()
    }

    fn ids(numbers: &[u32]) -> Vec<DiskId> {
        numbers.iter().copied().map(DiskId).collect()
    }

    /// Clocks after these sightings, so many seconds apart, with their number.
    fn seen(map: &ClusterMap, every_s: u64, looks: u64, sight: impl Fn(u64, u32) -> Sight) -> Clocks {
        let (mut clocks, start) = (Clocks::default(), Instant::now());
        for look in 0..=looks {
            let at = start + SECOND * u32::try_from(look * every_s).unwrap();
            clocks.look(&sights(map, |disk| sight(look, disk)), at, SECOND * 5, RULES.well_after);
        }
        clocks
    }

    /// Has them go in turn, those for whom there is a place: who goes, and who stays for the limit or another reason.
    fn go(verdict: &Verdict, has_place: impl Fn(DiskId) -> bool) -> (Vec<DiskId>, Vec<DiskId>) {
        let (mut turns, mut out) = (verdict.out.clone(), Vec::new());
        let mut stays: Vec<DiskId> = verdict.stays.iter().map(|(disk, _)| *disk).collect();
        while let Some((disk, limit)) = turns.take() {
            if limit.is_none() && has_place(disk) {
                turns.went();
                out.push(disk);
            } else {
                stays.push(disk);
            }
        }
        (out, stays)
    }

    #[test]
    fn dead_is_what_this_gateway_and_more_than_half_of_all_observers_do_not_reach() {
        use Reach::{Reached as R, Unknown as X, Unreached as U};
        use Sight::{Dead, Doubtful};
        // (what the observers that answered say; how many observers there are; how it is seen)
        for (said, of, sight) in [
            (&[U, U, U, U][..], 5, Dead),
            (&[U, U, U], 5, Dead),
            (&[U, U], 5, Doubtful),
            (&[U, U, R, R, R], 5, Doubtful),
            (&[U, U, U, R, R], 5, Dead),
            (&[U, U, X, X, X], 5, Doubtful),
            (&[U, U, U, X, X], 5, Dead),
            (&[X, X, X, X, X], 5, Doubtful),
            (&[], 5, Doubtful),
            (&[R, R, R], 5, Doubtful),
            (&[U, U], 4, Doubtful),
            (&[U], 1, Dead),
            (&[], 0, Doubtful),
        ] {
            assert_eq!(sight_of_down(said.iter().copied(), of), sight, "{said:?} of {of}");
        }
        let map = map(8, 1);
        assert_eq!(observers(&map).collect::<Vec<_>>(), ids(&[1, 2, 3, 4, 5]));
        let takers = Takers { ceiling_percent: 90, ..Takers::default() };
        assert_eq!(observers(&take_out(&map, DiskId(2), &takers).unwrap()).collect::<Vec<_>>(), ids(&[1, 3, 4, 5]));
    }

    #[test]
    fn who_goes_out() {
        use Sight::{Dead, Doubtful, Up};
        let dead_are = |dead: &'static [u32]| move |disk: u32| if dead.contains(&disk) { Dead } else { Up };
        type See = Box<dyn Fn(u64, u32) -> Sight>;
        type Row = (&'static str, usize, usize, u64, See, usize, &'static [u32], &'static [u32]);
        let always = |dead: &'static [u32]| -> See { Box::new(move |_, disk| dead_are(dead)(disk)) };
        // (what, servers, disks each, looks 5 s apart, sightings, gone out within the hour, goes out, stays)
        let table: Vec<Row> = vec![
            ("all well", 8, 1, 300, always(&[]), 0, &[], &[]),
            ("not for long enough", 8, 1, 119, always(&[3]), 0, &[], &[]),
            ("long enough", 8, 1, 120, always(&[3]), 0, &[3], &[]),
            ("two at once, one may", 8, 1, 120, always(&[3, 4]), 0, &[3], &[4]),
            ("one may, and one has", 8, 1, 120, always(&[3]), 1, &[], &[3]),
            ("however many disks there are", 30, 1, 120, always(&[3, 4, 5]), 0, &[3], &[4, 5]),
            ("a whole server", 4, 4, 120, always(&[1, 2, 3, 4]), 0, &[1, 2, 3, 4], &[]),
            ("a server and one more", 4, 4, 120, always(&[1, 2, 3, 4, 5]), 0, &[1, 2, 3, 4], &[5]),
            ("half of all", 8, 1, 500, always(&[1, 2, 3, 4]), 0, &[], &[1, 2, 3, 4]),
            (
                "half of all, and of most of them nobody else says so",
                8,
                1,
                500,
                Box::new(|_, disk| match disk {
                    3 => Dead,
                    1 | 5 | 7 => Doubtful,
                    _ => Up,
                }),
                0,
                &[],
                &[3],
            ),
            (
                "less than half of all",
                8,
                1,
                500,
                Box::new(|_, disk| match disk {
                    3 => Dead,
                    1 | 5 => Doubtful,
                    _ => Up,
                }),
                0,
                &[3],
                &[],
            ),
            (
                "the longest dead first",
                8,
                1,
                130,
                Box::new(|look, disk| if disk == 6 || (disk == 2 && look > 5) { Dead } else { Up }),
                0,
                &[6],
                &[2],
            ),
            (
                "up again at the last look",
                8,
                1,
                130,
                Box::new(|look, disk| if disk == 3 && look < 130 { Dead } else { Up }),
                0,
                &[],
                &[],
            ),
            (
                "doubtful at the last look",
                8,
                1,
                130,
                Box::new(|look, disk| match disk {
                    3 if look < 130 => Dead,
                    3 => Doubtful,
                    _ => Up,
                }),
                0,
                &[],
                &[],
            ),
            (
                "doubtful time does not count",
                8,
                1,
                200,
                Box::new(|look, disk| match disk {
                    3 if look < 110 => Doubtful,
                    3 => Dead,
                    _ => Up,
                }),
                0,
                &[],
                &[],
            ),
            // Eight looks dead, four up: it never answers for a minute.
            (
                "one that comes and goes adds up",
                8,
                1,
                210,
                Box::new(|look, disk| if disk == 3 && look % 12 < 8 { Dead } else { Up }),
                0,
                &[3],
                &[],
            ),
            // Answers for more than a minute each time.
            (
                "one that was well begins anew",
                8,
                1,
                219,
                Box::new(|look, disk| if disk == 3 && look % 110 < 95 { Dead } else { Up }),
                0,
                &[],
                &[],
            ),
        ];
        for (what, servers, disks, looks, sight, recent, out, stays) in table {
            let map = map(servers, disks);
            let verdict = judge(&map, &seen(&map, 5, looks, sight), recent, &RULES);
            assert_eq!(go(&verdict, |_| true), (ids(out), ids(stays)), "{what}");
        }
        let none = Rules { limit_percent: Some(0), ..RULES };
        let map = map(8, 1);
        let clocks = seen(&map, 5, 200, |_, disk| dead_are(&[3])(disk));
        let mut turns = judge(&map, &clocks, 0, &none).out;
        assert_eq!(turns.take(), Some((DiskId(3), Some(Stays::Limit { limit: 0, recent: 0 }))));
        assert_eq!(turns.take(), None);
    }

    #[test]
    fn as_many_go_out_within_an_hour_as_the_largest_server_has_or_as_an_operator_says() {
        // (servers, disks each, heal.out_limit, so many)
        for (servers, disks, percent, expected) in [
            (8, 1, None, 1),
            (4, 4, None, 4),
            (40, 1, None, 1),
            (40, 1, Some(10), 4),
            (4, 4, Some(10), 2),
            (8, 1, Some(1), 1),
            (8, 1, Some(100), 8),
            (8, 1, Some(0), 0),
        ] {
            assert_eq!(limit(&map(servers, disks), percent), expected, "{servers} {disks} {percent:?}");
        }
    }

    #[test]
    fn a_disk_without_a_substitute_leaves_its_turn_to_the_next() {
        let map = map(8, 1);
        let clocks = seen(&map, 5, 130, |_, disk| if [2, 3, 5].contains(&disk) { Sight::Dead } else { Sight::Up });
        let verdict = judge(&map, &clocks, 0, &RULES);
        assert_eq!(go(&verdict, |disk| disk != DiskId(2)), (ids(&[3]), ids(&[2, 5])));
        assert_eq!(go(&verdict, |_| false), (ids(&[]), ids(&[2, 3, 5])));
    }

    #[test]
    fn a_judgement_is_held_against_the_map_that_it_changes() {
        let seen_map = map(8, 1);
        let clocks = seen(&seen_map, 5, 130, |_, disk| if [3, 4].contains(&disk) { Sight::Dead } else { Sight::Up });
        let holds = |newest: &ClusterMap, recent| holds(DiskId(3), &seen_map, newest, (&clocks, recent), &RULES);
        let with = |change: &dyn Fn(&mut ClusterMap)| {
            let mut newest = seen_map.clone();
            newest.epoch.0 += 1;
            change(&mut newest);
            newest
        };
        assert!(holds(&seen_map, 0) && holds(&with(&|_| {}), 0));
        assert!(!holds(&seen_map, 1), "the limit is reached");
        let moved = with(&|map| map.disks.get_mut(&DiskId(3)).unwrap().address = "10.0.0.9:7000".to_owned());
        assert!(!holds(&moved, 0), "nobody has looked for it there");
        let takers = Takers { ceiling_percent: 90, ..Takers::default() };
        assert!(!holds(&take_out(&seen_map, DiskId(3), &takers).unwrap(), 0), "it is out already");
        assert!(!holds(&take_out(&seen_map, DiskId(4), &takers).unwrap(), 1), "another is");
        // Four of eight disks in service are as good as away: of those two are dead, and two nobody has looked at.
        let news = with(&|map| {
            for disk in [7, 8] {
                let mut new = map.disks.remove(&DiskId(disk)).unwrap();
                new.id = DiskId(disk + 10);
                map.disks.insert(new.id, new);
            }
        });
        assert!(!holds(&news, 0), "half are not up");
    }

    #[test]
    fn a_disk_that_dies_while_it_is_draining_goes_out() {
        let map = crate::ops::drain(&map(9, 1), DiskId(7)).unwrap();
        let dead = |gone: &'static [u32]| {
            seen(&map, 5, 130, move |_, disk| if gone.contains(&disk) { Sight::Dead } else { Sight::Up })
        };
        assert_eq!(go(&judge(&map, &dead(&[7]), 0, &RULES), |_| true), (ids(&[7]), ids(&[])));
        // It counts among those in service, too.
        assert_eq!(judge(&map, &dead(&[1, 2, 3, 4, 7]), 0, &RULES).stays[0].1, Stays::Half(Half { silent: 5, of: 9 }));
    }

    #[test]
    fn time_in_which_nobody_looked_counts_for_nothing() {
        let map = map(8, 1);
        let (start, usual) = (Instant::now(), SECOND * 5);
        for (pause, passed, counts) in [(5, 5, true), (5, 20, true), (5, 21, false), (1, 15, true), (1, 16, false)] {
            let all_dead = sights(&map, |_| Sight::Dead);
            let mut clocks = Clocks::default();
            assert_eq!(clocks.look(&all_dead, start, usual, usual), None);
            let dropped = clocks.look(&all_dead, start + SECOND * passed, SECOND * pause, usual);
            assert_eq!(dropped, (!counts).then_some(SECOND * passed), "{pause} {passed}");
        }
        // Looked at 16 s apart: longer than any pause between two looks.
        let clocks = seen(&map, 21, 500, |_, disk| if disk == 3 { Sight::Dead } else { Sight::Up });
        assert_eq!(go(&judge(&map, &clocks, 0, &RULES), |_| true), (ids(&[]), ids(&[])));
        assert_eq!(clocks.unwell().collect::<Vec<_>>(), [(DiskId(3), Duration::ZERO, Sight::Dead)]);
    }

    #[test]
    fn the_next_holder_goes_on_counting_where_the_last_one_stopped() {
        let (map, start) = (map(8, 1), Instant::now());
        let mut clocks = Clocks::inherit([(DiskId(3), SECOND * 590), (DiskId(99), SECOND * 700)]);
        for look in 0..=2u32 {
            assert_eq!(go(&judge(&map, &clocks, 0, &RULES), |_| true).0, []);
            let sights = sights(&map, |disk| if disk == 3 { Sight::Dead } else { Sight::Up });
            clocks.look(&sights, start + SECOND * 5 * look, SECOND * 5, RULES.well_after);
        }
        assert_eq!(go(&judge(&map, &clocks, 0, &RULES), |_| true).0, [DiskId(3)]);
    }

    #[test]
    fn a_disk_that_went_out_is_let_in_when_it_has_answered_long_enough() {
        let takers = Takers { ceiling_percent: 90, ..Takers::default() };
        let map = take_out(&map(8, 1), DiskId(3), &takers).unwrap();
        let clocks =
            |looks| seen(&map, 5, looks, |look, disk| if disk == 3 && look < 1 { Sight::Dead } else { Sight::Up });
        assert_eq!(judge(&map, &clocks(12), 1, &RULES).back, []);
        assert_eq!(judge(&map, &clocks(13), 1, &RULES).back, [DiskId(3)]);
    }

    /// Whatever is seen: only what is dead now and was for long enough goes out, in any hour no more than the limit,
    /// and never while half are dead.
    #[test]
    fn nothing_that_is_seen_makes_more_go_out_than_may() {
        let (mut went, mut came, mut held) = (0, 0, 0);
        for seed in 0..60u64 {
            let mut draw = Draw(seed);
            let (servers, disks) = [(12, 1), (10, 2), (40, 1), (4, 4)][usize::try_from(draw.number() % 4).unwrap()];
            let mut map = map(servers, disks);
            let percent = [None, Some(5), Some(10), Some(25)][usize::try_from(draw.number() % 4).unwrap()];
            let rules = Rules { limit_percent: percent, ..RULES };
            let (mut clocks, mut now) = (Clocks::default(), Instant::now());
            let mut out_at: Vec<Instant> = Vec::new();
            let mut dead_since: BTreeMap<DiskId, Instant> = BTreeMap::new();
            let mut down: BTreeMap<DiskId, u64> = BTreeMap::new();
            for look in 0..1500u64 {
                now += SECOND * u32::try_from(4 + draw.number() % 3).unwrap();
                for disk in map.disks.keys() {
                    if draw.number().is_multiple_of(600) {
                        down.insert(*disk, look + draw.number() % 400);
                    }
                }
                down.retain(|_, until| *until > look);
                let sights = sights(&map, |disk| match down.contains_key(&DiskId(disk)) {
                    true if draw_at(seed, look, disk).is_multiple_of(20) => Sight::Doubtful,
                    true => Sight::Dead,
                    false => Sight::Up,
                });
                for (disk, sight) in &sights {
                    match sight {
                        Sight::Up => drop(dead_since.remove(disk)),
                        _ => drop(dead_since.entry(*disk).or_insert(now)),
                    }
                }
                clocks.look(&sights, now, SECOND * 5, rules.well_after);
                out_at.retain(|at| now.duration_since(*at) < LIMIT_WINDOW);
                let mut verdict = judge(&map, &clocks, out_at.len(), &rules);
                held += verdict.stays.len();
                while let Some((disk, stays)) = verdict.out.take() {
                    if stays.is_some() {
                        held += 1;
                        continue;
                    }
                    assert_eq!(sights[&disk], Sight::Dead, "seed {seed}");
                    let in_service = map.disks.values().filter(|disk| disk.state == DiskState::In).count();
                    let silent = sights
                        .iter()
                        .filter(|(disk, sight)| **sight != Sight::Up && map.disks[*disk].state == DiskState::In);
                    assert!(silent.count() * 2 < in_service + 2 * out_at.len(), "seed {seed}");
                    if let Ok(next) = take_out(&map, disk, &Takers { ceiling_percent: 90, ..Takers::default() }) {
                        map = settled(next);
                        out_at.push(now);
                        verdict.out.went();
                        went += 1;
                    }
                }
                assert!(out_at.len() <= limit(&map, rules.limit_percent), "seed {seed}");
                for disk in verdict.back {
                    assert!(!dead_since.contains_key(&disk), "seed {seed}");
                    map = let_in(&map, disk).unwrap();
                    came += 1;
                }
            }
        }
        println!("{went} went out, {came} came back, {held} times one had to stay");
        assert!(went > 100 && came > 50 && held > 100, "{went} {came} {held}");
    }

    fn draw_at(seed: u64, look: u64, disk: u32) -> u64 {
        Draw(seed.wrapping_mul(1_000_003) ^ look.wrapping_mul(7919) ^ u64::from(disk)).number()
    }

    fn settled(mut map: ClusterMap) -> ClusterMap {
        map.groups.values_mut().flat_map(|group| &mut group.slots).for_each(|slot| slot.previous = None);
        map
    }
}
