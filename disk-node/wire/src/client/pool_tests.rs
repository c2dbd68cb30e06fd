//! How many connections a client keeps, and who waits for one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::pool::Pool;
use super::*;
use crate::auth::GatewayId;
use crate::server::ServerLimits;
use crate::test_support::{
    chunk_id, credentials, node_status, payload, reaches, spec, start_with, MemoryNode, Running, DEADLINE,
};
use futures::future::{join_all, try_join_all};
use std::future::Future;
use std::sync::atomic::Ordering;

async fn in_time<F: Future>(what: F) -> F::Output {
    timeout(DEADLINE, what).await.expect("in time")
}

/// A node with so many places that answers Status.
async fn node_with(places: usize) -> Running {
    let node = Arc::new(MemoryNode::default());
    *node.status.lock().unwrap() = Some(node_status());
    let limits = ServerLimits { max_connections: places, ..ServerLimits::default() };
    start_with(node, limits, "127.0.0.1:0").await
}

/// A client in a gateway of its own.
fn gateway(server: &Running, limits: ClientLimits) -> NodeClient {
    let ends = Ends { gateway: GatewayId::random(), ..Ends::default() };
    NodeClient::new(server.address.to_string(), ends, credentials(), limits)
}

fn patient() -> ClientLimits {
    ClientLimits { pool_wait: DEADLINE, ..ClientLimits::default() }
}

/// Asks for the status, as gateways do every second.
async fn ping(client: &NodeClient) {
    let answer = client.control(ControlRequest::Status, DEADLINE).await;
    assert!(matches!(answer, Ok(ControlResponse::Status(_))), "{answer:?}");
}

/// Idle connections, and how many there may be in all.
fn pool_of(client: &NodeClient) -> (usize, usize) {
    client.shared.pool.idle_and_allowed()
}

async fn until(condition: impl Fn() -> bool) {
    in_time(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_gateways_under_load_share_a_nodes_places_and_all_are_served() {
    let server = node_with(24).await;
    let clients: Vec<NodeClient> = (0..3).map(|_| gateway(&server, patient())).collect();
    for client in clients.iter().chain(&clients) {
        ping(client).await;
    }
    // No read is answered before as many are at work as there are places.
    server.node.crowd.store(24, Ordering::SeqCst);
    let load = clients.iter().map(|client| async {
        let reads = join_all((0..20).map(|_| client.read_blocks(chunk_id(99), 0, 1)));
        let writes = join_all((0..20).map(|number| client.put_chunk(chunk_id(number), spec(5), vec![payload(5)])));
        tokio::join!(reads, writes)
    });
    for (reads, writes) in in_time(join_all(load)).await {
        assert!(reads.iter().all(|read| *read == Err(ChunkError::NotFound)), "{reads:?}");
        assert!(writes.iter().all(Result::is_ok), "{writes:?}");
    }
    let pools: Vec<_> = clients.iter().map(pool_of).collect();
    assert_eq!(pools, [(8, 8); 3], "nobody's connection had to make room");
    assert_eq!(server.node.crowd.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_share_closes_idle_connections_at_once_and_a_larger_one_opens_more() {
    // With two gateways an eighth is kept back: 12 for each.
    let server = node_with(27).await;
    let first = gateway(&server, patient());
    ping(&first).await;
    server.node.crowd.store(20, Ordering::SeqCst);
    in_time(join_all((0..20).map(|_| first.read_blocks(chunk_id(1), 0, 1)))).await;
    assert_eq!(pool_of(&first), (20, 27));

    let second = gateway(&server, patient());
    ping(&second).await;
    ping(&first).await;
    assert_eq!(pool_of(&first), (12, 12));
    drop(second);
    reaches(&server.node.gateways, 1).await;
    ping(&first).await;
    assert_eq!(pool_of(&first), (12, 27));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_under_way_outlast_a_smaller_share_and_their_connections_do_not() {
    // With two gateways an eighth is kept back: 12 for each.
    let server = node_with(27).await;
    let limits = ClientLimits { pool_wait: Duration::from_millis(200), max_in_use: 20, ..patient() };
    let first = gateway(&server, limits);
    let begin = |count: u32| try_join_all((0..count).map(|number| first.begin_chunk(chunk_id(number), spec(5))));
    let writers = begin(20).await.unwrap();
    let second = gateway(&server, patient());
    ping(&second).await;
    ping(&first).await;
    assert_eq!(first.read_blocks(chunk_id(1), 0, 1).await, Err(ChunkError::Overloaded), "20 of 12 are under way");
    for mut writer in writers {
        writer.write(payload(5)).await.unwrap();
        in_time(writer.finish()).await.unwrap();
    }
    assert_eq!(pool_of(&first), (12, 12));
    let _writers = begin(12).await.unwrap();
    assert_eq!(first.read_blocks(chunk_id(1), 0, 1).await, Err(ChunkError::Overloaded), "12 of 12 are");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_comes_back_wakes_the_write_that_waits_for_a_place() {
    let server = node_with(1).await;
    let hour = Duration::from_secs(3600);
    let limits = ClientLimits { pool_wait: hour, ..ClientLimits::default() };
    let target = Target {
        address: server.address.to_string().into(),
        ends: Ends::default(),
        credentials: credentials(),
        limits: Arc::new(limits),
    };
    // The node is not asked again while the test runs.
    let pool = Arc::new(Pool::with_pause(target, || Duration::from_secs(3600)));
    let mut writer = chunk::begin(&pool, chunk_id(1), spec(5), None, false).await.unwrap();
    let waiting = {
        let pool = Arc::clone(&pool);
        tokio::spawn(async move { chunk::put(&pool, chunk_id(2), spec(5), None, vec![payload(5)]).await })
    };
    until(|| pool.knocks()).await;
    writer.write(payload(5)).await.unwrap();
    writer.finish().await.unwrap();
    in_time(waiting).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_waits_for_a_place_at_the_node_and_holds_up_no_read_meanwhile() {
    let server = node_with(1).await;
    let other = gateway(&server, patient());
    let holder = other.begin_chunk(chunk_id(1), spec(5)).await.unwrap();
    reaches(&server.node.begun, 1).await;
    let client = gateway(&server, ClientLimits { max_in_use: 1, ..patient() });
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { client.put_chunk(chunk_id(2), spec(5), vec![payload(5)]).await })
    };
    until(|| client.shared.pool.knocks()).await;
    let read = in_time(client.read_blocks(chunk_id(2), 0, 1)).await;
    assert_eq!(read, Err(ChunkError::Link(LinkError::Busy)), "asked elsewhere at once");
    assert!(!waiting.is_finished());
    drop(holder);
    assert_eq!(in_time(waiting).await.unwrap(), Ok(()));
}
