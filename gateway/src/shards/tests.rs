#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::buckets::{Created, Removed};
use super::list::merge;
use super::map_watch::MapSet;
use super::memory::{Fault, MemoryPeers};
use super::{random_below, ShardError, Shards, Timing};
use crate::metrics::Metrics;
use bytes::Bytes;
use granary_meta::keys::{kind, Keys};
use granary_meta::kv::Overlay;
use granary_meta::record::{AccountId, BucketId, BucketRecord, ObjectData, ObjectMeta, ObjectRecord, VersionSeq};
use granary_meta::{Answer, Command, Conditions, ListFrom, ListItem, ObjectSummary, Query, Reply, VersionPick};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::{ClusterMap, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_wire::control::ControlError;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const OBJECT_SHARDS: usize = 5;

/// The default times, twenty times as fast.
pub(crate) const HURRY: Timing = Timing {
    deadline: Duration::from_millis(1000),
    attempt: Duration::from_millis(200),
    silence: Duration::from_millis(100),
    first_pause: Duration::from_millis(1),
    longest_pause: Duration::from_millis(50),
    settle: Duration::from_millis(150),
    recent: Duration::from_millis(50),
};

/// A valid map: 3+2, every disk with both roles, every shard on five of them.
pub(crate) fn map(disks: u32, shards: usize, epoch: u64) -> ClusterMap {
    let disk = |id: u32| NewDisk {
        uuid: DiskUuid([u8::try_from(id).unwrap(); 16]),
        address: format!("127.0.0.1:{}", 4000 + id),
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 1,
        roles: Roles { storage: true, metadata: true },
    };
    let map = new_map(NewCluster {
        cluster_id: ClusterId([7; 16]),
        disks: (1..=disks).map(disk).collect(),
        scheme_name: "3+2".into(),
        scheme: Scheme::new(3, 2, FailureDomain::Disk).unwrap(),
        object_shards: u16::try_from(shards - 1).unwrap(),
        replicas: Some(5),
        groups_per_disk: 2,
    });
    ClusterMap { epoch: Epoch(epoch), ..map.unwrap() }
}

fn cluster() -> (Arc<MemoryPeers>, Shards) {
    let peers = MemoryPeers::new(&map(5, OBJECT_SHARDS + 1, 1));
    let shards = another_gateway(&peers);
    (peers, shards)
}

/// Knows the cluster, and nothing of other gateways.
fn another_gateway(peers: &Arc<MemoryPeers>) -> Shards {
    gateway(peers, HURRY)
}

fn gateway(peers: &Arc<MemoryPeers>, timing: Timing) -> Shards {
    let known = watch::Sender::new(Some(Arc::new(map(5, OBJECT_SHARDS + 1, 1))));
    Shards::with_timing(peers.clone(), known, Metrics::new().unwrap(), timing)
}

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

/// What a listing must be, by the plainest means: all keys, folded, sorted, cut.
fn naive_list(
    keys: &BTreeSet<String>,
    prefix: &str,
    delimiter: &str,
    from: &ListFrom,
    limit: usize,
) -> (Vec<ListItem>, bool) {
    let mut items: Vec<ListItem> = Vec::new();
    for key in keys.iter().filter(|key| key.starts_with(prefix)) {
        let rest = &key[prefix.len()..];
        let folded = (!delimiter.is_empty()).then(|| rest.find(delimiter)).flatten();
        let item = match folded {
            Some(at) => ListItem::Prefix(format!("{prefix}{}", &rest[..at + delimiter.len()])),
            None => ListItem::Object(summary(key)),
        };
        let after = match from {
            ListFrom::Start => true,
            ListFrom::After(last) => key > last && item.sort_key() != last,
        };
        if after && items.last() != Some(&item) {
            items.push(item);
        }
    }
    let more = items.len() > limit;
    items.truncate(limit);
    (items, more)
}

fn summary(key: &str) -> ObjectSummary {
    ObjectSummary {
        key: key.to_owned(),
        size_bytes: 1,
        etag: String::new(),
        modified_ms: 1,
        storage_class: String::new(),
        owner: AccountId::ROOT,
        checksum: None,
    }
}

/// A small generator, so that a failing seed can be run again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

fn put_command(bucket: BucketId, key: &str) -> Command {
    let bytes = Bytes::from_static(b"1");
    let record = ObjectRecord {
        version: VersionSeq(0),
        null_version: true,
        delete_marker: false,
        modified_ms: 1,
        size_bytes: 1,
        etag: String::new(),
        part_sizes: Vec::new(),
        checksum: None,
        part_checksums: Vec::new(),
        meta: ObjectMeta::default(),
        owner: AccountId::ROOT,
        data: ObjectData::Inline { crc32: crc32fast::hash(&bytes), bytes },
    };
    let (key, missing, conditions) = (key.to_owned(), Vec::new(), Conditions::default());
    Command::PutObject { bucket, key, record, missing, map_epoch: Epoch(1), conditions, rule_epoch: 0 }
}

async fn put(shards: &Shards, bucket: BucketId, key: &str) -> Result<Reply, ShardError> {
    shards.command_for(AccountId::ROOT, bucket, key, put_command(bucket, key)).await
}

#[tokio::test]
async fn a_request_follows_the_leader_and_remembers_it() {
    let (peers, shards) = cluster();
    peers.state().leaders.insert(ShardId(2), DiskId(4));
    assert_eq!(shards.command(ShardId(2), Command::Noop).await.unwrap(), Reply::Done);
    let asked = peers.state().asked.len();
    assert!(asked <= 2, "a hint leads straight to the leader: {asked} requests");
    shards.command(ShardId(2), Command::Noop).await.unwrap();
    assert_eq!(peers.state().asked.len(), asked + 1);
    assert_eq!(shards.leader(ShardId(2)), Some(DiskId(4)));
}

#[tokio::test]
async fn a_command_whose_answer_is_lost_is_applied_once() {
    let (peers, shards) = cluster();
    // Learns who leads.
    shards.query(ShardId::ROOT, Query::ListLeases).await.unwrap();
    let faults = [
        Fault::LoseAnswer,
        Fault::LoseRequest,
        Fault::Answer(ControlError::Unavailable("election".into())),
        Fault::LoseAnswer,
    ];
    peers.state().faults.extend(faults);
    let created = shards.create_bucket("b", AccountId::ROOT).await.unwrap();
    assert!(matches!(created, Created::New(_)), "{created:?}");
    let state = peers.state();
    let ids: BTreeSet<[u8; 16]> = state.commands.iter().map(|(_, request)| request.request_id).collect();
    assert_eq!((state.commands.len(), ids.len()), (3, 1), "served three times, under one id: {:?}", state.commands);
}

#[tokio::test]
async fn a_hung_leader_that_the_others_still_name_costs_one_attempt_not_the_deadline() {
    let (peers, shards) = cluster();
    peers.state().leaders.insert(ShardId(1), DiskId(1));
    shards.command(ShardId(1), Command::Noop).await.unwrap();
    peers.state().hung.insert(DiskId(1));
    let begun = tokio::time::Instant::now();
    let moving = peers.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(225)).await;
        moving.state().leaders.insert(ShardId(1), DiskId(3));
    });
    shards.command(ShardId(1), Command::Noop).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn without_an_answer_the_deadline_ends_it_and_the_outcome_is_unknown() {
    let (peers, shards) = cluster();
    peers.state().leaders.remove(&ShardId(1));
    let begun = tokio::time::Instant::now();
    let error = shards.command(ShardId(1), Command::Noop).await.unwrap_err();
    assert!(error.outcome_unknown(), "{error}");
    assert!(
        (Duration::from_millis(750)..=Duration::from_millis(2000)).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    let asked = peers.state().asked.len();
    assert!(asked < 300, "backs off: {asked} requests");
}

#[tokio::test]
async fn a_senseless_request_is_refused_at_once() {
    let (peers, shards) = cluster();
    peers.state().faults.push_back(Fault::Answer(ControlError::BadRequest("no".into())));
    let error = shards.query(ShardId(1), Query::GetMap { newer_than: Epoch(0) }).await.unwrap_err();
    assert_eq!(error, ShardError::Refused { shard: ShardId(1), why: "no".into() });
    assert!(matches!(shards.command(ShardId(99), Command::Noop).await, Err(ShardError::NoMap(ShardId(99)))));
}

#[tokio::test]
async fn a_command_that_may_have_been_applied_is_not_called_refused_by_a_later_answer() {
    let (peers, shards) = cluster();
    // Learns who leads.
    shards.command(ShardId(1), Command::Noop).await.unwrap();
    let refusal = Fault::Answer(ControlError::BadRequest("not known to this build".into()));
    peers.state().faults.extend([Fault::LoseAnswer, refusal]);
    let error = shards.command(ShardId(1), Command::Noop).await.unwrap_err();
    assert_eq!(peers.state().commands.len(), 2);
    assert!(error.outcome_unknown(), "{error}");
}

#[tokio::test]
async fn listings_over_shards_equal_a_naive_sort() {
    let seed = random_below(u64::MAX - 1) + 1;
    println!("seed {seed}");
    listings_equal_a_naive_sort(seed).await;
    listings_equal_a_naive_sort(0x5eed).await;
}

async fn listings_equal_a_naive_sort(seed: u64) {
    let mut dice = Dice(seed);
    for _ in 0..40 {
        let (peers, shards) = cluster();
        let bucket = BucketId(9);
        let alphabet = ["a", "b", "/", ".", "é", "a/", "-"];
        let mut keys = BTreeSet::new();
        for _ in 0..dice.below(120) {
            let length = 1 + dice.below(6);
            let key: String = (0..length).map(|_| alphabet[dice.below(alphabet.len())]).collect();
            let shard = shards.shard_of(bucket, &key).unwrap();
            peers.command(shard, put_command(bucket, &key));
            keys.insert(key);
        }
        for (prefix, delimiter) in [("", ""), ("", "/"), ("a", "/"), ("a/", "/"), ("a", ""), ("", "a/"), ("zz", "/")] {
            let limit = 1 + dice.below(40);
            let mut from = match dice.below(3) {
                0 => ListFrom::After(alphabet[dice.below(alphabet.len())].repeat(2)),
                _ => ListFrom::Start,
            };
            loop {
                let page = shards
                    .list_objects(bucket, prefix, delimiter, from.clone(), u32::try_from(limit).unwrap())
                    .await
                    .unwrap();
                let (items, more) = naive_list(&keys, prefix, delimiter, &from, limit);
                assert_eq!(
                    (&page.items, page.more),
                    (&items, more),
                    "seed {seed}, {prefix:?} {delimiter:?} {from:?} {limit} of {keys:?}"
                );
                match page.items.last() {
                    Some(last) if page.more => from = ListFrom::After(last.sort_key().to_owned()),
                    _ => break,
                }
            }
        }
    }
}

#[tokio::test]
async fn a_merge_of_large_uneven_sources_reads_little_more_than_it_gives() {
    let sources: Vec<Vec<u64>> = vec![(0..50_000).collect(), (0..50_000).map(|n| n * 3).collect(), vec![], vec![7]];
    let fetched = std::sync::atomic::AtomicUsize::new(0);
    let fetch = |at: usize, after: Option<u64>, want: usize| {
        let rest: Vec<u64> = sources[at].iter().copied().filter(|n| after.is_none_or(|after| *n > after)).collect();
        fetched.fetch_add(want, std::sync::atomic::Ordering::Relaxed);
        async move { Ok::<_, ()>((rest.iter().copied().take(want).collect(), rest.len() > want)) }
    };
    let (items, more) = merge(4, 1000, |n| *n, fetch).await.unwrap();
    assert_eq!(items, (0..1000).collect::<Vec<u64>>());
    assert!(more);
    assert!(fetched.into_inner() < 4000);
}

#[tokio::test]
async fn a_listing_fails_rather_than_leave_a_shard_out() {
    let (peers, shards) = cluster();
    put(&shards, BucketId(1), "k").await.unwrap();
    peers.state().leaders.remove(&ShardId(3));
    assert!(shards.list_objects(BucketId(1), "", "", ListFrom::Start, 10).await.unwrap_err().outcome_unknown());
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

#[tokio::test]
async fn a_newer_map_is_taken_confirmed_and_offered_to_disks_that_lag() {
    let (peers, shards) = cluster();
    assert!(!*shards.confirmed().borrow());
    assert!(!shards.refresh_map().await.unwrap());
    assert!(*shards.confirmed().borrow());
    assert_eq!(shards.set_map(map(5, OBJECT_SHARDS + 1, 2)).await.unwrap(), MapSet::Done);
    assert_eq!(shards.set_map(map(5, OBJECT_SHARDS + 1, 2)).await.unwrap(), MapSet::Conflict { current: Epoch(2) });
    assert_eq!(shards.current_map().unwrap().epoch, Epoch(2));
    let all_at = |epoch| {
        let state = peers.state();
        assert!((1..=5).all(|disk| state.epochs.get(&DiskId(disk)) == Some(&Epoch(epoch))), "{:?}", state.epochs);
        state.diffs_taken
    };
    // They knew nothing, so they were told the whole; from then on what changes.
    assert_eq!(all_at(2), 0);
    let third = Command::SetMap { map: Box::new(map(5, OBJECT_SHARDS + 1, 3)) };
    assert_eq!(peers.command(ShardId::ROOT, third), Reply::Done);
    assert!(shards.refresh_map().await.unwrap());
    peers.state().epochs.insert(DiskId(4), Epoch(1));
    shards.offer_map().await;
    assert_eq!(all_at(3), 6, "two steps for the disk that lags by two");
    // One that is further behind than anybody remembers is told the whole.
    peers.state().epochs.insert(DiskId(4), Epoch(0));
    shards.offer_map().await;
    assert_eq!(all_at(3), 6);
}

#[tokio::test]
async fn a_map_given_at_start_gives_way_to_the_root_shards_whatever_its_epoch() {
    for epoch in [1, 2, 9] {
        let (peers, _) = cluster();
        let next = Command::SetMap { map: Box::new(map(5, OBJECT_SHARDS + 1, 2)) };
        assert_eq!(peers.command(ShardId::ROOT, next), Reply::Done);
        // What the file at hand says of a disk is not so.
        let mut given = map(5, OBJECT_SHARDS + 1, epoch);
        given.disks.get_mut(&DiskId(3)).unwrap().weight += 7;
        let shards = Shards::with_timing(
            peers.clone(),
            watch::Sender::new(Some(Arc::new(given))),
            Metrics::new().unwrap(),
            HURRY,
        );
        assert!(shards.refresh_map().await.unwrap());
        assert_eq!(*shards.current_map().unwrap(), map(5, OBJECT_SHARDS + 1, 2), "epoch {epoch}");
        // And what is new is a difference to that.
        let mut third = map(5, OBJECT_SHARDS + 1, 3);
        third.disks.get_mut(&DiskId(2)).unwrap().weight += 1;
        assert_eq!(peers.command(ShardId::ROOT, Command::SetMap { map: Box::new(third.clone()) }), Reply::Done);
        assert!(shards.refresh_map().await.unwrap());
        assert_eq!(*shards.current_map().unwrap(), third);
        assert!(!shards.refresh_map().await.unwrap());
    }
}

#[tokio::test]
async fn a_map_of_another_cluster_is_never_confirmed() {
    let (peers, _) = cluster();
    let given = ClusterMap { cluster_id: ClusterId([9; 16]), ..map(5, OBJECT_SHARDS + 1, 1) };
    let known = watch::Sender::new(Some(Arc::new(given.clone())));
    let shards = Shards::with_timing(peers, known, Metrics::new().unwrap(), HURRY);
    assert!(shards.refresh_map().await.is_err());
    assert!(!*shards.confirmed().borrow());
    assert_eq!(*shards.current_map().unwrap(), given);
}

#[tokio::test]
async fn a_clock_that_is_off_is_a_certain_refusal_unless_an_attempt_is_in_doubt() {
    let (peers, shards) = cluster();
    let off = || Fault::Answer(ControlError::ClockOff { ahead_ms: 3_600_000 });
    peers.state().faults.push_back(off());
    let error = shards.command(ShardId(1), Command::Noop).await.unwrap_err();
    assert_eq!(error, ShardError::ClockOff { shard: ShardId(1), ahead_ms: 3_600_000 });
    assert!(!error.outcome_unknown() && peers.state().commands.is_empty());
    // Tried again, as everything after an attempt that may have been taken.
    peers.state().faults.extend([Fault::LoseRequest, off()]);
    assert_eq!(shards.command(ShardId(1), Command::Noop).await.unwrap(), Reply::Done);
}

#[tokio::test]
async fn every_attempt_has_a_stamp_of_its_own_and_the_time_of_the_first() {
    let (peers, shards) = cluster();
    shards.query(ShardId::ROOT, Query::ListLeases).await.unwrap();
    peers.state().faults.extend([Fault::LoseAnswer]);
    shards.create_bucket("b", AccountId::ROOT).await.unwrap();
    let state = peers.state();
    let [(_, first), (_, second)] = &state.commands[..] else { panic!("{:?}", state.commands) };
    assert_eq!((first.request_id, first.now_ms), (second.request_id, second.now_ms));
    assert!(first.stamp_ms < second.stamp_ms, "{:?} {:?}", first.stamp_ms, second.stamp_ms);
}

#[tokio::test]
async fn a_refusal_after_an_attempt_in_doubt_leaves_the_outcome_unknown() {
    let (peers, shards) = cluster();
    let bucket = BucketId(7);
    let put = put_command(bucket, "k");
    let shard = shards.shard_of(bucket, "k").unwrap();
    // What the shard says of a bucket that is fenced is certain by itself.
    assert_eq!(peers.command(shard, Command::FenceBucket { bucket, attempt: 1 }), Reply::Fenced { empty: true });
    let refused = shards.command(shard, put.clone()).await;
    assert!(refused.as_ref().is_ok_and(|reply| !reply.is_success()), "{refused:?}");
    // So it is when an attempt before found no connection: that one was not sent.
    peers.state().faults.push_back(Fault::NoConnection);
    let refused = shards.command(shard, put.clone()).await;
    assert!(refused.as_ref().is_ok_and(|reply| !reply.is_success()), "{refused:?}");
    // After an attempt that may have been applied it says nothing of that attempt.
    peers.state().faults.push_back(Fault::LoseRequest);
    let refused = shards.command(shard, put).await.unwrap_err();
    assert!(refused.outcome_unknown(), "{refused:?}");
}
