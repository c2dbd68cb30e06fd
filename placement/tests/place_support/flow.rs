//! The fewest moves that any algorithm could do with: a minimum-cost flow. Slow and exact, for small clusters.

use super::{domain, fair_slots, takes_slots};
use granary_placement::id::DiskId;
use granary_placement::map::ClusterMap;
use granary_placement::scheme::FailureDomain;
use std::collections::{BTreeMap, VecDeque};

struct Edge {
    to: usize,
    room: i64,
    cost: i64,
}

#[derive(Default)]
struct Network {
    edges: Vec<Edge>,
    from: Vec<Vec<usize>>,
}

impl Network {
    fn node(&mut self) -> usize {
        self.from.push(Vec::new());
        self.from.len() - 1
    }

    fn edge(&mut self, a: usize, b: usize, room: i64, cost: i64) {
        self.from[a].push(self.edges.len());
        self.edges.push(Edge { to: b, room, cost });
        self.from[b].push(self.edges.len());
        self.edges.push(Edge { to: a, room: 0, cost: -cost });
    }

    /// Sends as much as fits from `source` to `sink`, each unit by the cheapest way; returns (units, cost).
    fn send(&mut self, source: usize, sink: usize) -> (i64, i64) {
        let (mut units, mut total) = (0, 0);
        loop {
            let mut cost = vec![i64::MAX; self.from.len()];
            let mut by = vec![usize::MAX; self.from.len()];
            let mut waiting = vec![false; self.from.len()];
            let mut queue = VecDeque::from([source]);
            cost[source] = 0;
            while let Some(node) = queue.pop_front() {
                waiting[node] = false;
                for &number in &self.from[node] {
                    let edge = &self.edges[number];
                    if edge.room > 0 && cost[node] + edge.cost < cost[edge.to] {
                        cost[edge.to] = cost[node] + edge.cost;
                        by[edge.to] = number;
                        if !std::mem::replace(&mut waiting[edge.to], true) {
                            queue.push_back(edge.to);
                        }
                    }
                }
            }
            if cost[sink] == i64::MAX {
                return (units, total);
            }
            let mut node = sink;
            while node != source {
                let number = by[node];
                self.edges[number].room -= 1;
                self.edges[number ^ 1].room += 1;
                node = self.edges[number ^ 1].to;
            }
            units += 1;
            total += cost[sink];
        }
    }
}

/// Fewest slots that must change their disk so that `changed` keeps the scheme and every disk holds its fair share
/// within 5 % or rounding. None when no layout does all that.
pub fn fewest_moves(changed: &ClusterMap) -> Option<usize> {
    // Dearer than any number of moves, so that fairness comes first.
    const UNFAIR: i64 = 1_000_000;
    let scheme = &changed.schemes[&changed.default_scheme];
    let mut network = Network::default();
    let (source, sink) = (network.node(), network.node());
    let mut must_hold = 0;
    let mut disks: BTreeMap<DiskId, usize> = BTreeMap::new();
    for (disk, fair) in fair_slots(changed) {
        let low = (fair * 0.95 - 1e-6).ceil().min((fair + 1e-6).floor()) as i64;
        let high = (fair * 1.05 + 1e-6).floor().max((fair - 1e-6).ceil()) as i64;
        let node = network.node();
        network.edge(node, sink, low, -UNFAIR);
        network.edge(node, sink, high - low, 0);
        must_hold += low;
        disks.insert(disk, node);
    }
    for group in changed.groups.values() {
        let start = network.node();
        network.edge(source, start, scheme.width() as i64, 0);
        let mut homes: BTreeMap<String, usize> = BTreeMap::new();
        for (disk, node) in &disks {
            assert!(takes_slots(&changed.disks[disk]));
            let via = if scheme.failure_domain == FailureDomain::Disk {
                start
            } else {
                let home = domain(&changed.disks[disk].location, scheme.failure_domain).unwrap();
                *homes.entry(home).or_insert_with(|| {
                    let home = network.node();
                    network.edge(start, home, i64::from(scheme.m), 0);
                    home
                })
            };
            network.edge(via, *node, 1, i64::from(group.slots.iter().all(|slot| slot.current != *disk)));
        }
    }
    let (units, cost) = network.send(source, sink);
    let moves = cost + UNFAIR * must_hold;
    (units == (changed.groups.len() * scheme.width()) as i64 && moves < UNFAIR).then_some(moves as usize)
}
