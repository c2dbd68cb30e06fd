//! np16: the erasure codec. Pure values in, bytes out; no I/O, no async.
//!
//! The crate `reed-solomon-novelpoly` defines the code, and this folder makes it fast: the code is linear, so it equals
//! a small matrix that is read out of the crate once and applied to whole units by SIMD kernels.
//! `docs/formats/codec-np16.md` says the same for someone who writes another implementation.
//!
//! Reading order:
//! - `field.rs`: the byte field GF(2^8), the twist between stored symbols and field bytes;
//! - `matrix.rs`: the coding matrix from the crate, held against pinned hashes;
//! - `plan.rs`, [`Plan`]: from "these chunks are present, those are wanted" to one row of byte constants per wanted
//!   chunk;
//! - [`kernel`]: the same row arithmetic once per CPU family, chosen at run time, byte-identical;
//! - `coder.rs`, [`Codec`]: the door for callers; [`self_test()`], run by every daemon before it touches data;
//! - [`reference`](mod@reference): the crate itself on Granary's chunk layout: slow, the oracle of the self-test and of
//!   the tests.
//!
//! ```
//! use granary_placement::codec::{ChunkSet, Codec};
//!
//! let codec = Codec::new(2, 1)?;
//! let (a, b) = ([1u8; 128], [2u8; 128]);
//! let mut coding = [0u8; 128];
//! codec.encode(&[&a, &b], &mut [&mut coding])?;
//!
//! // Chunk 0 is lost: rebuild it from chunk 1 and coding chunk 2.
//! let plan = codec.plan(ChunkSet::from_indices([1, 2]), ChunkSet::from_indices([0]))?;
//! assert_eq!(plan.sources(), [1, 2]);
//! let mut rebuilt = [0u8; 128];
//! plan.apply(&[&b, &coding], &mut [&mut rebuilt])?;
//! assert_eq!(rebuilt, a);
//! # Ok::<(), granary_placement::codec::CodecError>(())
//! ```
//!
//! **Erasure codes do not detect corruption.** A unit whose checksum failed is absent; it must never be a source.

#![deny(unsafe_code)]

mod coder;
mod error;
mod field;
#[allow(unsafe_code)]
pub mod kernel;
mod matrix;
mod plan;
pub mod reference;
mod self_test;
mod set;

pub use coder::Codec;
pub use error::CodecError;
pub use kernel::{kernel_name, Kernel};
pub use plan::Plan;
pub use self_test::self_test;
pub use set::ChunkSet;

/// Units of full stripes are a multiple of this many bytes, so that no kernel needs tail code on the usual path.
pub const UNIT_ALIGN_BYTES: usize = 128;
/// The largest number of data chunks of a scheme.
pub const MAX_K: u8 = 32;
/// The largest number of coding chunks of a scheme.
pub const MAX_M: u8 = 16;
/// The largest number of chunks of a scheme, data and coding.
pub const MAX_CHUNKS: usize = MAX_K as usize + MAX_M as usize;

// All evaluation points of the code are below k_code + M, with k_code at most MAX_K. Below 256 they lie in the byte
// field, and so does every constant of every matrix and inverse. The kernels rest on this.
const _: () = assert!(MAX_CHUNKS <= 256 && MAX_K.is_power_of_two());

/// The unit of a stripe that carries `len_bytes` of payload over `k` data chunks: `len_bytes / k` rounded up to
/// [`UNIT_ALIGN_BYTES`]. Full stripes use the scheme's unit; this is for the last stripe of an extent, which shrinks.
///
/// Zero for an empty payload; a `k` of 0 counts as 1. Saturates for lengths no disk can hold.
pub fn unit_for_len(len_bytes: u64, k: u8) -> u64 {
    const ALIGN: u64 = UNIT_ALIGN_BYTES as u64;
    len_bytes.div_ceil(u64::from(k.max(1))).checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX - (ALIGN - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_stripe_shrinks_to_the_smallest_aligned_unit_that_holds_it() {
        assert_eq!(unit_for_len(0, 8), 0);
        assert_eq!(unit_for_len(1, 8), 128);
        assert_eq!(unit_for_len(8 * 128, 8), 128);
        assert_eq!(unit_for_len(8 * 128 + 1, 8), 256);
        assert_eq!(unit_for_len(10 * 65_536, 10), 65_536);
        assert_eq!(unit_for_len(1 << 20, 3), 349_568);
        for k in 1..=MAX_K {
            for len_bytes in 0..5_000u64 {
                let unit = unit_for_len(len_bytes, k);
                assert_eq!(unit % UNIT_ALIGN_BYTES as u64, 0);
                assert!(unit * u64::from(k) >= len_bytes);
                assert!(unit == 0 || (unit - 128) * u64::from(k) < len_bytes);
            }
        }
        assert_eq!(unit_for_len(u64::MAX, 1) % 128, 0);
    }
}
