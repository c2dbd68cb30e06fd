//! Bodies of chunk requests and answers: frames of reference-counted bytes, written as they are.

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The sender gave up before the announced length was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the body was given up by its sender")]
pub(crate) struct BodyAborted;

/// A body of known length.
pub(crate) struct WireBody {
    frames: Frames,
    remaining_bytes: u64,
}

enum Frames {
    /// All at hand.
    List(VecDeque<Bytes>),
    /// Still being made, through a bounded queue.
    Queue(mpsc::Receiver<Bytes>),
}

impl WireBody {
    /// No bytes.
    pub(crate) fn empty() -> WireBody {
        WireBody::list(VecDeque::new())
    }

    /// These bytes.
    pub(crate) fn list(frames: VecDeque<Bytes>) -> WireBody {
        let remaining_bytes = frames.iter().map(|frame| frame.len() as u64).sum();
        WireBody { frames: Frames::List(frames), remaining_bytes }
    }

    /// What comes out of the queue, `len_bytes` in all. If the queue ends before, the body fails and with it the
    /// connection.
    pub(crate) fn queue(queue: mpsc::Receiver<Bytes>, len_bytes: u64) -> WireBody {
        WireBody { frames: Frames::Queue(queue), remaining_bytes: len_bytes }
    }

    /// Bytes still to come.
    pub(crate) fn remaining_bytes(&self) -> u64 {
        self.remaining_bytes
    }
}

impl Body for WireBody {
    type Data = Bytes;
    type Error = BodyAborted;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyAborted>>> {
        if self.remaining_bytes == 0 {
            return Poll::Ready(None);
        }
        let next = match &mut self.frames {
            Frames::List(frames) => frames.pop_front(),
            Frames::Queue(queue) => match queue.poll_recv(cx) {
                Poll::Ready(next) => next,
                Poll::Pending => return Poll::Pending,
            },
        };
        Poll::Ready(Some(match next.map(|bytes| (self.remaining_bytes.checked_sub(bytes.len() as u64), bytes)) {
            Some((Some(remaining), bytes)) => {
                self.remaining_bytes = remaining;
                Ok(Frame::data(bytes))
            }
            _ => Err(BodyAborted),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.remaining_bytes == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining_bytes)
    }
}
