//! `granary init`: forms a cluster from disk nodes that are formatted and running.
//!
//! The configuration names what cannot be guessed; ids of disks are their places in the list, from 1:
//! ```json
//! { "cluster_id": "32 hex digits", "scheme": "4+2", "failure_domain": "server", "shards": 16,
//!   "disks": [ { "uuid": "32 hex digits", "address": "10.0.0.1:7000", "zone": "a", "rack": "1", "server": "s1",
//!                "weight": 1000, "storage": true, "metadata": true } ] }
//! ```
//! Each disk was formatted with `granary-disk-node format --cluster ID --disk PLACE --uuid UUID`.

use crate::bootstrap::form;
use crate::dev::layout::{read_json, write_json};
use crate::disks::{DiskSettings, Disks};
use crate::metrics::Metrics;
use crate::shards::Shards;
use clap::Args;
use granary_placement::id::{ClusterId, DiskUuid};
use granary_placement::map::{Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk, DEFAULT_GROUPS_PER_DISK};
use granary_placement::scheme::{FailureDomain, KPlusM, Scheme};
use granary_wire::auth::{ClusterSecret, Credentials};
use serde::Deserialize;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;

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
    write_json(&args.map_out, &map)?;
    let known = watch::Sender::new(Some(Arc::new(map.clone())));
    let disks = Disks::new(known.subscribe(), credentials, args.addresses, DiskSettings::default());
    let shards = Shards::new(Arc::new(disks), known, Metrics::new()?);
    form(&shards, &map).await?;
    println!(
        "cluster {} is formed: {} disks, {} shards; map in {}",
        map.cluster_id,
        map.disks.len(),
        map.shards.len(),
        args.map_out.display()
    );
    Ok(())
}
