//! A disk in a temporary folder, the real binary serving it, and chunks to store there.

#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_placement::id::{ClusterId, ExtentId, PlacementGroupId};
use granary_placement::lease::LeaseStamp;
use granary_wire::chunk::ChunkId;
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::{ChunkError, ClientLimits, ClusterSecret, Credentials, Ends, NodeClient};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

mod spec;
pub use spec::spec;

pub const BINARY: &str = env!("CARGO_BIN_EXE_granary-disk-node");
pub const CLUSTER: ClusterId = ClusterId([0x11; 16]);
pub const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

pub fn disk_node(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

pub struct Disk {
    pub root: tempfile::TempDir,
}

impl Disk {
    pub fn new() -> Disk {
        let root = tempfile::tempdir().unwrap();
        let secret = root.path().join("secret");
        std::fs::write(&secret, SECRET).unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
        let disk = Disk { root };
        let done = disk.format();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        disk
    }

    pub fn dir(&self) -> PathBuf {
        self.root.path().join("disk")
    }

    pub fn format(&self) -> Output {
        disk_node(&["format", "--dir", self.dir().to_str().unwrap(), "--cluster", &CLUSTER.to_string(), "--disk", "4"])
    }

    /// The arguments of `serve`.
    pub fn serve_args(&self) -> Vec<String> {
        let secret = self.root.path().join("secret");
        let dir = self.dir();
        let words = [
            "serve",
            "--dir",
            dir.to_str().unwrap(),
            "--listen",
            "127.0.0.1:0",
            "--secret-file",
            secret.to_str().unwrap(),
        ];
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    pub fn start(&self, command: &mut Command) -> Running {
        let _ = std::fs::remove_file(self.dir().join("address"));
        let child =
            command.stdout(Stdio::null()).stderr(std::fs::File::create(self.root.path().join("log")).unwrap()).spawn();
        let mut running = Running { child: child.unwrap(), address: String::new() };
        let begun = Instant::now();
        while running.address.is_empty() {
            if let Ok(Some(status)) = running.child.try_wait() {
                panic!("ended at once with {status}: {}", self.log());
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "did not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
            running.address = std::fs::read_to_string(self.dir().join("address")).unwrap_or_default().trim().to_owned();
        }
        running
    }

    pub fn serve(&self) -> Running {
        self.serve_with(&[])
    }

    /// Serves with these settings, each written NAME=VALUE.
    pub fn serve_with(&self, settings: &[&str]) -> Running {
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        self.start(Command::new(BINARY).args(self.serve_args()).args(settings))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.root.path().join("log")).unwrap_or_default()
    }
}

pub struct Running {
    pub child: Child,
    pub address: String,
}

impl Running {
    pub fn client(&self) -> NodeClient {
        self.client_as(Ends::default())
    }

    pub fn client_as(&self, ends: Ends) -> NodeClient {
        client_at(&self.address, ends, ClientLimits::default())
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap()
            .success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "did not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A client of whatever listens there.
pub fn client_at(address: &str, ends: Ends, limits: ClientLimits) -> NodeClient {
    let credentials = Credentials { cluster: CLUSTER, secret: ClusterSecret::from_hex(SECRET).unwrap() };
    NodeClient::new(address.to_owned(), ends, credentials, limits)
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn chunk(number: u8) -> ChunkId {
    ChunkId { group: PlacementGroupId(1), extent: ExtentId([number; 16]), index: 2, generation: 1 }
}

pub fn payload(number: u8, len: usize) -> Bytes {
    (0..len)
        .map(|at| (at as u32).wrapping_mul(2_654_435_761).wrapping_add(u32::from(number)).to_be_bytes()[0])
        .collect()
}

pub async fn put(client: &NodeClient, number: u8, len: usize) -> Result<(), ChunkError> {
    client.put_chunk(chunk(number), spec(len as u64), vec![payload(number, len)]).await
}

pub async fn get(client: &NodeClient, number: u8) -> Result<Bytes, ChunkError> {
    Ok(client.read_blocks(chunk(number), 0, 64).await?.data.concat().into())
}

pub async fn ask(client: &NodeClient, request: ControlRequest) -> ControlResponse {
    client.control(request, Duration::from_secs(10)).await.unwrap()
}

pub async fn delete(client: &NodeClient, numbers: &[u8], lease: Option<LeaseStamp>) -> ControlResponse {
    let chunks = numbers.iter().map(|number| chunk(*number)).collect();
    ask(client, ControlRequest::DeleteChunks { chunks, lease }).await
}
