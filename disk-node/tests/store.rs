//! The store on a real file system with its real index.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_disk_node::metrics::Metrics;
use granary_disk_node::store::core::Whose;
use granary_disk_node::store::device::Device;
use granary_disk_node::store::file_device::FileDevice;
use granary_disk_node::store::handle::Store;
use granary_disk_node::store::index_rocksdb::RocksEngine;
use granary_disk_node::store::recover::Recovered;
use granary_disk_node::store::{OpenError, StoreError, StoreSettings};
use granary_placement::id::{DiskUuid, ExtentId, PlacementGroupId};
use granary_wire::chunk::{block_crc, ChunkHealth, ChunkId, BLOCK_BYTES};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[path = "scenery/spec.rs"]
mod spec;
use spec::spec;

const DISK: DiskUuid = DiskUuid([7; 16]);
const MIB: u64 = 1024 * 1024;

fn settings() -> StoreSettings {
    StoreSettings {
        segment_bytes: 8 * MIB,
        min_segment_bytes: MIB,
        reserve_bytes: 0,
        punch_interval: Duration::from_millis(50),
        ..StoreSettings::default()
    }
}

fn open_with(dir: &Path, settings: StoreSettings, disk: DiskUuid) -> Result<(Store, Recovered), OpenError> {
    let device = FileDevice::open(&dir.join("segments")).unwrap();
    let engine = RocksEngine::open(&dir.join("index")).unwrap();
    Store::open(
        Arc::new(device),
        Box::new(engine),
        disk,
        settings,
        Arc::new(Metrics::new().unwrap()),
        Arc::new(|reason| panic!("{reason}")),
    )
}

fn open(dir: &Path) -> (Store, Recovered) {
    open_with(dir, settings(), DISK).unwrap()
}

fn chunk(number: u32) -> ChunkId {
    ChunkId { group: PlacementGroupId(number % 3), extent: ExtentId([number as u8; 16]), index: 1, generation: number }
}

fn payload(seed: u64, len_bytes: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len_bytes as usize + 8);
    while (bytes.len() as u64) < len_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len_bytes as usize);
    bytes
}

fn crcs(id: &ChunkId, data: &[u8]) -> Vec<u32> {
    data.chunks(BLOCK_BYTES as usize).enumerate().map(|(block, bytes)| block_crc(id, block as u32, bytes)).collect()
}

async fn put(store: &Store, id: ChunkId, data: &[u8]) -> Result<(), StoreError> {
    put_for(Whose::Client, store, id, data).await
}

async fn put_for(whose: Whose, store: &Store, id: ChunkId, data: &[u8]) -> Result<(), StoreError> {
    let mut upload = store.begin(id, spec(data.len() as u64), whose).await?;
    for piece in data.chunks(100_003) {
        upload.write(Bytes::copy_from_slice(piece)).await?;
    }
    upload.finish(crcs(&id, data)).await
}

async fn get(store: &Store, id: ChunkId) -> Result<Vec<u8>, StoreError> {
    let mut all = Vec::new();
    loop {
        let blocks = store.read_blocks(id, (all.len() as u64 / BLOCK_BYTES) as u32, 64).await?;
        all.extend(blocks.data.concat());
        if all.len() as u64 == blocks.spec.len_bytes {
            return Ok(all);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_every_size_come_back_over_restarts_and_without_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [1, 4095, 4096, 65_535, 65_536, 65_537, MIB, MIB + 1, 3 * MIB + 5, 9 * MIB, 64 * MIB];
    let (store, recovered) = open(dir.path());
    assert!(recovered.rebuilt, "a new disk has no index");
    for (number, size) in sizes.iter().enumerate() {
        put(&store, chunk(number as u32), &payload(number as u64, *size)).await.unwrap();
    }
    let all_there = |store: Store| async move {
        for (number, size) in sizes.iter().enumerate() {
            assert!(
                get(&store, chunk(number as u32)).await.unwrap() == payload(number as u64, *size),
                "chunk of {size}"
            );
            assert_eq!(store.verify(chunk(number as u32)).await, Ok(ChunkHealth::Good));
        }
        let (listed, more) = store.list(None, 1000).await.unwrap();
        assert_eq!((listed.len(), more), (sizes.len(), false));
        let fill = store.fill().unwrap();
        assert_eq!((fill.chunks, fill.chunk_bytes), (sizes.len() as u64, sizes.iter().sum()));
    };
    all_there(store.clone()).await;
    store.close().await.unwrap();
    assert!(matches!(store.have(vec![chunk(0)]).await, Err(StoreError::Failed(_))));
    assert!(matches!(
        store.begin(chunk(0), spec(10), Whose::Client).await.unwrap().finish(vec![]).await,
        Err(StoreError::Rejected(_))
    ));
    assert!(matches!(put(&store, chunk(0), b"late").await, Err(StoreError::Failed(_))));
    drop(store);
    let (store, recovered) = open(dir.path());
    assert_eq!((recovered.rebuilt, recovered.records_indexed), (false, 0), "a clean stop leaves nothing to recover");
    all_there(store.clone()).await;
    put(&store, chunk(50), &payload(50, 70_000)).await.unwrap();
    store.delete(vec![chunk(50)]).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let (store, recovered) = open(dir.path());
    assert!(recovered.rebuilt);
    all_there(store.clone()).await;
    store.close().await.unwrap();
    drop(store);
    // A damaged index is as good as none.
    let manifest = std::fs::read_dir(dir.path().join("index")).unwrap().map(|entry| entry.unwrap().path());
    let manifest: PathBuf = manifest.into_iter().find(|path| path.to_string_lossy().contains("MANIFEST")).unwrap();
    let mut bytes = std::fs::read(&manifest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&manifest, bytes).unwrap();
    let (store, recovered) = open(dir.path());
    assert!(recovered.rebuilt);
    all_there(store.clone()).await;
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overwritten_chunk_is_the_new_one_and_a_deleted_one_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    for round in 0..5 {
        put(&store, chunk(1), &payload(round, 300_000 + round)).await.unwrap();
        put(&store, chunk(2), &payload(100 + round, 2 * MIB)).await.unwrap();
        assert_eq!(get(&store, chunk(1)).await.unwrap(), payload(round, 300_000 + round));
    }
    assert_eq!(store.delete(vec![chunk(2), chunk(9)]).await, Ok(1));
    assert_eq!(get(&store, chunk(2)).await, Err(StoreError::NotFound));
    assert_eq!(store.have(vec![chunk(1), chunk(2)]).await, Ok(vec![true, false]));
    store.close().await.unwrap();
    drop(store);
    let (store, _) = open(dir.path());
    assert_eq!(get(&store, chunk(1)).await.unwrap(), payload(4, 300_004));
    assert_eq!(get(&store, chunk(2)).await, Err(StoreError::NotFound));
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_wrong_or_given_up_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    for size in [50_000, 5 * MIB] {
        let data = payload(1, size);
        let mut upload = store.begin(chunk(1), spec(size), Whose::Client).await.unwrap();
        upload.write(Bytes::copy_from_slice(&data[..40_000])).await.unwrap();
        drop(upload);
        let mut upload = store.begin(chunk(1), spec(size), Whose::Client).await.unwrap();
        upload.write(Bytes::copy_from_slice(&data[..40_000])).await.unwrap();
        assert!(matches!(upload.finish(crcs(&chunk(1), &data)).await, Err(StoreError::Rejected(_))), "short");
        let mut upload = store.begin(chunk(1), spec(size), Whose::Client).await.unwrap();
        upload.write(Bytes::copy_from_slice(&data)).await.unwrap();
        assert!(matches!(upload.write(Bytes::from_static(b"x")).await, Err(StoreError::Rejected(_))), "long");
        let mut upload = store.begin(chunk(1), spec(size), Whose::Client).await.unwrap();
        upload.write(Bytes::copy_from_slice(&data)).await.unwrap();
        let mut wrong = crcs(&chunk(1), &data);
        wrong[0] ^= 1;
        assert_eq!(upload.finish(wrong).await, Err(StoreError::Corrupt { block: 0 }));
    }
    assert!(matches!(store.begin(chunk(1), spec(0), Whose::Client).await, Err(StoreError::Rejected(_))));
    assert!(matches!(store.begin(chunk(1), spec(64 * MIB + 1), Whose::Client).await, Err(StoreError::Rejected(_))));
    assert_eq!(store.have(vec![chunk(1)]).await, Ok(vec![false]));
    assert_eq!(store.fill().unwrap().chunks, 0);
    store.close().await.unwrap();
}

/// One flipped bit in each class of bytes of a record.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let data = payload(3, 200_000);
    let header_fields = [0, 9, 13, 20, 35, 45, 50, 73, 74, 77, 85, 90, 97, 105, 110, 124];
    let payload_bytes = [4096, 4096 + 100_000, 4096 + 199_999];
    for (number, at) in header_fields.into_iter().chain(payload_bytes).enumerate() {
        let (store, _) = open(dir.path());
        let id = chunk(number as u32);
        put(&store, id, &data).await.unwrap();
        store.close().await.unwrap();
        drop(store);
        let (path, record) = find_record(dir.path(), &id);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[record + at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let (store, _) = open(dir.path());
        let outcome = get(&store, id).await;
        assert!(
            matches!(outcome, Err(StoreError::Corrupt { .. })),
            "byte {at}: {:?}",
            outcome.map(|bytes| bytes.len())
        );
        assert_eq!(store.verify(id).await, Ok(ChunkHealth::Corrupt), "byte {at}");
        // A good copy written over it heals it.
        put(&store, id, &data).await.unwrap();
        assert_eq!(get(&store, id).await.unwrap(), data);
        store.close().await.unwrap();
    }
}

/// The file and offset of a chunk's record, found by its id.
fn find_record(dir: &Path, id: &ChunkId) -> (PathBuf, usize) {
    let mut found = None;
    for entry in std::fs::read_dir(dir.join("segments")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for at in (8192..bytes.len()).step_by(4096) {
            if bytes[at..].starts_with(b"GRNYREC\0") && bytes[at + 48..at + 73] == id.to_bytes() {
                found = Some((path.clone(), at));
            }
        }
    }
    found.expect("the record is on the disk")
}

#[tokio::test(flavor = "multi_thread")]
async fn many_writers_share_syncs_and_readers_see_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let tasks: Vec<_> = (0..64u32)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move {
                for round in 0..6 {
                    let data = payload(u64::from(number * 100 + round), 1 + u64::from(number) * 40_000);
                    put(&store, chunk(number), &data).await.unwrap();
                    assert!(get(&store, chunk(number)).await.unwrap() == data);
                    if round % 3 == 2 {
                        assert_eq!(store.delete(vec![chunk(number)]).await, Ok(1));
                        assert_eq!(get(&store, chunk(number)).await, Err(StoreError::NotFound));
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(store.fill().unwrap().chunks, 0);
    // All of it is dead: space comes back within the punch interval and a little.
    let begun = Instant::now();
    loop {
        let segments = FileDevice::open_read_only(&dir.path().join("segments")).list().unwrap().len();
        if segments <= 1 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{segments} segments left");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_of_another_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    put(&store, chunk(1), b"mine").await.unwrap();
    store.close().await.unwrap();
    drop(store);
    let refused = open_with(dir.path(), settings(), DiskUuid([8; 16]));
    assert!(matches!(refused, Err(OpenError::Foreign { .. })));
}

/// A file system of its own in a file, unmounted when dropped.
struct LoopMount {
    dir: tempfile::TempDir,
}

/// A command as root: by itself, or through sudo where that asks for no password. Debian keeps file system tools out of
/// others' PATH.
fn as_root(program: &str, args: &[&str]) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "--", program]);
        sudo
    };
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(args).env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn run(mut command: Command) -> Result<(), String> {
    let done = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() {
        Ok(())
    } else {
        Err(format!("{command:?}: {}", said.trim()))
    }
}

impl LoopMount {
    /// # Errors
    /// Why this user or machine cannot mount.
    fn new(size_bytes: u64) -> Result<LoopMount, String> {
        run(as_root("true", &[]))?;
        let dir = tempfile::tempdir().unwrap();
        let (image, mount) = (dir.path().join("image"), dir.path().join("mnt"));
        std::fs::File::create(&image).unwrap().set_len(size_bytes).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let (image, mount) = (image.to_str().unwrap(), mount.to_str().unwrap());
        let owner = format!("{}:{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        run(as_root("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", &format!("root_owner={owner}"), image]))?;
        run(as_root("mount", &["-o", "loop", image, mount]))?;
        Ok(LoopMount { dir })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // Lazily: a failed test may still hold files open.
        let _ = as_root("umount", &["-l", self.path().to_str().unwrap()]).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_stall_hold_no_other_up() {
    let dir = tempfile::tempdir().unwrap();
    let settings = StoreSettings { queue_bytes: 2 * MIB, ..settings() };
    let (store, _) = open_with(dir.path(), settings, DISK).unwrap();
    let mut stalled = Vec::new();
    for number in 0..8 {
        // Short ones, which go to the writer whole, and longer ones, which go in pieces.
        let len_bytes = if number % 2 == 0 { MIB } else { 3 * MIB };
        let begun =
            tokio::time::timeout(Duration::from_secs(10), store.begin(chunk(number), spec(len_bytes), Whose::Client));
        let mut upload = begun.await.expect("it may begin").unwrap();
        let half = payload(1, len_bytes / 2);
        tokio::time::timeout(Duration::from_secs(10), upload.write(half.into())).await.expect("it may send").unwrap();
        stalled.push(upload);
    }
    for len_bytes in [1000, MIB, 5 * MIB] {
        let data = payload(7, len_bytes);
        let stored = tokio::time::timeout(Duration::from_secs(10), put(&store, chunk(100), &data)).await;
        stored.expect("others are stalled, and this one waits for them").unwrap();
        assert!(get(&store, chunk(100)).await.unwrap() == data);
    }
    drop(stalled);
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_chunks_reads_deletes_and_takes_chunks_again() {
    let mount = match LoopMount::new(96 * MIB) {
        Ok(mount) => mount,
        Err(why) => {
            let why = format!("a really full disk needs a loop mount, and so root or sudo without a password: {why}");
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
            // Past the runner, which shows the output of failed tests only.
            writeln!(
                std::io::stderr(),
                "NOT RUN: a_full_disk_refuses_chunks_reads_deletes_and_takes_chunks_again: {why}"
            )
            .unwrap();
            return;
        }
    };
    let reserve = 8 * MIB;
    let (store, _) = open_with(&mount.path(), StoreSettings { reserve_bytes: reserve, ..settings() }, DISK).unwrap();
    let data = |number: u32| payload(u64::from(number), if number.is_multiple_of(4) { 2 * MIB } else { 300_000 });
    let mut stored = Vec::new();
    for number in 0.. {
        match put(&store, chunk(number), &data(number)).await {
            Ok(()) => stored.push(number),
            Err(StoreError::DiskFull) => break,
            Err(other) => panic!("{other}"),
        }
        assert!(number < 1000, "never full");
    }
    println!("{} chunks until full", stored.len());
    assert!(stored.len() > 80, "{}", stored.len());
    let space = FileDevice::open_read_only(&mount.path().join("segments")).space().unwrap();
    assert!(space.free_bytes >= reserve - MIB, "the reserve was kept: {} free", space.free_bytes);
    // Repairs go on into a quarter of the reserve, and no further. What they open there is not for clients.
    assert_eq!(put(&store, chunk(5000), &payload(1, MIB)).await, Err(StoreError::DiskFull));
    put_for(Whose::Repair, &store, chunk(6000), &payload(1, MIB)).await.unwrap();
    assert_eq!(put(&store, chunk(5001), &payload(1, 4096)).await, Err(StoreError::DiskFull));
    let mut repaired = 1;
    while put_for(Whose::Repair, &store, chunk(6000 + repaired), &payload(1, MIB)).await.is_ok() {
        repaired += 1;
    }
    assert!(repaired <= 3, "{repaired}");
    let space = FileDevice::open_read_only(&mount.path().join("segments")).space().unwrap();
    assert!(space.free_bytes >= reserve / 4 * 3 - MIB, "{} free", space.free_bytes);
    assert_eq!(store.delete((0..repaired).map(|number| chunk(6000 + number)).collect()).await, Ok(repaired));
    // Take the reserve away too: to the last byte, as a stranger on the same file system would.
    let filler = std::fs::File::create(mount.path().join("filler")).unwrap();
    let mut written = 0;
    while std::os::unix::fs::FileExt::write_at(&filler, &[1; 4096], written).is_ok() {
        written += 4096;
    }
    assert!(matches!(put(&store, chunk(2000), &data(1)).await, Ok(()) | Err(StoreError::DiskFull)));
    assert_eq!(put(&store, chunk(2001), &payload(1, 4 * MIB)).await, Err(StoreError::DiskFull));
    for number in &stored {
        assert!(get(&store, chunk(*number)).await.unwrap() == data(*number));
    }
    drop(filler);
    std::fs::remove_file(mount.path().join("filler")).unwrap();
    let (gone, kept) = stored.split_at(stored.len() / 2);
    assert_eq!(store.delete(gone.iter().map(|number| chunk(*number)).collect()).await, Ok(gone.len() as u32));
    for number in 3000..3000 + gone.len() as u32 / 2 {
        put(&store, chunk(number), &payload(u64::from(number), 300_000)).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let (store, _) = open_with(&mount.path(), StoreSettings { reserve_bytes: reserve, ..settings() }, DISK).unwrap();
    for number in kept {
        assert!(get(&store, chunk(*number)).await.unwrap() == data(*number));
    }
    store.close().await.unwrap();
}
