//! How many bytes of a log lie in front of each place of it, roughly: enough to bound the log by bytes.

use std::collections::VecDeque;

/// Entries are counted together up to this many bytes.
const STEP_BYTES: u64 = 1024 * 1024;

/// Entries that are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step {
    first: u64,
    bytes: u64,
}

/// The bytes of a log's entries, in steps of about a mebibyte.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogBytes {
    steps: VecDeque<Step>,
    total: u64,
}

impl LogBytes {
    /// An entry of so many bytes was put at the end.
    pub fn push(&mut self, index: u64, bytes: u64) {
        match self.steps.back_mut() {
            Some(step) if step.bytes < STEP_BYTES => step.bytes += bytes,
            _ => self.steps.push_back(Step { first: index, bytes }),
        }
        self.total += bytes;
    }

    /// Entries from this index on are gone. The step that it falls into is counted whole.
    pub fn truncate(&mut self, first_gone: u64) {
        while let Some(step) = self.steps.back().copied().filter(|step| step.first >= first_gone) {
            self.steps.pop_back();
            self.total -= step.bytes;
        }
    }

    /// Entries up to this index are gone. The step that it falls into is counted whole.
    pub fn purge(&mut self, last_gone: u64) {
        while self.steps.get(1).is_some_and(|next| next.first <= last_gone.saturating_add(1)) {
            if let Some(step) = self.steps.pop_front() {
                self.total -= step.bytes;
            }
        }
    }

    /// Bytes of all entries.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The entry up to which all must go so that at most so many bytes stay; None when nothing must, or the last step
    /// alone is longer.
    pub fn purge_to_keep(&self, keep_bytes: u64) -> Option<u64> {
        let mut left = self.total;
        let mut upto = None;
        for (step, next) in self.steps.iter().zip(self.steps.iter().skip(1)) {
            if left <= keep_bytes {
                break;
            }
            left -= step.bytes;
            upto = next.first.checked_sub(1);
        }
        upto
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: u64 = STEP_BYTES / 2;

    #[test]
    fn bytes_are_counted_in_steps_and_purged_to_what_is_kept() {
        let mut log = LogBytes::default();
        for index in 10..20 {
            log.push(index, HALF);
        }
        assert_eq!((log.total(), log.steps.len()), (10 * HALF, 5));
        assert_eq!(log.purge_to_keep(10 * HALF), None);
        assert_eq!(log.purge_to_keep(10 * HALF - 1), Some(11));
        assert_eq!(log.purge_to_keep(4 * HALF), Some(15));
        assert_eq!(log.purge_to_keep(0), Some(17), "the last step stays");
        log.purge(14);
        assert_eq!(log.total(), 6 * HALF, "13 and 14 go with the step that 14 ends");
        log.truncate(17);
        assert_eq!(log.total(), 4 * HALF);
        log.push(17, 5 * STEP_BYTES);
        assert_eq!(log.purge_to_keep(STEP_BYTES), Some(16));
        log.truncate(0);
        assert_eq!(log, LogBytes::default());
    }
}
