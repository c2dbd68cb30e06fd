//! 32-byte vectors with `pshufb`: a product by a constant is two look-ups in tables of 16, one per nibble.

use std::arch::x86_64::{
    __m256i, _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_loadu_si256, _mm256_set1_epi8, _mm256_setzero_si256,
    _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srli_epi16, _mm256_storeu_si256, _mm256_xor_si256, _mm_loadu_si128,
};

use super::{Addresses, TWIST_NIBBLES};

/// Two vectors wide, so that each table is loaded once for both.
const COLUMN_BYTES: usize = 64;

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
}

/// See [`super::RowBlock::run`]; `tables` holds all rows of the first source, then of the second.
pub(super) fn run(tables: &[[u8; 32]], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    assert!(is_available());
    // SAFETY: the CPU has the feature `pass` is compiled for.
    unsafe {
        match out.len() {
            1 => pass::<1>(tables, sources, out, len_bytes),
            2 => pass::<2>(tables, sources, out, len_bytes),
            3 => pass::<3>(tables, sources, out, len_bytes),
            _ => pass::<4>(tables, sources, out, len_bytes),
        }
    }
}

#[target_feature(enable = "avx2")]
fn pass<const R: usize>(tables: &[[u8; 32]], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    let addresses = Addresses::<R>::checked(tables.len(), sources, out, len_bytes);
    let twister = Pair::load(&TWIST_NIBBLES);
    for at in (0..len_bytes).step_by(COLUMN_BYTES) {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        let mut table = tables.as_ptr();
        for source in &addresses.sources[..addresses.count] {
            // SAFETY: `checked` saw `len_bytes` at every source, a multiple of COLUMN_BYTES, so `at` has 64 bytes
            // there; and R tables per source, which `table` steps through in that order.
            unsafe {
                let x0 = twister.twist(_mm256_loadu_si256(source.add(at).cast()));
                let x1 = twister.twist(_mm256_loadu_si256(source.add(at).add(32).cast()));
                let (low0, high0) = nibbles(x0);
                let (low1, high1) = nibbles(x1);
                for sum in &mut sums {
                    let pair = Pair::load(&*table);
                    table = table.add(1);
                    sum[0] = _mm256_xor_si256(sum[0], pair.map(low0, high0));
                    sum[1] = _mm256_xor_si256(sum[1], pair.map(low1, high1));
                }
            }
        }
        for (out, sum) in addresses.out.iter().zip(&sums) {
            // SAFETY: `checked` saw `len_bytes` at every output; outputs are distinct `&mut` slices.
            unsafe {
                _mm256_storeu_si256(out.add(at).cast(), twister.twist(sum[0]));
                _mm256_storeu_si256(out.add(at).add(32).cast(), twister.twist(sum[1]));
            }
        }
    }
}

/// A linear map of bytes: images of low nibbles and of high nibbles, in both halves of a vector.
#[derive(Clone, Copy)]
struct Pair {
    low: __m256i,
    high: __m256i,
}

impl Pair {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn load(table: &[u8; 32]) -> Self {
        let at = table.as_ptr();
        // SAFETY: two loads of 16 bytes from an array of 32.
        unsafe {
            Self {
                low: _mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast())),
                high: _mm256_broadcastsi128_si256(_mm_loadu_si128(at.add(16).cast())),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn map(self, low: __m256i, high: __m256i) -> __m256i {
        _mm256_xor_si256(_mm256_shuffle_epi8(self.low, low), _mm256_shuffle_epi8(self.high, high))
    }

    /// In a little-endian 16-bit lane the first byte, the high one of the symbol, is the low half.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn twist(self, x: __m256i) -> __m256i {
        let (low, high) = nibbles(x);
        _mm256_xor_si256(x, _mm256_slli_epi16::<8>(self.map(low, high)))
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(x: __m256i) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(0x0f);
    (_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask))
}
