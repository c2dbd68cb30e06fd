//! What operators ask for and change: one function per request of [`api`](super::api).

use super::api::{ApiError, Census, DiskAct, DiskChanged, ErrorCode};
use super::api::{GetMap, GetStatus, ReplaceDisk, RunCensus, StartDisk, Status, StopDisk};
use super::{AdminContext, LocalDisks};
use crate::shards::map_watch::MapSet;
use futures::future::BoxFuture;
use granary_placement::id::{DiskId, DiskUuid, Epoch};
use granary_placement::map::ClusterMap;
use granary_wire::control::{ControlRequest, ControlResponse};
use std::sync::Arc;
use std::time::Duration;

/// How long a new disk's node may take to tell which disk it serves.
const NEW_DISK: Duration = Duration::from_secs(5);

pub(super) async fn status(context: Arc<AdminContext>, _: GetStatus) -> Result<Status, ApiError> {
    Ok(context.status.borrow().as_ref().clone())
}

pub(super) async fn map(context: Arc<AdminContext>, _: GetMap) -> Result<ClusterMap, ApiError> {
    context.shards.current_map().map(|map| map.as_ref().clone()).ok_or_else(no_map)
}

pub(super) async fn census(context: Arc<AdminContext>, _: RunCensus) -> Result<Census, ApiError> {
    let healer = context.healer.get().ok_or_else(no_map)?;
    healer.census(|_| {}).await.map_err(|error| ApiError::new(ErrorCode::Unavailable, error))
}

pub(super) async fn start_disk(context: Arc<AdminContext>, call: StartDisk) -> Result<DiskChanged, ApiError> {
    local(&context, call.disk, DiskAct::Start, |local| local.start(call.disk)).await
}

pub(super) async fn stop_disk(context: Arc<AdminContext>, call: StopDisk) -> Result<DiskChanged, ApiError> {
    local(&context, call.disk, DiskAct::Stop, |local| local.stop(call.disk)).await
}

pub(super) async fn replace_disk(context: Arc<AdminContext>, call: ReplaceDisk) -> Result<DiskChanged, ApiError> {
    if context.local.is_some() {
        return local(&context, call.disk, DiskAct::Replace, |local| local.replace(call.disk)).await;
    }
    let Some(uuid) = call.uuid else {
        let why = "name the new disk by the UUID on its label (--uuid): this gateway runs no disk nodes itself";
        return Err(ApiError::new(ErrorCode::BadRequest, why));
    };
    let done = replace(&context, call.disk, uuid, call.address).await;
    tracing::info!(disk = call.disk.0, result = ?done, "admin request to replace a disk");
    let epoch = done.map_err(|why| ApiError::new(ErrorCode::Conflict, why))?;
    Ok(DiskChanged { disk: call.disk, done: DiskAct::Replace, epoch: Some(epoch) })
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
    Ok(DiskChanged { disk, done: act, epoch: None })
}

/// Gives the slots and replicas of a disk to a new one; the shard leaders and the healer do the rest.
async fn replace(
    context: &AdminContext,
    old: DiskId,
    uuid: DiskUuid,
    address: Option<String>,
) -> Result<Epoch, String> {
    for _ in 0..5 {
        context.shards.refresh_map().await.map_err(|error| error.to_string())?;
        let map = context.shards.current_map().ok_or("no cluster map yet")?;
        let (next, id) = granary_placement::place::replace_disk(&map, old, uuid, address.clone())
            .map_err(|error| error.to_string())?;
        check_new(context, &map, (old, id), uuid, address.as_deref()).await?;
        let epoch = next.epoch;
        match context.shards.set_map(next).await.map_err(|error| error.to_string())? {
            MapSet::Done => return Ok(epoch),
            MapSet::Conflict { .. } => {}
        }
    }
    Err("the cluster map changes all the time; try again".to_owned())
}

/// Is the new disk's node there, with the number that the map will give it? Asked before the map changes: afterwards the old disk is
/// gone for good, and a wrong label would leave its place empty.
async fn check_new(
    context: &AdminContext,
    map: &ClusterMap,
    (old, id): (DiskId, DiskId),
    uuid: DiskUuid,
    address: Option<&str>,
) -> Result<(), String> {
    let client = match (address, context.disks.client(old)) {
        (Some(address), _) => context.disks.client_at(address),
        (None, Some(client)) => client,
        (None, None) => return Err(format!("the address of disk {old} is not known; name the new disk's")),
    };
    let format = format!("granary-disk-node format --dir DIR --cluster {} --disk {id}", map.cluster_id);
    match client.control(ControlRequest::Status, NEW_DISK).await {
        Ok(ControlResponse::Status(status)) if status.uuid == uuid && status.disk == Some(id) => Ok(()),
        Ok(ControlResponse::Status(status)) => {
            let number = status.disk.map_or_else(|| "without a number".to_owned(), |disk| disk.to_string());
            Err(format!(
                "the node at {} serves disk {number} ({}), but the new one must be disk {id} ({uuid}): `{format}`",
                client.address(),
                status.uuid,
            ))
        }
        Ok(other) => Err(format!("the node at {} does not tell which disk it serves: {other:?}", client.address())),
        Err(error) => Err(format!(
            "the new disk's node does not answer at {}: {error}; `{format}`, then start it there",
            client.address()
        )),
    }
}

fn no_map() -> ApiError {
    ApiError::new(ErrorCode::Unavailable, "the root shard has not told the cluster map yet")
}
