//! The body of a GET.

use crate::object::{ObjectReader, ReadError};
use bytes::Bytes;
use futures::Stream;
use s3s::stream::{ByteStream, RemainingLength};
use s3s::StdError;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The payload of a GET: pieces from the object reader passed on untouched, with the exact length. A stream that is
/// shorter or longer than its length ends in an error, which breaks the connection: a client never takes a part of an
/// object for the whole.
pub(super) struct ExactBody {
    reader: ObjectReader,
    left_bytes: u64,
}

impl ExactBody {
    /// Wraps a reader of exactly `len_bytes`.
    pub(super) fn new(reader: ObjectReader, len_bytes: u64) -> ExactBody {
        ExactBody { reader, left_bytes: len_bytes }
    }
}

impl Stream for ExactBody {
    type Item = Result<Bytes, StdError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.left_bytes == 0 {
            return Poll::Ready(None);
        }
        let wrong_length = || ReadError::BadRecord("the payload has another length than its record says".to_owned());
        let cause = match std::task::ready!(Pin::new(&mut self.reader).poll_next(cx)) {
            Some(Ok(piece)) => match self.left_bytes.checked_sub(piece.len() as u64) {
                Some(left) => {
                    self.left_bytes = left;
                    return Poll::Ready(Some(Ok(piece)));
                }
                None => wrong_length(),
            },
            Some(Err(cause)) => cause,
            None => wrong_length(),
        };
        tracing::error!(%cause, "a payload breaks off after its headers were sent");
        Poll::Ready(Some(Err(Box::new(cause))))
    }
}

impl ByteStream for ExactBody {
    fn remaining_length(&self) -> RemainingLength {
        RemainingLength::new_exact(usize::try_from(self.left_bytes).unwrap_or(usize::MAX))
    }
}
