//! A small S3 client over hyper, for benchmarks and tests. It signs with `aws-sigv4`, a third party's signer, keeps
//! connections alive, sends bodies of any length without gathering them, and hides nothing: a test sees every status,
//! header and byte.
//!
//! Reading order: [`Client`], what is sent and how; [`answer`], what comes back; `signing`, how a request is signed.
//!
//! ```no_run
//! # async fn example() -> Result<(), granary_s3_client::NoAnswer> {
//! let limit = std::time::Duration::from_secs(10);
//! let client = granary_s3_client::Client::new("127.0.0.1:9000", "access", "secret", limit);
//! client.make_bucket("photos").await?;
//! let answer = client.put("photos", "a key", "some bytes".into()).await?;
//! assert_eq!(answer.status, 200);
//! # Ok(()) }
//! ```

pub mod answer;
mod signing;

pub use answer::{Answer, NoAnswer, Streaming};
pub use signing::uri;

use answer::no_answer;
use aws_credential_types::Credentials;
use aws_sigv4::http_request::SignableBody;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::StreamExt;
use http::{Method, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use std::sync::{Arc, Mutex};
use std::time::Duration;

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

    /// One signed request, its answer read whole. `path` is raw (`/bucket/key`, not yet percent-encoded); `query`
    /// likewise.
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
        Ok(Streaming { status: parts.status, headers: parts.headers, body, sender: Some(sender), client: self.clone() })
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

fn whole(bytes: Bytes) -> ClientBody {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}
