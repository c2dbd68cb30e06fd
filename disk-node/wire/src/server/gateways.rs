//! How many gateways share this node's places for chunk requests, and how many places each of them gets.
//!
//! A gateway counts while it has a connection here that is authenticated: it pings each disk once a second over one
//! that stays, and the server ends those on which nothing comes any more. So the table has at most as many rows as
//! there are places, and nothing is done for it while requests come.

use crate::auth::GatewayId;
use std::collections::BTreeMap;

/// A gateway may have this many connections however many share the places; a node with fewer places gives all of them.
const LEAST: usize = 8;

/// Of so many places one is given to nobody. A gateway may close a connection and open another before the end of the
/// first is noticed here, and one that comes may have its first before the others heard of it.
const SPARE_ONE_OF: usize = 8;

/// How many connections for chunk requests each of `gateways` may have at a node with that many places.
pub(super) fn share(places: usize, gateways: usize) -> u32 {
    let given = places - places / SPARE_ONE_OF;
    let share = (given / gateways.max(1)).max(LEAST.min(places)).max(1);
    u32::try_from(share).unwrap_or(u32::MAX)
}

/// The gateways that have connections here, with how many.
#[derive(Debug, Default)]
pub(super) struct Gateways(BTreeMap<GatewayId, usize>);

impl Gateways {
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// One more connection of it.
    pub(super) fn arrive(&mut self, gateway: GatewayId) {
        *self.0.entry(gateway).or_default() += 1;
    }

    /// One connection of it less.
    pub(super) fn leave(&mut self, gateway: GatewayId) {
        let left = self.0.get_mut(&gateway).map(|connections| {
            *connections = connections.saturating_sub(1);
            *connections
        });
        if left == Some(0) {
            self.0.remove(&gateway);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn places_are_divided_among_the_gateways_down_to_a_least() {
        for (places, gateways, each) in [
            (512, 0, 448),
            (512, 1, 448),
            (512, 3, 149),
            (512, 56, 8),
            (512, 57, 8),
            (512, usize::MAX, 8),
            (36, 3, 10),
            (36, 4, 8),
            (24, 3, 8),
            (4, 1, 4),
            (4, 3, 4),
            (0, 3, 1),
        ] {
            assert_eq!(share(places, gateways), each, "{places} places, {gateways} gateways");
        }
    }

    #[test]
    fn places_take_at_most_half_of_the_open_files() {
        let limits = crate::server::ServerLimits {
            max_connections: 500,
            max_control_connections: 300,
            max_handshakes: 200,
            ..crate::server::ServerLimits::default()
        };
        for (open_files, places) in [
            (u64::MAX, [500, 300, 200]),
            (2000, [500, 300, 200]),
            (1000, [250, 150, 100]),
            (100, [25, 15, 10]),
            (0, [1, 1, 1]),
        ] {
            let limits = limits.clone().within(open_files);
            let found = [limits.max_connections, limits.max_control_connections, limits.max_handshakes];
            assert_eq!(found, places, "{open_files} open files");
        }
    }

    #[test]
    fn a_gateway_counts_once_and_until_its_last_connection_is_gone() {
        let [first, second] = [GatewayId::random().unwrap(), GatewayId::random().unwrap()];
        let mut gateways = Gateways::default();
        for (arrives, gateway, count) in
            [(true, first, 1), (true, first, 1), (true, second, 2), (false, first, 2), (false, first, 1)]
        {
            match arrives {
                true => gateways.arrive(gateway),
                false => gateways.leave(gateway),
            }
            assert_eq!(gateways.count(), count);
        }
        gateways.leave(first);
        assert_eq!(gateways.count(), 1, "it had left before");
    }
}
