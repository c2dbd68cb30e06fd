//! Connections to the real binary: how gateways share its places, and what somebody between the ends can say in its
//! name.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scenery;

use futures::future::join_all;
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::{AuthError, LinkError};
use granary_wire::{ChunkError, ClientLimits, Ends, GatewayId, NodeClient};
use scenery::{ask, chunk, client_at, get, payload, spec, Disk, Running};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

const DEADLINE: Duration = Duration::from_secs(60);

async fn in_time<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(DEADLINE, what).await.expect("in time")
}

/// A gateway with patience.
fn gateway(node: &Running) -> NodeClient {
    let limits = ClientLimits { pool_wait: DEADLINE, answer_timeout: DEADLINE, ..ClientLimits::default() };
    client_at(&node.address, Ends { gateway: GatewayId::random(), ..Ends::default() }, limits)
}

/// What the node tells each of them of its share, asked as gateways ask every second.
async fn shares(clients: &[NodeClient]) -> Vec<u32> {
    let answers = join_all(clients.iter().map(|client| ask(client, ControlRequest::Status))).await;
    let share = |answer| match answer {
        ControlResponse::Status(status) => status.data_connections,
        other => panic!("{other:?}"),
    };
    answers.into_iter().map(share).collect()
}

/// Has each gateway store twice as many chunks as it has places, and read as many: no upload ends before all places are
/// taken by others, and nobody reads before that. All are served.
async fn load(gateways: &[NodeClient], share: usize) {
    let (begun, go) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let uploads: Vec<_> = (0..gateways.len() * share * 2)
        .map(|number| {
            let (client, begun, go) = (gateways[number % gateways.len()].clone(), begun.clone(), go.clone());
            let number = u8::try_from(number).unwrap();
            tokio::spawn(async move {
                let mut writer = client.begin_chunk(chunk(number), spec(70_000)).await?;
                begun.add_permits(1);
                drop(go.acquire().await.unwrap());
                writer.write(payload(number, 70_000)).await?;
                writer.finish().await
            })
        })
        .collect();
    let all = u32::try_from(gateways.len() * share).unwrap();
    in_time(begun.acquire_many(all)).await.unwrap().forget();
    let reads: Vec<_> = (gateways.iter().flat_map(|client| std::iter::repeat_n(client, share)))
        .map(|client| {
            let client = client.clone();
            tokio::spawn(async move { get(&client, 255).await })
        })
        .collect();
    // Time to be told that the node is busy, were somebody to knock at it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    go.add_permits(1);
    for upload in uploads {
        assert_eq!(in_time(upload).await.unwrap(), Ok(()));
    }
    for read in reads {
        assert_eq!(in_time(read).await.unwrap(), Err(ChunkError::NotFound));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_gateways_under_load_are_all_served_and_a_fourth_makes_their_shares_smaller() {
    let disk = Disk::new();
    let node = disk.serve_with(&["node.max_connections=54"]);
    let mut gateways: Vec<_> = (0..3).map(|_| gateway(&node)).collect();
    shares(&gateways).await;
    assert_eq!(shares(&gateways).await, [16; 3]);
    load(&gateways, 16).await;
    assert!(!disk.log().contains("all places are taken"), "somebody was told that it is busy: {}", disk.log());

    gateways.push(gateway(&node));
    shares(&gateways).await;
    assert_eq!(shares(&gateways).await, [12; 4]);
    load(&gateways, 12).await;
    for number in 0..96 {
        assert_eq!(get(&gateways[3], number).await.unwrap(), payload(number, 70_000), "chunk {number}");
    }
    // Who is no gateway is told nothing, and takes nothing from their shares.
    let other = node.client();
    assert_eq!(shares(std::slice::from_ref(&other)).await, [0]);
    assert_eq!(shares(&gateways).await, [12; 4]);
    // Those that stay share what the others leave.
    gateways.truncate(2);
    in_time(async {
        while shares(&gateways).await != [24; 2] {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// The lengths of what is said in a handshake; see docs/formats/wire.md.
const CLIENT_HELLO_BYTES: u64 = 108;
const SERVER_HELLO_BYTES: u64 = 76;
/// Verdicts, by their numbers.
const ACCEPTED: u8 = 0;
const SECRET: u8 = 3;
const BUSY: u8 = 4;
const DISK: u8 = 5;

/// What somebody between the ends makes of a connection.
#[derive(Debug, Clone, Copy)]
enum Alter {
    Nothing,
    /// The verdict after the proof gets this number.
    Verdict(u8),
    /// A bit of the client's proof is flipped.
    Proof,
}

/// Passes on what comes; the byte after the first `at` is altered.
async fn pass(
    from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    at: u64,
    alter: impl FnOnce(u8) -> u8 + Send,
) -> io::Result<()> {
    let mut begin = from.take(at);
    tokio::io::copy(&mut begin, &mut to).await?;
    let mut from = begin.into_inner();
    let byte = from.read_u8().await?;
    to.write_u8(alter(byte)).await?;
    tokio::io::copy(&mut from, &mut to).await?;
    to.shutdown().await
}

/// Stands before a node, and answers at the address that is given back.
async fn between(node: &Running, alter: Alter) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let node = node.address.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (from_client, to_client) = client.into_split();
            let (from_node, to_node) = TcpStream::connect(&node).await.unwrap().into_split();
            let proof = move |byte| if let Alter::Proof = alter { byte ^ 1 } else { byte };
            let verdict = move |byte| if let Alter::Verdict(number) = alter { number } else { byte };
            tokio::spawn(pass(from_client, to_node, CLIENT_HELLO_BYTES, proof));
            tokio::spawn(pass(from_node, to_client, SERVER_HELLO_BYTES, verdict));
        }
    });
    address
}

/// What comes of a control request and of a chunk request through somebody between the ends. The chunk does not exist.
async fn heard_through(node: &Running, alter: Alter) -> [Result<(), LinkError>; 2] {
    let client = client_at(&between(node, alter).await, Ends::default(), ClientLimits::default());
    let control = in_time(client.control(ControlRequest::Status, DEADLINE)).await.map(|_| ());
    let read = match in_time(get(&client, 255)).await {
        Err(ChunkError::NotFound) => Ok(()),
        Err(ChunkError::Link(error)) => Err(error),
        other => panic!("{other:?}"),
    };
    [control, read]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_that_somebody_between_the_ends_gives_is_not_believed() {
    let (disk, full_disk) = (Disk::new(), Disk::new());
    let node = disk.serve();
    let altered = LinkError::Auth(AuthError::Message);
    assert_eq!(heard_through(&node, Alter::Nothing).await, [Ok(()), Ok(())]);
    for verdict in [SECRET, BUSY, DISK] {
        let heard = heard_through(&node, Alter::Verdict(verdict)).await;
        assert_eq!(heard, [Err(altered.clone()), Err(altered.clone())], "verdict {verdict}");
    }
    // This one the node itself gives, with its code: the proof that it saw was wrong. The client's secret is right.
    assert_eq!(heard_through(&node, Alter::Proof).await, [Err(altered.clone()), Err(altered.clone())]);
    let words = AuthError::Secret.to_string();
    // Its line may come after the client has heard of it, and one a second is all that strangers can provoke.
    let mut asks = 0;
    while !disk.log().contains(&words) {
        assert!(asks < 20, "the node did not say so: {}", disk.log());
        asks += 1;
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert!(heard_through(&node, Alter::Proof).await[0].is_err());
    }

    let full = full_disk.serve_with(&["node.max_connections=1", "node.max_control_connections=1"]);
    let holder = full.client();
    let _writer = holder.begin_chunk(chunk(1), spec(1000)).await.unwrap();
    ask(&holder, ControlRequest::Status).await;
    let busy = LinkError::Busy;
    assert_eq!(heard_through(&full, Alter::Nothing).await, [Err(busy.clone()), Err(busy)], "from the node itself");
    let heard = heard_through(&full, Alter::Verdict(ACCEPTED)).await;
    assert_eq!(heard, [Err(altered.clone()), Err(altered)], "busy is made into accepted");
}
