//! From "these chunks are present, those are wanted" to rows of byte constants, and their use on bytes.
//!
//! Of the present chunks a plan reads the data chunks, and as many coding chunks as data chunks are missing. Write D
//! for the data present, E for the missing, C for the coding chunks read, and G for the coding matrix by its parts.
//! Then `C = G_CD * D + G_CE * E`, so `E = inverse(G_CE) * (C + G_CD * D)`: only a square as small as the loss is
//! inverted. A wanted coding chunk is its row of G with E replaced by that, so it is rebuilt in one step, without
//! rebuilding data first.

use super::field::{invert, multiply};
use super::kernel::{Kernel, RowBlock, ROWS_AT_ONCE};
use super::matrix::Generator;
use super::{ChunkSet, CodecError, MAX_CHUNKS, MAX_K, UNIT_ALIGN_BYTES};

/// What one wanted chunk takes each chunk times.
type Row = [u8; MAX_CHUNKS];

/// How to compute wanted chunks from present ones. Made by [`Codec::plan`](super::Codec::plan), valid for every stripe
/// of the scheme and for any byte range of it.
#[derive(Debug)]
pub struct Plan {
    sources: Vec<u8>,
    wanted: Vec<u8>,
    blocks: Vec<RowBlock>,
}

impl Plan {
    /// Chunk indices to hand to [`Plan::apply`], in this order. At most K, and the wanted chunks that are themselves
    /// present; fewer where some are not needed.
    pub fn sources(&self) -> &[u8] {
        &self.sources
    }

    /// Chunk indices that [`Plan::apply`] computes, ascending.
    pub fn wanted(&self) -> &[u8] {
        &self.wanted
    }

    /// Computes the wanted bytes of one byte range: `sources` holds that range of the chunks [`Plan::sources`] names,
    /// `out` receives that range of the chunks [`Plan::wanted`] names, overwriting whatever was there.
    ///
    /// The range starts at an even offset within a unit and has even length; multiples of [`UNIT_ALIGN_BYTES`] are
    /// fastest. Addresses need no alignment. **Every source must have passed its checksum.**
    ///
    /// Errors: [`CodecError::UnitCount`] and [`CodecError::UnitLength`], before any output is touched.
    pub fn apply(&self, sources: &[&[u8]], out: &mut [&mut [u8]]) -> Result<(), CodecError> {
        check_count("source", sources.len(), self.sources.len())?;
        check_count("output", out.len(), self.wanted.len())?;
        let len_bytes = sources.first().map_or(0, |source| source.len());
        check_lengths("source", sources.iter().map(|source| source.len()), len_bytes)?;
        check_lengths("output", out.iter().map(|unit| unit.len()), len_bytes)?;

        let tail_bytes = len_bytes % UNIT_ALIGN_BYTES;
        let body_bytes = len_bytes - tail_bytes;
        let mut rest = &mut *out;
        for block in &self.blocks {
            let (these, others) = rest.split_at_mut(block.rows());
            block.run(sources, these, body_bytes);
            rest = others;
        }
        if tail_bytes > 0 {
            self.apply_tail(sources, out, body_bytes);
        }
        Ok(())
    }

    /// The last bytes, fewer than a kernel takes: moved to zero-padded columns and back.
    fn apply_tail(&self, sources: &[&[u8]], out: &mut [&mut [u8]], start: usize) {
        let mut columns = [[0u8; UNIT_ALIGN_BYTES]; MAX_CHUNKS];
        for (column, source) in columns.iter_mut().zip(sources) {
            let tail = &source[start..];
            column[..tail.len()].copy_from_slice(tail);
        }
        let columns: [&[u8]; MAX_CHUNKS] = columns.each_ref().map(|column| column.as_slice());
        let columns = &columns[..sources.len()];
        let mut rest = out;
        for block in &self.blocks {
            let (these, others) = rest.split_at_mut(block.rows());
            let mut results = [[0u8; UNIT_ALIGN_BYTES]; ROWS_AT_ONCE];
            let mut outputs = results.each_mut().map(|result| result.as_mut_slice());
            block.run(columns, &mut outputs[..block.rows()], UNIT_ALIGN_BYTES);
            for (unit, result) in these.iter_mut().zip(&results) {
                let tail = &mut unit[start..];
                let len_bytes = tail.len();
                tail.copy_from_slice(&result[..len_bytes]);
            }
            rest = others;
        }
    }

    /// `present` must be `usable`; `wanted` within the scheme; `kernel` available.
    pub(super) fn new(k: u8, kernel: Kernel, present: ChunkSet, wanted: ChunkSet) -> Result<Self, CodecError> {
        let rows = solve(k, present, wanted)?;
        let is_needed = |&index: &u8| rows.iter().any(|row| row[usize::from(index)] != 0);
        let sources: Vec<u8> = present.iter().filter(is_needed).collect();
        let dense: Vec<Vec<u8>> =
            rows.iter().map(|row| sources.iter().map(|&index| row[usize::from(index)]).collect()).collect();
        let blocks = dense.chunks(ROWS_AT_ONCE).map(|rows| RowBlock::new(kernel, rows)).collect();
        Ok(Self { sources, wanted: wanted.iter().collect(), blocks })
    }
}

fn check_count(role: &'static str, given: usize, needed: usize) -> Result<(), CodecError> {
    if given == needed {
        Ok(())
    } else {
        Err(CodecError::UnitCount { role, given, needed })
    }
}

fn check_lengths(role: &'static str, lengths: impl Iterator<Item = usize>, needed: usize) -> Result<(), CodecError> {
    for given in lengths {
        if given != needed || !given.is_multiple_of(2) {
            return Err(CodecError::UnitLength { role, given, needed });
        }
    }
    Ok(())
}

/// The part of `present` that a plan reads: data chunks first, coding chunks to make up K, and the wanted chunks that
/// are present, which stand for themselves. Two losses with the same usable part share one plan.
///
/// Errors: [`CodecError::ChunkIndex`] for an index outside K+M; [`CodecError::NotEnough`] for fewer than K chunks.
pub(super) fn usable(k: u8, m: u8, present: ChunkSet, wanted: ChunkSet) -> Result<ChunkSet, CodecError> {
    let chunks = k + m;
    if let Some(index) = present.union(wanted).last().filter(|&index| index >= chunks) {
        return Err(CodecError::ChunkIndex { index, chunks });
    }
    if present.len() < k {
        return Err(CodecError::NotEnough { present: present.len(), needed: k });
    }
    // Data indices are below coding indices, so the first K present ones are the choice.
    let chosen: ChunkSet = present.iter().take(k.into()).collect();
    Ok(chosen.union(present.intersection(wanted)))
}

/// One row per wanted chunk, ascending.
fn solve(k: u8, present: ChunkSet, wanted: ChunkSet) -> Result<Vec<Row>, CodecError> {
    let generator = Generator::for_k(k)?;
    let is_data = |index: &u8| *index < k;
    let coding_entry = |coding: u8, data: u8| generator.entry(usize::from(coding - k), usize::from(data));
    let missing: Vec<u8> = (0..k).filter(|&index| !present.contains(index)).collect();
    let coding: Vec<u8> = present.iter().filter(|index| !is_data(index)).take(missing.len()).collect();

    let square = coding.iter().map(|&c| missing.iter().map(|&e| coding_entry(c, e)).collect()).collect();
    let inverse = invert_square(square)?;
    let mut data_rows = [[0u8; MAX_CHUNKS]; MAX_K as usize];
    for index in present.iter().filter(is_data) {
        data_rows[usize::from(index)][usize::from(index)] = 1;
    }
    for (&index, factors) in missing.iter().zip(&inverse) {
        let row = &mut data_rows[usize::from(index)];
        for (&c, &factor) in coding.iter().zip(factors) {
            row[usize::from(c)] = factor;
            for d in present.iter().filter(is_data) {
                row[usize::from(d)] ^= multiply(factor, coding_entry(c, d));
            }
        }
    }

    let row_of = |index: u8| {
        let mut row: Row = [0; MAX_CHUNKS];
        if present.contains(index) {
            row[usize::from(index)] = 1;
        } else if is_data(&index) {
            row = data_rows[usize::from(index)];
        } else {
            for data in 0..k {
                let factor = coding_entry(index, data);
                for (sum, &entry) in row.iter_mut().zip(&data_rows[usize::from(data)]) {
                    *sum ^= multiply(factor, entry);
                }
            }
        }
        row
    };
    Ok(wanted.iter().map(row_of).collect())
}

/// Gauss-Jordan elimination in GF(2^8). Every square within a matrix of an MDS code is regular, so an error here means
/// that the matrix or the field is not what it should be.
fn invert_square(mut left: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, CodecError> {
    let size = left.len();
    let mut right: Vec<Vec<u8>> = (0..size).map(|i| (0..size).map(|j| u8::from(i == j)).collect()).collect();
    for at in 0..size {
        let pivot = (at..size)
            .find(|&row| left[row][at] != 0)
            .ok_or_else(|| CodecError::broken(format!("a {size}x{size} part of the matrix has no inverse")))?;
        left.swap(at, pivot);
        right.swap(at, pivot);
        let scale = invert(left[at][at]).ok_or_else(|| CodecError::broken("an element has no inverse"))?;
        for entry in left[at].iter_mut().chain(&mut right[at]) {
            *entry = multiply(scale, *entry);
        }
        let (pivot_left, pivot_right) = (left[at].clone(), right[at].clone());
        for row in (0..size).filter(|&row| row != at) {
            let factor = left[row][at];
            let targets = left[row].iter_mut().chain(&mut right[row]);
            for (entry, &pivot) in targets.zip(pivot_left.iter().chain(&pivot_right)) {
                *entry ^= multiply(factor, pivot);
            }
        }
    }
    Ok(right)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn set<const N: usize>(indices: [u8; N]) -> ChunkSet {
        ChunkSet::from_indices(indices)
    }

    #[test]
    fn data_chunks_are_preferred_and_surplus_coding_chunks_are_left_alone() {
        assert_eq!(usable(4, 3, set([0, 1, 3, 4, 5, 6]), set([2])), Ok(set([0, 1, 3, 4])));
        assert_eq!(usable(4, 3, set([0, 1, 2, 3, 6]), set([4, 6])), Ok(set([0, 1, 2, 3, 6])));
    }

    #[test]
    fn too_few_chunks_and_strange_indices_are_told_apart() {
        assert_eq!(usable(4, 2, set([0, 1, 5]), set([2])), Err(CodecError::NotEnough { present: 3, needed: 4 }));
        let strange = CodecError::ChunkIndex { index: 6, chunks: 6 };
        assert_eq!(usable(4, 2, set([0, 1, 2, 3, 6]), set([4])), Err(strange.clone()));
        assert_eq!(usable(4, 2, set([0, 1, 2, 3]), set([6])), Err(strange));
    }

    #[test]
    fn a_square_without_inverse_is_an_error_and_not_a_wrong_row() {
        assert!(matches!(invert_square(vec![vec![3, 3], vec![3, 3]]), Err(CodecError::Broken { .. })));
        assert_eq!(invert_square(vec![vec![0, 1], vec![1, 0]]), Ok(vec![vec![0, 1], vec![1, 0]]));
    }

    #[test]
    fn coding_rows_of_complete_data_are_the_matrix() {
        let rows = solve(10, ChunkSet::range(0, 10), ChunkSet::range(10, 14)).unwrap();
        for (p, row) in rows.iter().enumerate() {
            for (j, &entry) in row.iter().enumerate() {
                let expected = if j < 10 { Generator::for_k(10).unwrap().entry(p, j) } else { 0 };
                assert_eq!(entry, expected);
            }
        }
    }
}
