//! What somebody on the network can try, with raw sockets.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::auth::{client_handshake, Ends, Session};
use crate::client::{ClientLimits, NodeClient};
use crate::control::{ControlError, Reach};
use crate::error::AuthError;
use crate::frame::{decode, encode, Frame, FrameReader, FrameWriter, Kind};
use crate::head;
use crate::test_support::{chunk_id, credentials, map, payload, reaches, spec, start, start_with, Running, DEADLINE};
use granary_placement::id::ShardId;
use granary_placement::map::{diff, ClusterMap};
use std::future::Future;
use std::sync::atomic::Ordering;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn enter(server: &Running, purpose: Purpose) -> (TcpStream, Session) {
    enter_as(server, purpose, Ends::default()).await
}

async fn enter_as(server: &Running, purpose: Purpose, ends: Ends) -> (TcpStream, Session) {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let session =
        client_handshake(&mut stream, &credentials(), (purpose, ends), PROTOCOL_VERSIONS, nonce().unwrap()).await;
    (stream, session.unwrap())
}

/// A control connection of a client that speaks these versions.
async fn enter_with(server: &Running, versions: VersionRange) -> Result<(TcpStream, Session), LinkError> {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let purpose = (Purpose::Control, Ends::default());
    let session = client_handshake(&mut stream, &credentials(), purpose, versions, nonce().unwrap()).await?;
    Ok((stream, session))
}

/// The head of a request with the code that belongs to it.
fn signed(session: &Session, counter: u64, method: &str, target: &str, content_len: Option<u64>) -> String {
    let mac = head::request_mac(&session.to_server, counter, method, target, content_len, None);
    let length = content_len.map(|len| format!("content-length: {len}\r\n")).unwrap_or_default();
    format!("{method} {target} HTTP/1.1\r\nhost: granary\r\n{length}x-granary-mac: {}\r\n\r\n", hex::encode(mac))
}

async fn within<F: Future>(what: F) -> F::Output {
    timeout(DEADLINE, what).await.expect("in time")
}

/// Everything until the server closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset is an end too.
    let _ = within(stream.read_to_end(&mut bytes)).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One answer without a body.
async fn one_answer(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(within(stream.read_u8()).await.unwrap());
    }
    String::from_utf8(bytes).unwrap()
}

fn get(number: u32) -> String {
    format!("/v1/chunks/{}?first=0&blocks=1", chunk_id(number))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_altered_request_is_refused_and_the_connection_closed() {
    let server = start().await;
    let good = |session: &Session| signed(session, 0, "GET", &get(1), None);
    let (mut stream, session) = enter(&server, Purpose::Data).await;
    stream.write_all(good(&session).as_bytes()).await.unwrap();
    assert!(one_answer(&mut stream).await.starts_with("HTTP/1.1 404"), "the request itself is in order");

    type Alter = fn(String) -> String;
    let alterations: [(&str, Alter); 7] = [
        ("method", |text| text.replace("GET", "PUT")),
        ("path", |text| text.replace("/v1/chunks/00000001", "/v1/chunks/00000002")),
        ("query", |text| text.replace("blocks=1", "blocks=2")),
        ("no code", |text| text.replace("x-granary-mac", "x-granary-mad")),
        ("two codes", |text| {
            let line = text.lines().find(|line| line.starts_with("x-granary-mac")).unwrap().to_owned();
            text.replace(&line, &format!("{line}\r\n{line}"))
        }),
        ("a body", |text| text.replace("host: granary", "host: granary\r\ncontent-length: 1") + "x"),
        ("a body in chunks", |text| {
            text.replace("host: granary", "host: granary\r\ntransfer-encoding: chunked") + "0\r\n\r\n"
        }),
    ];
    for (what, alter) in alterations {
        let (mut stream, session) = enter(&server, Purpose::Data).await;
        stream.write_all(alter(good(&session)).as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 401"), "{what}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_the_release_before_is_told_nothing_that_it_cannot_read_and_is_refused_when_all_is_new() {
    let older = VersionRange { min: 2, max: 2 };
    let server = start().await;
    let (stream, session) = enter_with(&server, older).await.unwrap();
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) =
        (FrameReader::new(read, session.to_client), FrameWriter::new(write, session.to_server));
    let mut ask = async |request: &ControlRequest| -> Option<ControlResponse> {
        let frame = Frame { id: 1, kind: Kind::Request, body: encode(request).unwrap() };
        writer.write(&frame, DEADLINE).await.ok()?;
        writer.flush(DEADLINE).await.ok()?;
        let answer = reader.next(DEADLINE).await.ok()??;
        Some(decode::<ControlResponse>(&answer.body).unwrap())
    };
    let refused = |answer: &Option<ControlResponse>| matches!(answer, Some(ControlResponse::Error(ControlError::BadRequest(why))) if why.contains("version 2"));
    let offers = |answer: ControlResponse| *server.node.answer.lock().unwrap() = Some(answer);
    let (plain, away) = (map(false), map(true));
    let diffs = |from: &ClusterMap, to: &ClusterMap| ControlResponse::MapDiffs(vec![diff(from, to)]);
    for (answer, readable) in [
        (ControlResponse::Map(Some(Box::new(plain.clone()))), true),
        (ControlResponse::Map(Some(Box::new(away.clone()))), false),
        (diffs(&plain, &away), false),
        (diffs(&away, &plain), true),
        (ControlResponse::Reached(vec![Reach::Reached]), false),
    ] {
        offers(answer.clone());
        let told = ask(&ControlRequest::GetMap).await;
        assert!(if readable { told == Some(answer) } else { refused(&told) }, "{told:?}");
    }
    // While a shard is asked it comes about that there is what this client cannot read: it may be in the answer.
    let shard = ControlRequest::Shard { shard: ShardId(0), request: Bytes::new() };
    assert_eq!(ask(&shard).await, Some(ControlResponse::Shard(Bytes::from_static(b"answer"))));
    server.node.oldest_next.store(3, Ordering::SeqCst);
    assert!(refused(&ask(&shard).await));
    assert_eq!(ask(&ControlRequest::Status).await, None, "its connection ends");
    let error = AuthError::Version { ours: older, theirs: VersionRange { min: 3, max: PROTOCOL_VERSIONS.max } };
    assert_eq!(enter_with(&server, older).await.err(), Some(LinkError::Auth(error)));
    enter_with(&server, PROTOCOL_VERSIONS).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_good_once_on_one_connection() {
    let server = start().await;
    let (mut stream, session) = enter(&server, Purpose::Data).await;
    let request = signed(&session, 0, "GET", &get(1), None);
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(one_answer(&mut stream).await.starts_with("HTTP/1.1 404"));
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(rest(&mut stream).await.starts_with("HTTP/1.1 401"), "replayed on its own connection");

    let (mut other, _) = enter(&server, Purpose::Data).await;
    other.write_all(request.as_bytes()).await.unwrap();
    assert!(rest(&mut other).await.starts_with("HTTP/1.1 401"), "replayed on another connection");

    let (mut stream, session) = enter(&server, Purpose::Data).await;
    let (first, second) = (signed(&session, 0, "GET", &get(1), None), signed(&session, 1, "GET", &get(2), None));
    stream.write_all(format!("{second}{first}").as_bytes()).await.unwrap();
    assert!(rest(&mut stream).await.starts_with("HTTP/1.1 401"), "put in another order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_conversation_cannot_be_played_again() {
    let server = start().await;
    // A client writes a chunk through somebody who listens.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, target) = (listener.local_addr().unwrap(), server.address);
    let recording = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&recording);
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = TcpStream::connect(target).await.unwrap().into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
            record.lock().unwrap().extend_from_slice(&buffer[..read]);
            to_server.write_all(&buffer[..read]).await.unwrap();
        }
    });
    let client = NodeClient::new(address.to_string(), Ends::default(), credentials(), ClientLimits::default());
    client.put_chunk(chunk_id(1), spec(1000), vec![payload(1000)]).await.unwrap();
    server.node.chunks.lock().unwrap().clear();

    let recording = recording.lock().unwrap().clone();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&recording).await.unwrap();
    let mut answer = Vec::new();
    let _ = within(stream.read_to_end(&mut answer)).await;
    assert!(!String::from_utf8_lossy(&answer).contains("200"));
    assert!(server.node.chunks.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_not_the_announced_chunk_stores_nothing() {
    let server = start().await;
    let id = chunk_id(1);
    let target = format!("{}{id}?{}", head::CHUNKS_PATH, head::spec_query(&spec(1000)));
    for (what, len) in [("too short", 1003), ("too long", 1005), ("the payload alone", 1000)] {
        let (mut stream, session) = enter(&server, Purpose::Data).await;
        stream.write_all(signed(&session, 0, "PUT", &target, Some(len)).as_bytes()).await.unwrap();
        stream.write_all(&vec![0; len as usize]).await.unwrap();
        let answer = one_answer(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("rejected"), "{what}: {answer}");
    }
    let (mut stream, session) = enter(&server, Purpose::Data).await;
    stream.write_all(signed(&session, 0, "PUT", &target, Some(1004)).as_bytes()).await.unwrap();
    stream.write_all(&[0; 1004]).await.unwrap();
    assert!(one_answer(&mut stream).await.starts_with("HTTP/1.1 422"), "wrong checksums");

    let (mut stream, session) = enter(&server, Purpose::Data).await;
    stream.write_all(signed(&session, 0, "PUT", &target, Some(1004)).as_bytes()).await.unwrap();
    stream.write_all(&[0; 600]).await.unwrap();
    stream.shutdown().await.unwrap();
    let _ = rest(&mut stream).await;
    assert!(server.node.chunks.lock().unwrap().is_empty());
    reaches(&server.node.aborted, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_good_for_its_purpose_only() {
    let server = start().await;
    let (mut stream, session) = enter(&server, Purpose::Control).await;
    stream.write_all(signed(&session, 0, "GET", &get(1), None).as_bytes()).await.unwrap();
    assert_eq!(rest(&mut stream).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_peers_are_let_go() {
    let quick = Duration::from_millis(150);
    let limits = ServerLimits {
        handshake_timeout: quick,
        head_timeout: quick,
        stall_timeout: quick,
        control_idle_timeout: quick,
        ..ServerLimits::default()
    };
    let server = start_with(Arc::default(), limits, "127.0.0.1:0").await;

    let mut silent = TcpStream::connect(server.address).await.unwrap();
    assert_eq!(rest(&mut silent).await, "", "before the handshake");
    let (mut stream, _) = enter(&server, Purpose::Data).await;
    stream.write_all(b"GET /v1/chunks/").await.unwrap();
    assert!(!rest(&mut stream).await.contains("200"), "in a head");
    let (mut stream, _) = enter(&server, Purpose::Control).await;
    assert_eq!(rest(&mut stream).await, "", "on a control connection");

    let target = format!("{}{}?{}", head::CHUNKS_PATH, chunk_id(1), head::spec_query(&spec(1000)));
    let (mut stream, session) = enter(&server, Purpose::Data).await;
    stream.write_all(signed(&session, 0, "PUT", &target, Some(1004)).as_bytes()).await.unwrap();
    stream.write_all(&[0; 100]).await.unwrap();
    assert!(rest(&mut stream).await.starts_with("HTTP/1.1 400"), "in a body");
    reaches(&server.node.aborted, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_read_its_answer_is_let_go() {
    let limits = ServerLimits { stall_timeout: Duration::from_millis(150), ..ServerLimits::default() };
    let server = start_with(Arc::default(), limits, "127.0.0.1:0").await;
    let len = 4 << 20;
    let data = payload(len);
    server.node.chunks.lock().unwrap().insert(chunk_id(1), (spec(len), data.to_vec()));
    // The gateway counts for as long as its only connection is served.
    let ends = Ends { gateway: GatewayId::random(), ..Ends::default() };
    let (mut stream, session) = enter_as(&server, Purpose::Data, ends).await;
    reaches(&server.node.gateways, 1).await;
    let target = format!("/v1/chunks/{}?first=0&blocks=64", chunk_id(1));
    // More than the kernel buffers of both ends can hold.
    let requests: String = (0..8).map(|counter| signed(&session, counter, "GET", &target, None)).collect();
    stream.write_all(requests.as_bytes()).await.unwrap();
    reaches(&server.node.gateways, 0).await;
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    assert!(bytes.len() < 8 * len as usize, "{}", bytes.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_and_handshakes_are_bounded() {
    let limits = ServerLimits {
        max_handshakes: 4,
        max_connections: 2,
        max_control_connections: 8,
        // Idle connections end for others only.
        head_timeout: Duration::from_secs(3600),
        ..ServerLimits::default()
    };
    let server = start_with(Arc::default(), limits, "127.0.0.1:0").await;
    // Sockets that say nothing keep nobody out: once they have been silent for a while, the oldest goes.
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    served(&server).await;
    // Whoever is sent away in the middle of a slow handshake does not take the node for dead either.
    let (mut busy, mut told) = (Vec::new(), Vec::new());
    refuse_busy(&mut busy).await;
    within(silent.remove(0).read_to_end(&mut told)).await.unwrap();
    assert_eq!(told, busy, "the one that made room");
    let quiet = |stream: &TcpStream| stream.try_read(&mut [0; 1]).is_err();
    assert!(silent.iter().all(quiet), "the others are still there");
    drop(silent);
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(served(&server).await);
    }
    // Full is not gone: whoever hears it does not take the disk for dead.
    let result = server.client().control(ControlRequest::Status, DEADLINE).await;
    assert_eq!(result, Err(LinkError::Busy));
    clients[0].control(ControlRequest::Status, DEADLINE).await.unwrap();
    // Chunk requests have places of their own, and a connection at work makes no room for another client.
    let writers =
        [clients[0].begin_chunk(chunk_id(1), spec(5)).await, clients[1].begin_chunk(chunk_id(1), spec(5)).await];
    let read = |place: usize| clients[place].read_blocks(chunk_id(3), 0, 1);
    assert_eq!(read(2).await, Err(ChunkError::Link(LinkError::Busy)), "both are at work");
    for mut writer in writers.into_iter().map(Result::unwrap) {
        writer.write(payload(5)).await.unwrap();
        writer.finish().await.unwrap();
    }
    // Between two requests it does, once it has been silent for a while.
    within(async {
        while read(2).await == Err(ChunkError::Link(LinkError::Busy)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(read(2).await, Err(ChunkError::NotFound));
}

/// A client that was given a place for its control connection; it asks until there is one.
async fn served(server: &Running) -> NodeClient {
    within(async {
        loop {
            let client = server.client();
            match client.control(ControlRequest::Status, DEADLINE).await {
                Err(LinkError::Busy) => tokio::time::sleep(Duration::from_millis(20)).await,
                answer => return answer.map(|_| client).unwrap(),
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_or_cluster_reaches_nothing() {
    let server = start().await;
    let strangers = [
        (Credentials { secret: crate::auth::ClusterSecret::generate().unwrap(), ..credentials() }, AuthError::Secret),
        (Credentials { cluster: granary_placement::id::ClusterId([8; 16]), ..credentials() }, AuthError::Cluster),
    ];
    for (stranger, error) in strangers {
        let client = NodeClient::new(server.address.to_string(), Ends::default(), stranger, ClientLimits::default());
        assert_eq!(client.control(ControlRequest::Status, DEADLINE).await, Err(LinkError::Auth(error.clone())));
        let put = client.put_chunk(chunk_id(1), spec(5), vec![payload(5)]).await;
        assert_eq!(put, Err(ChunkError::Link(LinkError::Auth(error.clone()))));
        let read = client.read_blocks(chunk_id(1), 0, 1).await;
        assert_eq!(read, Err(ChunkError::Link(LinkError::Auth(error))));
    }
    assert_eq!(server.node.controls.load(Ordering::SeqCst), 0);
    assert!(server.node.chunks.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_make_no_sense_are_answered_or_end_the_connection() {
    let server = start().await;
    let (stream, session) = enter(&server, Purpose::Control).await;
    let (read, write) = stream.into_split();
    let mut writer = FrameWriter::new(write, session.to_server);
    let mut reader = FrameReader::new(read, session.to_client);
    let status = encode(&ControlRequest::Status).unwrap();
    for (id, body) in [(1, Bytes::from_static(&[200])), (2, Bytes::from_static(&[0, 0])), (3, status)] {
        writer.write(&Frame { id, kind: Kind::Request, body }, DEADLINE).await.unwrap();
        writer.flush(DEADLINE).await.unwrap();
        let answer = within(reader.next(DEADLINE)).await.unwrap().unwrap();
        let response: ControlResponse = crate::frame::decode(&answer.body).unwrap();
        assert_eq!(answer.id, id);
        let refused = matches!(response, ControlResponse::Error(crate::control::ControlError::BadRequest(_)));
        assert_eq!(refused, id < 3, "{response:?}");
    }
    let body = Bytes::new();
    writer.write(&Frame { id: 4, kind: Kind::Response, body }, DEADLINE).await.unwrap();
    writer.flush(DEADLINE).await.unwrap();
    assert_eq!(within(reader.next(DEADLINE)).await, Ok(None));

    let (mut stream, _) = enter(&server, Purpose::Control).await;
    stream.write_all(&[0xff; 64]).await.unwrap();
    assert_eq!(rest(&mut stream).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_connection_says_so_and_goes_on() {
    let limits = ServerLimits { max_control_in_flight: 2, ..ServerLimits::default() };
    let server = start_with(Arc::default(), limits, "127.0.0.1:0").await;
    server.node.hang.store(true, Ordering::SeqCst);
    let client = server.client();
    let overloaded = ControlResponse::Error(crate::control::ControlError::Overloaded);
    let hanging: Vec<_> = (0..2)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.control(ControlRequest::Status, DEADLINE).await })
        })
        .collect();
    reaches(&server.node.controls, 2).await;
    for _ in 0..2 {
        assert_eq!(client.control(ControlRequest::Status, DEADLINE).await, Ok(overloaded.clone()));
    }
    assert!(hanging.iter().all(|call| !call.is_finished()), "the connection goes on");
    hanging.iter().for_each(tokio::task::JoinHandle::abort);
}
