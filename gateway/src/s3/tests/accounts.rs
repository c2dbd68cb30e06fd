use super::client::{Ask, Scene};
use crate::s3::AccessKey;
use granary_meta::record::AccountId;

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
