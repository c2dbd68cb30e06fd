//! A cluster run by hand, without `granary dev`: disks formatted and started one by one, formed by `granary init`,
//! served by two gateways. Every step of docs/operations.md in short form, and what an operator is told when a step
//! goes wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_s3_client::Client;
use granary_tests::cluster::{self, bin, free_ports, http, metric, scratch, signal};
use granary_tests::seed::Random;
use rustix::process::Signal;
use serde_json::{json, Value};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CLUSTER: &str = "0123456789abcdef0123456789abcdef";
const KEY: &str = "AKIAOPERATOR";
const PATIENCE: Duration = Duration::from_secs(60);

/// A process of the cluster; killed if the test ends early.
struct Process(Child);

impl Process {
    fn start(mut command: Command, log: &Path) -> Process {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        Process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    /// SIGTERM; gives the exit code.
    fn stop(mut self) -> Option<i32> {
        signal(self.pid(), Signal::TERM);
        self.0.wait().unwrap().code()
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a command that ends by itself said.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    text: String,
}

impl Said {
    fn well(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.text);
        self.text
    }

    /// It failed, and its words name all of this.
    fn failed(self, words: &[&str]) {
        assert_ne!(self.code, Some(0), "{}", self.text);
        for word in words {
            assert!(self.text.contains(word), "`{word}` is not in: {}", self.text);
        }
    }
}

struct Operator {
    folder: tempfile::TempDir,
    secret_key: String,
}

impl Operator {
    fn new() -> Operator {
        let operator = Operator { folder: scratch("operator"), secret_key: hex::encode(random::<20>()) };
        operator.private("cluster-secret", &hex::encode(random::<32>()));
        operator.private("wrong-secret", &hex::encode(random::<32>()));
        operator.private("admin-token", &hex::encode(random::<32>()));
        operator.private("wrong-token", &hex::encode(random::<32>()));
        operator
            .private("root-credentials", &json!({"access_key": KEY, "secret_key": operator.secret_key}).to_string());
        operator
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn private(&self, name: &str, text: &str) {
        let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(self.path(name)).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    }

    /// Options name files as an operator in that folder does: by bare names.
    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(bin(program));
        command.args(args).current_dir(self.folder.path()).env_remove("GRANARY_LOG");
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Said {
        let output = self.command(program, args).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        Said { code: output.status.code(), text: String::from_utf8(text).unwrap() }
    }

    /// Formats a disk; gives its UUID.
    fn format(&self, dir: &str, number: u32) -> String {
        let args = ["format", "--dir", dir, "--cluster", CLUSTER, "--disk", &number.to_string()];
        let said = self.run("granary-disk-node", &args).well();
        said.split(['(', ')']).nth(1).unwrap().to_owned()
    }

    /// Starts a disk node; gives its address.
    fn serve(&self, dir: &str, address: &str) -> (Process, String) {
        self.serve_with(dir, address, &[])
    }

    fn serve_with(&self, dir: &str, address: &str, extra: &[&str]) -> (Process, String) {
        let args = [
            "serve",
            "--dir",
            dir,
            "--listen",
            address,
            "--secret-file",
            "cluster-secret",
            "--set",
            "node.segment=16MiB",
        ];
        let args = [&args, extra].concat();
        let process = Process::start(self.command("granary-disk-node", &args), &self.path(&format!("{dir}.log")));
        let file = self.path(dir).join("address");
        let address = eventually("the disk node tells its address", || std::fs::read_to_string(&file).ok());
        (process, address.trim().to_owned())
    }

    /// Formats and starts `disk-1` to `disk-6`: their nodes with the address of each, and their rows for
    /// `granary init`.
    fn six_disks(&self) -> (Vec<(Process, String)>, Vec<Value>) {
        self.six_disks_with(&[])
    }

    /// The same, with these arguments of their nodes.
    fn six_disks_with(&self, extra: &[&str]) -> (Vec<(Process, String)>, Vec<Value>) {
        let one = |number: u32| {
            let dir = format!("disk-{number}");
            let uuid = self.format(&dir, number);
            let (node, address) = self.serve_with(&dir, "127.0.0.1:0", extra);
            let row = json!({
                "uuid": uuid, "address": address, "zone": "a", "rack": "1", "server": "s1", "weight": 1000, "metadata": true
            });
            ((node, address), row)
        };
        (1..=6).map(one).unzip()
    }

    fn gateway(&self, s3: &str, admin: &str) -> Process {
        self.gateway_with(s3, admin, &[])
    }

    fn gateway_with(&self, s3: &str, admin: &str, extra: &[&str]) -> Process {
        let args = [
            "gateway",
            "--map",
            "map.json",
            "--secret-file",
            "cluster-secret",
            "--s3",
            s3,
            "--admin",
            admin,
            "--root-credentials",
            "root-credentials",
            "--admin-token-file",
            "admin-token",
        ];
        let args = [&args, extra].concat();
        let process = Process::start(self.command("granary", &args), &self.path("gateway.log"));
        eventually("the gateway is ready", || {
            matches!(http(admin, "GET", "/readyz", None, PATIENCE), Ok((200, _))).then_some(())
        });
        process
    }

    fn init(&self, config: &Value, secret: &str) -> Said {
        std::fs::write(self.path("cluster-config.json"), config.to_string()).unwrap();
        self.run(
            "granary",
            &["init", "--config", "cluster-config.json", "--secret-file", secret, "--map-out", "map.json"],
        )
    }

    fn client(&self, s3: &str) -> Client {
        Client::new(s3, KEY, &self.secret_key, PATIENCE)
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

fn eventually<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    cluster::eventually(what, PATIENCE, look)
}

#[test]
fn a_cluster_run_by_hand_is_formed_served_by_two_gateways_repaired_and_stopped() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut random = Random::of_this_run("operator");
    let operator = Operator::new();

    // Disks, each formatted and started by itself.
    let (nodes, disks) = operator.six_disks();
    let mut nodes: Vec<Process> = nodes.into_iter().map(|(node, _)| node).collect();
    let said = operator.run("granary-disk-node", &["serve", "--dir", ".", "--secret-file", "cluster-secret"]);
    said.failed(&["refusing to use somebody else's folder"]);
    let other = "ffffffffffffffffffffffffffffffff";
    let args = ["serve", "--dir", "disk-1", "--cluster", other, "--secret-file", "cluster-secret"];
    operator.run("granary-disk-node", &args).failed(&["belongs to cluster", CLUSTER, other]);

    // Forming: mistakes are told at once and change nothing; the right configuration then works.
    let config = json!({"cluster_id": CLUSTER, "scheme": "4+2", "failure_domain": "disk", "shards": 4, "disks": disks});
    let begun = Instant::now();
    operator.init(&config, "wrong-secret").failed(&["does not have the same cluster secret"]);
    let mut mistaken = config.clone();
    mistaken["disks"][2]["uuid"] = json!(other);
    operator.init(&mistaken, "cluster-secret").failed(&["disk 3", other, "nothing was changed"]);
    assert!(begun.elapsed() < Duration::from_secs(20), "mistakes took {:?} to be told", begun.elapsed());
    operator.init(&config, "cluster-secret").well();
    operator.init(&config, "cluster-secret").well();
    let mut wider = config.clone();
    wider["shards"] = json!(5);
    operator.init(&wider, "cluster-secret").failed(&["another map"]);
    operator.init(&config, "cluster-secret").well();

    // Two gateways: what one wrote, the other reads and lists.
    let ports: [u16; 4] = free_ports();
    let [s3_a, admin_a, s3_b, admin_b] = ports.map(|port| format!("127.0.0.1:{port}"));
    let gateway_a = operator.gateway(&s3_a, &admin_a);
    let gateway_b = operator.gateway(&s3_b, &admin_b);
    let (a, b) = (operator.client(&s3_a), operator.client(&s3_b));
    let bodies: Vec<Bytes> =
        [100, 50_000, 3_000_000, 9_000_001].into_iter().map(|len| random.bytes(len).into()).collect();
    runtime.block_on(async {
        assert_eq!(a.make_bucket("hand").await.unwrap().status, 200);
        for (number, body) in bodies.iter().enumerate() {
            assert_eq!(a.put("hand", &format!("o{number}"), body.clone()).await.unwrap().status, 200);
        }
    });
    let all_there = |client: &Client| {
        runtime.block_on(async {
            assert_eq!(client.list("hand", "").await.unwrap(), ["o0", "o1", "o2", "o3"]);
            for (number, body) in bodies.iter().enumerate() {
                let answer = client.get("hand", &format!("o{number}")).await.unwrap();
                assert!(answer.status == 200 && answer.body == *body, "o{number}: {}", answer.status);
            }
        });
    };
    all_there(&b);
    let ask = |args: &[&str]| {
        operator.run("granary", &[args, &["--admin", &admin_b, "--token-file", "admin-token"]].concat())
    };
    ask(&["census"]).well();
    operator
        .run("granary", &["status", "--admin", &admin_b, "--token-file", "wrong-token"])
        .failed(&["admin token", "wrong"]);

    // A disk dies and is wiped.
    nodes.remove(2).kill();
    std::fs::remove_dir_all(operator.path("disk-3")).unwrap();
    all_there(&a);
    ask(&["disk", "replace", "3"]).failed(&["--disk 7", CLUSTER, "--uuid"]);
    ask(&["disk", "replace", "3", "--yes"]).failed(&["--uuid"]);
    ask(&["disk", "replace", "3", "--yes", "--uuid", other]).failed(&["does not answer", "--disk 7"]);
    let uuid = operator.format("disk-again", 3);
    let (wrong, address) = operator.serve("disk-again", "127.0.0.1:0");
    ask(&["disk", "replace", "3", "--yes", "--uuid", &uuid, "--address", &address])
        .failed(&["disk 3", "must be disk 7"]);
    assert_eq!(wrong.stop(), Some(0));
    let uuid = operator.format("disk-7", 7);
    let (node, address) = operator.serve("disk-7", "127.0.0.1:0");
    nodes.push(node);
    ask(&["disk", "replace", "3", "--yes", "--uuid", &uuid, "--address", &address]).well();
    let census = eventually("full redundancy", || Some(ask(&["census"])).filter(|said| said.code == Some(0)));
    assert!(census.text.contains("0  missing"), "{}", census.text);
    eventually("status names the new disk", || ask(&["status"]).well().contains(&address).then_some(()));

    // A gateway that starts again with the map of the first day finds the cluster of today.
    assert_eq!(gateway_a.stop(), Some(0));
    let gateway_a = operator.gateway(&s3_a, &admin_a);
    all_there(&a);

    // Disks without room: a clear error that no client retries for hours, and a warning; reading and deleting go on.
    for node in nodes {
        assert_eq!(node.stop(), Some(0));
    }
    let dirs = ["disk-1", "disk-2", "disk-4", "disk-5", "disk-6", "disk-7"];
    let addresses: Vec<&str> = disks.iter().map(|disk| disk["address"].as_str().unwrap()).collect();
    let addresses = [addresses[0], addresses[1], addresses[3], addresses[4], addresses[5], &address];
    let full = ["--set", "node.reserve=900TiB"];
    let nodes: Vec<Process> =
        dirs.iter().zip(addresses).map(|(dir, address)| operator.serve_with(dir, address, &full).0).collect();
    eventually("all disks are up, and full", || {
        let (status, said) = http(&admin_a, "GET", "/readyz", None, PATIENCE).unwrap();
        (status == 200 && said.matches("is full").count() == 6).then_some(())
    });
    let refused = runtime.block_on(a.put("hand", "more", bodies[2].clone())).unwrap();
    assert_eq!((refused.status.as_u16(), refused.code()), (507, "InsufficientStorage"), "{}", refused.text());
    all_there(&a);
    assert_eq!(runtime.block_on(a.delete("hand", "o3")).unwrap().status, 204);

    // Everything ends in order, and every disk is sound.
    for process in [gateway_a, gateway_b].into_iter().chain(nodes) {
        assert_eq!(process.stop(), Some(0));
    }
    for number in [1, 2, 4, 5, 6, 7] {
        let said =
            operator.run("granary-disk-node", &["inspect", "--dir", &format!("disk-{number}"), "--verify"]).well();
        assert!(said.contains("no damage found; every block was read"), "{said}");
    }
}

/// Two nodes come back on each other's addresses. What is written meanwhile lies on the right disks or is refused.
#[test]
fn disks_that_swapped_addresses_take_nothing_meant_for_each_other() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut random = Random::of_this_run("swapped");
    let operator = Operator::new();
    let (mut nodes, disks) = operator.six_disks();
    let config = json!({"cluster_id": CLUSTER, "scheme": "4+2", "failure_domain": "disk", "shards": 2, "disks": disks});
    operator.init(&config, "cluster-secret").well();
    let [s3, admin] = free_ports::<2>().map(|port| format!("127.0.0.1:{port}"));
    let gateway = operator.gateway(&s3, &admin);
    let client = operator.client(&s3);
    let body: Bytes = random.bytes(3_000_000).into();
    runtime.block_on(async {
        assert_eq!(client.make_bucket("swapped").await.unwrap().status, 200);
        assert_eq!(client.put("swapped", "before", body.clone()).await.unwrap().status, 200);
    });

    let (second, at_second) = nodes.remove(1);
    let (first, at_first) = nodes.remove(0);
    assert_eq!((first.stop(), second.stop()), (Some(0), Some(0)));
    let chunks = |dir: &str| {
        let said = operator.run("granary-disk-node", &["inspect", "--dir", dir, "--json"]).well();
        let report: Value = serde_json::from_str(&said).unwrap();
        report["segments"].as_array().unwrap().iter().map(|segment| segment["records"].as_u64().unwrap()).sum::<u64>()
    };
    let before = [chunks("disk-1"), chunks("disk-2")];
    assert!(before.iter().all(|chunks| *chunks > 0), "{before:?}");
    let first = operator.serve("disk-1", &at_second).0;
    let second = operator.serve("disk-2", &at_first).0;
    // Both are known to be elsewhere once their pings were refused; before that a write may time out.
    let stored = eventually("a write", || {
        let key = format!("while-{}", random.number());
        let answer = runtime.block_on(client.put("swapped", &key, body.clone())).unwrap();
        (answer.status == 200).then_some(key)
    });
    let read = |key: &str| {
        let answer = runtime.block_on(client.get("swapped", key)).unwrap();
        (answer.status == 200).then(|| assert!(answer.body == body, "{key}: other bytes"))
    };
    eventually("reads while two disks are not where they belong", || read("before").and_then(|()| read(&stored)));
    assert_eq!((first.stop(), second.stop()), (Some(0), Some(0)));
    assert_eq!([chunks("disk-1"), chunks("disk-2")], before, "chunks on a disk that was not meant");

    let first = operator.serve("disk-1", &at_first).0;
    let second = operator.serve("disk-2", &at_second).0;
    eventually("full redundancy", || {
        let args = ["census", "--admin", &admin, "--token-file", "admin-token"];
        (operator.run("granary", &args).code == Some(0)).then_some(())
    });
    for key in ["before", &stored] {
        read(key).expect("every disk is at its place again");
    }
    assert_eq!(gateway.stop(), Some(0));
    for node in [first, second].into_iter().chain(nodes.into_iter().map(|(node, _)| node)) {
        assert_eq!(node.stop(), Some(0));
    }
}

/// Requests of a client under way at once.
const AT_ONCE: usize = 24;

/// Puts and gets many objects at once through each of the gateways, whose addresses these are; every request succeeds.
async fn load(operator: &Operator, gateways: &[(String, String)], body: &Bytes, name: &str) {
    let requests = gateways.iter().zip(0..).flat_map(|((s3, _), gateway)| {
        let client = Arc::new(operator.client(s3));
        (0..AT_ONCE).map(move |number| (client.clone(), format!("{name}/{gateway}/{number}"), body.clone()))
    });
    let tasks: Vec<_> = requests
        .map(|(client, key, body)| {
            tokio::spawn(async move {
                for _ in 0..3 {
                    assert_eq!(client.put("shared", &key, body.clone()).await.unwrap().status, 200, "PUT {key}");
                    let answer = client.get("shared", &key).await.unwrap();
                    assert!(answer.status == 200 && answer.body == body, "GET {key}: {}", answer.status);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[test]
fn gateways_that_come_while_others_work_share_the_places_of_disk_nodes() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let operator = Operator::new();
    // The requests of two gateways would take them all.
    let (_nodes, disks) = operator.six_disks_with(&["--set", "node.max_connections=36"]);
    let config = json!({"cluster_id": CLUSTER, "scheme": "4+2", "failure_domain": "disk", "shards": 4, "disks": disks});
    operator.init(&config, "cluster-secret").well();
    let ports: [u16; 8] = free_ports();
    let addresses: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let (chunks, _) = addresses.as_chunks::<2>();
    let gateways: Vec<(String, String)> = chunks.iter().map(|[s3, admin]| (s3.clone(), admin.clone())).collect();
    // However slow the machine is: who waits for a place of its own gateway's gets it.
    let patient = ["--set", "disks.pool_wait=30s", "--set", "object.hedge_floor=60s"];
    let start = |(s3, admin): &(String, String)| operator.gateway_with(s3, admin, &patient);
    let mut processes: Vec<Process> = gateways[..3].iter().map(start).collect();
    // Each pings all six disks twice: at the first time all are counted, at the second all are told.
    let all_are_told = |gateways: &[(String, String)]| {
        let pings = |admin: &str| {
            let (_, page) = http(admin, "GET", "/metrics", None, PATIENCE).unwrap();
            metric(&page, "granary_disk_pings_good_total")
        };
        let before: Vec<f64> = gateways.iter().map(|(_, admin)| pings(admin)).collect();
        for ((_, admin), before) in gateways.iter().zip(before) {
            eventually("the gateway pings", || (pings(admin) >= before + 18.0).then_some(()));
        }
    };
    let busy = || {
        let logs = (1..=6).map(|disk| std::fs::read_to_string(operator.path(&format!("disk-{disk}.log"))).unwrap());
        logs.map(|log| log.matches("all places are taken").count()).sum::<usize>()
    };
    let body: Bytes = Random::of_this_run("shares").bytes(200_000).into();
    runtime.block_on(async {
        assert_eq!(operator.client(&gateways[0].0).make_bucket("shared").await.unwrap().status, 200);
    });
    all_are_told(&gateways[..3]);
    runtime.block_on(load(&operator, &gateways[..3], &body, "three"));
    assert_eq!(busy(), 0, "somebody was told that a node is busy");

    // While the fourth comes, a node may be full for a moment; no client hears of it.
    let coming = std::thread::scope(|scope| {
        let fourth = scope.spawn(|| start(&gateways[3]));
        runtime.block_on(load(&operator, &gateways[..3], &body, "meanwhile"));
        fourth.join().unwrap()
    });
    processes.push(coming);
    all_are_told(&gateways);
    let before = busy();
    runtime.block_on(load(&operator, &gateways, &body, "four"));
    assert_eq!(busy(), before, "somebody was told that a node is busy");
    for process in processes {
        assert_eq!(process.stop(), Some(0));
    }
}
