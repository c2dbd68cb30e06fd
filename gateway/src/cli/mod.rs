//! The `granary` command: `dev` and `gateway` run something, `init` forms a cluster, the other verbs talk to the admin
//! API.
//!
//! Exit codes: 0 done, 1 failed, 2 the command line makes no sense, 3 a census found chunks missing or corrupt, or
//! keys are lost, 4 of the lost keys not everything could be asked, 141 the reader of what it prints went away.

mod admin_verbs;
mod config;
mod form;
mod heal;
pub mod http;
pub mod init;
mod lost;
pub mod output;
mod shard;

use crate::dev::layout::{read_map, Shape};
use crate::dev::{self, DevOptions};
use crate::gateway::{apart, listen, Gateway, GatewayConfig};
use crate::logging::{self, LogFormat};
use crate::settings::{
    random_token, read_token, RootCredentials, Secret, SettingsArgs, SettingsError, ROOT_ACCESS_KEY_VAR,
    ROOT_SECRET_KEY_VAR,
};
use admin_verbs::AdminVerb;
use clap::{Args, Parser, Subcommand};
use granary_placement::settings::Program;
use granary_wire::auth::{ClusterSecret, Credentials};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{signal, SignalKind};
use tokio_util::sync::CancellationToken;

/// Granary, an S3-compatible object store for backups.
#[derive(Debug, Parser)]
#[command(name = "granary", version, propagate_version = true)]
pub struct Cli {
    /// Log filter: error, warn, info, debug, or per module.
    #[arg(long, global = true, env = logging::LOG_VAR, default_value = "info")]
    log: String,
    /// Form of log lines.
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: LogFormat,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a whole cluster on this machine: one process per disk, and a gateway.
    Dev(DevArgs),
    /// Run one gateway of a cluster.
    Gateway(GatewayArgs),
    /// Form a cluster from running disk nodes.
    Init(init::InitArgs),
    #[command(flatten)]
    Admin(AdminVerb),
}

#[derive(Debug, Args)]
struct DevArgs {
    /// Directory of the cluster; made at the first start.
    #[arg(long)]
    dir: PathBuf,
    /// Disks [first start: 8].
    #[arg(long)]
    disks: Option<u16>,
    /// Redundancy as K+M [first start: 4+2].
    #[arg(long)]
    scheme: Option<String>,
    /// Metadata shards for objects [first start: 16].
    #[arg(long)]
    shards: Option<u16>,
    /// Play so many servers, with the disks dealt out to them [first start: 1]. Later starts do not look at it.
    #[arg(long)]
    servers: Option<u16>,
    /// HOST:PORT of S3.
    #[arg(long, default_value = "127.0.0.1:9000")]
    s3: String,
    /// HOST:PORT of the console and the admin API.
    #[arg(long, default_value = "127.0.0.1:9001")]
    admin: String,
    /// Leave a disk node that ends alone, until it is started by the admin API.
    #[arg(long)]
    no_restart: bool,
    /// Region that clients sign for.
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Domain whose subdomains are buckets (virtual-host style).
    #[arg(long)]
    domain: Option<String>,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Debug, Args)]
struct GatewayArgs {
    /// A cluster map as JSON (`granary map` prints one); may be old, and is replaced by newer ones.
    #[arg(long)]
    map: PathBuf,
    /// File of the cluster secret.
    #[arg(long)]
    secret_file: PathBuf,
    /// HOST:PORT of S3.
    #[arg(long, default_value = "127.0.0.1:9000")]
    s3: String,
    /// HOST:PORT of the console and the admin API.
    #[arg(long, default_value = "127.0.0.1:9001")]
    admin: String,
    /// JSON file of addresses that replace those of the map: {"disk id": "host:port"}.
    #[arg(long)]
    addresses: Option<PathBuf>,
    /// JSON file with access_key and secret_key, instead of the environment.
    #[arg(long)]
    root_credentials: Option<PathBuf>,
    /// File of the admin token; without it one is made for this run and the admin API is of no use.
    #[arg(long)]
    admin_token_file: Option<PathBuf>,
    /// Region that clients sign for.
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Domain whose subdomains are buckets (virtual-host style).
    #[arg(long)]
    domain: Option<String>,
    #[command(flatten)]
    settings: SettingsArgs,
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

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(found) => return output::clap(&found),
    };
    raise_file_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::say(&format!("no runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(run(cli)).unwrap_or_else(|error| output::failed(error.as_ref()));
    // Whatever blocks a thread now was given its time by the stopping above.
    runtime.shutdown_background();
    code
}

async fn run(cli: Cli) -> Result<ExitCode, Box<dyn Error>> {
    match cli.verb {
        Verb::Dev(args) => {
            logging::init(&cli.log, cli.log_format)?;
            dev::run(args.options()?, stop_signal()?).await?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Gateway(args) => {
            logging::init(&cli.log, cli.log_format)?;
            run_gateway(args, stop_signal()?).await?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Init(args) => {
            logging::init(&cli.log, cli.log_format)?;
            init::run(args).await?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Admin(verb) => admin_verbs::run(verb).await,
    }
}

impl DevArgs {
    fn options(self) -> Result<DevOptions, SettingsError> {
        let values = self.settings.load(Program::Dev)?;
        Ok(DevOptions {
            dir: self.dir,
            shape: Shape { disks: self.disks, scheme: self.scheme, shards: self.shards, servers: self.servers },
            s3: self.s3,
            admin: self.admin,
            restart: !self.no_restart,
            domain: self.domain,
            region: self.region,
            values,
        })
    }
}

async fn run_gateway(args: GatewayArgs, stop: CancellationToken) -> Result<(), Box<dyn Error>> {
    let values = args.settings.load(Program::Gateway)?;
    let root = match &args.root_credentials {
        Some(path) => RootCredentials::read_file(path)?,
        None => RootCredentials::from_env()?.ok_or_else(|| {
            let why = format!(
                "name a file, or set {ROOT_ACCESS_KEY_VAR} and {ROOT_SECRET_KEY_VAR}; there are no default keys"
            );
            SettingsError::invalid("--root-credentials", why)
        })?,
    };
    let admin_token = match &args.admin_token_file {
        Some(path) => read_token(path)?,
        None => Secret::new(random_token()?),
    };
    let map = read_map(&args.map)?;
    let secret = ClusterSecret::read_file(&args.secret_file)?;
    apart(&args.s3, &args.admin)?;
    let (s3, s3_address) = listen("--s3", &args.s3).await?;
    let (admin, admin_address) = listen("--admin", &args.admin).await?;
    let gateway = Gateway::start(GatewayConfig {
        credentials: Credentials { cluster: map.cluster_id, secret },
        map,
        addresses: args.addresses,
        keep_map: None,
        root,
        domain: args.domain,
        region: args.region,
        admin_token,
        admin: admin_address,
        values,
    })?;
    gateway.serve_admin(admin, s3_address, None);
    gateway.serve_s3(s3);
    tracing::info!(s3 = %s3_address, admin = %admin_address, "gateway started");
    stop.cancelled().await;
    tracing::info!("stopping");
    gateway.stop().await;
    Ok(())
}

/// Cancelled by the first SIGINT or SIGTERM; a second one ends the process at once, and the kernel ends its disk nodes.
fn stop_signal() -> Result<CancellationToken, SettingsError> {
    let failed = |error: std::io::Error| SettingsError::invalid("signals", error.to_string());
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        for round in 0..2 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if round == 1 {
                output::say("stopped at once by a second signal");
                std::process::exit(130);
            }
            told.cancel();
        }
    });
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
