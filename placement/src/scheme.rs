//! Redundancy schemes: codec, K, M, unit and failure domain. A storage class names one.

use crate::codec::{MAX_K, MAX_M};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Unit of a stripe unless a scheme says otherwise, in bytes: two checksum blocks.
pub const DEFAULT_UNIT_BYTES: u32 = 128 * 1024;

/// Which code made the coding units. The number stands in every chunk header and object record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodecId {
    /// docs/formats/codec-np16.md; number 1.
    Np16,
}

impl CodecId {
    /// The number in binary headers.
    pub fn number(self) -> u8 {
        match self {
            CodecId::Np16 => 1,
        }
    }

    /// The codec of that number, if this build knows it.
    pub fn from_number(number: u8) -> Option<CodecId> {
        (number == 1).then_some(CodecId::Np16)
    }
}

/// What may fail as one: chunks of a group are spread over these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureDomain {
    /// Each disk on its own: one machine with several disks. No limit per server.
    Disk,
    /// At most M chunks of a group on one server.
    Server,
    /// At most M chunks of a group in one rack.
    Rack,
    /// At most M chunks of a group in one zone.
    Zone,
}

/// A redundancy scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scheme {
    /// The code.
    pub codec: CodecId,
    /// Data chunks per group, 1 to 32.
    pub k: u8,
    /// Coding chunks per group, 1 to 16.
    pub m: u8,
    /// One chunk's share of a full stripe, in bytes: a multiple of 64 KiB, at most 4 MiB.
    pub unit_bytes: u32,
    /// What may fail as one.
    pub failure_domain: FailureDomain,
}

/// A scheme that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemeError {
    /// Not of the form K+M.
    #[error("scheme `{0}` is not of the form K+M, for example 4+2")]
    Form(String),
    /// K or M out of range.
    #[error("scheme {k}+{m}: K must be 1 to {MAX_K} and M 1 to {MAX_M}")]
    Range {
        /// Data chunks asked for.
        k: u32,
        /// Coding chunks asked for.
        m: u32,
    },
    /// A unit no stripe can have.
    #[error("unit of {0} bytes: must be a multiple of 65536, at most 4194304")]
    Unit(u32),
}

impl Scheme {
    /// A scheme with the default unit.
    ///
    /// # Errors
    /// [`SchemeError::Range`] when K or M is out of range.
    pub fn new(k: u8, m: u8, failure_domain: FailureDomain) -> Result<Scheme, SchemeError> {
        let scheme = Scheme { codec: CodecId::Np16, k, m, unit_bytes: DEFAULT_UNIT_BYTES, failure_domain };
        scheme.validate().map(|()| scheme)
    }

    /// Checks the limits; every scheme from a map or a setting passes here before use.
    ///
    /// # Errors
    /// The limit that is broken.
    pub fn validate(&self) -> Result<(), SchemeError> {
        if self.k == 0 || self.k > MAX_K || self.m == 0 || self.m > MAX_M {
            return Err(SchemeError::Range { k: self.k.into(), m: self.m.into() });
        }
        if self.unit_bytes == 0 || !self.unit_bytes.is_multiple_of(65536) || self.unit_bytes > 4 * 1024 * 1024 {
            return Err(SchemeError::Unit(self.unit_bytes));
        }
        Ok(())
    }

    /// Chunks per group, K+M.
    pub fn width(&self) -> usize {
        usize::from(self.k) + usize::from(self.m)
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.k, self.m)
    }
}

/// K and M as an operator writes them: `4+2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KPlusM {
    /// Data chunks.
    pub k: u8,
    /// Coding chunks.
    pub m: u8,
}

impl FromStr for KPlusM {
    type Err = SchemeError;
    fn from_str(text: &str) -> Result<KPlusM, SchemeError> {
        let form = || SchemeError::Form(text.to_owned());
        let (k, m) = text.split_once('+').ok_or_else(form)?;
        let k: u32 = k.trim().parse().map_err(|_| form())?;
        let m: u32 = m.trim().parse().map_err(|_| form())?;
        if k == 0 || k > MAX_K.into() || m == 0 || m > MAX_M.into() {
            return Err(SchemeError::Range { k, m });
        }
        Ok(KPlusM { k: k as u8, m: m as u8 })
    }
}
