//! An upload's body on its way to the disks: its bytes are counted and hashed as they pass.
//!
//! ```text
//! socket -> s3s (payload hash, chunk signatures, trailers) -> Source -> Intake -> ObjectStore
//!                                                                         `-> MD5 and checksums (own thread when large)
//! ```
//! **Invariant:** digests exist only after the stream ended well and had exactly the promised length. Every failed signature,
//! hash or length arrives as an error of the stream, so nothing is committed before [`Verdict::digests`] said yes.

use super::backend::BrokenBody;
use super::body::RequestBodyError;
use super::error;
use crate::digest::{Digester, Digests};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use granary_meta::record::ChecksumAlgorithm;
use http::StatusCode;
use s3s::dto::StreamingBlob;
use s3s::stream::aws_chunked_stream::AwsChunkedStreamError;
use s3s::stream::upload_stream::UploadStreamError;
use s3s::{s3_error, BodySizeLimitExceeded, S3Error, S3ErrorCode, StdError};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, Semaphore};

/// Bodies at least this long are hashed on a thread of their own, so that MD5 overlaps with coding and sending.
const THREAD_FROM_BYTES: u64 = 1024 * 1024;
/// Frames between the socket and the hashing thread.
const HASH_QUEUE_FRAMES: usize = 16;

/// Threads that may hash at the same time; more streams hash inline, which costs less when all cores are busy.
static HASH_THREADS: Semaphore = Semaphore::const_new(16);

/// Why a body was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BodyFault {
    /// It ended early, had broken frames, or was longer than promised.
    Incomplete,
    /// A chunk's or trailer's signature is wrong.
    Signature,
    /// It is not what x-amz-content-sha256 said.
    ContentSha256,
    /// A chunk or the body is too large.
    TooLarge,
    /// No byte for too long.
    Idle,
    /// The connection broke.
    Connection,
}

impl From<BodyFault> for S3Error {
    fn from(fault: BodyFault) -> S3Error {
        match fault {
            BodyFault::Incomplete | BodyFault::Connection => s3_error!(IncompleteBody),
            BodyFault::Signature => s3_error!(SignatureDoesNotMatch),
            BodyFault::ContentSha256 => error::custom(
                "XAmzContentSHA256Mismatch",
                StatusCode::BAD_REQUEST,
                "The provided 'x-amz-content-sha256' header does not match what was computed.",
            ),
            BodyFault::TooLarge => s3_error!(EntityTooLarge),
            BodyFault::Idle => s3_error!(RequestTimeout),
        }
    }
}

/// Finds out what a body's error was. The layers of s3s wrap each other, so the chain of sources is walked.
pub(super) fn fault_of(error: &StdError) -> BodyFault {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error.as_ref());
    let mut fault = BodyFault::Incomplete;
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<UploadStreamError>() {
            match error {
                UploadStreamError::Sha256Mismatch => return BodyFault::ContentSha256,
                UploadStreamError::Underlying(_) => {}
                _ => return BodyFault::Incomplete,
            }
        } else if let Some(error) = error.downcast_ref::<AwsChunkedStreamError>() {
            match (error, error.to_s3_error_code()) {
                (AwsChunkedStreamError::Underlying(_), _) => {}
                (_, S3ErrorCode::SignatureDoesNotMatch) => return BodyFault::Signature,
                (_, S3ErrorCode::EntityTooLarge) => return BodyFault::TooLarge,
                _ => return BodyFault::Incomplete,
            }
        } else if error.downcast_ref::<BodySizeLimitExceeded>().is_some() {
            return BodyFault::TooLarge;
        } else if let Some(error) = error.downcast_ref::<RequestBodyError>() {
            return match error {
                RequestBodyError::Idle => BodyFault::Idle,
                RequestBodyError::Checksum(_) | RequestBodyError::NoLastChunk => BodyFault::Incomplete,
                RequestBodyError::Connection(_) => BodyFault::Connection,
            };
        } else {
            fault = BodyFault::Connection;
        }
        next = error.source();
    }
    fault
}

/// An authorised body that nobody has read yet.
pub(super) struct Source {
    body: Option<StreamingBlob>,
    first: Option<Option<Result<Bytes, StdError>>>,
}

impl Source {
    /// Wraps the body of a request; none is an empty one.
    pub(super) fn new(body: Option<StreamingBlob>) -> Source {
        Source { body, first: None }
    }

    /// Polls the body once. The headers are checked by now, so a client that waits for `100 Continue` gets it before a shard or a
    /// disk is asked anything.
    pub(super) fn kick(&mut self) {
        if self.first.is_none() {
            if let Some(body) = &mut self.body {
                self.first = body.next().now_or_never();
            }
        }
    }

    async fn next(&mut self) -> Option<Result<Bytes, StdError>> {
        match self.first.take() {
            Some(first) => first,
            None => self.body.as_mut()?.next().await,
        }
    }
}

enum Hashing {
    Inline(Box<Digester>),
    Thread { frames: mpsc::Sender<Bytes>, digests: oneshot::Receiver<Digests> },
    Over,
}

/// A body being streamed into the store. See [`Intake::start`].
pub(super) struct Intake {
    source: Source,
    len_bytes: u64,
    seen_bytes: u64,
    hashing: Hashing,
    verdict: Verdict,
}

/// What came of a body; filled when its stream has ended.
#[derive(Clone)]
pub(super) struct Verdict(Arc<Mutex<Option<Result<Digests, BodyFault>>>>);

impl Verdict {
    /// The digests of a body that came whole.
    ///
    /// # Errors
    /// What was wrong with it. A stream that was never read to its end is a defect of ours.
    pub(super) fn digests(&self) -> Result<Digests, S3Error> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Ok(digests)) => Ok(digests),
            Some(Err(fault)) => Err(fault.into()),
            None => Err(error::internal("a body was staged without being read to its end")),
        }
    }

    /// The body's own error, if it had one.
    pub(super) fn fault(&self) -> Option<S3Error> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(Err(fault)) => Some(fault.clone().into()),
            _ => None,
        }
    }
}

impl Intake {
    /// Makes the stream that the store reads, and the place where its digests will be.
    pub(super) fn start(
        source: Source,
        len_bytes: u64,
        algorithms: &[ChecksumAlgorithm],
    ) -> (BoxStream<'static, Result<Bytes, BrokenBody>>, Verdict) {
        let verdict = Verdict(Arc::new(Mutex::new(None)));
        let digester = Digester::new(algorithms);
        let permit = if len_bytes >= THREAD_FROM_BYTES { HASH_THREADS.try_acquire().ok() } else { None };
        let hashing = match permit {
            None => Hashing::Inline(Box::new(digester)),
            Some(permit) => {
                let (frames, mut queue) = mpsc::channel::<Bytes>(HASH_QUEUE_FRAMES);
                let (done, digests) = oneshot::channel();
                tokio::task::spawn_blocking(move || {
                    let _permit = permit;
                    let mut digester = digester;
                    while let Some(frame) = queue.blocking_recv() {
                        digester.update(&frame);
                    }
                    // Nobody listens any more when the upload was given up.
                    let _ = done.send(digester.finish());
                });
                Hashing::Thread { frames, digests }
            }
        };
        let intake = Intake { source, len_bytes, seen_bytes: 0, hashing, verdict: verdict.clone() };
        let stream = futures::stream::unfold(intake, |mut intake| async move {
            let item = intake.next().await?;
            Some((item, intake))
        });
        // Fused: an unfold must not be polled after its end, and not every reader knows that.
        (stream.fuse().boxed(), verdict)
    }

    async fn next(&mut self) -> Option<Result<Bytes, BrokenBody>> {
        if matches!(self.hashing, Hashing::Over) {
            return None;
        }
        match self.source.next().await {
            Some(Ok(frame)) => match self.pass(frame).await {
                Ok(frame) => Some(Ok(frame)),
                Err(fault) => Some(Err(self.end(Err(fault)))),
            },
            Some(Err(cause)) => Some(Err(self.end(Err(fault_of(&cause))))),
            None => match self.finish().await {
                Ok(digests) => {
                    self.end(Ok(digests));
                    None
                }
                Err(fault) => Some(Err(self.end(Err(fault)))),
            },
        }
    }

    async fn pass(&mut self, frame: Bytes) -> Result<Bytes, BodyFault> {
        self.seen_bytes += frame.len() as u64;
        if self.seen_bytes > self.len_bytes {
            return Err(BodyFault::Incomplete);
        }
        match &mut self.hashing {
            Hashing::Inline(digester) => digester.update(&frame),
            // The thread is gone only when it panicked; finish() notices.
            Hashing::Thread { frames, .. } => drop(frames.send(frame.clone()).await),
            Hashing::Over => {}
        }
        Ok(frame)
    }

    async fn finish(&mut self) -> Result<Digests, BodyFault> {
        if self.seen_bytes != self.len_bytes {
            return Err(BodyFault::Incomplete);
        }
        match std::mem::replace(&mut self.hashing, Hashing::Over) {
            Hashing::Inline(digester) => Ok(digester.finish()),
            Hashing::Thread { frames, digests } => {
                drop(frames);
                digests.await.map_err(|_| BodyFault::Incomplete)
            }
            Hashing::Over => Err(BodyFault::Incomplete),
        }
    }

    fn end(&mut self, outcome: Result<Digests, BodyFault>) -> BrokenBody {
        self.hashing = Hashing::Over;
        *self.verdict.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        BrokenBody
    }
}

/// The bytes of another object on their way into a new one: hashed like a body, read errors kept apart.
pub(super) fn copy_source(
    stream: BoxStream<'static, Result<Bytes, super::backend::ReadError>>,
) -> (Source, Arc<Mutex<Option<super::backend::ReadError>>>) {
    let failed = Arc::new(Mutex::new(None));
    let seen = failed.clone();
    let stream = stream.map(move |item| {
        item.inspect_err(|cause| {
            *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause.clone());
        })
    });
    (Source::new(Some(StreamingBlob::wrap(super::body::SyncStream::new(stream.boxed())))), failed)
}
