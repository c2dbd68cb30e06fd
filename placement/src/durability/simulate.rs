//! The same cluster played through: disks and servers die by chance, chunks are rebuilt, errors come and are scrubbed.
//!
//! Nothing is taken from the chains but the times of repair: who shares a group with whom, what is lost together, and
//! which chunk is missing for what reason is kept disk by disk and slot by slot. Meant for rates so high that losses
//! are frequent. A group or shard that is lost begins anew, so that the next loss can be counted.

use super::input::{Cluster, DurabilityError, HOURS_PER_YEAR};
use super::layout::Groups;
use super::random::Random;
use std::collections::BTreeSet;

/// Stretches of time whose losses are compared to find the statistical error.
const STRETCHES: usize = 40;

/// A rate and how far by chance it may be off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Per year.
    pub per_year: f64,
    /// Its standard error.
    pub error: f64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulated {
    /// Moments in which at least one extent was lost, from data alone.
    pub any_data: Estimate,
    /// Losses of a group or of one of its extents, per extent.
    pub given_data: Estimate,
    /// Losses of all voters, per shard.
    pub metadata_lost: Estimate,
    /// Losses of a majority, per shard.
    pub metadata_blocked: Estimate,
    /// Losses of any kind that were seen.
    pub losses: u64,
}

/// Why a chunk is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    There,
    WithDisk,
    WithServer,
}

/// Plays `years` years.
///
/// Shards have voters on disks of their own, each in a server of its own.
///
/// # Errors
/// An input that cannot be, or groups that are not those of the cluster's layout.
pub fn simulate(cluster: &Cluster, groups: &Groups, years: f64, seed: u64) -> Result<Simulated, DurabilityError> {
    cluster.validate()?;
    super::input::within("the years to simulate", years, 1e-6, 1e12)?;
    if groups.layout()? != cluster.layout {
        return Err(DurabilityError::Layout("the groups are not those that were counted"));
    }
    let mut run = Run::new(cluster, groups, Random::new(seed));
    let stretch = years * HOURS_PER_YEAR / STRETCHES as f64;
    let counts: Vec<Counts> = (0..STRETCHES).map(|_| run.play(stretch)).collect();
    let extents = cluster.layout.groups as f64 * run.extents as f64;
    let shards = f64::from(cluster.metadata.shards);
    let estimate = |of: &dyn Fn(&Counts) -> f64| {
        let rates: Vec<f64> = counts.iter().map(|count| of(count) * HOURS_PER_YEAR / stretch).collect();
        let mean = rates.iter().sum::<f64>() / STRETCHES as f64;
        let square: f64 = rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        Estimate { per_year: mean, error: (square / ((STRETCHES - 1) * STRETCHES) as f64).sqrt() }
    };
    Ok(Simulated {
        any_data: estimate(&|count| count.moments),
        given_data: estimate(&|count| count.extents / extents),
        metadata_lost: estimate(&|count| count.shards_lost / shards),
        metadata_blocked: estimate(&|count| count.shards_blocked / shards),
        losses: counts.iter().map(|count| count.moments + count.shards_lost).sum::<f64>() as u64,
    })
}

#[derive(Default)]
struct Counts {
    moments: f64,
    extents: f64,
    shards_lost: f64,
    shards_blocked: f64,
}

struct Run<'c> {
    cluster: &'c Cluster,
    groups: &'c Groups,
    random: Random,
    extents: usize,
    /// (group, slot) of each disk.
    slots_of: Vec<Vec<(usize, usize)>>,
    disks_of: Vec<Vec<usize>>,
    chunks: Vec<Vec<Chunk>>,
    /// Missing chunks of each group, with their disks and with their servers.
    missing: Vec<[usize; 2]>,
    /// Groups that miss more than one chunk.
    urgent: BTreeSet<usize>,
    /// Disks and servers of which slots are missing.
    lost_disks: Vec<usize>,
    lost_servers: Vec<usize>,
    /// Bad chunks: (group, extent, slot).
    bad: Vec<(usize, usize, usize)>,
    /// Voters that each shard lacks.
    lacking: Vec<usize>,
    counts: Counts,
}

impl<'c> Run<'c> {
    fn new(cluster: &'c Cluster, groups: &'c Groups, random: Random) -> Run<'c> {
        let disks = groups.server_of.len();
        let mut slots_of = vec![Vec::new(); disks];
        for (number, group) in groups.groups.iter().enumerate() {
            for (slot, disk) in group.iter().enumerate() {
                slots_of[*disk].push((number, slot));
            }
        }
        let mut disks_of = vec![Vec::new(); groups.server_of.iter().max().map_or(0, |most| most + 1)];
        for (disk, server) in groups.server_of.iter().enumerate() {
            disks_of[*server].push(disk);
        }
        Run {
            cluster,
            groups,
            random,
            extents: cluster.latent.extents_per_group.round() as usize,
            slots_of,
            disks_of,
            chunks: vec![vec![Chunk::There; cluster.layout.width]; groups.groups.len()],
            missing: vec![[0, 0]; groups.groups.len()],
            urgent: BTreeSet::new(),
            lost_disks: Vec::new(),
            lost_servers: Vec::new(),
            bad: Vec::new(),
            lacking: vec![0; cluster.metadata.shards as usize],
            counts: Counts::default(),
        }
    }

    /// Plays so many hours and returns what was lost.
    fn play(&mut self, hours: f64) -> Counts {
        let cluster = self.cluster;
        let (disks, servers) = (self.slots_of.len(), self.disks_of.len());
        let all_chunks = (self.groups.groups.len() * self.extents * cluster.layout.width) as f64;
        let voter_rate = cluster.disk_rate() + cluster.server_rate();
        let shards = self.lacking.len();
        let voters = cluster.metadata.voters as usize;
        let mut now = 0.0;
        loop {
            let urgent: f64 = self.urgent.iter().map(|group| self.urgent_rate(*group)).sum();
            let shard_repairs: f64 = self.lacking.iter().map(|lacking| self.shard_rate(*lacking)).sum();
            let rates = [
                disks as f64 * cluster.disk_rate(),
                servers as f64 * cluster.server_rate(),
                self.lost_disks.len() as f64 / cluster.hours_after_disk(1),
                self.lost_servers.len() as f64 / cluster.hours_after_server(1),
                urgent,
                all_chunks * cluster.latent_rate(),
                self.bad.len() as f64 / cluster.latent_hours(),
                (shards * voters) as f64 * voter_rate,
                shard_repairs,
            ];
            let total: f64 = rates.iter().sum();
            now += if total > 0.0 { self.random.wait(total) } else { hours };
            if now >= hours {
                return std::mem::take(&mut self.counts);
            }
            match pick(&mut self.random, &rates) {
                0 => self.lose_disk(),
                1 => self.lose_server(),
                2 => self.disk_is_back(),
                3 => self.server_is_back(),
                4 => self.rebuild_urgent(urgent),
                5 => self.chunk_goes_bad(),
                6 => self.scrub(),
                7 => self.lose_voter(),
                _ => self.repair_shard(shard_repairs),
            }
        }
    }

    fn lose_disk(&mut self) {
        let disk = self.random.below(self.slots_of.len());
        self.take(&[disk], Chunk::WithDisk);
        if !self.lost_disks.contains(&disk) {
            self.lost_disks.push(disk);
        }
    }

    fn lose_server(&mut self) {
        let server = self.random.below(self.disks_of.len());
        let disks = self.disks_of[server].clone();
        self.take(&disks, Chunk::WithServer);
        if !self.lost_servers.contains(&server) {
            self.lost_servers.push(server);
        }
    }

    /// All chunks that are there on these disks are gone at once.
    fn take(&mut self, disks: &[usize], why: Chunk) {
        let slots: Vec<(usize, usize)> = disks.iter().flat_map(|disk| &self.slots_of[*disk]).copied().collect();
        for &(group, slot) in &slots {
            if self.chunks[group][slot] == Chunk::There {
                self.chunks[group][slot] = why;
                self.missing[group][usize::from(why == Chunk::WithServer)] += 1;
                if self.missing[group][0] + self.missing[group][1] > 1 {
                    self.urgent.insert(group);
                }
            }
        }
        let gone: BTreeSet<(usize, usize)> = slots.iter().copied().collect();
        self.bad.retain(|(group, _, slot)| !gone.contains(&(*group, *slot)));
        let touched: BTreeSet<usize> = slots.iter().map(|(group, _)| *group).collect();
        self.count_losses(&touched);
    }

    /// Counts what is lost in these groups at this moment.
    fn count_losses(&mut self, touched: &BTreeSet<usize>) {
        let mut lost = 0.0;
        for &group in touched {
            let missing = self.missing[group][0] + self.missing[group][1];
            let m = usize::from(self.cluster.scheme.m);
            if missing > m {
                lost += self.extents as f64;
            } else {
                let of_group = self.bad.iter().filter(|(other, ..)| *other == group);
                let mut extents: Vec<usize> = of_group.map(|(_, extent, _)| *extent).collect();
                extents.sort_unstable();
                let dead = extents.chunk_by(|a, b| a == b).filter(|bad| missing + bad.len() > m).count();
                if dead == 0 {
                    continue;
                }
                lost += dead as f64;
            }
            self.begin_anew(group);
        }
        self.counts.extents += lost;
        self.counts.moments += f64::from(u8::from(lost > 0.0));
    }

    fn begin_anew(&mut self, group: usize) {
        self.chunks[group].fill(Chunk::There);
        self.missing[group] = [0, 0];
        self.urgent.remove(&group);
        self.bad.retain(|(other, ..)| *other != group);
    }

    fn give_back(&mut self, (group, slot): (usize, usize)) {
        let kind = usize::from(self.chunks[group][slot] == Chunk::WithServer);
        self.missing[group][kind] -= 1;
        self.chunks[group][slot] = Chunk::There;
        if self.missing[group][0] + self.missing[group][1] < 2 {
            self.urgent.remove(&group);
        }
    }

    fn disk_is_back(&mut self) {
        let place = self.random.below(self.lost_disks.len());
        let disk = self.lost_disks.swap_remove(place);
        self.give_all_back(&[disk], Chunk::WithDisk);
    }

    fn server_is_back(&mut self) {
        let place = self.random.below(self.lost_servers.len());
        let server = self.lost_servers.swap_remove(place);
        let disks = self.disks_of[server].clone();
        self.give_all_back(&disks, Chunk::WithServer);
    }

    fn give_all_back(&mut self, disks: &[usize], why: Chunk) {
        let slots: Vec<(usize, usize)> = disks.iter().flat_map(|disk| &self.slots_of[*disk]).copied().collect();
        for (group, slot) in slots {
            if self.chunks[group][slot] == why {
                self.give_back((group, slot));
            }
        }
    }

    /// How much sooner than with their disk or server a group's chunks come back because it misses many.
    fn urgent_rates(&self, group: usize) -> [f64; 2] {
        let [disks, servers] = self.missing[group];
        let sooner = |hours: &dyn Fn(usize) -> f64| 1.0 / hours(disks + servers) - 1.0 / hours(1);
        [
            disks as f64 * sooner(&|missing| self.cluster.hours_after_disk(missing)).max(0.0),
            servers as f64 * sooner(&|missing| self.cluster.hours_after_server(missing)).max(0.0),
        ]
    }

    fn urgent_rate(&self, group: usize) -> f64 {
        self.urgent_rates(group).iter().sum()
    }

    fn rebuild_urgent(&mut self, all: f64) {
        let mut left = self.random.unit() * all;
        let mut chosen = None;
        for &group in &self.urgent {
            let rate = self.urgent_rate(group);
            if rate > 0.0 {
                chosen = Some(group);
            }
            left -= rate;
            if left <= 0.0 {
                break;
            }
        }
        let Some(group) = chosen else { return };
        let rates = self.urgent_rates(group);
        let why = [Chunk::WithDisk, Chunk::WithServer][pick(&mut self.random, &rates)];
        let slots: Vec<usize> = (0..self.chunks[group].len()).filter(|slot| self.chunks[group][*slot] == why).collect();
        let slot = slots[self.random.below(slots.len())];
        self.give_back((group, slot));
    }

    fn chunk_goes_bad(&mut self) {
        let group = self.random.below(self.groups.groups.len());
        let (extent, slot) = (self.random.below(self.extents), self.random.below(self.chunks[group].len()));
        let entry = (group, extent, slot);
        if self.chunks[group][slot] == Chunk::There && !self.bad.contains(&entry) {
            self.bad.push(entry);
            self.count_losses(&BTreeSet::from([group]));
        }
    }

    fn scrub(&mut self) {
        let place = self.random.below(self.bad.len());
        self.bad.swap_remove(place);
    }

    fn shard_rate(&self, lacking: usize) -> f64 {
        let meta = self.cluster.metadata;
        if lacking > (meta.voters as usize - 1) / 2 {
            1.0 / meta.operator_hours
        } else {
            lacking as f64 / meta.repair_hours
        }
    }

    fn lose_voter(&mut self) {
        let (shards, voters) = (self.lacking.len(), self.cluster.metadata.voters as usize);
        let (shard, voter) = (self.random.below(shards), self.random.below(voters));
        // Those that are lost already are the first.
        if voter < self.lacking[shard] {
            return;
        }
        self.lacking[shard] += 1;
        self.counts.shards_blocked += f64::from(u8::from(self.lacking[shard] == voters.div_ceil(2)));
        if self.lacking[shard] == voters {
            self.counts.shards_lost += 1.0;
            self.lacking[shard] = 0;
        }
    }

    fn repair_shard(&mut self, all: f64) {
        let mut left = self.random.unit() * all;
        let mut chosen = None;
        for (shard, &lacking) in self.lacking.iter().enumerate().filter(|(_, lacking)| **lacking > 0) {
            chosen = Some(shard);
            left -= self.shard_rate(lacking);
            if left <= 0.0 {
                break;
            }
        }
        let Some(shard) = chosen else { return };
        let by_operator = self.lacking[shard] > (self.cluster.metadata.voters as usize - 1) / 2;
        self.lacking[shard] = if by_operator { 0 } else { self.lacking[shard] - 1 };
    }
}

/// One of several by their rates.
fn pick(random: &mut Random, rates: &[f64]) -> usize {
    let mut left = random.unit() * rates.iter().sum::<f64>();
    let mut last = 0;
    for (number, rate) in rates.iter().enumerate().filter(|(_, rate)| **rate > 0.0) {
        last = number;
        left -= rate;
        if left <= 0.0 {
            break;
        }
    }
    last
}
