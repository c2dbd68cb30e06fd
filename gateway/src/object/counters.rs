//! What happened to payloads, in numbers that only grow.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Counters of the object pipelines and the healer; they only grow.
        #[derive(Debug, Default)]
        pub struct ObjectCounters {
            $($(#[doc = $doc])+ pub $name: AtomicU64,)+
        }

        impl ObjectCounters {
            /// (name, help, value) of each, for /metrics.
            pub fn samples(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($doc),+), self.$name.load(Ordering::Relaxed)),)+]
            }
        }
    };
}

counters! {
    /// Extents written with at least K+1 durable chunks.
    extents_written,
    /// Extents written narrower than their scheme because disks were down.
    extents_narrow,
    /// Extents begun again in another group or narrower after disks failed.
    extents_rewritten,
    /// Chunks that a write could not place and named as missing.
    chunks_missing_at_write,
    /// Writes given up because fewer than K+1 chunks became durable.
    writes_unavailable,
    /// Chunks whose commit never came and that were handed to the cleaner.
    staged_chunks_dropped,
    /// Of these, deleted.
    staged_chunks_deleted,
    /// Of these, given up on: disk away, or too many at once. A sweep by age finds them.
    staged_chunks_abandoned,
    /// Read requests to disks.
    chunk_reads,
    /// Of these, sent because another disk was slow.
    chunk_reads_hedged,
    /// Of these, failed.
    chunk_reads_failed,
    /// Hedges not sent because the budget was used up.
    hedges_denied,
    /// Blocks that were decoded instead of read.
    blocks_decoded,
    /// Chunks that readers found missing or corrupt and reported.
    chunks_reported,
    /// Reads that found fewer than K good chunks for certain.
    extents_lost_seen,
    /// Reads that could not reach K good chunks, though the rest may still be good.
    extents_unreachable_seen,
    /// Chunks rebuilt and verified.
    chunks_rebuilt,
    /// Bytes of them.
    bytes_rebuilt,
    /// Queued chunks that turned out to be good on their disk.
    chunks_found_good,
    /// Rebuilds that failed and will be tried again.
    rebuilds_failed,
    /// Rebuilt chunks that did not pass the check by decoding back.
    rebuilds_refuted,
    /// Extents whose chunks were all deleted as garbage.
    garbage_extents_deleted,
    /// Chunks that no shard knew all their time in quarantine, deleted.
    orphans_deleted,
    /// Extents in a garbage queue that their shard still owns; never deleted.
    garbage_extents_alive,
    /// Chunks that a walk over a disk's groups found absent and queued.
    chunks_found_absent,
    /// Chunks that a disk's scrub found damaged, told to their shards.
    chunks_found_damaged,
    /// Dead disks taken out of service.
    disks_taken_out,
    /// Disks let back into service, because they answer again.
    disks_let_in,
    /// Leftover chunks deleted on disks that came back after having been out.
    leftovers_deleted,
    /// Chunks copied to their disk from one that does not serve their slot any more.
    strays_brought_home,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
