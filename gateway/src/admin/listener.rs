//! The listener under the admin API: connections, of which there are never more than a few, each for a bounded time.
//!
//! axum's own `serve` waits for ever for a header; this one is hyper's connection with a timer. A connection is asked
//! to end after a while, or when the gateway drains: the request under way is answered, with `Connection: close`, and
//! no other is taken.

use axum::Router;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// What a client may take.
#[derive(Debug, Clone)]
pub(super) struct ListenerLimits {
    /// Connections at once; more wait in the listener's queue.
    pub connections: usize,
    /// Time for a request's head, and between two requests.
    pub header: Duration,
    /// After this a connection takes no further request.
    pub lifetime: Duration,
    /// Time for the rest of an answer to leave after that.
    pub linger: Duration,
}

impl Default for ListenerLimits {
    fn default() -> ListenerLimits {
        ListenerLimits {
            connections: 64,
            header: Duration::from_secs(10),
            lifetime: Duration::from_secs(60),
            linger: Duration::from_secs(10),
        }
    }
}

const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Serves until `stop`; then lets answers under way end, within the drain time of the caller.
pub(super) async fn run(listener: TcpListener, router: Router, limits: ListenerLimits, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let tasks = TaskTracker::new();
    let next = || async {
        let place = places.clone().acquire_owned().await;
        (place, listener.accept().await)
    };
    loop {
        let (place, stream) = tokio::select! {
            accepted = next() => match accepted {
                (Ok(place), Ok((stream, _))) => (place, stream),
                (Err(_), _) => break,
                (_, Err(error)) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "admin listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
            () = stop.cancelled() => break,
        };
        let (router, limits, stop) = (router.clone(), limits.clone(), stop.clone());
        tasks.spawn(async move {
            let _place = place;
            connection(stream, router, limits, stop).await;
        });
    }
    // Nobody is accepted any more: who connects now is refused, and asks another gateway.
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

async fn connection(stream: TcpStream, router: Router, limits: ListenerLimits, stop: CancellationToken) {
    let running = Arc::new(AtomicUsize::new(0));
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let counted = Counted::new(running.clone());
        let answer = router.clone().oneshot(request);
        async move {
            let answer = answer.await;
            drop(counted);
            answer
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.header);
    http.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD_BYTES);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = tokio::time::sleep(limits.lifetime) => None,
        () = stop.cancelled() => None,
    };
    if ended.is_none() {
        connection.as_mut().graceful_shutdown();
    }
    while ended.is_none() {
        match tokio::time::timeout(limits.linger, connection.as_mut()).await {
            Ok(result) => ended = Some(result),
            // An answer that takes long to make, a census, is waited for; one that is not taken is not.
            Err(_) if running.load(Ordering::Relaxed) > 0 => {}
            Err(_) => {
                tracing::debug!("admin connection cut off: the client does not take its answer");
                return;
            }
        }
    }
    if let Some(Err(error)) = ended {
        tracing::debug!(%error, "admin connection ended");
    }
}

/// One request whose answer is being made.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(running: Arc<AtomicUsize>) -> Counted {
        running.fetch_add(1, Ordering::Relaxed);
        Counted(running)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
