//! Source trees for backups, and the judge: a restored tree is compared byte for byte, never by a tool's own word.

use crate::seed::Random;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Path below the root to what is there: a file's length and SHA-256, or a link's target.
pub type Manifest = BTreeMap<Vec<u8>, String>;

/// What lies below `root`. With `links` false symbolic links are left out, as some tools leave them out.
pub fn manifest(root: &Path, links: bool) -> Manifest {
    let mut found = Manifest::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("entry of a folder").path();
            let kind = std::fs::symlink_metadata(&path).expect("metadata").file_type();
            let name = path.strip_prefix(root).expect("below the root").as_os_str().as_bytes().to_vec();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_symlink() {
                if links {
                    found.insert(name, format!("-> {}", std::fs::read_link(&path).expect("link").display()));
                }
            } else {
                found.insert(name, fingerprint(&path));
            }
        }
    }
    found
}

fn fingerprint(path: &Path) -> String {
    let mut file = std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut hash, mut length, mut buffer) = (Sha256::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        let got = file.read(&mut buffer).expect("read a file");
        if got == 0 {
            return format!("{length} {}", hex::encode(hash.finalize()));
        }
        length += got as u64;
        hash.update(&buffer[..got]);
    }
}

/// Fails with the first differences, if there are any.
pub fn assert_same(what: &str, expected: &Manifest, found: &Manifest) {
    let mut wrong = Vec::new();
    for (name, is) in expected {
        match found.get(name) {
            None => wrong.push(format!("missing: {}", String::from_utf8_lossy(name))),
            Some(other) if other != is => {
                wrong.push(format!("differs: {} ({is} became {other})", String::from_utf8_lossy(name)))
            }
            Some(_) => {}
        }
    }
    wrong.extend(
        found
            .keys()
            .filter(|name| !expected.contains_key(*name))
            .map(|name| format!("not in the source: {}", String::from_utf8_lossy(name))),
    );
    assert!(
        wrong.is_empty(),
        "{what}: {} of {} differ, the first:\n{}",
        wrong.len(),
        expected.len(),
        wrong.iter().take(10).cloned().collect::<Vec<_>>().join("\n")
    );
    println!("    {what}: {} files the same", expected.len());
}

/// A copy of a part of the Rust toolchain's folder below `into`: about `bytes` in all, many small files and some large
/// ones. The same on each run with the same toolchain. Links are kept.
pub fn toolchain_sample(into: &Path, bytes: u64) -> PathBuf {
    let source = toolchain();
    let mut files = Vec::new();
    let mut folders = vec![source.clone()];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<PathBuf> =
            std::fs::read_dir(&folder).expect("toolchain folder").map(|entry| entry.expect("entry").path()).collect();
        entries.sort();
        for path in entries {
            let meta = std::fs::symlink_metadata(&path).expect("metadata");
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() {
                files.push((meta.len(), path));
            }
        }
    }
    let total: u64 = files.iter().map(|(length, _)| length).sum();
    // Large files first, at most a third of the budget; then every n-th of the small ones.
    let mut picked = Vec::new();
    let mut left = bytes;
    if total <= bytes {
        picked = files.into_iter().map(|(_, path)| path).collect();
    } else {
        let mut large: Vec<&(u64, PathBuf)> =
            files.iter().filter(|(length, _)| *length > 4 << 20 && *length <= bytes / 4).collect();
        large.sort();
        let mut for_large = bytes / 3;
        for (length, path) in large {
            if *length <= for_large {
                for_large -= length;
                left -= length;
                picked.push(path.clone());
            }
        }
        let small: Vec<&(u64, PathBuf)> = files.iter().filter(|(length, _)| *length <= 4 << 20).collect();
        let small_total: u64 = small.iter().map(|(length, _)| length).sum();
        let step = (small_total / left.max(1)).max(1) as usize;
        for (length, path) in small.into_iter().step_by(step) {
            if *length <= left {
                left -= length;
                picked.push(path.clone());
            }
        }
    }
    let root = into.join("tree");
    for path in &picked {
        let target = root.join(path.strip_prefix(&source).expect("below the toolchain"));
        std::fs::create_dir_all(target.parent().expect("parent")).expect("folder of the sample");
        std::fs::copy(path, &target).unwrap_or_else(|error| panic!("copy {}: {error}", path.display()));
    }
    root
}

/// The Rust toolchain's folder.
pub fn toolchain() -> PathBuf {
    let out = std::process::Command::new("rustc").args(["--print", "sysroot"]).output().expect("rustc");
    PathBuf::from(String::from_utf8(out.stdout).expect("a path").trim())
}

/// Files with hard names and sizes, below `root`.
pub fn add_odd_files(root: &Path, random: &mut Random) {
    let odd = root.join("odd names");
    std::fs::create_dir_all(odd.join("skel.other")).expect("folder");
    std::fs::create_dir_all(odd.join("skel")).expect("folder");
    let mut write = |name: &str, length: usize| {
        std::fs::write(odd.join(name), random.bytes(length)).unwrap_or_else(|error| panic!("{name}: {error}"));
    };
    write("empty", 0);
    write("a+b %20 é&=?.txt", 100);
    write("ends with a space ", 1);
    write("skel/x", 10);
    write("skel.other/x", 10);
    write("quote ' \" <xml> & \u{30c6}\u{30b9}\u{30c8}", 5_000);
    for (name, length) in [
        ("inline-max", 8192),
        ("inline-over", 8193),
        ("unit", 131_072),
        ("stripe", 524_288),
        ("stripe-over", 524_289),
        ("mid", 3_000_001),
        ("large", 20_000_003),
    ] {
        write(name, length);
    }
    let long = "long".repeat(60);
    write(&long, 300);
}
