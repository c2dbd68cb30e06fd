//! A range of a payload as a stream: [`ObjectStore::read`].
//!
//! The range is cut into windows of whole stripes; one is given out while the next is fetched. Healthy windows are
//! slices of the blocks as they came from the disks: nothing is copied.

use super::fetch::{fetch, Avoid, Wanted};
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
use tokio::task::JoinHandle;

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
            current: None,
            next: None,
            failed: None,
            left_bytes: range.end.saturating_sub(range.start),
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
    current: Option<Fetching>,
    next: Option<Fetching>,
    failed: Option<ReadError>,
    left_bytes: u64,
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

    /// Begins to fetch the next window, if there is one.
    fn begin(&mut self) -> Option<Fetching> {
        let (extent, range) = self.extents.front_mut()?;
        let layout = extent.layout();
        let stripes = (self.store.settings().window_bytes / layout.unit_bytes).max(1);
        let first = range.start / layout.stripe_bytes();
        let end = first.saturating_add(stripes).saturating_mul(layout.stripe_bytes()).min(range.end);
        let (window, extent_of_window) = (range.start..end, extent.clone());
        range.start = end;
        if range.is_empty() {
            self.extents.pop_front();
        }
        let (store, avoid) = (self.store.clone(), self.avoid.clone());
        Some(Fetching(tokio::spawn(async move { read_window(&store, &extent_of_window, window, &avoid).await })))
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
                self.next = self.begin();
            }
            let Some(current) = &mut self.current else { return Poll::Ready(Ok(())) };
            let window = std::task::ready!(Pin::new(&mut current.0).poll(cx));
            self.current = None;
            match window {
                Ok(Ok(window)) => self.ready.extend(window),
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
        Poll::Ready(self.ready.pop_front().map(|bytes| {
            self.left_bytes = self.left_bytes.saturating_sub(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            Ok(bytes)
        }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, None)
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
