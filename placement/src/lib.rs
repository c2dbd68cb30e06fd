//! Where data goes and how it is coded: pure values, no I/O, no async, no clock.
//!
//! Reading order:
//! 1. [`id`]: a type for every id, so that a disk is never mistaken for a server;
//! 2. [`scheme`] and [`map`]: redundancy schemes and the cluster map, versioned by epoch, with validation;
//! 3. [`place`] and [`moves`]: lay placement groups out over failure domains, and what changes between two maps;
//! 4. [`durable`]: which chunks are enough to acknowledge an extent;
//! 5. [`lease`]: the mark of background work;
//! 6. [`extent`]: the geometry of one extent: stripes, units, chunks;
//! 7. [`codec`]: np16, the erasure code;
//! 8. [`durability`]: how many nines, from failure rates, repair times and the layout of groups;
//! 9. [`settings`]: the table of all settings.

pub mod codec;
pub mod durability;
pub mod durable;
pub mod extent;
pub mod id;
pub mod lease;
pub mod map;
pub mod moves;
pub mod place;
pub mod scheme;
pub mod settings;
