//! Work that no client waits for: healing, garbage, walks. One gateway at a time does each task.
//!
//! - [`leases`]: who does it, and how that is found out by everybody else;
//! - [`heal`]: the tasks themselves.
//!
//! **Invariant:** every command and every chunk request of background work carries the stamp of its lease, so that
//! shards and disks refuse a gateway that was paused and does not know yet that another one took over.

pub mod heal;
pub mod leases;

use crate::shards::map_watch::MapSet;
use crate::shards::Shards;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::ShardId;
use granary_placement::map::ClusterMap;

/// A metadata shard did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shard {shard}: {detail}")]
pub struct MetaClientError {
    /// Which shard.
    pub shard: ShardId,
    /// What happened.
    pub detail: String,
}

impl MetaClientError {
    fn unexpected(shard: ShardId, answer: &impl std::fmt::Debug) -> MetaClientError {
        let text: String = format!("{answer:?}").chars().take(80).collect();
        MetaClientError { shard, detail: format!("unexpected answer: {text}") }
    }
}

/// The way to the metadata shards, as far as background work needs it.
#[async_trait::async_trait]
pub trait MetaClient: Send + Sync + 'static {
    /// Applies a command to a shard.
    async fn command(&self, shard: ShardId, command: Command) -> Result<Reply, MetaClientError>;
    /// Reads from a shard, linearizably.
    async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, MetaClientError>;
    /// The shards that hold objects.
    fn shards(&self) -> Vec<ShardId>;
    /// Installs a map whose epoch is one above the one in force. False when another was installed first.
    async fn set_map(&self, map: ClusterMap) -> Result<bool, MetaClientError>;
}

#[async_trait::async_trait]
impl MetaClient for Shards {
    async fn command(&self, shard: ShardId, command: Command) -> Result<Reply, MetaClientError> {
        Shards::command(self, shard, command)
            .await
            .map_err(|error| MetaClientError { shard, detail: error.to_string() })
    }

    async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, MetaClientError> {
        Shards::query(self, shard, query).await.map_err(|error| MetaClientError { shard, detail: error.to_string() })
    }

    fn shards(&self) -> Vec<ShardId> {
        self.object_shards()
    }

    async fn set_map(&self, map: ClusterMap) -> Result<bool, MetaClientError> {
        match Shards::set_map(self, map).await {
            Ok(set) => Ok(set == MapSet::Done),
            Err(error) => Err(MetaClientError { shard: ShardId::ROOT, detail: error.to_string() }),
        }
    }
}

/// Applies a command that carries the stamp of `held`. When the shard has heard of a later holder, the lease is given
/// up.
async fn command_under(
    meta: &dyn MetaClient,
    held: &leases::Held,
    shard: ShardId,
    command: Command,
) -> Result<Reply, MetaClientError> {
    match meta.command(shard, command).await? {
        Reply::StaleLease { current } => {
            held.refused(current);
            Err(MetaClientError { shard, detail: format!("the lease was taken over (epoch {current})") })
        }
        reply => Ok(reply),
    }
}
