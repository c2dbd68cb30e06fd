//! For unit tests: the other disks, as a function.

use crate::message::{decode_message, encode_message, PeerMessage, PeerResponse};
use crate::raft::network::{PeerTransport, TransportError};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::FutureExt;
use granary_placement::id::{DiskId, ShardId};
use std::sync::Arc;
use std::time::Duration;

type Answers = dyn Fn(DiskId, ShardId, PeerMessage) -> Option<PeerResponse> + Send + Sync;

/// What each other disk answers; None: nothing, and whoever asks is told so at once.
#[derive(Clone)]
pub struct FakePeers(Arc<Answers>);

impl FakePeers {
    /// They answer this.
    pub fn new(
        answers: impl Fn(DiskId, ShardId, PeerMessage) -> Option<PeerResponse> + Send + Sync + 'static,
    ) -> FakePeers {
        FakePeers(Arc::new(answers))
    }

    /// Nobody else is there.
    pub fn nobody() -> FakePeers {
        FakePeers::new(|_, _, _| None)
    }

    fn answer(&self, to: DiskId, shard: ShardId, message: &Bytes) -> Result<Bytes, TransportError> {
        let bad = |error: granary_meta::BadBytes| TransportError::Refused(error.to_string());
        let answer = (self.0)(to, shard, decode_message(message).map_err(bad)?).ok_or(TransportError::Timeout)?;
        encode_message(&answer).map_err(bad)
    }
}

impl PeerTransport for FakePeers {
    fn raft(
        &self,
        to: DiskId,
        shard: ShardId,
        message: Bytes,
        _: Duration,
    ) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        let answer = self.answer(to, shard, &message);
        async { answer }.boxed()
    }

    fn raft_batch(
        &self,
        to: DiskId,
        messages: Vec<(ShardId, Bytes)>,
        _: Duration,
    ) -> BoxFuture<'static, Result<Vec<Result<Bytes, TransportError>>, TransportError>> {
        let answers = messages.iter().map(|(shard, message)| self.answer(to, *shard, message)).collect();
        async { Ok(answers) }.boxed()
    }

    fn link_beat(&self, _: DiskId, _: Bytes, _: Duration) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        async { Err(TransportError::Timeout) }.boxed()
    }

    fn is_displaced(&self, _: Duration) -> BoxFuture<'static, Option<bool>> {
        async { None }.boxed()
    }
}
