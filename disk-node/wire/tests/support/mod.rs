//! A node in memory, and a server and client around it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, dead_code)]

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::FutureExt;
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ExtentId, HashSlot, PlacementGroupId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::{ClusterMap, Disk, DiskState, Location, Roles};
use granary_placement::scheme::CodecId;
use granary_wire::chunk::{block_count, block_crc, ChunkId, ChunkSpec, BLOCK_BYTES};
use granary_wire::control::{ControlRequest, ControlResponse, NodeStatus};
use granary_wire::error::ChunkError;
use granary_wire::{
    serve, Asker, ChunkBlocks, ChunkSink, ClientLimits, ClusterSecret, Credentials, Ends, NodeClient, NodeService,
    ServerLimits,
};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const SECRET: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
/// The disk that the node is.
pub const ME: DiskUuid = DiskUuid([0x33; 16]);
pub const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Default)]
pub struct MemoryNode {
    pub chunks: Mutex<HashMap<ChunkId, (ChunkSpec, Vec<u8>)>>,
    /// Chunks begun.
    pub begun: AtomicUsize,
    /// Sinks dropped without finish.
    pub aborted: AtomicUsize,
    /// Refuses every chunk with this.
    pub refuse: Mutex<Option<ChunkError>>,
    /// Refuses a chunk once it has this many bytes.
    pub refuse_after: Mutex<Option<(u64, ChunkError)>>,
    /// Flips a bit of this block in answers.
    pub lie_in_block: Mutex<Option<u32>>,
    /// Control requests hang.
    pub hang: AtomicBool,
    pub controls: AtomicUsize,
    /// The answer to Status, instead of Done.
    pub status: Mutex<Option<NodeStatus>>,
    /// No read is answered until so many are at work at once; then zero.
    pub crowd: AtomicUsize,
    /// Reads at work.
    pub reading: AtomicUsize,
    /// Gateways by the server's count.
    pub gateways: AtomicUsize,
    /// The answer to GetMap and Shard, instead of Done.
    pub answer: Mutex<Option<ControlResponse>>,
    /// The oldest protocol version whose speakers can read what the node has to tell; zero: any.
    pub oldest: AtomicU16,
    /// `oldest` from the next answer to Shard on.
    pub oldest_next: AtomicU16,
    /// The lease of each chunk begun.
    pub leases: Mutex<Vec<Option<LeaseStamp>>>,
}

struct MemorySink {
    node: Option<Arc<MemoryNode>>,
    id: ChunkId,
    spec: ChunkSpec,
    data: Vec<u8>,
}

impl Drop for MemorySink {
    fn drop(&mut self) {
        if let Some(node) = &self.node {
            node.aborted.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl ChunkSink for MemorySink {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), ChunkError>> {
        async move {
            self.data.extend_from_slice(&data);
            assert!(self.data.len() as u64 <= self.spec.len_bytes, "more bytes than announced");
            match &*self.node.as_ref().unwrap().refuse_after.lock().unwrap() {
                Some((limit, error)) if self.data.len() as u64 > *limit => Err(error.clone()),
                _ => Ok(()),
            }
        }
        .boxed()
    }

    fn finish(mut self: Box<Self>, crcs: Vec<u32>) -> BoxFuture<'static, Result<(), ChunkError>> {
        async move {
            for (block, data) in (0..).zip(self.data.chunks(BLOCK_BYTES as usize)) {
                if crcs.get(block as usize) != Some(&block_crc(&self.id, block, data)) {
                    return Err(ChunkError::Corrupt { block });
                }
            }
            assert_eq!(self.data.len() as u64, self.spec.len_bytes);
            let node = self.node.take().unwrap();
            let mut chunks = node.chunks.lock().unwrap();
            chunks.insert(self.id, (self.spec, std::mem::take(&mut self.data)));
            Ok(())
        }
        .boxed()
    }
}

pub struct Service(pub Arc<MemoryNode>);

impl NodeService for Service {
    fn control(&self, from: Asker, request: ControlRequest) -> BoxFuture<'_, ControlResponse> {
        async move {
            self.0.controls.fetch_add(1, Ordering::SeqCst);
            if self.0.hang.load(Ordering::SeqCst) {
                futures::future::pending::<()>().await;
            }
            match request {
                // A Raft message of one byte sleeps that many milliseconds; all are echoed.
                ControlRequest::Raft { message, .. } => {
                    if let [delay_ms] = message[..] {
                        tokio::time::sleep(Duration::from_millis(delay_ms.into())).await;
                    }
                    ControlResponse::Raft(message)
                }
                ControlRequest::DeleteChunks { chunks, .. } => ControlResponse::Deleted(chunks.len() as u32),
                ControlRequest::Status => {
                    let status = self.0.status.lock().unwrap().clone();
                    let told = |status| NodeStatus { data_connections: from.data_connections, ..status };
                    status.map_or(ControlResponse::Done, |status| ControlResponse::Status(told(status)))
                }
                ControlRequest::GetMap => self.0.answer.lock().unwrap().clone().unwrap_or(ControlResponse::Done),
                ControlRequest::Shard { .. } => {
                    self.0.oldest.fetch_max(self.0.oldest_next.load(Ordering::SeqCst), Ordering::SeqCst);
                    ControlResponse::Shard(Bytes::from_static(b"answer"))
                }
                _ => ControlResponse::Done,
            }
        }
        .boxed()
    }

    fn begin_chunk(
        &self,
        id: ChunkId,
        spec: ChunkSpec,
        lease: Option<LeaseStamp>,
    ) -> BoxFuture<'_, Result<Box<dyn ChunkSink>, ChunkError>> {
        async move {
            self.0.leases.lock().unwrap().push(lease);
            if let Some(error) = &*self.0.refuse.lock().unwrap() {
                return Err(error.clone());
            }
            self.0.begun.fetch_add(1, Ordering::SeqCst);
            let sink: Box<dyn ChunkSink> =
                Box::new(MemorySink { node: Some(Arc::clone(&self.0)), id, spec, data: Vec::new() });
            Ok(sink)
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
            if self.0.reading.fetch_add(1, Ordering::SeqCst) + 1 >= self.0.crowd.load(Ordering::SeqCst) {
                self.0.crowd.store(0, Ordering::SeqCst);
            }
            while self.0.crowd.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            self.0.reading.fetch_sub(1, Ordering::SeqCst);
            let (spec, data) = self.0.chunks.lock().unwrap().get(&id).cloned().ok_or(ChunkError::NotFound)?;
            let total = block_count(spec.len_bytes) as u32;
            if first_block >= total {
                return Err(ChunkError::Rejected("beyond the chunk's end".to_owned()));
            }
            let data = Bytes::from(data);
            let lie = *self.0.lie_in_block.lock().unwrap();
            let (mut crcs, mut found) = (Vec::new(), Vec::new());
            for block in first_block..total.min(first_block + blocks) {
                let from = block as usize * BLOCK_BYTES as usize;
                let bytes = data.slice(from..data.len().min(from + BLOCK_BYTES as usize));
                crcs.push(block_crc(&id, block, &bytes));
                found.push(if lie == Some(block) {
                    let mut wrong = bytes.to_vec();
                    wrong[0] ^= 1;
                    wrong.into()
                } else {
                    bytes
                });
            }
            Ok(ChunkBlocks { spec, first_block, crcs, data: found })
        }
        .boxed()
    }

    fn note_gateways(&self, count: usize) {
        self.0.gateways.store(count, Ordering::SeqCst);
    }

    fn oldest_version(&self) -> u16 {
        self.0.oldest.load(Ordering::SeqCst)
    }
}

pub fn credentials() -> Credentials {
    Credentials { cluster: ClusterId([7; 16]), secret: ClusterSecret::from_hex(SECRET).unwrap() }
}

pub struct Running {
    pub address: SocketAddr,
    pub node: Arc<MemoryNode>,
    pub stop: CancellationToken,
    pub task: JoinHandle<()>,
}

pub async fn start() -> Running {
    start_with(Arc::default(), ServerLimits::default(), "127.0.0.1:0").await
}

pub async fn start_with(node: Arc<MemoryNode>, limits: ServerLimits, address: &str) -> Running {
    let mut tries = 0;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if tries > 100 => panic!("{error}"),
            Err(_) => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let service = Arc::new(Service(Arc::clone(&node)));
    let task = tokio::spawn(serve(listener, service, (ME, credentials()), limits, stop.clone()));
    Running { address, node, stop, task }
}

impl Running {
    pub fn client(&self) -> NodeClient {
        NodeClient::new(self.address.to_string(), Ends::default(), credentials(), ClientLimits::default())
    }

    /// Stops the server in good order and starts another at the same address.
    pub async fn restart(self) -> Running {
        self.stop.cancel();
        self.task.await.unwrap();
        start_with(self.node, ServerLimits::default(), &self.address.to_string()).await
    }
}

pub fn chunk_id(number: u32) -> ChunkId {
    ChunkId { group: PlacementGroupId(number), extent: ExtentId([9; 16]), index: 3, generation: 1 }
}

pub fn spec(len_bytes: u64) -> ChunkSpec {
    ChunkSpec {
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 256 * 1024,
        extent_len_bytes: len_bytes * 4,
        len_bytes,
        owner: HashSlot(1),
        created_ms: 1_700_000_000_000,
    }
}

/// A map that says of a disk that it is away, or of none.
pub fn map(away: bool) -> ClusterMap {
    let disk = Disk {
        id: DiskId(1),
        uuid: ME,
        address: "d:1".to_owned(),
        location: Location { zone: "z".to_owned(), rack: "r".to_owned(), server: "s".to_owned() },
        weight: 1,
        roles: Roles::default(),
        state: if away { DiskState::Away } else { DiskState::In },
    };
    ClusterMap {
        cluster_id: ClusterId([7; 16]),
        epoch: Epoch(if away { 2 } else { 1 }),
        next_disk_id: 2,
        disks: [(disk.id, disk)].into(),
        schemes: [].into(),
        default_scheme: String::new(),
        groups: [].into(),
        shards: Vec::new(),
        slot_shards: Vec::new(),
    }
}

/// How the node stands.
pub fn node_status() -> NodeStatus {
    NodeStatus {
        disk: None,
        uuid: ME,
        epoch: Epoch(1),
        capacity_bytes: 0,
        free_bytes: 0,
        chunks: 0,
        chunk_bytes: 0,
        feature_level: 1,
        data_connections: 0,
    }
}

/// Waits until the counter has that value, some seconds at most.
pub async fn reaches(counter: &AtomicUsize, value: usize) {
    let begin = std::time::Instant::now();
    while counter.load(Ordering::SeqCst) != value {
        assert!(begin.elapsed() < DEADLINE, "{} instead of {value}", counter.load(Ordering::SeqCst));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Bytes that differ everywhere.
pub fn payload(len_bytes: u64) -> Bytes {
    let mut state = 0x9E37_79B9_7F4A_7C15u64 ^ len_bytes;
    (0..len_bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect::<Vec<u8>>()
        .into()
}

/// Reads a whole chunk.
pub async fn read_all(client: &NodeClient, id: ChunkId, len_bytes: u64) -> Result<Vec<u8>, ChunkError> {
    let mut data = Vec::new();
    let mut first = 0;
    while u64::from(first) < block_count(len_bytes) {
        let blocks = client.read_blocks(id, first, 64).await?;
        assert_eq!(blocks.first_block, first);
        for block in &blocks.data {
            data.extend_from_slice(block);
        }
        first += blocks.data.len() as u32;
    }
    Ok(data)
}
