//! Groups on disks while a layout is being made: who holds what, how far each disk is from its target, and what may
//! move.
//!
//! All search is by the tree and by the slots of single disks: nothing here looks at every pair of disks.

use super::tree::{ceiling, fair_range, mix, Shares, Tree};
use crate::id::DiskId;
use std::collections::BTreeSet;

/// A slot without a disk. The root of the tree is node 0 and never a disk.
const VACANT: usize = 0;

/// Slack for comparisons of targets with whole slots.
const ROUNDING: f64 = 1e-6;

/// Deficits are compared in thousandths of a slot, so that floating-point noise does not decide between equals.
const DEFICIT_STEPS: f64 = 1000.0;

/// How close a disk's load must come to its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Band {
    /// The target rounded down or up: for fresh layouts, where moving costs nothing.
    Whole,
    /// Within 5 % of its weight's share, or rounded: what a change may leave, so that it moves little.
    FivePercent,
}

pub(super) struct Board<'t> {
    pub tree: &'t Tree,
    width: usize,
    /// Disk of each slot; `width` slots a group, groups one after the other.
    slots: Vec<usize>,
    /// Disk of each slot when settling began: a slot that has left it may be moved again at no cost.
    origin: Vec<usize>,
    /// Slots of each disk, in no order.
    held: Vec<Vec<usize>>,
    /// Slots in each node's subtree.
    load: Vec<usize>,
    /// Slots that each node should hold.
    target: Vec<f64>,
    /// Of disks: fewest and most slots to be left in peace.
    low: Vec<usize>,
    high: Vec<usize>,
    /// Most chunks of a group in each node: as few as the shares allow.
    spread: Vec<usize>,
    /// Most chunks of a group in each node, never to be exceeded.
    caps: Vec<usize>,
    /// All disks by [`Board::want`], the most overloaded first.
    order: BTreeSet<(i64, u64, usize)>,
    /// Of groups: disks that may not take a slot, because chunks of the group are still moving away from them.
    barred: Vec<Vec<usize>>,
    /// Disks in each subtree that are being filled up.
    pub needy: Vec<usize>,
    /// Of disks: loads that settling stops at, on the way up and down.
    raise_to: Vec<usize>,
    lower_to: Vec<usize>,
}

/// Which limits a search keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limits {
    /// As few chunks of a group in each domain as the shares allow.
    Spread,
    /// Only what the scheme demands.
    Caps,
}

impl<'t> Board<'t> {
    /// An empty board. `caps` are the limits that hold always: the tree's, or looser ones.
    pub fn new(
        tree: &'t Tree,
        shares: &Shares,
        caps: Vec<usize>,
        groups: usize,
        width: usize,
        band: Band,
    ) -> Board<'t> {
        let count = tree.nodes.len();
        let target: Vec<f64> = shares.quota.iter().map(|share| share * groups as f64).collect();
        let (mut low, mut high) = (vec![0; count], vec![0; count]);
        for v in tree.leaves() {
            low[v] = (target[v] + ROUNDING).floor() as usize;
            high[v] = (target[v] - ROUNDING).ceil() as usize;
            if band == Band::FivePercent {
                (low[v], high[v]) = fair_range(shares.fair[v] * groups as f64);
            }
        }
        let spread = shares.quota.iter().zip(&caps).map(|(share, cap)| ceiling(*share).min(*cap)).collect();
        let mut board = Board {
            tree,
            width,
            slots: vec![VACANT; groups * width],
            origin: vec![VACANT; groups * width],
            held: vec![Vec::new(); count],
            load: vec![0; count],
            target,
            raise_to: low.clone(),
            lower_to: high.clone(),
            low,
            high,
            spread,
            caps,
            order: BTreeSet::new(),
            barred: vec![Vec::new(); groups],
            needy: vec![0; count],
        };
        for v in tree.leaves() {
            board.order.insert(board.rank(v));
        }
        board
    }

    pub fn groups(&self) -> usize {
        self.slots.len().checked_div(self.width).unwrap_or(0)
    }

    pub fn slots_of(&self, group: usize) -> std::ops::Range<usize> {
        group * self.width..(group + 1) * self.width
    }

    pub fn group_of(&self, slot: usize) -> usize {
        slot / self.width
    }

    /// The disk node in a slot.
    pub fn at(&self, slot: usize) -> Option<usize> {
        Some(self.slots[slot]).filter(|leaf| *leaf != VACANT)
    }

    /// The disk in a slot.
    pub fn disk_at(&self, slot: usize) -> Option<DiskId> {
        self.at(slot).and_then(|leaf| self.tree.nodes[leaf].disk)
    }

    /// Keeps a disk from taking slots of a group.
    pub fn bar(&mut self, group: usize, leaf: usize) {
        self.barred[group].push(leaf);
    }

    /// Remembers where every slot is: from here on moves count.
    pub fn remember_origin(&mut self) {
        self.origin.clone_from(&self.slots);
    }

    /// Has the slot left its disk already?
    pub fn is_moved(&self, slot: usize) -> bool {
        self.origin[slot] != self.slots[slot]
    }

    pub fn held(&self, leaf: usize) -> &[usize] {
        &self.held[leaf]
    }

    pub fn load(&self, v: usize) -> usize {
        self.load[v]
    }

    pub fn low(&self, leaf: usize) -> usize {
        self.low[leaf]
    }

    pub fn high(&self, leaf: usize) -> usize {
        self.high[leaf]
    }

    /// Sets how far settling brings each disk that is outside its band: into it, and on towards its target by
    /// `percent` of that way, so that the next small change finds slack.
    pub fn aim(&mut self, percent: usize) {
        for leaf in self.tree.leaves() {
            let (load, low, high, goal) = (self.load[leaf], self.low[leaf], self.high[leaf], self.goal(leaf));
            self.raise_to[leaf] = (low + low.saturating_sub(load) * percent / 100).min(goal.max(low));
            self.lower_to[leaf] = (high - (load.saturating_sub(high) * percent / 100).min(high)).max(goal.min(high));
        }
    }

    /// The load up to which settling fills a disk that is below its band.
    pub fn raise_to(&self, leaf: usize) -> usize {
        self.raise_to[leaf]
    }

    /// Has the disk slots enough?
    pub fn is_raised(&self, leaf: usize) -> bool {
        self.load[leaf] >= self.raise_to[leaf]
    }

    /// Has the disk no more slots than it should?
    pub fn is_lowered(&self, leaf: usize) -> bool {
        self.load[leaf] <= self.lower_to[leaf]
    }

    /// Is the disk near enough to its share to be left in peace?
    pub fn is_in_band(&self, leaf: usize) -> bool {
        (self.low[leaf]..=self.high[leaf]).contains(&self.load[leaf])
    }

    /// The whole number of slots nearest to a disk's target.
    pub fn goal(&self, leaf: usize) -> usize {
        self.target[leaf].round() as usize
    }

    /// Slots that a node is short of; negative when it holds too many.
    pub fn deficit(&self, v: usize) -> f64 {
        self.target[v] - self.load[v] as f64
    }

    fn steps(&self, v: usize) -> i64 {
        (self.deficit(v) * DEFICIT_STEPS).round() as i64
    }

    /// How badly a disk wants slots: its deficit in steps, and disks outside their band before all others.
    pub fn want(&self, leaf: usize) -> i64 {
        const BEFORE_OTHERS: i64 = 1 << 50;
        let outside = i64::from(self.load[leaf] < self.low[leaf]) - i64::from(self.load[leaf] > self.high[leaf]);
        self.steps(leaf) + outside * BEFORE_OTHERS
    }

    fn rank(&self, leaf: usize) -> (i64, u64, usize) {
        (self.want(leaf), mix(leaf as u64, 0), leaf)
    }

    /// Disks with more slots than their target, the most overloaded first.
    pub fn donors(&self) -> impl Iterator<Item = usize> + '_ {
        self.order.iter().take_while(|(want, _, _)| *want < 0).map(|(_, _, leaf)| *leaf)
    }

    /// Disks with fewer slots than their target, the shortest first.
    pub fn takers(&self) -> impl Iterator<Item = usize> + '_ {
        self.order.iter().rev().take_while(|(want, _, _)| *want > 0).map(|(_, _, leaf)| *leaf)
    }

    /// Puts a disk in a vacant slot.
    pub fn place(&mut self, slot: usize, leaf: usize) {
        debug_assert_eq!(self.slots[slot], VACANT);
        self.order.remove(&self.rank(leaf));
        self.slots[slot] = leaf;
        self.held[leaf].push(slot);
        self.count(leaf, true);
        self.order.insert(self.rank(leaf));
    }

    /// Takes the disk out of a slot and returns it.
    pub fn vacate(&mut self, slot: usize) -> Option<usize> {
        let leaf = self.at(slot)?;
        self.order.remove(&self.rank(leaf));
        self.slots[slot] = VACANT;
        if let Some(position) = self.held[leaf].iter().position(|held| *held == slot) {
            self.held[leaf].swap_remove(position);
        }
        self.count(leaf, false);
        self.order.insert(self.rank(leaf));
        Some(leaf)
    }

    fn count(&mut self, leaf: usize, more: bool) {
        let mut v = leaf;
        loop {
            if more {
                self.load[v] += 1;
            } else {
                self.load[v] -= 1;
            }
            if v == 0 {
                return;
            }
            v = self.tree.nodes[v].parent;
        }
    }

    /// Chunks of a group under a node.
    fn chunks_under(&self, group: usize, v: usize, except: Option<usize>) -> usize {
        let end = self.tree.nodes[v].end;
        self.slots_of(group).filter(|slot| Some(*slot) != except && (v..end).contains(&self.slots[*slot])).count()
    }

    fn limit(&self, v: usize, limits: Limits) -> usize {
        match limits {
            Limits::Spread => self.spread[v],
            Limits::Caps => self.caps[v],
        }
    }

    /// May the group of `slot` have `leaf` in that slot, whatever holds it now?
    pub fn fits(&self, slot: usize, leaf: usize, limits: Limits) -> bool {
        let group = self.group_of(slot);
        if self.barred[group].contains(&leaf) {
            return false;
        }
        let mut v = leaf;
        while v != 0 {
            if self.chunks_under(group, v, Some(slot)) >= self.limit(v, limits) {
                return false;
            }
            v = self.tree.nodes[v].parent;
        }
        true
    }

    /// The smallest domain above the disk of `slot` that holds more of its group than `limits` allow.
    pub fn crowded(&self, slot: usize, limits: Limits) -> Option<usize> {
        let group = self.group_of(slot);
        let mut v = self.at(slot)?;
        while v != 0 {
            if self.chunks_under(group, v, None) > self.limit(v, limits) {
                return Some(v);
            }
            v = self.tree.nodes[v].parent;
        }
        None
    }

    /// A disk for a vacant slot: down the tree, always to where most slots are missing, within the limits. Only disks
    /// that `wanted` accepts, only in subtrees that `promising` accepts.
    pub fn best_disk(
        &self,
        slot: usize,
        limits: Limits,
        promising: &dyn Fn(usize) -> bool,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Option<usize> {
        self.best_under(0, slot, limits, promising, wanted)
    }

    fn best_under(
        &self,
        v: usize,
        slot: usize,
        limits: Limits,
        promising: &dyn Fn(usize) -> bool,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Option<usize> {
        if self.tree.is_leaf(v) {
            return (wanted(v) && !self.barred[self.group_of(slot)].contains(&v)).then_some(v);
        }
        let group = self.group_of(slot);
        let children: Vec<(i64, u64, usize)> = self.tree.nodes[v]
            .children
            .iter()
            .filter(|child| promising(**child))
            .map(|child| (self.steps(*child), mix(*child as u64, group as u64), *child))
            .collect();
        // The first choice nearly always holds, so a heap beats sorting.
        let mut heap = std::collections::BinaryHeap::from(children);
        while let Some((_, _, child)) = heap.pop() {
            if self.chunks_under(group, child, Some(slot)) < self.limit(child, limits) {
                if let Some(leaf) = self.best_under(child, slot, limits, promising, wanted) {
                    return Some(leaf);
                }
            }
        }
        None
    }
}
