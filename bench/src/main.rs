//! `granary-bench`: what Granary does per second, measured.
//!
//! One module per subcommand; this file only hands over to them.
//! - [`codec`]: the erasure codec by kernel, beside other crates, in one run;
//! - [`floor`]: the CPU-seconds that a PUT and a GET cannot avoid, step by step;
//! - [`idle`]: the CPU time of a cluster that nobody uses;
//! - [`load`]: PUT and GET against an S3 endpoint, with the CPU-seconds of every process;
//! - [`placement`]: how even layouts are, what moves, how long a rebuild takes and how many nines that gives.

mod codec;
mod floor;
mod idle;
mod load;
mod output;
mod placement;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "granary-bench", version, about = "Benchmarks of Granary")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Erasure codec: encode and rebuild, every kernel of this CPU, beside other crates
    Codec(codec::Args),
    /// CPU-seconds per GiB that a PUT and a GET cannot avoid, each step measured alone
    Floor(floor::Args),
    /// CPU time of a cluster that nobody uses
    Idle(idle::Args),
    /// PUT and GET against an S3 endpoint or a fresh embedded cluster, with CPU-seconds of every process
    Load(load::Args),
    /// Fairness, moves, rebuild time and nines of clusters of up to 10,000 disks, by the placement code itself
    Placement(placement::Args),
}

fn main() -> ExitCode {
    let done: Result<(), Box<dyn Error>> = match Cli::parse().command {
        Command::Codec(args) => codec::run(&args),
        Command::Floor(args) => floor::run(&args),
        Command::Idle(args) => idle::run(&args),
        Command::Load(args) => load::run(&args),
        Command::Placement(args) => placement::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failed(error.as_ref()),
    }
}
