//! The seam between [`super::Shards`] and the disk nodes.

use crate::disks::Disks;
use futures::future::BoxFuture;
use granary_placement::id::DiskId;
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
use std::time::Duration;

/// Why a disk node gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Whether the request arrived is not known.
    #[error("{0}")]
    Lost(String),
    /// The request is longer than a frame may be; it was not sent, and never will be.
    #[error("the request is too large")]
    TooLarge,
}

/// Something that reaches disk nodes by their ids.
pub trait Peers: Send + Sync + 'static {
    /// Sends one request on the control connection of a disk. An answer of [`ControlResponse::Error`] is an answer.
    fn control(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, PeerError>>;
}

impl Peers for Disks {
    fn control(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, PeerError>> {
        let client = self.client(disk);
        Box::pin(async move {
            let Some(client) = client else { return Err(PeerError::Lost("no such disk in the map".to_owned())) };
            client.control(request, deadline).await.map_err(|error| match error {
                LinkError::TooLarge => PeerError::TooLarge,
                other => PeerError::Lost(other.to_string()),
            })
        })
    }
}
