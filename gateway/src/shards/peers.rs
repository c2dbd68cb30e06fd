//! The seam between [`super::Shards`] and the disk nodes.

use futures::future::BoxFuture;
use granary_placement::id::DiskId;
use granary_wire::control::{ControlRequest, ControlResponse};
use std::time::Duration;

/// No answer from a disk node. Whether the request arrived is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct PeerError {
    /// What happened, for logs and the last error of a deadline.
    pub detail: String,
}

/// Something that reaches disk nodes by their ids.
pub trait Peers: Send + Sync + 'static {
    /// Sends one request on the control connection of a disk. An answer of [`ControlResponse::Error`] is an answer.
    fn control(&self, disk: DiskId, request: ControlRequest, deadline: Duration) -> BoxFuture<'_, Result<ControlResponse, PeerError>>;
}
