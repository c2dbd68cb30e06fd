//! One chunk written to a node or read from it.

use super::pool::{Lease, Pool};
use crate::body::WireBody;
use crate::chunk::{block_count, block_crc, BlockCrc, ChunkId, ChunkSpec, BLOCK_BYTES};
use crate::error::{AuthError, ChunkError, LinkError};
use crate::head;
use crate::server::{ChunkBlocks, MAX_READ_BLOCKS};
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use granary_placement::lease::LeaseStamp;
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::error::Error;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Pieces in a writer's queue, each at most [`PIECE_BYTES`]: what a slow node can make us hold per chunk.
const QUEUE_PIECES: usize = 8;
/// Longest piece, in bytes.
const PIECE_BYTES: usize = 256 * 1024;

type Answer = BoxFuture<'static, Result<Response<Incoming>, hyper::Error>>;

/// Sends a request head with its body.
fn send(
    lease: &mut Lease,
    method: Method,
    target: &str,
    stamp: Option<&LeaseStamp>,
    body: WireBody,
) -> Result<(Answer, u64), ChunkError> {
    let counter = lease.next_counter();
    // hyper leaves the content length out of a request without a body, and the server counts what it sees.
    let content_len = (method != Method::GET).then(|| body.remaining_bytes());
    let stamp = stamp.map(head::lease_text);
    let key = &lease.session().to_server;
    let mac = head::request_mac(key, counter, method.as_str(), target, content_len, stamp.as_deref());
    let mut request = Request::builder()
        .method(method)
        .uri(target)
        .header(http::header::HOST, "granary")
        .header(head::MAC_HEADER, hex::encode(mac));
    if let Some(stamp) = stamp {
        request = request.header(head::LEASE_HEADER, stamp);
    }
    let request = request.body(body).map_err(|error| ChunkError::Rejected(format!("not a request: {error}")))?;
    Ok((Box::pin(lease.sender().send_request(request)), counter))
}

/// Waits for the head of an answer.
async fn answer_head(answer: &mut Answer, lease: &Lease, pool: &Pool, counter: u64) -> Result<Good, ChunkError> {
    let answer = timeout(pool.target().limits.answer_timeout, answer).await.map_err(|_| LinkError::Timeout)?;
    check_answer(answer, lease, counter)
}

/// An answer that reports success.
struct Good {
    text: String,
    body: Incoming,
    len_bytes: u64,
}

/// Checks that the node itself gave this answer to this request, and turns errors into errors.
fn check_answer(
    answer: Result<Response<Incoming>, hyper::Error>,
    lease: &Lease,
    counter: u64,
) -> Result<Good, ChunkError> {
    let (parts, body) = answer.map_err(|error| link_error(&error))?.into_parts();
    let text = head::single_header(&parts.headers, head::ANSWER_HEADER).unwrap_or_default();
    let Some(len_bytes) = body.size_hint().exact() else {
        return Err(LinkError::Protocol("an answer without a length".to_owned()).into());
    };
    let expected = head::answer_mac(&lease.session().to_client, counter, parts.status, text, len_bytes);
    if !head::mac_matches(&parts.headers, &expected) {
        return Err(match parts.status {
            StatusCode::OK => LinkError::Auth(AuthError::Message),
            // hyper's own answers, to heads it cannot parse or that come too slowly, carry no code.
            status => LinkError::Protocol(format!("the peer answered {status} without authentication")),
        }
        .into());
    }
    match parts.status {
        StatusCode::OK => Ok(Good { text: text.to_owned(), body, len_bytes }),
        StatusCode::UNAUTHORIZED => Err(LinkError::Auth(AuthError::Message).into()),
        status => Err(head::parse_error(text)
            .unwrap_or_else(|| LinkError::Protocol(format!("unknown answer {status} `{text}`")).into())),
    }
}

fn link_error(error: &hyper::Error) -> LinkError {
    let text = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    if error.is_parse() {
        LinkError::Protocol(text)
    } else if error.is_timeout() {
        LinkError::Timeout
    } else {
        LinkError::Closed(text)
    }
}

/// Did this fail because an idle connection had died?
fn stale(lease_reused: bool, error: &ChunkError) -> bool {
    lease_reused && matches!(error, ChunkError::Link(LinkError::Closed(_)))
}

fn taken_early() -> ChunkError {
    LinkError::Protocol("the node took a chunk before it had all of it".to_owned()).into()
}

/// Streams one chunk to a node. Dropped before [`ChunkWriter::finish`], it closes the connection and the node forgets
/// the chunk.
pub struct ChunkWriter {
    id: ChunkId,
    spec: ChunkSpec,
    pool: Arc<Pool>,
    lease: Lease,
    counter: u64,
    queue: mpsc::Sender<Bytes>,
    answer: Answer,
    failed: Option<ChunkError>,
    written_bytes: u64,
    block: BlockCrc,
    block_left_bytes: u64,
    crcs: Vec<u32>,
}

/// Begins a chunk, over a new connection if `fresh`.
pub(super) async fn begin(
    pool: &Arc<Pool>,
    id: ChunkId,
    spec: ChunkSpec,
    stamp: Option<&LeaseStamp>,
    fresh: bool,
) -> Result<ChunkWriter, ChunkError> {
    head::check_spec(&id, &spec).map_err(ChunkError::Rejected)?;
    let mut lease = pool.lease(fresh, true).await?;
    let (queue, receiver) = mpsc::channel(QUEUE_PIECES);
    let body = WireBody::queue(receiver, head::put_len_bytes(spec.len_bytes));
    let target = format!("{}{id}?{}", head::CHUNKS_PATH, head::spec_query(&spec));
    let (answer, counter) = send(&mut lease, Method::PUT, &target, stamp, body)?;
    Ok(ChunkWriter {
        id,
        spec,
        pool: Arc::clone(pool),
        lease,
        counter,
        queue,
        answer,
        failed: None,
        written_bytes: 0,
        block: BlockCrc::new(&id, 0),
        block_left_bytes: BLOCK_BYTES,
        crcs: Vec::new(),
    })
}

/// Stores a chunk that is all at hand, a second time if the first connection was dead.
pub(super) async fn put(
    pool: &Arc<Pool>,
    id: ChunkId,
    spec: ChunkSpec,
    stamp: Option<&LeaseStamp>,
    data: Vec<Bytes>,
) -> Result<(), ChunkError> {
    let writer = begin(pool, id, spec, stamp, false).await?;
    let reused = writer.lease.reused;
    match writer.write_all(&data).await {
        Err(error) if stale(reused, &error) => begin(pool, id, spec, stamp, true).await?.write_all(&data).await,
        result => result,
    }
}

impl ChunkWriter {
    /// The chunk it writes.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// Payload taken so far, in bytes.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Takes the next bytes of the payload; waits while the node is behind. Checksums are made on the way.
    ///
    /// # Errors
    /// What the node refused the chunk for, or [`ChunkError::Link`]; [`ChunkError::Rejected`] for more bytes than
    /// announced. After an error every further call gives the same one.
    pub async fn write(&mut self, data: Bytes) -> Result<(), ChunkError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.take(data).await;
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    async fn take(&mut self, mut data: Bytes) -> Result<(), ChunkError> {
        let total = self.written_bytes.saturating_add(data.len() as u64);
        if total > self.spec.len_bytes {
            return Err(ChunkError::Rejected(format!("{total} bytes for a chunk of {}", self.spec.len_bytes)));
        }
        self.written_bytes = total;
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(PIECE_BYTES));
            self.checksum(&piece);
            self.push(piece).await?;
        }
        Ok(())
    }

    /// Runs the bytes through the checksums of the blocks they belong to.
    fn checksum(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let here = usize::try_from(self.block_left_bytes).map_or(bytes.len(), |left| left.min(bytes.len()));
            let (now, later) = bytes.split_at(here);
            self.block.update(now);
            self.block_left_bytes -= here as u64;
            bytes = later;
            if self.block_left_bytes == 0 {
                self.end_block();
            }
        }
    }

    fn end_block(&mut self) {
        let done = self.crcs.len() as u32 + 1;
        let block = std::mem::replace(&mut self.block, BlockCrc::new(&self.id, done));
        self.crcs.push(block.finish());
        self.block_left_bytes = BLOCK_BYTES;
    }

    /// Hands a piece to the connection. The node may answer at any time, with a refusal.
    async fn push(&mut self, piece: Bytes) -> Result<(), ChunkError> {
        let stall = self.pool.target().limits.stall_timeout;
        let queue = self.queue.clone();
        tokio::select! {
            biased;
            answer = &mut self.answer => {
                check_answer(answer, &self.lease, self.counter)?;
                Err(taken_early())
            }
            room = timeout(stall, queue.reserve()) => match room {
                Ok(Ok(place)) => {
                    place.send(piece);
                    Ok(())
                }
                // The connection takes no more of the body: the answer says why.
                Ok(Err(_)) => match answer_head(&mut self.answer, &self.lease, &self.pool, self.counter).await {
                    Ok(_) => Err(taken_early()),
                    Err(error) => Err(error),
                },
                Err(_) => Err(LinkError::Timeout.into()),
            },
        }
    }

    async fn write_all(mut self, data: &[Bytes]) -> Result<(), ChunkError> {
        for piece in data {
            self.write(piece.clone()).await?;
        }
        self.finish().await
    }

    /// Sends the checksums and waits until the node has the chunk durably.
    ///
    /// # Errors
    /// As [`ChunkWriter::write`]; [`ChunkError::Rejected`] for fewer bytes than announced; [`ChunkError::Corrupt`] when
    /// the bytes were damaged on the way. After [`ChunkError::Link`] the chunk may be there or not.
    pub async fn finish(mut self) -> Result<(), ChunkError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.written_bytes != self.spec.len_bytes {
            return Err(ChunkError::Rejected(format!(
                "{} bytes for a chunk of {}",
                self.written_bytes, self.spec.len_bytes
            )));
        }
        if self.block_left_bytes < BLOCK_BYTES {
            self.end_block();
        }
        let mut table = BytesMut::with_capacity(self.crcs.len() * 4);
        for crc in &self.crcs {
            table.extend_from_slice(&crc.to_be_bytes());
        }
        self.push(table.freeze()).await?;
        let result = answer_head(&mut self.answer, &self.lease, &self.pool, self.counter).await;
        match result {
            Ok(good) if good.len_bytes == 0 => {
                self.lease.give_back();
                Ok(())
            }
            Ok(_) => Err(LinkError::Protocol("a body where none belongs".to_owned()).into()),
            Err(error) => Err(error),
        }
    }
}

/// Reads blocks, a second time if the first connection was dead.
pub(super) async fn read(pool: &Arc<Pool>, id: ChunkId, first: u32, blocks: u32) -> Result<ChunkBlocks, ChunkError> {
    if blocks == 0 || blocks > MAX_READ_BLOCKS {
        return Err(ChunkError::Rejected(format!("{blocks} blocks at once")));
    }
    let lease = pool.lease(false, false).await?;
    let reused = lease.reused;
    match read_once(pool, lease, id, first, blocks).await {
        Err(error) if stale(reused, &error) => read_once(pool, pool.lease(true, false).await?, id, first, blocks).await,
        result => result,
    }
}

async fn read_once(
    pool: &Pool,
    mut lease: Lease,
    id: ChunkId,
    first: u32,
    blocks: u32,
) -> Result<ChunkBlocks, ChunkError> {
    let target = format!("{}{id}?{}", head::CHUNKS_PATH, head::read_query(first, blocks));
    let (mut answer, counter) = send(&mut lease, Method::GET, &target, None, WireBody::empty())?;
    let good = match answer_head(&mut answer, &lease, pool, counter).await {
        Err(error @ ChunkError::Link(_)) => return Err(error),
        // A refusal is a whole answer without a body: the connection is as good as before.
        Err(error) => {
            lease.give_back();
            return Err(error);
        }
        Ok(good) => good,
    };
    let (spec, sizes) = expected_blocks(&id, first, blocks, &good)?;
    let mut assembler = Assembler::new(sizes);
    let mut body = good.body;
    let stall = pool.target().limits.stall_timeout;
    while !assembler.complete() {
        let frame = timeout(stall, body.frame())
            .await
            .map_err(|_| LinkError::Timeout)?
            .ok_or_else(|| LinkError::Closed("in the middle of an answer".to_owned()))?
            .map_err(|error| link_error(&error))?;
        if let Ok(data) = frame.into_data() {
            assembler.push(data);
        }
    }
    let mut parts = assembler.parts.into_iter();
    let crcs = parse_table(&parts.next().unwrap_or_default());
    let data: Vec<Bytes> = parts.collect();
    for (block, (bytes, crc)) in (first..).zip(data.iter().zip(&crcs)) {
        if block_crc(&id, block, bytes) != *crc {
            return Err(ChunkError::Corrupt { block });
        }
    }
    lease.give_back();
    Ok(ChunkBlocks { spec, first_block: first, crcs, data })
}

/// The chunk's spec and the sizes of what the body consists of: the checksum table and each block.
fn expected_blocks(id: &ChunkId, first: u32, blocks: u32, good: &Good) -> Result<(ChunkSpec, Vec<usize>), ChunkError> {
    let bad = |what: &str| ChunkError::Link(LinkError::Protocol(what.to_owned()));
    let (got_first, got_blocks, spec) =
        head::parse_blocks_answer(&good.text).ok_or_else(|| bad("an answer that does not say what it holds"))?;
    head::check_spec(id, &spec).map_err(|why| bad(&why))?;
    let total = block_count(spec.len_bytes);
    let wanted = total.saturating_sub(first.into()).min(blocks.into());
    if got_first != first || u64::from(got_blocks) != wanted || wanted == 0 {
        return Err(bad("an answer with other blocks than asked for"));
    }
    let mut sizes = vec![got_blocks as usize * 4];
    for block in u64::from(first)..u64::from(first) + wanted {
        sizes.push((spec.len_bytes - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize);
    }
    if good.len_bytes != sizes.iter().map(|size| *size as u64).sum::<u64>() {
        return Err(bad("an answer of the wrong length"));
    }
    Ok((spec, sizes))
}

fn parse_table(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|crc| u32::from_be_bytes(*crc)).collect()
}

/// Cuts a body that comes in pieces of any size into parts of known sizes; copies only parts that lie in more than one
/// piece.
struct Assembler {
    sizes: std::vec::IntoIter<usize>,
    need: usize,
    partial: BytesMut,
    parts: Vec<Bytes>,
}

impl Assembler {
    fn new(sizes: Vec<usize>) -> Assembler {
        let parts = Vec::with_capacity(sizes.len());
        let mut sizes = sizes.into_iter();
        let need = sizes.next().unwrap_or(0);
        Assembler { sizes, need, partial: BytesMut::new(), parts }
    }

    fn complete(&self) -> bool {
        self.need == 0
    }

    fn push(&mut self, mut piece: Bytes) {
        while !piece.is_empty() && self.need > 0 {
            let lacking = self.need - self.partial.len();
            let part = piece.split_to(lacking.min(piece.len()));
            if part.len() == self.need {
                self.parts.push(part);
            } else {
                if self.partial.is_empty() {
                    self.partial.reserve(self.need);
                }
                self.partial.extend_from_slice(&part);
                if self.partial.len() < self.need {
                    continue;
                }
                self.parts.push(self.partial.split().freeze());
            }
            self.need = self.sizes.next().unwrap_or(0);
        }
    }
}
