//! Which shards sleep, as values: no I/O, no clock of its own.
//!
//! A shard with nothing to do costs its disks some 20 timer ticks a second each and its leader four heartbeats a second
//! to each follower. So a shard whose log has not grown for a while sleeps: all its replicas stop their Raft timers.
//! What stands for its heartbeats is one message between two disks, [`LinkBeat`], for all shards that they share.
//!
//! - A leader whose log rests, applied everywhere, names the shard in its beats. A follower that stands at the same
//!   term and index stops its timers and agrees. When every other member has agreed, the leader stops its own.
//! - A follower wakes when a beat does not name the shard any more, when no beat came for [`SleepTiming::lost`], and
//!   when a Raft message with entries, of another leader, or of a candidate arrives. Awake, it holds an election at
//!   once, unless the leader speaks first.
//! - A leader wakes before it proposes anything, and when a member does not agree any more or its link is lost.
//!
//! Timers are all that sleeps. What a command or a read rests on, a majority asked anew each time, is the same asleep
//! and awake; so a mistake here costs time, never data.

use crate::message::{Asleep, LinkBeat};
use granary_placement::id::{DiskId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How a replica rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Its timers run.
    Awake,
    /// It leads in this term, and its timers stand still.
    Leading {
        /// The term.
        term: u64,
    },
    /// It follows that leader of that term, and its timers stand still.
    Following {
        /// The leader.
        leader: DiskId,
        /// The term.
        term: u64,
    },
}

/// What is known of a replica here, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its shard.
    pub shard: ShardId,
    /// Its Raft tasks run.
    pub running: bool,
    /// It leads.
    pub leads: bool,
    /// Who leads, as far as it knows.
    pub leader: Option<DiskId>,
    /// Its term.
    pub term: u64,
    /// Last index of its log.
    pub last: u64,
    /// Last index it applied.
    pub applied: u64,
    /// As leader: its members are not being changed, and each has all of the log.
    pub settled: bool,
    /// The members beside this disk.
    pub others: BTreeSet<DiskId>,
    /// How it rests.
    pub rest: Rest,
    /// Commands it was given since it was opened.
    pub commands: u64,
}

/// Durations of sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SleepTiming {
    /// A shard sleeps when its log has not grown for so long.
    pub after: Duration,
    /// A link without a beat for so long is lost.
    pub lost: Duration,
}

/// What to do with a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Stop the timers of this leader, if it was given no command beyond these.
    SleepAsLeader(Asleep, u64),
    /// Stop the timers of this follower of that leader.
    SleepAsFollower(Asleep, DiskId),
    /// Start its timers; why, for the log.
    Wake(ShardId, &'static str),
}

/// A led shard whose log rests.
#[derive(Debug)]
struct Resting {
    at: Asleep,
    commands: u64,
    since: Instant,
    /// Long enough: it is named in beats.
    named: bool,
    agreed: BTreeSet<DiskId>,
}

#[derive(Debug)]
struct Link {
    heard: Instant,
    /// What the last beat from there named and the replica here agreed to.
    agreed: Vec<Asleep>,
}

/// What a disk knows about sleep.
#[derive(Debug)]
pub struct Sleepers {
    timing: SleepTiming,
    links: BTreeMap<DiskId, Link>,
    resting: BTreeMap<ShardId, Resting>,
}

/// May a leader's shard sleep, length of its rest aside? The root shard never does: every change of the cluster begins
/// there.
fn leader_may_sleep(facts: &Facts) -> bool {
    facts.shard != ShardId::ROOT
        && facts.running
        && facts.leads
        && facts.settled
        && facts.applied == facts.last
        && facts.last > 0
}

/// Does a follower stand where its leader says that the shard sleeps?
fn follower_agrees(facts: &Facts, leader: DiskId, named: &Asleep) -> bool {
    facts.shard != ShardId::ROOT
        && facts.running
        && !facts.leads
        && facts.leader == Some(leader)
        && (facts.term, facts.last, facts.applied) == (named.term, named.index, named.index)
}

impl Sleepers {
    /// Nothing is known yet.
    pub fn new(timing: SleepTiming) -> Sleepers {
        Sleepers { timing, links: BTreeMap::new(), resting: BTreeMap::new() }
    }

    /// Disks to exchange beats with: all that hold a replica of a shard that may sleep.
    pub fn peers(facts: &[Facts]) -> BTreeSet<DiskId> {
        let others = facts.iter().filter(|facts| facts.shard != ShardId::ROOT && facts.running);
        others.flat_map(|facts| facts.others.iter().copied()).collect()
    }

    fn lost(&self, peer: DiskId, now: Instant) -> bool {
        self.links.get(&peer).is_none_or(|link| now.saturating_duration_since(link.heard) >= self.timing.lost)
    }

    /// Looks at all replicas of this disk. To be called at each beat.
    pub fn observe(&mut self, now: Instant, all: &[Facts]) -> Vec<Action> {
        let peers = Self::peers(all);
        self.links.retain(|peer, _| peers.contains(peer));
        let mut actions = Vec::new();
        let mut may_sleep = BTreeSet::new();
        for facts in all {
            if leader_may_sleep(facts) {
                may_sleep.insert(facts.shard);
                self.observe_resting(now, facts);
            }
            match facts.rest {
                Rest::Awake => actions.extend(self.sleep_of_leader(facts)),
                Rest::Leading { term } => {
                    if !may_sleep.contains(&facts.shard) || facts.term != term {
                        actions.push(Action::Wake(facts.shard, "it does not lead a shard at rest any more"));
                    } else if facts.others.iter().any(|peer| self.lost(*peer, now)) {
                        actions.push(Action::Wake(facts.shard, "the link to a member is lost"));
                    }
                }
                Rest::Following { leader, term } => {
                    if !facts.running || facts.leader != Some(leader) || facts.term != term {
                        actions.push(Action::Wake(facts.shard, "its leader changed"));
                    } else if self.lost(leader, now) {
                        actions.push(Action::Wake(facts.shard, "the link to its leader is lost"));
                    }
                }
            }
        }
        self.resting.retain(|shard, _| may_sleep.contains(shard));
        actions
    }

    /// Notes since when a led shard rests.
    fn observe_resting(&mut self, now: Instant, facts: &Facts) {
        let at = Asleep { shard: facts.shard, term: facts.term, index: facts.last };
        let begin = |commands| Resting { at, commands, since: now, named: false, agreed: BTreeSet::new() };
        let resting = self.resting.entry(facts.shard).or_insert_with(|| begin(facts.commands));
        if resting.at != at || resting.commands != facts.commands {
            *resting = begin(facts.commands);
        }
        resting.named = now.saturating_duration_since(resting.since) >= self.timing.after;
        resting.agreed.retain(|peer| facts.others.contains(peer));
    }

    /// An awake leader may sleep when all others have agreed.
    fn sleep_of_leader(&self, facts: &Facts) -> Option<Action> {
        let resting = self.resting.get(&facts.shard)?;
        let agreed = facts.rest == Rest::Awake && resting.named && facts.others.is_subset(&resting.agreed);
        agreed.then_some(Action::SleepAsLeader(resting.at, resting.commands))
    }

    /// What to tell a peer.
    pub fn beat_for(&self, peer: DiskId, all: &[Facts]) -> LinkBeat {
        let named = |facts: &Facts| {
            let resting = self.resting.get(&facts.shard)?;
            (resting.named && resting.commands == facts.commands && facts.others.contains(&peer)).then_some(resting.at)
        };
        LinkBeat {
            asleep: all.iter().filter_map(named).collect(),
            agreed: self.links.get(&peer).map(|link| link.agreed.clone()).unwrap_or_default(),
            clock_ms: 0,
            is_full: false,
        }
    }

    /// Takes a peer's beat, whether it was sent by itself or as an answer.
    pub fn take(&mut self, now: Instant, from: DiskId, beat: &LinkBeat, all: &[Facts]) -> Vec<Action> {
        if !Self::peers(all).contains(&from) {
            return Vec::new();
        }
        let mut actions = Vec::new();
        let mut agreed = Vec::new();
        for facts in all {
            let named = beat.asleep.iter().find(|named| named.shard == facts.shard);
            match named.filter(|named| follower_agrees(facts, from, named)) {
                Some(named) => {
                    agreed.push(*named);
                    if facts.rest == Rest::Awake {
                        actions.push(Action::SleepAsFollower(*named, from));
                    }
                }
                None if matches!(facts.rest, Rest::Following { leader, .. } if leader == from) => {
                    actions.push(Action::Wake(facts.shard, "its leader does not call it asleep any more"));
                }
                None => {}
            }
            actions.extend(self.take_agreement(from, beat, facts));
        }
        self.links.insert(from, Link { heard: now, agreed });
        actions
    }

    /// What a beat says about a shard that is led here.
    fn take_agreement(&mut self, from: DiskId, beat: &LinkBeat, facts: &Facts) -> Option<Action> {
        if !facts.others.contains(&from) {
            return None;
        }
        let resting = self.resting.get_mut(&facts.shard)?;
        if beat.agreed.contains(&resting.at) {
            resting.agreed.insert(from);
            return self.sleep_of_leader(facts);
        }
        resting.agreed.remove(&from);
        matches!(facts.rest, Rest::Leading { .. })
            .then_some(Action::Wake(facts.shard, "a member does not agree any more"))
    }
}

#[cfg(test)]
mod tests;
