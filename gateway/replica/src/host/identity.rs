//! What the log database says of itself: whose directory it is, and which replicas live in it.

use super::MetaError;
use crate::message::{MetadataIdentity, ReplicaRecord};
use crate::store::{LogDb, LogWrite};
use granary_meta::codec::{decode, encode};
use granary_meta::keys::after_prefix;
use granary_meta::kv::StateError;
use granary_placement::id::{DiskId, ShardId};

/// Log-database keys that belong to no shard: `0xFFFF | 'I'` whose directory it is, `0xFFFF | 'G' | shard` a replica
/// that lives here.
const IDENTITY_KEY: &[u8] = &[0xff, 0xff, b'I'];
const REPLICA_PREFIX: &[u8] = &[0xff, 0xff, b'G'];

/// A number that no directory or replica had before.
///
/// # Errors
/// The system has no random bytes.
pub(super) fn new_number() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(u64::from_be_bytes(bytes))
}

/// Checks whose directory this is, or says it in one that is new. `on_label` is the number that the disk's label has.
/// Blocks.
///
/// # Errors
/// [`MetaError::OtherDisk`], [`MetaError::OtherDirectory`]; nothing was changed.
pub(super) fn identify(log: &LogDb, disk: DiskId, on_label: Option<u64>) -> Result<MetadataIdentity, MetaError> {
    let Some(bytes) = log.get(IDENTITY_KEY)? else {
        let identity = MetadataIdentity { disk, number: new_number()?, replaces: on_label };
        log.write_synced(&[LogWrite::Put(IDENTITY_KEY.to_vec(), encode(&identity)?)])?;
        return Ok(identity);
    };
    let identity: MetadataIdentity = decode(&bytes)?;
    if identity.disk != disk {
        return Err(MetaError::OtherDisk { found: identity.disk, expected: disk });
    }
    // The label follows the directory: a stop between the two leaves it one behind.
    match on_label {
        Some(expected) if expected != identity.number && Some(expected) != identity.replaces => {
            Err(MetaError::OtherDirectory { found: identity.number, expected })
        }
        _ => Ok(identity),
    }
}

pub(super) fn replica_key(shard: ShardId) -> Vec<u8> {
    [REPLICA_PREFIX, &shard.0.to_be_bytes()].concat()
}

/// The incarnation of the replica that lives here, if one does. Blocks.
pub(super) fn incarnation_of(log: &LogDb, shard: ShardId) -> Result<Option<u64>, StateError> {
    let record = log.get(&replica_key(shard))?.map(|bytes| decode::<ReplicaRecord>(&bytes)).transpose()?;
    Ok(record.map(|record| record.incarnation))
}

/// What writes down that a replica lives here from now on, and its incarnation.
pub(super) fn new_replica(shard: ShardId) -> Result<(u64, LogWrite), MetaError> {
    let incarnation = new_number()?;
    Ok((incarnation, LogWrite::Put(replica_key(shard), encode(&ReplicaRecord { incarnation })?)))
}

pub(super) fn replicas_here(log: &LogDb) -> Result<Vec<ShardId>, StateError> {
    let mut found = Vec::new();
    let end = after_prefix(REPLICA_PREFIX).unwrap_or_default();
    log.scan(REPLICA_PREFIX, &end, |key, _| {
        if let Some(shard) = key.last_chunk::<2>() {
            found.push(ShardId(u16::from_be_bytes(*shard)));
        }
        Ok(true)
    })?;
    Ok(found)
}
