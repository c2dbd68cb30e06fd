use super::client::{Ask, Scene};
use granary_meta::{Command, Query, Reply};
use granary_placement::id::{Epoch, ShardId};
use granary_placement::lease::LeaseStamp;
use granary_placement::map::ClusterMap;

/// Makes a map of epoch 2 behind the gateways' backs, and has all shards require it.
fn next_map(scene: &Scene, change: impl FnOnce(&mut ClusterMap)) {
    let peers = &scene.cluster.peers;
    let granary_meta::Answer::Map(mut next) = peers.query(ShardId::ROOT, &Query::GetMap { newer_than: Epoch(0) })
    else {
        panic!()
    };
    next.epoch = Epoch(2);
    change(&mut next);
    let shards = next.object_shards();
    assert_eq!(peers.command(ShardId::ROOT, Command::SetMap { map: next }), Reply::Done);
    for shard in (1..=shards).map(ShardId) {
        let lease = LeaseStamp { task: "heal".to_owned(), epoch: 1 };
        assert_eq!(peers.command(shard, Command::RequireMap { epoch: Epoch(2), lease }), Reply::Done);
    }
}

/// The epochs of the maps that payloads were held against, and whether each write had a request id of its own.
fn map_epochs(scene: &Scene) -> (Vec<u64>, bool) {
    let (mut epochs, mut ids) = (Vec::new(), std::collections::BTreeSet::new());
    for request in scene.cluster.take_commands() {
        if let Command::PutObject { map_epoch, .. } | Command::PutPart { map_epoch, .. } = &request.command {
            epochs.push(map_epoch.0);
            ids.insert(request.request_id);
        }
    }
    let alone = ids.len() == epochs.len();
    (epochs, alone)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_with_an_old_map_holds_payloads_against_the_new_one_and_writes() {
    let scene = Scene::new().await;
    next_map(&scene, |next| next.disks.values_mut().for_each(|disk| disk.weight += 1));
    scene.cluster.take_commands();
    let body = vec![3u8; 100_000];
    scene.put("k", &body).await;
    assert_eq!(map_epochs(&scene), (vec![1, 2], true), "refused, held against the newest and sent again");
    let upload = scene.ask(Ask::new("POST", "/bucket/u").query("uploads", "")).await.ok().one("UploadId");
    let part = Ask::new("PUT", "/bucket/u").query("uploadId", &upload).query("partNumber", "1").body(body.clone());
    scene.ask(part).await.ok();
    assert_eq!(map_epochs(&scene), (vec![1, 2], true));
    scene.put("inline", b"on no disk").await;
    assert_eq!(map_epochs(&scene).0.len(), 1, "on no disk, so no map matters");
    assert_eq!(scene.cluster.dropped_chunks(), 0);
    assert!(scene.get("k").await.ok().body == body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_moves_left_without_a_spare_is_refused_and_leaves_nothing() {
    let scene = Scene::new().await;
    // A slot of every group of 2+1 goes to the disk that has none of its slots.
    next_map(&scene, |next| {
        let disks: Vec<_> = next.disks.keys().copied().collect();
        for group in next.groups.values_mut().filter(|group| group.slots.len() == 3) {
            let free = |disk: &&_| group.slots.iter().all(|slot| slot.current != **disk);
            let to = *disks.iter().find(free).unwrap();
            group.slots[0].give_to(to);
        }
    });
    scene.ask(Ask::new("PUT", "/bucket/k").body(vec![3u8; 100_000])).await.expect(503, "ServiceUnavailable");
    scene.cluster.until_chunks(0).await;
    assert_eq!((scene.cluster.object_count().await, scene.cluster.dropped_chunks()), (0, 3));
}
