//! The admin listener over a socket: what it answers, and that hostile clients stay bounded.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::api::{
    ApiError, DrainDisk, ErrorCode, GetMap, GetStatus, PauseHealing, Readiness, RunCensus, SetConfig, StartDisk,
    Status, StopDisk,
};
use super::listener::{self, ListenerLimits};
use super::routes::{router, RequestLimits};
use super::{AdminContext, LocalDisks};
use crate::cli::http::{call, CallError};
use crate::disks::{DiskSettings, Disks};
use crate::metrics::Metrics;
use crate::settings::Secret;
use crate::shards::Shards;
use futures::future::BoxFuture;
use granary_placement::id::{ClusterId, DiskId};
use granary_placement::settings::Values;
use granary_wire::auth::{ClusterSecret, Credentials};
use http::StatusCode;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{watch, Notify};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
/// Longer than any test should take; a test that hangs ends with its name.
const PATIENCE: Duration = Duration::from_secs(60);
const PATIENT: RequestLimits =
    RequestLimits { body_bytes: 1024, body_pause: PATIENCE, request: PATIENCE, acts: 2, long_acts: 1 };

/// Disk nodes that stop when they are told to go on.
#[derive(Default)]
struct SlowDisks {
    begun: Notify,
    go_on: Notify,
}

impl LocalDisks for SlowDisks {
    fn start(&self, disk: DiskId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { Err(format!("no disk {disk} here")) })
    }

    fn stop(&self, _: DiskId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async {
            self.begun.notify_one();
            self.go_on.notified().await;
            Ok(())
        })
    }

    fn replace(&self, _: DiskId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

struct Served {
    address: SocketAddr,
    local: Arc<SlowDisks>,
    stop: CancellationToken,
    ended: JoinHandle<()>,
}

impl Served {
    async fn start(requests: RequestLimits, connections: ListenerLimits) -> Served {
        let metrics = Metrics::new().unwrap();
        let map = watch::Sender::new(None);
        let secret = ClusterSecret::generate().unwrap();
        let credentials = Credentials { cluster: ClusterId([1; 16]), secret };
        let disks = Disks::new(map.subscribe(), credentials, None, DiskSettings::default());
        let local = Arc::new(SlowDisks::default());
        let context = AdminContext {
            shards: Shards::new(Arc::new(disks.clone()), map, metrics.clone()),
            disks,
            values: watch::Sender::new(Arc::new(Values::default())).subscribe(),
            metrics,
            token: Secret::new(TOKEN),
            healer: Arc::new(OnceLock::new()),
            local: Some(local.clone()),
            status: super::status::newest().0,
            serving: watch::Sender::new(false).subscribe(),
            s3: "127.0.0.1:9000".to_owned(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let serving = listener::run(listener, router(Arc::new(context), &requests), connections, stop.clone());
        Served { address, local, stop, ended: tokio::spawn(serving) }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends `request` and reads until the server closes the connection.
    async fn exchange(&self, request: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        read_to_end(&mut stream).await
    }

    async fn get(&self, path: &str) -> String {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
    }
}

/// A reset is an end too: the server may close while bytes of ours are on their way.
async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut said = Vec::new();
    let _ =
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the server closes the connection");
    String::from_utf8(said).unwrap()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").expect("a whole head").1
}

fn error_of(answer: &str) -> (String, ErrorCode) {
    let status = answer.split(' ').nth(1).unwrap_or_default().to_owned();
    (status, serde_json::from_str::<ApiError>(body(answer)).unwrap_or_else(|error| panic!("{error}: {answer}")).code)
}

#[tokio::test]
async fn probes_page_and_metrics_need_no_token_and_everything_else_does() {
    let served = Served::start(PATIENT, ListenerLimits::default()).await;
    let health = served.get("/healthz").await;
    assert!(health.starts_with("HTTP/1.1 200") && health.ends_with("ok\n"), "{health}");
    for header in ["cache-control: no-store", "x-content-type-options: nosniff", "x-request-id: ", "default-src 'none'"]
    {
        assert!(health.contains(header), "{header} in {health}");
    }
    let ready = served.get("/readyz").await;
    let readiness: Readiness = serde_json::from_str(body(&ready)).unwrap();
    assert!(ready.starts_with("HTTP/1.1 503") && !readiness.ready && !readiness.reasons.is_empty(), "{ready}");
    let metrics = served.get("/metrics").await;
    assert!(metrics.contains("text/plain; version=0.0.4") && metrics.contains("granary_map_epoch 0"), "{metrics}");
    let page = served.get("/").await;
    assert!(page.contains("text/html") && page.contains("not ready") && page.ends_with("</html>"), "{page}");
    assert!(served.get("/granary.css").await.contains("content-type: text/css"));

    for path in ["/v1/status", "/v1/map", "/v1/feature-level"] {
        let refused = served.get(path).await;
        assert_eq!(error_of(&refused), ("401".to_owned(), ErrorCode::Unauthorized), "{path}");
        assert!(refused.contains("www-authenticate: Bearer"), "{refused}");
    }
    let stop = "POST /v1/disks/1/stop HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(error_of(&served.exchange(stop).await).1, ErrorCode::Unauthorized);
    assert_eq!(error_of(&served.get("/nowhere").await), ("404".to_owned(), ErrorCode::NotFound));
    let wrong = "PUT /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(error_of(&served.exchange(wrong).await), ("405".to_owned(), ErrorCode::MethodNotAllowed));
}

#[tokio::test]
async fn the_verbs_client_gets_typed_answers_and_typed_errors() {
    let served = Served::start(PATIENT, ListenerLimits::default()).await;
    let address = served.address.to_string();
    let status = call(&address, TOKEN, &GetStatus {}, PATIENCE).await.unwrap();
    assert_eq!(status, Status::default());
    let refused = |error: CallError| match error {
        CallError::Refused { status, error } => (status, error.code),
        other => panic!("{other}"),
    };
    let wrong = refused(call(&address, "wrong", &GetStatus {}, PATIENCE).await.unwrap_err());
    assert_eq!(wrong, (StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized));
    let no_map = refused(call(&address, TOKEN, &GetMap {}, PATIENCE).await.unwrap_err());
    assert_eq!(no_map, (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable));
    let too_early = refused(call(&address, TOKEN, &RunCensus {}, PATIENCE).await.unwrap_err());
    assert_eq!(too_early, (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable));
    let no_root = refused(call(&address, TOKEN, &DrainDisk { disk: DiskId(3) }, PATIENCE).await.unwrap_err());
    assert_eq!(no_root, (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable));
    for (for_s, refusal) in
        [(0, ErrorCode::BadRequest), (604_801, ErrorCode::BadRequest), (604_800, ErrorCode::Unavailable)]
    {
        let paused = refused(call(&address, TOKEN, &PauseHealing { for_s }, PATIENCE).await.unwrap_err());
        assert_eq!(paused.1, refusal, "{for_s} s");
    }
    for (path, sent) in
        [("/v1/disks/three/stop", "{}"), ("/v1/disks/3/stop", "{\"now\":true}"), ("/v1/disks/3/stop", "[")]
    {
        let length = sent.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n\r\n{sent}"
        );
        assert_eq!(
            error_of(&served.exchange(&request).await),
            ("400".to_owned(), ErrorCode::BadRequest),
            "{path} {sent}"
        );
    }
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_and_not_read() {
    let served = Served::start(PATIENT, ListenerLimits::default()).await;
    let head = format!("POST /v1/disks/3/replace HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n");
    // By its length, before a byte of it came.
    let announced = served.exchange(&format!("{head}Content-Length: 1000000000000\r\n\r\n")).await;
    assert_eq!(error_of(&announced), ("413".to_owned(), ErrorCode::TooLarge));
    // In pieces of which nobody says how many there will be.
    let mut stream = served.connect().await;
    stream.write_all(format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes()).await.unwrap();
    let piece = format!("400\r\n{}\r\n", " ".repeat(0x400));
    let mut sent = 0u64;
    while stream.write_all(piece.as_bytes()).await.is_ok() {
        sent += 0x400;
        assert!(sent < 1 << 30, "a gigabyte was taken");
    }
}

#[tokio::test]
async fn slow_heads_and_slow_bodies_end_and_give_their_place_to_others() {
    let quick = Duration::from_millis(100);
    let requests = RequestLimits { body_pause: quick, ..PATIENT };
    let served = Served::start(requests, ListenerLimits { connections: 2, header: quick, ..Default::default() }).await;
    // Both places are held by heads that never end; a third client is served once they are cut off.
    let mut slow = [served.connect().await, served.connect().await];
    for stream in &mut slow {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHo").await.unwrap();
    }
    assert!(served.get("/healthz").await.starts_with("HTTP/1.1 200"));
    for stream in &mut slow {
        assert!(!read_to_end(stream).await.contains("200 OK"));
    }
    let head = format!("POST /v1/disks/3/replace HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n");
    let stalled = served.exchange(&format!("{head}Content-Length: 100\r\n\r\n{{")).await;
    assert_eq!(error_of(&stalled), ("408".to_owned(), ErrorCode::Timeout));
}

#[tokio::test]
async fn more_connections_than_there_are_places_wait_and_are_served() {
    let served =
        Served::start(PATIENT, ListenerLimits { connections: 3, silent: PATIENCE, ..Default::default() }).await;
    let many = (0..50).map(|_| served.get("/healthz"));
    for answer in futures::future::join_all(many).await {
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_given_up() {
    let requests = RequestLimits { request: Duration::from_millis(100), ..PATIENT };
    let served = Served::start(requests, ListenerLimits::default()).await;
    let error = call(&served.address.to_string(), TOKEN, &StopDisk { disk: DiskId(3) }, PATIENCE).await.unwrap_err();
    assert!(matches!(&error, CallError::Refused { error, .. } if error.code == ErrorCode::Timeout), "{error}");
}

#[tokio::test]
async fn only_so_many_acts_run_at_once_and_listings_go_on() {
    let served = Served::start(PATIENT, ListenerLimits::default()).await;
    let address = served.address.to_string();
    let stop = || {
        let address = address.clone();
        tokio::spawn(async move { call(&address, TOKEN, &StopDisk { disk: DiskId(3) }, PATIENCE).await })
    };
    let running = [stop(), stop()];
    for _ in 0..2 {
        served.local.begun.notified().await;
    }
    // Of another kind, too.
    let error = call(&address, TOKEN, &StartDisk { disk: DiskId(3) }, PATIENCE).await.unwrap_err();
    assert!(matches!(&error, CallError::Refused { error, .. } if error.code == ErrorCode::Busy), "{error}");
    call(&address, TOKEN, &GetStatus {}, PATIENCE).await.unwrap();
    for _ in 0..2 {
        served.local.go_on.notify_one();
        tokio::task::yield_now().await;
    }
    served.local.go_on.notify_waiters();
    for task in running {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn censuses_and_other_acts_have_places_of_their_own() {
    let served = Served::start(RequestLimits { acts: 1, long_acts: 1, ..PATIENT }, ListenerLimits::default()).await;
    let address = served.address.to_string();
    let code = |error: CallError| match error {
        CallError::Refused { error, .. } => error.code,
        other => panic!("{other}"),
    };
    let census = || async { code(call(&address, TOKEN, &RunCensus {}, PATIENCE).await.unwrap_err()) };
    let start = || async { code(call(&address, TOKEN, &StartDisk { disk: DiskId(3) }, PATIENCE).await.unwrap_err()) };

    // The place of a census is taken by one whose body does not come.
    let mut held = served.connect().await;
    let request =
        format!("POST /v1/census HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 2\r\n\r\n");
    held.write_all(request.as_bytes()).await.unwrap();
    let until_busy = async {
        while census().await != ErrorCode::Busy {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, until_busy).await.expect("a second census is refused");
    // No disk 3 is here; that its node was asked to start is what counts.
    assert_eq!(start().await, ErrorCode::Conflict);
    drop(held);
    let until_free = async {
        while census().await == ErrorCode::Busy {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, until_free).await.expect("a census that was given up frees its place");

    // The other way round.
    let stop = call(&address, TOKEN, &StopDisk { disk: DiskId(3) }, PATIENCE);
    let meanwhile = async {
        served.local.begun.notified().await;
        let codes = (start().await, census().await);
        served.local.go_on.notify_one();
        codes
    };
    let (stopped, codes) = tokio::join!(stop, meanwhile);
    stopped.unwrap();
    assert_eq!(codes, (ErrorCode::Busy, ErrorCode::Unavailable));
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_setting_that_is_refused_is_logged_by_name_and_reason_and_without_what_was_given() {
    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _log = tracing::subscriber::set_default(log);
    let served = Served::start(PATIENT, ListenerLimits::default()).await;
    // No setting; a setting of the cluster and no value of it; a setting of each process.
    for name in ["secretname", "heal.rate", "s3.max_requests"] {
        let set = SetConfig { name: name.to_owned(), value: Some("secretvalue".to_owned()) };
        let error = call(&served.address.to_string(), TOKEN, &set, PATIENCE).await.unwrap_err();
        let refused = matches!(&error, CallError::Refused { error, .. } if error.code == ErrorCode::BadRequest);
        assert!(refused, "{name}: {error}");
    }
    let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("/v1/config"), "requests are logged at this level: {logged}");
    assert!(!logged.contains("secretname") && !logged.contains("secretvalue"), "{logged}");
    for said in ["no setting has that name", "name=heal.rate", "name=s3.max_requests"] {
        assert!(logged.contains(said), "{said} in {logged}");
    }
}

#[tokio::test]
async fn draining_answers_what_is_under_way_with_connection_close_and_ends_idle_connections() {
    let served = Served::start(PATIENT, ListenerLimits::default()).await;
    let mut idle = served.connect().await;
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut first = [0u8; 12];
    idle.read_exact(&mut first).await.unwrap();
    let mut busy = served.connect().await;
    let request = format!(
        "POST /v1/disks/3/stop HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n\r\n"
    );
    busy.write_all(request.as_bytes()).await.unwrap();
    served.local.begun.notified().await;

    served.stop.cancel();
    read_to_end(&mut idle).await;
    served.local.go_on.notify_one();
    let answer = read_to_end(&mut busy).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.to_lowercase().contains("connection: close"), "{answer}");
    tokio::time::timeout(PATIENCE, served.ended).await.expect("the listener ends").unwrap();
    assert!(TcpStream::connect(served.address).await.is_err(), "a drained listener takes no connection");
}

#[tokio::test]
async fn silent_connections_make_room_the_oldest_first_and_requests_in_work_do_not() {
    let limits = ListenerLimits {
        connections: 3,
        silent: Duration::ZERO,
        header: PATIENCE * 10,
        lifetime: PATIENCE * 10,
        ..Default::default()
    };
    let served = Served::start(PATIENT, limits).await;
    let mut busy = served.connect().await;
    let request = format!(
        "POST /v1/disks/3/stop HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n\r\n"
    );
    busy.write_all(request.as_bytes()).await.unwrap();
    served.local.begun.notified().await;
    let health = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut kept = served.connect().await;
    kept.write_all(health).await.unwrap();
    kept.read_exact(&mut [0u8; 12]).await.unwrap();
    let mut silent = served.connect().await;
    // All places are taken: the one that never asked goes first, then the one that has been silent the longest.
    let mut third = served.connect().await;
    third.write_all(health).await.unwrap();
    tokio::time::timeout(PATIENCE, third.read_exact(&mut [0u8; 12])).await.expect("somebody makes room").unwrap();
    assert_eq!(read_to_end(&mut silent).await, "", "it made room");
    let mut many = Vec::new();
    for _ in 0..5 {
        many.push(served.connect().await);
    }
    assert!(served.get("/healthz").await.ends_with("ok\n"), "whoever comes is served, whoever is silent");
    read_to_end(&mut kept).await;
    third.write_all(health).await.unwrap();
    third.read_exact(&mut [0u8; 12]).await.expect("who asked stays before those who never did");
    served.local.go_on.notify_one();
    let mut first = [0u8; 12];
    tokio::time::timeout(PATIENCE, busy.read_exact(&mut first)).await.expect("an answer").unwrap();
    assert_eq!(&first, b"HTTP/1.1 200", "a request in work keeps its place");
}

#[tokio::test]
async fn a_connection_is_ended_after_its_time_but_not_under_an_answer_that_is_being_made() {
    let short = Duration::from_millis(100);
    let limits = ListenerLimits { lifetime: short, linger: short, ..Default::default() };
    let served = Served::start(PATIENT, limits).await;
    let mut idle = served.connect().await;
    assert_eq!(read_to_end(&mut idle).await, "", "nothing was asked");
    let mut busy = served.connect().await;
    let request = format!(
        "POST /v1/disks/3/stop HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n\r\n"
    );
    busy.write_all(request.as_bytes()).await.unwrap();
    served.local.begun.notified().await;
    tokio::time::sleep(short * 5).await;
    served.local.go_on.notify_one();
    assert!(read_to_end(&mut busy).await.starts_with("HTTP/1.1 200"));
}
