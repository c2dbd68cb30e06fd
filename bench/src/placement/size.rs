//! One cluster: laid out, a disk lost, a server lost, and the durability model asked.

use super::Args;
use granary_placement::durability::{
    assumptions, report, Cause, Causes, Cluster, Failures, Groups, Latent, Loss, Metadata, Rebuild, Repair,
};
use granary_placement::extent::MAX_EXTENT_BYTES;
use granary_placement::id::{ClusterId, DiskId, DiskUuid};
use granary_placement::map::{ClusterMap, DiskState, Location, Roles};
use granary_placement::place::{default_replicas, new_map, substitute, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, KPlusM, Scheme};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::time::Instant;

const SCHEME: &str = "standard";
const SERVERS_PER_RACK: u32 = 25;
const OBJECT_SHARDS: u16 = 16;
/// Copying a shard to a new voter, and an operator who brings a shard back from one voter, in hours.
const COPY_SHARD_HOURS: f64 = 1.0;
const OPERATOR_HOURS: f64 = 24.0;

/// A cluster to be measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub disks: u32,
    pub disks_per_server: u32,
    pub scheme: KPlusM,
}

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Size {
    pub disks: u32,
    pub servers: u64,
    pub scheme: String,
    pub groups: u64,
    pub layout_seconds: f64,
    pub share: Share,
    pub disk_pairs: u64,
    pub all_pairs: u64,
    pub chunks_per_server: usize,
    pub disk_lost: Lost,
    pub server_lost: Lost,
    /// The fewest slots per disk with which one disk can be rebuilt within the target; none when no number is enough.
    pub slots_needed: Option<f64>,
    /// Share of a disk's rate that the target needs if all disks had the same to do.
    pub share_needed_percent: f64,
    pub any_object: Nines,
    pub given_object: Nines,
    pub metadata_blocked: Nines,
    pub metadata_unavailable: f64,
    pub data_unavailable: f64,
    pub assumptions: Vec<String>,
}

/// Slots per disk.
#[derive(Debug, Serialize)]
pub(super) struct Share {
    pub min: usize,
    pub mean: f64,
    pub max: usize,
    /// How far the disk that is farthest from the mean is from it.
    pub off_percent: f64,
}

/// A loss and its rebuild.
#[derive(Debug, Serialize)]
pub(super) struct Lost {
    /// Slots that must move, and those that do.
    pub must_move: usize,
    pub moved: usize,
    pub takers: usize,
    pub helpers: usize,
    /// What the busiest disk reads and writes, in slots, and an average one.
    pub busiest_slots: f64,
    pub mean_slots: f64,
    /// Hours until all is rebuilt, and if all disks had the same to do; without the grace time.
    pub hours: f64,
    pub even_hours: f64,
    pub substitutes_seconds: f64,
    #[serde(skip)]
    work: Rebuild,
}

/// A [`Loss`] with what it comes from.
#[derive(Debug, Serialize)]
pub(super) struct Nines {
    pub probability_per_year: f64,
    /// Null when nothing is ever lost.
    pub nines: f64,
    pub mttdl_years: f64,
    pub mostly_from: Option<String>,
    pub by_cause_per_year: BTreeMap<String, f64>,
}

/// Lays the cluster out and takes a disk and a server from it.
///
/// # Errors
/// A number that cannot be, or a cluster that cannot keep its scheme.
pub(super) fn measure(args: &Args, shape: Shape) -> Result<Size, Box<dyn Error>> {
    for (name, value) in
        [("--disk-tb", args.disk_tb), ("--rate-mb", args.rate_mb), ("--target-minutes", args.target_minutes)]
    {
        if !(value.is_finite() && value > 0.0) {
            return Err(format!("{name} {value}: must be above zero").into());
        }
    }
    for (name, value) in [("--fill-percent", args.fill_percent), ("--share-percent", args.share_percent)] {
        if !(value > 0.0 && value <= 100.0) {
            return Err(format!("{name} {value}: must be above 0 and at most 100").into());
        }
    }
    let (disk_bytes, rate) =
        (args.disk_tb * 1e12 * args.fill_percent / 100.0, args.rate_mb * 1e6 * args.share_percent / 100.0);
    let scheme = Scheme::new(shape.scheme.k, shape.scheme.m, FailureDomain::Server)?;
    let begun = Instant::now();
    let map = new_map(order(args, shape, scheme))?;
    let layout_seconds = begun.elapsed().as_secs_f64();
    let groups = Groups::of_map(&map, SCHEME)?;
    let layout = groups.layout()?;
    drop(groups);

    let loads = loads(&map);
    // The disk with the most slots takes longest.
    let fullest = *loads.iter().max_by_key(|(disk, load)| (**load, **disk)).ok_or("no disk holds a slot")?.0;
    let server = |disk: DiskId| map.disk(disk).map(|disk| &disk.location);
    let with_it: BTreeSet<DiskId> = loads.keys().copied().filter(|disk| server(*disk) == server(fullest)).collect();
    let disk_lost = lose(&map, &BTreeSet::from([fullest]), disk_bytes, rate)?;
    let server_lost = lose(&map, &with_it, disk_bytes, rate)?;

    let repair = Repair {
        grace_hours: args.grace_minutes / 60.0,
        disk_hours: disk_lost.hours,
        slot_hours: disk_lost.work.slot_hours(disk_bytes, rate).min(disk_lost.hours),
        server_hours: server_lost.hours.max(disk_lost.hours),
    };
    let extent_chunk = MAX_EXTENT_BYTES as f64 / f64::from(scheme.k);
    let cluster = Cluster {
        scheme,
        layout,
        failures: Failures {
            disk_afr: args.afr_percent / 100.0,
            server_losses_per_year: args.server_losses,
            server_outages_per_year: args.server_outages,
            server_return_hours: args.server_return_hours,
        },
        repair,
        latent: Latent {
            errors_per_disk_year: args.latent_errors,
            scrub_hours: args.scrub_days * 24.0,
            extents_per_group: (disk_bytes / layout.slots_per_disk() / extent_chunk).max(1.0),
        },
        metadata: Metadata {
            shards: u32::from(OBJECT_SHARDS) + 1,
            voters: u32::try_from(default_replicas(scheme.m, shape.disks as usize))?,
            disks: shape.disks,
            repair_hours: repair.grace_hours + COPY_SHARD_HOURS,
            operator_hours: OPERATOR_HOURS,
        },
    };
    let found = report(&cluster)?;
    let target_hours = args.target_minutes / 60.0;
    let possible = disk_lost.even_hours <= target_hours;
    Ok(Size {
        disks: shape.disks,
        servers: layout.servers,
        scheme: scheme.to_string(),
        groups: layout.groups,
        layout_seconds,
        share: share(&loads),
        disk_pairs: layout.pairs,
        all_pairs: layout.disks * (layout.disks - 1) / 2,
        chunks_per_server: layout.chunks_per_server,
        slots_needed: possible.then(|| Rebuild::fewest_slots(target_hours, disk_bytes, rate)),
        share_needed_percent: args.share_percent * disk_lost.even_hours / target_hours,
        disk_lost,
        server_lost,
        any_object: nines(found.any_object, Some(found.any_causes)),
        given_object: nines(found.given_object, Some(found.given_causes)),
        metadata_blocked: nines(found.metadata_blocked, None),
        metadata_unavailable: found.metadata_unavailable,
        data_unavailable: found.data_unavailable,
        assumptions: assumptions(&cluster),
    })
}

fn order(args: &Args, shape: Shape, scheme: Scheme) -> NewCluster {
    let disk = |number: u32| {
        let server = number / shape.disks_per_server;
        let mut uuid = [0; 16];
        uuid[12..].copy_from_slice(&(number + 1).to_be_bytes());
        NewDisk {
            uuid: DiskUuid(uuid),
            address: format!("disk-{number}:9100"),
            location: Location {
                zone: "zone".to_owned(),
                rack: format!("rack-{}", server / SERVERS_PER_RACK),
                server: format!("server-{server}"),
            },
            weight: 1000,
            roles: Roles { storage: true, metadata: true },
        }
    };
    NewCluster {
        cluster_id: ClusterId([1; 16]),
        disks: (0..shape.disks).map(disk).collect(),
        scheme_name: SCHEME.to_owned(),
        scheme,
        object_shards: OBJECT_SHARDS,
        replicas: None,
        groups_per_disk: args.groups_per_disk,
    }
}

/// Takes disks out as the healer does: they are away, and their slots, and no others, get substitutes.
fn lose(map: &ClusterMap, lost: &BTreeSet<DiskId>, disk_bytes: f64, rate: f64) -> Result<Lost, Box<dyn Error>> {
    let mut away = map.clone();
    for disk in lost {
        if let Some(disk) = away.disks.get_mut(disk) {
            disk.state = DiskState::Away;
        }
    }
    let begun = Instant::now();
    let after = substitute(&away, &BTreeSet::new())?;
    let substitutes_seconds = begun.elapsed().as_secs_f64();
    let work = Rebuild::between(map, &after, lost);
    let left = map.disks.len() - lost.len();
    Ok(Lost {
        must_move: work.slots,
        moved: work.slots + work.other_moves,
        takers: work.takers,
        helpers: work.helpers,
        busiest_slots: work.busiest,
        mean_slots: work.total / left as f64,
        hours: work.hours(disk_bytes, rate),
        even_hours: work.even_hours(disk_bytes, rate, left),
        substitutes_seconds,
        work,
    })
}

fn loads(map: &ClusterMap) -> BTreeMap<DiskId, usize> {
    let mut loads: BTreeMap<DiskId, usize> = map.disks.keys().map(|disk| (*disk, 0)).collect();
    for slot in map.groups.values().flat_map(|group| &group.slots) {
        *loads.entry(slot.current).or_default() += 1;
    }
    loads
}

fn share(loads: &BTreeMap<DiskId, usize>) -> Share {
    let (min, max) = (loads.values().min().copied().unwrap_or(0), loads.values().max().copied().unwrap_or(0));
    let mean = loads.values().sum::<usize>() as f64 / loads.len().max(1) as f64;
    let off = (max as f64 - mean).max(mean - min as f64);
    Share { min, mean, max, off_percent: 100.0 * off / mean }
}

fn nines(loss: Loss, causes: Option<Causes>) -> Nines {
    let by_cause = |causes: Causes| Cause::ALL.map(|cause| (cause.to_string(), causes.of(cause))).into();
    Nines {
        probability_per_year: loss.probability,
        nines: loss.nines,
        mttdl_years: loss.mttdl_years,
        mostly_from: causes.and_then(|causes| causes.dominant()).map(|cause| cause.to_string()),
        by_cause_per_year: causes.map(by_cause).unwrap_or_default(),
    }
}
