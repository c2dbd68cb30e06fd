//! kill -9 under load: nothing acknowledged is lost or wrong, listings are right, the cluster is
//! complete again without an operator.
//!
//! Several write and read each key at the same time; what a read may find follows from what was acknowledged by then,
//! and from writes whose outcome nobody learned. (kill -9 keeps the page cache: this is no test of power loss; the
//! chunk store's crash enumeration is.)
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_s3_client::Client;
use granary_tests::cluster::{signal, Cluster, DiskProcess, Options};
use granary_tests::register::Register;
use granary_tests::seed::Random;
use http::StatusCode;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const BUCKET: &str = "faults";
const WRITERS: u64 = 6;
const READERS: u64 = 3;
/// Fewer than twice the writers and readers: several are at most keys at any time.
const KEYS: u64 = 8;

/// All keys, and the counter that orders their requests.
#[derive(Default)]
struct Model {
    keys: Mutex<BTreeMap<String, Register>>,
    ticks: AtomicU64,
    reads: AtomicU64,
}

impl Model {
    fn tick(&self) -> u64 {
        1 + self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    fn with<T>(&self, key: &str, what: impl FnOnce(&mut Register) -> T) -> T {
        what(self.keys.lock().unwrap().entry(key.to_owned()).or_default())
    }
}

fn any_key(random: &mut Random) -> String {
    format!("{}key {}", if random.below(2) == 0 { "a/" } else { "" }, random.below(KEYS))
}

/// The body of that number: its number, then bytes that follow from it. Sizes from inline to several stripes.
fn body(number: u64) -> Bytes {
    let mut random = Random::new(number);
    let length = match random.below(10) {
        0..=3 => 16 + random.below(8_000),
        4..=6 => 8_200 + random.below(60_000),
        7..=8 => 100_000 + random.below(600_000),
        _ => 1_000_000 + random.below(2_000_000),
    };
    let mut bytes = random.bytes(length as usize);
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes.into()
}

/// The number of a body. Panics on bytes that no writer ever made.
fn number_of(key: &str, found: &[u8]) -> u64 {
    let number = u64::from_be_bytes(found[..8].try_into().unwrap());
    assert!(body(number) == found, "{key}: {} bytes that nobody wrote (they begin with number {number})", found.len());
    number
}

async fn writer(
    client: Client,
    mut random: Random,
    model: Arc<Model>,
    numbers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
) {
    while !stop.load(Ordering::Relaxed) {
        let key = any_key(&mut random);
        let number = (random.below(5) != 0).then(|| numbers.fetch_add(1, Ordering::Relaxed));
        let body = number.map(body);
        let begun = model.tick();
        model.with(&key, |register| register.begin(number, begun));
        let outcome = match body {
            None => client.delete(BUCKET, &key).await.map(|answer| answer.status == StatusCode::NO_CONTENT),
            Some(body) => client.put(BUCKET, &key, body).await.map(|answer| answer.status == StatusCode::OK),
        };
        if matches!(outcome, Ok(true)) {
            let ended = model.tick();
            model.with(&key, |register| register.acknowledge(begun, ended));
            done.fetch_add(1, Ordering::Relaxed);
        } else {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Reads keys while others write them; an error says nothing, an answer must be one that may be.
async fn reader(client: Client, mut random: Random, model: Arc<Model>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let key = any_key(&mut random);
        let begun = model.tick();
        let found = match client.get(BUCKET, &key).await {
            Ok(answer) if answer.status == StatusCode::OK => Some(number_of(&key, &answer.body)),
            Ok(answer) if answer.status == StatusCode::NOT_FOUND => None,
            Ok(answer) => {
                assert!(answer.status.is_server_error(), "GET {key}: {} {}", answer.status, answer.text());
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let ended = model.tick();
        model.with(&key, |register| {
            assert!(register.may_read(found, begun, ended), "{key} held {found:?} at {begun} to {ended}: {register:?}");
        });
        model.reads.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads every key and the listing, and compares with what may be there.
async fn check(client: &Client, model: &Model) -> usize {
    let keys: Vec<String> = model.keys.lock().unwrap().keys().cloned().collect();
    let mut present = Vec::new();
    for key in &keys {
        let begun = model.tick();
        let answer = patiently(|| client.get(BUCKET, key)).await;
        let found = match answer.status {
            StatusCode::OK => Some(number_of(key, &answer.body)),
            StatusCode::NOT_FOUND => None,
            other => panic!("GET {key}: {other} {}", answer.text()),
        };
        let ended = model.tick();
        model.with(key, |register| {
            assert!(register.may_read(found, begun, ended), "{key} holds {found:?}: {register:?}");
            // From here on the key holds what was read: a later read must find the same.
            register.settle(found, ended);
        });
        if found.is_some() {
            present.push(key.clone());
        }
    }
    let started = Instant::now();
    let listed = loop {
        match client.list(BUCKET, "").await {
            Ok(listed) => break listed,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(30), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert_eq!(listed, present, "the listing is not what GET finds");
    keys.len()
}

async fn patiently<F, W>(request: F) -> granary_s3_client::Answer
where
    F: Fn() -> W,
    W: std::future::Future<Output = Result<granary_s3_client::Answer, granary_s3_client::NoAnswer>>,
{
    let started = Instant::now();
    loop {
        match request().await {
            Ok(answer) if !answer.status.is_server_error() => return answer,
            other => assert!(started.elapsed() < Duration::from_secs(30), "still no answer: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn one_hundred_kills_lose_nothing_acknowledged() {
    // GRANARY_KILLS=n: so many instead, in rounds of ten.
    let wanted = std::env::var("GRANARY_KILLS").ok().map(|text| text.parse::<u64>().unwrap());
    let points = wanted.unwrap_or(if granary_tests::soak() { 1000 } else { 100 }).max(10);
    let mut random = Random::of_this_run("one_hundred_kills_lose_nothing_acknowledged");
    let mut cluster = Cluster::start(Options { restart: true, ..Options::default() });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let client = cluster.client();
    assert_eq!(runtime.block_on(client.make_bucket(BUCKET)).unwrap().status, StatusCode::OK);
    let model: Arc<Model> = Arc::default();
    let numbers = Arc::new(AtomicU64::new(1 + random.below(1 << 40)));
    let done = Arc::new(AtomicU64::new(0));
    let (mut killed_disks, mut killed_gateway, mut killed_all) = (0, 0, 0);
    let rounds = points / 10;
    for round in 0..rounds {
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..WRITERS)
            .map(|_| {
                let random = Random::new(random.number());
                runtime.spawn(writer(
                    client.clone(),
                    random,
                    model.clone(),
                    numbers.clone(),
                    stop.clone(),
                    done.clone(),
                ))
            })
            .collect();
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                let random = Random::new(random.number());
                runtime.spawn(reader(client.clone(), random, model.clone(), stop.clone()))
            })
            .collect();
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(100 + random.below(700)));
            match random.below(16) {
                0 => {
                    cluster.kill_gateway_and_restart();
                    killed_gateway += 1;
                }
                1 => {
                    cluster.kill_all_and_restart();
                    killed_all += 1;
                }
                _ => {
                    let disks = cluster.disks();
                    let disk = &disks[random.below(disks.len() as u64) as usize];
                    signal(disk.pid, rustix::process::Signal::KILL);
                    killed_disks += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        for task in writers.into_iter().chain(readers) {
            runtime.block_on(task).unwrap();
        }
        let keys = runtime.block_on(check(&client, &model));
        println!("    round {round}: {} acknowledged so far, {keys} keys right", done.load(Ordering::Relaxed));
    }
    let acknowledged = done.load(Ordering::Relaxed);
    println!("    {points} kills ({killed_disks} disk nodes, {killed_gateway} gateways, {killed_all} times everything), {acknowledged} acknowledged, none lost");
    let reads = model.reads.load(Ordering::Relaxed);
    println!("    {reads} reads while others wrote, all of them right");
    assert!(reads > points * 5, "only {reads} reads were answered: the load was no load");
    assert!(acknowledged > points * 5, "only {acknowledged} writes were acknowledged: the load was no load");
    // Everything is up again by itself, and redundancy comes back.
    cluster.wait_ready(Duration::from_secs(60));
    let census = cluster.wait_full_redundancy(Duration::from_secs(120));
    assert_eq!(census["extents_lost"].as_u64(), Some(0), "{census}");
    cluster.wait_no_orphans(Duration::from_secs(90));
}

/// With a third of six disks gone, 4+2 cannot be read: the refusal is a 503 with a code, never bytes and never 404, and
/// nothing is lost. A write goes on narrower or is refused likewise; a 200 can be read back at once.
#[test]
fn a_third_dead_disk_refuses_clearly_and_loses_nothing() {
    let cluster = Cluster::start(Options::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = cluster.client();
    // Too long to ride in their records: all six disks have a chunk of each.
    let mut large = (1..).filter(|number| body(*number).len() > 100_000);
    let (healthy, narrow, after) = (large.next().unwrap(), large.next().unwrap(), large.next().unwrap());
    runtime.block_on(async {
        assert_eq!(client.make_bucket(BUCKET).await.unwrap().status, StatusCode::OK);
        assert_eq!(client.put(BUCKET, "healthy", body(healthy)).await.unwrap().status, StatusCode::OK);
    });
    cluster.wait_full_redundancy(Duration::from_secs(60));
    let dead = [cluster.kill_disk(0), cluster.kill_disk(5), cluster.kill_disk(2)];
    let stored = runtime.block_on(async {
        let started = Instant::now();
        let answer = client.get(BUCKET, "healthy").await.unwrap();
        println!("    GET with three of six disks dead: {} {}", answer.status, answer.code());
        assert_eq!((answer.status, answer.code()), (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"));
        let answer = client.put(BUCKET, "narrow", body(narrow)).await.unwrap();
        println!("    PUT with three of six disks dead: {} {}", answer.status, answer.code());
        let stored = answer.status == StatusCode::OK;
        if stored {
            let back = client.get(BUCKET, "narrow").await.unwrap();
            assert_eq!((back.status, number_of("narrow", &back.body)), (StatusCode::OK, narrow));
        } else {
            assert_eq!((answer.status, answer.code()), (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"));
        }
        assert!(started.elapsed() < Duration::from_secs(100), "a refusal takes {:?}", started.elapsed());
        stored
    });
    for disk in &dead {
        cluster.start_disk(disk);
    }
    runtime.block_on(async {
        let answer = patiently(|| client.get(BUCKET, "healthy")).await;
        assert_eq!(number_of("healthy", &answer.body), healthy);
        if stored {
            let answer = patiently(|| client.get(BUCKET, "narrow")).await;
            assert_eq!(number_of("narrow", &answer.body), narrow);
        }
        let again = patiently(|| client.put(BUCKET, "after", body(after))).await;
        assert_eq!(again.status, StatusCode::OK);
    });
    cluster.wait_full_redundancy(Duration::from_secs(60));
    cluster.wait_no_orphans(Duration::from_secs(60));
}

/// One disk after the other loses its metadata folder while it is down. Each comes back as a new replica of its shards,
/// and in the end nothing of what any of them acknowledged is left but what they learnt.
#[test]
fn all_disks_lose_their_metadata_one_after_the_other_and_nothing_is_lost() {
    let cluster = Cluster::start(Options::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = cluster.client();
    assert_eq!(runtime.block_on(client.make_bucket(BUCKET)).unwrap().status, StatusCode::OK);
    let mut written = Vec::new();
    let with_metadata = |disk: &DiskProcess| disk.dir.join("meta").exists();
    let places: Vec<usize> =
        cluster.disks().iter().enumerate().filter(|(_, disk)| with_metadata(disk)).map(|(place, _)| place).collect();
    assert!(places.len() >= 5, "{places:?}");
    for place in places {
        let dead = cluster.kill_disk(place);
        for _ in 0..10 {
            let (key, number) = (format!("key-{:03}", written.len()), written.len() as u64 + 1);
            let answer = runtime.block_on(patiently(|| client.put(BUCKET, &key, body(number))));
            assert_eq!(answer.status, StatusCode::OK);
            written.push((key, number));
        }
        std::fs::remove_dir_all(dead.dir.join("meta")).unwrap();
        cluster.start_disk(&dead);
        let started = Instant::now();
        // A status is collected in the background: the second new one was begun after the disk was started.
        let mut collected = BTreeSet::new();
        loop {
            let status = cluster.admin("GET", "/v1/status");
            collected.insert(status["collected_ms"].as_u64().unwrap());
            let votes = |replica: &&Value| replica["state"] == "leader" || replica["state"] == "follower";
            let whole = |shard: &Value| {
                let replicas = shard["replicas"].as_array().unwrap();
                replicas.iter().filter(votes).count() == shard["members"].as_array().unwrap().len()
            };
            let shards = status["shards"].as_array().unwrap();
            if collected.len() > 2 && !shards.is_empty() && shards.iter().all(whole) {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "shards are not whole again: {}", status["shards"]);
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("    disk {} has all its replicas again after {:?}", dead.disk, started.elapsed());
    }
    runtime.block_on(async {
        let listed = client.list(BUCKET, "").await.unwrap();
        assert_eq!(listed.len(), written.len());
        for (key, number) in &written {
            let answer = patiently(|| client.get(BUCKET, key)).await;
            assert_eq!(number_of(key, &answer.body), *number);
        }
    });
    cluster.wait_full_redundancy(Duration::from_secs(60));
    cluster.wait_no_orphans(Duration::from_secs(60));
}

/// Flips a byte of each 64 KiB of every segment of a disk, behind the daemon's back. Gives how many.
fn flip_bytes(disk: &DiskProcess, random: &mut Random) -> u64 {
    use std::os::unix::fs::FileExt;
    let mut flips = 0;
    for entry in std::fs::read_dir(disk.dir.join("segments")).unwrap() {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.unwrap().path()).unwrap();
        let length = file.metadata().unwrap().len();
        let mut at = 4096;
        while at + 65_536 < length {
            let place = at + random.below(65_536);
            let mut byte = [0u8];
            file.read_exact_at(&mut byte, place).unwrap();
            if byte[0] != 0 {
                file.write_all_at(&[byte[0] ^ 0x40], place).unwrap();
                flips += 1;
            }
            at += 65_536;
        }
    }
    flips
}

/// Puts forty objects into a new bucket, named and filled by the numbers.
async fn put_forty(client: &Client, random: &mut Random) -> Vec<u64> {
    let numbers: Vec<u64> = (0..40).map(|_| random.number() >> 1).collect();
    assert_eq!(client.make_bucket(BUCKET).await.unwrap().status, StatusCode::OK);
    for number in &numbers {
        assert_eq!(client.put(BUCKET, &format!("k{number}"), body(*number)).await.unwrap().status, StatusCode::OK);
    }
    numbers
}

/// What rots on a disk while nobody reads it is found by the disk itself and repaired.
#[test]
fn flipped_bytes_that_nobody_reads_are_found_and_repaired_without_a_hand() {
    let mut random = Random::of_this_run("flipped_bytes_that_nobody_reads_are_found_and_repaired_without_a_hand");
    let set = ["node.scrub_interval=2s", "node.scrub_floor=1GiB/s", "node.scrub_ceiling=1GiB/s", "heal.interval=100ms"];
    let extra = set.iter().flat_map(|value| ["--set", value]).map(str::to_owned).collect();
    let cluster = Cluster::start(Options { extra, ..Options::default() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = cluster.client();
    let numbers = runtime.block_on(put_forty(&client, &mut random));
    cluster.wait_full_redundancy(Duration::from_secs(60));
    let counter = |name: &str| -> u64 {
        let metrics = cluster.metrics();
        let line = metrics.lines().find(|line| line.starts_with(&format!("granary_object_{name}_total ")));
        line.and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or_else(|| panic!("no {name}: {metrics}"))
    };
    let before = counter("chunks_rebuilt");
    let flips = flip_bytes(&cluster.disks()[1], &mut random);
    println!("    {flips} bytes flipped");
    assert!(flips > 10);
    // No census meanwhile: it would find and queue what the scrub is to find. All that was told is rebuilt, and over
    // several passes nothing more comes.
    let (started, mut settled, mut seen) = (Instant::now(), Instant::now(), 0);
    while settled.elapsed() < Duration::from_secs(15) {
        assert!(started.elapsed() < Duration::from_secs(180), "{seen} chunks told, not all of them rebuilt");
        std::thread::sleep(Duration::from_millis(200));
        let (told, rebuilt) = (counter("chunks_found_damaged"), counter("chunks_rebuilt") - before);
        if told == 0 || told != seen || rebuilt < told {
            (settled, seen) = (Instant::now(), told);
        }
    }
    let census = cluster.census();
    println!("    {seen} chunks repaired; census: {census}");
    assert_eq!((census["corrupt"].as_u64(), census["missing"].as_u64()), (Some(0), Some(0)), "{census}");
    assert_eq!(census["good"], census["chunks_expected"], "{census}");
    runtime.block_on(async {
        for number in &numbers {
            let key = format!("k{number}");
            let answer = patiently(|| client.get(BUCKET, &key)).await;
            assert_eq!(number_of(&key, &answer.body), *number, "{key}");
        }
    });
}

/// A flipped byte on a disk is never given to a client, and is repaired.
#[test]
fn flipped_bytes_on_two_disks_are_never_served_and_are_repaired() {
    let mut random = Random::of_this_run("flipped_bytes_on_two_disks_are_never_served_and_are_repaired");
    let cluster = Cluster::start(Options::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = cluster.client();
    let numbers = runtime.block_on(put_forty(&client, &mut random));
    // A chunk that a busy disk did not take in time would be a third loss beside the two disks.
    cluster.wait_full_redundancy(Duration::from_secs(60));
    // Every 64 KiB of every segment of two disks gets a flipped byte, behind the daemons' backs.
    let disks = cluster.disks();
    let flips: u64 = disks[1..3].iter().map(|disk| flip_bytes(disk, &mut random)).sum();
    println!("    {flips} bytes flipped");
    assert!(flips > 20);
    runtime.block_on(async {
        for number in &numbers {
            let key = format!("k{number}");
            let answer = patiently(|| client.get(BUCKET, &key)).await;
            assert_eq!(number_of(&key, &answer.body), *number, "{key}");
        }
    });
    // What a read did not touch (coding chunks) the census finds; reads of the damaged chunks queue their repair.
    let census = cluster.census();
    println!("    census after the flips: {census}");
    assert_eq!(census["extents_lost"].as_u64(), Some(0), "{census}");
    cluster.wait_full_redundancy(Duration::from_secs(120));
}
