//! The grid of one fetch: what is known of every (chunk, block). Pure, but for the decoding at its end.

use super::{block_len, Wanted};
use crate::object::counters::{add, ObjectCounters};
use crate::object::read::ReadError;
use bytes::{Bytes, BytesMut};
use granary_meta::record::ExtentRef;
use granary_placement::codec::{ChunkSet, Codec};
use granary_wire::chunk::block_count;
use std::ops::Range;

/// Columns decoded before other tasks may run: less than a megabyte even at K = 32.
const DECODE_AT_ONCE: usize = 4;

/// What is known of one block of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cell {
    /// Not asked for.
    Untried,
    /// Asked for. Slow: not counted on any more, but welcome.
    Pending { slow: bool },
    /// Read and verified.
    Read(Bytes),
    /// Computed from K verified ones.
    Decoded(Bytes),
    /// Not there or corrupt, for certain; or not to be used.
    Gone,
    /// Its disk did not answer.
    Away,
}

pub(super) struct Grid {
    k: u8,
    width: u8,
    chunk_len: u64,
    base: u32,
    columns: usize,
    /// By chunk: the wanted blocks.
    wanted: Vec<Range<u32>>,
    /// Row by row.
    cells: Vec<Cell>,
}

impl Grid {
    pub(super) fn new(extent: &ExtentRef, wanted: &[Wanted], exclude: ChunkSet) -> Result<Grid, String> {
        let width = extent.k.checked_add(extent.m).ok_or("K+M out of range")?;
        let chunk_len = extent.layout().chunk_len();
        let base = wanted.iter().map(|want| want.blocks.start).min().unwrap_or(0);
        let end = wanted.iter().map(|want| want.blocks.end).max().unwrap_or(0);
        if u64::from(end) > block_count(chunk_len)
            || wanted.iter().any(|want| want.chunk >= width || want.blocks.is_empty())
        {
            return Err(format!("blocks outside extent {}", extent.extent));
        }
        let mut rows = vec![0..0; usize::from(width)];
        for want in wanted {
            if let Some(row) = rows.get_mut(usize::from(want.chunk)) {
                *row = want.blocks.clone();
            }
        }
        let columns = usize::try_from(end.saturating_sub(base)).map_err(|error| error.to_string())?;
        let cells = (0..width)
            .flat_map(|chunk| {
                let cell = if exclude.contains(chunk) { Cell::Gone } else { Cell::Untried };
                std::iter::repeat_n(cell, columns)
            })
            .collect();
        Ok(Grid { k: extent.k, width, chunk_len, base, columns, wanted: rows, cells })
    }

    fn place(&self, chunk: u8, block: u32) -> Option<usize> {
        let column = usize::try_from(block.checked_sub(self.base)?).ok()?;
        (column < self.columns && chunk < self.width).then(|| usize::from(chunk) * self.columns + column)
    }

    fn cell(&self, chunk: u8, block: u32) -> &Cell {
        self.place(chunk, block).and_then(|place| self.cells.get(place)).unwrap_or(&Cell::Gone)
    }

    pub(super) fn set(&mut self, chunk: u8, blocks: Range<u32>, cell: impl Fn() -> Cell) {
        for block in blocks {
            if let Some(place) = self.place(chunk, block).and_then(|place| self.cells.get_mut(place)) {
                *place = cell();
            }
        }
    }

    fn row_mut(&mut self, chunk: u8) -> &mut [Cell] {
        let start = usize::from(chunk) * self.columns;
        self.cells.get_mut(start..start + self.columns).unwrap_or_default()
    }

    fn row(&self, chunk: u8) -> &[Cell] {
        let start = usize::from(chunk) * self.columns;
        self.cells.get(start..start + self.columns).unwrap_or_default()
    }

    /// What a chunk's disk said goes for all of the chunk: cells that were not asked for become that too.
    pub(super) fn set_untried(&mut self, chunk: u8, becomes: impl Fn() -> Cell) {
        self.row_mut(chunk).iter_mut().filter(|cell| **cell == Cell::Untried).for_each(|cell| *cell = becomes());
    }

    /// Stops counting on what a chunk's disk was asked for.
    pub(super) fn set_slow(&mut self, chunk: u8) {
        for cell in self.row_mut(chunk) {
            if let Cell::Pending { slow } = cell {
                *slow = true;
            }
        }
    }

    pub(super) fn is_slow(&self, chunk: u8) -> bool {
        self.row(chunk).iter().any(|cell| matches!(cell, Cell::Pending { slow: true }))
    }

    pub(super) fn is_waiting(&self, chunk: u8) -> bool {
        self.row(chunk).iter().any(|cell| matches!(cell, Cell::Pending { slow: false }))
    }

    pub(super) fn is_untried(&self, chunk: u8, block: u32) -> bool {
        *self.cell(chunk, block) == Cell::Untried
    }

    pub(super) fn chunks(&self) -> Range<u8> {
        0..self.width
    }

    pub(super) fn columns(&self) -> Range<u32> {
        self.base..self.base.saturating_add(u32::try_from(self.columns).unwrap_or(0))
    }

    fn is_wanted(&self, chunk: u8, block: u32) -> bool {
        self.wanted.get(usize::from(chunk)).is_some_and(|blocks| blocks.contains(&block))
    }

    pub(super) fn wanted_untried(&self, chunk: u8) -> impl Iterator<Item = u32> + '_ {
        let blocks = self.wanted.get(usize::from(chunk)).cloned().unwrap_or_default();
        blocks.filter(move |block| self.is_untried(chunk, *block))
    }

    /// Chunks that are wanted in this column and not there yet.
    fn open(&self, block: u32) -> impl Iterator<Item = u8> + '_ {
        self.chunks().filter(move |chunk| {
            self.is_wanted(*chunk, block) && !matches!(self.cell(*chunk, block), Cell::Read(_) | Cell::Decoded(_))
        })
    }

    fn readable(&self, block: u32) -> ChunkSet {
        self.chunks().filter(|chunk| matches!(self.cell(*chunk, block), Cell::Read(_))).collect()
    }

    /// How many more cells of this column have to be asked for: none when what is wanted is there or on its way.
    pub(super) fn lacking(&self, block: u32) -> u8 {
        if self.open(block).all(|chunk| matches!(self.cell(chunk, block), Cell::Pending { slow: false })) {
            return 0;
        }
        let coming = |chunk: &u8| matches!(self.cell(*chunk, block), Cell::Read(_) | Cell::Pending { slow: false });
        let coming = self.chunks().filter(coming).count();
        self.k.saturating_sub(u8::try_from(coming).unwrap_or(u8::MAX))
    }

    /// Whether everything wanted is there or can be decoded.
    pub(super) fn is_settled(&self) -> bool {
        self.columns().all(|block| self.open(block).next().is_none() || self.readable(block).len() >= self.k)
    }

    /// A column that can never be settled: (good, gone for certain).
    pub(super) fn dead_column(&self) -> Option<(u8, u8)> {
        self.columns().find_map(|block| {
            let hope = |chunk| matches!(self.cell(chunk, block), Cell::Untried | Cell::Pending { .. });
            let good = self.readable(block).len();
            if self.open(block).next().is_none() || good >= self.k || self.chunks().any(hope) {
                return None;
            }
            let gone = self.chunks().filter(|chunk| *self.cell(*chunk, block) == Cell::Gone).count();
            Some((good, u8::try_from(gone).unwrap_or(u8::MAX)))
        })
    }

    /// Decodes what is wanted and was not read. The grid must be settled.
    pub(super) async fn decode(mut self, codec: &Codec, counters: &ObjectCounters) -> Result<Blocks, ReadError> {
        let mut decoded = 0;
        for block in self.columns() {
            let wanted: ChunkSet = self.open(block).collect();
            if wanted.is_empty() {
                continue;
            }
            let plan = codec.plan(self.readable(block), wanted).map_err(ReadError::Codec)?;
            let len = usize::try_from(block_len(self.chunk_len, block)).unwrap_or(0);
            let mut outputs: Vec<BytesMut> = plan.wanted().iter().map(|_| BytesMut::zeroed(len)).collect();
            {
                let sources: Vec<&[u8]> = plan
                    .sources()
                    .iter()
                    .filter_map(|chunk| match self.cell(*chunk, block) {
                        Cell::Read(bytes) => Some(&bytes[..]),
                        _ => None,
                    })
                    .collect();
                let mut out: Vec<&mut [u8]> = outputs.iter_mut().map(|output| &mut output[..]).collect();
                plan.apply(&sources, &mut out).map_err(ReadError::Codec)?;
            }
            for (chunk, output) in plan.wanted().iter().zip(outputs) {
                let bytes = output.freeze();
                self.set(*chunk, block..block + 1, || Cell::Decoded(bytes.clone()));
                add(&counters.blocks_decoded, 1);
            }
            decoded += 1;
            if decoded % DECODE_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        Ok(Blocks { grid: self })
    }
}

/// What a fetch brought.
pub struct Blocks {
    grid: Grid,
}

impl Blocks {
    /// A block, read or decoded.
    pub fn get(&self, chunk: u8, block: u32) -> Option<&Bytes> {
        match self.grid.cell(chunk, block) {
            Cell::Read(bytes) | Cell::Decoded(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The chunks whose block of that number was read from a disk and verified.
    pub fn sources(&self, block: u32) -> ChunkSet {
        self.grid.readable(block)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_placement::id::{ExtentId, PlacementGroupId};
    use granary_placement::scheme::CodecId;

    fn grid(wanted: &[(u8, Range<u32>)], exclude: &[u8]) -> Grid {
        let extent = ExtentRef {
            extent: ExtentId([1; 16]),
            group: PlacementGroupId(1),
            codec: CodecId::Np16,
            k: 4,
            m: 2,
            unit_bytes: 65536,
            len_bytes: 4 * 65536 * 8,
            generation: 1,
            slots: (0..6).collect(),
        };
        let wanted: Vec<Wanted> =
            wanted.iter().map(|(chunk, blocks)| Wanted { chunk: *chunk, blocks: blocks.clone() }).collect();
        Grid::new(&extent, &wanted, exclude.iter().copied().collect()).unwrap()
    }

    #[test]
    fn a_column_whose_wanted_cells_are_coming_lacks_nothing() {
        let mut grid = grid(&[(0, 0..2), (1, 0..1)], &[]);
        assert_eq!((grid.lacking(0), grid.lacking(1)), (4, 4));
        grid.set(0, 0..2, || Cell::Pending { slow: false });
        assert_eq!((grid.lacking(0), grid.lacking(1)), (3, 0));
        grid.set(1, 0..1, || Cell::Pending { slow: false });
        assert_eq!(grid.lacking(0), 0);
        grid.set_slow(0);
        assert_eq!((grid.lacking(0), grid.lacking(1)), (3, 4), "what is slow is not counted on");
    }

    #[test]
    fn a_column_is_dead_only_when_nothing_is_left_to_ask() {
        let mut grid = grid(&[(0, 0..1)], &[5]);
        for chunk in 0..2 {
            grid.set(chunk, 0..1, || Cell::Gone);
        }
        grid.set(2, 0..1, || Cell::Away);
        grid.set(3, 0..1, || Cell::Read(Bytes::new()));
        assert_eq!(grid.dead_column(), None, "chunk 4 was not tried");
        grid.set(4, 0..1, || Cell::Pending { slow: true });
        assert_eq!(grid.dead_column(), None, "chunk 4 may still come");
        grid.set(4, 0..1, || Cell::Away);
        assert_eq!(grid.dead_column(), Some((1, 3)));
    }

    #[test]
    fn blocks_outside_the_chunk_are_refused() {
        let extent = ExtentRef {
            extent: ExtentId([1; 16]),
            group: PlacementGroupId(1),
            codec: CodecId::Np16,
            k: 2,
            m: 1,
            unit_bytes: 65536,
            len_bytes: 65537 * 2,
            generation: 1,
            slots: vec![0, 1, 2],
        };
        let wants = |chunk, blocks| Grid::new(&extent, &[Wanted { chunk, blocks }], ChunkSet::EMPTY).is_err();
        assert!(!wants(2, 0..2));
        assert!(wants(2, 0..3) && wants(3, 0..1) && wants(0, 1..1));
    }
}
