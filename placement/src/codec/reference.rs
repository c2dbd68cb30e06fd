//! The crate `reed-solomon-novelpoly` on Granary's chunk layout: the definition of np16, hundreds of times slower than
//! the kernels. For the self-test, for tests and for the benchmark; never on the path of a request.
//!
//! The crate wants a power of two of data units, interleaved symbol by symbol. Here absent data units are zeros, and
//! what comes out is laid back into one unit per chunk. Never hand the crate another K: it rounds down without a word.

use reed_solomon_novelpoly::{CodeParams, ReedSolomon, WrappedShard};

use super::matrix::code_size;
use super::{CodecError, MAX_K, MAX_M};

/// The `m` coding units of `data`, units of one even length above zero.
///
/// Errors: [`CodecError::Scheme`], [`CodecError::UnitLength`], and [`CodecError::Broken`] when the crate refuses.
pub fn encode(data: &[&[u8]], m: u8) -> Result<Vec<Vec<u8>>, CodecError> {
    let len_bytes = common_length(data.iter().copied())?;
    let (k_code, crate_codec) = crate_codec(data.len(), m)?;
    let mut interleaved = vec![0u8; k_code * len_bytes];
    for (j, unit) in data.iter().enumerate() {
        for (run, symbol) in interleaved.chunks_exact_mut(2 * k_code).zip(unit.chunks_exact(2)) {
            run[2 * j..2 * j + 2].copy_from_slice(symbol);
        }
    }
    let units = crate_codec.encode::<WrappedShard>(&interleaved).map_err(refused)?;
    Ok(units.into_iter().skip(k_code).map(WrappedShard::into_inner).collect())
}

/// All `k` data units from any `k` of the K+M units; `chunks[i]` is the unit of chunk i, or none where it is lost.
///
/// Errors: as [`encode`]; too few units are [`CodecError::Broken`] too, with the crate's words.
pub fn rebuild_data(chunks: &[Option<&[u8]>], k: u8) -> Result<Vec<Vec<u8>>, CodecError> {
    let k = usize::from(k);
    let len_bytes = common_length(chunks.iter().flatten().copied())?;
    let m = u8::try_from(chunks.len().saturating_sub(k)).unwrap_or(u8::MAX);
    let (k_code, crate_codec) = crate_codec(k, m)?;
    let (data, coding) = chunks.split_at(k);
    let absent = vec![0u8; len_bytes];
    let given = data.iter().copied().chain((k..k_code).map(|_| Some(absent.as_slice()))).chain(coding.iter().copied());
    let given = given.map(|unit| unit.map(|unit| WrappedShard::new(unit.to_vec()))).collect();
    let interleaved = crate_codec.reconstruct(given).map_err(refused)?;
    let unit = |j: usize| interleaved.chunks_exact(2 * k_code).flat_map(|run| run[2 * j..2 * j + 2].to_vec()).collect();
    Ok((0..k).map(unit).collect())
}

fn common_length<'a>(mut units: impl Iterator<Item = &'a [u8]>) -> Result<usize, CodecError> {
    let needed = units.next().map_or(0, <[u8]>::len);
    let odd_one = units.map(<[u8]>::len).find(|&len| len != needed);
    match odd_one.or((needed == 0 || !needed.is_multiple_of(2)).then_some(needed)) {
        Some(given) => Err(CodecError::UnitLength { role: "source", given, needed }),
        None => Ok(needed),
    }
}

fn crate_codec(k: usize, m: u8) -> Result<(usize, ReedSolomon), CodecError> {
    let k = u8::try_from(k).unwrap_or(u8::MAX);
    if !(1..=MAX_K).contains(&k) || !(1..=MAX_M).contains(&m) {
        return Err(CodecError::Scheme { k, m });
    }
    let k_code = usize::from(code_size(k));
    let params = CodeParams::derive_parameters(k_code + usize::from(m), k_code).map_err(refused)?;
    if params.k() != k_code {
        return Err(CodecError::broken(format!("the crate made {} data units of {k_code}", params.k())));
    }
    Ok((k_code, params.make_encoder()))
}

fn refused(error: reed_solomon_novelpoly::Error) -> CodecError {
    CodecError::broken(format!("the crate refuses: {error}"))
}
