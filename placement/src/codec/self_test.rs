//! The start-up check: the kernel that was chosen on this CPU against the crate that defines the code.

use super::reference;
use super::{ChunkSet, Codec, CodecError, Kernel, MAX_CHUNKS};

/// Schemes that reach every size of code but the smallest, a shortened K, and more rows than a kernel takes at once.
const SCHEMES: [(u8, u8); 6] = [(2, 1), (4, 2), (8, 4), (10, 4), (16, 6), (32, 16)];
/// Several column blocks of every kernel, and a tail.
const LEN_BYTES: usize = 3 * 128 + 54;

/// Encodes, loses M chunks, rebuilds them, and compares with the crate at each step. Takes a few milliseconds.
///
/// Every daemon calls this before it touches data and stops on an error: [`CodecError::Kernel`] when the environment
/// names a kernel that does not run here, [`CodecError::Broken`] when the bytes differ.
pub fn self_test() -> Result<(), CodecError> {
    let kernel = Kernel::chosen()?;
    SCHEMES.iter().try_for_each(|&(k, m)| test_scheme(k, m, kernel))
}

fn test_scheme(k: u8, m: u8, kernel: Kernel) -> Result<(), CodecError> {
    let broken =
        |what: &str| Err(CodecError::broken(format!("{what} of {k}+{m} on kernel {kernel} differs from the crate's")));
    let codec = Codec::with_kernel(k, m, kernel)?;
    let mut units = vec![vec![0u8; LEN_BYTES]; usize::from(k + m)];
    let (data, coding) = units.split_at_mut(k.into());
    fill(data);
    let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    codec.encode(&data, &mut coding.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())?;
    if reference::encode(&data, m)? != *coding {
        return broken("encoding");
    }

    // The first M chunks are lost: all coding chunks that are left are read, and where M exceeds K some are wanted too.
    let lost = ChunkSet::range(0, m);
    let present = ChunkSet::range(m, k + m);
    let plan = codec.plan(present, lost)?;
    let sources: Vec<&[u8]> = plan.sources().iter().map(|&index| units[usize::from(index)].as_slice()).collect();
    let mut rebuilt = [[0u8; LEN_BYTES]; MAX_CHUNKS];
    let mut out: Vec<&mut [u8]> = rebuilt.iter_mut().take(m.into()).map(|unit| unit.as_mut_slice()).collect();
    plan.apply(&sources, &mut out)?;
    if lost.iter().any(|index| rebuilt[usize::from(index)] != *units[usize::from(index)]) {
        return broken("rebuilding");
    }
    let chunks: Vec<Option<&[u8]>> =
        (0..k + m).map(|index| present.contains(index).then(|| units[usize::from(index)].as_slice())).collect();
    if reference::rebuild_data(&chunks, k)? != units[..usize::from(k)] {
        return broken("reading back");
    }
    Ok(())
}

/// Bytes that no two units share and that take all values: the multiplier is the fractional part of the golden ratio.
fn fill(data: &mut [Vec<u8>]) {
    let mut state = 1u64;
    for byte in data.iter_mut().flatten() {
        state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_this_cpu_passes_the_start_up_check() {
        for kernel in Kernel::available() {
            for (k, m) in SCHEMES {
                assert_eq!(test_scheme(k, m, kernel), Ok(()));
            }
        }
        assert_eq!(self_test(), Ok(()));
    }
}
