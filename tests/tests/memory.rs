//! Clients that stop half way, by the thousand: the gateway's memory stays within its bound, and others are served.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use granary_s3_client::Client;
use granary_tests::cluster::{memory_bytes, Cluster, Options};
use granary_tests::seed::Random;
use http::{Method, StatusCode};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const BUCKET: &str = "memory";
const CLIENTS: usize = 1000;
/// Longest object whose chunks are sent whole: all of it, and its coding, is in memory at once.
const WHOLE_BYTES: usize = 4 << 20;
/// Most memory of the process that runs the gateway.
const BOUND_BYTES: u64 = 512 << 20;
/// Buffers of the clients' sockets: what lies in the kernel is not what is measured.
const SOCKET_BYTES: u32 = 32 * 1024;

async fn connect(address: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(SOCKET_BYTES).unwrap();
    socket.set_recv_buffer_size(SOCKET_BYTES).unwrap();
    socket.connect(address.parse().unwrap()).await.unwrap()
}

/// Sends a request and its body without the last byte, as far as the gateway takes it; then nothing, until it is
/// closed.
async fn stop_sending(client: Client, key: String, body: Bytes) {
    let uri = client.presign(&Method::PUT, &format!("/{BUCKET}/{key}"), Duration::from_secs(3600)).unwrap();
    let mut stream = connect(client.address()).await;
    let head = format!("PUT {uri} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n", client.address(), body.len());
    let sent = async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body[..body.len() - 1]).await
    };
    if sent.await.is_ok() {
        let mut rest = Vec::new();
        // An answer in place of the missing byte is a refusal; which one does not matter here.
        let _ended = stream.read_to_end(&mut rest).await;
    }
}

/// Asks for an object and reads nothing but the beginning of its answer.
async fn stop_reading(client: Client, key: &'static str) {
    let uri = client.presign(&Method::GET, &format!("/{BUCKET}/{key}"), Duration::from_secs(3600)).unwrap();
    let mut stream = connect(client.address()).await;
    let head = format!("GET {uri} HTTP/1.1\r\nhost: {}\r\n\r\n", client.address());
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut first = [0u8; 1024];
    let _read = stream.read(&mut first).await;
    std::future::pending::<()>().await;
}

/// A request that may be refused for lack of memory, as every S3 client tries it again.
async fn served<F, W>(what: &str, request: F)
where
    F: Fn() -> W,
    W: std::future::Future<Output = StatusCode>,
{
    let began = Instant::now();
    loop {
        match request().await {
            StatusCode::OK => return,
            StatusCode::SERVICE_UNAVAILABLE if began.elapsed() < Duration::from_secs(50) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            other => panic!("{what}: {other} after {:?}", began.elapsed()),
        }
    }
}

#[test]
fn a_thousand_clients_that_stop_half_way_take_bounded_memory_and_a_fast_one_is_served() {
    let cluster = Cluster::start(Options::default());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let client = cluster.client();
        assert_eq!(client.make_bucket(BUCKET).await.unwrap().status, StatusCode::OK);
        let big: Bytes = Random::new(5).bytes(32 << 20).into();
        assert_eq!(client.put(BUCKET, "big", big.clone()).await.unwrap().status, StatusCode::OK);
        let small = big.slice(..WHOLE_BYTES);
        let mut stopped = Vec::new();
        for number in 0..CLIENTS {
            stopped.push(match number % 4 {
                // One byte before the end of an extent that is sent whole, and before a full stripe of a long one.
                0 => tokio::spawn(stop_sending(client.clone(), format!("stopped {number}"), small.clone())),
                1 => tokio::spawn(stop_sending(
                    client.clone(),
                    format!("stopped {number}"),
                    big.slice(..WHOLE_BYTES * 2),
                )),
                _ => tokio::spawn(stop_reading(client.clone(), "big")),
            });
        }
        let mut slowest = Duration::ZERO;
        for round in 0..8 {
            let began = Instant::now();
            let key = format!("fast {round}");
            let body = big.slice(round..round + (12 << 20));
            served("PUT", || async { client.put(BUCKET, &key, body.clone()).await.unwrap().status }).await;
            served("GET", || async {
                let answer = client.get(BUCKET, &key).await.unwrap();
                assert!(answer.status != StatusCode::OK || answer.body == body, "wrong bytes");
                answer.status
            })
            .await;
            slowest = slowest.max(began.elapsed());
            let now = memory_bytes(cluster.pid(), false);
            assert!(now < BOUND_BYTES, "round {round}: the gateway takes {} MiB", now >> 20);
        }
        let peak = memory_bytes(cluster.pid(), true);
        println!("    peak memory {} MiB, slowest round {slowest:?}", peak >> 20);
        assert!(peak > 0 && peak < BOUND_BYTES, "the gateway took {} MiB", peak >> 20);
        stopped.iter().for_each(tokio::task::JoinHandle::abort);
    });
}
