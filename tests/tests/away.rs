//! Disks die and nobody comes: the others take over what they held, as long as there is a place for every chunk, and a
//! disk that returns with what it had long ago does no harm.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_s3_client::Client;
use granary_tests::cluster::{signal, Cluster, DiskProcess, Options};
use granary_tests::seed::Random;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const BUCKET: &str = "away";
const PATIENCE: Duration = Duration::from_secs(60);

/// A rebuild that goes on for half a minute or more, unless this is changed.
const SLOWLY: &str = "heal.rate=512KiB/s";

/// Eight disks at 4+2. `more`: further arguments of `granary dev`.
fn eight_disks(more: &[&str]) -> Cluster {
    cluster_of(8, more)
}

/// So many disks at 4+2 that are judged and healed in seconds.
fn cluster_of(disks: u32, more: &[&str]) -> Cluster {
    let set = [
        // Longer than any healthy disk is late on a busy machine.
        "heal.out_after=6s",
        "heal.well_after=1s",
        "heal.move_settle=500ms",
        "heal.interval=300ms",
        "heal.garbage_grace=1s",
        "heal.garbage_backoff=1s",
        // The folders of all disks lie on one file system, which may be full of other things.
        "heal.fill_ceiling=100%",
    ];
    let set = set.iter().flat_map(|value| ["--set", value]).chain(more.iter().copied());
    Cluster::start(Options { disks, extra: set.map(str::to_owned).collect(), ..Options::default() })
}

/// What was stored, by key.
type Model = BTreeMap<String, Bytes>;

struct Load {
    runtime: Runtime,
    client: Client,
    random: Random,
    model: Model,
}

impl Load {
    fn new(cluster: &Cluster, name: &str) -> Load {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = cluster.client();
        assert_eq!(runtime.block_on(client.make_bucket(BUCKET)).unwrap().status, 200);
        Load { runtime, client, random: Random::of_this_run(name), model: Model::new() }
    }

    /// A body too long to ride in its record.
    fn body(&mut self) -> Bytes {
        let length = 20_000 + self.random.below(700_000);
        self.random.bytes(length as usize).into()
    }

    fn put(&mut self, key: &str) {
        let body = self.body();
        let started = Instant::now();
        loop {
            let answer = self.runtime.block_on(self.client.put(BUCKET, key, body.clone()));
            match answer {
                Ok(answer) if answer.status == 200 => break,
                other => assert!(started.elapsed() < PATIENCE, "PUT {key}: {other:?}"),
            }
        }
        self.model.insert(key.to_owned(), body);
    }

    fn put_many(&mut self, prefix: &str, count: usize) {
        (0..count).for_each(|number| self.put(&format!("{prefix}{number:03}")));
    }

    fn delete(&mut self, key: &str) {
        let started = Instant::now();
        while !matches!(self.runtime.block_on(self.client.delete(BUCKET, key)), Ok(answer) if answer.status == 204) {
            assert!(started.elapsed() < PATIENCE, "DELETE {key}");
        }
        self.model.remove(key);
    }

    /// Reads everything, and the listing: exactly what was stored last, and nothing else.
    fn check(&self) {
        let started = Instant::now();
        for (key, body) in &self.model {
            loop {
                let answer = self.runtime.block_on(self.client.get(BUCKET, key));
                match answer {
                    Ok(answer) if answer.status == 200 => {
                        assert!(answer.body == *body, "{key} has bytes that were not stored last");
                        break;
                    }
                    Ok(answer) => assert!(answer.status.is_server_error(), "GET {key}: {}", answer.status),
                    Err(_) => {}
                }
                assert!(started.elapsed() < PATIENCE, "GET {key} is not answered");
            }
        }
        let listed = self.runtime.block_on(self.client.list(BUCKET, "")).unwrap();
        assert_eq!(listed, self.model.keys().cloned().collect::<Vec<_>>());
    }
}

/// The rows of `state` in the map.
fn disks_in(status: &Value, state: &str) -> Vec<u64> {
    let rows = status["disks"].as_array().unwrap().iter().filter(|row| row["state"] == state);
    rows.map(|row| row["disk"].as_u64().unwrap()).collect()
}

/// Dead disks with why they stay in service, where that is known.
fn dead_disks(status: &Value) -> Vec<(u64, String)> {
    let rows = status["heal"]["dead_disks"].as_array().cloned().unwrap_or_default();
    let row = |row: &Value| (row["disk"].as_u64().unwrap(), row["stays"].as_str().unwrap_or_default().to_owned());
    rows.iter().map(row).collect()
}

fn slots_moving(status: &Value) -> u64 {
    status["disks"].as_array().unwrap().iter().map(|row| row["slots_leaving"].as_u64().unwrap()).sum()
}

/// Waits until the status is as wanted; shows the last one when it never is.
fn wait_for(cluster: &Cluster, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let status = cluster.admin("GET", "/v1/status");
        if is(&status) {
            println!("    {what} after {:.1} s", started.elapsed().as_secs_f64());
            return status;
        }
        let short = format!("disks {}\nheal {}", status["disks"], status["heal"]);
        assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}: {short}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until these disks, and no others, are away, and every chunk is good on the others.
fn healed_without(cluster: &Cluster, away: &[u64], in_service: u64) {
    wait_for(cluster, &format!("disks {away:?} are away and nothing moves"), |status| {
        disks_in(status, "away") == away && slots_moving(status) == 0
    });
    let census = cluster.wait_full_redundancy(PATIENCE);
    assert_eq!(census["good_on_previous"], 0, "{census}");
    let status = cluster.admin("GET", "/v1/status");
    let holding = status["disks"].as_array().unwrap().iter().filter(|row| row["slots"].as_u64().unwrap() > 0);
    assert_eq!(holding.count() as u64, in_service, "{status}");
}

/// Runs a verb of an operator: what it says, or why it is refused.
fn granary(cluster: &Cluster, verb: &[&str]) -> Result<String, String> {
    let token = cluster.json()["admin_token_file"].as_str().unwrap().to_owned();
    let mut command = std::process::Command::new(granary_tests::cluster::bin("granary"));
    let done = command.args(verb).args(["--admin", cluster.admin_address(), "--token-file", &token]).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if done.status.success() {
        Ok(text(done.stdout))
    } else {
        Err(text(done.stderr))
    }
}

/// Gives a setting of the cluster another value.
fn set(cluster: &Cluster, name: &str, value: &str) {
    granary(cluster, &["config", "set", name, value]).unwrap();
}

fn lose(cluster: &Cluster, place: usize) -> DiskProcess {
    let disk = cluster.kill_disk(place);
    std::fs::remove_dir_all(&disk.dir).unwrap();
    disk
}

#[test]
fn disks_die_one_after_the_other_and_the_others_take_over_until_there_is_no_place_left() {
    let cluster = eight_disks(&[]);
    let mut load = Load::new(&cluster, "disks_die_one_after_the_other");
    load.put_many("first-", 40);
    cluster.wait_full_redundancy(PATIENCE);

    let mut away = vec![lose(&cluster, 7).disk];
    load.put_many("on-seven-", 5);
    healed_without(&cluster, &away, 7);
    load.check();

    away.insert(0, lose(&cluster, 1).disk);
    away.sort_unstable();
    load.put_many("on-six-", 5);
    healed_without(&cluster, &away, 6);
    load.check();

    // Six are left for six chunks: one more, and there is nobody who could take them over.
    let third = lose(&cluster, 5).disk;
    let status = wait_for(&cluster, "it is said that there is no substitute", |status| {
        dead_disks(status).iter().any(|(disk, why)| *disk == third && !why.is_empty())
    });
    let (_, why) = dead_disks(&status).remove(0);
    let expected =
        format!("nobody can take over what disk {third} held: scheme `4+2` puts 6 chunks on 6 different disks");
    assert!(why.starts_with(&expected) && why.contains("granary disk replace"), "{why}");
    assert_eq!(disks_in(&status, "away"), away, "it stays in service");
    load.put_many("degraded-", 5);
    load.check();
    let census = cluster.census();
    assert_eq!(census["extents_lost"].as_u64(), Some(0), "{census}");

    // A new disk in its place is all that is needed, and what is away does not matter.
    cluster.admin("POST", &format!("/v1/disks/{third}/replace"));
    healed_without(&cluster, &away, 6);
    load.check();
}

#[test]
fn a_disk_that_returns_with_old_data_does_no_harm_and_gets_its_share_again() {
    let cluster = eight_disks(&[]);
    let mut load = Load::new(&cluster, "a_disk_that_returns_with_old_data");
    load.put_many("kept-", 25);
    load.put_many("deleted-", 40);
    load.put_many("overwritten-", 15);
    cluster.wait_full_redundancy(PATIENCE);
    let stale = cluster.kill_disk(6);
    // One is deleted before the disk goes out, the others after what it held has moved.
    load.delete("deleted-000");
    healed_without(&cluster, &[stale.disk], 7);
    (1..40).for_each(|number| load.delete(&format!("deleted-{number:03}")));
    load.put_many("overwritten-", 15);
    load.put_many("new-", 10);
    load.check();
    // Its chunks are garbage by now: nothing of them is left in the queues when it comes back.
    let started = Instant::now();
    let collected =
        || granary_tests::cluster::metric(&cluster.metrics(), "granary_object_garbage_extents_deleted_total");
    while collected() < 55.0 {
        assert!(started.elapsed() < PATIENCE, "{} of 55 extents were collected", collected());
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("    garbage is collected after {:.1} s", started.elapsed().as_secs_f64());

    cluster.start_disk(&stale);
    wait_for(&cluster, "the disk is back in service", |status| disks_in(status, "away").is_empty());
    load.check();
    let status = wait_for(&cluster, "it has its share", |status| {
        let row = status["disks"].as_array().unwrap().iter().find(|row| row["disk"] == stale.disk).unwrap();
        row["slots"].as_u64().unwrap() > 0 && slots_moving(status) == 0
    });
    assert_eq!(dead_disks(&status), []);
    cluster.wait_full_redundancy(PATIENCE);
    load.check();
    // What was deleted while it was away nobody knows any more: it goes into quarantine, though it is more than the
    // limit allows, and is not listed.
    for (name, value) in [("heal.orphan_age", "5s"), ("heal.sweep_interval", "1s")] {
        set(&cluster, name, value);
    }
    let started = Instant::now();
    loop {
        let census = cluster.census();
        let (orphans, quarantined) = (census["orphans"].as_u64().unwrap(), census["orphans_quarantined"].as_u64());
        assert!(orphans > 16, "{census}");
        if quarantined == Some(orphans) {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "orphans outside quarantine: {census}");
        std::thread::sleep(Duration::from_millis(500));
    }
    let beyond = cluster.admin("GET", "/v1/status")["heal"]["disks_beyond_orphan_limit"].clone();
    assert_eq!(beyond, Value::Array(Vec::new()));
    load.check();
    assert!(granary_tests::cluster::metric(&cluster.metrics(), "granary_object_leftovers_deleted_total") > 0.0);
}

#[test]
fn a_disk_that_returns_in_the_middle_of_the_rebuild_is_read_from_and_ends_whole() {
    // So slow that it is still going on when the disk returns.
    let cluster = eight_disks(&["--set", SLOWLY]);
    let mut load = Load::new(&cluster, "a_disk_that_returns_in_the_middle");
    load.put_many("kept-", 40);
    load.put_many("deleted-", 10);
    cluster.wait_full_redundancy(PATIENCE);
    let disk = cluster.kill_disk(5);
    wait_for(&cluster, "it goes out", |status| disks_in(status, "away") == [disk.disk]);
    (0..10).for_each(|number| load.delete(&format!("deleted-{number:03}")));
    let status = cluster.admin("GET", "/v1/status");
    assert!(slots_moving(&status) > 0, "the rebuild was over too early");
    cluster.start_disk(&disk);
    wait_for(&cluster, "the disk is back in service", |status| disks_in(status, "away").is_empty());
    load.check();
    set(&cluster, "heal.rate", "0");
    wait_for(&cluster, "it has its share", |status| {
        let row = status["disks"].as_array().unwrap().iter().find(|row| row["disk"] == disk.disk).unwrap();
        row["slots"].as_u64().unwrap() > 0 && slots_moving(status) == 0
    });
    cluster.wait_full_redundancy(PATIENCE);
    load.check();
    cluster.wait_no_orphans(PATIENCE);
}

#[test]
fn disks_that_all_stop_answering_at_once_do_not_all_go_out() {
    // Ten servers: no more than one disk may go out within an hour, though there is room for three.
    let cluster = cluster_of(10, &["--servers", "10"]);
    let mut load = Load::new(&cluster, "disks_that_all_stop_answering");
    load.put_many("first-", 20);
    cluster.wait_full_redundancy(PATIENCE);
    let disks = cluster.disks();
    // Two of five metadata disks among them: a majority is left.
    let stopped: Vec<&DiskProcess> = [3, 4, 6].iter().map(|place| &disks[*place]).collect();
    stopped.iter().for_each(|disk| signal(disk.pid, Signal::STOP));
    let ids: Vec<u64> = stopped.iter().map(|disk| disk.disk).collect();
    let stay = |status: &Value, why: &str| dead_disks(status).iter().filter(|(_, stays)| stays.contains(why)).count();
    wait_for(&cluster, "one is out, and the limit holds the others", |status| {
        disks_in(status, "away").len() == 1 && stay(status, "heal.out_limit") == 2
    });
    // They are seen dead for three times as long as it takes for one to go out.
    wait_for(&cluster, "the others have been dead for long", |status| {
        let away = disks_in(status, "away");
        assert!(away.len() == 1 && ids.contains(&away[0]), "{away:?}");
        let after = status["heal"]["out_after_s"].as_u64().unwrap();
        let dead = status["heal"]["dead_disks"].as_array().unwrap().iter();
        dead.filter(|row| row["dead_s"].as_u64().unwrap() >= 3 * after).count() == 2
    });
    stopped.iter().for_each(|disk| signal(disk.pid, Signal::CONT));
    wait_for(&cluster, "all are back in service", |status| {
        let rows = status["disks"].as_array().unwrap();
        rows.iter().all(|row| row["state"] == "in" && row["slots"].as_u64().unwrap() > 0) && slots_moving(status) == 0
    });
    cluster.wait_full_redundancy(PATIENCE);
    load.check();

    // Half of all, which looks like a cut network: nobody goes out, though the limit would allow it.
    set(&cluster, "heal.out_limit", "100%");
    let half: Vec<&DiskProcess> = [0, 5, 6, 7, 8].iter().map(|place| &disks[*place]).collect();
    half.iter().for_each(|disk| signal(disk.pid, Signal::STOP));
    wait_for(&cluster, "half are dead and stay", |status| {
        let dead = status["heal"]["dead_disks"].as_array().unwrap().iter();
        let stays =
            dead.filter(|row| row["stays"].as_str().is_some_and(|why| why.contains("the network or the power")));
        stays.count() == 5
    });
    assert_eq!(disks_in(&cluster.admin("GET", "/v1/status"), "away"), Vec::<u64>::new());
    half.iter().for_each(|disk| signal(disk.pid, Signal::CONT));
    cluster.wait_full_redundancy(PATIENCE);
    load.check();
}

#[test]
fn a_rebuild_goes_on_after_kill_9_of_the_gateway_that_heals() {
    // So slow that it is still going on when the gateway dies.
    let mut cluster = eight_disks(&["--set", SLOWLY, "--set", "heal.lease_ttl=3s"]);
    let mut load = Load::new(&cluster, "a_rebuild_goes_on");
    load.put_many("first-", 40);
    cluster.wait_full_redundancy(PATIENCE);
    let dead = lose(&cluster, 7);
    let rebuilt =
        |cluster: &Cluster| granary_tests::cluster::metric(&cluster.metrics(), "granary_object_chunks_rebuilt_total");
    let started = Instant::now();
    while rebuilt(&cluster) < 5.0 {
        assert!(started.elapsed() < PATIENCE, "nothing is rebuilt");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(slots_moving(&cluster.admin("GET", "/v1/status")) > 0, "the rebuild was over too early");
    cluster.kill_gateway_and_restart();
    set(&cluster, "heal.rate", "0");
    healed_without(&cluster, &[dead.disk], 7);
    load.check();
    assert!(!dead.dir.exists() || std::fs::read_dir(&dead.dir).unwrap().next().is_none(), "no new disk in its place");
}

#[test]
fn a_disk_that_dies_while_it_is_draining_goes_out_and_what_was_to_leave_it_is_rebuilt() {
    let cluster = cluster_of(9, &[]);
    let mut load = Load::new(&cluster, "a_disk_that_dies_while_it_is_draining");
    load.put_many("first-", 40);
    cluster.wait_full_redundancy(PATIENCE);
    // Nothing moves until it is dead and has gone out.
    set(&cluster, "heal.move_settle", "10min");
    // The metadata are on the first five.
    let disk = cluster.disks()[8].disk;
    cluster.admin("POST", &format!("/v1/disks/{disk}/drain"));
    wait_for(&cluster, "it is draining", |status| disks_in(status, "draining") == [disk] && slots_moving(status) > 0);
    let dead = lose(&cluster, 8);
    wait_for(&cluster, "it goes out", |status| disks_in(status, "away") == [disk]);
    assert!(slots_moving(&cluster.admin("GET", "/v1/status")) > 0, "the drain was over too early");
    set(&cluster, "heal.move_settle", "500ms");
    healed_without(&cluster, &[dead.disk], 8);
    load.check();
    // It is empty by now, so it can be taken off the list.
    cluster.admin("POST", &format!("/v1/disks/{disk}/drain"));
    assert_eq!(cluster.admin("GET", "/v1/map")["disks"][disk.to_string()]["state"], "out");
}

#[test]
fn an_operator_who_knows_that_a_disk_is_dead_takes_it_out_at_once() {
    let cluster = eight_disks(&[]);
    let mut load = Load::new(&cluster, "an_operator_who_knows");
    load.put_many("first-", 20);
    cluster.wait_full_redundancy(PATIENCE);
    // By itself none would go out: it would take an hour, and none may.
    set(&cluster, "heal.out_after", "1h");
    set(&cluster, "heal.out_limit", "0");
    let disk = cluster.disks()[7].disk;
    let out = |disk: u64| granary(&cluster, &["disk", "out", &disk.to_string()]);
    let refused = out(disk).unwrap_err();
    assert!(refused.contains("answers") && refused.contains("granary disk drain"), "{refused}");
    let dead = lose(&cluster, 7);
    wait_for(&cluster, "the disk is down", |status| {
        let rows = status["disks"].as_array().unwrap().iter();
        rows.filter(|row| row["disk"] == disk && row["health"] == "down").count() == 1
    });
    // What was set a moment ago counts.
    set(&cluster, "heal.fill_ceiling", "1%");
    let refused = out(disk).unwrap_err();
    assert!(refused.contains("fuller than 1 %"), "{refused}");
    set(&cluster, "heal.fill_ceiling", "100%");
    let said = out(disk).unwrap();
    assert!(said.contains("is out of service"), "{said}");
    healed_without(&cluster, &[dead.disk], 7);
    load.check();
    let again = out(disk).unwrap_err();
    assert!(again.contains("out of service already"), "{again}");

    // Four of seven are silent: that may be the network.
    let disks = cluster.disks();
    let silent: Vec<&DiskProcess> = disks[3..7].iter().collect();
    silent.iter().for_each(|disk| signal(disk.pid, Signal::STOP));
    wait_for(&cluster, "four are down", |status| {
        let rows = status["disks"].as_array().unwrap().iter();
        rows.filter(|row| row["health"] == "down" && row["state"] == "in").count() == 4
    });
    let refused = out(silent[3].disk).unwrap_err();
    assert!(refused.contains("4 of 7 disks in service do not answer"), "{refused}");
    silent.iter().for_each(|disk| signal(disk.pid, Signal::CONT));
    cluster.wait_full_redundancy(PATIENCE);
    load.check();
}

/// What a node says to a client that speaks version 2 of the node protocol and no other: the verdict in its hello.
fn verdict_on_version_2(cluster: &Cluster, disk: u64) -> u8 {
    let map = cluster.admin("GET", "/v1/map");
    let disk = &map["disks"][disk.to_string()];
    let id = |value: &Value| hex::decode(value.as_str().unwrap()).unwrap();
    let mut stream = TcpStream::connect(disk["address"].as_str().unwrap()).unwrap();
    let hello = [b"granary\0\x00\x02\x02\x00", &id(&map["cluster_id"])[..], &id(&disk["uuid"]), &[0; 32], &[9; 32]];
    stream.write_all(&hello.concat()).unwrap();
    let mut prefix = [0; 12];
    stream.read_exact(&mut prefix).unwrap();
    prefix[10]
}

#[test]
fn a_new_cluster_begins_at_the_level_at_which_disks_can_be_away_and_speaks_to_nobody_who_cannot_read_that() {
    let cluster = eight_disks(&[]);
    let started = Instant::now();
    loop {
        let levels = cluster.admin("GET", "/v1/feature-level");
        let shards = levels["shards"].as_array().unwrap();
        if shards.len() > 2 && shards.iter().all(|row| row["level"] == 2) && levels["can_raise_to"].is_null() {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{levels}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let map = cluster.admin("GET", "/v1/map");
    for disk in cluster.disks() {
        // Where the root shard is not, nothing is to be told as long as no disk is away.
        let is_root = map["shards"][0]["members"].as_array().unwrap().contains(&disk.disk.into());
        assert_eq!(verdict_on_version_2(&cluster, disk.disk), u8::from(is_root), "disk {}", disk.disk);
    }
}
