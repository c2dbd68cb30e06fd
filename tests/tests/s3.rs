//! S3 as clients and attackers see it, against a real cluster: hostile input gives the AWS error and stores nothing,
//! strange keys give the very key back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use base64::Engine as _;
use bytes::Bytes;
use granary_s3_client::{uri, Answer, Body, Client, Payload};
use granary_tests::cluster::{memory_bytes, Cluster, Options};
use granary_tests::seed::Random;
use http::{Method, StatusCode};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const BUCKET: &str = "hostile";

struct Scene {
    cluster: Cluster,
    client: Client,
    runtime: tokio::runtime::Runtime,
}

impl Scene {
    fn new() -> Scene {
        let cluster = Cluster::start(Options::default());
        let client = cluster.client();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let scene = Scene { cluster, client, runtime };
        assert_eq!(scene.ask(Method::PUT, &format!("/{BUCKET}"), &[], &[], Body::Empty).status, StatusCode::OK);
        scene
    }

    fn ask(&self, method: Method, path: &str, query: &[(&str, &str)], headers: &[(&str, &str)], body: Body) -> Answer {
        self.runtime.block_on(self.client.request(method, path, query, headers, body, Payload::Signed)).unwrap()
    }

    fn ask_as(&self, client: &Client, method: Method, path: &str, headers: &[(&str, &str)], body: Body) -> Answer {
        self.runtime.block_on(client.request(method, path, &[], headers, body, Payload::Signed)).unwrap()
    }

    fn keys(&self) -> Vec<String> {
        self.runtime.block_on(self.client.list(BUCKET, "")).unwrap()
    }

    fn refused(&self, what: &str, answer: &Answer, status: u16, codes: &[&str]) {
        assert_eq!(answer.status.as_u16(), status, "{what}: {}", answer.text());
        assert!(codes.contains(&answer.code()), "{what}: {} is none of {codes:?}: {}", answer.code(), answer.text());
        assert!(!answer.header("x-amz-request-id").is_empty(), "{what}: no request id");
        assert_eq!(self.keys(), Vec::<String>::new(), "{what}: something was stored");
    }

    /// Bytes as they are on a connection of their own; the answer as text.
    fn raw(&self, request: &[u8]) -> String {
        self.raw_with_end(request, false)
    }

    /// The same; with `cut` the client's side of the connection is closed after the bytes.
    fn raw_with_end(&self, request: &[u8], cut: bool) -> String {
        let mut stream = TcpStream::connect(self.cluster.s3()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // A server may refuse before it has read everything.
        let request =
            String::from_utf8(request.to_vec()).unwrap().replacen("\r\nHost:", "\r\nConnection: close\r\nHost:", 1);
        let _refused_early = stream.write_all(request.as_bytes());
        if cut {
            let _refused_early = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut answer = Vec::new();
        let _reset_after_the_answer = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn bytes(text: &'static str) -> Body {
    Body::Bytes(Bytes::from_static(text.as_bytes()))
}

#[test]
fn hostile_requests_get_the_aws_error_and_store_nothing() {
    let scene = Scene::new();
    let path = format!("/{BUCKET}/key");
    let address = scene.cluster.s3();

    let wrong = Client::new(address, scene.cluster.access_key(), "not the secret key at all", Duration::from_secs(20));
    scene.refused(
        "wrong secret",
        &scene.ask_as(&wrong, Method::PUT, &path, &[], bytes("x")),
        403,
        &["SignatureDoesNotMatch"],
    );
    let unknown = Client::new(address, "AKIAUNKNOWNUNKNOWN00", scene.cluster.secret_key(), Duration::from_secs(20));
    scene.refused(
        "unknown key",
        &scene.ask_as(&unknown, Method::PUT, &path, &[], bytes("x")),
        403,
        &["InvalidAccessKeyId"],
    );
    let anonymous =
        scene.raw(format!("PUT {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1\r\n\r\nx").as_bytes());
    assert!(anonymous.starts_with("HTTP/1.1 403"), "anonymous: {anonymous}");

    // A presigned PUT, with a header that the signer never saw.
    let presigned = scene.client.presign(&Method::PUT, &path, Duration::from_secs(60)).unwrap();
    for header in [
        "x-amz-copy-source: /hostile/other",
        "x-amz-meta-injected: yes",
        "x-amz-acl: public-read",
        "x-amz-storage-class: STANDARD",
    ] {
        let answer = scene.raw(
            format!("PUT {presigned} HTTP/1.1\r\nHost: {address}\r\n{header}\r\nContent-Length: 1\r\n\r\nx").as_bytes(),
        );
        assert!(
            answer.starts_with("HTTP/1.1 403") || answer.starts_with("HTTP/1.1 400"),
            "unsigned {header}: {answer}"
        );
        assert_eq!(scene.keys(), Vec::<String>::new(), "unsigned {header}");
    }
    let expired = presigned.replace("X-Amz-Expires=60", "X-Amz-Expires=600000");
    let answer =
        scene.raw(format!("PUT {expired} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1\r\n\r\nx").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 403"), "altered expiry: {answer}");

    // Bodies that are not what was announced.
    let short = scene.raw_with_end(
        format!("PUT {presigned} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 100000\r\n\r\nonly this").as_bytes(),
        true,
    );
    assert!(!short.starts_with("HTTP/1.1 200"), "short body: {short}");
    assert_eq!(scene.keys(), Vec::<String>::new(), "short body");
    let no_length = scene.raw(
        format!("PUT {presigned} HTTP/1.1\r\nHost: {address}\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")
            .as_bytes(),
    );
    assert!(no_length.starts_with("HTTP/1.1 411"), "neither length: {no_length}");
    let both = scene.raw(format!("PUT {presigned} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n").as_bytes());
    assert!(both.starts_with("HTTP/1.1 4"), "both lengths: {both}");
    let two = scene.raw(
        format!("PUT {presigned} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx")
            .as_bytes(),
    );
    assert!(two.starts_with("HTTP/1.1 4"), "two lengths: {two}");
    assert_eq!(scene.keys(), Vec::<String>::new(), "odd lengths");

    // Checksums that do not agree with the body.
    let md5_of_nothing = base64(&hex::decode("d41d8cd98f00b204e9800998ecf8427e").unwrap());
    for (length, body) in [(5, Bytes::from_static(b"hello")), (600_000, Bytes::from(vec![7u8; 600_000]))] {
        let put = |headers: &[(&str, &str)]| scene.ask(Method::PUT, &path, &[], headers, Body::Bytes(body.clone()));
        scene.refused(
            &format!("Content-MD5 of something else, {length} bytes"),
            &put(&[("content-md5", &md5_of_nothing)]),
            400,
            &["BadDigest"],
        );
        scene.refused("Content-MD5 that is none", &put(&[("content-md5", "nonsense")]), 400, &["InvalidDigest"]);
        for (header, zeros) in [
            ("x-amz-checksum-crc32", 4),
            ("x-amz-checksum-crc32c", 4),
            ("x-amz-checksum-crc64nvme", 8),
            ("x-amz-checksum-sha1", 20),
            ("x-amz-checksum-sha256", 32),
        ] {
            let value = base64(&vec![0u8; zeros]);
            scene.refused(
                &format!("{header} of something else, {length} bytes"),
                &put(&[(header, &value)]),
                400,
                &["BadDigest", "XAmzContentChecksumMismatch"],
            );
            scene.refused(
                &format!("{header} that is none"),
                &put(&[(header, "nonsense")]),
                400,
                &["InvalidRequest", "BadDigest"],
            );
        }
    }

    // Multipart with absurd numbers.
    let created = scene.ask(Method::POST, &path, &[("uploads", "")], &[], Body::Empty);
    let upload = created.all("UploadId").remove(0);
    for number in ["0", "10001", "-1", "99999999999999999999", "one", ""] {
        let answer = scene.ask(Method::PUT, &path, &[("partNumber", number), ("uploadId", &upload)], &[], bytes("x"));
        assert_eq!(answer.status.as_u16(), 400, "part number {number:?}: {}", answer.text());
        assert!(
            ["InvalidArgument", "InvalidRequest"].contains(&answer.code()),
            "part number {number:?}: {}",
            answer.text()
        );
    }
    for bad in ["nonsense", "00000000000000000000000000000000", "../../etc/passwd"] {
        let answer = scene.ask(Method::PUT, &path, &[("partNumber", "1"), ("uploadId", bad)], &[], bytes("x"));
        scene.refused("an upload that is none", &answer, 404, &["NoSuchUpload"]);
    }
    let complete = "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>\"d41d8cd98f00b204e9800998ecf8427e\"</ETag></Part></CompleteMultipartUpload>";
    scene.refused(
        "complete without its part",
        &scene.ask(Method::POST, &path, &[("uploadId", &upload)], &[], bytes(complete)),
        400,
        &["InvalidPart"],
    );
    let broken = scene.ask(Method::POST, &path, &[("uploadId", &upload)], &[], bytes("<Complete"));
    scene.refused("XML that is none", &broken, 400, &["MalformedXML"]);
    assert_eq!(
        scene.ask(Method::DELETE, &path, &[("uploadId", &upload)], &[], Body::Empty).status,
        StatusCode::NO_CONTENT
    );
    scene.refused(
        "abort twice",
        &scene.ask(Method::DELETE, &path, &[("uploadId", &upload)], &[], Body::Empty),
        404,
        &["NoSuchUpload"],
    );

    // Names that S3 does not allow.
    let nul = scene.ask(Method::PUT, &format!("/{BUCKET}/a\0b"), &[], &[], bytes("x"));
    assert_eq!(nul.status.as_u16(), 400, "NUL in a key: {}", nul.text());
    let long = scene.ask(Method::PUT, &format!("/{BUCKET}/{}", "k".repeat(1025)), &[], &[], bytes("x"));
    scene.refused("key of 1,025 bytes", &long, 400, &["KeyTooLongError"]);
    let bad_utf8 =
        scene.raw(format!("PUT /{BUCKET}/%ff%fe HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n").as_bytes());
    assert!(bad_utf8.starts_with("HTTP/1.1 4"), "a key that is no UTF-8: {bad_utf8}");
    for name in ["UPPER", "a", "has_underscore..", "192.168.0.1", "-dash"] {
        let answer = scene.ask(Method::PUT, &format!("/{name}"), &[], &[], Body::Empty);
        assert_eq!(answer.status.as_u16(), 400, "bucket {name}: {}", answer.text());
        assert_eq!(answer.code(), "InvalidBucketName", "bucket {name}");
    }
    assert_eq!(scene.ask(Method::GET, "/no-such-bucket/key", &[], &[], Body::Empty).code(), "NoSuchBucket");
    assert_eq!(scene.ask(Method::GET, &path, &[], &[], Body::Empty).code(), "NoSuchKey");
    assert_eq!(scene.keys(), Vec::<String>::new());
    // The gateway still works.
    assert_eq!(scene.ask(Method::PUT, &path, &[], &[], bytes("fine")).status, StatusCode::OK);
    assert!(memory_bytes(scene.cluster.pid(), true) < 400 << 20);
}

#[test]
fn every_legal_key_comes_back_as_it_went() {
    let scene = Scene::new();
    let long = format!("{}{}", "\u{e9}".repeat(500), "x".repeat(24));
    assert_eq!(long.len(), 1024);
    let mut keys: Vec<&str> = vec![
        "..",
        "../..",
        "../../etc/passwd",
        ".",
        "./x",
        "a/../b",
        "a//b",
        "//x",
        "/leading",
        "trailing/",
        "trailing space ",
        " leading space",
        "a b",
        "a+b",
        "a%20b",
        "a%2Fb",
        "a&b=c?d#e",
        "quote\"'<>",
        "back\\slash",
        "tab\tand\nnewline",
        "\u{1}",
        "\u{7f}",
        "e\u{301}",
        "\u{e9}",
        "\u{202e}rtl",
        "\u{1f980}",
        "skel/x",
        "skel.other/x",
        "skel",
        &long,
        "*",
        "%",
        "%zz",
        "~tilde",
        "null",
        "uploads",
        "a=b",
        "x;y",
        "comma,semi",
        "(paren)",
        "@at",
        "$dollar",
        ":colon",
    ];
    for (number, key) in keys.iter().enumerate() {
        let answer = scene.ask(
            Method::PUT,
            &format!("/{BUCKET}/{key}"),
            &[],
            &[],
            Body::Bytes(Bytes::from(format!("body {number}"))),
        );
        assert_eq!(answer.status, StatusCode::OK, "PUT {key:?}: {}", answer.text());
    }
    for (number, key) in keys.iter().enumerate() {
        let answer = scene.ask(Method::GET, &format!("/{BUCKET}/{key}"), &[], &[], Body::Empty);
        assert_eq!((answer.status, answer.text()), (StatusCode::OK, format!("body {number}")), "GET {key:?}");
    }
    keys.sort_unstable();
    // Control characters cannot stand in XML 1.0; a client that has them asks for URL encoding, as every SDK does.
    let mut listed = Vec::new();
    let mut token = String::new();
    loop {
        let mut query = vec![("list-type", "2"), ("encoding-type", "url"), ("max-keys", "7")];
        if !token.is_empty() {
            query.push(("continuation-token", &token));
        }
        let page = scene.ask(Method::GET, &format!("/{BUCKET}"), &query, &[], Body::Empty);
        assert_eq!(page.status, StatusCode::OK, "{}", page.text());
        listed.extend(page.all("Key").iter().map(|key| decode(key)));
        match page.all("NextContinuationToken").into_iter().next() {
            Some(next) => token = next,
            None => break,
        }
    }
    assert_eq!(listed, keys, "the listing is in byte order and holds every key as it was");
    for key in &keys {
        let answer = scene.ask(Method::DELETE, &format!("/{BUCKET}/{key}"), &[], &[], Body::Empty);
        assert_eq!(answer.status, StatusCode::NO_CONTENT, "DELETE {key:?}");
    }
    assert_eq!(scene.keys(), Vec::<String>::new());
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        if *first == b'%' {
            bytes.push(u8::from_str_radix(std::str::from_utf8(&more[..2]).unwrap(), 16).unwrap());
            rest = &more[2..];
        } else {
            // Clients decode as a form does: a plus that was not encoded would become a space.
            bytes.push(if *first == b'+' { b' ' } else { *first });
            rest = more;
        }
    }
    String::from_utf8(bytes).unwrap()
}

#[test]
fn ranges_conditions_and_copies_agree_with_the_bytes() {
    let scene = Scene::new();
    let mut random = Random::of_this_run("ranges_conditions_and_copies_agree_with_the_bytes");
    for size in [0usize, 1, 100, 8192, 8193, 131_072, 524_288, 524_289, 5_000_000, 70_000_000] {
        let payload: Bytes = random.bytes(size).into();
        let path = format!("/{BUCKET}/size {size}");
        let put = scene.ask(
            Method::PUT,
            &path,
            &[],
            &[("x-amz-meta-size", &size.to_string()), ("content-type", "x/y")],
            Body::Bytes(payload.clone()),
        );
        assert_eq!(put.status, StatusCode::OK, "{}", put.text());
        let whole = scene.ask(Method::GET, &path, &[], &[], Body::Empty);
        assert!(whole.body == payload, "{size}: the bytes came back wrong");
        assert_eq!((whole.header("x-amz-meta-size"), whole.header("content-type")), (size.to_string().as_str(), "x/y"));
        assert_eq!(whole.header("etag"), put.header("etag"));
        let head = scene.ask(Method::HEAD, &path, &[], &[], Body::Empty);
        assert_eq!((head.header("content-length"), head.body.len()), (size.to_string().as_str(), 0));
        for _ in 0..12 {
            let first = random.below(size as u64 + 1);
            let last = first + random.below(size as u64 + 10);
            let answer =
                scene.ask(Method::GET, &path, &[], &[("range", &format!("bytes={first}-{last}"))], Body::Empty);
            if first >= size as u64 {
                assert_eq!(
                    (answer.status.as_u16(), answer.code()),
                    (416, "InvalidRange"),
                    "bytes={first}-{last} of {size}"
                );
            } else {
                let end = (last + 1).min(size as u64);
                assert_eq!(answer.status.as_u16(), 206, "bytes={first}-{last} of {size}");
                assert!(
                    answer.body == payload.slice(first as usize..end as usize),
                    "bytes={first}-{last} of {size}: wrong bytes"
                );
                assert_eq!(answer.header("content-range"), format!("bytes {first}-{}/{size}", end - 1));
            }
        }
        if size > 0 {
            let tail = scene.ask(Method::GET, &path, &[], &[("range", "bytes=-1")], Body::Empty);
            assert!(tail.body == payload.slice(size - 1..), "bytes=-1 of {size}");
        }
        let etag = put.header("etag").to_owned();
        let get =
            |name: &str, value: &str| scene.ask(Method::GET, &path, &[], &[(name, value)], Body::Empty).status.as_u16();
        assert_eq!(
            (
                get("if-match", &etag),
                get("if-match", "\"no\""),
                get("if-none-match", &etag),
                get("if-none-match", "\"no\"")
            ),
            (200, 412, 304, 200)
        );
        let copy = scene.ask(
            Method::PUT,
            &format!("/{BUCKET}/copy of {size}"),
            &[],
            &[("x-amz-copy-source", &uri(&path, &[]))],
            Body::Empty,
        );
        assert_eq!(copy.status, StatusCode::OK, "{}", copy.text());
        let copied = scene.ask(Method::GET, &format!("/{BUCKET}/copy of {size}"), &[], &[], Body::Empty);
        assert!(copied.body == payload, "{size}: the copy is wrong");
        assert_eq!(copied.header("x-amz-meta-size"), size.to_string());
    }
    // Of many concurrent writers with If-None-Match: * exactly one wins.
    let racers = (0..16).map(|number| {
        let client = scene.client.clone();
        async move {
            let body = Body::Bytes(Bytes::from(format!("racer {number}")));
            client
                .request(Method::PUT, &format!("/{BUCKET}/race"), &[], &[("if-none-match", "*")], body, Payload::Signed)
                .await
                .unwrap()
        }
    });
    let answers = scene.runtime.block_on(futures::future::join_all(racers));
    let winners: Vec<usize> = answers
        .iter()
        .enumerate()
        .filter(|(_, answer)| answer.status == StatusCode::OK)
        .map(|(number, _)| number)
        .collect();
    assert_eq!(winners.len(), 1, "winners {winners:?}");
    assert!(answers.iter().all(|answer| [200, 409, 412].contains(&answer.status.as_u16())));
    assert_eq!(
        scene.ask(Method::GET, &format!("/{BUCKET}/race"), &[], &[], Body::Empty).text(),
        format!("racer {}", winners[0])
    );
}

/// An object of 20 GiB (2 GiB in the short form) goes in and out by multipart; no process may grow beyond 400 MiB.
#[test]
fn a_huge_object_goes_through_in_constant_memory() {
    let scene = Scene::new();
    let gib: u64 = if granary_tests::soak() { 20 } else { 1 };
    let part_bytes: u64 = 64 << 20;
    let parts = gib * (1 << 30) / part_bytes;
    let path = format!("/{BUCKET}/huge");
    let upload = scene.ask(Method::POST, &path, &[("uploads", "")], &[], Body::Empty).all("UploadId").remove(0);
    // Part n is the 16 MiB pattern rotated by n bytes, four times: wrong order or wrong part shows.
    let pattern: Bytes = Random::new(20).bytes((16 << 20) + parts as usize).into();
    let part = |number: u64| pattern.slice(number as usize..number as usize + (16 << 20));
    let mut manifest = String::from("<CompleteMultipartUpload>");
    for number in 1..=parts {
        let piece = part(number - 1);
        let stream = futures::stream::iter((0..4).map(move |_| Ok(piece.clone())));
        let query = [("partNumber", number.to_string()), ("uploadId", upload.clone())];
        let query: Vec<(&str, &str)> = query.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let answer = scene.ask(Method::PUT, &path, &query, &[], Body::Stream(part_bytes, Box::pin(stream)));
        assert_eq!(answer.status, StatusCode::OK, "part {number}: {}", answer.text());
        manifest += &format!("<Part><PartNumber>{number}</PartNumber><ETag>{}</ETag></Part>", answer.header("etag"));
    }
    manifest += "</CompleteMultipartUpload>";
    let done = scene.ask(Method::POST, &path, &[("uploadId", &upload)], &[], Body::Bytes(manifest.into()));
    assert!(done.status == StatusCode::OK && done.code().is_empty(), "{}", done.text());
    scene.runtime.block_on(async {
        let mut answer = scene.client.stream(Method::GET, &path, &[], &[], Body::Empty, Payload::Signed).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK);
        let mut at = 0u64;
        while let Some(mut bytes) = answer.next().await.unwrap() {
            while !bytes.is_empty() {
                let expected = part(at / part_bytes);
                let inside = (at % (16 << 20)) as usize;
                let length = bytes.len().min((16 << 20) - inside);
                assert!(bytes[..length] == expected[inside..inside + length], "wrong bytes at {at}");
                at += length as u64;
                let _compared = bytes.split_to(length);
            }
        }
        assert_eq!(at, gib << 30);
    });
    let mut peaks = vec![("gateway".to_owned(), memory_bytes(scene.cluster.pid(), true))];
    peaks.extend(
        scene.cluster.disks().iter().map(|disk| (format!("disk node {}", disk.disk), memory_bytes(disk.pid, true))),
    );
    println!(
        "    peak memory: {}",
        peaks.iter().map(|(name, bytes)| format!("{name} {} MiB", bytes >> 20)).collect::<Vec<_>>().join(", ")
    );
    for (name, bytes) in peaks {
        assert!(bytes > 0 && bytes < 400 << 20, "{name} took {} MiB", bytes >> 20);
    }
}
