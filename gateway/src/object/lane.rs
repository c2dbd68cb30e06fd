//! One chunk's way onto its disk: a task that begins it, sends its units as they come, and finishes it.
//!
//! Every step has a deadline, so a lane always ends; when it ends early its queue closes and the extent goes on without
//! it.

use crate::disks::{DiskHealth, Disks};
use bytes::Bytes;
use granary_placement::id::DiskId;
use granary_wire::chunk::{ChunkId, ChunkSpec};
use granary_wire::client::NodeClient;
use granary_wire::error::{ChunkError, LinkError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

/// Units that wait for a lane. With the one it is sending and the one being gathered, three stripes are in memory.
const QUEUED_UNITS: usize = 1;
/// How often somebody who waits for a lane looks whether its disk is still up.
pub(super) const HEALTH_LOOK: Duration = Duration::from_millis(100);

enum Message {
    Unit(Bytes),
    Finish,
}

/// What a lane is for.
pub(super) struct LaneTarget {
    /// Chunk index.
    pub index: u8,
    /// Its disk.
    pub disk: DiskId,
    /// Its client.
    pub client: NodeClient,
    /// Its name.
    pub id: ChunkId,
}

/// The sending end of one chunk.
pub(super) struct Lane {
    pub(super) index: u8,
    pub(super) disk: DiskId,
    queue: Option<mpsc::Sender<Message>>,
    pub(super) task: JoinHandle<Result<(), ChunkError>>,
}

impl Lane {
    /// A lane that gets its units one by one by [`Lane::send`].
    pub(super) fn stream(target: LaneTarget, spec: ChunkSpec, deadline: Duration, tasks: &TaskTracker) -> Lane {
        let (queue, mut messages) = mpsc::channel(QUEUED_UNITS);
        let LaneTarget { index, disk, client, id } = target;
        let task = tasks.spawn(async move {
            let mut writer = within(deadline, client.begin_chunk(id, spec)).await?;
            while let Some(message) = messages.recv().await {
                match message {
                    Message::Unit(unit) => within(deadline, writer.write(unit)).await?,
                    Message::Finish => return stored(within(deadline, writer.finish()).await),
                }
            }
            // The extent was given up: dropping the writer aborts the chunk.
            Err(ChunkError::Link(LinkError::Closed("given up".to_owned())))
        });
        Lane { index, disk, queue: Some(queue), task }
    }

    /// A lane that has all its units at once.
    pub(super) fn whole(
        target: LaneTarget,
        spec: ChunkSpec,
        units: Vec<Bytes>,
        deadline: Duration,
        tasks: &TaskTracker,
    ) -> Lane {
        let LaneTarget { index, disk, client, id } = target;
        let task = tasks.spawn(async move { stored(within(deadline, client.put_chunk(id, spec, units)).await) });
        Lane { index, disk, queue: None, task }
    }

    /// Hands the next unit over; waits while the lane is behind. False when the lane has ended, or when it is behind,
    /// its disk is not up and `spare` says that the extent can do without it.
    pub(super) async fn send(&self, unit: Bytes, disks: &Disks, spare: bool) -> bool {
        self.deliver(Message::Unit(unit), disks, spare).await
    }

    /// Says that all units were sent.
    pub(super) async fn finish(&self, disks: &Disks, spare: bool) -> bool {
        self.queue.is_none() || self.deliver(Message::Finish, disks, spare).await
    }

    async fn deliver(&self, message: Message, disks: &Disks, spare: bool) -> bool {
        let Some(queue) = &self.queue else { return false };
        let permit = queue.reserve();
        tokio::pin!(permit);
        loop {
            tokio::select! {
                permit = &mut permit => {
                    return permit.map(|permit| permit.send(message)).is_ok();
                }
                () = tokio::time::sleep(HEALTH_LOOK) => {
                    if spare && disks.health(self.disk) != DiskHealth::Up {
                        return false;
                    }
                }
            }
        }
    }
}

/// The disk has the chunk already: ids are random, so it is the one this lane sent before a connection was lost.
fn stored(result: Result<(), ChunkError>) -> Result<(), ChunkError> {
    match result {
        Err(ChunkError::AlreadyThere) => Ok(()),
        other => other,
    }
}

async fn within<T>(
    deadline: Duration,
    work: impl std::future::Future<Output = Result<T, ChunkError>>,
) -> Result<T, ChunkError> {
    tokio::time::timeout(deadline, work).await.unwrap_or(Err(ChunkError::Link(LinkError::Timeout)))
}
