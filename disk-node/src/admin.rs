//! `/healthz` and `/metrics` on a listener of their own, for probes and Prometheus. Nothing secret is behind it.

use crate::metrics::Metrics;
use crate::roles::Roles;
use crate::store::handle::Store;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const MAX_CONNECTIONS: usize = 32;
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// Answers until told to stop.
pub async fn serve(
    listener: TcpListener,
    store: Store,
    roles: Arc<Roles>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let (store, roles, metrics) = (store.clone(), roles.clone(), metrics.clone());
                    connections.spawn(async move {
                        let service = service_fn(move |request| {
                            let answer = answer(&request, &store, &roles, &metrics);
                            async move { Ok::<_, Infallible>(answer) }
                        });
                        let mut builder = http1::Builder::new();
                        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
                        let connection = builder.serve_connection(TokioIo::new(stream), service);
                        // A probe that hangs up is no news.
                        let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections on the admin address");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

fn answer(request: &Request<Incoming>, store: &Store, roles: &Roles, metrics: &Metrics) -> Response<Full<Bytes>> {
    // Asking refreshes the gauges, and fails once the store has.
    let fill = store.fill();
    let (status, body) = match request.uri().path() {
        "/healthz" => match fill {
            Ok(_) => (StatusCode::OK, Bytes::from_static(b"ok\n")),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, Bytes::from(format!("{error}\n"))),
        },
        "/metrics" => {
            if let Some(counters) = roles.counters() {
                metrics.record_meta(&counters);
            }
            metrics.metadata_closed.set(i64::from(roles.cannot_be_opened()));
            (StatusCode::OK, Bytes::from(metrics.render()))
        }
        _ => (StatusCode::NOT_FOUND, Bytes::from_static(b"not found\n")),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
}
