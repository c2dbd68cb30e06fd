//! What operators ask for and change: one function per request of [`api`](super::api).

use super::api::{
    ApiError, Census, Config, ConfigChanged, DiskAct, DiskChanged, ErrorCode, FeatureLevelRaised, FeatureLevels,
    HealingPaused, LostPage, ShardLevelRow, Status,
};
use super::api::{
    DrainDisk, FindLost, GetConfig, GetFeatureLevels, GetMap, GetStatus, OutDisk, PauseHealing, RaiseFeatureLevel,
    ReplaceDisk, ResumeHealing, RunCensus, SetConfig, StartDisk, StopDisk, WeighDisk,
};
use super::routes::{on, Shared};
use super::{AdminContext, LocalDisks};
use crate::background::heal::pace::LONGEST_PAUSE;
use crate::background::heal::takers;
use crate::disks::DiskHealth;
use crate::ops::away::{take_out_now, AwayError};
use crate::ops::levels;
use crate::ops::settings::{self, SetError};
use crate::ops::{self, ChangeError, CommitError, Committed, Replacement};
use crate::shards::now_ms;
use axum::Router;
use futures::future::BoxFuture;
use granary_meta::level::MAX_FEATURE_LEVEL;
use granary_placement::id::{DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::{ClusterMap, DiskState};
use granary_placement::moves::{moves, replica_moves};
use granary_placement::place::PlaceError;
use granary_placement::settings::Setting;
use granary_wire::control::{ControlRequest, ControlResponse, NodeStatus};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// How long a new disk's node may take to tell which disk it serves.
const NEW_DISK: Duration = Duration::from_secs(5);

/// Requests that change nothing.
pub(super) fn listings() -> Router<Shared> {
    let router = Router::new();
    let router = on(router, status);
    let router = on(router, map);
    let router = on(router, feature_levels);
    on(router, config)
}

/// Requests that change something and are done soon.
pub(super) fn changes() -> Router<Shared> {
    let router = Router::new();
    let router = on(router, replace_disk);
    let router = on(router, drain_disk);
    let router = on(router, out_disk);
    let router = on(router, weigh_disk);
    let router = on(router, set_config);
    let router = on(router, pause_healing);
    let router = on(router, resume_healing);
    let router = on(router, raise_feature_level);
    let router = on(router, start_disk);
    on(router, stop_disk)
}

/// Requests that may take hours.
pub(super) fn long() -> Router<Shared> {
    on(Router::new(), census)
}

/// Requests that look through everything page by page: each takes seconds, or what it takes to read chunks.
pub(super) fn walks() -> Router<Shared> {
    on(Router::new(), find_lost)
}

async fn status(context: Arc<AdminContext>, _: GetStatus) -> Result<Status, ApiError> {
    let epoch = context.shards.current_map().map_or(Epoch(0), |map| map.epoch);
    Ok(context.status.at_least(epoch).await.as_ref().clone())
}

async fn map(context: Arc<AdminContext>, _: GetMap) -> Result<ClusterMap, ApiError> {
    context.shards.current_map().map(|map| map.as_ref().clone()).ok_or_else(no_map)
}

async fn census(context: Arc<AdminContext>, _: RunCensus) -> Result<Census, ApiError> {
    let healer = context.healer.get().ok_or_else(no_map)?;
    healer.census(|_| {}).await.map_err(|error| ApiError::new(ErrorCode::Unavailable, error))
}

async fn find_lost(context: Arc<AdminContext>, call: FindLost) -> Result<LostPage, ApiError> {
    let healer = context.healer.get().ok_or_else(no_map)?;
    let bucket = match &call.bucket {
        None => None,
        Some(name) => {
            let found = context.shards.fresh_bucket(name).await;
            let found = found.map_err(|error| ApiError::new(ErrorCode::Unavailable, error))?;
            let none = || ApiError::new(ErrorCode::NotFound, "there is no bucket of that name");
            Some(found.ok_or_else(none)?)
        }
    };
    Ok(healer.lost(bucket, call.from, call.read).await)
}

/// The setting that says until when healing is paused.
const PAUSED_UNTIL: &str = "heal.paused_until";

async fn pause_healing(context: Arc<AdminContext>, call: PauseHealing) -> Result<HealingPaused, ApiError> {
    let time = Duration::from_secs(call.for_s);
    if time.is_zero() || time > LONGEST_PAUSE {
        let why = format!("a pause is from 1 to {} seconds long", LONGEST_PAUSE.as_secs());
        return Err(ApiError::new(ErrorCode::BadRequest, why));
    }
    set_pause(&context, now_ms().saturating_add(call.for_s.saturating_mul(1000))).await
}

async fn resume_healing(context: Arc<AdminContext>, _: ResumeHealing) -> Result<HealingPaused, ApiError> {
    set_pause(&context, 0).await
}

async fn set_pause(context: &AdminContext, paused_until_ms: u64) -> Result<HealingPaused, ApiError> {
    let value = (paused_until_ms > 0).then(|| paused_until_ms.to_string());
    let done = settings::set(&context.shards, PAUSED_UNTIL, value.as_deref()).await;
    done.map_err(|error| ApiError::new(ErrorCode::Unavailable, error))?;
    tracing::warn!(paused_until_ms, "admin request to pause healing, or to go on");
    Ok(HealingPaused { paused_until_ms })
}

async fn config(context: Arc<AdminContext>, _: GetConfig) -> Result<Config, ApiError> {
    // Disk nodes elsewhere have settings of their own, which nobody tells us.
    let known = |setting: &Setting| !setting.is_for_disk_nodes() || context.local.is_some();
    Ok(Config { settings: context.values.borrow().rows(known) })
}

async fn set_config(context: Arc<AdminContext>, call: SetConfig) -> Result<ConfigChanged, ApiError> {
    if call.name == PAUSED_UNTIL && call.value.is_some() {
        let why = "`heal.paused_until` is set by `granary heal pause`, which knows how long a pause may be";
        return Err(ApiError::new(ErrorCode::BadRequest, why));
    }
    let done = settings::set(&context.shards, &call.name, call.value.as_deref()).await;
    // What was asked is logged only when it is the name and the value of a setting: anything else may be any text, or a
    // secret in the wrong place.
    match done {
        Ok((setting, value)) => {
            let (name, value) = (setting.name.to_owned(), setting.render(&value));
            tracing::info!(%name, %value, "a setting of the cluster was changed");
            Ok(ConfigChanged { name, value })
        }
        Err(error) => {
            let name = granary_placement::settings::find(&call.name).map_or("-", |setting| setting.name);
            tracing::warn!(%name, why = %error.for_log(), "a setting of the cluster was not changed");
            let code = if matches!(error, SetError::Shard(_)) { ErrorCode::Unavailable } else { ErrorCode::BadRequest };
            Err(ApiError::new(code, error))
        }
    }
}

async fn feature_levels(context: Arc<AdminContext>, _: GetFeatureLevels) -> Result<FeatureLevels, ApiError> {
    let (map, known) = levels_known(&context).await?;
    let (can_raise_to, blocked) = match levels::plan(&map, &known) {
        Ok(plan) => (Some(plan.level).filter(|_| !plan.raise.is_empty()), None),
        Err(why) => (None, Some(why.to_string())),
    };
    let shards =
        shard_ids(&map).into_iter().map(|shard| ShardLevelRow { shard, level: known.shards.get(&shard).copied() });
    Ok(FeatureLevels { shards: shards.collect(), disks: known.disks, gateway: known.gateway, can_raise_to, blocked })
}

async fn raise_feature_level(context: Arc<AdminContext>, _: RaiseFeatureLevel) -> Result<FeatureLevelRaised, ApiError> {
    let (map, known) = levels_known(&context).await?;
    let plan = levels::plan(&map, &known).map_err(|why| ApiError::new(ErrorCode::Conflict, why))?;
    let raised = levels::raise(&context.shards, &plan).await;
    let raised = raised.map_err(|why| ApiError::new(ErrorCode::Unavailable, why))?;
    Ok(FeatureLevelRaised { level: plan.level, raised })
}

/// All shards of the map, the root shard first.
fn shard_ids(map: &ClusterMap) -> Vec<ShardId> {
    (0u16..).zip(&map.shards).map(|(number, _)| ShardId(number)).collect()
}

/// The map, the level of every shard that answers, and what the builds of all disk nodes that answer know.
async fn levels_known(context: &AdminContext) -> Result<(Arc<ClusterMap>, levels::Known), ApiError> {
    let map = context.shards.current_map().ok_or_else(no_map)?;
    let shards = levels::of_shards(&context.shards, &map).await;
    // What a node that does not answer said last may be another build's word.
    let views = context.disks.view().into_iter().filter(|view| view.health == DiskHealth::Up);
    let disks = views.filter_map(|view| Some((view.id, view.status?.feature_level))).collect();
    Ok((map, levels::Known { shards, disks, gateway: MAX_FEATURE_LEVEL }))
}

async fn start_disk(context: Arc<AdminContext>, call: StartDisk) -> Result<DiskChanged, ApiError> {
    local(&context, call.disk, DiskAct::Start, |local| local.start(call.disk)).await
}

async fn stop_disk(context: Arc<AdminContext>, call: StopDisk) -> Result<DiskChanged, ApiError> {
    local(&context, call.disk, DiskAct::Stop, |local| local.stop(call.disk)).await
}

async fn replace_disk(context: Arc<AdminContext>, call: ReplaceDisk) -> Result<DiskChanged, ApiError> {
    if context.local.is_some() {
        return local(&context, call.disk, DiskAct::Replace, |local| local.replace(call.disk)).await;
    }
    let Some(uuid) = call.uuid else {
        let why = "name the new disk by the UUID on its label (--uuid): this gateway runs no disk nodes itself";
        return Err(ApiError::new(ErrorCode::BadRequest, why));
    };
    let mut new = Replacement { old: call.disk, uuid, number: None, address: call.address };
    // What makes no sense is refused before anybody is asked.
    let map = context.shards.current_map().ok_or_else(no_map)?;
    ops::replace(&map, &new).map_err(refused)?;
    new.number = Some(number_of_new(&context, &map, &new).await?);
    change(&context, call.disk, DiskAct::Replace, |map| ops::replace(map, &new)).await
}

async fn drain_disk(context: Arc<AdminContext>, call: DrainDisk) -> Result<DiskChanged, ApiError> {
    let mut changed = change(&context, call.disk, DiskAct::Drain, |map| ops::drain(map, call.disk)).await?;
    let state = |map: &ClusterMap| map.disk(call.disk).map(|disk| disk.state);
    if context.shards.current_map().is_some_and(|map| state(&map) == Some(DiskState::Out)) {
        changed.done = DiskAct::Out;
    }
    Ok(changed)
}

async fn weigh_disk(context: Arc<AdminContext>, call: WeighDisk) -> Result<DiskChanged, ApiError> {
    change(&context, call.disk, DiskAct::Weight, |map| ops::set_weight(map, call.disk, call.weight)).await
}

async fn out_disk(context: Arc<AdminContext>, call: OutDisk) -> Result<DiskChanged, ApiError> {
    // As it is now: what was set a moment ago counts.
    let cluster = settings::fetch(&context.shards, 0).await;
    let cluster = cluster.map_err(|error| ApiError::new(ErrorCode::Unavailable, error))?;
    let known = context.values.borrow().clone();
    let values = cluster.map_or_else(|| known.as_ref().clone(), |(_, cluster)| known.with_cluster(&cluster).0);
    let ceiling_percent = values.number("heal.fill_ceiling");
    change(&context, call.disk, DiskAct::Away, |map| {
        let is_down = context.disks.health(call.disk) == DiskHealth::Down;
        take_out_now(map, call.disk, &takers(map, &context.disks.view(), ceiling_percent), is_down)
    })
    .await
}

/// Commits a change of the cluster map; shard leaders and the healer do the rest.
async fn change<E: Error + Refusal + 'static>(
    context: &AdminContext,
    disk: DiskId,
    act: DiskAct,
    change: impl Fn(&ClusterMap) -> Result<ClusterMap, E>,
) -> Result<DiskChanged, ApiError> {
    let result = ops::commit(&context.shards, change).await;
    let said = result.as_ref().map(|committed| committed.after.epoch);
    tracing::info!(disk = disk.0, ?act, result = ?said, "admin request to change the cluster map");
    match result {
        Ok(Committed { before, after }) => Ok(DiskChanged {
            disk,
            done: act,
            epoch: Some(after.epoch),
            slots_moving: moves(&before, &after).len(),
            replicas_moving: replica_moves(&before, &after).len(),
        }),
        Err(CommitError::Refused(why)) => Err(refused(why)),
        Err(error @ CommitError::Root(_)) => Err(ApiError::new(ErrorCode::Unavailable, error)),
        Err(error @ CommitError::Restless) => Err(ApiError::new(ErrorCode::Conflict, error)),
    }
}

/// Why a change of the cluster map is refused.
trait Refusal {
    /// There is no such disk.
    fn is_unknown_disk(&self) -> bool;
}

impl Refusal for ChangeError {
    fn is_unknown_disk(&self) -> bool {
        matches!(self, ChangeError::Place(PlaceError::NoSuchDisk(_)))
    }
}

impl Refusal for AwayError {
    fn is_unknown_disk(&self) -> bool {
        matches!(self, AwayError::Place(PlaceError::NoSuchDisk(_)))
    }
}

fn refused<E: Error + Refusal>(why: E) -> ApiError {
    let code = if why.is_unknown_disk() { ErrorCode::NotFound } else { ErrorCode::Conflict };
    ApiError::new(code, why)
}

/// An act of `granary dev` on one of its own disk nodes.
async fn local(
    context: &AdminContext,
    disk: DiskId,
    act: DiskAct,
    run: impl FnOnce(&dyn LocalDisks) -> BoxFuture<'_, Result<(), String>>,
) -> Result<DiskChanged, ApiError> {
    let Some(local) = &context.local else {
        let why = "this gateway runs no disk nodes; start and stop them where they run";
        return Err(ApiError::new(ErrorCode::NotSupported, why));
    };
    let done = run(local.as_ref()).await;
    tracing::info!(disk = disk.0, ?act, result = ?done, "admin request for a disk node");
    done.map_err(|why| ApiError::new(ErrorCode::Conflict, why))?;
    Ok(DiskChanged { disk, done: act, epoch: None, slots_moving: 0, replicas_moving: 0 })
}

/// The number on the label of the new disk, told by its node. Asked before the map changes: afterwards the old disk is
/// gone for good, and a wrong label would leave its place empty. The change itself compares it with the number that the
/// map will give.
async fn number_of_new(context: &AdminContext, map: &ClusterMap, new: &Replacement) -> Result<DiskId, ApiError> {
    let conflict = |why: String| ApiError::new(ErrorCode::Conflict, why);
    let next = ops::new_disk_id(map);
    let client = match (&new.address, context.disks.client(new.old)) {
        (Some(address), _) => context.disks.client_at(address),
        (None, Some(client)) => client,
        (None, None) => {
            return Err(conflict(format!("the address of disk {} is not known; name the new disk's", new.old)))
        }
    };
    let address = client.address();
    let format = format!("granary-disk-node format --dir DIR --cluster {} --disk {next}", map.cluster_id);
    match client.control(ControlRequest::Status, NEW_DISK).await {
        Ok(ControlResponse::Status(status)) => {
            let level = levels::of_shards(&context.shards, map).await.into_values().max().unwrap_or_default();
            let wrong = unfit(&status, new.uuid, next, level);
            wrong.map_or(Ok(next), |why| Err(conflict(format!("the node at {address} {why}: `{format}`"))))
        }
        Ok(other) => Err(conflict(format!("the node at {address} does not tell which disk it serves: {other:?}"))),
        Err(error) => Err(conflict(format!(
            "the new disk's node does not answer at {address}: {error}; `{format}`, then start it there"
        ))),
    }
}

/// Why a node cannot take the place of a disk, when the new one must have this identity and the shards are at this
/// feature level; None when it can.
fn unfit(status: &NodeStatus, uuid: DiskUuid, next: DiskId, level: u32) -> Option<String> {
    if status.uuid != uuid || status.disk != Some(next) {
        let number = status.disk.map_or_else(|| "without a number".to_owned(), |disk| disk.to_string());
        let found = status.uuid;
        return Some(format!("serves disk {number} ({found}), but the new one must be disk {next} ({uuid})"));
    }
    let knows = status.feature_level;
    (knows < level).then(|| {
        format!(
            "runs an older release: it knows feature level {knows}, and the cluster is at {level}. Upgrade it first"
        )
    })
}

fn no_map() -> ApiError {
    ApiError::new(ErrorCode::Unavailable, "the root shard has not told the cluster map yet")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_disk_that_was_named_by_a_node_that_knows_the_clusters_level_takes_a_place() {
        let (uuid, next) = (DiskUuid([7; 16]), DiskId(9));
        let status = |uuid, disk, feature_level| NodeStatus {
            disk,
            uuid,
            epoch: Epoch(1),
            capacity_bytes: 0,
            free_bytes: 0,
            chunks: 0,
            chunk_bytes: 0,
            feature_level,
            data_connections: 0,
        };
        assert_eq!(unfit(&status(uuid, Some(next), 2), uuid, next, 2), None);
        assert_eq!(unfit(&status(uuid, Some(next), 3), uuid, next, 2), None);
        for (wrong, says) in [
            (status(DiskUuid([8; 16]), Some(next), 2), "serves disk 9"),
            (status(uuid, Some(DiskId(8)), 2), "serves disk 8"),
            (status(uuid, None, 2), "without a number"),
            (status(uuid, Some(next), 1), "feature level 1"),
        ] {
            let why = unfit(&wrong, uuid, next, 2);
            assert!(why.as_ref().is_some_and(|why| why.contains(says)), "{why:?}");
        }
    }
}
