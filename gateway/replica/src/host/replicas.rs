//! How replicas begin on this disk: opened again, made empty for a shard that the map gives it, first of a new shard,
//! or anew after their data were damaged.

use super::identity::{incarnation_of, new_replica};
use super::{bad_request, failures, lock, MetaHost, ReplicaState, STOP_WAIT};
use crate::batching::Batcher;
use crate::log::ShardLog;
use crate::message::{decode_message, encode_message, PeerMessage, PeerRequest, PeerResponse, ReplicaId};
use crate::raft::containment::{spawn_blocking, Containment};
use crate::raft::machine::Machine;
use crate::raft::Replica;
use crate::snapshot;
use crate::store::LogWrite;
use crate::writer::LogWriter;
use bytes::Bytes;
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::control::ControlError;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// How long another disk may take to say which replica it has.
pub(super) const IDENTIFY_DEADLINE: Duration = Duration::from_secs(2);

pub(super) fn unavailable(why: impl ToString) -> ControlError {
    ControlError::Unavailable(why.to_string())
}

fn no_map() -> ControlError {
    unavailable("no cluster map is known here yet")
}

impl MetaHost {
    /// The running replica of a shard; made, empty, when there is none.
    pub(super) async fn open_replica(&self, shard: ShardId) -> Result<Arc<Batcher>, ControlError> {
        let inner = &self.inner;
        let _one = inner.opening.lock().await;
        match self.batcher(shard) {
            Err(ControlError::NoSuchShard(_)) => {}
            known => return known,
        }
        self.open_now(shard).await?;
        self.batcher(shard)
    }

    /// Opens it, while nothing else is opened, and enters what came of it.
    ///
    /// # Errors
    /// It was not tried; what was entered before still is.
    pub(super) async fn open_now(&self, shard: ShardId) -> Result<(), ControlError> {
        let inner = &self.inner;
        if inner.stop.is_cancelled() {
            return Err(unavailable("stopping"));
        }
        let writer = lock(&inner.writer).clone().ok_or_else(|| unavailable("stopping"))?;
        let log = inner.log.clone();
        let known = tokio::task::spawn_blocking(move || incarnation_of(&log, shard)).await.map_err(unavailable)?;
        let id = match known {
            Ok(Some(incarnation)) => ReplicaId { disk: inner.config.disk, incarnation },
            Ok(None) => {
                // The log database alone may have been lost: a new replica begins without a state, too.
                self.forget_state(shard).await?;
                let (incarnation, record) =
                    new_replica(shard).map_err(|error| ControlError::Disk(error.to_string()))?;
                writer.write(vec![record]).await.map_err(ControlError::Disk)?;
                ReplicaId { disk: inner.config.disk, incarnation }
            }
            Err(error) => {
                let broken = ReplicaState::Broken { id: None, why: error.to_string() };
                lock(&inner.replicas).insert(shard, broken);
                return Ok(());
            }
        };
        let containment = Containment::new(shard);
        let opened = containment.contain(self.start_replica(id, shard, writer, containment.clone())).await;
        let replica = match opened {
            Ok(Ok(replica)) => {
                let replica = Arc::new(replica);
                replica.elect_if_sole_voter().await;
                let batcher = Batcher::start(replica, inner.batches.clone(), &inner.tasks, inner.stop.child_token());
                self.enter(Arc::new(batcher)).await;
                return Ok(());
            }
            Ok(Err(why)) => {
                tracing::error!(%shard, replica = %id, why, "the data of a metadata replica cannot be used");
                containment.end().await;
                ReplicaState::Broken { id: Some(id), why }
            }
            Err(ended) => {
                containment.end().await;
                inner.failures.count();
                inner.tasks.spawn(failures::open_again(self.clone(), shard));
                ReplicaState::Failed { id, why: ended.0 }
            }
        };
        lock(&inner.replicas).insert(shard, replica);
        Ok(())
    }

    /// Enters a replica that runs. One that is entered while the host stops is ended at once: the stop may have ended
    /// all others before.
    pub(super) async fn enter(&self, batcher: Arc<Batcher>) {
        let (inner, shard) = (&self.inner, batcher.replica.shard);
        lock(&inner.replicas).insert(shard, ReplicaState::Running(batcher.clone()));
        // Only now: whoever watches it looks for it there.
        inner.tasks.spawn(failures::watch(self.clone(), batcher.clone()));
        if inner.stop.is_cancelled() {
            lock(&inner.replicas).remove(&shard);
            self.end(&batcher.replica).await;
        }
    }

    /// Stops a replica that is no member of its shard any more; its data stays. When another was opened in its place
    /// meanwhile, that one goes on: two at once on one log would give two votes in a term. It ends in a task of its
    /// own, for its disk may hang; until it has ended, none is opened on its log.
    pub(super) fn let_go(&self, batcher: &Arc<Batcher>) {
        let shard = batcher.replica.shard;
        {
            let mut replicas = lock(&self.inner.replicas);
            match replicas.get(&shard) {
                Some(ReplicaState::Running(known)) if Arc::ptr_eq(known, batcher) => {}
                _ => return,
            }
            replicas.insert(shard, ReplicaState::Ending);
        }
        tracing::info!(%shard, "this replica is no member any more; stopping it, its data stays");
        batcher.stop.cancel();
        let (host, batcher) = (self.clone(), batcher.clone());
        self.inner.tasks.spawn(async move {
            let Some(writer) = lock(&host.inner.writer).clone() else { return };
            // What it had queued is to be on disk before another one reads the log.
            let ended = async { host.end(&batcher.replica).await && writer.flush().await.is_ok() };
            tokio::pin!(ended);
            let has_ended = match tokio::time::timeout(STOP_WAIT, &mut ended).await {
                Ok(has_ended) => has_ended,
                Err(_) => {
                    tracing::warn!(%shard, "it does not end: no other replica of the shard is opened here until it has");
                    ended.await
                }
            };
            if has_ended {
                if let Some(replica @ ReplicaState::Ending) = lock(&host.inner.replicas).get_mut(&shard) {
                    *replica = ReplicaState::Removed;
                }
            }
        });
    }

    /// Starts the replica on what lies here. In the containment, for its data may lead to an assertion at once.
    pub(super) async fn start_replica(
        &self,
        id: ReplicaId,
        shard: ShardId,
        writer: LogWriter,
        containment: Arc<Containment>,
    ) -> Result<Replica, String> {
        let inner = &self.inner;
        let (log, state, dir) = (inner.log.clone(), inner.state.clone(), inner.peers.snapshot_dir.clone());
        let map = (shard == ShardId::ROOT).then(|| inner.root_map.clone());
        let (applies, space) = (inner.applies.clone(), inner.config.space.clone());
        let opened = spawn_blocking(move || -> std::io::Result<(ShardLog, Machine)> {
            let machine = Machine::open(shard, state.clone(), dir, space, map, applies)?;
            let log = ShardLog::open(shard, log, writer, state)?;
            let (first, next) = (log.first_index(), machine.next_index());
            if next < first {
                let why = format!("the state of shard {shard} ends before entry {next}, its log begins at {first}");
                return Err(std::io::Error::other(why));
            }
            Ok((log, machine))
        });
        let opened = opened.await.and_then(|opened| opened).map_err(|error| error.to_string())?;
        Replica::open(id, inner.peers.clone(), inner.config.timing.of(shard), opened, containment).await
    }

    /// Makes this disk the first of a new shard with these members, itself among them. Repeated, it does nothing.
    ///
    /// All members must be there and empty: a shard that was formed before, on whichever of these disks something of it
    /// is left, is not formed again.
    ///
    /// # Errors
    /// BadRequest when this disk is no member or another one has a replica already; Unavailable; Disk.
    pub async fn init_shard(&self, shard: ShardId, members: Vec<DiskId>) -> Result<(), ControlError> {
        let me = self.inner.config.disk;
        let map = self.newest_map().ok_or_else(no_map)?;
        if !members.contains(&me) || !self.named_by(&map, shard) {
            return Err(ControlError::BadRequest(format!("disk {me} is no member of shard {shard}")));
        }
        let batcher = self.open_undisturbed(shard).await?;
        if batcher.replica.has_log() {
            return Ok(());
        }
        if let Some(lost) = self.inner.identity.replaces {
            return Err(ControlError::Disk(format!(
                "the metadata of disk {me} (number {lost:016x}) were lost once: it begins no shard, for that could be one it had; name another disk first, or format this one under a new number"
            )));
        }
        let from = batcher.replica.me;
        let mut ids = BTreeSet::from([from]);
        for disk in members.into_iter().filter(|disk| *disk != me) {
            let message = PeerMessage { from, to: None, request: PeerRequest::Identify };
            match self.inner.peers.ask(disk, shard, &message, IDENTIFY_DEADLINE).await {
                Ok(PeerResponse::Identity { me, is_empty: true }) => ids.insert(me),
                Ok(PeerResponse::Identity { .. }) => {
                    let why = format!("disk {disk} has a replica of shard {shard} that is not empty");
                    return Err(ControlError::BadRequest(why));
                }
                Ok(_) => return Err(unavailable(format!("disk {disk}: an answer to another question"))),
                Err(error) => return Err(unavailable(format!("disk {disk}: {error}"))),
            };
        }
        batcher.replica.initialize(ids).await
    }

    /// Opens a replica in a task of its own, which a stop waits for: a connection that breaks must not leave it half
    /// done.
    async fn open_undisturbed(&self, shard: ShardId) -> Result<Arc<Batcher>, ControlError> {
        let host = self.clone();
        self.inner.tasks.spawn(async move { host.open_replica(shard).await }).await.map_err(unavailable)?
    }

    pub(super) fn named_by(&self, map: &ClusterMap, shard: ShardId) -> bool {
        map.shards.get(usize::from(shard.0)).is_some_and(|replicas| replicas.members.contains(&self.inner.config.disk))
    }

    /// Takes a message of another replica, authenticated by the caller as one of disk `from`, and gives the answer.
    /// Makes an empty replica for a shard that is not here when the map names this disk for it.
    ///
    /// # Errors
    /// NoSuchShard; Unavailable while no map is known; BadRequest for bytes that are no message of that disk; Disk.
    pub async fn raft(&self, shard: ShardId, from: DiskId, message: Bytes) -> Result<Bytes, ControlError> {
        let message: PeerMessage = decode_message(&message).map_err(bad_request)?;
        if message.from.disk != from {
            return Err(ControlError::BadRequest(format!("disk {from} sends a message of replica {}", message.from)));
        }
        if self.inner.room.is_at_its_end() && message.request.carries_commands() {
            return encode_message(&PeerResponse::Failed("there is no room on this disk".to_owned()))
                .map_err(bad_request);
        }
        let map = self.newest_map().ok_or_else(no_map)?;
        let answer = match self.answer_of_broken(&map, shard, &message).await? {
            Some(answer) => answer,
            None => {
                let batcher = match self.batcher(shard) {
                    Err(ControlError::NoSuchShard(_))
                        if message.request != PeerRequest::Members && self.named_by(&map, shard) =>
                    {
                        self.open_undisturbed(shard).await?
                    }
                    known => known?,
                };
                batcher.replica.handle(message).await?
            }
        };
        encode_message(&answer).map_err(bad_request)
    }

    /// What a replica answers whose data cannot be used; None when there is no such replica.
    async fn answer_of_broken(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        message: &PeerMessage,
    ) -> Result<Option<PeerResponse>, ControlError> {
        let (me, why) = match lock(&self.inner.replicas).get(&shard) {
            Some(ReplicaState::Broken { id: Some(id), why }) => (*id, why.clone()),
            _ => return Ok(None),
        };
        // Only a disk of the shard can lead it.
        let members = map.shards.get(usize::from(shard.0)).map(|replicas| replicas.members.as_slice());
        let may_lead = members.is_some_and(|members| members.contains(&message.from.disk));
        if message.request != PeerRequest::Rebuild || message.to != Some(me) || !self.named_by(map, shard) || !may_lead
        {
            return Ok(Some(PeerResponse::Broken { me, why }));
        }
        let host = self.clone();
        let rebuilding = self.inner.tasks.spawn(async move { host.rebuild(shard, me).await });
        let batcher = rebuilding.await.map_err(unavailable)??;
        Ok(Some(PeerResponse::Identity { me: batcher.replica.me, is_empty: batcher.replica.is_empty() }))
    }

    async fn forget_state(&self, shard: ShardId) -> Result<(), ControlError> {
        let (state, dir) = (self.inner.state.clone(), self.inner.peers.snapshot_dir.clone());
        let forgotten = tokio::task::spawn_blocking(move || snapshot::forget(&state, shard, &dir)).await;
        forgotten.map_err(unavailable)?.map_err(|error| ControlError::Disk(error.to_string()))
    }

    /// Empties a replica whose data cannot be used, and begins it anew under another incarnation. It is opened once
    /// more before: what kept it from opening may have been a read that failed once, and its data are whole.
    ///
    /// The state goes first and the log, with the incarnation, in one write after it: a stop between the two leaves the
    /// old replica, with a log that is as damaged as it was, or that leads to the state once more.
    pub(super) async fn rebuild(&self, shard: ShardId, id: ReplicaId) -> Result<Arc<Batcher>, ControlError> {
        let inner = &self.inner;
        {
            let _one = inner.opening.lock().await;
            self.check_broken(shard, id)?;
            lock(&inner.replicas).remove(&shard);
        }
        let why = match self.open_replica(shard).await {
            Ok(opened) => {
                tracing::warn!(%shard, replica = %id, "a metadata replica that could not be used before has opened");
                return Ok(opened);
            }
            Err(error) => error.to_string(),
        };
        {
            let _one = inner.opening.lock().await;
            // This time not even its incarnation could be read; it is known still.
            if let Some(replica @ ReplicaState::Broken { id: None, .. }) = lock(&inner.replicas).get_mut(&shard) {
                *replica = ReplicaState::Broken { id: Some(id), why };
            }
            self.check_broken(shard, id)?;
            let writer = lock(&inner.writer).clone().ok_or_else(|| unavailable("stopping"))?;
            let (incarnation, record) = new_replica(shard).map_err(|error| ControlError::Disk(error.to_string()))?;
            tracing::warn!(%shard, replica = %id, incarnation, "a damaged metadata replica begins anew, empty");
            self.forget_state(shard).await?;
            let group = shard.0.to_be_bytes().to_vec();
            let after = shard.0.saturating_add(1).to_be_bytes().to_vec();
            writer.write(vec![LogWrite::DeleteRange(group, after), record]).await.map_err(ControlError::Disk)?;
            lock(&inner.replicas).remove(&shard);
            inner.rebuilt.fetch_add(1, Ordering::Relaxed);
        }
        self.open_replica(shard).await
    }

    /// Is that the replica that cannot be used? Asked while nothing else is opened.
    fn check_broken(&self, shard: ShardId, id: ReplicaId) -> Result<(), ControlError> {
        match lock(&self.inner.replicas).get(&shard) {
            Some(ReplicaState::Broken { id: Some(found), .. }) if *found == id => Ok(()),
            _ => Err(unavailable("the replica has changed meanwhile")),
        }
    }
}
