//! What is known of the cluster, collected once for everybody who asks: the API, the page, readiness and metrics.

use crate::disks::Disks;
use crate::heal::{HealStatus, Healer};
use crate::metrics::Metrics;
use crate::shards::{jitter, now_ms, Shards};
use futures::stream::{self, StreamExt};
use granary_meta::record::Usage;
use granary_meta::{Answer, Query};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::control::{ControlRequest, ControlResponse, ShardStatus};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const INTERVAL: Duration = Duration::from_secs(1);
const ASK: Duration = Duration::from_secs(2);
const AT_ONCE: usize = 32;
/// Queues and usage take a query per shard, so they are looked at less often.
const SLOW_INTERVAL: Duration = Duration::from_secs(5);
/// Buckets whose usage is shown.
const MAX_BUCKETS: u32 = 50;
/// Queue entries counted per shard; more are shown as "more".
const QUEUE_PAGE: u32 = 1000;

/// The cluster as this gateway sees it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Snapshot {
    /// When it was collected, Unix milliseconds; 0 for never.
    pub collected_ms: u64,
    /// Which cluster.
    pub cluster_id: String,
    /// Epoch of the map in use.
    pub epoch: u64,
    /// Scheme of uploads that name no storage class.
    pub default_scheme: String,
    /// Placement groups.
    pub groups: usize,
    /// Groups of the default scheme by how many of their disks are up.
    pub groups_by_disks_up: BTreeMap<usize, usize>,
    /// Disks in service.
    pub disks: Vec<DiskRow>,
    /// Shards.
    pub shards: Vec<ShardRow>,
    /// Chunks waiting for repair.
    pub repair_queue: Count,
    /// How healing stands; None before it begins.
    pub heal: Option<HealStatus>,
    /// Buckets, the first by name.
    pub buckets: Vec<BucketRow>,
    /// There are more buckets than shown.
    pub more_buckets: bool,
}

/// How many; `more` when counting stopped there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Counted.
    pub count: u64,
    /// There are more.
    pub more: bool,
    /// Some shards did not answer.
    pub partial: bool,
}

/// A disk.
#[derive(Debug, Clone, Serialize)]
pub struct DiskRow {
    /// Its number.
    pub disk: u32,
    /// On its label.
    pub uuid: String,
    /// Where its node is called.
    pub address: String,
    /// zone/rack/server.
    pub location: String,
    /// in or draining.
    pub state: DiskState,
    /// storage, metadata.
    pub roles: Vec<&'static str>,
    /// up, suspect or down.
    pub health: String,
    /// Size of its file system, in bytes.
    pub capacity_bytes: Option<u64>,
    /// Free for chunks, in bytes.
    pub free_bytes: Option<u64>,
    /// Chunks on it.
    pub chunks: Option<u64>,
    /// Payload of them, in bytes.
    pub chunk_bytes: Option<u64>,
    /// Epoch of the map it knows.
    pub epoch: Option<u64>,
    /// The last error seen.
    pub last_error: Option<String>,
}

/// A shard.
#[derive(Debug, Clone, Serialize)]
pub struct ShardRow {
    /// Its number; 0 is the root shard.
    pub shard: u16,
    /// Members by the map.
    pub members: Vec<u32>,
    /// Who says to lead it.
    pub leader: Option<u32>,
    /// Term of that.
    pub term: Option<u64>,
    /// Voters by the leader's word.
    pub voters: Vec<u32>,
    /// Replicas that answered: disk, state, last applied index.
    pub replicas: Vec<ReplicaRow>,
}

/// A replica of a shard.
#[derive(Debug, Clone, Serialize)]
pub struct ReplicaRow {
    /// On which disk.
    pub disk: u32,
    /// leader, follower, ...
    pub state: String,
    /// Last applied index.
    pub applied_index: u64,
}

/// A bucket.
#[derive(Debug, Clone, Serialize)]
pub struct BucketRow {
    /// Name.
    pub name: String,
    /// What lies in it; None when a shard did not answer.
    pub usage: Option<UsageRow>,
}

/// Usage of a bucket.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct UsageRow {
    /// Current objects.
    pub objects: u64,
    /// Payload, uploads in progress included, in bytes.
    pub bytes: u64,
    /// Uploads in progress.
    pub uploads: u64,
}

impl From<Usage> for UsageRow {
    fn from(usage: Usage) -> UsageRow {
        UsageRow { objects: usage.objects, bytes: usage.bytes + usage.upload_bytes, uploads: usage.uploads }
    }
}

/// Where it is collected from.
pub struct Sources {
    /// The shards.
    pub shards: Shards,
    /// The disks.
    pub disks: Disks,
    /// The healer, once it has begun.
    pub healer: Arc<OnceLock<Healer>>,
    /// Where gauges are set.
    pub metrics: Metrics,
}

/// Collects each second until `stop`; the receivers see each new snapshot.
pub async fn collect(sources: Sources, out: watch::Sender<Arc<Snapshot>>, stop: CancellationToken) {
    let shards = &sources.shards;
    let mut slow_at = Instant::now();
    let mut slow = Slow::default();
    loop {
        if let Some(map) = shards.current_map() {
            let work = async {
                if *shards.confirmed().borrow() && Instant::now() >= slow_at {
                    slow = Slow::collect(shards).await;
                    slow_at = Instant::now() + SLOW_INTERVAL;
                }
                quick(shards, &sources.disks, &map).await
            };
            let mut snapshot = tokio::select! {
                snapshot = work => snapshot,
                () = stop.cancelled() => return,
            };
            snapshot.repair_queue = slow.repair_queue;
            snapshot.buckets = slow.buckets.clone();
            snapshot.more_buckets = slow.more_buckets;
            snapshot.heal = sources.healer.get().map(Healer::status);
            gauge(&sources.metrics, &snapshot);
            out.send_replace(Arc::new(snapshot));
        }
        tokio::select! {
            () = tokio::time::sleep(jitter(INTERVAL)) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn quick(shards: &Shards, disks: &Disks, map: &ClusterMap) -> Snapshot {
    let views: BTreeMap<DiskId, _> = disks.view().into_iter().map(|view| (view.id, view)).collect();
    let serving = || map.disks.values().filter(|disk| disk.state != DiskState::Out);
    let rows = serving().map(|disk| {
        let view = views.get(&disk.id);
        let status = view.and_then(|view| view.status.as_ref());
        DiskRow {
            disk: disk.id.0,
            uuid: disk.uuid.to_string(),
            address: view.map_or_else(|| disk.address.clone(), |view| view.address.clone()),
            location: format!("{}/{}/{}", disk.location.zone, disk.location.rack, disk.location.server),
            state: disk.state,
            roles: [("storage", disk.roles.storage), ("metadata", disk.roles.metadata)]
                .into_iter()
                .filter_map(|(name, has)| has.then_some(name))
                .collect(),
            health: health_name(disks, disk.id),
            capacity_bytes: status.map(|status| status.capacity_bytes),
            free_bytes: status.map(|status| status.free_bytes),
            chunks: status.map(|status| status.chunks),
            chunk_bytes: status.map(|status| status.chunk_bytes),
            epoch: status.map(|status| status.epoch.0),
            last_error: view.and_then(|view| view.last_error.clone()),
        }
    });
    let up = |disk: &DiskId| health_name(disks, *disk) == "up";
    let mut groups_by_disks_up: BTreeMap<usize, usize> = BTreeMap::new();
    for group in map.groups.values().filter(|group| group.scheme == map.default_scheme) {
        *groups_by_disks_up.entry(group.slots.iter().filter(|slot| up(&slot.current)).count()).or_default() += 1;
    }
    let metadata: Vec<DiskId> = serving().filter(|disk| disk.roles.metadata).map(|disk| disk.id).collect();
    let replicas: Vec<(DiskId, Vec<ShardStatus>)> = stream::iter(metadata)
        .map(|disk| async move {
            match shards.ask_disk(disk, ControlRequest::ShardStatus, ASK).await {
                Ok(ControlResponse::Shards(replicas)) => (disk, replicas),
                _ => (disk, Vec::new()),
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    Snapshot {
        collected_ms: now_ms(),
        cluster_id: map.cluster_id.to_string(),
        epoch: map.epoch.0,
        default_scheme: map.default_scheme.clone(),
        groups: map.groups.len(),
        groups_by_disks_up,
        disks: rows.collect(),
        shards: shard_rows(map, &replicas),
        ..Snapshot::default()
    }
}

fn health_name(disks: &Disks, disk: DiskId) -> String {
    format!("{:?}", disks.health(disk)).to_ascii_lowercase()
}

fn shard_rows(map: &ClusterMap, answers: &[(DiskId, Vec<ShardStatus>)]) -> Vec<ShardRow> {
    let row = |(number, members): (u16, &granary_placement::map::ShardReplicas)| {
        let mut replicas: Vec<(DiskId, &ShardStatus)> = answers
            .iter()
            .flat_map(|(disk, replicas)| replicas.iter().map(|replica| (*disk, replica)))
            .filter(|(_, replica)| replica.shard.0 == number)
            .collect();
        replicas.sort_by_key(|(disk, _)| *disk);
        // A leader that was cut off may still call itself one; the higher term is right.
        let leader =
            replicas.iter().filter(|(_, replica)| replica.state == "leader").max_by_key(|(_, replica)| replica.term);
        ShardRow {
            shard: number,
            members: members.members.iter().map(|disk| disk.0).collect(),
            leader: leader.map(|(disk, _)| disk.0),
            term: leader.map(|(_, replica)| replica.term),
            voters: leader.map(|(_, replica)| replica.voters.iter().map(|disk| disk.0).collect()).unwrap_or_default(),
            replicas: replicas
                .iter()
                .map(|(disk, replica)| ReplicaRow {
                    disk: disk.0,
                    state: replica.state.clone(),
                    applied_index: replica.applied_index,
                })
                .collect(),
        }
    };
    (0u16..).zip(&map.shards).map(row).collect()
}

/// What takes a query per shard.
#[derive(Default)]
struct Slow {
    repair_queue: Count,
    buckets: Vec<BucketRow>,
    more_buckets: bool,
}

impl Slow {
    async fn collect(shards: &Shards) -> Slow {
        let pages = shards.object_shards().into_iter().map(|shard| async move {
            tokio::time::timeout(ASK, shards.query(shard, Query::ListMissing { after: None, limit: QUEUE_PAGE })).await
        });
        let mut repair_queue = Count::default();
        for page in futures::future::join_all(pages).await {
            match page {
                Ok(Ok(Answer::Missing { chunks, more })) => {
                    repair_queue.count += chunks.len() as u64;
                    repair_queue.more |= more;
                }
                _ => repair_queue.partial = true,
            }
        }
        let listed = tokio::time::timeout(ASK, shards.list_buckets("", MAX_BUCKETS)).await;
        let Ok(Ok(page)) = listed else { return Slow { repair_queue, ..Slow::default() } };
        let rows = stream::iter(page.buckets).map(|bucket| async move {
            let usage = tokio::time::timeout(ASK, shards.bucket_usage(bucket.id)).await;
            BucketRow { name: bucket.name, usage: usage.ok().and_then(Result::ok).map(UsageRow::from) }
        });
        Slow { repair_queue, buckets: rows.buffered(4).collect().await, more_buckets: page.more }
    }
}

fn gauge(metrics: &Metrics, snapshot: &Snapshot) {
    // Disks that left the map must not stay behind in the metrics.
    metrics.disk_state.reset();
    metrics.disk_free_bytes.reset();
    metrics.disk_capacity_bytes.reset();
    metrics.disk_chunks.reset();
    let set = |gauge: &prometheus::IntGaugeVec, disk: &str, value: Option<u64>| {
        if let Some(value) = value {
            gauge.with_label_values(&[disk]).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    };
    for row in &snapshot.disks {
        let disk = row.disk.to_string();
        for state in ["up", "suspect", "down"] {
            metrics.disk_state.with_label_values(&[disk.as_str(), state]).set(i64::from(row.health == state));
        }
        set(&metrics.disk_free_bytes, &disk, row.free_bytes);
        set(&metrics.disk_capacity_bytes, &disk, row.capacity_bytes);
        set(&metrics.disk_chunks, &disk, row.chunks);
    }
    for row in &snapshot.shards {
        let shard = row.shard.to_string();
        metrics.shard_leader_known.with_label_values(&[&shard]).set(i64::from(row.leader.is_some()));
        let answering = row.replicas.iter().filter(|replica| row.voters.contains(&replica.disk)).count();
        metrics.shard_voters.with_label_values(&[&shard]).set(i64::try_from(answering).unwrap_or(i64::MAX));
    }
    metrics.repair_queue.set(i64::try_from(snapshot.repair_queue.count).unwrap_or(i64::MAX));
    metrics.map_epoch.set(i64::try_from(snapshot.epoch).unwrap_or(i64::MAX));
}

/// The shards of a snapshot that have no leader.
pub fn leaderless(snapshot: &Snapshot) -> Vec<ShardId> {
    snapshot.shards.iter().filter(|row| row.leader.is_none()).map(|row| ShardId(row.shard)).collect()
}
