//! The geometry of one extent: payload bytes to stripes, units and chunk offsets.
//!
//! ```text
//! payload   |<------------- stripe 0: K*U ------------->|<- stripe 1 ->| ... |<- last: len' ->|
//! chunk j   | unit 0: U bytes | unit 1: U bytes | ... | last unit: U' = round_up(ceil(len'/K), 128) |
//! ```
//! Data unit j of a stripe is payload[j*U..(j+1)*U] of it, unmoved; what a last unit lacks is zeros.

/// Longest extent, in payload bytes.
pub const MAX_EXTENT_BYTES: u64 = 64 * 1024 * 1024;

/// Units are multiples of this many bytes.
pub const UNIT_ALIGN_BYTES: u64 = 128;

/// Shape of one extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentLayout {
    /// Data chunks; at least 1.
    pub k: u8,
    /// Unit of a full stripe, in bytes; a multiple of 128, not zero.
    pub unit_bytes: u64,
    /// Payload of the extent, in bytes; at least 1.
    pub len_bytes: u64,
}

/// One stripe of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stripe {
    /// Where its payload begins in the extent.
    pub payload_offset: u64,
    /// Its payload, in bytes: at most K*unit.
    pub payload_len: u64,
    /// Where its unit begins in every chunk.
    pub chunk_offset: u64,
    /// Length of its unit in every chunk.
    pub unit_len: u64,
}

impl ExtentLayout {
    /// Payload of a full stripe.
    pub fn stripe_bytes(&self) -> u64 {
        self.unit_bytes * u64::from(self.k)
    }

    /// How many stripes; the last may be short.
    pub fn stripes(&self) -> u64 {
        self.len_bytes.div_ceil(self.stripe_bytes())
    }

    /// Stripe `number`; None past the end.
    pub fn stripe(&self, number: u64) -> Option<Stripe> {
        let payload_offset = number.checked_mul(self.stripe_bytes())?;
        let left = self.len_bytes.checked_sub(payload_offset).filter(|left| *left > 0)?;
        let payload_len = left.min(self.stripe_bytes());
        let unit_len = if payload_len == self.stripe_bytes() {
            self.unit_bytes
        } else {
            payload_len.div_ceil(u64::from(self.k)).next_multiple_of(UNIT_ALIGN_BYTES)
        };
        Some(Stripe { payload_offset, payload_len, chunk_offset: number * self.unit_bytes, unit_len })
    }

    /// Length of every chunk of the extent, in bytes.
    pub fn chunk_len(&self) -> u64 {
        match self.stripes().checked_sub(1).and_then(|last| self.stripe(last)) {
            Some(last) => last.chunk_offset + last.unit_len,
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_cover_the_payload_once_and_units_cover_the_stripe() {
        for k in [1u8, 2, 4, 10, 17, 32] {
            for len in [
                1u64,
                127,
                128,
                129,
                65_536,
                131_072 * 4 - 1,
                131_072 * 4,
                131_072 * 4 + 1,
                10_000_000,
                MAX_EXTENT_BYTES,
            ] {
                let layout = ExtentLayout { k, unit_bytes: 131_072, len_bytes: len };
                let (mut payload, mut chunk) = (0, 0);
                for number in 0..layout.stripes() {
                    let stripe = layout.stripe(number).unwrap_or_else(|| panic!("stripe {number} of {len} at K={k}"));
                    assert_eq!((stripe.payload_offset, stripe.chunk_offset), (payload, chunk));
                    assert!(
                        stripe.unit_len * u64::from(k) >= stripe.payload_len && stripe.unit_len.is_multiple_of(128)
                    );
                    assert!(stripe.unit_len <= layout.unit_bytes);
                    payload += stripe.payload_len;
                    chunk += stripe.unit_len;
                }
                assert_eq!((payload, chunk), (len, layout.chunk_len()));
                assert_eq!(layout.stripe(layout.stripes()), None);
            }
        }
    }
}
