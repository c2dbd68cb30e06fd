//! The client's end: one [`NodeClient`] per disk node.
//!
//! 1. this file: limits, and how a connection is made;
//! 2. [`pool`]: data connections, one request at a time on each;
//! 3. [`chunk`]: a chunk written or read over one of them;
//! 4. [`control`]: the one connection that carries many control requests at once.

mod chunk;
mod control;
mod pool;
#[cfg(test)]
mod pool_tests;
#[cfg(test)]
mod tests;

pub use chunk::ChunkWriter;

use crate::auth::{client_handshake, nonce, Credentials, Ends, Purpose, Session, PROTOCOL_VERSIONS};
use crate::chunk::{ChunkId, ChunkSpec};
use crate::control::{ControlRequest, ControlResponse};
use crate::error::{ChunkError, LinkError};
use crate::server::ChunkBlocks;
use bytes::Bytes;
use granary_placement::lease::LeaseStamp;
use granary_placement::settings::Values;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Bounds and deadlines of a [`NodeClient`].
#[derive(Debug, Clone)]
pub struct ClientLimits {
    /// Name lookup and TCP connect.
    pub connect_timeout: Duration,
    /// The handshake that follows.
    pub handshake_timeout: Duration,
    /// From the end of a request to the head of its answer.
    pub answer_timeout: Duration,
    /// Without a byte more, in a body or a frame, either way.
    pub stall_timeout: Duration,
    /// Chunk requests under way at once; also the most data connections. Fewer when the node tells a smaller share of
    /// its places with its Status.
    pub max_in_use: usize,
    /// How long a chunk request waits for a place among them before it is [`ChunkError::Overloaded`].
    pub pool_wait: Duration,
    /// Data connections kept for the next request.
    pub max_idle: usize,
    /// How long they are kept. Shorter than the server waits for a head, so that the client is the one who closes.
    pub idle_keep: Duration,
    /// Control requests under way at once.
    pub max_control_in_flight: usize,
    /// Control requests waiting to be sent, in bytes of their bodies.
    pub max_control_queue_bytes: usize,
    /// Pause after the first failed control connect; doubles with each further failure.
    pub reconnect_min: Duration,
    /// Longest such pause.
    pub reconnect_max: Duration,
    /// A silent control connection is asked for a sign of life this often.
    pub ping_every: Duration,
    /// A control connection silent for this long is given up.
    pub silence_timeout: Duration,
}

impl ClientLimits {
    /// From the settings `disks.*`.
    pub fn from_settings(values: &Values) -> ClientLimits {
        ClientLimits {
            connect_timeout: values.time("disks.connect_timeout"),
            handshake_timeout: values.time("disks.handshake_timeout"),
            answer_timeout: values.time("disks.answer_timeout"),
            stall_timeout: values.time("disks.stall_timeout"),
            max_in_use: values.size("disks.requests_at_once"),
            pool_wait: values.time("disks.pool_wait"),
            max_idle: values.size("disks.idle_connections"),
            idle_keep: values.time("disks.idle_keep"),
            max_control_in_flight: values.size("disks.control_at_once"),
            max_control_queue_bytes: values.size("disks.control_queue"),
            reconnect_min: values.time("disks.reconnect_min"),
            reconnect_max: values.time("disks.reconnect_max"),
            ping_every: values.time("disks.control_ping_interval"),
            silence_timeout: values.time("disks.control_silence"),
        }
    }
}

impl Default for ClientLimits {
    fn default() -> ClientLimits {
        ClientLimits::from_settings(&Values::default())
    }
}

/// One disk node, as its peers and gateways see it. Cheap to clone; connects when asked something.
#[derive(Clone)]
pub struct NodeClient {
    shared: Arc<Shared>,
}

struct Shared {
    pool: Arc<pool::Pool>,
    control: control::ControlLink,
}

/// Where a node is and how to get in.
#[derive(Clone)]
struct Target {
    address: Arc<str>,
    ends: Ends,
    credentials: Credentials,
    limits: Arc<ClientLimits>,
}

impl fmt::Debug for NodeClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeClient").field("address", &self.address()).finish_non_exhaustive()
    }
}

impl NodeClient {
    /// A client of the node at `address` (`host:port`) that serves the disk `ends.to`: every connection, for chunks
    /// too, is refused with [`AuthError::Disk`](crate::error::AuthError::Disk) when another disk is found there.
    /// Nothing is connected yet.
    pub fn new(address: String, ends: Ends, credentials: Credentials, limits: ClientLimits) -> NodeClient {
        let target = Target { address: address.into(), ends, credentials, limits: Arc::new(limits) };
        let pool = Arc::new(pool::Pool::new(target.clone()));
        NodeClient { shared: Arc::new(Shared { pool, control: control::ControlLink::new(target) }) }
    }

    /// The address it was made with.
    pub fn address(&self) -> &str {
        &self.shared.pool.target().address
    }

    /// The disks it was made for.
    pub fn ends(&self) -> Ends {
        self.shared.pool.target().ends
    }

    /// Begins to store a chunk; its payload follows through the writer. A refusal of the node (disk full, already
    /// there) comes out of a later [`ChunkWriter::write`] or of [`ChunkWriter::finish`].
    ///
    /// # Errors
    /// [`ChunkError::Rejected`] for a spec no chunk can have, [`ChunkError::Overloaded`] when too many requests are
    /// under way, [`ChunkError::Link`] when there is no connection.
    pub async fn begin_chunk(&self, id: ChunkId, spec: ChunkSpec) -> Result<ChunkWriter, ChunkError> {
        chunk::begin(&self.shared.pool, id, spec, None, false).await
    }

    /// As [`NodeClient::begin_chunk`], for background work: the node refuses it once another holder of the task's lease
    /// has acted there.
    ///
    /// # Errors
    /// As [`NodeClient::begin_chunk`]; [`ChunkError::StaleLease`] comes out of the writer.
    pub async fn begin_chunk_under(
        &self,
        lease: &LeaseStamp,
        id: ChunkId,
        spec: ChunkSpec,
    ) -> Result<ChunkWriter, ChunkError> {
        chunk::begin(&self.shared.pool, id, spec, Some(lease), false).await
    }

    /// Stores a chunk whose payload is at hand. Sent a second time when the connection taken from the pool turns out to
    /// be dead: a chunk that was there already is replaced.
    ///
    /// # Errors
    /// What the node refused it for, or [`ChunkError::Link`].
    pub async fn put_chunk(&self, id: ChunkId, spec: ChunkSpec, data: Vec<Bytes>) -> Result<(), ChunkError> {
        chunk::put(&self.shared.pool, id, spec, None, data).await
    }

    /// As [`NodeClient::put_chunk`], for background work: the node refuses it once another holder of the task's lease
    /// has acted there.
    ///
    /// # Errors
    /// As [`NodeClient::put_chunk`], and [`ChunkError::StaleLease`].
    pub async fn put_chunk_under(
        &self,
        lease: &LeaseStamp,
        id: ChunkId,
        spec: ChunkSpec,
        data: Vec<Bytes>,
    ) -> Result<(), ChunkError> {
        chunk::put(&self.shared.pool, id, spec, Some(lease), data).await
    }

    /// Reads up to `blocks` blocks (1 to [`crate::server::MAX_READ_BLOCKS`]) from `first_block` on, fewer at the
    /// chunk's end. Every block has been checked against its seeded checksum when this returns.
    ///
    /// # Errors
    /// [`ChunkError::Corrupt`] names the first block that is wrong, here or on the node's disk.
    pub async fn read_blocks(&self, id: ChunkId, first_block: u32, blocks: u32) -> Result<ChunkBlocks, ChunkError> {
        chunk::read(&self.shared.pool, id, first_block, blocks).await
    }

    /// Asks something over the control connection. [`ControlResponse::Error`] is handed back as it is. The share of the
    /// node's places that an answer to Status tells holds for chunk requests from then on.
    ///
    /// # Errors
    /// [`LinkError::Connect`], [`LinkError::Busy`] and [`LinkError::TooLarge`] mean that nothing was sent, and so does
    /// [`AuthError::Version`](crate::error::AuthError::Version), also where the node speaks a version that cannot read
    /// this very request; after any other the request may have been carried out.
    pub async fn control(&self, request: ControlRequest, deadline: Duration) -> Result<ControlResponse, LinkError> {
        let answer = self.shared.control.call(request, deadline).await;
        if let Ok(ControlResponse::Status(status)) = &answer {
            self.shared.pool.go_by_share(status.data_connections);
        }
        answer
    }
}

/// A second handle on a connection's socket, to ask the kernel whether the peer has closed it. The runtime learns of
/// that a moment later, and in this moment a request would be lost on a connection that was dead before.
struct Probe(std::net::TcpStream);

impl Probe {
    fn of(stream: &TcpStream) -> Result<Probe, LinkError> {
        let handle = stream.as_fd().try_clone_to_owned().map_err(|error| LinkError::Connect(error.to_string()))?;
        Ok(Probe(handle.into()))
    }

    /// Nothing to read and not closed.
    fn quiet(&self) -> bool {
        matches!(self.0.peek(&mut [0u8; 1]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Not closed; there may be something to read.
    fn open(&self) -> bool {
        match self.0.peek(&mut [0u8; 1]) {
            Ok(read) => read > 0,
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

/// Makes an authenticated connection.
async fn connect(target: &Target, purpose: Purpose) -> Result<(TcpStream, Session), LinkError> {
    let limits = &target.limits;
    let mut stream = timeout(limits.connect_timeout, TcpStream::connect(&*target.address))
        .await
        .map_err(|_| LinkError::Connect(format!("no connection to {} in time", target.address)))?
        .map_err(|error| LinkError::Connect(format!("{}: {error}", target.address)))?;
    stream.set_nodelay(true).map_err(|error| LinkError::Connect(error.to_string()))?;
    let handshake =
        client_handshake(&mut stream, &target.credentials, (purpose, target.ends), PROTOCOL_VERSIONS, nonce()?);
    match timeout(limits.handshake_timeout, handshake).await {
        Ok(Ok(session)) => {
            tracing::debug!(address = %target.address, ?purpose, version = session.version, "connected");
            Ok((stream, session))
        }
        // Nothing was asked yet, so whatever it was, it is a failure to connect.
        Ok(Err(LinkError::Closed(why))) => Err(LinkError::Connect(format!("{}: {why}", target.address))),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(LinkError::Connect(format!("no handshake with {} in time", target.address))),
    }
}
