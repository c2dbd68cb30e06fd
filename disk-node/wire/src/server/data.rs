//! Chunk requests of one connection.

use super::places::Number;
use super::stall::WriteDeadline;
use super::{ChunkBlocks, Server};
use crate::auth::Session;
use crate::body::WireBody;
use crate::chunk::{block_count, ChunkId, ChunkSpec, BLOCK_BYTES};
use crate::error::ChunkError;
use crate::head;
use bytes::{Bytes, BytesMut};
use granary_placement::lease::LeaseStamp;
use http::header::{HeaderValue, CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{pin, Pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::time::timeout;

const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 32;

/// How long the rest of a refused body is read. Closing a socket that has unread bytes resets the connection, and the
/// reset can overtake the refusal; a sender that hears the refusal stops by itself.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one connection to its end.
pub(super) async fn serve(server: &Arc<Server>, number: Number, stream: TcpStream, session: Session, peer: SocketAddr) {
    let requests = Arc::new(Requests { server: Arc::clone(server), number, session, counter: AtomicU64::new(0), peer });
    let service = service_fn(move |request| {
        let requests = Arc::clone(&requests);
        async move { Ok::<_, Infallible>(requests.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(server.limits.head_timeout)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(WriteDeadline::new(stream, server.limits.stall_timeout)), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = server.stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            match timeout(server.limits.stop_grace, connection).await {
                Ok(result) => result,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = result {
        // Peers that hang up and idle connections that end look like errors too.
        tracing::debug!(%peer, %error, "data connection ended");
    }
}

/// While it lives, the connection has a request at work and is not closed for another.
struct AtWork {
    server: Arc<Server>,
    number: Number,
}

impl AtWork {
    fn new(server: Arc<Server>, number: Number) -> AtWork {
        server.places().work(number);
        AtWork { server, number }
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.server.places().silence(self.number, Instant::now());
    }
}

/// The body of an answer; the request is at work until all of it was handed to the connection.
struct Answer {
    body: WireBody,
    _at_work: AtWork,
}

impl Body for Answer {
    type Data = <WireBody as Body>::Data;
    type Error = <WireBody as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What went wrong with a request.
enum Refusal {
    /// Not from who holds the session key, or not at this place in the order.
    Unauthenticated,
    Chunk(ChunkError),
}

impl From<ChunkError> for Refusal {
    fn from(error: ChunkError) -> Refusal {
        Refusal::Chunk(error)
    }
}

fn rejected(why: impl Into<String>) -> Refusal {
    Refusal::Chunk(ChunkError::Rejected(why.into()))
}

/// The requests of one connection, which hyper hands over one after the other.
struct Requests {
    server: Arc<Server>,
    /// Of the connection, among the server's.
    number: Number,
    session: Session,
    counter: AtomicU64,
    peer: SocketAddr,
}

impl Requests {
    async fn answer(&self, request: Request<Incoming>) -> Response<Answer> {
        let at_work = AtWork::new(self.server.clone(), self.number);
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        let (parts, mut body) = request.into_parts();
        let result = self.handle(&parts, &mut body, counter).await;
        let mut close = false;
        let (status, text, body_out) = match result {
            Ok((text, frames)) => (StatusCode::OK, text, frames),
            Err(Refusal::Unauthenticated) => {
                self.server.complaints.warn(self.peer, "a chunk request without the right authentication code");
                close = true;
                (StatusCode::UNAUTHORIZED, "unauthenticated".to_owned(), VecDeque::new())
            }
            Err(Refusal::Chunk(error)) => {
                if !body.is_end_stream() {
                    // Ends by itself after a while; and each connection has one request at a time.
                    tokio::spawn(timeout(DRAIN_TIMEOUT, drain(body)));
                }
                let (status, text) = head::error_answer(&error);
                (status, text, VecDeque::new())
            }
        };
        let body_out = WireBody::list(body_out);
        let len_bytes = body_out.remaining_bytes();
        let mac = head::answer_mac(&self.session.to_client, counter, status, &text, len_bytes);
        let mut response = Response::new(Answer { body: body_out, _at_work: at_work });
        *response.status_mut() = status;
        let headers = response.headers_mut();
        if close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        headers.insert(CONTENT_LENGTH, len_bytes.into());
        for (name, value) in [(head::ANSWER_HEADER, text), (head::MAC_HEADER, hex::encode(mac))] {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        }
        response
    }

    async fn handle(
        &self,
        parts: &http::request::Parts,
        body: &mut Incoming,
        counter: u64,
    ) -> Result<(String, VecDeque<Bytes>), Refusal> {
        let content_len = match head::single_header(&parts.headers, CONTENT_LENGTH.as_str()) {
            Some(text) => Some(text.parse::<u64>().map_err(|_| Refusal::Unauthenticated)?),
            None if parts.headers.contains_key(CONTENT_LENGTH) => return Err(Refusal::Unauthenticated),
            None => None,
        };
        let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
        let lease = head::single_header(&parts.headers, head::LEASE_HEADER);
        let (key, method) = (&self.session.to_server, parts.method.as_str());
        let expected = head::request_mac(key, counter, method, target, content_len, lease);
        // A lease that stands there twice or is no text was not read, so it was not covered by the code either.
        if lease.is_none() && parts.headers.contains_key(head::LEASE_HEADER) {
            return Err(Refusal::Unauthenticated);
        }
        if !head::mac_matches(&parts.headers, &expected) || parts.headers.contains_key(TRANSFER_ENCODING) {
            return Err(Refusal::Unauthenticated);
        }
        let id: ChunkId = parts
            .uri
            .path()
            .strip_prefix(head::CHUNKS_PATH)
            .and_then(|id| id.parse().ok())
            .ok_or_else(|| rejected("no such path"))?;
        let query = parts.uri.query().unwrap_or_default();
        match parts.method {
            Method::PUT => {
                let spec = head::parse_spec(query).ok_or_else(|| rejected("not a chunk's spec"))?;
                head::check_spec(&id, &spec).map_err(rejected)?;
                if content_len != Some(head::put_len_bytes(spec.len_bytes)) {
                    return Err(rejected("the body's length is not that of the chunk and its checksums"));
                }
                let lease =
                    lease.map(|text| head::parse_lease(text).ok_or_else(|| rejected("not a lease"))).transpose()?;
                self.put(id, spec, lease, body).await?;
                Ok((String::new(), VecDeque::new()))
            }
            Method::GET => {
                let (first, blocks) = head::parse_read(query).ok_or_else(|| rejected("not a range of blocks"))?;
                if blocks == 0 || blocks > super::MAX_READ_BLOCKS {
                    return Err(rejected(format!("{blocks} blocks at once")));
                }
                let found = self.server.service.read_blocks(id, first, blocks).await?;
                check_blocks(first, blocks, &found).map_err(|why| ChunkError::Disk(why.to_owned()))?;
                let mut table = BytesMut::with_capacity(found.crcs.len() * 4);
                for crc in &found.crcs {
                    table.extend_from_slice(&crc.to_be_bytes());
                }
                let text = head::blocks_answer(first, found.data.len(), &found.spec);
                Ok((text, std::iter::once(table.freeze()).chain(found.data).collect()))
            }
            _ => Err(rejected("no such method")),
        }
    }

    /// Passes the payload to a sink as it comes, then the checksum table. On any error the sink is dropped, which
    /// undoes it.
    async fn put(
        &self,
        id: ChunkId,
        spec: ChunkSpec,
        lease: Option<LeaseStamp>,
        body: &mut Incoming,
    ) -> Result<(), ChunkError> {
        let mut sink = self.server.service.begin_chunk(id, spec, lease).await?;
        let mut data_left = spec.len_bytes;
        let blocks = block_count(spec.len_bytes);
        let table_bytes =
            usize::try_from(blocks * 4).map_err(|_| ChunkError::Rejected("too many blocks".to_owned()))?;
        let mut table = BytesMut::with_capacity(table_bytes);
        while data_left > 0 || table.len() < table_bytes {
            let frame = timeout(self.server.limits.stall_timeout, body.frame())
                .await
                .map_err(|_| ChunkError::Rejected("the body stopped coming".to_owned()))?
                .ok_or_else(|| ChunkError::Rejected("the body is too short".to_owned()))?
                .map_err(|error| ChunkError::Rejected(format!("the body broke off: {error}")))?;
            let Ok(mut bytes) = frame.into_data() else { continue };
            let here = usize::try_from(data_left).map_or(bytes.len(), |left| left.min(bytes.len()));
            let data = bytes.split_to(here);
            if !data.is_empty() {
                data_left -= data.len() as u64;
                sink.write(data).await?;
            }
            if table.len() + bytes.len() > table_bytes {
                return Err(ChunkError::Rejected("the body is too long".to_owned()));
            }
            table.extend_from_slice(&bytes);
        }
        let crcs = table.as_chunks::<4>().0.iter().map(|crc| u32::from_be_bytes(*crc)).collect();
        sink.finish(crcs).await
    }
}

/// Are these the blocks that were asked for? A service that is wrong here must not be believed by the other side
/// either.
fn check_blocks(first: u32, blocks: u32, found: &ChunkBlocks) -> Result<(), &'static str> {
    let total = block_count(found.spec.len_bytes);
    let wanted = total.saturating_sub(first.into()).min(blocks.into());
    if found.first_block != first
        || wanted == 0
        || found.data.len() as u64 != wanted
        || found.crcs.len() as u64 != wanted
    {
        return Err("other blocks were read than asked for");
    }
    for (block, data) in (u64::from(first)..).zip(&found.data) {
        if data.len() as u64 != (found.spec.len_bytes - block * BLOCK_BYTES).min(BLOCK_BYTES) {
            return Err("a block was read with the wrong length");
        }
    }
    Ok(())
}

async fn drain(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}
