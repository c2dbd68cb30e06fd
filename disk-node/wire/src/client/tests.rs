//! Servers that are silent, old, dead or lying.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::auth::{server_handshake, Caller, Ends, VersionRange, PROTOCOL_VERSIONS};
use crate::error::AuthError;
use crate::frame::{decode, encode, Frame, FrameReader, FrameWriter, Kind};
use crate::head;
use crate::test_support::{chunk_id, credentials, map, payload, spec, start, DEADLINE, ME};
use granary_placement::id::{DiskId, Epoch};
use granary_placement::map::{diff, MapDiff};
use http::StatusCode;
use std::future::Future;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const QUICK: Duration = Duration::from_millis(200);

fn quick() -> ClientLimits {
    ClientLimits {
        connect_timeout: QUICK,
        handshake_timeout: QUICK,
        answer_timeout: QUICK,
        stall_timeout: QUICK,
        pool_wait: QUICK,
        ping_every: QUICK / 4,
        silence_timeout: QUICK,
        ..ClientLimits::default()
    }
}

/// A client of a server that does this with each connection.
async fn against<F, R>(limits: ClientLimits, what: F) -> NodeClient
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(what(stream));
        }
    });
    NodeClient::new(address, Ends::default(), credentials(), limits)
}

/// The server's side of a handshake.
async fn meet(stream: &mut TcpStream) -> Result<Caller, LinkError> {
    let stays = CancellationToken::new();
    server_handshake(stream, &credentials(), ME, PROTOCOL_VERSIONS, [1; 32], stays, |_| true).await
}

async fn hang() {
    futures::future::pending().await
}

/// Asks all three ways.
async fn ask_all(client: &NodeClient) -> [LinkError; 3] {
    let link = |error| match error {
        ChunkError::Link(error) => error,
        error => panic!("{error:?}"),
    };
    let put = client.put_chunk(chunk_id(1), spec(5), vec![payload(5)]).await.unwrap_err();
    let read = client.read_blocks(chunk_id(1), 0, 1).await.unwrap_err();
    [client.control(ControlRequest::Status, DEADLINE).await.unwrap_err(), link(put), link(read)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_shakes_hands_fails_in_time() {
    let client = against(quick(), |_stream| hang()).await;
    let begin = Instant::now();
    for error in ask_all(&client).await {
        assert!(matches!(error, LinkError::Connect(_)), "{error:?}");
    }
    assert!(begin.elapsed() < DEADLINE / 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_version_is_named_as_such() {
    let client = against(quick(), |mut stream| async move {
        let _ = stream.write_all(b"granary\0\x00\x05\x01\x00").await;
        hang().await;
    })
    .await;
    for error in ask_all(&client).await {
        assert_eq!(
            error,
            LinkError::Auth(AuthError::Version { ours: PROTOCOL_VERSIONS, theirs: VersionRange { min: 5, max: 5 } })
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_the_release_before_is_not_sent_what_it_cannot_read() {
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let client = against(quick(), move |mut stream| {
        let told = told.clone();
        async move {
            let (stays, older) = (CancellationToken::new(), VersionRange { min: 2, max: 2 });
            let met = server_handshake(&mut stream, &credentials(), ME, older, [1; 32], stays, |_| true).await;
            let session = met.unwrap().session;
            let (read, write) = stream.into_split();
            let mut reader = FrameReader::new(read, session.to_server);
            let mut writer = FrameWriter::new(write, session.to_client);
            while let Ok(Some(frame)) = reader.next(DEADLINE).await {
                if frame.kind == Kind::Request {
                    told.send(decode::<ControlRequest>(&frame.body).unwrap()).unwrap();
                    let answer = Frame { kind: Kind::Response, body: encode(&ControlResponse::Done).unwrap(), ..frame };
                    writer.write(&answer, DEADLINE).await.unwrap();
                    writer.flush(DEADLINE).await.unwrap();
                }
            }
        }
    })
    .await;
    let to_away = diff(&map(false), &map(true));
    let from_away = MapDiff { to: Epoch(3), ..diff(&map(true), &map(false)) };
    // (what, can it be read)
    for (request, readable) in [
        (ControlRequest::Status, true),
        (ControlRequest::Reach(vec![DiskId(1)]), false),
        (ControlRequest::ListDamaged { after: None, limit: 1 }, false),
        (ControlRequest::OfferMap(Box::new(map(false))), true),
        (ControlRequest::OfferMap(Box::new(map(true))), false),
        (ControlRequest::OfferMapDiff(Box::new(to_away)), false),
        (ControlRequest::OfferMapDiff(Box::new(from_away)), true),
    ] {
        let answer = client.control(request.clone(), DEADLINE).await;
        if readable {
            assert_eq!((answer, heard.recv().await), (Ok(ControlResponse::Done), Some(request)));
        } else {
            let needs = VersionRange { min: request.since(), ..PROTOCOL_VERSIONS };
            let (ours, theirs) = (needs, VersionRange { min: 2, max: 2 });
            assert_eq!(answer, Err(LinkError::Auth(AuthError::Version { ours, theirs })), "{request:?}");
        }
    }
    assert!(heard.try_recv().is_err(), "nothing else was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_about_disks_before_any_proof_says_nothing_about_the_disk() {
    // 3: secret, 5: another disk is meant.
    for verdict in [3, 5] {
        let client = against(quick(), move |mut stream| async move {
            let hello = [b"granary\0\x00\x02".as_slice(), &[verdict, 0]].concat();
            let _ = stream.write_all(&hello).await;
            hang().await;
        })
        .await;
        for error in ask_all(&client).await {
            assert!(matches!(error, LinkError::Protocol(_)), "{error:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn something_else_that_listens_is_named_as_such() {
    let client = against(quick(), |mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        hang().await;
    })
    .await;
    for error in ask_all(&client).await {
        assert_eq!(error, LinkError::Auth(AuthError::Magic));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_falls_silent_fails_in_time() {
    let client = against(quick(), |mut stream| async move {
        let _ = meet(&mut stream).await;
        hang().await;
    })
    .await;
    let begin = Instant::now();
    let [control, put, read] = ask_all(&client).await;
    // The deadline of the control call is long: silence is noticed without it.
    assert!(matches!(control, LinkError::Closed(_)), "{control:?}");
    assert_eq!((put, read), (LinkError::Timeout, LinkError::Timeout));
    assert!(begin.elapsed() < DEADLINE / 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_the_right_code_is_not_believed() {
    // Success for everybody, said by somebody between the ends who has no keys; then by the server, but to another
    // request.
    for counter in [None, Some(1)] {
        let client = against(quick(), move |mut stream| async move {
            let Caller { session, .. } = meet(&mut stream).await.unwrap();
            let mac =
                counter.map_or([0; 32], |counter| head::answer_mac(&session.to_client, counter, StatusCode::OK, "", 0));
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-granary-mac: {}\r\n\r\n", hex::encode(mac));
            let mut byte = [0; 1];
            while !matches!(stream.read(&mut byte).await, Ok(1) if byte[0] == b'\n') {}
            let _ = stream.write_all(answer.as_bytes()).await;
            hang().await;
        })
        .await;
        let put = client.put_chunk(chunk_id(1), spec(5), vec![payload(5)]).await;
        assert_eq!(put, Err(ChunkError::Link(LinkError::Auth(AuthError::Message))));
        let read = client.read_blocks(chunk_id(1), 0, 1).await;
        assert_eq!(read, Err(ChunkError::Link(LinkError::Auth(AuthError::Message))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_with_other_blocks_than_asked_for_is_not_believed() {
    // Authenticated, but for a wrong range, of a wrong length, of another chunk's spec, or unreadable.
    let good = head::blocks_answer(0, 1, &spec(5));
    let wrong = [
        (head::blocks_answer(1, 1, &spec(5)), 9),
        (head::blocks_answer(0, 2, &spec(5)), 9),
        (head::blocks_answer(0, 0, &spec(5)), 0),
        (head::blocks_answer(0, 1, &spec(0)), 4),
        (head::blocks_answer(0, 1, &spec(6)), 9),
        (good.clone(), 8),
        (good.clone(), 10),
        (String::new(), 9),
        ("first=0".to_owned(), 9),
    ];
    for (text, len) in wrong {
        let shown = format!("{text} {len}");
        let client = against(quick(), move |mut stream| {
            let text = text.clone();
            async move {
                let Caller { session, .. } = meet(&mut stream).await.unwrap();
                let mac = hex::encode(head::answer_mac(&session.to_client, 0, StatusCode::OK, &text, len));
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\nx-granary-answer: {text}\r\nx-granary-mac: {mac}\r\n\r\n");
                let mut byte = [0; 1];
                while !matches!(stream.read(&mut byte).await, Ok(1) if byte[0] == b'\n') {}
                let _ = stream.write_all(head.as_bytes()).await;
                let _ = stream.write_all(&vec![0; len as usize]).await;
                hang().await;
            }
        })
        .await;
        let read = client.read_blocks(chunk_id(1), 0, 1).await;
        assert!(matches!(read, Err(ChunkError::Link(LinkError::Protocol(_)))), "{shown}: {read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_too_large_or_forged_ends_the_connection_and_its_waiters() {
    for bytes in [[0x7f, 0xff, 0xff, 0xff].to_vec(), vec![0, 0, 0, 25, 0, 0, 0, 0, 0, 0, 0, 1, 2], vec![0; 29]] {
        let mut bytes = bytes;
        bytes.resize(29, 0);
        let client = against(quick(), move |mut stream| {
            let bytes = bytes.clone();
            async move {
                let _ = meet(&mut stream).await;
                let mut byte = [0; 1];
                let _ = stream.read(&mut byte).await;
                let _ = stream.write_all(&bytes).await;
                hang().await;
            }
        })
        .await;
        let begin = Instant::now();
        let result = client.control(ControlRequest::Status, DEADLINE).await;
        assert!(matches!(result, Err(LinkError::Protocol(_) | LinkError::Auth(AuthError::Message))), "{result:?}");
        assert!(begin.elapsed() < DEADLINE / 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_another_kind_or_to_nobody_harms_nobody() {
    let client = against(ClientLimits::default(), |mut stream| async move {
        let Caller { session, .. } = meet(&mut stream).await.unwrap();
        let (read, write) = stream.into_split();
        let mut reader = FrameReader::new(read, session.to_server);
        let mut writer = FrameWriter::new(write, session.to_client);
        while let Ok(Some(request)) = reader.next(DEADLINE).await {
            let body = encode(&ControlResponse::Done).unwrap();
            for (id, body) in [(request.id + 1000, body.clone()), (request.id, Bytes::from_static(&[0xff; 3]))] {
                writer.write(&Frame { id, kind: Kind::Response, body }, DEADLINE).await.unwrap();
            }
            writer.flush(DEADLINE).await.unwrap();
        }
    })
    .await;
    for _ in 0..3 {
        let result = client.control(ControlRequest::Status, DEADLINE).await;
        assert!(matches!(result, Err(LinkError::Protocol(_))), "{result:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_says_so_in_time() {
    let server = start().await;
    let limits = ClientLimits { max_in_use: 2, ..quick() };
    let client = NodeClient::new(server.address.to_string(), Ends::default(), credentials(), limits);
    let first = client.begin_chunk(chunk_id(1), spec(5)).await.unwrap();
    let _second = client.begin_chunk(chunk_id(2), spec(5)).await.unwrap();
    assert_eq!(client.read_blocks(chunk_id(1), 0, 1).await, Err(ChunkError::Overloaded));
    drop(first);
    assert_eq!(client.read_blocks(chunk_id(1), 0, 1).await, Err(ChunkError::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_control_requests_at_once_are_refused_not_queued() {
    let server = start().await;
    server.node.hang.store(true, std::sync::atomic::Ordering::SeqCst);
    let limits = ClientLimits { max_control_in_flight: 3, ..ClientLimits::default() };
    let client = NodeClient::new(server.address.to_string(), Ends::default(), credentials(), limits);
    let calls = (0..5).map(|_| client.control(ControlRequest::Status, QUICK));
    let results = futures::future::join_all(calls).await;
    assert_eq!(results.iter().filter(|result| **result == Err(LinkError::Busy)).count(), 2, "{results:?}");
    assert_eq!(results.iter().filter(|result| **result == Err(LinkError::Timeout)).count(), 3, "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_comes_back_is_found_again() {
    let server = start().await;
    let client = server.client();
    client.control(ControlRequest::Status, DEADLINE).await.unwrap();
    server.task.abort();
    let _ = server.task.await;
    for _ in 0..5 {
        assert!(client.control(ControlRequest::Status, DEADLINE).await.is_err());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let limits = crate::server::ServerLimits::default();
    let _server = crate::test_support::start_with(server.node, limits, &server.address.to_string()).await;
    let begin = Instant::now();
    while client.control(ControlRequest::Status, DEADLINE).await.is_err() {
        assert!(begin.elapsed() < Duration::from_secs(5), "still not connected");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
