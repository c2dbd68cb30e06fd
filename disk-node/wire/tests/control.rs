//! Control requests over a real connection.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use bytes::Bytes;
use futures::future::join_all;
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::{payload, reaches, start, DEADLINE};

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
    server.node.hang.store(true, Ordering::SeqCst);
    let slow = {
        let client = client.clone();
        tokio::spawn(async move { client.control(ControlRequest::Status, DEADLINE).await })
    };
    reaches(&server.node.controls, 1).await;
    server.node.hang.store(false, Ordering::SeqCst);
    assert_eq!(client.control(ControlRequest::Status, DEADLINE).await, Ok(ControlResponse::Done));
    assert!(!slow.is_finished(), "it hangs for as long as it is waited for");
    slow.abort();
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
    let call = client.control(ControlRequest::Status, Duration::from_millis(100));
    assert_eq!(tokio::time::timeout(DEADLINE, call).await, Ok(Err(LinkError::Timeout)));
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
    reaches(&server.node.controls, 2).await;
    server.task.abort();
    let _ = server.task.await;
    let result = waiting.await.unwrap();
    assert!(matches!(result, Err(LinkError::Closed(_))), "{result:?}");
    for _ in 0..100 {
        let result = client.control(ControlRequest::Status, DEADLINE).await;
        assert!(matches!(result, Err(LinkError::Connect(_))), "{result:?}");
    }
}
