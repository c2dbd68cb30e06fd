//! The verbs that talk to the admin API, each with its arguments: parse, ask, print.

use super::http::call;
use super::output::{print, print_json};
use crate::admin::api::{
    Call, Census, DiskAct, DiskRow, DrainDisk, FeatureLevels, GetFeatureLevels, GetMap, GetStatus, Health, OutDisk,
    RaiseFeatureLevel, ReplaceDisk, RunCensus, ShardLevelRow, StartDisk, Status, StopDisk, WeighDisk,
};
use crate::admin::healing;
use crate::admin::page::bytes;
use crate::dev::layout::read_json;
use crate::dev::report::ClusterJson;
use crate::settings::{read_token, SettingsError};
use clap::{Args, Subcommand};
use granary_placement::id::{DiskId, DiskUuid};
use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

pub(super) const QUICK: Duration = Duration::from_secs(120);
const CENSUS: Duration = Duration::from_secs(24 * 3600);
/// Exit code of a census that found something wrong.
const NOT_WHOLE: u8 = 3;

pub(super) type Done = Result<ExitCode, Box<dyn Error>>;

/// Verbs about the cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum AdminVerb {
    /// How the cluster stands.
    Status {
        #[command(flatten)]
        target: Target,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read every chunk and count them.
    Census {
        #[command(flatten)]
        target: Target,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the keys that cannot be read now, and what would bring them back.
    Lost(super::lost::LostArgs),
    /// How healing stands; pause it, let it go on, set its pace.
    Heal(super::heal::HealArgs),
    /// The metadata shards: leaders, replicas, and how far these are behind.
    Shard(super::shard::ShardArgs),
    /// Print the cluster map.
    Map {
        #[command(flatten)]
        target: Target,
    },
    /// The cluster as a whole.
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// Disks.
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Settings: list them, or change one of the whole cluster.
    Config(super::config::ConfigArgs),
}

/// Verbs about the cluster as a whole.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterVerb {
    /// Show the feature level of each shard and what the builds in the cluster know, or raise it after an upgrade.
    FeatureLevel {
        #[command(flatten)]
        target: Target,
        /// Raise every shard to the highest level that all builds know. There is no way back to an older release.
        #[arg(long)]
        raise: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Verbs about disks.
#[derive(Debug, Subcommand)]
pub(crate) enum DiskVerb {
    /// List the disks.
    List {
        #[command(flatten)]
        target: Target,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Put a new disk in the place of one: its chunks are rebuilt from the others.
    Replace {
        /// Number of the disk to be replaced.
        id: DiskId,
        #[command(flatten)]
        target: Target,
        /// UUID on the label of the new disk, formatted and running; not needed under `granary dev`.
        #[arg(long)]
        uuid: Option<DiskUuid>,
        /// HOST:PORT of the new disk's node, if not the old one's.
        #[arg(long, requires = "uuid")]
        address: Option<String>,
        /// Do it. Without this, what would happen is printed.
        #[arg(long)]
        yes: bool,
    },
    /// Take a disk out of service: its data moves to other disks. Repeat it to see how far that is, and to end it.
    Drain {
        /// Number of the disk.
        id: DiskId,
        #[command(flatten)]
        target: Target,
    },
    /// Take a dead disk out of service now: the others take over what it held. It is let back in when it answers again.
    Out {
        /// Number of the disk.
        id: DiskId,
        #[command(flatten)]
        target: Target,
    },
    /// Give a disk another share of the data, relative to the other disks.
    Weight {
        /// Number of the disk.
        id: DiskId,
        /// The new weight; by convention its capacity in GiB. 0 takes no data.
        weight: u32,
        #[command(flatten)]
        target: Target,
    },
    /// Start a disk node of `granary dev`.
    Start {
        /// Number of the disk.
        id: DiskId,
        #[command(flatten)]
        target: Target,
    },
    /// Stop a disk node of `granary dev`.
    Stop {
        /// Number of the disk.
        id: DiskId,
        #[command(flatten)]
        target: Target,
    },
}

/// Runs a verb.
///
/// # Errors
/// No answer, or refused; standard output is closed.
pub(crate) async fn run(verb: AdminVerb) -> Done {
    match verb {
        AdminVerb::Status { target, json } => {
            let status = target.ask(&GetStatus {}, QUICK).await?;
            if json {
                print_json(&status)?;
            } else {
                print(|out| write_status(out, &status))?;
            }
        }
        AdminVerb::Map { target } => print_json(&target.ask(&GetMap {}, QUICK).await?)?,
        AdminVerb::Census { target, json } => {
            let census = target.ask(&RunCensus {}, CENSUS).await?;
            if json {
                print_json(&census)?;
            } else {
                print(|out| write_census(out, &census))?;
            }
            if !census.is_complete() {
                return Ok(ExitCode::from(NOT_WHOLE));
            }
        }
        AdminVerb::Cluster(ClusterVerb::FeatureLevel { target, raise: true, json }) => {
            let done = target.ask(&RaiseFeatureLevel {}, QUICK).await?;
            if json {
                print_json(&done)?;
            } else {
                print(|out| match done.raised.len() {
                    0 => writeln!(
                        out,
                        "there is nothing to raise: {} is the highest level that all builds know",
                        done.level
                    ),
                    raised => writeln!(out, "{raised} shards have the feature level {} from now on", done.level),
                })?;
            }
        }
        AdminVerb::Cluster(ClusterVerb::FeatureLevel { target, raise: false, json }) => {
            let levels = target.ask(&GetFeatureLevels {}, QUICK).await?;
            if json {
                print_json(&levels)?;
            } else {
                print(|out| write_levels(out, &levels))?;
            }
        }
        AdminVerb::Disk(DiskVerb::List { target, json }) => {
            let status = target.ask(&GetStatus {}, QUICK).await?;
            if json {
                print_json(&status.disks)?;
            } else {
                print(|out| write_disks(out, &status.disks))?;
            }
        }
        AdminVerb::Disk(DiskVerb::Replace { id, target, uuid, address, yes }) => {
            if !yes {
                return explain_replace(&target, id, address).await;
            }
            target.ask(&ReplaceDisk { disk: id, uuid, address }, QUICK).await?;
            let next = "`granary status` shows the repair, `granary census` proves it";
            print(|out| writeln!(out, "disk {id} is replaced; {next}"))?;
        }
        AdminVerb::Disk(DiskVerb::Drain { id, target }) => {
            let changed = target.ask(&DrainDisk { disk: id }, QUICK).await?;
            print(|out| match changed.done {
                DiskAct::Out => writeln!(out, "disk {id} was empty and is out of service; its node can be stopped"),
                _ => writeln!(
                    out,
                    "disk {id} is draining; {} slots and {} shard replicas move to other disks, see `granary status`",
                    changed.slots_moving, changed.replicas_moving
                ),
            })?;
        }
        AdminVerb::Disk(DiskVerb::Out { id, target }) => {
            let changed = target.ask(&OutDisk { disk: id }, QUICK).await?;
            let (slots, replicas) = (changed.slots_moving, changed.replicas_moving);
            print(|out| {
                writeln!(
                    out,
                    "disk {id} is out of service; {slots} slots and {replicas} shard replicas are taken over by other \
                     disks, see `granary status`"
                )
            })?;
        }
        AdminVerb::Disk(DiskVerb::Weight { id, weight, target }) => {
            let changed = target.ask(&WeighDisk { disk: id, weight }, QUICK).await?;
            let (slots, replicas) = (changed.slots_moving, changed.replicas_moving);
            print(|out| {
                writeln!(
                    out,
                    "disk {id} has the weight {weight}; {slots} slots and {replicas} shard replicas are moving"
                )
            })?;
        }
        AdminVerb::Disk(DiskVerb::Start { id, target }) => {
            target.ask(&StartDisk { disk: id }, QUICK).await?;
            print(|out| writeln!(out, "disk {id}: start done"))?;
        }
        AdminVerb::Lost(args) => return super::lost::run(args).await,
        AdminVerb::Heal(args) => return super::heal::run(args).await,
        AdminVerb::Shard(args) => return super::shard::run(args).await,
        AdminVerb::Config(args) => return super::config::run(args).await,
        AdminVerb::Disk(DiskVerb::Stop { id, target }) => {
            target.ask(&StopDisk { disk: id }, QUICK).await?;
            print(|out| writeln!(out, "disk {id}: stop done"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Which cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Directory of a `granary dev` cluster.
    #[arg(long, conflicts_with_all = ["admin", "token_file"])]
    dir: Option<PathBuf>,
    /// HOST:PORT of a gateway's admin API.
    #[arg(long, requires = "token_file", value_parser = without_scheme)]
    admin: Option<String>,
    /// File of its admin token.
    #[arg(long, requires = "admin")]
    token_file: Option<PathBuf>,
}

fn without_scheme(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    if address.contains('/') || !address.contains(':') {
        return Err("must be HOST:PORT".to_owned());
    }
    Ok(address.to_owned())
}

impl Target {
    /// Was a cluster named?
    pub(super) fn is_named(&self) -> bool {
        self.dir.is_some() || self.admin.is_some()
    }

    pub(super) async fn ask<C: Call>(&self, request: &C, limit: Duration) -> Result<C::Answer, Box<dyn Error>> {
        let (address, token_file) = match (&self.dir, &self.admin, &self.token_file) {
            (Some(dir), _, _) => {
                let path = dir.join("cluster.json");
                if !path.exists() {
                    let why = "no cluster.json there: has `granary dev` been started on it?";
                    return Err(SettingsError::invalid(format!("--dir {}", dir.display()), why).into());
                }
                let cluster: ClusterJson = read_json(&path)?;
                (cluster.admin, cluster.admin_token_file)
            }
            (None, Some(address), Some(file)) => (address.clone(), file.clone()),
            _ => return Err(SettingsError::invalid("--dir, --admin", "name one: the directory, or the address").into()),
        };
        let token = read_token(&token_file)?;
        Ok(call(&address, token.reveal(), request, limit).await?)
    }
}

fn write_status(out: &mut dyn Write, status: &Status) -> io::Result<()> {
    let cluster = status.cluster_id.map_or_else(|| "-".to_owned(), |id| id.to_string());
    writeln!(out, "cluster {cluster}  epoch {}  scheme {}", status.epoch, status.default_scheme)?;
    write_disks(out, &status.disks)?;
    for disk in status.disks.iter().filter(|disk| disk.health != Health::Up) {
        writeln!(out, "disk {} is {}: {}", disk.disk, disk.health, disk.last_error.as_deref().unwrap_or("-"))?;
    }
    for line in healing::lines(status) {
        writeln!(out, "{line}")?;
    }
    let led = status.shards.iter().filter(|shard| shard.leader.is_some()).count();
    writeln!(out, "shards with a leader: {led} of {}", status.shards.len())?;
    let more = if status.repair_queue.more { " or more" } else { "" };
    if let Some(at) = &status.heals_at {
        writeln!(out, "healing is done by the gateway at {at}")?;
    }
    writeln!(out, "chunks waiting for repair: {}{more}", status.repair_queue.count)
}

fn write_disks(out: &mut dyn Write, disks: &[DiskRow]) -> io::Result<()> {
    writeln!(
        out,
        "{:>5}  {:8} {:9} {:22} {:>6} {:>10} {:>10} {:>10}  roles",
        "disk", "health", "state", "address", "weight", "chunks", "stored", "free"
    )?;
    let size = |bytes_or_none: Option<u64>| bytes_or_none.map_or_else(|| "-".to_owned(), bytes);
    for disk in disks {
        writeln!(
            out,
            "{:>5}  {:8} {:9} {:22} {:>6} {:>10} {:>10} {:>10}  {}",
            disk.disk.0,
            disk.health,
            format!("{:?}", disk.state).to_ascii_lowercase(),
            disk.address,
            disk.weight,
            disk.chunks.map_or_else(|| "-".to_owned(), |chunks| chunks.to_string()),
            size(disk.chunk_bytes),
            size(disk.free_bytes),
            disk.roles.iter().map(|role| role.name()).collect::<Vec<_>>().join(",")
        )?;
    }
    Ok(())
}

fn write_levels(out: &mut dyn Write, levels: &FeatureLevels) -> io::Result<()> {
    let text = |level: Option<u32>| level.map_or_else(|| "no answer".to_owned(), |level| level.to_string());
    writeln!(out, "{:>9}  feature level", "shard")?;
    for ShardLevelRow { shard, level } in &levels.shards {
        writeln!(out, "{:>9}  {}", shard.0, text(*level))?;
    }
    writeln!(out, "{:>9}  highest level that its build knows", "disk node")?;
    for (disk, knows) in &levels.disks {
        writeln!(out, "{:>9}  {knows}", disk.0)?;
    }
    writeln!(out, "{:>9}  {}", "gateway", levels.gateway)?;
    match (levels.can_raise_to, &levels.blocked) {
        (_, Some(why)) => writeln!(out, "no shard can be raised now: {why}"),
        (Some(level), _) => writeln!(out, "shards can be raised to {level}: `granary cluster feature-level --raise`"),
        (None, None) => writeln!(out, "there is nothing to raise"),
    }
}

fn write_census(out: &mut dyn Write, census: &Census) -> io::Result<()> {
    for (count, what) in [
        (census.extents, "extents"),
        (census.bytes, "bytes"),
        (census.chunks_expected, "chunks expected"),
        (census.good, "good"),
        (census.good_on_previous, "of these not on their new disk yet"),
        (census.missing, "missing"),
        (census.corrupt, "corrupt"),
        (census.unreachable, "unreachable"),
        (census.queued_for_repair, "queued for repair"),
        (census.orphans, "chunks that no object owns"),
        (census.orphans_quarantined, "of these in quarantine"),
        (census.extents_lost, "extents lost"),
        (census.extents_lost_unless_disks_return, "extents lost unless disks return"),
    ] {
        writeln!(out, "{count:>14}  {what}")?;
    }
    Ok(())
}

async fn explain_replace(target: &Target, id: DiskId, address: Option<String>) -> Done {
    let map = target.ask(&GetMap {}, QUICK).await?;
    let Some(disk) = map.disk(id) else {
        return Err(SettingsError::invalid("ID", format!("there is no disk {id} in the cluster map")).into());
    };
    print(|out| {
        writeln!(
            out,
            "Disk {id} would leave the cluster for good, and a new disk would take its place. What it holds is rebuilt from the\n\
             other disks; until that is done the cluster stands one more failure less."
        )?;
        if target.dir.is_some() {
            return writeln!(out, "Repeat with --yes to do it.");
        }
        writeln!(
            out,
            "First, where the new disk is:\n  \
             granary-disk-node format --dir DIR --cluster {} --disk {}\n  \
             granary-disk-node serve --dir DIR --listen {} --secret-file FILE\n\
             Then repeat this command with --uuid and the UUID that `format` printed, and --yes.",
            map.cluster_id,
            map.next_disk_id,
            address.as_ref().unwrap_or(&disk.address),
        )
    })?;
    Ok(ExitCode::FAILURE)
}
