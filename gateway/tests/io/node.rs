//! A disk node whose disk is a map, with faults on demand.

use bytes::Bytes;
use futures::future::BoxFuture;
use granary_placement::id::{DiskId, DiskUuid, Epoch};
use granary_placement::lease::LeaseStamp;
use granary_wire::chunk::{block_count, block_crc, ChunkHealth, ChunkId, ChunkInfo, ChunkSpec, BLOCK_BYTES};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus};
use granary_wire::error::ChunkError;
use granary_wire::server::{serve, ChunkBlocks, ChunkSink, NodeService, ServerLimits};
use granary_wire::Credentials;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How a block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// A bit is flipped, and the node does not notice.
    Flip,
    /// The node notices that its checksum fails.
    Noticed,
    /// Bytes and checksum of another block of the chunk.
    Misplaced,
}

#[derive(Clone)]
pub struct Stored {
    pub spec: ChunkSpec,
    pub bytes: Bytes,
    pub crcs: Vec<u32>,
}

/// The disk and its faults; outlives the server in front of it.
pub struct Disk {
    pub id: DiskId,
    pub uuid: DiskUuid,
    pub chunks: Mutex<BTreeMap<ChunkId, Stored>>,
    pub damage: Mutex<BTreeMap<(ChunkId, u32), Damage>>,
    /// Reads find nothing.
    pub blind: AtomicBool,
    /// Every request hangs for ever, as if the process were stopped.
    pub hung: AtomicBool,
    /// Reads take this long.
    pub read_delay_ms: AtomicU64,
    /// The server is gone after so many bytes written from now on.
    pub die_after_bytes: AtomicU64,
    pub full: AtomicBool,
    /// All its chunks are that old, in milliseconds.
    pub age_ms: AtomicU64,
    pub reads_begun: AtomicU64,
    pub reads_ended: AtomicU64,
    pub deletes: AtomicU64,
    /// Chunks in quarantine, and for how long, in milliseconds.
    pub quarantine: Mutex<BTreeMap<ChunkId, u64>>,
    /// The highest epoch of each background task that was obeyed.
    pub leases: Mutex<BTreeMap<String, u64>>,
    server: Mutex<Option<(JoinHandle<()>, CancellationToken)>>,
}

impl Disk {
    pub fn new(id: u32) -> Arc<Disk> {
        Arc::new(Disk {
            id: DiskId(id),
            uuid: DiskUuid([id as u8; 16]),
            chunks: Mutex::default(),
            damage: Mutex::default(),
            blind: AtomicBool::new(false),
            hung: AtomicBool::new(false),
            read_delay_ms: AtomicU64::new(0),
            die_after_bytes: AtomicU64::new(u64::MAX),
            full: AtomicBool::new(false),
            age_ms: AtomicU64::new(0),
            reads_begun: AtomicU64::new(0),
            reads_ended: AtomicU64::new(0),
            deletes: AtomicU64::new(0),
            quarantine: Mutex::default(),
            leases: Mutex::default(),
            server: Mutex::new(None),
        })
    }

    pub fn serve(self: &Arc<Disk>, listener: TcpListener, credentials: Credentials) {
        let killed = CancellationToken::new();
        let service: Arc<dyn NodeService> = Arc::new(Service { disk: self.clone(), killed: killed.clone() });
        let who = (self.uuid, credentials);
        let server = tokio::spawn(serve(listener, service, who, ServerLimits::default(), CancellationToken::new()));
        *self.server.lock().unwrap() = Some((server, killed));
    }

    /// As kill -9: from now on nothing is done and nothing is answered; every connection breaks, new ones are refused.
    pub fn kill(&self) {
        if let Some((server, killed)) = self.server.lock().unwrap().take() {
            // The task ends, and closes its connections, only when its runtime comes to that. Nothing that reaches it
            // until then is answered.
            killed.cancel();
            server.abort();
        }
    }

    pub fn count(&self) -> usize {
        self.chunks.lock().unwrap().len()
    }

    /// Obeys a lease or gives the epoch that took it over.
    fn admit(&self, lease: &Option<LeaseStamp>) -> Result<(), u64> {
        let Some(LeaseStamp { task, epoch }) = lease else { return Ok(()) };
        let mut leases = self.leases.lock().unwrap();
        let current = leases.entry(task.clone()).or_default();
        *current = (*current).max(*epoch);
        if *current == *epoch {
            Ok(())
        } else {
            Err(*current)
        }
    }

    async fn hang(&self) {
        if self.hung.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    fn health(&self, id: &ChunkId) -> ChunkHealth {
        let chunks = self.chunks.lock().unwrap();
        let Some(stored) = chunks.get(id).filter(|_| !self.blind.load(Ordering::SeqCst)) else {
            return ChunkHealth::Missing;
        };
        let damage = self.damage.lock().unwrap();
        let damaged = damage.keys().any(|(damaged, _)| damaged == id);
        let wrong = stored.bytes.chunks(BLOCK_BYTES as usize).zip(&stored.crcs).zip(0u32..);
        let wrong = wrong.into_iter().any(|((bytes, crc), block)| block_crc(id, block, bytes) != *crc);
        if damaged || wrong {
            ChunkHealth::Corrupt
        } else {
            ChunkHealth::Good
        }
    }

    fn read(&self, id: ChunkId, first: u32, blocks: u32) -> Result<ChunkBlocks, ChunkError> {
        let chunks = self.chunks.lock().unwrap();
        let stored = chunks.get(&id).filter(|_| !self.blind.load(Ordering::SeqCst)).ok_or(ChunkError::NotFound)?;
        let total = block_count(stored.spec.len_bytes) as u32;
        let damage = self.damage.lock().unwrap();
        let (mut crcs, mut data) = (Vec::new(), Vec::new());
        for block in first..total.min(first + blocks) {
            let at = |block: u32| {
                let start = block as usize * BLOCK_BYTES as usize;
                stored.bytes.slice(start..stored.bytes.len().min(start + BLOCK_BYTES as usize))
            };
            let mut bytes = at(block);
            let mut crc = stored.crcs[block as usize];
            match damage.get(&(id, block)) {
                None => {}
                Some(Damage::Noticed) => return Err(ChunkError::Corrupt { block }),
                Some(Damage::Flip) => {
                    let mut flipped = bytes.to_vec();
                    let place = (id.index as usize * 977 + block as usize * 31) % flipped.len();
                    flipped[place] ^= 1 << (block % 8);
                    bytes = flipped.into();
                }
                Some(Damage::Misplaced) => {
                    let other = if block == 0 { total - 1 } else { block - 1 };
                    let there = at(other);
                    if there.len() == bytes.len() && other != block {
                        (bytes, crc) = (there, stored.crcs[other as usize]);
                    } else {
                        crc ^= 1;
                    }
                }
            }
            crcs.push(crc);
            data.push(bytes);
        }
        Ok(ChunkBlocks { spec: stored.spec, first_block: first, crcs, data })
    }
}

/// Does some work of a node, unless and until that is killed: its answer never comes then, and the connection breaks.
async fn until_killed<T>(killed: &CancellationToken, work: impl Future<Output = T>) -> T {
    let done = tokio::select! {
        biased;
        () = killed.cancelled() => None,
        done = work => Some(done),
    };
    match done.filter(|_| !killed.is_cancelled()) {
        Some(done) => done,
        None => std::future::pending().await,
    }
}

/// A node from its start until it is killed.
struct Service {
    disk: Arc<Disk>,
    killed: CancellationToken,
}

impl NodeService for Service {
    fn control(&self, _from: Option<DiskUuid>, request: ControlRequest) -> BoxFuture<'_, ControlResponse> {
        Box::pin(until_killed(&self.killed, async move {
            let disk = &self.disk;
            disk.hang().await;
            match request {
                ControlRequest::Status => ControlResponse::Status(NodeStatus {
                    disk: Some(disk.id),
                    uuid: disk.uuid,
                    epoch: Epoch(1),
                    capacity_bytes: 1 << 40,
                    free_bytes: 1 << 39,
                    chunks: disk.count() as u64,
                    chunk_bytes: 0,
                    feature_level: 1,
                }),
                ControlRequest::DeleteChunks { chunks: ids, lease } => {
                    if let Err(current) = disk.admit(&lease) {
                        return ControlResponse::Error(ControlError::StaleLease { current });
                    }
                    disk.deletes.fetch_add(ids.len() as u64, Ordering::SeqCst);
                    let mut chunks = disk.chunks.lock().unwrap();
                    let mut damage = disk.damage.lock().unwrap();
                    damage.retain(|(id, _), _| !ids.contains(id));
                    disk.quarantine.lock().unwrap().retain(|id, _| !ids.contains(id));
                    ControlResponse::Deleted(ids.iter().filter(|id| chunks.remove(id).is_some()).count() as u32)
                }
                ControlRequest::HaveChunks(ids) => {
                    let chunks = disk.chunks.lock().unwrap();
                    ControlResponse::Have(ids.iter().map(|id| chunks.contains_key(id)).collect())
                }
                ControlRequest::ListChunks { after, limit } => {
                    let (chunks, quarantine) = (disk.chunks.lock().unwrap(), disk.quarantine.lock().unwrap());
                    let mut listed: Vec<ChunkInfo> = chunks
                        .iter()
                        .filter(|(id, _)| after.is_none_or(|after| **id > after))
                        .take(limit as usize + 1)
                        .map(|(id, stored)| ChunkInfo {
                            id: *id,
                            spec: stored.spec,
                            age_ms: disk.age_ms.load(Ordering::SeqCst),
                            quarantined_ms: quarantine.get(id).copied(),
                        })
                        .collect();
                    let more = listed.len() > limit as usize;
                    listed.truncate(limit as usize);
                    ControlResponse::Chunks { chunks: listed, more }
                }
                ControlRequest::Quarantine { chunks: ids, into, lease } => {
                    if let Err(current) = disk.admit(&Some(lease)) {
                        return ControlResponse::Error(ControlError::StaleLease { current });
                    }
                    let mut quarantine = disk.quarantine.lock().unwrap();
                    for id in ids {
                        if into {
                            quarantine.entry(id).or_insert(0);
                        } else {
                            quarantine.remove(&id);
                        }
                    }
                    ControlResponse::Done
                }
                ControlRequest::VerifyChunks(ids) => {
                    ControlResponse::Health(ids.iter().map(|id| disk.health(id)).collect())
                }
                _ => ControlResponse::Error(ControlError::BadRequest("not in this test".to_owned())),
            }
        }))
    }

    fn begin_chunk(
        &self,
        id: ChunkId,
        spec: ChunkSpec,
        lease: Option<LeaseStamp>,
    ) -> BoxFuture<'_, Result<Box<dyn ChunkSink>, ChunkError>> {
        Box::pin(until_killed(&self.killed, async move {
            let Service { disk, killed } = self;
            disk.hang().await;
            disk.admit(&lease).map_err(|current| ChunkError::StaleLease { current })?;
            if disk.full.load(Ordering::SeqCst) {
                return Err(ChunkError::DiskFull);
            }
            let (disk, killed) = (disk.clone(), killed.clone());
            Ok(Box::new(Sink { disk, killed, id, spec, lease, bytes: Vec::new() }) as Box<dyn ChunkSink>)
        }))
    }

    fn read_blocks(&self, id: ChunkId, first: u32, blocks: u32) -> BoxFuture<'_, Result<ChunkBlocks, ChunkError>> {
        Box::pin(until_killed(&self.killed, async move {
            self.disk.reads_begun.fetch_add(1, Ordering::SeqCst);
            self.disk.hang().await;
            let delay_ms = self.disk.read_delay_ms.load(Ordering::SeqCst);
            if delay_ms > 0 {
                tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            }
            let result = self.disk.read(id, first, blocks);
            self.disk.reads_ended.fetch_add(1, Ordering::SeqCst);
            result
        }))
    }
}

struct Sink {
    disk: Arc<Disk>,
    killed: CancellationToken,
    id: ChunkId,
    spec: ChunkSpec,
    lease: Option<LeaseStamp>,
    bytes: Vec<u8>,
}

impl ChunkSink for Sink {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), ChunkError>> {
        let killed = self.killed.clone();
        let work = async move {
            self.disk.hang().await;
            let left = self.disk.die_after_bytes.load(Ordering::SeqCst);
            if left != u64::MAX {
                if (data.len() as u64) > left {
                    self.disk.kill();
                    std::future::pending::<()>().await;
                }
                self.disk.die_after_bytes.store(left - data.len() as u64, Ordering::SeqCst);
            }
            self.bytes.extend_from_slice(&data);
            Ok(())
        };
        Box::pin(async move { until_killed(&killed, work).await })
    }

    fn finish(self: Box<Self>, crcs: Vec<u32>) -> BoxFuture<'static, Result<(), ChunkError>> {
        let killed = self.killed.clone();
        let work = async move {
            self.disk.hang().await;
            self.disk.admit(&self.lease).map_err(|current| ChunkError::StaleLease { current })?;
            for (block, (bytes, crc)) in (0u32..).zip(self.bytes.chunks(BLOCK_BYTES as usize).zip(&crcs)) {
                if block_crc(&self.id, block, bytes) != *crc {
                    return Err(ChunkError::Corrupt { block });
                }
            }
            assert_eq!(self.bytes.len() as u64, self.spec.len_bytes);
            // As the chunk store does: the whole new chunk takes the place of an older one in one step.
            let mut chunks = self.disk.chunks.lock().unwrap();
            self.disk.damage.lock().unwrap().retain(|(id, _), _| *id != self.id);
            chunks.insert(self.id, Stored { spec: self.spec, bytes: self.bytes.into(), crcs });
            Ok(())
        };
        Box::pin(async move { until_killed(&killed, work).await })
    }
}
