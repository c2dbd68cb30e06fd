//! What a disk node answers: chunk requests from the store, metadata requests from the roles, the rest from what it knows.

use crate::label::Label;
use crate::maps::Maps;
use crate::roles::Roles;
use crate::store::handle::{Store, Upload};
use crate::store::StoreError;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::FutureExt;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus};
use granary_wire::server::{ChunkBlocks, ChunkSink, NodeService};
use granary_wire::ChunkError;
use std::sync::Arc;

/// Most chunks one request may delete, look up or list.
const MAX_CHUNKS: usize = 1000;
/// Most chunks one request may have read.
const MAX_VERIFY: usize = 256;

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

struct Sink(Upload);

impl ChunkSink for Sink {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), ChunkError>> {
        async move { Ok(self.0.write(data).await?) }.boxed()
    }

    fn finish(self: Box<Self>, crcs: Vec<u32>) -> BoxFuture<'static, Result<(), ChunkError>> {
        async move { Ok(self.0.finish(crcs).await?) }.boxed()
    }
}

impl NodeService for Node {
    fn control(&self, request: ControlRequest) -> BoxFuture<'_, ControlResponse> {
        async move { self.answer(request).await.unwrap_or_else(ControlResponse::Error) }.boxed()
    }

    fn begin_chunk(&self, id: ChunkId, spec: ChunkSpec) -> BoxFuture<'_, Result<Box<dyn ChunkSink>, ChunkError>> {
        async move { Ok(Box::new(Sink(self.store.begin(id, spec).await?)) as Box<dyn ChunkSink>) }.boxed()
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
}

fn at_most(count: usize, limit: usize) -> Result<(), ControlError> {
    if count > limit {
        return Err(ControlError::BadRequest(format!("{count} chunks in one request, at most {limit} are allowed")));
    }
    Ok(())
}

impl Node {
    async fn answer(&self, request: ControlRequest) -> Result<ControlResponse, ControlError> {
        Ok(match request {
            ControlRequest::Status => ControlResponse::Status(self.status()?),
            ControlRequest::DeleteChunks(ids) => {
                at_most(ids.len(), MAX_CHUNKS)?;
                ControlResponse::Deleted(self.store.delete(ids).await.map_err(control_error)?)
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
            ControlRequest::Shard { shard, request } => {
                ControlResponse::Shard(self.roles.serve_shard(shard, &request).await?)
            }
            ControlRequest::Raft { shard, from, message } => {
                ControlResponse::Raft(self.roles.raft(shard, from, message).await?)
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
            ControlRequest::GetMap => ControlResponse::Map(self.maps.newest().map(|map| Box::new((*map).clone()))),
            ControlRequest::ShardStatus => ControlResponse::Shards(self.roles.status()),
        })
    }

    fn status(&self) -> Result<NodeStatus, ControlError> {
        let fill = self.store.fill().map_err(control_error)?;
        Ok(NodeStatus {
            disk: Some(self.label.disk),
            uuid: self.label.uuid,
            epoch: self.maps.epoch(),
            capacity_bytes: fill.capacity_bytes,
            free_bytes: fill.free_bytes,
            chunks: fill.chunks,
            chunk_bytes: fill.chunk_bytes,
        })
    }
}
