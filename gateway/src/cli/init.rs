//! `granary init`: forms a cluster from disk nodes that are formatted and running.
//!
//! The configuration names what cannot be guessed; ids of disks are their places in the list, from 1:
//! ```json
//! { "cluster_id": "32 hex digits", "scheme": "4+2", "failure_domain": "server", "shards": 16,
//!   "disks": [ { "uuid": "32 hex digits", "address": "10.0.0.1:7300", "zone": "a", "rack": "1", "server": "s1",
//!                "weight": 1000, "storage": true, "metadata": true } ] }
//! ```
//! Each disk was formatted with `granary-disk-node format --cluster ID --disk PLACE --uuid UUID`.

use super::output::print;
use crate::bootstrap::{form, DEADLINE};
use crate::dev::layout::{read_json, write_json};
use crate::disks::{DiskSettings, Disks};
use crate::metrics::Metrics;
use crate::shards::Shards;
use clap::Args;
use futures::stream::{self, StreamExt, TryStreamExt};
use granary_placement::id::{ClusterId, DiskId, DiskUuid};
use granary_placement::map::{ClusterMap, Disk, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk, DEFAULT_GROUPS_PER_DISK};
use granary_placement::scheme::{FailureDomain, KPlusM, Scheme};
use granary_wire::auth::{ClusterSecret, Credentials};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
use serde::Deserialize;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

const ATTEMPT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(500);
const AT_ONCE: usize = 16;

/// Options of `granary init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// JSON file that describes the cluster.
    #[arg(long)]
    config: PathBuf,
    /// File of the cluster secret.
    #[arg(long)]
    secret_file: PathBuf,
    /// Where to write the cluster map, for `granary gateway --map`.
    #[arg(long)]
    map_out: PathBuf,
    /// JSON file of addresses that replace those of the map: {"disk id": "host:port"}.
    #[arg(long)]
    addresses: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    cluster_id: ClusterId,
    scheme: String,
    failure_domain: FailureDomain,
    shards: u16,
    replicas: Option<usize>,
    disks: Vec<ConfigDisk>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigDisk {
    uuid: DiskUuid,
    address: String,
    zone: String,
    rack: String,
    server: String,
    weight: u32,
    #[serde(default = "yes")]
    storage: bool,
    #[serde(default)]
    metadata: bool,
}

fn yes() -> bool {
    true
}

/// Forms the cluster; done again after a failure, it goes on.
///
/// # Errors
/// The configuration, or a disk node that does not do its part.
pub async fn run(args: InitArgs) -> Result<(), Box<dyn Error>> {
    let config: Config = read_json(&args.config)?;
    let parts: KPlusM = config.scheme.parse()?;
    let scheme = Scheme::new(parts.k, parts.m, config.failure_domain)?;
    let disks = config.disks.into_iter().map(|disk| NewDisk {
        uuid: disk.uuid,
        address: disk.address,
        location: Location { zone: disk.zone, rack: disk.rack, server: disk.server },
        weight: disk.weight,
        roles: Roles { storage: disk.storage, metadata: disk.metadata },
    });
    let map = new_map(NewCluster {
        cluster_id: config.cluster_id,
        disks: disks.collect(),
        scheme_name: scheme.to_string(),
        scheme,
        object_shards: config.shards,
        replicas: config.replicas,
        groups_per_disk: DEFAULT_GROUPS_PER_DISK,
    })?;
    let credentials = Credentials { cluster: map.cluster_id, secret: ClusterSecret::read_file(&args.secret_file)? };
    let known = watch::Sender::new(Some(Arc::new(map.clone())));
    let disks = Disks::new(known.subscribe(), credentials, args.addresses, DiskSettings::default());
    check_disks(&disks, &map).await?;
    write_json(&args.map_out, &map)?;
    let shards = Shards::new(Arc::new(disks), known, Metrics::new()?);
    form(&shards, &map).await?;
    print(|out| {
        writeln!(
            out,
            "cluster {} is formed: {} disks, {} shards; map in {}",
            map.cluster_id,
            map.disks.len(),
            map.shards.len(),
            args.map_out.display()
        )
    })?;
    Ok(())
}

/// Asks every disk node who it is before any is told anything: a node keeps the first map it takes, so one wrong line of the
/// configuration must not reach the others. Waits for nodes that do not answer yet.
async fn check_disks(disks: &Disks, map: &ClusterMap) -> Result<(), InitError> {
    let deadline = Instant::now() + DEADLINE;
    let checks = map.disks.values().map(|disk| check_disk(disks, map, disk, deadline));
    stream::iter(checks).buffer_unordered(AT_ONCE).try_collect().await
}

async fn check_disk(disks: &Disks, map: &ClusterMap, disk: &Disk, deadline: Instant) -> Result<(), InitError> {
    let (id, uuid) = (disk.id, disk.uuid);
    loop {
        let client = disks.client(id).ok_or(InitError::NotInMap(id))?;
        let failed = |why: String| InitError::Disk { disk: id, address: client.address().to_owned(), why };
        let known = match client.control(ControlRequest::Status, ATTEMPT).await {
            Ok(ControlResponse::Status(found)) if found.uuid != uuid || found.disk.is_some_and(|found| found != id) => {
                let number = found.disk.map_or_else(|| "no number".to_owned(), |disk| disk.to_string());
                let why = format!("the configuration says {uuid} there, but it is disk {number} ({})", found.uuid);
                return Err(failed(why));
            }
            Ok(ControlResponse::Status(found)) if found.epoch < map.epoch => return Ok(()),
            Ok(ControlResponse::Status(found)) if found.epoch > map.epoch => {
                return Err(failed(format!("it belongs to a formed cluster already (map epoch {})", found.epoch)));
            }
            // The same epoch: fine if an earlier attempt was broken off, and nothing else.
            Ok(ControlResponse::Status(_)) => client.control(ControlRequest::GetMap, ATTEMPT).await,
            other => other,
        };
        let why = match known {
            Ok(ControlResponse::Map(Some(known))) if *known == *map => return Ok(()),
            Ok(ControlResponse::Map(_)) => {
                let why = "it has taken another map of this cluster already: give the same configuration as then, or format anew";
                return Err(failed(why.to_owned()));
            }
            Ok(other) => format!("an answer of another kind: {other:?}"),
            Err(LinkError::Auth(error)) => return Err(failed(LinkError::Auth(error).to_string())),
            Err(error) => error.to_string(),
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(failed(why));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Why the disks cannot form this cluster.
#[derive(Debug, thiserror::Error)]
enum InitError {
    /// The map and the clients disagree.
    #[error("disk {0} is not in the cluster map")]
    NotInMap(DiskId),
    /// A disk node is not what the configuration says, or does not answer.
    #[error("disk {disk} at {address}: {why}; nothing was changed")]
    Disk {
        /// Which.
        disk: DiskId,
        /// Where.
        address: String,
        /// What is wrong.
        why: String,
    },
}
