//! A disk that nobody serves, and one that has no place.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::health::BUSY_FOR;
use super::*;
use futures::future::BoxFuture;
use futures::FutureExt;
use granary_placement::id::ClusterId;
use granary_placement::lease::LeaseStamp;
use granary_placement::map::{Disk, Location, Roles};
use granary_wire::chunk::{ChunkId, ChunkSpec};
use granary_wire::server::{serve, Asker, ChunkBlocks, ChunkSink, NodeService, ServerLimits};
use granary_wire::ClusterSecret;
use tokio::net::TcpListener;

pub(super) fn status() -> NodeStatus {
    NodeStatus {
        disk: None,
        uuid: DiskUuid([1; 16]),
        epoch: Epoch(1),
        capacity_bytes: 1,
        free_bytes: 1,
        chunks: 0,
        chunk_bytes: 0,
        feature_level: 1,
        data_connections: 0,
    }
}

/// A disk node that answers how it stands, and has no chunks.
struct Node;

impl NodeService for Node {
    fn control(&self, _: Asker, _: ControlRequest) -> BoxFuture<'_, ControlResponse> {
        async { ControlResponse::Status(status()) }.boxed()
    }

    fn begin_chunk(
        &self,
        _: ChunkId,
        _: ChunkSpec,
        _: Option<LeaseStamp>,
    ) -> BoxFuture<'_, Result<Box<dyn ChunkSink>, ChunkError>> {
        async { Err(ChunkError::DiskFull) }.boxed()
    }

    fn read_blocks(&self, _: ChunkId, _: u32, _: u32) -> BoxFuture<'_, Result<ChunkBlocks, ChunkError>> {
        async { Err(ChunkError::NotFound) }.boxed()
    }

    fn note_gateways(&self, _: usize) {}
}

fn map_with(address: String) -> ClusterMap {
    let disk = Disk {
        id: DiskId(1),
        uuid: DiskUuid([1; 16]),
        address,
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 1,
        roles: Roles { storage: true, metadata: true },
        state: DiskState::In,
    };
    ClusterMap {
        cluster_id: ClusterId([7; 16]),
        epoch: Epoch(1),
        next_disk_id: 2,
        disks: BTreeMap::from([(disk.id, disk)]),
        schemes: BTreeMap::new(),
        default_scheme: "4+2".into(),
        groups: BTreeMap::new(),
        shards: Vec::new(),
        slot_shards: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_dead_when_the_gateway_starts_counts_as_down_once() {
    // A port that was free a moment ago, where nobody listens.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let map = watch::Sender::new(Some(Arc::new(map_with(address))));
    let credentials = Credentials { cluster: ClusterId([7; 16]), secret: ClusterSecret::generate().unwrap() };
    let settings = DiskSettings { ping_interval: Duration::from_millis(50), ..DiskSettings::default() };
    let disks = Disks::new(map.subscribe(), credentials, None, settings);
    let pings_failed = || disks.counters().pings_failed.load(Ordering::Relaxed);
    let pinged = async {
        while pings_failed() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), pinged).await.expect("pinged three times");
    assert_eq!(disks.health(DiskId(1)), DiskHealth::Down);
    assert_eq!(disks.counters().downs.load(Ordering::Relaxed), 1);
}

/// No clock ticks here but the test's: nothing is pinged unless the test says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_pings_find_it_busy_counts_as_silent_after_a_minute_and_comes_back() {
    let credentials = Credentials { cluster: ClusterId([7; 16]), secret: ClusterSecret::generate().unwrap() };
    let start = |listener: TcpListener, places: usize| {
        let stop = CancellationToken::new();
        let limits = ServerLimits { max_control_connections: places, ..ServerLimits::default() };
        let who = (DiskUuid([1; 16]), credentials.clone());
        (tokio::spawn(serve(listener, Arc::new(Node), who, limits, stop.clone())), stop)
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (server, stop) = start(listener, 8);

    let time = Arc::new(Mutex::new(Instant::now()));
    let pass = |by: Duration| *time.lock().unwrap() += by;
    let clock = time.clone();
    let limits = ClientLimits { reconnect_min: Duration::ZERO, reconnect_max: Duration::ZERO, ..Default::default() };
    let hour = Duration::from_secs(3600);
    let settings = DiskSettings { ping_interval: hour, ping_deadline: hour, limits, ..DiskSettings::default() };
    let down_after = settings.down_after;
    let map = watch::Sender::new(Some(Arc::new(map_with(address.to_string()))));
    let clock: Clock = Box::new(move || *clock.lock().unwrap());
    let disks = Disks::with_clock(map.subscribe(), credentials.clone(), None, settings, clock);
    assert!(disks.wait_ready(Duration::from_secs(30)).await);
    assert_eq!(disks.health(DiskId(1)), DiskHealth::Up);

    // The node starts again, and somebody else has its only place before the gateway asks for it.
    stop.cancel();
    server.await.unwrap();
    let (_server, _stop) = start(TcpListener::bind(address).await.unwrap(), 1);
    let holder = NodeClient::new(address.to_string(), Ends::default(), credentials, ClientLimits::default());
    holder.control(ControlRequest::Status, hour).await.unwrap();
    let moment = Duration::from_millis(1);
    for (passed, health) in [
        (Duration::ZERO, DiskHealth::Up),
        (BUSY_FOR - moment, DiskHealth::Up),
        (moment, DiskHealth::Suspect),
        (down_after - moment, DiskHealth::Suspect),
        (moment, DiskHealth::Down),
    ] {
        pass(passed);
        disks.inner.ping_round(false).await;
        let view = disks.view().remove(0);
        assert_eq!(view.health, health, "{passed:?} later: {:?}", view.last_error);
    }
    let asked = disks.client(DiskId(1)).unwrap().control(ControlRequest::Status, hour).await;
    assert_eq!(asked, Err(LinkError::Busy), "all that it ever said");
    assert_eq!(disks.counters().downs.load(Ordering::Relaxed), 1);

    drop(holder);
    let comes_back = async {
        while disks.health(DiskId(1)) != DiskHealth::Up {
            disks.inner.ping_round(false).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), comes_back).await.expect("it has a place again");
}
