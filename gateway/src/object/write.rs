//! A body's way into extents: [`ObjectStore::stage`].

use super::budget::{Budget, Grant};
use super::choose::{choose, ChooseError, Draw, Usable};
use super::counters::add;
use super::extent_write::{Attempt, TooFew, Written};
use super::recheck::recheck;
use super::staged::{Staged, Uncommitted};
use super::{random, BodyError, ObjectStore};
use crate::disks::DiskHealth;
use bytes::{Bytes, BytesMut};
use futures::stream::{Stream, StreamExt};
use granary_meta::record::ObjectData;
use granary_placement::codec::CodecError;
use granary_placement::extent::MAX_EXTENT_BYTES;
use granary_placement::id::{DiskId, Epoch, ExtentId, HashSlot};
use granary_placement::map::ClusterMap;
use std::collections::{HashSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Attempts to write one extent, each without the disks that failed the ones before.
const ATTEMPTS: u32 = 3;

/// Why a payload could not be staged. Nothing of it stays on the disks, apart from what the background cleaning still
/// has to reach.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The body failed; this is its own error, untouched.
    #[error("body: {0}")]
    Body(BodyError),
    /// The body ended early.
    #[error("the body ended after {got} of {expected} bytes")]
    TooShort {
        /// Bytes announced.
        expected: u64,
        /// Bytes received.
        got: u64,
    },
    /// The body has more bytes than announced.
    #[error("the body has more than the {expected} bytes announced")]
    TooLong {
        /// Bytes announced.
        expected: u64,
    },
    /// The cluster map has no such scheme.
    #[error("no scheme `{0}` in the cluster map")]
    UnknownScheme(String),
    /// Too few disks answer, or no map is known yet. Worth retrying later: 503 SlowDown.
    #[error("not enough disks: {0}")]
    Unavailable(String),
    /// Memory is short, and nothing of the body came for a while. Worth retrying later: 503 SlowDown.
    #[error("memory is short, and nothing of the body came for a while")]
    Stalled,
    /// The codec refuses; a fault of the map or of this build.
    #[error(transparent)]
    Codec(CodecError),
}

impl ObjectStore {
    /// Brings a payload of exactly `len_bytes` onto disks, or into memory when it is short enough to ride in the
    /// record. When it returns, at least K+1 chunks of every extent are durable; the others are named in
    /// [`Staged::missing`].
    ///
    /// The body is polled to its end before any last chunk is finished, so an error at its end (a wrong digest) leaves
    /// nothing behind. Memory: three stripes, and [`replay_bytes`](super::ObjectSettings::replay_bytes), whatever the
    /// length, and with all others no more than [`memory_bytes`](super::ObjectSettings::memory_bytes).
    ///
    /// # Errors
    /// See [`StageError`]. On an error, and when the future is dropped, written chunks are deleted in the background.
    pub async fn stage<S>(
        &self,
        scheme: Option<&str>,
        owner: HashSlot,
        len_bytes: u64,
        body: S,
    ) -> Result<Staged, StageError>
    where
        S: Stream<Item = Result<Bytes, BodyError>> + Send,
    {
        self.stage_within(self.settings().inline_limit_bytes, scheme, owner, len_bytes, body).await
    }

    /// As [`ObjectStore::stage`], for a part of a multipart upload: never inline unless empty, because parts become one
    /// object by joining their extents.
    ///
    /// # Errors
    /// As [`ObjectStore::stage`].
    pub async fn stage_part<S>(
        &self,
        scheme: Option<&str>,
        owner: HashSlot,
        len_bytes: u64,
        body: S,
    ) -> Result<Staged, StageError>
    where
        S: Stream<Item = Result<Bytes, BodyError>> + Send,
    {
        self.stage_within(0, scheme, owner, len_bytes, body).await
    }

    async fn stage_within<S>(
        &self,
        inline_limit_bytes: u64,
        scheme: Option<&str>,
        owner: HashSlot,
        len_bytes: u64,
        body: S,
    ) -> Result<Staged, StageError>
    where
        S: Stream<Item = Result<Bytes, BodyError>> + Send,
    {
        let body = std::pin::pin!(body);
        let mut source = Source::new(body, len_bytes, self.settings().replay_bytes)
            .within(self.memory().clone(), self.settings().memory_patience);
        let mut uncommitted = Uncommitted::new(&self.inner.cleaner);
        if len_bytes <= inline_limit_bytes {
            let len = usize::try_from(len_bytes).unwrap_or(0);
            let mut bytes = BytesMut::with_capacity(len);
            source.take(&mut bytes, len).await?;
            source.end().await?;
            let bytes = bytes.freeze();
            let crc32 = crc32fast::hash(&bytes);
            return Ok(Staged {
                data: ObjectData::Inline { bytes, crc32 },
                missing: Vec::new(),
                map_epoch: Epoch(0),
                size_bytes: len_bytes,
                uncommitted,
            });
        }

        let begun = Instant::now();
        let longest = self.settings().extent_bytes.clamp(1, MAX_EXTENT_BYTES);
        let mut draw = Draw(u64::from_be_bytes(random()?));
        let mut failed = HashSet::new();
        let (mut extents, mut missing) = (Vec::new(), Vec::new());
        let mut left = len_bytes;
        while left > 0 {
            let len = left.min(longest);
            left -= len;
            let written = self.write_extent(scheme, owner, len, left == 0, &mut source, &mut failed, &mut draw).await?;
            uncommitted.absorb(written.uncommitted);
            extents.push(written.extent);
            missing.extend(written.missing);
        }
        // Sweeps take chunks that nobody owns for left over when they are older than this.
        if begun.elapsed() > self.settings().longest_upload {
            add(&self.counters().writes_unavailable, 1);
            return Err(StageError::Unavailable("the payload took longer than object.longest_upload".to_owned()));
        }
        let data = ObjectData::Extents(extents);
        let mut staged = Staged { data, missing, map_epoch: Epoch(0), size_bytes: len_bytes, uncommitted };
        // The map was read for each extent; the payload is committed under the one that is in force now.
        let map = self.disks().map().ok_or_else(|| StageError::Unavailable("there is no cluster map".to_owned()))?;
        self.hold_against(&map, &mut staged)?;
        Ok(staged)
    }

    /// Holds a payload on disks against a newer map: chunks that are not on the disk of their slot any more are named
    /// missing.
    ///
    /// # Errors
    /// [`StageError::Unavailable`] when moves left an extent without a spare chunk: it must not be committed.
    pub fn hold_against(&self, map: &ClusterMap, staged: &mut Staged) -> Result<(), StageError> {
        let chunks = staged.uncommitted.chunks();
        recheck(map, staged.data.extents(), chunks, &mut staged.missing).map_err(|extent| {
            add(&self.counters().writes_unavailable, 1);
            StageError::Unavailable(format!("extent {extent} was overtaken by moves of its placement group"))
        })?;
        staged.map_epoch = map.epoch;
        Ok(())
    }

    /// Writes one extent; while its payload so far is still in memory, disks that fail are replaced by another group or
    /// a narrower extent.
    #[allow(clippy::too_many_arguments)] // all of it is the state of one upload
    async fn write_extent<S>(
        &self,
        scheme: Option<&str>,
        owner: HashSlot,
        len_bytes: u64,
        last: bool,
        source: &mut Source<'_, S>,
        failed: &mut HashSet<DiskId>,
        draw: &mut Draw,
    ) -> Result<Written, StageError>
    where
        S: Stream<Item = Result<Bytes, BodyError>> + Send,
    {
        let disks = self.disks();
        for attempt in 1.. {
            let map =
                disks.map().ok_or_else(|| StageError::Unavailable("the cluster map is not known yet".to_owned()))?;
            let usable = |disk: DiskId| match disks.health(disk) {
                _ if failed.contains(&disk) => Usable::No,
                DiskHealth::Up if disks.writable(disk) => Usable::Yes,
                DiskHealth::Up | DiskHealth::Suspect => Usable::Maybe,
                DiskHealth::Down => Usable::No,
            };
            let choice =
                choose(&map, &self.group_index(&map), scheme, usable, || draw.number()).map_err(
                    |error| match error {
                        ChooseError::UnknownScheme(name) => StageError::UnknownScheme(name),
                        ChooseError::Unavailable { .. } => {
                            add(&self.counters().writes_unavailable, 1);
                            StageError::Unavailable(error.to_string())
                        }
                    },
                )?;
            source.begin_extent();
            let try_this =
                Attempt { store: self, choice: &choice, extent: ExtentId(random()?), owner, len_bytes, last };
            match try_this.run(source).await? {
                Ok(written) => return Ok(written),
                Err(TooFew { failed: disks, why }) => {
                    failed.extend(disks);
                    if attempt >= ATTEMPTS || !source.rewind() {
                        add(&self.counters().writes_unavailable, 1);
                        tracing::warn!(group = %choice.group, %why, "an upload was given up: too few disks");
                        return Err(StageError::Unavailable(why));
                    }
                    add(&self.counters().extents_rewritten, 1);
                }
            }
        }
        Err(StageError::Unavailable("no attempt was made".to_owned()))
    }
}

/// A body of known length, with the beginning of the extent under way kept for another attempt.
pub(super) struct Source<'a, S> {
    body: Pin<&'a mut S>,
    expected: u64,
    received: u64,
    ended: bool,
    /// Comes before anything else from the body.
    carry: Bytes,
    replay: VecDeque<Bytes>,
    /// Payload of the attempt under way; None when it grew beyond the limit.
    kept: Option<Vec<Bytes>>,
    kept_bytes: u64,
    keep_limit: u64,
    /// Where stripes get their memory, and how long they may hold it for nothing when others want it.
    memory: Option<(Budget, Duration)>,
}

/// How often somebody who holds memory looks whether others wait for it.
const MEMORY_LOOK: Duration = Duration::from_millis(200);

impl<'a, S> Source<'a, S>
where
    S: Stream<Item = Result<Bytes, BodyError>> + Send,
{
    fn new(body: Pin<&'a mut S>, expected: u64, keep_limit: u64) -> Source<'a, S> {
        Source {
            body,
            expected,
            received: 0,
            ended: false,
            carry: Bytes::new(),
            replay: VecDeque::new(),
            kept: None,
            kept_bytes: 0,
            keep_limit,
            memory: None,
        }
    }

    fn within(mut self, memory: Budget, patience: Duration) -> Self {
        self.memory = Some((memory, patience));
        self
    }

    /// Memory for a stripe, or an extent that is sent whole. Waits with nothing in hand but the first piece of what is
    /// to come: see [`super::budget`].
    pub(super) async fn grant(&mut self, bytes: u64) -> Result<Option<Arc<Grant>>, StageError> {
        if self.carry.is_empty() && self.replay.is_empty() {
            // Nothing is granted to a client that sends nothing.
            self.carry = self.receive(false).await?.unwrap_or_default();
        }
        let Some((memory, _)) = &self.memory else { return Ok(None) };
        if let Some(grant) = memory.try_write(bytes) {
            return Ok(Some(Arc::new(grant)));
        }
        let memory = memory.clone();
        self.kept = None;
        if !self.replay.is_empty() {
            return Err(StageError::Unavailable("there is no memory to write the extent again".to_owned()));
        }
        Ok(Some(Arc::new(memory.write(bytes).await)))
    }

    /// Waits for the next piece of the body; Err when others have waited for memory for too long meanwhile.
    async fn piece(&mut self, holding: bool) -> Result<Option<Result<Bytes, BodyError>>, StageError> {
        let Some((memory, patience)) = self.memory.as_ref().filter(|_| holding) else {
            return Ok(self.body.next().await);
        };
        let stalled = async {
            tokio::time::sleep(*patience).await;
            while !memory.is_short() {
                tokio::time::sleep(MEMORY_LOOK).await;
            }
        };
        tokio::select! {
            biased;
            piece = self.body.next() => Ok(piece),
            () = stalled => Err(StageError::Stalled),
        }
    }

    /// Appends exactly `want` bytes to `into`.
    pub(super) async fn take(&mut self, into: &mut BytesMut, mut want: usize) -> Result<(), StageError> {
        while want > 0 {
            if self.carry.is_empty() {
                self.carry = match self.replay.pop_front() {
                    Some(bytes) => bytes,
                    None => self
                        .receive(true)
                        .await?
                        .ok_or(StageError::TooShort { expected: self.expected, got: self.received })?,
                };
            }
            let some = self.carry.split_to(want.min(self.carry.len()));
            into.extend_from_slice(&some);
            want -= some.len();
        }
        Ok(())
    }

    /// The next piece of the body itself; None at its end. `holding`: whether memory was granted for what it is for.
    async fn receive(&mut self, holding: bool) -> Result<Option<Bytes>, StageError> {
        if self.ended {
            return Ok(None);
        }
        match self.piece(holding).await? {
            None => {
                self.ended = true;
                Ok(None)
            }
            Some(Err(error)) => Err(StageError::Body(error)),
            Some(Ok(bytes)) => {
                self.received = self.received.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                if self.received > self.expected {
                    return Err(StageError::TooLong { expected: self.expected });
                }
                Ok(Some(bytes))
            }
        }
    }

    /// Sees to it that the body has ended, with as many bytes as announced.
    pub(super) async fn end(&mut self) -> Result<(), StageError> {
        while self.receive(true).await?.is_some() {}
        if self.received < self.expected {
            return Err(StageError::TooShort { expected: self.expected, got: self.received });
        }
        Ok(())
    }

    /// Begins to keep what is taken.
    fn begin_extent(&mut self) {
        self.kept = Some(Vec::new());
        self.kept_bytes = 0;
    }

    /// Keeps what was taken, while it is not too much.
    pub(super) fn keep(&mut self, payload: Bytes) {
        self.kept_bytes = self.kept_bytes.saturating_add(u64::try_from(payload.len()).unwrap_or(u64::MAX));
        if self.kept_bytes > self.keep_limit {
            self.kept = None;
        }
        if let Some(kept) = &mut self.kept {
            kept.push(payload);
        }
    }

    /// Puts what was taken since [`Source::begin_extent`] back to the front. False when it is not in memory any more.
    fn rewind(&mut self) -> bool {
        let Some(kept) = self.kept.take() else { return false };
        let carry = std::mem::take(&mut self.carry);
        if !carry.is_empty() {
            self.replay.push_front(carry);
        }
        for payload in kept.into_iter().rev() {
            self.replay.push_front(payload);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use futures::stream;

    fn pieces(all: &[&'static [u8]]) -> impl Stream<Item = Result<Bytes, BodyError>> + Send {
        stream::iter(all.iter().map(|piece| Ok(Bytes::from_static(piece))).collect::<Vec<_>>())
    }

    #[tokio::test]
    async fn a_rewound_source_gives_the_same_bytes_again() {
        let body = std::pin::pin!(pieces(&[b"abc", b"", b"defg", b"hi"]));
        let mut source = Source::new(body, 9, 100);
        source.begin_extent();
        let mut first = BytesMut::new();
        source.take(&mut first, 5).await.unwrap();
        source.keep(first.clone().freeze());
        assert_eq!(&first[..], b"abcde");
        assert!(source.rewind());
        source.begin_extent();
        let mut second = BytesMut::new();
        source.take(&mut second, 4).await.unwrap();
        source.keep(second.clone().freeze());
        assert!(source.rewind());
        let mut all = BytesMut::new();
        source.take(&mut all, 9).await.unwrap();
        assert_eq!(&all[..], b"abcdefghi");
        source.end().await.unwrap();
    }

    #[tokio::test]
    async fn what_grew_beyond_the_limit_is_not_kept() {
        let body = std::pin::pin!(pieces(&[b"abcdefghi"]));
        let mut source = Source::new(body, 9, 4);
        source.begin_extent();
        let mut taken = BytesMut::new();
        source.take(&mut taken, 5).await.unwrap();
        source.keep(taken.freeze());
        assert!(!source.rewind());
    }

    #[tokio::test]
    async fn a_body_that_is_too_short_or_too_long_is_refused() {
        let body = std::pin::pin!(pieces(&[b"abc"]));
        let mut source = Source::new(body, 4, 0);
        assert!(matches!(
            source.take(&mut BytesMut::new(), 4).await,
            Err(StageError::TooShort { expected: 4, got: 3 })
        ));
        let body = std::pin::pin!(pieces(&[b"abc", b"d"]));
        let mut source = Source::new(body, 3, 0);
        source.take(&mut BytesMut::new(), 3).await.unwrap();
        assert!(matches!(source.end().await, Err(StageError::TooLong { expected: 3 })));
    }
}
