//! All disks full at once, on a file system that is really full: what grows is refused in words, nothing dies, nothing
//! is lost, and deleting brings the cluster back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_s3_client::Client;
use granary_tests::cluster::{alive, Cluster, Options};
use http::StatusCode;
use std::process::Command;
use std::time::{Duration, Instant};

const NAME: &str = "all_disks_full_at_once_refuse_what_grows_and_come_back_by_deleting";
/// Set in the process that sees the small file system, to the file it writes when it is done.
const INSIDE: &str = "GRANARY_TEST_FILE_SYSTEM";
const BUCKET: &str = "full";
/// Of small objects, which lie in the metadata.
const SMALL_BYTES: usize = 7_000;
const PATIENCE: Duration = Duration::from_secs(120);

/// Mounts an ext4 of its own, or where loop devices may not be used a tmpfs of the same size, in a mount namespace that
/// ends with the test; then runs the rest of the command there.
const MOUNT: &str = r#"
set -e
image=$1 dir=$2; shift 2
truncate --size 1200M "$image"
if mkfs.ext4 -q -m 0 "$image" && mount -o loop "$image" "$dir" 2>/dev/null; then echo "    on an ext4 of its own"
else mount -t tmpfs -o size=1200m none "$dir"; echo "    on a tmpfs of its own"
fi
chmod 777 "$dir"
exec "$@"
"#;

#[test]
fn all_disks_full_at_once_refuse_what_grows_and_come_back_by_deleting() {
    if let Some(done) = std::env::var_os(INSIDE) {
        inside();
        std::fs::write(done, "").unwrap();
        return;
    }
    let outer = granary_tests::cluster::scratch("full");
    let dir = outer.path().join("mounted");
    std::fs::create_dir(&dir).unwrap();
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.arg("--map-root-user");
        // Some systems keep users from making namespaces of their own.
        let trial = Command::new("unshare").args(["--map-root-user", "--mount", "true"]).output();
        if let Some(why) = trial.map_or_else(
            |error| Some(error.to_string()),
            |tried| (!tried.status.success()).then(|| String::from_utf8_lossy(&tried.stderr).trim().to_owned()),
        ) {
            let why =
                format!("a file system of its own needs root, or user namespaces that this system refuses: {why}");
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
            // Past the runner, which shows the output of failed tests only.
            std::io::Write::write_all(&mut std::io::stderr(), format!("NOT RUN: {NAME}: {why}\n").as_bytes()).unwrap();
            return;
        }
    }
    unshare.args(["--mount", "sh", "-c", MOUNT, "sh"]).arg(outer.path().join("image")).arg(&dir);
    unshare.arg(std::env::current_exe().unwrap()).args(["--exact", NAME, "--nocapture"]);
    let status = unshare
        .env(INSIDE, outer.path().join("done"))
        .env("GRANARY_TEST_DIR", &dir)
        .status()
        .expect("unshare of util-linux");
    assert!(status.success(), "{status}");
    // Without a test of that name the runner is content as well.
    assert!(outer.path().join("done").exists(), "it did not run");
}

/// Random, so that nothing shrinks it on its way to the disk.
fn small_body() -> Bytes {
    let mut bytes = vec![0; SMALL_BYTES];
    getrandom::fill(&mut bytes).unwrap();
    Bytes::from(bytes)
}

async fn patiently(what: &str, client: &Client, key: &str, wanted: StatusCode) {
    let started = Instant::now();
    loop {
        let answer = client.put(BUCKET, key, small_body()).await;
        if answer.as_ref().is_ok_and(|answer| answer.status == wanted) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{what}: {answer:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn inside() {
    let extra = ["--set", "node.reserve=128MiB", "--set", "node.segment=8MiB"].map(str::to_owned).to_vec();
    let cluster = Cluster::start(Options { disks: 6, scheme: "4+2", shards: 2, extra, ..Options::default() });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let client = cluster.client();
    let large = Bytes::from(vec![7; 4 << 20]);
    let processes: Vec<i32> = cluster.disks().iter().map(|disk| disk.pid).collect();
    runtime.block_on(async {
        assert_eq!(client.make_bucket(BUCKET).await.unwrap().status, StatusCode::OK);
        assert_eq!(client.put(BUCKET, "large", large.clone()).await.unwrap().status, StatusCode::OK);
    });
    // Something else fills the file system, down to what chunks leave.
    let free = |path: &std::path::Path| {
        let stat = rustix::fs::statvfs(path).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let ballast = cluster.dir().parent().unwrap().join("ballast");
    let file = std::fs::File::create(&ballast).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free(&ballast) - (112 << 20)).unwrap();
    drop(file);
    runtime.block_on(async {
        // The first refusal may be a 503: gateways learn from pings which disks are full.
        let started = Instant::now();
        loop {
            let answer = client.put(BUCKET, "more", large.clone()).await.unwrap();
            if (answer.status.as_u16(), answer.code()) == (507, "InsufficientStorage") {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "{} {}", answer.status, answer.text());
        }
    });

    // Small objects go on, into the metadata, until those are refused too.
    let started = Instant::now();
    let mut small = 0u64;
    let refused = runtime.block_on(async {
        loop {
            let answers = (0..32).map(|place| {
                let (client, key) = (client.clone(), format!("small-{:07}", small + place));
                async move { client.put(BUCKET, &key, small_body()).await.unwrap() }
            });
            let answers = futures::future::join_all(answers).await;
            small += 32;
            if let Some(refused) = answers
                .into_iter()
                .find(|answer| ![StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE].contains(&answer.status))
            {
                break refused;
            }
            assert!(started.elapsed() < PATIENCE, "{small} small objects, and no end");
        }
    });
    assert_eq!((refused.status.as_u16(), refused.code()), (507, "InsufficientStorage"), "{}", refused.text());
    println!("    full after {small} small objects; {} MiB are free", free(&cluster.dir()) >> 20);

    // It stays so, whoever insists, and everything is read.
    let listed = runtime.block_on(async {
        let insist = Instant::now();
        while insist.elapsed() < Duration::from_secs(10) {
            let answers = (0..32).map(|place| {
                let client = client.clone();
                async move { client.put(BUCKET, &format!("x-{place}"), small_body()).await }
            });
            futures::future::join_all(answers).await;
        }
        let read = client.get(BUCKET, "large").await.unwrap();
        assert!(read.status == StatusCode::OK && read.body == large, "{}", read.status);
        client.list(BUCKET, "").await.unwrap()
    });
    println!("    {} MiB are free after 10 s of writes that were refused", free(&cluster.dir()) >> 20);
    assert!(processes.iter().all(|pid| alive(*pid)), "a disk node died of a full disk");

    // Deleting is taken, and brings the space back while the file system is as full as ever of other things.
    runtime.block_on(async {
        for keys in listed.iter().filter(|key| *key != "large").collect::<Vec<_>>().chunks(32) {
            for answer in futures::future::join_all(keys.iter().map(|key| client.delete(BUCKET, key))).await {
                assert_eq!(answer.unwrap().status, StatusCode::NO_CONTENT);
            }
        }
        println!("    {} keys deleted, {} MiB are free", listed.len(), free(&cluster.dir()) >> 20);
        patiently("a small object after everything was deleted", &client, "again", StatusCode::OK).await;
        println!("    small objects are taken again, {} MiB are free", free(&cluster.dir()) >> 20);
    });
    std::fs::remove_file(&ballast).unwrap();
    runtime.block_on(async {
        let started = Instant::now();
        while client.put(BUCKET, "large-again", large.clone()).await.unwrap().status != StatusCode::OK {
            assert!(started.elapsed() < PATIENCE, "large objects are still refused");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        for key in ["large", "large-again"] {
            assert!(client.get(BUCKET, key).await.unwrap().body == large, "{key}");
        }
        assert_eq!(client.list(BUCKET, "").await.unwrap(), ["again", "large", "large-again"]);
    });
    assert!(processes.iter().all(|pid| alive(*pid)), "a disk node died of a full disk");
}
