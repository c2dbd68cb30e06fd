//! Frames of the control connection.
//!
//! ```text
//! length u32 | request id u64 | kind u8 | body | MAC 16
//! ```
//!
//! Numbers are big-endian; the length counts all that follows it. The MAC is the first half of HMAC-SHA256, under the
//! session key of the direction, over a label, the number of frames sent before in this direction (u64), and the frame
//! up to the MAC. So a frame that was altered, dropped, repeated or put in another order ends the connection.

use crate::auth::{same, MacKey};
use crate::error::{AuthError, LinkError};
use bytes::{Bytes, BytesMut};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest frame, in bytes after the length field.
pub const MAX_FRAME_BYTES: usize = 32 * 1024 * 1024;

const LEN_BYTES: usize = 4;
const HEAD_BYTES: usize = 9;
const MAC_BYTES: usize = 16;

/// Longest body of a frame, in bytes.
pub const MAX_FRAME_BODY_BYTES: usize = MAX_FRAME_BYTES - HEAD_BYTES - MAC_BYTES;

/// Bodies up to this size are copied beside their head, so that many small frames leave in one write.
const COPY_BELOW_BYTES: usize = 16 * 1024;

/// Read buffer for frames of unknown size, in bytes.
const READ_BYTES: usize = 64 * 1024;

const LABEL: &[u8] = b"granary frame\0";

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A request; answered by a response of the same id.
    Request,
    /// A response.
    Response,
    /// Are you there? Answered by a pong. No body.
    Ping,
    /// I am. No body.
    Pong,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Kind::Request => 1,
            Kind::Response => 2,
            Kind::Ping => 3,
            Kind::Pong => 4,
        }
    }

    fn from_number(number: u8) -> Option<Kind> {
        Some(match number {
            1 => Kind::Request,
            2 => Kind::Response,
            3 => Kind::Ping,
            4 => Kind::Pong,
            _ => return None,
        })
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub id: u64,
    pub kind: Kind,
    pub body: Bytes,
}

/// Reads frames and checks their MACs.
pub(crate) struct FrameReader<R> {
    stream: R,
    key: MacKey,
    counter: u64,
    buffer: BytesMut,
    last_read: Instant,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames that the other end authenticates with `key`.
    pub(crate) fn new(stream: R, key: MacKey) -> FrameReader<R> {
        FrameReader { stream, key, counter: 0, buffer: BytesMut::new(), last_read: Instant::now() }
    }

    /// When bytes last came.
    pub(crate) fn last_read(&self) -> Instant {
        self.last_read
    }

    /// The next frame; None when the peer closed the connection between two frames. Waits for ever for the first byte
    /// of a frame, and `stall` for each further part of it. May be dropped and called again.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub(crate) async fn next(&mut self, stall: Duration) -> Result<Option<Frame>, LinkError> {
        loop {
            let missing = match self.take()? {
                Ok(frame) => return Ok(Some(frame)),
                Err(missing) => missing,
            };
            // Memory grows with what has come, not with what the length field promises.
            self.buffer.reserve(missing.clamp(READ_BYTES, self.buffer.len().max(READ_BYTES)));
            let read = if self.buffer.is_empty() {
                self.stream.read_buf(&mut self.buffer).await
            } else {
                tokio::time::timeout(stall, self.stream.read_buf(&mut self.buffer))
                    .await
                    .map_err(|_| LinkError::Timeout)?
            };
            match read {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(LinkError::Closed("in the middle of a frame".to_owned())),
                Ok(_) => self.last_read = Instant::now(),
                Err(error) => return Err(LinkError::Closed(error.to_string())),
            }
        }
    }

    /// A frame out of the buffer, or how many bytes it lacks at least.
    fn take(&mut self) -> Result<Result<Frame, usize>, LinkError> {
        let Some(&[a, b, c, d]) = self.buffer.first_chunk::<LEN_BYTES>() else {
            return Ok(Err(LEN_BYTES - self.buffer.len()));
        };
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if len > MAX_FRAME_BYTES {
            return Err(LinkError::TooLarge);
        }
        if len < HEAD_BYTES + MAC_BYTES {
            return Err(LinkError::Protocol("a frame too short to be one".to_owned()));
        }
        if self.buffer.len() < LEN_BYTES + len {
            return Ok(Err(LEN_BYTES + len - self.buffer.len()));
        }
        let mut frame = self.buffer.split_to(LEN_BYTES + len).freeze();
        let mac = frame.split_off(LEN_BYTES + len - MAC_BYTES);
        let expected = frame_mac(&self.key, self.counter, &frame, &[]);
        if !same(&mac, &expected) {
            return Err(AuthError::Message.into());
        }
        self.counter += 1;
        let head = frame.split_to(LEN_BYTES + HEAD_BYTES);
        let Some((&[_, _, _, _, a, b, c, d, e, f, g, h, kind], _)) =
            head.split_first_chunk::<{ LEN_BYTES + HEAD_BYTES }>()
        else {
            return Err(LinkError::Protocol("a frame too short to be one".to_owned()));
        };
        let kind = Kind::from_number(kind).ok_or_else(|| LinkError::Protocol(format!("unknown frame kind {kind}")))?;
        Ok(Ok(Frame { id: u64::from_be_bytes([a, b, c, d, e, f, g, h]), kind, body: frame }))
    }
}

fn frame_mac(key: &MacKey, counter: u64, head: &[u8], body: &[u8]) -> [u8; MAC_BYTES] {
    let whole = key.mac(&[LABEL, &counter.to_be_bytes(), head, body]);
    let mut half = [0u8; MAC_BYTES];
    half.copy_from_slice(&whole[..MAC_BYTES]);
    half
}

/// Writes frames with their MACs.
pub(crate) struct FrameWriter<W> {
    stream: W,
    key: MacKey,
    counter: u64,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes frames authenticated with `key`.
    pub(crate) fn new(stream: W, key: MacKey) -> FrameWriter<W> {
        FrameWriter { stream, key, counter: 0, buffer: BytesMut::new() }
    }

    /// Writes a frame; a small one only into the buffer. Not to be dropped half way: the rest of the connection depends
    /// on it.
    ///
    /// # Errors
    /// [`LinkError::TooLarge`] leaves the connection as it was; any other ends it.
    pub(crate) async fn write(&mut self, frame: &Frame, stall: Duration) -> Result<(), LinkError> {
        if frame.body.len() > MAX_FRAME_BODY_BYTES {
            return Err(LinkError::TooLarge);
        }
        let len = u32::try_from(HEAD_BYTES + frame.body.len() + MAC_BYTES).map_err(|_| LinkError::TooLarge)?;
        let mut head = [0u8; LEN_BYTES + HEAD_BYTES];
        head[..4].copy_from_slice(&len.to_be_bytes());
        head[4..12].copy_from_slice(&frame.id.to_be_bytes());
        head[12] = frame.kind.number();
        let mac = frame_mac(&self.key, self.counter, &head, &frame.body);
        self.counter += 1;
        self.buffer.extend_from_slice(&head);
        if frame.body.len() <= COPY_BELOW_BYTES {
            self.buffer.extend_from_slice(&frame.body);
        } else {
            self.flush(stall).await?;
            write_all(&mut self.stream, &frame.body, stall).await?;
        }
        self.buffer.extend_from_slice(&mac);
        if self.buffer.len() >= READ_BYTES {
            self.flush(stall).await?;
        }
        Ok(())
    }

    /// Sends what is in the buffer.
    pub(crate) async fn flush(&mut self, stall: Duration) -> Result<(), LinkError> {
        write_all(&mut self.stream, &self.buffer, stall).await?;
        self.buffer.clear();
        Ok(())
    }
}

/// Writes everything; `stall` bounds the time without progress, not the whole.
async fn write_all<W: AsyncWrite + Unpin>(stream: &mut W, mut bytes: &[u8], stall: Duration) -> Result<(), LinkError> {
    while !bytes.is_empty() {
        let written = tokio::time::timeout(stall, stream.write(bytes))
            .await
            .map_err(|_| LinkError::Timeout)?
            .map_err(|error| LinkError::Closed(error.to_string()))?;
        bytes = match bytes.get(written..) {
            Some(rest) if written > 0 => rest,
            _ => return Err(LinkError::Closed("the peer takes no more bytes".to_owned())),
        };
    }
    Ok(())
}

/// Encodes a message for a frame's body.
///
/// # Errors
/// [`LinkError::TooLarge`]; a value that postcard cannot encode is a [`LinkError::Protocol`].
pub(crate) fn encode<T: serde::Serialize>(message: &T) -> Result<Bytes, LinkError> {
    let body = postcard::to_stdvec(message).map_err(|error| LinkError::Protocol(format!("cannot encode: {error}")))?;
    if body.len() > MAX_FRAME_BODY_BYTES {
        return Err(LinkError::TooLarge);
    }
    Ok(body.into())
}

/// Decodes a frame's body; all of it must be used.
///
/// # Errors
/// [`LinkError::Protocol`].
pub(crate) fn decode<'a, T: serde::Deserialize<'a>>(body: &'a [u8]) -> Result<T, LinkError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(LinkError::Protocol(format!("{} bytes too many in a message", rest.len()))),
        Err(error) => Err(LinkError::Protocol(format!("cannot decode: {error}"))),
    }
}

#[cfg(test)]
mod tests;
