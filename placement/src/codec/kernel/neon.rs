//! 16-byte vectors with `tbl`: a product by a constant is two look-ups in tables of 16, one per nibble.

use std::arch::aarch64::{
    uint8x16_t, vandq_u8, vdupq_n_u8, veorq_u8, vld1q_u8, vqtbl1q_u8, vreinterpretq_u16_u8, vreinterpretq_u8_u16,
    vshlq_n_u16, vshrq_n_u8, vst1q_u8,
};
use std::arch::is_aarch64_feature_detected;

use super::{Addresses, TWIST_NIBBLES};

/// Two vectors wide, so that each table is loaded once for both.
const COLUMN_BYTES: usize = 32;

pub(super) fn is_available() -> bool {
    is_aarch64_feature_detected!("neon")
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

#[target_feature(enable = "neon")]
fn pass<const R: usize>(tables: &[[u8; 32]], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    let addresses = Addresses::<R>::checked(tables.len(), sources, out, len_bytes);
    let twister = Pair::load(&TWIST_NIBBLES);
    for at in (0..len_bytes).step_by(COLUMN_BYTES) {
        let mut sums = [[vdupq_n_u8(0); 2]; R];
        let mut table = tables.as_ptr();
        for source in &addresses.sources[..addresses.count] {
            // SAFETY: `checked` saw `len_bytes` at every source, a multiple of COLUMN_BYTES, so `at` has 32 bytes
            // there; and R tables per source, which `table` steps through in that order.
            unsafe {
                let x0 = twister.twist(vld1q_u8(source.add(at)));
                let x1 = twister.twist(vld1q_u8(source.add(at).add(16)));
                let (low0, high0) = nibbles(x0);
                let (low1, high1) = nibbles(x1);
                for sum in &mut sums {
                    let pair = Pair::load(&*table);
                    table = table.add(1);
                    sum[0] = veorq_u8(sum[0], pair.map(low0, high0));
                    sum[1] = veorq_u8(sum[1], pair.map(low1, high1));
                }
            }
        }
        for (out, sum) in addresses.out.iter().zip(&sums) {
            // SAFETY: `checked` saw `len_bytes` at every output; outputs are distinct `&mut` slices.
            unsafe {
                vst1q_u8(out.add(at), twister.twist(sum[0]));
                vst1q_u8(out.add(at).add(16), twister.twist(sum[1]));
            }
        }
    }
}

/// A linear map of bytes: images of low nibbles and of high nibbles.
#[derive(Clone, Copy)]
struct Pair {
    low: uint8x16_t,
    high: uint8x16_t,
}

impl Pair {
    #[inline]
    #[target_feature(enable = "neon")]
    fn load(table: &[u8; 32]) -> Self {
        let at = table.as_ptr();
        // SAFETY: two loads of 16 bytes from an array of 32.
        unsafe { Self { low: vld1q_u8(at), high: vld1q_u8(at.add(16)) } }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn map(self, low: uint8x16_t, high: uint8x16_t) -> uint8x16_t {
        veorq_u8(vqtbl1q_u8(self.low, low), vqtbl1q_u8(self.high, high))
    }

    /// In a little-endian 16-bit lane the first byte, the high one of the symbol, is the low half.
    #[inline]
    #[target_feature(enable = "neon")]
    fn twist(self, x: uint8x16_t) -> uint8x16_t {
        let (low, high) = nibbles(x);
        let moved = vshlq_n_u16::<8>(vreinterpretq_u16_u8(self.map(low, high)));
        veorq_u8(x, vreinterpretq_u8_u16(moved))
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn nibbles(x: uint8x16_t) -> (uint8x16_t, uint8x16_t) {
    (vandq_u8(x, vdupq_n_u8(0x0f)), vshrq_n_u8::<4>(x))
}
