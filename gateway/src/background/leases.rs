//! Leases: at one time one gateway does each background task.
//!
//! A lease lives in the root shard as an epoch and a number of renewals; no clock is compared with another. Whoever
//! wants a task watches both numbers, and when they stood still for the TTL by its own monotonic clock it takes the
//! lease over, which raises the epoch. The holder renews several times within the TTL and stops its work by its own
//! clock before others may take over.
//!
//! That is for order, not for safety: a holder that is paused between looking at its clock and acting still acts. So
//! every command and chunk request of background work carries the [`LeaseStamp`], and shards and disks that heard of a
//! later epoch refuse it. Whoever is told so gives the lease up at once.
//!
//! There is one lease per task for the whole cluster, not one per object shard: the healer must weigh the extents of
//! all shards against each other to rebuild what is in most danger first, and one pace bounds what all repairs may read
//! and write.
//!
//! - [`Watch`]: pure; when a lease may be taken over;
//! - [`Holder`]: takes, renews, gives up; runs the work while it holds.

use crate::backoff::Backoff;
use crate::shards::buckets::{odd_answer, odd_reply};
use crate::shards::{random_id, random_per_mille, ShardError, Shards};
use bytes::Bytes;
use granary_meta::record::LeaseRecord;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::ShardId;
use granary_placement::lease::LeaseStamp;
use std::future::Future;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How leases are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseSettings {
    /// A lease that was not renewed for this long may be taken over. The holder renews three times in it. A record
    /// tells what its holder reckons with, so that holders and candidates of different minds do not meet.
    pub ttl: Duration,
}

impl LeaseSettings {
    fn ttl_ms(&self) -> u64 {
        u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX)
    }

    fn renew_every(&self) -> Duration {
        self.ttl / 3
    }

    /// How long a holder works on after its last renewal that was confirmed: less than the TTL, so that it stops first.
    fn work_on(&self) -> Duration {
        self.ttl * 2 / 3
    }
}

/// What a candidate has seen of a lease. Pure: the clock is handed in.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Watch {
    /// Epoch and renewals, and since when they have stood still.
    seen: Option<(u64, u64, Instant)>,
}

impl Watch {
    /// Looks at the lease as it is now. It has to stand still for `ttl` and for the time its holder reckons with. Some:
    /// it may be taken, by naming this epoch and these renewals.
    pub fn look(&mut self, lease: Option<&LeaseRecord>, now: Instant, ttl: Duration) -> Option<(u64, u64)> {
        let Some(lease) = lease else {
            self.seen = None;
            return Some((0, 0));
        };
        let numbers = (lease.epoch, lease.renewals);
        match self.seen {
            Some((epoch, renewals, since)) if (epoch, renewals) == numbers => {
                let ttl = ttl.max(Duration::from_millis(lease.ttl_ms));
                let stood_still = now.saturating_duration_since(since) >= ttl;
                (lease.holder.is_none() || stood_still).then_some(numbers)
            }
            _ => {
                self.seen = Some((numbers.0, numbers.1, now));
                lease.holder.is_none().then_some(numbers)
            }
        }
    }
}

/// A lease in hand. Clones are the same lease.
#[derive(Debug, Clone)]
pub struct Held {
    stamp: LeaseStamp,
    /// Who holds it: another one each time.
    holder: [u8; 16],
    /// What the root shard was told when it was taken.
    settings: LeaseSettings,
    /// When it was asked for: others count from then or later.
    taken_at: Instant,
    /// What the holder before published last.
    inherited: Bytes,
    lost: CancellationToken,
}

impl Held {
    /// What the holder before published last; empty when there was none.
    pub fn inherited(&self) -> &Bytes {
        &self.inherited
    }

    /// What every command and chunk request of the work carries.
    pub fn stamp(&self) -> &LeaseStamp {
        &self.stamp
    }

    /// A shard or disk refused the stamp: another holder has acted. The work ends.
    pub fn refused(&self, current: u64) {
        tracing::info!(task = %self.stamp.task, epoch = self.stamp.epoch, current, "the lease was taken over");
        self.lost.cancel();
    }

    /// Is it over?
    pub fn is_lost(&self) -> bool {
        self.lost.is_cancelled()
    }

    /// Ends when the lease is lost.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }
}

/// Wants one task for one gateway.
pub struct Holder {
    shards: Shards,
    settings: Box<dyn Fn() -> LeaseSettings + Send + Sync>,
    task: String,
    /// Where this gateway is found, for status pages.
    address: String,
    held: watch::Sender<Option<Held>>,
}

impl Holder {
    /// `settings` is asked before each look and each renewal; `address` is shown to operators.
    pub fn new(
        shards: Shards,
        settings: impl Fn() -> LeaseSettings + Send + Sync + 'static,
        task: &str,
        address: String,
    ) -> Holder {
        Holder { shards, settings: Box::new(settings), task: task.to_owned(), address, held: watch::Sender::new(None) }
    }

    /// The lease in hand, and news of it.
    pub fn held(&self) -> watch::Receiver<Option<Held>> {
        self.held.subscribe()
    }

    /// Waits for the lease, runs `work` while it holds it, and begins anew when it lost it; until `stop`, when it gives
    /// the lease back. `progress` is published with each renewal. Work is dropped at an await when the lease is lost.
    pub async fn run<F, W>(&self, progress: impl Fn() -> Bytes, work: W, stop: CancellationToken)
    where
        F: Future<Output = ()>,
        W: Fn(Held) -> F,
    {
        loop {
            let held = tokio::select! {
                () = stop.cancelled() => return,
                held = self.acquire() => held,
            };
            tracing::info!(task = %self.task, epoch = held.stamp.epoch, "took the lease");
            self.held.send_replace(Some(held.clone()));
            tokio::select! {
                () = stop.cancelled() => {}
                () = held.lost() => {}
                () = self.keep(&held, &progress) => {}
                () = work(held.clone()) => {}
            }
            held.lost.cancel();
            self.held.send_replace(None);
            if stop.is_cancelled() {
                self.release(&held).await;
                return;
            }
            tracing::warn!(task = %self.task, epoch = held.stamp.epoch, "lost the lease");
        }
    }

    /// Takes the lease as soon as that is possible.
    pub async fn acquire(&self) -> Held {
        let mut watch = Watch::default();
        let mut failed = 0u32;
        loop {
            let settings = (self.settings)();
            let backoff = Backoff { first: settings.renew_every() / 4, longest: settings.renew_every() };
            match self.try_acquire(&mut watch, settings).await {
                Ok(Some(held)) => return held,
                Ok(None) => failed = 0,
                Err(error) => {
                    failed = failed.saturating_add(1);
                    tracing::debug!(task = %self.task, %error, "leases cannot be asked for");
                }
            }
            // Somebody holds it: looked at as often as it is renewed.
            tokio::time::sleep(backoff.delay(if failed == 0 { 3 } else { failed }, random_per_mille())).await;
        }
    }

    async fn try_acquire(&self, watch: &mut Watch, settings: LeaseSettings) -> Result<Option<Held>, ShardError> {
        let root = ShardId::ROOT;
        let leases = match self.shards.query(root, Query::ListLeases).await? {
            Answer::Leases(leases) => leases,
            other => return Err(odd_answer(root, &other)),
        };
        let lease = leases.into_iter().find(|lease| lease.task == self.task);
        let Some((seen_epoch, seen_renewals)) = watch.look(lease.as_ref(), Instant::now(), settings.ttl) else {
            return Ok(None);
        };
        let (task, address) = (self.task.clone(), self.address.clone());
        let holder = random_id().map_err(|why| ShardError::Refused { shard: root, why })?;
        let ttl_ms = settings.ttl_ms();
        let take = Command::TakeLease { task: task.clone(), holder, address, ttl_ms, seen_epoch, seen_renewals };
        let taken_at = Instant::now();
        match self.shards.command(root, take).await? {
            Reply::Lease(taken) => Ok(Some(Held {
                stamp: LeaseStamp { task, epoch: taken.epoch },
                holder,
                settings,
                taken_at,
                inherited: lease.map(|lease| lease.progress).unwrap_or_default(),
                lost: CancellationToken::new(),
            })),
            Reply::LeaseHeld(_) | Reply::NoSuchLease => Ok(None),
            other => Err(odd_reply(root, &other)),
        }
    }

    /// Renews the lease; ends when it is another's, or when it may be, because no renewal was confirmed for too long.
    async fn keep(&self, held: &Held, progress: &impl Fn() -> Bytes) {
        // What counts is what the root shard has confirmed, and others know.
        let (mut confirmed, mut settings) = (held.taken_at, held.settings);
        loop {
            tokio::time::sleep(settings.renew_every()).await;
            let (sent, next) = (Instant::now(), (self.settings)());
            let left = (confirmed + settings.work_on()).saturating_duration_since(sent);
            let renew = Command::RenewLease {
                task: self.task.clone(),
                holder: held.holder,
                epoch: held.stamp.epoch,
                ttl_ms: next.ttl_ms(),
                progress: progress(),
            };
            match tokio::time::timeout(left, self.shards.command(ShardId::ROOT, renew)).await {
                Ok(Ok(Reply::Lease(_))) => (confirmed, settings) = (sent, next),
                Ok(Ok(Reply::LeaseHeld(now))) => return held.refused(now.epoch),
                Ok(Ok(other)) => {
                    tracing::warn!(task = %self.task, reply = ?other, "a lease could not be renewed");
                    return;
                }
                Ok(Err(error)) => tracing::debug!(task = %self.task, %error, "a lease was not renewed"),
                Err(_) => return,
            }
            if sent.saturating_duration_since(confirmed) >= settings.work_on() {
                return;
            }
        }
    }

    /// Gives the lease back, so that the next gateway need not wait. That it fails only costs the others the TTL.
    async fn release(&self, held: &Held) {
        let (task, holder, epoch) = (self.task.clone(), held.holder, held.stamp.epoch);
        let release = Command::ReleaseLease { task, holder, epoch };
        let _ = tokio::time::timeout(held.settings.renew_every(), self.shards.command(ShardId::ROOT, release)).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::metrics::Metrics;
    use crate::shards::memory::MemoryPeers;
    use crate::shards::tests::{map, HURRY};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::Arc;

    const TTL: Duration = Duration::from_millis(300);

    /// Who wants the lease, and the way of that gateway alone to the root shard.
    type Gateway = (Arc<MemoryPeers>, Arc<Holder>);

    fn gateways(count: usize) -> Vec<Gateway> {
        let root = MemoryPeers::new(&map(5, 2, 1));
        let gateway = |number: usize| {
            let peers = root.another_way();
            let map = watch::Sender::new(Some(Arc::new(map(5, 2, 1))));
            let shards = Shards::with_timing(peers.clone(), map, Metrics::new().unwrap(), HURRY);
            let address = format!("gateway-{number}:9001");
            (peers, Arc::new(Holder::new(shards, || LeaseSettings { ttl: TTL }, "heal", address)))
        };
        (0..count).map(gateway).collect()
    }

    fn lease(epoch: u64, renewals: u64, held: bool) -> LeaseRecord {
        LeaseRecord {
            task: "heal".to_owned(),
            epoch,
            renewals,
            holder: held.then_some([1; 16]),
            address: String::new(),
            ttl_ms: 0,
            taken_ms: 0,
            renewed_ms: 0,
            progress: Bytes::new(),
        }
    }

    #[test]
    fn a_lease_may_be_taken_when_it_stood_still_for_the_ttl_or_is_free() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        let mut look = |lease: Option<&LeaseRecord>, at_s: u64| {
            watch.look(lease, start + Duration::from_secs(at_s), Duration::from_secs(15))
        };
        assert_eq!(look(None, 0), Some((0, 0)));
        assert_eq!(look(Some(&lease(1, 0, true)), 0), None);
        assert_eq!(look(Some(&lease(1, 0, true)), 14), None);
        assert_eq!(look(Some(&lease(1, 1, true)), 15), None, "renewed");
        assert_eq!(look(Some(&lease(1, 1, true)), 29), None);
        assert_eq!(look(Some(&lease(1, 1, true)), 30), Some((1, 1)));
        assert_eq!(look(Some(&lease(2, 0, true)), 31), None, "another was faster");
        assert_eq!(look(Some(&lease(2, 0, false)), 32), Some((2, 0)), "given back");
        let patient = LeaseRecord { ttl_ms: 60_000, ..lease(3, 0, true) };
        assert_eq!((look(Some(&patient), 40), look(Some(&patient), 99)), (None, None), "its holder renews less often");
        assert_eq!(look(Some(&patient), 100), Some((3, 0)));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_holder_whose_ttl_is_raised_and_lowered_while_it_works_keeps_its_lease() {
        let root = MemoryPeers::new(&map(5, 2, 1));
        let ttl_ms = Arc::new(AtomicU64::new(300));
        let make = |ttl: Arc<AtomicU64>| {
            let map = watch::Sender::new(Some(Arc::new(map(5, 2, 1))));
            let shards = Shards::with_timing(root.another_way(), map, Metrics::new().unwrap(), HURRY);
            let settings = move || LeaseSettings { ttl: Duration::from_millis(ttl.load(Ordering::SeqCst)) };
            Holder::new(shards, settings, "heal", String::new())
        };
        let (holder, impatient) = (make(ttl_ms.clone()), make(Arc::new(AtomicU64::new(150))));
        let held = holder.acquire().await;
        let waiting = tokio::spawn(async move { impatient.acquire().await.stamp.epoch });
        let keeping = async {
            tokio::select! {
                () = holder.keep(&held, &Bytes::new) => panic!("the lease is gone"),
                () = tokio::time::sleep(Duration::from_secs(3)) => {}
            }
        };
        let changing = async {
            for ttl in [300, 2400, 200, 900] {
                ttl_ms.store(ttl, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(700)).await;
            }
        };
        tokio::join!(keeping, changing);
        assert!(!waiting.is_finished() && !held.is_lost());
        assert_eq!(waiting.await.unwrap(), 2, "once nobody renews it, it is taken");
    }

    /// Runs every gateway until `stop`. Gives how many are at work.
    fn run(gateways: &[Gateway], stop: &CancellationToken) -> Arc<AtomicU64> {
        struct AtWork(Arc<AtomicU64>);
        impl Drop for AtWork {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let now = Arc::new(AtomicU64::new(0));
        for (_, holder) in gateways {
            let (holder, stop, now) = (holder.clone(), stop.clone(), now.clone());
            tokio::spawn(async move {
                let work = |held: Held| {
                    let now = now.clone();
                    async move {
                        now.fetch_add(1, Ordering::SeqCst);
                        let _at_work = AtWork(now);
                        held.lost().await;
                    }
                };
                holder.run(|| Bytes::from_static(b"{}"), work, stop).await;
            });
        }
        now
    }

    async fn until(what: &str, done: impl Fn() -> bool) {
        for _ in 0..3000 {
            if done() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come about that {what}");
    }

    fn lease_now(peers: &MemoryPeers) -> Option<LeaseRecord> {
        match peers.query(ShardId::ROOT, &Query::ListLeases) {
            Answer::Leases(leases) => leases.into_iter().next(),
            other => panic!("{other:?}"),
        }
    }

    fn owner(gateways: &[Gateway]) -> Option<&Gateway> {
        gateways.iter().find(|(_, holder)| holder.held.borrow().is_some())
    }

    #[tokio::test]
    async fn a_lease_is_renewed_and_another_gateway_takes_over_when_its_holder_is_cut_off() {
        let gateways = gateways(3);
        let stop = CancellationToken::new();
        let now = run(&gateways, &stop);
        let renewals = || lease_now(&gateways[0].0).map_or(0, |lease| lease.renewals);
        until("a lease is renewed", || renewals() >= 3).await;
        for _ in 0..3 {
            let epoch = lease_now(&gateways[0].0).unwrap().epoch;
            let cut = loop {
                match owner(&gateways) {
                    Some(owner) => break owner,
                    None => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            };
            cut.0.cut_off(true);
            until("the one that is cut off stops", || cut.1.held.borrow().is_none()).await;
            until("another took over", || lease_now(&gateways[0].0).unwrap().epoch > epoch).await;
            until("one works", || now.load(Ordering::SeqCst) == 1 && owner(&gateways).is_some()).await;
            cut.0.cut_off(false);
        }
        stop.cancel();
        until("all have ended", || now.load(Ordering::SeqCst) == 0).await;
    }

    #[tokio::test]
    async fn a_stop_gives_the_lease_back_and_what_was_published_is_inherited() {
        let gateways = gateways(2);
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        run(&gateways[..1], &first);
        until("it publishes", || lease_now(&gateways[0].0).is_some_and(|lease| lease.renewals > 0)).await;
        first.cancel();
        until("it is given back", || lease_now(&gateways[0].0).unwrap().holder.is_none()).await;
        run(&gateways[1..], &second);
        until("the next holds it", || gateways[1].1.held.borrow().is_some()).await;
        assert_eq!(gateways[1].1.held.borrow().as_ref().unwrap().inherited()[..], b"{}"[..]);
    }

    #[tokio::test]
    async fn a_holder_that_is_told_of_a_successor_stops() {
        let gateways = gateways(1);
        let stop = CancellationToken::new();
        let now = run(&gateways, &stop);
        until("it works", || now.load(Ordering::SeqCst) == 1 && owner(&gateways).is_some()).await;
        let held = gateways[0].1.held.borrow().clone().unwrap();
        gateways[0].0.cut_off(true);
        held.refused(held.stamp().epoch + 1);
        until("it stops", || held.is_lost() && now.load(Ordering::SeqCst) == 0).await;
    }
}
