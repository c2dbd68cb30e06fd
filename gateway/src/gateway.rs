//! One gateway put together.
//!
//! Starting, in this order:
//! 1. the map given at start names addresses; connections to disks are made when first used;
//! 2. the admin listener answers from the first moment: `/healthz` 200, `/readyz` 503 with reasons;
//! 3. when the root shard has told its map, S3 is served. Until then connections wait in the listener's queue.
//!
//! Stopping: no new S3 requests, those under way get [`DRAIN`]; then background work; then the admin listener, so that
//! a gateway that drains can still be looked at.

use crate::admin::status::{collect, newest, Newest, Sources};
use crate::admin::{AdminContext, LocalDisks};
use crate::background::heal::{HealSettings, Healer};
use crate::disks::{DiskSettings, Disks};
use crate::metrics::{MetricError, Metrics};
use crate::object::{ObjectSettings, ObjectStore};
use crate::ops;
use crate::s3::{self, S3Context, S3Settings};
use crate::settings::{RootCredentials, Secret, DRAIN};
use crate::shards::{Shards, Timing};
use futures::future::BoxFuture;
use granary_placement::map::ClusterMap;
use granary_placement::settings::Values;
use granary_wire::auth::Credentials;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What a gateway is made from.
#[derive(Debug)]
pub struct GatewayConfig {
    /// A map of the cluster, perhaps old: where to ask first.
    pub map: ClusterMap,
    /// The cluster and its secret.
    pub credentials: Credentials,
    /// File of addresses that replace those of the map.
    pub addresses: Option<PathBuf>,
    /// Where to keep the newest map, as JSON; None: nowhere.
    pub keep_map: Option<PathBuf>,
    /// Keys of the root account.
    pub root: RootCredentials,
    /// Domain whose subdomains are buckets; None: path style only.
    pub domain: Option<String>,
    /// Region that clients sign for.
    pub region: String,
    /// What opens the admin API.
    pub admin_token: Secret,
    /// Where the admin listener listens; operators are told which gateway does background work.
    pub admin: SocketAddr,
    /// Settings of this process.
    pub values: Values,
}

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Two metrics of one name.
    #[error(transparent)]
    Metric(#[from] MetricError),
    /// S3 cannot be set up.
    #[error("S3: {0}")]
    S3(#[from] s3::S3SetupError),
    /// A listener's address.
    #[error("{option} {address}: {why}")]
    Listen {
        /// The option that named it.
        option: &'static str,
        /// The address.
        address: String,
        /// What is wrong, and what to do.
        why: String,
    },
}

/// A running gateway.
pub struct Gateway {
    /// The way to the shards.
    pub shards: Shards,
    /// The disks.
    pub disks: Disks,
    /// Payloads.
    pub store: ObjectStore,
    /// The registry.
    pub metrics: Metrics,
    /// Settings of this process, and over them those of the cluster once the root shard has told them.
    pub values: watch::Sender<Arc<Values>>,
    s3: S3Settings,
    healer: Arc<OnceLock<Healer>>,
    admin_token: Secret,
    status: Newest,
    serving: watch::Sender<bool>,
    /// Ends S3, background work and the admin listener, in this order.
    stops: [CancellationToken; 3],
    tasks: [TaskTracker; 3],
}

type Task = BoxFuture<'static, ()>;

const S3: usize = 0;
const BACKGROUND: usize = 1;
const ADMIN: usize = 2;

impl Gateway {
    /// Puts the parts together and begins background work. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`GatewayError::Metric`].
    pub fn start(config: GatewayConfig) -> Result<Gateway, GatewayError> {
        let metrics = Metrics::new()?;
        let map = watch::Sender::new(Some(Arc::new(config.map)));
        let disks = Disks::new(
            map.subscribe(),
            config.credentials,
            config.addresses,
            DiskSettings::from_settings(&config.values),
        );
        let timing = Timing::from_settings(&config.values);
        let shards = Shards::with_timing(Arc::new(disks.clone()), map, metrics.clone(), timing);
        let store = ObjectStore::new(disks.clone(), ObjectSettings::from_settings(&config.values));
        let (access, secret) = (&config.root.access_key, config.root.secret_key.reveal());
        let mut s3 = S3Settings::from_settings(&config.values, &config.region, access, secret);
        s3.base_domain = config.domain;
        s3.metrics = Some(metrics.clone());
        let counted = store.clone();
        metrics.register_sampled("granary_object_", move || counted.counters().samples())?;
        let counted = disks.clone();
        metrics.register_sampled("granary_disk_", move || counted.counters().samples())?;
        let healer: Arc<OnceLock<Healer>> = Arc::default();
        let (status, collector) = newest();
        let gateway = Gateway {
            s3,
            store,
            healer: healer.clone(),
            admin_token: config.admin_token,
            status,
            serving: watch::Sender::new(false),
            stops: [(); 3].map(|()| CancellationToken::new()),
            tasks: [(); 3].map(|()| TaskTracker::new()),
            shards,
            disks,
            metrics,
            values: watch::Sender::new(Arc::new(config.values)),
        };
        // Background work may be waiting for a shard that does not answer; nothing it does needs an orderly end.
        let background = |task: Task| {
            let stop = gateway.stops[BACKGROUND].clone();
            gateway.tasks[BACKGROUND].spawn(async move {
                tokio::select! {
                    () = task => {}
                    () = stop.cancelled() => {}
                }
            });
        };
        let stop = || gateway.stops[BACKGROUND].clone();
        let shards = gateway.shards.clone();
        let (heard, watch_stop) = (gateway.disks.heard_epoch(), stop());
        background(Box::pin(async move { shards.watch_map(heard, watch_stop).await }));
        let sources = Sources {
            shards: gateway.shards.clone(),
            disks: gateway.disks.clone(),
            healer: healer.clone(),
            metrics: gateway.metrics.clone(),
        };
        background(Box::pin(collect(sources, collector, stop())));
        background(Box::pin(ops::settings::watch(gateway.shards.clone(), gateway.values.clone())));
        let (settings, following) = ops::settings::follow(gateway.values.subscribe(), HealSettings::from_settings);
        background(Box::pin(following));
        let found_at = reachable(config.admin);
        background(Box::pin(heal(
            gateway.store.clone(),
            gateway.shards.clone(),
            (settings, gateway.values.clone()),
            found_at,
            healer.clone(),
            stop(),
        )));
        if let Some(path) = config.keep_map {
            background(Box::pin(keep_map(gateway.shards.map(), path, stop())));
        }
        Ok(gateway)
    }

    /// Serves the admin API on `listener`.
    pub fn serve_admin(&self, listener: TcpListener, s3: SocketAddr, local: Option<Arc<dyn LocalDisks>>) {
        let context = AdminContext {
            shards: self.shards.clone(),
            disks: self.disks.clone(),
            values: self.values.subscribe(),
            metrics: self.metrics.clone(),
            token: self.admin_token.clone(),
            healer: self.healer.clone(),
            local,
            status: self.status.clone(),
            serving: self.serving.subscribe(),
            s3: s3.to_string(),
        };
        self.tasks[ADMIN].spawn(crate::admin::serve(listener, Arc::new(context), self.stops[ADMIN].clone()));
    }

    /// Serves S3 on `listener` as soon as the root shard has told the map.
    pub fn serve_s3(&self, listener: TcpListener) {
        let mut confirmed = self.shards.confirmed();
        let stop = self.stops[S3].clone();
        let serving = self.serving.clone();
        let context = S3Context::new(self.shards.clone(), self.store.clone(), self.s3.clone());
        self.tasks[S3].spawn(async move {
            let known = async { confirmed.wait_for(|confirmed| *confirmed).await.is_ok() };
            tokio::select! {
                known = known => if !known { return },
                () = stop.cancelled() => return,
            }
            serving.send_replace(true);
            if let Err(error) = s3::serve(listener, context, stop).await {
                tracing::error!(%error, "S3 cannot be served");
            }
            serving.send_replace(false);
        });
    }

    /// Waits until S3 is served.
    pub async fn wait_serving(&self) {
        let mut serving = self.serving.subscribe();
        if serving.wait_for(|serving| *serving).await.is_err() {
            std::future::pending().await
        }
    }

    /// Stops in order; requests under way get [`DRAIN`].
    pub async fn stop(self) {
        for (name, (stop, tasks)) in
            ["S3", "background work", "the admin listener"].iter().zip(self.stops.iter().zip(&self.tasks))
        {
            stop.cancel();
            tasks.close();
            if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
                tracing::warn!("{name} did not end in {} s and is cut off", DRAIN.as_secs());
            }
        }
    }
}

/// Heals from the moment the root shard has told its map and its settings: by an old map, chunks might be rebuilt where
/// they no longer belong, and without the settings it is not known whether healing is paused.
async fn heal(
    store: ObjectStore,
    shards: Shards,
    (mut settings, values): (watch::Receiver<HealSettings>, watch::Sender<Arc<Values>>),
    address: String,
    place: Arc<OnceLock<Healer>>,
    stop: CancellationToken,
) {
    if shards.confirmed().wait_for(|confirmed| *confirmed).await.is_err() {
        return;
    }
    ops::settings::known(&shards, &values, &mut settings, HealSettings::from_settings).await;
    let healer = place.get_or_init(|| Healer::start(store, shards, settings, address, stop.clone()));
    healer.stopped().await;
}

/// An address for others: the name of this machine where the listener listens on all its addresses.
fn reachable(listener: SocketAddr) -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        name if listener.ip().is_unspecified() && !name.is_empty() => format!("{name}:{}", listener.port()),
        _ => listener.to_string(),
    }
}

async fn keep_map(mut map: watch::Receiver<Option<Arc<ClusterMap>>>, path: PathBuf, stop: CancellationToken) {
    loop {
        tokio::select! {
            changed = map.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
        let Some(newest) = map.borrow_and_update().clone() else { continue };
        let written = serde_json::to_vec_pretty(newest.as_ref())
            .map_err(|error| error.to_string())
            .and_then(|text| crate::settings::write_atomic(&path, &text, 0o644).map_err(|error| error.to_string()));
        if let Err(error) = written {
            tracing::warn!(%error, path = %path.display(), "the newest cluster map is not kept");
        }
    }
}

/// Refuses one address for both listeners: to say that another program has it would be no help.
///
/// # Errors
/// [`GatewayError::Listen`].
pub fn apart(s3: &str, admin: &str) -> Result<(), GatewayError> {
    if s3 != admin || s3.ends_with(":0") {
        return Ok(());
    }
    let why = "is given to --s3 too; each needs an address of its own".to_owned();
    Err(GatewayError::Listen { option: "--admin", address: admin.to_owned(), why })
}

/// Listens, or says which option to change.
///
/// # Errors
/// [`GatewayError::Listen`].
pub async fn listen(option: &'static str, address: &str) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let failed = |why: String| GatewayError::Listen { option, address: address.to_owned(), why };
    let listener = TcpListener::bind(address).await.map_err(|error| {
        failed(match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!("another program listens there; choose another with {option} HOST:PORT")
            }
            std::io::ErrorKind::InvalidInput => "must be HOST:PORT, for example 127.0.0.1:9000".to_owned(),
            _ => error.to_string(),
        })
    })?;
    let local = listener.local_addr().map_err(|error| failed(error.to_string()))?;
    Ok((listener, local))
}
