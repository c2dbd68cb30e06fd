use super::client::{b64, checksum, md5_hex, now, Ask, Scene, SECRET};
use granary_meta::record::ChecksumAlgorithm;

const CRC32: &str = "x-amz-checksum-crc32";

fn data(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_payload_mode_stores_the_same_bytes() {
    let scene = Scene::new().await;
    for len in [0, 1, 1000, 200_000, 2_500_000] {
        let body = data(len);
        let host = scene.host();
        let check = async |mode: &str| {
            let (stored, record) = scene.cluster.object("bucket", "k").await;
            assert!(stored == body, "{mode}, {len} bytes");
            assert_eq!(record.etag, md5_hex(&body), "{mode}");
            assert!(!record.meta.headers.iter().any(|(name, _)| name == "content-encoding"), "{mode}");
        };
        scene.put("k", &body).await;
        check("hex").await;
        scene.ask(Ask::new("PUT", "/bucket/k").body(body.clone()).payload("UNSIGNED-PAYLOAD")).await.ok();
        check("unsigned").await;
        scene.raw(&Ask::new("PUT", "/bucket/k").presigned(&host, 60, &[]), false).await.ok();
        scene.raw(&Ask::new("PUT", "/bucket/k").body(body.clone()).presigned(&host, 60, &[]), false).await.ok();
        check("presigned").await;
        scene.raw(&Ask::new("PUT", "/bucket/k").chunked(&host, &body, 65_536, None), false).await.ok();
        check("signed chunks").await;
        let crc = checksum(ChecksumAlgorithm::Crc32c, &body);
        let trailer = ("x-amz-checksum-crc32c", crc.as_str());
        let got =
            scene.raw(&Ask::new("PUT", "/bucket/k").chunked(&host, &body, 1 << 20, Some(trailer)), false).await.ok();
        check("signed chunks and trailer").await;
        assert_eq!(got.header("x-amz-checksum-crc32c"), Some(crc.clone()));
        let got =
            scene.raw(&Ask::new("PUT", "/bucket/k").unsigned_trailer(&host, &body, trailer, true), false).await.ok();
        check("unsigned frames and trailer").await;
        assert_eq!(got.header("x-amz-checksum-crc32c"), Some(crc));
    }
    assert_eq!(scene.cluster.dropped_chunks(), 0, "everything was committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_signatures_are_refused_and_store_nothing() {
    let scene = Scene::new().await;
    let put = || Ask::new("PUT", "/bucket/k").body("payload").header("x-amz-meta-a", "b");
    let host = scene.host();
    scene.ask(Ask { secret: format!("{SECRET}x"), ..put() }).await.expect(403, "SignatureDoesNotMatch");
    scene.ask(Ask { access: "AKIANOBODY".to_owned(), ..put() }).await.expect(403, "InvalidAccessKeyId");
    scene.ask(Ask { time: now() - 16 * 60, ..put() }).await.expect(403, "RequestTimeTooSkewed");
    scene.ask(Ask { time: now() + 16 * 60, ..put() }).await.expect(403, "RequestTimeTooSkewed");
    let wrong_region =
        scene.ask(Ask { region: "mars-1".to_owned(), ..put() }).await.expect(400, "AuthorizationHeaderMalformed");
    assert_eq!(wrong_region.one("Region"), super::client::REGION);
    scene.ask(Ask { skip_signing: vec!["host"], ..put() }).await.expect(403, "AccessDenied");
    scene.ask(Ask { skip_signing: vec!["x-amz-meta-a"], ..put() }).await.expect(403, "AccessDenied");
    scene.ask(put().header("x-amz-security-token", "t")).await.expect(400, "InvalidToken");

    let (mut wire, signature) = put().signed(&host);
    let at = wire.windows(signature.len()).position(|window| window == signature.as_bytes()).unwrap();
    wire[at] = if wire[at] == b'0' { b'1' } else { b'0' };
    scene.raw(&wire, false).await.expect(403, "SignatureDoesNotMatch");

    // Another body than was signed for; another path; anonymous; two answers to who one is.
    let (mut wire, _) = put().signed(&host);
    *wire.last_mut().unwrap() ^= 1;
    scene.raw(&wire, false).await.expect(400, "XAmzContentSHA256Mismatch");
    let text = String::from_utf8(put().signed(&host).0).unwrap();
    scene.raw(text.replacen("/bucket/k", "/bucket/l", 1).as_bytes(), false).await.expect(403, "SignatureDoesNotMatch");
    let anonymous = format!("PUT /bucket/k HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1\r\n\r\nx");
    scene.raw(anonymous.as_bytes(), false).await.expect(403, "AccessDenied");
    let line = text.lines().find(|line| line.starts_with("authorization")).unwrap();
    scene
        .raw(text.replacen(line, &format!("{line}\r\n{line}"), 1).as_bytes(), false)
        .await
        .expect(400, "InvalidArgument");
    scene.raw(&put().query("X-Amz-Signature", "00").signed(&host).0, false).await.expect(400, "InvalidArgument");
    let v2 = format!(
        "PUT /bucket/k HTTP/1.1\r\nhost: {host}\r\nauthorization: AWS {}:c2ln\r\ncontent-length: 1\r\n\r\nx",
        super::client::ACCESS
    );
    assert_eq!(scene.raw(v2.as_bytes(), false).await.status, 403);

    // Presigned: expired, unsigned additions, changed.
    let presigned = |ask: Ask, expires, extra: &[(&str, &str)]| ask.presigned(&host, expires, extra);
    scene.raw(&presigned(Ask { time: now() - 100, ..put() }, 50, &[]), false).await.expect(403, "AccessDenied");
    assert_eq!(scene.raw(&presigned(put(), 604_801, &[]), false).await.status, 400);
    for extra in [
        ("x-amz-copy-source", "/bucket/other"),
        ("x-amz-acl", "private"),
        ("x-amz-meta-x", "y"),
        ("x-amz-storage-class", "wide"),
    ] {
        scene.raw(&presigned(put(), 60, &[extra]), false).await.expect(403, "AccessDenied");
    }
    let text = String::from_utf8(presigned(put(), 60, &[])).unwrap();
    scene
        .raw(text.replacen("X-Amz-Expires=60", "X-Amz-Expires=6000", 1).as_bytes(), false)
        .await
        .expect(403, "SignatureDoesNotMatch");
    assert_eq!(scene.cluster.object_count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_frames_and_trailers_store_nothing() {
    let scene = Scene::new().await;
    let host = scene.host();
    let body = data(300_000);
    let crc = checksum(ChecksumAlgorithm::Crc32, &body);
    let wrong = b64(&[0, 1, 2, 3]);
    let ask = || Ask::new("PUT", "/bucket/k");

    let signed = ask().chunked(&host, &body, 65_536, None);
    // One bit of the data, and a last chunk that never comes.
    let mut flipped = signed.clone();
    let middle = flipped.len() - 100_000;
    flipped[middle] ^= 1;
    scene.raw(&flipped, false).await.expect(403, "SignatureDoesNotMatch");
    // 86 bytes are the last chunk; three are an end in the middle of it.
    for cut in [86, 3, 40_000] {
        let ask = Ask { cut, ..ask() };
        scene.raw(&ask.chunked(&host, &body, 65_536, None), false).await.expect(400, "IncompleteBody");
    }
    for trailer in [(CRC32, wrong.as_str()), (CRC32, "no base64")] {
        let got = scene.raw(&ask().chunked(&host, &body, 65_536, Some(trailer)), false).await;
        assert_eq!(got.status, 400, "{}", got.text());
        let got = scene.raw(&ask().unsigned_trailer(&host, &body, trailer, true), false).await;
        assert_eq!(got.status, 400, "{}", got.text());
    }
    scene.raw(&ask().unsigned_trailer(&host, &body, (CRC32, &wrong), true), false).await.expect(400, "BadDigest");
    let got = scene.raw(&ask().unsigned_trailer(&host, &body, (CRC32, &crc), false), false).await;
    assert!(["IncompleteBody", "MalformedTrailerError"].contains(&got.one("Code").as_str()), "{}", got.text());

    // The signature of a trailer counts: a right checksum under a wrong signature is refused.
    let mut trailer = ask().chunked(&host, &body, 65_536, Some((CRC32, &crc)));
    let at = trailer.len() - 10;
    trailer[at] = if trailer[at] == b'0' { b'1' } else { b'0' };
    scene.raw(&trailer, false).await.expect(403, "SignatureDoesNotMatch");

    // An announced trailer that is not there.
    let text = "x-amz-checksum-sha1";
    let missing = ask().header("x-amz-trailer", text);
    let mut missing = Ask { payload: "STREAMING-UNSIGNED-PAYLOAD-TRAILER".to_owned(), ..missing };
    missing.headers.push(("x-amz-decoded-content-length".to_owned(), "3".to_owned()));
    missing.body = b"3\r\nabc\r\n0\r\n\r\n".to_vec();
    scene.ask(missing.clone()).await.expect(400, "MalformedTrailerError");

    // A decoded length that is not what comes.
    for length in ["2", "4"] {
        let mut lying = missing.clone();
        lying.headers.retain(|(name, _)| name != "x-amz-decoded-content-length");
        lying.headers.push(("x-amz-decoded-content-length".to_owned(), length.to_owned()));
        scene.ask(lying).await.expect(400, "IncompleteBody");
    }
    // No length at all.
    let mut no_length =
        ask().payload("UNSIGNED-PAYLOAD").header("transfer-encoding", "chunked").body(&b"1\r\nx\r\n0\r\n\r\n"[..]);
    no_length.send_length = false;
    scene.ask(no_length).await.expect(411, "MissingContentLength");
    assert_eq!(scene.cluster.object_count().await, 0);
    scene.cluster.until_chunks(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_are_verified_kept_and_given_back() {
    let scene = Scene::new().await;
    for body in [data(10), data(3_000_000)] {
        for (algorithm, name) in [
            (ChecksumAlgorithm::Crc32, "crc32"),
            (ChecksumAlgorithm::Crc32c, "crc32c"),
            (ChecksumAlgorithm::Crc64Nvme, "crc64nvme"),
            (ChecksumAlgorithm::Sha1, "sha1"),
            (ChecksumAlgorithm::Sha256, "sha256"),
        ] {
            let header = format!("x-amz-checksum-{name}");
            let good = checksum(algorithm, &body);
            let put = |value: &str| Ask::new("PUT", "/bucket/k").body(body.clone()).header(&header, value);
            let got = scene.ask(put(&good)).await.ok();
            assert_eq!(
                (got.header(&header), got.header("x-amz-checksum-type").as_deref()),
                (Some(good.clone()), Some("FULL_OBJECT"))
            );
            scene.ask(put(&checksum(algorithm, b"other"))).await.expect(400, "BadDigest");
            scene.ask(put("AAAA")).await.expect(400, "InvalidRequest");
            for method in ["GET", "HEAD"] {
                let asked =
                    scene.ask(Ask::new(method, "/bucket/k").header("x-amz-checksum-mode", "ENABLED")).await.ok();
                assert_eq!(asked.header(&header), Some(good.clone()), "{method}");
                assert_eq!(scene.ask(Ask::new(method, "/bucket/k")).await.ok().header(&header), None);
                let ranged =
                    Ask::new(method, "/bucket/k").header("x-amz-checksum-mode", "ENABLED").header("range", "bytes=0-3");
                assert_eq!(scene.ask(ranged).await.ok().header(&header), None, "no whole-object checksum on a 206");
            }
        }
    }
    let put = || Ask::new("PUT", "/bucket/k").body("hello");
    scene.ask(put().header("content-md5", &b64(&[0; 16]))).await.expect(400, "BadDigest");
    scene.ask(put().header("content-md5", "nonsense")).await.expect(400, "InvalidDigest");
    scene.ask(put().header("content-md5", &b64(&hex::decode(md5_hex(b"hello")).unwrap()))).await.ok();
    scene.ask(put().header("x-amz-checksum-sha512", "AA==")).await.expect(400, "InvalidRequest");
    scene.ask(put().header("x-amz-sdk-checksum-algorithm", "CRC32")).await.expect(400, "InvalidRequest");
    let both = put()
        .header(CRC32, &checksum(ChecksumAlgorithm::Crc32, b"hello"))
        .header("x-amz-checksum-sha1", &checksum(ChecksumAlgorithm::Sha1, b"hello"));
    scene.ask(both).await.expect(400, "InvalidRequest");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_location_may_be_asked_for_under_the_first_region_and_nothing_else() {
    let scene = Scene::new().await;
    let first = |ask: Ask| Ask { region: "us-east-1".to_owned(), ..ask };
    let got = scene.ask(first(Ask::new("GET", "/bucket").query("location", ""))).await.ok();
    assert!(got.text().contains(super::client::REGION), "{}", got.text());
    scene.ask(first(Ask::new("GET", "/bucket"))).await.expect(400, "AuthorizationHeaderMalformed");
    scene
        .ask(first(Ask::new("GET", "/bucket/key").query("location", "")))
        .await
        .expect(400, "AuthorizationHeaderMalformed");
    let wrong = Ask { secret: "wrong".to_owned(), ..first(Ask::new("GET", "/bucket").query("location", "")) };
    scene.ask(wrong).await.expect(403, "SignatureDoesNotMatch");
}
