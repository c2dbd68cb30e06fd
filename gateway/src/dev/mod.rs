//! A whole cluster on one machine: `granary dev`.
//!
//! - [`look`]: what stands in the way, said before anything is written;
//! - [`layout`]: the directory, and what is decided at the first start;
//! - [`ready`] and [`label`]: a disk directory becomes a disk the cluster knows;
//! - [`others`]: unless the other disks take over what a lost one held;
//! - [`child`] and [`supervisor`]: disk-node processes, kept running;
//! - [`report`]: `cluster.json` and what is printed;
//! - this file: start and stop, in order.

pub mod child;
pub mod label;
pub mod layout;
mod look;
pub mod others;
pub mod ready;
pub mod report;
pub mod supervisor;

use crate::admin::LocalDisks;
use crate::bootstrap::{form, FormError};
use crate::gateway::{apart, listen, Gateway, GatewayConfig, GatewayError};
use crate::ops::settings;
use crate::settings::{random_token, read_token, write_atomic, RootCredentials, Secret, SettingsError};
use crate::shards::Shards;
use futures::future::{try_join_all, BoxFuture};
use granary_placement::id::DiskId;
use granary_placement::settings::Values;
use granary_wire::auth::{ClusterSecret, Credentials, SecretError};
use layout::{Layout, LayoutError, Plan, Shape};
use ready::{Readier, ReadyError};
use report::Places;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use supervisor::{NodeSettings, SlotHandle, SlotTask};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Environment variable of the disk node's executable.
pub const DISK_NODE_VAR: &str = "GRANARY_DISK_NODE";

/// Settings of a new cluster of `granary dev` that differ from those elsewhere. Its disk nodes start again within
/// seconds, or not at all, and whoever breaks one wants to see what happens. All its disks lie on one file system,
/// which may be full of other things.
const AT_FIRST: [(&str, &str); 2] = [("heal.out_after", "30s"), ("heal.fill_ceiling", "100%")];

/// What `granary dev` is told.
#[derive(Debug, Clone)]
pub struct DevOptions {
    /// DIR.
    pub dir: PathBuf,
    /// What the first start decides.
    pub shape: Shape,
    /// `--s3`.
    pub s3: String,
    /// `--admin`.
    pub admin: String,
    /// `--no-restart` is false here.
    pub restart: bool,
    /// `--region`.
    pub region: String,
    /// `--domain`.
    pub domain: Option<String>,
    /// Settings: of this process, of the disk nodes, and of the cluster.
    pub values: Values,
}

/// Why `granary dev` ends in failure.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// The directory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The cluster secret.
    #[error("cluster secret: {0}")]
    Secret(#[from] SecretError),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// A disk directory at the first start.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// Forming the cluster.
    #[error("the cluster could not be formed: {0}; logs of the disk nodes are in {logs}", logs = .1.display())]
    Form(#[source] FormError, PathBuf),
    /// A setting of the cluster.
    #[error("a setting of the cluster could not be changed: {0}")]
    ClusterSetting(#[from] settings::SetError),
    /// The executable.
    #[error("{0}")]
    Program(String),
    /// The system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Runs a cluster until `stop`.
///
/// # Errors
/// It cannot start; whatever was started has been stopped again.
pub async fn run(options: DevOptions, stop: CancellationToken) -> Result<(), DevError> {
    let mut values = options.values;
    let mut for_cluster = values.take_cluster();
    // All that can stand in the way is looked at before anything is written.
    look::look(&Layout::at(&options.dir)?, &options.shape)?;
    let program = disk_node_program()?;
    RootCredentials::from_env()?;
    apart(&options.s3, &options.admin)?;
    let (s3, s3_address) = listen("--s3", &options.s3).await?;
    let (admin, admin_address) = listen("--admin", &options.admin).await?;

    let layout = Layout::open(&options.dir)?;
    let _lock = layout.lock()?;
    let (plan, map) = layout.plan(&options.shape)?;
    for (name, value) in AT_FIRST.into_iter().filter(|_| !plan.formed) {
        if !for_cluster.iter().any(|(given, _)| *given == name) {
            for_cluster.push((name, value.to_owned()));
        }
    }
    let (root, credentials_file, fresh) = root_credentials(&layout)?;
    layout.make_addresses()?;
    let secret_file = layout.file("cluster-secret");
    let secret = cluster_secret(&secret_file)?;
    let admin_token = admin_token(&layout)?;
    let gateway = Gateway::start(GatewayConfig {
        map: map.clone(),
        credentials: Credentials { cluster: plan.cluster_id, secret },
        addresses: Some(layout.file("addresses.json")),
        keep_map: Some(layout.file("map.json")),
        root: root.clone(),
        domain: options.domain.clone(),
        region: options.region.clone(),
        admin_token,
        admin: admin_address,
        values: values.clone(),
    })?;
    let readier = Arc::new(Readier::new(layout.clone(), program.clone(), &gateway, &plan));
    let plan = format_all(&layout, plan, &readier).await?;

    let settings = NodeSettings {
        program,
        secret_file,
        addresses_file: layout.file("addresses.json"),
        set: values.node_arguments(),
        restart: options.restart,
    };
    let spawner =
        child::Spawner::new().map_err(|source| DevError::System { what: "a thread for disk nodes", source })?;
    let (nodes, nodes_stop) = (TaskTracker::new(), CancellationToken::new());
    let mut slots = Vec::new();
    for slot in &plan.disks {
        let log = layout.logs().join(format!("{}.log", slot.name));
        let dir = layout.disk(&slot.name);
        let (task, handle) = SlotTask::new(slot.clone(), dir, log, settings.clone(), spawner.clone(), readier.clone());
        nodes.spawn(task.run(nodes_stop.clone()));
        slots.push(Arc::new(handle));
    }
    let places = Places {
        layout: layout.clone(),
        s3: s3_address,
        admin: admin_address,
        region: options.region,
        credentials_file,
    };
    let (report, report_stop) = (TaskTracker::new(), CancellationToken::new());
    report.spawn(places.clone().keep_cluster_json(plan.cluster_id.to_string(), slots.clone(), report_stop.clone()));
    gateway.serve_admin(admin, s3_address, Some(Arc::new(OwnDisks { slots })));
    gateway.serve_s3(s3);

    let result = tokio::select! {
        result = serve(&layout, plan, &map, &gateway, places.banner(&root, fresh), &for_cluster) => result,
        () = stop.cancelled() => Ok(()),
    };
    tracing::info!("stopping");
    gateway.stop().await;
    nodes_stop.cancel();
    nodes.close();
    nodes.wait().await;
    report_stop.cancel();
    report.close();
    report.wait().await;
    result
}

/// Forms the cluster if that was not done to the end before, gives it the settings that are its own, says when it is
/// ready, then goes on for ever.
async fn serve(
    layout: &Layout,
    mut plan: Plan,
    map: &granary_placement::map::ClusterMap,
    gateway: &Gateway,
    banner: String,
    for_cluster: &[(&'static str, String)],
) -> Result<(), DevError> {
    if !plan.formed {
        form(&gateway.shards, map).await.map_err(|error| DevError::Form(error, layout.logs()))?;
        plan.formed = true;
        layout.write_plan(&plan)?;
        tracing::info!(disks = map.disks.len(), shards = map.shards.len(), scheme = %plan.scheme, "cluster formed");
    }
    gateway.wait_serving().await;
    let changed = set_cluster(&gateway.shards, for_cluster).await?;
    // A cluster runs on when nobody reads what it says.
    let mut out = std::io::stdout();
    if let Err(error) = write!(out, "{changed}{banner}").and_then(|()| out.flush()) {
        tracing::warn!(%error, "standard output takes nothing");
    }
    std::future::pending().await
}

/// Gives the root shard the settings of the cluster that were given to this start; answers a line for each that was
/// another before.
async fn set_cluster(shards: &Shards, given: &[(&'static str, String)]) -> Result<String, DevError> {
    let mut changed = String::new();
    if given.is_empty() {
        return Ok(changed);
    }
    let (_, known) = settings::fetch(shards, 0).await.map_err(settings::SetError::from)?.unwrap_or_default();
    for (name, value) in given {
        let before = known.get(*name);
        if before != Some(value) {
            settings::set(shards, name, Some(value)).await?;
            let before = before.map_or_else(|| "the default".to_owned(), Clone::clone);
            changed += &format!("{name} of the cluster is {value} from now on; it was {before}\n");
        }
    }
    Ok(changed)
}

/// At the first start all disks are formatted before the first node runs: from then on an empty directory is a lost
/// disk, also when the forming of the cluster is broken off.
async fn format_all(layout: &Layout, mut plan: Plan, readier: &Readier) -> Result<Plan, DevError> {
    if !plan.formatted {
        let dirs: Vec<PathBuf> = plan.disks.iter().map(|slot| layout.disk(&slot.name)).collect();
        try_join_all(plan.disks.iter().zip(&dirs).map(|(slot, dir)| readier.make_ready(slot, dir, false))).await?;
        plan.formatted = true;
        layout.write_plan(&plan)?;
        readier.set_formatted();
    }
    Ok(plan)
}

/// The disk node's executable: GRANARY_DISK_NODE, or the one beside ours.
fn disk_node_program() -> Result<PathBuf, DevError> {
    let path = match std::env::var_os(DISK_NODE_VAR) {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()
            .map_err(|source| DevError::System { what: "the path of this program", source })?
            .with_file_name("granary-disk-node"),
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(DevError::Program(format!(
        "{} is not there: build it (make build) or name it in {DISK_NODE_VAR}",
        path.display()
    )))
}

/// From the environment, else from DIR, else made now; the file they are in, and whether they are new.
fn root_credentials(layout: &Layout) -> Result<(RootCredentials, Option<PathBuf>, bool), DevError> {
    if let Some(root) = RootCredentials::from_env()? {
        return Ok((root, None, false));
    }
    let path = layout.file("root-credentials");
    if path.exists() {
        return Ok((RootCredentials::read_file(&path)?, Some(path), false));
    }
    let root = RootCredentials::generate()?;
    write_atomic(&path, root.to_json().as_bytes(), 0o600)?;
    Ok((root, Some(path), true))
}

fn cluster_secret(path: &Path) -> Result<ClusterSecret, DevError> {
    if !path.exists() {
        write_atomic(path, format!("{}\n", ClusterSecret::generate()?.to_hex()).as_bytes(), 0o600)?;
    }
    Ok(ClusterSecret::read_file(path)?)
}

fn admin_token(layout: &Layout) -> Result<Secret, DevError> {
    let path = layout.file("admin-token");
    if !path.exists() {
        write_atomic(&path, format!("{}\n", random_token()?).as_bytes(), 0o600)?;
    }
    Ok(read_token(&path)?)
}

/// The disk directories, for the admin API.
struct OwnDisks {
    slots: Vec<Arc<SlotHandle>>,
}

impl OwnDisks {
    /// The directory where that disk lives, or else where it lived.
    fn find(&self, disk: DiskId) -> Result<&SlotHandle, String> {
        let lives = self.slots.iter().find(|slot| slot.state().disk == Some(disk));
        let lived = || self.slots.iter().find(|slot| slot.state().past.contains(&disk));
        lives.or_else(lived).map(AsRef::as_ref).ok_or_else(|| format!("no disk {disk} here"))
    }
}

impl LocalDisks for OwnDisks {
    fn start(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.find(disk)?.start().await })
    }

    fn stop(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.find(disk)?.stop().await })
    }

    fn replace(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.find(disk)?.replace(disk).await })
    }
}
