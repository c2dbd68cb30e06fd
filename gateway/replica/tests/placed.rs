//! A leader holds what gateways have placed against its own cluster map.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::{AccountId, ExtentRef, ObjectData};
use granary_meta::{ChunkRef, Command, MetaRequest, Reply, ShardRequest, ShardResponse};
use granary_placement::id::{DiskId, Epoch, ExtentId, PlacementGroupId, ShardId};
use granary_placement::map::{ClusterMap, GroupSlot, PlacementGroup};
use granary_placement::scheme::{CodecId, FailureDomain, Scheme};
use granary_wire::control::ControlError;
use scenery::cluster::{map, Cluster};
use scenery::{put, Random};
use std::collections::BTreeMap;
use std::sync::Arc;

const SHARD: ShardId = ShardId(1);
const GROUP: PlacementGroupId = PlacementGroupId(0);

/// One group of 4+2 by servers, on six disks in three servers.
fn three_servers(epoch: u64) -> ClusterMap {
    let mut map = map(epoch, vec![vec![1, 2, 3, 4, 5, 6], vec![1]]);
    for disk in map.disks.values_mut() {
        disk.location.server = format!("s{}", disk.id.0 % 3);
    }
    map.schemes = BTreeMap::from([("4+2".to_owned(), Scheme::new(4, 2, FailureDomain::Server).unwrap())]);
    let slots = (1..=6).map(|disk| GroupSlot::new(DiskId(disk))).collect();
    map.groups = BTreeMap::from([(GROUP, PlacementGroup { scheme: "4+2".to_owned(), slots })]);
    map
}

/// A PUT of one extent over the whole group, as a gateway makes it.
fn request(random: &mut Random, missing: &[u8], by: u64) -> MetaRequest {
    let id = ExtentId(random.id());
    let Command::PutObject { bucket, key, mut record, conditions, rule_epoch, .. } = put(1, "k", b"body") else {
        panic!()
    };
    record.data = ObjectData::Extents(vec![ExtentRef {
        extent: id,
        group: GROUP,
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 131_072,
        len_bytes: record.size_bytes,
        generation: 1,
        slots: (0..6).collect(),
    }]);
    let missing = missing.iter().map(|index| ChunkRef { group: GROUP, extent: id, index: *index }).collect();
    let map_epoch = Epoch(by);
    let command = Command::PutObject { bucket, key, record, missing, map_epoch, conditions, rule_epoch };
    let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    let (request_id, account) = (random.id(), AccountId::ROOT);
    MetaRequest { request_id, now_ms, stamp_ms: Some(now_ms), account, command }
}

async fn send(cluster: &Cluster, random: &mut Random, missing: &[u8], by: u64) -> Result<Reply, ControlError> {
    serve(cluster, request(random, missing, by)).await
}

async fn serve(cluster: &Cluster, request: MetaRequest) -> Result<Reply, ControlError> {
    let answer = cluster.host(1).serve(SHARD, &ShardRequest::Command(request).encode().unwrap()).await?;
    match ShardResponse::decode(&answer).unwrap() {
        ShardResponse::Reply(reply) => Ok(reply),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_refuses_a_payload_that_would_not_bear_the_loss_of_a_server() {
    let (cluster, mut random) = (Cluster::new(), Random(1));
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    cluster.leader(SHARD).await;
    cluster.map.send_replace(Some(Arc::new(three_servers(7))));
    let stored = |reply| matches!(reply, Ok(Reply::Put { .. }));
    assert!(stored(send(&cluster, &mut random, &[], 7).await));
    // Five chunks on three servers: one more server lost leaves three of four.
    let wrong = send(&cluster, &mut random, &[2], 7).await;
    assert!(matches!(wrong, Err(ControlError::BadRequest(_))), "{wrong:?}");
    let old = send(&cluster, &mut random, &[2], 6).await;
    assert!(matches!(old, Ok(Reply::StaleMap { oldest: Epoch(7) })), "{old:?}");
    let newer = send(&cluster, &mut random, &[2], 8).await;
    assert!(matches!(newer, Err(ControlError::Overloaded)), "{newer:?}");
    // The newer map has every disk in a server of its own.
    let mut apart = three_servers(8);
    apart.disks.values_mut().for_each(|disk| disk.location.server = format!("s{}", disk.id.0));
    cluster.map.send_replace(Some(Arc::new(apart)));
    assert!(stored(send(&cluster, &mut random, &[2], 8).await));
    cluster.stop_all().await;
}

/// A gateway that did not hear the answer sends the command again. What was committed by an earlier map is not refused
/// by a later one: its chunks would be deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_that_is_kept_outweighs_what_the_leader_thinks_of_the_payload_now() {
    let (cluster, mut random) = (Cluster::new(), Random(2));
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    cluster.leader(SHARD).await;
    let mut apart = three_servers(7);
    apart.disks.values_mut().for_each(|disk| disk.location.server = format!("s{}", disk.id.0));
    cluster.map.send_replace(Some(Arc::new(apart)));
    let sent = request(&mut random, &[2], 7);
    let reply = serve(&cluster, sent.clone()).await;
    assert!(matches!(reply, Ok(Reply::Put { .. })), "{reply:?}");
    cluster.map.send_replace(Some(Arc::new(three_servers(8))));
    assert_eq!(serve(&cluster, sent).await, reply);
    let another = send(&cluster, &mut random, &[2], 7).await;
    assert!(matches!(another, Ok(Reply::StaleMap { oldest: Epoch(8) })), "{another:?}");
    cluster.stop_all().await;
}
