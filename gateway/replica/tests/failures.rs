//! A panic in a replica's Raft ends that replica: it answers nothing, the other shards of its disk go on, and it comes
//! back from its log.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use bytes::Bytes;
use granary_meta::record::BucketId;
use granary_meta::{Answer, Query, VersionPick};
use granary_placement::id::{DiskId, ShardId};
use granary_replica::fatal::Fatal;
use granary_replica::message::{
    decode_message, encode_message, AppliedState, PeerMessage, PeerRequest, PeerResponse, ReplicaId, WireEntry,
    WireLogId, WireMembership, WirePayload, WireVote,
};
use granary_replica::raft::containment::note_panic;
use granary_replica::raft::members::{out_of_service, Phase};
use granary_replica::store::StateDb;
use granary_replica::{snapshot, MetaHost, Space};
use granary_wire::control::{ControlError, ShardStatus};
use scenery::cluster::{disk, noop, Cluster};
use scenery::Random;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

const SHARD: ShardId = ShardId(1);
const BESIDE: ShardId = ShardId(2);
const PATIENCE: Duration = Duration::from_secs(40);
const ALL: [u32; 3] = [1, 2, 3];

/// Panics that would have ended the process: the disk node's hook asks the same.
static OF_NOBODY: AtomicU64 = AtomicU64::new(0);

fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let is_a_replicas = note_panic(panic);
            report(panic);
            if !is_a_replicas {
                OF_NOBODY.fetch_add(1, Ordering::SeqCst);
            }
        }));
    });
}

fn get(key: &str) -> Query {
    Query::GetObject { bucket: BucketId(1), key: key.to_owned(), version: VersionPick::Current }
}

fn status(host: &MetaHost, shard: ShardId) -> ShardStatus {
    let known = host.status().into_iter().find(|status| status.shard == shard);
    known.unwrap_or_else(|| out_of_service(shard, Phase::Stopped))
}

fn runs(host: &MetaHost, shard: ShardId) -> bool {
    ["leader", "follower"].contains(&status(host, shard).state.as_str())
}

async fn eventually(what: &str, cluster: &Cluster, look: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < until, "{what}: {:?}", cluster.statuses());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What the host answers to a message of that replica.
async fn say(
    host: &MetaHost,
    from: ReplicaId,
    to: Option<ReplicaId>,
    request: PeerRequest,
) -> Result<PeerResponse, ControlError> {
    let message = encode_message(&PeerMessage { from, to, request }).unwrap();
    host.raft(SHARD, from.disk, message).await.map(|answer| decode_message(&answer).unwrap())
}

fn stranger(disk: u32) -> ReplicaId {
    ReplicaId { disk: DiskId(disk), incarnation: 9 }
}

async fn identity(host: &MetaHost) -> ReplicaId {
    match say(host, stranger(9), None, PeerRequest::Identify).await.unwrap() {
        PeerResponse::Identity { me, .. } => me,
        other => panic!("{other:?}"),
    }
}

/// A snapshot of this shard, in one piece, from the leader of that term: it was applied as far as `last`, and its
/// members are as of the first entry.
fn snapshot_piece(from: ReplicaId, term: u64, last: WireLogId, configs: Vec<Vec<ReplicaId>>) -> PeerRequest {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDb::open(&dir.path().join("state"), Fatal::new(Arc::new(|why| panic!("{why}")))).unwrap();
    let membership_at = Some(if last.index == 0 { last } else { WireLogId { term: 0, node: from, index: 0 } });
    let membership = WireMembership { configs, nodes: vec![from] };
    let applied = AppliedState { last: Some(last), membership_at, membership };
    let key = granary_meta::keys::Keys::new(SHARD).single(granary_meta::keys::kind::APPLIED);
    let writes = [(key, Some(granary_meta::codec::encode(&applied).unwrap()))].into_iter().collect();
    state.write(SHARD, writes, Some(last.index)).unwrap();
    let file = dir.path().join("snapshot");
    snapshot::write_file(&state, SHARD, &file, &Space::without_reserve()).unwrap();
    PeerRequest::SnapshotPiece {
        vote: WireVote { term, node: from, committed: true },
        transfer: 1,
        offset: 0,
        data: Bytes::from(std::fs::read(&file).unwrap()),
        last: true,
    }
}

/// A snapshot that contradicts what was committed here: it ends in the first entry, which another leader wrote.
/// openraft asserts that none does.
async fn say_what_cannot_be(host: &MetaHost, from: ReplicaId, term: u64) -> Result<PeerResponse, ControlError> {
    let me = identity(host).await;
    let first = WireLogId { term, node: from, index: 0 };
    say(host, from, Some(me), snapshot_piece(from, term, first, vec![vec![from]])).await
}

/// Everything that can be asked of a replica. The votes are of a term that is long over: should it run again already,
/// it believes nothing that was never said.
async fn ask_everything(host: &MetaHost, me: ReplicaId, from: ReplicaId) -> Vec<(&'static str, Option<ControlError>)> {
    let vote = WireVote { term: 0, node: from, committed: false };
    let (last, transfer) = (None, false);
    let mut answers = vec![
        ("command", host.command(SHARD, noop(&mut Random(1))).await.err()),
        ("query", host.query(SHARD, get("acked-0")).await.err()),
    ];
    let requests = [
        ("vote", PeerRequest::Vote { vote, last, transfer, pre_vote: false }),
        ("pre-vote", PeerRequest::Vote { vote, last, transfer, pre_vote: true }),
        (
            "append",
            PeerRequest::Append {
                vote: WireVote { committed: true, ..vote },
                previous: None,
                entries: Vec::new(),
                committed: None,
            },
        ),
        ("members", PeerRequest::Members),
        ("identity", PeerRequest::Identify),
        ("rebuild", PeerRequest::Rebuild),
    ];
    for (name, request) in requests {
        answers.push((name, say(host, from, Some(me), request).await.err()));
    }
    answers
}

/// Three disks with two shards, and some acknowledged writes.
async fn scene() -> Cluster {
    watch_panics();
    let cluster = Cluster::new();
    cluster.start_all(&ALL).await;
    cluster.init(SHARD, &ALL).await;
    cluster.init(BESIDE, &ALL).await;
    let mut random = Random(41);
    for i in 0..5 {
        cluster.put(&mut random, SHARD, &format!("acked-{i}"), b"x").await;
    }
    cluster.same_state(SHARD, &ALL).await;
    cluster.same_state(BESIDE, &ALL).await;
    cluster
}

/// Fails the replica on `at` by `fail`, and shows what is promised of it. The other shard takes writes all the while.
async fn fails_alone<F: Future<Output = ()>>(cluster: &Arc<Cluster>, at: u32, fail: impl Fn() -> F) {
    let host = cluster.host(at);
    let me = identity(&host).await;
    let from = identity(&cluster.host(at % 3 + 1)).await;
    let (stop, beside) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
    let writer = {
        let (cluster, stop, beside) = (cluster.clone(), stop.clone(), beside.clone());
        tokio::spawn(async move {
            let mut random = Random(42);
            while !stop.load(Ordering::SeqCst) {
                let key = format!("beside-{}", random.below(50));
                cluster.put(&mut random, BESIDE, &key, b"x").await;
                assert!(runs(&cluster.host(at), BESIDE), "{:?}", cluster.statuses());
                beside.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    // The pause must not have ended before the last of the questions: otherwise once more, with a longer one.
    let mut failures = 0;
    loop {
        fail().await;
        failures += 1;
        eventually("it fails", cluster, || host.counters().replica_failures >= failures).await;
        let answers = ask_everything(&host, me, from).await;
        let (failed, stopped) = (status(&host, SHARD).state == "failed", host.counters().replicas_stopped);
        let during = beside.load(Ordering::SeqCst);
        eventually("the other shard goes on", cluster, || beside.load(Ordering::SeqCst) > during + 3).await;
        eventually("it comes back", cluster, || runs(&host, SHARD)).await;
        if failed {
            for (what, answer) in answers {
                assert!(matches!(answer, Some(ControlError::Unavailable(_))), "a ghost answers a {what}: {answer:?}");
            }
            assert_eq!(stopped, 1);
            break;
        }
        assert!(failures < 7, "no pause was long enough");
    }
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    let mut random = Random(43);
    cluster.put(&mut random, SHARD, "after", b"y").await;
    for i in 0..5 {
        let answer = cluster.query(SHARD, &get(&format!("acked-{i}"))).await;
        assert!(matches!(answer, Answer::Object(_)), "{answer:?}");
    }
    for shard in [SHARD, BESIDE] {
        cluster.same_state(shard, &ALL).await;
    }
    assert_eq!(identity(&host).await, me, "it came back as another");
    assert_eq!((host.counters().replica_failures, host.counters().replicas_rebuilt), (failures, 0));
    assert_eq!(*cluster.fatal.lock().unwrap(), Vec::<String>::new());
    assert_eq!(OF_NOBODY.load(Ordering::SeqCst), 0, "a panic was outside of every replica");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_replication_panics_is_no_ghost() {
    let cluster = Arc::new(scene().await);
    let leader = cluster.leader(SHARD).await;
    let shared = cluster.clone();
    let fail = || {
        let cluster = shared.clone();
        async move {
            // It sends when it leads, or stands for election.
            cluster.network.plant_panic(leader, SHARD);
            let mut random = Random(44);
            while cluster.network.is_planted(leader, SHARD) {
                let ask_to_lead = cluster.leader(SHARD).await;
                if ask_to_lead == leader {
                    cluster.put(&mut random, SHARD, "more", b"x").await;
                } else {
                    cluster.network.isolate(leader, &[disk(1), disk(2), disk(3)]);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            cluster.network.heal();
        }
    };
    fails_alone(&cluster, leader.0, fail).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_assertion_of_openraft_ends_one_replica_and_it_comes_back() {
    for as_leader in [true, false] {
        let cluster = Arc::new(scene().await);
        let leader = cluster.leader(SHARD).await.0;
        let at = if as_leader { leader } else { leader % 3 + 1 };
        let host = cluster.host(at);
        let from = identity(&cluster.host(at % 3 + 1)).await;
        let fail = || async {
            let answer = say_what_cannot_be(&host, from, status(&host, SHARD).term + 1).await;
            let Err(ControlError::Unavailable(why)) = &answer else { panic!("it took what cannot be: {answer:?}") };
            assert!(why.starts_with("a panic at ") && why.contains("contradicts locally committed logs"), "{why}");
        };
        fails_alone(&cluster, at, fail).await;
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vote_is_not_given_twice_across_a_failure() {
    watch_panics();
    let cluster = Cluster::new();
    let host = cluster.start(1).await;
    cluster.name(SHARD, &ALL);
    let me = identity(&host).await;
    let first = WireLogId { term: 1, node: stranger(3), index: 0 };
    let vote = |from, last| PeerRequest::Vote {
        vote: WireVote { term: 5, node: from, committed: false },
        last,
        transfer: false,
        pre_vote: false,
    };
    let voted = say(&host, stranger(3), Some(me), vote(stranger(3), None)).await.unwrap();
    assert!(matches!(voted, PeerResponse::Voted { granted: true, .. }), "{voted:?}");
    let append = PeerRequest::Append {
        vote: WireVote { term: 5, node: stranger(3), committed: true },
        previous: None,
        entries: vec![WireEntry { id: first, payload: WirePayload::Blank }],
        committed: Some(first),
    };
    assert_eq!(say(&host, stranger(3), Some(me), append).await.unwrap(), PeerResponse::Appended);
    let failed = say_what_cannot_be(&host, stranger(3), 5).await;
    assert!(failed.is_err(), "{failed:?}");
    eventually("it fails", &cluster, || host.counters().replica_failures == 1).await;
    let is_back = || !["failed", "stopped"].contains(&status(&host, SHARD).state.as_str());
    eventually("it comes back", &cluster, is_back).await;
    let again = say(&host, stranger(2), Some(me), vote(stranger(2), Some(first))).await.unwrap();
    assert!(matches!(again, PeerResponse::Voted { granted: false, .. }), "two candidates got this vote: {again:?}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_no_replica_has_is_refused_and_ends_nothing() {
    let cluster = scene().await;
    let at = cluster.leader(SHARD).await.0;
    let host = cluster.host(at);
    let (me, from) = (identity(&host).await, identity(&cluster.host(at % 3 + 1)).await);
    let term = status(&host, SHARD).term;
    let end = |term, index| WireLogId { term, node: from, index };
    for (what, last, configs) in [
        ("after its leader's term", end(term + 1, 1_000_000), vec![vec![from]]),
        ("at no index", end(term, u64::MAX), vec![vec![from]]),
        ("without voters", end(term, 1_000_000), Vec::new()),
    ] {
        let answer = say(&host, from, Some(me), snapshot_piece(from, term, last, configs)).await;
        assert!(matches!(answer, Ok(PeerResponse::Failed(_))), "a snapshot {what}: {answer:?}");
    }
    // Nothing of it was believed, not even its term, and no file is left.
    assert_eq!((status(&host, SHARD).term, host.counters().replica_failures), (term, 0));
    assert_eq!(std::fs::read_dir(cluster.path(at).join("snapshots")).unwrap().count(), 0);
    let mut random = Random(45);
    cluster.put(&mut random, SHARD, "after", b"y").await;
    cluster.same_state(SHARD, &ALL).await;
    assert_eq!(OF_NOBODY.load(Ordering::SeqCst), 0, "a panic was outside of every replica");
    cluster.stop_all().await;
}
