//! Keeps the members of led shards as the map says, stops replicas that are no members any more, and keeps logs short.

use super::{lock, MetaHost, ReplicaState};
use crate::batching::Batcher;
use crate::message::{PeerRequest, PeerResponse};
use granary_placement::id::ShardId;
use granary_placement::map::ClusterMap;
use std::time::Duration;

/// How often members are compared with the map.
const RECONCILE_EVERY: Duration = Duration::from_millis(500);
/// How many of those rounds pass between two questions of a replica that the map does not name.
const ASK_EVERY_ROUNDS: u64 = 10;
/// How long such a question may take.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// How long one step of a change of members may take.
const STEP_DEADLINE: Duration = Duration::from_secs(5);

/// Does so until the host ends.
pub(super) async fn run(host: MetaHost) {
    let stop = host.inner.stop.clone();
    let mut round = 0u64;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RECONCILE_EVERY) => {}
        }
        round += 1;
        let map = host.newest_map();
        for (shard, batcher) in host.running() {
            let work = async {
                batcher.replica.transfer_leadership_if_log_is_long().await;
                if let Some(map) = &map {
                    reconcile_shard(&host, map, shard, &batcher, round).await;
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = work => {}
            }
        }
    }
}

async fn reconcile_shard(host: &MetaHost, map: &ClusterMap, shard: ShardId, batcher: &Batcher, round: u64) {
    let Some(wanted) = map.shards.get(usize::from(shard.0)) else { return };
    if batcher.replica.is_leader() {
        let step = batcher.replica.reconcile(&wanted.members);
        match tokio::time::timeout(STEP_DEADLINE, step).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%shard, %error, "members not changed yet"),
            Err(_) => tracing::warn!(%shard, "changing members takes long"),
        }
        return;
    }
    if host.named_by(map, shard) || !round.is_multiple_of(ASK_EVERY_ROUNDS) {
        return;
    }
    let me = host.inner.config.disk;
    for member in &wanted.members {
        let answer = host.inner.peers.ask(*member, shard, &PeerRequest::Members, ASK_DEADLINE).await;
        if let Ok(PeerResponse::Members { leads: true, membership }) = answer {
            if !membership.nodes.is_empty() && !membership.nodes.contains(&u64::from(me.0)) {
                tracing::info!(%shard, "this replica is no member any more; stopping it, its data stays");
                batcher.stop.cancel();
                batcher.replica.shutdown().await;
                lock(&host.inner.replicas).insert(shard, ReplicaState::Removed);
            }
            return;
        }
    }
}
