use super::super::buckets::{Created, Removed};
use super::super::memory::MemoryPeers;
use super::super::{Shards, Timing};
use super::{another_gateway, cluster, gateway, map, put, put_command, HURRY, OBJECT_SHARDS};
use granary_meta::keys::{kind, Keys};
use granary_meta::kv::Overlay;
use granary_meta::record::{AccountId, BucketId, BucketRecord};
use granary_meta::{Answer, Command, Conditions, ListFrom, Query, Reply, VersionPick};
use granary_placement::id::ShardId;
use std::time::Duration;

/// How many shards have a fence around the bucket up.
fn fences(peers: &MemoryPeers, bucket: BucketId) -> usize {
    let query = Query::ListObjects { bucket, prefix: "".into(), delimiter: "".into(), from: ListFrom::Start, limit: 1 };
    let fenced = |shard| peers.query(ShardId(shard), &query) == Answer::BucketFenced;
    (1..).take(OBJECT_SHARDS).filter(|shard| fenced(*shard)).count()
}

/// Objects of all buckets in a shard, those in fenced buckets too.
fn objects_in(peers: &MemoryPeers, shard: ShardId) -> usize {
    let mut state = peers.state();
    let range = Keys::new(shard).kind_range(kind::OBJECT);
    Overlay::new(&state.shards.shard(shard).unwrap().kv).scan(&range.from, &range.to, 1000).unwrap().len()
}

/// The bucket `b` as the root shard has it.
fn bucket_b(peers: &MemoryPeers) -> Option<BucketRecord> {
    match peers.query(ShardId::ROOT, &Query::GetBucket { name: "b".into() }) {
        Answer::Bucket(bucket) => Some(bucket),
        Answer::NoSuchBucket => None,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_bucket_is_deleted_only_when_empty_and_its_name_is_free_again_under_a_new_id() {
    let (peers, shards) = cluster();
    let Created::New(bucket) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
    put(&shards, bucket.id, "k").await.unwrap();
    assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::NotEmpty);
    assert_eq!(fences(&peers, bucket.id), 0);
    assert!(put(&shards, bucket.id, "k2").await.unwrap().is_success());

    for key in ["k", "k2"] {
        let (version, conditions) = (VersionPick::Current, Conditions::default());
        let delete = Command::DeleteObject { bucket: bucket.id, key: key.into(), version, conditions, rule_epoch: 0 };
        assert!(shards.command_for(AccountId::ROOT, bucket.id, key, delete).await.unwrap().is_success());
    }
    assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::Done);
    assert_eq!(put(&shards, bucket.id, "k3").await.unwrap(), Reply::BucketFenced);
    assert_eq!(shards.get_bucket("b").await.unwrap(), None);
    assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::NoSuchBucket);
    let Created::New(again) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
    assert_ne!(again.id, bucket.id);
}

#[tokio::test]
async fn a_name_without_a_bucket_is_asked_for_once_in_a_while_and_a_bucket_made_here_is_seen_at_once() {
    let peers = MemoryPeers::new(&map(5, OBJECT_SHARDS + 1, 1));
    let [one, other] = [(); 2].map(|()| gateway(&peers, Timing { recent: Duration::from_secs(3600), ..HURRY }));
    let forgetful = gateway(&peers, Timing { recent: Duration::ZERO, ..HURRY });
    for gateway in [&one, &other] {
        assert_eq!(gateway.get_bucket("b").await.unwrap(), None);
        let asked = peers.state().asked.len();
        for _ in 0..100 {
            assert_eq!(gateway.get_bucket("b").await.unwrap(), None);
            assert_eq!(gateway.recent_bucket("b").await.unwrap(), None);
        }
        assert_eq!(peers.state().asked.len(), asked);
    }
    assert_eq!(forgetful.get_bucket("b").await.unwrap(), None);
    let Created::New(made) = one.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
    assert_eq!(one.get_bucket("b").await.unwrap(), Some(made.clone()));
    assert_eq!(other.get_bucket("b").await.unwrap(), None, "for a moment");
    assert_eq!(forgetful.get_bucket("b").await.unwrap(), Some(made.clone()), "when the moment is over");
    assert_eq!(other.fresh_bucket("b").await.unwrap(), Some(made.clone()), "at once when it matters");
    // Another's bucket that was looked up a moment ago is not looked up again, later it is.
    let asked = peers.state().asked.len();
    assert_eq!(other.recent_bucket("b").await.unwrap(), Some(made.clone()));
    assert_eq!(peers.state().asked.len(), asked);
    assert_eq!(forgetful.recent_bucket("b").await.unwrap(), Some(made));
    assert!(peers.state().asked.len() > asked);
}

#[tokio::test]
async fn a_deletion_that_was_broken_off_is_finished_by_the_next_one_or_by_create() {
    for finish_by_create in [false, true] {
        let (peers, shards) = cluster();
        let Created::New(bucket) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
        shards
            .command(ShardId::ROOT, Command::BeginDeleteBucket { name: "b".into(), bucket: bucket.id })
            .await
            .unwrap();
        shards.command(ShardId(2), Command::FenceBucket { bucket: bucket.id, attempt: 1 }).await.unwrap();
        // Meanwhile it is neither gone nor there.
        assert!(shards.fresh_bucket("b").await.unwrap().unwrap().deleting);
        if finish_by_create {
            let Created::New(again) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
            assert_ne!(again.id, bucket.id);
        } else {
            assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::Done);
        }
        assert_eq!(fences(&peers, bucket.id), OBJECT_SHARDS);
    }
}

async fn begin_delete(shards: &Shards, name: &str, bucket: BucketId) -> u64 {
    let begin = Command::BeginDeleteBucket { name: name.into(), bucket };
    match shards.command(ShardId::ROOT, begin).await.unwrap() {
        Reply::Bucket(marked) => marked.delete_attempt,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_late_unfence_of_one_deletion_leaves_the_fences_of_the_next() {
    let (peers, shards) = cluster();
    let Created::New(bucket) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
    let attempt = begin_delete(&another_gateway(&peers), "b", bucket.id).await;
    let shard = shards.shard_of(bucket.id, "k").unwrap();
    peers.state().before_end =
        vec![(shard, Command::UnfenceBucket { bucket: bucket.id, attempt }), (shard, put_command(bucket.id, "k"))];
    assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::Done);
    assert_eq!(objects_in(&peers, shard), 0, "an acknowledged object lies in a deleted bucket");
    assert_eq!(fences(&peers, bucket.id), OBJECT_SHARDS);
}

#[tokio::test]
async fn a_deletion_that_was_taken_over_does_not_remove_what_the_other_found_not_empty() {
    let (peers, shards) = cluster();
    let Created::New(bucket) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
    let id = bucket.id;
    let shard = shards.shard_of(id, "k").unwrap();
    // The other one took the fences off, where a PUT comes in at once, and ends before this one does.
    peers.state().before_end = vec![
        (ShardId::ROOT, Command::BeginDeleteBucket { name: "b".into(), bucket: id }),
        (shard, Command::UnfenceBucket { bucket: id, attempt: 2 }),
        (shard, put_command(id, "k")),
        (ShardId::ROOT, Command::EndDeleteBucket { name: "b".into(), bucket: id, attempt: 2, remove: false }),
    ];
    assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::NotEmpty);
    assert_eq!(objects_in(&peers, shard), 1);
    assert_eq!(bucket_b(&peers), Some(BucketRecord { delete_attempt: 2, ..bucket }));
}

#[tokio::test]
async fn a_deletion_that_was_taken_over_goes_on_when_the_other_is_broken_off() {
    let (peers, shards) = cluster();
    let Created::New(bucket) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
    peers.state().before_end = vec![
        (ShardId::ROOT, Command::BeginDeleteBucket { name: "b".into(), bucket: bucket.id }),
        (ShardId(2), Command::FenceBucket { bucket: bucket.id, attempt: 2 }),
    ];
    assert_eq!(shards.delete_bucket("b", AccountId::ROOT).await.unwrap(), Removed::Done);
    let removals: Vec<u64> = peers
        .state()
        .commands
        .iter()
        .filter_map(|(_, request)| match &request.command {
            Command::EndDeleteBucket { attempt, remove: true, .. } => Some(*attempt),
            _ => None,
        })
        .collect();
    assert_eq!(removals, [1, 3], "the attempt that was taken over, and a third");
    assert_eq!((bucket_b(&peers), fences(&peers, bucket.id)), (None, OBJECT_SHARDS));
}

#[tokio::test]
async fn of_deletions_by_several_gateways_one_removes_the_bucket() {
    for _ in 0..50 {
        let (peers, shards) = cluster();
        shards.create_bucket("b", AccountId::ROOT).await.unwrap();
        let deletes = (0..3).map(|_| {
            let gateway = another_gateway(&peers);
            async move { gateway.delete_bucket("b", AccountId::ROOT).await.unwrap() }
        });
        let mut removed = futures::future::join_all(deletes).await;
        removed.sort_by_key(|removed| *removed != Removed::Done);
        assert_eq!(removed, [Removed::Done, Removed::NoSuchBucket, Removed::NoSuchBucket]);
    }
}

#[tokio::test]
async fn no_acknowledged_put_is_lost_in_a_race_with_deletions() {
    for round in 0..200 {
        let (peers, shards) = cluster();
        let Created::New(bucket) = shards.create_bucket("b", AccountId::ROOT).await.unwrap() else { panic!() };
        let puts = (0..3).map(|n| {
            let shards = shards.clone();
            tokio::spawn(async move { put(&shards, bucket.id, &format!("key{round}-{n}")).await.unwrap() })
        });
        // Two in one gateway, which take turns, and one in another.
        let deletes = [shards.clone(), shards.clone(), another_gateway(&peers)]
            .into_iter()
            .map(|shards| tokio::spawn(async move { shards.delete_bucket("b", AccountId::ROOT).await.unwrap() }));
        let (puts, deletes): (Vec<_>, Vec<_>) = (puts.collect(), deletes.collect());
        let puts = futures::future::try_join_all(puts).await.unwrap();
        let deletes = futures::future::try_join_all(deletes).await.unwrap();
        let stored = puts.iter().filter(|reply| reply.is_success()).count();
        let gone = bucket_b(&peers).is_none();
        assert_eq!(
            deletes.iter().filter(|removed| **removed == Removed::Done).count(),
            usize::from(gone),
            "{deletes:?}"
        );
        assert!(!gone || stored == 0, "round {round}: {stored} acknowledged puts in a deleted bucket");
        assert!(gone || fences(&peers, bucket.id) == 0, "round {round}: a living bucket keeps a fence");
    }
}
