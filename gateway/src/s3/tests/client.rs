//! A client that signs by itself and writes its bytes by hand, so that it can also lie.

use super::cluster::Cluster;
use crate::s3::{serve, S3Context, S3Settings};
use base64::engine::general_purpose::STANDARD as BASE64;
use base64::Engine;
use granary_meta::record::ChecksumAlgorithm;
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;

pub const ACCESS: &str = "AKIATESTTESTTEST0000";
pub const SECRET: &str = "a secret for tests, nothing else";
pub const REGION: &str = "eu-test-1";

pub fn sha256_hex(data: &[u8]) -> String {
    hex::encode(Sha256::digest(data))
}

fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0u8; 64];
    block[..key.len()].copy_from_slice(key);
    let pad = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

/// Percent-encoding as signatures want it.
pub fn encode(text: &str, slash: bool) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
            b'/' if slash => "/".to_owned(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

pub fn b64(data: &[u8]) -> String {
    BASE64.encode(data)
}

pub fn checksum(algorithm: ChecksumAlgorithm, data: &[u8]) -> String {
    b64(crate::digest::digest(data, &[algorithm]).checksum(algorithm).unwrap())
}

pub fn md5_hex(data: &[u8]) -> String {
    hex::encode(crate::digest::digest(data, &[]).md5)
}

/// `YYYYMMDDTHHMMSSZ`, by the days-to-civil algorithm of Howard Hinnant.
pub fn amz_date(unix: u64) -> String {
    let (days, rest) = ((unix / 86_400) as i64, unix % 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// A request; built, changed, signed, sent.
#[derive(Clone)]
pub struct Ask {
    pub method: String,
    pub path: String,
    pub query: Vec<(String, String)>,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub payload: String,
    pub secret: String,
    pub access: String,
    pub region: String,
    pub time: u64,
    pub skip_signing: Vec<&'static str>,
    pub send_length: bool,
    /// Bytes to leave off the end of a framed body; its length says so.
    pub cut: usize,
}

impl Ask {
    pub fn new(method: &str, path: &str) -> Ask {
        Ask {
            method: method.to_owned(),
            path: encode(path, true),
            query: Vec::new(),
            headers: Vec::new(),
            body: Vec::new(),
            payload: String::new(),
            secret: SECRET.to_owned(),
            access: ACCESS.to_owned(),
            region: REGION.to_owned(),
            time: now(),
            skip_signing: Vec::new(),
            send_length: true,
            cut: 0,
        }
    }
    pub fn query(mut self, name: &str, value: &str) -> Ask {
        self.query.push((name.to_owned(), value.to_owned()));
        self
    }
    pub fn header(mut self, name: &str, value: &str) -> Ask {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Ask {
        self.body = body.into();
        self
    }
    pub fn payload(mut self, payload: &str) -> Ask {
        self.payload = payload.to_owned();
        self
    }

    fn query_text(&self) -> String {
        let mut pairs: Vec<String> =
            self.query.iter().map(|(n, v)| format!("{}={}", encode(n, false), encode(v, false))).collect();
        pairs.sort();
        pairs.join("&")
    }

    fn scope(&self) -> String {
        format!("{}/{}/s3/aws4_request", &amz_date(self.time)[..8], self.region)
    }

    pub fn key(&self) -> [u8; 32] {
        let date = hmac(format!("AWS4{}", self.secret).as_bytes(), &amz_date(self.time).as_bytes()[..8]);
        hmac(&hmac(&hmac(&date, self.region.as_bytes()), b"s3"), b"aws4_request")
    }

    fn sign(&self, headers: &[(String, String)], payload: &str) -> (String, String) {
        let mut signed: Vec<(String, String)> = headers
            .iter()
            .filter(|(name, _)| !self.skip_signing.contains(&name.as_str()))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        signed.sort();
        let names: Vec<&str> = signed.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(";");
        let lines: String = signed.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
        let canonical = format!("{}\n{}\n{}\n{lines}\n{names}\n{payload}", self.method, self.path, self.query_text());
        let to_sign = format!(
            "AWS4-HMAC-SHA256\n{}\n{}\n{}",
            amz_date(self.time),
            self.scope(),
            sha256_hex(canonical.as_bytes())
        );
        (names, hex::encode(hmac(&self.key(), to_sign.as_bytes())))
    }

    fn wire(&self, headers: &[(String, String)], query: &str) -> Vec<u8> {
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        let mut wire = format!("{} {}{query} HTTP/1.1\r\n", self.method, self.path).into_bytes();
        for (name, value) in headers {
            wire.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
        if self.send_length && (!self.body.is_empty() || matches!(self.method.as_str(), "PUT" | "POST")) {
            wire.extend_from_slice(format!("content-length: {}\r\n", self.body.len()).as_bytes());
        }
        wire.extend_from_slice(b"\r\n");
        wire.extend_from_slice(&self.body);
        wire
    }

    /// The bytes of the request, signed in its header; and its signature, for chunks.
    pub fn signed(&self, host: &str) -> (Vec<u8>, String) {
        let payload = if self.payload.is_empty() { sha256_hex(&self.body) } else { self.payload.clone() };
        let mut headers = self.headers.clone();
        headers.push(("host".to_owned(), host.to_owned()));
        headers.push(("x-amz-date".to_owned(), amz_date(self.time)));
        headers.push(("x-amz-content-sha256".to_owned(), payload.clone()));
        let (names, signature) = self.sign(&headers, &payload);
        let value = format!(
            "AWS4-HMAC-SHA256 Credential={}/{}, SignedHeaders={names}, Signature={signature}",
            self.access,
            self.scope()
        );
        headers.push(("authorization".to_owned(), value));
        (self.wire(&headers, &self.query_text()), signature)
    }

    /// The bytes of the request, signed in its query; `extra` headers are added unsigned.
    pub fn presigned(mut self, host: &str, expires: u64, extra: &[(&str, &str)]) -> Vec<u8> {
        let mut headers = self.headers.clone();
        headers.push(("host".to_owned(), host.to_owned()));
        let mut names: Vec<String> = headers.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        names.sort();
        for (name, value) in [
            ("X-Amz-Algorithm", "AWS4-HMAC-SHA256".to_owned()),
            ("X-Amz-Credential", format!("{}/{}", self.access, self.scope())),
            ("X-Amz-Date", amz_date(self.time)),
            ("X-Amz-Expires", expires.to_string()),
            ("X-Amz-SignedHeaders", names.join(";")),
        ] {
            self.query.push((name.to_owned(), value));
        }
        let (_, signature) = self.sign(&headers, "UNSIGNED-PAYLOAD");
        let query = format!("{}&X-Amz-Signature={signature}", self.query_text());
        headers.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.wire(&headers, &query)
    }

    /// Frames `data` as signed chunks, with a signed trailer when one is given, and signs all of it.
    pub fn chunked(mut self, host: &str, data: &[u8], chunk: usize, trailer: Option<(&str, &str)>) -> Vec<u8> {
        self.payload = if trailer.is_some() {
            "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
        } else {
            "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
        }
        .to_owned();
        self.headers.push(("x-amz-decoded-content-length".to_owned(), data.len().to_string()));
        self.headers.push(("content-encoding".to_owned(), "aws-chunked".to_owned()));
        if let Some((name, _)) = trailer {
            self.headers.push(("x-amz-trailer".to_owned(), name.to_owned()));
        }
        let (_, mut previous) = self.signed(host);
        let begin = |kind: &str| format!("AWS4-HMAC-SHA256-{kind}\n{}\n{}", amz_date(self.time), self.scope());
        let mut framed = Vec::new();
        for piece in data.chunks(chunk).chain([&[][..]]) {
            let to_sign = format!("{}\n{previous}\n{}\n{}", begin("PAYLOAD"), sha256_hex(b""), sha256_hex(piece));
            previous = hex::encode(hmac(&self.key(), to_sign.as_bytes()));
            framed.extend_from_slice(format!("{:x};chunk-signature={previous}\r\n", piece.len()).as_bytes());
            framed.extend_from_slice(piece);
            if !piece.is_empty() || trailer.is_none() {
                framed.extend_from_slice(b"\r\n");
            }
        }
        if let Some((name, value)) = trailer {
            let to_sign =
                format!("{}\n{previous}\n{}", begin("TRAILER"), sha256_hex(format!("{name}:{value}\n").as_bytes()));
            let signature = hex::encode(hmac(&self.key(), to_sign.as_bytes()));
            framed
                .extend_from_slice(format!("{name}:{value}\r\nx-amz-trailer-signature:{signature}\r\n\r\n").as_bytes());
        }
        framed.truncate(framed.len() - self.cut);
        self.body = framed;
        self.signed(host).0
    }

    /// As an SDK over TLS sends it: unsigned frames, a trailer, chunked transfer without a length.
    pub fn unsigned_trailer(mut self, host: &str, data: &[u8], trailer: (&str, &str), last_chunk: bool) -> Vec<u8> {
        self.payload = "STREAMING-UNSIGNED-PAYLOAD-TRAILER".to_owned();
        for (name, value) in [
            ("x-amz-decoded-content-length", data.len().to_string()),
            ("content-encoding", "aws-chunked".to_owned()),
            ("x-amz-trailer", trailer.0.to_owned()),
            ("transfer-encoding", "chunked".to_owned()),
        ] {
            self.headers.push((name.to_owned(), value));
        }
        self.send_length = false;
        let mut framed = Vec::new();
        if !data.is_empty() {
            framed.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
            framed.extend_from_slice(data);
            framed.extend_from_slice(b"\r\n");
        }
        if last_chunk {
            framed.extend_from_slice(format!("0\r\n{}:{}\r\n\r\n", trailer.0, trailer.1).as_bytes());
        }
        let mut outer = Vec::new();
        for piece in framed.chunks(1000) {
            outer.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            outer.extend_from_slice(piece);
            outer.extend_from_slice(b"\r\n");
        }
        outer.extend_from_slice(b"0\r\n\r\n");
        self.body = outer;
        self.signed(host).0
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Got {
    pub status: u16,
    pub headers: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
    /// Interim answers seen before, like 100.
    pub interim: Vec<u16>,
}

impl Got {
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    /// All values of an element, in order.
    pub fn all(&self, element: &str) -> Vec<String> {
        let text = self.text();
        let (begin, end) = (format!("<{element}>"), format!("</{element}>"));
        text.split(&begin).skip(1).filter_map(|rest| Some(rest.split_once(&end)?.0.to_owned())).collect()
    }
    pub fn one(&self, element: &str) -> String {
        self.all(element).first().cloned().unwrap_or_default()
    }
    #[track_caller]
    pub fn expect(self, status: u16, code: &str) -> Got {
        assert_eq!((self.status, self.one("Code").as_str()), (status, code), "{}", self.text());
        self
    }
    #[track_caller]
    pub fn ok(self) -> Got {
        assert!((200..300).contains(&self.status), "{} {}", self.status, self.text());
        self
    }
}

/// A gateway over a [`Cluster`], on loopback.
pub struct Scene {
    pub cluster: Arc<Cluster>,
    pub address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Scene {
    pub async fn new() -> Scene {
        Scene::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut S3Settings)) -> Scene {
        let scene = Scene::over(Cluster::start().await, change).await;
        scene.ask(Ask::new("PUT", "/bucket")).await.ok();
        scene
    }

    /// One more gateway over the same cluster, with empty caches.
    pub async fn another(&self) -> Scene {
        Scene::over(self.cluster.clone(), |_| {}).await
    }

    async fn over(cluster: Arc<Cluster>, change: impl FnOnce(&mut S3Settings)) -> Scene {
        let mut settings = S3Settings::new(REGION, ACCESS, SECRET);
        settings.base_domain = Some("s3.test".to_owned());
        change(&mut settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let cx = S3Context::new(cluster.more_shards(), cluster.objects.clone(), settings);
        tokio::spawn(serve(listener, cx, stop.clone()));
        Scene { cluster, address, stop }
    }

    /// A connection from 127.0.0.`from`.
    pub async fn connect(&self, from: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, from], 0))).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub async fn ask(&self, ask: Ask) -> Got {
        let head = ask.method == "HEAD";
        self.raw(&ask.signed(&self.host()).0, head).await
    }

    pub async fn put(&self, key: &str, body: &[u8]) -> Got {
        self.ask(Ask::new("PUT", &format!("/bucket/{key}")).body(body)).await.ok()
    }

    pub async fn get(&self, key: &str) -> Got {
        self.ask(Ask::new("GET", &format!("/bucket/{key}"))).await
    }

    /// Sends bytes and reads one answer; the rest of the request is sent even when the answer comes early.
    pub async fn raw(&self, request: &[u8], head: bool) -> Got {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let (mut read, mut write) = stream.split();
        let send = async {
            let _ = write.write_all(request).await;
        };
        let (_, got) = tokio::join!(send, read_answer(&mut read, head));
        got
    }
}

/// Reads one answer off a connection.
pub async fn read_answer(stream: &mut (impl AsyncReadExt + Unpin), head: bool) -> Got {
    let mut got = Got { status: 0, headers: Vec::new(), body: Vec::new(), interim: Vec::new() };
    loop {
        let mut lines: Vec<Vec<u8>> = Vec::new();
        loop {
            let line = read_line(stream).await;
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        let Some(first) = lines.first() else { return got };
        got.status = String::from_utf8_lossy(first).split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        if (100..200).contains(&got.status) {
            got.interim.push(got.status);
            continue;
        }
        for line in &lines[1..] {
            let at = line.iter().position(|byte| *byte == b':').unwrap();
            let name = String::from_utf8_lossy(&line[..at]).to_ascii_lowercase();
            let value = line[at + 1..].strip_prefix(b" ").unwrap_or(&line[at + 1..]);
            got.headers.push((name, value.to_vec()));
        }
        break;
    }
    if head || matches!(got.status, 204 | 304) {
        return got;
    }
    match got.header("content-length").and_then(|text| text.parse::<usize>().ok()) {
        Some(len) => {
            let mut body = vec![0; len];
            let mut at = 0;
            while at < len {
                match stream.read(&mut body[at..]).await {
                    Ok(read) if read > 0 => at += read,
                    _ => break,
                }
            }
            body.truncate(at);
            got.body = body;
        }
        None => loop {
            let size = read_line(stream).await;
            let size = usize::from_str_radix(String::from_utf8_lossy(&size).trim(), 16).unwrap_or(0);
            let mut piece = vec![0; size + 2];
            if stream.read_exact(&mut piece).await.is_err() || size == 0 {
                break;
            }
            piece.truncate(size);
            got.body.extend_from_slice(&piece);
        },
    }
    got
}

async fn read_line(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut line = Vec::new();
    while let Ok(byte) = stream.read_u8().await {
        if byte == b'\n' {
            break;
        }
        line.push(byte);
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    line
}
