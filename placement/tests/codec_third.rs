//! A third implementation of the same code, written by others from the same paper: `LowRate` of reed-solomon-simd.
//! Symbol for symbol it is np16; in bytes it keeps the low bytes of 32 symbols, then their high bytes, in each 64-byte
//! block.

#![allow(clippy::unwrap_used)]

mod codec_support;

use codec_support::{random_units, seed, units_of};
use reed_solomon_simd::engine::NoSimd;
use reed_solomon_simd::rate::{LowRateDecoder, LowRateEncoder, RateDecoder, RateEncoder};

const LEN_BYTES: usize = 256;

fn to_low_rate(unit: &[u8]) -> Vec<u8> {
    let mut turned = vec![0u8; unit.len()];
    for (block, symbols) in turned.chunks_exact_mut(64).zip(unit.chunks_exact(64)) {
        for (t, symbol) in symbols.chunks_exact(2).enumerate() {
            block[t] = symbol[1];
            block[t + 32] = symbol[0];
        }
    }
    turned
}

#[test]
fn low_rate_computes_the_same_coding_units() {
    let seed = seed();
    for (k, m) in [(1, 1), (2, 1), (4, 2), (8, 3), (8, 4), (16, 4), (32, 16), (4, 4), (16, 16)] {
        let units = units_of(k, m, LEN_BYTES, seed);
        let mut encoder = LowRateEncoder::new(k.into(), m.into(), LEN_BYTES, NoSimd::new(), None).unwrap();
        for unit in &units[..usize::from(k)] {
            encoder.add_original_shard(to_low_rate(unit)).unwrap();
        }
        let result = encoder.encode().unwrap();
        for (p, theirs) in result.recovery_iter().enumerate() {
            assert_eq!(to_low_rate(&units[usize::from(k) + p]), theirs, "{k}+{m}, coding unit {p}, seed {seed}");
        }
    }
}

#[test]
fn low_rate_with_absent_data_as_zeros_is_a_shortened_scheme() {
    let seed = seed();
    for (k, m) in [(3, 2), (6, 3), (10, 4), (12, 4), (17, 3), (31, 16)] {
        let units = units_of(k, m, LEN_BYTES, seed);
        let k_code = usize::from(k).next_power_of_two();
        let mut encoder = LowRateEncoder::new(k_code, m.into(), LEN_BYTES, NoSimd::new(), None).unwrap();
        for unit in units[..usize::from(k)].iter().chain(&vec![vec![0; LEN_BYTES]; k_code - usize::from(k)]) {
            encoder.add_original_shard(to_low_rate(unit)).unwrap();
        }
        let result = encoder.encode().unwrap();
        for (p, theirs) in result.recovery_iter().enumerate() {
            assert_eq!(to_low_rate(&units[usize::from(k) + p]), theirs, "{k}+{m}, coding unit {p}, seed {seed}");
        }
    }
}

#[test]
fn low_rate_rebuilds_our_data_from_our_coding_units() {
    let seed = seed();
    let units = units_of(8, 4, LEN_BYTES, seed);
    let mut decoder = LowRateDecoder::new(8, 4, LEN_BYTES, NoSimd::new(), None).unwrap();
    for (index, unit) in units.iter().enumerate().filter(|(index, _)| ![0, 3, 5, 9].contains(index)) {
        if index < 8 {
            decoder.add_original_shard(index, to_low_rate(unit)).unwrap();
        } else {
            decoder.add_recovery_shard(index - 8, to_low_rate(unit)).unwrap();
        }
    }
    let result = decoder.decode().unwrap();
    for index in [0, 3, 5] {
        assert_eq!(result.restored_original(index).unwrap(), to_low_rate(&units[index]), "chunk {index}, seed {seed}");
    }
}

#[test]
fn the_comparison_itself_notices_a_wrong_bit() {
    let mut units = random_units(2, LEN_BYTES, 1);
    units[1] = units[0].clone();
    units[1][77] ^= 4;
    assert_ne!(to_low_rate(&units[0]), to_low_rate(&units[1]));
}
