//! A fresh layout: groups are dealt down the tree of failure domains.
//!
//! Each node deals the chunks of a group to its children. A child whose share is 2.4 gets two of every group, and a
//! third of four groups in ten: those extras are tickets, and the k-th ticket of a child falls due at a random moment
//! of its k-th turn. A group takes the tickets that are due first. So every group holds the share of every domain
//! rounded down or up, totals come out within about one of the target, and who meets whom is well mixed, whatever the
//! weights.

use super::board::Board;
use super::tree::{mix, Tree};
use std::collections::BTreeSet;

pub(super) struct Dealer<'t> {
    tree: &'t Tree,
    /// Chunks of every group.
    sure: Vec<usize>,
    /// Share of the extras: below one.
    fraction: Vec<f64>,
    /// Tickets used so far.
    used: Vec<u64>,
    /// Under each node, the next ticket of each child: when it falls due (bits of a positive float sort as the float),
    /// whose.
    tickets: Vec<BTreeSet<(u64, usize)>>,
    /// Under each node, the children with a sure part.
    certain: Vec<Vec<usize>>,
}

impl<'t> Dealer<'t> {
    pub fn new(tree: &'t Tree, quota: &[f64]) -> Dealer<'t> {
        let count = tree.nodes.len();
        let mut dealer = Dealer {
            tree,
            sure: quota.iter().map(|share| share.floor() as usize).collect(),
            fraction: quota.iter().map(|share| share - share.floor()).collect(),
            used: vec![0; count],
            tickets: vec![BTreeSet::new(); count],
            certain: vec![Vec::new(); count],
        };
        for v in 1..count {
            let parent = tree.nodes[v].parent;
            if dealer.sure[v] > 0 {
                dealer.certain[parent].push(v);
            }
            dealer.issue(v);
        }
        dealer
    }

    fn issue(&mut self, v: usize) {
        if self.fraction[v] > 0.0 {
            let moment = mix(v as u64, self.used[v]) as f64 / u64::MAX as f64;
            let due = (self.used[v] as f64 + moment) / self.fraction[v];
            self.tickets[self.tree.nodes[v].parent].insert((due.to_bits(), v));
        }
    }

    /// Deals `group` of the board. Slots that floating-point error leaves without a disk stay vacant, to be filled
    /// after.
    pub fn deal(&mut self, board: &mut Board<'_>, group: usize, width: usize) {
        let mut disks = Vec::with_capacity(width);
        self.deal_under(0, width, &mut disks);
        // Slots carry chunk indices; without this the first zone would hold the first data chunks of every group.
        disks.sort_by_key(|leaf| mix(*leaf as u64, !(group as u64)));
        for (slot, leaf) in board.slots_of(group).zip(disks) {
            board.place(slot, leaf);
        }
    }

    fn deal_under(&mut self, v: usize, chunks: usize, disks: &mut Vec<usize>) {
        if self.tree.is_leaf(v) {
            disks.push(v);
            return;
        }
        let mut hands: Vec<(usize, usize)> = Vec::new();
        let mut left = chunks;
        for &child in &self.certain[v] {
            let hand = self.sure[child].min(left);
            left -= hand;
            hands.push((child, hand));
        }
        let mut winners = Vec::with_capacity(left);
        while winners.len() < left {
            let Some((_, child)) = self.tickets[v].pop_first() else { break };
            winners.push(child);
        }
        for child in winners {
            self.used[child] += 1;
            self.issue(child);
            match hands.iter_mut().find(|(other, _)| *other == child) {
                Some((_, hand)) => *hand += 1,
                None => hands.push((child, 1)),
            }
        }
        for (child, hand) in hands.into_iter().filter(|(_, hand)| *hand > 0) {
            self.deal_under(child, hand, disks);
        }
    }
}
