//! The metadata role: shard replicas on this disk. This build hosts none and says so: every shard is unknown here.

use bytes::Bytes;
use granary_placement::id::{DiskId, ShardId};
use granary_wire::control::ControlError;
use granary_wire::meta::{Answer, MetaRequest, Query, Reply, ShardStatus};

/// Shard replicas of this disk: none.
pub struct Roles;

impl Roles {
    /// A command for a shard here.
    ///
    /// # Errors
    /// NoSuchShard.
    pub async fn command(&self, shard: ShardId, _request: MetaRequest) -> Result<Reply, ControlError> {
        Err(ControlError::NoSuchShard(shard))
    }

    /// A query for a shard here.
    ///
    /// # Errors
    /// NoSuchShard.
    pub async fn query(&self, shard: ShardId, _query: Query) -> Result<Answer, ControlError> {
        Err(ControlError::NoSuchShard(shard))
    }

    /// A message for a replica here.
    ///
    /// # Errors
    /// NoSuchShard.
    pub async fn raft(&self, shard: ShardId, _from: DiskId, _message: Bytes) -> Result<Bytes, ControlError> {
        Err(ControlError::NoSuchShard(shard))
    }

    /// Makes a shard here.
    ///
    /// # Errors
    /// NoSuchShard.
    pub async fn init_shard(&self, shard: ShardId, _members: Vec<DiskId>) -> Result<(), ControlError> {
        Err(ControlError::NoSuchShard(shard))
    }

    /// How the replicas here stand.
    pub fn status(&self) -> Vec<ShardStatus> {
        Vec::new()
    }
}
