//! CPU-seconds of processes, from /proc.

use serde::Serialize;

/// A process whose CPU-seconds are counted.
#[derive(Debug, Clone)]
pub struct Process {
    /// Shown in the table.
    pub name: String,
    /// Its pid.
    pub pid: i32,
}

/// What a process spent in a phase.
#[derive(Debug, Clone, Serialize)]
pub struct Spent {
    /// Shown in the table.
    pub name: String,
    /// User and system time, in seconds.
    pub cpu_seconds: f64,
}

/// CPU-seconds of each process so far; zero for one that is gone.
pub fn read(processes: &[Process]) -> Vec<f64> {
    processes.iter().map(|process| seconds(&format!("/proc/{}/stat", process.pid))).collect()
}

/// What each spent since `before`.
pub fn since(processes: &[Process], before: &[f64]) -> Vec<Spent> {
    processes
        .iter()
        .zip(read(processes))
        .zip(before)
        .map(|((process, now), then)| Spent { name: process.name.clone(), cpu_seconds: (now - then).max(0.0) })
        .collect()
}

/// CPU-seconds of this process so far.
pub fn own() -> f64 {
    seconds("/proc/self/stat")
}

fn seconds(stat: &str) -> f64 {
    let text = std::fs::read_to_string(stat).unwrap_or_default();
    // Fields after the name in parentheses: state is the first, utime and stime the 12th and 13th.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |place: usize| fields.get(place).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Linux reports in USER_HZ, which is 100 on every architecture that Rust's standard library runs on.
    (ticks(11) + ticks(12)) / 100.0
}
