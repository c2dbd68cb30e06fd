//! What the durability model is told of a cluster, and what it refuses to calculate with.

use super::layout::Layout;
use crate::scheme::{Scheme, SchemeError};

/// Hours in a year, leap years counted.
pub const HOURS_PER_YEAR: f64 = 8766.0;

/// A cluster as the model sees it. Rates are of one disk or server; times are means.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Redundancy of the data.
    pub scheme: Scheme,
    /// How the groups lie on disks and servers.
    pub layout: Layout,
    /// How often disks and servers fail.
    pub failures: Failures,
    /// How fast redundancy comes back.
    pub repair: Repair,
    /// Errors that only a scrub finds.
    pub latent: Latent,
    /// The metadata shards.
    pub metadata: Metadata,
}

/// How often disks and servers fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failures {
    /// Part of the disks that die within a year (annualised failure rate): 0.014 for 1.4 %.
    pub disk_afr: f64,
    /// How often in a year a server is lost for good, and all its disks with it.
    pub server_losses_per_year: f64,
    /// How often in a year a server is away and comes back with its disks.
    pub server_outages_per_year: f64,
    /// How long such a server is away, in hours.
    pub server_return_hours: f64,
}

/// How fast redundancy comes back. What was measured is `grace_hours` + `disk_hours`: from the loss of a disk until
/// everything on it is whole again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Repair {
    /// From a loss until rebuilding begins: `heal.out_after`, in hours.
    pub grace_hours: f64,
    /// Rebuilding everything that lay on one disk, in hours.
    pub disk_hours: f64,
    /// Rebuilding a single slot of a group, in hours, when nothing else is to be done: however urgent, it takes so
    /// long.
    pub slot_hours: f64,
    /// Rebuilding everything that lay on one server, in hours.
    pub server_hours: f64,
}

/// Latent errors: a part of a chunk that its disk gives back wrong or not at all, unnoticed until it is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latent {
    /// Chunks that go bad so on one disk in a year.
    pub errors_per_disk_year: f64,
    /// Time between two scrubs of a disk, in hours.
    pub scrub_hours: f64,
    /// Extents in one placement group.
    pub extents_per_group: f64,
}

/// The metadata shards: each is a Raft group whose voters lie on different disks of different servers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metadata {
    /// Shards, the root shard included.
    pub shards: u32,
    /// Voters of each shard: 1, 3 or 5.
    pub voters: u32,
    /// Disks with the role metadata.
    pub disks: u32,
    /// From the loss of a voter until another one has its data, in hours, the grace time included.
    pub repair_hours: f64,
    /// From the loss of a majority until an operator has brought the shard back from a voter that is left, in hours.
    pub operator_hours: f64,
}

/// Inputs that mean nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DurabilityError {
    /// Not a number, infinite, negative, or outside what can be.
    #[error("{what} is {value}: must be from {low} to {high}")]
    Range {
        /// Which input.
        what: &'static str,
        /// What it was.
        value: f64,
        /// The least that is accepted.
        low: f64,
        /// The most that is accepted.
        high: f64,
    },
    /// The number of voters.
    #[error("{0} voters: a shard has 1, 3 or 5, and no more than there are metadata disks")]
    Voters(u32),
    /// The scheme.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// The layout names a disk or server that it does not have, or a group is not as wide as its scheme.
    #[error("the layout cannot be: {0}")]
    Layout(&'static str),
}

/// Longest time that is accepted: a hundred years.
const MAX_HOURS: f64 = 100.0 * HOURS_PER_YEAR;
/// Shortest repair that is accepted, a tenth of a second: chains with a repair of no time have no answer.
const MIN_HOURS: f64 = 0.1 / 3600.0;
/// Most events of one disk or server in a year.
const MAX_PER_YEAR: f64 = 1e6;

pub(super) fn within(what: &'static str, value: f64, low: f64, high: f64) -> Result<(), DurabilityError> {
    // A value that is not a number is in no range.
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(DurabilityError::Range { what, value, low, high })
}

impl Cluster {
    /// Checks every input.
    ///
    /// # Errors
    /// The first that cannot be.
    pub fn validate(&self) -> Result<(), DurabilityError> {
        self.scheme.validate()?;
        self.layout.validate(self.scheme.width())?;
        let Cluster { failures, repair, latent, metadata, .. } = self;
        // All disks dying within the year has no finite rate.
        within("the AFR of a disk", failures.disk_afr, 0.0, 0.999_999)?;
        within("server losses per year", failures.server_losses_per_year, 0.0, MAX_PER_YEAR)?;
        within("server outages per year", failures.server_outages_per_year, 0.0, MAX_PER_YEAR)?;
        within("the hours until a server returns", failures.server_return_hours, 0.0, MAX_HOURS)?;
        within("the hours of grace", repair.grace_hours, 0.0, MAX_HOURS)?;
        within("the hours to rebuild a disk", repair.disk_hours, MIN_HOURS, MAX_HOURS)?;
        within("the hours to rebuild a slot", repair.slot_hours, MIN_HOURS, repair.disk_hours)?;
        within("the hours to rebuild a server", repair.server_hours, repair.slot_hours, MAX_HOURS)?;
        within("latent errors per disk and year", latent.errors_per_disk_year, 0.0, MAX_PER_YEAR)?;
        within("the hours between scrubs", latent.scrub_hours, MIN_HOURS, MAX_HOURS)?;
        within("extents per group", latent.extents_per_group, 1.0, 1e12)?;
        within("metadata shards", metadata.shards.into(), 1.0, 1e5)?;
        within("metadata disks", metadata.disks.into(), 1.0, 1e7)?;
        within("the hours to replace a voter", metadata.repair_hours, MIN_HOURS, MAX_HOURS)?;
        within("the hours until an operator acts", metadata.operator_hours, MIN_HOURS, MAX_HOURS)?;
        if !matches!(metadata.voters, 1 | 3 | 5) || metadata.voters > metadata.disks {
            return Err(DurabilityError::Voters(metadata.voters));
        }
        Ok(())
    }

    /// Losses of one disk per hour.
    pub(super) fn disk_rate(&self) -> f64 {
        -(-self.failures.disk_afr).ln_1p() / HOURS_PER_YEAR
    }

    /// Losses of one server per hour.
    pub(super) fn server_rate(&self) -> f64 {
        self.failures.server_losses_per_year / HOURS_PER_YEAR
    }

    /// Latent errors of one chunk per hour.
    pub(super) fn latent_rate(&self) -> f64 {
        let chunks = self.layout.slots_per_disk() * self.latent.extents_per_group;
        self.latent.errors_per_disk_year / HOURS_PER_YEAR / chunks
    }

    /// How long a latent error stays unnoticed, in hours: half a scrub interval.
    pub(super) fn latent_hours(&self) -> f64 {
        self.latent.scrub_hours / 2.0
    }

    /// Part of the time that a server is away and will come back.
    pub(super) fn server_away_share(&self) -> f64 {
        let hours = self.failures.server_outages_per_year * self.failures.server_return_hours;
        hours / (HOURS_PER_YEAR + hours)
    }

    /// Mean hours until a chunk that its disk took with it is rebuilt, in a group that misses `missing` chunks. The
    /// groups that miss most come first: of the slots of a disk only those count which other lost disks share.
    pub(super) fn hours_after_disk(&self, missing: usize) -> f64 {
        self.urgent_hours(self.repair.disk_hours, missing)
    }

    /// As [`Cluster::hours_after_disk`], for a chunk that was lost with its server.
    pub(super) fn hours_after_server(&self, missing: usize) -> f64 {
        self.urgent_hours(self.repair.server_hours, missing)
    }

    fn urgent_hours(&self, all: f64, missing: usize) -> f64 {
        let ahead = all * self.layout.overlap().powi(missing.saturating_sub(1).min(64) as i32);
        self.repair.grace_hours + ahead.max(self.repair.slot_hours)
    }
}
