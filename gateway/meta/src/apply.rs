//! Applies commands: deterministic, no clock, no randomness, no unordered iteration. Same state and command, same batch
//! and reply.
//!
//! `apply` is the door: it deduplicates by request id, turns away background work whose lease was taken over, and hands
//! the command to the module of its kind. A refusal writes nothing but its own kept reply.

use crate::codec::{decode, encode_at, Counters, Fence, KeptReply, QueuedAt, Record};
use crate::keys::{kind, Keys};
use crate::kv::{Kv, Overlay, StateError};
use crate::level::{self, Build};
use crate::nature::TakenBy;
use crate::record::{AccountId, BucketId, BucketRule, Usage};
use crate::{buckets, leases, maps, objects, queues, repair_slots, rules, settings, uploads};
use crate::{Command, MetaRequest, Reply};
use granary_placement::id::ShardId;

/// So many replies are kept at least.
pub const REQUEST_WINDOW: u64 = 16_384;
/// A command is applied no later than this after it was made, by the shard's clock: longer than gateways go on trying.
pub const LIFETIME_MS: u64 = 40_000;
/// A command may be made so far ahead of the shard's clock.
pub const AHEAD_MS: u64 = 5_000;
/// A reply is kept for as long as its command could be applied once more: by the shard's clock it was applied no
/// earlier than AHEAD_MS before it was made, and can be applied no later than LIFETIME_MS after. All four are part of
/// the replicated history.
pub const KEPT_MS: u64 = LIFETIME_MS + AHEAD_MS;
/// Replies forgotten per command. More than one, so that the window shrinks again after a rush.
const FORGOTTEN_AT_ONCE: usize = 4;

/// A batch being built by the commands of one or more log entries.
pub struct Tx<'b, 'k, K: Kv + ?Sized> {
    /// Reads its own writes.
    pub batch: &'b mut Overlay<'k, K>,
    /// Keys of the shard.
    pub keys: Keys,
    /// The command's time, Unix milliseconds.
    pub now_ms: u64,
    /// Who acts.
    pub account: AccountId,
    /// The build that applies.
    pub build: Build,
    /// The shard's feature level: decides, alone, what is written.
    pub level: u32,
}

impl<K: Kv + ?Sized> Tx<'_, '_, K> {
    /// A decoded value.
    pub fn load<T: Record>(&self, key: &[u8]) -> Result<Option<T>, StateError> {
        self.batch.get(key)?.map(|bytes| decode(&bytes)).transpose()
    }

    /// Encodes a value as the feature level wants, and writes it.
    pub fn store<T: Record>(&mut self, key: Vec<u8>, value: &T) -> Result<(), StateError> {
        self.batch.put(key, encode_at(self.level, value)?);
        Ok(())
    }

    /// Writes the command's time.
    pub fn store_now(&mut self, key: Vec<u8>) -> Result<(), StateError> {
        let now_ms = self.now_ms;
        self.store(key, &QueuedAt(now_ms))
    }

    /// The shard's counters.
    pub fn counters(&self) -> Result<Counters, StateError> {
        Ok(self.load(&self.keys.single(kind::COUNTERS))?.unwrap_or_default())
    }

    /// Writes the shard's counters.
    pub fn store_counters(&mut self, counters: &Counters) -> Result<(), StateError> {
        self.store(self.keys.single(kind::COUNTERS), counters)
    }

    /// Is there a fence up around the bucket?
    pub fn fenced(&self, bucket: BucketId) -> Result<bool, StateError> {
        Ok(self.load::<Fence>(&self.keys.fence(bucket))?.is_some_and(|fence| fence.up))
    }

    /// Usage of a bucket.
    pub fn usage(&self, bucket: BucketId) -> Result<Usage, StateError> {
        Ok(self.load(&self.keys.usage(bucket))?.unwrap_or_default())
    }

    /// Writes usage of a bucket; an empty bucket has no entry.
    pub fn store_usage(&mut self, bucket: BucketId, usage: &Usage) -> Result<(), StateError> {
        let key = self.keys.usage(bucket);
        if *usage == Usage::default() {
            self.batch.delete(key);
            return Ok(());
        }
        self.store(key, usage)
    }
}

/// Applies one request of a log entry to the batch and says what it came to.
///
/// # Errors
/// [`StateError`] when the state cannot be read: the replica must stop, for it can neither apply nor skip the command.
pub fn apply<K: Kv + ?Sized>(
    shard: ShardId,
    batch: &mut Overlay<'_, K>,
    request: &MetaRequest,
) -> Result<Reply, StateError> {
    apply_by(Build::THIS, shard, batch, request)
}

/// As [`apply`], by a build of other feature levels.
///
/// # Errors
/// As [`apply`].
pub fn apply_by<K: Kv + ?Sized>(
    build: Build,
    shard: ShardId,
    batch: &mut Overlay<'_, K>,
    request: &MetaRequest,
) -> Result<Reply, StateError> {
    let keys = Keys::new(shard);
    let level = level::level_in(batch.get(&keys.single(kind::LEVEL))?)?;
    if level > build.max_level {
        return Err(StateError::Level { level, known: build.max_level });
    }
    let mut tx = Tx { batch, keys, now_ms: request.now_ms, account: request.account, build, level };
    let kept_key = tx.keys.request(&request.request_id);
    let repeatable = request.command.nature().repeatable;
    if !repeatable {
        if let Some(kept) = tx.load::<KeptReply>(&kept_key)? {
            return Ok(kept.reply);
        }
    }
    let clock_ms = tx.counters()?.clock_ms.max(request.stamp_ms.unwrap_or_default());
    if request.stamp_ms.is_some() && !repeatable {
        if let Some(expired) = expired(request.now_ms, clock_ms) {
            return Ok(expired);
        }
    }
    let reply = dispatch(shard, &mut tx, &request.command)?;
    let mut counters = tx.counters()?;
    counters.commands += 1;
    counters.clock_ms = clock_ms;
    if !repeatable {
        let kept = KeptReply { sequence: counters.kept_next, reply: reply.clone() };
        tx.store(kept_key, &kept)?;
        let entry = [request.request_id.as_slice(), &clock_ms.to_be_bytes()].concat();
        tx.batch.put(tx.keys.request_order(counters.kept_next), entry);
        counters.kept_next += 1;
        forget_replies(&mut tx, &mut counters)?;
    }
    tx.store_counters(&counters)?;
    Ok(reply)
}

/// Was the request applied before, and is its reply kept?
///
/// # Errors
/// [`StateError`] when the state cannot be read.
pub fn is_kept<K: Kv + ?Sized>(shard: ShardId, kv: &K, request_id: &[u8; 16]) -> Result<bool, StateError> {
    Ok(kv.get(&Keys::new(shard).request(request_id))?.is_some())
}

/// The refusal of a command that comes too late, or from too far ahead. No clock of a gateway decides it for another's
/// commands, and none can make a command be applied twice: whatever `now_ms` is, it is the same in all retries, and all
/// are judged by the one clock of the shard, which never goes back.
fn expired(now_ms: u64, clock_ms: u64) -> Option<Reply> {
    let in_time = now_ms <= clock_ms.saturating_add(AHEAD_MS) && clock_ms <= now_ms.saturating_add(LIFETIME_MS);
    let age_ms = i64::try_from(i128::from(clock_ms) - i128::from(now_ms)).unwrap_or(i64::MAX);
    (!in_time).then_some(Reply::Expired { age_ms })
}

/// Forgets replies that are beyond the window and older than any command that could still be applied.
fn forget_replies<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, counters: &mut Counters) -> Result<(), StateError> {
    for _ in 0..FORGOTTEN_AT_ONCE {
        if counters.kept_next - counters.kept_first <= REQUEST_WINDOW {
            break;
        }
        let order = tx.keys.request_order(counters.kept_first);
        let entry = tx.batch.get(&order)?.unwrap_or_default();
        let (Some(id), Some(at_ms)) = (entry.first_chunk::<16>(), entry.get(16..).and_then(|at| at.first_chunk::<8>()))
        else {
            return Err(StateError::Value("an entry of the request window of another length".to_owned()));
        };
        if u64::from_be_bytes(*at_ms).saturating_add(KEPT_MS) >= counters.clock_ms {
            break;
        }
        tx.batch.delete(tx.keys.request(id));
        tx.batch.delete(order);
        counters.kept_first += 1;
    }
    Ok(())
}

fn dispatch<K: Kv + ?Sized>(shard: ShardId, tx: &mut Tx<'_, '_, K>, command: &Command) -> Result<Reply, StateError> {
    let nature = command.nature();
    let is_taken = match nature.taken_by {
        TakenBy::Root => shard == ShardId::ROOT,
        TakenBy::Objects => shard != ShardId::ROOT,
        TakenBy::Any => true,
    };
    if !is_taken {
        return Ok(Reply::Refused(format!("not a command of shard {shard}")));
    }
    if let Some(stamp) = nature.lease {
        if let Some(reply) = leases::turned_away(tx, stamp)? {
            return Ok(reply);
        }
    }
    match command {
        Command::PutObject { bucket, key, record, missing, map_epoch, conditions, rule_epoch } => {
            let placed = queues::Placed { missing, map_epoch: *map_epoch };
            objects::put(tx, *bucket, key, record, placed, conditions, *rule_epoch)
        }
        Command::DeleteObject { bucket, key, version, conditions, rule_epoch } => {
            objects::delete(tx, *bucket, key, *version, conditions, *rule_epoch)
        }
        Command::CreateUpload { bucket, key, upload, record, rule_epoch } => {
            uploads::create(tx, *bucket, key, *upload, record, *rule_epoch)
        }
        Command::PutPart { bucket, key, upload, part, missing, map_epoch, rule_epoch } => {
            let placed = queues::Placed { missing, map_epoch: *map_epoch };
            uploads::put_part(tx, *bucket, key, *upload, part, placed, *rule_epoch)
        }
        Command::CompleteUpload { bucket, key, upload, parts, record, conditions, rule_epoch } => {
            let wanted = uploads::Completion { parts, record, conditions, rule_epoch: *rule_epoch };
            uploads::complete(tx, *bucket, key, *upload, &wanted)
        }
        Command::AbortUpload { bucket, key, upload } => uploads::abort(tx, *bucket, key, *upload),
        Command::FenceBucket { bucket, attempt } => buckets::fence(tx, *bucket, *attempt),
        Command::UnfenceBucket { bucket, attempt } => buckets::unfence(tx, *bucket, *attempt),
        Command::ReportMissing { chunks } => queues::report_missing(tx, chunks),
        Command::RepairDone { chunks, lease: _ } => queues::repair_done(tx, chunks),
        Command::GarbageDone { extents, lease: _ } => queues::garbage_done(tx, extents),
        Command::CreateBucket { name, owner } => buckets::create(tx, name, *owner),
        Command::BeginDeleteBucket { name, bucket } => buckets::begin_delete(tx, name, *bucket),
        Command::EndDeleteBucket { name, bucket, attempt, remove } => {
            buckets::end_delete(tx, name, *bucket, *attempt, *remove)
        }
        Command::SetMap { map } => maps::set(tx, map),
        Command::RequireMap { epoch, lease: _ } => maps::require(tx, *epoch),
        Command::Noop => Ok(Reply::Done),
        Command::SetFeatureLevel { level } => level::set(tx, *level),
        Command::TakeLease { task, holder, address, ttl_ms, seen_epoch, seen_renewals } => {
            leases::take(tx, task, *holder, address, *ttl_ms, (*seen_epoch, *seen_renewals))
        }
        Command::RenewLease { task, holder, epoch, ttl_ms, progress } => {
            leases::renew(tx, task, *holder, *epoch, *ttl_ms, progress)
        }
        Command::ReleaseLease { task, holder, epoch } => leases::release(tx, task, *holder, *epoch),
        Command::SetSetting { name, value } => settings::set(tx, name, value.as_deref()),
        Command::BeginBucketRule { name, bucket, versioning, lock, policy_epoch } => {
            let wanted = BucketRule { epoch: 0, versioning: *versioning, lock: *lock, policy_epoch: *policy_epoch };
            rules::begin(tx, name, *bucket, wanted)
        }
        Command::EndBucketRule { name, bucket, epoch } => rules::end(tx, name, *bucket, *epoch),
        Command::SetBucketRule { bucket, rule } => rules::set(tx, *bucket, rule),
        Command::QueueRepair { slots, keep, lease: _ } => repair_slots::queue(tx, slots, *keep),
        Command::AdvanceRepair { group, slot, generation, cursor, lease: _ } => {
            repair_slots::advance(tx, *group, *slot, *generation, *cursor)
        }
        Command::RepairSlotDone { group, slot, generation, lease: _ } => {
            repair_slots::done(tx, *group, *slot, *generation)
        }
    }
}
