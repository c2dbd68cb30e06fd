//! Clocks that are off: gateways' are refused, leaders' cost them their shards, and nobody else notices.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::record::AccountId;
use granary_meta::{MetaRequest, Reply, ShardRequest, ShardResponse};
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::ControlError;
use scenery::cluster::{map, Cluster};
use scenery::{put, Random};
use std::sync::Arc;
use std::time::Duration;

const SHARD: ShardId = ShardId(1);

async fn cluster() -> Cluster {
    let cluster = Cluster::new();
    cluster.map.send_replace(Some(Arc::new(map(1, vec![vec![1, 2, 3]; 2]))));
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    cluster
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// A PUT as a gateway sends it whose clock is that far ahead, to one disk.
async fn send(cluster: &Cluster, to: DiskId, random: &mut Random, ahead_ms: i64) -> Result<Reply, ControlError> {
    let now_ms = now_ms().saturating_add_signed(ahead_ms);
    let command = put(1, "k", b"body");
    let (request_id, account) = (random.id(), AccountId::ROOT);
    let request = MetaRequest { request_id, now_ms, stamp_ms: Some(now_ms), account, command };
    let bytes = ShardRequest::Command(request).encode().unwrap();
    let answer = cluster.host(to.0).serve(SHARD, &bytes).await?;
    match ShardResponse::decode(&answer).unwrap() {
        ShardResponse::Reply(reply) => Ok(reply),
        other => panic!("{other:?}"),
    }
}

/// To whoever leads, until it is answered.
async fn send_to_leader(cluster: &Cluster, random: &mut Random, ahead_ms: i64) -> Reply {
    loop {
        let leader = cluster.leader(SHARD).await;
        match send(cluster, leader, random, ahead_ms).await {
            Ok(reply) => return reply,
            Err(ControlError::NotLeader { .. } | ControlError::Unavailable(_)) => {}
            Err(other) => panic!("{other}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_whose_clock_is_off_is_refused_and_others_are_not() {
    let (cluster, mut random) = (cluster().await, Random(1));
    let hour = 3_600_000;
    for ahead_ms in [hour, -hour, 20_000, -20_000] {
        let leader = cluster.leader(SHARD).await;
        match send(&cluster, leader, &mut random, ahead_ms).await {
            Err(ControlError::ClockOff { ahead_ms: told }) => assert!((told - ahead_ms).abs() < 10_000, "{told}"),
            Err(ControlError::NotLeader { .. }) => {}
            other => panic!("{ahead_ms}: {other:?}"),
        }
        let reply = send_to_leader(&cluster, &mut random, 0).await;
        assert!(matches!(reply, Reply::Put { .. }), "{reply:?}");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_clock_is_off_its_majoritys_gives_its_shard_up_and_expires_nobody() {
    let (cluster, mut random) = (cluster().await, Random(2));
    let hour = 3_600_000;
    for ahead_ms in [hour, -hour] {
        assert!(matches!(send_to_leader(&cluster, &mut random, 0).await, Reply::Put { .. }));
        let wrong = cluster.leader(SHARD).await;
        cluster.clock(wrong).run_ahead(ahead_ms);
        // Until it hears of it, it refuses gateways whose clocks are right; it takes nothing under a wrong stamp.
        while cluster.leader(SHARD).await == wrong {
            // Not of a gateway whose clock is just as wrong either.
            for of_gateway in [0, ahead_ms] {
                if let Ok(reply) = send(&cluster, wrong, &mut random, of_gateway).await {
                    panic!("{reply:?}");
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for _ in 0..20 {
            assert!(matches!(send_to_leader(&cluster, &mut random, 0).await, Reply::Put { .. }));
        }
        cluster.clock(wrong).run_ahead(0);
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}
