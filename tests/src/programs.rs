//! Where the client programs are, and how they are run: a clean environment, a private home, output kept for the
//! failure message.

use crate::cluster::Cluster;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The argument that carries the secret key to a program that takes it from nowhere else.
const SECRET: &str = "--secret_key=";

fn clients_env() -> BTreeMap<String, String> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache"));
    let file = cache.join("granary/clients.env");
    let text = std::fs::read_to_string(&file)
        .unwrap_or_else(|error| panic!("{}: {error}; `make setup-test` makes it", file.display()));
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// A program of the newest set (PyPI, next Debian release) or, with `newest` false, Debian's own.
pub fn find(name: &str, newest: bool) -> PathBuf {
    let mut folders = Vec::new();
    if newest {
        let env = clients_env();
        folders.extend(
            ["GRANARY_CLIENTS", "GRANARY_NEWER_CLIENTS"]
                .iter()
                .filter_map(|key| env.get(*key))
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
        );
    }
    folders.push(PathBuf::from("/usr/bin"));
    for folder in &folders {
        let program = folder.join(name);
        if program.exists() {
            return program;
        }
    }
    panic!("{name} is not in {folders:?}; `make setup-test` installs it");
}

/// Runs client programs against one cluster.
pub struct Programs {
    home: PathBuf,
    env: Vec<(String, String)>,
}

/// What a program said.
pub struct Said {
    /// Exit code 0.
    pub ok: bool,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Programs {
    /// Programs with keys, endpoint and region of the cluster, and a home below `work`.
    pub fn new(cluster: &Cluster, work: &Path) -> Programs {
        let home = work.join("home");
        std::fs::create_dir_all(&home).expect("home for the clients");
        let endpoint = format!("http://{}", cluster.s3());
        let mut env: Vec<(String, String)> = vec![
            ("HOME".into(), home.display().to_string()),
            ("AWS_ACCESS_KEY_ID".into(), cluster.access_key().into()),
            ("AWS_SECRET_ACCESS_KEY".into(), cluster.secret_key().into()),
            ("AWS_REGION".into(), "us-east-1".into()),
            ("AWS_DEFAULT_REGION".into(), "us-east-1".into()),
            ("AWS_EC2_METADATA_DISABLED".into(), "true".into()),
            ("AWS_ENDPOINT_URL".into(), endpoint.clone()),
            ("RESTIC_PASSWORD".into(), "only a test".into()),
            ("NO_PROXY".into(), "127.0.0.1,localhost".into()),
            ("RCLONE_S3_PROVIDER".into(), "Other".into()),
            ("RCLONE_S3_ENDPOINT".into(), endpoint),
            ("RCLONE_S3_ENV_AUTH".into(), "true".into()),
            ("RCLONE_S3_REGION".into(), "us-east-1".into()),
            ("RCLONE_S3_FORCE_PATH_STYLE".into(), "true".into()),
            ("LANG".into(), "C.UTF-8".into()),
        ];
        env.push(("PATH".into(), std::env::var("PATH").unwrap_or_default()));
        Programs { home, env }
    }

    /// Runs a program to its end, at most `limit`.
    pub fn try_run(&self, program: &Path, args: &[&str], limit: Duration) -> Said {
        let shown = command_line(program, args);
        let out_path = self.home.join(format!("out-{:x}", rand_name()));
        let err_path = out_path.with_extension("err");
        let started = Instant::now();
        let mut child = Command::new(program)
            .args(args)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out_path).expect("output file"))
            .stderr(std::fs::File::create(&err_path).expect("output file"))
            .spawn()
            .unwrap_or_else(|error| panic!("{shown}: {error}"));
        let status = loop {
            if let Some(status) = child.try_wait().expect("wait for a client") {
                break Some(status);
            }
            if started.elapsed() > limit {
                child.kill().expect("stop a client that hangs");
                child.wait().expect("wait for a client");
                break None;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        let said =
            Said { ok: status.is_some_and(|status| status.success()), out: read(&out_path), err: read(&err_path) };
        std::fs::remove_file(&out_path).expect("remove output");
        std::fs::remove_file(&err_path).expect("remove output");
        println!(
            "    {:6.1} s  {}{}",
            started.elapsed().as_secs_f64(),
            shown.chars().take(160).collect::<String>(),
            if status.is_none() { "  (stopped: too long)" } else { "" }
        );
        said
    }

    /// Runs a program that must succeed; gives its standard output.
    pub fn run(&self, program: &Path, args: &[&str]) -> String {
        let said = self.try_run(program, args, Duration::from_secs(if crate::soak() { 3600 } else { 600 }));
        assert!(
            said.ok,
            "{} failed\n--- out\n{}\n--- err\n{}",
            command_line(program, args),
            tail(&said.out),
            tail(&said.err)
        );
        said.out
    }

    /// Starts a program and leaves it running.
    pub fn start(&self, program: &Path, args: &[&str], log: &Path) -> std::process::Child {
        Command::new(program)
            .args(args)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(log).expect("log file"))
            .stderr(std::fs::File::create(log.with_extension("err")).expect("log file"))
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }
}

/// The command line as it may be printed: without the secret key.
fn command_line(program: &Path, args: &[&str]) -> String {
    let mut line = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for arg in args {
        line.push(' ');
        line.push_str(if arg.starts_with(SECRET) { "--secret_key=***" } else { arg });
    }
    line
}

fn rand_name() -> u64 {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("randomness of the operating system");
    u64::from_le_bytes(bytes)
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(4000);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
