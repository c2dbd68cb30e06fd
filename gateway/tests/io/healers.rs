//! Several healers at once, and one that does not know that another took over.

use crate::answers;
use crate::cluster::{seed, Cluster};
use crate::heal::{all_contents, chunk, contents, fill, heal, settings, small};
use crate::meta::Meta;
use crate::moves::give_slot_to;
use crate::node::Damage;
use granary_gateway::background::heal::{HealSettings, Healer, HEAL_TASK};
use granary_gateway::background::leases::{Held, Holder, LeaseSettings};
use granary_gateway::object::chunk_id;
use granary_meta::{Command, Reply};
use granary_placement::id::{Epoch, ExtentId, ShardId};
use granary_wire::chunk::ChunkId;
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use granary_wire::error::ChunkError;
use granary_wire::NodeClient;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_holder_whose_lease_was_taken_over_can_neither_delete_nor_write() {
    let mut draw = seed("a_paused_holder_whose_lease_was_taken_over_can_neither_delete_nor_write");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let ttl = Duration::from_millis(200);
    let holder =
        |name: &str| Holder::new(meta.shards.clone(), move || LeaseSettings { ttl }, HEAL_TASK, name.to_owned());
    // The first takes the lease and is paused from then on: it renews nothing, and does not know what happens.
    let paused = holder("paused").acquire().await;
    let successor = holder("successor").acquire().await;
    assert_eq!((paused.stamp().epoch, successor.stamp().epoch, paused.is_lost()), (1, 2, false));

    let extent = &objects[1].0.extents()[0];
    let (id, disk) = (chunk_id(extent, 0), cluster.holder(extent, 0));
    let client = cluster.store.disks().client(disk.id).unwrap();
    let delete = |held: &Held, id: ChunkId| {
        let (client, lease) = (client.clone(), Some(held.stamp().clone()));
        async move {
            let request = ControlRequest::DeleteChunks { chunks: vec![id], lease };
            client.control(request, Duration::from_secs(10)).await.unwrap()
        }
    };
    let (spec, bytes) = disk.chunks.lock().unwrap().get(&id).map(|stored| (stored.spec, stored.bytes.clone())).unwrap();
    let other = ChunkId { extent: ExtentId([9; 16]), ..id };
    meta.report(ShardId(1), chunk(extent, 0));
    let queued = (chunk(extent, 0), meta.generation(ShardId(1), chunk(extent, 0)));
    let repaired = |held: &Held| Command::RepairDone { chunks: vec![queued], lease: held.stamp().clone() };

    // As long as the successor has not acted, nobody knows of it; then the paused one is refused everywhere it acted.
    assert_eq!(delete(&successor, other).await, ControlResponse::Deleted(0));
    let noted =
        meta.shards.command(ShardId(1), Command::GarbageDone { extents: vec![], lease: successor.stamp().clone() });
    assert_eq!(noted.await.unwrap(), Reply::Done);
    let before = all_contents(&cluster);
    let refused = ControlResponse::Error(ControlError::StaleLease { current: 2 });
    assert_eq!(delete(&paused, id).await, refused);
    let write = client.put_chunk_under(paused.stamp(), other, spec, vec![bytes]).await;
    assert_eq!(write, Err(ChunkError::StaleLease { current: 2 }));
    assert_eq!(meta.shards.command(ShardId(1), repaired(&paused)).await.unwrap(), Reply::StaleLease { current: 2 });
    assert!(all_contents(&cluster) == before && meta.missing() == 1);
    assert_eq!(meta.shards.command(ShardId(1), repaired(&successor)).await.unwrap(), Reply::Done);
    assert_eq!(meta.missing(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_healers_do_no_harm_to_each_other() {
    let mut draw = seed("several_healers_do_no_harm_to_each_other");
    let cluster = Cluster::start(4, 2, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    let before = all_contents(&cluster);
    let _healers = [heal(&cluster, &meta), heal(&cluster, &meta), heal(&cluster, &meta)];
    for round in 0..3 {
        let place = (round + draw.number() as usize % 2) % 6;
        cluster.kill(place).await;
        cluster.disks[place].chunks.lock().unwrap().clear();
        cluster.revive(place).await;
        cluster
            .until("it is full again", || contents(&cluster.disks[place]) == before[place] && meta.missing() == 0)
            .await;
    }
    assert!(all_contents(&cluster) == before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_holder_deletes_nothing_on_the_disk_that_a_move_relied_on() {
    let mut draw = seed("a_paused_holder_deletes_nothing_on_the_disk_that_a_move_relied_on");
    let cluster = Cluster::with_disks(4, 2, 7, small()).await;
    let meta = Meta::of(&cluster);
    fill(&cluster, &meta, &mut draw).await;
    // The new disk has everything already, so that nothing is written to it.
    let all = cluster.disks[2].chunks.lock().unwrap().clone();
    cluster.disks[6].chunks.lock().unwrap().extend(all.clone());
    let ttl = Duration::from_millis(200);
    let paused = Holder::new(meta.shards.clone(), move || LeaseSettings { ttl }, HEAL_TASK, String::new());
    let paused = paused.acquire().await;
    let quick = HealSettings { lease: LeaseSettings { ttl }, ..settings() };
    let stop = CancellationToken::new();
    let quick = watch::channel(quick).1;
    let _healer = Healer::start(cluster.store.clone(), meta.shards.clone(), quick, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    give_slot_to(&cluster, 7);
    cluster.until("the move is over", || cluster.map.borrow().as_ref().unwrap().epoch == Epoch(3)).await;
    assert_eq!((cluster.disks[2].count(), cluster.disks[6].count()), (0, all.len()));
    let lease = Some(paused.stamp().clone());
    let request = ControlRequest::DeleteChunks { chunks: all.keys().copied().collect(), lease };
    let client = cluster.store.disks().client(cluster.disks[6].id).unwrap();
    let answer = client.control(request, Duration::from_secs(10)).await.unwrap();
    assert_eq!(answer, ControlResponse::Error(ControlError::StaleLease { current: 2 }));
}

/// The imitation of a disk node, for the table of answers.
struct Asked {
    cluster: Cluster,
    client: NodeClient,
}

impl answers::Node for Asked {
    fn client(&self) -> NodeClient {
        self.client.clone()
    }

    fn damage(&mut self, id: ChunkId, block: u32, _: &[u8]) {
        self.cluster.disks[0].damage.lock().unwrap().insert((id, block), Damage::Noticed);
    }

    async fn kill(&mut self) {
        self.cluster.kill(0).await;
        self.cluster.revive(0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_imitation_of_a_disk_node_answers_as_the_real_one() {
    let cluster = Cluster::start(1, 1, small()).await;
    let client = cluster.store.disks().client(cluster.disks[0].id).unwrap();
    answers::ask_all(&mut Asked { cluster, client }).await;
}
