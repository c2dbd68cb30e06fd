//! What is known of one request: its ids, what was found out on its way, and the line it leaves in the log.

use super::call::Caller;
use super::checksums::BodyCheck;
use crate::metrics::Metrics;
use crate::object::Grant;
use http::{Extensions, HeaderMap, Method};
use s3s::S3Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Longest part of a path in a log line, in bytes.
const LOGGED_PATH_BYTES: usize = 256;

/// One request.
pub(super) struct RequestInfo {
    /// x-amz-request-id: 16 hex digits.
    pub(super) id: String,
    /// x-amz-id-2.
    pub(super) id2: String,
    method: Method,
    path: String,
    began: Instant,
    /// The verb's name and who signed; set once the request has passed the access check.
    authorised: OnceLock<(&'static str, Arc<Caller>)>,
    /// A verb began its work: the body of an XML verb came whole and well.
    entered: AtomicBool,
    received_bytes: AtomicU64,
    check: Mutex<Option<BodyCheck>>,
    is_xml: AtomicBool,
    /// Memory that its XML body takes.
    held: Mutex<Option<Grant>>,
    body_fault: Mutex<Option<S3Error>>,
    metrics: Option<Metrics>,
}

impl Drop for RequestInfo {
    fn drop(&mut self) {
        if let Some(metrics) = &self.metrics {
            metrics.requests_in_flight.dec();
        }
    }
}

impl RequestInfo {
    /// Begins a request.
    pub(super) fn new(method: Method, path: &str, metrics: Option<Metrics>) -> Arc<RequestInfo> {
        if let Some(metrics) = &metrics {
            metrics.requests_in_flight.inc();
        }
        let mut random = [0u8; 24];
        // Ids need to be different, not secret: the clock will do when the system gives no randomness.
        if getrandom::fill(&mut random).is_err() {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            for (place, byte) in random.iter_mut().zip(now.as_nanos().to_le_bytes()) {
                *place = byte;
            }
        }
        let (id, id2) = random.split_at(8);
        let mut end = path.len().min(LOGGED_PATH_BYTES);
        while !path.is_char_boundary(end) {
            end -= 1;
        }
        Arc::new(RequestInfo {
            id: hex::encode_upper(id),
            id2: hex::encode(id2),
            method,
            path: path.get(..end).unwrap_or_default().to_owned(),
            began: Instant::now(),
            authorised: OnceLock::new(),
            entered: AtomicBool::new(false),
            received_bytes: AtomicU64::new(0),
            check: Mutex::new(None),
            is_xml: AtomicBool::new(false),
            held: Mutex::default(),
            body_fault: Mutex::new(None),
            metrics,
        })
    }

    /// The request that carries these extensions.
    pub(super) fn of(extensions: &Extensions) -> Option<&Arc<RequestInfo>> {
        extensions.get::<Arc<RequestInfo>>()
    }

    /// The request has passed the access check of a verb. Only the first call counts.
    pub(super) fn authorised(&self, verb: &'static str, caller: Caller) {
        let _ = self.authorised.set((verb, Arc::new(caller)));
    }

    /// Was it authorised?
    pub(super) fn is_authorised(&self) -> bool {
        self.authorised.get().is_some()
    }

    /// A verb begins. Gives who signed the request; None when it has passed no access check.
    pub(super) fn enter(&self) -> Option<Arc<Caller>> {
        self.entered.store(true, Ordering::Relaxed);
        self.authorised.get().map(|(_, caller)| caller.clone())
    }

    /// Did a verb begin?
    pub(super) fn has_entered(&self) -> bool {
        self.entered.load(Ordering::Relaxed)
    }

    /// The body is XML: checksums in the headers are verified as it is read. `of_body`: see [`BodyCheck::begin`].
    ///
    /// # Errors
    /// Malformed checksums.
    pub(super) fn verify_xml(&self, headers: &HeaderMap, of_body: bool) -> Result<(), S3Error> {
        *self.check.lock().unwrap_or_else(PoisonError::into_inner) = BodyCheck::begin(headers, of_body)?;
        self.is_xml.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Keeps a grant until the request is over.
    pub(super) fn hold(&self, grant: Grant) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *held {
            Some(held) => held.absorb(grant),
            None => *held = Some(grant),
        }
    }

    /// Whether the body is XML; known once the request has passed the access check.
    pub(super) fn is_xml(&self) -> bool {
        self.is_xml.load(Ordering::Relaxed)
    }

    /// What to verify the body with.
    pub(super) fn xml_check(&self) -> Option<BodyCheck> {
        self.check.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Why the body of an XML verb was refused. s3s answers such a body with 500; the service puts this error in its
    /// place.
    pub(super) fn set_body_fault(&self, error: S3Error) {
        *self.body_fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// See [`RequestInfo::set_body_fault`].
    pub(super) fn take_body_fault(&self) -> Option<S3Error> {
        self.body_fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Counts bytes of the body.
    pub(super) fn add_received(&self, bytes: u64) {
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The request's line in the log. Called once, when its last byte was sent or its connection broke.
    /// Counts it too.
    pub(super) fn log(&self, status: u16, code: &str, sent_bytes: u64, whole: bool) {
        let (verb, access_key_id) = match self.authorised.get() {
            Some((verb, caller)) => (*verb, caller.access_key_id.as_str()),
            None => ("-", "-"),
        };
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let received_bytes = self.received_bytes.load(Ordering::Relaxed);
        if let Some(metrics) = &self.metrics {
            metrics.bytes_in.inc_by(received_bytes);
            metrics.bytes_out.inc_by(sent_bytes);
            metrics.request_done(verb, status, self.began.elapsed());
        }
        if status >= 500 || !whole {
            tracing::warn!(
                target: "granary::s3", id = %self.id, access_key_id, verb, method = %self.method, path = ?self.path, status, code,
                received_bytes, sent_bytes, whole, ms, "request"
            );
        } else {
            tracing::debug!(
                target: "granary::s3", id = %self.id, access_key_id, verb, method = %self.method, path = ?self.path, status, code,
                received_bytes, sent_bytes, whole, ms, "request"
            );
        }
    }
}
