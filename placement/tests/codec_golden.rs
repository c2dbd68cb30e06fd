//! The bytes on disk, written down: coding units of a fixed payload. If this test fails, the format has changed, and
//! chunks already written can no longer be rebuilt. Never edit the fixtures to make it pass.

#![allow(clippy::unwrap_used)]

use granary_placement::codec::{reference, Codec, Kernel};

const LEN_BYTES: usize = 16;

/// Byte i of the payload is `i * 37 + 11`, modulo 256; data unit j is bytes `16 * j` to `16 * j + 15`.
fn payload(k: u8) -> Vec<u8> {
    (0..usize::from(k) * LEN_BYTES).map(|i| (i * 37 + 11) as u8).collect()
}

const CODING_4_2: [&str; 2] = ["3aa3ac2fba8c50a6e0e48f99ec023486", "6aa0ef3f9e41671fe3536b333c351098"];

const CODING_10_4: [&str; 4] = [
    "022069647710a909e549988cc2e16f7b",
    "3188139ef0e56753dac34041ebafe898",
    "e37142107658fe76ac5636734c7e4cc1",
    "b9c789c406091ffee5d3ffe72d4d3cb8",
];

#[test]
fn coding_units_are_the_golden_ones_on_every_kernel() {
    for (k, golden) in [(4, &CODING_4_2[..]), (10, &CODING_10_4[..])] {
        let payload = payload(k);
        let data: Vec<&[u8]> = payload.chunks(LEN_BYTES).collect();
        let m = golden.len() as u8;
        let by_the_crate: Vec<String> = reference::encode(&data, m).unwrap().iter().map(|unit| hex(unit)).collect();
        assert_eq!(by_the_crate, golden, "the crate that defines the code");
        for kernel in Kernel::available() {
            let mut coding = vec![[0u8; LEN_BYTES]; golden.len()];
            let mut out: Vec<&mut [u8]> = coding.iter_mut().map(|unit| unit.as_mut_slice()).collect();
            Codec::with_kernel(k, m, kernel).unwrap().encode(&data, &mut out).unwrap();
            assert_eq!(coding.iter().map(|unit| hex(unit)).collect::<Vec<_>>(), golden, "kernel {kernel}");
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
