use super::client::{Ask, Scene};
use crate::s3::AccessKey;
use granary_meta::record::AccountId;
use std::time::Duration;

const OTHER: (&str, &str) = ("AKIAOTHEROTHEROTHER0", "the secret of the other account");

async fn two_accounts() -> Scene {
    let key = AccessKey { secret: OTHER.1.to_owned(), account: AccountId(42) };
    Scene::with(|settings| drop(settings.keys.insert(OTHER.0.to_owned(), key))).await
}

fn by_other(ask: Ask) -> Ask {
    Ask { access: OTHER.0.to_owned(), secret: OTHER.1.to_owned(), ..ask }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_request_makes_belongs_to_the_account_of_its_signer() {
    let scene = two_accounts().await;
    let same = |ask: Ask| ask;
    type Signer = fn(Ask) -> Ask;
    let signers: [(Signer, &str, AccountId); 2] =
        [(same, "mine", AccountId::ROOT), (by_other, "theirs", AccountId(42))];
    for (signed, bucket, account) in signers {
        let ask = |method: &str, path: &str| signed(Ask::new(method, &format!("/{bucket}{path}")));
        let text = format!("{:012}", account.0);
        scene.cluster.take_commands();
        scene.ask(ask("PUT", "")).await.ok();
        let record = scene.cluster.shards.fresh_bucket(bucket).await.unwrap().unwrap();
        assert_eq!(record.owner, account);
        scene.ask(ask("PUT", "/put").body("x")).await.ok();
        scene.ask(ask("PUT", "/copied").header("x-amz-copy-source", &format!("{bucket}/put"))).await.ok();
        let upload = scene.ask(ask("POST", "/parts").query("uploads", "")).await.ok().one("UploadId");
        let listed = scene.ask(ask("GET", "").query("uploads", "")).await.ok();
        assert_eq!(listed.all("ID"), [text.as_str(), text.as_str()], "owner and initiator");
        let part = ask("PUT", "/parts").query("uploadId", &upload).query("partNumber", "1").body("part");
        let etag = scene.ask(part).await.ok().header("etag").unwrap();
        let body = format!(
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part></CompleteMultipartUpload>"
        );
        scene.ask(ask("POST", "/parts").query("uploadId", &upload).body(body)).await.ok();
        for key in ["put", "copied", "parts"] {
            assert_eq!(scene.cluster.object(bucket, key).await.1.owner, account, "{key}");
        }
        let listed = scene.ask(ask("GET", "").query("list-type", "2").query("fetch-owner", "true")).await.ok();
        assert_eq!(listed.all("ID"), [text.as_str(); 3]);
        let acl = scene.ask(ask("GET", "").query("acl", "")).await.ok();
        assert_eq!(acl.all("ID"), [text.as_str(), text.as_str()], "owner and grantee");
        let head = |owner: &str| ask("HEAD", "").header("x-amz-expected-bucket-owner", owner);
        assert_eq!(scene.ask(head(&text)).await.status, 200);
        assert_eq!(scene.ask(head("000000000007")).await.status, 403);
        for key in ["put", "copied", "parts"] {
            scene.ask(ask("DELETE", &format!("/{key}"))).await.expect(204, "");
        }
        scene.ask(ask("DELETE", "")).await.expect(204, "");
        let commands = scene.cluster.take_commands();
        assert!(commands.len() >= 14, "{}", commands.len());
        assert!(commands.iter().all(|request| request.account == account), "{commands:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_buckets_of_another_account_are_out_of_reach() {
    let scene = two_accounts().await;
    scene.put("k", b"mine").await;
    let list = by_other(Ask::new("GET", "/"));
    assert_eq!(scene.ask(list.clone()).await.ok().all("Name"), Vec::<String>::new());
    scene.ask(by_other(Ask::new("PUT", "/theirs"))).await.ok();
    let theirs = scene.ask(list).await.ok();
    assert_eq!((theirs.all("Name"), theirs.all("ID")), (vec!["theirs".to_owned()], vec!["000000000042".to_owned()]));
    assert_eq!(scene.ask(Ask::new("GET", "/")).await.ok().all("Name"), ["bucket"]);

    scene.ask(by_other(Ask::new("PUT", "/bucket"))).await.expect(409, "BucketAlreadyExists");
    for (method, path) in [("GET", "/bucket/k"), ("PUT", "/bucket/k"), ("DELETE", "/bucket/k"), ("GET", "/bucket")] {
        scene.ask(by_other(Ask::new(method, path).body("x"))).await.expect(403, "AccessDenied");
    }
    let copy = Ask::new("PUT", "/theirs/k").header("x-amz-copy-source", "bucket/k");
    scene.ask(by_other(copy)).await.expect(403, "AccessDenied");
    scene.ask(Ask::new("DELETE", "/bucket/k")).await.expect(204, "");
    scene.ask(by_other(Ask::new("DELETE", "/bucket"))).await.expect(403, "AccessDenied");
    scene.ask(Ask::new("DELETE", "/bucket")).await.expect(204, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_buckets_names_no_bucket_of_another_account() {
    let scene = two_accounts().await;
    for name in ["aaa-secret", "mmm-secret", "zzz-secret"] {
        scene.ask(by_other(Ask::new("PUT", &format!("/{name}")))).await.ok();
    }
    for name in ["lll", "nnn"] {
        scene.ask(Ask::new("PUT", &format!("/{name}"))).await.ok();
    }
    let (mut names, mut token) = (Vec::new(), None::<String>);
    loop {
        let ask = Ask::new("GET", "/").query("max-buckets", "1");
        let ask = token.iter().fold(ask, |ask, token| ask.query("continuation-token", token));
        let page = scene.ask(ask).await.ok();
        names.extend(page.all("Name"));
        match page.all("ContinuationToken").pop() {
            Some(next) => {
                assert!(!next.contains("secret"), "{next}");
                token = Some(next);
            }
            None => break,
        }
        assert!(names.len() < 10, "{names:?}");
    }
    assert_eq!(names, ["bucket", "lll", "nnn"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_another_account_gave_up_is_its_new_owners_a_moment_later() {
    let scene = two_accounts().await;
    scene.ask(Ask::new("PUT", "/name")).await.ok();
    scene.ask(Ask::new("HEAD", "/name")).await.ok();
    // Through another gateway: this one's cache of buckets does not hear of it.
    let other = scene.cluster.more_shards();
    other.delete_bucket("name", AccountId::ROOT).await.unwrap();
    other.create_bucket("name", AccountId(42)).await.unwrap();
    // It has just looked the bucket up, and does so again when the moment is over.
    while scene.ask(by_other(Ask::new("PUT", "/name/k").body("x"))).await.status == 403 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    scene.ask(by_other(Ask::new("GET", "/name/k"))).await.ok();
    scene.ask(Ask::new("GET", "/name/k")).await.expect(403, "AccessDenied");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_not_known_under_another_bucket_or_key() {
    let scene = two_accounts().await;
    let upload = scene.ask(Ask::new("POST", "/bucket/parts").query("uploads", "")).await.ok().one("UploadId");
    let part = |path: &str| Ask::new("PUT", path).query("uploadId", &upload).query("partNumber", "1").body("part");
    scene.ask(part("/bucket/parts")).await.ok();
    scene.ask(by_other(Ask::new("PUT", "/theirs"))).await.ok();
    // A checksum that the upload does not ask for: whoever is told of that was told what the upload asks for.
    let wrong = |path: &str| part(path).header("x-amz-checksum-crc32", "AAAAAA==");
    scene.ask(wrong("/bucket/other")).await.expect(404, "NoSuchUpload");
    scene.ask(by_other(wrong("/theirs/parts"))).await.expect(404, "NoSuchUpload");
}
