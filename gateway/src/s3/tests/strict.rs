//! Requests that carry what is not understood, over HTTP with right signatures: refused before anything happens.

use super::client::{Ask, Got, Scene};

/// `/bucket/k` holds this before every request, and after every refused one.
const KEPT: &[u8] = b"kept";

async fn scene() -> Scene {
    let scene = Scene::new().await;
    scene.put("k", KEPT).await;
    scene
}

async fn refused(scene: &Scene, ask: Ask, status: u16, code: &str) -> Got {
    let got = scene.ask(ask).await.expect(status, code);
    assert_eq!(scene.get("k").await.ok().body, KEPT);
    assert_eq!(scene.cluster.object_count().await, 1);
    got
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_is_refused_and_replaces_nothing() {
    let scene = scene().await;
    let append = Ask::new("PUT", "/bucket/k").header("x-amz-write-offset-bytes", "4").body("more");
    let got = refused(&scene, append, 501, "NotImplemented").await;
    assert!(got.one("Message").ends_with(": x-amz-write-offset-bytes"), "{}", got.text());
    for name in ["x-amz-copy-source-range", "x-amz-never-heard-of", "content-range", "if-unmodified-since"] {
        let put = Ask::new("PUT", "/bucket/k").header(name, "v").body("more");
        refused(&scene, put, 501, "NotImplemented").await;
    }
    for name in ["if-none-match", "if-unmodified-since", "x-amz-never-heard-of"] {
        refused(&scene, Ask::new("DELETE", "/bucket/k").header(name, "\"v\""), 501, "NotImplemented").await;
    }
    // On the way, not of the request; and others' headers.
    let traced = Ask::new("PUT", "/bucket/k").header("x-amzn-trace-id", "Root=1").header("x-amz-cf-id", "a");
    scene.ask(traced.header("x-forwarded-for", "::1").header("x-other", "b").body(KEPT)).await.ok();
    scene.ask(Ask::new("GET", "/bucket/k").header("x-amz-never-heard-of", "v")).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sub_resource_that_is_not_known_deletes_and_replaces_nothing() {
    let scene = scene().await;
    for name in ["acl", "retention", "legal-hold", "restore", "uploads", "versions", "Tagging", "append"] {
        refused(&scene, Ask::new("DELETE", "/bucket/k").query(name, ""), 405, "MethodNotAllowed").await;
    }
    for (name, value) in [("uploadid", "u"), ("versionid", "null"), ("partNumber", "1"), ("prefix", "k")] {
        refused(&scene, Ask::new("DELETE", "/bucket/k").query(name, value), 400, "InvalidArgument").await;
    }
    refused(&scene, Ask::new("DELETE", "/bucket/k").query("never-heard-of", ""), 501, "NotImplemented").await;
    // An upload id without a part number would replace the object.
    refused(&scene, Ask::new("PUT", "/bucket/k").query("uploadId", "u").body("x"), 400, "InvalidArgument").await;
    refused(&scene, Ask::new("PUT", "/bucket/k").query("partNumber", "1").body("x"), 400, "InvalidArgument").await;
    refused(&scene, Ask::new("PUT", "/bucket/k").query("torrent", "").body("x"), 405, "MethodNotAllowed").await;
    refused(&scene, Ask::new("PUT", "/new-bucket").query("versions", ""), 405, "MethodNotAllowed").await;
    scene.ask(Ask::new("HEAD", "/new-bucket")).await.expect(404, "");
    scene.ask(Ask::new("DELETE", "/bucket").query("force", "true")).await.expect(405, "MethodNotAllowed");

    scene.ask(Ask::new("GET", "/bucket/k").query("never-heard-of", "")).await.ok();
    scene.ask(Ask::new("PUT", "/bucket/k").query("x-id", "PutObject").query("trace", "5").body(KEPT)).await.ok();
    scene.ask(Ask::new("DELETE", "/bucket/k").query("x-id", "DeleteObject").query("versionId", "null")).await.ok();
    assert_eq!(scene.cluster.object_count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_presigned_is_done_or_refused_and_never_dropped() {
    let scene = scene().await;
    let host = scene.host();
    let put = || Ask::new("PUT", "/bucket/k").body("more");
    for (name, value) in [
        ("x-amz-meta-color", "red"),
        ("X-Amz-Tagging", "a=b"),
        ("x-amz-server-side-encryption", "AES256"),
        ("x-amz-object-lock-mode", "COMPLIANCE"),
        ("x-amz-storage-class", "GLACIER"),
        ("x-amz-acl", "public-read"),
        ("x-amz-expected-bucket-owner", "999999999999"),
    ] {
        let got = scene.raw(&put().query(name, value).presigned(&host, 60, &[]), false).await;
        got.expect(501, "NotImplemented");
        assert_eq!(scene.get("k").await.ok().body, KEPT, "{name}");
    }
    let harmless = put().query("x-amz-acl", "private").query("x-id", "PutObject");
    scene.raw(&harmless.presigned(&host, 60, &[]), false).await.ok();
    assert_eq!(scene.get("k").await.ok().body, b"more");
    let get = Ask::new("GET", "/bucket/k").query("x-amz-checksum-mode", "ENABLED");
    scene.raw(&get.presigned(&host, 60, &[]), false).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_a_cdata_section_deletes_no_other_key() {
    let scene = scene().await;
    let delete = |key: &str| {
        let xml = format!("<Delete><Object><Key>{key}</Key></Object></Delete>");
        Ask::new("POST", "/bucket").query("delete", "").body(xml)
    };
    // Without its CDATA section the key is `k`.
    refused(&scene, delete("k<![CDATA[/2026]]>"), 400, "MalformedXML").await;
    refused(&scene, delete("<![CDATA[j]]>k"), 400, "MalformedXML").await;
    scene.ask(delete("k<!-- a comment is no part of a text -->")).await.ok();
    assert_eq!(scene.cluster.object_count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_in_other_letters_names_the_same_bucket() {
    let scene = Scene::new().await;
    scene.ask(Ask::new("PUT", "/k")).await.expect(400, "InvalidBucketName");
    scene.ask(Ask::new("PUT", "/other")).await.ok();
    scene.put("other", KEPT).await;
    // By path this would delete the bucket `other`.
    for host in ["BUCKET.s3.test", "bucket.S3.Test", "Bucket.s3.test.", "bucket.s3.test.:9000"] {
        let put = Ask::new("PUT", "/other").body(KEPT).signed(host).0;
        scene.raw(&put, false).await.ok();
        let delete = Ask::new("DELETE", "/other").signed(host).0;
        scene.raw(&delete, false).await.ok();
        scene.get("other").await.expect(404, "NoSuchKey");
        scene.ask(Ask::new("HEAD", "/other")).await.ok();
    }
}
