//! Chunks over a real connection.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use futures::future::join_all;
use granary_placement::lease::LeaseStamp;
use granary_wire::chunk::BLOCK_BYTES;
use granary_wire::error::{ChunkError, LinkError};
use std::sync::atomic::Ordering;
use support::{chunk_id, payload, reaches, read_all, spec, start};

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_every_size_come_back_as_they_were_sent() {
    let server = start().await;
    let client = server.client();
    let sizes = [
        1,
        2,
        4095,
        BLOCK_BYTES - 1,
        BLOCK_BYTES,
        BLOCK_BYTES + 1,
        3 * BLOCK_BYTES,
        10_000_000,
        16 << 20,
        (64 << 20) - 1,
        64 << 20,
    ];
    for (number, len) in (0..).zip(sizes) {
        let (id, data) = (chunk_id(number), payload(len));
        client.put_chunk(id, spec(len), vec![data.clone()]).await.unwrap();
        assert!(read_all(&client, id, len).await.unwrap() == data, "{len} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_takes_pieces_of_any_size() {
    let server = start().await;
    let client = server.client();
    for (number, piece) in (0..).zip([1usize, 1000, 65_535, 65_536, 65_537, 1 << 20]) {
        let data = payload(if piece == 1 { 100_000 } else { 5_000_001 });
        let (id, len) = (chunk_id(number), data.len() as u64);
        let mut writer = client.begin_chunk(id, spec(len)).await.unwrap();
        let mut rest = data.clone();
        while !rest.is_empty() {
            writer.write(rest.split_to(piece.min(rest.len()))).await.unwrap();
        }
        writer.finish().await.unwrap();
        assert!(read_all(&client, id, len).await.unwrap() == data, "pieces of {piece}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_of_a_background_write_arrives_with_it() {
    let server = start().await;
    let client = server.client();
    let lease = LeaseStamp { task: "heal".to_owned(), epoch: 7 };
    client.put_chunk(chunk_id(1), spec(5), vec![payload(5)]).await.unwrap();
    client.put_chunk_under(&lease, chunk_id(2), spec(5), vec![payload(5)]).await.unwrap();
    let mut writer = client.begin_chunk_under(&lease, chunk_id(3), spec(5)).await.unwrap();
    writer.write(payload(5)).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(*server.node.leases.lock().unwrap(), [None, Some(lease.clone()), Some(lease.clone())]);
    *server.node.refuse.lock().unwrap() = Some(ChunkError::StaleLease { current: 8 });
    let refused = client.put_chunk_under(&lease, chunk_id(4), spec(5), vec![payload(5)]).await;
    assert_eq!(refused, Err(ChunkError::StaleLease { current: 8 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_clipped_at_the_end_of_the_chunk() {
    let server = start().await;
    let client = server.client();
    let len = 5 * BLOCK_BYTES + 17;
    client.put_chunk(chunk_id(1), spec(len), vec![payload(len)]).await.unwrap();
    let blocks = client.read_blocks(chunk_id(1), 4, 64).await.unwrap();
    assert_eq!(blocks.spec, spec(len));
    assert_eq!(blocks.data.iter().map(|block| block.len()).collect::<Vec<_>>(), [BLOCK_BYTES as usize, 17]);
    assert!(matches!(client.read_blocks(chunk_id(1), 6, 1).await, Err(ChunkError::Rejected(_))));
    assert!(matches!(client.read_blocks(chunk_id(1), 0, 65).await, Err(ChunkError::Rejected(_))));
    assert_eq!(client.read_blocks(chunk_id(2), 0, 1).await, Err(ChunkError::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_do_not_mix() {
    let server = start().await;
    let client = server.client();
    let work = (0..200).map(|number| {
        let client = client.clone();
        async move {
            let len = 1 + u64::from(number) * 3000;
            client.put_chunk(chunk_id(number), spec(len), vec![payload(len)]).await.unwrap();
            assert!(read_all(&client, chunk_id(number), len).await.unwrap() == payload(len), "chunk {number}");
        }
    });
    join_all(work).await;
    assert_eq!(server.node.aborted.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_refusal_comes_through_as_itself() {
    let server = start().await;
    let client = server.client();
    let (len, data) = (32 << 20, payload(32 << 20));
    for error in [ChunkError::DiskFull, ChunkError::Overloaded, ChunkError::Rejected("no such group".into())] {
        *server.node.refuse.lock().unwrap() = Some(error.clone());
        for _ in 0..10 {
            assert_eq!(client.put_chunk(chunk_id(1), spec(len), vec![data.clone()]).await, Err(error.clone()));
        }
    }
    *server.node.refuse.lock().unwrap() = None;
    *server.node.refuse_after.lock().unwrap() = Some((1 << 20, ChunkError::DiskFull));
    for _ in 0..10 {
        assert_eq!(client.put_chunk(chunk_id(1), spec(len), vec![data.clone()]).await, Err(ChunkError::DiskFull));
    }
    reaches(&server.node.aborted, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_writer_leaves_nothing_behind() {
    let server = start().await;
    let client = server.client();
    let mut writer = client.begin_chunk(chunk_id(1), spec(1 << 20)).await.unwrap();
    writer.write(payload(1 << 19)).await.unwrap();
    reaches(&server.node.begun, 1).await;
    drop(writer);
    reaches(&server.node.aborted, 1).await;
    assert!(server.node.chunks.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_holds_its_caller_to_the_announced_length() {
    let server = start().await;
    let client = server.client();
    let mut writer = client.begin_chunk(chunk_id(1), spec(10)).await.unwrap();
    assert!(matches!(writer.write(payload(11)).await, Err(ChunkError::Rejected(_))));
    let mut writer = client.begin_chunk(chunk_id(1), spec(10)).await.unwrap();
    writer.write(payload(9)).await.unwrap();
    assert!(matches!(writer.finish().await, Err(ChunkError::Rejected(_))));
    assert!(server.node.chunks.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_an_answer_is_found() {
    let server = start().await;
    let client = server.client();
    let len = 10 * BLOCK_BYTES;
    client.put_chunk(chunk_id(1), spec(len), vec![payload(len)]).await.unwrap();
    *server.node.lie_in_block.lock().unwrap() = Some(6);
    assert_eq!(client.read_blocks(chunk_id(1), 0, 10).await, Err(ChunkError::Corrupt { block: 6 }));
    assert!(client.read_blocks(chunk_id(1), 0, 6).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_goes_unnoticed() {
    let mut server = start().await;
    let client = server.client();
    for number in 0..20 {
        client.put_chunk(chunk_id(number), spec(100_000), vec![payload(100_000)]).await.unwrap();
        server = server.restart().await;
        assert!(read_all(&client, chunk_id(number), 100_000).await.unwrap() == payload(100_000));
        server = server.restart().await;
        let mut writer = client.begin_chunk(chunk_id(1000 + number), spec(5)).await.unwrap();
        writer.write(payload(5)).await.unwrap();
        writer.finish().await.unwrap();
        server = server.restart().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_in_the_middle_is_a_lost_connection() {
    let server = start().await;
    let client = server.client();
    let mut writer = client.begin_chunk(chunk_id(1), spec(1 << 20)).await.unwrap();
    writer.write(payload(1 << 19)).await.unwrap();
    reaches(&server.node.begun, 1).await;
    server.task.abort();
    let _ = server.task.await;
    let _ = writer.write(payload(1 << 19)).await;
    let result = writer.finish().await;
    assert!(matches!(result, Err(ChunkError::Link(LinkError::Closed(_)))), "{result:?}");
    let result = client.read_blocks(chunk_id(1), 0, 1).await;
    assert!(matches!(result, Err(ChunkError::Link(LinkError::Connect(_)))), "{result:?}");
}
