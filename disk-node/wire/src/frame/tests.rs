#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::auth::tests::known_session;
use crate::control::{ControlRequest, ControlResponse};
use proptest::prelude::{any, proptest, ProptestConfig, Strategy};

const STALL: Duration = Duration::from_millis(200);

// Computed with another implementation of HMAC, under the session keys of the golden handshake.
const REQUEST: &str = "0000001a000000000000000101008caafb7bb265582d1221c2e7aff258a0";
const REQUEST_2: &str = "0000001a00000000000000020109955aec434bb20d55be3011c8ca806fd9";
const RESPONSE: &str = "0000001b00000000000000010202036f1c950cf8302127ce46b277150cb31d";

fn requests() -> [Frame; 2] {
    [(1, ControlRequest::Status), (2, ControlRequest::GetMap)].map(|(id, request)| Frame {
        id,
        kind: Kind::Request,
        body: encode(&request).unwrap(),
    })
}

async fn written(frames: &[Frame], key: MacKey) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), key);
    for frame in frames {
        writer.write(frame, STALL).await.unwrap();
    }
    writer.flush(STALL).await.unwrap();
    writer.stream
}

async fn read_all(bytes: &[u8], key: MacKey) -> (Vec<Frame>, Option<LinkError>) {
    let mut reader = FrameReader::new(bytes, key);
    let mut frames = Vec::new();
    loop {
        match reader.next(STALL).await {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => return (frames, None),
            Err(error) => return (frames, Some(error)),
        }
    }
}

#[tokio::test]
async fn frames_are_the_golden_bytes() {
    let session = known_session();
    let bytes = written(&requests(), session.to_server.clone()).await;
    assert_eq!(hex::encode(&bytes), format!("{REQUEST}{REQUEST_2}"));
    assert_eq!(read_all(&bytes, session.to_server).await, (requests().to_vec(), None));

    let response = Frame { id: 1, kind: Kind::Response, body: encode(&ControlResponse::Deleted(3)).unwrap() };
    assert_eq!(hex::encode(written(&[response], session.to_client).await), RESPONSE);
}

#[tokio::test]
async fn a_frame_altered_anywhere_is_refused() {
    let key = known_session().to_server;
    let good = written(&requests(), key.clone()).await;
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let (frames, error) = read_all(&bytes, key.clone()).await;
        assert!(frames.len() < 2 && error.is_some(), "bit {bit}: {frames:?} {error:?}");
    }
}

#[tokio::test]
async fn frames_cannot_be_repeated_dropped_or_swapped() {
    let key = known_session().to_server;
    let good = written(&requests(), key.clone()).await;
    let (first, second) = good.split_at(30);
    for wrong in [[first, first].concat(), second.to_vec(), [second, first].concat()] {
        let (_, error) = read_all(&wrong, key.clone()).await;
        assert_eq!(error, Some(LinkError::Auth(AuthError::Message)));
    }
    let (_, error) = read_all(&good, known_session().to_client).await;
    assert_eq!(error, Some(LinkError::Auth(AuthError::Message)), "a frame sent back to its sender");
}

#[tokio::test]
async fn a_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
    let key = known_session().to_server;
    let (_, error) = read_all(&[0x02, 0x00, 0x00, 0x01, 0, 0], key.clone()).await;
    assert_eq!(error, Some(LinkError::TooLarge));
    // Allowed, but it never comes: memory follows what came.
    let bytes = [0x02u8, 0, 0, 0, 1, 2, 3];
    let mut reader = FrameReader::new(&bytes[..], key);
    assert!(matches!(reader.next(STALL).await, Err(LinkError::Closed(_))));
    assert!(reader.buffer.capacity() <= 4 * READ_BYTES, "{}", reader.buffer.capacity());
    let too_long = Frame { id: 1, kind: Kind::Request, body: vec![0; MAX_FRAME_BODY_BYTES + 1].into() };
    assert_eq!(
        FrameWriter::new(Vec::new(), known_session().to_server).write(&too_long, STALL).await,
        Err(LinkError::TooLarge)
    );
}

#[tokio::test]
async fn half_a_frame_does_not_wait_for_ever() {
    let (ours, mut theirs) = tokio::io::duplex(1024);
    tokio::io::AsyncWriteExt::write_all(&mut theirs, &[0, 0, 0, 30, 1]).await.unwrap();
    let mut reader = FrameReader::new(ours, known_session().to_server);
    assert_eq!(reader.next(STALL).await, Err(LinkError::Timeout));
}

#[tokio::test]
async fn a_peer_that_does_not_read_fails_the_write() {
    let (ours, _theirs) = tokio::io::duplex(1024);
    let mut writer = FrameWriter::new(ours, known_session().to_server);
    let frame = Frame { id: 1, kind: Kind::Request, body: vec![0; 100_000].into() };
    assert_eq!(writer.write(&frame, STALL).await, Err(LinkError::Timeout));
}

#[tokio::test]
async fn frames_of_any_size_in_any_pieces_come_back() {
    let key = known_session().to_server;
    let sizes = [0, 1, 100, COPY_BELOW_BYTES, COPY_BELOW_BYTES + 1, READ_BYTES, 1_000_000, 3];
    let frames: Vec<Frame> = (1..)
        .zip(sizes)
        .map(|(id, size)| Frame { id, kind: Kind::Response, body: vec![id as u8; size].into() })
        .collect();
    let bytes = written(&frames, key.clone()).await;
    for piece in [1000, 77_777] {
        let (mut theirs, ours) = tokio::io::duplex(piece);
        let mut reader = FrameReader::new(ours, key.clone());
        let bytes = bytes.clone();
        let sending =
            tokio::spawn(async move { tokio::io::AsyncWriteExt::write_all(&mut theirs, &bytes).await.unwrap() });
        for frame in &frames {
            assert_eq!(reader.next(STALL).await.unwrap().as_ref(), Some(frame));
        }
        sending.await.unwrap();
    }
}

/// Bytes that look like messages: a leading variant number, then anything; or a real message with a few bytes changed.
fn near_messages() -> impl Strategy<Value = Vec<u8>> {
    (0u8..20, proptest::collection::vec(any::<u8>(), 0..300)).prop_map(|(variant, mut rest)| {
        rest.insert(0, variant);
        rest
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_decode_or_fail_without_panic(bytes in near_messages()) {
        if let Ok(request) = decode::<ControlRequest>(&bytes) {
            let again = encode(&request).unwrap();
            assert_eq!(decode::<ControlRequest>(&again).unwrap(), request);
        }
        if let Ok(response) = decode::<ControlResponse>(&bytes) {
            let again = encode(&response).unwrap();
            assert_eq!(decode::<ControlResponse>(&again).unwrap(), response);
        }
    }

    #[test]
    fn any_bytes_are_no_frames(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut reader = FrameReader::new(&[][..], known_session().to_server);
        reader.buffer.extend_from_slice(&bytes);
        assert!(!matches!(reader.take(), Ok(Ok(_))));
    }
}
