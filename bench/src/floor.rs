//! `granary-bench floor`: the CPU-seconds per GiB that a PUT and a GET cannot avoid, each step measured alone on this
//! machine.
//!
//! A PUT of one GiB must hash it (MD5 for the ETag; SHA-256 too when the client signs its payload), code it, checksum
//! every block once in the gateway and once in the disk node, receive it once and send it (K+M)/K times over loopback,
//! receive that, and write it to files. A GET reads (from the page cache), checksums twice, and crosses loopback twice.
//! The sum is what an implementation without a single wasted instruction would need; `granary-bench load` measures what
//! ours needs. Both in one run on one machine, or the ratio means nothing.
//!
//! Times are CPU times of the threads that do the step, kernel included.

use crate::output::line;
use clap::Parser;
use granary_placement::codec::Codec;
use rustix::time::{clock_gettime, ClockId};
use sha2::{Digest, Sha256};
use std::error::Error;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

const GIB: f64 = (1u64 << 30) as f64;
const UNIT: usize = 128 * 1024;

/// Options of `granary-bench floor`.
#[derive(Debug, Parser)]
pub struct Args {
    /// Data chunks
    #[arg(long, default_value_t = 4)]
    k: u8,
    /// Coding chunks
    #[arg(long, default_value_t = 2)]
    m: u8,
    /// MiB that each step works on
    #[arg(long, default_value_t = 512)]
    mib: usize,
    /// Folder for the files that are written; not tmpfs
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Write the result as JSON to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures and prints the steps and their sums.
///
/// # Errors
/// The scratch file or a socket cannot be used.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let bytes = args.mib.max(16) << 20;
    let scale = GIB / bytes as f64;
    let width = (f64::from(args.k) + f64::from(args.m)) / f64::from(args.k);
    let piece: Vec<u8> = (0..4usize << 20).map(|place| (place.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    let rounds = bytes / piece.len();

    let md5 = timed(|| {
        let mut hash = md5_simd::Md5::new();
        (0..rounds).for_each(|_| hash.update(&piece));
        std::hint::black_box(hash.finalize());
    }) * scale;
    let sha256 = timed(|| {
        let mut hash = Sha256::new();
        (0..rounds).for_each(|_| hash.update(&piece));
        std::hint::black_box(hash.finalize());
    }) * scale;
    let crc = timed(|| {
        for _ in 0..rounds {
            piece.chunks(64 * 1024).for_each(|block| {
                std::hint::black_box(crc32fast::hash(block));
            });
        }
    }) * scale;
    let codec = code(args.k, args.m, bytes)? * scale;
    let (receive, send) = loopback(bytes, &piece)?;
    let (receive, send) = (receive * scale, send * scale);
    let (write, read) = file(args, bytes, &piece)?;
    let (write, read) = (write * scale, read * scale);

    let put_steps = [
        ("MD5 (ETag), one stream", md5),
        ("np16 encode", codec),
        ("block CRC-32, gateway and disk node", 2.0 * width * crc),
        ("receive from the client", receive),
        ("send to the disk nodes", width * send),
        ("receive at the disk nodes", width * receive),
        ("write to files, fdatasync", width * write),
    ];
    let get_steps = [
        ("read from files (page cache)", read),
        ("block CRC-32, disk node and gateway", 2.0 * crc),
        ("send from the disk nodes", send),
        ("receive at the gateway", receive),
        ("send to the client", send),
    ];
    line(format_args!("CPU-seconds per GiB of payload at {}+{}:", args.k, args.m))?;
    let put = table("PUT, payload not signed", &put_steps)?;
    line(format_args!("  {:<42} {:>7.3}", "with a signed payload (SHA-256)", put + sha256))?;
    let get = table("GET", &get_steps)?;
    if let Some(path) = &args.json {
        let steps = |steps: &[(&str, f64)]| {
            steps
                .iter()
                .map(|(name, seconds)| (name.to_string(), serde_json::json!(seconds)))
                .collect::<serde_json::Map<_, _>>()
        };
        let report = serde_json::json!({
            "scheme": format!("{}+{}", args.k, args.m),
            "put": steps(&put_steps), "put_sum": put, "put_signed_sum": put + sha256, "get": steps(&get_steps), "get_sum": get,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}

fn table(title: &str, steps: &[(&str, f64)]) -> std::io::Result<f64> {
    line(format_args!("{title}"))?;
    for (name, seconds) in steps {
        line(format_args!("  {name:<42} {seconds:>7.3}"))?;
    }
    let sum = steps.iter().map(|(_, seconds)| seconds).sum();
    line(format_args!("  {:<42} {sum:>7.3}", "sum"))?;
    Ok(sum)
}

/// CPU time of this thread over `work`, in seconds.
fn timed(work: impl FnOnce()) -> f64 {
    let before = thread_seconds();
    work();
    thread_seconds() - before
}

fn thread_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn code(k: u8, m: u8, bytes: usize) -> Result<f64, Box<dyn Error>> {
    let codec = Codec::new(k, m)?;
    let data = vec![vec![7u8; UNIT]; k.into()];
    let mut coding = vec![vec![0u8; UNIT]; m.into()];
    let sources: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let stripes = bytes / (UNIT * usize::from(k));
    let before = thread_seconds();
    for _ in 0..stripes {
        let mut outputs: Vec<&mut [u8]> = coding.iter_mut().map(Vec::as_mut_slice).collect();
        codec.encode(&sources, &mut outputs)?;
    }
    Ok(thread_seconds() - before)
}

/// (receiver, sender) of `bytes` over one TCP connection on loopback, in pieces as our data path sends them.
fn loopback(bytes: usize, piece: &[u8]) -> Result<(f64, f64), Box<dyn Error>> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let receiver = std::thread::spawn(move || -> std::io::Result<f64> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0u8; UNIT];
        let before = thread_seconds();
        while stream.read(&mut buffer)? > 0 {}
        Ok(thread_seconds() - before)
    });
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let before = thread_seconds();
    for _ in 0..bytes / piece.len() {
        for unit in piece.chunks(UNIT) {
            stream.write_all(unit)?;
        }
    }
    let sent = thread_seconds() - before;
    drop(stream);
    let received = receiver.join().map_err(|_| "the receiver panicked")??;
    Ok((received, sent))
}

/// (write with one fdatasync per 4 MiB, read) of `bytes` in a preallocated file.
fn file(args: &Args, bytes: usize, piece: &[u8]) -> Result<(f64, f64), Box<dyn Error>> {
    let folder = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let path = folder.join(format!("granary-bench-floor-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    // Unlinked at once: nothing is left behind however this ends.
    std::fs::remove_file(&path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64)?;
    let before = thread_seconds();
    for _ in 0..bytes / piece.len() {
        for part in piece.chunks(1 << 20) {
            file.write_all(part)?;
        }
        file.sync_data()?;
    }
    let written = thread_seconds() - before;
    file.seek(SeekFrom::Start(0))?;
    let mut buffer = vec![0u8; 1 << 20];
    let before = thread_seconds();
    while file.read(&mut buffer)? > 0 {}
    Ok((written, thread_seconds() - before))
}
