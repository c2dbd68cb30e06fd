//! A cluster in memory for tests: naive shards behind [`Peers`], with leaders that move, answers that get lost and
//! requests that hang.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::peers::{PeerError, Peers};
use futures::future::BoxFuture;
use granary_meta::record::{AccountId, BucketId, BucketRecord, BucketRule};
use granary_meta::{
    Answer, Command, ListFrom, ListItem, MetaRequest, ObjectSummary, Query, Reply, ShardRequest, ShardResponse,
};
use granary_placement::id::{ClusterId, DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::{ClusterMap, Location, Roles};
use granary_placement::place::{new_map, NewCluster, NewDisk};
use granary_placement::scheme::{FailureDomain, Scheme};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

/// What the next request meets, whoever it goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The answer is lost after the command was applied.
    LoseAnswer,
    /// The request is lost on the way.
    LoseRequest,
    /// This answer instead of doing anything.
    Answer(ControlError),
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) leaders: HashMap<ShardId, DiskId>,
    pub(crate) hung: HashSet<DiskId>,
    pub(crate) faults: VecDeque<Fault>,
    /// Keys by shard and bucket.
    pub(crate) keys: BTreeMap<(ShardId, u64), BTreeSet<String>>,
    pub(crate) fences: HashSet<(ShardId, u64)>,
    /// Highest attempt at a deletion seen by each shard; a fence is always this attempt's.
    attempts: HashMap<(ShardId, u64), u64>,
    pub(crate) buckets: BTreeMap<String, BucketRecord>,
    next_bucket: u64,
    replies: HashMap<[u8; 16], Reply>,
    pub(crate) map: Option<ClusterMap>,
    pub(crate) epochs: HashMap<DiskId, Epoch>,
    /// Differences of the map that disk nodes took.
    pub(crate) diffs_taken: usize,
    /// Applied before the next EndDeleteBucket: what others did, or what came late.
    pub(crate) before_end: Vec<(ShardId, Command)>,
    /// Commands applied, in order.
    pub(crate) applied: Vec<(ShardId, Command)>,
    /// (disk, shard) of every request for a shard.
    pub(crate) asked: Vec<(DiskId, ShardId)>,
}

pub(crate) struct FakeCluster {
    pub(crate) state: Mutex<State>,
}

/// A valid map: 3+2, every disk with both roles, every shard on five of them.
pub(crate) fn map(disks: u32, shards: usize, epoch: u64) -> ClusterMap {
    let disk = |id: u32| NewDisk {
        uuid: DiskUuid([u8::try_from(id).unwrap(); 16]),
        address: format!("127.0.0.1:{}", 4000 + id),
        location: Location { zone: "z".into(), rack: "r".into(), server: "s".into() },
        weight: 1,
        roles: Roles { storage: true, metadata: true },
    };
    let map = new_map(NewCluster {
        cluster_id: ClusterId([7; 16]),
        disks: (1..=disks).map(disk).collect(),
        scheme_name: "3+2".into(),
        scheme: Scheme::new(3, 2, FailureDomain::Disk).unwrap(),
        object_shards: u16::try_from(shards - 1).unwrap(),
        replicas: Some(5),
        groups_per_disk: 2,
    });
    ClusterMap { epoch: Epoch(epoch), ..map.unwrap() }
}

impl FakeCluster {
    /// All shards led by disk 1.
    pub(crate) fn new(map: &ClusterMap) -> FakeCluster {
        let leaders = (0..map.shards.len()).map(|shard| (ShardId(u16::try_from(shard).unwrap()), DiskId(1))).collect();
        FakeCluster { state: Mutex::new(State { leaders, map: Some(map.clone()), next_bucket: 1, ..State::default() }) }
    }

    fn answer(&self, disk: DiskId, request: ControlRequest) -> Result<ControlResponse, PeerError> {
        let mut state = self.state.lock().unwrap();
        match request {
            ControlRequest::Status => {
                let epoch = state.epochs.get(&disk).copied().unwrap_or_default();
                let uuid = DiskUuid([0; 16]);
                let status = NodeStatus {
                    disk: Some(disk),
                    uuid,
                    epoch,
                    capacity_bytes: 0,
                    free_bytes: 0,
                    chunks: 0,
                    chunk_bytes: 0,
                    feature_level: 1,
                };
                Ok(ControlResponse::Status(status))
            }
            ControlRequest::OfferMapDiff(diff) => {
                let known = state.epochs.get(&disk).copied().unwrap_or_default();
                if known != diff.from {
                    return Ok(ControlResponse::Error(ControlError::EpochMismatch { known }));
                }
                state.epochs.insert(disk, diff.to);
                state.diffs_taken += 1;
                Ok(ControlResponse::Done)
            }
            ControlRequest::OfferMap(map) => {
                state.epochs.insert(disk, map.epoch);
                Ok(ControlResponse::Done)
            }
            ControlRequest::Shard { shard, request } => {
                let fault = state.enter(disk, shard)?;
                if let Some(answer) = fault.as_ref().and_then(Fault::answer).or_else(|| state.not_leading(disk, shard))
                {
                    return Ok(answer);
                }
                let response = match ShardRequest::decode(&request).expect("a shard request") {
                    ShardRequest::Query(query) => ShardResponse::Answer(state.find(shard, query)),
                    ShardRequest::Command(request) => ShardResponse::Reply(state.command(shard, request)),
                };
                if fault == Some(Fault::LoseAnswer) {
                    return Err(PeerError::Lost("answer lost".into()));
                }
                Ok(ControlResponse::Shard(response.encode().expect("an encodable answer")))
            }
            other => panic!("the fake does not know {other:?}"),
        }
    }
}

impl Fault {
    fn answer(&self) -> Option<ControlResponse> {
        match self {
            Fault::Answer(error) => Some(ControlResponse::Error(error.clone())),
            _ => None,
        }
    }
}

impl State {
    fn command(&mut self, shard: ShardId, request: MetaRequest) -> Reply {
        if let Some(reply) = self.replies.get(&request.request_id) {
            return reply.clone();
        }
        self.applied.push((shard, request.command.clone()));
        let reply = self.apply(shard, request.command);
        self.replies.insert(request.request_id, reply.clone());
        reply
    }

    fn enter(&mut self, disk: DiskId, shard: ShardId) -> Result<Option<Fault>, PeerError> {
        self.asked.push((disk, shard));
        match self.faults.pop_front() {
            Some(Fault::LoseRequest) => Err(PeerError::Lost("request lost".into())),
            fault => Ok(fault),
        }
    }

    fn not_leading(&self, disk: DiskId, shard: ShardId) -> Option<ControlResponse> {
        let leader = self.leaders.get(&shard).copied();
        (leader != Some(disk)).then_some(ControlResponse::Error(ControlError::NotLeader { leader }))
    }

    fn apply(&mut self, shard: ShardId, command: Command) -> Reply {
        match command {
            Command::Noop => Reply::Done,
            Command::CreateUpload { bucket, key, .. } => {
                if self.fences.contains(&(shard, bucket.0)) {
                    return Reply::BucketFenced;
                }
                self.keys.entry((shard, bucket.0)).or_default().insert(key);
                Reply::Done
            }
            Command::FenceBucket { bucket, attempt } => {
                let at = (shard, bucket.0);
                let seen = self.attempts.get(&at).copied().unwrap_or(0);
                if attempt < seen || (attempt == seen && !self.fences.contains(&at)) {
                    return Reply::StaleAttempt { current: seen };
                }
                self.attempts.insert(at, attempt);
                let empty = self.keys.get(&(shard, bucket.0)).is_none_or(BTreeSet::is_empty);
                if empty {
                    self.fences.insert((shard, bucket.0));
                }
                Reply::Fenced { empty }
            }
            Command::UnfenceBucket { bucket, attempt } => {
                let seen = self.attempts.entry((shard, bucket.0)).or_default();
                if attempt < *seen {
                    return Reply::StaleAttempt { current: *seen };
                }
                *seen = attempt;
                self.fences.remove(&(shard, bucket.0));
                Reply::Done
            }
            Command::CreateBucket { name, owner } => {
                if let Some(bucket) = self.buckets.get(&name) {
                    return Reply::BucketExists(bucket.clone());
                }
                let id = BucketId(self.next_bucket);
                self.next_bucket += 1;
                let bucket = BucketRecord {
                    id,
                    name: name.clone(),
                    created_ms: 1,
                    owner,
                    deleting: false,
                    delete_attempt: 0,
                    rule: BucketRule::default(),
                    rule_pending: false,
                };
                self.buckets.insert(name, bucket.clone());
                Reply::Bucket(bucket)
            }
            Command::BeginDeleteBucket { name, bucket } => {
                match self.buckets.get_mut(&name).filter(|known| known.id == bucket) {
                    Some(known) => {
                        known.deleting = true;
                        known.delete_attempt += 1;
                        Reply::Bucket(known.clone())
                    }
                    None => Reply::NoSuchBucket,
                }
            }
            Command::EndDeleteBucket { name, bucket, attempt, remove } => {
                for (shard, command) in std::mem::take(&mut self.before_end) {
                    self.apply(shard, command);
                }
                match self.buckets.get_mut(&name).filter(|known| known.id == bucket) {
                    Some(known) if known.delete_attempt != attempt || (remove && !known.deleting) => {
                        Reply::StaleAttempt { current: known.delete_attempt }
                    }
                    Some(known) => {
                        known.deleting = false;
                        if remove {
                            self.buckets.remove(&name);
                        }
                        Reply::Done
                    }
                    None => Reply::NoSuchBucket,
                }
            }
            Command::SetMap { map } => {
                let current = self.map.as_ref().map_or(Epoch(0), |map| map.epoch);
                if map.epoch.0 != current.0 + 1 {
                    return Reply::EpochConflict { current };
                }
                self.map = Some(*map);
                Reply::Done
            }
            other => panic!("the fake does not know {other:?}"),
        }
    }

    fn find(&self, shard: ShardId, query: Query) -> Answer {
        match query {
            Query::GetMap { .. } => self.map.clone().map_or(Answer::NoMap, |map| Answer::Map(Box::new(map))),
            Query::GetBucket { name } => {
                self.buckets.get(&name).map_or(Answer::NoSuchBucket, |bucket| Answer::Bucket(bucket.clone()))
            }
            Query::ListObjects { bucket, prefix, delimiter, from, limit } => {
                if self.fences.contains(&(shard, bucket.0)) {
                    return Answer::BucketFenced;
                }
                let none = BTreeSet::new();
                let keys = self.keys.get(&(shard, bucket.0)).unwrap_or(&none);
                let (items, more) = naive_list(keys, &prefix, &delimiter, &from, limit as usize);
                Answer::Listing { items, more }
            }
            other => panic!("the fake does not know {other:?}"),
        }
    }
}

/// What a listing must be, by the plainest means: all keys, folded, sorted, cut.
pub(crate) fn naive_list(
    keys: &BTreeSet<String>,
    prefix: &str,
    delimiter: &str,
    from: &ListFrom,
    limit: usize,
) -> (Vec<ListItem>, bool) {
    let mut items: Vec<ListItem> = Vec::new();
    for key in keys.iter().filter(|key| key.starts_with(prefix)) {
        let rest = &key[prefix.len()..];
        let folded = (!delimiter.is_empty()).then(|| rest.find(delimiter)).flatten();
        let item = match folded {
            Some(at) => ListItem::Prefix(format!("{prefix}{}", &rest[..at + delimiter.len()])),
            None => ListItem::Object(summary(key)),
        };
        let after = match from {
            ListFrom::Start => true,
            ListFrom::After(last) => {
                item.sort_key() > last.as_str() && !(folded.is_some() && last.starts_with(item.sort_key()))
            }
        };
        if after && items.last() != Some(&item) {
            items.push(item);
        }
    }
    let more = items.len() > limit;
    items.truncate(limit);
    (items, more)
}

pub(crate) fn summary(key: &str) -> ObjectSummary {
    ObjectSummary {
        key: key.to_owned(),
        size_bytes: 1,
        etag: String::new(),
        modified_ms: 1,
        storage_class: String::new(),
        owner: AccountId::ROOT,
        checksum: None,
    }
}

impl Peers for FakeCluster {
    fn control(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, PeerError>> {
        Box::pin(async move {
            // Lets the tasks of a race mix.
            for _ in 0..super::random_below(4) {
                tokio::task::yield_now().await;
            }
            if self.state.lock().unwrap().hung.contains(&disk) {
                tokio::time::sleep(deadline).await;
                return Err(PeerError::Lost("timed out".into()));
            }
            self.answer(disk, request)
        })
    }
}
