//! Leases of background tasks in the root shard, and the stamps of their holders in every shard.
//!
//! A lease is an epoch and a number of renewals. Nothing here knows a clock: whoever wants a lease watches both
//! numbers, and takes it by naming the numbers it saw stand still. So a taking and a renewal at the same moment cannot
//! both succeed, and the loser is told. Leases are never removed: an epoch that was handed out is never handed out
//! again.
//!
//! A holder that was paused does not know that its lease was taken over. What it then sends carries the old epoch, and
//! every shard that heard of the new holder refuses it.

use crate::apply::Tx;
use crate::check::check_task;
use crate::codec::LeaseSeen;
use crate::keys::kind;
use crate::kv::{Kv, StateError};
use crate::record::LeaseRecord;
use crate::Reply;
use bytes::Bytes;
use granary_placement::lease::LeaseStamp;

/// Most tasks with a lease. Part of the replicated history.
pub const MAX_LEASES: usize = 1_024;
/// Longest progress, in bytes. Part of the replicated history.
pub const MAX_PROGRESS_BYTES: usize = 4 * 1024;
/// Longest address of a holder, in bytes. Part of the replicated history.
pub const MAX_ADDRESS_BYTES: usize = 256;

/// Most tasks whose stamps a shard knows. Part of the replicated history.
pub const MAX_STAMPED_TASKS: usize = 1_024;

/// Notes the stamp of a command of background work. Some: the command is turned away with that reply.
pub fn turned_away<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, stamp: &LeaseStamp) -> Result<Option<Reply>, StateError> {
    if let Err(why) = check_task(&stamp.task) {
        return Ok(Some(Reply::Refused(why)));
    }
    let key = tx.keys.lease_seen(&stamp.task);
    let seen: Option<LeaseSeen> = tx.load(&key)?;
    match seen.map(|seen| seen.0) {
        Some(current) if current > stamp.epoch => return Ok(Some(Reply::StaleLease { current })),
        Some(current) if current == stamp.epoch => return Ok(None),
        Some(_) => {}
        None => {
            let all = tx.keys.kind_range(kind::LEASE_SEEN);
            if tx.batch.scan(&all.from, &all.to, MAX_STAMPED_TASKS)?.len() == MAX_STAMPED_TASKS {
                return Ok(Some(Reply::Refused(format!("stamps of {MAX_STAMPED_TASKS} tasks"))));
            }
        }
    }
    tx.store(key, &LeaseSeen(stamp.epoch))?;
    Ok(None)
}

/// What a reply says of a lease: all but the progress, which would stay in the window of kept replies with every
/// renewal.
fn told(lease: LeaseRecord) -> LeaseRecord {
    LeaseRecord { progress: Bytes::new(), ..lease }
}

/// See [`crate::Command::TakeLease`].
pub fn take<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    task: &str,
    holder: [u8; 16],
    address: &str,
    ttl_ms: u64,
    seen: (u64, u64),
) -> Result<Reply, StateError> {
    if let Err(why) = check_task(task) {
        return Ok(Reply::Refused(why));
    }
    if address.len() > MAX_ADDRESS_BYTES {
        return Ok(Reply::Refused(format!("an address of {} bytes", address.len())));
    }
    let key = tx.keys.lease(task);
    match tx.load::<LeaseRecord>(&key)? {
        Some(there) if (there.epoch, there.renewals) != seen => return Ok(Reply::LeaseHeld(told(there))),
        Some(_) => {}
        None if seen != (0, 0) => return Ok(Reply::NoSuchLease),
        None => {
            let all = tx.keys.kind_range(kind::LEASE);
            if tx.batch.scan(&all.from, &all.to, MAX_LEASES)?.len() == MAX_LEASES {
                return Ok(Reply::Refused(format!("there are {MAX_LEASES} leases")));
            }
        }
    }
    let taken = LeaseRecord {
        task: task.to_owned(),
        epoch: seen.0 + 1,
        renewals: 0,
        holder: Some(holder),
        address: address.to_owned(),
        ttl_ms,
        taken_ms: tx.now_ms,
        renewed_ms: tx.now_ms,
        progress: Bytes::new(),
    };
    tx.store(key, &taken)?;
    Ok(Reply::Lease(told(taken)))
}

/// See [`crate::Command::RenewLease`].
pub fn renew<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    task: &str,
    holder: [u8; 16],
    epoch: u64,
    ttl_ms: u64,
    progress: &Bytes,
) -> Result<Reply, StateError> {
    if progress.len() > MAX_PROGRESS_BYTES {
        return Ok(Reply::Refused(format!("a progress of {} bytes", progress.len())));
    }
    let key = tx.keys.lease(task);
    let Some(there) = tx.load::<LeaseRecord>(&key)? else { return Ok(Reply::NoSuchLease) };
    if there.epoch != epoch || there.holder != Some(holder) {
        return Ok(Reply::LeaseHeld(told(there)));
    }
    let renewals = there.renewals + 1;
    let renewed = LeaseRecord { renewals, ttl_ms, renewed_ms: tx.now_ms, progress: progress.clone(), ..there };
    tx.store(key, &renewed)?;
    Ok(Reply::Lease(told(renewed)))
}

/// See [`crate::Command::ReleaseLease`]. A release that comes twice is answered twice.
pub fn release<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    task: &str,
    holder: [u8; 16],
    epoch: u64,
) -> Result<Reply, StateError> {
    let key = tx.keys.lease(task);
    let Some(there) = tx.load::<LeaseRecord>(&key)? else { return Ok(Reply::NoSuchLease) };
    if there.epoch != epoch || there.holder.is_some_and(|now| now != holder) {
        return Ok(Reply::LeaseHeld(told(there)));
    }
    if there.holder.is_none() {
        return Ok(Reply::Lease(told(there)));
    }
    let released = LeaseRecord { holder: None, address: String::new(), renewed_ms: tx.now_ms, ..there };
    tx.store(key, &released)?;
    Ok(Reply::Lease(told(released)))
}
