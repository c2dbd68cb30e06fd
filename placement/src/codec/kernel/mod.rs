//! Row arithmetic, once per CPU family: `out[r] = sum over j of constant[r][j] * source[j]`, symbol by symbol.
//!
//! All kernels give the same bytes, so the choice among them is no matter of format. Each works on columns: it takes
//! one or two vectors from every source in turn, twists them once (see `field.rs`), and keeps the sums of up to
//! `ROWS_AT_ONCE` output rows in registers until the last source. Sources are read once per block of rows, outputs
//! written once.
//!
//! **Invariant:** `unsafe` in this crate is in the files of this folder only, and each kernel's `run` is safe to call:
//! it asserts that the CPU has the instructions and that every slice holds the bytes it is about to touch.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_gfni;
#[cfg(target_arch = "x86_64")]
mod avx512_gfni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod ssse3;

use std::fmt;
use std::sync::OnceLock;

use super::field::{bit_matrix, images, nibble_tables};
use super::{CodecError, MAX_CHUNKS, UNIT_ALIGN_BYTES};

/// Environment variable that names the kernel to use, for operators and tests.
pub const KERNEL_VARIABLE: &str = "GRANARY_CODEC_KERNEL";

/// Output rows whose sums stay in registers during one walk over the sources.
pub(super) const ROWS_AT_ONCE: usize = 4;

/// An implementation of the row arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// 64-byte vectors, bit-matrix products.
    Avx512Gfni,
    /// 32-byte vectors, bit-matrix products.
    Avx2Gfni,
    /// 32-byte vectors, nibble tables.
    Avx2,
    /// 16-byte vectors, nibble tables.
    Ssse3,
    /// 16-byte vectors, nibble tables, on aarch64.
    Neon,
    /// One byte at a time, on anything.
    Scalar,
}

impl Kernel {
    /// Every kernel, fastest first.
    pub const ALL: [Self; 6] = [Self::Avx512Gfni, Self::Avx2Gfni, Self::Avx2, Self::Ssse3, Self::Neon, Self::Scalar];

    /// The name in settings, metrics and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512Gfni => "avx512-gfni",
            Self::Avx2Gfni => "avx2-gfni",
            Self::Avx2 => "avx2",
            Self::Ssse3 => "ssse3",
            Self::Neon => "neon",
            Self::Scalar => "scalar",
        }
    }

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Gfni => avx512_gfni::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Gfni => avx2_gfni::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Ssse3 => ssse3::is_available(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => neon::is_available(),
            Self::Scalar => true,
            #[allow(unreachable_patterns)] // Reached where a kernel of another architecture is asked for.
            _ => false,
        }
    }

    /// The kernels this CPU can run, fastest first. Never empty: scalar runs anywhere.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|kernel| kernel.is_available())
    }

    /// The kernel of this name, if this CPU can run it.
    ///
    /// Errors: [`CodecError::Kernel`] for an unknown name and for one this CPU cannot run.
    pub fn from_name(name: &str) -> Result<Self, CodecError> {
        Self::available().find(|kernel| kernel.name() == name).ok_or_else(|| CodecError::Kernel {
            name: name.to_owned(),
            available: Self::available().map(Self::name).collect::<Vec<_>>().join(", "),
        })
    }

    /// The kernel that codecs use unless told otherwise: the one named by [`KERNEL_VARIABLE`], or the fastest.
    ///
    /// Errors: [`CodecError::Kernel`] when the variable names no kernel that runs here. Daemons stop on it at start, in
    /// [`self_test`](super::self_test()); whoever goes on regardless gets the fastest kernel, which gives the same
    /// bytes.
    pub fn chosen() -> Result<Self, CodecError> {
        static CHOSEN: OnceLock<Result<Kernel, CodecError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| Self::choose(std::env::var_os(KERNEL_VARIABLE).map(|v| v.to_string_lossy().into_owned())))
            .clone()
    }

    fn choose(named: Option<String>) -> Result<Self, CodecError> {
        match named {
            Some(name) => Self::from_name(name.trim()),
            None => Ok(Self::fastest()),
        }
    }

    pub(super) fn fastest() -> Self {
        Self::available().next().unwrap_or(Self::Scalar)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Name of the kernel in use by codecs made without naming one, for logs and metrics.
pub fn kernel_name() -> &'static str {
    Kernel::chosen().unwrap_or_else(|_| Kernel::fastest()).name()
}

/// The constants of up to `ROWS_AT_ONCE` output rows, in the form their kernel multiplies with, in the order it reads
/// them: all rows of the first source, all rows of the second, and so on.
#[derive(Debug)]
pub(super) struct RowBlock {
    kernel: Kernel,
    rows: usize,
    sources: usize,
    tables: Tables,
}

#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
enum Tables {
    /// 8x8 bit matrices.
    Matrices(Vec<u64>),
    /// Images of low nibbles, then of high nibbles.
    Nibbles(Vec<[u8; 32]>),
    /// The constants themselves.
    Constants(Vec<u8>),
}

impl RowBlock {
    /// `rows[r][j]` is the constant of output r and source j. 1 to [`ROWS_AT_ONCE`] rows of one length; `kernel` must
    /// be available.
    pub(super) fn new(kernel: Kernel, rows: &[Vec<u8>]) -> Self {
        let sources = rows.first().map_or(0, Vec::len);
        assert!((1..=ROWS_AT_ONCE).contains(&rows.len()) && sources <= MAX_CHUNKS);
        assert!(rows.iter().all(|row| row.len() == sources));
        let constants = (0..sources).flat_map(|j| rows.iter().map(move |row| row[j]));
        let tables = match kernel {
            Kernel::Avx512Gfni | Kernel::Avx2Gfni => {
                Tables::Matrices(constants.map(|c| bit_matrix(images(c))).collect())
            }
            Kernel::Avx2 | Kernel::Ssse3 | Kernel::Neon => {
                Tables::Nibbles(constants.map(|c| nibble_tables(images(c))).collect())
            }
            Kernel::Scalar => Tables::Constants(constants.collect()),
        };
        Self { kernel, rows: rows.len(), sources, tables }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Overwrites the first `len_bytes` of every output. `len_bytes` is a multiple of [`UNIT_ALIGN_BYTES`]; one output
    /// per row, one source per column, all of at least `len_bytes`.
    ///
    /// Panics when that does not hold, before a byte is touched: [`super::Plan::apply`] has checked what callers give.
    pub(super) fn run(&self, sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) {
        assert_eq!((sources.len(), out.len(), len_bytes % UNIT_ALIGN_BYTES), (self.sources, self.rows, 0));
        assert!(sources.iter().all(|source| source.len() >= len_bytes));
        assert!(out.iter().all(|unit| unit.len() >= len_bytes));
        match (self.kernel, &self.tables) {
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx512Gfni, Tables::Matrices(matrices)) => avx512_gfni::run(matrices, sources, out, len_bytes),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx2Gfni, Tables::Matrices(matrices)) => avx2_gfni::run(matrices, sources, out, len_bytes),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx2, Tables::Nibbles(nibbles)) => avx2::run(nibbles, sources, out, len_bytes),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Ssse3, Tables::Nibbles(nibbles)) => ssse3::run(nibbles, sources, out, len_bytes),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            (Kernel::Neon, Tables::Nibbles(nibbles)) => neon::run(nibbles, sources, out, len_bytes),
            (_, Tables::Constants(constants)) => scalar::run(constants, sources, out, len_bytes),
            #[allow(unreachable_patterns)] // `new` pairs them; kernels of other architectures are never available.
            (kernel, _) => unreachable!("kernel {kernel} does not run on this CPU"),
        }
    }
}

/// The addresses of one pass, in the form all vector kernels walk them: fixed arrays, so that the inner loop has no
/// slice to check.
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
struct Addresses<const R: usize> {
    sources: [*const u8; MAX_CHUNKS],
    count: usize,
    out: [*mut u8; R],
}

#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
impl<const R: usize> Addresses<R> {
    /// Panics unless there are R outputs, at most [`MAX_CHUNKS`] sources, R tables per source, `len_bytes` in every
    /// slice, and a whole number of column blocks: afterwards a kernel may read and write `len_bytes` at every address.
    fn checked(tables: usize, sources: &[&[u8]], out: &mut [&mut [u8]], len_bytes: usize) -> Self {
        assert!(len_bytes.is_multiple_of(UNIT_ALIGN_BYTES) && sources.len() <= MAX_CHUNKS);
        assert!(out.len() == R && tables == R * sources.len());
        let mut addresses =
            Self { sources: [std::ptr::null(); MAX_CHUNKS], count: sources.len(), out: [std::ptr::null_mut(); R] };
        for (address, source) in addresses.sources.iter_mut().zip(sources) {
            assert!(source.len() >= len_bytes);
            *address = source.as_ptr();
        }
        for (address, unit) in addresses.out.iter_mut().zip(out) {
            assert!(unit.len() >= len_bytes);
            *address = unit.as_mut_ptr();
        }
        addresses
    }
}

/// The twist as a bit matrix.
#[cfg(target_arch = "x86_64")]
const TWIST_MATRIX: u64 = bit_matrix(super::field::TWIST);

/// The twist as nibble tables.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const TWIST_NIBBLES: [u8; 32] = nibble_tables(super::field::TWIST);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_kernel_name_means_that_kernel_and_an_unknown_one_says_what_runs_here() {
        for kernel in Kernel::available() {
            assert_eq!(Kernel::choose(Some(format!(" {kernel}\n"))), Ok(kernel));
        }
        assert_eq!(Kernel::choose(None), Ok(Kernel::available().next().unwrap()));
        let refusal = Kernel::choose(Some("sse9".into())).unwrap_err().to_string();
        assert!(refusal.contains("\"sse9\"") && refusal.contains("scalar"), "{refusal}");
    }

    #[test]
    fn kernels_of_other_architectures_are_not_available() {
        let foreign = if cfg!(target_arch = "x86_64") { Kernel::Neon } else { Kernel::Avx2 };
        assert!(!foreign.is_available());
        assert!(Kernel::from_name(foreign.name()).is_err());
    }
}
