//! Control requests over a real connection.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use bytes::Bytes;
use futures::future::join_all;
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::{payload, start, DEADLINE};

fn echo(message: impl Into<Bytes>) -> ControlRequest {
    ControlRequest::Raft { shard: ShardId(1), from: DiskId(2), message: message.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_find_their_requests_in_any_order() {
    let server = start().await;
    let client = server.client();
    let work = (0..500u64).map(|number| {
        let client = client.clone();
        async move {
            // Some of one byte, which wait; some larger than a read buffer.
            let message = if number % 3 == 0 { payload(1).slice(..) } else { payload(number * 500) };
            let message = if message.len() == 1 { Bytes::from(vec![(number % 50) as u8]) } else { message };
            assert_eq!(client.control(echo(message.clone()), DEADLINE).await, Ok(ControlResponse::Raft(message)));
        }
    });
    join_all(work).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_request_does_not_hold_up_a_fast_one() {
    let server = start().await;
    let client = server.client();
    let begin = Instant::now();
    let (slow, fast) = tokio::join!(client.control(echo(vec![250u8]), DEADLINE), async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        client.control(ControlRequest::Status, DEADLINE).await.unwrap();
        begin.elapsed()
    });
    assert_eq!(slow, Ok(ControlResponse::Raft(Bytes::from(vec![250u8]))));
    assert!(fast < Duration::from_millis(200), "{fast:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_pass_and_larger_ones_are_refused_at_once() {
    let server = start().await;
    let client = server.client();
    let message = payload(30 << 20);
    let answer = client.control(echo(message.clone()), DEADLINE).await;
    // Not printed: it is long.
    assert!(answer == Ok(ControlResponse::Raft(message)), "{:?}", answer.err());
    assert_eq!(client.control(echo(payload(33 << 20)), DEADLINE).await, Err(LinkError::TooLarge));
    assert_eq!(client.control(ControlRequest::Status, DEADLINE).await, Ok(ControlResponse::Done));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_and_spoils_nothing() {
    let server = start().await;
    let client = server.client();
    server.node.hang.store(true, Ordering::SeqCst);
    let begin = Instant::now();
    assert_eq!(client.control(ControlRequest::Status, Duration::from_millis(100)).await, Err(LinkError::Timeout));
    assert!(begin.elapsed() < Duration::from_secs(5));
    server.node.hang.store(false, Ordering::SeqCst);
    assert_eq!(client.control(ControlRequest::Status, DEADLINE).await, Ok(ControlResponse::Done));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_goes_unnoticed() {
    let mut server = start().await;
    let client = server.client();
    for _ in 0..30 {
        assert_eq!(client.control(ControlRequest::Status, DEADLINE).await, Ok(ControlResponse::Done));
        server = server.restart().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_fails_its_waiters_at_once_and_later_callers_fast() {
    let server = start().await;
    let client = server.client();
    client.control(ControlRequest::Status, DEADLINE).await.unwrap();
    server.node.hang.store(true, Ordering::SeqCst);
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { client.control(ControlRequest::Status, DEADLINE).await })
    };
    while server.node.controls.load(Ordering::SeqCst) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let begin = Instant::now();
    server.task.abort();
    let _ = server.task.await;
    let result = waiting.await.unwrap();
    assert!(matches!(result, Err(LinkError::Closed(_))), "{result:?}");
    for _ in 0..100 {
        let result = client.control(ControlRequest::Status, DEADLINE).await;
        assert!(matches!(result, Err(LinkError::Connect(_))), "{result:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(2));
}
