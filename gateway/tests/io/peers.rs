//! The metadata shards of a test's cluster: the real state machines in memory behind the seam to the disk nodes, with
//! faults on demand. For tests of the gateway's inside too.

use bytes::Bytes;
use futures::future::BoxFuture;
use granary_gateway::shards::peers::Peers;
use granary_meta::memory::{MemoryError, MemoryShards};
use granary_meta::{Answer, Command, MetaRequest, Query, Reply, ShardRequest};
use granary_placement::id::{DiskId, DiskUuid, Epoch, ShardId};
use granary_placement::map::ClusterMap;
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, NodeStatus};
use granary_wire::error::LinkError;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// What the next request to a shard meets, whoever it goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It is served, and the answer is lost. Waits for a request that goes to the leader.
    LoseAnswer,
    /// It is lost on the way.
    LoseRequest,
    /// There is no connection to send it on.
    NoConnection,
    /// This answer instead of doing anything.
    Answer(ControlError),
}

/// Is a query of some kind?
pub type Kind = fn(&Query) -> bool;

/// The shards, and what is wrong with the way to them.
pub struct State {
    pub shards: MemoryShards,
    /// Others than the leader name it, or nobody when there is none.
    pub leaders: HashMap<ShardId, DiskId>,
    /// Requests to these disks take until their deadline and are lost.
    pub hung: HashSet<DiskId>,
    /// Requests to these shards are lost.
    pub silent: BTreeSet<ShardId>,
    /// Queries of this kind to this shard are lost.
    pub unheard: Option<(ShardId, Kind)>,
    /// What the next requests to shards meet, one each.
    pub faults: VecDeque<Fault>,
    /// Every request to a shard is served, and its answer lost.
    pub lose_answers: bool,
    /// Every command is applied, and answered with this instead of its reply.
    pub garbled_reply: Option<Bytes>,
    /// Every request waits this long before it is served.
    pub delay: Duration,
    /// Pages of queries are no longer than this, so that paging is tried with few entries.
    pub page: Option<u32>,
    /// Applied before the next EndDeleteBucket: what others did, or what came late.
    pub before_end: Vec<(ShardId, Command)>,
    /// The commands that were served, in order: a repeated one again.
    pub commands: Vec<(ShardId, MetaRequest)>,
    /// (disk, shard) of every request for a shard.
    pub asked: Vec<(DiskId, ShardId)>,
    /// How often each shard was asked for its repair queue, and answered.
    pub looks: HashMap<ShardId, usize>,
    /// The epoch of the map that each disk node knows.
    pub epochs: HashMap<DiskId, Epoch>,
    /// Differences of the map that disk nodes took.
    pub diffs_taken: usize,
}

/// Disk nodes that host the shards. Each shard is led by the first of its members.
pub struct MemoryPeers {
    state: Arc<Mutex<State>>,
    /// Nothing passes this way.
    cut_off: AtomicBool,
}

impl MemoryPeers {
    pub fn new(map: &ClusterMap) -> Arc<MemoryPeers> {
        let leader = |(shard, replicas): (u16, &granary_placement::map::ShardReplicas)| {
            replicas.members.first().map(|disk| (ShardId(shard), *disk))
        };
        let state = State {
            shards: MemoryShards::new(map).unwrap(),
            leaders: (0..).zip(&map.shards).filter_map(leader).collect(),
            hung: HashSet::new(),
            silent: BTreeSet::new(),
            unheard: None,
            faults: VecDeque::new(),
            lose_answers: false,
            garbled_reply: None,
            delay: Duration::ZERO,
            page: None,
            before_end: Vec::new(),
            commands: Vec::new(),
            asked: Vec::new(),
            looks: HashMap::new(),
            epochs: HashMap::new(),
            diffs_taken: 0,
        };
        let peers = MemoryPeers { state: Arc::new(Mutex::new(state)), cut_off: AtomicBool::new(false) };
        let known = peers.query(ShardId::ROOT, &Query::GetMap { newer_than: Epoch(0) });
        assert_eq!(known, Answer::Map(Box::new(map.clone())), "the root shard took the map");
        Arc::new(peers)
    }

    /// The way of one more gateway to the same shards, to be cut off alone.
    pub fn another_way(&self) -> Arc<MemoryPeers> {
        Arc::new(MemoryPeers { state: self.state.clone(), cut_off: AtomicBool::new(false) })
    }

    pub fn cut_off(&self, cut_off: bool) {
        self.cut_off.store(cut_off, Ordering::SeqCst);
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Applies a command behind the back of all gateways.
    pub fn command_at(&self, shard: ShardId, now_ms: u64, command: Command) -> Reply {
        self.state().shards.command(shard, now_ms, command).unwrap()
    }

    /// As [`MemoryPeers::command_at`], at the beginning of time.
    pub fn command(&self, shard: ShardId, command: Command) -> Reply {
        self.command_at(shard, 1, command)
    }

    pub fn query(&self, shard: ShardId, query: &Query) -> Answer {
        self.state().shards.query(shard, query).unwrap()
    }
}

impl State {
    fn serve(&mut self, disk: DiskId, request: ControlRequest) -> Result<ControlResponse, LinkError> {
        let known = self.epochs.get(&disk).copied().unwrap_or_default();
        match request {
            ControlRequest::Status => Ok(ControlResponse::Status(NodeStatus {
                disk: Some(disk),
                uuid: DiskUuid([0; 16]),
                epoch: known,
                capacity_bytes: 0,
                free_bytes: 0,
                chunks: 0,
                chunk_bytes: 0,
                feature_level: 1,
                data_connections: 0,
            })),
            ControlRequest::OfferMapDiff(diff) if known != diff.from => {
                Ok(ControlResponse::Error(ControlError::EpochMismatch { known }))
            }
            ControlRequest::OfferMapDiff(diff) => {
                self.epochs.insert(disk, diff.to);
                self.diffs_taken += 1;
                Ok(ControlResponse::Done)
            }
            ControlRequest::OfferMap(map) => {
                self.epochs.insert(disk, map.epoch);
                Ok(ControlResponse::Done)
            }
            ControlRequest::Shard { shard, request } => self.serve_shard(disk, shard, &request),
            other => panic!("no disk node in these tests knows {other:?}"),
        }
    }

    fn serve_shard(&mut self, disk: DiskId, shard: ShardId, request: &[u8]) -> Result<ControlResponse, LinkError> {
        self.asked.push((disk, shard));
        let lost = |what: &str| Err(LinkError::Closed(format!("{what} was lost on purpose")));
        let leader = self.leaders.get(&shard).copied();
        let fault = self.faults.pop_front_if(|fault| *fault != Fault::LoseAnswer || leader == Some(disk));
        match &fault {
            Some(Fault::LoseRequest) => return lost("the request"),
            Some(Fault::NoConnection) => return Err(LinkError::Connect("on purpose".into())),
            Some(Fault::Answer(error)) => return Ok(ControlResponse::Error(error.clone())),
            Some(Fault::LoseAnswer) | None => {}
        }
        if self.silent.contains(&shard) {
            return lost("the request");
        }
        if leader != Some(disk) {
            return Ok(ControlResponse::Error(ControlError::NotLeader { leader }));
        }
        let mut request = ShardRequest::decode(request).expect("a shard request");
        let is_command = match &mut request {
            ShardRequest::Command(request) => {
                if matches!(request.command, Command::EndDeleteBucket { .. }) {
                    for (shard, command) in std::mem::take(&mut self.before_end) {
                        self.shards.command(shard, 1, command).unwrap();
                    }
                }
                self.commands.push((shard, request.clone()));
                true
            }
            ShardRequest::Query(query) => {
                if self.unheard.is_some_and(|(of, is_unheard)| of == shard && is_unheard(query)) {
                    return lost("the request");
                }
                if let Query::ListMissing { .. } = query {
                    *self.looks.entry(shard).or_default() += 1;
                }
                if let (Some(limit), Some(page)) = (limit_of(query), self.page) {
                    *limit = page.min(*limit);
                }
                false
            }
        };
        let answer = match self.shards.serve(shard, &request.encode().unwrap()) {
            Ok(answer) => answer,
            // As the host of the leader does.
            Err(MemoryError::BadBytes(why)) => {
                return Ok(ControlResponse::Error(ControlError::BadRequest(why.to_string())))
            }
            Err(error) => panic!("{error}"),
        };
        match self.garbled_reply.clone().filter(|_| is_command) {
            _ if self.lose_answers || fault == Some(Fault::LoseAnswer) => lost("the answer"),
            Some(garbled) => Ok(ControlResponse::Shard(garbled)),
            None => Ok(ControlResponse::Shard(answer)),
        }
    }
}

/// How much a query asks for, where it asks for a page.
fn limit_of(query: &mut Query) -> Option<&mut u32> {
    match query {
        Query::ListObjects { limit, .. }
        | Query::ListUploads { limit, .. }
        | Query::ListParts { limit, .. }
        | Query::ExtentsOfGroup { limit, .. }
        | Query::ListMissing { limit, .. }
        | Query::ListGarbage { limit, .. }
        | Query::ListBuckets { limit, .. }
        | Query::ListRepairSlots { limit, .. } => Some(limit),
        _ => None,
    }
}

impl Peers for MemoryPeers {
    fn control(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<ControlResponse, LinkError>> {
        Box::pin(async move {
            // Lets the tasks of a race mix.
            let mut dice = [0u8; 1];
            getrandom::fill(&mut dice).unwrap();
            for _ in 0..dice[0] % 4 {
                tokio::task::yield_now().await;
            }
            if self.cut_off.load(Ordering::SeqCst) {
                return Err(LinkError::Closed("cut off".into()));
            }
            let (hung, delay) = {
                let state = self.state();
                (state.hung.contains(&disk), state.delay)
            };
            if hung {
                tokio::time::sleep(deadline).await;
                return Err(LinkError::Timeout);
            }
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            self.state().serve(disk, request)
        })
    }
}
