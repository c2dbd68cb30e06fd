//! Extents a shard owns ('E'), the repair queue ('M') and the garbage queue ('G').
//!
//! An extent is in 'E' from the commit that refers to it until the commit that drops the last reference; that commit
//! puts it into 'G'. Its chunks in 'M' exist only while it is in 'E'. An extent in 'E' or 'G' cannot be committed
//! again: a retry that outlived the request window must not refer to chunks that are about to be deleted.

use crate::apply::Tx;
use crate::kv::{Kv, StateError};
use crate::record::{BucketId, ExtentRecord, ExtentRef, MissingRecord};
use crate::{ChunkRef, Reply};
use granary_placement::id::{Epoch, ExtentId};

/// Where the chunks of a payload lie, as its gateway knows.
#[derive(Debug, Clone, Copy)]
pub struct Placed<'a> {
    /// Chunks that are not on their slot's disk.
    pub missing: &'a [ChunkRef],
    /// By the map of this epoch.
    pub map_epoch: Epoch,
}

/// Why these extents cannot be committed; None when they can.
pub fn not_new<K: Kv + ?Sized>(tx: &Tx<'_, '_, K>, extents: &[ExtentRef]) -> Result<Option<String>, StateError> {
    for extent in extents {
        if tx.batch.get(&tx.keys.extent(extent.group, extent.extent))?.is_some() {
            return Ok(Some(format!("extent {} was committed before", extent.extent)));
        }
        if tx.batch.get(&tx.keys.garbage_index(extent.extent))?.is_some() {
            return Ok(Some(format!("extent {} is garbage", extent.extent)));
        }
    }
    Ok(None)
}

/// Enters new extents, and their missing chunks into the repair queue.
pub fn own_extents<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    extents: &[ExtentRef],
    missing: &[ChunkRef],
) -> Result<(), StateError> {
    for extent in extents {
        let record = ExtentRecord { extent: extent.clone(), bucket, key: key.to_owned() };
        tx.store(tx.keys.extent(extent.group, extent.extent), &record)?;
    }
    missing.iter().try_for_each(|chunk| queue_missing(tx, *chunk))
}

/// Queues a chunk for repair. One that is queued keeps its time, and is known by another generation from now on.
fn queue_missing<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, chunk: ChunkRef) -> Result<(), StateError> {
    let key = tx.keys.missing(chunk);
    let queued_ms = tx.load::<MissingRecord>(&key)?.map_or(tx.now_ms, |there| there.queued_ms);
    // The number of this command in its shard: no other command has it, before or after.
    let generation = tx.counters()?.commands + 1;
    tx.store(key, &MissingRecord { queued_ms, generation })
}

/// Moves extents whose last reference is gone to the garbage queue.
pub fn free_extents<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, extents: &[ExtentRef]) -> Result<(), StateError> {
    for extent in extents {
        tx.batch.delete(tx.keys.extent(extent.group, extent.extent));
        let queued = tx.keys.missing_of(extent.group, extent.extent);
        for (key, _) in tx.batch.scan(&queued.from, &queued.to, usize::from(u8::MAX) + 1)? {
            tx.batch.delete(key);
        }
        tx.store(tx.keys.garbage(tx.now_ms, extent.extent), extent)?;
        tx.store_now(tx.keys.garbage_index(extent.extent))?;
    }
    Ok(())
}

/// See [`crate::Command::ReportMissing`].
pub fn report_missing<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, chunks: &[ChunkRef]) -> Result<Reply, StateError> {
    for chunk in chunks {
        let Some(owned) = tx.load::<ExtentRecord>(&tx.keys.extent(chunk.group, chunk.extent))? else { continue };
        if usize::from(chunk.index) < owned.extent.slots.len() {
            queue_missing(tx, *chunk)?;
        }
    }
    Ok(Reply::Done)
}

/// See [`crate::Command::RepairDone`].
pub fn repair_done<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, chunks: &[(ChunkRef, u64)]) -> Result<Reply, StateError> {
    for (chunk, generation) in chunks {
        let key = tx.keys.missing(*chunk);
        if tx.load::<MissingRecord>(&key)?.is_some_and(|there| there.generation == *generation) {
            tx.batch.delete(key);
        }
    }
    Ok(Reply::Done)
}

/// See [`crate::Command::GarbageDone`].
pub fn garbage_done<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, extents: &[(u64, ExtentId)]) -> Result<Reply, StateError> {
    for (queued_ms, extent) in extents {
        let key = tx.keys.garbage(*queued_ms, *extent);
        if tx.batch.get(&key)?.is_some() {
            tx.batch.delete(key);
            tx.batch.delete(tx.keys.garbage_index(*extent));
        }
    }
    Ok(Reply::Done)
}
