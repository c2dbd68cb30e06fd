//! The server's end: what a disk node implements, and the loop that serves it.
//!
//! 1. this file: [`NodeService`], limits, accepting and stopping;
//! 2. [`places`]: who may stay while many want to; [`gateways`]: how many share the places;
//! 3. [`data`]: chunk requests, HTTP/1.1;
//! 4. [`control`]: control frames;
//! 5. [`stall`]: a stream that gives up on a peer that does not read.
//!
//! Every connection is bounded in number, has a deadline until it is authenticated, and ends with [`serve`]: dropping
//! its future closes them all.

mod control;
mod data;
mod gateways;
mod places;
mod stall;
#[cfg(test)]
mod tests;

use crate::auth::{
    nonce, refuse_busy, server_handshake, Caller, Credentials, GatewayId, Purpose, VersionRange, PROTOCOL_VERSIONS,
};
use crate::chunk::{ChunkId, ChunkSpec};
use crate::control::{ControlRequest, ControlResponse};
use crate::error::{AuthError, ChunkError, LinkError};
use crate::log_pace::LogPace;
use bytes::Bytes;
use futures::future::BoxFuture;
use gateways::Gateways;
use granary_placement::id::DiskUuid;
use granary_placement::lease::LeaseStamp;
use granary_placement::settings::Values;
use places::{Bounds, Places};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Most blocks one read may ask for.
pub const MAX_READ_BLOCKS: u32 = 64;

/// What a disk node does with what peers ask. Futures may be dropped at any await when the peer goes away.
pub trait NodeService: Send + Sync + 'static {
    /// Answers a control request.
    fn control(&self, from: Asker, request: ControlRequest) -> BoxFuture<'_, ControlResponse>;

    /// Begins to store a chunk. Refuses early what cannot be stored, before its payload is on the way. `lease`: the
    /// lease under which background work writes it; one that was taken over is refused, also when that happens while
    /// the payload comes.
    fn begin_chunk(
        &self,
        id: ChunkId,
        spec: ChunkSpec,
        lease: Option<LeaseStamp>,
    ) -> BoxFuture<'_, Result<Box<dyn ChunkSink>, ChunkError>>;

    /// Reads blocks of a chunk: `blocks` is 1 to [`MAX_READ_BLOCKS`], clipped at the chunk's end.
    fn read_blocks(&self, id: ChunkId, first_block: u32, blocks: u32)
        -> BoxFuture<'_, Result<ChunkBlocks, ChunkError>>;

    /// Notes that so many gateways have connections here from now on.
    fn note_gateways(&self, count: usize);

    /// The oldest protocol version whose speakers can read what this node has to tell now. It may rise at any time;
    /// others are refused from then on, and connections of theirs end.
    fn oldest_version(&self) -> u16 {
        PROTOCOL_VERSIONS.min
    }
}

/// Who asks something over a control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Asker {
    /// The disk whose node asks; None for a gateway.
    pub disk: Option<DiskUuid>,
    /// How many connections for chunk requests it may have now, for the answer to Status. Zero for who is no gateway,
    /// and so has no share of the places.
    pub data_connections: u32,
}

/// Takes one chunk. Dropped without [`ChunkSink::finish`], the chunk was never there.
pub trait ChunkSink: Send {
    /// Takes the next bytes of the payload; never more in all than the spec announced.
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), ChunkError>>;

    /// All bytes came; `crcs` are the sender's checksums, one per block, to be compared with the sink's own. Ok only
    /// when the chunk is durable.
    fn finish(self: Box<Self>, crcs: Vec<u32>) -> BoxFuture<'static, Result<(), ChunkError>>;
}

/// Blocks of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkBlocks {
    /// What the chunk is part of.
    pub spec: ChunkSpec,
    /// Number of the first block.
    pub first_block: u32,
    /// Checksum per block.
    pub crcs: Vec<u32>,
    /// One `Bytes` per block: 64 KiB each, the chunk's last may be shorter.
    pub data: Vec<Bytes>,
}

/// Bounds and deadlines of [`serve`].
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Connections for chunk requests at once.
    pub max_connections: usize,
    /// Connections for control frames at once.
    pub max_control_connections: usize,
    /// Connections at once that are not authenticated yet.
    pub max_handshakes: usize,
    /// From accept to the end of the handshake.
    pub handshake_timeout: Duration,
    /// For the whole head of a request, counted from the end of the one before: also how long a data connection may be
    /// idle.
    pub head_timeout: Duration,
    /// Without a byte more, in a body or a frame, either way.
    pub stall_timeout: Duration,
    /// Control requests at work at once, per connection.
    pub max_control_in_flight: usize,
    /// Bodies of control requests at work, in bytes, over all connections.
    pub max_control_bytes: usize,
    /// A control connection on which nothing came for this long is closed; clients ping more often.
    pub control_idle_timeout: Duration,
    /// When stopping: how long requests under way may take to end.
    pub stop_grace: Duration,
}

impl ServerLimits {
    /// From the settings `node.*`.
    pub fn from_settings(values: &Values) -> ServerLimits {
        ServerLimits {
            max_connections: values.size("node.max_connections"),
            max_control_connections: values.size("node.max_control_connections"),
            max_handshakes: values.size("node.max_handshakes"),
            handshake_timeout: values.time("node.handshake_timeout"),
            head_timeout: values.time("node.head_timeout"),
            stall_timeout: values.time("node.stall_timeout"),
            max_control_in_flight: values.size("node.control_at_once"),
            max_control_bytes: values.size("node.control_bytes"),
            control_idle_timeout: values.time("node.control_idle_timeout"),
            stop_grace: values.time("node.stop_grace"),
        }
    }

    /// Connections of all kinds at once.
    pub fn connections(&self) -> usize {
        self.max_connections.saturating_add(self.max_control_connections).saturating_add(self.max_handshakes)
    }

    /// With places for at most half as many connections as the process may have files open: the other half is for
    /// segments, databases and connections to other nodes. Each kind of place gives up the same part.
    #[must_use]
    pub fn within(mut self, open_files: u64) -> ServerLimits {
        let (wanted, most) = (self.connections() as u128, u128::from(open_files / 2));
        if wanted > most {
            for places in [&mut self.max_connections, &mut self.max_control_connections, &mut self.max_handshakes] {
                *places = usize::try_from(*places as u128 * most / wanted).unwrap_or(*places).max(1);
            }
        }
        self
    }
}

impl Default for ServerLimits {
    fn default() -> ServerLimits {
        ServerLimits::from_settings(&Values::default())
    }
}

/// What all connections of a server share.
struct Server {
    service: Arc<dyn NodeService>,
    me: DiskUuid,
    credentials: Credentials,
    limits: ServerLimits,
    stop: CancellationToken,
    places: Mutex<Places>,
    gateways: Mutex<Gateways>,
    /// How many connections for chunk requests each gateway may have now. Read with every control request, and so
    /// without the lock.
    share: AtomicU32,
    control_units: Arc<Semaphore>,
    complaints: Complaints,
}

/// Serves peers of the disk `me` until `stop` is cancelled, and then until requests under way have ended or
/// `stop_grace` is over. Dropping the future ends everything at once.
pub async fn serve(
    listener: TcpListener,
    service: Arc<dyn NodeService>,
    (me, credentials): (DiskUuid, Credentials),
    limits: ServerLimits,
    stop: CancellationToken,
) {
    let server = Arc::new(Server {
        places: Mutex::new(Places::new(Bounds {
            strangers: limits.max_handshakes,
            control: limits.max_control_connections,
            data: limits.max_connections,
        })),
        gateways: Mutex::default(),
        share: AtomicU32::new(gateways::share(limits.max_connections, 0)),
        control_units: Arc::new(Semaphore::new(control::units(limits.max_control_bytes) as usize)),
        service,
        me,
        credentials,
        limits,
        stop,
        complaints: Complaints::default(),
    });
    let (mut connections, mut refused) = (JoinSet::new(), JoinSet::new());
    loop {
        tokio::select! {
            biased;
            () = server.stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            Some(_) = refused.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let close = CancellationToken::new();
                    let Some(number) = server.places().arrive(close.clone(), Instant::now()) else {
                        server.complaints.warn(peer, "too many connections that are not authenticated yet: see node.max_handshakes");
                        if refused.len() < REFUSED_AT_ONCE {
                            refused.spawn(refuse(stream));
                        }
                        continue;
                    };
                    let guest = Guest { server: Arc::clone(&server), number };
                    connections.spawn(async move { guest.connection(stream, peer, close).await });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: closing ones will free some, trying again at once will not.
                    tracing::warn!(%error, "cannot accept connections");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Connections at once that are told that there is no place for them.
const REFUSED_AT_ONCE: usize = 64;

/// Tells a client that there is no place for it just now. It is not taken for gone then.
async fn refuse(mut stream: TcpStream) {
    let _ = timeout(Duration::from_millis(200), refuse_busy(&mut stream)).await;
}

impl Server {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the service is told of whoever is at the other end.
    fn asker(&self, disk: Option<DiskUuid>, gateway: Option<GatewayId>) -> Asker {
        Asker { disk, data_connections: gateway.map_or(0, |_| self.share.load(Ordering::Relaxed)) }
    }

    /// What it speaks now.
    fn versions(&self) -> VersionRange {
        VersionRange { min: self.service.oldest_version().max(PROTOCOL_VERSIONS.min), ..PROTOCOL_VERSIONS }
    }

    fn count_gateway(&self, change: impl FnOnce(&mut Gateways)) {
        // Told under the lock, so that the last count told is the last one.
        let mut gateways = self.gateways.lock().unwrap_or_else(PoisonError::into_inner);
        let before = gateways.count();
        change(&mut gateways);
        if gateways.count() != before {
            self.share.store(gateways::share(self.limits.max_connections, gateways.count()), Ordering::Relaxed);
            self.service.note_gateways(gateways.count());
        }
    }
}

/// While it lives, its gateway counts.
struct Present {
    server: Arc<Server>,
    gateway: GatewayId,
}

impl Present {
    fn new(server: Arc<Server>, gateway: GatewayId) -> Present {
        server.count_gateway(|gateways| gateways.arrive(gateway));
        Present { server, gateway }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.server.count_gateway(|gateways| gateways.leave(self.gateway));
    }
}

/// A connection and its place, which is free when this is dropped.
struct Guest {
    server: Arc<Server>,
    number: places::Number,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.server.places().leave(self.number);
    }
}

impl Guest {
    /// `close` makes room for another connection: a stranger is told that the node is busy, and any other one ends.
    async fn connection(&self, mut stream: TcpStream, peer: SocketAddr, close: CancellationToken) {
        let server = &self.server;
        let _ = stream.set_nodelay(true);
        let authenticated = tokio::select! {
            () = server.stop.cancelled() => return,
            done = timeout(server.limits.handshake_timeout, self.handshake(&mut stream, &close)) => done,
        };
        let gateway = authenticated.as_ref().ok().and_then(|done| done.as_ref().ok()).and_then(|caller| caller.gateway);
        let _present = gateway.map(|gateway| Present::new(Arc::clone(server), gateway));
        match authenticated {
            Ok(Ok(Caller { purpose: Purpose::Data, session, .. })) => tokio::select! {
                () = close.cancelled() => {}
                () = data::serve(server, self.number, stream, session, peer) => {}
            },
            Ok(Ok(caller)) => control::serve(server, stream, caller, peer).await,
            Ok(Err(LinkError::Closed(_))) => {} // A port check, or a peer that died.
            Ok(Err(LinkError::Busy)) if close.is_cancelled() => server
                .complaints
                .warn(peer, "its place was needed before it had proved who it is: see node.max_handshakes"),
            Ok(Err(LinkError::Busy)) => server.complaints.warn(
                peer,
                "all places are taken: see node.max_connections (chunk requests) and node.max_control_connections",
            ),
            Ok(Err(LinkError::Auth(AuthError::Disk))) => {
                server
                    .complaints
                    .warn(peer, "the peer means another disk: the map, or its file of addresses, names this one's");
            }
            Ok(Err(error)) => server.complaints.warn(peer, &error.to_string()),
            Err(_) => server.complaints.warn(peer, "no handshake in time"),
        }
    }

    async fn handshake(&self, stream: &mut TcpStream, close: &CancellationToken) -> Result<Caller, LinkError> {
        let server = &self.server;
        let versions = server.versions();
        let admit = |purpose| server.places().admit(self.number, purpose == Purpose::Control, Instant::now());
        server_handshake(stream, &server.credentials, server.me, versions, nonce()?, close.clone(), admit).await
    }
}

/// Log lines about peers: strangers can provoke them.
#[derive(Default)]
struct Complaints(LogPace);

impl Complaints {
    fn warn(&self, peer: SocketAddr, what: &str) {
        if let Some(left_out) = self.0.turn(Instant::now()) {
            tracing::warn!(%peer, left_out, "connection refused: {what}");
        }
    }
}
