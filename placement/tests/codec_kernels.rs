//! Every kernel of this CPU gives the same bytes, at any length, from any address, for any range of a unit.

#![allow(clippy::unwrap_used)]

mod codec_support;

use codec_support::{random_units, seed, Random};
use granary_placement::codec::{kernel_name, ChunkSet, Codec, CodecError, Kernel};

/// Around every boundary a kernel or the tail code could have.
const LENGTHS: [usize; 25] = [
    0, 2, 14, 16, 30, 32, 34, 62, 64, 66, 126, 128, 130, 190, 192, 254, 256, 258, 4094, 4096, 4098, 65_534, 65_536,
    65_538, 131_074,
];

const SCHEMES: [(u8, u8); 8] = [(1, 1), (1, 16), (2, 1), (4, 2), (8, 4), (10, 4), (16, 6), (32, 16)];

/// Bytes that must survive around every output.
const GUARD: u8 = 0xc3;

#[test]
fn all_kernels_encode_and_rebuild_the_same_bytes_at_every_length_and_address() {
    let seed = seed();
    let mut random = Random::new(seed);
    let kernels: Vec<Kernel> = Kernel::available().collect();
    println!("kernels {kernels:?}, default {}", kernel_name());
    for (k, m) in SCHEMES {
        for len_bytes in LENGTHS.into_iter().filter(|&len| len <= 4098 || (k, m) == (8, 4) || (k, m) == (10, 4)) {
            let units = random_units(k, len_bytes, random.next());
            let expected = encode(Kernel::Scalar, k, m, &units, &mut random);
            for &kernel in &kernels {
                let context = format!("{k}+{m}, {len_bytes} bytes, kernel {kernel}, seed {seed}");
                let coding = encode(kernel, k, m, &units, &mut random);
                assert!(coding == expected, "coding units: {context}");

                let all: Vec<Vec<u8>> = units.iter().chain(&coding).cloned().collect();
                let lost: ChunkSet = (0..m).map(|_| random.below(u64::from(k + m)) as u8).collect();
                let rebuilt = rebuild(kernel, k, m, &all, lost, &mut random);
                let same = lost.iter().zip(&rebuilt).all(|(index, unit)| *unit == all[usize::from(index)]);
                assert!(same, "rebuilt {lost:?}: {context}");
            }
        }
    }
}

#[test]
fn a_range_of_the_units_gives_that_range_of_the_result() {
    let seed = seed();
    let mut random = Random::new(seed);
    for kernel in Kernel::available() {
        let codec = Codec::with_kernel(6, 3, kernel).unwrap();
        let data = random_units(6, 2048, seed);
        let coding = encode(kernel, 6, 3, &data, &mut random);
        let units: Vec<&[u8]> = data.iter().chain(&coding).map(Vec::as_slice).collect();
        let lost = ChunkSet::from_indices([0, 4, 7]);
        let plan = codec.plan(ChunkSet::range(0, 9).difference(lost), lost).unwrap();
        for _ in 0..200 {
            let start = 2 * random.below(1024) as usize;
            let end = start + 2 * random.below((2048 - start as u64) / 2 + 1) as usize;
            let sources: Vec<&[u8]> = plan.sources().iter().map(|&i| &units[usize::from(i)][start..end]).collect();
            let mut out = vec![vec![0u8; end - start]; 3];
            plan.apply(&sources, &mut out.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>()).unwrap();
            for (index, part) in lost.iter().zip(&out) {
                assert!(part[..] == units[usize::from(index)][start..end], "{kernel}, {start}..{end}, seed {seed}");
            }
        }
    }
}

#[test]
fn a_wanted_chunk_that_is_present_comes_out_as_it_is() {
    let mut random = Random::new(7);
    for kernel in Kernel::available() {
        let data = random_units(4, 130, 7);
        let coding = encode(kernel, 4, 2, &data, &mut random);
        let units: Vec<&[u8]> = data.iter().chain(&coding).map(Vec::as_slice).collect();
        let plan = Codec::with_kernel(4, 2, kernel)
            .unwrap()
            .plan(ChunkSet::range(1, 6), ChunkSet::from_indices([0, 2, 5]))
            .unwrap();
        let sources: Vec<&[u8]> = plan.sources().iter().map(|&i| units[usize::from(i)]).collect();
        let mut out = vec![vec![0u8; 130]; 3];
        plan.apply(&sources, &mut out.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>()).unwrap();
        assert_eq!(out, [units[0], units[2], units[5]]);
    }
}

#[test]
fn chunks_that_count_for_nothing_are_not_asked_for() {
    let codec = Codec::new(8, 4).unwrap();
    let only_itself = codec.plan(ChunkSet::range(0, 8), ChunkSet::from_indices([3])).unwrap();
    assert_eq!(only_itself.sources(), [3]);
    let nothing = codec.plan(ChunkSet::range(0, 8), ChunkSet::EMPTY).unwrap();
    assert_eq!(nothing.sources(), [0u8; 0]);
    assert_eq!(nothing.apply(&[], &mut []), Ok(()));
    let one_lost = codec.plan(ChunkSet::range(1, 12), ChunkSet::from_indices([0])).unwrap();
    assert_eq!(one_lost.sources(), [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn wrong_shapes_are_refused_before_an_output_is_touched() {
    let codec = Codec::new(2, 2).unwrap();
    let (a, b, short, odd) = ([1u8; 64], [2u8; 64], [3u8; 62], [4u8; 63]);
    let mut out = [[GUARD; 64]; 2];
    let mut short_out = [GUARD; 62];
    let [p, q] = &mut out;

    let count = |role, given, needed| Err(CodecError::UnitCount { role, given, needed });
    let length = |role, given, needed| Err(CodecError::UnitLength { role, given, needed });
    assert_eq!(codec.encode(&[&a], &mut [p, q]), count("source", 1, 2));
    assert_eq!(codec.encode(&[&a, &b, &a], &mut [p, q]), count("source", 3, 2));
    assert_eq!(codec.encode(&[&a, &b], &mut [p]), count("output", 1, 2));
    assert_eq!(codec.encode(&[&a, &short], &mut [p, q]), length("source", 62, 64));
    assert_eq!(codec.encode(&[&odd, &odd], &mut [p, q]), length("source", 63, 63));
    assert_eq!(codec.encode(&[&a, &b], &mut [p, &mut short_out]), length("output", 62, 64));
    assert_eq!((out, short_out), ([[GUARD; 64]; 2], [GUARD; 62]));
}

/// A unit at an address of any alignment, with guards on both sides.
struct Placed {
    bytes: Vec<u8>,
    start: usize,
    len_bytes: usize,
}

impl Placed {
    fn new(len_bytes: usize, random: &mut Random) -> Self {
        let start = random.below(130) as usize;
        Self { bytes: vec![GUARD; start + len_bytes + 130], start, len_bytes }
    }

    fn with(unit: &[u8], random: &mut Random) -> Self {
        let mut placed = Self::new(unit.len(), random);
        placed.unit_mut().copy_from_slice(unit);
        placed
    }

    fn unit(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len_bytes]
    }

    fn unit_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len_bytes]
    }

    fn checked(self) -> Vec<u8> {
        let (before, rest) = self.bytes.split_at(self.start);
        let (unit, after) = rest.split_at(self.len_bytes);
        assert!(before.iter().chain(after).all(|&byte| byte == GUARD), "a kernel wrote outside its unit");
        unit.to_vec()
    }
}

fn encode(kernel: Kernel, k: u8, m: u8, data: &[Vec<u8>], random: &mut Random) -> Vec<Vec<u8>> {
    let data: Vec<Placed> = data.iter().map(|unit| Placed::with(unit, random)).collect();
    let len_bytes = data[0].len_bytes;
    let mut coding: Vec<Placed> = (0..m).map(|_| Placed::new(len_bytes, random)).collect();
    let sources: Vec<&[u8]> = data.iter().map(Placed::unit).collect();
    let mut out: Vec<&mut [u8]> = coding.iter_mut().map(Placed::unit_mut).collect();
    Codec::with_kernel(k, m, kernel).unwrap().encode(&sources, &mut out).unwrap();
    coding.into_iter().map(Placed::checked).collect()
}

fn rebuild(kernel: Kernel, k: u8, m: u8, units: &[Vec<u8>], lost: ChunkSet, random: &mut Random) -> Vec<Vec<u8>> {
    let plan =
        Codec::with_kernel(k, m, kernel).unwrap().plan(ChunkSet::range(0, k + m).difference(lost), lost).unwrap();
    let sources: Vec<Placed> =
        plan.sources().iter().map(|&index| Placed::with(&units[usize::from(index)], random)).collect();
    let mut rebuilt: Vec<Placed> = lost.iter().map(|_| Placed::new(units[0].len(), random)).collect();
    let sources: Vec<&[u8]> = sources.iter().map(Placed::unit).collect();
    plan.apply(&sources, &mut rebuilt.iter_mut().map(Placed::unit_mut).collect::<Vec<_>>()).unwrap();
    rebuilt.into_iter().map(Placed::checked).collect()
}
