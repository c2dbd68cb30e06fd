//! Dead disks go out of service, and come back when they answer again, without an operator.
//!
//! What is dead and what is to be done is decided by [`judge`](super::judge), how the map changes by
//! [`ops::away`](crate::ops::away); here disks are looked at, metadata disks are asked what they reach, and the changes
//! are made. Everything else follows from the map: slots with a new disk are filled by [`slots`](super::slots), and
//! what a disk that is back has left over is taken away before it is let in.
//!
//! How long disks have been dead and which went out within the hour is published with the lease, so that the next
//! holder goes on counting.

use super::home::Cleared;
use super::judge::{holds, judge, observers, sight_of_down, Clocks, Rules, Sight, Stays, Verdict, LIMIT_WINDOW};
use super::{lock, AwayDisk, DeadDisk, HealSettings, HealStatus, Inner};
use crate::background::leases::Held;
use crate::backoff::Backoff;
use crate::disks::{DiskHealth, DiskView};
use crate::object::add;
use crate::ops::away::{empty_disks, fill_empty, let_in, take_out, AwayError, Room, Takers};
use crate::ops::{commit, slots_moving, CommitError};
use futures::future::join_all;
use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::control::{ControlRequest, ControlResponse, Reach};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::mem::Discriminant;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Disks asked about by one request: disk nodes take no more.
const ASKED: usize = 64;
/// How long an observer may take to find out what it reaches.
const ASK: Duration = Duration::from_secs(5);
/// What observers said longer ago is not acted on.
const STALE: Duration = Duration::from_secs(20);
/// The pause between two looks.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(5)];

/// Disks that are away, answer again, and may be let back in: what the looks under this lease found. Under the next one
/// they are looked at anew. With why one waits, where it was tried and may not come in yet.
pub(super) type Returned = Mutex<BTreeMap<DiskId, Option<String>>>;

/// Disks for which something was not done yet: how often it was tried, and when it is tried again.
#[derive(Debug, Default)]
struct Tries(BTreeMap<DiskId, (u32, Instant)>);

impl Tries {
    /// It has failed once more.
    fn failed(&mut self, disk: DiskId, now: Instant, backoff: &Backoff) {
        let (tries, not_before) = self.0.entry(disk).or_insert((0, now));
        *tries = tries.saturating_add(1);
        *not_before = now + backoff.base(*tries);
    }

    /// Is it tried now?
    fn is_due(&self, disk: DiskId, now: Instant) -> bool {
        self.0.get(&disk).is_none_or(|(_, not_before)| now >= *not_before)
    }
}

/// What the holder of the lease remembers from look to look.
struct Memory {
    clocks: Clocks,
    /// When each disk went out that is away, or went out within the hour: how long before `begun`, or after it.
    out: BTreeMap<DiskId, OutAt>,
    begun: Instant,
    /// Why a dead disk stays in service, as it was logged.
    told: BTreeMap<DiskId, Kind>,
    /// That nobody looked for long was logged, and no time has counted since.
    told_of_gap: bool,
    /// Why disks that hold nothing get no share, as it was logged.
    told_of_share: Option<String>,
}

/// Why a dead disk stays in service.
struct Reason {
    kind: Kind,
    text: String,
}

/// The kind of a reason: a line is logged when it changes, not whenever a number in the text does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Judged(Discriminant<Stays>),
    Refused(Discriminant<AwayError>),
    /// The root shard takes no such map.
    Root,
    /// Healing is paused.
    Paused,
}

impl From<Stays> for Reason {
    fn from(stays: Stays) -> Reason {
        Reason { kind: Kind::Judged(std::mem::discriminant(&stays)), text: stays.to_string() }
    }
}

impl From<AwayError> for Reason {
    fn from(error: AwayError) -> Reason {
        Reason { kind: Kind::Refused(std::mem::discriminant(&error)), text: error.to_string() }
    }
}

#[derive(Debug, Clone, Copy)]
struct OutAt {
    /// So long before the lease was taken.
    before: Duration,
    /// Under this lease.
    at: Option<Instant>,
}

impl Memory {
    /// Goes on from what the holder before published.
    fn inherit(published: &[u8], map: Option<&ClusterMap>) -> Memory {
        let status: HealStatus = serde_json::from_slice(published).unwrap_or_default();
        let dead = status.dead_disks.iter().map(|row| (row.disk, Duration::from_secs(row.dead_s)));
        let before = |s| OutAt { before: Duration::from_secs(s), at: None };
        let out: BTreeMap<DiskId, OutAt> = status.away_disks.iter().map(|row| (row.disk, before(row.out_s))).collect();
        let begun = Instant::now();
        let mut memory = Memory {
            clocks: Clocks::inherit(dead),
            out,
            begun,
            told: BTreeMap::new(),
            told_of_gap: false,
            told_of_share: None,
        };
        map.into_iter().for_each(|map| memory.note_away(map, begun));
        memory
    }

    /// What is away and nobody wrote down counts as taken out now: the holder before died over it, or the root shard's
    /// answer was lost.
    fn note_away(&mut self, map: &ClusterMap, now: Instant) {
        for disk in map.disks.values().filter(|disk| disk.state == DiskState::Away) {
            self.out.entry(disk.id).or_insert(OutAt { before: Duration::ZERO, at: Some(now) });
        }
    }

    /// Takes in one look. Answers how long nobody had looked, if that is to be logged: the time does not count.
    fn look(
        &mut self,
        sights: &BTreeMap<DiskId, Sight>,
        looked: Instant,
        pause: Duration,
        well_after: Duration,
    ) -> Option<Duration> {
        let dropped = self.clocks.look(sights, looked, pause, well_after);
        let news = dropped.filter(|_| !self.told_of_gap && sights.values().any(|sight| *sight == Sight::Dead));
        self.told_of_gap = dropped.is_some() && (self.told_of_gap || news.is_some());
        news
    }

    /// Of which disks it is to be logged that they stay, since they do so for another kind of reason than before.
    fn news(&mut self, why: &BTreeMap<DiskId, Reason>) -> Vec<DiskId> {
        let news = why.iter().filter(|(disk, why)| self.told.get(disk) != Some(&why.kind)).map(|(disk, _)| *disk);
        let news = news.collect();
        self.told = why.iter().map(|(disk, why)| (*disk, why.kind)).collect();
        news
    }

    /// Disks that went out within the hour: those written down, and those that are away by this map and are not.
    fn recent(&self, map: &ClusterMap, now: Instant) -> usize {
        let written = self.out.values().filter(|out| self.ago(out, now) < LIMIT_WINDOW).count();
        let away = map.disks.values().filter(|disk| disk.state == DiskState::Away);
        written + away.filter(|disk| !self.out.contains_key(&disk.id)).count()
    }

    /// May a disk go out by the newest map, when it was judged by another, and the disks were looked at so long ago?
    fn may_go(&self, disk: DiskId, (seen, newest): (&ClusterMap, &ClusterMap), age: Duration, rules: &Rules) -> bool {
        let recent = self.recent(newest, Instant::now());
        age <= STALE && holds(disk, seen, newest, (&self.clocks, recent), rules)
    }

    /// How long ago a disk went out.
    fn ago(&self, out: &OutAt, now: Instant) -> Duration {
        match out.at {
            Some(at) => now.saturating_duration_since(at),
            None => out.before + now.saturating_duration_since(self.begun),
        }
    }
}

impl Inner {
    /// Looks at all disks again and again, and takes out what is dead.
    pub(super) async fn away_loop(&self, returned: &Returned, held: &Held) {
        let mut settings = self.settings.clone();
        let mut memory = Memory::inherit(held.inherited(), self.store.disks().map().as_deref());
        loop {
            let now = settings.borrow_and_update().clone();
            let pause = (now.out_after / 10).min(now.well_after / 4).clamp(PAUSES[0], PAUSES[1]);
            self.look_at_disks((&mut memory, returned), &now, pause, held).await;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = super::change(&mut settings) => {}
            }
        }
    }

    async fn look_at_disks(
        &self,
        (memory, returned): (&mut Memory, &Returned),
        settings: &HealSettings,
        pause: Duration,
        held: &Held,
    ) {
        let Some(map) = self.store.disks().map() else { return };
        let views = self.store.disks().view();
        let began = Instant::now();
        let sights = self.sights(&map, &views).await;
        let looked = Instant::now();
        if let Some(gap) = memory.look(&sights, looked, pause, settings.well_after) {
            tracing::warn!(
                gap_s = gap.as_secs(),
                look_ms = (looked - began).as_millis() as u64,
                "nobody looked at the disks for so long that the time does not count for those that are dead"
            );
        }
        memory.note_away(&map, looked);
        let rules = Rules {
            out_after: settings.out_after,
            limit_percent: settings.out_limit_percent,
            well_after: settings.well_after,
        };
        let Verdict { mut out, stays, back } = judge(&map, &memory.clocks, memory.recent(&map, looked), &rules);
        let mut why: BTreeMap<DiskId, Reason> = stays.into_iter().map(|(disk, why)| (disk, why.into())).collect();
        while let Some((disk, limit)) = out.take() {
            if let Some(limit) = limit {
                why.insert(disk, limit.into());
                continue;
            }
            if self.pace.is_paused() {
                why.insert(disk, Reason { kind: Kind::Paused, text: "healing is paused".to_owned() });
                continue;
            }
            // What was seen may be long ago, if this process slept; and it was seen by an older map. And the disk may
            // have come back while others went out.
            let may = |newest: &ClusterMap| {
                let is_down = self.store.disks().health(disk) == DiskHealth::Down;
                is_down && !held.is_lost() && memory.may_go(disk, (&map, newest), began.elapsed(), &rules)
            };
            let made = commit(&self.meta, |newest| match may(newest) {
                true => take_out(newest, disk, &takers(newest, &views, settings.fill_ceiling_percent)),
                false => Err(AwayError::Changed),
            });
            match made.await {
                Ok(made) => {
                    out.went();
                    add(&self.counters().disks_taken_out, 1);
                    memory.out.insert(disk, OutAt { before: Duration::ZERO, at: Some(Instant::now()) });
                    let slots = slots_moving(&made.after) - slots_moving(&made.before).min(slots_moving(&made.after));
                    tracing::warn!(
                        %disk, epoch = made.after.epoch.0, slots,
                        "disk is dead and out of service: the others take over what it held"
                    );
                    self.poke.notify_one();
                }
                Err(CommitError::Refused(AwayError::Changed)) => {}
                Err(CommitError::Refused(error)) => drop(why.insert(disk, error.into())),
                // Not only this disk: below its feature level the root shard takes no map in which a disk is away.
                Err(CommitError::Root(error)) if !error.outcome_unknown() => {
                    why.insert(disk, Reason { kind: Kind::Root, text: error.to_string() });
                    break;
                }
                Err(error) => {
                    tracing::warn!(%disk, %error, "disk is dead, but could not be taken out of service");
                    // It may have gone out all the same: what is away by the newest map counts from then on.
                    break;
                }
            }
        }
        if held.is_lost() {
            return;
        }
        note_returned(returned, back);
        self.give_share(&map, (&views, &sights), memory, began, settings.fill_ceiling_percent, held).await;
        self.tell_of_disks(&map, (memory, returned), why);
        lock(&self.status).out_after_s = settings.out_after.as_secs();
    }

    /// How every disk of the map is seen now.
    async fn sights(&self, map: &ClusterMap, views: &[DiskView]) -> BTreeMap<DiskId, Sight> {
        let mut sights: BTreeMap<DiskId, Sight> = views
            .iter()
            .map(|view| (view.id, if view.health == DiskHealth::Up { Sight::Up } else { Sight::Doubtful }))
            .collect();
        // One that is away has gone out already.
        let serves = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.state != DiskState::Away);
        let down = views.iter().filter(|view| view.health == DiskHealth::Down).map(|view| view.id);
        let down: Vec<DiskId> = down.filter(serves).collect();
        let observers: Vec<DiskId> = observers(map).collect();
        let ask = |observer, disks: Vec<DiskId>| async move { self.reached_by(observer, &disks).await };
        let mut said = ask_all(&observers, &down, ask).await;
        for disk in &down {
            let said = said.remove(disk).unwrap_or_default();
            // It may have come back while the others were asked.
            let sight = match self.store.disks().health(*disk) {
                DiskHealth::Down => sight_of_down(said, observers.len()),
                _ => Sight::Doubtful,
            };
            sights.insert(*disk, sight);
        }
        sights
    }

    /// Which of these disks an observer reaches; None: it does not answer, and says nothing.
    async fn reached_by(&self, observer: DiskId, disks: &[DiskId]) -> Option<Vec<Reach>> {
        if self.store.disks().health(observer) == DiskHealth::Down {
            return None;
        }
        let client = self.store.disks().client(observer)?;
        let asked = client.control(ControlRequest::Reach(disks.to_vec()), ASK);
        match tokio::time::timeout(ASK, asked).await {
            Ok(Ok(ControlResponse::Reached(reached))) if reached.len() == disks.len() => Some(reached),
            Ok(Ok(answer)) => {
                tracing::debug!(%observer, ?answer, "a metadata disk cannot tell which disks it reaches");
                None
            }
            Ok(Err(error)) => {
                tracing::debug!(%observer, %error, "a metadata disk was not asked which disks it reaches");
                None
            }
            Err(_) => None,
        }
    }

    /// Gives disks that are in service without slots their share, when all is well and nothing moves.
    async fn give_share(
        &self,
        map: &ClusterMap,
        (views, sights): (&[DiskView], &BTreeMap<DiskId, Sight>),
        memory: &mut Memory,
        began: Instant,
        ceiling_percent: u64,
        held: &Held,
    ) {
        let all_well = |map: &ClusterMap| {
            let mut serving = map.disks.values().filter(|disk| disk.state.holds_slots());
            serving.all(|disk| sights.get(&disk.id) == Some(&Sight::Up))
        };
        if !all_well(map) || slots_moving(map) > 0 || empty_disks(map).next().is_none() || self.pace.is_paused() {
            return;
        }
        let may = |newest: &ClusterMap| !held.is_lost() && began.elapsed() <= STALE && all_well(newest);
        let made = commit(&self.meta, |newest| match may(newest) {
            true => fill_empty(newest, &takers(newest, views, ceiling_percent)),
            false => Err(AwayError::Changed),
        });
        let told = match made.await {
            Ok(made) => {
                let slots = slots_moving(&made.after);
                tracing::info!(slots, epoch = made.after.epoch.0, "disks that hold nothing get their share");
                self.poke.notify_one();
                None
            }
            Err(CommitError::Refused(AwayError::Changed)) => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = told.as_ref().filter(|_| told != memory.told_of_share) {
            tracing::warn!(%error, "disks that hold nothing could not be given their share");
        }
        memory.told_of_share = told;
    }

    /// Notes what is dead and what went out, for status pages and the next holder of the lease.
    fn tell_of_disks(
        &self,
        map: &ClusterMap,
        (memory, returned): (&mut Memory, &Returned),
        mut why: BTreeMap<DiskId, Reason>,
    ) {
        for disk in memory.news(&why) {
            let why = why.get(&disk).map_or("", |why| &why.text);
            tracing::error!(%disk, why, "disk is dead and stays in service: what it held has a chunk less");
        }
        let now = Instant::now();
        let is_away = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.state == DiskState::Away);
        let recent: BTreeSet<DiskId> =
            memory.out.iter().filter(|(_, out)| memory.ago(out, now) < LIMIT_WINDOW).map(|(disk, _)| *disk).collect();
        memory.out.retain(|disk, _| is_away(disk) || recent.contains(disk));
        let serving = |disk: &DiskId| map.disk(*disk).is_some_and(|disk| disk.state.holds_slots());
        let dead = memory
            .clocks
            .unwell()
            .filter(|(disk, dead, sight)| serving(disk) && (*sight == Sight::Dead || *dead > Duration::ZERO));
        let dead_disks: Vec<DeadDisk> = dead
            .map(|(disk, dead, _)| DeadDisk {
                disk,
                dead_s: dead.as_secs(),
                stays: why.remove(&disk).map(|why| why.text),
            })
            .collect();
        let waits = lock(returned).clone();
        let mut away_disks: Vec<AwayDisk> = (memory.out.iter())
            .map(|(disk, out)| AwayDisk {
                disk: *disk,
                out_s: memory.ago(out, now).as_secs(),
                waits: waits.get(disk).cloned().flatten(),
            })
            .collect();
        // What counts for the limit is not to be cut off.
        away_disks.sort_by_key(|row| (row.out_s, row.disk));
        let mut status = lock(&self.status);
        (status.dead_disks, status.away_disks) = (dead_disks, away_disks);
    }

    /// Lets disks back in that answer again, once what only they hold was brought to others, and they are rid of the
    /// rest.
    pub(super) async fn return_loop(&self, returned: &Returned, held: &Held) {
        // Disks in service that still hold chunks of which the disks of their slots took no copy.
        let mut rests = Tries::default();
        let mut waits = Tries::default();
        loop {
            let answering: Vec<DiskId> = lock(returned).keys().copied().collect();
            waits.0.retain(|disk, _| answering.contains(disk));
            for disk in answering {
                // One that is known to wait for copies gets none while healing is paused.
                let is_held_up = self.pace.is_paused() && waits.0.contains_key(&disk);
                if is_held_up || !waits.is_due(disk, Instant::now()) {
                    continue;
                }
                let why = match self.clear_leftovers(disk, held).await {
                    Ok(Some(cleared)) if cleared.waits > 0 => {
                        let paused = if self.pace.is_paused() { ", for healing is paused" } else { "" };
                        let chunks = cleared.waits;
                        Some(format!("{chunks} chunks that it holds are not on the disks of their slots yet{paused}"))
                    }
                    Ok(Some(cleared)) => self.let_back_in(disk, &cleared, (returned, &mut rests), held).await,
                    Ok(None) => Some("it could not be looked through yet".to_owned()),
                    Err(error) => Some(format!("it could not be looked through yet: {error}")),
                };
                let Some(why) = why else {
                    waits.0.remove(&disk);
                    continue;
                };
                waits.failed(disk, Instant::now(), &self.backoff());
                if let Some(told) = lock(returned).get_mut(&disk).filter(|told| told.as_ref() != Some(&why)) {
                    tracing::info!(%disk, why, "disk answers again, and waits before it is let back in");
                    *told = Some(why);
                }
            }
            self.go_on_with(&mut rests, held).await;
            tokio::time::sleep(self.settings().interval).await;
        }
    }

    fn backoff(&self) -> Backoff {
        let settings = self.settings();
        Backoff { first: settings.first_backoff, longest: settings.longest_backoff }
    }

    /// Answers why it was not let in, if it may be.
    async fn let_back_in(
        &self,
        disk: DiskId,
        cleared: &Cleared,
        (returned, rests): (&Returned, &mut Tries),
        held: &Held,
    ) -> Option<String> {
        // It may have gone again meanwhile.
        let may = || !held.is_lost() && lock(returned).contains_key(&disk);
        if cleared.left > 0 {
            rests.0.insert(disk, (0, Instant::now()));
        }
        let made = commit(&self.meta, |newest| match may() {
            true => let_in(newest, disk),
            false => Err(AwayError::Changed),
        });
        match made.await {
            Ok(made) => {
                lock(returned).remove(&disk);
                add(&self.counters().disks_let_in, 1);
                tracing::info!(
                    %disk, epoch = made.after.epoch.0, chunks_deleted = cleared.deleted, chunks_to_copy = cleared.left,
                    "disk answers again and is back in service, without slots"
                );
                None
            }
            Err(CommitError::Refused(AwayError::Changed)) => None,
            Err(error) => Some(format!("the cluster map could not be changed: {error}")),
        }
    }

    /// Goes on copying from disks that were let in while the disks of some of their chunks took none. After a change of
    /// the lease the first sweep does.
    async fn go_on_with(&self, rests: &mut Tries, held: &Held) {
        let Some(map) = self.store.disks().map() else { return };
        rests.0.retain(|disk, _| map.disk(*disk).is_some_and(|disk| disk.state != DiskState::Out));
        let now = Instant::now();
        let due: Vec<DiskId> = rests.0.keys().copied().filter(|disk| rests.is_due(*disk, now)).collect();
        for disk in due {
            match self.bring_rest(disk, held).await {
                Ok(true) => drop(rests.0.remove(&disk)),
                Ok(false) | Err(_) => rests.failed(disk, Instant::now(), &self.backoff()),
            }
        }
    }
}

/// Asks every observer for every disk that is down, all at the same time: a look takes as long as one answer, however
/// many metadata disks there are. Answers what was said of each disk.
async fn ask_all<F: Future<Output = Option<Vec<Reach>>>>(
    observers: &[DiskId],
    down: &[DiskId],
    ask: impl Fn(DiskId, Vec<DiskId>) -> F,
) -> BTreeMap<DiskId, Vec<Reach>> {
    let asked = questions(observers, down).into_iter().map(|(observer, disks)| {
        let answer = ask(observer, disks.clone());
        async move { (disks, answer.await.unwrap_or_default()) }
    });
    let mut said: BTreeMap<DiskId, Vec<Reach>> = BTreeMap::new();
    for (disks, answers) in join_all(asked).await {
        disks.into_iter().zip(answers).for_each(|(disk, answer)| said.entry(disk).or_default().push(answer));
    }
    said
}

/// What is asked whom: each observer for all disks that are down, so many at a time.
fn questions(observers: &[DiskId], down: &[DiskId]) -> Vec<(DiskId, Vec<DiskId>)> {
    let parts = down.chunks(ASKED).flat_map(|part| observers.iter().map(move |observer| (*observer, part.to_vec())));
    parts.collect()
}

/// Takes in which disks may be let back in by now. Why one waits that has gone on answering stays known.
fn note_returned(returned: &Returned, back: Vec<DiskId>) {
    let mut returned = lock(returned);
    let mut before = std::mem::take(&mut *returned);
    *returned = back.into_iter().map(|disk| (disk, before.remove(&disk).flatten())).collect();
}

/// Who may take over slots, by what is known of the disks.
pub(crate) fn takers(map: &ClusterMap, views: &[DiskView], ceiling_percent: u64) -> Takers {
    let up: BTreeSet<DiskId> = views.iter().filter(|view| view.health == DiskHealth::Up).map(|view| view.id).collect();
    let rooms = views.iter().filter_map(|view| {
        let status = view.status.as_ref()?;
        let (capacity_bytes, free_bytes) = (status.capacity_bytes, status.free_bytes);
        Some((view.id, Room { capacity_bytes, free_bytes, chunk_bytes: status.chunk_bytes }))
    });
    Takers {
        unwell: map.disks.keys().copied().filter(|disk| !up.contains(disk)).collect(),
        rooms: rooms.collect(),
        ceiling_percent,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::form::tests::cluster;

    #[test]
    fn the_next_holder_knows_what_went_out_and_counts_what_nobody_wrote_down() {
        let mut map = cluster(9);
        for disk in [2, 3] {
            let takers = Takers { ceiling_percent: 90, ..Takers::default() };
            map = take_out(&map, DiskId(disk), &takers).unwrap();
        }
        let status = HealStatus {
            dead_disks: vec![DeadDisk { disk: DiskId(5), dead_s: 77, stays: None }],
            away_disks: vec![AwayDisk { disk: DiskId(2), out_s: 4000, waits: None }],
            ..HealStatus::default()
        };
        let memory = Memory::inherit(&serde_json::to_vec(&status).unwrap(), Some(&map));
        let dead: Vec<_> = memory.clocks.unwell().collect();
        assert_eq!(dead, [(DiskId(5), Duration::from_secs(77), Sight::Doubtful)]);
        let now = memory.begun + Duration::from_secs(10);
        let ago: Vec<_> = memory.out.iter().map(|(disk, out)| (disk.0, memory.ago(out, now).as_secs())).collect();
        assert_eq!(ago, [(2, 4010), (3, 10)]);
        assert!(Memory::inherit(b"no status", None).out.is_empty());
    }

    #[test]
    fn every_observer_is_asked_for_every_disk_that_is_down_however_many_they_are() {
        let down: Vec<DiskId> = (1..=150).map(DiskId).collect();
        let observers = [DiskId(200), DiskId(201), DiskId(202)];
        let asked = questions(&observers, &down);
        assert!(asked.iter().all(|(_, disks)| !disks.is_empty() && disks.len() <= 64), "no more are taken at once");
        for observer in observers {
            let of = asked.iter().filter(|(asked, _)| *asked == observer).flat_map(|(_, disks)| disks.iter().copied());
            assert_eq!(of.collect::<Vec<_>>(), down);
        }
        assert!(questions(&observers, &[]).is_empty());
    }

    #[tokio::test]
    async fn all_observers_are_asked_at_the_same_time_and_a_slow_one_keeps_nobody_else_waiting() {
        let observers: Vec<DiskId> = (1..=200).map(DiskId).collect();
        let down: Vec<DiskId> = (300..450).map(DiskId).collect();
        let (asked, answers) = (std::cell::Cell::new(0usize), tokio::sync::Semaphore::new(0));
        let ask = |observer: DiskId, disks: Vec<DiskId>| {
            let (asked, answers) = (&asked, &answers);
            async move {
                asked.set(asked.get() + 1);
                drop(answers.acquire().await.unwrap());
                // Every fourth does not answer.
                (!observer.0.is_multiple_of(4)).then(|| vec![Reach::Unreached; disks.len()])
            }
        };
        let mut looking = std::pin::pin!(ask_all(&observers, &down, ask));
        assert!(futures::poll!(&mut looking).is_pending());
        assert_eq!(asked.get(), 600, "nobody has answered yet");
        answers.add_permits(1);
        let said = looking.await;
        assert_eq!(said.keys().copied().collect::<Vec<_>>(), down);
        assert!(said.values().all(|said| *said == [Reach::Unreached; 150]));
    }

    #[test]
    fn time_that_does_not_count_is_told_once_and_only_while_something_is_dead() {
        let (mut memory, begun, second) = (Memory::inherit(b"", None), Instant::now(), Duration::from_secs(1));
        let dead = |sight| BTreeMap::from([(DiskId(1), Sight::Up), (DiskId(2), sight)]);
        // (when, is it dead, what is told)
        for (at, sight, told) in [
            (0, Sight::Dead, None),
            (5, Sight::Dead, None),
            (30, Sight::Up, None),
            (60, Sight::Dead, Some(30)),
            (90, Sight::Dead, None),
            (95, Sight::Dead, None),
            (120, Sight::Dead, Some(25)),
        ] {
            let news = memory.look(&dead(sight), begun + second * at, PAUSES[1], PAUSES[1]);
            assert_eq!(news.map(|gap| gap.as_secs()), told, "{at}");
        }
    }

    #[test]
    fn a_number_in_a_reason_that_changes_is_no_news() {
        let mut memory = Memory::inherit(b"", None);
        let limit = |recent| Stays::Limit { limit: 4, recent };
        let half = |silent| Stays::from(crate::ops::away::Half { silent, of: 9 });
        let mut news = |why: Stays| memory.news(&BTreeMap::from([(DiskId(3), why.into())])).len();
        let told = [limit(4), limit(5), half(5), half(6), limit(4)].map(&mut news);
        assert_eq!(told, [1, 0, 1, 0, 1]);
        assert!(memory.news(&BTreeMap::new()).is_empty());
        assert_eq!(memory.news(&BTreeMap::from([(DiskId(3), limit(4).into())])), [DiskId(3)], "it was well meanwhile");
    }

    #[test]
    fn what_fails_is_tried_less_and_less_often_and_why_a_disk_waits_stays_known() {
        let (mut tries, now, second) = (Tries::default(), Instant::now(), Duration::from_secs(1));
        let backoff = Backoff { first: second * 5, longest: second * 15 };
        assert!(tries.is_due(DiskId(3), now));
        for (fails_at, again_at) in [(0, 5), (5, 15), (15, 30), (30, 45)] {
            tries.failed(DiskId(3), now + second * fails_at, &backoff);
            let due = |at: u32, tries: &Tries| tries.is_due(DiskId(3), now + second * at);
            assert!(!due(again_at - 1, &tries) && due(again_at, &tries), "{fails_at}");
        }
        let returned = Returned::default();
        note_returned(&returned, vec![DiskId(3), DiskId(4)]);
        lock(&returned).insert(DiskId(3), Some("why".to_owned()));
        note_returned(&returned, vec![DiskId(3)]);
        assert_eq!(*lock(&returned), BTreeMap::from([(DiskId(3), Some("why".to_owned()))]));
        note_returned(&returned, vec![]);
        note_returned(&returned, vec![DiskId(3)]);
        assert_eq!(*lock(&returned), BTreeMap::from([(DiskId(3), None)]), "it has gone meanwhile");
    }

    #[test]
    fn what_went_out_unseen_counts_and_no_old_judgement_is_acted_on() {
        let (seen, takers) = (cluster(9), Takers { ceiling_percent: 90, ..Takers::default() });
        let (mut memory, begun) = (Memory::inherit(b"", Some(&seen)), Instant::now());
        for look in 0..=2u32 {
            let sight = |disk: DiskId| if [3, 4].contains(&disk.0) { Sight::Dead } else { Sight::Up };
            let sights = seen.disks.keys().map(|disk| (*disk, sight(*disk))).collect();
            memory.clocks.look(&sights, begun + Duration::from_secs(5) * look, PAUSES[1], PAUSES[1]);
        }
        let rules = Rules { out_after: PAUSES[1], limit_percent: Some(10), well_after: PAUSES[1] };
        let may = |newest: &ClusterMap, age| memory.may_go(DiskId(3), (&seen, newest), age, &rules);
        assert!(may(&seen, STALE));
        assert!(!may(&seen, STALE + Duration::from_millis(1)));
        // The answer to a change of the map was lost, and another disk is away by the newest one: that makes one.
        let newest = take_out(&seen, DiskId(4), &takers).unwrap();
        assert_eq!((memory.recent(&seen, Instant::now()), memory.recent(&newest, Instant::now())), (0, 1));
        assert!(!may(&newest, Duration::ZERO));
    }
}
