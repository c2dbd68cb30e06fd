//! What an operator asks and does when more disks die than the scheme bears: which keys cannot be read now, what would
//! bring them back; and a pause of repair.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_s3_client::Client;
use granary_tests::cluster::{self, bin, metric, Cluster, DiskProcess, Options};
use granary_tests::seed::Random;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::runtime::Runtime;

const PATIENCE: Duration = Duration::from_secs(90);
/// Longer than what rides in its record.
const LEAST: u64 = 9_000;

/// What a verb of `granary` said.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {} {}", self.out, self.err))
    }
}

struct Scene {
    cluster: Cluster,
    runtime: Runtime,
    client: Client,
    random: Random,
    /// What was stored, by bucket and key.
    stored: BTreeMap<(String, String), Bytes>,
}

impl Scene {
    fn start(name: &str, disks: u32, set: &[&str]) -> Scene {
        let extra = set.iter().flat_map(|value| ["--set", value]).map(str::to_owned).collect();
        let cluster = Cluster::start(Options { disks, extra, ..Options::default() });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = cluster.client();
        Scene { cluster, runtime, client, random: Random::of_this_run(name), stored: BTreeMap::new() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(bin("granary"));
        command.args(args).arg("--dir").arg(self.cluster.dir()).stdin(Stdio::null());
        command
    }

    fn granary(&self, args: &[&str]) -> Said {
        let done = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said { code: done.status.code(), out: text(done.stdout), err: text(done.stderr) }
    }

    /// It succeeds.
    fn json(&self, args: &[&str]) -> Value {
        let said = self.granary(&[args, &["--output", "json"]].concat());
        assert_eq!(said.code, Some(0), "{args:?}: {} {}", said.out, said.err);
        said.json()
    }

    fn bucket(&self, name: &str) {
        assert_eq!(self.runtime.block_on(self.client.make_bucket(name)).unwrap().status, 200);
    }

    fn put(&mut self, bucket: &str, key: &str, length: u64) {
        let body: Bytes = self.random.bytes(length as usize).into();
        eventually(&format!("PUT {key}"), || {
            let answer = self.runtime.block_on(self.client.put(bucket, key, body.clone())).ok()?;
            (answer.status == 200).then_some(())
        });
        self.stored.insert((bucket.to_owned(), key.to_owned()), body);
    }

    fn put_many(&mut self, bucket: &str, prefix: &str, count: u64) {
        for number in 0..count {
            let length = LEAST + self.random.below(600_000);
            self.put(bucket, &format!("{prefix}{number}"), length);
        }
    }

    /// Reads a key until it is there with its bytes.
    fn reads(&self, bucket: &str, key: &str) {
        eventually(&format!("GET {bucket}/{key}"), || {
            let answer = self.runtime.block_on(self.client.get(bucket, key)).ok()?;
            assert!(answer.status == 200 || answer.status.is_server_error(), "GET {key}: {}", answer.status);
            if answer.status != 200 {
                return None;
            }
            assert!(answer.body == self.stored[&(bucket.to_owned(), key.to_owned())], "{key} has other bytes");
            Some(())
        });
    }

    /// Kills the disk in that place and waits until the gateway knows.
    fn kill(&self, place: usize) -> DiskProcess {
        let disk = self.cluster.kill_disk(place);
        self.until_health(disk.disk, "down");
        disk
    }

    fn until_health(&self, disk: u64, health: &str) {
        eventually(&format!("disk {disk} is {health}"), || {
            let status = self.cluster.admin("GET", "/v1/status");
            let rows = status["disks"].as_array().unwrap();
            rows.iter().any(|row| row["disk"] == disk && row["health"] == health).then_some(())
        });
    }

    /// Every shard has a leader and a majority of voters that answer.
    fn until_led(&self) {
        eventually("all shards are led", || {
            let shards = self.json(&["shard"]);
            let led = |shard: &Value| {
                let voters = shard["voters"].as_array().unwrap().len();
                let answering =
                    shard["replicas"].as_array().unwrap().iter().filter(|replica| !replica["state"].is_null());
                !shard["leader"].is_null() && voters > 0 && answering.count() * 2 > voters
            };
            shards.as_array().unwrap().iter().all(led).then_some(())
        });
    }

    fn counter(&self, name: &str) -> f64 {
        metric(&self.cluster.metrics(), name)
    }
}

fn eventually<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    cluster::eventually(what, PATIENCE, look)
}

/// The keys of an answer of `granary lost`, each once.
fn keys(answer: &Value) -> BTreeSet<(String, String)> {
    let rows = answer["keys"].as_array().unwrap();
    let name = |row: &Value, name: &str| row[name].as_str().unwrap_or_else(|| panic!("{name}: {row}")).to_owned();
    let keys: BTreeSet<_> = rows.iter().map(|row| (name(row, "bucket"), name(row, "key"))).collect();
    assert_eq!(keys.len(), rows.len(), "a key is listed twice: {answer}");
    assert_eq!(answer["keys_lost"], rows.len());
    keys
}

#[test]
fn lost_lists_the_keys_that_cannot_be_read_and_no_other_until_a_disk_returns() {
    let set = ["object.extent=1MiB", "heal.out_after=24h", "shards.deadline=3s"];
    let mut scene = Scene::start("lost_lists_the_keys", 6, &set);
    scene.bucket("one");
    scene.bucket("two");
    scene.put_many("one", "before ", 12);
    scene.put("one", "several extents", 3_500_000);
    scene.put("one", "odd \n\u{1b} key", LEAST);
    scene.put_many("two", "before ", 3);
    for (number, length) in [1, 100, 8192].into_iter().enumerate() {
        scene.put("one", &format!("small {number}"), length);
    }
    let said = scene.granary(&["lost"]);
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{}", said.out);
    assert!(said.out.starts_with("every key can be read"), "{}", said.out);

    // The first five hold the metadata: three of them go on.
    let last = scene.kill(5);
    scene.put_many("one", "one down ", 6);
    let first = scene.kill(0);
    scene.until_led();
    scene.put_many("one", "two down ", 6);
    let second = scene.kill(1);
    scene.until_led();

    let said = scene.granary(&["lost", "--output", "json"]);
    assert_eq!((said.code, said.err.as_str()), (Some(3), ""), "{}", said.out);
    let answer = said.json();
    let lost = keys(&answer);
    println!("    {} of {} keys are lost", lost.len(), scene.stored.len());
    for (bucket, key) in scene.stored.keys() {
        if lost.contains(&(bucket.clone(), key.clone())) {
            let status = scene.runtime.block_on(scene.client.get(bucket, key)).map(|answer| answer.status);
            assert!(
                status.as_ref().is_ok_and(|status| status.is_server_error()),
                "{bucket}/{key} is listed: {status:?}"
            );
        } else {
            scene.reads(bucket, key);
        }
    }
    let in_bucket = |name: &str| lost.iter().filter(|(bucket, _)| bucket == name).count();
    assert_eq!(in_bucket("two"), 3);
    assert!(in_bucket("one") >= 14 && lost.len() < scene.stored.len());
    assert!(!lost.iter().any(|(_, key)| key.starts_with("small")), "small objects lie in the metadata");
    let row = answer["keys"].as_array().unwrap().iter().find(|row| row["key"] == "several extents").unwrap();
    assert_eq!((row["extents"].as_u64(), row["extents_lost"].as_u64()), (Some(4), Some(4)), "{row}");
    for row in answer["keys"].as_array().unwrap() {
        assert_eq!(row["back_with_all"], true, "{row}");
    }
    let with_first = answer["back_with_disk"][first.disk.to_string()].as_u64();
    assert_eq!(with_first, Some(lost.len() as u64), "each lacks one chunk: {answer}");

    // The same for people.
    let text = scene.granary(&["lost"]);
    assert_eq!(text.code, Some(3));
    let (summary, list) = text.out.split_once("\n\n").unwrap();
    assert!(summary.starts_with(&format!("{} keys cannot be read now", lost.len())), "{summary}");
    for disk in [&first, &second, &last] {
        assert!(summary.contains(&format!("could be read if disk {} alone returned", disk.disk)), "{summary}");
    }
    assert_eq!(list.lines().count(), lost.len());
    assert!(list.lines().any(|line| line == "one/odd \\n\\u{1b} key"), "{list}");
    let two = scene.granary(&["lost", "--bucket", "two", "--read", "--json"]);
    let of_two: BTreeSet<_> = lost.iter().filter(|(bucket, _)| bucket == "two").cloned().collect();
    assert_eq!((two.code, keys(&two.json())), (Some(3), of_two));
    let none = scene.granary(&["lost", "--bucket", "three"]);
    assert!(none.code == Some(1) && none.err.contains("no bucket of that name"), "{}", none.err);

    // Of shards without a majority nothing is said.
    let third = scene.kill(2);
    let unknown = scene.granary(&["lost", "--json"]);
    assert_eq!(unknown.code, Some(4), "{} {}", unknown.out, unknown.err);
    assert!(unknown.json()["unknown_shards"].as_array().is_some_and(|shards| !shards.is_empty()), "{}", unknown.out);

    scene.cluster.start_disk(&third);
    scene.cluster.start_disk(&first);
    scene.until_health(third.disk, "up");
    scene.until_health(first.disk, "up");
    scene.until_led();
    let said = eventually("every key can be read", || {
        let said = scene.granary(&["lost", "--json"]);
        (said.code == Some(0)).then_some(said)
    });
    assert!(keys(&said.json()).is_empty());
    scene.stored.keys().for_each(|(bucket, key)| scene.reads(bucket, key));
}

#[test]
fn nothing_is_repaired_and_no_disk_goes_out_while_repair_is_paused() {
    let set = [
        "heal.interval=200ms",
        "heal.out_after=2s",
        "heal.well_after=1s",
        "heal.fill_ceiling=100%",
        "heal.move_settle=10ms",
    ];
    let mut scene = Scene::start("nothing_is_repaired_while_paused", 8, &set);
    scene.bucket("pause");
    scene.put_many("pause", "before ", 10);
    let refused = scene.granary(&["config", "set", "heal.paused_until", "1"]);
    assert!(refused.code == Some(1) && refused.err.contains("granary heal pause"), "{}", refused.err);
    let until_ms = scene.json(&["heal", "pause", "--for", "2h"])["paused_until_ms"].as_u64().unwrap();
    let paused = |scene: &Scene| scene.json(&["heal"])["paused_until_ms"].as_u64();
    eventually("the gateway that heals knows of the pause", || (paused(&scene) == Some(until_ms)).then_some(()));
    assert_eq!(scene.counter("granary_heal_paused_until_seconds"), until_ms.div_ceil(1000) as f64);

    let dead = scene.kill(7);
    scene.put_many("pause", "one down ", 10);
    let stays = |scene: &Scene| {
        let status = scene.cluster.admin("GET", "/v1/status");
        let rows = status["heal"]["dead_disks"].as_array()?;
        let row = rows.iter().find(|row| row["disk"] == dead.disk)?;
        row["stays"].as_str().map(str::to_owned)
    };
    let why = eventually("the dead disk is judged", || stays(&scene));
    assert_eq!(why, "healing is paused");
    assert_eq!(scene.counter("granary_disks_dead_in_service"), 1.0, "the alarm says what is the case");
    let text = scene.granary(&["status"]).out;
    assert!(
        text.contains("healing is paused until ") && text.contains("stays in service: healing is paused"),
        "{text}"
    );

    // Another process heals. The disk is back, and a new one takes its place: all that it held is to be rebuilt.
    scene.cluster.kill_gateway_and_restart();
    scene.until_health(dead.disk, "up");
    let replaced = scene.granary(&["disk", "replace", &dead.disk.to_string(), "--yes"]);
    assert_eq!(replaced.code, Some(0), "{}", replaced.err);
    let queued = eventually("the slots of the new disk are queued", || {
        let heal = scene.json(&["heal"]);
        let queued = heal["heal"]["queued_slots"].as_u64().filter(|slots| *slots > 0 && !heal["heals_at"].is_null());
        assert!(queued.is_none() || heal["paused_until_ms"] == until_ms, "{heal}");
        queued
    });
    let missing = || scene.cluster.census()["missing"].as_u64().unwrap();
    let before = missing();
    assert!(before > 0, "{queued} slots are queued");
    for _ in 0..10 {
        assert_eq!(
            (missing(), scene.counter("granary_object_chunks_rebuilt_total")),
            (before, 0.0),
            "nothing is rebuilt"
        );
    }
    // Who reads nothing more of what a verb prints is no error.
    for args in [&["lost"][..], &["lost", "--json"], &["heal"], &["heal", "pace"], &["shard"], &["shard", "--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let said = scene.command(args).stdout(writer).output().unwrap();
        assert_eq!((said.status.code(), said.stderr.as_slice()), (Some(141), &b""[..]), "{args:?}");
    }
    let pace = scene.json(&["heal", "pace", "--ceiling", "300MiB/s"]);
    assert_eq!((&pace["ceiling"], scene.counter("granary_object_chunks_rebuilt_total")), (&"300MiB/s".into(), 0.0));
    eventually("the ceiling is in force", || {
        let heal = scene.json(&["heal"]);
        (heal["heal"]["bytes_per_s"] == 300 << 20).then_some(())
    });

    // A shorter pause in its place, which ends by itself.
    scene.json(&["heal", "pause", "--for", "1s"]);
    scene.cluster.wait_full_redundancy(PATIENCE);
    assert!(scene.counter("granary_object_chunks_rebuilt_total") > 0.0);
    assert_eq!(paused(&scene), Some(0));
    let until_ms = scene.json(&["heal", "pause"])["paused_until_ms"].as_u64().unwrap();
    eventually("it is paused again", || (paused(&scene) == Some(until_ms)).then_some(()));
    assert_eq!(scene.json(&["heal", "resume"])["paused_until_ms"], 0);
    eventually("it goes on", || (paused(&scene) == Some(0)).then_some(()));
    assert_eq!(scene.counter("granary_heal_paused_until_seconds"), 0.0);
}
