//! Forms a cluster from disk nodes that run and know nothing of each other yet.
//!
//! What the cluster is to be stands in its first map ([`first_map`](crate::ops::form::first_map)). Every step can be
//! repeated, so a forming that was broken off anywhere is simply done again:
//! 0. every disk node is asked who it is ([`check_disks`]), unless whoever forms the cluster has formatted the disks
//!    itself;
//! 1. every disk node is offered the map, from which it learns its peers' addresses;
//! 2. the first member of each shard is told to begin it with all its members;
//! 3. the root shard is given the map. From now on the cluster knows itself;
//! 4. every shard gets the highest feature level that all builds know: nothing in it was written by an older one.

use crate::disks::Disks;
use crate::ops::commit::{commit_first, CommitError, FormedOtherwise};
use crate::ops::levels::{self, Known};
use crate::shards::{jitter, Shards};
use futures::stream::{self, StreamExt, TryStreamExt};
use granary_meta::level::MAX_FEATURE_LEVEL;
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::{ClusterMap, Disk};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
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
    #[error(transparent)]
    Map(#[from] CommitError<FormedOtherwise>),
    /// Shards do not get the feature level of this release. Nothing else is missing.
    #[error("the cluster is formed, but its shards do not have the feature level of this release yet: {0}")]
    Level(String),
    /// The map and the clients disagree.
    #[error("disk {0} is not in the cluster map")]
    NotInMap(DiskId),
    /// A disk node is not what the configuration says, or does not answer.
    #[error("disk {disk} at {address}: {why}; nothing was changed")]
    Mistaken {
        /// Which.
        disk: DiskId,
        /// Where.
        address: String,
        /// What is wrong.
        why: String,
    },
}

/// Asks every disk node who it is before any is told anything: a node keeps the first map it takes, so one wrong line
/// of the configuration must not reach the others. Waits for nodes that do not answer yet.
///
/// # Errors
/// [`FormError::NotInMap`], [`FormError::Mistaken`]; nothing was changed.
pub async fn check_disks(disks: &Disks, map: &ClusterMap) -> Result<(), FormError> {
    let deadline = Instant::now() + DEADLINE;
    let checks = map.disks.values().map(|disk| check_disk(disks, map, disk, deadline));
    stream::iter(checks).buffer_unordered(AT_ONCE).try_collect().await
}

async fn check_disk(disks: &Disks, map: &ClusterMap, disk: &Disk, deadline: Instant) -> Result<(), FormError> {
    let (id, uuid) = (disk.id, disk.uuid);
    loop {
        // Whichever disk answers there, so that it can be named.
        let client = disks.client_at(disks.client(id).ok_or(FormError::NotInMap(id))?.address());
        let failed = |why: String| FormError::Mistaken { disk: id, address: client.address().to_owned(), why };
        let known = match client.control(ControlRequest::Status, ATTEMPT).await {
            Ok(ControlResponse::Status(found)) if found.uuid != uuid || found.disk.is_some_and(|found| found != id) => {
                let number = found.disk.map_or_else(|| "no number".to_owned(), |disk| disk.to_string());
                let why = format!("the configuration says {uuid} there, but it is disk {number} ({})", found.uuid);
                return Err(failed(why));
            }
            Ok(ControlResponse::Status(found)) if found.epoch < map.epoch => return Ok(()),
            Ok(ControlResponse::Status(found)) if found.epoch > map.epoch => {
                return Err(failed(format!("it belongs to a formed cluster already (map epoch {})", found.epoch)));
            }
            // The same epoch: fine if an earlier attempt was broken off, and nothing else.
            Ok(ControlResponse::Status(_)) => client.control(ControlRequest::GetMap, ATTEMPT).await,
            other => other,
        };
        let why = match known {
            Ok(ControlResponse::Map(Some(known))) if *known == *map => return Ok(()),
            Ok(ControlResponse::Map(_)) => {
                let why = "it has taken another map of this cluster already: give the same configuration as then, or format anew";
                return Err(failed(why.to_owned()));
            }
            Ok(other) => format!("an answer of another kind: {other:?}"),
            Err(LinkError::Auth(error)) => return Err(failed(LinkError::Auth(error).to_string())),
            Err(error) => error.to_string(),
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(failed(why));
        }
        tokio::time::sleep(jitter(PAUSE)).await;
    }
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

    commit_first(shards, map).await?;
    // A disk node or a shard may be silent for a moment.
    loop {
        match raise(shards, map).await {
            Err(error) if Instant::now() + PAUSE < deadline => tracing::debug!(%error, "not yet"),
            raised => return raised,
        }
        tokio::time::sleep(jitter(PAUSE)).await;
    }
}

/// Gives all shards of a new cluster the highest feature level that its disk nodes and this build know.
async fn raise(shards: &Shards, map: &ClusterMap) -> Result<(), FormError> {
    let disks = map.disks.keys().map(|disk| async move {
        match shards.ask_disk(*disk, ControlRequest::Status, ATTEMPT).await {
            Ok(ControlResponse::Status(status)) => Some((*disk, status.feature_level)),
            _ => None,
        }
    });
    let disks: Vec<_> = stream::iter(disks).buffer_unordered(AT_ONCE).collect().await;
    let known = Known {
        shards: levels::of_shards(shards, map).await,
        disks: disks.into_iter().flatten().collect(),
        gateway: MAX_FEATURE_LEVEL,
    };
    let plan = levels::plan(map, &known).map_err(|why| FormError::Level(why.to_string()))?;
    levels::raise(shards, &plan).await.map_err(|why| FormError::Level(why.to_string()))?;
    Ok(())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::metrics::Metrics;
    use crate::ops::form::tests::cluster;
    use crate::shards::memory::MemoryPeers;
    use crate::shards::peers::Peers;
    use futures::future::BoxFuture;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Arc;
    use tokio::sync::watch;

    /// Disk nodes that begin shards and know the highest feature level; one does not tell its status at first.
    struct SilentAtFirst {
        peers: Arc<MemoryPeers>,
        silent: AtomicUsize,
    }

    impl Peers for SilentAtFirst {
        fn control(
            &self,
            disk: DiskId,
            request: ControlRequest,
            deadline: Duration,
        ) -> BoxFuture<'_, Result<ControlResponse, LinkError>> {
            Box::pin(async move {
                if let ControlRequest::InitShard { .. } = request {
                    return Ok(ControlResponse::Done);
                }
                if disk == DiskId(3) && matches!(request, ControlRequest::Status) {
                    let fewer = |left: usize| left.checked_sub(1);
                    if self.silent.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer).is_ok() {
                        return Err(LinkError::Connect("not yet".to_owned()));
                    }
                }
                let mut answer = self.peers.control(disk, request, deadline).await;
                if let Ok(ControlResponse::Status(status)) = &mut answer {
                    status.feature_level = MAX_FEATURE_LEVEL;
                }
                answer
            })
        }
    }

    #[tokio::test]
    async fn a_disk_node_that_is_silent_for_a_moment_does_not_spoil_the_forming() {
        let map = cluster(8);
        let peers = SilentAtFirst { peers: MemoryPeers::new(&map), silent: AtomicUsize::new(3) };
        let known = watch::Sender::new(Some(Arc::new(map.clone())));
        let shards = Shards::new(Arc::new(peers), known, Metrics::new().unwrap());
        form(&shards, &map).await.unwrap();
        let levels = levels::of_shards(&shards, &map).await;
        assert_eq!(levels.len(), map.shards.len());
        assert!(levels.into_values().all(|level| level == MAX_FEATURE_LEVEL));
    }
}
