//! `serve`: puts the parts of a disk node together, and takes them apart in order when told to stop.

use crate::chunks::Node;
use crate::label::{self, LabelError};
use crate::leases::{LeaseRefused, Leases};
use crate::maps::{MapRefused, Maps};
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::roles::Roles;
use crate::store::device::Device;
use crate::store::file_device::FileDevice;
use crate::store::handle::Store;
use crate::store::index::IndexError;
use crate::store::index_rocksdb::RocksEngine;
use crate::store::scrub::budget::ScrubSettings;
use crate::store::{OpenError, StoreSettings};
use crate::{admin, label::Label, scrub};
use granary_placement::id::ClusterId;
use granary_placement::settings::Values;
use granary_wire::auth::SecretError;
use granary_wire::{ClusterSecret, Credentials, ServerLimits};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::signal::unix::{signal, SignalKind};
use tokio_util::sync::CancellationToken;

const ADDRESS_FILE: &str = "address";

/// What `serve` is told.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The disk.
    pub dir: PathBuf,
    /// Where to listen; port 0 lets the system pick one.
    pub listen: String,
    /// File with the cluster secret.
    pub secret_file: PathBuf,
    /// The cluster the disk must belong to, if the operator says so.
    pub cluster: Option<ClusterId>,
    /// Settings of this process.
    pub values: Values,
    /// File of peers' addresses.
    pub addresses: Option<PathBuf>,
    /// Where to serve health and metrics.
    pub admin: Option<String>,
}

/// Why a disk node does not start, or stopped badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The disk is not one this node may use.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// The secret is missing or unsafe.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The map on the disk says that this disk is another.
    #[error(transparent)]
    Map(#[from] MapRefused),
    /// What the disk knows of leases cannot be read.
    #[error(transparent)]
    Leases(#[from] LeaseRefused),
    /// The chunks cannot be opened.
    #[error("chunk store: {0}")]
    Store(#[from] OpenError),
    /// A listener or file failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The store failed while it was closed.
    #[error("closing the chunk store: {0}")]
    Close(crate::store::StoreError),
    /// Metrics cannot be registered.
    #[error("metrics: {0}")]
    Metrics(String),
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    let what = what.into();
    move |source| ServeError::Io { what, source }
}

/// Ends the process now. Nothing is flushed and nothing is answered: what the disk holds is for the next start to find
/// out.
fn end(reason: &str) -> ! {
    tracing::error!(reason, "this disk can no longer be trusted; the process ends");
    std::process::abort();
}

/// Runs a disk node until a signal or `stop` ends it.
///
/// # Errors
/// [`ServeError`] when it cannot start.
pub async fn serve(options: ServeOptions, stop: CancellationToken) -> Result<(), ServeError> {
    let label = label::read(&options.dir)?;
    if let Some(cluster) = options.cluster {
        label.check_cluster(cluster)?;
    }
    let _lock = label::lock(&options.dir)?;
    let credentials = Credentials { cluster: label.cluster, secret: ClusterSecret::read_file(&options.secret_file)? };
    // Before the disk is touched: a port that is taken should not cost a recovery.
    let listener = TcpListener::bind(&options.listen).await.map_err(failed(format!("listen on {}", options.listen)))?;
    let bound = listener.local_addr().map_err(failed("local address"))?;
    let maps = Arc::new(Maps::open(&options.dir, label.clone())?);
    let leases = Arc::new(Leases::open(&options.dir)?);
    let metrics = Arc::new(Metrics::new().map_err(|error| ServeError::Metrics(error.to_string()))?);
    let store = open_store(&options, &label, metrics.clone()).await?;
    let peers = Arc::new(Peers::new(&label, maps.clone(), credentials.clone(), options.addresses.clone()));
    let background = stop.child_token();
    let on_fatal: Arc<dyn Fn(String) + Send + Sync> = Arc::new(|reason: String| end(&reason));
    let reserve_bytes = store.settings().meta_reserve_bytes;
    let roles = Roles::new(
        &options.dir,
        &options.values,
        reserve_bytes,
        peers.clone(),
        maps.clone(),
        on_fatal.clone(),
        background.clone(),
    );
    roles.start().await;
    let mut tasks = tokio::task::JoinSet::new();
    if let Some(address) = &options.admin {
        let listener = TcpListener::bind(address).await.map_err(failed(format!("listen on {address}")))?;
        let bound = listener.local_addr().map_err(failed("local address"))?;
        tracing::info!(%bound, "serving health and metrics");
        tasks.spawn(admin::serve(listener, store.clone(), roles.clone(), metrics.clone(), background.clone()));
    }
    {
        let (peers, stop) = (peers.clone(), background.clone());
        tasks.spawn(async move { peers.poll_maps(stop).await });
    }
    let scrubbed = ScrubSettings::from_settings(&options.values);
    tasks.spawn(scrub::run(store.clone(), scrubbed, background.clone()));
    let node = Arc::new(Node {
        label: label.clone(),
        store: store.clone(),
        maps,
        roles: roles.clone(),
        leases,
        metrics,
        on_fatal,
    });
    write_address(&options.dir, bound)?;
    tracing::info!(%bound, disk = label.disk.0, uuid = %label.uuid, cluster = %label.cluster, "serving");
    let limits = within_open_files(ServerLimits::from_settings(&options.values));
    let server = tokio::spawn(granary_wire::serve(listener, node, (label.uuid, credentials), limits, stop.clone()));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("signal handler"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("signal handler"))?;
    tokio::select! {
        () = stop.cancelled() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    stop.cancel();
    // Requests under way end first, then what they rest on.
    if let Err(error) = server.await {
        tracing::error!(%error, "the server ended badly");
    }
    roles.shutdown().await;
    while tasks.join_next().await.is_some() {}
    store.close().await.map_err(ServeError::Close)?;
    let _ = std::fs::remove_file(options.dir.join(ADDRESS_FILE));
    tracing::info!("stopped");
    Ok(())
}

/// No more places than the limit of open files allows. A connection that cannot be accepted waits in silence; one for
/// which there is no place is told so.
fn within_open_files(limits: ServerLimits) -> ServerLimits {
    let open_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let Some(open_files) = open_files else { return limits };
    let wanted = limits.connections();
    let limits = limits.within(open_files);
    if limits.connections() < wanted {
        let places = limits.connections();
        tracing::warn!(
            open_files,
            wanted,
            places,
            "fewer places for connections than set: raise the limit of open files"
        );
    }
    limits
}

async fn open_store(options: &ServeOptions, label: &Label, metrics: Arc<Metrics>) -> Result<Store, ServeError> {
    let (options, uuid) = (options.clone(), label.uuid);
    let open = move || -> Result<Store, ServeError> {
        let device = FileDevice::open(&options.dir.join("segments")).map_err(failed("segments"))?;
        let capacity_bytes = device.space().map_err(failed("size of the file system"))?.capacity_bytes;
        let settings = StoreSettings::from_settings(&options.values, capacity_bytes);
        let begun = std::time::Instant::now();
        let device = Arc::new(device);
        let once = || {
            let engine = RocksEngine::open(&options.dir.join("index"))?;
            let on_fatal = Arc::new(|reason: &str| end(reason));
            Store::open(device.clone(), Box::new(engine), uuid, settings, metrics.clone(), on_fatal)
        };
        let (store, recovered) = match once() {
            // It was marked, and is rebuilt from the segments now; a second time would not help.
            Err(OpenError::Index(error @ IndexError::Damaged(_))) => {
                tracing::error!(%error, "the index was found damaged at the start");
                once()?
            }
            opened => opened?,
        };
        tracing::info!(?recovered, seconds = begun.elapsed().as_secs_f64(), "chunk store open");
        Ok(store)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    opened.unwrap_or_else(|error| {
        Err(ServeError::Io { what: "open the chunk store".to_owned(), source: io::Error::other(error) })
    })
}

/// For scripts that let the system pick a port. Not synced: it is only true while the process runs.
fn write_address(dir: &Path, bound: SocketAddr) -> Result<(), ServeError> {
    let (path, temporary) = (dir.join(ADDRESS_FILE), dir.join("address.tmp"));
    std::fs::write(&temporary, format!("{bound}\n"))
        .and_then(|()| std::fs::rename(&temporary, &path))
        .map_err(failed(path.display().to_string()))
}
