//! Who may stay while many want to: the decision, without sockets and without a clock.
//!
//! Three kinds of connection have places of their own, so that none can take another's: those that have not proved yet
//! that they are of the cluster (strangers), those for control frames, and those for chunk requests. A stranger makes
//! room for the next one, the oldest first. So does a data connection between two requests, the one that has been
//! silent the longest. Where all are at work, the new one is told that the node is busy.

use std::collections::{BTreeMap, BTreeSet};
use tokio_util::sync::CancellationToken;

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
    /// Since which tick it has been silent; None with a request at work.
    Data(Option<u64>),
}

/// All connections. Closing one is asked for by its token; its place is free at once.
#[derive(Debug)]
pub(super) struct Places {
    bounds: Bounds,
    places: BTreeMap<Number, (Place, CancellationToken)>,
    strangers: BTreeSet<Number>,
    silent: BTreeSet<(u64, Number)>,
    control: usize,
    data: usize,
    next: u64,
}

impl Places {
    pub(super) fn new(bounds: Bounds) -> Places {
        Places {
            bounds,
            places: BTreeMap::new(),
            strangers: BTreeSet::new(),
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

    /// A connection was accepted; `close` ends it. The oldest stranger makes room for it; true when one had to.
    pub(super) fn arrive(&mut self, close: CancellationToken) -> (Number, bool) {
        let crowded = self.strangers.len() >= self.bounds.strangers.max(1);
        if let Some(oldest) = self.strangers.first().copied().filter(|_| crowded) {
            self.turn_out(oldest);
        }
        let number = self.tick();
        self.strangers.insert(number);
        self.places.insert(number, (Place::Stranger, close));
        (number, crowded)
    }

    /// A stranger proved to be of the cluster, and wants to stay for control frames or chunk requests. False: there is
    /// no place, or it was turned out meanwhile.
    pub(super) fn admit(&mut self, number: Number, control: bool) -> bool {
        if !self.strangers.contains(&number) {
            return false;
        }
        if control {
            if self.control >= self.bounds.control.max(1) {
                return false;
            }
            self.control += 1;
        } else {
            if self.data >= self.bounds.data.max(1) {
                let Some((_, silent)) = self.silent.first().copied() else { return false };
                self.turn_out(silent);
            }
            self.data += 1;
        }
        self.strangers.remove(&number);
        if let Some((place, _)) = self.places.get_mut(&number) {
            *place = if control { Place::Control } else { Place::Data(None) };
        }
        if !control {
            self.silence(number);
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
    pub(super) fn silence(&mut self, number: Number) {
        self.work(number);
        let since = self.tick();
        if let Some((Place::Data(silent), _)) = self.places.get_mut(&number) {
            *silent = Some(since);
            self.silent.insert((since, number));
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
    use super::*;

    struct Crowd {
        places: Places,
        tokens: BTreeMap<Number, CancellationToken>,
    }

    impl Crowd {
        fn new() -> Crowd {
            Crowd { places: Places::new(Bounds { strangers: 2, control: 1, data: 2 }), tokens: BTreeMap::new() }
        }

        fn arrive(&mut self) -> Number {
            let token = CancellationToken::new();
            let (number, _) = self.places.arrive(token.clone());
            self.tokens.insert(number, token);
            number
        }

        fn data(&mut self) -> Option<Number> {
            let number = self.arrive();
            self.places.admit(number, false).then_some(number)
        }

        fn is_out(&self, number: Number) -> bool {
            self.tokens.get(&number).is_some_and(CancellationToken::is_cancelled)
        }
    }

    #[test]
    fn the_oldest_stranger_makes_room_for_a_new_one_and_cannot_come_in_any_more() {
        let mut crowd = Crowd::new();
        let [first, second, third] = [0; 3].map(|_| crowd.arrive());
        assert_eq!([first, second, third].map(|number| crowd.is_out(number)), [true, false, false]);
        assert!(!crowd.places.admit(first, true));
        assert!(crowd.places.admit(third, true));
        assert_eq!(crowd.places.count(), 2);
    }

    #[test]
    fn a_silent_data_connection_makes_room_and_one_at_work_does_not() {
        let mut crowd = Crowd::new();
        let (first, second) = (crowd.data().unwrap_or(0), crowd.data().unwrap_or(0));
        crowd.places.work(first);
        let third = crowd.data().unwrap_or(0);
        assert_eq!([first, second, third].map(|number| crowd.is_out(number)), [false, true, false]);
        crowd.places.work(third);
        assert_eq!(crowd.data(), None, "all are at work");
        crowd.places.silence(first);
        crowd.places.silence(third);
        let fourth = crowd.data().unwrap_or(0);
        assert_eq!([first, third, fourth].map(|number| crowd.is_out(number)), [true, false, false]);
    }

    #[test]
    fn control_connections_have_places_of_their_own() {
        let mut crowd = Crowd::new();
        let (first, second) = (crowd.data().unwrap_or(0), crowd.data().unwrap_or(0));
        crowd.places.work(first);
        crowd.places.work(second);
        let control = crowd.arrive();
        assert!(crowd.places.admit(control, true));
        let another = crowd.arrive();
        assert!(!crowd.places.admit(another, true), "one was all");
        crowd.places.leave(control);
        assert!(crowd.places.admit(another, true));
        for number in [first, second, another] {
            crowd.places.leave(number);
            crowd.places.leave(number);
        }
        assert_eq!((crowd.places.count(), crowd.places.data, crowd.places.control), (0, 0, 0));
    }
}
