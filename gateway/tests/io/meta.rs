//! Metadata shards as maps: what the healer asks of them and nothing more.

use async_trait::async_trait;
use granary_gateway::background::heal::{MetaClient, MetaClientError};
use granary_meta::memory::MemoryShard;
use granary_meta::record::{AccountId, BucketId, ExtentRecord, ExtentRef, ObjectData};
use granary_meta::{Answer, ChunkRef, Command, MetaRequest, Query, Reply};
use granary_placement::id::{ExtentId, PlacementGroupId, ShardId};
use granary_placement::map::ClusterMap;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

#[derive(Default)]
pub struct Shard {
    pub extents: BTreeMap<(PlacementGroupId, ExtentId), ExtentRecord>,
    pub missing: BTreeMap<ChunkRef, u64>,
    pub garbage: Vec<(u64, ExtentRef)>,
}

/// Shards 1 and 2; leases and their stamps are the real state machine's.
pub struct Meta {
    real: Mutex<[MemoryShard; 3]>,
    requests: AtomicU64,
    /// Where a map that is set goes to.
    pub map: Mutex<Option<watch::Sender<Option<Arc<ClusterMap>>>>>,
    shards: [Mutex<Shard>; 2],
    /// This shard does not answer; 0: all do.
    pub silent: AtomicU64,
    /// Pages are no longer than this, so that paging is tried with few extents.
    pub page: AtomicU64,
}

impl Default for Meta {
    fn default() -> Meta {
        let real = Mutex::new([0, 1, 2].map(|shard| MemoryShard::new(ShardId(shard))));
        Meta {
            real,
            requests: AtomicU64::new(1),
            map: Mutex::default(),
            shards: Default::default(),
            silent: AtomicU64::new(0),
            page: AtomicU64::new(0),
        }
    }
}

impl Meta {
    pub fn shard(&self, shard: ShardId) -> std::sync::MutexGuard<'_, Shard> {
        self.shards[usize::from(shard.0) - 1].lock().unwrap()
    }

    /// As a commit does.
    pub fn commit(&self, shard: ShardId, key: &str, data: &ObjectData, missing: &[ChunkRef]) {
        let mut state = self.shard(shard);
        for extent in data.extents() {
            let record = ExtentRecord { extent: extent.clone(), bucket: BucketId(1), key: key.to_owned() };
            state.extents.insert((extent.group, extent.extent), record);
        }
        state.missing.extend(missing.iter().map(|chunk| (*chunk, 1)));
    }

    /// As a delete does.
    pub fn delete(&self, shard: ShardId, data: &ObjectData, now_ms: u64) {
        let mut state = self.shard(shard);
        for extent in data.extents() {
            state.extents.remove(&(extent.group, extent.extent));
            state.missing.retain(|chunk, _| chunk.extent != extent.extent);
            state.garbage.push((now_ms, extent.clone()));
        }
    }

    pub fn missing(&self) -> usize {
        [1, 2].into_iter().map(|shard| self.shard(ShardId(shard)).missing.len()).sum()
    }

    fn real(&self, shard: ShardId, command: Command) -> Result<Reply, MetaClientError> {
        let mut request_id = [0; 16];
        request_id[..8].copy_from_slice(&self.requests.fetch_add(1, Ordering::Relaxed).to_be_bytes());
        let request = MetaRequest { request_id, now_ms: 1, account: AccountId::ROOT, command };
        let mut real = self.real.lock().unwrap();
        real[usize::from(shard.0)].apply(&request).map_err(|error| MetaClientError { shard, detail: error.to_string() })
    }

    fn reach(&self, shard: ShardId) -> Result<(), MetaClientError> {
        if shard != ShardId::ROOT && u64::from(shard.0) == self.silent.load(Ordering::Relaxed) {
            return Err(MetaClientError { shard, detail: "it does not answer in this test".to_owned() });
        }
        Ok(())
    }

    fn limit(&self, limit: u32) -> usize {
        match self.page.load(Ordering::Relaxed) {
            0 => limit as usize,
            page => page as usize,
        }
    }
}

fn page<T>(all: impl Iterator<Item = T>, limit: usize) -> (Vec<T>, bool) {
    let mut items: Vec<T> = all.take(limit + 1).collect();
    let more = items.len() > limit;
    items.truncate(limit);
    (items, more)
}

#[async_trait]
impl MetaClient for Meta {
    async fn command(&self, shard: ShardId, command: Command) -> Result<Reply, MetaClientError> {
        self.reach(shard)?;
        let of_slots = matches!(
            command,
            Command::QueueRepair { .. } | Command::AdvanceRepair { .. } | Command::RepairSlotDone { .. }
        );
        if shard == ShardId::ROOT || of_slots {
            return self.real(shard, command);
        }
        if let Command::RepairDone { lease, .. } | Command::GarbageDone { lease, .. } = &command {
            let stamped = Command::QueueRepair { slots: Vec::new(), lease: lease.clone() };
            if let stale @ Reply::StaleLease { .. } = self.real(shard, stamped)? {
                return Ok(stale);
            }
        }
        let mut state = self.shard(shard);
        match command {
            Command::ReportMissing { chunks } => {
                for chunk in chunks {
                    let known = state.extents.get(&(chunk.group, chunk.extent));
                    if known.is_some_and(|record| chunk.index < record.extent.k + record.extent.m) {
                        state.missing.entry(chunk).or_insert(1);
                    }
                }
            }
            Command::RepairDone { chunks, .. } => state.missing.retain(|chunk, _| !chunks.contains(chunk)),
            Command::GarbageDone { extents, .. } => {
                state.garbage.retain(|(queued_ms, extent)| !extents.contains(&(*queued_ms, extent.extent)));
            }
            other => panic!("the healer sends {other:?}"),
        }
        Ok(Reply::Done)
    }

    async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, MetaClientError> {
        self.reach(shard)?;
        if shard == ShardId::ROOT || matches!(query, Query::ListRepairSlots { .. }) {
            return Ok(self.real.lock().unwrap()[usize::from(shard.0)].answer(&query).unwrap());
        }
        let state = self.shard(shard);
        Ok(match query {
            Query::ExtentsOfGroup { group, after, limit } => {
                let fits = |record: &&ExtentRecord| {
                    let key = (record.extent.group, record.extent.extent);
                    group.is_none_or(|group| group == key.0) && after.is_none_or(|after| key > after)
                };
                let (extents, more) = page(state.extents.values().filter(fits).cloned(), self.limit(limit));
                Answer::Extents { extents, more }
            }
            Query::ExtentsAlive { extents } => {
                Answer::Alive(extents.iter().map(|extent| state.extents.contains_key(extent)).collect())
            }
            Query::ListMissing { after, limit } => {
                let all = state.missing.iter().filter(|(chunk, _)| after.is_none_or(|after| **chunk > after));
                let all = all.map(|(chunk, queued_ms)| {
                    (*chunk, *queued_ms, state.extents[&(chunk.group, chunk.extent)].clone())
                });
                let (chunks, more) = page(all, self.limit(limit));
                Answer::Missing { chunks, more }
            }
            Query::ListGarbage { until_ms, limit } => {
                let all = state.garbage.iter().filter(|(queued_ms, _)| *queued_ms <= until_ms).cloned();
                let (extents, more) = page(all, self.limit(limit));
                Answer::Garbage { extents, more }
            }
            other => panic!("the healer asks {other:?}"),
        })
    }

    fn shards(&self) -> Vec<ShardId> {
        vec![ShardId(1), ShardId(2)]
    }

    async fn set_map(&self, next: ClusterMap) -> Result<bool, MetaClientError> {
        let Some(map) = &*self.map.lock().unwrap() else { return Ok(false) };
        Ok(map.send_if_modified(|known| {
            let follows = known.as_ref().is_some_and(|known| known.epoch.0 + 1 == next.epoch.0);
            if follows {
                *known = Some(Arc::new(next));
            }
            follows
        }))
    }
}
