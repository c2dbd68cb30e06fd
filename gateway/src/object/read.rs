//! A range of a payload as a stream: [`ObjectStore::read`].
//!
//! The range is cut into windows of whole stripes; once a quarter of one was given out the next is fetched, not
//! earlier: a client that does not read has one window in memory. Healthy windows are slices of the blocks as they came
//! from the disks: nothing is copied. When memory is short, windows are a block long, and the next is fetched when the
//! last was let go.

use super::budget::{Grant, FLOOR_BYTES};
use super::fetch::{fetch, Avoid, Wanted};
use super::open_reads::OpenRead;
use super::{check_extent, ObjectStore};
use bytes::Bytes;
use futures::stream::Stream;
use granary_meta::record::{ExtentRef, ObjectData};
use granary_placement::codec::{ChunkSet, CodecError};
use granary_placement::id::ExtentId;
use granary_wire::chunk::BLOCK_BYTES;
use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::PollSemaphore;

/// Why a payload could not be read. Every one is a 5xx; nothing is ever cleaned away because of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Fewer than K chunks are good, for certain: more than M are missing or corrupt.
    #[error("extent {extent} is lost: {good} good chunks, {needed} needed")]
    Lost {
        /// Which extent.
        extent: ExtentId,
        /// Good chunks found.
        good: u8,
        /// K.
        needed: u8,
    },
    /// Fewer than K chunks could be reached; others may be good on disks that do not answer. Worth retrying later.
    #[error("extent {extent} cannot be reached: {good} good chunks, {needed} needed, other disks do not answer")]
    Unreachable {
        /// Which extent.
        extent: ExtentId,
        /// Good chunks reached.
        good: u8,
        /// K.
        needed: u8,
    },
    /// An inline payload does not agree with its checksum.
    #[error("the payload in the record does not agree with its checksum")]
    InlineCorrupt,
    /// The range is not within the payload.
    #[error("range {start}..{end} is not within {len_bytes} bytes")]
    Range {
        /// First byte.
        start: u64,
        /// After the last byte.
        end: u64,
        /// Length of the payload.
        len_bytes: u64,
    },
    /// The record cannot be: a fault of whoever wrote it.
    #[error("bad record: {0}")]
    BadRecord(String),
    /// The codec refuses; a fault of this build.
    #[error(transparent)]
    Codec(CodecError),
    /// The task that read was stopped.
    #[error("reading was stopped: {0}")]
    Stopped(String),
}

impl ObjectStore {
    /// The bytes `range` of a payload, exactly and verified. Nothing is asked of the disks before the reader is polled
    /// or [opened](ObjectReader::open).
    pub fn read(&self, data: &ObjectData, range: Range<u64>) -> ObjectReader {
        let mut reader = ObjectReader {
            store: self.clone(),
            avoid: Arc::new(Avoid::default()),
            extents: VecDeque::new(),
            ready: VecDeque::new(),
            prefetch_below: 0,
            floor: PollSemaphore::new(Arc::new(Semaphore::new(1))),
            current: None,
            next: None,
            failed: None,
            left_bytes: range.end.saturating_sub(range.start),
            _open: self.open_reads().begin(),
        };
        match data {
            ObjectData::Inline { bytes, crc32 } => reader.read_inline(bytes, *crc32, range),
            ObjectData::Extents(extents) => reader.read_extents(extents, range),
        }
        reader
    }
}

/// A stream of verified bytes; ends after exactly the length of its range, or with one error.
pub struct ObjectReader {
    store: ObjectStore,
    avoid: Arc<Avoid>,
    /// What is still to be fetched: extents, and the range of each.
    extents: VecDeque<(Arc<ExtentRef>, Range<u64>)>,
    ready: VecDeque<Bytes>,
    /// The next window is fetched once no more than so many bytes are left to give.
    prefetch_below: u64,
    /// The block that this reader may have in memory when memory is short.
    floor: PollSemaphore,
    current: Option<Fetching>,
    next: Option<Fetching>,
    failed: Option<ReadError>,
    left_bytes: u64,
    /// While it lives, garbage that was not queued before it began stays.
    _open: OpenRead,
}

/// A window being fetched; given up when dropped.
struct Fetching(JoinHandle<Result<Vec<Bytes>, ReadError>>);

impl Drop for Fetching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ObjectReader {
    /// Fetches the first window, so that an error is known before the first byte is given out.
    ///
    /// # Errors
    /// Why the first window cannot be read. The stream then ends with the same error.
    pub async fn open(&mut self) -> Result<(), ReadError> {
        std::future::poll_fn(|cx| self.poll_ready(cx)).await
    }

    /// Bytes the stream has still to give.
    pub fn left_bytes(&self) -> u64 {
        self.left_bytes
    }

    fn read_inline(&mut self, bytes: &Bytes, crc32: u32, range: Range<u64>) {
        let len_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if range.start > range.end || range.end > len_bytes {
            self.failed = Some(ReadError::Range { start: range.start, end: range.end, len_bytes });
        } else if crc32fast::hash(bytes) != crc32 {
            tracing::error!("a payload in a record does not agree with its checksum");
            self.failed = Some(ReadError::InlineCorrupt);
        } else if let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) {
            if start < end {
                self.ready.push_back(bytes.slice(start..end));
            }
        }
    }

    fn read_extents(&mut self, extents: &[ExtentRef], range: Range<u64>) {
        let mut offset = 0u64;
        for extent in extents {
            if let Err(what) = check_extent(extent) {
                tracing::error!(%what, "bad record");
                self.failed = Some(ReadError::BadRecord(what));
                return;
            }
            let end = offset.saturating_add(extent.len_bytes);
            let (from, to) = (range.start.max(offset), range.end.min(end));
            if from < to {
                self.extents.push_back((Arc::new(extent.clone()), from - offset..to - offset));
            }
            offset = end;
        }
        if range.start > range.end || range.end > offset {
            self.extents.clear();
            self.failed = Some(ReadError::Range { start: range.start, end: range.end, len_bytes: offset });
        }
    }

    /// The end of a window of so many stripes, within the first of the extents that are left; None at the end.
    fn window_end(&self, stripes: Option<u64>) -> Option<u64> {
        let (extent, range) = self.extents.front()?;
        let layout = extent.layout();
        let end = match stripes {
            Some(stripes) => {
                (range.start / layout.stripe_bytes()).saturating_add(stripes).saturating_mul(layout.stripe_bytes())
            }
            None => range.start.saturating_add(FLOOR_BYTES),
        };
        Some(end.min(range.end))
    }

    /// Begins to fetch the next window, when there is one and memory for it.
    fn begin(&mut self) -> Option<Fetching> {
        let (extent, range) = self.extents.front()?;
        let stripes = (self.store.settings().window_bytes / extent.layout().unit_bytes).max(1);
        let start = range.start;
        let end = self.window_end(Some(stripes))?;
        let grant = self.store.memory().try_read((end - start).max(FLOOR_BYTES))?;
        self.fetch(end, Held::Granted(Arc::new(grant)))
    }

    /// Begins to fetch one block when the last one was let go.
    fn begin_block(&mut self, cx: &mut Context<'_>) -> Poll<Option<Fetching>> {
        let Some(end) = self.window_end(None) else { return Poll::Ready(None) };
        let permit = std::task::ready!(self.floor.poll_acquire(cx));
        Poll::Ready(permit.and_then(|permit| self.fetch(end, Held::Floor(Arc::new(permit)))))
    }

    fn fetch(&mut self, end: u64, held: Held) -> Option<Fetching> {
        let (extent, range) = self.extents.front_mut()?;
        let (window, extent_of_window) = (range.start..end, extent.clone());
        range.start = end;
        if range.is_empty() {
            self.extents.pop_front();
        }
        let (store, avoid) = (self.store.clone(), self.avoid.clone());
        Some(Fetching(tokio::spawn(async move {
            let window = read_window(&store, &extent_of_window, window, &avoid).await?;
            Ok(window.into_iter().map(|bytes| held.with(bytes)).collect())
        })))
    }

    /// Ready when there are bytes to give, or the end is reached.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ReadError>> {
        loop {
            if let Some(error) = &self.failed {
                return Poll::Ready(Err(error.clone()));
            }
            if !self.ready.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.current.is_none() {
                self.current = self.next.take().or_else(|| self.begin());
                if self.current.is_none() {
                    self.current = std::task::ready!(self.begin_block(cx));
                }
            }
            let Some(current) = &mut self.current else { return Poll::Ready(Ok(())) };
            let window = std::task::ready!(Pin::new(&mut current.0).poll(cx));
            self.current = None;
            match window {
                Ok(Ok(window)) => {
                    let len: u64 = window.iter().map(|bytes| bytes.len() as u64).sum();
                    self.prefetch_below = self.left_bytes.saturating_sub(len / 4);
                    self.ready.extend(window);
                }
                Ok(Err(error)) => self.failed = Some(error),
                Err(error) => self.failed = Some(ReadError::Stopped(error.to_string())),
            }
            if self.failed.is_some() {
                self.next = None;
                self.extents.clear();
            }
        }
    }
}

impl Stream for ObjectReader {
    type Item = Result<Bytes, ReadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Err(error) = std::task::ready!(self.poll_ready(cx)) {
            // The error is given once; then the stream is over.
            let ended = std::mem::replace(&mut self.left_bytes, 0) == 0;
            return Poll::Ready((!ended).then_some(Err(error)));
        }
        let bytes = self.ready.pop_front();
        let len = bytes.as_ref().map_or(0, Bytes::len);
        self.left_bytes = self.left_bytes.saturating_sub(u64::try_from(len).unwrap_or(u64::MAX));
        let asked = self.left_bytes <= self.prefetch_below;
        if asked && self.next.is_none() && self.current.is_none() && self.store.memory().may_prefetch() {
            self.next = self.begin();
        }
        Poll::Ready(bytes.map(Ok))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, None)
    }
}

/// What the bytes of a window hold until they are let go.
enum Held {
    Granted(Arc<Grant>),
    Floor(Arc<OwnedSemaphorePermit>),
}

/// Bytes of a block with the only permit of their reader.
struct OnFloor(Bytes, #[allow(dead_code)] Arc<OwnedSemaphorePermit>); // held, never looked at

impl AsRef<[u8]> for OnFloor {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Held {
    fn with(&self, bytes: Bytes) -> Bytes {
        match self {
            Held::Granted(grant) => Grant::with(grant, bytes),
            Held::Floor(permit) => Bytes::from_owner(OnFloor(bytes, permit.clone())),
        }
    }
}

/// A piece of one chunk that is a piece of the payload.
struct Segment {
    chunk: u8,
    bytes: Range<u64>,
}

/// The pieces that make up a range of an extent's payload, in order.
fn segments(extent: &ExtentRef, range: &Range<u64>) -> Vec<Segment> {
    let layout = extent.layout();
    let mut segments = Vec::new();
    for number in range.start / layout.stripe_bytes().. {
        let Some(stripe) = layout.stripe(number).filter(|stripe| stripe.payload_offset < range.end) else { break };
        let from = range.start.saturating_sub(stripe.payload_offset);
        let to = (range.end - stripe.payload_offset).min(stripe.payload_len);
        for chunk in 0..extent.k {
            let unit = u64::from(chunk) * stripe.unit_len;
            let (start, end) = (from.max(unit), to.min(unit + stripe.unit_len));
            if start < end {
                let bytes = stripe.chunk_offset + (start - unit)..stripe.chunk_offset + (end - unit);
                segments.push(Segment { chunk, bytes });
            }
        }
    }
    segments
}

/// The payload bytes `range` of one extent.
async fn read_window(
    store: &ObjectStore,
    extent: &ExtentRef,
    range: Range<u64>,
    avoid: &Avoid,
) -> Result<Vec<Bytes>, ReadError> {
    let segments = segments(extent, &range);
    let block = |offset: u64| u32::try_from(offset / BLOCK_BYTES).unwrap_or(u32::MAX);
    let mut wanted: Vec<Wanted> = Vec::with_capacity(usize::from(extent.k));
    for segment in &segments {
        let blocks = block(segment.bytes.start)..block(segment.bytes.end.saturating_sub(1)).saturating_add(1);
        match wanted.iter_mut().find(|want| want.chunk == segment.chunk) {
            Some(want) => want.blocks = want.blocks.start.min(blocks.start)..want.blocks.end.max(blocks.end),
            None => wanted.push(Wanted { chunk: segment.chunk, blocks }),
        }
    }
    let blocks = fetch(store, extent, &wanted, ChunkSet::EMPTY, avoid).await?;
    let mut window = Vec::with_capacity(segments.len() * 2);
    for segment in segments {
        let mut at = segment.bytes.start;
        while at < segment.bytes.end {
            let in_block = at % BLOCK_BYTES;
            let len = (segment.bytes.end - at).min(BLOCK_BYTES - in_block);
            let piece = blocks.get(segment.chunk, block(at)).and_then(|bytes| {
                let (start, end) = (usize::try_from(in_block).ok()?, usize::try_from(in_block + len).ok()?);
                (end <= bytes.len()).then(|| bytes.slice(start..end))
            });
            // Cannot be: the grid was settled. Better no byte than a wrong one.
            window.push(piece.ok_or_else(|| ReadError::BadRecord(format!("a hole in extent {}", extent.extent)))?);
            at += len;
        }
    }
    Ok(window)
}
