//! Around s3s: what happens to every request before and after its verb.
//!
//! Before: bounds, and requests that are refused whatever they ask. After: ids on the answer and in its error, errors
//! that s3s cannot tell apart put right, the unread rest of a body drained, the line in the log.

use super::access::{query_has, AccessCheck, Keys};
use super::context::S3Context;
use super::error;
use super::host::AnyCase;
use super::request::RequestInfo;
use super::request_body::{Patience, RequestBody, Socket};
use super::upload_body::BodyFault;
use super::verbs::Verbs;
use bytes::Bytes;
use futures::FutureExt;
use http::{header, HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use s3s::config::{S3Config, StaticConfigProvider};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{s3_error, Body, S3Error, StdError};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Largest chunk of a signed aws-chunked body: it is buffered whole before its signature is checked. The largest seen
/// from clients is 1 MiB.
const MAX_SIGNED_CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Longest XML body: 10,000 parts, or 1,000 keys of 1,024 bytes, take a few MiB.
const MAX_XML_BYTES: usize = 16 * 1024 * 1024;
/// Most header bytes of a request.
const MAX_HEADER_BYTES: usize = 32 * 1024;
/// Rest of a body that is drained before a refusal is sent, so that the connection can be kept.
const DRAIN_BEFORE_BYTES: usize = 256 * 1024;
const DRAIN_BEFORE_TIME: Duration = Duration::from_millis(50);
/// Rest of a body that is drained while a refusal is being read, so that no reset destroys it.
const DRAIN_AFTER_BYTES: usize = 64 * 1024 * 1024;
const DRAIN_AFTER_TIME: Duration = Duration::from_secs(10);
/// Longest error answer that gets ids.
const MAX_ERROR_BYTES: usize = 64 * 1024;

/// What keeps the S3 front end from starting.
#[derive(Debug, thiserror::Error)]
pub enum S3SetupError {
    /// s3s checks nothing when it has no keys.
    #[error("there is no access key, or one with an empty id or secret")]
    NoKeys,
    /// No region name.
    #[error("`{0}` is not a region")]
    Region(String),
    /// No domain.
    #[error("`{0}` is not a domain")]
    Domain(String),
    /// No network.
    #[error("`{0}` in s3.trusted_proxies is neither an address nor a network such as 10.0.0.0/8")]
    Proxy(String),
}

/// The S3 front end as an HTTP service; cheap to clone.
#[derive(Clone)]
pub(super) struct FrontEnd {
    service: S3Service,
    /// The same for clients that do not know the region yet: they ask for it signed for us-east-1.
    location: Option<S3Service>,
    cx: Arc<S3Context>,
    requests: Arc<Semaphore>,
}

const FIRST_REGION: &str = "us-east-1";

fn build(cx: &Arc<S3Context>, region: &str, only: Option<&'static str>) -> Result<S3Service, S3SetupError> {
    let mut config = S3Config::default();
    config.expected_region = Some(region.parse().map_err(|_| S3SetupError::Region(region.to_owned()))?);
    config.aws_chunked_stream_max_chunk_size = MAX_SIGNED_CHUNK_BYTES;
    config.sig_v4_allowed_services = vec!["s3".to_owned()];
    config.enable_sig_v2 = false;
    config.allow_post_signature = false;
    config.xml_max_body_size = MAX_XML_BYTES;
    config.post_object_max_file_size = 0;
    config.form_max_field_size = 1024;
    config.form_max_fields_size = 16 * 1024;
    config.form_max_parts = 16;
    config.unsigned_amz_header_allowlist = Vec::new();
    config.normalize_forward_slash_path = false;
    // The request itself says what it is; a query parameter that could disagree with it does not.
    config.operation_id_routing = false;
    let mut builder = S3ServiceBuilder::new(Verbs(cx.clone()));
    builder.set_config(Arc::new(StaticConfigProvider::new(Arc::new(config))));
    builder.set_auth(Keys(cx.clone()));
    builder.set_access(AccessCheck { cx: cx.clone(), only });
    if let Some(domain) = &cx.settings.base_domain {
        builder.set_host(AnyCase::new(domain).ok_or_else(|| S3SetupError::Domain(domain.clone()))?);
    }
    Ok(builder.build())
}

impl FrontEnd {
    /// Builds the front end.
    ///
    /// # Errors
    /// Settings that cannot be.
    pub(super) fn new(cx: Arc<S3Context>) -> Result<FrontEnd, S3SetupError> {
        let keys = &cx.settings.keys;
        if keys.is_empty() || keys.iter().any(|(id, key)| id.is_empty() || key.secret.is_empty()) {
            return Err(S3SetupError::NoKeys);
        }
        let region = cx.settings.region.clone();
        let service = build(&cx, &region, None)?;
        let location =
            if region == FIRST_REGION { None } else { Some(build(&cx, FIRST_REGION, Some("GetBucketLocation"))?) };
        let requests = Arc::new(Semaphore::new(cx.settings.max_requests));
        Ok(FrontEnd { service, location, cx, requests })
    }

    /// Answers one request. `refuse_all` is set on connections beyond the bound.
    /// `work` is dropped when the last byte of the answer was handed over.
    pub(super) async fn handle<W>(&self, request: Request<Incoming>, refuse_all: bool, work: W) -> Response<Answer<W>> {
        let info = RequestInfo::new(request.method().clone(), request.uri().path(), self.cx.settings.metrics.clone());
        let head = request.method() == Method::HEAD;
        let permit = if refuse_all { None } else { self.requests.clone().try_acquire_owned().ok() };
        let expects_continue = request.headers().contains_key(header::EXPECT);
        let (parts, incoming) = request.into_parts();
        let socket = Socket::new(incoming);

        let mut response = if permit.is_none() {
            refusal(s3_error!(SlowDown), head)
        } else if let Err(error) = check_head(&parts.method, &parts.headers, &parts.uri) {
            refusal(error, head)
        } else {
            let service = self.service_for(&parts);
            let signed_chunks = parts
                .headers
                .get("x-amz-content-sha256")
                .is_some_and(|mode| mode == "STREAMING-AWS4-HMAC-SHA256-PAYLOAD");
            let patience =
                Patience { time: self.cx.settings.body_idle_timeout, bytes: self.cx.settings.body_progress_bytes };
            let body = RequestBody::new(
                socket.clone(),
                info.clone(),
                patience,
                self.cx.objects.memory().clone(),
                signed_chunks,
            );
            let mut request = Request::from_parts(parts, Body::http_body(body));
            request.extensions_mut().insert(info.clone());
            match AssertUnwindSafe(service.call(request)).catch_unwind().await {
                Ok(Ok(response)) => response,
                Ok(Err(cause)) => refusal(error::internal(cause), head),
                Err(_) => refusal(error::internal("a verb panicked"), head),
            }
        };
        if response.status() == StatusCode::INTERNAL_SERVER_ERROR && info.is_authorised() && !info.has_entered() {
            // Between authorisation and verb there is only the reading of an XML body, and s3s has one answer for all
            // that can go wrong there.
            let cause = info.take_body_fault().unwrap_or_else(|| BodyFault::ContentSha256.into());
            response = refusal(cause, head);
        }
        if head && response.status() == StatusCode::OK && response.headers().contains_key(header::CONTENT_RANGE) {
            // s3s knows the 206 of a GET only.
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        let code = self.complete_error(&mut response, &info, head).await;
        for (name, value) in [("x-amz-request-id", &info.id), ("x-amz-id-2", &info.id2)] {
            if let Ok(value) = HeaderValue::from_str(value) {
                response.headers_mut().insert(name, value);
            }
        }
        response.headers_mut().insert(header::SERVER, HeaderValue::from_static("Granary"));
        if refuse_all || !drained(&socket, expects_continue).await {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        let status = response.status().as_u16();
        response.map(|body| Answer { body, info, status, code, sent_bytes: 0, whole: head, _held: (permit, work) })
    }

    /// A request for a bucket's location may be signed for us-east-1; its signature is verified all the same.
    fn service_for(&self, parts: &http::request::Parts) -> &S3Service {
        let Some(location) = &self.location else { return &self.service };
        let query = parts.uri.query().unwrap_or_default();
        let asks = parts.method == Method::GET
            && form_urlencoded::parse(query.as_bytes()).any(|(name, value)| name == "location" && value.is_empty());
        let scope = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if asks && scope.contains("/us-east-1/s3/") {
            location
        } else {
            &self.service
        }
    }

    /// Puts ids (and the right region) into an error's XML. Gives its code.
    async fn complete_error(&self, response: &mut Response<Body>, info: &RequestInfo, head: bool) -> String {
        let status = response.status();
        if !(status.is_client_error() || status.is_server_error()) || head {
            return String::new();
        }
        let body = std::mem::take(response.body_mut());
        let text = match http_body_util::Limited::new(body, MAX_ERROR_BYTES).collect().await {
            Ok(collected) => String::from_utf8(collected.to_bytes().to_vec()).unwrap_or_default(),
            Err(_) => String::new(),
        };
        let code = text
            .split_once("<Code>")
            .and_then(|(_, rest)| rest.split_once("</Code>"))
            .map_or("", |(code, _)| code)
            .to_owned();
        let text = match text.strip_suffix("</Error>") {
            Some(begin) => {
                let region = if code == "AuthorizationHeaderMalformed" {
                    format!("<Region>{}</Region>", self.cx.settings.region)
                } else {
                    String::new()
                };
                format!("{begin}{region}<RequestId>{}</RequestId><HostId>{}</HostId></Error>", info.id, info.id2)
            }
            None => text,
        };
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(text);
        code
    }
}

/// An error of ours as an answer.
fn refusal(error: S3Error, head: bool) -> Response<Body> {
    let status = error.status_code().unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = error.to_http_response().unwrap_or_else(|_| Response::default());
    *response.status_mut() = status;
    if head {
        *response.body_mut() = Body::empty();
    }
    response
}

/// Requests that are refused whatever they ask.
fn check_head(method: &Method, headers: &HeaderMap, uri: &Uri) -> Result<(), S3Error> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if bytes > MAX_HEADER_BYTES {
        let message = "Your request header section exceeds the maximum allowed size.";
        return Err(error::custom("RequestHeaderSectionTooLarge", StatusCode::BAD_REQUEST, message));
    }
    if headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH) {
        return Err(s3_error!(InvalidRequest, "A request must not have both Content-Length and Transfer-Encoding."));
    }
    let form = headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        value.as_bytes().get(..19).is_some_and(|begin| begin.eq_ignore_ascii_case(b"multipart/form-data"))
    });
    if *method == Method::POST && form {
        return Err(error::not_implemented("Upload by an HTML form"));
    }
    let authorizations = headers.get_all(header::AUTHORIZATION).iter().count();
    let signed_query = query_has(uri, "x-amz-signature");
    if authorizations > 1 || (authorizations == 1 && signed_query) {
        return Err(s3_error!(InvalidArgument, "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, Signature query string parameter or the Authorization header should be specified"));
    }
    Ok(())
}

async fn drain(body: &mut Incoming, most: usize) -> bool {
    let mut left = most;
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return false };
        let len = frame.data_ref().map_or(0, Bytes::len);
        match left.checked_sub(len) {
            Some(rest) => left = rest,
            None => return false,
        }
    }
    true
}

/// Deals with the unread rest of a body. False: the connection must be closed after the answer.
async fn drained(socket: &Socket, expects_continue: bool) -> bool {
    let Some(mut rest) = socket.take_rest() else { return true };
    if expects_continue && !socket.was_polled() {
        // The client still waits for a word: the answer is it, and no body will come.
        return false;
    }
    match tokio::time::timeout(DRAIN_BEFORE_TIME, drain(&mut rest, DRAIN_BEFORE_BYTES)).await {
        Ok(true) => true,
        Ok(false) | Err(_) => {
            tokio::spawn(async move {
                let _ = tokio::time::timeout(DRAIN_AFTER_TIME, drain(&mut rest, DRAIN_AFTER_BYTES)).await;
            });
            false
        }
    }
}

/// The body of an answer: counts, and logs the request when it is over.
pub(super) struct Answer<W> {
    body: Body,
    info: Arc<RequestInfo>,
    status: u16,
    code: String,
    sent_bytes: u64,
    whole: bool,
    _held: (Option<OwnedSemaphorePermit>, W),
}

impl<W: Unpin> http_body::Body for Answer<W> {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        let polled = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &polled {
            Some(Ok(frame)) => self.sent_bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
            Some(Err(_)) => self.whole = false,
            None => self.whole = true,
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<W> Drop for Answer<W> {
    fn drop(&mut self) {
        let whole = self.whole || self.body.is_end_stream();
        self.info.log(self.status, &self.code, self.sent_bytes, whole);
    }
}
