//! The durability model by itself: known figures, very small numbers, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod durability_support;

use durability_support::{cluster, scheme};
use granary_placement::durability::{
    assumptions, report, Cause, Cluster, DurabilityError, Layout, Loss, HOURS_PER_YEAR,
};

/// A single group of independent disks that is repaired at one pace however urgent: the textbook's chain.
fn textbook(k: u8, m: u8, afr: f64, hours: f64) -> Cluster {
    let mut cluster = cluster(scheme(k, m), Layout::mixed(1000, 1000, 1, usize::from(k + m), 1));
    cluster.failures.disk_afr = afr;
    cluster.repair.grace_hours = 0.0;
    cluster.repair.disk_hours = hours;
    cluster.repair.slot_hours = hours;
    cluster.repair.server_hours = hours;
    cluster
}

fn data_nines(cluster: &Cluster) -> f64 {
    let causes = report(cluster).unwrap().given_causes;
    Loss::of_rate(causes.total() - causes.of(Cause::Metadata)).nines
}

#[test]
fn nines_of_a_group_are_those_of_the_textbook() {
    // Solved apart from this code, in exact fractions, for the chain that loses a group of N disks at (N-i) lambda and
    // repairs it at i/T.
    for (k, m, afr, hours, nines) in [
        (2, 1, 0.0136, 6.0, 6.1),
        (4, 2, 0.0136, 6.0, 10.1),
        (4, 2, 0.0136, 24.0, 8.9),
        (4, 2, 0.0136, 156.0, 7.3),
        (8, 3, 0.0136, 24.0, 12.0),
        (8, 3, 0.03, 24.0, 10.6),
        (8, 4, 0.0136, 6.0, 18.4),
        (17, 3, 0.0136, 156.0, 8.4),
    ] {
        let found = data_nines(&textbook(k, m, afr, hours));
        assert!((found - nines).abs() < 0.06, "{k}+{m}, {afr}, {hours} h: {found}, not {nines}");
    }
}

#[test]
fn a_latent_error_is_met_as_often_as_m_disks_are_lost_and_one_is_there() {
    for (k, m) in [(2u8, 1u8), (4, 2), (8, 3)] {
        let mut cluster = textbook(k, m, 0.0136, 24.0);
        // Errors so rare that two of them never meet, and scrubs so far apart that few come during a repair.
        cluster.latent.scrub_hours = 8760.0;
        cluster.latent.extents_per_group = 1.0;
        let share = 1e-9;
        let per_hour = share / (cluster.latent.scrub_hours / 2.0);
        cluster.latent.errors_per_disk_year = per_hour * HOURS_PER_YEAR * cluster.layout.slots_per_disk();
        let rate = -(-0.0136f64).ln_1p() / HOURS_PER_YEAR;
        let n = f64::from(k + m);
        let ways: f64 = (0..m).map(|i| (n - f64::from(i)) / f64::from(i + 1)).product();
        let m_missing = ways * f64::from(m) * rate.powi(m.into()) * 24f64.powi(i32::from(m) - 1) * HOURS_PER_YEAR;
        let right = m_missing * f64::from(k) * share;
        let found = report(&cluster).unwrap();
        let given = found.given_causes.of(Cause::LatentErrors);
        assert!((given / right - 1.0).abs() < 0.02, "{k}+{m}: {given:e} is not {right:e}");
        // With many extents the first to be hit counts: as many times more while errors are rare, and no more often
        // than M disks are lost when they are not.
        cluster.latent.extents_per_group = 1000.0;
        cluster.latent.errors_per_disk_year *= 1000.0;
        let any = report(&cluster).unwrap().any_causes.of(Cause::LatentErrors);
        assert!((any / right / 1000.0 - 1.0).abs() < 0.02, "{k}+{m}: {any:e} is not a thousand times {right:e}");
        cluster.latent.extents_per_group = 1e10;
        cluster.latent.errors_per_disk_year *= 1e7;
        let any = report(&cluster).unwrap().any_causes.of(Cause::LatentErrors);
        assert!((any / m_missing - 1.0).abs() < 0.02, "{k}+{m}: {any:e} is not {m_missing:e}");
    }
}

#[test]
fn rates_of_1e_20_and_below_are_right_to_six_digits() {
    for (k, m, afr) in [(8u8, 3u8, 1e-4), (8, 4, 1e-5), (16, 8, 1e-3), (4, 2, 1e-9)] {
        let cluster = textbook(k, m, afr, 1.0);
        let found = report(&cluster).unwrap().given_causes.of(Cause::Disks);
        // While losses are rare: M of the others are missing at once, and one more goes.
        let rate = -(-afr).ln_1p() / HOURS_PER_YEAR;
        let n = f64::from(k + m);
        let ways: f64 = (0..m).map(|i| (n - f64::from(i)) / f64::from(i + 1)).product();
        let right = ways * rate.powi(m.into()) * f64::from(k) * rate * HOURS_PER_YEAR;
        assert!(right < 1e-18 && (found / right - 1.0).abs() < 1e-5, "{k}+{m}: {found:e} is not {right:e}");
    }
    let tiny = Loss::of_rate(1e-20);
    assert_eq!((tiny.probability, tiny.nines, tiny.mttdl_years), (1e-20, 20.0, 1e20));
    let certain = Loss::of_rate(1e6);
    assert_eq!((certain.probability, certain.nines), (1.0, 0.0));
    assert_eq!(Loss::of_rate(0.0).nines, f64::INFINITY);
}

#[test]
fn what_comes_first_is_rebuilt_first_and_that_gives_nines() {
    let mut cluster = textbook(8, 3, 0.014, 24.0);
    cluster.layout = Layout::mixed(1000, 1000, 4545, 11, 1);
    let alike = report(&cluster).unwrap();
    cluster.repair.slot_hours = 0.5;
    let urgent = report(&cluster).unwrap();
    // With 1,000 disks two of them share one slot in a hundred: the second and third loss meet 48 times less.
    let gain = alike.given_causes.of(Cause::Disks) / urgent.given_causes.of(Cause::Disks);
    assert!((1000.0..48.0 * 48.0).contains(&gain), "{gain}");
}

#[test]
fn everything_is_lost_as_often_as_a_group_times_how_many_differ() {
    // Ten disks: all groups lie on the same ten, so they are lost together.
    let mut one = textbook(8, 2, 0.014, 24.0);
    one.layout = Layout::mixed(10, 10, 500, 10, 1);
    let small = report(&one).unwrap();
    let (any, given) = (small.any_causes.of(Cause::Disks), small.given_causes.of(Cause::Disks));
    assert!((any / given - 1.0).abs() < 1e-9, "{}", any / given);
    // Ten thousand: no two groups have three disks in common, or hardly.
    one.layout = Layout::mixed(10_000, 500, 50_000, 10, 1);
    let large = report(&one).unwrap();
    let times = large.any_causes.of(Cause::Disks) / large.given_causes.of(Cause::Disks);
    assert!((0.9 * 50_000.0..=50_000.0).contains(&times), "{times}");
}

#[test]
fn the_cause_that_dominates_is_named() {
    let mut cluster = cluster(scheme(8, 3), Layout::mixed(1000, 50, 4545, 11, 1));
    let quiet = |cluster: &mut Cluster| {
        cluster.failures.disk_afr = 0.0;
        cluster.failures.server_losses_per_year = 0.0;
        cluster.latent.errors_per_disk_year = 0.0;
    };
    quiet(&mut cluster);
    let nothing = report(&cluster).unwrap();
    assert_eq!((nothing.any_causes.dominant(), nothing.any_object.nines), (None, f64::INFINITY));
    assert_eq!((nothing.any_object.probability, nothing.any_object.mttdl_years), (0.0, f64::INFINITY));

    cluster.failures.disk_afr = 0.5;
    cluster.metadata.repair_hours = 0.01;
    assert_eq!(report(&cluster).unwrap().any_causes.dominant(), Some(Cause::Disks));
    cluster.latent.errors_per_disk_year = 100.0;
    assert_eq!(report(&cluster).unwrap().any_causes.dominant(), Some(Cause::LatentErrors));
    quiet(&mut cluster);
    cluster.failures.server_losses_per_year = 0.5;
    assert_eq!(report(&cluster).unwrap().any_causes.dominant(), Some(Cause::Servers));
    quiet(&mut cluster);
    cluster.failures.disk_afr = 0.014;
    cluster.metadata.voters = 1;
    assert_eq!(report(&cluster).unwrap().any_causes.dominant(), Some(Cause::Metadata));
}

#[test]
fn a_majority_lost_blocks_and_only_all_voters_lost_is_a_loss() {
    let mut cluster = textbook(8, 3, 0.014, 24.0);
    cluster.metadata.repair_hours = 24.0;
    cluster.metadata.operator_hours = 24.0;
    let found = report(&cluster).unwrap();
    let rate = -(-0.014f64).ln_1p() / HOURS_PER_YEAR;
    let (shards, voters) = (f64::from(cluster.metadata.shards), cluster.metadata.voters);
    assert_eq!(voters, 5);
    // Two gone with three left: the third blocks. Then nobody is replaced, and the fourth and fifth must go within the
    // operator's time.
    let blocked = 10.0 * (rate * 24.0).powi(2) * 3.0 * rate * HOURS_PER_YEAR;
    let lost = blocked * (2.0 * rate * 24.0) * (rate * 24.0);
    assert!((found.metadata_blocked.per_year / (blocked * shards) - 1.0).abs() < 1e-2, "{found:?}");
    assert!((found.given_causes.of(Cause::Metadata) / lost - 1.0).abs() < 1e-2, "{found:?} {lost}");
    // Servers that are away block, and lose nothing.
    cluster.failures.server_outages_per_year = 12.0;
    cluster.failures.server_return_hours = 1.0;
    let away = report(&cluster).unwrap();
    assert_eq!(away.any_causes, found.any_causes);
    assert!(away.metadata_unavailable > 2.0 * found.metadata_unavailable);
    assert!(away.data_unavailable > 2.0 * found.data_unavailable);
}

#[test]
fn more_chunks_on_a_server_cost_nines() {
    let nines = |per_server: usize, servers: u64| {
        let mut cluster = textbook(4, 2, 1e-9, 24.0);
        cluster.layout = Layout::mixed(60, servers, 100, 6, per_server);
        cluster.repair.slot_hours = 24.0;
        cluster.failures.server_losses_per_year = 0.005;
        data_nines(&cluster)
    };
    // Three of six servers within 24 hours, or two of three.
    let rate: f64 = 0.005 / HOURS_PER_YEAR;
    let right =
        |ways: f64, lost: i32| Loss::of_rate(ways * rate.powi(lost) * 24f64.powi(lost - 1) * HOURS_PER_YEAR).nines;
    let (one, two) = (nines(1, 6), nines(2, 3));
    assert!((one - right(60.0, 3)).abs() < 0.01 && (two - right(6.0, 2)).abs() < 0.01, "{one} {two}");
}

#[test]
fn what_means_nothing_is_refused_by_name() {
    let good = cluster(scheme(8, 3), Layout::mixed(1000, 50, 4545, 11, 1));
    good.validate().unwrap();
    type Change = fn(&mut Cluster, f64);
    let fields: [(&str, Change); 13] = [
        ("the AFR of a disk", |c, v| c.failures.disk_afr = v),
        ("server losses per year", |c, v| c.failures.server_losses_per_year = v),
        ("server outages per year", |c, v| c.failures.server_outages_per_year = v),
        ("the hours until a server returns", |c, v| c.failures.server_return_hours = v),
        ("the hours of grace", |c, v| c.repair.grace_hours = v),
        ("the hours to rebuild a disk", |c, v| c.repair.disk_hours = v),
        ("the hours to rebuild a slot", |c, v| c.repair.slot_hours = v),
        ("the hours to rebuild a server", |c, v| c.repair.server_hours = v),
        ("latent errors per disk and year", |c, v| c.latent.errors_per_disk_year = v),
        ("the hours between scrubs", |c, v| c.latent.scrub_hours = v),
        ("extents per group", |c, v| c.latent.extents_per_group = v),
        ("the hours to replace a voter", |c, v| c.metadata.repair_hours = v),
        ("the hours until an operator acts", |c, v| c.metadata.operator_hours = v),
    ];
    for (name, change) in fields {
        for absurd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -1e-300, 1e300] {
            let mut bad = good.clone();
            change(&mut bad, absurd);
            match report(&bad) {
                Err(DurabilityError::Range { what, .. }) => assert_eq!(what, name),
                other => panic!("{name} = {absurd}: {other:?}"),
            }
        }
    }
    let layouts: [fn(&mut Layout); 9] = [
        |l| l.disks = 0,
        |l| l.disks = 10,
        |l| l.servers = 0,
        |l| l.servers = 3,
        |l| l.groups = 0,
        |l| l.width = 10,
        |l| l.pairs = 0,
        |l| l.pairs = u64::MAX,
        |l| l.chunks_per_server = 0,
    ];
    for change in layouts {
        let mut bad = good.clone();
        change(&mut bad.layout);
        assert!(report(&bad).is_err(), "{:?}", bad.layout);
    }
    for voters in [0, 2, 4, 6, u32::MAX] {
        let mut bad = good.clone();
        bad.metadata.voters = voters;
        assert_eq!(report(&bad).unwrap_err(), DurabilityError::Voters(voters));
    }
    let mut bad = good.clone();
    bad.scheme.m = 0;
    assert!(matches!(report(&bad), Err(DurabilityError::Scheme(_))));
}

#[test]
fn the_ends_of_what_is_accepted_give_numbers() {
    let mut extreme = cluster(scheme(32, 16), Layout::mixed(10_000_000, 1_000_000, 4_000_000_000, 48, 16));
    for (afr, hours, errors) in [(0.999_999, 876_600.0, 1e6), (0.0, 876_600.0, 1e6), (1e-300, 1e-4, 1e-300)] {
        extreme.failures.disk_afr = afr;
        extreme.failures.server_losses_per_year = afr * 1e6;
        extreme.repair.grace_hours = 0.0;
        extreme.repair.disk_hours = hours;
        extreme.repair.slot_hours = 1e-4;
        extreme.repair.server_hours = hours;
        extreme.latent.errors_per_disk_year = errors;
        extreme.latent.extents_per_group = 1e12;
        let found = report(&extreme).unwrap();
        for loss in [found.any_object, found.given_object, found.metadata_blocked] {
            assert!((0.0..=1.0).contains(&loss.probability) && loss.nines >= 0.0, "{afr}: {found:?}");
        }
        assert!((0.0..=1.0).contains(&found.data_unavailable) && (0.0..=1.0).contains(&found.metadata_unavailable));
    }
}

#[test]
fn the_assumptions_are_sentences_that_say_what_was_put_in() {
    let cluster = cluster(scheme(8, 3), Layout::mixed(1000, 50, 4545, 11, 1));
    let said = assumptions(&cluster);
    for sentence in &said {
        assert!(sentence.ends_with('.') && !sentence.contains("  "), "{sentence}");
    }
    let all = said.join(" ");
    for part in
        ["8+3", "1000 disks", "50 servers", "4545 groups", "1.40 %", "5 voters", "all voters that hold it are lost"]
    {
        assert!(all.contains(part), "{part}: {all}");
    }
}
