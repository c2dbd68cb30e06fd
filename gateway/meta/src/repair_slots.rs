//! The repair queue of slots: one durable entry for everything this shard owns in a slot of a placement group, with a
//! cursor, so that a whole disk is queued in a few commands and its repair goes on where it stopped.

use crate::apply::Tx;
use crate::kv::{Kv, StateError};
use crate::record::RepairSlotRecord;
use crate::Reply;
use granary_placement::id::{ExtentId, PlacementGroupId};

/// Most slots in one command. Part of the replicated history.
pub const MAX_SLOTS: usize = 4_096;

/// See [`crate::Command::QueueRepair`].
pub fn queue<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    slots: &[(PlacementGroupId, u8)],
    keep: bool,
) -> Result<Reply, StateError> {
    if slots.len() > MAX_SLOTS {
        return Ok(Reply::Refused(format!("{} slots at once", slots.len())));
    }
    // The number of this command in its shard: no other command has it, before or after.
    let generation = tx.counters()?.commands + 1;
    for (group, slot) in slots {
        let key = tx.keys.repair_slot(*group, *slot);
        let there: Option<RepairSlotRecord> = tx.load(&key)?;
        if keep && there.is_some() {
            continue;
        }
        let queued_ms = there.map_or(tx.now_ms, |there| there.queued_ms);
        tx.store(key, &RepairSlotRecord { queued_ms, generation, cursor: None })?;
    }
    Ok(Reply::Done)
}

/// The entry of a slot, if it is of this generation.
fn of_generation<K: Kv + ?Sized>(
    tx: &Tx<'_, '_, K>,
    key: &[u8],
    generation: u64,
) -> Result<Option<RepairSlotRecord>, StateError> {
    Ok(tx.load::<RepairSlotRecord>(key)?.filter(|there| there.generation == generation))
}

/// See [`crate::Command::AdvanceRepair`].
pub fn advance<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    group: PlacementGroupId,
    slot: u8,
    generation: u64,
    cursor: ExtentId,
) -> Result<Reply, StateError> {
    let key = tx.keys.repair_slot(group, slot);
    if let Some(there) = of_generation(tx, &key, generation)? {
        // A command that comes late does not take the cursor back.
        if there.cursor.is_none_or(|before| before < cursor) {
            tx.store(key, &RepairSlotRecord { cursor: Some(cursor), ..there })?;
        }
    }
    Ok(Reply::Done)
}

/// See [`crate::Command::RepairSlotDone`].
pub fn done<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    group: PlacementGroupId,
    slot: u8,
    generation: u64,
) -> Result<Reply, StateError> {
    let key = tx.keys.repair_slot(group, slot);
    if of_generation(tx, &key, generation)?.is_some() {
        tx.batch.delete(key);
    }
    Ok(Reply::Done)
}
