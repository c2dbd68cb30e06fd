//! The seam between [`super::Shards`] and the disk nodes.

use crate::disks::Disks;
use futures::future::BoxFuture;
use granary_placement::id::DiskId;
use granary_wire::control::{ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
use std::time::Duration;

/// Something that reaches disk nodes by their ids.
pub trait Peers: Send + Sync + 'static {
    /// Sends one request on the control connection of a disk. An answer of [`ControlResponse::Error`] is an answer.
    fn control(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, LinkError>>;
}

impl Peers for Disks {
    fn control(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, LinkError>> {
        let client = self.client(disk);
        Box::pin(async move {
            let Some(client) = client else { return Err(LinkError::Connect("no such disk in the map".to_owned())) };
            client.control(request, deadline).await
        })
    }
}
