//! The body of a request as it comes off the socket, before s3s reads it.

use super::checksums::BodyCheck;
use super::request::RequestInfo;
use super::xml_scan::XmlScan;
use crate::object::Budget;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use s3s::s3_error;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Why a request's body broke off on the socket.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestBodyError {
    /// No progress for too long.
    #[error("too little of the body came for too long")]
    Idle,
    /// A checksum in the headers does not fit. XML bodies only: payloads are verified by their verbs.
    #[error("{0}")]
    Checksum(String),
    /// XML with parts that its reader would leave out.
    #[error("the XML has a CDATA section or a document type")]
    Xml,
    /// There is no memory for so much XML now.
    #[error("memory is short")]
    Memory,
    /// Signed chunks without the last one.
    #[error("the last chunk of the body is missing")]
    NoLastChunk,
    /// hyper's error.
    #[error("the connection broke")]
    Connection(#[source] hyper::Error),
}

/// Bytes of the last, empty chunk of signed chunks: `0;chunk-signature=`, 64 hex digits, two line ends.
const LAST_CHUNK_BYTES: usize = 18 + 64 + 4;

/// Bytes of an XML body that need no memory of the budget.
const FREE_XML_BYTES: u64 = 64 * 1024;

/// Watches that signed chunks end in their empty one. s3s takes an end after any whole chunk for the end, once the
/// length fits.
#[derive(Default)]
struct LastChunk {
    tail: Vec<u8>,
}

impl LastChunk {
    fn see(&mut self, data: &[u8]) {
        let fresh = data.get(data.len().saturating_sub(LAST_CHUNK_BYTES)..).unwrap_or(data);
        self.tail.extend_from_slice(fresh);
        self.tail.drain(..self.tail.len().saturating_sub(LAST_CHUNK_BYTES));
    }

    fn is_there(&self) -> bool {
        let text = String::from_utf8_lossy(&self.tail);
        let signature =
            text.trim_end_matches("\r\n").rsplit_once("0;chunk-signature=").map_or("", |(_, signature)| signature);
        signature.len() == 64 && signature.bytes().all(|byte| byte.is_ascii_hexdigit())
    }
}

/// The socket's end of a request body. It outlives the request's handling, so that what a refused client still sends
/// can be drained.
pub(super) struct Socket {
    incoming: Mutex<Option<Incoming>>,
    polled: AtomicBool,
}

impl Socket {
    /// Holds the body of a request.
    pub(super) fn new(incoming: Incoming) -> Arc<Socket> {
        Arc::new(Socket { incoming: Mutex::new(Some(incoming)), polled: AtomicBool::new(false) })
    }

    /// Did anyone ask for bytes? If not, a client that waits for `100 Continue` sends none.
    pub(super) fn was_polled(&self) -> bool {
        self.polled.load(Ordering::Relaxed)
    }

    /// Takes the unread rest; None when all was read.
    pub(super) fn take_rest(&self) -> Option<Incoming> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner).take().filter(|incoming| !incoming.is_end_stream())
    }
}

/// How slow a body may be: in every such time at least so many bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) time: Duration,
    pub(super) bytes: u64,
}

/// A request body on its way into s3s: bounded in slowness, and verified against its checksums when it is XML.
pub(super) struct RequestBody {
    socket: Arc<Socket>,
    info: Arc<RequestInfo>,
    patience: Patience,
    idle: Option<Pin<Box<Sleep>>>,
    /// Bytes since the last progress.
    progress: u64,
    /// Time that was spent waiting for the client since then. Time in which nobody asked for bytes does not count: a
    /// client must not pay for slow disks.
    waited: Duration,
    since: Option<Instant>,
    check: Option<BodyCheck>,
    last_chunk: Option<LastChunk>,
    scan: Option<XmlScan>,
    memory: Budget,
    xml_bytes: u64,
    started: bool,
    over: bool,
}

impl RequestBody {
    /// Wraps a body; `signed_chunks` is how it is framed.
    pub(super) fn new(
        socket: Arc<Socket>,
        info: Arc<RequestInfo>,
        patience: Patience,
        memory: Budget,
        signed_chunks: bool,
    ) -> RequestBody {
        let last_chunk = signed_chunks.then(LastChunk::default);
        RequestBody {
            socket,
            info,
            patience,
            idle: None,
            progress: 0,
            waited: Duration::ZERO,
            since: None,
            check: None,
            last_chunk,
            scan: None,
            memory,
            xml_bytes: 0,
            started: false,
            over: false,
        }
    }

    fn fail(&mut self, error: RequestBodyError) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        self.over = true;
        Poll::Ready(Some(Err(error)))
    }

    fn waiting(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        self.since.get_or_insert_with(Instant::now);
        let limit = self.patience.time.saturating_sub(self.waited);
        let idle = self.idle.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match idle.as_mut().poll(cx) {
            Poll::Ready(()) => self.fail(RequestBodyError::Idle),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if !self.started {
            // Routing and authorisation are done by the first poll, so it is known whether the body is XML.
            self.started = true;
            self.socket.polled.store(true, Ordering::Relaxed);
            self.check = self.info.xml_check();
            self.scan = self.info.is_xml().then(XmlScan::default);
        }
        let polled = match self.socket.incoming.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(incoming) => Pin::new(incoming).poll_frame(cx),
            None => Poll::Ready(None),
        };
        match polled {
            Poll::Pending => self.waiting(cx),
            Poll::Ready(Some(Ok(frame))) => {
                self.progress += frame.data_ref().map_or(0, |data| data.len() as u64);
                self.idle = None;
                let waited = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
                self.waited += waited;
                if self.progress >= self.patience.bytes {
                    self.progress = 0;
                    self.waited = Duration::ZERO;
                }
                if let Some(data) = frame.data_ref() {
                    self.info.add_received(data.len() as u64);
                    if let Some(check) = &mut self.check {
                        check.update(data);
                    }
                    if let Some(last_chunk) = &mut self.last_chunk {
                        last_chunk.see(data);
                    }
                    if self.scan.is_some() {
                        // s3s gathers XML before it reads it. A little is free, the rest is of the budget or refused.
                        let before = self.xml_bytes;
                        self.xml_bytes = before.saturating_add(data.len() as u64);
                        let more = self.xml_bytes.saturating_sub(before.max(FREE_XML_BYTES));
                        if more > 0 {
                            let Some(grant) = self.memory.try_read(more) else {
                                self.info.set_body_fault(s3_error!(SlowDown, "Memory is short."));
                                return self.fail(RequestBodyError::Memory);
                            };
                            self.info.hold(grant);
                        }
                    }
                    if self.scan.as_mut().is_some_and(|scan| scan.see(data)) {
                        self.info.set_body_fault(s3_error!(
                            MalformedXML,
                            "The XML you provided has a CDATA section or a document type, which this server does not read."
                        ));
                        return self.fail(RequestBodyError::Xml);
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(cause))) => self.fail(RequestBodyError::Connection(cause)),
            Poll::Ready(None) if self.last_chunk.as_ref().is_some_and(|last_chunk| !last_chunk.is_there()) => {
                self.fail(RequestBodyError::NoLastChunk)
            }
            Poll::Ready(None) => match self.check.take().map_or(Ok(()), BodyCheck::verify) {
                Ok(()) => {
                    self.over = true;
                    Poll::Ready(None)
                }
                Err(error) => {
                    let message = error.message().unwrap_or("a checksum does not match").to_owned();
                    self.info.set_body_fault(error);
                    self.fail(RequestBodyError::Checksum(message))
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        // An empty body with a checksum still has to be verified, so its end must be polled.
        let at_end = self
            .socket
            .incoming
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_none_or(Incoming::is_end_stream);
        at_end && self.check.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.socket
            .incoming
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(Incoming::size_hint)
            .unwrap_or_default()
    }
}
