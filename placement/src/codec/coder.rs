//! [`Codec`]: the door to np16 for one K and M.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::plan::usable;
use super::{ChunkSet, CodecError, Kernel, Plan, MAX_K, MAX_M};

/// Plans kept per codec. A plan takes microseconds to make and some kilobytes to keep; a cluster in trouble shows as
/// many loss patterns at once as it has placement groups with lost disks, mostly the same few.
const CACHED_PLANS: usize = 256;

/// np16 for one scheme's K and M. Cheap to clone; clones share the cache of plans.
#[derive(Clone)]
pub struct Codec {
    shared: Arc<Shared>,
}

struct Shared {
    k: u8,
    m: u8,
    kernel: Kernel,
    encode: Plan,
    plans: Mutex<PlanCache>,
}

impl Codec {
    /// The codec of `k` data and `m` coding chunks, on the kernel [`Kernel::chosen`] names, or the fastest.
    ///
    /// Errors: [`CodecError::Scheme`] unless K is 1 to 32 and M is 1 to 16; [`CodecError::Broken`] when the crate that
    /// defines the code gives another matrix than the pinned one.
    pub fn new(k: u8, m: u8) -> Result<Self, CodecError> {
        Self::with_kernel(k, m, Kernel::chosen().unwrap_or_else(|_| Kernel::fastest()))
    }

    /// The same on a kernel of the caller's choice: for tests and benchmarks. All kernels give the same bytes.
    ///
    /// Errors: as [`Codec::new`], and [`CodecError::Kernel`] when this CPU lacks the kernel.
    pub fn with_kernel(k: u8, m: u8, kernel: Kernel) -> Result<Self, CodecError> {
        if !(1..=MAX_K).contains(&k) || !(1..=MAX_M).contains(&m) {
            return Err(CodecError::Scheme { k, m });
        }
        let kernel = Kernel::from_name(kernel.name())?;
        let encode = Plan::new(k, kernel, ChunkSet::range(0, k), ChunkSet::range(k, k + m))?;
        Ok(Self { shared: Arc::new(Shared { k, m, kernel, encode, plans: Mutex::default() }) })
    }

    /// Number of data chunks.
    pub fn k(&self) -> u8 {
        self.shared.k
    }

    /// Number of coding chunks.
    pub fn m(&self) -> u8 {
        self.shared.m
    }

    /// The kernel this codec runs on.
    pub fn kernel(&self) -> Kernel {
        self.shared.kernel
    }

    /// Computes the M coding units of one stripe, or of the same byte range of all its units. `data` holds the K data
    /// units in order, `coding` receives chunks K to K+M-1 and is overwritten.
    ///
    /// One even length for all; multiples of [`UNIT_ALIGN_BYTES`](super::UNIT_ALIGN_BYTES) are fastest. Addresses need
    /// no alignment.
    ///
    /// Errors: [`CodecError::UnitCount`] and [`CodecError::UnitLength`], before any output is touched.
    pub fn encode(&self, data: &[&[u8]], coding: &mut [&mut [u8]]) -> Result<(), CodecError> {
        // No entry of the matrix is zero, so the plan's sources are exactly the K data chunks in order.
        self.shared.encode.apply(data, coding)
    }

    /// How to compute the `wanted` chunks, data or coding, from the `present` ones. Reads data chunks in preference to
    /// coding chunks; a wanted chunk that is present stands for itself, at the cost of a copy. Plans are cached.
    ///
    /// Errors: [`CodecError::NotEnough`] for fewer than K present; [`CodecError::ChunkIndex`] for an index outside K+M.
    pub fn plan(&self, present: ChunkSet, wanted: ChunkSet) -> Result<Arc<Plan>, CodecError> {
        let Shared { k, m, kernel, ref plans, .. } = *self.shared;
        let key = (usable(k, m, present, wanted)?, wanted);
        if let Some(plan) = lock(plans).by_key.get(&key) {
            return Ok(plan.clone());
        }
        // Made outside the lock: two callers may make the same plan once, and nobody waits for another's arithmetic.
        let plan = Arc::new(Plan::new(k, kernel, key.0, wanted)?);
        lock(plans).insert(key, plan.clone());
        Ok(plan)
    }
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Codec(np16 {}+{} on {})", self.shared.k, self.shared.m, self.shared.kernel)
    }
}

/// A plan that was inserted by a thread that then panicked is still a whole plan.
fn lock(plans: &Mutex<PlanCache>) -> std::sync::MutexGuard<'_, PlanCache> {
    plans.lock().unwrap_or_else(PoisonError::into_inner)
}

type PlanKey = (ChunkSet, ChunkSet);

/// First in, first out: at most [`CACHED_PLANS`] entries, and `order` holds exactly the keys of `by_key`.
#[derive(Default)]
struct PlanCache {
    by_key: HashMap<PlanKey, Arc<Plan>>,
    order: VecDeque<PlanKey>,
}

impl PlanCache {
    fn insert(&mut self, key: PlanKey, plan: Arc<Plan>) {
        if self.by_key.insert(key, plan).is_some() {
            return;
        }
        self.order.push_back(key);
        if self.order.len() > CACHED_PLANS {
            if let Some(oldest) = self.order.pop_front() {
                self.by_key.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn schemes_outside_the_limits_are_refused() {
        for (k, m) in [(0, 1), (1, 0), (33, 1), (1, 17), (255, 255)] {
            assert_eq!(Codec::new(k, m).unwrap_err(), CodecError::Scheme { k, m });
        }
        assert_eq!(Codec::new(32, 16).map(|codec| (codec.k(), codec.m())), Ok((32, 16)));
    }

    #[test]
    fn losses_with_the_same_usable_chunks_share_a_plan() {
        let codec = Codec::new(4, 3).unwrap();
        let wanted = ChunkSet::from_indices([1]);
        let one = codec.plan(ChunkSet::from_indices([0, 2, 3, 4]), wanted).unwrap();
        let other = codec.clone().plan(ChunkSet::from_indices([0, 2, 3, 4, 6]), wanted).unwrap();
        assert!(Arc::ptr_eq(&one, &other));
    }

    #[test]
    fn cache_of_plans_stays_bounded_and_an_evicted_plan_is_made_again() {
        let codec = Codec::new(16, 4).unwrap();
        let all = ChunkSet::range(0, 20);
        for a in 0..20 {
            for b in 0..a {
                for c in 0..b {
                    let lost = ChunkSet::from_indices([a, b, c]);
                    let plan = codec.plan(all.difference(lost), lost).unwrap();
                    assert_eq!(plan.wanted(), lost.iter().collect::<Vec<_>>());
                }
            }
        }
        let cache = lock(&codec.shared.plans);
        assert_eq!((cache.by_key.len(), cache.order.len()), (CACHED_PLANS, CACHED_PLANS));
    }
}
