//! The write of one chunk to its disk: a task that begins it, sends its units as they come, and finishes it.
//!
//! Every step has a deadline, so a chunk write always ends; when it ends early its queue closes and the extent goes on
//! without it.

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

/// Units that wait to be sent. With the one being sent and the one being gathered, three stripes are in memory.
const QUEUED_UNITS: usize = 1;
/// How often somebody who waits for a chunk write looks whether its disk is still up.
pub(super) const HEALTH_LOOK: Duration = Duration::from_millis(100);

enum Message {
    Unit(Bytes),
    Finish,
}

/// Which chunk is written, and where.
pub(super) struct ChunkTarget {
    /// Chunk index.
    pub index: u8,
    /// Its disk.
    pub disk: DiskId,
    /// Its client.
    pub client: NodeClient,
    /// Its name.
    pub id: ChunkId,
}

/// The sending end of one chunk write.
pub(super) struct ChunkWrite {
    pub(super) index: u8,
    pub(super) disk: DiskId,
    queue: Option<mpsc::Sender<Message>>,
    pub(super) task: JoinHandle<Result<(), ChunkError>>,
}

impl ChunkWrite {
    /// A chunk that gets its units one by one by [`ChunkWrite::send`].
    pub(super) fn stream(target: ChunkTarget, spec: ChunkSpec, deadline: Duration, tasks: &TaskTracker) -> ChunkWrite {
        let (queue, mut messages) = mpsc::channel(QUEUED_UNITS);
        let ChunkTarget { index, disk, client, id } = target;
        let task = tasks.spawn(async move {
            let mut writer = within(deadline, client.begin_chunk(id, spec)).await?;
            while let Some(message) = messages.recv().await {
                match message {
                    Message::Unit(unit) => within(deadline, writer.write(unit)).await?,
                    Message::Finish => return within(deadline, writer.finish()).await,
                }
            }
            // The extent was given up: dropping the writer aborts the chunk.
            Err(ChunkError::Link(LinkError::Closed("given up".to_owned())))
        });
        ChunkWrite { index, disk, queue: Some(queue), task }
    }

    /// A chunk that has all its units at once.
    pub(super) fn whole(
        target: ChunkTarget,
        spec: ChunkSpec,
        units: Vec<Bytes>,
        deadline: Duration,
        tasks: &TaskTracker,
    ) -> ChunkWrite {
        let ChunkTarget { index, disk, client, id } = target;
        let task = tasks.spawn(async move { within(deadline, client.put_chunk(id, spec, units)).await });
        ChunkWrite { index, disk, queue: None, task }
    }

    /// Hands the next unit over; waits while the write is behind. False when it has ended, or when it is behind, its
    /// disk is not up and `spare` says that the extent can do without it.
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

async fn within<T>(
    deadline: Duration,
    work: impl std::future::Future<Output = Result<T, ChunkError>>,
) -> Result<T, ChunkError> {
    tokio::time::timeout(deadline, work).await.unwrap_or(Err(ChunkError::Link(LinkError::Timeout)))
}
