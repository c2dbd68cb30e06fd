//! A disk node whose disk is a map, with faults on demand.
//!
//! Without faults it answers as the real one does: both are asked the same questions in
//! `disk-node/tests/answers/rows.rs`. What it leaves out: room (it is full or not), holes, recovery, and the
//! quarantine's clock, which tests set.

use bytes::Bytes;
use futures::future::BoxFuture;
use granary_placement::id::{DiskId, DiskUuid, Epoch};
use granary_placement::lease::LeaseStamp;
use granary_wire::chunk::{
    block_count, block_crc, ChunkHealth, ChunkId, ChunkInfo, ChunkSpec, BLOCK_BYTES, MAX_CHUNK_BYTES,
};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus, Reach};
use granary_wire::error::ChunkError;
use granary_wire::server::{serve, Asker, ChunkBlocks, ChunkSink, NodeService, ServerLimits};
use granary_wire::Credentials;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
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

/// What is to happen at the steps of requests.
pub type AtStep = Arc<dyn Fn(&'static str) + Send + Sync>;

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
    /// Control requests of these names, as steps have them, are refused.
    pub refuses: Mutex<BTreeSet<&'static str>>,
    /// How many control requests of each name came.
    asked: Mutex<BTreeMap<&'static str, u64>>,
    /// No page of a listing is longer.
    pub longest_page: AtomicUsize,
    /// It finds by itself what is corrupt, and lists it.
    pub scrubs: AtomicBool,
    /// All its chunks are that old, in milliseconds.
    pub age_ms: AtomicU64,
    pub reads_begun: AtomicU64,
    pub reads_ended: AtomicU64,
    pub deletes: AtomicU64,
    /// Chunks in quarantine, and for how long, in milliseconds.
    pub quarantine: Mutex<BTreeMap<ChunkId, u64>>,
    /// The highest epoch of each background task that was obeyed. Locked while a request under a lease is carried out.
    leases: Mutex<BTreeMap<String, u64>>,
    /// Requests that were refused because a newer holder of their lease had acted.
    pub refused_stale: AtomicU64,
    /// Chunks of which a request took a good block away.
    pub spoiled: Mutex<BTreeSet<ChunkId>>,
    /// Other disks that it says it does not reach.
    pub unreached: Mutex<BTreeSet<DiskId>>,
    /// Called with the name of each step of each request, before it.
    pub at_step: Mutex<Option<AtStep>>,
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
            refuses: Mutex::default(),
            asked: Mutex::default(),
            longest_page: AtomicUsize::new(MAX_CHUNKS),
            scrubs: AtomicBool::new(false),
            age_ms: AtomicU64::new(0),
            reads_begun: AtomicU64::new(0),
            reads_ended: AtomicU64::new(0),
            deletes: AtomicU64::new(0),
            quarantine: Mutex::default(),
            leases: Mutex::default(),
            refused_stale: AtomicU64::new(0),
            spoiled: Mutex::default(),
            unreached: Mutex::default(),
            at_step: Mutex::default(),
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

    /// How many control requests of this name came.
    pub fn asked(&self, name: &'static str) -> u64 {
        self.asked.lock().unwrap().get(name).copied().unwrap_or_default()
    }

    pub fn count(&self) -> usize {
        self.chunks.lock().unwrap().len()
    }

    /// Obeys a lease, or says why not. Whoever holds the answer is waited for by a newer holder's requests.
    fn admit(&self, lease: Option<&LeaseStamp>) -> Result<Option<MutexGuard<'_, BTreeMap<String, u64>>>, Refused> {
        let Some(LeaseStamp { task, epoch }) = lease else { return Ok(None) };
        if !LeaseStamp::is_task(task) {
            return Err(Refused::BadTask);
        }
        let mut leases = self.leases.lock().unwrap();
        let current = leases.entry(task.clone()).or_default();
        *current = (*current).max(*epoch);
        let current = *current;
        if current == *epoch {
            Ok(Some(leases))
        } else {
            self.refused_stale.fetch_add(1, Ordering::SeqCst);
            Err(Refused::Stale(current))
        }
    }

    async fn step(&self, name: &'static str) {
        let at_step = self.at_step.lock().unwrap().clone();
        if let Some(at_step) = at_step {
            at_step(name);
            // Whatever that did to this node or to others comes first.
            tokio::task::yield_now().await;
        }
        if self.hung.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    /// Puts a chunk in the place of an older one, or nothing, in one step.
    fn replace(&self, id: ChunkId, stored: Option<Stored>) -> bool {
        let (mut chunks, mut damage) = (self.chunks.lock().unwrap(), self.damage.lock().unwrap());
        let before = good_blocks(&chunks, &damage, &id);
        damage.retain(|(damaged, _), _| *damaged != id);
        let was_there = match stored {
            Some(stored) => chunks.insert(id, stored),
            None => {
                self.quarantine.lock().unwrap().remove(&id);
                chunks.remove(&id)
            }
        };
        if !before.is_subset(&good_blocks(&chunks, &damage, &id)) {
            self.spoiled.lock().unwrap().insert(id);
        }
        was_there.is_some()
    }

    fn health(&self, id: &ChunkId) -> ChunkHealth {
        let (chunks, damage) = (self.chunks.lock().unwrap(), self.damage.lock().unwrap());
        let Some(stored) = chunks.get(id).filter(|_| !self.blind.load(Ordering::SeqCst)) else {
            return ChunkHealth::Missing;
        };
        if good_blocks(&chunks, &damage, id).len() as u64 == block_count(stored.spec.len_bytes) {
            ChunkHealth::Good
        } else {
            ChunkHealth::Corrupt
        }
    }

    fn answer(&self, asker: Asker, request: ControlRequest) -> Result<ControlResponse, ControlError> {
        Ok(match request {
            ControlRequest::Status => ControlResponse::Status(NodeStatus {
                disk: Some(self.id),
                uuid: self.uuid,
                epoch: Epoch(1),
                capacity_bytes: 1 << 40,
                free_bytes: 1 << 39,
                chunks: self.count() as u64,
                chunk_bytes: 0,
                feature_level: 1,
                data_connections: asker.data_connections,
            }),
            ControlRequest::DeleteChunks { chunks: ids, lease } => {
                at_most(ids.len(), MAX_CHUNKS)?;
                let _under_lease = self.admit(lease.as_ref())?;
                self.deletes.fetch_add(ids.len() as u64, Ordering::SeqCst);
                ControlResponse::Deleted(ids.iter().filter(|id| self.replace(**id, None)).count() as u32)
            }
            ControlRequest::HaveChunks(ids) => {
                at_most(ids.len(), MAX_CHUNKS)?;
                let chunks = self.chunks.lock().unwrap();
                ControlResponse::Have(ids.iter().map(|id| chunks.contains_key(id)).collect())
            }
            ControlRequest::ListChunks { after, limit } => {
                let limit = (limit as usize).clamp(1, self.longest_page.load(Ordering::SeqCst));
                let (chunks, quarantine) = (self.chunks.lock().unwrap(), self.quarantine.lock().unwrap());
                let mut listed: Vec<ChunkInfo> = chunks
                    .iter()
                    .filter(|(id, _)| after.is_none_or(|after| **id > after))
                    .take(limit + 1)
                    .map(|(id, stored)| ChunkInfo {
                        id: *id,
                        spec: stored.spec,
                        age_ms: self.age_ms.load(Ordering::SeqCst),
                        quarantined_ms: quarantine.get(id).copied(),
                    })
                    .collect();
                let more = listed.len() > limit;
                listed.truncate(limit);
                ControlResponse::Chunks { chunks: listed, more }
            }
            ControlRequest::ListDamaged { after, limit } if self.scrubs.load(Ordering::SeqCst) => {
                let ids: Vec<ChunkId> = self.chunks.lock().unwrap().keys().copied().collect();
                let is_next = |id: &ChunkId| after.is_none_or(|after| *id > after);
                let bad = |id: &ChunkId| self.health(id) == ChunkHealth::Corrupt;
                let mut listed: Vec<ChunkId> = ids.into_iter().filter(is_next).filter(bad).collect();
                let limit = (limit as usize).clamp(1, self.longest_page.load(Ordering::SeqCst));
                let more = listed.len() > limit;
                listed.truncate(limit);
                let spec = |id: &ChunkId| self.chunks.lock().unwrap()[id].spec;
                let info = |id: ChunkId| ChunkInfo { id, spec: spec(&id), age_ms: 0, quarantined_ms: None };
                ControlResponse::Chunks { chunks: listed.into_iter().map(info).collect(), more }
            }
            ControlRequest::Quarantine { chunks: ids, into, lease } => {
                at_most(ids.len(), MAX_CHUNKS)?;
                let _under_lease = self.admit(Some(&lease))?;
                let (chunks, mut quarantine) = (self.chunks.lock().unwrap(), self.quarantine.lock().unwrap());
                for id in ids {
                    if !into {
                        quarantine.remove(&id);
                    } else if chunks.contains_key(&id) {
                        quarantine.entry(id).or_insert(0);
                    }
                }
                ControlResponse::Done
            }
            ControlRequest::VerifyChunks(ids) => {
                at_most(ids.len(), MAX_VERIFY)?;
                ControlResponse::Health(ids.iter().map(|id| self.health(id)).collect())
            }
            ControlRequest::Reach(disks) => {
                let unreached = self.unreached.lock().unwrap();
                let of = |disk| if unreached.contains(disk) { Reach::Unreached } else { Reach::Reached };
                ControlResponse::Reached(disks.iter().map(of).collect())
            }
            _ => return Err(ControlError::BadRequest("not in this test".to_owned())),
        })
    }

    fn read(&self, id: ChunkId, first: u32, blocks: u32) -> Result<ChunkBlocks, ChunkError> {
        let chunks = self.chunks.lock().unwrap();
        let stored = chunks.get(&id).filter(|_| !self.blind.load(Ordering::SeqCst)).ok_or(ChunkError::NotFound)?;
        let total = block_count(stored.spec.len_bytes) as u32;
        if blocks == 0 || first >= total {
            return Err(ChunkError::Rejected(format!("block {first} of a chunk of {total} blocks")));
        }
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

/// Most chunks that one request may name, and may have verified.
const MAX_CHUNKS: usize = 1000;
const MAX_VERIFY: usize = 256;

/// Why a request under a lease is refused.
enum Refused {
    Stale(u64),
    BadTask,
}

impl From<Refused> for ChunkError {
    fn from(refused: Refused) -> ChunkError {
        match refused {
            Refused::Stale(current) => ChunkError::StaleLease { current },
            Refused::BadTask => ChunkError::Rejected("not the name of a task".to_owned()),
        }
    }
}

impl From<Refused> for ControlError {
    fn from(refused: Refused) -> ControlError {
        match refused {
            Refused::Stale(current) => ControlError::StaleLease { current },
            Refused::BadTask => ControlError::BadRequest("not the name of a task".to_owned()),
        }
    }
}

fn good_blocks(
    chunks: &BTreeMap<ChunkId, Stored>,
    damage: &BTreeMap<(ChunkId, u32), Damage>,
    id: &ChunkId,
) -> BTreeSet<u32> {
    let Some(stored) = chunks.get(id) else { return BTreeSet::new() };
    let blocks = (0u32..).zip(stored.bytes.chunks(BLOCK_BYTES as usize).zip(&stored.crcs));
    let good = blocks.filter(|(block, (bytes, crc))| block_crc(id, *block, bytes) == **crc);
    good.map(|(block, _)| block).filter(|block| !damage.contains_key(&(*id, *block))).collect()
}

fn at_most(count: usize, limit: usize) -> Result<(), ControlError> {
    let too_many = || ControlError::BadRequest(format!("{count} chunks in one request, at most {limit} are allowed"));
    (count <= limit).then_some(()).ok_or_else(too_many)
}

fn name_of(request: &ControlRequest) -> &'static str {
    match request {
        ControlRequest::HaveChunks(_) => "have",
        ControlRequest::ListChunks { .. } => "list",
        ControlRequest::VerifyChunks(_) => "verify",
        ControlRequest::DeleteChunks { .. } => "delete",
        ControlRequest::ListDamaged { .. } => "damaged",
        _ => "control",
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
    fn note_gateways(&self, _count: usize) {}

    fn control(&self, asker: Asker, request: ControlRequest) -> BoxFuture<'_, ControlResponse> {
        Box::pin(until_killed(&self.killed, async move {
            let name = name_of(&request);
            self.disk.step(name).await;
            *self.disk.asked.lock().unwrap().entry(name).or_default() += 1;
            if self.disk.refuses.lock().unwrap().contains(name) {
                return ControlResponse::Error(ControlError::BadRequest("refused by this test".to_owned()));
            }
            self.disk.answer(asker, request).unwrap_or_else(ControlResponse::Error)
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
            disk.step("begin").await;
            drop(disk.admit(lease.as_ref())?);
            if spec.len_bytes == 0 || spec.len_bytes > MAX_CHUNK_BYTES {
                return Err(ChunkError::Rejected("a chunk has 1 byte to 64 MiB of payload".to_owned()));
            }
            if spec.k == 0 || u16::from(id.index) >= u16::from(spec.k) + u16::from(spec.m) {
                return Err(ChunkError::Rejected("the chunk's index is not below K+M".to_owned()));
            }
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
            self.disk.step("read").await;
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
            self.disk.step("write").await;
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
            let Sink { disk, killed, id, spec, lease, bytes } = *self;
            disk.step("finish").await;
            let _under_lease = disk.admit(lease.as_ref())?;
            if bytes.len() as u64 != spec.len_bytes {
                return Err(ChunkError::Rejected("less payload than was announced".to_owned()));
            }
            if crcs.len() as u64 != block_count(spec.len_bytes) {
                return Err(ChunkError::Rejected("as many checksums as blocks are needed".to_owned()));
            }
            for (block, (bytes, crc)) in (0u32..).zip(bytes.chunks(BLOCK_BYTES as usize).zip(&crcs)) {
                if block_crc(&id, block, bytes) != *crc {
                    return Err(ChunkError::Corrupt { block });
                }
            }
            // As the chunk store does: the whole new chunk takes the place of an older one in one step.
            if !killed.is_cancelled() {
                disk.replace(id, Some(Stored { spec, bytes: bytes.into(), crcs }));
            }
            Ok(())
        };
        Box::pin(async move { until_killed(&killed, work).await })
    }
}
