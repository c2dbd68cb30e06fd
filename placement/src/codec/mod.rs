//! The erasure code np16.

/// Most data chunks a scheme may have.
pub const MAX_K: u8 = 32;
/// Most coding chunks a scheme may have.
pub const MAX_M: u8 = 16;
