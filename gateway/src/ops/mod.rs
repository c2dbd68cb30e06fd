//! What operators and the healer do to the cluster map, and what operators set for the whole cluster.
//!
//! - [`change`]: pure functions from a map to the next one: replace, drain, weigh, end a move;
//! - [`away`]: pure functions, too: take a dead disk out, let it back in, give empty disks their share;
//! - [`form`]: the description of a new cluster becomes its first map;
//! - [`levels`]: pure: which shards may write what a newer release writes;
//! - [`settings`]: the settings of the whole cluster, set and followed;
//! - [`commit`]: the one way in which a change becomes the map of the root shard.
//!
//! Nothing here moves data. A map whose slots name a `previous` disk is what the healer works from.

pub mod away;
pub mod change;
pub mod commit;
pub mod form;
pub mod levels;
pub mod settings;

pub use change::{drain, finish_moves, new_disk_id, replace, set_weight, slots_moving, ChangeError, Replacement};
pub use commit::{commit, CommitError, Committed, MapStore};
