#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::auth::tests::known_session;
use crate::error::LinkError;
use crate::test_support::{chunk_id, spec};
use proptest::prelude::{any, proptest};

#[test]
fn codes_of_heads_are_the_golden_bytes() {
    // Computed with another implementation of HMAC, under the session keys of the golden handshake.
    let session = known_session();
    let request = request_mac(&session.to_server, 5, "PUT", "/v1/chunks/00?x=1", Some(70_000), None);
    assert_eq!(hex::encode(request), "479ef2268408e42a11411746640289e50ac4d5abd9910ab8b69b3575c3beb351");
    let answer = answer_mac(&session.to_client, 5, StatusCode::INSUFFICIENT_STORAGE, "disk-full", 0);
    assert_eq!(hex::encode(answer), "50b7b0a8ede78ef248f9bdbef8575251db8db68cfc0bd3a9cd4b4e320036376f");
}

#[test]
fn the_code_of_a_request_covers_its_lease() {
    let key = known_session().to_server;
    let mac = |lease| request_mac(&key, 5, "PUT", "/v1/chunks/00?x=1", Some(70_000), lease);
    assert_ne!(mac(Some("1 61")), mac(None));
    assert_ne!(mac(Some("1 61")), mac(Some("2 61")));
    assert_ne!(mac(Some("")), mac(None));
}

#[test]
fn a_lease_in_a_header_has_one_form() {
    let lease = LeaseStamp { task: "heal/3 \u{e9}".to_owned(), epoch: u64::MAX };
    assert_eq!(lease_text(&lease), "18446744073709551615 6865616c2f3320c3a9");
    assert_eq!(parse_lease(&lease_text(&lease)), Some(lease));
    let long = format!("1 {}", "61".repeat(65));
    for wrong in
        ["", "1", "1 ", "+1 61", "-1 61", " 61", "1 6", "1 00", "1 ff", "18446744073709551616 61", "1 61 61", &long]
    {
        assert_eq!(parse_lease(wrong), None, "{wrong}");
    }
}

#[test]
fn the_query_of_a_spec_has_one_form() {
    let text = "codec=1&k=4&m=2&unit=262144&extent_len=400000&len=100000&owner=1&created=1700000000000";
    assert_eq!(spec_query(&spec(100_000)), text);
    assert_eq!(parse_spec(text), Some(spec(100_000)));
    for wrong in [
        text.replace("codec=1", "codec=2"),
        text.replace("k=4", "k=256"),
        text.replace("k=4&m=2", "m=2&k=4"),
        text.replace("k=4", "k=+4"),
        text.replace("k=4", "k=-4"),
        text.replace("k=4", "k="),
        text.replace("k=4", "k"),
        text.replace("owner=1", "owner=65536"),
        text.replace("owner=1", "owner=4096"),
        text.replace("len=100000", "len=18446744073709551616"),
        format!("{text}&"),
        format!("{text}&k=4"),
        String::new(),
    ] {
        assert_eq!(parse_spec(&wrong), None, "{wrong}");
    }
}

#[test]
fn no_chunk_is_empty_too_long_or_outside_its_code() {
    assert!(check_spec(&chunk_id(1), &spec(1)).is_ok());
    assert!(check_spec(&chunk_id(1), &spec(MAX_CHUNK_BYTES)).is_ok());
    assert!(check_spec(&chunk_id(1), &spec(0)).is_err());
    assert!(check_spec(&chunk_id(1), &spec(MAX_CHUNK_BYTES + 1)).is_err());
    let outside = ChunkId { index: 6, ..chunk_id(1) };
    assert!(check_spec(&outside, &spec(1)).is_err());
}

#[test]
fn every_error_survives_the_trip() {
    for error in [
        ChunkError::NotFound,
        ChunkError::StaleLease { current: 7 },
        ChunkError::Corrupt { block: 17 },
        ChunkError::DiskFull,
        ChunkError::Overloaded,
        ChunkError::Rejected("no such group".to_owned()),
        ChunkError::Rejected(String::new()),
        ChunkError::Disk("I/O error".to_owned()),
    ] {
        let (status, text) = error_answer(&error);
        assert!(!status.is_success());
        assert!(http::HeaderValue::from_str(&text).is_ok());
        assert_eq!(parse_error(&text), Some(error));
    }
    let (_, text) = error_answer(&ChunkError::Link(LinkError::Timeout));
    assert!(matches!(parse_error(&text), Some(ChunkError::Disk(_))));
    assert_eq!(parse_error("something-new"), None);
}

proptest! {
    #[test]
    fn any_text_can_stand_in_an_error(text in any::<String>()) {
        let (_, header) = error_answer(&ChunkError::Disk(text));
        let header = http::HeaderValue::from_str(&header).unwrap();
        let received = header.to_str().unwrap().trim_end().to_owned();
        assert!(matches!(parse_error(&received), Some(ChunkError::Disk(_))));
    }

    #[test]
    fn any_text_parses_or_not_without_panic(text in any::<String>()) {
        let _ = (parse_spec(&text), parse_read(&text), parse_blocks_answer(&text), parse_error(&text));
    }

    #[test]
    fn ranges_come_back(first in any::<u32>(), blocks in any::<u32>()) {
        assert_eq!(parse_read(&read_query(first, blocks)), Some((first, blocks)));
        let answer = blocks_answer(first, blocks as usize, &spec(70_000));
        assert_eq!(parse_blocks_answer(&answer), Some((first, blocks, spec(70_000))));
    }
}
