//! The admin listener: health, metrics, the status page, and the JSON API under `/v1`.
//!
//! - this file: the listener and its routes;
//! - [`status`]: what is known of the cluster, collected each second;
//! - [`ready`]: whether this gateway should get traffic, and why not;
//! - [`page`]: the status page.
//!
//! | request | token | answer |
//! |---|---|---|
//! | `GET /healthz` | | 200 while the process lives |
//! | `GET /readyz` | | 200 or 503, JSON with reasons |
//! | `GET /metrics` | | Prometheus text |
//! | `GET /` | | the status page |
//! | `GET /v1/status`, `GET /v1/map` | yes | JSON |
//! | `POST /v1/census` | yes | reads every chunk; JSON |
//! | `POST /v1/disks/{id}/replace` | yes | a new disk takes the slots of that one |
//! | `POST /v1/disks/{id}/start`, `.../stop` | yes | disk nodes of `granary dev` only |

pub mod page;
pub mod ready;
pub mod status;

use crate::disks::Disks;
use crate::metrics::Metrics;
use crate::settings::Secret;
use crate::shards::map_watch::MapSet;
use crate::shards::Shards;
use bytes::Bytes;
use futures::future::BoxFuture;
use granary_placement::id::{DiskId, DiskUuid};
use granary_placement::map::ClusterMap;
use granary_wire::control::{ControlRequest, ControlResponse};
use http::{header, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use status::Snapshot;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{watch, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const MAX_CONNECTIONS: usize = 64;
/// How long a new disk's node may take to tell which disk it serves.
const NEW_DISK: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 * 1024;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection lives at most this long; a census of a large cluster is the longest answer.
const CONNECTION: Duration = Duration::from_secs(24 * 3600);
const CSP: &str =
    "default-src 'none'; style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Disk nodes that this process starts and stops itself: those of `granary dev`.
pub trait LocalDisks: Send + Sync + 'static {
    /// Starts the node of a disk, or of the directory where that disk lived; an empty directory becomes a new disk first.
    fn start(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>>;
    /// Stops it.
    fn stop(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>>;
    /// Puts its directory aside and a new disk in its place.
    fn replace(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>>;
}

/// Runs a census and gives its result.
pub type CensusFn = Arc<dyn Fn() -> BoxFuture<'static, Result<serde_json::Value, String>> + Send + Sync>;

/// More Prometheus text, from parts that count by themselves.
pub type SamplesFn = Arc<dyn Fn() -> String + Send + Sync>;

/// What the admin API works on.
pub struct AdminContext {
    /// The shards.
    pub shards: Shards,
    /// The disks.
    pub disks: Disks,
    /// The registry.
    pub metrics: Metrics,
    /// Further metrics.
    pub samples: Vec<SamplesFn>,
    /// What opens `/v1`.
    pub token: Secret,
    /// The census.
    pub census: CensusFn,
    /// Disk nodes of our own.
    pub local: Option<Arc<dyn LocalDisks>>,
    /// The newest collection.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// True while S3 is served.
    pub serving: watch::Receiver<bool>,
    /// `host:port` of S3.
    pub s3: String,
}

type Answer = Response<Full<Bytes>>;

/// Serves until `stop`, then lets answers under way end, within the drain time of the caller.
pub async fn serve(listener: TcpListener, context: Arc<AdminContext>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "admin listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
            () = stop.cancelled() => break,
        };
        let (context, stop) = (context.clone(), stop.clone());
        tasks.spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let context = context.clone();
                async move { Ok::<_, Infallible>(answer(&context, request).await) }
            });
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_headers(64).max_buf_size(32 * 1024);
            let connection = http.serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = tokio::time::timeout(CONNECTION, connection.as_mut()) => ended.unwrap_or(Ok(())),
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "admin connection ended");
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn answer(context: &AdminContext, request: Request<Incoming>) -> Answer {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    if parts.first() == Some(&"v1") && !authorised(context, &request) {
        let mut refusal =
            failure(StatusCode::UNAUTHORIZED, "the admin token is missing or wrong (Authorization: Bearer TOKEN)");
        refusal.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        return refusal;
    }
    let method = request.method().clone();
    match (&method, parts.as_slice()) {
        (&Method::GET, ["healthz"]) => plain(StatusCode::OK, "text/plain; charset=utf-8", "ok\n"),
        (&Method::GET, ["readyz"]) => {
            let verdict = ready::verdict(&context.snapshot.borrow(), &facts(context));
            let status = if verdict.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(status, &verdict)
        }
        (&Method::GET, ["metrics"]) => metrics(context),
        (&Method::GET, [""]) => {
            let snapshot = context.snapshot.borrow().clone();
            let verdict = ready::verdict(&snapshot, &facts(context));
            plain(StatusCode::OK, "text/html; charset=utf-8", page::render(&snapshot, &verdict, &context.s3))
        }
        (&Method::GET, ["v1", "status"]) => json(StatusCode::OK, context.snapshot.borrow().as_ref()),
        (&Method::GET, ["v1", "map"]) => match context.shards.current_map() {
            Some(map) => json(StatusCode::OK, map.as_ref()),
            None => failure(StatusCode::SERVICE_UNAVAILABLE, "no cluster map yet"),
        },
        (&Method::POST, ["v1", "census"]) => match (context.census)().await {
            Ok(census) => json(StatusCode::OK, &census),
            Err(why) => failure(StatusCode::SERVICE_UNAVAILABLE, &why),
        },
        (&Method::POST, ["v1", "disks", id, verb]) => match id.parse() {
            Ok(disk) => disk_verb(context, disk, verb, request).await,
            Err(_) => failure(StatusCode::BAD_REQUEST, "the disk id is a number"),
        },
        (_, ["healthz" | "readyz" | "metrics" | ""] | ["v1", "status" | "map" | "census"]) => {
            failure(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        }
        _ => failure(StatusCode::NOT_FOUND, "no such path"),
    }
}

fn facts(context: &AdminContext) -> ready::Facts {
    ready::Facts {
        confirmed: *context.shards.confirmed().borrow(),
        root_silence: context.shards.root_silence(),
        serving: *context.serving.borrow(),
    }
}

fn authorised(context: &AdminContext, request: &Request<Incoming>) -> bool {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    given.and_then(|given| given.strip_prefix("Bearer ")).is_some_and(|token| context.token.matches(token.trim()))
}

fn metrics(context: &AdminContext) -> Answer {
    match context.metrics.text() {
        Ok(mut text) => {
            for samples in &context.samples {
                text.extend_from_slice(samples().as_bytes());
            }
            plain(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Body of a replacement where disk nodes are run by somebody else: the new disk is formatted and running.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replacement {
    /// UUID on the new disk's label.
    uuid: DiskUuid,
    /// Address of its node; None: the old one's.
    address: Option<String>,
}

async fn disk_verb(context: &AdminContext, disk: DiskId, verb: &str, request: Request<Incoming>) -> Answer {
    let done = match (verb, &context.local) {
        ("start", Some(local)) => local.start(disk).await,
        ("stop", Some(local)) => local.stop(disk).await,
        ("replace", Some(local)) => local.replace(disk).await,
        ("start" | "stop", None) => {
            let why = "this gateway runs no disk nodes; start and stop them where they run";
            return failure(StatusCode::NOT_IMPLEMENTED, why);
        }
        ("replace", None) => {
            let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
            let Ok(Ok(body)) = tokio::time::timeout(BODY_TIMEOUT, body).await else {
                return failure(StatusCode::BAD_REQUEST, "the body did not come whole, or is too long");
            };
            let body = body.to_bytes();
            if body.is_empty() {
                let why = "name the new disk by the UUID on its label (--uuid): this gateway runs no disk nodes itself";
                return failure(StatusCode::BAD_REQUEST, why);
            }
            match serde_json::from_slice(&body) {
                Ok(replacement) => replace(context, disk, replacement).await,
                Err(error) => {
                    let form = r#"the body must be {"uuid": "...", "address": "host:port"}"#;
                    return failure(StatusCode::BAD_REQUEST, &format!("{form}: {error}"));
                }
            }
        }
        _ => return failure(StatusCode::NOT_FOUND, "no such path"),
    };
    tracing::info!(disk = disk.0, verb, result = ?done, "admin request for a disk");
    match done {
        Ok(()) => json(StatusCode::OK, &serde_json::json!({ "disk": disk.0, "done": verb })),
        Err(why) => failure(StatusCode::CONFLICT, &why),
    }
}

/// Gives the slots and replicas of a disk to a new one; the shard leaders and the healer do the rest.
async fn replace(context: &AdminContext, old: DiskId, new: Replacement) -> Result<(), String> {
    for _ in 0..5 {
        context.shards.refresh_map().await.map_err(|error| error.to_string())?;
        let map = context.shards.current_map().ok_or("no cluster map yet")?;
        let (next, id) = granary_placement::place::replace_disk(&map, old, new.uuid, new.address.clone())
            .map_err(|error| error.to_string())?;
        check_new(context, &map, (old, id), &new).await?;
        match context.shards.set_map(next).await.map_err(|error| error.to_string())? {
            MapSet::Done => return Ok(()),
            MapSet::Conflict { .. } => {}
        }
    }
    Err("the cluster map changes all the time; try again".to_owned())
}

/// Is the new disk's node there, with the number that the map will give it? Asked before the map changes: afterwards the old disk is
/// gone for good, and a wrong label would leave its place empty.
async fn check_new(
    context: &AdminContext,
    map: &ClusterMap,
    (old, id): (DiskId, DiskId),
    new: &Replacement,
) -> Result<(), String> {
    let client = match (&new.address, context.disks.client(old)) {
        (Some(address), _) => context.disks.client_at(address),
        (None, Some(client)) => client,
        (None, None) => return Err(format!("the address of disk {old} is not known; name the new disk's")),
    };
    let format = format!("granary-disk-node format --dir DIR --cluster {} --disk {id}", map.cluster_id);
    match client.control(ControlRequest::Status, NEW_DISK).await {
        Ok(ControlResponse::Status(status)) if status.uuid == new.uuid && status.disk == Some(id) => Ok(()),
        Ok(ControlResponse::Status(status)) => {
            let number = status.disk.map_or_else(|| "without a number".to_owned(), |disk| disk.to_string());
            Err(format!(
                "the node at {} serves disk {number} ({}), but the new one must be disk {id} ({}): `{format}`",
                client.address(),
                status.uuid,
                new.uuid
            ))
        }
        Ok(other) => Err(format!("the node at {} does not tell which disk it serves: {other:?}", client.address())),
        Err(error) => Err(format!(
            "the new disk's node does not answer at {}: {error}; `{format}`, then start it there",
            client.address()
        )),
    }
}

fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Answer {
    match serde_json::to_vec_pretty(value) {
        Ok(mut text) => {
            text.push(b'\n');
            plain(status, "application/json", text)
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn failure(status: StatusCode, why: &str) -> Answer {
    plain(status, "application/json", format!("{}\n", serde_json::json!({ "error": why })))
}

fn plain(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        answer.headers_mut().insert(name, header::HeaderValue::from_static(value));
    }
    answer
}
