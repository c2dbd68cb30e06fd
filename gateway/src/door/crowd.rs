//! Who may connect while many want to: the decision, without sockets and without a clock of its own.
//!
//! A connection is silent while it has no request in work: before its first, and between two. Silent ones are worth
//! little to their clients, so the one that has been silent the longest makes room for a new one; one that has never
//! asked anything goes before all that have. Connections in work are never cut off here: when there are no silent
//! ones, the new one is answered with 503.
//!
//! **Invariant:** never more than `places` + `refused` connections, and of one address that is no proxy never more than
//! `per_address` + [`REFUSED_PER_ADDRESS`].

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// Connections of one address beyond its bound that are still answered, with 503.
const REFUSED_PER_ADDRESS: usize = 16;

/// Bounds on connections.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    /// Connections served at once.
    pub(crate) places: usize,
    /// More than these, answered with 503.
    pub(crate) refused: usize,
    /// Connections of one address served at once.
    pub(crate) per_address: usize,
    /// Who speaks for many clients, and has no bound of its own.
    pub(crate) proxies: Vec<Network>,
}

/// A connection; numbers grow, and none is used twice.
pub(crate) type Number = u64;

/// What becomes of a new connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is served.
    Serve(Number),
    /// It is served in the place of a silent one, which is to be closed.
    Instead(Number, Number),
    /// Its requests are answered with 503.
    Refuse(Number),
    /// It is closed at once: its address has had more than enough answers.
    Close,
    /// There is no place even to refuse it; ask again when somebody left.
    Wait,
}

#[derive(Debug, Clone, Copy)]
struct Guest {
    address: IpAddr,
    served: bool,
    /// Its place among the silent ones; None while a request is in work.
    silent: Option<Silence>,
}

/// Whether it has ever asked anything, then since when it is silent.
type Silence = (bool, u64);

/// All connections.
#[derive(Debug)]
pub(crate) struct Crowd {
    bounds: Bounds,
    guests: HashMap<Number, Guest>,
    /// The silent ones, the first to go first.
    silent: BTreeSet<(Silence, Number)>,
    per_address: HashMap<IpAddr, usize>,
    served: usize,
    next: Number,
    /// Counts silences, so that their order needs no clock.
    ticks: u64,
}

impl Crowd {
    /// Nobody yet.
    pub(crate) fn new(bounds: Bounds) -> Crowd {
        Crowd {
            bounds,
            guests: HashMap::new(),
            silent: BTreeSet::new(),
            per_address: HashMap::new(),
            served: 0,
            next: 0,
            ticks: 0,
        }
    }

    /// Decides about a new connection, and takes it in unless it is closed or waits.
    pub(crate) fn arrive(&mut self, address: IpAddr) -> Decision {
        let address = address.to_canonical();
        let of_address = self.per_address.get(&address).copied().unwrap_or(0);
        let bounded = !self.bounds.proxies.iter().any(|network| network.contains(address));
        if bounded && of_address >= self.bounds.per_address {
            let own = self.silent.iter().find(|(_, number)| {
                self.guests.get(number).is_some_and(|guest| guest.address == address && guest.served)
            });
            return match own.map(|(_, number)| *number) {
                Some(out) => self.instead(out, address),
                None if of_address >= self.bounds.per_address.saturating_add(REFUSED_PER_ADDRESS) => Decision::Close,
                None => self.refuse(address),
            };
        }
        if self.served < self.bounds.places {
            return Decision::Serve(self.enter(address, true));
        }
        match self.first_to_go() {
            Some(out) => self.instead(out, address),
            None => self.refuse(address),
        }
    }

    /// The connection that would make room for a new one now: all places are taken, and it has been silent the longest.
    pub(crate) fn first_to_go(&self) -> Option<Number> {
        let mut oldest = self.silent.iter().map(|(_, number)| *number);
        let served = |number: &Number| self.guests.get(number).is_some_and(|guest| guest.served);
        (self.served >= self.bounds.places).then(|| oldest.find(served)).flatten()
    }

    fn instead(&mut self, out: Number, address: IpAddr) -> Decision {
        self.leave(out);
        Decision::Instead(self.enter(address, true), out)
    }

    fn refuse(&mut self, address: IpAddr) -> Decision {
        if self.guests.len() - self.served < self.bounds.refused {
            return Decision::Refuse(self.enter(address, false));
        }
        Decision::Wait
    }

    fn enter(&mut self, address: IpAddr, served: bool) -> Number {
        let number = self.next;
        self.next += 1;
        self.guests.insert(number, Guest { address, served, silent: None });
        *self.per_address.entry(address).or_default() += 1;
        self.served += usize::from(served);
        self.silence(number, false);
        number
    }

    fn silence(&mut self, number: Number, asked: bool) {
        self.ticks += 1;
        let silence = (asked, self.ticks);
        if let Some(guest) = self.guests.get_mut(&number) {
            guest.silent = Some(silence);
            self.silent.insert((silence, number));
        }
    }

    /// A request of this connection is in work.
    pub(crate) fn works(&mut self, number: Number) {
        if let Some(silence) = self.guests.get_mut(&number).and_then(|guest| guest.silent.take()) {
            self.silent.remove(&(silence, number));
        }
    }

    /// Its request is answered.
    pub(crate) fn rests(&mut self, number: Number) {
        self.works(number);
        self.silence(number, true);
    }

    /// It is over, or was told to go. Told twice, nothing happens.
    pub(crate) fn leave(&mut self, number: Number) {
        self.works(number);
        let Some(guest) = self.guests.remove(&number) else { return };
        self.served -= usize::from(guest.served);
        if let Some(count) = self.per_address.get_mut(&guest.address) {
            *count -= 1;
            if *count == 0 {
                self.per_address.remove(&guest.address);
            }
        }
    }
}

/// Addresses with the same beginning: `10.0.0.0/8`, `fd00::/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Network {
    address: IpAddr,
    bits: u32,
}

/// An address as 128 bits from the left, and how many of them it has.
fn bits_of(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    }
}

impl Network {
    fn parse(text: &str) -> Option<Network> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let most = bits_of(address).1;
        let bits = bits.unwrap_or(most);
        (bits <= most).then_some(Network { address, bits })
    }

    /// Networks with commas between them; Err: the one that is none.
    pub(crate) fn parse_list(text: &str) -> Result<Vec<Network>, String> {
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        names.map(|name| Network::parse(name).ok_or_else(|| name.to_owned())).collect()
    }

    fn contains(&self, address: IpAddr) -> bool {
        let ((own, len), (other, other_len)) = (bits_of(self.address), bits_of(address));
        let differ = own ^ other;
        len == other_len && (self.bits == 0 || differ >> (128 - self.bits) == 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::Decision::{Close, Instead, Refuse, Serve, Wait};
    use super::*;

    fn crowd(places: usize, refused: usize, per_address: usize, proxies: &str) -> Crowd {
        Crowd::new(Bounds { places, refused, per_address, proxies: Network::parse_list(proxies).unwrap() })
    }

    fn a(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn the_oldest_silent_one_makes_room_and_nobody_in_work_does() {
        let mut crowd = crowd(3, 1, 100, "");
        assert_eq!([crowd.arrive(a(1)), crowd.arrive(a(2)), crowd.arrive(a(3))], [Serve(0), Serve(1), Serve(2)]);
        crowd.works(0);
        crowd.rests(0);
        crowd.works(1);
        // 2 never asked anything: it goes before 0, who is silent for longer but did.
        assert_eq!(crowd.arrive(a(4)), Instead(3, 2));
        crowd.works(3);
        assert_eq!(crowd.arrive(a(5)), Instead(4, 0));
        crowd.works(4);
        assert_eq!([crowd.arrive(a(6)), crowd.arrive(a(7))], [Refuse(5), Wait]);
        crowd.leave(5);
        crowd.leave(5);
        crowd.leave(1);
        assert_eq!(crowd.arrive(a(7)), Serve(6));
        // Silent again: the older silence goes.
        crowd.rests(4);
        crowd.works(6);
        crowd.rests(6);
        assert_eq!(crowd.arrive(a(8)), Instead(7, 4));
    }

    #[test]
    fn one_address_makes_room_for_itself_only() {
        let mut crowd = crowd(10, 5, 2, "");
        assert_eq!([crowd.arrive(a(9)), crowd.arrive(a(1)), crowd.arrive(a(1))], [Serve(0), Serve(1), Serve(2)]);
        assert_eq!(crowd.arrive(a(1)), Instead(3, 1), "not 0, who is another");
        crowd.works(2);
        crowd.works(3);
        assert_eq!(crowd.arrive("::ffff:192.0.2.1".parse().unwrap()), Refuse(4), "the same address");
        for _ in 0..4 {
            assert!(matches!(crowd.arrive(a(1)), Refuse(_)));
        }
        assert_eq!([crowd.arrive(a(1)), crowd.arrive(a(2))], [Wait, Serve(9)]);
    }

    #[test]
    fn one_address_that_fills_all_refusals_is_closed_at_once() {
        let mut crowd = crowd(1000, 1000, 1, "");
        assert_eq!(crowd.arrive(a(1)), Serve(0));
        crowd.works(0);
        let decisions: Vec<Decision> = (0..40).map(|_| crowd.arrive(a(1))).collect();
        assert_eq!(decisions.iter().filter(|d| matches!(d, Refuse(_))).count(), REFUSED_PER_ADDRESS);
        assert_eq!(decisions.iter().filter(|d| matches!(d, Close)).count(), 40 - REFUSED_PER_ADDRESS);
    }

    #[test]
    fn a_proxy_has_no_bound_of_its_own() {
        let mut crowd = crowd(10, 5, 1, "192.0.2.0/30, fd00::/8");
        for (number, address) in (0..).zip([a(1), a(1), a(2), a(2), "fd00::1".parse().unwrap()]) {
            assert_eq!(crowd.arrive(address), Serve(number));
            crowd.works(number);
        }
        assert_eq!([crowd.arrive(a(4)), crowd.arrive("fe00::1".parse().unwrap())], [Serve(5), Serve(6)]);
        crowd.works(5);
        assert_eq!(crowd.arrive(a(4)), Refuse(7));
    }

    #[test]
    fn networks_are_read_or_named() {
        let contains =
            |network: &str, address: &str| Network::parse_list(network).unwrap()[0].contains(address.parse().unwrap());
        assert!(contains("0.0.0.0/0", "203.0.113.1") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("::1", "::1") && !contains("::1", "::2"));
        assert!(contains("10.1.0.0/16", "10.1.255.1") && !contains("10.1.0.0/16", "10.2.0.1"));
        assert_eq!(Network::parse_list(" ").unwrap(), []);
        for bad in ["10.0.0.0/33", "10.0.0/8", "proxy.example", "::1/129", "10.0.0.1/-1"] {
            assert_eq!(Network::parse_list(&format!("::1, {bad}")).unwrap_err(), bad);
        }
    }
}
