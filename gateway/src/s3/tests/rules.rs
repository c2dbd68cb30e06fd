use super::client::{Ask, Scene};
use granary_meta::record::BucketRule;
use granary_meta::Command;

/// What arrived: the rule epochs of writes, and 1000 more than the epoch for a rule that was brought to a shard.
fn epochs(scene: &Scene) -> Vec<u64> {
    let epoch = |command: &Command| match command {
        Command::PutObject { rule_epoch, .. }
        | Command::DeleteObject { rule_epoch, .. }
        | Command::CreateUpload { rule_epoch, .. }
        | Command::PutPart { rule_epoch, .. }
        | Command::CompleteUpload { rule_epoch, .. } => *rule_epoch,
        Command::SetBucketRule { rule: BucketRule { epoch, .. }, .. } => 1000 + epoch,
        other => panic!("{other:?}"),
    };
    scene.cluster.take_commands().iter().map(|request| epoch(&request.command)).collect()
}

async fn write_everything(scene: &Scene) {
    scene.put("k", &vec![7u8; 20_000]).await;
    let upload = scene.ask(Ask::new("POST", "/bucket/k").query("uploads", "")).await.ok().one("UploadId");
    let part = Ask::new("PUT", "/bucket/k").query("uploadId", &upload).query("partNumber", "1").body("part");
    let etag = scene.ask(part).await.ok().header("etag").unwrap();
    let body = format!(
        "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part></CompleteMultipartUpload>"
    );
    scene.ask(Ask::new("POST", "/bucket/k").query("uploadId", &upload).body(body)).await.ok();
    scene.ask(Ask::new("DELETE", "/bucket/k")).await.expect(204, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_remembers_an_old_rule_writes_by_the_new_one() {
    let scene = Scene::new().await;
    write_everything(&scene).await;
    let bucket = scene.cluster.begin_versioning("bucket").await;
    // Another gateway tells the shard of the key.
    scene.cluster.shards.push_bucket_rule(bucket.owner, &bucket, "k").await.unwrap();
    scene.cluster.take_commands();
    scene.put("k", b"new").await;
    assert_eq!(epochs(&scene), [0, 1], "refused, looked up and sent again");
    write_everything(&scene).await;
    assert_eq!(epochs(&scene), [1; 5]);
    let usage = scene.cluster.shards.bucket_usage(bucket.id).await.unwrap();
    assert_eq!((usage.objects, usage.versions > 1), (0, true), "the shard kept every version: {usage:?}");
    assert_eq!(scene.cluster.dropped_chunks(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_knows_a_rule_before_the_shard_brings_it_there() {
    let scene = Scene::new().await;
    scene.cluster.begin_versioning("bucket").await;
    let fresh = scene.another().await;
    scene.cluster.take_commands();
    fresh.put("k", b"x").await;
    assert_eq!(epochs(&scene), [1, 1001, 1], "refused, brought and sent again");
    fresh.put("k", b"y").await;
    assert_eq!(epochs(&scene), [1]);
    assert_eq!(scene.get("k").await.ok().body, b"y");
}
