//! Why a layout is refused, for the operator who reads it.

use super::tree::Tree;
use crate::id::DiskId;
use crate::map::MapError;
use crate::scheme::{FailureDomain, Scheme};

/// A layout that cannot be made. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Fewer disks in service than a group has chunks.
    #[error(
        "scheme `{scheme}` puts {needed} chunks on {needed} different disks, but only {present} disks can take chunks \
         (state in, storage role, weight above zero): add {missing} or choose a narrower scheme", missing = needed - present
    )]
    TooFewDisks {
        /// Name of the scheme.
        scheme: String,
        /// Chunks of a group.
        needed: usize,
        /// Disks that can take slots.
        present: usize,
    },
    /// Enough disks, but too many of them fail as one.
    #[error(
        "scheme `{scheme}` keeps at most {limit} of its {width} chunks in one {kind}, so it needs {needed} {kind}s with \
         {limit} disks each; the {present} {kind}s in service have room for {room} chunks: add {kind}s or disks to the smaller \
         ones, choose a scheme with more coding chunks or a smaller failure domain"
    )]
    NoRoom {
        /// Name of the scheme.
        scheme: String,
        /// Its failure domain: `server`, `rack` or `zone`.
        kind: &'static str,
        /// Most chunks of a group in one: M.
        limit: usize,
        /// Chunks of a group: K+M.
        width: usize,
        /// Domains that are enough when each has `limit` disks.
        needed: usize,
        /// Domains with disks that can take slots.
        present: usize,
        /// Chunks of one group that those can hold within the limit.
        room: usize,
    },
    /// Room enough, but not while chunks are still moving.
    #[error(
        "a placement group of scheme `{scheme}` could only use a disk that its chunks are still moving away from: \
         wait until the moves under way are done, then try again"
    )]
    MovesUnderWay {
        /// Name of the scheme.
        scheme: String,
    },
    /// Fewer metadata disks than members of a shard.
    #[error(
        "{members} replicas of a shard need {members} different disks with the metadata role in service, but there are \
         {present}: give the role to more disks or ask for fewer replicas"
    )]
    TooFewMetadataDisks {
        /// Replicas asked for.
        members: usize,
        /// Disks that can hold one.
        present: usize,
    },
    /// A number of replicas without a clear majority, or none we support.
    #[error("{0} replicas of a shard: must be 1, 3 or 5")]
    Members(usize),
    /// No disk of that id.
    #[error("there is no disk {0} in the cluster map")]
    NoSuchDisk(DiskId),
    /// The disk holds nothing that a new one could take over.
    #[error("disk {0} is already out: it holds nothing that a new disk could take over; add the new disk instead")]
    AlreadyOut(DiskId),
    /// A scheme of that name is there.
    #[error("there is a scheme `{0}` already; groups keep the scheme they were made with, so choose another name")]
    SchemeExists(String),
    /// Zero groups.
    #[error("placement groups per disk must be 1 or more; {} is a good number", super::DEFAULT_GROUPS_PER_DISK)]
    NoGroupsPerDisk,
    /// A number has run out: disk ids, group ids or epochs.
    #[error("the numbers for disks, placement groups or epochs are used up")]
    IdsExhausted,
    /// The map breaks a rule.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl PlaceError {
    pub(super) fn no_room(name: &str, scheme: Scheme, tree: &Tree) -> PlaceError {
        let (kind, depth) = match scheme.failure_domain {
            FailureDomain::Disk => ("disk", 4),
            FailureDomain::Server => ("server", 3),
            FailureDomain::Rack => ("rack", 2),
            FailureDomain::Zone => ("zone", 1),
        };
        let limit = if scheme.failure_domain == FailureDomain::Disk { 1 } else { usize::from(scheme.m) };
        PlaceError::NoRoom {
            scheme: name.to_owned(),
            kind,
            limit,
            width: scheme.width(),
            needed: scheme.width().div_ceil(limit),
            present: tree.count_at(depth),
            room: tree.room(),
        }
    }
}
