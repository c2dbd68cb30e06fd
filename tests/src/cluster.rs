//! A real cluster: `granary dev` as a child process in a folder of its own, removed at the end.

use granary_s3_client::Client;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ACCESS_KEY: &str = "AKIAGRANARYTEST00000";

/// How the cluster is made.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many disk nodes.
    pub disks: u32,
    /// Redundancy scheme, written K+M.
    pub scheme: &'static str,
    /// A disk node that dies is started again by `granary dev`.
    pub restart: bool,
    /// Metadata shards.
    pub shards: u32,
    /// Further arguments of `granary dev`.
    pub extra: Vec<String>,
    /// Further environment.
    pub env: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Options {
        Options { disks: 6, scheme: "4+2", restart: false, shards: 4, extra: Vec::new(), env: Vec::new() }
    }
}

/// One disk node, by `cluster.json`.
#[derive(Debug, Clone)]
pub struct DiskProcess {
    /// Its id in the map; 0 while none lives there.
    pub disk: u64,
    /// Its process.
    pub pid: i32,
    /// Its directory.
    pub dir: PathBuf,
}

/// A running cluster.
pub struct Cluster {
    folder: tempfile::TempDir,
    options: Options,
    child: Option<Child>,
    s3: String,
    admin: String,
    secret_key: String,
}

/// The folder of the binaries under test: beside the test's own.
pub fn bin(name: &str) -> PathBuf {
    let mut folder = std::env::current_exe().expect("path of the test").parent().expect("folder").to_path_buf();
    if folder.ends_with("deps") {
        folder.pop();
    }
    let program = folder.join(name);
    assert!(program.exists(), "{} is not built; `make test` builds it first", program.display());
    program
}

/// Where heavy data goes: GRANARY_TEST_DIR, or the system's temporary folder. Not tmpfs: durability is tested here.
pub fn scratch(name: &str) -> tempfile::TempDir {
    let base = std::env::var_os("GRANARY_TEST_DIR").map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
    tempfile::Builder::new().prefix(&format!("granary-{name}-")).tempdir_in(base).expect("a folder for the test")
}

/// Free ports. They may be taken by others before they are used; the caller then sees a clear error of `granary dev`.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: Vec<TcpListener> = (0..N).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr().expect("address").port();
    }
    ports
}

impl Cluster {
    /// Starts a fresh cluster and waits until it is ready.
    pub fn start(options: Options) -> Cluster {
        let [s3, admin] = free_ports();
        let mut bytes = [0u8; 20];
        getrandom::fill(&mut bytes).expect("randomness of the operating system");
        let mut cluster = Cluster {
            folder: scratch("cluster"),
            options,
            child: None,
            s3: format!("127.0.0.1:{s3}"),
            admin: format!("127.0.0.1:{admin}"),
            secret_key: hex::encode(bytes),
        };
        cluster.spawn();
        cluster.wait_ready(Duration::from_secs(90));
        cluster
    }

    fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join("granary.log"))
            .expect("log file");
        let mut command = Command::new(bin("granary"));
        command
            .arg("dev")
            .arg("--dir")
            .arg(self.dir())
            .args([
                "--disks",
                &self.options.disks.to_string(),
                "--scheme",
                self.options.scheme,
                "--shards",
                &self.options.shards.to_string(),
            ])
            .args(["--s3", &self.s3, "--admin", &self.admin])
            .args(if self.options.restart { None } else { Some("--no-restart") })
            .args(&self.options.extra)
            .env("GRANARY_ROOT_ACCESS_KEY", ACCESS_KEY)
            .env("GRANARY_ROOT_SECRET_KEY", &self.secret_key)
            .envs(self.options.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log file"))
            .stderr(log);
        self.child = Some(command.spawn().expect("granary dev"));
    }

    /// The cluster's own folder (`--dir`).
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    /// A folder beside it for the test's files, removed with it.
    pub fn work(&self) -> PathBuf {
        let work = self.folder.path().join("work");
        std::fs::create_dir_all(&work).expect("work folder");
        work
    }

    /// `host:port` of S3.
    pub fn s3(&self) -> &str {
        &self.s3
    }

    /// `host:port` of the admin API.
    pub fn admin_address(&self) -> &str {
        &self.admin
    }

    /// Root access key.
    pub fn access_key(&self) -> &str {
        ACCESS_KEY
    }

    /// Root secret key.
    pub fn secret_key(&self) -> &str {
        &self.secret_key
    }

    /// A client with the root keys.
    pub fn client(&self) -> Client {
        Client::new(&self.s3, ACCESS_KEY, &self.secret_key, Duration::from_secs(60))
    }

    /// Waits until `/readyz` says 200.
    pub fn wait_ready(&mut self, limit: Duration) {
        let started = Instant::now();
        loop {
            let said = http(&self.admin, "GET", "/readyz", None, Duration::from_secs(5));
            if matches!(&said, Ok((200, _))) {
                return;
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("state of granary dev"));
            if ended.is_some() || started.elapsed() > limit {
                self.show_logs();
                panic!("the cluster is not ready after {:?}: ended {ended:?}, readyz {said:?}", started.elapsed());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// `cluster.json`.
    pub fn json(&self) -> Value {
        let path = self.dir().join("cluster.json");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).expect("cluster.json is JSON")
    }

    /// The disk nodes, in order of their folders.
    pub fn disks(&self) -> Vec<DiskProcess> {
        let json = self.json();
        let processes = json["processes"].as_array().expect("processes in cluster.json");
        let mut disks: Vec<DiskProcess> = processes
            .iter()
            .filter(|process| process["role"] == "disk-node")
            .map(|process| DiskProcess {
                disk: process["disk"].as_u64().unwrap_or(0),
                pid: process["pid"].as_i64().unwrap_or(0) as i32,
                dir: PathBuf::from(process["dir"].as_str().expect("dir")),
            })
            .collect();
        disks.sort_by_key(|disk| disk.dir.clone());
        disks
    }

    /// SIGKILL to the disk node in that place (by folder, from 0), and waits until it is gone.
    pub fn kill_disk(&self, place: usize) -> DiskProcess {
        let disk = self.disks().into_iter().nth(place).expect("a disk node in that place");
        signal(disk.pid, rustix::process::Signal::KILL);
        let started = Instant::now();
        while alive(disk.pid) {
            assert!(started.elapsed() < Duration::from_secs(10), "disk node {} does not die", disk.disk);
            std::thread::sleep(Duration::from_millis(5));
        }
        println!("    killed disk node {} (place {place})", disk.disk);
        disk
    }

    /// Starts the disk node in that place again; an empty or missing directory becomes a new disk.
    pub fn start_disk(&self, disk: &DiskProcess) {
        let said = self.admin("POST", &format!("/v1/disks/{}/start", disk.disk));
        println!("    started disk node {}: {said}", disk.disk);
    }

    /// A call of the admin API that must succeed.
    pub fn admin(&self, method: &str, path: &str) -> Value {
        let token = std::fs::read_to_string(self.json()["admin_token_file"].as_str().expect("token file"))
            .expect("admin token");
        let (status, body) = http(&self.admin, method, path, Some(token.trim()), Duration::from_secs(600))
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        assert!((200..300).contains(&status), "{method} {path}: {status} {body}");
        serde_json::from_str(&body).unwrap_or(Value::String(body))
    }

    /// A census: every chunk read.
    pub fn census(&self) -> Value {
        self.admin("POST", "/v1/census")
    }

    /// After a run with faults: sweeps as if it had been long ago, and waits until everything on the disks that no
    /// shard knows is in quarantine.
    pub fn wait_no_orphans(&self, limit: Duration) {
        for (name, value) in [("heal.orphan_age", "5s"), ("heal.sweep_interval", "1s"), ("heal.orphan_limit", "100%")] {
            let token = self.json()["admin_token_file"].as_str().expect("token file").to_owned();
            let mut command = Command::new(bin("granary"));
            command.args(["config", "set", name, value, "--admin", &self.admin, "--token-file", &token]);
            let done = command.output().expect("granary config");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        let started = Instant::now();
        loop {
            let census = self.census();
            let number =
                |name: &str| census[name].as_u64().unwrap_or_else(|| panic!("census without {name}: {census}"));
            if number("orphans") == number("orphans_quarantined") {
                println!("    {} orphans, all of them in quarantine", number("orphans"));
                return;
            }
            assert!(started.elapsed() < limit, "orphans outside quarantine after {:?}: {census}", started.elapsed());
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Waits until a census finds every chunk good.
    pub fn wait_full_redundancy(&self, limit: Duration) -> Value {
        let started = Instant::now();
        loop {
            let census = self.census();
            let number =
                |name: &str| census[name].as_u64().unwrap_or_else(|| panic!("census without {name}: {census}"));
            if number("good") == number("chunks_expected")
                && number("missing") + number("corrupt") + number("unreachable") == 0
            {
                println!("    census after {:.1} s: {census}", started.elapsed().as_secs_f64());
                return census;
            }
            assert!(started.elapsed() < limit, "redundancy is not back after {:?}: {census}", started.elapsed());
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> String {
        http(&self.admin, "GET", "/metrics", None, Duration::from_secs(10)).expect("metrics").1
    }

    /// Waits until clients have uploaded `bytes` more than now while `client` still runs: the middle of a backup. Fails
    /// when it ends first.
    pub fn wait_until_uploading(&self, client: &mut Child, bytes: u64) {
        let uploaded = || metric(&self.metrics(), "granary_s3_bytes_in_total");
        let (before, started) = (uploaded(), Instant::now());
        while uploaded() < before + bytes as f64 {
            let ended = client.try_wait().expect("state of the client");
            assert!(
                ended.is_none(),
                "the client ended ({ended:?}) after {:.0} bytes; the disks were to die before",
                uploaded() - before
            );
            assert!(started.elapsed() < Duration::from_secs(60), "the client uploads nothing");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(client.try_wait().expect("state of the client").is_none(), "the client was too fast");
    }

    /// SIGKILL to the gateway process (and so to everything that depends on it), then a new start on the same folder.
    pub fn kill_all_and_restart(&mut self) {
        let disks = self.disks();
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill granary dev");
            child.wait().expect("wait for granary dev");
        }
        for disk in &disks {
            signal(disk.pid, rustix::process::Signal::KILL);
        }
        for disk in &disks {
            wait_gone(disk.pid);
        }
        self.spawn();
        self.wait_ready(Duration::from_secs(90));
    }

    /// SIGKILL to `granary dev` alone; its disk nodes must end by themselves. Then a new start.
    pub fn kill_gateway_and_restart(&mut self) {
        let disks = self.disks();
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill granary dev");
            child.wait().expect("wait for granary dev");
        }
        for disk in &disks {
            wait_gone(disk.pid);
        }
        self.spawn();
        self.wait_ready(Duration::from_secs(90));
    }

    /// SIGTERM and a clean end; gives the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        signal(child.id() as i32, rustix::process::Signal::TERM);
        let started = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("state of granary dev") {
                return status.code();
            }
            if started.elapsed() > Duration::from_secs(40) {
                child.kill().expect("kill granary dev");
                child.wait().expect("wait for granary dev");
                self.show_logs();
                panic!("granary dev does not stop on SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts again after [`Cluster::stop`].
    pub fn start_again(&mut self) {
        self.spawn();
        self.wait_ready(Duration::from_secs(90));
    }

    /// Pid of `granary dev`.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().map(|child| child.id() as i32).expect("a running cluster")
    }

    fn show_logs(&self) {
        let mut logs = vec![self.folder.path().join("granary.log")];
        if let Ok(entries) = std::fs::read_dir(self.dir().join("logs")) {
            logs.extend(entries.flatten().map(|entry| entry.path()));
        }
        for log in logs {
            if let Ok(text) = std::fs::read(&log) {
                let start = text.len().saturating_sub(6000);
                println!("--- {}\n{}", log.display(), String::from_utf8_lossy(&text[start..]));
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        let disks: Vec<i32> =
            if self.child.is_some() && self.dir().join("cluster.json").exists() && !std::thread::panicking() {
                self.disks().iter().map(|disk| disk.pid).collect()
            } else {
                Vec::new()
            };
        if let Some(mut child) = self.child.take() {
            signal(child.id() as i32, rustix::process::Signal::TERM);
            let started = Instant::now();
            while matches!(child.try_wait(), Ok(None)) && started.elapsed() < Duration::from_secs(15) {
                std::thread::sleep(Duration::from_millis(20));
            }
            // Gone already, or past the time it had to stop.
            if child.kill().is_ok() {
                let _status = child.wait();
            }
        }
        for pid in disks {
            if alive(pid) {
                signal(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Sends a signal; a process that is gone already is no failure.
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        if let Err(error) = rustix::process::kill_process(pid, signal) {
            assert_eq!(error, rustix::io::Errno::SRCH, "signal to {pid:?}");
        }
    }
}

/// True while the process runs; a zombie does not.
pub fn alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

fn wait_gone(pid: i32) {
    let started = Instant::now();
    while alive(pid) {
        assert!(started.elapsed() < Duration::from_secs(20), "process {pid} outlives its cluster");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Resident memory of a process, in bytes; the peak it ever had with `peak`.
pub fn memory_bytes(pid: i32, peak: bool) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = if peak { "VmHWM:" } else { "VmRSS:" };
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// The sum of a metric over its labels.
pub fn metric(page: &str, name: &str) -> f64 {
    page.lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// One plain HTTP request; status and body.
pub fn http(
    address: &str,
    method: &str,
    path: &str,
    token: Option<&str>,
    limit: Duration,
) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(limit))?;
    let auth = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    stream.write_all(
        format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n{auth}Content-Length: 0\r\nConnection: close\r\n\r\n")
            .as_bytes(),
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let bad = || std::io::Error::other(format!("not an HTTP answer: {answer}"));
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(bad)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    Ok((
        status,
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { dechunk(body) } else { body.to_owned() },
    ))
}

fn dechunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).unwrap_or(0);
        if length == 0 {
            break;
        }
        whole.push_str(rest.get(..length).unwrap_or(rest));
        body = rest.get(length + 2..).unwrap_or("");
    }
    whole
}

/// Removes a directory tree that must be there.
pub fn remove_dir(dir: &Path) {
    std::fs::remove_dir_all(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
}

/// Looks again and again until there is something, or the test fails.
pub fn eventually<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < patience, "{what}: not within {patience:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
