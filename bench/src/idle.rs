//! `granary-bench idle`: the CPU time of all processes of a cluster that nobody uses.

use crate::load::{cpu, embedded};
use crate::output::line;
use clap::Parser;
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Options of `granary-bench idle`.
#[derive(Debug, Parser)]
pub struct Args {
    /// Folder of a running `granary dev`; without it a fresh cluster is started in a temporary folder and removed
    /// afterwards
    #[arg(long)]
    cluster: Option<PathBuf>,
    /// Seconds between the cluster's start and the measurement: its shards fall asleep in that time
    #[arg(long, default_value_t = 30.0)]
    settle: f64,
    /// Seconds of the measurement
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// K+M of the cluster that is started
    #[arg(long, default_value = "4+2")]
    scheme: String,
    /// Disk nodes of the cluster that is started
    #[arg(long, default_value_t = 6)]
    disks: u32,
    /// Folder for the cluster that is started
    #[arg(long)]
    scratch: Option<PathBuf>,
}

/// Measures, and prints a line for each process.
///
/// # Errors
/// The cluster does not start.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let target = match &args.cluster {
        Some(dir) => embedded::running(dir)?,
        None => embedded::start(args.disks, &args.scheme, args.scratch.as_deref())?,
    };
    std::thread::sleep(Duration::try_from_secs_f64(args.settle)?);
    let (before, begun) = (cpu::read(&target.processes), Instant::now());
    std::thread::sleep(Duration::try_from_secs_f64(args.seconds)?);
    let (spent, seconds) = (cpu::since(&target.processes, &before), begun.elapsed().as_secs_f64());
    for process in &spent {
        row(&process.name, process.cpu_seconds, seconds)?;
    }
    let all: f64 = spent.iter().map(|process| process.cpu_seconds).sum();
    row("all", all, seconds)?;
    Ok(())
}

fn row(name: &str, cpu_seconds: f64, seconds: f64) -> std::io::Result<()> {
    let share = 100.0 * cpu_seconds / seconds;
    line(format_args!("{name:<16} {cpu_seconds:>7.2} s {share:>7.2} % of a core"))
}
