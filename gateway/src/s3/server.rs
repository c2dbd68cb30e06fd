//! The listener: connections in, bounded in number and in time, and a stop that lets requests finish.

use super::context::S3Context;
use super::service::{FrontEnd, S3SetupError};
use crate::door::{Bounds, Door, Network, Place, Work};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most headers of a request.
const MAX_HEADERS: usize = 100;
/// Read buffer of a connection: also the largest frame of a body.
const BUFFER_BYTES: usize = 256 * 1024;
/// Connections beyond the bound that are still answered, with 503; beyond these, the kernel's backlog waits.
const REFUSED_CONNECTIONS: usize = 256;
/// How long a stop waits for requests in work.
const STOP_GRACE: Duration = Duration::from_secs(30);
/// Pause after a failed accept: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves S3 on a listener until `stop`; returns when the requests in work are done, or have used up their grace.
///
/// # Errors
/// [`S3SetupError`] before anything is served.
pub async fn serve(listener: TcpListener, cx: Arc<S3Context>, stop: CancellationToken) -> Result<(), S3SetupError> {
    let front = FrontEnd::new(cx.clone())?;
    let bounds = Bounds {
        places: cx.settings.max_connections,
        refused: REFUSED_CONNECTIONS,
        per_address: cx.settings.connections_per_address,
        proxies: Network::parse_list(&cx.settings.trusted_proxies).map_err(S3SetupError::Proxy)?,
    };
    if let Some(limit) = crate::descriptors::raise_limit() {
        let wanted = cx.settings.max_connections.saturating_add(REFUSED_CONNECTIONS);
        if limit < u64::try_from(wanted).unwrap_or(u64::MAX) {
            tracing::warn!(limit, wanted, "the limit of open files is lower than s3.max_connections needs");
        }
    }
    let door = Door::new(bounds, Duration::ZERO);
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(cause) => {
                tracing::warn!(%cause, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let entered = tokio::select! {
            () = stop.cancelled() => break,
            entered = door.enter(peer.ip()) => entered,
        };
        // An address that takes up all its places, and all its refusals: its socket is closed.
        let Some((place, refuse_all)) = entered else { continue };
        let connection = connection(stream, front.clone(), cx.clone(), place, refuse_all, stop.clone());
        let cut = cut.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = connection => {}
                () = cut.cancelled() => {}
            }
        });
    }
    tasks.close();
    if tokio::time::timeout(STOP_GRACE, tasks.wait()).await.is_err() {
        cut.cancel();
        tasks.wait().await;
    }
    Ok(())
}

async fn connection(
    stream: TcpStream,
    front: FrontEnd,
    cx: Arc<S3Context>,
    place: Place,
    refuse_all: bool,
    stop: CancellationToken,
) {
    // Without it the last segment of an answer waits for the client's acknowledgement.
    if let Err(cause) = stream.set_nodelay(true) {
        tracing::debug!(%cause, "a connection went away at once");
        return;
    }
    let place = Arc::new(place);
    let io = Guarded {
        stream,
        place: place.clone(),
        asked: false,
        head_limit: cx.settings.header_timeout,
        write_limit: cx.settings.body_idle_timeout,
        write_progress_bytes: cx.settings.body_progress_bytes,
        head: None,
        write: None,
        written: 0,
    };
    let worker = place.clone();
    let service = service_fn(move |request| {
        let (front, work) = (front.clone(), Work::begin(&worker));
        async move { Ok::<_, Infallible>(front.handle(request, refuse_all, work).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        // hyper's clock also runs while a kept-alive connection is silent, so it is the idle limit here; a head that
        // does not come or does not end is the business of `Guarded`.
        .header_read_timeout(cx.settings.keep_alive)
        .max_headers(MAX_HEADERS)
        .max_buf_size(BUFFER_BYTES)
        .keep_alive(true);
    let connection = http.serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = place.given_away() => {
            // It was silent when its place was given away. A head may have come since: that request is answered.
            if !place.is_busy() {
                return;
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(cause) = outcome {
        tracing::debug!(%cause, "a connection broke off");
    }
}

/// A socket that gives up on a client that says nothing, sends a head byte by byte, or does not take its answer.
struct Guarded {
    stream: TcpStream,
    place: Arc<Place>,
    /// There was a request.
    asked: bool,
    head_limit: Duration,
    write_limit: Duration,
    /// Fewer bytes than this are no progress, unless they are the last of what is to be written.
    write_progress_bytes: u64,
    head: Option<Pin<Box<Sleep>>>,
    write: Option<Pin<Box<Sleep>>>,
    /// Bytes since the last progress.
    written: u64,
}

fn expired(timer: &mut Option<Pin<Box<Sleep>>>, limit: Duration, cx: &mut Context<'_>) -> bool {
    timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit))).as_mut().poll(cx).is_ready()
}

impl Guarded {
    fn progressed(&mut self) {
        self.write = None;
        self.written = 0;
    }

    fn wrote(&mut self, polled: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = &polled {
            self.written += written.as_ref().map_or(0, |written| *written as u64);
            if self.written >= self.write_progress_bytes {
                self.progressed();
            }
        } else if expired(&mut self.write, self.write_limit, cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.place.is_busy() {
            self.head = None;
            self.asked = true;
            return polled;
        }
        let began = !self.asked || self.head.is_some() || buf.filled().len() > before;
        let limit = self.head_limit;
        if began && expired(&mut self.head, limit, cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, data);
        self.wrote(polled, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, data);
        self.wrote(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // All there was to write is written: hyper flushes when its buffer is empty.
        self.progressed();
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
