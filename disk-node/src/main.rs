//! Command line of the disk node.

use clap::{Args, Parser, Subcommand, ValueEnum};
use granary_disk_node::inspect::inspect;
use granary_disk_node::label;
use granary_disk_node::roles::note_panic;
use granary_disk_node::serve::{serve, ServeOptions};
use granary_placement::id::{ClusterId, DiskId, DiskUuid};
use granary_placement::settings::{Layers, Program, Values};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// A file of settings longer than this is none.
const MAX_CONFIG_BYTES: u64 = 64 * 1024;
/// How long the process waits at its end for work that a disk holds up.
const END_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

#[derive(Parser)]
#[command(name = "granary-disk-node", version, about = "The daemon of one Granary disk")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a disk until SIGTERM or SIGINT
    Serve(Serve),
    /// Make an empty folder a disk of a cluster
    Format(Format),
    /// Read a disk that no process serves; exits with 1 when it finds damage
    Inspect(Inspect),
}

#[derive(Args)]
struct Serve {
    /// Folder of the disk
    #[arg(long, env = "GRANARY_DISK_DIR")]
    dir: PathBuf,
    /// Where to listen, host:port; port 0 lets the system pick one, which DIR/address then names
    #[arg(long, env = "GRANARY_DISK_LISTEN", default_value = "127.0.0.1:7300")]
    listen: String,
    /// File with the cluster secret in hex, readable by its owner only
    #[arg(long, env = "GRANARY_SECRET_FILE")]
    secret_file: PathBuf,
    /// Refuse to serve a disk of any other cluster than this
    #[arg(long, env = "GRANARY_CLUSTER_ID")]
    cluster: Option<ClusterId>,
    /// Where the disk's roles come from
    #[arg(long, value_enum, default_value_t = RolesFrom::Map)]
    roles_from: RolesFrom,
    /// A setting, as NAME=VALUE; repeatable. `granary config` lists them
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// TOML file of settings: sections by what comes before the point of a name
    #[arg(long, value_name = "FILE", env = "GRANARY_CONFIG")]
    config: Option<PathBuf>,
    /// JSON file {"disk id": "host:port"} that overrides the addresses of the cluster map
    #[arg(long)]
    addresses: Option<PathBuf>,
    /// Where to serve /healthz and /metrics
    #[arg(long, env = "GRANARY_DISK_ADMIN")]
    admin: Option<String>,
    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "GRANARY_LOG_FORMAT")]
    log_format: LogFormat,
}

#[derive(Args)]
struct Format {
    /// Folder of the disk: empty, or not there yet
    #[arg(long)]
    dir: PathBuf,
    /// The cluster, 32 hex digits
    #[arg(long)]
    cluster: ClusterId,
    /// The disk's number in the cluster map
    #[arg(long)]
    disk: DiskId,
    /// The disk's UUID, 32 hex digits [default: random]
    #[arg(long)]
    uuid: Option<DiskUuid>,
}

#[derive(Args)]
struct Inspect {
    /// Folder of the disk
    #[arg(long)]
    dir: PathBuf,
    /// List every record
    #[arg(long)]
    chunks: bool,
    /// Read and check every block
    #[arg(long)]
    verify: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum RolesFrom {
    /// The cluster map gives them
    Map,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(args) => run_serve(args),
        Command::Format(args) => run_format(args),
        Command::Inspect(args) => run_inspect(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("granary-disk-node: {error}");
        ExitCode::from(2)
    })
}

fn run_serve(args: Serve) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let filter = match std::env::var("GRANARY_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|error| format!("GRANARY_LOG `{text}` is no filter: {error}"))?,
        Err(_) => EnvFilter::new("info,openraft=warn"),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    // A broken invariant ends the process: other threads must not go on answering from a state nobody understands.
    // One in a shard replica ends that replica, which keeps it from answering by itself.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // First of all: until it is marked, the replica answers as if nothing had happened.
        let is_a_replicas = note_panic(panic);
        report(panic);
        if !is_a_replicas {
            std::process::abort();
        }
    }));
    let RolesFrom::Map = args.roles_from;
    let values = load_settings(&args.set, args.config.as_deref())?;
    let options = ServeOptions {
        dir: args.dir,
        listen: args.listen,
        secret_file: args.secret_file,
        cluster: args.cluster,
        values,
        addresses: args.addresses,
        admin: args.admin,
    };
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(options, CancellationToken::new()));
    // What still waits for a disk that hangs does not hold up the end: all that was acknowledged is synced.
    runtime.shutdown_timeout(END_WAIT);
    served?;
    Ok(ExitCode::SUCCESS)
}

/// Lets this process open as many files and sockets as the system allows it; the usual soft limit of 1,024 is less than
/// the places for connections alone.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// `--set` before the environment before the file before the defaults.
fn load_settings(set: &[String], config: Option<&Path>) -> Result<Values, Box<dyn std::error::Error>> {
    let file = match config {
        Some(path) => Some((path.display().to_string(), read_config(path)?)),
        None => None,
    };
    // A variable that is no UTF-8 is no setting.
    let environment: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let file = file.as_ref().map(|(name, text)| (name.as_str(), text.as_str()));
    Ok(Values::load(Program::DiskNode, Layers { set, environment: &environment, file })?)
}

fn read_config(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(format!("{}: {error}", path.display())),
        Ok(_) if text.len() as u64 > MAX_CONFIG_BYTES => {
            Err(format!("{}: longer than {MAX_CONFIG_BYTES} bytes", path.display()))
        }
        Ok(_) => Ok(text),
    }
}

fn run_format(args: Format) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let uuid = match args.uuid {
        Some(uuid) => uuid,
        None => {
            let mut bytes = [0u8; 16];
            getrandom::fill(&mut bytes).map_err(|error| format!("no random bytes from the system: {error}"))?;
            DiskUuid(bytes)
        }
    };
    let label = label::format(&args.dir, args.cluster, args.disk, uuid)?;
    let (dir, disk) = (args.dir.display(), label.disk);
    print(&format!("{dir} is now disk {disk} ({}) of cluster {}\n", label.uuid, label.cluster))?;
    Ok(ExitCode::SUCCESS)
}

fn run_inspect(args: &Inspect) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let report = inspect(&args.dir, args.chunks, args.verify)?;
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { report.text() };
    print(&text)?;
    Ok(if report.damaged { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whoever reads may have seen enough (`| head`), which is no failure: the exit code still says what was done.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}
