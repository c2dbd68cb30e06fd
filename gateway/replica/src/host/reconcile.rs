//! Keeps the members of led shards as the map says, stops replicas that are no members any more, and keeps logs short.

use super::replicas::IDENTIFY_DEADLINE;
use super::MetaHost;
use crate::batching::Batcher;
use crate::message::{PeerMessage, PeerRequest, PeerResponse, ReplicaId};
use crate::raft::Replica;
use futures::StreamExt;
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::ClusterMap;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How often members are compared with the map.
const RECONCILE_EVERY: Duration = Duration::from_millis(500);
/// How many of those rounds pass between two questions of a replica that the map does not name.
const ASK_EVERY_ROUNDS: u64 = 10;
/// How long such a question may take.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// How long one step of a change of members may take.
const STEP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a damaged replica may take to empty itself.
const REBUILD_DEADLINE: Duration = Duration::from_secs(60);
/// How many shards are looked at at once: a disk that does not answer holds up those it belongs to only.
const AT_ONCE: usize = 16;

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
        let work = futures::stream::iter(host.running()).for_each_concurrent(AT_ONCE, |(shard, batcher)| {
            let (host, map) = (&host, &map);
            async move {
                batcher.replica.look_for_end();
                batcher.replica.keep_log_short(host.inner.room.is_full()).await;
                batcher.replica.transfer_leadership_if_log_is_long().await;
                if let Some(map) = map {
                    reconcile_shard(host, map, shard, &batcher, round).await;
                }
            }
        });
        // Failed ones are asked about before each attempt to open them; broken ones are not opened again.
        // One at a time: whoever does not answer holds up the rest.
        let mut broken = if round.is_multiple_of(ASK_EVERY_ROUNDS) { host.broken() } else { Vec::new() };
        if !broken.is_empty() {
            let turn = usize::try_from(round / ASK_EVERY_ROUNDS).unwrap_or(0) % broken.len();
            broken = vec![broken.swap_remove(turn)];
        }
        let ask = async {
            for shard in broken {
                host.let_failed_go(shard).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = work => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = ask => {}
        }
    }
}

async fn reconcile_shard(host: &MetaHost, map: &ClusterMap, shard: ShardId, batcher: &Arc<Batcher>, round: u64) {
    let Some(wanted) = map.shards.get(usize::from(shard.0)) else { return };
    let replica = &*batcher.replica;
    if replica.is_leader() {
        let on_disks = wanted.members.iter().map(|disk| async { (*disk, replica_on(host, replica, *disk).await) });
        let wanted: BTreeMap<DiskId, Option<ReplicaId>> =
            futures::future::join_all(on_disks).await.into_iter().collect();
        match tokio::time::timeout(STEP_DEADLINE, replica.reconcile(&wanted)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%shard, %error, "members not changed yet"),
            Err(_) => tracing::warn!(%shard, "changing members takes long"),
        }
        return;
    }
    if host.named_by(map, shard) || !round.is_multiple_of(ASK_EVERY_ROUNDS) {
        return;
    }
    if is_no_member(host, map, shard, replica.me).await {
        host.let_go(batcher);
    }
}

/// Does the shard's leader, which is asked, say that this replica is no member?
pub(super) async fn is_no_member(host: &MetaHost, map: &ClusterMap, shard: ShardId, me: ReplicaId) -> bool {
    let Some(wanted) = map.shards.get(usize::from(shard.0)) else { return false };
    for member in wanted.members.iter().filter(|disk| **disk != me.disk) {
        let message = PeerMessage { from: me, to: None, request: PeerRequest::Members };
        let answer = host.inner.peers.ask(*member, shard, &message, ASK_DEADLINE).await;
        if let Ok(PeerResponse::Members { leads: true, membership }) = answer {
            return !membership.nodes.is_empty() && !membership.nodes.contains(&me);
        }
    }
    false
}

/// The replica that is on a disk now, as its leader knows it: the member there, unless another one answered for it;
/// then, and where there is none yet, the disk is asked.
async fn replica_on(host: &MetaHost, replica: &Replica, disk: DiskId) -> Option<ReplicaId> {
    if disk == replica.me.disk {
        return Some(replica.me);
    }
    let (shard, peers) = (replica.shard, &host.inner.peers);
    let nodes = replica.nodes();
    let members: Vec<ReplicaId> = nodes.into_iter().filter(|id| id.disk == disk).collect();
    let heard = || peers.heard().get(&(shard, disk)).copied();
    match (heard(), members.as_slice()) {
        (Some(heard), members) if members.contains(&heard.id) && !heard.is_broken => return Some(heard.id),
        (None, [only]) => return Some(*only),
        _ => {}
    }
    let identify = PeerMessage { from: replica.me, to: None, request: PeerRequest::Identify };
    if let Ok(PeerResponse::Identity { me, .. }) = peers.ask(disk, shard, &identify, IDENTIFY_DEADLINE).await {
        return Some(me);
    }
    // Broken, it may empty itself once nothing is lost by that. What anyone was told of must not be on it alone.
    let broken = heard().filter(|heard| heard.is_broken)?;
    // A leader that is none any more may not know who the members are.
    if replica.read_barrier().await.is_err() {
        return None;
    }
    if members.contains(&broken.id) {
        // What this leader remembers of the others' logs is not enough: they may be damaged or gone as well, one of
        // them emptied a moment ago. Only those count that say now that they are who they were.
        let others = replica.voters().into_iter().filter(|id| *id != broken.id && *id != replica.me);
        let answers = others.map(|id| async move {
            let identify = PeerMessage { from: replica.me, to: None, request: PeerRequest::Identify };
            let answer = peers.ask(id.disk, shard, &identify, IDENTIFY_DEADLINE).await;
            matches!(answer, Ok(PeerResponse::Identity { me, is_empty: false }) if me == id).then_some(id)
        });
        let present: BTreeSet<ReplicaId> = futures::future::join_all(answers).await.into_iter().flatten().collect();
        if !replica.can_spare(broken.id, &present) {
            return None;
        }
    }
    let rebuild = PeerMessage { from: replica.me, to: Some(broken.id), request: PeerRequest::Rebuild };
    match peers.ask(disk, shard, &rebuild, REBUILD_DEADLINE).await {
        Ok(PeerResponse::Identity { me, .. }) => Some(me),
        _ => None,
    }
}
