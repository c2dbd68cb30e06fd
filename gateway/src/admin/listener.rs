//! The listener under the admin API: connections, of which there are never more than a few, each for a bounded time.
//!
//! axum's own `serve` waits for ever for a header; this one is hyper's connection with a timer. A connection is asked
//! to end after a while, or when the gateway drains: the request under way is answered, with `Connection: close`, and
//! no other is taken. When all places are taken, the connection that has been silent the longest makes room for a new
//! one, as at the S3 listener ([`crate::door`]); while all have requests in work, new ones wait.

use crate::door::{Bounds, Door, Place, Work};
use axum::Router;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// What a client may take.
#[derive(Debug, Clone)]
pub(super) struct ListenerLimits {
    /// Connections at once; more take the places of silent ones, or wait in the listener's queue.
    pub connections: usize,
    /// So long a connection may be silent before it makes room for a new one.
    pub silent: Duration,
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
            silent: Duration::from_secs(1),
            header: Duration::from_secs(5),
            lifetime: Duration::from_secs(60),
            linger: Duration::from_secs(10),
        }
    }
}

const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Serves until `stop`; then lets answers under way end, within the drain time of the caller.
pub(super) async fn run(listener: TcpListener, router: Router, limits: ListenerLimits, stop: CancellationToken) {
    // Operators and probes often share an address, so one may have all places; nobody is answered with a refusal.
    let bounds = Bounds {
        places: limits.connections,
        refused: 0,
        per_address: limits.connections.saturating_add(1),
        proxies: Vec::new(),
    };
    let door = Door::new(bounds, limits.silent);
    let tasks = TaskTracker::new();
    let next = || async {
        let (stream, peer) = listener.accept().await?;
        Ok::<_, std::io::Error>(door.enter(peer.ip()).await.map(|(place, _)| (place, stream)))
    };
    loop {
        let (place, stream) = tokio::select! {
            accepted = next() => match accepted {
                Ok(Some(entered)) => entered,
                Ok(None) => continue,
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "admin listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
            () = stop.cancelled() => break,
        };
        tasks.spawn(connection(stream, place, router.clone(), limits.clone(), stop.clone()));
    }
    // Nobody is accepted any more: who connects now is refused, and asks another gateway.
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

async fn connection(stream: TcpStream, place: Place, router: Router, limits: ListenerLimits, stop: CancellationToken) {
    let place = Arc::new(place);
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let work = Work::begin(&place);
        let answer = router.clone().oneshot(request);
        async move {
            let answer = answer.await;
            drop(work);
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
        () = place.given_away() => {
            // It was silent when its place was given away. A head may have come since: that request is answered.
            if !place.is_busy() {
                return;
            }
            None
        }
    };
    if ended.is_none() {
        connection.as_mut().graceful_shutdown();
    }
    while ended.is_none() {
        match tokio::time::timeout(limits.linger, connection.as_mut()).await {
            Ok(result) => ended = Some(result),
            // An answer that takes long to make, a census, is waited for; one that is not taken is not.
            Err(_) if place.is_busy() => {}
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
