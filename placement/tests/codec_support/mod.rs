//! Random units that a seed brings back, and subsets.

// Each test binary uses its own part.
#![allow(dead_code, clippy::unwrap_used)]

use granary_placement::codec::{ChunkSet, Codec};

/// A seed of its own for every run, or the one in `GRANARY_SEED`, to replay a failure. Failing assertions print
/// it.
pub fn seed() -> u64 {
    if let Ok(text) = std::env::var("GRANARY_SEED") {
        return text.parse().unwrap();
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = since.as_nanos() as u64;
    println!("seed {seed}");
    seed
}

/// SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let len_bytes = piece.len();
            piece.copy_from_slice(&self.next().to_le_bytes()[..len_bytes]);
        }
    }
}

pub fn random_units(count: u8, len_bytes: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    let mut units = vec![vec![0u8; len_bytes]; count.into()];
    units.iter_mut().for_each(|unit| random.fill(unit));
    units
}

/// K random data units and their M coding units.
pub fn units_of(k: u8, m: u8, len_bytes: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut units = random_units(k + m, len_bytes, seed);
    let (data, coding) = units.split_at_mut(k.into());
    let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let mut coding: Vec<&mut [u8]> = coding.iter_mut().map(Vec::as_mut_slice).collect();
    Codec::new(k, m).unwrap().encode(&data, &mut coding).unwrap();
    units
}

/// Every set of `count` of the indices 0..n.
pub fn for_each_subset(n: u8, count: u8, mut visit: impl FnMut(ChunkSet)) {
    // The next larger number with as many bits set.
    let mut bits: u64 = (1 << count) - 1;
    while bits < 1 << n {
        visit(ChunkSet::from_bits(bits));
        let lowest = bits & bits.wrapping_neg();
        let carried = bits + lowest;
        bits = carried | ((bits ^ carried) / lowest) >> 2;
    }
}
