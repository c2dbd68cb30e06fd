//! A disk that nobody serves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use granary_placement::id::ClusterId;
use granary_placement::map::{Disk, Location, Roles};
use granary_wire::ClusterSecret;

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
