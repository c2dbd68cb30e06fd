//! What is on disk when: crashes without a flush, corruption of the log, votes, interrupted snapshot installs.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;
mod synced;

use granary_meta::apply::apply;
use granary_meta::kv::{Kv, Overlay};
use granary_meta::record::{BucketId, ObjectData};
use granary_meta::{Answer, Query, VersionPick};
use granary_placement::id::{DiskId, ShardId};
use granary_replica::fatal::Fatal;
use granary_replica::message::{
    decode_message, encode_message, PeerMessage, PeerRequest, PeerResponse, ReplicaId, WireVote,
};
use granary_replica::snapshot;
use granary_replica::store::{Buffers, LogDb, LogWrite, StateDb};
use granary_replica::Space;
use granary_wire::control::ControlError;
use scenery::cluster::Cluster;
use scenery::{put, request, Random};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use synced::{copy_what_was_synced, Keep};

const SHARD: ShardId = ShardId(1);

fn get(key: &str) -> Query {
    Query::GetObject { bucket: BucketId(1), key: key.to_owned(), version: VersionPick::Current }
}

fn no_fatal() -> Fatal {
    Fatal::new(Arc::new(|why| panic!("{why}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_without_a_flush_replays_the_log_to_the_same_state() {
    let seed = scenery::seed("a_crash_without_a_flush_replays_the_log_to_the_same_state");
    let mut random = Random(seed);
    let mut cluster = Cluster::new();
    // Some runs crash before the first snapshot, some after several purges.
    cluster.timing.snapshot_entries = 20 + random.below(380);
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    cluster.leader(SHARD).await;
    for i in 0..300u64 {
        let key = format!("key-{}", random.below(40));
        cluster.put(&mut random, SHARD, &key, &i.to_be_bytes()).await;
    }
    // A crash right after a flush loses nothing and would show nothing: go on until the copy lacks something.
    let mut applied;
    let mut tries = 0;
    loop {
        cluster.same_state(SHARD, &[1]).await;
        applied = cluster.host(1).status()[0].applied_index;
        // The memtables are lost, and so are bytes that were written and not synced.
        copy_what_was_synced(&cluster.path(1), &cluster.path(2));
        let at = {
            let crashed = StateDb::open(&cluster.path(2).join("state"), no_fatal()).unwrap();
            snapshot::applied_state(&crashed, SHARD).unwrap().last.map_or(0, |last| last.index)
        };
        println!("state on disk at {at}, applied before the crash {applied}");
        std::fs::remove_dir_all(cluster.path(2)).unwrap();
        copy_what_was_synced(&cluster.path(1), &cluster.path(2));
        if at < applied {
            break;
        }
        tries += 1;
        assert!(tries < 20, "every crash lost nothing, so the test shows nothing");
        std::fs::remove_dir_all(cluster.path(2)).unwrap();
        cluster.put(&mut random, SHARD, "more", b"x").await;
    }
    cluster.stop_all().await;
    let before = contents(&cluster.path(1));
    std::fs::remove_dir_all(cluster.path(1)).unwrap();
    std::fs::rename(cluster.path(2), cluster.path(1)).unwrap();
    let host = cluster.start(1).await;
    let until = Instant::now() + Duration::from_secs(10);
    while host.status()[0].applied_index <= applied {
        assert!(Instant::now() < until, "{:?}", host.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(host);
    cluster.stop_all().await;
    assert!(contents(&cluster.path(1)) == before, "the replayed state differs");
}

/// Everything a stopped disk holds of the shard, beside how far it is applied: a new leadership adds a blank entry
/// there.
fn contents(dir: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let state = StateDb::open(&dir.join("state"), no_fatal()).unwrap();
    let range = granary_meta::keys::Keys::new(SHARD).shard_range();
    let mut cursor = state.cursor(&range.to);
    cursor.seek(&range.from).unwrap();
    let mut all = Vec::new();
    while let Some((key, value)) = cursor.entry() {
        if key[2] != granary_meta::keys::kind::APPLIED {
            all.push((key.to_vec(), value.to_vec()));
        }
        cursor.next().unwrap();
    }
    assert!(!all.is_empty());
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_one_of_three_replays_to_the_hash_of_the_others() {
    let cluster = Cluster::new();
    cluster.start_all(&[1, 2, 3]).await;
    cluster.init(SHARD, &[1, 2, 3]).await;
    let mut random = Random(21);
    for i in 0..90u64 {
        cluster.put(&mut random, SHARD, &format!("key-{}", i % 30), &i.to_be_bytes()).await;
    }
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    let (number, applied) = (cluster.host(2).number(), cluster.host(2).status()[0].applied_index);
    copy_what_was_synced(&cluster.path(2), &cluster.path(9));
    cluster.stop(2).await;
    std::fs::remove_dir_all(cluster.path(2)).unwrap();
    std::fs::rename(cluster.path(9), cluster.path(2)).unwrap();
    cluster.put(&mut random, SHARD, "while-down", b"x").await;
    cluster.network.isolate(DiskId(2), &[DiskId(1), DiskId(3)]);
    let host = cluster.start(2).await;
    assert_eq!(host.number(), number, "it came back as another");
    let until = Instant::now() + Duration::from_secs(10);
    while host.status()[0].last_log_index < applied {
        assert!(Instant::now() < until, "it lost what it had said it has: {:?}", host.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(host);
    cluster.network.heal();
    cluster.same_state(SHARD, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

fn log_key(index: u64) -> Vec<u8> {
    let mut key = SHARD.0.to_be_bytes().to_vec();
    key.push(b'E');
    key.extend_from_slice(&index.to_be_bytes());
    key
}

/// Changes the log of a stopped disk; `change` gets the bytes of the entry and gives what is to stand there (None:
/// nothing).
fn tamper(dir: &Path, index: u64, change: impl Fn(&LogDb, Vec<u8>) -> Option<Vec<u8>>) {
    let log = LogDb::open(&dir.join("log")).unwrap();
    let entry = log.get(&log_key(index)).unwrap().expect("no such entry");
    match change(&log, entry) {
        Some(bytes) => log.write_synced(&[LogWrite::Put(log_key(index), bytes)]).unwrap(),
        None => log.write_synced(&[LogWrite::DeleteRange(log_key(index), log_key(index + 1))]).unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_entry_in_the_log_stops_the_replica_and_is_not_cut_away_until_the_others_have_all() {
    type Change = fn(&LogDb, Vec<u8>) -> Option<Vec<u8>>;
    let changes: [(&str, Change); 5] = [
        ("flipped bit", |_, mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        }),
        ("zeros", |_, bytes| Some(vec![0; bytes.len()])),
        ("cut short", |_, bytes| Some(bytes[..bytes.len() - 1].to_vec())),
        ("its neighbour", |log, _| log.get(&log_key(4)).unwrap()),
        ("missing", |_, _| None),
    ];
    for (name, change) in changes {
        let cluster = Cluster::new();
        cluster.start_all(&[1, 2, 3]).await;
        cluster.init(SHARD, &[1, 2, 3]).await;
        let mut random = Random(22);
        for i in 0..12 {
            cluster.put(&mut random, SHARD, &format!("key-{i}"), b"x").await;
        }
        cluster.same_state(SHARD, &[1, 2, 3]).await;
        cluster.stop(2).await;
        tamper(&cluster.path(2), 5, change);
        cluster.network.isolate(DiskId(2), &[DiskId(1), DiskId(3)]);
        let host = cluster.start(2).await;
        let status = host.status();
        assert_eq!((status.len(), status[0].state.as_str()), (1, "stopped"), "{name}");
        assert!(matches!(host.query(SHARD, get("key-1")).await, Err(ControlError::Disk(_))), "{name}");
        // The shard serves from the others, and the bad log is left as it was found.
        cluster.put(&mut random, SHARD, "after", b"x").await;
        cluster.stop(2).await;
        drop(host);
        let log = LogDb::open(&cluster.path(2).join("log")).unwrap();
        assert!(log.get(&log_key(6)).unwrap().is_some(), "{name}: entries were cut away");
        drop(log);
        // The others have all that it had: it begins anew.
        cluster.network.heal();
        cluster.start(2).await;
        cluster.same_state(SHARD, &[1, 2, 3]).await;
        assert_eq!(cluster.host(2).counters().replicas_rebuilt, 1, "{name}");
        cluster.stop_all().await;
    }
}

/// A replica of that disk.
fn id(disk: u32) -> ReplicaId {
    ReplicaId { disk: DiskId(disk), incarnation: 1 }
}

async fn ask(host: &granary_replica::MetaHost, from: u32, request: PeerRequest) -> PeerResponse {
    let mut message = PeerMessage { from: id(from), to: None, request: PeerRequest::Identify };
    for request in [PeerRequest::Identify, request] {
        message.request = request;
        let bytes = encode_message(&message).unwrap();
        match decode_message(&host.raft(SHARD, DiskId(from), bytes).await.unwrap()).unwrap() {
            PeerResponse::Identity { me, .. } => message.to = Some(me),
            answer => return answer,
        }
    }
    panic!("no answer")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vote_is_not_given_twice_across_a_crash() {
    let cluster = Cluster::new();
    let host = cluster.start(1).await;
    cluster.name(SHARD, &[1, 2, 3]);
    let vote = |disk| PeerRequest::Vote {
        vote: WireVote { term: 5, node: id(disk), committed: false },
        last: None,
        transfer: false,
        pre_vote: false,
    };
    let PeerResponse::Voted { granted: true, .. } = ask(&host, 3, vote(3)).await else { panic!("no vote") };
    copy_what_was_synced(&cluster.path(1), &cluster.path(8));
    cluster.stop_all().await;
    drop(host);
    std::fs::remove_dir_all(cluster.path(1)).unwrap();
    std::fs::rename(cluster.path(8), cluster.path(1)).unwrap();
    let host = cluster.start(1).await;
    let PeerResponse::Voted { granted, vote: held, .. } = ask(&host, 2, vote(2)).await else { panic!("no answer") };
    assert!(!granted, "two candidates of one term got this vote");
    assert_eq!((held.term, held.node), (5, id(3)));
    let PeerResponse::Voted { granted: true, .. } = ask(&host, 3, vote(3)).await else {
        panic!("the vote was forgotten")
    };
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_another_disk_is_refused() {
    let cluster = Cluster::new();
    cluster.start(1).await;
    cluster.stop_all().await;
    std::fs::rename(cluster.path(1), cluster.path(2)).unwrap();
    let config = granary_replica::HostConfig {
        dir: cluster.path(2),
        disk: DiskId(2),
        number: None,
        timing: cluster.timing.clone(),
        clock: cluster.clock(DiskId(2)),
        space: Space::without_reserve(),
    };
    let wire = Arc::new(scenery::cluster::Wire { me: DiskId(2), network: cluster.network.clone() });
    let opened = granary_replica::MetaHost::open(config, wire, cluster.map.subscribe(), Arc::new(|_| {})).await;
    assert!(matches!(opened, Err(granary_replica::MetaError::OtherDisk { found: DiskId(1), expected: DiskId(2) })));
}

fn filled(dir: &Path, objects: u64) -> StateDb {
    let state = StateDb::open(dir, no_fatal()).unwrap();
    let mut random = Random(objects);
    for i in 0..objects {
        let mut overlay = Overlay::new(&state);
        let sent = request(&mut random, 1, put(1, &format!("key-{i}"), &[1; 700]));
        apply(SHARD, &mut overlay, &sent).unwrap();
        let applied = granary_replica::message::AppliedState {
            last: Some(granary_replica::message::WireLogId { term: 1, node: id(1), index: i }),
            ..Default::default()
        };
        let key = granary_meta::keys::Keys::new(SHARD).single(granary_meta::keys::kind::APPLIED);
        overlay.put(key, granary_meta::codec::encode(&applied).unwrap());
        let writes = overlay.into_writes();
        state.write(SHARD, writes, Some(i)).unwrap();
    }
    state
}

#[test]
fn a_snapshot_file_carries_the_whole_shard_and_any_damage_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let from = filled(&dir.path().join("from"), 1_000);
    let file = dir.path().join("snapshot");
    let applied = snapshot::write_file(&from, SHARD, &file, &Space::without_reserve()).unwrap();
    assert_eq!(applied.last.unwrap().index, 999);
    assert_eq!(snapshot::check_file(&file, SHARD).unwrap(), applied);
    assert!(snapshot::check_file(&file, ShardId(2)).is_err(), "taken for another shard");

    let whole = std::fs::read(&file).unwrap();
    let seed = scenery::seed("a_snapshot_file_carries_the_whole_shard_and_any_damage_is_seen");
    let mut random = Random(seed);
    let bad = dir.path().join("bad");
    for _ in 0..300 {
        let mut bytes = whole.clone();
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(3) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes.truncate(at),
            _ => bytes.insert(at, 0x55),
        }
        std::fs::write(&bad, &bytes).unwrap();
        assert!(snapshot::check_file(&bad, SHARD).is_err(), "damage at {at} of {} was not seen", whole.len());
    }

    let to = filled(&dir.path().join("to"), 300);
    let copy = dir.path().join("copy");
    std::fs::copy(&file, &copy).unwrap();
    snapshot::install(&to, SHARD, dir.path(), &copy).unwrap();
    assert_eq!(snapshot::state_hash(&to, SHARD).unwrap(), snapshot::state_hash(&from, SHARD).unwrap());
}

/// The state and the snapshot files in a folder, opened as at a start. The memtables are as small as they can be.
fn open_in(dir: &Path) -> StateDb {
    let state = StateDb::open_with(&dir.join("state"), no_fatal(), &Buffers::within(1), true).unwrap();
    snapshot::finish_interrupted(&state, SHARD, &dir.join("files"), &Space::without_reserve()).unwrap();
    state
}

/// What a replica finds when it is opened again in the same process may be in memory only.
#[test]
fn what_a_reopened_replica_finds_is_flushed_before_its_log_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, copy) = (dir.path().join("disk"), dir.path().join("copy"));
    std::fs::create_dir(&disk).unwrap();
    let state = filled(&disk.join("state"), 20);
    std::fs::File::open(&disk).unwrap().sync_all().unwrap();
    state.opened_at(SHARD, 19);
    state.make_durable(SHARD, 19).unwrap();
    copy_what_was_synced(&disk, &copy);
    let left = StateDb::open(&copy.join("state"), no_fatal()).unwrap();
    assert_eq!(snapshot::applied_state(&left, SHARD).unwrap().last.map(|last| last.index), Some(19));
}

#[test]
fn an_install_that_loses_power_at_any_moment_leaves_the_old_state_or_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let files = disk.join("files");
    std::fs::create_dir_all(&files).unwrap();
    std::fs::File::open(&disk).unwrap().sync_all().unwrap();
    std::fs::File::open(&files).unwrap().sync_all().unwrap();
    let from = filled(&dir.path().join("from"), 3_000);
    let new = snapshot::state_hash(&from, SHARD).unwrap();
    drop(filled(&disk.join("state"), 500));
    let state = open_in(&disk);
    state.flush().unwrap();
    std::fs::File::open(&disk).unwrap().sync_all().unwrap();
    let old = snapshot::state_hash(&state, SHARD).unwrap();

    let is_installed = Arc::<AtomicU64>::default();
    let told = is_installed.clone();
    let record = synced::record(&[disk], move || told.load(Ordering::SeqCst));
    snapshot::write_file(&from, SHARD, &files.join("in-1"), &Space::without_reserve()).unwrap();
    snapshot::install(&state, SHARD, &files, &files.join("in-1")).unwrap();
    is_installed.store(1, Ordering::SeqCst);
    let moments = record.end();

    let seed = scenery::seed("an_install_that_loses_power_at_any_moment_leaves_the_old_state_or_is_finished");
    let mut random = Random(seed);
    let mut finished = 0;
    for (number, moment) in moments.iter().enumerate() {
        for keep in [Keep::Nothing, Keep::SomeOf(Random(random.next()))] {
            let after = format!("moment {number}, after a sync of {}", moment.after_sync_of.display());
            let again = tempfile::tempdir().unwrap();
            let (first, second) = (again.path().join("first"), again.path().join("second"));
            moment.cuts[0].write(&first, keep);
            let marker = [[0xff, 0xff], SHARD.0.to_be_bytes()].concat();
            let found = StateDb::open(&first.join("state"), no_fatal()).unwrap();
            finished += u64::from(found.get(&marker).unwrap().is_some());
            drop(found);
            let state = open_in(&first);
            let hash = snapshot::state_hash(&state, SHARD).unwrap();
            assert!(hash == new || (hash == old && moment.told_until == 0), "{after}: half a state, or an old one");
            assert!(!first.join("files").join(format!("install-{SHARD}")).exists());
            // And it stays so, whatever was finished here.
            copy_what_was_synced(&first, &second);
            assert_eq!(snapshot::state_hash(&open_in(&second), SHARD).unwrap(), hash, "{after}: not for long");
        }
    }
    println!("{} moments, {finished} installs finished at the next start", moments.len());
    assert!(finished > 0, "no cut came in the middle of the install");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_of_a_disk_do_not_see_each_other() {
    let cluster = Cluster::new();
    cluster.start(1).await;
    cluster.init(ShardId(1), &[1]).await;
    cluster.init(ShardId(2), &[1]).await;
    let mut random = Random(23);
    cluster.put(&mut random, ShardId(1), "k", b"x").await;
    assert!(matches!(cluster.query(ShardId(1), &get("k")).await, Answer::Object(_)));
    assert_eq!(cluster.query(ShardId(2), &get("k")).await, Answer::NoSuchKey);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_and_reads_whose_state_is_not_in_memory_wait_for_the_disk() {
    let cluster = Cluster::new();
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    let mut random = Random(22);
    let body = |i: u64| i.to_be_bytes().repeat(128);
    for i in 0..60u64 {
        cluster.put(&mut random, SHARD, &format!("key-{i}"), &body(i)).await;
    }
    assert_eq!(cluster.host(1).counters().apply_waits, 0, "all of it was in memory");
    // A stop writes it to files, and an opening reads nothing of them but what it needs.
    cluster.stop(1).await;
    cluster.start(1).await;
    let held = async |key: &str| match cluster.query(SHARD, &get(key)).await {
        Answer::Object(record) => match record.data {
            ObjectData::Inline { bytes, .. } => bytes.to_vec(),
            other => panic!("{key}: {other:?}"),
        },
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(held("key-7").await, body(7));
    cluster.put(&mut random, SHARD, "key-30", b"new").await;
    assert!(cluster.host(1).counters().apply_waits > 0, "all was in memory, so the test shows nothing");
    assert_eq!(held("key-30").await, b"new");
    for i in (0..60u64).filter(|i| *i != 30) {
        assert_eq!(held(&format!("key-{i}")).await, body(i));
    }
}
