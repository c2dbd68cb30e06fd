//! The way to the metadata shards.
//!
//! [`Shards`] knows which disk leads which shard, goes elsewhere when it does not, and asks until an answer comes or
//! the deadline passes, always under the same request id, so that a command is applied once however often it was sent.
//!
//! - this file: one request to one shard, and the object helpers on it;
//! - [`buckets`]: buckets: cache, making, and deleting behind fences;
//! - [`rules`]: a bucket's rule, changed in every shard before it counts;
//! - [`list`]: listings over all shards, merged;
//! - [`map_watch`]: the cluster map, kept up to date here and on the disk nodes;
//! - [`peers`]: the seam to the disk nodes, which tests replace.
//!
//! **Invariant:** a stale leader, member list or bucket in a cache costs a round trip, never a wrong answer: leaders
//! answer for themselves, bucket ids are never used again, and a bucket's shards refuse everything once it is fenced.

pub mod buckets;
pub mod list;
pub mod map_watch;
pub mod peers;
pub mod rules;

#[cfg(test)]
#[allow(missing_docs, dead_code, clippy::unwrap_used, clippy::expect_used)] // the tests in tests/io use it too
#[path = "../../tests/io/peers.rs"]
pub(crate) mod memory;

use crate::backoff::Backoff;
use crate::metrics::Metrics;
use granary_meta::record::{AccountId, BucketId};
use granary_meta::{Answer, BadBytes, Command, MetaRequest, Query, Reply, ShardRequest, ShardResponse};
use granary_placement::id::{DiskId, ShardId};
use granary_placement::map::ClusterMap;
use granary_placement::settings::Values;
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use granary_wire::error::LinkError;
use peers::Peers;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::Instant;

/// How long things may take. The defaults are for service; tests are in more of a hurry.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long a request to a shard is tried in all.
    pub deadline: Duration,
    /// How long one attempt may take. Longer than an election, so that a busy leader is not deserted; short enough that
    /// a hung one is.
    pub attempt: Duration,
    /// How long a member that did not answer is left alone within one request.
    pub silence: Duration,
    /// The first pause after all members were asked; each next one is twice as long.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// How long a bucket lookup waits for a deletion under way to end one way or the other.
    pub settle: Duration,
    /// For how long the root shard is not asked again about a name that was free, or another account's, when it was
    /// looked up. What another gateway does with the name meanwhile is seen here that much later.
    pub recent: Duration,
}

impl Timing {
    /// From the settings `shards.*`.
    pub fn from_settings(values: &Values) -> Timing {
        Timing {
            deadline: values.time("shards.deadline"),
            attempt: values.time("shards.attempt"),
            silence: values.time("shards.silence"),
            first_pause: values.time("shards.first_pause"),
            longest_pause: values.time("shards.longest_pause"),
            settle: values.time("shards.settle"),
            recent: RECENT,
        }
    }
}

impl Default for Timing {
    fn default() -> Timing {
        Timing::from_settings(&Values::default())
    }
}

/// See [`Timing::recent`].
const RECENT: Duration = Duration::from_secs(1);
/// In the leader cache: not known. Disk ids begin far below.
const NO_LEADER: u32 = u32::MAX;

/// Why a shard did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// No answer until the deadline. Whether a command was applied is not known.
    #[error("shard {shard} did not answer: {detail}")]
    Unavailable {
        /// Which shard.
        shard: ShardId,
        /// What the last attempt met.
        detail: String,
    },
    /// There is no cluster map yet, or it has no such shard. Nothing was sent.
    #[error("no cluster map with shard {0} yet")]
    NoMap(ShardId),
    /// The bucket was fenced in a shard: it is being deleted, or is gone. Look its name up again.
    #[error("the bucket is being deleted or gone")]
    BucketFenced,
    /// Background work under a lease that another gateway took over. Nothing was done.
    #[error("shard {shard}: the lease was taken over (epoch {current})")]
    LeaseLost {
        /// Which shard.
        shard: ShardId,
        /// The highest epoch of the task known there.
        current: u64,
    },
    /// The clocks of this gateway and of the shard's leader are too far apart: one of them is wrong. Nothing was done.
    #[error("this gateway's clock is {ahead_ms} ms ahead of the clock of shard {shard}'s leader")]
    ClockOff {
        /// Which shard.
        shard: ShardId,
        /// How far ahead, in milliseconds; negative: behind.
        ahead_ms: i64,
    },
    /// A disk of the shard has no room for what makes metadata grow. Nothing was done.
    #[error("shard {shard}: disk {disk} has no room left for more metadata")]
    NoRoom {
        /// Which shard.
        shard: ShardId,
        /// Which disk.
        disk: DiskId,
    },
    /// An answer came, and this build makes no sense of it. A command may have been applied.
    #[error("shard {shard} gave an answer that makes no sense here: {why}")]
    Garbled {
        /// Which shard.
        shard: ShardId,
        /// What is wrong with it.
        why: String,
    },
    /// The shard calls the request senseless; a mistake on our side. A command was not applied.
    #[error("shard {shard} refused: {why}")]
    Refused {
        /// Which shard.
        shard: ShardId,
        /// Its words.
        why: String,
    },
}

impl ShardError {
    /// May the command have been applied although there was no answer?
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, ShardError::Unavailable { .. } | ShardError::Garbled { .. })
    }
}

/// The shards of a cluster. A cheap handle.
#[derive(Clone)]
pub struct Shards {
    inner: Arc<Inner>,
}

struct Inner {
    peers: Arc<dyn Peers>,
    map: watch::Sender<Option<Arc<ClusterMap>>>,
    /// What the last changes of the map were, oldest first; for nodes that are a little behind.
    map_diffs: Mutex<std::collections::VecDeque<Arc<granary_placement::map::MapDiff>>>,
    /// True once the root shard itself has told us the map.
    confirmed: watch::Sender<bool>,
    /// When the root shard last answered.
    root_seen: Mutex<Option<Instant>>,
    /// By shard number; fixed in length because a cluster's number of shards is.
    leaders: Vec<AtomicU32>,
    buckets: buckets::BucketCache,
    timing: Timing,
    metrics: Metrics,
}

impl Shards {
    /// Shards behind `peers`. `map` holds the map given at start (bootstrap file) and is where newer maps are
    /// published; its receivers were handed to `peers` beforehand.
    pub fn new(peers: Arc<dyn Peers>, map: watch::Sender<Option<Arc<ClusterMap>>>, metrics: Metrics) -> Shards {
        Shards::with_timing(peers, map, metrics, Timing::default())
    }

    /// As [`Shards::new`], with other times.
    pub fn with_timing(
        peers: Arc<dyn Peers>,
        map: watch::Sender<Option<Arc<ClusterMap>>>,
        metrics: Metrics,
        timing: Timing,
    ) -> Shards {
        let leaders = (0..=u16::MAX).map(|_| AtomicU32::new(NO_LEADER)).collect();
        let confirmed = watch::Sender::new(false);
        let buckets = buckets::BucketCache::default();
        let root_seen = Mutex::new(None);
        let map_diffs = Mutex::default();
        Shards {
            inner: Arc::new(Inner { peers, map, map_diffs, confirmed, root_seen, leaders, buckets, timing, metrics }),
        }
    }

    /// The newest map known here, and news of it.
    pub fn map(&self) -> watch::Receiver<Option<Arc<ClusterMap>>> {
        self.inner.map.subscribe()
    }

    /// The newest map known here.
    pub fn current_map(&self) -> Option<Arc<ClusterMap>> {
        self.inner.map.borrow().clone()
    }

    /// True once the root shard has confirmed or renewed the map given at start.
    pub fn confirmed(&self) -> watch::Receiver<bool> {
        self.inner.confirmed.subscribe()
    }

    /// How long ago the root shard last answered.
    pub fn root_silence(&self) -> Option<Duration> {
        let seen = *self.inner.root_seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.map(|seen| seen.elapsed())
    }

    /// One control request to one disk, without retries: for status and forming a cluster.
    ///
    /// # Errors
    /// As [`Peers::control`].
    pub async fn ask_disk(
        &self,
        disk: DiskId,
        request: ControlRequest,
        deadline: Duration,
    ) -> Result<ControlResponse, LinkError> {
        self.inner.peers.control(disk, request, deadline).await
    }

    /// The shard that owns a key.
    ///
    /// # Errors
    /// [`ShardError::NoMap`].
    pub fn shard_of(&self, bucket: BucketId, key: &str) -> Result<ShardId, ShardError> {
        self.current_map().and_then(|map| map.shard_of(bucket.0, key)).ok_or(ShardError::NoMap(ShardId::ROOT))
    }

    /// The shards that hold objects, in order.
    pub fn object_shards(&self) -> Vec<ShardId> {
        let count = self.current_map().map_or(0, |map| map.object_shards());
        (1..=count).map(ShardId).collect()
    }

    /// Applies a command of the gateway itself to a shard, exactly once if it answers. Refusals of the state machine
    /// that callers act on come back as replies.
    ///
    /// # Errors
    /// [`ShardError::outcome_unknown`] tells whether the command may have been applied all the same.
    pub async fn command(&self, shard: ShardId, command: Command) -> Result<Reply, ShardError> {
        self.command_by(AccountId::ROOT, shard, command).await
    }

    /// As [`Shards::command`], on behalf of an account.
    ///
    /// # Errors
    /// As [`Shards::command`].
    pub async fn command_by(&self, account: AccountId, shard: ShardId, command: Command) -> Result<Reply, ShardError> {
        let request_id = random_id().map_err(|why| ShardError::Refused { shard, why })?;
        let request =
            ShardRequest::Command(MetaRequest { request_id, now_ms: now_ms(), stamp_ms: None, account, command });
        let (response, in_doubt) = self.timed("command", shard, request).await?;
        match response {
            // Shards remember what they applied for so many commands only: a refusal after an attempt that may have
            // been applied says nothing of that one.
            ShardResponse::Reply(reply) if in_doubt && !reply.is_success() => {
                let detail = "an earlier attempt may have been applied, and a later one was refused".to_owned();
                Err(ShardError::Unavailable { shard, detail })
            }
            ShardResponse::Reply(Reply::Refused(why)) => Err(ShardError::Refused { shard, why }),
            ShardResponse::Reply(reply) => Ok(reply),
            ShardResponse::Answer(_) => Err(ShardError::Garbled { shard, why: "an answer to a command".to_owned() }),
        }
    }

    /// Reads from a shard, linearizably.
    ///
    /// # Errors
    /// As [`Shards::command`]; nothing is ever applied.
    pub async fn query(&self, shard: ShardId, query: Query) -> Result<Answer, ShardError> {
        match self.timed("query", shard, ShardRequest::Query(query)).await?.0 {
            ShardResponse::Answer(Answer::Refused(why)) => Err(ShardError::Refused { shard, why }),
            ShardResponse::Answer(answer) => Ok(answer),
            ShardResponse::Reply(_) => Err(ShardError::Garbled { shard, why: "a reply to a query".to_owned() }),
        }
    }

    /// [`Shards::command_by`] on the shard that owns the key.
    ///
    /// # Errors
    /// As [`Shards::command`].
    pub async fn command_for(
        &self,
        account: AccountId,
        bucket: BucketId,
        key: &str,
        command: Command,
    ) -> Result<Reply, ShardError> {
        self.command_by(account, self.shard_of(bucket, key)?, command).await
    }

    /// [`Shards::query`] on the shard that owns the key.
    ///
    /// # Errors
    /// As [`Shards::query`].
    pub async fn query_for(&self, bucket: BucketId, key: &str, query: Query) -> Result<Answer, ShardError> {
        self.query(self.shard_of(bucket, key)?, query).await
    }

    /// The disk that was last seen leading a shard.
    pub fn leader(&self, shard: ShardId) -> Option<DiskId> {
        let leader = self.inner.leaders.get(usize::from(shard.0))?.load(Ordering::Relaxed);
        (leader != NO_LEADER).then_some(DiskId(leader))
    }

    fn set_leader(&self, shard: ShardId, leader: Option<DiskId>) {
        if let Some(place) = self.inner.leaders.get(usize::from(shard.0)) {
            place.store(leader.map_or(NO_LEADER, |disk| disk.0), Ordering::Relaxed);
        }
    }

    /// The answer, and whether an earlier attempt may have been taken too.
    async fn timed(
        &self,
        kind: &str,
        shard: ShardId,
        request: ShardRequest,
    ) -> Result<(ShardResponse, bool), ShardError> {
        let begun = Instant::now();
        let result = self.ask(shard, request).await;
        // The request was taken: whatever is wrong with its answer, a command may have been applied.
        let garbled = |error: BadBytes| ShardError::Garbled { shard, why: error.to_string() };
        let result = result.and_then(|(response, in_doubt)| match response {
            ControlResponse::Shard(bytes) => {
                ShardResponse::decode(&bytes).map(|response| (response, in_doubt)).map_err(garbled)
            }
            other => Err(ShardError::Garbled { shard, why: unexpected(&other) }),
        });
        let name = match &result {
            Ok(_) => "ok",
            Err(ShardError::Garbled { .. }) => "garbled",
            Err(error) if error.outcome_unknown() => "unavailable",
            Err(_) => "refused",
        };
        self.inner.metrics.shard_requests.with_label_values(&[kind, name]).inc();
        self.inner.metrics.shard_seconds.with_label_values(&[kind]).observe(begun.elapsed().as_secs_f64());
        result
    }

    /// Asks the leader; looks for it among the members when it is not where it was. The request goes out unchanged each
    /// time, but for its stamp. The answer, and whether an earlier attempt may have been taken too.
    async fn ask(&self, shard: ShardId, mut request: ShardRequest) -> Result<(ControlResponse, bool), ShardError> {
        let deadline = Instant::now() + self.inner.timing.deadline;
        // Rounds over all members that brought nothing.
        let mut rounds = 0;
        // Members asked since the last pause: each is asked once, then all are given time to elect.
        let mut asked: BTreeSet<DiskId> = BTreeSet::new();
        // Members that did not answer at all, and until when they are left alone: a hung leader is still named by the
        // others.
        let mut silent: BTreeMap<DiskId, Instant> = BTreeMap::new();
        let mut hint = self.leader(shard);
        // An attempt that was not clearly turned away may have been applied, whatever is answered to a later one.
        let mut in_doubt = false;
        loop {
            let map = self.current_map().ok_or(ShardError::NoMap(shard))?;
            let members = map.shards.get(usize::from(shard.0)).map(|replicas| replicas.members.as_slice());
            let members = members.ok_or(ShardError::NoMap(shard))?;
            let begun = Instant::now();
            silent.retain(|_, until| *until > begun);
            let target = hint.take().filter(|disk| map.disk(*disk).is_some() && !silent.contains_key(disk));
            let Some(target) =
                target.or_else(|| pick(members, |disk| !asked.contains(&disk) && !silent.contains_key(&disk)))
            else {
                self.pause(shard, deadline, &mut rounds, "no member answers").await?;
                asked.clear();
                continue;
            };
            asked.insert(target);
            let left = deadline.saturating_duration_since(Instant::now());
            if let ShardRequest::Command(command) = &mut request {
                command.stamp_ms = Some(now_ms());
            }
            let encoded = request.encode().map_err(|error| ShardError::Refused { shard, why: error.to_string() })?;
            let sent = ControlRequest::Shard { shard, request: encoded };
            let outcome = self.inner.peers.control(target, sent, left.min(self.inner.timing.attempt)).await;
            let (reason, detail) = match outcome {
                Ok(ControlResponse::Error(error)) => match error {
                    ControlError::BadRequest(detail) if in_doubt => {
                        return Err(ShardError::Unavailable { shard, detail })
                    }
                    ControlError::BadRequest(why) => return Err(ShardError::Refused { shard, why }),
                    // No answers to a request for a shard.
                    ControlError::EpochMismatch { .. } | ControlError::StaleLease { .. } => {
                        return Err(ShardError::Refused { shard, why: error.to_string() });
                    }
                    ControlError::NotLeader { leader } => {
                        hint = leader.filter(|leader| !asked.contains(leader));
                        ("not_leader", format!("disk {target} does not lead, it names {leader:?}"))
                    }
                    ControlError::ClockOff { ahead_ms } if !in_doubt => {
                        return Err(ShardError::ClockOff { shard, ahead_ms });
                    }
                    ControlError::ClockOff { .. } => ("clock_off", format!("disk {target}: {error}")),
                    ControlError::NoRoom { disk } if !in_doubt => return Err(ShardError::NoRoom { shard, disk }),
                    ControlError::NoRoom { .. } => ("no_room", format!("disk {target}: {error}")),
                    ControlError::Overloaded => ("overloaded", format!("disk {target} is overloaded")),
                    ControlError::Unavailable(why) => ("unavailable", format!("disk {target}: {why}")),
                    ControlError::NoSuchShard(_) => ("not_leader", format!("disk {target} holds no replica")),
                    ControlError::Disk(why) => ("unavailable", format!("disk {target}: {why}")),
                },
                Ok(response) => {
                    self.set_leader(shard, Some(target));
                    if shard == ShardId::ROOT {
                        *self.inner.root_seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                    }
                    return Ok((response, in_doubt));
                }
                Err(LinkError::TooLarge) if !in_doubt => {
                    return Err(ShardError::Refused { shard, why: LinkError::TooLarge.to_string() })
                }
                Err(error) => {
                    silent.insert(target, Instant::now() + self.inner.timing.silence);
                    // Without a connection, or a place on it, the request was certainly not sent.
                    let reason = match error {
                        LinkError::Connect(_) | LinkError::Busy => "not_sent",
                        _ => "link",
                    };
                    (reason, format!("disk {target}: {error}"))
                }
            };
            in_doubt |= matches!(reason, "link" | "unavailable");
            self.inner.metrics.shard_retries.with_label_values(&[reason]).inc();
            if self.leader(shard) == Some(target) {
                self.set_leader(shard, None);
            }
            tracing::debug!(shard = shard.0, %reason, %detail, "shard request goes on elsewhere");
            let all_asked = hint.is_none() && members.iter().all(|member| asked.contains(member));
            if all_asked || reason == "overloaded" {
                self.pause(shard, deadline, &mut rounds, &detail).await?;
                asked.clear();
            } else if Instant::now() >= deadline {
                return Err(ShardError::Unavailable { shard, detail });
            }
        }
    }

    /// Waits a little longer each time, with jitter, or gives up when the deadline comes first.
    async fn pause(&self, shard: ShardId, deadline: Instant, rounds: &mut u32, detail: &str) -> Result<(), ShardError> {
        *rounds = rounds.saturating_add(1);
        let timing = &self.inner.timing;
        let backoff = Backoff { first: timing.first_pause, longest: timing.longest_pause };
        let wait = backoff.delay(*rounds, random_per_mille());
        if Instant::now() + wait >= deadline {
            return Err(ShardError::Unavailable { shard, detail: detail.to_owned() });
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// A member that may be asked, drawn at random so that gateways do not all press on the first.
fn pick(members: &[DiskId], may: impl Fn(DiskId) -> bool) -> Option<DiskId> {
    let fresh: Vec<DiskId> = members.iter().copied().filter(|member| may(*member)).collect();
    let at = usize::try_from(random_below(fresh.len() as u64)).unwrap_or(0);
    fresh.get(at).copied()
}

fn unexpected(response: &ControlResponse) -> String {
    format!("answer of another kind: {}", buckets::short(response))
}

/// 16 random bytes.
pub(crate) fn random_id() -> Result<[u8; 16], String> {
    let mut id = [0u8; 16];
    getrandom::fill(&mut id).map_err(|error| format!("no randomness: {error}"))?;
    Ok(id)
}

/// A number below `bound`, 0 for 0; for spreading load, not for secrets.
pub(crate) fn random_below(bound: u64) -> u64 {
    let mut bytes = [0u8; 8];
    if bound == 0 || getrandom::fill(&mut bytes).is_err() {
        return 0;
    }
    u64::from_be_bytes(bytes) % bound
}

/// Jitter for [`Backoff::delay`].
pub(crate) fn random_per_mille() -> u32 {
    u32::try_from(random_below(1001)).unwrap_or(500)
}

/// Between half of `base` and one and a half of it.
pub(crate) fn jitter(base: Duration) -> Duration {
    Backoff { first: base, longest: base }.delay(1, random_per_mille())
}

/// Unix time by this machine's clock, in milliseconds. For ages only, never for order.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
pub(crate) mod tests;
