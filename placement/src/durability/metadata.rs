//! The chain of one metadata shard.
//!
//! What a shard has acknowledged is lost for good only when all voters that hold it are lost. When a majority is lost,
//! no new voter can join: the shard answers nothing until an operator brings it back from one that is left.

use super::chain::Chain;
use super::input::{Cluster, HOURS_PER_YEAR};
use super::layout::choose;

/// One shard, per year.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shard {
    /// How often all voters are lost.
    pub lost: f64,
    /// How often a majority is lost, all of them or not.
    pub blocked: f64,
    /// Part of the time without a majority, voters that come back counted too.
    pub unavailable: f64,
}

pub(super) fn shard(cluster: &Cluster) -> Shard {
    let meta = cluster.metadata;
    let voters = meta.voters as usize;
    let spare = (voters - 1) / 2;
    let rate = cluster.disk_rate() + cluster.server_rate();
    let mut chain = Chain::new(voters);
    for gone in 0..voters {
        let loss = (voters - gone) as f64 * rate;
        if gone + 1 == voters {
            chain.lose(gone, 0, loss);
        } else {
            chain.add(gone, gone + 1, loss);
        }
        if gone > spare {
            chain.add(gone, 0, 1.0 / meta.operator_hours);
        } else if gone > 0 {
            chain.add(gone, gone - 1, gone as f64 / meta.repair_hours);
        }
    }
    let run = chain.long_run(1);
    let blocked = run.share[spare] * (voters - spare) as f64 * rate;
    let stuck: f64 = run.share.iter().skip(spare + 1).sum();
    let away = cluster.server_away_share() + rate * meta.repair_hours;
    Shard {
        lost: run.losses[0] * HOURS_PER_YEAR,
        blocked: blocked * HOURS_PER_YEAR,
        unavailable: (stuck + more_than(spare, voters, away)).min(1.0),
    }
}

/// Probability that more than `spare` of `all` are away, each with probability `away`.
pub(super) fn more_than(spare: usize, all: usize, away: f64) -> f64 {
    let away = away.clamp(0.0, 1.0);
    let exactly = |n: usize| choose(all as f64, n) * away.powi(n as i32) * (1.0 - away).powi((all - n) as i32);
    (spare + 1..=all).map(exactly).sum::<f64>().min(1.0)
}

/// How many shards an average set of voters holds that holds one at all.
pub(super) fn shards_together(cluster: &Cluster) -> f64 {
    let meta = cluster.metadata;
    let (shards, sets) = (f64::from(meta.shards), choose(meta.disks.into(), meta.voters as usize));
    shards / (-(-shards / sets).exp_m1() * sets)
}
