//! `granary-bench codec`: GB/s of payload of np16 on every kernel of this CPU, and of the other crates, in one run.
//!
//! Three operations on one stripe whose units stay in cache: encode all coding units, rebuild one lost data unit,
//! rebuild M lost data units. GB are 10^9 bytes of payload, K x unit, whatever the operation. Time is CPU time of this
//! thread, so a busy machine slows the figures less than the clock on the wall would; the median of many samples is the
//! figure, the best one is beside it. Every operation is checked for right bytes once, before it is timed.
//!
//! Read in this order: [`run`], [`measure`], then the contestants in [`contestants`].

mod contestants;

use std::error::Error;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Parser;
use granary_placement::codec::{self_test, Kernel};
use rustix::time::{clock_gettime, ClockId};
use serde::Serialize;

use contestants::Contestant;

/// Units lie this much further apart than they are long. At a stride of a power of two, all units of a stripe fall into
/// the same cache sets.
const EXTRA_STRIDE_BYTES: usize = 128;

/// One sample repeats the operation for at least this long, so that reading the clock costs nothing beside it.
const SAMPLE_NS: u64 = 200_000;

/// Fewest samples that a median is taken from.
const MIN_SAMPLES: usize = 5;

/// What 8+4 with units of 64 KiB must reach, in GB/s.
const TARGETS: [(Kernel, Operation, f64); 4] = [
    (Kernel::Avx512Gfni, Operation::Encode, 24.0),
    (Kernel::Avx2Gfni, Operation::Encode, 20.0),
    (Kernel::Avx2, Operation::Encode, 9.0),
    (Kernel::Avx512Gfni, Operation::RebuildOne, 45.0),
];

#[derive(Debug, Parser)]
pub struct Args {
    /// Data and coding chunks, written K+M
    #[arg(long, default_value = "8+4", value_parser = parse_scheme)]
    scheme: (u8, u8),
    /// Bytes of one unit; even
    #[arg(long, default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(2..=64 << 20))]
    unit: u32,
    /// A kernel by name, or "all" of this CPU
    #[arg(long, default_value = "all")]
    kernel: String,
    /// CPU seconds per operation and contestant
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Leave the other crates out
    #[arg(long)]
    no_peers: bool,
    /// Write the report here as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn parse_scheme(text: &str) -> Result<(u8, u8), String> {
    let (k, m) = text.split_once('+').ok_or("write it K+M, for example 8+4")?;
    let number = |part: &str| part.trim().parse::<u8>().map_err(|error| format!("{part:?}: {error}"));
    Ok((number(k)?, number(m)?))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Operation {
    Encode,
    RebuildOne,
    RebuildM,
}

impl Operation {
    const ALL: [Self; 3] = [Self::Encode, Self::RebuildOne, Self::RebuildM];

    /// How many data units the operation takes as lost.
    fn lost(self, m: u8) -> usize {
        match self {
            Self::Encode => 0,
            Self::RebuildOne => 1,
            Self::RebuildM => m.into(),
        }
    }
}

/// Everything a reader of the figures needs to judge them; the JSON file is this.
#[derive(Debug, Serialize)]
struct Report {
    cpu: String,
    k: u8,
    m: u8,
    unit_bytes: usize,
    extra_stride_bytes: usize,
    cpu_seconds_each: f64,
    results: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    contestant: String,
    operation: Operation,
    median_gb_per_s: f64,
    best_gb_per_s: f64,
    samples: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_gb_per_s: Option<f64>,
}

/// Measures, prints the table, writes the JSON file.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    self_test()?;
    let (k, m) = args.scheme;
    let unit_bytes = args.unit as usize;
    let kernels = match args.kernel.as_str() {
        "all" => Kernel::available().collect(),
        name => vec![Kernel::from_name(name)?],
    };
    let mut report = Report {
        cpu: cpu_name(),
        k,
        m,
        unit_bytes,
        extra_stride_bytes: EXTRA_STRIDE_BYTES,
        cpu_seconds_each: args.seconds,
        results: Vec::new(),
    };
    let is_target_setting = (k, m, unit_bytes) == (8, 4, 65_536);
    for kernel in kernels {
        let mut contestant = contestants::np16(k, m, kernel, unit_bytes)?;
        let target = |operation| {
            let target = TARGETS.iter().find(|target| target.0 == kernel && target.1 == operation)?;
            is_target_setting.then_some(target.2)
        };
        measure_all(&mut *contestant, args, target, &mut report.results)?;
    }
    if !args.no_peers {
        for mut contestant in contestants::peers(k, m, unit_bytes)? {
            measure_all(&mut *contestant, args, |_| None, &mut report.results)?;
        }
    }
    crate::output::line(format_args!("{}", table(&report).trim_end()))?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}

fn measure_all(
    contestant: &mut dyn Contestant,
    args: &Args,
    target: impl Fn(Operation) -> Option<f64>,
    results: &mut Vec<Line>,
) -> Result<(), Box<dyn Error>> {
    let (k, m) = args.scheme;
    let payload_bytes = f64::from(k) * f64::from(args.unit);
    for operation in Operation::ALL {
        let lost = operation.lost(m);
        if lost > usize::from(k) {
            continue; // More coding than data chunks: there are not M data units to lose.
        }
        contestant.prepare(lost)?;
        contestant.run()?;
        contestant.check().map_err(|what| format!("{}, {operation:?}: {what}", contestant.name()))?;
        let samples = measure(args.seconds, || contestant.run())?;
        let gb_per_s = |ns: Option<&f64>| ns.map_or(0.0, |ns| payload_bytes / ns);
        results.push(Line {
            contestant: contestant.name(),
            operation,
            median_gb_per_s: gb_per_s(samples.get(samples.len() / 2)),
            best_gb_per_s: gb_per_s(samples.first()),
            samples: samples.len(),
            target_gb_per_s: target(operation),
        });
    }
    Ok(())
}

/// CPU nanoseconds per call, one entry per sample, ascending.
fn measure(seconds: f64, mut call: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<Vec<f64>, Box<dyn Error>> {
    let budget_ns = (seconds.clamp(0.001, 600.0) * 1e9) as u64;
    let start_ns = thread_cpu_ns();
    let mut calls_per_sample = 1u32;
    let mut samples = Vec::new();
    loop {
        let before_ns = thread_cpu_ns();
        for _ in 0..calls_per_sample {
            call()?;
        }
        let after_ns = thread_cpu_ns();
        let sample_ns = after_ns - before_ns;
        if sample_ns < SAMPLE_NS && calls_per_sample < 1 << 20 {
            calls_per_sample *= 2; // Still finding out how fast it is; caches warm up meanwhile.
            continue;
        }
        samples.push(sample_ns as f64 / f64::from(calls_per_sample));
        if after_ns - start_ns >= budget_ns && samples.len() >= MIN_SAMPLES {
            samples.sort_by(f64::total_cmp);
            return Ok(samples);
        }
    }
}

fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// The model the kernel reports, for the report's reader; figures of different models do not compare.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name") || line.starts_with("CPU part"));
    line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, name)| name.trim()).to_owned()
}

fn table(report: &Report) -> String {
    let Report { cpu, k, m, unit_bytes, cpu_seconds_each, results, .. } = report;
    let mut text = format!("{k}+{m}, units of {unit_bytes} bytes, {cpu}; GB/s of payload, median (best)\n\n");
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{:<34}{:>18}{:>18}{:>18}", "", "encode", "rebuild 1", format!("rebuild {m}"));
    for lines in results.chunk_by(|a, b| a.contestant == b.contestant) {
        let cell = |operation| {
            let line = lines.iter().find(|line| line.operation == operation);
            line.map_or(String::from("-"), |line| {
                let mark = match line.target_gb_per_s {
                    Some(target) if line.median_gb_per_s < target => "!",
                    _ => "",
                };
                format!("{mark}{:.3} ({:.3})", line.median_gb_per_s, line.best_gb_per_s)
            })
        };
        let [encode, one, all] = Operation::ALL.map(cell);
        let _ = writeln!(text, "{:<34}{encode:>18}{one:>18}{all:>18}", lines[0].contestant);
    }
    let _ = writeln!(text, "\n{cpu_seconds_each} CPU seconds each; \"!\" is below the target of this setting");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_are_written_k_plus_m() {
        assert_eq!(parse_scheme("10+4"), Ok((10, 4)));
        for wrong in ["10", "10+", "+4", "10+300", "10-4", ""] {
            assert!(parse_scheme(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn every_contestant_gives_right_bytes_for_every_operation() -> Result<(), Box<dyn Error>> {
        for (k, m) in [(2, 1), (8, 4), (10, 4)] {
            let mut all = contestants::peers(k, m, 4096)?;
            for kernel in Kernel::available() {
                all.push(contestants::np16(k, m, kernel, 4096)?);
            }
            for contestant in &mut all {
                for operation in Operation::ALL {
                    contestant.prepare(operation.lost(m))?;
                    contestant.run()?;
                    contestant.check()?;
                }
            }
        }
        Ok(())
    }
}
