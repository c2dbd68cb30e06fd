//! Chunks that disks find damaged by themselves.

use crate::cluster::{seed, Cluster};
use crate::heal::{fill, heal_by, settings, small};
use crate::meta::Meta;
use crate::node::Damage;
use granary_gateway::background::heal::HealSettings;
use granary_gateway::object::chunk_id;
use granary_wire::chunk::ChunkId;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_disks_find_damaged_is_repaired_though_nobody_reads_it_and_nothing_is_deleted() {
    let mut draw = seed("what_disks_find_damaged_is_repaired_though_nobody_reads_it_and_nothing_is_deleted");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let chunks = cluster.chunks();
    // Two chunks each of several extents, of both shards; on one disk more than a page of its list.
    let extents: Vec<_> = objects.iter().flat_map(|(data, _)| data.extents()).collect();
    let mut damaged: Vec<ChunkId> = Vec::new();
    for extent in &extents {
        for index in [0, 5] {
            cluster.damage(extent, index, 0, Damage::Noticed);
            damaged.push(chunk_id(extent, index));
        }
    }
    // One of an object that nobody has any more: no shard owns it, so nobody repairs it.
    let stray = ChunkId { extent: granary_placement::id::ExtentId([0xee; 16]), ..damaged[0] };
    let holder = cluster.holder(extents[0], 0);
    let copy = holder.chunks.lock().unwrap()[&damaged[0]].clone();
    holder.chunks.lock().unwrap().insert(stray, copy);
    holder.damage.lock().unwrap().insert((stray, 0), Damage::Noticed);
    for disk in &cluster.disks {
        disk.longest_page.store(1, Ordering::SeqCst);
        disk.scrubs.store(true, Ordering::SeqCst);
    }
    let (healer, _stop) =
        heal_by(&cluster, meta.shards.clone(), HealSettings { interval: Duration::from_millis(20), ..settings() });
    let counters = cluster.store.counters();
    let rebuilt = || counters.chunks_rebuilt.load(Ordering::Relaxed);
    cluster.until("all are rebuilt", || rebuilt() == damaged.len() as u64 && meta.missing() == 0).await;
    cluster.until("the lists are short", || healer.status().scrub_findings == 1).await;
    assert_eq!(cluster.chunks(), chunks + 1, "nothing was deleted");
    assert_eq!(cluster.disks.iter().map(|disk| disk.deletes.load(Ordering::SeqCst)).sum::<u64>(), 0);
    // What stays on a list is not told again with every look.
    let looks = holder.asked("damaged");
    cluster.until("they are asked again", || holder.asked("damaged") > looks + 2).await;
    assert_eq!(counters.chunks_found_damaged.load(Ordering::Relaxed), damaged.len() as u64 + 1);
    let census = healer.census(|_| {}).await.unwrap();
    assert!(census.is_complete() && census.corrupt == 0, "{census:?}");
}
