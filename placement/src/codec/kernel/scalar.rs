//! The kernel for any CPU, and the plainest statement of the arithmetic. No `unsafe`.

use super::super::field::{multiples, twist};
use super::super::UNIT_ALIGN_BYTES;
use super::ROWS_AT_ONCE;

type Column = [u8; UNIT_ALIGN_BYTES];

/// See [`super::RowBlock::run`]; `constants` holds all rows of the first source, then of the second.
pub(super) fn run(constants: &[u8], sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
    let rows = out.len();
    let twists: [u8; 256] = std::array::from_fn(|high| twist(high as u8));
    for start in (0..len_bytes).step_by(UNIT_ALIGN_BYTES) {
        let mut sums = [[0u8; UNIT_ALIGN_BYTES]; ROWS_AT_ONCE];
        for (source, constants) in sources.iter().zip(constants.chunks_exact(rows)) {
            let mut column: Column = [0; UNIT_ALIGN_BYTES];
            column.copy_from_slice(&source[start..start + UNIT_ALIGN_BYTES]);
            twist_column(&twists, &mut column);
            for (sum, &constant) in sums.iter_mut().zip(constants) {
                let multiples = multiples(constant);
                for (sum, &byte) in sum.iter_mut().zip(&column) {
                    *sum ^= multiples[usize::from(byte)];
                }
            }
        }
        for (unit, sum) in out.iter_mut().zip(&mut sums) {
            twist_column(&twists, sum);
            unit[start..start + UNIT_ALIGN_BYTES].copy_from_slice(sum);
        }
    }
}

fn twist_column(twists: &[u8; 256], column: &mut Column) {
    for symbol in column.chunks_exact_mut(2) {
        symbol[1] ^= twists[usize::from(symbol[0])];
    }
}
