//! The chains and the simulation say the same of the same cluster, within the simulation's own statistical error.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod durability_support;

use durability_support::{cluster, scheme};
use granary_placement::durability::{report, simulate, Cause, Cluster, Estimate, Groups, HOURS_PER_YEAR};
use granary_placement::scheme::Scheme;

/// How far by chance an estimate may be from what it estimates, in standard errors. All comparisons of a run together
/// stay within this in all but one of some thousand seeds.
const ERRORS: f64 = 4.0;

/// SplitMix64, to lay out groups.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }
}

/// Groups by chance with one chunk on a server.
fn groups(servers: usize, disks_per_server: usize, count: usize, width: usize, seed: u64) -> Groups {
    let mut random = Random(seed);
    let mut group = || {
        let mut chosen: Vec<usize> = (0..servers).collect();
        (0..servers).for_each(|place| chosen.swap(place, place + random.below(servers - place)));
        let disks = chosen.iter().take(width).map(|server| server * disks_per_server + random.below(disks_per_server));
        disks.collect()
    };
    let groups = (0..count).map(|_| group()).collect();
    Groups { groups, server_of: (0..servers * disks_per_server).map(|disk| disk / disks_per_server).collect() }
}

fn accelerated(scheme: Scheme, groups: &Groups) -> Cluster {
    let mut cluster = cluster(scheme, groups.layout().unwrap());
    // Once in 10,000 hours: so often that groups are lost every few months, so seldom that hardly ever two different
    // ones are lost at once, which the chains count as two.
    cluster.failures.disk_afr = -(-HOURS_PER_YEAR / 10_000.0).exp_m1();
    cluster.repair.grace_hours = 40.0;
    cluster.repair.disk_hours = 110.0;
    cluster.repair.slot_hours = 20.0;
    cluster.repair.server_hours = 200.0;
    cluster.latent.extents_per_group = 1.0;
    cluster.metadata.shards = 20;
    cluster.metadata.repair_hours = 1_500.0;
    cluster.metadata.operator_hours = 3_000.0;
    cluster
}

fn agree(what: &str, seed: u64, found: Estimate, expected: f64, percent: f64) {
    let off = (found.per_year - expected).abs();
    println!("seed {seed}: {what}: simulated {:e} ± {:e}, by the chains {expected:e}", found.per_year, found.error);
    assert!(found.error < percent / 100.0 * expected, "{what}, seed {seed}: too few losses to tell: {found:?}");
    assert!(off < ERRORS * found.error, "{what}, seed {seed}: simulated {found:?}, by the chains {expected}");
}

fn data(causes: granary_placement::durability::Causes) -> f64 {
    causes.total() - causes.of(Cause::Metadata)
}

#[test]
fn the_chains_and_the_simulation_agree_on_disks_servers_latent_errors_and_metadata() {
    type Change = fn(&mut Cluster);
    let all = |cluster: &mut Cluster| {
        cluster.failures.server_losses_per_year = 0.2;
        cluster.latent.errors_per_disk_year = 4.0;
        cluster.latent.scrub_hours = 30.0;
    };
    let settings: [(&str, u64, Change); 4] = [
        ("disks", 11, |_| ()),
        ("disks and servers", 12, |cluster| cluster.failures.server_losses_per_year = 0.3),
        ("disks and latent errors", 13, |cluster| {
            cluster.latent.errors_per_disk_year = 6.0;
            cluster.latent.scrub_hours = 30.0;
        }),
        ("disks, servers and latent errors", 14, all),
    ];
    for (what, seed, change) in settings {
        let groups = groups(30, 3, 40, 6, seed);
        let mut cluster = accelerated(scheme(4, 2), &groups);
        change(&mut cluster);
        let (found, expected) = (simulate(&cluster, &groups, 4_000.0, seed).unwrap(), report(&cluster).unwrap());
        agree(&format!("{what}: given"), seed, found.given_data, data(expected.given_causes), 5.0);
        agree(&format!("{what}: any"), seed, found.any_data, data(expected.any_causes), 5.0);
        let lost = expected.given_causes.of(Cause::Metadata);
        agree(&format!("{what}: metadata lost"), seed, found.metadata_lost, lost, 10.0);
    }
}
