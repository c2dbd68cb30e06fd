//! How long the healer rests between two looks at the queues, and what ends a rest before its time.
//!
//! Each look asks every shard, and each question costs its disks a round of the majority. So queues in which nothing
//! was for a while are looked at less often; what a disk that went or came, or slots that are to move, bring with them
//! is not waited for.

use super::{change, HealSettings};
use granary_placement::map::ClusterMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{watch, Notify};

/// Looks that found nothing, and no change of a disk or of the map, before the queues are looked at less often.
const IDLE_LOOKS: u32 = 10;
/// How rarely then, unless `heal.interval` is longer.
const IDLE_INTERVAL: Duration = Duration::from_secs(30);

/// What came of a look at the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Looked {
    /// How many chunks left the queues, or pages of slots came further.
    pub done: usize,
    /// Something is still to be done, whether or not it can be done now; or nobody knows, for a queue could not be
    /// read.
    pub open: bool,
}

impl Looked {
    /// Nobody looked.
    pub(super) const NOT: Looked = Looked { done: 0, open: true };

    /// Both looks together.
    pub(super) fn and(self, other: Looked) -> Looked {
        Looked { done: self.done + other.done, open: self.open || other.open }
    }
}

/// The rests of one holder of the lease.
pub(super) struct Rest {
    idle_looks: u32,
    settings: watch::Receiver<HealSettings>,
    disks: watch::Receiver<u64>,
    maps: watch::Receiver<Option<Arc<ClusterMap>>>,
}

impl Rest {
    pub(super) fn new(
        settings: watch::Receiver<HealSettings>,
        disks: watch::Receiver<u64>,
        maps: watch::Receiver<Option<Arc<ClusterMap>>>,
    ) -> Rest {
        Rest { idle_looks: 0, settings, disks, maps }
    }

    /// The settings in force.
    pub(super) fn settings(&mut self) -> watch::Ref<'_, HealSettings> {
        self.settings.borrow_and_update()
    }

    /// How long to rest after such a look; None: not at all, there is more to be done at once.
    pub(super) fn after(&mut self, looked: Looked, interval: Duration) -> Option<Duration> {
        self.idle_looks = if looked == Looked::default() { self.idle_looks.saturating_add(1) } else { 0 };
        if looked.done > 0 {
            return None;
        }
        Some(if self.idle_looks > IDLE_LOOKS { interval.max(IDLE_INTERVAL) } else { interval })
    }

    /// Returns when `time` is over, and at once when `poke` says that something was queued, or when a disk, the map or
    /// the settings changed.
    pub(super) async fn until(&mut self, time: impl Future<Output = ()>, poke: &Notify) {
        tokio::select! {
            () = time => {}
            () = change(&mut self.settings) => {}
            () = poke.notified() => {}
            () = change(&mut self.disks) => self.idle_looks = 0,
            () = change(&mut self.maps) => self.idle_looks = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures::FutureExt;

    const INTERVAL: Duration = Duration::from_millis(700);
    const NOTHING: Looked = Looked { done: 0, open: false };

    struct World {
        settings: watch::Sender<HealSettings>,
        disks: watch::Sender<u64>,
        maps: watch::Sender<Option<Arc<ClusterMap>>>,
        poke: Notify,
        rest: Rest,
    }

    impl World {
        /// Nothing was found for so long that the queues are looked at less often.
        fn idle() -> World {
            let settings = watch::Sender::new(HealSettings::default());
            let (disks, maps) = (watch::Sender::new(0), watch::Sender::new(None));
            let mut rest = Rest::new(settings.subscribe(), disks.subscribe(), maps.subscribe());
            for _ in 0..IDLE_LOOKS {
                assert_eq!(rest.after(NOTHING, INTERVAL), Some(INTERVAL));
            }
            assert_eq!(rest.after(NOTHING, INTERVAL), Some(IDLE_INTERVAL));
            World { settings, disks, maps, poke: Notify::new(), rest }
        }

        /// Does the rest end now, though its time is never over?
        fn wakes(&mut self) -> bool {
            self.rest.until(std::future::pending(), &self.poke).now_or_never().is_some()
        }
    }

    #[test]
    fn queues_that_are_empty_for_a_while_are_looked_at_less_often_and_all_else_ends_that() {
        for (looked, pause) in [
            (Looked { done: 1, open: false }, None),
            (Looked { done: 1, open: true }, None),
            (Looked { done: 0, open: true }, Some(INTERVAL)),
            (Looked::NOT, Some(INTERVAL)),
            (NOTHING.and(Looked::NOT), Some(INTERVAL)),
            (Looked::NOT.and(NOTHING), Some(INTERVAL)),
        ] {
            let mut rest = World::idle().rest;
            assert_eq!(rest.after(looked, INTERVAL), pause, "{looked:?}");
            // From there on as from the beginning.
            for _ in 0..IDLE_LOOKS {
                assert_eq!(rest.after(NOTHING, INTERVAL), Some(INTERVAL), "{looked:?}");
            }
            assert_eq!(rest.after(NOTHING, INTERVAL), Some(IDLE_INTERVAL), "{looked:?}");
        }
        let mut rest = World::idle().rest;
        assert_eq!(rest.after(NOTHING, IDLE_INTERVAL * 2), Some(IDLE_INTERVAL * 2), "never more often than is set");
    }

    #[test]
    fn a_healer_at_rest_wakes_at_once_when_a_disk_or_the_map_changes_and_looks_often_again() {
        type Change = fn(&World);
        for (what, change, is_news) in [
            ("a disk comes back", (|world| world.disks.send_modify(|version| *version += 1)) as Change, true),
            ("another map", |world| world.maps.send_modify(|_| ()), true),
            ("chunks are reported", |world| world.poke.notify_one(), false),
            ("other settings", |world| world.settings.send_modify(|_| ()), false),
        ] {
            let mut world = World::idle();
            assert!(!world.wakes(), "before {what}");
            change(&world);
            assert!(world.wakes(), "{what}");
            assert!(!world.wakes(), "once is enough: {what}");
            let pause = if is_news { INTERVAL } else { IDLE_INTERVAL };
            assert_eq!(world.rest.after(NOTHING, INTERVAL), Some(pause), "{what}");
        }
        // Also what changed while the healer looked, and not only while it rested.
        let mut world = World::idle();
        world.disks.send_modify(|version| *version += 1);
        world.rest.after(NOTHING, INTERVAL);
        assert!(world.wakes());
    }

    #[test]
    fn a_rest_ends_when_its_time_is_over_and_outlives_those_it_listens_to() {
        let mut world = World::idle();
        assert!(world.rest.until(std::future::ready(()), &world.poke).now_or_never().is_some());
        let World { settings, disks, maps, poke, mut rest } = world;
        drop((settings, disks, maps));
        assert!(rest.until(std::future::pending(), &poke).now_or_never().is_none(), "nobody can change anything");
    }
}
