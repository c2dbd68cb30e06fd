//! A small S3 client over hyper. It signs with `aws-sigv4`, keeps connections alive, sends bodies of any length without gathering
//! them, and hides nothing: a test sees every status, header and byte.

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    sign, PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings,
    UriPathNormalizationMode,
};
use aws_sigv4::sign::v4;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::StreamExt;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// Any failure before an answer arrived. An answer of any status is not a failure.
#[derive(Debug)]
pub struct NoAnswer(pub String);

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no answer: {}", self.0)
    }
}

impl std::error::Error for NoAnswer {}

fn no_answer(what: &str) -> impl Fn(&dyn std::fmt::Display) -> NoAnswer + '_ {
    move |error| NoAnswer(format!("{what}: {error}"))
}

type ClientBody = UnsyncBoxBody<Bytes, std::io::Error>;
type Sender = SendRequest<ClientBody>;

/// How the payload is bound to the signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// SHA-256 of the body in the signature.
    Signed,
    /// `UNSIGNED-PAYLOAD`.
    Unsigned,
}

/// What to send.
pub enum Body {
    /// Nothing.
    Empty,
    /// These bytes.
    Bytes(Bytes),
    /// A stream of exactly that many bytes; always `UNSIGNED-PAYLOAD`.
    Stream(u64, BoxStream<'static, std::io::Result<Bytes>>),
}

/// An answer, read whole.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// The `<Code>` of an S3 error, or nothing.
    pub fn code(&self) -> &str {
        let text = std::str::from_utf8(&self.body).unwrap_or("");
        between(text, "<Code>", "</Code>").unwrap_or("")
    }

    /// A header's text, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// All texts between `<tag>` and `</tag>`, unescaped.
    pub fn all(&self, tag: &str) -> Vec<String> {
        let text = self.text();
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let mut found = Vec::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find(&open) {
            rest = &rest[at + open.len()..];
            let Some(end) = rest.find(&close) else { break };
            found.push(unescape(&rest[..end]));
            rest = &rest[end..];
        }
        found
    }
}

fn between<'a>(text: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let start = text.find(open)? + open.len();
    let end = text[start..].find(close)?;
    Some(&text[start..start + end])
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

/// An answer whose body is still to be read.
pub struct Streaming {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    body: Incoming,
    sender: Option<Sender>,
    home: Client,
}

impl Streaming {
    /// The next bytes; None at the end.
    ///
    /// # Errors
    /// The connection broke before the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, NoAnswer> {
        loop {
            match self.body.frame().await {
                None => {
                    if let Some(sender) = self.sender.take() {
                        self.home.give_back(sender);
                    }
                    return Ok(None);
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(NoAnswer(format!("body: {error}"))),
            }
        }
    }

    /// The rest of the body.
    ///
    /// # Errors
    /// The connection broke before the end.
    pub async fn read(mut self) -> Result<Answer, NoAnswer> {
        let mut body = Vec::new();
        while let Some(data) = self.next().await? {
            body.extend_from_slice(&data);
        }
        Ok(Answer { status: self.status, headers: self.headers.clone(), body: body.into() })
    }
}

/// The client. Clones share the idle connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    address: String,
    credentials: Credentials,
    region: String,
    timeout: Duration,
    idle: Mutex<Vec<Sender>>,
}

/// Most idle connections kept.
const MAX_IDLE: usize = 256;

impl Client {
    /// A client of `host:port` with these keys in us-east-1. Every request ends within `timeout`, its body aside.
    pub fn new(address: &str, access_key: &str, secret_key: &str, timeout: Duration) -> Client {
        Client {
            inner: Arc::new(Inner {
                address: address.to_owned(),
                credentials: Credentials::new(access_key, secret_key, None, None, "given"),
                region: "us-east-1".to_owned(),
                timeout,
                idle: Mutex::new(Vec::new()),
            }),
        }
    }

    /// The address it talks to.
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// One signed request, its answer read whole. `path` is raw (`/bucket/key`, not yet percent-encoded); `query` likewise.
    ///
    /// # Errors
    /// No answer arrived.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        headers: &[(&str, &str)],
        body: Body,
        payload: Payload,
    ) -> Result<Answer, NoAnswer> {
        let work = async { self.stream(method, path, query, headers, body, payload).await?.read().await };
        tokio::time::timeout(self.inner.timeout, work).await.map_err(|_| NoAnswer("timed out".into()))?
    }

    /// One signed request; the caller reads the body.
    ///
    /// # Errors
    /// No answer arrived.
    pub async fn stream(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        headers: &[(&str, &str)],
        body: Body,
        payload: Payload,
    ) -> Result<Streaming, NoAnswer> {
        let uri = uri(path, query);
        let (signable, length, body): (SignableBody<'static>, u64, ClientBody) = match body {
            Body::Empty => (SignableBody::Precomputed(hex::encode(Sha256::digest(b""))), 0, whole(Bytes::new())),
            Body::Bytes(bytes) => {
                let signable = match payload {
                    Payload::Signed => SignableBody::Precomputed(hex::encode(Sha256::digest(&bytes))),
                    Payload::Unsigned => SignableBody::UnsignedPayload,
                };
                (signable, bytes.len() as u64, whole(bytes))
            }
            Body::Stream(length, stream) => (
                SignableBody::UnsignedPayload,
                length,
                StreamBody::new(stream.map(|piece| piece.map(Frame::data))).boxed_unsync(),
            ),
        };
        let request = self.signed(method, &uri, headers, signable, length)?.map(|()| body);
        let mut sender = self.connection().await?;
        let answer = sender.send_request(request).await.map_err(|error| no_answer("request")(&error))?;
        let (parts, body) = answer.into_parts();
        Ok(Streaming { status: parts.status, headers: parts.headers, body, sender: Some(sender), home: self.clone() })
    }

    /// A presigned URL's path and query, valid for `expires`.
    ///
    /// # Errors
    /// The signer refused.
    pub fn presign(&self, method: &Method, path: &str, expires: Duration) -> Result<String, NoAnswer> {
        let mut settings = settings();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.payload_checksum_kind = PayloadChecksumKind::NoHeader;
        settings.expires_in = Some(expires);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{}", self.inner.address, uri(path, &[])))
            .header("host", &self.inner.address)
            .body(())
            .map_err(|error| no_answer("presign")(&error))?;
        self.sign(&mut request, settings, SignableBody::UnsignedPayload)?;
        Ok(request.uri().path_and_query().map(|path| path.to_string()).unwrap_or_default())
    }

    fn signed(
        &self,
        method: Method,
        uri: &str,
        headers: &[(&str, &str)],
        body: SignableBody<'static>,
        length: u64,
    ) -> Result<Request<()>, NoAnswer> {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("http://{}{uri}", self.inner.address))
            .header("host", &self.inner.address)
            .header("content-length", length);
        for (name, value) in headers {
            builder = builder.header(
                *name,
                http::HeaderValue::from_bytes(value.as_bytes()).map_err(|error| no_answer("header")(&error))?,
            );
        }
        let mut request = builder.body(()).map_err(|error| no_answer("build")(&error))?;
        self.sign(&mut request, settings(), body)?;
        // hyper wants the origin form; the signature does not care.
        let origin = request.uri().path_and_query().map(|path| path.as_str().to_owned()).unwrap_or_else(|| "/".into());
        *request.uri_mut() = origin.parse().map_err(|error| no_answer("uri")(&error))?;
        Ok(request)
    }

    fn sign(
        &self,
        request: &mut Request<()>,
        settings: SigningSettings,
        body: SignableBody<'static>,
    ) -> Result<(), NoAnswer> {
        let identity = self.inner.credentials.clone().into();
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.inner.region)
            .name("s3")
            .time(SystemTime::now())
            .settings(settings)
            .build()
            .map_err(|error| no_answer("sign")(&error))?
            .into();
        let headers: Vec<(String, String)> = request
            .headers()
            .iter()
            .filter(|(name, _)| *name != "content-length")
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let method = request.method().to_string();
        let uri = request.uri().to_string();
        let signable = SignableRequest::new(
            &method,
            &uri,
            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())),
            body,
        )
        .map_err(|error| no_answer("sign")(&error))?;
        let (instructions, _) = sign(signable, &params).map_err(|error| no_answer("sign")(&error))?.into_parts();
        instructions.apply_to_request_http1x(request);
        Ok(())
    }

    async fn connection(&self) -> Result<Sender, NoAnswer> {
        loop {
            let idle = self.inner.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
            match idle {
                Some(sender) if sender.is_closed() => {}
                Some(mut sender) => {
                    if sender.ready().await.is_ok() {
                        return Ok(sender);
                    }
                }
                None => break,
            }
        }
        let stream =
            tokio::net::TcpStream::connect(&self.inner.address).await.map_err(|error| no_answer("connect")(&error))?;
        stream.set_nodelay(true).map_err(|error| no_answer("nodelay")(&error))?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| no_answer("handshake")(&error))?;
        tokio::spawn(async move {
            // Its end shows at the request that used it.
            let _ended = connection.await;
        });
        Ok(sender)
    }

    fn give_back(&self, sender: Sender) {
        let mut idle = self.inner.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !sender.is_closed() && idle.len() < MAX_IDLE {
            idle.push(sender);
        }
    }

    /// PUT of whole bytes, unsigned payload.
    ///
    /// # Errors
    /// No answer arrived.
    pub async fn put(&self, bucket: &str, key: &str, body: Bytes) -> Result<Answer, NoAnswer> {
        self.request(Method::PUT, &format!("/{bucket}/{key}"), &[], &[], Body::Bytes(body), Payload::Unsigned).await
    }

    /// GET, read whole.
    ///
    /// # Errors
    /// No answer arrived.
    pub async fn get(&self, bucket: &str, key: &str) -> Result<Answer, NoAnswer> {
        self.request(Method::GET, &format!("/{bucket}/{key}"), &[], &[], Body::Empty, Payload::Signed).await
    }

    /// DELETE.
    ///
    /// # Errors
    /// No answer arrived.
    pub async fn delete(&self, bucket: &str, key: &str) -> Result<Answer, NoAnswer> {
        self.request(Method::DELETE, &format!("/{bucket}/{key}"), &[], &[], Body::Empty, Payload::Signed).await
    }

    /// PUT of a bucket.
    ///
    /// # Errors
    /// No answer arrived.
    pub async fn make_bucket(&self, bucket: &str) -> Result<Answer, NoAnswer> {
        self.request(Method::PUT, &format!("/{bucket}"), &[], &[], Body::Empty, Payload::Signed).await
    }

    /// All keys under a prefix, page by page, in the order they come.
    ///
    /// # Errors
    /// No answer arrived, or one that is not a listing.
    pub async fn list(&self, bucket: &str, prefix: &str) -> Result<Vec<String>, NoAnswer> {
        let mut keys = Vec::new();
        let mut token = String::new();
        loop {
            let mut query = vec![("list-type", "2"), ("prefix", prefix)];
            if !token.is_empty() {
                query.push(("continuation-token", token.as_str()));
            }
            let page =
                self.request(Method::GET, &format!("/{bucket}"), &query, &[], Body::Empty, Payload::Signed).await?;
            if page.status != StatusCode::OK {
                return Err(NoAnswer(format!("listing: {} {}", page.status, page.code())));
            }
            keys.extend(page.all("Key"));
            match page.all("NextContinuationToken").into_iter().next() {
                Some(next) => token = next,
                None => return Ok(keys),
            }
        }
    }
}

fn settings() -> SigningSettings {
    let mut settings = SigningSettings::default();
    settings.percent_encoding_mode = PercentEncodingMode::Single;
    settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
    settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    settings
}

fn whole(bytes: Bytes) -> ClientBody {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Path and query, percent-encoded as S3 signs them: everything but unreserved characters, slashes of the path kept.
pub fn uri(path: &str, query: &[(&str, &str)]) -> String {
    let mut uri = encode(path, true);
    for (place, (name, value)) in query.iter().enumerate() {
        uri.push(if place == 0 { '?' } else { '&' });
        uri.push_str(&encode(name, false));
        uri.push('=');
        uri.push_str(&encode(value, false));
    }
    uri
}

fn encode(text: &str, keep_slash: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(byte as char),
            b'/' if keep_slash => encoded.push('/'),
            _ => {
                let _infallible = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded
}
