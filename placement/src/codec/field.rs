//! The field under np16.
//!
//! A symbol is an element of GF(2^16) = GF(2)[x] / 0x1002D, written in the Cantor basis [`CANTOR_BASIS`]: bit b of the
//! 16-bit value stands for the b-th basis element. Addition is XOR. In this basis the values 0 to 255 are closed under
//! multiplication: they are the field GF(2^8), and every constant np16 ever multiplies by is one of them.
//!
//! With `s = hi * 256 + lo`, a product of a symbol and such a constant splits into two products of bytes, once the
//! symbol has been *twisted*: `twist(hi, lo) = (hi, lo ^ t(hi))`, with t linear over bits. `c * s` is
//! `twist(c * hi, c * (lo ^ t(hi)))`, and twisting twice is doing nothing. So a kernel twists every source once, works
//! on single bytes, and twists every output once.

use std::sync::LazyLock;

/// The polynomial that reduces products in GF(2^16), x^16 included.
pub const POLYNOMIAL: u32 = 0x1_002D;

/// Basis elements in the usual polynomial form; each squared plus itself gives the one before.
pub const CANTOR_BASIS: [u16; 16] =
    [1, 44234, 15374, 5694, 50562, 60718, 37196, 16402, 27800, 4312, 27250, 47360, 64952, 64308, 65336, 39198];

/// `to_cantor` of the single-bit polynomials, by Gauss-Jordan elimination of the basis.
const CANTOR_OF_BIT: [u16; 16] = {
    // Pairs (polynomial form, Cantor form) stay equal as elements through every step; at the end the first are single
    // bits.
    let mut poly = CANTOR_BASIS;
    let mut cantor = [0u16; 16];
    let mut i = 0;
    while i < 16 {
        cantor[i] = 1 << i;
        i += 1;
    }
    let mut bit = 0;
    while bit < 16 {
        let mut pivot = bit;
        while poly[pivot] >> bit & 1 == 0 {
            pivot += 1; // Out of bounds, and so a compile error, if the sixteen were no basis.
        }
        let (p, c) = (poly[pivot], cantor[pivot]);
        (poly[pivot], cantor[pivot]) = (poly[bit], cantor[bit]);
        (poly[bit], cantor[bit]) = (p, c);
        let mut row = 0;
        while row < 16 {
            if row != bit && poly[row] >> bit & 1 == 1 {
                poly[row] ^= p;
                cantor[row] ^= c;
            }
            row += 1;
        }
        bit += 1;
    }
    cantor
};

/// XOR of the table entries that the set bits of `bits` select.
const fn select(table: &[u16; 16], bits: u16) -> u16 {
    let mut sum = 0;
    let mut bit = 0;
    while bit < 16 {
        if bits >> bit & 1 == 1 {
            sum ^= table[bit];
        }
        bit += 1;
    }
    sum
}

/// The product of two symbols in GF(2^16), straight from the definition. Slow; for tables and tests.
pub const fn multiply_symbols(a: u16, b: u16) -> u16 {
    let (a, b) = (select(&CANTOR_BASIS, a) as u32, select(&CANTOR_BASIS, b));
    let mut product = 0u32;
    let mut bit = 16;
    while bit > 0 {
        bit -= 1;
        product <<= 1;
        if product >> 16 & 1 == 1 {
            product ^= POLYNOMIAL;
        }
        if b >> bit & 1 == 1 {
            product ^= a;
        }
    }
    select(&CANTOR_OF_BIT, product as u16)
}

/// `t` of the twist on single bits: what the ninth basis element times the b-th adds to the low byte.
pub const TWIST: [u8; 8] = {
    let mut table = [0u8; 8];
    let mut bit = 0;
    while bit < 8 {
        let extra = multiply_symbols(0x100, 1 << bit) ^ (0x100 << bit);
        assert!(extra < 256);
        table[bit] = extra as u8;
        bit += 1;
    }
    table
};

/// `t` of the twist on a whole byte.
pub const fn twist(high: u8) -> u8 {
    let mut sum = 0;
    let mut bit = 0;
    while bit < 8 {
        if high >> bit & 1 == 1 {
            sum ^= TWIST[bit];
        }
        bit += 1;
    }
    sum
}

/// `PRODUCTS[c][v]` is `c * v` in GF(2^8).
static PRODUCTS: LazyLock<Box<[[u8; 256]; 256]>> = LazyLock::new(|| {
    let mut products = Box::new([[0u8; 256]; 256]);
    // A product is linear in each factor, so eight times eight products of single bits give them all.
    let bits: [[u8; 8]; 8] =
        std::array::from_fn(|i| std::array::from_fn(|j| multiply_symbols(1 << i, 1 << j).to_be_bytes()[1]));
    for (c, row) in products.iter_mut().enumerate() {
        for (v, product) in row.iter_mut().enumerate() {
            for (_, line) in bits.iter().enumerate().filter(|(i, _)| c >> i & 1 == 1) {
                *product ^= line.iter().enumerate().filter(|(j, _)| v >> j & 1 == 1).fold(0, |sum, (_, bit)| sum ^ bit);
            }
        }
    }
    products
});

/// All 256 multiples of `c` in GF(2^8).
pub fn multiples(c: u8) -> &'static [u8; 256] {
    &PRODUCTS[usize::from(c)]
}

/// The product of two elements of GF(2^8).
pub fn multiply(a: u8, b: u8) -> u8 {
    multiples(a)[usize::from(b)]
}

/// The element whose product with `a` is 1; none for 0.
pub fn invert(a: u8) -> Option<u8> {
    multiples(a).iter().position(|&product| product == 1).map(|at| at as u8)
}

/// What a constant makes of the eight single bits: enough to know the whole map.
pub fn images(c: u8) -> [u8; 8] {
    std::array::from_fn(|bit| multiply(c, 1 << bit))
}

/// A linear map of bytes, given by the images of single bits, as the 8x8 bit matrix that `gf2p8affineqb` takes: output
/// bit i is byte 7-i, and bit b in it says whether input bit b counts.
pub const fn bit_matrix(images: [u8; 8]) -> u64 {
    let mut matrix = 0;
    let mut at = 0;
    while at < 64 {
        let (i, b) = (at / 8, at % 8);
        matrix |= (images[b] as u64 >> i & 1) << (8 * (7 - i) + b);
        at += 1;
    }
    matrix
}

/// A linear map of bytes, given by the images of single bits, as two tables of 16: images of the low nibble, then
/// images of the high nibble.
pub const fn nibble_tables(images: [u8; 8]) -> [u8; 32] {
    let mut tables = [0u8; 32];
    let mut at = 0;
    while at < 32 * 4 {
        let (entry, bit) = (at / 4, at % 4);
        if (entry % 16) >> bit & 1 == 1 {
            tables[entry] ^= images[entry / 16 * 4 + bit];
        }
        at += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use reed_solomon_novelpoly::f2e16::Additive;

    #[test]
    fn basis_is_cantors() {
        for pair in CANTOR_BASIS.windows(2) {
            let as_cantor = select(&CANTOR_OF_BIT, pair[1]);
            let squared = select(&CANTOR_BASIS, multiply_symbols(as_cantor, as_cantor));
            assert_eq!(squared ^ pair[1], pair[0]);
        }
    }

    #[test]
    fn twist_is_the_pinned_one() {
        assert_eq!(TWIST, [0x00, 0xcf, 0xab, 0x21, 0x8a, 0x9d, 0x27, 0x1f]);
        assert_eq!(bit_matrix(TWIST), 0xeed6_e2b6_a04c_0236);
    }

    #[test]
    fn products_of_bytes_stay_bytes_and_equal_the_crates() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let symbol = multiply_symbols(a.into(), b.into());
                assert_eq!(symbol, u16::from(multiply(a, b)));
                // The crate multiplies through logarithms and has none of zero.
                let theirs = if b == 0 { 0 } else { Additive(a.into()).mul(Additive(b.into()).to_multiplier()).0 };
                assert_eq!(symbol, theirs);
            }
        }
    }

    #[test]
    fn every_constant_times_every_symbol_is_two_products_of_bytes() {
        for c in 0..=255u8 {
            let constant = (c != 0).then(|| Additive(c.into()).to_multiplier());
            for symbol in 0..=u16::MAX {
                let [high, low] = symbol.to_be_bytes();
                let (high2, low2) = (multiply(c, high), multiply(c, low ^ twist(high)));
                let ours = u16::from_be_bytes([high2, low2 ^ twist(high2)]);
                assert_eq!(ours, constant.map_or(0, |c| Additive(symbol).mul(c).0), "{c:02x} * {symbol:04x}");
            }
        }
    }

    #[test]
    fn inverses_undo_products() {
        assert_eq!(invert(0), None);
        for a in 1..=255 {
            assert_eq!(multiply(a, invert(a).unwrap()), 1);
        }
    }

    #[test]
    fn both_table_forms_give_the_map_back() {
        for c in 0..=255u8 {
            let (matrix, nibbles) = (bit_matrix(images(c)), nibble_tables(images(c)));
            for v in 0..=255u8 {
                let by_nibbles = nibbles[usize::from(v & 15)] ^ nibbles[16 + usize::from(v >> 4)];
                let rows = matrix.to_be_bytes();
                let by_matrix = (0..8).fold(0u8, |sum, i| sum | ((rows[i] & v).count_ones() as u8 & 1) << i);
                assert_eq!((by_nibbles, by_matrix), (multiply(c, v), multiply(c, v)));
            }
        }
    }
}
