//! The body of an upload on its way to the disks: its bytes are counted and hashed as they pass.
//!
//! ```text
//! socket -> s3s (payload hash, chunk signatures, trailers) -> Source -> UploadBody -> ObjectStore
//!                                                                            `-> MD5 and checksums (own thread when large)
//! ```
//! **Invariant:** digests are given only after the stream ended well and had exactly the promised length. Every failed
//! signature, hash or length arrives as an error of the stream, so nothing is committed without digests.

use super::error;
use super::request_body::RequestBodyError;
use crate::digest::{Digester, Digests};
use crate::object::{ObjectReader, ReadError};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use granary_meta::record::ChecksumAlgorithm;
use http::StatusCode;
use s3s::dto::StreamingBlob;
use s3s::stream::aws_chunked_stream::AwsChunkedStreamError;
use s3s::stream::upload_stream::UploadStreamError;
use s3s::{s3_error, BodySizeLimitExceeded, S3Error, S3ErrorCode, StdError};
use tokio::sync::{mpsc, oneshot, Semaphore};

/// Bodies at least this long are hashed on a thread of their own, so that MD5 overlaps with coding and sending.
const THREAD_FROM_BYTES: u64 = 1024 * 1024;
/// Pieces between the socket and the hashing thread.
const HASH_QUEUE_PIECES: usize = 16;

/// Threads that may hash at the same time; more streams hash inline, which costs less when all cores are busy.
static HASH_THREADS: Semaphore = Semaphore::const_new(16);

/// Why a body was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BodyFault {
    /// It ended early, had broken frames, or was longer than promised.
    #[error("the body is incomplete or malformed")]
    Incomplete,
    /// The signature of a chunk or of the trailer is wrong.
    #[error("a signature in the body is wrong")]
    Signature,
    /// It is not what x-amz-content-sha256 said.
    #[error("the body has another SHA-256 than promised")]
    ContentSha256,
    /// A chunk or the body is too large.
    #[error("the body is too large")]
    TooLarge,
    /// No byte for too long.
    #[error("no byte of the body came for too long")]
    Idle,
    /// The connection broke.
    #[error("the connection broke")]
    Connection,
    /// The body is that of a stored object, for a copy, and cannot be read.
    #[error(transparent)]
    Source(ReadError),
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
            BodyFault::Source(cause) => error::read(cause),
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
                RequestBodyError::Checksum(_)
                | RequestBodyError::Xml
                | RequestBodyError::Memory
                | RequestBodyError::NoLastChunk => BodyFault::Incomplete,
                RequestBodyError::Connection(_) => BodyFault::Connection,
            };
        } else if let Some(error) = error.downcast_ref::<ReadError>() {
            return BodyFault::Source(error.clone());
        } else {
            fault = BodyFault::Connection;
        }
        next = error.source();
    }
    fault
}

/// The bytes of an upload that nobody has read yet.
pub(super) struct Source {
    stream: BoxStream<'static, Result<Bytes, StdError>>,
    first: Option<Option<Result<Bytes, StdError>>>,
}

impl Source {
    /// The body of an authorised request; none is an empty one.
    pub(super) fn of_request(body: Option<StreamingBlob>) -> Source {
        let stream = body.map_or_else(|| futures::stream::empty().boxed(), StreamExt::boxed);
        Source { stream, first: None }
    }

    /// The bytes of a stored object, to be copied.
    pub(super) fn of_object(reader: ObjectReader) -> Source {
        Source { stream: reader.map_err(|cause| Box::new(cause) as StdError).boxed(), first: None }
    }

    /// Polls the body once. The headers are checked by now, so a client that waits for `100 Continue` gets it before a
    /// shard or a disk is asked anything.
    pub(super) fn send_continue(&mut self) {
        if self.first.is_none() {
            self.first = self.stream.next().now_or_never();
        }
    }

    async fn next(&mut self) -> Option<Result<Bytes, StdError>> {
        match self.first.take() {
            Some(first) => first,
            None => self.stream.next().await,
        }
    }
}

enum Hashing {
    Inline(Box<Digester>),
    Thread { pieces: mpsc::Sender<Bytes>, digests: oneshot::Receiver<Digests> },
    Over,
}

/// A body that is being streamed into the object store. See [`upload_body`].
struct UploadBody {
    source: Source,
    len_bytes: u64,
    seen_bytes: u64,
    hashing: Hashing,
    digests: Option<oneshot::Sender<Digests>>,
}

/// Makes the stream that the object store reads, and the place where its digests arrive once it has ended well. The
/// stream has exactly `len_bytes`, or it ends in an error.
pub(super) fn upload_body(
    source: Source,
    len_bytes: u64,
    algorithm: ChecksumAlgorithm,
) -> (impl Stream<Item = Result<Bytes, BodyFault>> + Send + 'static, oneshot::Receiver<Digests>) {
    let (sender, receiver) = oneshot::channel();
    let hashing = Hashing::start(len_bytes, Digester::new(&[algorithm]));
    let body = UploadBody { source, len_bytes, seen_bytes: 0, hashing, digests: Some(sender) };
    let stream = futures::stream::unfold(body, |mut body| async move {
        let item = body.next().await?;
        Some((item, body))
    });
    // Fused: an unfold must not be polled after its end, and not every reader knows that.
    (stream.fuse(), receiver)
}

impl Hashing {
    fn start(len_bytes: u64, digester: Digester) -> Hashing {
        let permit = if len_bytes >= THREAD_FROM_BYTES { HASH_THREADS.try_acquire().ok() } else { None };
        let Some(permit) = permit else { return Hashing::Inline(Box::new(digester)) };
        let (pieces, mut queue) = mpsc::channel::<Bytes>(HASH_QUEUE_PIECES);
        let (done, digests) = oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let mut digester = digester;
            while let Some(piece) = queue.blocking_recv() {
                digester.update(&piece);
            }
            // Nobody listens any more when the upload was given up.
            let _ = done.send(digester.finish());
        });
        Hashing::Thread { pieces, digests }
    }

    async fn update(&mut self, piece: &Bytes) {
        match self {
            Hashing::Inline(digester) => digester.update(piece),
            // The thread is gone only when it panicked; `finish` notices.
            Hashing::Thread { pieces, .. } => drop(pieces.send(piece.clone()).await),
            Hashing::Over => {}
        }
    }

    async fn finish(self) -> Result<Digests, BodyFault> {
        match self {
            Hashing::Inline(digester) => Ok(digester.finish()),
            Hashing::Thread { pieces, digests } => {
                drop(pieces);
                digests.await.map_err(|_| BodyFault::Incomplete)
            }
            Hashing::Over => Err(BodyFault::Incomplete),
        }
    }
}

impl UploadBody {
    async fn next(&mut self) -> Option<Result<Bytes, BodyFault>> {
        if matches!(self.hashing, Hashing::Over) {
            return None;
        }
        let fault = match self.source.next().await {
            Some(Ok(piece)) => {
                self.seen_bytes += piece.len() as u64;
                if self.seen_bytes <= self.len_bytes {
                    self.hashing.update(&piece).await;
                    return Some(Ok(piece));
                }
                BodyFault::Incomplete
            }
            Some(Err(cause)) => fault_of(&cause),
            None => match self.finish().await {
                Ok(()) => return None,
                Err(fault) => fault,
            },
        };
        self.hashing = Hashing::Over;
        Some(Err(fault))
    }

    async fn finish(&mut self) -> Result<(), BodyFault> {
        let hashing = std::mem::replace(&mut self.hashing, Hashing::Over);
        if self.seen_bytes != self.len_bytes {
            return Err(BodyFault::Incomplete);
        }
        let digests = hashing.finish().await?;
        if let Some(sender) = self.digests.take() {
            // Nobody waits for the digests of an upload that was given up.
            let _ = sender.send(digests);
        }
        Ok(())
    }
}
