//! `granary-bench placement`: how evenly groups lie on disks, what moves when a disk or a server is lost, how long the
//! rebuild takes by its busiest disk, and how many nines come of that.
//!
//! Maps are made and changed by the code that makes and changes those of clusters; nothing is written or read. The
//! rebuild is arithmetic: what each disk would read and write, at a share of its rate. What carries the bytes, gateways
//! and network, is taken to keep up.
//! - [`size`]: one cluster, measured;
//! - [`table`]: what is printed.

mod size;
mod table;

use crate::output::line;
use clap::{Parser, ValueEnum};
use granary_placement::place::DEFAULT_GROUPS_PER_DISK;
use granary_placement::scheme::KPlusM;
use size::{measure, Shape, Size};
use std::error::Error;

/// Clusters that are measured unless others are named: disks, disks per server, scheme. Ten disks cannot keep 8+3.
const SHAPES: [(u32, u32, KPlusM); 4] = [
    (10, 2, KPlusM { k: 4, m: 2 }),
    (100, 10, KPlusM { k: 8, m: 3 }),
    (1_000, 20, KPlusM { k: 8, m: 3 }),
    (10_000, 20, KPlusM { k: 8, m: 3 }),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table
    Text,
    /// The same and more as JSON
    Json,
}

/// Options of `granary-bench placement`.
#[derive(Debug, Parser)]
pub struct Args {
    /// Numbers of disks, separated by commas; 10, 100, 1,000 and 10,000 if none is named
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=100_000))]
    disks: Vec<u32>,
    /// Disks in one server [default: 2 of 10, 10 of 100, else 20]
    #[arg(long)]
    disks_per_server: Option<u32>,
    /// K+M [default: 8+3, with ten disks 4+2]
    #[arg(long)]
    scheme: Option<KPlusM>,
    /// Slots of placement groups per disk
    #[arg(long, default_value_t = DEFAULT_GROUPS_PER_DISK, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    groups_per_disk: u32,
    /// Size of a disk in TB (10^12 bytes)
    #[arg(long, default_value_t = 16.0)]
    disk_tb: f64,
    /// How full the disks are, in percent
    #[arg(long, default_value_t = 100.0)]
    fill_percent: f64,
    /// What a disk reads and writes in a second, in MB (10^6 bytes)
    #[arg(long, default_value_t = 60.0)]
    rate_mb: f64,
    /// Share of that for rebuilding, in percent
    #[arg(long, default_value_t = 10.0)]
    share_percent: f64,
    /// Minutes from a loss until rebuilding begins (heal.out_after)
    #[arg(long, default_value_t = 10.0)]
    grace_minutes: f64,
    /// Minutes that a rebuild should take at most
    #[arg(long, default_value_t = 30.0)]
    target_minutes: f64,
    /// Disks that die within a year, in percent
    #[arg(long, default_value_t = 1.4)]
    afr_percent: f64,
    /// How often in a year a server is lost for good with its disks
    #[arg(long, default_value_t = 0.005)]
    server_losses: f64,
    /// How often in a year a server is away and comes back
    #[arg(long, default_value_t = 4.0)]
    server_outages: f64,
    /// Hours until it comes back
    #[arg(long, default_value_t = 1.0)]
    server_return_hours: f64,
    /// Chunks of a disk that go bad unnoticed in a year
    #[arg(long, default_value_t = 1.0)]
    latent_errors: f64,
    /// Days between two scrubs
    #[arg(long, default_value_t = 14.0)]
    scrub_days: f64,
    /// How to print
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Measures and prints.
///
/// # Errors
/// A number that cannot be, or a cluster that cannot keep its scheme.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let sizes = shapes(args).into_iter().map(|shape| measure(args, shape)).collect::<Result<Vec<Size>, _>>()?;
    match args.output {
        Output::Json => line(format_args!("{}", serde_json::to_string_pretty(&sizes)?))?,
        Output::Text => table::print(args, &sizes)?,
    }
    Ok(())
}

fn shapes(args: &Args) -> Vec<Shape> {
    let usual = |disks: u32| SHAPES.into_iter().find(|(usual, _, _)| *usual == disks).or(SHAPES.last().copied());
    let named: Vec<u32> =
        if args.disks.is_empty() { SHAPES.iter().map(|(disks, _, _)| *disks).collect() } else { args.disks.clone() };
    let shape = |disks: u32| {
        let (_, per_server, scheme) = usual(disks)?;
        let disks_per_server = args.disks_per_server.unwrap_or(per_server).max(1);
        Some(Shape { disks, disks_per_server, scheme: args.scheme.unwrap_or(scheme) })
    };
    named.into_iter().filter_map(shape).collect()
}
