//! One budget of bytes for the payloads that this gateway has in memory, whoever they belong to.
//!
//! Bytes are granted before they are read from a client or a disk, and the grant travels with them ([`Grant::with`]):
//! it is given back when the last slice of them is dropped, wherever that is.
//!
//! Nothing waits in a circle:
//! - reads never wait for memory. What they cannot get at once they do without: a reader that gets no window goes on
//!   block by block, one block in memory at a time ([`FLOOR_BYTES`] for each request, beside the budget);
//! - writes wait only while they hold nothing that needs another grant to be let go. A payload that is kept for another
//!   attempt is dropped before its owner waits; one that is being written again is refused instead. Stripes on their
//!   way to disks are let go by the disks' deadlines;
//! - a write that holds memory while its client sends nothing is given up after a short time when others wait;
//! - reads and writes have shares of their own, so that a copy, which is both, waits for writes only.
//!
//! Writes are granted in order of arrival. A part of their share goes the other way round, to the newest who waits: a
//! thousand clients that stopped half way stand in front of a queue for ever, and a fast one that comes then does not
//! wait behind them.

use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// What every reader may have in memory when the budget has nothing left.
pub(crate) const FLOOR_BYTES: u64 = 64 * 1024;

/// Bytes that are left, by whom they are for.
#[derive(Debug)]
struct Left {
    reads: u64,
    /// For writes in order of arrival.
    writes: u64,
    /// For the newest write that waits.
    newest: u64,
    waiting: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    grant: oneshot::Sender<Grant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Share {
    Reads,
    Writes,
    Newest,
}

#[derive(Debug)]
struct Inner {
    /// How many bytes the shares of reads, and of writes in order of arrival, have in all.
    reads: u64,
    writes: u64,
    left: Mutex<Left>,
}

/// The budget; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Inner>);

/// Bytes of the budget; given back when dropped.
#[derive(Debug)]
pub(crate) struct Grant {
    of: Arc<Inner>,
    bytes: u64,
    share: Share,
}

/// Bytes with the grant for them.
struct Granted(Bytes, #[allow(dead_code)] Arc<Grant>); // held, never looked at

impl AsRef<[u8]> for Granted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Grant {
    /// The same bytes; this grant is held until the last slice of them is gone.
    pub(crate) fn with(grant: &Arc<Grant>, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Granted(bytes, grant.clone()))
    }
}

impl Grant {
    /// Takes over what another one of the same budget and share holds.
    pub(crate) fn absorb(&mut self, mut other: Grant) {
        if self.share == other.share && Arc::ptr_eq(&self.of, &other.of) {
            self.bytes += std::mem::take(&mut other.bytes);
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let late = {
            let mut left = self.of.left();
            match self.share {
                Share::Reads => left.reads += self.bytes,
                Share::Writes => left.writes += self.bytes,
                Share::Newest => left.newest += self.bytes,
            }
            if self.share == Share::Reads {
                return;
            }
            serve(&self.of, &mut left)
        };
        // Grants for who stopped waiting at this moment; after the lock, because dropping them takes it.
        drop(late);
    }
}

impl Inner {
    fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives what is left to who waits: the oldest, then from their own share the newest. Returns what nobody took.
fn serve(of: &Arc<Inner>, left: &mut Left) -> Vec<Grant> {
    let mut late = Vec::new();
    left.waiting.retain(|waiter| !waiter.grant.is_closed());
    while let Some(first) = left.waiting.pop_front() {
        if first.bytes > left.writes {
            left.waiting.push_front(first);
            break;
        }
        left.writes -= first.bytes;
        let grant = Grant { of: of.clone(), bytes: first.bytes, share: Share::Writes };
        late.extend(first.grant.send(grant).err());
    }
    while let Some(last) = left.waiting.pop_back() {
        if last.bytes > left.newest {
            left.waiting.push_back(last);
            break;
        }
        left.newest -= last.bytes;
        let grant = Grant { of: of.clone(), bytes: last.bytes, share: Share::Newest };
        late.extend(last.grant.send(grant).err());
    }
    late
}

impl Budget {
    /// A budget of so many bytes: three eighths for reads, half for writes in order of arrival, an eighth for the
    /// newest write.
    pub(crate) fn new(bytes: u64) -> Budget {
        let (reads, newest) = (bytes / 8 * 3, bytes / 8);
        let writes = bytes - reads - newest;
        let left = Left { reads, writes, newest, waiting: VecDeque::new() };
        Budget(Arc::new(Inner { reads, writes, left: Mutex::new(left) }))
    }

    /// Bytes for a read; None when there are not so many now.
    pub(crate) fn try_read(&self, bytes: u64) -> Option<Grant> {
        let mut left = self.0.left();
        left.reads = left.reads.checked_sub(bytes)?;
        Some(Grant { of: self.0.clone(), bytes, share: Share::Reads })
    }

    /// Whether reads may take memory for what nobody asked for yet.
    pub(crate) fn may_prefetch(&self) -> bool {
        self.0.left().reads > self.0.reads / 2
    }

    /// Bytes for a write, more than all of the share counting as all of it; None when others wait or there are not so
    /// many now.
    pub(crate) fn try_write(&self, bytes: u64) -> Option<Grant> {
        let bytes = bytes.min(self.0.writes);
        let mut left = self.0.left();
        left.waiting.retain(|waiter| !waiter.grant.is_closed());
        let share = if left.waiting.is_empty() && bytes <= left.writes {
            left.writes -= bytes;
            Share::Writes
        } else if bytes <= left.newest {
            // Who asks now is the newest.
            left.newest -= bytes;
            Share::Newest
        } else {
            return None;
        };
        Some(Grant { of: self.0.clone(), bytes, share })
    }

    /// As [`Budget::try_write`], and waits. Nothing is taken when the future is dropped.
    pub(crate) async fn write(&self, bytes: u64) -> Grant {
        let bytes = bytes.min(self.0.writes);
        loop {
            if let Some(grant) = self.try_write(bytes) {
                return grant;
            }
            let (grant, granted) = oneshot::channel();
            let late = {
                let mut left = self.0.left();
                left.waiting.push_back(Waiter { bytes, grant });
                // Something may have come back since it was tried.
                serve(&self.0, &mut left)
            };
            drop(late);
            if let Ok(grant) = granted.await {
                return grant;
            }
        }
    }

    /// Whether a write waits for memory.
    pub(crate) fn is_short(&self) -> bool {
        let mut left = self.0.left();
        left.waiting.retain(|waiter| !waiter.grant.is_closed());
        !left.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use futures::FutureExt;

    /// 30 for reads, 40 for writes, 10 for the newest.
    fn budget() -> Budget {
        Budget::new(80)
    }

    /// Bytes granted now: of reads, and of writes.
    fn granted(budget: &Budget) -> [u64; 2] {
        let left = budget.0.left();
        [30 - left.reads, 50 - left.writes - left.newest]
    }

    #[test]
    fn reads_take_what_is_there_and_never_wait() {
        let budget = budget();
        let first = budget.try_read(20).unwrap();
        assert!(budget.try_read(11).is_none() && !budget.may_prefetch());
        let second = budget.try_read(10).unwrap();
        assert_eq!(granted(&budget), [30, 0]);
        drop((first, second));
        assert!(budget.may_prefetch());
        assert_eq!(granted(&budget), [0, 0]);
    }

    #[test]
    fn a_grant_is_held_by_the_last_slice_of_its_bytes() {
        let budget = budget();
        let grant = Arc::new(budget.try_read(30).unwrap());
        let bytes = Grant::with(&grant, Bytes::from_static(b"some bytes"));
        let (slice, empty) = (bytes.slice(2..4), bytes.slice(0..0));
        drop((grant, bytes, empty));
        assert_eq!((&slice[..], granted(&budget)), (&b"me"[..], [30, 0]));
        drop(slice);
        assert_eq!(granted(&budget), [0, 0]);
    }

    #[test]
    fn writes_wait_in_order_and_the_newest_has_a_share_of_its_own() {
        let budget = budget();
        let mut all = Some(budget.try_write(40).unwrap());
        let mut newest = Some(budget.try_write(10).unwrap());
        assert!(budget.try_write(1).is_none() && !budget.is_short());
        let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(budget.write(10))).collect();
        for write in &mut waiting {
            assert!(write.now_or_never().is_none());
        }
        assert!(budget.is_short());
        newest.take();
        let last = waiting.pop().unwrap().now_or_never().expect("the newest comes first here");
        assert!(waiting.iter_mut().all(|write| write.now_or_never().is_none()));
        // Given up: it takes nothing, and keeps nobody waiting.
        drop(waiting.remove(0));
        all.take();
        let rest: Vec<Grant> = waiting.into_iter().map(|write| write.now_or_never().unwrap()).collect();
        assert_eq!((granted(&budget), budget.is_short()), ([0, 30], false));
        drop((rest, last));
        assert_eq!(granted(&budget), [0, 0]);
    }

    #[test]
    fn more_than_there_ever_is_counts_as_all_there_is() {
        let budget = budget();
        let all = budget.write(1 << 40).now_or_never().unwrap();
        assert_eq!(granted(&budget), [0, 40]);
        drop(all);
        assert!(budget.try_write(1 << 40).is_some());
    }

    #[tokio::test]
    async fn many_writes_of_all_sizes_all_get_their_turn() {
        let budget = budget();
        let writes: Vec<_> = (0..500u64)
            .map(|n| {
                let budget = budget.clone();
                tokio::spawn(async move {
                    for turn in 0..4 {
                        let grant = budget.write(1 + (n * 7 + turn * 13) % 50).await;
                        tokio::task::yield_now().await;
                        drop(grant);
                    }
                })
            })
            .collect();
        for write in writes {
            write.await.unwrap();
        }
        assert_eq!((granted(&budget), budget.is_short()), ([0, 0], false));
    }
}
