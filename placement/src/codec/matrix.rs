//! The coding matrix, read out of the crate that defines the code.
//!
//! The code of size `k_code` (K rounded up to a power of two) takes `k_code` symbols to any number of coding symbols,
//! and it is linear: encoding the j-th unit vector gives column j. Row p does not depend on how many rows are asked
//! for, so M can be raised later and old coding chunks stay what they were. A K that is no power of two uses the first
//! K columns: the others would multiply data that is absent, which is zero.
//!
//! **Invariant:** the matrix hashes to the value pinned here, or no codec is made. Chunks on disk outlive the version
//! of the crate, so a crate that computes another code must not get as far as coding one byte.

use std::sync::OnceLock;

use reed_solomon_novelpoly::f2e16::encode_sub;

use super::{CodecError, MAX_K, MAX_M};

/// FNV-1a-64 of the 16 rows for k_code 1, 2, 4, 8, 16, 32: row by row, each entry as a big-endian 16-bit symbol.
const PINNED: [u64; SIZES] = [
    0x33af_01ef_4250_0be5,
    0x0abc_5eca_b26d_66a5,
    0x7a71_87a3_6dc6_1f65,
    0xb3f6_1604_a194_b625,
    0x3051_d64d_847a_5565,
    0x7a4c_b2cf_8fdc_5865,
];
const SIZES: usize = MAX_K.trailing_zeros() as usize + 1;

/// All [`MAX_M`] rows of the code of one size. Entries at columns `k_code` and up are zero and mean nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generator {
    rows: [[u8; MAX_K as usize]; MAX_M as usize],
}

impl Generator {
    /// The matrix that serves `k` data chunks, 1 to [`MAX_K`].
    ///
    /// Errors: [`CodecError::Scheme`] for another `k`; [`CodecError::Broken`] when the crate gives another matrix than
    /// the pinned one.
    pub fn for_k(k: u8) -> Result<&'static Self, CodecError> {
        static BY_SIZE: [OnceLock<Result<Generator, CodecError>>; SIZES] = [const { OnceLock::new() }; SIZES];
        if k == 0 || k > MAX_K {
            return Err(CodecError::Scheme { k, m: MAX_M });
        }
        let k_code = code_size(k);
        let size = k_code.trailing_zeros() as usize;
        BY_SIZE[size].get_or_init(|| Self::from_crate(k_code, PINNED[size])).as_ref().map_err(Clone::clone)
    }

    /// What coding chunk `p` takes data symbol `j` times; both count from 0.
    pub fn entry(&self, p: usize, j: usize) -> u8 {
        self.rows[p][j]
    }

    fn from_crate(k_code: u8, pinned: u64) -> Result<Self, CodecError> {
        let k = usize::from(k_code);
        let n = (2 * k).max((k + usize::from(MAX_M)).next_power_of_two());
        let mut symbols = [[0u16; MAX_K as usize]; MAX_M as usize];
        for j in 0..k {
            let mut unit_vector = vec![0u8; 2 * k];
            unit_vector[2 * j + 1] = 1;
            let codeword = encode_sub(&unit_vector, n, k)
                .map_err(|error| CodecError::broken(format!("the crate refuses k_code {k}: {error}")))?;
            for (row, symbol) in symbols.iter_mut().zip(&codeword[k..]) {
                row[j] = symbol.0;
            }
        }
        let hash = fnv1a_64(symbols.iter().flat_map(|row| &row[..k]).flat_map(|symbol| symbol.to_be_bytes()));
        if hash != pinned {
            let detail = format!("the matrix for k_code {k} hashes to {hash:016x}, the pinned one to {pinned:016x}");
            return Err(CodecError::Broken { detail });
        }
        let mut rows = [[0u8; MAX_K as usize]; MAX_M as usize];
        for (row, symbols) in rows.iter_mut().zip(&symbols) {
            for (entry, &symbol) in row.iter_mut().zip(symbols) {
                *entry = u8::try_from(symbol).map_err(|_| CodecError::broken("a matrix entry exceeds a byte"))?;
            }
        }
        Ok(Self { rows })
    }
}

/// The power of two that the code for `k` data chunks is made for.
pub fn code_size(k: u8) -> u8 {
    k.next_power_of_two()
}

fn fnv1a_64(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::field::multiply_symbols;
    use super::*;

    /// In a field of 2^16 elements, a^(2^16 - 2) is the inverse of a.
    fn invert_symbol(a: u16) -> u16 {
        let (mut power, mut inverse) = (a, 1);
        for _ in 1..16 {
            power = multiply_symbols(power, power);
            inverse = multiply_symbols(inverse, power);
        }
        inverse
    }

    /// Lagrange interpolation through the points 0..k_code, taken at k_code + p.
    fn closed_form(k_code: u16, p: u16, j: u16) -> u16 {
        let x = k_code + p;
        (0..k_code)
            .filter(|&i| i != j)
            .fold(1, |product, i| multiply_symbols(product, multiply_symbols(x ^ i, invert_symbol(j ^ i))))
    }

    #[test]
    fn matrix_of_the_crate_is_lagrange_interpolation() {
        for k_code in [1u8, 2, 4, 8, 16, 32] {
            let generator = Generator::for_k(k_code).unwrap();
            for p in 0..MAX_M {
                for j in 0..k_code {
                    let entry = generator.entry(p.into(), j.into());
                    assert_ne!(entry, 0);
                    assert_eq!(u16::from(entry), closed_form(k_code.into(), p.into(), j.into()), "{k_code} {p} {j}");
                }
            }
        }
    }

    #[test]
    fn first_rows_are_the_published_ones() {
        let row = |k: u8| (0..usize::from(k)).map(|j| Generator::for_k(k).unwrap().entry(0, j)).collect::<Vec<_>>();
        assert_eq!(row(4), [0x0c, 0x0f, 0x0a, 0x08]);
        assert_eq!(row(8), [0x07, 0x0b, 0x06, 0x09, 0x04, 0x0e, 0x0d, 0x05]);
        assert_eq!(
            row(16),
            [0x71, 0x76, 0xba, 0xb1, 0x6d, 0x6b, 0x94, 0x9d, 0x49, 0x4d, 0xe9, 0xe7, 0xd3, 0xde, 0x5b, 0x5e]
        );
    }

    #[test]
    fn every_k_finds_the_matrix_of_the_next_power_of_two() {
        for k in 1..=MAX_K {
            assert_eq!(Generator::for_k(k).unwrap(), Generator::for_k(code_size(k)).unwrap());
        }
        assert!(Generator::for_k(0).is_err());
        assert!(Generator::for_k(MAX_K + 1).is_err());
    }

    #[test]
    fn another_matrix_than_the_pinned_one_is_refused() {
        assert!(matches!(Generator::from_crate(8, PINNED[3] ^ 1), Err(CodecError::Broken { .. })));
    }
}
