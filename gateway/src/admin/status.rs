//! What is known of the cluster, collected for everybody who asks: the API, the page, readiness and metrics. While
//! nobody asks nothing is collected: the queries wake shards that sleep.

use super::api::{BucketRow, Count, DiskRow, Health, ReplicaRow, Role, ShardRow, Status, UsageRow};
use crate::background::heal::{HealStatus, Healer, HEAL_TASK};
use crate::disks::Disks;
use crate::metrics::Metrics;
use crate::shards::{jitter, now_ms, Shards};
use futures::stream::{self, StreamExt};
use granary_meta::record::Usage;
use granary_meta::{Answer, Query};
use granary_placement::id::{DiskId, Epoch, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_wire::control::{ControlRequest, ControlResponse, ShardStatus};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{watch, Notify};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A status is good for this long.
const INTERVAL: Duration = Duration::from_secs(1);
/// So long somebody who asks waits for a new one; probes give up after a second.
const PATIENCE: Duration = Duration::from_millis(800);
/// So long somebody who asks waits for a status of the newest map.
const MAP_PATIENCE: Duration = Duration::from_secs(4);
const ASK: Duration = Duration::from_secs(2);
const AT_ONCE: usize = 32;
/// Queues and usage take a query per shard, so they are looked at less often.
const SLOW_INTERVAL: Duration = Duration::from_secs(5);
/// Buckets whose usage is shown.
const MAX_BUCKETS: u32 = 50;
/// Queue entries counted per shard; more are shown as "more".
const QUEUE_PAGE: u32 = 1000;

impl From<Usage> for UsageRow {
    fn from(usage: Usage) -> UsageRow {
        UsageRow { objects: usage.objects, bytes: usage.bytes + usage.upload_bytes, uploads: usage.uploads }
    }
}

/// The newest status, as it was when it came.
type Dated = Option<(Instant, Arc<Status>)>;

/// The newest status, for who asks. Cheap to clone.
#[derive(Clone)]
pub struct Newest {
    seen: watch::Receiver<Dated>,
    wanted: Arc<Notify>,
}

/// Where [`collect`] puts what it found.
pub struct Collector {
    found: watch::Sender<Dated>,
    wanted: Arc<Notify>,
}

/// Nothing is known at first.
pub fn newest() -> (Newest, Collector) {
    let (found, seen) = watch::channel(None);
    let wanted = Arc::new(Notify::new());
    (Newest { seen, wanted: wanted.clone() }, Collector { found, wanted })
}

impl Newest {
    /// A status of about this moment, or the last one when it cannot be collected quickly; `Status::default()` before
    /// there was one.
    pub async fn get(&self) -> Arc<Status> {
        let mut seen = self.seen.clone();
        if let Some((at, status)) = &*seen.borrow_and_update() {
            if at.elapsed() < INTERVAL {
                return status.clone();
            }
        }
        self.wanted.notify_one();
        // Nobody collects in a gateway that stops: then the channel is closed, and this ends at once.
        let _ = tokio::time::timeout(PATIENCE, seen.changed()).await;
        let newest = seen.borrow().as_ref().map(|(_, status)| status.clone());
        newest.unwrap_or_default()
    }

    /// As [`Newest::get`], and waits a little longer for one of at least this epoch: whoever changed the map wants to
    /// see the change.
    pub async fn at_least(&self, epoch: Epoch) -> Arc<Status> {
        let newest = self.get().await;
        if newest.epoch >= epoch {
            return newest;
        }
        let mut seen = self.seen.clone();
        let newer = async {
            loop {
                self.wanted.notify_one();
                if seen.changed().await.is_err() {
                    return None;
                }
                let found = seen.borrow_and_update().as_ref().map(|(_, status)| status.clone());
                if let Some(found) = found.filter(|found| found.epoch >= epoch) {
                    return Some(found);
                }
            }
        };
        tokio::time::timeout(MAP_PATIENCE, newer).await.ok().flatten().unwrap_or(newest)
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

/// Collects whenever somebody wants to know, once a second at most, until `stop`.
pub async fn collect(sources: Sources, collector: Collector, stop: CancellationToken) {
    let shards = &sources.shards;
    let mut slow_at = Instant::now();
    let mut slow = Slow::default();
    loop {
        tokio::select! {
            () = collector.wanted.notified() => {}
            () = stop.cancelled() => return,
        }
        if let Some(map) = shards.current_map() {
            let work = async {
                if *shards.confirmed().borrow() && Instant::now() >= slow_at {
                    slow = Slow::collect(shards).await;
                    slow_at = Instant::now() + SLOW_INTERVAL;
                }
                quick(shards, &sources.disks, &map).await
            };
            let mut found = tokio::select! {
                found = work => found,
                () = stop.cancelled() => return,
            };
            found.heals_at = slow.heals_at.clone();
            found.repair_queue = slow.repair_queue;
            found.buckets = slow.buckets.clone();
            found.more_buckets = slow.more_buckets;
            // The gateway that heals knows more than it has published.
            let healer = sources.healer.get();
            let own = healer.filter(|healer| healer.heals() || slow.heal.is_none()).map(Healer::status);
            found.heal = own.or_else(|| slow.heal.clone());
            set_gauges(&sources.metrics, &found);
            collector.found.send_replace(Some((Instant::now(), Arc::new(found))));
        }
        tokio::select! {
            () = tokio::time::sleep(jitter(INTERVAL)) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn quick(shards: &Shards, disks: &Disks, map: &ClusterMap) -> Status {
    let views: BTreeMap<DiskId, _> = disks.view().into_iter().map(|view| (view.id, view)).collect();
    let serving = || map.disks.values().filter(|disk| disk.state != DiskState::Out);
    let slots = || map.groups.values().flat_map(|group| &group.slots);
    let rows = serving().map(|disk| {
        let view = views.get(&disk.id);
        let status = view.and_then(|view| view.status.as_ref());
        DiskRow {
            disk: disk.id,
            uuid: disk.uuid,
            address: view.map_or_else(|| disk.address.clone(), |view| view.address.clone()),
            location: format!("{}/{}/{}", disk.location.zone, disk.location.rack, disk.location.server),
            state: disk.state,
            weight: disk.weight,
            slots: slots().filter(|slot| slot.current == disk.id).count(),
            slots_leaving: slots().filter(|slot| slot.previous == Some(disk.id)).count(),
            roles: [(Role::Storage, disk.roles.storage), (Role::Metadata, disk.roles.metadata)]
                .into_iter()
                .filter_map(|(role, has)| has.then_some(role))
                .collect(),
            health: disks.health(disk.id).into(),
            capacity_bytes: status.map(|status| status.capacity_bytes),
            free_bytes: status.map(|status| status.free_bytes),
            chunks: status.map(|status| status.chunks),
            chunk_bytes: status.map(|status| status.chunk_bytes),
            epoch: status.map(|status| status.epoch),
            last_error: view.and_then(|view| view.last_error.clone()),
        }
    });
    let up = |disk: &DiskId| Health::from(disks.health(*disk)) == Health::Up;
    let mut groups_by_disks_up: BTreeMap<usize, usize> = BTreeMap::new();
    for group in map.groups.values().filter(|group| group.scheme == map.default_scheme) {
        *groups_by_disks_up.entry(group.slots.iter().filter(|slot| up(&slot.current)).count()).or_default() += 1;
    }
    let mut groups_by_failures_left: BTreeMap<i32, usize> = BTreeMap::new();
    for group in map.groups.values() {
        let answers = |disk: DiskId| Health::from(disks.health(disk)) != Health::Down;
        // While a slot moves, its chunks are where they come from.
        let lacking = group.slots.iter().filter(|slot| !answers(slot.previous.unwrap_or(slot.current))).count();
        let m = map.schemes.get(&group.scheme).map_or(0, |scheme| i32::from(scheme.m));
        let left = m - i32::try_from(lacking).unwrap_or(i32::MAX);
        *groups_by_failures_left.entry(left).or_default() += 1;
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
    Status {
        collected_ms: now_ms(),
        cluster_id: Some(map.cluster_id),
        epoch: map.epoch,
        default_scheme: map.default_scheme.clone(),
        groups: map.groups.len(),
        groups_by_disks_up,
        groups_by_failures_left,
        disks: rows.collect(),
        shards: shard_rows(map, &replicas),
        ..Status::default()
    }
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
            shard: ShardId(number),
            members: members.members.clone(),
            leader: leader.map(|(disk, _)| *disk),
            term: leader.map(|(_, replica)| replica.term),
            voters: leader.map(|(_, replica)| replica.voters.clone()).unwrap_or_default(),
            replicas: replicas
                .iter()
                .map(|(disk, replica)| ReplicaRow {
                    disk: *disk,
                    state: replica.state.clone(),
                    applied_index: replica.applied_index,
                    last_log_index: replica.last_log_index,
                })
                .collect(),
        }
    };
    (0u16..).zip(&map.shards).map(row).collect()
}

/// What takes a query per shard.
#[derive(Default)]
struct Slow {
    /// What the gateway that heals has published with its lease.
    heal: Option<HealStatus>,
    heals_at: Option<String>,
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
        let leases = tokio::time::timeout(ASK, shards.query(ShardId::ROOT, Query::ListLeases)).await;
        let heal = match leases {
            Ok(Ok(Answer::Leases(leases))) => leases.into_iter().find(|lease| lease.task == HEAL_TASK),
            _ => None,
        };
        let heals_at = heal.as_ref().filter(|lease| lease.holder.is_some()).map(|lease| lease.address.clone());
        let heal = heal.and_then(|lease| serde_json::from_slice(&lease.progress).ok());
        let listed = tokio::time::timeout(ASK, shards.list_buckets(None, "", "", MAX_BUCKETS)).await;
        let Ok(Ok(page)) = listed else { return Slow { heal, heals_at, repair_queue, ..Slow::default() } };
        let rows = stream::iter(page.buckets).map(|bucket| async move {
            let usage = tokio::time::timeout(ASK, shards.bucket_usage(bucket.id)).await;
            BucketRow { name: bucket.name, usage: usage.ok().and_then(Result::ok).map(UsageRow::from) }
        });
        Slow { heal, heals_at, repair_queue, buckets: rows.buffered(4).collect().await, more_buckets: page.more }
    }
}

fn set_gauges(metrics: &Metrics, status: &Status) {
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
    for row in &status.disks {
        let disk = row.disk.to_string();
        for state in Health::ALL {
            metrics.disk_state.with_label_values(&[&disk, state.name()]).set(i64::from(row.health == state));
        }
        set(&metrics.disk_free_bytes, &disk, row.free_bytes);
        set(&metrics.disk_capacity_bytes, &disk, row.capacity_bytes);
        set(&metrics.disk_chunks, &disk, row.chunks);
    }
    for row in &status.shards {
        let shard = row.shard.to_string();
        metrics.shard_leader_known.with_label_values(&[&shard]).set(i64::from(row.leader.is_some()));
        metrics
            .shard_voters
            .with_label_values(&[&shard])
            .set(i64::try_from(row.voters_answering()).unwrap_or(i64::MAX));
    }
    metrics.repair_queue.set(i64::try_from(status.repair_queue.count).unwrap_or(i64::MAX));
    let moving: usize = status.disks.iter().map(|row| row.slots_leaving).sum::<usize>();
    metrics.slots_moving.set(i64::try_from(moving).unwrap_or(i64::MAX));
    let away = status.disks.iter().filter(|row| row.state == DiskState::Away).count();
    metrics.disks_away.set(i64::try_from(away).unwrap_or(i64::MAX));
    let stay = status.heal.iter().flat_map(|heal| &heal.dead_disks).filter(|dead| dead.stays.is_some()).count();
    metrics.disks_dead_in_service.set(i64::try_from(stay).unwrap_or(i64::MAX));
    let paused_until_ms = status.heal.as_ref().map_or(0, |heal| heal.paused_until_ms);
    metrics.heal_paused_until.set(i64::try_from(paused_until_ms.div_ceil(1000)).unwrap_or(i64::MAX));
    match status.groups_by_failures_left.keys().next() {
        Some(least) => metrics.least_failures_left.with_label_values::<&str>(&[]).set(i64::from(*least)),
        None => metrics.least_failures_left.reset(),
    }
    metrics.map_epoch.set(i64::try_from(status.epoch.0).unwrap_or(i64::MAX));
}

/// The shards that have no leader.
pub fn leaderless(status: &Status) -> Vec<ShardId> {
    status.shards.iter().filter(|row| row.leader.is_none()).map(|row| row.shard).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn how_much_more_may_fail_is_told_only_when_it_is_known() {
        let metrics = Metrics::new().unwrap();
        let told = || {
            let text = String::from_utf8(metrics.text().unwrap()).unwrap();
            text.lines().find_map(|line| Some(line.strip_prefix("granary_least_failures_left ")?.to_owned()))
        };
        assert_eq!(told(), None, "nothing was collected yet");
        for (groups, value) in [(&[][..], None), (&[(0, 3), (2, 9)], Some("0")), (&[(-1, 1)], Some("-1")), (&[], None)]
        {
            let groups_by_failures_left = groups.iter().copied().collect();
            set_gauges(&metrics, &Status { groups_by_failures_left, ..Status::default() });
            assert_eq!(told().as_deref(), value, "{groups:?}");
        }
    }

    #[tokio::test]
    async fn a_status_is_collected_when_somebody_asks_and_serves_all_who_ask_within_a_second() {
        let (newest, collector) = newest();
        let found = |epoch: u64| {
            let status = Status { epoch: Epoch(epoch), ..Status::default() };
            Some((Instant::now(), Arc::new(status)))
        };
        assert_eq!(newest.get().await.epoch.0, 0, "nobody collects");
        collector.wanted.notified().await;
        let many = (0..9).map(|_| newest.get());
        let collecting = async {
            collector.wanted.notified().await;
            collector.found.send_replace(found(7));
        };
        let (got, ()) = tokio::join!(futures::future::join_all(many), collecting);
        assert!(got.iter().all(|status| status.epoch.0 == 7));
        tokio::time::sleep(INTERVAL / 4).await;
        assert_eq!(newest.get().await.epoch.0, 7);
        tokio::time::sleep(INTERVAL).await;
        let (late, ()) = tokio::join!(newest.get(), async {
            collector.wanted.notified().await;
            tokio::time::sleep(INTERVAL).await;
            collector.found.send_replace(found(8));
        });
        assert_eq!(late.epoch.0, 7, "what cannot be collected quickly is not waited for");
        assert_eq!(newest.get().await.epoch.0, 8);
        // The map has changed: an old status will not do, and one more of the old map neither.
        let (newer, ()) = tokio::join!(newest.at_least(Epoch(9)), async {
            collector.wanted.notified().await;
            collector.found.send_replace(found(8));
            collector.wanted.notified().await;
            collector.found.send_replace(found(9));
        });
        assert_eq!(newer.epoch.0, 9);
    }
}
