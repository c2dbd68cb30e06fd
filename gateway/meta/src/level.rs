//! The feature level of a shard: a number in its state on which alone depends what its commands write.
//!
//! Replicas of one shard may run builds of two releases while a cluster is upgraded. A newer build writes what the
//! older one writes until the level is raised, by a command in the log, so at the same place in every replica.

use crate::apply::Tx;
use crate::codec::{decode, FeatureLevel};
use crate::keys::{kind, Keys};
use crate::kv::{Kv, StateError};
use crate::Reply;
use granary_placement::id::ShardId;

/// The level of a shard that was never told of another.
pub const FIRST_FEATURE_LEVEL: u32 = 1;
/// The highest level that this build knows. Level 1: the first release. Level 2: maps in which disks are away.
pub const MAX_FEATURE_LEVEL: u32 = 2;
/// The level from which on a map can say of a disk that it is away.
pub const AWAY_LEVEL: u32 = 2;

/// A build, as far as commands are concerned. There is one in a process; tests of upgrades bring another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Build {
    /// The highest level that it knows.
    pub max_level: u32,
}

impl Build {
    /// This one.
    pub const THIS: Build = Build { max_level: MAX_FEATURE_LEVEL };
}

/// The level in a stored value.
pub(crate) fn level_in(value: Option<Vec<u8>>) -> Result<u32, StateError> {
    match value {
        Some(bytes) => Ok(decode::<FeatureLevel>(&bytes)?.0),
        None => Ok(FIRST_FEATURE_LEVEL),
    }
}

/// The level of a shard.
///
/// # Errors
/// [`StateError`] when its state cannot be read.
pub fn level_of<K: Kv + ?Sized>(kv: &K, shard: ShardId) -> Result<u32, StateError> {
    level_in(kv.get(&Keys::new(shard).single(kind::LEVEL))?)
}

/// See [`crate::Command::SetFeatureLevel`].
pub fn set<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, level: u32) -> Result<Reply, StateError> {
    if level == tx.level {
        return Ok(Reply::Done);
    }
    // Builds must agree on this refusal, so it does not ask which levels they know.
    if tx.level.checked_add(1) != Some(level) {
        return Ok(Reply::Refused(format!("feature level {level} after {}", tx.level)));
    }
    if level > tx.build.max_level {
        return Err(StateError::Level { level, known: tx.build.max_level });
    }
    tx.level = level;
    tx.store(tx.keys.single(kind::LEVEL), &FeatureLevel(level))?;
    Ok(Reply::Done)
}
