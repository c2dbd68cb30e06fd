//! The admin listener: health, metrics, the status page, and the JSON API under `/v1`.
//!
//! - [`api`]: what can be asked and what is answered, as types;
//! - [`acts`]: what operators ask for and change;
//! - [`routes`]: which path leads where, and the limits around all of them;
//! - [`status`]: what is known of the cluster, collected when somebody asks;
//! - [`ready`]: whether this gateway should get traffic, and why not;
//! - [`page`]: the status page; [`healing`]: how healing stands, in words;
//! - [`listener`]: accepts connections.
//!
//! | request | token | answer |
//! |---|---|---|
//! | `GET /healthz` | | 200 while the process lives |
//! | `GET /readyz` | | 200 or 503, [`api::Readiness`] |
//! | `GET /metrics` | | Prometheus text |
//! | `GET /`, `/granary.css` | | the status page |
//! | `/v1/...` | yes | as in [`api`] |

mod acts;
pub mod api;
pub mod healing;
mod listener;
pub mod page;
pub mod ready;
mod routes;
pub mod status;

use crate::background::heal::Healer;
use crate::disks::Disks;
use crate::metrics::Metrics;
use crate::settings::Secret;
use crate::shards::Shards;
use futures::future::BoxFuture;
use granary_placement::id::DiskId;
use granary_placement::settings::Values;
use std::sync::{Arc, OnceLock};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Disk nodes that this process starts and stops itself: those of `granary dev`.
pub trait LocalDisks: Send + Sync + 'static {
    /// Starts the node of a disk, or of the directory where that disk lived; an empty directory becomes a new disk
    /// first.
    fn start(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>>;
    /// Stops it.
    fn stop(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>>;
    /// Puts its directory aside and a new disk in its place.
    fn replace(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>>;
}

/// What the admin API works on.
pub struct AdminContext {
    /// The shards.
    pub shards: Shards,
    /// The disks.
    pub disks: Disks,
    /// Settings in force.
    pub values: watch::Receiver<Arc<Values>>,
    /// The registry.
    pub metrics: Metrics,
    /// What opens `/v1`.
    pub token: Secret,
    /// Who makes a census, once it has begun.
    pub healer: Arc<OnceLock<Healer>>,
    /// Disk nodes of our own.
    pub local: Option<Arc<dyn LocalDisks>>,
    /// The newest status.
    pub status: status::Newest,
    /// True while S3 is served.
    pub serving: watch::Receiver<bool>,
    /// `host:port` of S3.
    pub s3: String,
}

/// Serves until `stop`, then lets answers under way end, within the drain time of the caller.
pub async fn serve(listener: TcpListener, context: Arc<AdminContext>, stop: CancellationToken) {
    let router = routes::router(context, &routes::RequestLimits::default());
    listener::run(listener, router, listener::ListenerLimits::default(), stop).await;
}

#[cfg(test)]
mod tests;
