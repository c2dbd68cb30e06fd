//! A shard's state machine: applies committed entries in batches, each with how far it applied, and gives and takes
//! snapshots.

use super::containment::spawn_blocking;
use super::types::{
    log_id_from_wire, log_id_to_wire, members_from_applied, membership_to_wire, Batch, Entry, LeaderId, LogId, Members,
    Replies, TypeConfig,
};
use crate::message::{AppliedState, ReplicaId};
use crate::room::Space;
use crate::snapshot;
use crate::store::{StateDb, Wait};
use futures::{Stream, StreamExt};
use granary_meta::apply::apply;
use granary_meta::keys::{kind, Keys};
use granary_meta::kv::{Kv, Overlay, StateError};
use granary_placement::id::ShardId;
use granary_placement::map::ClusterMap;
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use tokio::sync::watch;

/// Most entries applied in one batch.
const APPLY_ENTRIES: usize = 64;
/// A batch of entries is closed at this size of requests, in bytes.
const APPLY_BYTES: usize = 1024 * 1024;
/// Batches up to this size of requests, in bytes, are tried on the task's own thread. Larger ones keep it busy for too
/// long, even in memory.
const AT_ONCE_BYTES: usize = 64 * 1024;

/// Runs blocking work without holding up the other tasks of the runtime. Another thread takes those over, which costs
/// two changes of threads: more than what is in memory costs to read or write.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    let multi = tokio::runtime::Handle::try_current()
        .is_ok_and(|handle| handle.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread);
    if multi {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}

/// Where a snapshot's entries come from.
pub enum SnapshotSource {
    /// The state as it is when the snapshot is sent: at least as far applied as the snapshot's metadata says.
    Live(Arc<StateDb>),
    /// A checked file. It is moved or deleted by whoever takes it.
    File(PathBuf),
}

/// Where the root shard publishes its map.
pub type MapSender = watch::Sender<Option<Arc<ClusterMap>>>;

/// What the state machines of a disk did since they began.
#[derive(Debug, Default)]
pub struct ApplyCounters {
    /// Entries applied.
    pub entries: AtomicU64,
    /// Requests in them.
    pub requests: AtomicU64,
    /// Batches written.
    pub batches: AtomicU64,
    /// Those that were found to need the disk, and began again where they may wait for it.
    pub waited: AtomicU64,
    /// Snapshots installed.
    pub installs: AtomicU64,
}

/// One shard's state machine.
pub struct Machine {
    /// Which shard.
    pub shard: ShardId,
    state: Arc<StateDb>,
    snapshot_dir: PathBuf,
    space: Space,
    applied: AppliedState,
    map: Option<MapSender>,
    counters: Arc<ApplyCounters>,
}

fn failed(error: impl ToString) -> io::Error {
    io::Error::other(error.to_string())
}

fn last_log_id(applied: &AppliedState) -> Option<LogId> {
    applied.last.map(log_id_from_wire)
}

impl Machine {
    /// Opens it as far as it was applied, after finishing an install that a crash interrupted. Blocks. `map`: where to
    /// publish the cluster map, for the root shard.
    ///
    /// # Errors
    /// The state cannot be used.
    pub fn open(
        shard: ShardId,
        state: Arc<StateDb>,
        snapshot_dir: PathBuf,
        space: Space,
        map: Option<MapSender>,
        counters: Arc<ApplyCounters>,
    ) -> io::Result<Machine> {
        snapshot::finish_interrupted(&state, shard, &snapshot_dir, &space).map_err(failed)?;
        let applied = snapshot::applied_state(&*state, shard).map_err(failed)?;
        if let Some(last) = applied.last {
            state.opened_at(shard, last.index);
        }
        let machine = Machine { shard, state, snapshot_dir, space, applied, map, counters };
        machine.publish_map();
        Ok(machine)
    }

    /// The first entry that is not applied.
    pub fn next_index(&self) -> u64 {
        self.applied.last.map_or(0, |last| last.index + 1)
    }

    fn publish_map(&self) {
        let Some(sender) = &self.map else { return };
        let key = Keys::new(self.shard).single(kind::MAP);
        match self
            .state
            .get(&key)
            .and_then(|bytes| bytes.map(|bytes| granary_meta::codec::decode::<ClusterMap>(&bytes)).transpose())
        {
            Ok(Some(map)) => {
                sender.send_if_modified(|known| {
                    let newer = known.as_ref().is_none_or(|known| known.epoch < map.epoch);
                    if newer {
                        *known = Some(Arc::new(map));
                    }
                    newer
                });
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "the cluster map in the root shard cannot be read"),
        }
    }

    /// Applies a batch: on this thread at once if all that it reads is in memory and its writes have room there.
    fn apply_batch(&mut self, entries: &[Entry], bytes: usize) -> Result<Vec<Replies>, StateError> {
        if bytes <= AT_ONCE_BYTES {
            match self.write_batch(entries, Wait::Never) {
                Err(StateError::WouldWait) => self.counters.waited.fetch_add(1, Ordering::Relaxed),
                done => return done,
            };
        }
        blocking(|| self.write_batch(entries, Wait::Allowed))
    }

    fn write_batch(&mut self, entries: &[Entry], wait: Wait) -> Result<Vec<Replies>, StateError> {
        let state = self.state.now(wait);
        let mut overlay = Overlay::new(&state);
        let mut applied = self.applied.clone();
        let mut replies = Vec::with_capacity(entries.len());
        let mut done = 0;
        for entry in entries {
            let mut of_entry = Vec::new();
            match &entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(Batch { requests, .. }) => {
                    for request in requests.iter() {
                        of_entry.push(apply(self.shard, &mut overlay, request)?);
                    }
                    done += requests.len() as u64;
                }
                EntryPayload::Membership(membership) => {
                    applied.membership_at = Some(log_id_to_wire(&entry.log_id));
                    applied.membership = membership_to_wire(membership);
                }
            }
            applied.last = Some(log_id_to_wire(&entry.log_id));
            replies.push(Replies(of_entry));
        }
        let keys = Keys::new(self.shard);
        overlay.put(keys.single(kind::APPLIED), granary_meta::codec::encode(&applied)?);
        let new_map = overlay.writes().contains_key(&keys.single(kind::MAP));
        self.state.write_by(wait, self.shard, overlay.into_writes(), applied.last.map(|last| last.index))?;
        self.counters.requests.fetch_add(done, Ordering::Relaxed);
        self.counters.entries.fetch_add(entries.len() as u64, Ordering::Relaxed);
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        self.applied = applied;
        if new_map {
            // It is long.
            blocking(|| self.publish_map());
        }
        Ok(replies)
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotSource;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Members), io::Error> {
        Ok((last_log_id(&self.applied), members_from_applied(&self.applied)))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut next = entries.next().await.transpose()?;
        while next.is_some() {
            let (mut batch, mut responders, mut bytes) = (Vec::new(), Vec::new(), 0);
            while let Some((entry, responder)) = next.take() {
                if let EntryPayload::Normal(requests) = &entry.payload {
                    bytes += requests.encoded.len();
                }
                batch.push(entry);
                responders.push(responder);
                next = entries.next().await.transpose()?;
                if batch.len() >= APPLY_ENTRIES || bytes >= APPLY_BYTES {
                    break;
                }
            }
            let replies = self.apply_batch(&batch, bytes).map_err(failed)?;
            for (responder, replies) in responders.into_iter().zip(replies) {
                if let Some(responder) = responder {
                    responder.send(replies);
                }
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder { shard: self.shard, state: self.state.clone(), applied: self.applied.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<LeaderId, ReplicaId, ()>,
        source: SnapshotSource,
    ) -> Result<(), io::Error> {
        let (state, dir, shard, space) =
            (self.state.clone(), self.snapshot_dir.clone(), self.shard, self.space.clone());
        let install = move || -> Result<AppliedState, snapshot::SnapshotError> {
            let path = match source {
                SnapshotSource::File(path) => path,
                SnapshotSource::Live(from) => {
                    let path = dir.join(format!("copy-{shard}"));
                    snapshot::write_file(&from, shard, &path, &space)?;
                    path
                }
            };
            snapshot::install(&state, shard, &dir, &path)
        };
        let applied = spawn_blocking(install).await?.map_err(failed)?;
        if last_log_id(&applied) != meta.last_log_id {
            return Err(failed("snapshot file and metadata disagree"));
        }
        tracing::info!(shard = %self.shard, index = applied.last.map_or(0, |last| last.index), "snapshot installed");
        self.applied = applied;
        self.counters.installs.fetch_add(1, Ordering::Relaxed);
        self.publish_map();
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<LeaderId, ReplicaId, (), SnapshotSource>>, io::Error> {
        Ok(self.applied.last.map(|_| live_snapshot(&self.state, &self.applied)))
    }
}

/// The state itself is the snapshot; its file is only written when it is sent.
fn live_snapshot(state: &Arc<StateDb>, applied: &AppliedState) -> Snapshot<LeaderId, ReplicaId, (), SnapshotSource> {
    let meta = SnapshotMeta { last_log_id: last_log_id(applied), last_membership: members_from_applied(applied) };
    Snapshot { meta, snapshot: SnapshotSource::Live(state.clone()) }
}

/// Builds snapshots: an explicit flush, after which the log up to there may go.
pub struct Builder {
    shard: ShardId,
    state: Arc<StateDb>,
    applied: AppliedState,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotSource;

    async fn build_snapshot(&mut self) -> Result<Snapshot<LeaderId, ReplicaId, (), SnapshotSource>, io::Error> {
        let (state, shard) = (self.state.clone(), self.shard);
        if let Some(last) = self.applied.last {
            spawn_blocking(move || state.make_durable(shard, last.index)).await?.map_err(failed)?;
        }
        Ok(live_snapshot(&self.state, &self.applied))
    }
}
