//! The mark that background work carries: which task it belongs to, and under which lease its sender does that task.
//!
//! The root shard hands out leases and adds one to a task's epoch each time another holder takes it. Shards and disks
//! keep the highest epoch they saw of each task and refuse lower ones, so a holder that was paused or cut off cannot
//! act after its successor did.

use serde::{Deserialize, Serialize};

/// Longest name of a task, in bytes.
pub const MAX_TASK_BYTES: usize = 64;

/// A task and the epoch of its lease.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseStamp {
    /// The task, 1 to [`MAX_TASK_BYTES`] bytes, no NUL.
    pub task: String,
    /// Epoch of the lease; the first holder has 1.
    pub epoch: u64,
}

impl LeaseStamp {
    /// Can this be the name of a task?
    pub fn is_task(task: &str) -> bool {
        !task.is_empty() && task.len() <= MAX_TASK_BYTES && !task.as_bytes().contains(&0)
    }
}
