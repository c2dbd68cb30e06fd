//! The real binary: label, lock, serving, stopping, and the end of the process at the first failed sync.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scenery;

use bytes::Bytes;
use granary_placement::id::{ClusterId, DiskUuid};
use granary_placement::lease::LeaseStamp;
use granary_wire::chunk::{ChunkHealth, ChunkId};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use granary_wire::error::{AuthError, LinkError};
use granary_wire::{ChunkError, Ends, NodeClient};
use scenery::{ask, chunk, delete, disk_node, get, payload, put, spec, Disk, BINARY, CLUSTER, SECRET};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_whose_lease_was_taken_over_can_neither_write_nor_delete_also_after_a_kill() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    let lease = |epoch| LeaseStamp { task: "heal".to_owned(), epoch };
    let put_under = |client: NodeClient, lease: LeaseStamp, number: u8| async move {
        client.put_chunk_under(&lease, chunk(number), spec(70_000), vec![payload(number, 70_000)]).await
    };
    put_under(client.clone(), lease(4), 1).await.unwrap();
    // The old holder is in the middle of a chunk when the new one acts for the first time.
    let mut half = client.begin_chunk_under(&lease(4), chunk(2), spec(70_000)).await.unwrap();
    half.write(payload(2, 70_000).slice(..1000)).await.unwrap();
    assert_eq!(delete(&client, &[9], Some(lease(5))).await, ControlResponse::Deleted(0));
    let stale = ChunkError::StaleLease { current: 5 };
    let rest = async move {
        half.write(payload(2, 70_000).slice(1000..)).await?;
        half.finish().await
    };
    assert_eq!(rest.await, Err(stale.clone()));
    assert_eq!(get(&client, 2).await, Err(ChunkError::NotFound));
    node.signal("KILL");
    node.wait();

    let node = disk.serve();
    let client = node.client();
    assert_eq!(put_under(client.clone(), lease(4), 3).await, Err(stale));
    let refused = ControlResponse::Error(ControlError::StaleLease { current: 5 });
    assert_eq!(delete(&client, &[1], Some(lease(4))).await, refused);
    assert_eq!(get(&client, 1).await.unwrap(), payload(1, 70_000));
    assert_eq!(get(&client, 3).await, Err(ChunkError::NotFound));
    // The holder, and what is no background work, go on.
    put_under(client.clone(), lease(5), 3).await.unwrap();
    assert_eq!(delete(&client, &[1], None).await, ControlResponse::Deleted(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_node_stores_reads_verifies_lists_and_deletes_over_kill_and_stop() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    for (number, len) in [(1, 5), (2, 70_000), (3, 3_000_000)] {
        put(&client, number, len).await.unwrap();
        assert_eq!(get(&client, number).await.unwrap(), payload(number, len));
    }
    let all = vec![chunk(1), chunk(9), chunk(3)];
    assert_eq!(
        ask(&client, ControlRequest::HaveChunks(all.clone())).await,
        ControlResponse::Have(vec![true, false, true])
    );
    let health = vec![ChunkHealth::Good, ChunkHealth::Missing, ChunkHealth::Good];
    assert_eq!(ask(&client, ControlRequest::VerifyChunks(all)).await, ControlResponse::Health(health));
    assert_eq!(delete(&client, &[1, 9], None).await, ControlResponse::Deleted(1));
    node.signal("KILL");
    node.wait();

    let mut node = disk.serve();
    let client = node.client();
    assert_eq!(get(&client, 1).await, Err(ChunkError::NotFound));
    assert_eq!(get(&client, 2).await.unwrap(), payload(2, 70_000));
    assert_eq!(get(&client, 3).await.unwrap(), payload(3, 3_000_000));
    let ControlResponse::Chunks { chunks, more } =
        ask(&client, ControlRequest::ListChunks { after: None, limit: 10 }).await
    else {
        panic!()
    };
    assert_eq!((chunks.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), more), (vec![chunk(2), chunk(3)], false));
    assert!(chunks.iter().all(|chunk| chunk.quarantined_ms.is_none()));
    let quarantine = async |ids: &[u8], into: bool, epoch: u64| {
        let lease = LeaseStamp { task: "heal".to_owned(), epoch };
        let chunks = ids.iter().map(|id| chunk(*id)).collect();
        ask(&client, ControlRequest::Quarantine { chunks, into, lease }).await
    };
    let marked = async || {
        let answer = ask(&client, ControlRequest::ListChunks { after: None, limit: 10 }).await;
        let ControlResponse::Chunks { chunks, .. } = answer else { panic!("{answer:?}") };
        chunks.iter().filter(|chunk| chunk.quarantined_ms.is_some()).map(|chunk| chunk.id).collect::<Vec<_>>()
    };
    assert_eq!(quarantine(&[2, 3, 9], true, 9).await, ControlResponse::Done);
    assert_eq!(marked().await, [chunk(2), chunk(3)]);
    assert_eq!(get(&client, 2).await.unwrap(), payload(2, 70_000));
    let refused = ControlResponse::Error(ControlError::StaleLease { current: 9 });
    assert_eq!(quarantine(&[2], false, 8).await, refused);
    assert_eq!(quarantine(&[2], false, 9).await, ControlResponse::Done);
    assert_eq!(marked().await, [chunk(3)]);
    let ControlResponse::Status(status) = ask(&client, ControlRequest::Status).await else { panic!() };
    assert_eq!((status.chunks, status.chunk_bytes), (2, 3_070_000));
    assert!(status.free_bytes > 0 && status.free_bytes < status.capacity_bytes);
    assert_eq!(ask(&client, ControlRequest::GetMap).await, ControlResponse::Map(None));
    node.signal("TERM");
    assert_eq!(node.wait().code(), Some(0), "{}", disk.log());
    assert!(!disk.log().contains(&SECRET[..16]), "the secret is in the log");

    let report = disk_node(&["inspect", "--dir", disk.dir().to_str().unwrap(), "--verify", "--chunks"]);
    let text = String::from_utf8_lossy(&report.stdout).into_owned();
    assert_eq!(report.status.code(), Some(0), "{text}");
    assert!(text.contains(&chunk(3).to_string()) && text.contains("no damage found"), "{text}");
    flip_a_payload_byte(&disk.dir());
    let report = disk_node(&["inspect", "--dir", disk.dir().to_str().unwrap(), "--verify", "--json"]);
    assert_eq!(report.status.code(), Some(1), "{}", String::from_utf8_lossy(&report.stdout));
    let json: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(json["damaged"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_found_damaged_at_the_start_is_rebuilt_in_the_same_start() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    for number in 1..40 {
        put(&client, number, 20_000).await.unwrap();
    }
    node.signal("TERM");
    assert_eq!(node.wait().code(), Some(0));
    // The first bytes of each table are entries; what says where entries lie stands at its end and stays good, so that
    // the index opens.
    let mut damaged = 0;
    for entry in std::fs::read_dir(disk.dir().join("index")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "sst") {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.iter_mut().take(64).for_each(|byte| *byte ^= 0x5a);
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0);
    let node = disk.serve();
    let client = node.client();
    for number in 1..40 {
        assert_eq!(get(&client, number).await.unwrap(), payload(number, 20_000), "{number}");
    }
    assert!(disk.log().contains("the index was found damaged at the start"), "{}", disk.log());
}

/// In a sealed segment, so that no crash explains it.
fn flip_a_payload_byte(dir: &Path) {
    for entry in std::fs::read_dir(dir.join("segments")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let Some(record) = (8192..bytes.len()).step_by(4096).find(|at| bytes[*at..].starts_with(b"GRNYREC\0")) else {
            continue;
        };
        if bytes[4096..].starts_with(b"GRNYSEAL") {
            bytes[record + 4096] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            return;
        }
    }
    panic!("no sealed segment with a record");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_this_nodes_disk_is_refused_in_words() {
    let disk = Disk::new();
    let said = |output: Output| (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
    let (code, text) = said(disk.format());
    assert!(code == Some(2) && text.contains("already disk 4"), "{text}");
    let serve = |extra: &[&str]| {
        let mut args = disk.serve_args();
        args.extend(extra.iter().map(|word| (*word).to_owned()));
        said(Command::new(BINARY).args(args).output().unwrap())
    };
    let (code, text) = serve(&["--cluster", &ClusterId([0x22; 16]).to_string()]);
    assert!(code == Some(2) && text.contains("belongs to cluster"), "{text}");
    let node = disk.serve();
    let (code, text) = serve(&[]);
    assert!(code == Some(2) && text.contains("in use by another process"), "{text}");
    let (code, text) = said(disk_node(&["inspect", "--dir", disk.dir().to_str().unwrap()]));
    assert!(code == Some(2) && text.contains("in use by another process"), "{text}");
    drop(node);
    let stranger = disk.root.path().join("stranger");
    std::fs::create_dir(&stranger).unwrap();
    std::fs::write(stranger.join("holiday.jpg"), b"x").unwrap();
    let format = ["format", "--dir", stranger.to_str().unwrap(), "--cluster", &CLUSTER.to_string(), "--disk", "5"];
    let (code, text) = said(disk_node(&format));
    assert!(code == Some(2) && text.contains("holiday.jpg"), "{text}");
    std::fs::write(disk.dir().join("label.json"), b"{\"version\": 1}").unwrap();
    let (code, text) = serve(&[]);
    assert!(code == Some(2) && text.contains("damaged"), "{text}");
}

/// A reader that goes away (`| head`) is no failure.
#[test]
fn verbs_whose_reader_went_away_end_quietly() {
    let disk = Disk::new();
    let new = disk.root.path().join("new");
    let cluster = CLUSTER.to_string();
    for verb in [
        vec!["format", "--dir", new.to_str().unwrap(), "--cluster", &cluster, "--disk", "5"],
        vec!["inspect", "--dir", disk.dir().to_str().unwrap()],
        vec!["inspect", "--dir", disk.dir().to_str().unwrap(), "--json"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let done = Command::new(BINARY).args(&verb).stdout(writer).output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!((done.status.code(), said.as_str()), (Some(0), ""), "{verb:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_takes_nothing_that_is_meant_for_another_disk() {
    let disk = Disk::new();
    let node = disk.serve();
    let ControlResponse::Status(status) = ask(&node.client(), ControlRequest::Status).await else { panic!() };
    let right = node.client_as(Ends { to: Some(status.uuid), from: None, gateway: None });
    // It may open as many sockets as the system allows.
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", node.child.id())).unwrap();
    let files: Vec<&str> =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(files[3], files[4], "{limits}");
    put(&right, 1, 1000).await.unwrap();

    let wrong = node.client_as(Ends { to: Some(DiskUuid([9; 16])), from: None, gateway: None });
    assert_eq!(put(&wrong, 2, 1000).await, Err(ChunkError::Link(LinkError::Auth(AuthError::Disk))));
    assert_eq!(get(&wrong, 1).await, Err(ChunkError::Link(LinkError::Auth(AuthError::Disk))));
    let deletion = ControlRequest::DeleteChunks { chunks: vec![chunk(1)], lease: None };
    let deleted = wrong.control(deletion, Duration::from_secs(10)).await;
    assert_eq!(deleted, Err(LinkError::Auth(AuthError::Disk)));
    assert_eq!(ask(&right, ControlRequest::HaveChunks(vec![chunk(1), chunk(2)])).await, {
        ControlResponse::Have(vec![true, false])
    });
}

/// Chunks rot on a disk that nobody reads: the node finds them by itself, says so, and takes off its list what is
/// written again.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_finds_what_rots_by_itself_and_tells_of_it_until_it_is_replaced() {
    let disk = Disk::new();
    let scrubs = ["node.scrub_interval=1s", "node.scrub_ceiling=1GiB/s", "node.scrub_floor=1GiB/s"];
    let mut node = disk.serve_with(&scrubs);
    let client = node.client();
    // Its first page is no other chunk's.
    let data = |number: u8| Bytes::from([vec![number; 4096], payload(number, 200_000 - 4096).to_vec()].concat());
    let put = async |client: &NodeClient, number: u8| {
        client.put_chunk(chunk(number), spec(200_000), vec![data(number)]).await.unwrap();
    };
    for number in 1..=5 {
        put(&client, number).await;
    }
    let damaged = async |client: &NodeClient, after: Option<u8>, limit: u32| {
        let request = ControlRequest::ListDamaged { after: after.map(chunk), limit };
        let answer = ask(client, request).await;
        let ControlResponse::Chunks { chunks, more } = answer else { panic!("{answer:?}") };
        assert!(chunks.iter().all(|chunk| chunk.spec.len_bytes == 200_000 && chunk.quarantined_ms.is_none()));
        (chunks.into_iter().map(|chunk| chunk.id).collect::<Vec<_>>(), more)
    };
    let until_listed = async |client: &NodeClient, expected: &[ChunkId]| {
        let begun = Instant::now();
        while damaged(client, None, 1000).await.0 != expected {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", damaged(client, None, 1000).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert_eq!(damaged(&client, None, 10).await, (vec![], false));
    let flip = |number: u8| {
        use std::os::unix::fs::FileExt;
        let wanted = vec![number; 4096];
        for entry in std::fs::read_dir(disk.dir().join("segments")).unwrap() {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.unwrap().path()).unwrap();
            let mut page = vec![0; 4096];
            for at in (0..4 << 20).step_by(4096) {
                if file.read_exact_at(&mut page, at).is_ok() && page == wanted {
                    return file.write_all_at(&[!page[77]], at + 77).unwrap();
                }
            }
        }
        panic!("chunk {number} is not on the disk");
    };
    flip(2);
    flip(4);
    until_listed(&client, &[chunk(2), chunk(4)]).await;
    assert_eq!(damaged(&client, None, 1).await, (vec![chunk(2)], true));
    assert_eq!(damaged(&client, Some(2), 1).await, (vec![chunk(4)], false));
    let all = (1..=5).map(chunk).collect();
    assert_eq!(ask(&client, ControlRequest::HaveChunks(all)).await, ControlResponse::Have(vec![true; 5]));
    put(&client, 4).await;
    until_listed(&client, &[chunk(2)]).await;
    node.signal("TERM");
    assert!(node.wait().success());

    // The list outlives the process.
    let node = disk.serve_with(&["node.scrub_interval=0ms"]);
    let client = node.client();
    assert_eq!(damaged(&client, None, 10).await, (vec![chunk(2)], false));
    put(&client, 2).await;
    assert_eq!(damaged(&client, None, 10).await, (vec![], false));
    assert!(disk.log().contains("node.scrub_interval is 0"), "{}", disk.log());
}

/// The kernel refuses one sync; the process must end without an answer, and a fresh one must hold what was acknowledged
/// before.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_failed_sync_ends_the_process() {
    let strace = Command::new("strace").arg("-V").output();
    assert!(
        strace.is_ok_and(|done| done.status.success()),
        "this test needs strace (a failing sync cannot be had otherwise): install it"
    );
    let disk = Disk::new();
    let mut node = disk.serve();
    put(&node.client(), 1, 100_000).await.unwrap();
    node.signal("TERM");
    node.wait();
    // The tracer counts per thread: past what the opening thread needs, so that it is the writer's sync that fails, at
    // its birth of a segment or for a group.
    for when in [16, 25, 40] {
        let trace = disk.root.path().join("trace");
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", trace.to_str().unwrap(), "-e", "trace=fdatasync", "-e"]);
        command.arg(format!("inject=fdatasync:error=EIO:when={when}")).arg(BINARY).args(disk.serve_args());
        let mut node = disk.start(&mut command);
        let client = node.client();
        let mut acknowledged = Vec::new();
        let begun = Instant::now();
        for number in 10..60 {
            match put(&client, number, 3000).await {
                Ok(()) => acknowledged.push(number),
                Err(_) => break,
            }
        }
        assert!(acknowledged.len() < 50, "no sync failed: {}", std::fs::read_to_string(&trace).unwrap());
        assert!(!node.wait().success());
        assert!(begun.elapsed() < Duration::from_secs(10));
        let traced = std::fs::read_to_string(&trace).unwrap();
        assert!(traced.contains("INJECTED"), "{traced}");
        assert!(disk.log().contains("can no longer be trusted"), "{}", disk.log());
        let mut node = disk.serve();
        let client = node.client();
        assert_eq!(get(&client, 1).await.unwrap(), payload(1, 100_000));
        for number in acknowledged {
            assert_eq!(get(&client, number).await.unwrap(), payload(number, 3000));
        }
        node.signal("TERM");
        assert!(node.wait().success());
    }
}

/// Many long uploads and reads at once; what is not written yet must wait in the clients, not in the node.
#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_bounded_under_load() {
    let disk = Disk::new();
    let mut node = disk.serve();
    let client = node.client();
    // Made before: whoever makes bytes in a task keeps the handshakes of the others from going on.
    let bytes = payload(1, 24 << 20);
    let tasks: Vec<_> = (0..32u8)
        .map(|number| {
            let (client, mut data) = (client.clone(), bytes.clone());
            tokio::spawn(async move {
                let len = if number % 2 == 0 { 24 << 20 } else { 900_000 };
                data.truncate(len);
                client.put_chunk(chunk(number), spec(len as u64), vec![data]).await.unwrap();
                let blocks = (len as u32).div_ceil(65536);
                for first in (0..blocks).step_by(64) {
                    client.read_blocks(chunk(number), first, 64).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("peak memory {} MiB", peak_kib / 1024);
    assert!(peak_kib < 400 * 1024, "{peak_kib} KiB");
    node.signal("TERM");
    assert!(node.wait().success());
}
