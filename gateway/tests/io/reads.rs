use crate::cluster::{seed, Cluster, UNIT};
use crate::heal::{fill, now_ms, settings};
use crate::meta::Meta;
use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use granary_gateway::background::heal::{HealSettings, Healer};
use granary_gateway::background::leases::LeaseSettings;
use granary_gateway::object::{ObjectSettings, ObjectStore};
use granary_placement::id::ShardId;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const GRACE: Duration = Duration::from_secs(2);

/// A gateway whose healer collects garbage after a short grace.
fn healer(cluster: &Cluster, store: &ObjectStore) -> (Healer, CancellationToken) {
    let lease = LeaseSettings { ttl: Duration::from_millis(600) };
    let settings = HealSettings { garbage_grace: GRACE, lease, ..settings() };
    let stop = CancellationToken::new();
    let channel = watch::channel(settings).1;
    (Healer::start(store.clone(), cluster.shards.clone(), channel, String::new(), stop.clone()), stop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_lasts_longer_than_the_grace_finds_its_chunks_and_they_go_when_it_is_over() {
    let mut draw = seed("a_read_that_lasts_longer_than_the_grace_finds_its_chunks");
    // Small extents and windows: most of the object is fetched late.
    let small = ObjectSettings { extent_bytes: 4 * UNIT, window_bytes: UNIT, ..ObjectSettings::default() };
    let cluster = Cluster::start(4, 2, small.clone()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let (data, payload) = &objects[3];
    let len = payload.len() as u64;
    let shard = ShardId(1 + (len % 2) as u16);
    // One gateway collects, another reads.
    let (_collector, stop_collector) = healer(&cluster, &cluster.store);
    let held = || meta.leases().iter().any(|lease| lease.task == "garbage" && lease.holder.is_some());
    cluster.until("the first collects garbage", held).await;
    let reads_here = ObjectStore::new(cluster.store.disks().clone(), small);
    let (_other, stop_other) = healer(&cluster, &reads_here);
    let mut reader = reads_here.read(data, 0..len);
    let first: Bytes = reader.next().await.unwrap().unwrap();
    // The object, and with it all of its extents.
    meta.delete(shard, &data.extents()[0], now_ms());
    tokio::time::sleep(3 * GRACE).await;
    assert!(data.extents().iter().all(|extent| meta.is_garbage(shard, extent)), "it was collected while it was read");
    let publishes = || meta.leases().iter().any(|lease| lease.task.starts_with("reads-") && lease.holder.is_some());
    assert!(publishes());
    let rest: Vec<Bytes> = reader.by_ref().try_collect().await.expect("the rest of a long read");
    assert!([vec![first], rest].concat().concat() == *payload);

    // It is over: the place is given back, and the garbage goes.
    drop(reader);
    cluster.until("it is collected", || !data.extents().iter().any(|extent| meta.is_garbage(shard, extent))).await;
    assert!(!publishes());
    stop_other.cancel();
    stop_collector.cancel();
}
