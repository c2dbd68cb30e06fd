//! One HTTP request to the admin API.

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
    #[error("{status}: {why}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// The API's words.
        why: String,
    },
    /// It broke off, or makes no sense.
    #[error("no sensible answer from {address}: {why}")]
    Broken {
        /// Where.
        address: String,
        /// What happened.
        why: String,
    },
}

/// Asks `address` (`host:port`), waits at most `limit`, and gives the JSON of a successful answer.
///
/// # Errors
/// [`CallError`].
pub async fn call(
    address: &str,
    token: &str,
    method: Method,
    path: &str,
    body: Vec<u8>,
    limit: Duration,
) -> Result<serde_json::Value, CallError> {
    let broken = |why: String| CallError::Broken { address: address.to_owned(), why };
    let unreachable = |why: String| CallError::Connect { address: address.to_owned(), why };
    let stream = tokio::time::timeout(CONNECT, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable("no connection in time".to_owned()))?
        .map_err(|error| unreachable(error.to_string()))?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, address)
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| broken(error.to_string()))?;
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let answer = sender.send_request(request).await?;
        Ok::<_, hyper::Error>(answer)
    };
    let answer = tokio::time::timeout(limit, exchange)
        .await
        .map_err(|_| broken(format!("no answer in {} s", limit.as_secs())))?
        .map_err(|error| broken(error.to_string()))?;
    let status = answer.status();
    let body = tokio::time::timeout(limit, Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect())
        .await
        .map_err(|_| broken("the answer stalls".to_owned()))?
        .map_err(|error| broken(error.to_string()))?
        .to_bytes();
    let json: serde_json::Value = serde_json::from_slice(&body).map_err(|error| broken(error.to_string()))?;
    if status.is_success() {
        return Ok(json);
    }
    let why = json.get("error").and_then(serde_json::Value::as_str).unwrap_or("no reason given").to_owned();
    Err(CallError::Refused { status, why })
}
