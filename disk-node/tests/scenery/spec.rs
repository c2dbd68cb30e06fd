//! What the chunks of these tests are part of.

use granary_placement::id::HashSlot;
use granary_placement::scheme::CodecId;
use granary_wire::chunk::ChunkSpec;

/// The spec of a chunk of that length, of an extent of four such chunks.
pub fn spec(len_bytes: u64) -> ChunkSpec {
    ChunkSpec {
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 65536,
        extent_len_bytes: len_bytes * 4,
        len_bytes,
        owner: HashSlot(3),
        created_ms: 5,
    }
}
