//! The shards of a cluster in memory: the real state machine without Raft and without a database, for tests of whoever
//! talks to shards.
//!
//! ```
//! # use granary_meta::memory::MemoryShard;
//! # use granary_meta::{Answer, Query, ShardRequest, ShardResponse};
//! # use granary_placement::id::ShardId;
//! let mut root = MemoryShard::new(ShardId::ROOT);
//! let request = ShardRequest::Query(Query::ListLeases).encode()?;
//! let response = ShardResponse::decode(&root.serve(&request)?)?;
//! assert_eq!(response, ShardResponse::Answer(Answer::Leases(Vec::new())));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::answer::answer;
use crate::apply::apply;
use crate::check::check_level;
use crate::kv::{MemoryKv, Overlay, StateError};
use crate::level::level_of;
use crate::record::AccountId;
use crate::{Answer, BadBytes, Command, MetaRequest, Query, Reply, ShardRequest, ShardResponse};
use bytes::Bytes;
use granary_placement::id::ShardId;
use granary_placement::map::ClusterMap;

/// Why a request got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The request's bytes make no sense; nothing was done.
    #[error(transparent)]
    BadBytes(#[from] BadBytes),
    /// The state cannot be read; nothing was done.
    #[error(transparent)]
    State(#[from] StateError),
    /// The cluster has no such shard.
    #[error("there is no shard {0}")]
    NoSuchShard(ShardId),
}

/// One shard in memory.
#[derive(Debug, Clone)]
pub struct MemoryShard {
    shard: ShardId,
    /// All that it holds.
    pub kv: MemoryKv,
}

impl MemoryShard {
    /// An empty shard.
    pub fn new(shard: ShardId) -> MemoryShard {
        MemoryShard { shard, kv: MemoryKv::default() }
    }

    /// Applies one request.
    ///
    /// # Errors
    /// [`StateError`]; then nothing was written.
    pub fn apply(&mut self, request: &MetaRequest) -> Result<Reply, StateError> {
        let mut overlay = Overlay::new(&self.kv);
        let reply = apply(self.shard, &mut overlay, request)?;
        let writes = overlay.into_writes();
        self.kv.write(writes);
        Ok(reply)
    }

    /// Answers a query.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn answer(&self, query: &Query) -> Result<Answer, StateError> {
        answer(self.shard, &self.kv, query)
    }

    /// What the leader of the shard would answer to a [`ShardRequest`], bytes to bytes.
    ///
    /// # Errors
    /// [`MemoryError`], never NoSuchShard.
    pub fn serve(&mut self, request: &[u8]) -> Result<Bytes, MemoryError> {
        self.serve_and_tell(request, &mut |_, _| {})
    }

    fn serve_and_tell(
        &mut self,
        request: &[u8],
        applied: &mut dyn FnMut(&MetaRequest, &Reply),
    ) -> Result<Bytes, MemoryError> {
        let response = match ShardRequest::decode(request)? {
            ShardRequest::Command(request) => {
                let level = level_of(&self.kv, self.shard)?;
                check_level(&request.command, level).map_err(|why| BadBytes { what: "command", why })?;
                let reply = self.apply(&request)?;
                applied(&request, &reply);
                ShardResponse::Reply(reply)
            }
            ShardRequest::Query(query) => ShardResponse::Answer(self.answer(&query)?),
        };
        Ok(response.encode()?)
    }
}

/// Told of every command that was applied, with its reply; also of one that was repeated and answered from memory.
pub type Observer = Box<dyn FnMut(ShardId, &MetaRequest, &Reply) + Send>;

/// All shards of a cluster in memory. Their number is the map's and stays.
pub struct MemoryShards {
    shards: Vec<MemoryShard>,
    observer: Option<Observer>,
    /// Requests made by [`MemoryShards::command`].
    own_requests: u64,
}

impl MemoryShards {
    /// The shards of `map`, which the root shard holds.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchShard`] when the map has no root shard.
    pub fn new(map: &ClusterMap) -> Result<MemoryShards, MemoryError> {
        let shards = (0..=u16::MAX).map(ShardId).zip(&map.shards).map(|(shard, _)| MemoryShard::new(shard)).collect();
        let mut shards = MemoryShards { shards, observer: None, own_requests: 0 };
        shards.command(ShardId::ROOT, 0, Command::SetMap { map: Box::new(map.clone()) })?;
        Ok(shards)
    }

    /// Sets who is told of every command from now on.
    pub fn observe(&mut self, observer: Observer) {
        self.observer = Some(observer);
    }

    /// One shard, to look at or to change behind everybody's back.
    pub fn shard(&mut self, shard: ShardId) -> Option<&mut MemoryShard> {
        self.shards.get_mut(usize::from(shard.0))
    }

    /// What the leader of the shard would answer to a [`ShardRequest`], bytes to bytes.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn serve(&mut self, shard: ShardId, request: &[u8]) -> Result<Bytes, MemoryError> {
        let of = self.shards.get_mut(usize::from(shard.0)).ok_or(MemoryError::NoSuchShard(shard))?;
        let observer = &mut self.observer;
        of.serve_and_tell(request, &mut |request, reply| {
            if let Some(observer) = observer {
                observer(shard, request, reply);
            }
        })
    }

    /// Applies a command of the test itself, under a request id of its own, in the root account's name. The observer is
    /// not told.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn command(&mut self, shard: ShardId, now_ms: u64, command: Command) -> Result<Reply, MemoryError> {
        self.own_requests += 1;
        let request_id = ((u128::from(u64::MAX) << 64) | u128::from(self.own_requests)).to_be_bytes();
        let of = self.shards.get_mut(usize::from(shard.0)).ok_or(MemoryError::NoSuchShard(shard))?;
        Ok(of.apply(&MetaRequest { request_id, now_ms, stamp_ms: None, account: AccountId::ROOT, command })?)
    }

    /// Answers a query of the test itself.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn query(&self, shard: ShardId, query: &Query) -> Result<Answer, MemoryError> {
        let of = self.shards.get(usize::from(shard.0)).ok_or(MemoryError::NoSuchShard(shard))?;
        Ok(of.answer(query)?)
    }
}
