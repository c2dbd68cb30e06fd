//! Every way to lose up to M chunks, for every scheme Granary is made for, against the data itself and the crate that
//! defines the code.

#![allow(clippy::unwrap_used)]

mod codec_support;

use codec_support::{for_each_subset, random_units, seed, units_of, Random};
use granary_placement::codec::{reference, ChunkSet, Codec};

const SCHEMES: [(u8, u8); 9] = [(2, 1), (4, 2), (6, 3), (8, 3), (8, 4), (10, 4), (12, 4), (16, 4), (17, 3)];

/// The crate takes milliseconds for each pattern, so beyond this many it sees a random sample of them.
const CRATE_PATTERNS: usize = 500;

/// Long enough for a column block and a tail, short enough for thousands of patterns.
const LEN_BYTES: usize = 128 + 34;

#[test]
fn coding_units_of_every_scheme_are_the_crates() {
    let seed = seed();
    for k in 1..=32 {
        for m in [1, 2, 3, 4, 5, 8, 13, 16] {
            let units = units_of(k, m, LEN_BYTES, seed);
            let data: Vec<&[u8]> = units[..usize::from(k)].iter().map(Vec::as_slice).collect();
            assert_eq!(units[usize::from(k)..], reference::encode(&data, m).unwrap(), "{k}+{m}, seed {seed}");
        }
    }
}

#[test]
fn every_loss_of_m_chunks_comes_back_data_and_coding_alike() {
    let seed = seed();
    for (k, m) in SCHEMES {
        let codec = Codec::new(k, m).unwrap();
        let units = units_of(k, m, LEN_BYTES, seed);
        let all = ChunkSet::range(0, k + m);
        let mut patterns = 0;
        for_each_subset(k + m, m, |lost| {
            let rebuilt = rebuild(&codec, &units, all.difference(lost), lost);
            for (index, unit) in lost.iter().zip(&rebuilt) {
                assert!(*unit == units[usize::from(index)], "{k}+{m}, lost {lost:?}, chunk {index}, seed {seed}");
            }
            patterns += 1;
        });
        assert_eq!(patterns, binomial(k + m, m), "{k}+{m}");
    }
}

#[test]
fn every_smaller_loss_comes_back_too() {
    let seed = seed();
    for (k, m) in SCHEMES {
        let codec = Codec::new(k, m).unwrap();
        let units = units_of(k, m, 66, seed);
        let all = ChunkSet::range(0, k + m);
        for lost_count in 1..m {
            for_each_subset(k + m, lost_count, |lost| {
                let rebuilt = rebuild(&codec, &units, all.difference(lost), lost);
                for (index, unit) in lost.iter().zip(&rebuilt) {
                    assert!(*unit == units[usize::from(index)], "{k}+{m}, lost {lost:?}, chunk {index}, seed {seed}");
                }
            });
        }
    }
}

#[test]
fn the_crate_reads_back_what_we_encode_and_we_agree_pattern_by_pattern() {
    let seed = seed();
    let mut random = Random::new(seed);
    for (k, m) in SCHEMES {
        let codec = Codec::new(k, m).unwrap();
        let units = units_of(k, m, 34, seed);
        let all = ChunkSet::range(0, k + m);
        let total = binomial(k + m, m);
        for_each_subset(k + m, m, |lost| {
            if total > CRATE_PATTERNS && random.below(total as u64) >= CRATE_PATTERNS as u64 {
                return;
            }
            let present = all.difference(lost);
            let chunks: Vec<Option<&[u8]>> =
                (0..k + m).map(|index| present.contains(index).then(|| units[usize::from(index)].as_slice())).collect();
            let theirs = reference::rebuild_data(&chunks, k).unwrap();
            let ours = rebuild(&codec, &units, present, ChunkSet::range(0, k));
            assert_eq!(theirs, ours, "{k}+{m}, lost {lost:?}, seed {seed}");
        });
    }
}

#[test]
fn any_k_and_m_within_the_limits_rebuild_random_losses() {
    let seed = seed();
    let mut random = Random::new(seed);
    for k in 1..=32 {
        for m in 1..=16 {
            let codec = Codec::new(k, m).unwrap();
            let units = units_of(k, m, 2 * 128 + 2, seed);
            for _ in 0..4 {
                let mut present = ChunkSet::range(0, k + m);
                while present.len() > k {
                    present.remove(random.below(u64::from(k + m)) as u8);
                }
                let lost = ChunkSet::range(0, k + m).difference(present);
                let rebuilt = rebuild(&codec, &units, present, lost);
                for (index, unit) in lost.iter().zip(&rebuilt) {
                    assert!(*unit == units[usize::from(index)], "{k}+{m}, lost {lost:?}, chunk {index}, seed {seed}");
                }
            }
        }
    }
}

#[test]
fn rows_already_written_stay_valid_when_m_is_raised() {
    let seed = seed();
    let data = random_units(10, LEN_BYTES, seed);
    let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let coding = |m: u8| {
        let mut coding = vec![vec![0u8; LEN_BYTES]; m.into()];
        let mut out: Vec<&mut [u8]> = coding.iter_mut().map(Vec::as_mut_slice).collect();
        Codec::new(10, m).unwrap().encode(&data, &mut out).unwrap();
        coding
    };
    assert_eq!(coding(4), coding(16)[..4]);
}

fn rebuild(codec: &Codec, units: &[Vec<u8>], present: ChunkSet, wanted: ChunkSet) -> Vec<Vec<u8>> {
    let plan = codec.plan(present, wanted).unwrap();
    assert_eq!(plan.wanted(), wanted.iter().collect::<Vec<_>>());
    assert!(plan.sources().iter().all(|&index| present.contains(index)), "a plan may read present chunks only");
    let sources: Vec<&[u8]> = plan.sources().iter().map(|&index| units[usize::from(index)].as_slice()).collect();
    let mut rebuilt = vec![vec![0xa5u8; units[0].len()]; wanted.len().into()];
    let mut out: Vec<&mut [u8]> = rebuilt.iter_mut().map(Vec::as_mut_slice).collect();
    plan.apply(&sources, &mut out).unwrap();
    rebuilt
}

fn binomial(n: u8, k: u8) -> usize {
    (0..usize::from(k)).fold(1, |product, i| product * (usize::from(n) - i) / (i + 1))
}
