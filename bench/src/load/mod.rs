//! `granary-bench load`: PUT and GET of one or more object sizes against an S3 endpoint, with the CPU-seconds of every
//! process.
//!
//! Wall time on a shared machine is noise; CPU-seconds per GiB and per 10,000 requests are what lasts. With
//! `--embedded` a fresh cluster is started in a temporary folder and removed afterwards; else `--cluster DIR` names the
//! folder of a running `granary dev`, or `--endpoint` any S3 server (whose processes are then named by `--pid`).
//!
//! Read in this order: [`run`], [`Phase`] (one verb at one size), [`cpu`] (where CPU-seconds come from), [`embedded`].

pub mod cpu;
pub mod embedded;

use crate::output::{line, say};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use futures::StreamExt;
use granary_s3_client::{Body, Client, Payload};
use http::{Method, StatusCode};
use serde::Serialize;
use std::error::Error;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// PUT of a new object.
    Put,
    /// GET of an object that was put.
    Get,
}

/// Options of `granary-bench load`.
#[derive(Debug, Parser)]
pub struct Args {
    /// Start a fresh cluster of six disk nodes (4+2) in a temporary folder, and remove it afterwards
    #[arg(long)]
    embedded: bool,
    /// Folder of a running `granary dev`: endpoint, keys and processes are read from it
    #[arg(long)]
    cluster: Option<PathBuf>,
    /// host:port of an S3 server; keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    #[arg(long)]
    endpoint: Option<String>,
    /// Processes whose CPU-seconds are counted, with --endpoint
    #[arg(long = "pid")]
    pids: Vec<i32>,
    /// Object sizes, for example 4KiB,16MiB
    #[arg(long, value_delimiter = ',', default_value = "4KiB,16MiB", value_parser = parse_size)]
    sizes: Vec<u64>,
    /// Verbs, in order; GET reads what PUT wrote
    #[arg(long, value_delimiter = ',', default_value = "put,get")]
    verbs: Vec<Verb>,
    /// Requests at once
    #[arg(long, default_value_t = 8)]
    concurrency: usize,
    /// Seconds per phase
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// At most this many payload bytes per PUT phase
    #[arg(long, default_value = "4GiB", value_parser = parse_size)]
    most: u64,
    /// Bind the payload to the signature with SHA-256, as most SDKs do over plain http
    #[arg(long)]
    signed: bool,
    /// K+M of the embedded cluster
    #[arg(long, default_value = "4+2")]
    scheme: String,
    /// Disk nodes of the embedded cluster
    #[arg(long, default_value_t = 6)]
    disks: u32,
    /// Folder for the embedded cluster; not tmpfs, where durability costs nothing
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Write the result as JSON to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        other => return Err(format!("unknown unit `{other}`; use B, KiB, MiB or GiB")),
    };
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is not a size, for example 16MiB"))?;
    number.checked_mul(factor).filter(|bytes| *bytes > 0).ok_or_else(|| format!("`{text}` is no size"))
}

/// One verb at one size.
#[derive(Debug, Serialize)]
struct Phase {
    verb: Verb,
    size_bytes: u64,
    requests: u64,
    errors: u64,
    seconds: f64,
    mib_per_second: f64,
    requests_per_second: f64,
    latency_ms_p50: f64,
    latency_ms_p99: f64,
    /// CPU-seconds of the servers, all processes together.
    cpu_seconds: f64,
    cpu_seconds_per_gib: f64,
    cpu_seconds_per_10k_requests: f64,
    processes: Vec<cpu::Spent>,
    /// CPU-seconds of this load generator, for comparison.
    client_cpu_seconds: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    endpoint: String,
    scheme: String,
    concurrency: usize,
    signed_payload: bool,
    phases: Vec<Phase>,
}

/// Runs the benchmark and prints its table.
///
/// # Errors
/// The endpoint cannot be used, or a phase had no successful request.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let target = embedded::target(args)?;
    let client = Client::new(&target.endpoint, &target.access_key, &target.secret_key, Duration::from_secs(120));
    let bucket = format!("bench-{:08x}", random(0));
    let made = runtime.block_on(client.make_bucket(&bucket))?;
    if made.status != StatusCode::OK {
        return Err(format!("bucket {bucket}: {} {}", made.status, made.code()).into());
    }
    let mut phases = Vec::new();
    for size in &args.sizes {
        let written = Arc::new(AtomicU64::new(0));
        for verb in &args.verbs {
            let phase = runtime.block_on(phase(args, &client, &bucket, *verb, *size, &written, &target.processes))?;
            line(format_args!("{}", row(&phase)))?;
            phases.push(phase);
        }
    }
    line(format_args!("\nCPU-seconds by process (user + system):"))?;
    for phase in &phases {
        let spent: Vec<String> =
            phase.processes.iter().map(|spent| format!("{} {:.2}", spent.name, spent.cpu_seconds)).collect();
        line(format_args!(
            "  {:?} {}: {}; client {:.2}",
            phase.verb,
            size_text(phase.size_bytes),
            spent.join(", "),
            phase.client_cpu_seconds
        ))?;
    }
    if let Some(path) = &args.json {
        let report = Report {
            endpoint: target.endpoint.clone(),
            scheme: args.scheme.clone(),
            concurrency: args.concurrency,
            signed_payload: args.signed,
            phases,
        };
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}

async fn phase(
    args: &Args,
    client: &Client,
    bucket: &str,
    verb: Verb,
    size: u64,
    written: &Arc<AtomicU64>,
    processes: &[cpu::Process],
) -> Result<Phase, Box<dyn Error>> {
    let payload: Bytes = pattern(size.min(16 << 20) as usize).into();
    let before = cpu::read(processes);
    let own_before = cpu::own();
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(args.seconds);
    let next = Arc::new(AtomicU64::new(0));
    let errors = Arc::new(AtomicU64::new(0));
    let latencies = Arc::new(Mutex::new(Vec::new()));
    let most = (args.most / size).max(1);
    let available = written.load(Ordering::Relaxed);
    if verb == Verb::Get && available == 0 {
        return Err("GET needs objects: let --verbs begin with put".into());
    }
    let workers = (0..args.concurrency).map(|_| {
        let (client, bucket, payload) = (client.clone(), bucket.to_owned(), payload.clone());
        let (next, errors, latencies, written) = (next.clone(), errors.clone(), latencies.clone(), written.clone());
        let signed = if args.signed { Payload::Signed } else { Payload::Unsigned };
        tokio::spawn(async move {
            while Instant::now() < end {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if verb == Verb::Put && number >= most {
                    break;
                }
                let begun = Instant::now();
                let good = match verb {
                    Verb::Put => put(&client, &bucket, size, number, &payload, signed).await,
                    Verb::Get => get(&client, &bucket, size, number % available).await,
                };
                match good {
                    Ok(()) => {
                        if verb == Verb::Put {
                            written.fetch_max(number + 1, Ordering::Relaxed);
                        }
                        latencies
                            .lock()
                            .unwrap_or_else(|poisoned| poisoned.into_inner())
                            .push(begun.elapsed().as_secs_f64() * 1e3);
                    }
                    Err(error) => {
                        if errors.fetch_add(1, Ordering::Relaxed) < 3 {
                            say(format_args!("{verb:?}: {error}"));
                        }
                    }
                }
            }
        })
    });
    for worker in futures::future::join_all(workers).await {
        worker?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let spent = cpu::since(processes, &before);
    let client_cpu_seconds = cpu::own() - own_before;
    let mut latencies = std::mem::take(&mut *latencies.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    latencies.sort_by(f64::total_cmp);
    let requests = latencies.len() as u64;
    if requests == 0 {
        return Err(format!("no {verb:?} of {} succeeded", size_text(size)).into());
    }
    let at =
        |quantile: f64| latencies.get(((latencies.len() - 1) as f64 * quantile) as usize).copied().unwrap_or_default();
    let cpu_seconds: f64 = spent.iter().map(|spent| spent.cpu_seconds).sum();
    let gib = (requests * size) as f64 / f64::from(1 << 30);
    Ok(Phase {
        verb,
        size_bytes: size,
        requests,
        errors: errors.load(Ordering::Relaxed),
        seconds,
        mib_per_second: gib * 1024.0 / seconds,
        requests_per_second: requests as f64 / seconds,
        latency_ms_p50: at(0.5),
        latency_ms_p99: at(0.99),
        cpu_seconds,
        cpu_seconds_per_gib: cpu_seconds / gib,
        cpu_seconds_per_10k_requests: cpu_seconds / requests as f64 * 1e4,
        processes: spent,
        client_cpu_seconds,
    })
}

async fn put(
    client: &Client,
    bucket: &str,
    size: u64,
    number: u64,
    payload: &Bytes,
    signed: Payload,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let body = if size <= payload.len() as u64 {
        Body::Bytes(payload.clone())
    } else {
        let piece = payload.clone();
        let pieces = futures::stream::unfold(size, move |left| {
            let take = left.min(piece.len() as u64);
            let bytes = piece.slice(..take as usize);
            async move { (take > 0).then_some((Ok(bytes), left - take)) }
        });
        Body::Stream(size, pieces.boxed())
    };
    let answer = client.request(Method::PUT, &format!("/{bucket}/{size}/{number:08}"), &[], &[], body, signed).await?;
    if answer.status == StatusCode::OK {
        Ok(())
    } else {
        Err(format!("{} {}", answer.status, answer.code()).into())
    }
}

async fn get(client: &Client, bucket: &str, size: u64, number: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut answer = client
        .stream(Method::GET, &format!("/{bucket}/{size}/{number:08}"), &[], &[], Body::Empty, Payload::Unsigned)
        .await?;
    let mut length = 0u64;
    while let Some(bytes) = answer.next().await? {
        length += bytes.len() as u64;
    }
    if answer.status == StatusCode::OK && length == size {
        Ok(())
    } else {
        Err(format!("{} after {length} of {size} bytes", answer.status).into())
    }
}

/// Bytes that do not compress.
fn pattern(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut counter = 0u64;
    while bytes.len() < length {
        counter += 1;
        bytes.extend_from_slice(&random(counter).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// SplitMix64 of the counter; of fresh randomness for zero.
fn random(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    if counter == 0 {
        let mut bytes = [0u8; 8];
        // Only a name: two benchmarks at once should not share a bucket.
        if getrandom::fill(&mut bytes).is_ok() {
            z = u64::from_le_bytes(bytes);
        }
        return z >> 32;
    }
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn size_text(bytes: u64) -> String {
    for (unit, factor) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes.is_multiple_of(factor) {
            return format!("{} {unit}", bytes / factor);
        }
    }
    format!("{bytes} B")
}

fn row(phase: &Phase) -> String {
    format!(
        "{:>4} {:>8}: {:>8.1} MiB/s {:>9.1} req/s  p50 {:>8.2} ms  p99 {:>8.2} ms  {:>6} requests, {} errors  CPU {:>6.2} s/GiB {:>7.2} s/10k requests",
        format!("{:?}", phase.verb).to_uppercase(),
        size_text(phase.size_bytes),
        phase.mib_per_second,
        phase.requests_per_second,
        phase.latency_ms_p50,
        phase.latency_ms_p99,
        phase.requests,
        phase.errors,
        phase.cpu_seconds_per_gib,
        phase.cpu_seconds_per_10k_requests,
    )
}
