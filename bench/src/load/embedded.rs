//! What is measured: a fresh embedded cluster, a running one, or any S3 endpoint.

use super::cpu::Process;
use super::Args;
use crate::output::say;
use serde_json::Value;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An endpoint, its keys, its processes, and the cluster that ends with it.
pub struct Target {
    /// host:port.
    pub endpoint: String,
    /// Access key.
    pub access_key: String,
    /// Secret key.
    pub secret_key: String,
    /// Processes to count.
    pub processes: Vec<Process>,
    _own: Option<Own>,
}

/// A cluster that this process started.
struct Own {
    child: Child,
    folder: PathBuf,
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            // An error here means it is gone already; the folder goes in any case.
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let started = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _gone = self.child.kill();
        let _status = self.child.wait();
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            say(format_args!("{} is left behind: {error}", self.folder.display()));
        }
    }
}

/// Finds or starts what `args` names.
///
/// # Errors
/// Not exactly one of --embedded, --cluster and --endpoint; keys missing; the cluster does not start.
pub fn target(args: &Args) -> Result<Target, Box<dyn Error>> {
    match (args.embedded, &args.cluster, &args.endpoint) {
        (true, None, None) => start(args.disks, &args.scheme, args.scratch.as_deref()),
        (false, Some(dir), None) => running(dir),
        (false, None, Some(endpoint)) => Ok(Target {
            endpoint: endpoint.clone(),
            access_key: std::env::var("AWS_ACCESS_KEY_ID").map_err(|_| "AWS_ACCESS_KEY_ID is not set")?,
            secret_key: std::env::var("AWS_SECRET_ACCESS_KEY").map_err(|_| "AWS_SECRET_ACCESS_KEY is not set")?,
            processes: args.pids.iter().map(|pid| Process { name: format!("pid {pid}"), pid: *pid }).collect(),
            _own: None,
        }),
        _ => Err("say one of --embedded, --cluster DIR and --endpoint HOST:PORT".into()),
    }
}

/// The cluster of a running `granary dev`.
///
/// # Errors
/// Its folder does not say what is needed.
pub fn running(dir: &Path) -> Result<Target, Box<dyn Error>> {
    let (access_key, secret_key) = keys_of(dir)?;
    let (endpoint, processes) = describe(dir)?;
    Ok(Target { endpoint, access_key, secret_key, processes, _own: None })
}

/// Starts a fresh cluster in a folder of its own below `scratch`, and waits until it is ready.
///
/// # Errors
/// It does not start.
pub fn start(disks: u32, scheme: &str, scratch: Option<&Path>) -> Result<Target, Box<dyn Error>> {
    let granary = std::env::current_exe()?.with_file_name("granary");
    if !granary.exists() {
        return Err(format!("{} is not built; `make build` builds it", granary.display()).into());
    }
    let base = scratch.map_or_else(std::env::temp_dir, Path::to_path_buf);
    let folder = base.join(format!("granary-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let dir = folder.join("cluster");
    let (s3, admin) = (free_port()?, free_port()?);
    let log = std::fs::File::create(folder.join("granary.log"))?;
    let child = Command::new(granary)
        .args(["dev", "--disks", &disks.to_string(), "--scheme", scheme])
        .args(["--s3", &format!("127.0.0.1:{s3}"), "--admin", &format!("127.0.0.1:{admin}")])
        .arg("--dir")
        .arg(&dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let mut own = Own { child, folder };
    let started = Instant::now();
    while !ready(&format!("127.0.0.1:{admin}")) {
        if own.child.try_wait()?.is_some() || started.elapsed() > Duration::from_secs(90) {
            return Err(format!(
                "the cluster does not get ready:\n{}",
                std::fs::read_to_string(own.folder.join("granary.log"))?
            )
            .into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let (access_key, secret_key) = keys_of(&dir)?;
    let (endpoint, processes) = describe(&dir)?;
    Ok(Target { endpoint, access_key, secret_key, processes, _own: Some(own) })
}

fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn ready(admin: &str) -> bool {
    use std::io::{Read, Write};
    let ask = || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(admin)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(format!("GET /readyz HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

fn json(path: &Path) -> Result<Value, Box<dyn Error>> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?)
}

fn keys_of(dir: &Path) -> Result<(String, String), Box<dyn Error>> {
    if let (Ok(access_key), Ok(secret_key)) =
        (std::env::var("GRANARY_ROOT_ACCESS_KEY"), std::env::var("GRANARY_ROOT_SECRET_KEY"))
    {
        return Ok((access_key, secret_key));
    }
    let keys = json(&dir.join("root-credentials"))?;
    let text =
        |name: &str| keys[name].as_str().map(str::to_owned).ok_or_else(|| format!("root-credentials has no {name}"));
    Ok((text("access_key")?, text("secret_key")?))
}

fn describe(dir: &Path) -> Result<(String, Vec<Process>), Box<dyn Error>> {
    let cluster = json(&dir.join("cluster.json"))?;
    let endpoint = cluster["s3"].as_str().ok_or("cluster.json names no s3 address")?.to_owned();
    let processes = cluster["processes"].as_array().ok_or("cluster.json names no processes")?;
    let processes = processes
        .iter()
        .filter_map(|process| {
            let pid = i32::try_from(process["pid"].as_i64()?).ok()?;
            let name = match process["disk"].as_u64() {
                Some(disk) => format!("disk-node {disk}"),
                None => process["role"].as_str()?.to_owned(),
            };
            Some(Process { name, pid })
        })
        .collect();
    Ok((endpoint, processes))
}
