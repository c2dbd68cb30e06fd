//! What the codec refuses.

use thiserror::Error;

/// Why a codec could not be made, planned or applied. Apart from [`CodecError::NotEnough`], which a reader meets when
/// too many disks are gone, every variant is a fault of the caller, of the settings, or of the build.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CodecError {
    /// K or M is outside what np16 is defined for.
    #[error("np16 needs K from 1 to 32 and M from 1 to 16, not {k}+{m}")]
    Scheme {
        /// Data chunks asked for.
        k: u8,
        /// Coding chunks asked for.
        m: u8,
    },
    /// Fewer chunks are present than the scheme needs: nothing can be decoded until more come back.
    #[error("{present} chunks are present, {needed} are needed")]
    NotEnough {
        /// Chunks present.
        present: u8,
        /// Chunks needed, the K of the scheme.
        needed: u8,
    },
    /// A chunk index is not one of the scheme's.
    #[error("chunk index {index} does not exist in a scheme of {chunks} chunks")]
    ChunkIndex {
        /// The index given.
        index: u8,
        /// Number of chunks of the scheme, K+M.
        chunks: u8,
    },
    /// The number of units handed in does not fit the scheme or the plan.
    #[error("{given} {role} units were given, {needed} are needed")]
    UnitCount {
        /// "source" or "output".
        role: &'static str,
        /// Units given.
        given: usize,
        /// Units needed.
        needed: usize,
    },
    /// Units of one call must have one length, and that must be even: a symbol is two bytes.
    #[error("a {role} unit has {given} bytes where an even length, equal for all, was needed ({needed} bytes in the first source)")]
    UnitLength {
        /// "source" or "output".
        role: &'static str,
        /// Length of the offending unit in bytes.
        given: usize,
        /// Length of the first source in bytes.
        needed: usize,
    },
    /// The kernel asked for is unknown, or this CPU lacks it.
    #[error("codec kernel {name:?} cannot run here; this CPU runs: {available}")]
    Kernel {
        /// The name asked for.
        name: String,
        /// Names that would work, separated by commas.
        available: String,
    },
    /// The codec does not agree with its own definition. No byte may be coded with it.
    #[error("np16 does not agree with its definition: {detail}")]
    Broken {
        /// What differed.
        detail: String,
    },
}

impl CodecError {
    pub(super) fn broken(detail: impl Into<String>) -> Self {
        Self::Broken { detail: detail.into() }
    }
}
