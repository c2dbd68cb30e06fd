use super::client::{b64, checksum, md5_hex, Ask, Got, Scene};
use granary_meta::record::{AccountId, ChecksumAlgorithm, ExtentRef, ObjectData, PartRecord};
use granary_meta::{Command, Reply};
use granary_placement::id::ExtentId;
use granary_placement::scheme::CodecId;

const MIB: usize = 1024 * 1024;

fn data(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) * 131 % 251) as u8).collect()
}

async fn create(scene: &Scene, headers: &[(&str, &str)]) -> String {
    let ask = headers
        .iter()
        .fold(Ask::new("POST", "/bucket/k").query("uploads", ""), |ask, (name, value)| ask.header(name, value));
    scene.ask(ask).await.ok().one("UploadId")
}

fn part(id: &str, number: usize) -> Ask {
    Ask::new("PUT", "/bucket/k").query("partNumber", &number.to_string()).query("uploadId", id)
}

fn complete(id: &str, parts: &[(usize, &str, &str)]) -> Ask {
    let parts: String = parts
        .iter()
        .map(|(n, etag, more)| format!("<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag>{more}</Part>"))
        .collect();
    Ask::new("POST", "/bucket/k")
        .query("uploadId", id)
        .body(format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>"))
}

fn etag_of(parts: &[&[u8]]) -> String {
    let all: Vec<u8> = parts.iter().flat_map(|part| hex::decode(md5_hex(part)).unwrap()).collect();
    format!("{}-{}", md5_hex(&all), parts.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_in_any_order_and_with_gaps_become_the_object() {
    let scene = Scene::new().await;
    let id = create(&scene, &[("x-amz-meta-m", "v"), ("content-type", "a/b")]).await;
    let (one, two, three) = (data(5 * MIB, 1), data(7 * MIB + 13, 2), data(1, 3));
    scene.ask(part(&id, 9000).body(three.clone())).await.ok();
    scene.ask(part(&id, 2).body("replaced later")).await.ok();
    let got = scene.raw(&part(&id, 2).chunked(&scene.host(), &two, MIB, None), false).await.ok();
    assert_eq!(got.header("etag").unwrap(), format!("\"{}\"", md5_hex(&two)));
    scene.ask(part(&id, 1).body(one.clone())).await.ok();
    scene.ask(part(&id, 17).body("never named")).await.ok();

    let listed = scene.ask(Ask::new("GET", "/bucket/k").query("uploadId", &id).query("max-parts", "2")).await.ok();
    assert_eq!(
        (listed.all("PartNumber"), listed.one("IsTruncated"), listed.one("NextPartNumberMarker")),
        (vec!["1".into(), "2".into()], "true".into(), "2".into())
    );
    let rest =
        scene.ask(Ask::new("GET", "/bucket/k").query("uploadId", &id).query("part-number-marker", "2")).await.ok();
    assert_eq!(rest.all("PartNumber"), ["17", "9000"]);

    let (e1, e2, e3) = (md5_hex(&one), format!("\"{}\"", md5_hex(&two)), format!("&quot;{}&quot;", md5_hex(&three)));
    let named = [(1, e1.as_str(), ""), (2, e2.as_str(), ""), (9000, e3.as_str(), "")];
    let done = scene.ask(complete(&id, &named)).await.ok();
    let etag = etag_of(&[&one, &two, &three]);
    assert_eq!(done.one("ETag").replace("&quot;", "\""), format!("\"{etag}\""));
    // Repeated, it is the same; with other parts it is not.
    assert_eq!(scene.ask(complete(&id, &named)).await.ok().one("ETag"), done.one("ETag"));
    scene.ask(complete(&id, &named[..2])).await.expect(404, "NoSuchUpload");

    let whole = [one.as_slice(), &two, &three].concat();
    let got = scene.ask(Ask::new("GET", "/bucket/k").header("x-amz-checksum-mode", "ENABLED")).await.ok();
    assert!(got.body == whole);
    assert_eq!(
        (got.header("etag"), got.header("x-amz-meta-m").as_deref(), got.header("content-type").as_deref()),
        (Some(format!("\"{etag}\"")), Some("v"), Some("a/b"))
    );
    assert_eq!(
        got.header("x-amz-checksum-crc64nvme"),
        Some(checksum(ChecksumAlgorithm::Crc64Nvme, &whole)),
        "combined from the parts"
    );
    let second = scene.ask(Ask::new("GET", "/bucket/k").query("partNumber", "2")).await;
    assert_eq!((second.status, second.header("x-amz-mp-parts-count").as_deref()), (206, Some("3")));
    assert!(second.body == two);
    scene.ask(Ask::new("GET", "/bucket/k").query("partNumber", "4")).await.expect(416, "InvalidPartNumber");
    let attributes = scene
        .ask(
            Ask::new("GET", "/bucket/k")
                .query("attributes", "")
                .header("x-amz-object-attributes", "ETag,ObjectSize,ObjectParts"),
        )
        .await
        .ok();
    assert_eq!((attributes.one("ETag"), attributes.one("ObjectSize")), (etag, whole.len().to_string()));

    // A copy of it has a plain MD5 again.
    scene.ask(Ask::new("PUT", "/bucket/copy").header("x-amz-copy-source", "bucket/k")).await.ok();
    assert_eq!(scene.get("copy").await.header("etag").unwrap(), format!("\"{}\"", md5_hex(&whole)));
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_of_both_kinds_are_made_and_compared() {
    let scene = Scene::new().await;
    let (one, two) = (data(5 * MIB, 5), data(100, 6));
    let whole = [one.as_slice(), &two].concat();
    for (algorithm, name, kind) in [
        (ChecksumAlgorithm::Crc32, "CRC32", "COMPOSITE"),
        (ChecksumAlgorithm::Crc32, "CRC32", "FULL_OBJECT"),
        (ChecksumAlgorithm::Crc32c, "CRC32C", "FULL_OBJECT"),
        (ChecksumAlgorithm::Crc64Nvme, "CRC64NVME", "FULL_OBJECT"),
        (ChecksumAlgorithm::Sha1, "SHA1", "COMPOSITE"),
        (ChecksumAlgorithm::Sha256, "SHA256", "COMPOSITE"),
    ] {
        let header = format!("x-amz-checksum-{}", name.to_ascii_lowercase());
        let id = create(&scene, &[("x-amz-checksum-algorithm", name), ("x-amz-checksum-type", kind)]).await;
        let (s1, s2) = (checksum(algorithm, &one), checksum(algorithm, &two));
        let got = scene.ask(part(&id, 1).header(&header, &s1).body(one.clone())).await.ok();
        assert_eq!(got.header(&header), Some(s1.clone()));
        // A part without a checksum gets one all the same; one with another algorithm is refused.
        let got = scene.ask(part(&id, 2).body(two.clone())).await.ok();
        assert_eq!(got.header(&header), Some(s2.clone()));
        let other = if algorithm == ChecksumAlgorithm::Sha1 {
            ("x-amz-checksum-crc32", checksum(ChecksumAlgorithm::Crc32, &two))
        } else {
            ("x-amz-checksum-sha1", checksum(ChecksumAlgorithm::Sha1, &two))
        };
        scene.ask(part(&id, 2).header(other.0, &other.1).body(two.clone())).await.expect(400, "InvalidRequest");

        let expected = if kind == "FULL_OBJECT" {
            checksum(algorithm, &whole)
        } else {
            let raw: Vec<u8> = [&one, &two]
                .iter()
                .flat_map(|part| crate::digest::digest(part, &[algorithm]).checksum(algorithm).unwrap().to_vec())
                .collect();
            format!("{}-2", checksum(algorithm, &raw))
        };
        let (e1, e2) = (md5_hex(&one), md5_hex(&two));
        let (good, bad) =
            (format!("<Checksum{name}>{s1}</Checksum{name}>"), format!("<Checksum{name}>{s2}</Checksum{name}>"));
        scene.ask(complete(&id, &[(1, &e1, &bad), (2, &e2, "")])).await.expect(400, "InvalidPart");
        scene
            .ask(complete(&id, &[(1, &e1, ""), (2, &e2, "")]).header(&header, &checksum(algorithm, b"other")))
            .await
            .expect(400, "BadDigest");
        scene
            .ask(complete(&id, &[(1, &e1, ""), (2, &e2, "")]).header("x-amz-mp-object-size", "5"))
            .await
            .expect(400, "InvalidRequest");
        let done = scene.ask(complete(&id, &[(1, &e1, &good), (2, &e2, "")]).header(&header, &expected)).await.ok();
        assert_eq!(
            (done.one(&format!("Checksum{name}")), done.one("ChecksumType")),
            (expected.clone(), kind.to_owned())
        );
        let head = scene.ask(Ask::new("HEAD", "/bucket/k").header("x-amz-checksum-mode", "ENABLED")).await.ok();
        assert_eq!((head.header(&header), head.header("x-amz-checksum-type").as_deref()), (Some(expected), Some(kind)));
    }
    for (name, kind) in [("SHA256", "FULL_OBJECT"), ("CRC64NVME", "COMPOSITE"), ("CRC32", "NONSENSE")] {
        let ask = Ask::new("POST", "/bucket/k")
            .query("uploads", "")
            .header("x-amz-checksum-algorithm", name)
            .header("x-amz-checksum-type", kind);
        scene.ask(ask).await.expect(400, "InvalidRequest");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_completions_are_refused_and_leave_the_upload() {
    let scene = Scene::new().await;
    let id = create(&scene, &[]).await;
    let (small, other) = (md5_hex(b"small"), md5_hex(b"other"));
    scene.ask(part(&id, 1).body("small")).await.ok();
    scene.ask(part(&id, 2).body("other")).await.ok();
    scene.ask(complete(&id, &[])).await.expect(400, "MalformedXML");
    scene.ask(complete(&id, &[(2, &other, ""), (1, &small, "")])).await.expect(400, "InvalidPartOrder");
    scene.ask(complete(&id, &[(1, &small, ""), (1, &small, "")])).await.expect(400, "InvalidPartOrder");
    scene.ask(complete(&id, &[(1, &other, "")])).await.expect(400, "InvalidPart");
    scene.ask(complete(&id, &[(3, &other, "")])).await.expect(400, "InvalidPart");
    scene.ask(complete(&id, &[(1, &small, ""), (2, &other, "")])).await.expect(400, "EntityTooSmall");
    scene.ask(complete(&id, &[(10_001, &small, "")])).await.expect(400, "InvalidArgument");
    for number in ["0", "10001", "-1", "99999999999999999999", "one", ""] {
        let got =
            scene.ask(Ask::new("PUT", "/bucket/k").query("partNumber", number).query("uploadId", &id).body("x")).await;
        assert_eq!(got.status, 400, "part number {number:?}: {}", got.text());
    }
    for bad in ["nonsense", "00000000000000000000000000000000", "../../etc/passwd"] {
        scene.ask(part(bad, 1).body("x")).await.expect(404, "NoSuchUpload");
        scene.ask(complete(bad, &[(1, &small, "")])).await.expect(404, "NoSuchUpload");
    }
    scene.ask(part(&id, 3).header("content-md5", &b64(&[0; 16])).body("x")).await.expect(400, "BadDigest");
    scene.put("k", b"there").await;
    scene.ask(complete(&id, &[(1, &small, "")]).header("if-none-match", "*")).await.expect(412, "PreconditionFailed");
    assert_eq!(scene.get("k").await.body, b"there");
    scene.ask(complete(&id, &[(1, &small, "")])).await.ok();
    assert_eq!(scene.get("k").await.body, b"small");

    let id = create(&scene, &[]).await;
    scene.ask(Ask::new("DELETE", "/bucket/k").query("uploadId", &id)).await.expect(204, "");
    scene.ask(Ask::new("DELETE", "/bucket/k").query("uploadId", &id)).await.expect(404, "NoSuchUpload");
    scene.ask(part(&id, 1).body("x")).await.expect(404, "NoSuchUpload");
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_are_copied_by_range() {
    let scene = Scene::new().await;
    let source = data(6 * MIB, 9);
    scene.put("source", &source).await;
    let id = create(&scene, &[("x-amz-checksum-algorithm", "CRC32C")]).await;
    let copy = |number: usize, range: &str| {
        scene.ask(
            part(&id, number).header("x-amz-copy-source", "/bucket/source").header("x-amz-copy-source-range", range),
        )
    };
    let clean = |got: Got| got.ok().one("ETag").replace("&quot;", "");
    let e1 = clean(copy(1, &format!("bytes=0-{}", 5 * MIB - 1)).await);
    let e2 = clean(copy(2, &format!("bytes={}-{}", 5 * MIB, 6 * MIB - 1)).await);
    copy(3, &format!("bytes=0-{}", 6 * MIB)).await.expect(416, "InvalidRange");
    copy(3, "bytes=5-").await.expect(400, "InvalidArgument");
    scene.ask(complete(&id, &[(1, e1.trim_matches('"'), ""), (2, e2.trim_matches('"'), "")])).await.ok();
    assert!(scene.get("k").await.body == source);
}

/// Ten thousand parts of 5 MiB are 50 GB, so the parts are put into their shard as records whose extents lie nowhere;
/// everything else goes the way of every completion.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_parts_become_an_object_and_one_more_is_refused() {
    let scene = Scene::new().await;
    let id = create(&scene, &[]).await;
    scene.ask(part(&id, 10_001).body("x")).await.expect(400, "InvalidArgument");
    scene.ask(part(&id, 0).body("x")).await.expect(400, "InvalidArgument");
    let shards = scene.cluster.more_shards();
    let bucket = shards.get_bucket("bucket").await.unwrap().unwrap();
    let upload = crate::s3::multipart::parse_upload(&id).unwrap();
    let etag = |n: u64| md5_hex(format!("{n}").as_bytes());
    let put = |n: u64| {
        let size_bytes = 5 * MIB as u64 + n;
        let extent = ExtentRef {
            extent: ExtentId(u128::from(n).to_be_bytes()),
            group: *scene.cluster.objects.disks().map().unwrap().groups.keys().next().unwrap(),
            codec: CodecId::Np16,
            k: 1,
            m: 1,
            unit_bytes: 65_536,
            len_bytes: size_bytes,
            generation: 1,
            slots: vec![0, 1],
        };
        let part = PartRecord {
            number: n as u16,
            size_bytes,
            etag: etag(n),
            modified_ms: 1,
            checksum: None,
            data: ObjectData::Extents(vec![extent]),
        };
        let map_epoch = scene.cluster.objects.disks().map().unwrap().epoch;
        let (key, missing) = ("k".to_owned(), Vec::new());
        let rule_epoch = bucket.rule.epoch;
        let command = Command::PutPart { bucket: bucket.id, key, upload, part, missing, map_epoch, rule_epoch };
        shards.command_for(AccountId::ROOT, bucket.id, "k", command)
    };
    for begin in (1..=10_000).step_by(50) {
        for reply in futures::future::join_all((begin..begin + 50).map(put)).await {
            assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
        }
    }
    let etags: Vec<String> = (1..=10_000).map(etag).collect();
    let mut named: Vec<(usize, &str, &str)> = etags.iter().zip(1..).map(|(etag, n)| (n, etag.as_str(), "")).collect();
    named.push((10_001, "00", ""));
    scene.ask(complete(&id, &named)).await.expect(400, "MalformedXML");
    named.pop();
    let done = scene.ask(complete(&id, &named)).await.ok();
    let all: Vec<u8> = etags.iter().flat_map(|etag| hex::decode(etag).unwrap()).collect();
    assert_eq!(done.one("ETag").replace("&quot;", "").trim_matches('"'), format!("{}-10000", md5_hex(&all)));
    let head = scene.ask(Ask::new("HEAD", "/bucket/k")).await.ok();
    let size = 10_000 * 5 * MIB as u64 + 10_000 * 10_001 / 2;
    assert_eq!(head.header("content-length"), Some(size.to_string()));
    let last = scene.ask(Ask::new("HEAD", "/bucket/k").query("partNumber", "10000")).await;
    assert_eq!((last.status, last.header("content-length")), (206, Some((5 * MIB + 10_000).to_string())));
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_listed_by_key_and_id() {
    let scene = Scene::new().await;
    for key in ["b", "a/1", "a/2", "a/2", "c"] {
        scene.ask(Ask::new("POST", &format!("/bucket/{key}")).query("uploads", "")).await.ok();
    }
    let list = |pairs: Vec<(&str, String)>| {
        let ask = pairs
            .iter()
            .fold(Ask::new("GET", "/bucket").query("uploads", ""), |ask, (name, value)| ask.query(name, value));
        scene.ask(ask)
    };
    let all = list(vec![]).await.ok();
    assert_eq!(all.all("Key"), ["a/1", "a/2", "a/2", "b", "c"]);
    let (mut seen, mut ids, mut marker) = (Vec::new(), Vec::new(), (String::new(), String::new()));
    loop {
        let got = list(vec![("max-uploads", "1".into()), ("key-marker", marker.0), ("upload-id-marker", marker.1)])
            .await
            .ok();
        seen.extend(got.all("Key"));
        ids.extend(got.all("UploadId"));
        if got.one("IsTruncated") == "false" {
            break;
        }
        marker = (got.one("NextKeyMarker"), got.one("NextUploadIdMarker"));
    }
    assert_eq!((seen, ids), (all.all("Key"), all.all("UploadId")));
    let folded = list(vec![("delimiter", "/".into())]).await.ok();
    assert_eq!((folded.all("Key"), folded.all("CommonPrefixes").len()), (vec!["b".to_owned(), "c".to_owned()], 1));
    assert_eq!(list(vec![("prefix", "a/".into())]).await.ok().all("Key").len(), 3);
}
