//! How many nines: what a cluster is expected to lose in a year, from how often its parts fail and how fast it heals.
//!
//! Reading order:
//! 1. [`Cluster`]: all inputs, with what [`Cluster::validate`] accepts; [`Layout`] and [`Groups`]: how groups lie;
//! 2. `chain`: Markov chains whose small numbers stay right; `losses` and `metadata`: the chains of a group and of a
//!    metadata shard;
//! 3. [`report`]: both put together; [`assumptions`]: what the numbers rest on, in sentences;
//! 4. [`simulate`]: the same cluster played through with random failures, to hold the chains against;
//! 5. [`Rebuild`]: how long a lost disk takes to rebuild, by its busiest helper.
//!
//! A rate of losses R per year gives the probability 1 - e^-R of one within a year, and its nines are the negative
//! decimal logarithm of that. Probabilities are never taken as one minus nearly one.

mod assumptions;
mod chain;
mod input;
mod layout;
mod losses;
mod metadata;
mod random;
mod rebuild;
mod simulate;

pub use assumptions::assumptions;
pub use input::{Cluster, DurabilityError, Failures, Latent, Metadata, Repair, HOURS_PER_YEAR};
pub use layout::{Groups, Layout};
pub use rebuild::Rebuild;
pub use simulate::{simulate, Estimate, Simulated};

use losses::{losses, ByCause, View};
use std::fmt;

/// Something that may be lost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Losses expected in a year.
    pub per_year: f64,
    /// Probability of at least one within a year.
    pub probability: f64,
    /// How many nines that leaves: 11 for a probability of 1e-11. Infinite for none.
    pub nines: f64,
    /// Mean time to a loss, in years. Infinite for none.
    pub mttdl_years: f64,
}

impl Loss {
    /// Of a rate in losses per year.
    pub fn of_rate(per_year: f64) -> Loss {
        let probability = -(-per_year).exp_m1();
        // Zero minus: no negative zero where a loss is certain.
        Loss { per_year, probability, nines: 0.0 - probability.log10(), mttdl_years: 1.0 / per_year }
    }
}

/// What a loss comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// More than M disks of one group, one after the other.
    Disks,
    /// The same with whole servers among what was lost.
    Servers,
    /// Fewer than that, and a latent error in what was left.
    LatentErrors,
    /// All voters of a metadata shard.
    Metadata,
}

impl Cause {
    /// All causes.
    pub const ALL: [Cause; 4] = [Cause::Disks, Cause::Servers, Cause::LatentErrors, Cause::Metadata];
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cause::Disks => "disks",
            Cause::Servers => "servers",
            Cause::LatentErrors => "latent errors",
            Cause::Metadata => "metadata",
        })
    }
}

/// Losses per year by cause.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Causes([f64; 4]);

impl Causes {
    fn new(data: ByCause, metadata: f64) -> Causes {
        Causes([data.disks, data.servers, data.latent, metadata])
    }

    /// Losses per year that come from it.
    pub fn of(&self, cause: Cause) -> f64 {
        self.0[cause as usize]
    }

    /// Losses per year from all causes.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    /// The cause of most losses; none when there are none.
    pub fn dominant(&self) -> Option<Cause> {
        let most = Cause::ALL.into_iter().max_by(|one, other| self.of(*one).total_cmp(&self.of(*other)));
        most.filter(|cause| self.of(*cause) > 0.0)
    }
}

/// What the model says of a cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// At least one object of the cluster is lost.
    pub any_object: Loss,
    /// A given object of one extent is lost.
    pub given_object: Loss,
    /// What `any_object` comes from.
    pub any_causes: Causes,
    /// What `given_object` comes from.
    pub given_causes: Causes,
    /// Some metadata shard loses its majority for good, and an operator must bring it back.
    pub metadata_blocked: Loss,
    /// Part of the time in which a given metadata shard has no majority, because voters are away or lost.
    pub metadata_unavailable: f64,
    /// Part of the time in which a given extent cannot be read, because disks are away or lost.
    pub data_unavailable: f64,
}

/// What is to be expected of a cluster.
///
/// # Errors
/// An input that cannot be.
pub fn report(cluster: &Cluster) -> Result<Report, DurabilityError> {
    cluster.validate()?;
    let shard = metadata::shard(cluster);
    let shards = f64::from(cluster.metadata.shards) / metadata::shards_together(cluster);
    let given_causes = Causes::new(losses(cluster, View::OneExtent), shard.lost);
    let any_causes = Causes::new(losses(cluster, View::Everything), shard.lost * shards);
    Ok(Report {
        any_object: Loss::of_rate(any_causes.total()),
        given_object: Loss::of_rate(given_causes.total()),
        any_causes,
        given_causes,
        metadata_blocked: Loss::of_rate(shard.blocked * shards),
        metadata_unavailable: shard.unavailable,
        data_unavailable: data_unavailable(cluster),
    })
}

/// Chunks that are away with their servers and will come back, and chunks that are being rebuilt.
fn data_unavailable(cluster: &Cluster) -> f64 {
    let (width, m) = (cluster.scheme.width(), usize::from(cluster.scheme.m));
    let per_server = cluster.layout.chunks_per_server;
    let servers = width.div_ceil(per_server);
    let away = cluster.server_away_share();
    let lost =
        cluster.disk_rate() * cluster.hours_after_disk(1) + cluster.server_rate() * cluster.hours_after_server(1);
    let with = |gone: usize| {
        let ways =
            layout::choose(servers as f64, gone) * away.powi(gone as i32) * (1.0 - away).powi((servers - gone) as i32);
        let chunks = (gone * per_server).min(width);
        ways * if chunks > m { 1.0 } else { metadata::more_than(m - chunks, width - chunks, lost) }
    };
    (0..=servers).map(with).sum::<f64>().min(1.0)
}
