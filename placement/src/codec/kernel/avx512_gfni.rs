//! 64-byte vectors with `gf2p8affineqb`: one instruction multiplies 64 bytes by a constant.

use std::arch::x86_64::{
    __m512i, _mm512_gf2p8affine_epi64_epi8, _mm512_loadu_si512, _mm512_set1_epi64, _mm512_setzero_si512,
    _mm512_slli_epi16, _mm512_storeu_si512, _mm512_ternarylogic_epi64, _mm512_xor_si512,
};

use super::{Addresses, TWIST_MATRIX};

/// Two vectors wide, so that each matrix is broadcast once for both.
const COLUMN_BYTES: usize = 128;

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("gfni")
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

#[target_feature(enable = "avx512f,avx512bw,gfni")]
fn pass<const R: usize>(matrices: &[u64], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    let addresses = Addresses::<R>::checked(matrices.len(), sources, out, len_bytes);
    let twister = _mm512_set1_epi64(TWIST_MATRIX as i64);
    for at in (0..len_bytes).step_by(COLUMN_BYTES) {
        let mut sums = [[_mm512_setzero_si512(); 2]; R];
        let mut matrix = matrices.as_ptr();
        let mut sources = addresses.sources[..addresses.count].chunks_exact(2);
        for pair in &mut sources {
            // SAFETY: `checked` saw `len_bytes` at every source, a multiple of COLUMN_BYTES, so `at` has 128 bytes
            // there; and R matrices per source, which `matrix` steps through in that order.
            unsafe {
                let [x0, x1] = load(pair[0].add(at), twister);
                let [y0, y1] = load(pair[1].add(at), twister);
                for sum in &mut sums {
                    let (a, b) = (broadcast(matrix), broadcast(matrix.add(R)));
                    matrix = matrix.add(1);
                    sum[0] = xor3(sum[0], multiply(x0, a), multiply(y0, b));
                    sum[1] = xor3(sum[1], multiply(x1, a), multiply(y1, b));
                }
                matrix = matrix.add(R);
            }
        }
        if let [source] = sources.remainder() {
            // SAFETY: as above, for the last of an odd number of sources.
            unsafe {
                let [x0, x1] = load(source.add(at), twister);
                for sum in &mut sums {
                    let constant = broadcast(matrix);
                    matrix = matrix.add(1);
                    sum[0] = _mm512_xor_si512(sum[0], multiply(x0, constant));
                    sum[1] = _mm512_xor_si512(sum[1], multiply(x1, constant));
                }
            }
        }
        for (out, sum) in addresses.out.iter().zip(&sums) {
            // SAFETY: `checked` saw `len_bytes` at every output; outputs are distinct `&mut` slices.
            unsafe {
                _mm512_storeu_si512(out.add(at).cast(), twist(sum[0], twister));
                _mm512_storeu_si512(out.add(at).add(64).cast(), twist(sum[1], twister));
            }
        }
    }
}

/// A column of one source, twisted.
///
/// # Safety
/// [`COLUMN_BYTES`] readable bytes at `source`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
unsafe fn load(source: *const u8, twister: __m512i) -> [__m512i; 2] {
    // SAFETY: two loads of 64 bytes from 128.
    let (x0, x1) = unsafe { (_mm512_loadu_si512(source.cast()), _mm512_loadu_si512(source.add(64).cast())) };
    [twist(x0, twister), twist(x1, twister)]
}

/// # Safety
/// `matrix` points at a matrix.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
unsafe fn broadcast(matrix: *const u64) -> __m512i {
    // SAFETY: the caller's.
    _mm512_set1_epi64(unsafe { matrix.read() } as i64)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
fn multiply(x: __m512i, matrix: __m512i) -> __m512i {
    _mm512_gf2p8affine_epi64_epi8::<0>(x, matrix)
}

/// Three-way XOR in one instruction: the truth table of odd parity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0x96>(a, b, c)
}

/// In a little-endian 16-bit lane the first byte, the high one of the symbol, is the low half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
fn twist(x: __m512i, twister: __m512i) -> __m512i {
    _mm512_xor_si512(x, _mm512_slli_epi16::<8>(multiply(x, twister)))
}
