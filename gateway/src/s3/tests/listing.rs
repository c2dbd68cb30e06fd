use super::client::{Ask, Scene};

async fn fill(scene: &Scene, keys: &[&str]) {
    for key in keys {
        scene.put(key, b"x").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_both_versions_give_every_key_once_in_byte_order() {
    let scene = Scene::new().await;
    let keys = ["skel/x", "skel.other/x", "a", "a/b", "a+b", "ä", "Z", "a/c/d", "a/c/e", "z/"];
    fill(&scene, &keys).await;
    let mut sorted = keys.to_vec();
    sorted.sort_by_key(|key| key.as_bytes());
    for size in ["1", "2", "3", "1000", "100000"] {
        let (mut seen, mut token) = (Vec::new(), None::<String>);
        loop {
            let mut ask = Ask::new("GET", "/bucket").query("list-type", "2").query("max-keys", size);
            if let Some(token) = &token {
                ask = ask.query("continuation-token", token);
            }
            let got = scene.ask(ask).await.ok();
            assert_eq!(got.one("KeyCount"), got.all("Key").len().to_string());
            seen.extend(got.all("Key"));
            if got.one("IsTruncated") == "false" {
                assert_eq!(got.one("NextContinuationToken"), "");
                break;
            }
            token = Some(got.one("NextContinuationToken"));
        }
        assert_eq!(seen, sorted, "V2 by {size}");
        let (mut seen, mut marker) = (Vec::<String>::new(), String::new());
        loop {
            let got = scene.ask(Ask::new("GET", "/bucket").query("max-keys", size).query("marker", &marker)).await.ok();
            assert_eq!(got.one("NextMarker"), "", "only under a delimiter");
            seen.extend(got.all("Key"));
            if got.one("IsTruncated") == "false" {
                break;
            }
            marker = seen.last().unwrap().clone();
        }
        assert_eq!(seen, sorted, "V1 by {size}");
    }
    // With a delimiter, one item at a time.
    let (mut seen, mut marker) = (Vec::new(), String::new());
    loop {
        let got = scene
            .ask(Ask::new("GET", "/bucket").query("delimiter", "/").query("max-keys", "1").query("marker", &marker))
            .await
            .ok();
        let prefixes: Vec<String> = got
            .all("CommonPrefixes")
            .iter()
            .map(|text| text.replace("<Prefix>", "").replace("</Prefix>", ""))
            .collect();
        seen.extend(got.all("Key"));
        seen.extend(prefixes);
        if got.one("IsTruncated") == "false" {
            break;
        }
        marker = got.one("NextMarker");
    }
    assert_eq!(seen, ["Z", "a", "a+b", "a/", "skel.other/", "skel/", "z/", "ä"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn corner_cases_of_listings() {
    let scene = Scene::new().await;
    fill(&scene, &["a b+c", "a/1", "a/2", "b"]).await;
    let list = |pairs: &[(&str, &str)]| {
        let ask = pairs
            .iter()
            .fold(Ask::new("GET", "/bucket").query("list-type", "2"), |ask, (name, value)| ask.query(name, value));
        scene.ask(ask)
    };
    let none = list(&[("max-keys", "0")]).await.ok();
    assert_eq!(
        (none.all("Key").len(), none.one("IsTruncated").as_str(), none.one("MaxKeys").as_str()),
        (0, "false", "0")
    );
    let encoded = list(&[("encoding-type", "url"), ("prefix", "a b+")]).await.ok();
    assert_eq!((encoded.one("Key"), encoded.one("EncodingType")), ("a%20b%2Bc".to_owned(), "url".to_owned()));
    assert!(encoded.text().contains("<Prefix>a%20b%2B</Prefix>"));
    let after = list(&[("start-after", "a/1")]).await.ok();
    assert_eq!((after.all("Key"), after.one("StartAfter")), (vec!["a/2".to_owned(), "b".to_owned()], "a/1".to_owned()));
    assert_eq!(list(&[]).await.ok().all("Owner").len(), 0);
    let owned = list(&[("fetch-owner", "true")]).await.ok();
    assert_eq!(owned.all("Owner").len(), 4);
    let folded = list(&[("delimiter", "/"), ("prefix", "a/")]).await.ok();
    assert_eq!((folded.all("Key"), folded.all("CommonPrefixes").len()), (vec!["a/1".to_owned(), "a/2".to_owned()], 0));
    list(&[("continuation-token", "not one of ours")]).await.expect(400, "InvalidArgument");
    list(&[("max-keys", "-1")]).await.expect(400, "InvalidArgument");
    list(&[("encoding-type", "rot13")]).await.expect(400, "InvalidArgument");
    scene.ask(Ask::new("GET", "/no-such-bucket").query("list-type", "2")).await.expect(404, "NoSuchBucket");
    let v1 = scene.ask(Ask::new("GET", "/bucket")).await.ok();
    assert!(
        v1.text().contains("<Marker></Marker>") || v1.text().contains("<Marker/>"),
        "V1 names its marker always: {}",
        v1.text()
    );
}
