//! One request to the admin API, typed by [`api`].

use crate::admin::api::{ApiError, Call};
use bytes::Bytes;
use http::{header, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::net::TcpStream;

const CONNECT: Duration = Duration::from_secs(5);
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens.
    #[error("nothing answers at {address}: {why}; is the cluster running?")]
    Connect {
        /// Where.
        address: String,
        /// What happened.
        why: String,
    },
    /// The answer is an error.
    #[error("{error}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// The API's word.
        #[source]
        error: ApiError,
    },
    /// It broke off, or is not the admin API's.
    #[error("no sensible answer from {address}: {why}; is that the admin address of a gateway?")]
    Broken {
        /// Where.
        address: String,
        /// What happened.
        why: String,
    },
    /// It did not come in time.
    #[error("no answer from {address} in {} s", limit.as_secs())]
    Timeout {
        /// Where.
        address: String,
        /// How long it had.
        limit: Duration,
    },
}

/// Asks `address` (`host:port`), waits at most `limit`, and gives the answer.
///
/// # Errors
/// [`CallError`].
pub async fn call<C: Call>(address: &str, token: &str, call: &C, limit: Duration) -> Result<C::Answer, CallError> {
    let broken = |why: String| CallError::Broken { address: address.to_owned(), why };
    let unreachable = |why: String| CallError::Connect { address: address.to_owned(), why };
    let body = match C::METHOD {
        Method::GET => Bytes::new(),
        _ => serde_json::to_vec(call).map_err(|error| broken(error.to_string()))?.into(),
    };
    let request = Request::builder()
        .method(C::METHOD)
        .uri(call.path())
        .header(header::HOST, address)
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| broken(error.to_string()))?;
    let stream = tokio::time::timeout(CONNECT, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable("no connection in time".to_owned()))?
        .map_err(|error| unreachable(error.to_string()))?;
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        Ok::<_, hyper::Error>((status, Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await))
    };
    let (status, body) = tokio::time::timeout(limit, exchange)
        .await
        .map_err(|_| CallError::Timeout { address: address.to_owned(), limit })?
        .map_err(|error| broken(error.to_string()))?;
    let body = body.map_err(|error| broken(error.to_string()))?.to_bytes();
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(|error| broken(error.to_string()));
    }
    match serde_json::from_slice(&body) {
        Ok(error) => Err(CallError::Refused { status, error }),
        Err(_) => Err(broken(format!("{status} without a reason"))),
    }
}
