//! A type for every id. Numbers are assigned once and never reused; random ids are 128 bits from the operating system.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Text that is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}")]
pub struct ParseIdError {
    /// The text as it came.
    pub text: String,
    /// What was expected.
    pub what: &'static str,
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $int:ty, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                text.parse().map($name).map_err(|_| ParseIdError { text: text.to_owned(), what: $what })
            }
        }
    };
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                for byte in self.0 {
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let bad = || ParseIdError { text: text.to_owned(), what: $what };
                let mut id = [0u8; 16];
                if text.len() != 32 || !text.is_ascii() {
                    return Err(bad());
                }
                for (place, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
                    *place = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
                }
                Ok($name(id))
            }
        }

        // Text in JSON (labels, maps, reports), bytes in compact formats (records, frames).
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; 16]>::deserialize(deserializer).map($name)
                }
            }
        }
    };
}

random_id!(
    /// One cluster. Every disk label, connection and map names it.
    ClusterId, "cluster id (32 hex digits)"
);
random_id!(
    /// One physical disk, written on its label. A disk that comes back in another slot is still itself.
    DiskUuid, "disk UUID (32 hex digits)"
);
random_id!(
    /// One extent, made by the gateway that writes it.
    ExtentId, "extent id (32 hex digits)"
);
number_id!(
    /// A disk's number in the cluster map, and the Raft node id of the replicas it holds. Never reused.
    DiskId, u32, "disk id"
);
number_id!(
    /// Version of the cluster map: each change adds one.
    Epoch, u64, "epoch"
);
number_id!(
    /// One placement group.
    PlacementGroupId, u32, "placement group id"
);
number_id!(
    /// One metadata shard. Zero is the root shard; objects live in 1 and up.
    ShardId, u16, "shard id"
);

number_id!(
    /// One of the [`HASH_SLOTS`] parts of the key space, 0 to 4,095. Which shard owns it stands in the cluster map; the
    /// hash slot of a key never changes, so it can be written down with data for good.
    HashSlot, u16, "hash slot"
);

/// How many hash slots there are, in every cluster. Part of the format of the map, of chunk headers and of chunk
/// requests.
pub const HASH_SLOTS: u16 = 4096;

impl HashSlot {
    /// The hash slot with that number; None from [`HASH_SLOTS`] on.
    pub fn new(number: u16) -> Option<HashSlot> {
        (number < HASH_SLOTS).then_some(HashSlot(number))
    }

    /// The hash slot of (bucket, key): FNV-1a 64 over the bucket number (big-endian) and the key's bytes, finished, and
    /// folded over the slots by a multiply-shift.
    pub fn of(bucket: u64, key: &str) -> HashSlot {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in bucket.to_be_bytes().iter().chain(key.as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        // FNV's high bits mix poorly on short keys; one finalising round spreads them before the multiply-shift.
        hash ^= hash >> 32;
        hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
        HashSlot(((u128::from(hash) * u128::from(HASH_SLOTS)) >> 64) as u16)
    }
}

impl ShardId {
    /// The shard that owns the cluster map, buckets, accounts, keys and leases.
    pub const ROOT: ShardId = ShardId(0);
}
