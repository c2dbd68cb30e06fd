#![allow(clippy::unwrap_used)]
use super::identity::replica_key;
use super::*;
use crate::raft::network::TransportError;
use crate::store::LogWrite;
use futures::future::BoxFuture;
use futures::FutureExt;

/// Nobody else is there.
struct Alone;

impl PeerTransport for Alone {
    fn raft(&self, _: DiskId, _: ShardId, _: Bytes, _: Duration) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        async { Err(TransportError::Timeout) }.boxed()
    }

    fn raft_batch(
        &self,
        _: DiskId,
        _: Vec<(ShardId, Bytes)>,
        _: Duration,
    ) -> BoxFuture<'static, Result<Vec<Result<Bytes, TransportError>>, TransportError>> {
        async { Err(TransportError::Timeout) }.boxed()
    }

    fn link_beat(&self, _: DiskId, _: Bytes, _: Duration) -> BoxFuture<'static, Result<Bytes, TransportError>> {
        async { Err(TransportError::Timeout) }.boxed()
    }

    fn is_displaced(&self, _: Duration) -> BoxFuture<'static, Option<bool>> {
        async { None }.boxed()
    }
}

/// It is known which replica is to be emptied, also when its own record cannot be read at the second look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_replica_whose_name_cannot_be_read_any_more_is_still_rebuilt() {
    let (folder, shard) = (tempfile::tempdir().unwrap(), ShardId(1));
    let config = HostConfig {
        dir: folder.path().to_owned(),
        disk: DiskId(1),
        number: None,
        timing: Timing::default(),
        clock: WallClock::default(),
        space: Space::without_reserve(),
    };
    let map = watch::Sender::new(None);
    let host = MetaHost::open(config, Arc::new(Alone), map.subscribe(), Arc::new(|why| panic!("{why}"))).await.unwrap();
    let batcher = host.open_replica(shard).await.unwrap();
    let id = batcher.replica.me;
    batcher.stop.cancel();
    batcher.replica.shutdown().await;
    let broken = ReplicaState::Broken { id: Some(id), why: "a read failed".to_owned() };
    lock(&host.inner.replicas).insert(shard, broken);
    let writer = lock(&host.inner.writer).clone().unwrap();
    writer.write(vec![LogWrite::Put(replica_key(shard), b"no record".to_vec())]).await.unwrap();
    drop(writer);

    let other = ReplicaId { incarnation: id.incarnation ^ 1, ..id };
    assert!(host.rebuild(shard, other).await.is_err(), "another replica was meant");
    let rebuilt = host.rebuild(shard, id).await.unwrap();
    assert_ne!(rebuilt.replica.me, id);
    assert!(rebuilt.replica.is_empty());
    assert_eq!((host.counters().replicas_rebuilt, host.counters().replicas_stopped), (1, 0));
    host.shutdown().await;
}
