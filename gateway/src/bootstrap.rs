//! Forms a cluster from disk nodes that run and know nothing of each other yet.
//!
//! Every step can be repeated, so a forming that was broken off anywhere is simply done again:
//! 1. every disk node is offered the map, from which it learns its peers' addresses;
//! 2. the first member of each shard is told to begin it with all its members;
//! 3. the root shard is given the map. From now on the cluster knows itself.

use crate::shards::map_watch::MapSet;
use crate::shards::{jitter, ShardError, Shards};
use futures::stream::{self, StreamExt, TryStreamExt};
use granary_placement::id::{DiskId, Epoch, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::control::{ControlRequest, ControlResponse};
use std::time::Duration;
use tokio::time::Instant;

/// How long forming may take: disk nodes may have to be started first.
pub const DEADLINE: Duration = Duration::from_secs(120);
const ATTEMPT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);
const AT_ONCE: usize = 16;

/// Why a cluster was not formed.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// A disk node did not do its part in time.
    #[error("disk {disk} did not {what} in time: {detail}")]
    Disk {
        /// Which disk.
        disk: DiskId,
        /// What it was asked.
        what: String,
        /// What it said last.
        detail: String,
    },
    /// A shard without members.
    #[error("shard {0} has no members in the map")]
    NoMembers(ShardId),
    /// The root shard does not take the map.
    #[error("the root shard did not take the map: {0}")]
    Root(#[from] ShardError),
    /// The disks form another cluster, or one that is further on.
    #[error("the cluster has a map of epoch {current} already, this one has {ours}")]
    Conflict {
        /// Epoch in force.
        current: Epoch,
        /// Epoch of the map given.
        ours: Epoch,
    },
}

/// Forms the cluster of that map, or finishes forming it.
///
/// # Errors
/// [`FormError`]; what was done stays done.
pub async fn form(shards: &Shards, map: &ClusterMap) -> Result<(), FormError> {
    let deadline = Instant::now() + DEADLINE;
    let disks: Vec<DiskId> = map.disks.keys().copied().collect();
    let offers = disks.into_iter().map(|disk| {
        let offer = ControlRequest::OfferMap(Box::new(map.clone()));
        insist(shards, disk, offer, "take the cluster map".to_owned(), deadline)
    });
    stream::iter(offers).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;

    let mut begins = Vec::new();
    for (number, replicas) in (0u16..).zip(&map.shards) {
        let shard = ShardId(number);
        let first = *replicas.members.first().ok_or(FormError::NoMembers(shard))?;
        let init = ControlRequest::InitShard { shard, members: replicas.members.clone() };
        begins.push(insist(shards, first, init, format!("begin shard {shard}"), deadline));
    }
    stream::iter(begins).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;

    match shards.set_map(map.clone()).await? {
        MapSet::Done => Ok(()),
        // Formed before, and perhaps changed since: the root shard's map is the one that counts.
        MapSet::Conflict { current } if current >= map.epoch => Ok(()),
        MapSet::Conflict { current } => Err(FormError::Conflict { current, ours: map.epoch }),
    }
}

async fn insist(
    shards: &Shards,
    disk: DiskId,
    request: ControlRequest,
    what: String,
    deadline: Instant,
) -> Result<(), FormError> {
    loop {
        let detail = match shards.ask_disk(disk, request.clone(), ATTEMPT).await {
            Ok(ControlResponse::Done) => return Ok(()),
            Ok(ControlResponse::Error(error)) => error.to_string(),
            Ok(_) => "an answer of another kind".to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(FormError::Disk { disk, what, detail });
        }
        tracing::debug!(disk = disk.0, %what, %detail, "not yet");
        tokio::time::sleep(jitter(PAUSE)).await;
    }
}
