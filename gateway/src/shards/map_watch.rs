//! The cluster map: asked of the root shard when a disk node told of a newer one and every few seconds, published here,
//! and offered to disk nodes that lag behind.
//!
//! Whoever has the map before is told the difference, and the whole map when that does not fit.
//!
//! A gateway begins with a copy of the map given at start, so that it knows addresses before the first answer. The root
//! shard's word replaces it as soon as there is one; nothing serves S3 before that ([`Shards::confirmed`]).

use super::{jitter, ShardError, Shards};
use futures::stream::{self, StreamExt};
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::{DiskId, Epoch, ShardId};
use granary_placement::map::{apply_diff, diff, ClusterMap, DiskState, MapDiff};
use granary_wire::control::{ControlRequest, ControlResponse};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The root shard is asked this often without a reason. Each time costs it a round of its majority.
const POLL: Duration = Duration::from_secs(5);
/// And at most this often with one.
const POLL_AGAIN: Duration = Duration::from_secs(1);
/// Nodes spoken to at the same time.
const OFFERS_AT_ONCE: usize = 32;
/// Differences between maps kept to be offered.
const KEPT_DIFFS: usize = 16;
const OFFER_DEADLINE: Duration = Duration::from_secs(3);

/// What SetMap came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapSet {
    /// It is the map now.
    Done,
    /// Another map was installed first; make the change again on top of it.
    Conflict {
        /// The epoch in force.
        current: Epoch,
    },
}

impl Shards {
    /// Keeps the map fresh until `stop`. One task per gateway. `heard`: the highest epoch that a disk node told.
    pub async fn watch_map(&self, mut heard: watch::Receiver<Epoch>, stop: CancellationToken) {
        let mut root_lost = false;
        loop {
            match self.refresh_map().await {
                Ok(_) if root_lost => {
                    tracing::info!("the root shard answers again");
                    root_lost = false;
                }
                Ok(_) => {}
                Err(error) => {
                    if !root_lost {
                        tracing::warn!(%error, "cannot ask the root shard for the cluster map");
                        root_lost = true;
                    }
                }
            }
            // Nodes that lost everything but their disk learn the map from us even while the root shard has no leader.
            self.offer_map().await;
            let soon = root_lost || !*self.inner.confirmed.borrow();
            tokio::select! {
                () = self.wait_for_a_reason(&mut heard, soon) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Waits until the root shard should be asked again.
    async fn wait_for_a_reason(&self, heard: &mut watch::Receiver<Epoch>, soon: bool) {
        tokio::time::sleep(jitter(POLL_AGAIN)).await;
        if soon {
            return;
        }
        let known = self.current_map().map_or(Epoch(0), |map| map.epoch);
        let newer = async {
            // It ends with an error when nobody tells any more.
            if heard.wait_for(|told| *told > known).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let _ = tokio::time::timeout(jitter(POLL - POLL_AGAIN), newer).await;
    }

    /// Asks the root shard for the map once. True when it is another than the one known.
    ///
    /// # Errors
    /// The root shard does not answer, has no map yet, or one that cannot be used.
    pub async fn refresh_map(&self) -> Result<bool, ShardError> {
        // Only a map that the root shard told is asked to be continued.
        let known = self.current_map().filter(|_| *self.inner.confirmed.borrow());
        let newer_than = known.as_ref().map_or(Epoch(0), |map| map.epoch);
        let mut answer = self.query(ShardId::ROOT, Query::GetMap { newer_than }).await?;
        if let (Answer::MapDiffs(diffs), Some(known)) = (&answer, &known) {
            let applied = diffs.iter().try_fold((**known).clone(), |map, diff| apply_diff(&map, diff));
            answer = match applied {
                Ok(map) => Answer::Map(Box::new(map)),
                Err(error) => {
                    tracing::warn!(%error, "what changed in the cluster map does not fit; asking for the whole");
                    self.query(ShardId::ROOT, Query::GetMap { newer_than: Epoch(0) }).await?
                }
            };
        }
        match answer {
            Answer::Map(map) => self.take_map(*map),
            Answer::MapUnchanged => Ok(false),
            Answer::NoMap => Err(ShardError::NoMap(ShardId::ROOT)),
            other => Err(super::buckets::odd_answer(ShardId::ROOT, &other)),
        }
    }

    /// Publishes a map that the root shard has or had, unless a newer one is known from it. One that was given at start
    /// gives way whatever its epoch: it may be another map of the same epoch, and differences would be applied to the
    /// wrong one. True when it is another than before.
    fn take_map(&self, map: ClusterMap) -> Result<bool, ShardError> {
        let (epoch, shard) = (map.epoch, ShardId::ROOT);
        map.validate().map_err(|error| ShardError::Garbled { shard, why: format!("its map is not valid: {error}") })?;
        if self.inner.map.borrow().as_ref().is_some_and(|known| known.cluster_id != map.cluster_id) {
            return Err(ShardError::Garbled { shard, why: "its map is of another cluster".to_owned() });
        }
        let confirmed = *self.inner.confirmed.borrow();
        let taken = self.inner.map.send_if_modified(|known| {
            let other = known.as_ref().is_none_or(|known| match known.epoch.cmp(&epoch) {
                std::cmp::Ordering::Less => true,
                std::cmp::Ordering::Equal => **known != map,
                std::cmp::Ordering::Greater => !confirmed,
            });
            if other {
                let mut kept = self.inner.map_diffs.lock().unwrap_or_else(PoisonError::into_inner);
                match known.as_ref().filter(|known| confirmed && known.epoch < epoch) {
                    Some(before) => kept.push_back(Arc::new(diff(before, &map))),
                    None => kept.clear(),
                }
                let surplus = kept.len().saturating_sub(KEPT_DIFFS);
                kept.drain(..surplus);
                *known = Some(Arc::new(map));
            }
            other
        });
        if taken {
            tracing::info!(epoch = epoch.0, "cluster map in use");
            self.inner.metrics.map_epoch.set(i64::try_from(epoch.0).unwrap_or(i64::MAX));
        }
        self.inner.confirmed.send_if_modified(|confirmed| !std::mem::replace(confirmed, true));
        Ok(taken)
    }

    /// Installs a map whose epoch is one above the one in force.
    ///
    /// # Errors
    /// As [`Shards::command`].
    pub async fn set_map(&self, map: ClusterMap) -> Result<MapSet, ShardError> {
        match self.command(ShardId::ROOT, Command::SetMap { map: Box::new(map.clone()) }).await? {
            Reply::Done => {
                self.take_map(map)?;
                self.offer_map().await;
                Ok(MapSet::Done)
            }
            Reply::EpochConflict { current } => Ok(MapSet::Conflict { current }),
            other => Err(super::buckets::odd_reply(ShardId::ROOT, &other)),
        }
    }

    /// Tells every disk node that knows an older map about ours. Those that do not answer are told another time.
    pub async fn offer_map(&self) {
        let Some(map) = self.current_map() else { return };
        let disks: Vec<DiskId> =
            map.disks.values().filter(|disk| disk.state != DiskState::Out).map(|disk| disk.id).collect();
        stream::iter(disks).for_each_concurrent(OFFERS_AT_ONCE, |disk| self.offer_to(disk, &map)).await;
    }

    /// Brings a node that knows the map of one epoch to another by differences. False when they are not at hand, or it
    /// did not take them all.
    async fn offer_diffs(&self, disk: DiskId, from: Epoch, to: Epoch) -> bool {
        let mut steps: Vec<Arc<MapDiff>> = Vec::new();
        for step in self.inner.map_diffs.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if step.from == steps.last().map_or(from, |last| last.to) {
                steps.push(step.clone());
            }
        }
        if steps.last().is_none_or(|last| last.to < to) {
            return false;
        }
        for step in &steps {
            let offer = ControlRequest::OfferMapDiff(Box::new(step.as_ref().clone()));
            match self.inner.peers.control(disk, offer, OFFER_DEADLINE).await {
                Ok(ControlResponse::Done) => {}
                _ => return false,
            }
        }
        true
    }

    async fn offer_to(&self, disk: DiskId, map: &Arc<ClusterMap>) {
        let known = match self.inner.peers.control(disk, ControlRequest::Status, OFFER_DEADLINE).await {
            Ok(ControlResponse::Status(status)) if status.epoch < map.epoch => status.epoch,
            _ => return,
        };
        if self.offer_diffs(disk, known, map.epoch).await {
            return tracing::debug!(disk = disk.0, epoch = map.epoch.0, "disk node took what changed in the map");
        }
        let offer = ControlRequest::OfferMap(Box::new(map.as_ref().clone()));
        match self.inner.peers.control(disk, offer, OFFER_DEADLINE).await {
            Ok(ControlResponse::Done) => tracing::debug!(disk = disk.0, epoch = map.epoch.0, "disk node took the map"),
            Ok(other) => {
                tracing::warn!(disk = disk.0, epoch = map.epoch.0, answer = ?other, "disk node did not take the map")
            }
            Err(error) => tracing::debug!(disk = disk.0, %error, "disk node was not told the map"),
        }
    }
}
