//! What a disk node answers: chunk requests from the store, metadata requests from the roles, the rest from what it
//! knows.

use crate::label::Label;
use crate::leases::{LeaseRefused, Leases, UnderLease};
use crate::maps::{MapRefused, Maps, News};
use crate::metrics::Metrics;
use crate::roles::{no_map, OnFatal, Roles};
use crate::store::core::Whose;
use crate::store::handle::{Store, Upload};
use crate::store::StoreError;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::FutureExt;
use granary_placement::id::{DiskId, DiskUuid};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::MapError;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus};
use granary_wire::server::{Asker, ChunkBlocks, ChunkSink, NodeService};
use granary_wire::{ChunkError, AWAY_VERSION, PROTOCOL_VERSIONS};
use std::sync::Arc;

/// Most chunks one request may delete, look up or list.
const MAX_CHUNKS: usize = 1000;
/// Most chunks one request may have read.
const MAX_VERIFY: usize = 256;
/// Most disks one request may have asked.
const MAX_REACH: usize = 64;

/// One disk node.
pub struct Node {
    /// Which disk.
    pub label: Label,
    /// Its chunks.
    pub store: Store,
    /// The newest map.
    pub maps: Arc<Maps>,
    /// Its shard replicas.
    pub roles: Arc<Roles>,
    /// The leases under which background work was done here.
    pub leases: Arc<Leases>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// Ends the process when the disk cannot keep what it must.
    pub on_fatal: OnFatal,
}

impl From<StoreError> for ChunkError {
    fn from(error: StoreError) -> ChunkError {
        match error {
            StoreError::NotFound => ChunkError::NotFound,
            StoreError::Corrupt { block } => ChunkError::Corrupt { block },
            StoreError::DiskFull => ChunkError::DiskFull,
            StoreError::Overloaded => ChunkError::Overloaded,
            StoreError::Rejected(why) => ChunkError::Rejected(why),
            StoreError::Unreadable(why) | StoreError::Failed(why) => ChunkError::Disk(why),
        }
    }
}

fn control_error(error: StoreError) -> ControlError {
    match error {
        StoreError::Overloaded => ControlError::Overloaded,
        StoreError::Rejected(why) => ControlError::BadRequest(why),
        other => ControlError::Disk(other.to_string()),
    }
}

/// A chunk on its way to the store, and the lease it is written under, if it is background work.
struct Sink {
    upload: Upload,
    lease: Option<(LeaseStamp, Arc<Leases>, OnFatal)>,
}

impl ChunkSink for Sink {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), ChunkError>> {
        async move { Ok(self.upload.write(data).await?) }.boxed()
    }

    fn finish(self: Box<Self>, crcs: Vec<u32>) -> BoxFuture<'static, Result<(), ChunkError>> {
        async move {
            let Sink { upload, lease } = *self;
            let Some((lease, leases, on_fatal)) = lease else { return Ok(upload.finish(crcs).await?) };
            // Again: the lease may have been taken over while the payload came.
            let under_lease = admit(&leases, &lease, &*on_fatal).await.map_err(chunk_error)?;
            // A task of its own: a connection that breaks ends this request, but the chunk may become visible all the
            // same, and a newer holder of the lease must wait for that.
            let finishing = tokio::spawn(async move {
                let finished = upload.finish(crcs).await;
                drop(under_lease);
                finished
            });
            Ok(finishing.await.map_err(|error| ChunkError::Disk(error.to_string()))??)
        }
        .boxed()
    }
}

impl NodeService for Node {
    fn control(&self, asker: Asker, request: ControlRequest) -> BoxFuture<'_, ControlResponse> {
        // A gateway has no disk.
        if asker.disk.is_none() {
            self.roles.note_gateway();
        }
        async move { self.answer(asker, request).await.unwrap_or_else(ControlResponse::Error) }.boxed()
    }

    fn begin_chunk(
        &self,
        id: ChunkId,
        spec: ChunkSpec,
        lease: Option<LeaseStamp>,
    ) -> BoxFuture<'_, Result<Box<dyn ChunkSink>, ChunkError>> {
        async move {
            if let Some(lease) = &lease {
                drop(self.admit(lease).await.map_err(chunk_error)?);
            }
            let lease = lease.map(|lease| (lease, self.leases.clone(), self.on_fatal.clone()));
            let whose = if lease.is_some() { Whose::Repair } else { Whose::Client };
            let upload = self.store.begin(id, spec, whose).await?;
            Ok(Box::new(Sink { upload, lease }) as Box<dyn ChunkSink>)
        }
        .boxed()
    }

    fn read_blocks(
        &self,
        id: ChunkId,
        first_block: u32,
        blocks: u32,
    ) -> BoxFuture<'_, Result<ChunkBlocks, ChunkError>> {
        async move {
            let read = self.store.read_blocks(id, first_block, blocks).await?;
            Ok(ChunkBlocks { spec: read.spec, first_block: read.first_block, crcs: read.crcs, data: read.data })
        }
        .boxed()
    }

    fn note_gateways(&self, count: usize) {
        self.metrics.gateways.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    fn oldest_version(&self) -> u16 {
        // The root shard's answers are bytes here, and from this level on a disk may be away in them.
        let away = self.roles.root_may_have_away() || self.maps.newest().is_some_and(|map| map.has_away());
        if away {
            AWAY_VERSION
        } else {
            PROTOCOL_VERSIONS.min
        }
    }
}

/// Lets a request under a lease in. A disk that cannot write down what it obeyed ends here.
async fn admit(
    leases: &Leases,
    lease: &LeaseStamp,
    on_fatal: &(dyn Fn(String) + Send + Sync),
) -> Result<UnderLease, LeaseRefused> {
    let admitted = leases.admit(lease).await;
    if let Err(error @ LeaseRefused::File { .. }) = &admitted {
        on_fatal(error.to_string());
    }
    admitted
}

fn chunk_error(refused: LeaseRefused) -> ChunkError {
    match refused {
        LeaseRefused::Stale { current, .. } => ChunkError::StaleLease { current },
        LeaseRefused::File { .. } => ChunkError::Disk(refused.to_string()),
        other => ChunkError::Rejected(other.to_string()),
    }
}

fn lease_error(refused: LeaseRefused) -> ControlError {
    match refused {
        LeaseRefused::Stale { current, .. } => ControlError::StaleLease { current },
        LeaseRefused::File { .. } => ControlError::Disk(refused.to_string()),
        other => ControlError::BadRequest(other.to_string()),
    }
}

fn at_most(count: usize, limit: usize) -> Result<(), ControlError> {
    if count > limit {
        return Err(ControlError::BadRequest(format!("{count} items in one request, at most {limit} are allowed")));
    }
    Ok(())
}

impl Node {
    async fn answer(&self, asker: Asker, request: ControlRequest) -> Result<ControlResponse, ControlError> {
        Ok(match request {
            ControlRequest::Status => ControlResponse::Status(self.status(asker)?),
            ControlRequest::DeleteChunks { chunks, lease } => {
                at_most(chunks.len(), MAX_CHUNKS)?;
                let under_lease = match &lease {
                    Some(lease) => Some(self.admit(lease).await.map_err(lease_error)?),
                    None => None,
                };
                // A task of its own: a connection that breaks ends this request, but not the deletion, and a newer
                // holder of the lease must wait for that.
                let store = self.store.clone();
                let deleting = tokio::spawn(async move {
                    let deleted = store.delete(chunks).await;
                    drop(under_lease);
                    deleted
                });
                let deleted = deleting.await.map_err(|error| ControlError::Unavailable(error.to_string()))?;
                ControlResponse::Deleted(deleted.map_err(control_error)?)
            }
            ControlRequest::HaveChunks(ids) => {
                at_most(ids.len(), MAX_CHUNKS)?;
                ControlResponse::Have(self.store.have(ids).await.map_err(control_error)?)
            }
            ControlRequest::VerifyChunks(ids) => {
                at_most(ids.len(), MAX_VERIFY)?;
                let mut health = Vec::with_capacity(ids.len());
                // One after the other: a scrub takes one reader at a time, and leaves the others to clients.
                for id in ids {
                    health.push(self.store.verify(id).await.map_err(control_error)?);
                }
                ControlResponse::Health(health)
            }
            ControlRequest::ListChunks { after, limit } => {
                let limit = usize::try_from(limit).unwrap_or(MAX_CHUNKS).clamp(1, MAX_CHUNKS);
                let (chunks, more) = self.store.list(after, limit).await.map_err(control_error)?;
                ControlResponse::Chunks { chunks, more }
            }
            ControlRequest::ListDamaged { after, limit } => {
                let limit = usize::try_from(limit).unwrap_or(MAX_CHUNKS).clamp(1, MAX_CHUNKS);
                let (chunks, more) = self.store.damaged(after, limit).await.map_err(control_error)?;
                ControlResponse::Chunks { chunks, more }
            }
            ControlRequest::Quarantine { chunks, into, lease } => {
                at_most(chunks.len(), MAX_CHUNKS)?;
                let _under_lease = self.admit(&lease).await.map_err(lease_error)?;
                self.store.quarantine(chunks, into).await.map_err(control_error)?;
                ControlResponse::Done
            }
            ControlRequest::Shard { shard, request } => {
                ControlResponse::Shard(self.roles.serve_shard(shard, &request).await?)
            }
            ControlRequest::Raft { shard, from, message } => {
                self.check_sender(asker.disk, from)?;
                ControlResponse::Raft(self.roles.raft(shard, from, message).await?)
            }
            ControlRequest::RaftBatch { from, messages } => {
                self.check_sender(asker.disk, from)?;
                if messages.len() > MAX_CHUNKS {
                    return Err(ControlError::BadRequest(format!("{} Raft messages in a batch", messages.len())));
                }
                ControlResponse::RaftBatch(self.roles.raft_batch(from, messages).await)
            }
            ControlRequest::LinkBeat { from, message } => {
                self.check_sender(asker.disk, from)?;
                ControlResponse::LinkBeat(self.roles.link_beat(from, message).await?)
            }
            ControlRequest::InitShard { shard, members } => {
                self.roles.init_shard(shard, members).await?;
                ControlResponse::Done
            }
            ControlRequest::OfferMap(map) => {
                self.maps.offer(Arc::from(map)).await.map_err(|error| {
                    tracing::error!(%error, "an offered map was refused");
                    ControlError::BadRequest(error.to_string())
                })?;
                ControlResponse::Done
            }
            ControlRequest::OfferMapDiff(diff) => match self.maps.offer_diff(&diff).await {
                Ok(_) => ControlResponse::Done,
                Err(MapRefused::Rule(MapError::DiffBase { have, .. })) => {
                    return Err(ControlError::EpochMismatch { known: have });
                }
                Err(MapRefused::Rule(error)) => {
                    // The whole map may be right all the same: asked for as if this one had not been known.
                    tracing::warn!(%error, "an offered difference of the map was refused");
                    return Err(ControlError::EpochMismatch { known: self.maps.epoch() });
                }
                Err(error) => {
                    tracing::error!(%error, "an offered difference of the map was refused");
                    return Err(ControlError::BadRequest(error.to_string()));
                }
            },
            ControlRequest::GetMapSince(known) => match self.maps.since(known) {
                News::None => ControlResponse::Map(None),
                News::Diffs(diffs) => ControlResponse::MapDiffs(diffs),
                News::Whole(map) => ControlResponse::Map(Some(Box::new((*map).clone()))),
            },
            ControlRequest::GetMap => ControlResponse::Map(self.maps.newest().map(|map| Box::new((*map).clone()))),
            ControlRequest::ShardStatus => ControlResponse::Shards(self.roles.status()),
            ControlRequest::Reach(disks) => {
                at_most(disks.len(), MAX_REACH)?;
                ControlResponse::Reached(self.roles.reaches(&disks).await)
            }
        })
    }

    /// Replicas listen to the disk that the newest map means by a number, and to no other: a disk that was given the
    /// number or the address of another is not that one. Without a map nobody is known.
    fn check_sender(&self, caller: Option<DiskUuid>, from: DiskId) -> Result<(), ControlError> {
        let map = self.maps.newest().ok_or_else(no_map)?;
        match map.disk(from) {
            Some(disk) if Some(disk.uuid) == caller => Ok(()),
            Some(disk) => Err(ControlError::BadRequest(format!(
                "the map says that disk {from} is {}, but {} calls itself that",
                disk.uuid,
                caller.map_or_else(|| "a caller that is no disk".to_owned(), |uuid| uuid.to_string())
            ))),
            // A newer map may name it.
            None => Err(ControlError::Unavailable(format!("disk {from} is not in the map of epoch {}", map.epoch))),
        }
    }

    fn status(&self, asker: Asker) -> Result<NodeStatus, ControlError> {
        let fill = self.store.fill().map_err(control_error)?;
        Ok(NodeStatus {
            disk: Some(self.label.disk),
            uuid: self.label.uuid,
            epoch: self.maps.epoch(),
            capacity_bytes: fill.capacity_bytes,
            free_bytes: fill.free_bytes,
            chunks: fill.chunks,
            chunk_bytes: fill.chunk_bytes,
            feature_level: self.roles.feature_level(),
            data_connections: asker.data_connections,
        })
    }

    async fn admit(&self, lease: &LeaseStamp) -> Result<UnderLease, LeaseRefused> {
        admit(&self.leases, lease, &*self.on_fatal).await
    }
}

#[cfg(test)]
#[path = "../tests/scenery/spec.rs"]
mod spec;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::store::file_device::FileDevice;
    use crate::store::index_rocksdb::RocksEngine;
    use crate::store::StoreSettings;
    use granary_placement::id::{DiskUuid, ExtentId, PlacementGroupId};
    use granary_wire::chunk::block_crc;
    use spec::spec;

    #[tokio::test]
    async fn nothing_becomes_visible_under_a_lease_after_a_newer_holder_was_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let device = Arc::new(FileDevice::open(&dir.path().join("segments")).unwrap());
        let engine = Box::new(RocksEngine::open(&dir.path().join("index")).unwrap());
        let metrics = Arc::new(Metrics::new().unwrap());
        let settings = StoreSettings { segment_bytes: 64 << 20, reserve_bytes: 0, ..StoreSettings::default() };
        let failed = Arc::new(|reason: &str| panic!("{reason}"));
        let (store, _) = Store::open(device, engine, DiskUuid([7; 16]), settings, metrics, failed).unwrap();
        let leases = Arc::new(Leases::open(dir.path()).unwrap());
        let on_fatal: OnFatal = Arc::new(|reason| panic!("{reason}"));
        let stamp = |epoch: u64| LeaseStamp { task: "heal".to_owned(), epoch };
        let id = |number: u64, index: u8| ChunkId {
            group: PlacementGroupId(1),
            extent: ExtentId(u128::from(number).to_be_bytes()),
            index,
            generation: 1,
        };
        let begin = async |id: ChunkId, data: &Bytes| {
            let mut upload = store.begin(id, spec(data.len() as u64), Whose::Client).await.unwrap();
            upload.write(data.clone()).await.unwrap();
            let crcs = data.chunks(65536).zip(0..).map(|(bytes, block)| block_crc(&id, block, bytes)).collect();
            (upload, crcs)
        };
        let (large, small) = (Bytes::from(vec![5; 8 << 20]), Bytes::from_static(&[6; 40_000]));
        let mut written = 0;
        for round in 1..=12u64 {
            // The writer has much to do before it comes to the chunk under the lease.
            let mut busy = Vec::new();
            for index in 1..6 {
                let (upload, crcs) = begin(id(round, index), &large).await;
                busy.push(tokio::spawn(upload.finish(crcs)));
            }
            let (upload, crcs) = begin(id(round, 0), &small).await;
            let lease = Some((stamp(round), leases.clone(), on_fatal.clone()));
            let request = tokio::spawn(Box::new(Sink { upload, lease }).finish(crcs));
            // As when the connection breaks: the request is dropped at some point of its way.
            for _ in 0..round {
                tokio::time::sleep(std::time::Duration::from_micros(500)).await;
            }
            request.abort();
            drop(leases.admit(&stamp(round + 1)).await.unwrap());
            let before = store.have(vec![id(round, 0)]).await.unwrap();
            for other in busy {
                other.await.unwrap().unwrap();
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            assert_eq!(store.have(vec![id(round, 0)]).await.unwrap(), before, "round {round}");
            written += u64::from(before == [true]);
        }
        assert!(written > 0, "none was in time: nothing was shown");
    }
}
