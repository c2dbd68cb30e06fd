use super::client::{b64, encode, md5_hex, Ask, Got, Scene};
use bytes::Bytes;
use granary_meta::record::ChecksumAlgorithm;
use granary_meta::{Answer, Reply, ShardResponse};

#[tokio::test(flavor = "multi_thread")]
async fn every_legal_key_comes_back_as_it_went() {
    let scene = Scene::new().await;
    let long = "k".repeat(1024);
    let keys = [
        "a",
        "/",
        "//",
        "/a",
        "a//b",
        "a/",
        "..",
        "../../etc/passwd",
        "./a",
        "a/./b",
        "a b",
        " ",
        "a+b",
        "a%2Fb",
        "a%b",
        "%",
        "ä/é/ключ/日本",
        "e\u{301}",
        "\u{e9}",
        "\u{202e}rtl",
        "\\",
        "tab\tline\nend",
        "\u{1}\u{7f}",
        "\u{fffe}",
        "a?b#c&d=e",
        "<x>\"'&amp;",
        "~-._*!()';:@,=$",
        long.as_str(),
    ];
    for key in keys {
        scene.put(key, key.as_bytes()).await;
        assert_eq!(scene.cluster.object("bucket", key).await.0, key.as_bytes(), "{key:?}");
        assert_eq!(scene.get(key).await.ok().body, key.as_bytes(), "{key:?}");
    }
    assert_eq!(scene.cluster.object_count().await, keys.len() as u64);
    // Both ways to write a character in a path name one key: the path that was verified is the path that is used.
    let mut raw = Ask::new("GET", "/bucket/a+b");
    raw.path = "/bucket/a+b".to_owned();
    assert_eq!(scene.ask(raw).await.ok().body, b"a+b");
    let mut lower = Ask::new("GET", "/bucket/x");
    lower.path = "/bucket/a%2fb".to_owned();
    assert_ne!(scene.ask(lower).await.status, 200, "a path that was signed otherwise than it is written");
    // Listed, encoded and not, in the order of the bytes.
    let mut sorted = keys.to_vec();
    sorted.sort_by_key(|key| key.as_bytes());
    let listed = scene.ask(Ask::new("GET", "/bucket").query("list-type", "2").query("encoding-type", "url")).await.ok();
    assert_eq!(listed.all("Key"), sorted.iter().map(|key| encode(key, true)).collect::<Vec<_>>());
    let forced = scene.ask(Ask::new("GET", "/bucket").query("list-type", "2")).await.ok();
    assert_eq!(forced.one("EncodingType"), "url", "keys that XML cannot hold");
    for key in keys {
        scene.ask(Ask::new("DELETE", &format!("/bucket/{key}"))).await.expect(204, "");
    }
    assert_eq!(scene.cluster.object_count().await, 0);

    scene.ask(Ask::new("PUT", &format!("/bucket/{long}k")).body("x")).await.expect(400, "KeyTooLongError");
    scene.ask(Ask::new("PUT", "/bucket/a\0b").body("x")).await.expect(400, "InvalidArgument");
    let mut bad = Ask::new("PUT", "/bucket/x");
    bad.path = "/bucket/%ff%fe".to_owned();
    assert_eq!(scene.ask(bad).await.status, 400);
    for name in ["UPPER", "a", "has_underscore", "192.168.0.1", "-dash", "dots..dots", "xn--a"] {
        scene.ask(Ask::new("PUT", &format!("/{name}"))).await.expect(400, "InvalidBucketName");
    }
    assert_eq!(scene.cluster.object_count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_agree_with_the_bytes() {
    let scene = Scene::new().await;
    let body: Vec<u8> = (0..100_000u32).map(|i| (i % 253) as u8).collect();
    scene.put("k", &body).await;
    let range = |text: &str| scene.ask(Ask::new("GET", "/bucket/k").header("range", text));
    for (text, from, to) in [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=99999-", 99_999, 100_000),
        ("bytes=-1", 99_999, 100_000),
        ("bytes=-200000", 0, 100_000),
        ("bytes=50000-9223372036854775807", 50_000, 100_000),
        ("bytes=65535-65536", 65_535, 65_537),
    ] {
        let got = range(text).await;
        assert_eq!(got.status, 206, "{text}");
        assert!(got.body == body[from..to], "{text}");
        assert_eq!(got.header("content-range").unwrap(), format!("bytes {from}-{}/100000", to - 1));
        assert_eq!(got.header("content-length").unwrap(), (to - from).to_string());
    }
    for text in ["bytes=100000-", "bytes=100000-100001", "bytes=-0"] {
        let got = range(text).await.expect(416, "InvalidRange");
        assert_eq!(got.header("content-range").as_deref(), Some("bytes */100000"));
    }
    scene.put("empty", b"").await;
    for text in ["bytes=0-", "bytes=-5", "bytes=0-0"] {
        scene.ask(Ask::new("GET", "/bucket/empty").header("range", text)).await.expect(416, "InvalidRange");
    }
    assert_eq!(scene.get("empty").await.ok().header("content-length").as_deref(), Some("0"));
    let head = scene.ask(Ask::new("HEAD", "/bucket/k").header("range", "bytes=0-9")).await;
    assert_eq!((head.status, head.header("content-length").as_deref()), (206, Some("10")));
    // A resumed download never mixes two objects.
    scene
        .ask(Ask::new("GET", "/bucket/k").header("range", "bytes=5-").header("if-match", "\"00\""))
        .await
        .expect(412, "PreconditionFailed");
    let other = scene.ask(Ask::new("GET", "/bucket/k").header("range", "bytes=5-").header("if-range", "\"00\"")).await;
    assert_eq!((other.status, other.body.len()), (200, 100_000));
    let same = scene
        .ask(
            Ask::new("GET", "/bucket/k")
                .header("range", "bytes=5-")
                .header("if-range", &format!("\"{}\"", md5_hex(&body))),
        )
        .await;
    assert_eq!((same.status, same.body.len()), (206, 99_995));
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_of_reads_and_writes_hold() {
    let scene = Scene::new().await;
    let etag = scene.put("k", b"one").await.header("etag").unwrap();
    scene.cluster.touch("bucket", "k", 1_700_000_000_500).await; // Tue, 14 Nov 2023 22:13:20 GMT
    let get = |name: &str, value: &str| scene.ask(Ask::new("GET", "/bucket/k").header(name, value));
    get("if-match", &etag).await.ok();
    get("if-match", etag.trim_matches('"')).await.ok();
    get("if-match", "*").await.ok();
    get("if-match", "\"other\"").await.expect(412, "PreconditionFailed");
    let unchanged = get("if-none-match", &etag).await;
    assert_eq!((unchanged.status, unchanged.header("etag"), unchanged.body.len()), (304, Some(etag.clone()), 0));
    assert!(unchanged.header("last-modified").is_some());
    get("if-none-match", "\"other\"").await.ok();
    assert_eq!(get("if-modified-since", "Tue, 14 Nov 2023 22:13:20 GMT").await.status, 304);
    get("if-modified-since", "Tue, 14 Nov 2023 22:13:19 GMT").await.ok();
    get("if-unmodified-since", "Tue, 14 Nov 2023 22:13:20 GMT").await.ok();
    get("if-unmodified-since", "Tue, 14 Nov 2023 22:13:19 GMT").await.expect(412, "PreconditionFailed");

    let put = |name: &str, value: &str| scene.ask(Ask::new("PUT", "/bucket/k").header(name, value).body("two"));
    put("if-none-match", "*").await.expect(412, "PreconditionFailed");
    put("if-match", "\"other\"").await.expect(412, "PreconditionFailed");
    put("if-none-match", "\"other\"").await.expect(501, "NotImplemented");
    assert_eq!(scene.get("k").await.body, b"one");
    put("if-match", &etag).await.ok();
    assert_eq!(scene.get("k").await.body, b"two");
    scene.ask(Ask::new("PUT", "/bucket/new").header("if-match", &etag).body("x")).await.expect(404, "NoSuchKey");
    scene.ask(Ask::new("PUT", "/bucket/new").header("if-none-match", "*").body("x")).await.ok();
    scene
        .ask(Ask::new("DELETE", "/bucket/new").header("if-match", "\"other\""))
        .await
        .expect(412, "PreconditionFailed");
    scene.ask(Ask::new("DELETE", "/bucket/new").header("if-match", "*")).await.ok();

    // One winner of many.
    let race =
        (0..20).map(|n| scene.ask(Ask::new("PUT", "/bucket/race").header("if-none-match", "*").body(format!("{n}"))));
    let won: Vec<Got> = futures::future::join_all(race).await.into_iter().filter(|got| got.status == 200).collect();
    assert_eq!(won.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_and_metadata_come_back() {
    let scene = Scene::new().await;
    let put = Ask::new("PUT", "/bucket/k")
        .header("content-type", "text/x-test; a=b")
        .header("cache-control", "no-cache")
        .header("content-disposition", "attachment; filename=\"a b\"")
        .header("content-encoding", "aws-chunked,gzip")
        .header("content-language", "de")
        .header("expires", "Thu, 01 Dec 2044 16:00:00 GMT")
        .header("x-amz-meta-plain", "value")
        .header("x-amz-meta-utf", "Grüße 日本")
        .header("x-amz-storage-class", "wide")
        .header("x-amz-tagging", "a=1&b=c+d")
        .header("x-amz-acl", "private")
        .body("x");
    scene.ask(put).await.ok();
    let got = scene.get("k").await.ok();
    for (name, value) in [
        ("content-type", "text/x-test; a=b"),
        ("cache-control", "no-cache"),
        ("content-disposition", "attachment; filename=\"a b\""),
        ("content-encoding", "gzip"),
        ("content-language", "de"),
        ("expires", "Thu, 01 Dec 2044 16:00:00 GMT"),
        ("x-amz-meta-plain", "value"),
        ("x-amz-meta-utf", "Grüße 日本"),
        ("x-amz-storage-class", "wide"),
        ("x-amz-tagging-count", "2"),
        ("accept-ranges", "bytes"),
    ] {
        assert_eq!(got.header(name).as_deref(), Some(value), "{name}");
    }
    let tags = scene.ask(Ask::new("GET", "/bucket/k").query("tagging", "")).await.ok();
    assert_eq!((tags.all("Key"), tags.all("Value")), (vec!["a".into(), "b".into()], vec!["1".into(), "c d".into()]));
    let other =
        Ask::new("GET", "/bucket/k").query("response-content-type", "a/b").query("response-cache-control", "max-age=1");
    let other = scene.raw(&other.presigned(&scene.host(), 60, &[]), false).await.ok();
    assert_eq!(
        (other.header("content-type").as_deref(), other.header("cache-control").as_deref()),
        (Some("a/b"), Some("max-age=1"))
    );

    let refuse = |name: &str, value: &str| scene.ask(Ask::new("PUT", "/bucket/no").header(name, value).body("x"));
    refuse("x-amz-storage-class", "GLACIER").await.expect(400, "InvalidStorageClass");
    refuse("x-amz-acl", "public-read").await.expect(400, "AccessControlListNotSupported");
    refuse("x-amz-grant-read", "id=1").await.expect(400, "AccessControlListNotSupported");
    refuse("x-amz-server-side-encryption", "AES256").await.expect(501, "NotImplemented");
    refuse("x-amz-server-side-encryption-customer-algorithm", "AES256").await.expect(501, "NotImplemented");
    refuse("x-amz-object-lock-mode", "COMPLIANCE").await.expect(400, "InvalidRequest");
    refuse("x-amz-expected-bucket-owner", "000000000002").await.expect(403, "AccessDenied");
    refuse("x-amz-meta-a", &"x".repeat(2048)).await.expect(400, "MetadataTooLarge");
    assert_eq!(scene.cluster.object_count().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_copy_and_refuse_what_would_change_nothing() {
    let scene = Scene::new().await;
    let body = vec![7u8; 150_000];
    scene
        .ask(
            Ask::new("PUT", "/bucket/a ä").header("x-amz-meta-m", "1").header("content-type", "t/t").body(body.clone()),
        )
        .await
        .ok();
    let source = encode("/bucket/a ä", true);
    let copy = |to: &str| Ask::new("PUT", to).header("x-amz-copy-source", &source);
    let got = scene.ask(copy("/bucket/b")).await.ok();
    assert_eq!(got.one("ETag").replace("&quot;", "\""), format!("\"{}\"", md5_hex(&body)));
    let copied = scene.get("b").await.ok();
    assert!(copied.body == body);
    assert_eq!(
        (copied.header("x-amz-meta-m").as_deref(), copied.header("content-type").as_deref()),
        (Some("1"), Some("t/t"))
    );
    scene.ask(copy("/bucket/a ä")).await.expect(400, "InvalidRequest");
    scene.ask(copy("/bucket/a ä").header("x-amz-metadata-directive", "REPLACE").header("x-amz-meta-m", "2")).await.ok();
    let replaced = scene.get("a ä").await.ok();
    assert!(replaced.body == body);
    assert_eq!(
        (replaced.header("x-amz-meta-m").as_deref(), replaced.header("content-type").as_deref()),
        (Some("2"), Some("binary/octet-stream"))
    );
    scene.ask(copy("/bucket/c").header("x-amz-copy-source-if-match", "\"no\"")).await.expect(412, "PreconditionFailed");
    scene
        .ask(copy("/bucket/c").header("x-amz-copy-source-if-none-match", &md5_hex(&body)))
        .await
        .expect(412, "PreconditionFailed");
    scene.ask(copy("/bucket/b").header("if-none-match", "*")).await.expect(412, "PreconditionFailed");
    scene.ask(copy("/bucket/c").header("x-amz-checksum-algorithm", "SHA256")).await.ok();
    let head = scene.ask(Ask::new("HEAD", "/bucket/c").header("x-amz-checksum-mode", "ENABLED")).await.ok();
    assert_eq!(head.header("x-amz-checksum-sha256"), Some(super::client::checksum(ChecksumAlgorithm::Sha256, &body)));
    let absent = Ask::new("PUT", "/bucket/d").header("x-amz-copy-source", "bucket/none");
    scene.ask(absent).await.expect(404, "NoSuchKey");
}

fn delete_body(keys: &[&str], quiet: bool) -> String {
    let objects: String = keys.iter().map(|key| format!("<Object><Key>{key}</Key></Object>")).collect();
    format!("<Delete><Quiet>{quiet}</Quiet>{objects}</Delete>")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_deletes_with_any_checksum_or_none() {
    let scene = Scene::new().await;
    let ask = |body: &str| Ask::new("POST", "/bucket").query("delete", "").body(body);
    let md5 = |body: &str| b64(&hex::decode(md5_hex(body.as_bytes())).unwrap());
    let checksum = |algorithm, body: &str| super::client::checksum(algorithm, body.as_bytes());
    let body = delete_body(&["a", "never-there"], false);
    for checksums in [
        vec![],
        vec![("content-md5", md5(&body))],
        vec![
            ("x-amz-checksum-crc32", checksum(ChecksumAlgorithm::Crc32, &body)),
            ("x-amz-sdk-checksum-algorithm", "CRC32".to_owned()),
        ],
        vec![("content-md5", md5(&body)), ("x-amz-checksum-sha256", checksum(ChecksumAlgorithm::Sha256, &body))],
    ] {
        scene.put("a", b"x").await;
        let request = checksums.iter().fold(ask(&body), |ask, (name, value)| ask.header(name, value));
        let got = scene.ask(request).await.ok();
        assert_eq!(got.all("Key"), ["a", "never-there"], "{checksums:?}: {}", got.text());
        assert_eq!(scene.cluster.object_count().await, 0);
    }
    scene.put("a", b"x").await;
    scene.ask(ask(&body).header("content-md5", &md5("other"))).await.expect(400, "BadDigest");
    scene
        .ask(ask(&body).header("x-amz-checksum-crc32", &checksum(ChecksumAlgorithm::Crc32, "other")))
        .await
        .expect(400, "BadDigest");
    scene.ask(ask(&body).header("content-md5", "short")).await.expect(400, "InvalidDigest");
    let (mut wire, _) = ask(&body).signed(&scene.host());
    *wire.last_mut().unwrap() = b' ';
    scene.raw(&wire, false).await.expect(400, "XAmzContentSHA256Mismatch");
    assert_eq!(scene.cluster.object_count().await, 1, "nothing was deleted by a body that is not the signed one");

    let quiet = scene.ask(ask(&delete_body(&["a"], true))).await.ok();
    assert_eq!(quiet.all("Key"), Vec::<String>::new());
    let long = "k".repeat(1025);
    let errors = scene.ask(ask(&delete_body(&["fine", &long], true))).await.ok();
    assert_eq!(errors.all("Code"), ["KeyTooLongError"]);
    let many: Vec<String> = (0..1001).map(|n| format!("k{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    scene.ask(ask(&delete_body(&many[..1000], true))).await.ok();
    scene.ask(ask(&delete_body(&many, true))).await.expect(400, "MalformedXML");
    scene.ask(ask("<Delete>")).await.expect(400, "MalformedXML");
    scene
        .ask(ask("<!DOCTYPE x [<!ENTITY e \"a\">]><Delete><Object><Key>&e;</Key></Object></Delete>"))
        .await
        .expect(400, "MalformedXML");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_never_deletes_what_may_be_committed() {
    let scene = Scene::new().await;
    let cluster = &scene.cluster;
    let (one, two) = (vec![1u8; 100_000], vec![2u8; 100_000]);
    cluster.peers.state().lose_answers = true;
    scene.ask(Ask::new("PUT", "/bucket/k").body(one.clone())).await.expect(503, "ServiceUnavailable");
    cluster.peers.state().lose_answers = false;
    assert_eq!((cluster.dropped_chunks(), cluster.chunk_count()), (0, 3));
    assert!(scene.get("k").await.ok().body == one);
    scene
        .ask(Ask::new("PUT", "/bucket/k").header("if-none-match", "*").body(two))
        .await
        .expect(412, "PreconditionFailed");
    assert_eq!(cluster.dropped_chunks(), 3, "what was surely refused goes");
    cluster.until_chunks(3).await;
    assert!(scene.get("k").await.ok().body == one);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_makes_no_sense_never_deletes_what_may_be_committed() {
    let scene = Scene::new().await;
    let cluster = &scene.cluster;
    let garbled = |reply: Option<Bytes>| cluster.peers.state().garbled_reply = reply;
    let odd = ShardResponse::Reply(Reply::Done).encode().unwrap();
    let answer = ShardResponse::Answer(Answer::NoSuchKey).encode().unwrap();
    for (count, reply) in [odd, answer, Bytes::from_static(b"\xff of a later version")].into_iter().enumerate() {
        let (key, body) = (format!("k{count}"), vec![count as u8; 100_000]);
        garbled(Some(reply));
        let got = scene.ask(Ask::new("PUT", &format!("/bucket/{key}")).body(body.clone())).await;
        assert!(got.status >= 500, "{}", got.text());
        garbled(None);
        assert_eq!((cluster.dropped_chunks(), cluster.chunk_count()), (0, 3 * (count + 1)));
        assert!(scene.get(&key).await.ok().body == body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn buckets_and_probes_answer_as_clients_expect() {
    let scene = Scene::new().await;
    let head = scene.ask(Ask::new("HEAD", "/bucket")).await.ok();
    assert_eq!(head.header("x-amz-bucket-region").as_deref(), Some(super::client::REGION));
    let missing = scene.ask(Ask::new("HEAD", "/no-such-bucket")).await;
    assert_eq!((missing.status, missing.body.len()), (404, 0));
    scene.ask(Ask::new("PUT", "/bucket")).await.expect(409, "BucketAlreadyOwnedByYou");
    scene.ask(Ask::new("GET", "/no-such-bucket/key")).await.expect(404, "NoSuchBucket");
    scene.ask(Ask::new("GET", "/bucket/key")).await.expect(404, "NoSuchKey");
    scene.ask(Ask::new("PUT", "/no-such-bucket/key").body("x")).await.expect(404, "NoSuchBucket");
    for (probe, status, code) in [
        ("object-lock", 404, "ObjectLockConfigurationNotFoundError"),
        ("lifecycle", 404, "NoSuchLifecycleConfiguration"),
        ("policy", 404, "NoSuchBucketPolicy"),
        ("cors", 404, "NoSuchCORSConfiguration"),
        ("tagging", 404, "NoSuchTagSet"),
        ("encryption", 404, "ServerSideEncryptionConfigurationNotFoundError"),
    ] {
        scene.ask(Ask::new("GET", "/bucket").query(probe, "")).await.expect(status, code);
        scene.ask(Ask::new("GET", "/no-such-bucket").query(probe, "")).await.expect(404, "NoSuchBucket");
    }
    let versioning = scene.ask(Ask::new("GET", "/bucket").query("versioning", "")).await.ok();
    assert_eq!(versioning.all("Status"), Vec::<String>::new());
    let acl = scene.ask(Ask::new("GET", "/bucket").query("acl", "")).await.ok();
    assert_eq!(acl.one("Permission"), "FULL_CONTROL");
    scene.ask(Ask::new("PUT", "/bucket").query("acl", "").header("x-amz-acl", "private")).await.ok();
    scene
        .ask(Ask::new("PUT", "/bucket").query("acl", "").header("x-amz-acl", "public-read"))
        .await
        .expect(400, "AccessControlListNotSupported");
    scene
        .ask(
            Ask::new("PUT", "/bucket")
                .query("versioning", "")
                .body("<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"),
        )
        .await
        .expect(501, "NotImplemented");
    scene.ask(Ask::new("PUT", "/another")).await.ok();
    assert_eq!(scene.ask(Ask::new("GET", "/")).await.ok().all("Name"), ["another", "bucket"]);
    let constraint = |region: &str| {
        format!(
            "<CreateBucketConfiguration><LocationConstraint>{region}</LocationConstraint></CreateBucketConfiguration>"
        )
    };
    scene.ask(Ask::new("PUT", "/third").body(constraint("mars-1"))).await.expect(400, "InvalidLocationConstraint");
    scene.ask(Ask::new("PUT", "/third").body(constraint(super::client::REGION))).await.ok();
    scene.put("k", b"x").await;
    scene.ask(Ask::new("DELETE", "/bucket")).await.expect(409, "BucketNotEmpty");
    scene.ask(Ask::new("DELETE", "/bucket/k")).await.ok();
    scene.ask(Ask::new("DELETE", "/bucket")).await.expect(204, "");
    scene.ask(Ask::new("DELETE", "/bucket")).await.expect(404, "NoSuchBucket");
    // A query parameter that names another operation changes nothing.
    scene.ask(Ask::new("GET", "/third").query("x-id", "DeleteBucket")).await.ok();
    scene.ask(Ask::new("HEAD", "/third")).await.ok();
}
