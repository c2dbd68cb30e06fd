//! The listener: connections in, bounded in number and in time, and a stop that lets requests finish.

use super::context::S3Context;
use super::service::{FrontEnd, S3SetupError};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
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
    let served = Arc::new(Semaphore::new(cx.settings.max_connections));
    let held = Arc::new(Semaphore::new(cx.settings.max_connections.saturating_add(REFUSED_CONNECTIONS)));
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    loop {
        let accept = async {
            let held = held.clone().acquire_owned().await;
            (held, listener.accept().await)
        };
        let (held, accepted) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(cause) => {
                tracing::warn!(%cause, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let permit = served.clone().try_acquire_owned().ok();
        let connection = connection(stream, front.clone(), cx.clone(), permit.is_none(), stop.clone());
        let cut = cut.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = connection => {}
                () = cut.cancelled() => {}
            }
            drop((held, permit));
        });
    }
    tasks.close();
    if tokio::time::timeout(STOP_GRACE, tasks.wait()).await.is_err() {
        cut.cancel();
        tasks.wait().await;
    }
    Ok(())
}

async fn connection(stream: TcpStream, front: FrontEnd, cx: Arc<S3Context>, refuse_all: bool, stop: CancellationToken) {
    // Without it the last segment of an answer waits for the client's acknowledgement.
    if let Err(cause) = stream.set_nodelay(true) {
        tracing::debug!(%cause, "a connection went away at once");
        return;
    }
    let busy = Arc::new(AtomicBool::new(false));
    let io = Guarded {
        stream,
        busy: busy.clone(),
        head_limit: cx.settings.header_timeout,
        write_limit: cx.settings.body_idle_timeout,
        head: None,
        write: None,
    };
    let service = service_fn(move |request| {
        let (front, busy) = (front.clone(), busy.clone());
        busy.store(true, Ordering::Relaxed);
        async move {
            let response = front.handle(request, refuse_all).await;
            busy.store(false, Ordering::Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        // hyper's clock also runs while a kept-alive connection is silent, so it is the idle limit here; a head that
        // has begun and does not end is the business of `Guarded`.
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
    };
    if let Err(cause) = outcome {
        tracing::debug!(%cause, "a connection broke off");
    }
}

/// A socket that gives up on a client that sends a head byte by byte, or does not take its answer.
struct Guarded {
    stream: TcpStream,
    /// A request is in work: its head is complete.
    busy: Arc<AtomicBool>,
    head_limit: Duration,
    write_limit: Duration,
    head: Option<Pin<Box<Sleep>>>,
    write: Option<Pin<Box<Sleep>>>,
}

fn expired(timer: &mut Option<Pin<Box<Sleep>>>, limit: Duration, cx: &mut Context<'_>) -> bool {
    timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit))).as_mut().poll(cx).is_ready()
}

impl Guarded {
    fn wrote(&mut self, polled: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if polled.is_ready() {
            self.write = None;
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
        if self.busy.load(Ordering::Relaxed) {
            self.head = None;
            return polled;
        }
        let began = self.head.is_some() || buf.filled().len() > before;
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
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
