//! A set of chunk indices in one word.

use std::fmt;

/// A set of chunk indices: data chunks are 0..K, coding chunks K..K+M.
///
/// An index of 64 or more enters as 63, which no scheme has, so a plan that meets it answers with
/// [`CodecError::ChunkIndex`](super::CodecError::ChunkIndex) instead of silently losing it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ChunkSet(u64);

impl ChunkSet {
    /// The set of nothing.
    pub const EMPTY: Self = Self(0);

    /// The set whose bit `i` stands for chunk index `i`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The set of these indices.
    pub fn from_indices(indices: impl IntoIterator<Item = u8>) -> Self {
        indices.into_iter().fold(Self::EMPTY, |set, index| set.with(index))
    }

    /// The indices `start..end`.
    pub fn range(start: u8, end: u8) -> Self {
        Self::from_indices(start..end)
    }

    /// Bit `i` is set when chunk index `i` is a member.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// This set and one more index.
    #[must_use]
    pub fn with(self, index: u8) -> Self {
        Self(self.0 | 1 << index.min(63))
    }

    /// This set without one index.
    #[must_use]
    pub fn without(self, index: u8) -> Self {
        if index < 64 {
            Self(self.0 & !(1 << index))
        } else {
            self
        }
    }

    /// Adds one index.
    pub fn insert(&mut self, index: u8) {
        *self = self.with(index);
    }

    /// Takes one index out.
    pub fn remove(&mut self, index: u8) {
        *self = self.without(index);
    }

    /// Whether the index is a member.
    pub const fn contains(self, index: u8) -> bool {
        index < 64 && self.0 >> index & 1 == 1
    }

    /// Number of members.
    pub const fn len(self) -> u8 {
        self.0.count_ones() as u8
    }

    /// Whether there is no member.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Members of either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Members of both sets.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Members of this set that are not in the other.
    #[must_use]
    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The members, ascending.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..64).filter(move |&index| self.contains(index))
    }

    /// The largest member.
    pub const fn last(self) -> Option<u8> {
        if self.0 == 0 {
            None
        } else {
            Some(63 - self.0.leading_zeros() as u8)
        }
    }
}

impl FromIterator<u8> for ChunkSet {
    fn from_iter<I: IntoIterator<Item = u8>>(indices: I) -> Self {
        Self::from_indices(indices)
    }
}

impl fmt::Debug for ChunkSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_back_ascending() {
        let set = ChunkSet::from_indices([5, 0, 47, 5]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 5, 47]);
        assert_eq!((set.len(), set.last()), (3, Some(47)));
        assert_eq!(set.without(5).union(ChunkSet::range(1, 3)), [0, 1, 2, 47].into_iter().collect());
        assert_eq!(format!("{set:?}"), "{0, 5, 47}");
    }

    #[test]
    fn an_impossible_index_stays_visible() {
        let set = ChunkSet::from_indices([200]);
        assert_eq!(set.last(), Some(63));
        assert!(!set.contains(200));
        assert_eq!(set.without(200), set);
    }
}
