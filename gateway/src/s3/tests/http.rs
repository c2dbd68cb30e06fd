use super::client::{read_answer, Ask, Scene};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_carries_ids_and_errors_repeat_them() {
    let scene = Scene::new().await;
    let fine = scene.put("k", b"x").await;
    let wrong = scene.ask(Ask::new("GET", "/bucket/none")).await.expect(404, "NoSuchKey");
    let signature = scene
        .ask(Ask { secret: "wrong".to_owned(), ..Ask::new("GET", "/bucket/none") })
        .await
        .expect(403, "SignatureDoesNotMatch");
    for got in [&fine, &wrong, &signature] {
        assert_eq!(got.header("x-amz-request-id").unwrap().len(), 16);
        assert_eq!(got.header("x-amz-id-2").unwrap().len(), 32);
    }
    for got in [wrong, signature] {
        assert_eq!(
            (Some(got.one("RequestId")), Some(got.one("HostId"))),
            (got.header("x-amz-request-id"), got.header("x-amz-id-2"))
        );
        assert_eq!(got.header("content-length").unwrap(), got.body.len().to_string());
    }
    let head = scene.ask(Ask::new("HEAD", "/bucket/none")).await;
    assert_eq!((head.status, head.header("x-amz-request-id").unwrap().len()), (404, 16));
}

/// Sends only the head of a request that has a body, and reads what comes.
async fn send_head(scene: &Scene, ask: Ask) -> (TcpStream, Vec<u8>, Vec<u8>) {
    let (wire, _) = ask.signed(&scene.host());
    let end = wire.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    stream.write_all(&wire[..end]).await.unwrap();
    (stream, wire[end..].to_vec(), wire[..end].to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_client_gets_its_100_after_authorisation_and_before_any_lookup() {
    // This gateway has to look the bucket up: it was made through another.
    let scene = Scene::new().await.another().await;
    scene.cluster.peers.state().delay = Duration::from_millis(3000);
    let put = || Ask::new("PUT", "/bucket/k").header("expect", "100-continue").body(vec![1u8; 100_000]);
    let began = Instant::now();
    let (mut stream, body, _) = send_head(&scene, put()).await;
    let mut interim = [0u8; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    assert!(began.elapsed() < Duration::from_millis(2000), "the 100 waited for a lookup");
    scene.cluster.peers.state().delay = Duration::from_millis(0);
    stream.write_all(&body).await.unwrap();
    assert_eq!(read_answer(&mut stream, false).await.status, 200);

    // Refused: the final answer only, and the connection ends.
    let (mut stream, _, _) = send_head(&scene, Ask { secret: "wrong".to_owned(), ..put() }).await;
    let got = read_answer(&mut stream, false).await.expect(403, "SignatureDoesNotMatch");
    assert_eq!((got.interim.len(), got.header("connection").as_deref()), (0, Some("close")));
    assert_eq!(stream.read(&mut [0u8; 1]).await.unwrap(), 0);
    // An empty body: the final answer only.
    let (mut stream, _, _) = send_head(&scene, Ask::new("PUT", "/bucket/empty").header("expect", "100-continue")).await;
    let got = read_answer(&mut stream, false).await.ok();
    assert_eq!(got.interim.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upload_gets_its_whole_error_however_much_it_sends() {
    let scene = Scene::new().await;
    for len in [10, 100_000, 20 << 20] {
        let ask = Ask { secret: "wrong".to_owned(), ..Ask::new("PUT", "/bucket/k").body(vec![1u8; len]) };
        let got = scene.ask(ask).await.expect(403, "SignatureDoesNotMatch");
        assert_eq!(got.header("connection").is_some(), len > 1 << 20, "{len} bytes");
    }
    let missing = Ask::new("PUT", "/no-such-bucket/k").body(vec![1u8; 20 << 20]);
    scene.ask(missing).await.expect(404, "NoSuchBucket");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_serves_many_requests() {
    let scene = Scene::new().await;
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    for n in 0..20 {
        let body = vec![n as u8; n * 1000];
        let ask = if n % 3 == 2 {
            Ask::new("GET", "/bucket/none")
        } else {
            Ask::new("PUT", &format!("/bucket/{n}")).body(body)
        };
        stream.write_all(&ask.signed(&scene.host()).0).await.unwrap();
        let got = read_answer(&mut stream, false).await;
        assert_eq!(got.status, if n % 3 == 2 { 404 } else { 200 }, "{n}");
        assert_eq!(got.header("connection"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_a_bound_requests_are_told_to_slow_down() {
    let scene = Scene::with(|settings| settings.max_requests = 1).await;
    scene.cluster.peers.state().delay = Duration::from_millis(500);
    let slow = scene.ask(Ask::new("PUT", "/bucket/a").body("x"));
    let refused = async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        scene.ask(Ask::new("PUT", "/bucket/b").body("x")).await.expect(503, "SlowDown")
    };
    let (slow, _) = tokio::join!(slow, refused);
    slow.ok();

    let scene = Scene::with(|settings| settings.max_connections = 1).await;
    let (_held, _, _) = begun(&scene, scene.connect(1).await, 100_000).await;
    let got = scene.ask(Ask::new("GET", "/")).await.expect(503, "SlowDown");
    assert_eq!(got.header("connection").as_deref(), Some("close"));
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_and_slow_bodies_are_cut_off() {
    let scene = Scene::with(|settings| {
        settings.header_timeout = Duration::from_millis(300);
        settings.body_idle_timeout = Duration::from_millis(300);
    })
    .await;
    let mut head = TcpStream::connect(scene.address).await.unwrap();
    head.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), head.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "a head that never ends");

    let (mut stream, body, _) = send_head(&scene, Ask::new("PUT", "/bucket/k").body(vec![1u8; 100_000])).await;
    stream.write_all(&body[..50_000]).await.unwrap();
    let got = tokio::time::timeout(Duration::from_secs(5), read_answer(&mut stream, false)).await.unwrap();
    got.expect(400, "RequestTimeout");
    assert_eq!(scene.cluster.object_count().await, 0);
    // A connection that asked something and is silent since is left alone for longer.
    let mut idle = TcpStream::connect(scene.address).await.unwrap();
    idle.write_all(&Ask::new("GET", "/").signed(&scene.host()).0).await.unwrap();
    assert_eq!(read_answer(&mut idle, false).await.status, 200);
    tokio::time::sleep(Duration::from_millis(900)).await;
    idle.write_all(&Ask::new("GET", "/").signed(&scene.host()).0).await.unwrap();
    assert_eq!(read_answer(&mut idle, false).await.status, 200);
}

/// Begins an upload of so many bytes and sends all but the last. The connection is in work when this returns.
async fn begun(scene: &Scene, mut stream: TcpStream, len: usize) -> (TcpStream, Vec<u8>, Vec<u8>) {
    let put = Ask::new("PUT", "/bucket/slow").header("expect", "100-continue").body(vec![1u8; len]);
    let (wire, _) = put.signed(&scene.host());
    let end = wire.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    stream.write_all(&wire[..end]).await.unwrap();
    let mut interim = [0u8; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(&wire[end..wire.len() - 1]).await.unwrap();
    (stream, wire[wire.len() - 1..].to_vec(), wire[..end].to_vec())
}

/// Whether the other end has closed a connection on which it said nothing; waits for it at most so long.
async fn is_closed(stream: &mut TcpStream, wait: Duration) -> bool {
    let read = tokio::time::timeout(wait, stream.read(&mut [0u8; 1])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_never_says_anything_ends_with_the_time_for_a_head() {
    let scene = Scene::with(|settings| settings.header_timeout = Duration::from_millis(200)).await;
    let mut silent = scene.connect(1).await;
    assert!(is_closed(&mut silent, Duration::from_secs(20)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_takes_the_place_of_the_one_that_is_silent_the_longest() {
    let scene = Scene::with(|settings| {
        settings.max_connections = 3;
        settings.header_timeout = Duration::from_secs(600);
    })
    .await;
    let (mut working, last, _) = begun(&scene, scene.connect(1).await, 100_000).await;
    let (mut first, mut second) = (scene.connect(1).await, scene.connect(1).await);
    // One after another, more than there are places: each is served, and only silent ones had to go.
    for _ in 0..5 {
        let mut kept = scene.connect(1).await;
        kept.write_all(&Ask::new("GET", "/").signed(&scene.host()).0).await.unwrap();
        assert_eq!(read_answer(&mut kept, false).await.status, 200);
        assert!(is_closed(&mut first, Duration::from_secs(20)).await);
        first = std::mem::replace(&mut second, kept);
    }
    working.write_all(&last).await.unwrap();
    read_answer(&mut working, false).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_cannot_take_all_places_unless_it_is_a_trusted_proxy() {
    let ask = |scene: &Scene| Ask::new("GET", "/").signed(&scene.host()).0;
    for (proxies, expected) in [("", 503), ("127.0.0.3, 127.0.0.0/30", 200), ("192.0.2.0/24", 503)] {
        let scene = Scene::with(|settings| {
            settings.connections_per_address = 2;
            settings.trusted_proxies = proxies.to_owned();
        })
        .await;
        let first = begun(&scene, scene.connect(1).await, 100_000).await;
        let second = begun(&scene, scene.connect(1).await, 100_000).await;
        for (from, expected) in [(1, expected), (2, 200)] {
            let mut stream = scene.connect(from).await;
            stream.write_all(&ask(&scene)).await.unwrap();
            let got = read_answer(&mut stream, false).await;
            assert_eq!(got.status, expected, "from 127.0.0.{from}, proxies {proxies:?}: {}", got.text());
        }
        drop((first, second));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_drips_is_cut_off_and_one_that_stalls_for_less_is_not() {
    let scene = Scene::with(|settings| {
        settings.body_idle_timeout = Duration::from_secs(2);
        settings.body_progress_bytes = 4096;
    })
    .await;
    let (mut stream, body, _) = send_head(&scene, Ask::new("PUT", "/bucket/k").body(vec![1u8; 100_000])).await;
    let (mut read, mut write) = stream.split();
    let drip = async {
        for byte in body.iter().take(100) {
            if write.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = drip => panic!("a body of single bytes was taken for progress"),
        got = read_answer(&mut read, false) => drop(got.expect(400, "RequestTimeout")),
    }
    assert_eq!(scene.cluster.object_count().await, 0);

    let (mut stream, body, _) = send_head(&scene, Ask::new("PUT", "/bucket/k").body(vec![1u8; 16_000])).await;
    for piece in body.chunks(4096) {
        stream.write_all(piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    read_answer(&mut stream, false).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_stores_nothing() {
    let scene = Scene::new().await;
    let (mut stream, body, _) = send_head(&scene, Ask::new("PUT", "/bucket/k").body(vec![1u8; 3_000_000])).await;
    stream.write_all(&body[..2_000_000]).await.unwrap();
    drop(stream);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(scene.cluster.object_count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn buckets_may_be_named_by_the_host() {
    let scene = Scene::new().await;
    scene.put("k", b"there").await;
    let by_host = |host: &str, path: &str| Ask::new("GET", path).signed(host).0;
    assert_eq!(scene.raw(&by_host("bucket.s3.test", "/k"), false).await.ok().body, b"there");
    assert_eq!(scene.raw(&by_host("bucket.s3.test:9000", "/k"), false).await.ok().body, b"there");
    assert_eq!(scene.raw(&by_host("s3.test", "/bucket/k"), false).await.ok().body, b"there");
    assert_eq!(scene.raw(&by_host("localhost:9000", "/bucket/k"), false).await.ok().body, b"there");
    scene.raw(&by_host("bucket.s3.test", "/bucket/k"), false).await.expect(404, "NoSuchKey");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_get_a_4xx() {
    let scene = Scene::new().await;
    let host = scene.host();
    // All of these are signed, and fine but for what is changed below: only the refusal under test can answer 4xx.
    let put = || Ask::new("PUT", "/bucket/k").payload("UNSIGNED-PAYLOAD").body("x");
    let changed = |ask: Ask, from: &str, to: &str| {
        let wire = String::from_utf8(ask.signed(&host).0).unwrap();
        assert!(wire.contains(from), "{wire}");
        wire.replacen(from, to, 1)
    };
    let status = |text: String| {
        let scene = &scene;
        async move { scene.raw(text.as_bytes(), false).await.status }
    };
    let get = || Ask::new("GET", "/");
    assert_eq!(status(changed(put(), "content-length: 1\r\n", "content-length: 1\r\n")).await, 200);
    assert_eq!(status(changed(get(), "\r\nhost", "\r\nx-h: v\r\nhost")).await, 200);
    scene.ask(Ask::new("DELETE", "/bucket/k")).await.ok();

    let chunked = "transfer-encoding: chunked\r\n";
    for both in [format!("content-length: 1\r\n{chunked}"), format!("{chunked}content-length: 1\r\n")] {
        let wire = changed(put(), "content-length: 1\r\n", &both).replace("\r\n\r\nx", "\r\n\r\n1\r\nx\r\n0\r\n\r\n");
        // hyper goes by the transfer encoding alone, as it may, and such a body has no length that S3 takes.
        assert_eq!(status(wire).await, 411, "{both:?}");
    }
    for two in ["content-length: 1\r\ncontent-length: 2\r\n", "content-length: 2\r\ncontent-length: 1\r\n"] {
        assert_eq!(status(changed(put(), "content-length: 1\r\n", two)).await, 400, "{two:?}");
    }
    let many: String = (0..150).map(|n| format!("x-h{n}: v\r\n")).collect();
    assert_eq!(status(changed(get(), "host: ", &format!("{many}host: "))).await, 431);
    let long = format!("x-long: {}\r\nhost: ", "v".repeat(40_000));
    let got = scene.raw(changed(get(), "host: ", &long).as_bytes(), false).await;
    got.expect(400, "RequestHeaderSectionTooLarge");
    scene
        .ask(Ask::new("POST", "/bucket").header("content-type", "multipart/form-data; boundary=x").body("x"))
        .await
        .expect(501, "NotImplemented");
    assert_eq!(scene.cluster.object_count().await, 0);
}
