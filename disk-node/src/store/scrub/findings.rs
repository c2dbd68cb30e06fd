//! The chunks that the scrub found damaged: a list in the index, for whoever repairs them to read.
//!
//! An entry names the record, so that it says nothing of another one which has taken its place. It leaves the list when
//! its chunk is replaced, deleted, or read again and found good; one of those of a record that is gone is taken off
//! when somebody reads the list.

use crate::label::now_ms;
use crate::store::index::{Batch, Finding, Location};
use crate::store::shared::{lock, Shared};
use crate::store::StoreError;
use granary_wire::chunk::{ChunkId, ChunkInfo};

/// Findings on the list at most. A disk with more is to be replaced rather than repaired.
pub const MAX_FINDINGS: u64 = 10_000;

/// Entries looked at together when all are counted.
const COUNT_PAGE: usize = 1000;

/// Some of the list, and the last chunk that was looked at when there is more.
type Page = (Vec<(ChunkId, Location)>, Option<ChunkId>);

impl Shared {
    /// How many chunks are on the list.
    pub fn findings_count(&self) -> u64 {
        *lock(&self.findings)
    }

    /// Counts the list, and takes off it what is not damaged any more.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn count_findings(&self) -> Result<u64, StoreError> {
        let mut count = lock(&self.findings);
        let (mut after, mut counted) = (None, 0);
        loop {
            let (listed, next) = self.look_at_findings(&mut count, after.as_ref(), COUNT_PAGE)?;
            counted += listed.len() as u64;
            match next {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        *count = counted;
        self.metrics.scrub_damaged.set(i64::try_from(counted).unwrap_or(i64::MAX));
        Ok(counted)
    }

    /// Chunks that are damaged, in order of their ids, after that one; whether there are more.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    pub fn damaged_chunks(&self, after: Option<ChunkId>, limit: usize) -> Result<(Vec<ChunkInfo>, bool), StoreError> {
        self.check_running()?;
        let mut count = lock(&self.findings);
        if *count == 0 {
            return Ok((Vec::new(), false));
        }
        let (mut chunks, mut after) = (Vec::new(), after);
        loop {
            let (listed, next) = self.look_at_findings(&mut count, after.as_ref(), limit.max(1))?;
            let now_ms = now_ms();
            chunks.extend(listed.into_iter().map(|(id, at)| ChunkInfo {
                id,
                spec: at.spec,
                age_ms: now_ms.saturating_sub(at.spec.created_ms),
                quarantined_ms: None,
            }));
            // A page of entries of which all were taken off says nothing of what comes after it.
            match next {
                Some(last) if chunks.is_empty() => after = Some(last),
                next => return Ok((chunks, next.is_some())),
            }
        }
    }

    /// One page of the list, without what was taken off it now, and where it ended when there is more.
    fn look_at_findings(&self, count: &mut u64, after: Option<&ChunkId>, limit: usize) -> Result<Page, StoreError> {
        let mut found = self.index.findings(after, limit + 1).map_err(|error| self.fail_index(&error))?;
        let more = found.len() > limit;
        found.truncate(limit);
        let last = found.last().map(|(id, _)| *id).filter(|_| more);
        let (mut listed, mut gone) = (Vec::new(), Batch::default());
        for (id, finding) in found {
            match self.index.chunk(&id).map_err(|error| self.fail_index(&error))? {
                Some(at) if at.sequence == finding.sequence => listed.push((id, at)),
                _ => {
                    gone.remove_finding(&id);
                    *count = count.saturating_sub(1);
                }
            }
        }
        self.write_findings(gone, *count)?;
        Ok((listed, last))
    }

    /// A record is damaged, unless it is not that of its chunk any more. True when it is on the list now.
    pub(super) fn add_finding(&self, id: &ChunkId, at: &Location) -> Result<bool, StoreError> {
        let mut count = lock(&self.findings);
        let fail = |error| self.fail_index(&error);
        if self.index.chunk(id).map_err(fail)? != Some(*at) {
            return Ok(false);
        }
        // Readers keep headers: this one is to be read from the disk from now on.
        self.headers.remove(&(*id, at.sequence));
        let known = self.index.finding(id).map_err(fail)?;
        if known.is_some_and(|known| known.sequence == at.sequence) {
            return Ok(true);
        }
        *count += u64::from(known.is_none());
        let mut batch = Batch::default();
        batch.put_finding(id, &Finding { sequence: at.sequence, found_ms: now_ms() });
        self.write_findings(batch, *count)?;
        Ok(true)
    }

    /// All of this record was read and is good.
    pub(in crate::store) fn drop_finding(&self, id: &ChunkId, sequence: u64) -> Result<(), StoreError> {
        let mut count = lock(&self.findings);
        if *count == 0 {
            return Ok(());
        }
        let known = self.index.finding(id).map_err(|error| self.fail_index(&error))?;
        if known.is_none_or(|known| known.sequence > sequence) {
            return Ok(());
        }
        *count = count.saturating_sub(1);
        let mut batch = Batch::default();
        batch.remove_finding(id);
        self.write_findings(batch, *count)
    }

    fn write_findings(&self, batch: Batch, count: u64) -> Result<(), StoreError> {
        self.metrics.scrub_damaged.set(i64::try_from(count).unwrap_or(0));
        self.index.write(batch).map_err(|error| self.fail_index(&error))
    }
}
