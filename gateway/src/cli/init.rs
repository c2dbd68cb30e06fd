//! `granary init`: forms a cluster from disk nodes that are formatted and running.
//!
//! The configuration names what cannot be guessed ([`ClusterConfig`](crate::ops::form::ClusterConfig)); ids of disks
//! are their places in the list, from 1. Each disk was formatted with
//! `granary-disk-node format --cluster ID --disk PLACE --uuid UUID`.

use super::output::print;
use crate::bootstrap::{check_disks, form};
use crate::dev::layout::{read_json, write_json};
use crate::disks::{DiskSettings, Disks};
use crate::metrics::Metrics;
use crate::ops::form::first_map;
use crate::shards::Shards;
use clap::Args;
use granary_wire::auth::{ClusterSecret, Credentials};
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

/// Forms the cluster; done again after a failure, it goes on.
///
/// # Errors
/// The configuration, or a disk node that does not do its part.
pub async fn run(args: InitArgs) -> Result<(), Box<dyn Error>> {
    let map = first_map(read_json(&args.config)?)?;
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
