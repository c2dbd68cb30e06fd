//! Power cuts: what was acknowledged is in what was synced, at every moment, on one replica and on all of a shard.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;
mod synced;

use granary_meta::record::{BucketId, ObjectData};
use granary_meta::{Answer, Query, Reply, VersionPick};
use granary_placement::id::ShardId;
use granary_replica::store::LogDb;
use granary_replica::{MetaHost, Timing};
use scenery::cluster::{disk, fast, Cluster};
use scenery::{put, request, Random};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use synced::{copy_what_was_synced, synced_bytes, Cut, Keep, Moment};

const SHARD: ShardId = ShardId(1);

/// Fast elections, and a snapshot and a purge every few entries.
fn short_logs() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.timing = Timing {
        heartbeat_ms: 30,
        election_min_ms: 150,
        election_max_ms: 300,
        snapshot_entries: 8,
        keep_entries: 2,
        ..fast()
    };
    cluster
}

fn the_log_of(dir: &Path) -> PathBuf {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    logs.retain(|path| path.extension().is_some_and(|end| end == "log"));
    assert_eq!(logs.len(), 1, "{logs:?}");
    logs.remove(0)
}

#[test]
fn only_what_rocksdb_synced_is_in_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("db"), dir.path().join("copy"));
    let db = rocksdb::DB::open_default(&path).unwrap();
    let log = the_log_of(&path);
    let len_bytes = || std::fs::metadata(&log).unwrap().len();
    let mut and_sync = rocksdb::WriteOptions::default();
    and_sync.set_sync(true);

    db.put_opt("first", "1", &and_sync).unwrap();
    let after_first = len_bytes();
    assert!(after_first > 0);
    assert_eq!(synced_bytes(&log), Some(after_first));
    db.put("second", "2").unwrap();
    assert!(len_bytes() > after_first);
    assert_eq!(synced_bytes(&log), Some(after_first), "a write without a sync counts as one");
    copy_what_was_synced(&path, &copy);
    let left = rocksdb::DB::open_default(&copy).unwrap();
    assert_eq!(left.get("first").unwrap(), Some(b"1".to_vec()));
    assert_eq!(left.get("second").unwrap(), None);

    db.put_opt("third", "3", &and_sync).unwrap();
    assert_eq!(synced_bytes(&log), Some(len_bytes()));
}

/// The names in what a power cut would leave of `dir`, with the length of each file.
fn left_of(dir: &Path) -> BTreeMap<String, u64> {
    let target = tempfile::tempdir().unwrap();
    let copy = target.path().join("copy");
    copy_what_was_synced(dir, &copy);
    let entries = std::fs::read_dir(&copy).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())).collect()
}

#[test]
fn a_name_is_certain_once_its_folder_was_synced_and_a_byte_once_its_file_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("folder");
    std::fs::create_dir(&path).unwrap();
    let sync_folder = || File::open(&path).unwrap().sync_all().unwrap();
    let expect = |names: &[(&str, u64)]| {
        assert_eq!(left_of(&path), names.iter().map(|(name, len)| ((*name).to_owned(), *len)).collect());
    };
    let mut file = File::create(path.join("a")).unwrap();
    file.write_all(b"12345").unwrap();
    expect(&[]);
    file.sync_all().unwrap();
    expect(&[]);
    sync_folder();
    expect(&[("a", 5)]);
    file.write_all(b"678").unwrap();
    expect(&[("a", 5)]);
    file.sync_data().unwrap();
    expect(&[("a", 8)]);
    std::fs::rename(path.join("a"), path.join("b")).unwrap();
    expect(&[("a", 8)]);
    sync_folder();
    expect(&[("b", 8)]);
    std::fs::remove_file(path.join("b")).unwrap();
    std::fs::write(path.join("c"), b"never synced").unwrap();
    expect(&[("b", 8)]);
    sync_folder();
    expect(&[("c", 0)]);
}

fn get(key: &str) -> Query {
    Query::GetObject { bucket: BucketId(1), key: key.to_owned(), version: VersionPick::Current }
}

/// The number in an object.
async fn number_in(cluster: &Cluster, key: &str) -> Option<u64> {
    match cluster.query(SHARD, &get(key)).await {
        Answer::Object(record) => match record.data {
            ObjectData::Inline { bytes, .. } => Some(u64::from_be_bytes(*bytes.first_chunk().unwrap())),
            other => panic!("{other:?}"),
        },
        Answer::NoSuchKey => None,
        other => panic!("{other:?}"),
    }
}

/// Writes `key-N` for N from `from` on, one after the other, and counts what was acknowledged.
async fn put_numbers(cluster: &Cluster, random: &mut Random, acked: &AtomicU64, many: u64) {
    for _ in 0..many {
        let number = acked.load(Ordering::SeqCst);
        let mut body = vec![0; 500];
        body[..8].copy_from_slice(&number.to_be_bytes());
        cluster.put(random, SHARD, &format!("key-{number}"), &body).await;
        acked.store(number + 1, Ordering::SeqCst);
    }
}

/// Starts the disks from what a cut left of them, and expects what was acknowledged and one state.
async fn start_again(moment: &Moment, ids: &[u32], keep: impl Fn() -> Keep) {
    let cluster = short_logs();
    for (id, cut) in ids.iter().zip(&moment.cuts) {
        cut.write(&cluster.path(*id), keep());
    }
    cluster.name(SHARD, ids);
    cluster.start_all(ids).await;
    if moment.told_until > 0 {
        let numbers = (0..moment.told_until).map(|number| {
            let cluster = &cluster;
            async move { number_in(cluster, &format!("key-{number}")).await == Some(number) }
        });
        let lost = futures::future::join_all(numbers).await.iter().filter(|found| !**found).count();
        assert_eq!(lost, 0, "of {} acknowledged", moment.told_until);
        cluster.same_state(SHARD, ids).await;
    }
    assert!(cluster.fatal.lock().unwrap().is_empty());
    cluster.stop_all().await;
}

/// Was the log of a disk ever purged?
fn has_purged(cut: &Cut) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    cut.write(&copy, Keep::Nothing);
    copy.join("log").exists() && {
        let log = LogDb::open(&copy.join("log")).unwrap();
        log.get(&[&SHARD.0.to_be_bytes()[..], b"P"].concat()).unwrap().is_some()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_moment_one_replica_has_what_it_acknowledged() {
    let mut random = Random(scenery::seed("at_every_moment_one_replica_has_what_it_acknowledged"));
    let cluster = short_logs();
    std::fs::create_dir(cluster.path(1)).unwrap();
    let acked = Arc::<AtomicU64>::default();
    let record = || {
        let told = acked.clone();
        synced::record(&[cluster.path(1)], move || told.load(Ordering::SeqCst))
    };
    // The first start of an empty disk, and the first commands.
    let begin = record();
    cluster.start(1).await;
    cluster.init(SHARD, &[1]).await;
    put_numbers(&cluster, &mut random, &acked, 4).await;
    let mut moments = begin.end();
    put_numbers(&cluster, &mut random, &acked, 56).await;
    // Flushes, and the first purge.
    let later = record();
    for _ in 0..100 {
        put_numbers(&cluster, &mut random, &acked, 1).await;
        if has_purged(&synced::cut(&[cluster.path(1)])[0]) {
            break;
        }
    }
    put_numbers(&cluster, &mut random, &acked, 2).await;
    moments.extend(later.end());
    cluster.stop_all().await;

    let purged: Vec<bool> = moments.iter().map(|moment| has_purged(&moment.cuts[0])).collect();
    let with_purge = purged.iter().filter(|purged| **purged).count();
    println!("{} moments, {with_purge} of them after the first purge", moments.len());
    assert!(with_purge > 0 && with_purge < moments.len(), "the test shows nothing of purges");
    for (number, moment) in moments.iter().enumerate() {
        println!("moment {number}, after a sync of {}", moment.after_sync_of.display());
        start_again(moment, &[1], || Keep::Nothing).await;
        if random.chance(3) {
            let seed = random.next();
            start_again(moment, &[1], || Keep::SomeOf(Random(seed))).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_lost_around_a_snapshot_leaves_replicas_that_agree_on_what_was_acknowledged() {
    let mut random =
        Random(scenery::seed("power_lost_around_a_snapshot_leaves_replicas_that_agree_on_what_was_acknowledged"));
    let (cluster, ids) = (short_logs(), [1, 2, 3]);
    let acked = Arc::<AtomicU64>::default();
    cluster.start_all(&ids).await;
    cluster.init(SHARD, &ids).await;
    put_numbers(&cluster, &mut random, &acked, 10).await;
    cluster.same_state(SHARD, &ids).await;
    let first = cluster.leader(SHARD).await;
    let behind = if first == disk(3) { 2 } else { 3 };
    cluster.network.isolate(disk(behind), &ids.map(disk));
    put_numbers(&cluster, &mut random, &acked, 100).await;
    let told = acked.clone();
    let record = synced::record(&ids.map(|id| cluster.path(id)), move || told.load(Ordering::SeqCst));
    // A leader keeps its log for who is behind. The other one followed and has purged its own, and is the only one left
    // that can lead.
    cluster.stop(first.0).await;
    cluster.network.heal();
    put_numbers(&cluster, &mut random, &acked, 10).await;
    cluster.start(first.0).await;
    cluster.same_state(SHARD, &ids).await;
    let moments = record.end();
    let installed = cluster.host(behind).counters().snapshots_installed;
    assert!(installed > 0, "the replica that was behind took no snapshot");
    let its_files = cluster.path(behind).canonicalize().unwrap();
    cluster.stop_all().await;

    let its_own: Vec<&Moment> = moments.iter().filter(|moment| moment.after_sync_of.starts_with(&its_files)).collect();
    println!("{} moments, {} of the replica that was behind", moments.len(), its_own.len());
    for (number, moment) in its_own.iter().take(24).enumerate() {
        println!("moment {number}, after a sync of {}", moment.after_sync_of.display());
        let seed = random.next();
        let keep = || if number % 2 == 0 { Keep::Nothing } else { Keep::SomeOf(Random(seed)) };
        start_again(moment, &ids, keep).await;
    }
}

/// What writers said to each key, and what they were told.
#[derive(Default, Clone)]
struct Told {
    sent: BTreeMap<String, u64>,
    acked: BTreeMap<String, u64>,
}

/// Writes numbers that grow to keys of its own until it is stopped; a command whose answer is lost with the power stays
/// in doubt.
async fn write_on(hosts: Vec<MetaHost>, writer: u64, told: Arc<Mutex<Told>>, stop: Arc<AtomicBool>, seed: u64) {
    let (mut random, mut at) = (Random(seed), 0);
    while !stop.load(Ordering::SeqCst) {
        let key = format!("{writer}-{}", random.below(8));
        let number = {
            let mut told = told.lock().unwrap();
            let sent = told.sent.entry(key.clone()).or_insert(0);
            *sent += 1;
            *sent
        };
        let mut body = vec![0; 8 + random.below(1_500) as usize];
        body[..8].copy_from_slice(&number.to_be_bytes());
        let request = request(&mut random, 1, put(1, &key, &body));
        loop {
            let host = &hosts[at % hosts.len()];
            match host.command(SHARD, request.clone()).await {
                Ok(Reply::Put { .. }) => break,
                Ok(other) => panic!("{other:?}"),
                Err(_) if stop.load(Ordering::SeqCst) => return,
                Err(_) => at += 1,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        told.lock().unwrap().acked.insert(key, number);
    }
}

/// Compares every key with what was said of it. What is read now must be there at the next cut, too.
async fn check(cluster: &Cluster, told: &mut Told) {
    let keys: BTreeSet<String> = told.sent.keys().cloned().collect();
    let found = keys.iter().map(|key| number_in(cluster, key));
    for (key, found) in keys.iter().zip(futures::future::join_all(found).await) {
        let (sent, acked) = (told.sent[key], told.acked.get(key).copied());
        assert!(found >= acked && found <= Some(sent), "{key}: {found:?} found, {acked:?} acknowledged, {sent} sent");
        if let Some(found) = found {
            told.acked.insert(key.clone(), found);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_replicas_of_a_shard_lose_power_at_once_many_times_and_nothing_acknowledged() {
    let seed = scenery::seed("all_replicas_of_a_shard_lose_power_at_once_many_times_and_nothing_acknowledged");
    let (mut random, ids) = (Random(seed), [1, 2, 3]);
    let mut cluster = short_logs();
    let told = Arc::<Mutex<Told>>::default();
    cluster.start_all(&ids).await;
    cluster.init(SHARD, &ids).await;
    let (mut in_doubt, mut installed) = (0, 0);
    for _ in 0..36 {
        let stop = Arc::<AtomicBool>::default();
        if random.chance(2) {
            cluster.network.isolate(disk(1 + random.below(3) as u32), &ids.map(disk));
        }
        let hosts: Vec<MetaHost> = ids.iter().map(|id| cluster.host(*id)).collect();
        let writers: Vec<_> = (0..6)
            .map(|writer| tokio::spawn(write_on(hosts.clone(), writer, told.clone(), stop.clone(), random.next())))
            .collect();
        tokio::time::sleep(Duration::from_millis(random.below(300))).await;
        cluster.network.heal();
        tokio::time::sleep(Duration::from_millis(random.below(200))).await;

        // Nobody is told anything while the power goes.
        let (mut at_the_cut, cuts): (Told, Vec<Cut>) = {
            let told = told.lock().unwrap();
            (told.clone(), synced::cut(&ids.map(|id| cluster.path(id))))
        };
        stop.store(true, Ordering::SeqCst);
        installed += hosts.iter().map(|host| host.counters().snapshots_installed).sum::<u64>();
        drop(hosts);
        cluster.stop_all().await;
        for writer in writers {
            writer.await.unwrap();
        }

        let again = short_logs();
        for (id, cut) in ids.iter().zip(&cuts) {
            let keep = if random.chance(2) { Keep::Nothing } else { Keep::SomeOf(Random(random.next())) };
            cut.write(&again.path(*id), keep);
        }
        again.name(SHARD, &ids);
        // The disks' labels are not on the metadata's file system alone.
        again.labels.lock().unwrap().extend(cluster.labels.lock().unwrap().iter());
        again.start_all(&ids).await;
        let acked = &at_the_cut.acked;
        in_doubt += at_the_cut.sent.iter().filter(|(key, sent)| acked.get(*key) != Some(*sent)).count();
        check(&again, &mut at_the_cut).await;
        again.same_state(SHARD, &ids).await;
        assert!(again.fatal.lock().unwrap().is_empty());
        *told.lock().unwrap() = at_the_cut;
        cluster = again;
    }
    let written: u64 = told.lock().unwrap().acked.values().sum();
    println!("{written} commands, {in_doubt} of them in doubt at a cut, {installed} snapshots installed");
    assert!(in_doubt > 0, "no cut came while a command was on its way");
    cluster.stop_all().await;
}
