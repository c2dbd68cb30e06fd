//! Work that no client waits for: healing, garbage, walks. One gateway at a time does each task.
//!
//! - [`leases`]: who does it, and how that is found out by everybody else;
//! - [`heal`]: the tasks themselves;
//! - [`reads`]: garbage waits for reads that last long.
//!
//! **Invariant:** every command that takes something off a queue, and every chunk request of background work, carries
//! the stamp of its lease, so that shards and disks refuse a gateway that was paused and does not know yet that another
//! one took over. The end of moves is a change of the map, made on the very map that was looked at or not at all, and
//! reports of missing chunks only add work: neither carries a stamp.

pub mod heal;
pub mod leases;
pub mod reads;

use crate::shards::{ShardError, Shards};
use granary_meta::{Command, Reply};
use granary_placement::id::ShardId;

/// Applies a command that carries the stamp of `held`. When the shard has heard of a later holder, the lease is given
/// up.
async fn command_under(
    meta: &Shards,
    held: &leases::Held,
    shard: ShardId,
    command: Command,
) -> Result<Reply, ShardError> {
    match meta.command(shard, command).await? {
        Reply::StaleLease { current } => {
            held.refused(current);
            Err(ShardError::LeaseLost { shard, current })
        }
        reply => Ok(reply),
    }
}
