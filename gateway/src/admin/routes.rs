//! Which path leads where, what a request may weigh and take, and how errors leave.

use super::api::{ApiError, Call, ErrorCode};
use super::{acts, page, ready, AdminContext};
use axum::body::{Body, Bytes};
use axum::error_handling::HandleErrorLayer;
use axum::extract::{FromRequest, MatchedPath, RawPathParams, Request, State};
use axum::middleware::{from_fn_with_state, map_response, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, MethodRouter};
use axum::{BoxError, RequestExt, Router};
use http::{header, HeaderName, HeaderValue, Method, StatusCode};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::ServiceBuilder;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};
use tower_http::set_header::SetResponseHeaderLayer;
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutLayer};
use tower_http::trace::{DefaultOnFailure, DefaultOnRequest, DefaultOnResponse, TraceLayer};
use tracing::Level;

const CSP: &str = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What a request may weigh and take.
#[derive(Debug, Clone)]
pub(super) struct RequestLimits {
    /// Longest body, in bytes.
    pub body_bytes: usize,
    /// Longest wait for the next piece of a body.
    pub body_pause: Duration,
    /// Time for a request that is not a census.
    pub request: Duration,
    /// Requests that change something under way at once; more are refused as busy.
    pub acts: usize,
    /// Acts without a time limit under way at a time.
    pub long_acts: usize,
}

impl Default for RequestLimits {
    fn default() -> RequestLimits {
        RequestLimits {
            body_bytes: 64 * 1024,
            body_pause: Duration::from_secs(10),
            request: Duration::from_secs(120),
            acts: 8,
            long_acts: 2,
        }
    }
}

pub(super) type Shared = Arc<AdminContext>;

/// Everything the listener serves.
pub(super) fn router(context: Shared, limits: &RequestLimits) -> Router {
    let timeout = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, limits.request);
    let public = Router::new()
        .route("/", get(front_page))
        .route("/granary.css", get(|| async { typed("text/css; charset=utf-8", page::CSS) }))
        .route("/healthz", get(|| async { typed(TEXT, "ok\n") }))
        .route("/readyz", get(readiness))
        .route("/metrics", get(metrics));
    let busy = |places: usize| {
        ServiceBuilder::new()
            .layer(HandleErrorLayer::new(|_: BoxError| async {
                ApiError::new(ErrorCode::Busy, "too many requests of this kind are under way; try again later")
            }))
            .load_shed()
            // One limit for all of them together; `concurrency_limit` would give each route its own.
            .layer(GlobalConcurrencyLimitLayer::new(places))
    };
    let quick = acts::changes().layer(timeout);
    let operators = acts::listings()
        .layer(timeout)
        .merge(quick.layer(busy(limits.acts)))
        // What takes as long as it takes has no time limit, and places of its own: hours of counting must not keep an
        // operator from replacing a disk.
        .merge(acts::long().layer(busy(limits.long_acts)))
        .merge(acts::walks().layer(busy(limits.long_acts)))
        .layer(from_fn_with_state(context.clone(), token));
    let around = ServiceBuilder::new()
        // Ids are ours: what a client sends is of any length and says nothing.
        .map_request(|mut request: Request| {
            request.headers_mut().remove(REQUEST_ID);
            request
        })
        .layer(SetRequestIdLayer::new(REQUEST_ID, Numbered))
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(span)
                .on_request(DefaultOnRequest::new().level(Level::DEBUG))
                .on_response(DefaultOnResponse::new().level(Level::DEBUG))
                // A probe that hears "not ready" is no error of ours; what fails is logged where it is handled.
                .on_failure(DefaultOnFailure::new().level(Level::DEBUG)),
        )
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(fixed(header::CACHE_CONTROL, "no-store"))
        .layer(fixed(header::CONTENT_SECURITY_POLICY, CSP))
        .layer(fixed(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(fixed(header::REFERRER_POLICY, "no-referrer"))
        .layer(map_response(errors_as_json));
    public
        .layer(timeout)
        .merge(operators)
        .fallback(|| async { ApiError::new(ErrorCode::NotFound, "no such path") })
        .layer(RequestBodyTimeoutLayer::new(limits.body_pause))
        .layer(RequestBodyLimitLayer::new(limits.body_bytes))
        .layer(around)
        .with_state(context)
}

/// Adds the route of a request.
pub(super) fn on<C, F, A>(router: Router<Shared>, act: F) -> Router<Shared>
where
    C: Call,
    F: Fn(Shared, C) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Result<C::Answer, ApiError>> + Send + 'static,
{
    let handler = move |State(context): State<Shared>, Input(call): Input<C>| async move {
        act(context, call).await.map(|answer| json(StatusCode::OK, &answer))
    };
    let method: MethodRouter<Shared> = if C::METHOD == Method::GET { get(handler) } else { post(handler) };
    router.route(C::ROUTE, method)
}

/// A request, from its path and its body.
struct Input<C>(C);

impl<C: Call, S: Send + Sync> FromRequest<S> for Input<C> {
    type Rejection = ApiError;

    async fn from_request(mut request: Request, _: &S) -> Result<Input<C>, ApiError> {
        let bad = |why: String| ApiError::new(ErrorCode::BadRequest, why);
        let params: RawPathParams = request.extract_parts().await.map_err(|_| bad("the path is no text".to_owned()))?;
        let body = if C::METHOD == Method::GET { Bytes::new() } else { whole(request.into_body()).await? };
        let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
        let mut call: C = serde_json::from_slice(body)
            .map_err(|error| bad(format!("the body is not this request as JSON: {error}")))?;
        for (_, value) in params.iter().filter(|(name, _)| *name == "disk") {
            call.set_disk(value.parse().map_err(|_| bad("the disk id is a number".to_owned()))?);
        }
        Ok(Input(call))
    }
}

/// The body, which the layers around keep short.
async fn whole(body: Body) -> Result<Bytes, ApiError> {
    axum::body::to_bytes(body, usize::MAX).await.map_err(|error| {
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = cause {
            if error.is::<http_body_util::LengthLimitError>() {
                return ApiError::new(ErrorCode::TooLarge, "the body is too long");
            }
            if error.is::<tower_http::timeout::TimeoutError>() {
                return ApiError::new(ErrorCode::Timeout, "the body did not come whole in time");
            }
            cause = error.source();
        }
        ApiError::new(ErrorCode::BadRequest, "the body did not come whole")
    })
}

async fn token(State(context): State<Shared>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|given| given.strip_prefix("Bearer "));
    if given.is_some_and(|token| context.token.matches(token.trim())) {
        return next.run(request).await;
    }
    let why = "the admin token is missing or wrong (Authorization: Bearer TOKEN)";
    let mut refusal = ApiError::new(ErrorCode::Unauthorized, why).into_response();
    refusal.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    refusal
}

async fn front_page(State(context): State<Shared>) -> Result<Response, ApiError> {
    let status = context.status.get().await;
    let readiness = ready::verdict(&status, &ready::Facts::of(&context));
    match page::render(&status, &readiness, &context.s3) {
        Ok(page) => Ok(typed(HTML, page)),
        Err(error) => Err(ApiError::new(ErrorCode::Internal, error)),
    }
}

async fn readiness(State(context): State<Shared>) -> Response {
    let readiness = ready::verdict(context.status.get().await.as_ref(), &ready::Facts::of(&context));
    json(if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &readiness)
}

async fn metrics(State(context): State<Shared>) -> Result<Response, ApiError> {
    // Gauges of disks and shards are set by it.
    context.status.get().await;
    let text = context.metrics.text().map_err(|error| ApiError::new(ErrorCode::Internal, error))?;
    Ok(typed("text/plain; version=0.0.4; charset=utf-8", text))
}

fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Response {
    match serde_json::to_vec_pretty(value) {
        Ok(mut text) => {
            text.push(b'\n');
            (status, typed("application/json", text)).into_response()
        }
        Err(error) => ApiError::new(ErrorCode::Internal, error).into_response(),
    }
}

fn typed(kind: &'static str, body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, kind)], body.into()).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match serde_json::to_string(&self) {
            Ok(text) => (self.code.status(), typed("application/json", text + "\n")).into_response(),
            Err(_) => self.code.status().into_response(),
        }
    }
}

/// Errors that a layer or the router made have no body of ours yet.
async fn errors_as_json(answer: Response) -> Response {
    let ours = answer.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    let status = answer.status();
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return answer;
    }
    let (code, why) = match status {
        StatusCode::METHOD_NOT_ALLOWED => (ErrorCode::MethodNotAllowed, "this path takes another method"),
        StatusCode::REQUEST_TIMEOUT => (ErrorCode::Timeout, "the request was not done in time"),
        StatusCode::PAYLOAD_TOO_LARGE => (ErrorCode::TooLarge, "the body is too long"),
        StatusCode::NOT_FOUND => (ErrorCode::NotFound, "no such path"),
        status if status.is_client_error() => (ErrorCode::BadRequest, "the request makes no sense"),
        _ => (ErrorCode::Internal, "the gateway failed"),
    };
    let mut typed = ApiError::new(code, why).into_response();
    *typed.status_mut() = status;
    if let Some(allow) = answer.headers().get(header::ALLOW) {
        typed.headers_mut().insert(header::ALLOW, allow.clone());
    }
    typed
}

fn fixed(name: HeaderName, value: &'static str) -> SetResponseHeaderLayer<HeaderValue> {
    SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value))
}

/// Ids of requests: random, so that those of several gateways can be told apart.
#[derive(Clone, Copy)]
struct Numbered;

impl MakeRequestId for Numbered {
    fn make_request_id<B>(&mut self, _: &http::Request<B>) -> Option<RequestId> {
        let id = format!("{:016x}", crate::shards::random_below(u64::MAX));
        HeaderValue::from_str(&id).ok().map(RequestId::new)
    }
}

/// The route, not the path: a path is as long as a client likes.
fn span<B>(request: &http::Request<B>) -> tracing::Span {
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str);
    let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
    tracing::info_span!("admin", method = %request.method(), route, id)
}
