use crate::cluster::{seed, Cluster};
use crate::heal::{fill, settings, small};
use crate::meta::Meta;
use granary_gateway::background::heal::{HealSettings, Healer};
use granary_meta::{Command, Reply};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::DiskState;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_the_level_of_the_release_a_dead_disk_stays_and_it_is_said_why() {
    let mut draw = seed("below_the_level_of_the_release_a_dead_disk_stays_and_it_is_said_why");
    let cluster = Cluster::with_disks(4, 2, 8, small()).await;
    let meta = Meta::of(&cluster);
    let objects = fill(&cluster, &meta, &mut draw).await;
    let quick =
        HealSettings { out_after: Duration::from_secs(1), well_after: Duration::from_millis(400), ..settings() };
    let stop = CancellationToken::new();
    let healer =
        Healer::start(cluster.store.clone(), meta.shards.clone(), watch::channel(quick).1, String::new(), stop.clone());
    let _stop = stop.drop_guard();
    let dead = DiskId(3);
    cluster.kill(2).await;
    cluster.disks.iter().for_each(|disk| disk.unreached.lock().unwrap().extend([dead]));
    let said = || {
        let dead_disks = healer.status().dead_disks;
        dead_disks.iter().any(|row| row.disk == dead && row.stays.as_ref().is_some_and(|why| why.contains("--raise")))
    };
    cluster.until("it is said what keeps it in service", said).await;
    let state = || cluster.shards.current_map().unwrap().disk(dead).unwrap().state;
    assert_eq!(state(), DiskState::In);
    assert_eq!(cluster.peers.command(ShardId::ROOT, Command::SetFeatureLevel { level: 2 }), Reply::Done);
    cluster.until("it goes out", || state() == DiskState::Away).await;
    let map = || cluster.shards.current_map().unwrap();
    let moving = || map().groups.values().flat_map(|group| &group.slots).any(|slot| slot.previous.is_some());
    cluster.until("what it held is on others", || !moving()).await;
    assert!(healer.census(|_| {}).await.unwrap().is_complete());
    for (data, payload) in &objects {
        cluster.check(data, payload, 0..payload.len() as u64).await;
    }
}
