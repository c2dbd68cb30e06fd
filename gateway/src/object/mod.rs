//! Object payloads: streaming bytes into extents on disks, and back.
//!
//! Reading order:
//! - [`budget`]: pure; how much of all payloads is in memory, and who gets some when there is little;
//! - [`choose`]: pure; which placement group an extent goes to, and how wide it is while disks are down;
//! - [`write`]: [`ObjectStore::stage`], the body's way into extents; [`extent_write`]: one extent's way onto its disks,
//!   by [`chunk_write`], one task per chunk; [`staged`]: what happens to chunks whose commit never came;
//! - [`read`]: [`ObjectStore::read`], a range as a stream of windows; [`fetch`]: blocks of one extent from whichever
//!   disks can give them, decoding what is lost, slow or corrupt;
//! - [`reports`]: chunks that readers found missing or corrupt, on their way to the healer.
//!
//! **Invariant:** `stage` returns only after at least K+1 chunks of every extent are durable, and names the others.
//! **Invariant:** no byte leaves [`read`] that was not verified against its block's checksum or decoded from blocks
//! that were. **Invariant:** nothing here deletes a chunk of an extent whose commit may have happened.

mod budget;
pub mod choose;
mod chunk_write;
mod counters;
mod extent_write;
pub mod fetch;
mod open_reads;
mod read;
mod recheck;
pub mod reports;
mod staged;
mod write;

pub(crate) use budget::{Budget, Grant};
pub(crate) use counters::add;
pub use counters::ObjectCounters;
pub use open_reads::OpenReads;
pub use read::{ObjectReader, ReadError};
pub use staged::{Placement, Staged};
pub use write::StageError;

use crate::disks::Disks;
use choose::GroupIndex;
use fetch::Pulse;
use granary_meta::record::ExtentRef;
use granary_placement::codec::{Codec, CodecError};
use granary_placement::id::DiskId;
use granary_placement::map::{ClusterMap, GroupSlot};
use granary_placement::settings::Values;
use granary_wire::chunk::ChunkId;
use reports::Reports;
use staged::Cleaner;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// An error of the stream that a payload comes from; handed back untouched in [`StageError::Body`].
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// How payloads are written and read.
#[derive(Debug, Clone)]
pub struct ObjectSettings {
    /// Payloads up to this many bytes ride in the object record.
    pub inline_limit_bytes: u64,
    /// Longest extent, in payload bytes: at most 64 MiB.
    pub extent_bytes: u64,
    /// Extents whose chunks are at most this long are sent with one request per chunk, all bytes at hand.
    pub whole_chunk_bytes: u64,
    /// An extent that fails is written again elsewhere while no more than this much of it was taken from the body.
    pub replay_bytes: u64,
    /// How long one write to one disk may take, and how long its answer may take after the last byte.
    pub write_deadline: Duration,
    /// How long one read from one disk may take.
    pub read_deadline: Duration,
    /// Bytes of one chunk per read request; a unit at least. A reader holds two windows of K of these.
    pub window_bytes: u64,
    /// Bytes of payloads in memory at once, of all requests.
    pub memory_bytes: u64,
    /// An upload that holds memory while nothing of its body comes is given up after this time when others wait for
    /// memory.
    pub memory_patience: Duration,
    /// A payload that has taken longer to arrive is refused.
    pub longest_upload: Duration,
    /// The shortest time after which other disks are asked for what one is late with.
    pub hedge_floor: Duration,
    /// Extra reads for slow disks, in percent of all reads. Reads in place of failed disks are not counted.
    pub hedge_percent: u64,
}

impl ObjectSettings {
    /// From the settings `object.*`.
    pub fn from_settings(values: &Values) -> ObjectSettings {
        ObjectSettings {
            inline_limit_bytes: values.number("object.inline_limit"),
            extent_bytes: values.number("object.extent"),
            whole_chunk_bytes: values.number("object.whole_chunk"),
            replay_bytes: values.number("object.replay"),
            write_deadline: values.time("object.write_deadline"),
            read_deadline: values.time("object.read_deadline"),
            window_bytes: values.number("object.window"),
            memory_bytes: values.number("object.memory"),
            memory_patience: values.time("object.memory_patience"),
            longest_upload: values.time("object.longest_upload"),
            hedge_floor: values.time("object.hedge_floor"),
            hedge_percent: values.number("object.hedge_percent"),
        }
    }
}

impl Default for ObjectSettings {
    fn default() -> ObjectSettings {
        ObjectSettings::from_settings(&Values::default())
    }
}

/// Writes and reads payloads. Cheap to clone.
#[derive(Clone)]
pub struct ObjectStore {
    inner: Arc<Inner>,
}

struct Inner {
    disks: Disks,
    settings: ObjectSettings,
    counters: Arc<ObjectCounters>,
    codecs: Mutex<HashMap<(u8, u8), Codec>>,
    groups: Mutex<Option<(Arc<ClusterMap>, Arc<GroupIndex>)>>,
    pulse: Pulse,
    reports: Reports,
    cleaner: Cleaner,
    memory: Budget,
    reads: OpenReads,
}

impl ObjectStore {
    /// A store over those disks. Must be called inside a tokio runtime: it starts the task that deletes what was staged
    /// and never committed, which ends with the last clone.
    pub fn new(disks: Disks, settings: ObjectSettings) -> ObjectStore {
        let counters = Arc::new(ObjectCounters::default());
        let cleaner = Cleaner::start(disks.clone(), counters.clone());
        let memory = Budget::new(settings.memory_bytes);
        ObjectStore {
            inner: Arc::new(Inner {
                disks,
                settings,
                counters,
                codecs: Mutex::default(),
                groups: Mutex::default(),
                pulse: Pulse::default(),
                reports: Reports::default(),
                cleaner,
                memory,
                reads: OpenReads::default(),
            }),
        }
    }

    /// The disks below.
    pub fn disks(&self) -> &Disks {
        &self.inner.disks
    }

    /// The memory for payloads.
    pub(crate) fn memory(&self) -> &Budget {
        &self.inner.memory
    }

    /// Payload reads under way.
    pub fn open_reads(&self) -> &OpenReads {
        &self.inner.reads
    }

    /// Chunks that readers found missing or corrupt; the healer takes them from here.
    pub fn reports(&self) -> &Reports {
        &self.inner.reports
    }

    /// Counters.
    pub fn counters(&self) -> &ObjectCounters {
        &self.inner.counters
    }

    /// The settings.
    pub fn settings(&self) -> &ObjectSettings {
        &self.inner.settings
    }

    /// The codec of that K and M; made once. There are at most 512.
    ///
    /// # Errors
    /// K or M out of range, or a codec that is not what it should be.
    pub fn codec(&self, k: u8, m: u8) -> Result<Codec, CodecError> {
        let mut codecs = self.inner.codecs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(codec) = codecs.get(&(k, m)) {
            return Ok(codec.clone());
        }
        let codec = Codec::new(k, m)?;
        codecs.insert((k, m), codec.clone());
        Ok(codec)
    }

    /// The groups of each scheme by that map; made once per map.
    fn group_index(&self, map: &Arc<ClusterMap>) -> Arc<GroupIndex> {
        let mut groups = self.inner.groups.lock().unwrap_or_else(PoisonError::into_inner);
        match &*groups {
            Some((of, index)) if Arc::ptr_eq(of, map) => index.clone(),
            _ => {
                let index = Arc::new(GroupIndex::new(map));
                *groups = Some((map.clone(), index.clone()));
                index
            }
        }
    }
}

/// The disk that chunk `index` of an extent belongs on by this map; None when the map has no such group or slot.
pub fn disk_of(map: &ClusterMap, extent: &ExtentRef, index: u8) -> Option<DiskId> {
    slot_of(map, extent, index).map(|slot| slot.current)
}

/// The slot of chunk `index` of an extent: while the slot moves, the chunk may lie on either of its disks.
pub fn slot_of(map: &ClusterMap, extent: &ExtentRef, index: u8) -> Option<GroupSlot> {
    let slot = extent.slots.get(usize::from(index))?;
    map.group(extent.group)?.slots.get(usize::from(*slot)).copied()
}

/// The name of chunk `index` of an extent.
pub fn chunk_id(extent: &ExtentRef, index: u8) -> ChunkId {
    ChunkId { group: extent.group, extent: extent.extent, index, generation: extent.generation }
}

/// Whether an extent's record can be used at all: limits of the codec, a unit a stripe can have, as many slots as
/// chunks.
///
/// # Errors
/// What is wrong with it, for the log.
pub fn check_extent(extent: &ExtentRef) -> Result<(), String> {
    let (k, m) = (extent.k, extent.m);
    if k == 0 || k > granary_placement::codec::MAX_K || m == 0 || m > granary_placement::codec::MAX_M {
        return Err(format!("extent {} has K+M {k}+{m}", extent.extent));
    }
    let unit = u64::from(extent.unit_bytes);
    if unit == 0 || unit % granary_wire::chunk::BLOCK_BYTES != 0 {
        return Err(format!("extent {} has a unit of {unit} bytes", extent.extent));
    }
    if extent.len_bytes == 0 || extent.len_bytes > granary_placement::extent::MAX_EXTENT_BYTES {
        return Err(format!("extent {} has {} bytes", extent.extent, extent.len_bytes));
    }
    if extent.slots.len() != usize::from(k) + usize::from(m) {
        return Err(format!("extent {} names {} slots for {k}+{m}", extent.extent, extent.slots.len()));
    }
    Ok(())
}

/// Random bytes from the operating system.
fn random<const N: usize>() -> Result<[u8; N], StageError> {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes).map_err(|error| StageError::Unavailable(format!("no randomness: {error}")))?;
    Ok(bytes)
}
