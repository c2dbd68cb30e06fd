//! Who is measured: np16 on one kernel, the crate that defines it, and other erasure codecs.
//!
//! Each contestant works on its own copy of the same stripe, keeps its buffers and its decode matrix between calls
//! where its interface allows it, and proves its bytes in `check` before it is timed.

use std::error::Error;
use std::sync::Arc;

use granary_placement::codec::{ChunkSet, Codec, Kernel, Plan};
use reed_solomon_erasure::galois_8;
use reed_solomon_novelpoly::{CodeParams, ReedSolomon, WrappedShard};
use reed_solomon_simd::{ReedSolomonDecoder, ReedSolomonEncoder};
use rusty_erasure::{coder, Coder, DecodePlan, Matrix};

use super::EXTRA_STRIDE_BYTES;

type Outcome = Result<(), Box<dyn Error>>;

/// One codec with one stripe to work on.
pub trait Contestant {
    fn name(&self) -> String;
    /// Sets up for losing the first `lost` data units, or for encoding when that is 0. Not timed.
    fn prepare(&mut self, lost: usize) -> Outcome;
    /// Does it once. Timed.
    fn run(&mut self) -> Outcome;
    /// Whether the last run gave the right bytes.
    fn check(&self) -> Outcome;
}

/// np16 on one kernel.
pub fn np16(k: u8, m: u8, kernel: Kernel, unit_bytes: usize) -> Result<Box<dyn Contestant>, Box<dyn Error>> {
    let codec = Codec::with_kernel(k, m, kernel)?;
    Ok(Box::new(Np16 { codec, stripe: Stripe::new(k, m, unit_bytes), plan: None }))
}

/// The other crates, and the crate that defines np16.
pub fn peers(k: u8, m: u8, unit_bytes: usize) -> Result<Vec<Box<dyn Contestant>>, Box<dyn Error>> {
    let (ku, mu) = (usize::from(k), usize::from(m));
    let stripe = || Stripe::new(k, m, unit_bytes);
    Ok(vec![
        Box::new(Isal { coder: coder(Matrix::cauchy(ku, mu)?)?, stripe: stripe(), plan: None }),
        Box::new(Erasure { codec: galois_8::ReedSolomon::new(ku, mu)?, stripe: stripe() }),
        Box::new(Simd {
            encoder: ReedSolomonEncoder::new(ku, mu, unit_bytes)?,
            decoder: ReedSolomonDecoder::new(ku, mu, unit_bytes)?,
            stripe: stripe(),
        }),
        Box::new(NovelPoly::new(k, m, stripe())?),
    ])
}

/// K+M units in one allocation, [`EXTRA_STRIDE_BYTES`] apart, and room for the rebuilt ones in another.
struct Stripe {
    k: usize,
    m: usize,
    unit_bytes: usize,
    units: Vec<u8>,
    rebuilt: Vec<u8>,
    lost: usize,
}

impl Stripe {
    fn new(k: u8, m: u8, unit_bytes: usize) -> Self {
        let (k, m) = (usize::from(k), usize::from(m));
        let stride = unit_bytes + EXTRA_STRIDE_BYTES;
        let mut units = vec![0u8; (k + m) * stride + CACHE_LINE];
        let mut state = 0x5eed_u64;
        let start = aligned(&units); // Filled from here, every stripe of one shape holds the same bytes.
        for byte in &mut units[start..] {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
        Self { k, m, unit_bytes, units, rebuilt: vec![0u8; k.max(m) * stride + CACHE_LINE], lost: 0 }
    }

    /// K data units, then M coding units.
    fn units(&self) -> Vec<&[u8]> {
        let stride = self.unit_bytes + EXTRA_STRIDE_BYTES;
        let start = aligned(&self.units);
        self.units[start..].chunks(stride).take(self.k + self.m).map(|unit| &unit[..self.unit_bytes]).collect()
    }

    fn units_mut(&mut self) -> Vec<&mut [u8]> {
        split_mut(&mut self.units, self.unit_bytes, self.k + self.m)
    }

    /// The units, and the outputs for the lost ones.
    fn units_and_rebuilt(&mut self) -> (Vec<&[u8]>, Vec<&mut [u8]>) {
        let Self { k, m, unit_bytes, ref units, ref mut rebuilt, lost } = *self;
        let start = aligned(units);
        let stride = unit_bytes + EXTRA_STRIDE_BYTES;
        let units = units[start..].chunks(stride).take(k + m).map(|unit| &unit[..unit_bytes]).collect();
        (units, split_mut(rebuilt, unit_bytes, lost))
    }

    /// Whether the rebuilt units equal the data units that were taken as lost.
    fn check_rebuilt(&self) -> Outcome {
        let start = aligned(&self.rebuilt);
        let rebuilt = self.rebuilt[start..].chunks(self.unit_bytes + EXTRA_STRIDE_BYTES);
        let all_equal =
            self.units().iter().take(self.lost).zip(rebuilt).all(|(unit, it)| **unit == it[..self.unit_bytes]);
        right(all_equal)
    }
}

const CACHE_LINE: usize = 64;

/// Bytes to skip until the first cache line that starts within.
fn aligned(bytes: &[u8]) -> usize {
    bytes.as_ptr().align_offset(CACHE_LINE).min(CACHE_LINE)
}

fn split_mut(bytes: &mut [u8], unit_bytes: usize, count: usize) -> Vec<&mut [u8]> {
    let start = aligned(bytes);
    let units = bytes[start..].chunks_mut(unit_bytes + EXTRA_STRIDE_BYTES).take(count);
    units.map(|unit| &mut unit[..unit_bytes]).collect()
}

fn right(is_right: bool) -> Outcome {
    if is_right {
        Ok(())
    } else {
        Err("wrong bytes".into())
    }
}

struct Np16 {
    codec: Codec,
    stripe: Stripe,
    plan: Option<Arc<Plan>>,
}

impl Contestant for Np16 {
    fn name(&self) -> String {
        format!("np16 {}", self.codec.kernel())
    }

    fn prepare(&mut self, lost: usize) -> Outcome {
        self.stripe.lost = lost;
        let (k, m, lost) = (self.codec.k(), self.codec.m(), u8::try_from(lost)?);
        self.plan = match lost {
            0 => None,
            _ => Some(self.codec.plan(ChunkSet::range(lost, k + m), ChunkSet::range(0, lost))?),
        };
        Ok(())
    }

    fn run(&mut self) -> Outcome {
        let k = self.stripe.k;
        let Some(plan) = &self.plan else {
            let mut units = self.stripe.units_mut();
            let (data, coding) = units.split_at_mut(k);
            let data: Vec<&[u8]> = data.iter().map(|unit| &**unit).collect();
            return Ok(self.codec.encode(&data, coding)?);
        };
        let (units, mut rebuilt) = self.stripe.units_and_rebuilt();
        let sources: Vec<&[u8]> = plan.sources().iter().map(|&index| units[usize::from(index)]).collect();
        Ok(plan.apply(&sources, &mut rebuilt)?)
    }

    fn check(&self) -> Outcome {
        self.stripe.check_rebuilt()
    }
}

/// rusty_erasure: ISA-L's code and kernels in Rust.
struct Isal {
    coder: Coder,
    stripe: Stripe,
    plan: Option<DecodePlan>,
}

impl Contestant for Isal {
    fn name(&self) -> String {
        format!("rusty_erasure {}", self.coder.kernels().name)
    }

    fn prepare(&mut self, lost: usize) -> Outcome {
        self.stripe.lost = lost;
        let present: Vec<bool> = (0..self.stripe.k + self.stripe.m).map(|index| index >= lost).collect();
        let rebuild: Vec<usize> = (0..lost).collect();
        self.plan = if lost == 0 { None } else { Some(self.coder.decode_plan(&present, &rebuild)?) };
        Ok(())
    }

    fn run(&mut self) -> Outcome {
        let (k, lost) = (self.stripe.k, self.stripe.lost);
        let Some(plan) = &self.plan else {
            let mut units = self.stripe.units_mut();
            let (data, coding) = units.split_at_mut(k);
            let data: Vec<&[u8]> = data.iter().map(|unit| &**unit).collect();
            return Ok(self.coder.encode(&data, coding)?);
        };
        let (units, mut rebuilt) = self.stripe.units_and_rebuilt();
        let given: Vec<Option<&[u8]>> =
            units.into_iter().enumerate().map(|(index, unit)| (index >= lost).then_some(unit)).collect();
        Ok(self.coder.recover_with(plan, &given, &mut rebuilt)?)
    }

    fn check(&self) -> Outcome {
        self.stripe.check_rebuilt()
    }
}

/// reed-solomon-erasure with its C kernels. It rebuilds in place, so `check` compares with a fresh stripe.
struct Erasure {
    codec: galois_8::ReedSolomon,
    stripe: Stripe,
}

impl Contestant for Erasure {
    fn name(&self) -> String {
        String::from("reed-solomon-erasure simd-accel")
    }

    fn prepare(&mut self, lost: usize) -> Outcome {
        self.stripe.lost = lost;
        for unit in self.stripe.units_mut().iter_mut().take(lost) {
            unit.fill(0xee);
        }
        Ok(())
    }

    fn run(&mut self) -> Outcome {
        let (k, lost) = (self.stripe.k, self.stripe.lost);
        let mut units = self.stripe.units_mut();
        if lost == 0 {
            let (data, coding) = units.split_at_mut(k);
            return Ok(self.codec.encode_sep(data, coding)?);
        }
        let mut given: Vec<(&mut [u8], bool)> =
            units.into_iter().enumerate().map(|(index, unit)| (unit, index >= lost)).collect();
        Ok(self.codec.reconstruct_data(&mut given)?)
    }

    fn check(&self) -> Outcome {
        let fresh = Stripe::new(u8::try_from(self.stripe.k)?, u8::try_from(self.stripe.m)?, self.stripe.unit_bytes);
        right(self.stripe.units()[..self.stripe.k] == fresh.units()[..self.stripe.k])
    }
}

/// reed-solomon-simd at its default rate. It hands out results in its own memory; copying them out is part of the work,
/// as the others write where the caller says.
struct Simd {
    encoder: ReedSolomonEncoder,
    decoder: ReedSolomonDecoder,
    stripe: Stripe,
}

impl Contestant for Simd {
    fn name(&self) -> String {
        String::from("reed-solomon-simd")
    }

    fn prepare(&mut self, lost: usize) -> Outcome {
        self.stripe.lost = lost;
        Ok(())
    }

    fn run(&mut self) -> Outcome {
        let (k, lost) = (self.stripe.k, self.stripe.lost);
        if lost == 0 {
            let mut units = self.stripe.units_mut();
            let (data, coding) = units.split_at_mut(k);
            for unit in data {
                self.encoder.add_original_shard(&*unit)?;
            }
            for (unit, result) in coding.iter_mut().zip(self.encoder.encode()?.recovery_iter()) {
                unit.copy_from_slice(result);
            }
            return Ok(());
        }
        let (units, rebuilt) = self.stripe.units_and_rebuilt();
        for (index, unit) in units.iter().enumerate().skip(lost).take(k) {
            if index < k {
                self.decoder.add_original_shard(index, unit)?;
            } else {
                self.decoder.add_recovery_shard(index - k, unit)?;
            }
        }
        for (unit, (_, result)) in rebuilt.into_iter().zip(self.decoder.decode()?.restored_original_iter()) {
            unit.copy_from_slice(result);
        }
        Ok(())
    }

    fn check(&self) -> Outcome {
        self.stripe.check_rebuilt()
    }
}

/// reed-solomon-novelpoly as it is, on its own interleaved layout, which is prepared beforehand. A K that is no power
/// of two runs with zero units in the free places, as np16 defines it.
struct NovelPoly {
    codec: ReedSolomon,
    k_code: usize,
    stripe: Stripe,
    interleaved: Vec<u8>,
    encoded: Vec<WrappedShard>,
    decoded: Vec<u8>,
}

impl NovelPoly {
    fn new(k: u8, m: u8, stripe: Stripe) -> Result<Self, Box<dyn Error>> {
        let k_code = usize::from(k).next_power_of_two();
        let params = CodeParams::derive_parameters(k_code + usize::from(m), k_code)?;
        let mut interleaved = vec![0u8; k_code * stripe.unit_bytes];
        for (j, unit) in stripe.units().iter().take(stripe.k).enumerate() {
            for (run, symbol) in interleaved.chunks_exact_mut(2 * k_code).zip(unit.chunks_exact(2)) {
                run[2 * j..2 * j + 2].copy_from_slice(symbol);
            }
        }
        Ok(Self { codec: params.make_encoder(), k_code, stripe, interleaved, encoded: Vec::new(), decoded: Vec::new() })
    }
}

impl Contestant for NovelPoly {
    fn name(&self) -> String {
        String::from("reed-solomon-novelpoly")
    }

    fn prepare(&mut self, lost: usize) -> Outcome {
        self.stripe.lost = lost;
        self.encoded = self.codec.encode(&self.interleaved)?;
        Ok(())
    }

    fn run(&mut self) -> Outcome {
        if self.stripe.lost == 0 {
            self.encoded = self.codec.encode(&self.interleaved)?;
        } else {
            let given = self.encoded.iter().enumerate().map(|(i, unit)| (i >= self.stripe.lost).then(|| unit.clone()));
            self.decoded = self.codec.reconstruct(given.collect())?;
        }
        Ok(())
    }

    fn check(&self) -> Outcome {
        if self.stripe.lost == 0 {
            return right(self.encoded.len() == self.k_code + self.stripe.m);
        }
        right(self.decoded == self.interleaved)
    }
}
