//! Who may stay while many want to: the decision, without sockets and without a clock of its own.
//!
//! Three kinds of connection have places of their own, so that none can take another's: those that have not proved yet
//! that they are of the cluster (strangers), those for control frames, and those for chunk requests. A stranger that
//! has proved nothing for a while makes room for a new one, the oldest first; a handshake takes milliseconds. So does a
//! data connection between two requests, the one that has been silent the longest; not at once, for the end of its last
//! answer may still be on its way. Otherwise the new one is told that the node is busy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How long a stranger is left alone.
const STRANGER: Duration = Duration::from_millis(500);
/// How long a data connection must have been silent before it makes room. Shorter than the default of
/// `disks.pool_wait`: whoever waits that long gets a place.
const SILENT: Duration = Duration::from_secs(2);

/// A connection; numbers grow, and none is used twice.
pub(super) type Number = u64;

/// How many of each kind there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub strangers: usize,
    pub control: usize,
    pub data: usize,
}

#[derive(Debug)]
enum Place {
    Stranger,
    Control,
    /// Since when it has been silent; None with a request at work, or before its first.
    Data(Option<Instant>),
}

/// All connections. Closing one is asked for by its token; its place is free at once.
#[derive(Debug)]
pub(super) struct Places {
    bounds: Bounds,
    places: BTreeMap<Number, (Place, CancellationToken)>,
    strangers: BTreeMap<Number, Instant>,
    silent: BTreeSet<(Instant, Number)>,
    control: usize,
    data: usize,
    next: u64,
}

impl Places {
    pub(super) fn new(bounds: Bounds) -> Places {
        Places {
            bounds,
            places: BTreeMap::new(),
            strangers: BTreeMap::new(),
            silent: BTreeSet::new(),
            control: 0,
            data: 0,
            next: 0,
        }
    }

    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A connection was accepted; `close` ends it. None: there is no place, and it is to be told so.
    pub(super) fn arrive(&mut self, close: CancellationToken, now: Instant) -> Option<Number> {
        if self.strangers.len() >= self.bounds.strangers.max(1) {
            let (oldest, since) = self.strangers.first_key_value().map(|(number, since)| (*number, *since))?;
            if now.saturating_duration_since(since) < STRANGER {
                return None;
            }
            self.turn_out(oldest);
        }
        let number = self.tick();
        self.strangers.insert(number, now);
        self.places.insert(number, (Place::Stranger, close));
        Some(number)
    }

    /// A stranger proved to be of the cluster, and wants to stay for control frames or chunk requests. False: there is
    /// no place, or it was turned out meanwhile.
    pub(super) fn admit(&mut self, number: Number, control: bool, now: Instant) -> bool {
        if !self.strangers.contains_key(&number) {
            return false;
        }
        if control {
            if self.control >= self.bounds.control.max(1) {
                return false;
            }
            self.control += 1;
        } else {
            if self.data >= self.bounds.data.max(1) {
                let Some((since, silent)) = self.silent.first().copied() else { return false };
                if now.saturating_duration_since(since) < SILENT {
                    return false;
                }
                self.turn_out(silent);
            }
            self.data += 1;
        }
        self.strangers.remove(&number);
        if let Some((place, _)) = self.places.get_mut(&number) {
            *place = if control { Place::Control } else { Place::Data(None) };
        }
        true
    }

    /// A data connection has a request at work.
    pub(super) fn work(&mut self, number: Number) {
        if let Some((Place::Data(silent), _)) = self.places.get_mut(&number) {
            if let Some(since) = silent.take() {
                self.silent.remove(&(since, number));
            }
        }
    }

    /// A data connection has answered and waits for the next request.
    pub(super) fn silence(&mut self, number: Number, now: Instant) {
        self.work(number);
        if let Some((Place::Data(silent), _)) = self.places.get_mut(&number) {
            *silent = Some(now);
            self.silent.insert((now, number));
        }
    }

    fn turn_out(&mut self, number: Number) {
        if let Some((_, close)) = self.places.get(&number) {
            close.cancel();
        }
        self.leave(number);
    }

    /// A connection ended. One that was turned out has left already.
    pub(super) fn leave(&mut self, number: Number) {
        match self.places.remove(&number) {
            Some((Place::Stranger, _)) => {
                self.strangers.remove(&number);
            }
            Some((Place::Control, _)) => self.control -= 1,
            Some((Place::Data(silent), _)) => {
                self.data -= 1;
                if let Some(since) = silent {
                    self.silent.remove(&(since, number));
                }
            }
            None => {}
        }
    }

    /// Connections in all.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.places.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Crowd {
        places: Places,
        tokens: BTreeMap<Number, CancellationToken>,
        now: Instant,
    }

    impl Crowd {
        fn new() -> Crowd {
            let bounds = Bounds { strangers: 2, control: 1, data: 2 };
            Crowd { places: Places::new(bounds), tokens: BTreeMap::new(), now: Instant::now() }
        }

        fn arrive(&mut self) -> Option<Number> {
            let token = CancellationToken::new();
            let number = self.places.arrive(token.clone(), self.now)?;
            self.tokens.insert(number, token);
            Some(number)
        }

        fn admit(&mut self, number: Number, control: bool) -> bool {
            self.places.admit(number, control, self.now)
        }

        fn data(&mut self) -> Option<Number> {
            let number = self.arrive()?;
            let admitted = self.admit(number, false);
            if !admitted {
                self.places.leave(number);
            }
            admitted.then_some(number)
        }

        fn out(&self, numbers: &[Number]) -> Vec<bool> {
            numbers.iter().map(|number| self.tokens.get(number).is_some_and(CancellationToken::is_cancelled)).collect()
        }
    }

    #[test]
    fn a_stranger_that_says_nothing_makes_room_after_a_while_and_cannot_come_in_any_more() {
        let mut crowd = Crowd::new();
        let (first, second) = (crowd.arrive().unwrap(), crowd.arrive().unwrap());
        assert_eq!(crowd.arrive(), None, "both have hardly begun");
        crowd.now += STRANGER;
        let third = crowd.arrive().unwrap();
        assert_eq!(crowd.out(&[first, second, third]), [true, false, false]);
        assert!(!crowd.admit(first, true));
        assert!(crowd.admit(third, true));
        assert_eq!(crowd.places.count(), 2);
    }

    #[test]
    fn a_silent_data_connection_makes_room_after_a_while_and_one_at_work_does_not() {
        let mut crowd = Crowd::new();
        let (first, second) = (crowd.data().unwrap(), crowd.data().unwrap());
        crowd.now += 10 * SILENT;
        assert_eq!(crowd.data(), None, "their first requests are on their way");
        crowd.places.work(first);
        crowd.places.work(second);
        crowd.places.silence(second, crowd.now);
        assert_eq!(crowd.data(), None, "the end of its answer may be on its way");
        crowd.now += SILENT;
        let third = crowd.data().unwrap();
        assert_eq!(crowd.out(&[first, second, third]), [false, true, false]);
        crowd.places.silence(first, crowd.now);
        crowd.now += SILENT;
        crowd.places.silence(third, crowd.now);
        crowd.places.work(first);
        assert_eq!(crowd.data(), None, "one is at work again, and the other was a moment ago");
    }

    #[test]
    fn control_connections_have_places_of_their_own() {
        let mut crowd = Crowd::new();
        let (first, second) = (crowd.data().unwrap(), crowd.data().unwrap());
        let control = crowd.arrive().unwrap();
        assert!(crowd.admit(control, true));
        let another = crowd.arrive().unwrap();
        assert!(!crowd.admit(another, true), "one was all");
        crowd.places.leave(control);
        assert!(crowd.admit(another, true));
        for number in [first, second, another] {
            crowd.places.leave(number);
            crowd.places.leave(number);
        }
        assert_eq!((crowd.places.count(), crowd.places.data, crowd.places.control), (0, 0, 0));
    }
}
