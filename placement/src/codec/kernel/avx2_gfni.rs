//! 32-byte vectors with `gf2p8affineqb`, for CPUs that have it without AVX-512.

use std::arch::x86_64::{
    __m256i, _mm256_gf2p8affine_epi64_epi8, _mm256_loadu_si256, _mm256_set1_epi64x, _mm256_setzero_si256,
    _mm256_slli_epi16, _mm256_storeu_si256, _mm256_xor_si256,
};

use super::{Addresses, TWIST_MATRIX};

/// Two vectors wide, so that each matrix is broadcast once for both; eight sums of four rows leave half the registers.
const COLUMN_BYTES: usize = 64;

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("gfni")
}

/// See [`super::RowBlock::run`]; `matrices` holds all rows of the first source, then of the second.
pub(super) fn run(matrices: &[u64], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    assert!(is_available());
    // SAFETY: the CPU has the features `pass` is compiled for.
    unsafe {
        match out.len() {
            1 => pass::<1>(matrices, sources, out, len_bytes),
            2 => pass::<2>(matrices, sources, out, len_bytes),
            3 => pass::<3>(matrices, sources, out, len_bytes),
            _ => pass::<4>(matrices, sources, out, len_bytes),
        }
    }
}

#[target_feature(enable = "avx2,gfni")]
fn pass<const R: usize>(matrices: &[u64], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    let addresses = Addresses::<R>::checked(matrices.len(), sources, out, len_bytes);
    let twister = _mm256_set1_epi64x(TWIST_MATRIX as i64);
    for at in (0..len_bytes).step_by(COLUMN_BYTES) {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        let mut matrix = matrices.as_ptr();
        for source in &addresses.sources[..addresses.count] {
            // SAFETY: `checked` saw `len_bytes` at every source, a multiple of COLUMN_BYTES, so `at` has 64 bytes
            // there; and R matrices per source, which `matrix` steps through in that order.
            unsafe {
                let x0 = twist(_mm256_loadu_si256(source.add(at).cast()), twister);
                let x1 = twist(_mm256_loadu_si256(source.add(at).add(32).cast()), twister);
                for sum in &mut sums {
                    let constant = _mm256_set1_epi64x(matrix.cast::<i64>().read());
                    matrix = matrix.add(1);
                    sum[0] = _mm256_xor_si256(sum[0], _mm256_gf2p8affine_epi64_epi8::<0>(x0, constant));
                    sum[1] = _mm256_xor_si256(sum[1], _mm256_gf2p8affine_epi64_epi8::<0>(x1, constant));
                }
            }
        }
        for (out, sum) in addresses.out.iter().zip(&sums) {
            // SAFETY: `checked` saw `len_bytes` at every output; outputs are distinct `&mut` slices.
            unsafe {
                _mm256_storeu_si256(out.add(at).cast(), twist(sum[0], twister));
                _mm256_storeu_si256(out.add(at).add(32).cast(), twist(sum[1], twister));
            }
        }
    }
}

/// In a little-endian 16-bit lane the first byte, the high one of the symbol, is the low half.
#[inline]
#[target_feature(enable = "avx2,gfni")]
fn twist(x: __m256i, twister: __m256i) -> __m256i {
    _mm256_xor_si256(x, _mm256_slli_epi16::<8>(_mm256_gf2p8affine_epi64_epi8::<0>(x, twister)))
}
