//! The tree of failure domains, and how many chunks of an average group each part of it is to hold.
//!
//! Depth 0 is the cluster, then zone, rack, server, disk. Nodes stand in preorder, so the subtree of node `v` is the
//! range `v..end(v)`: "is this disk in that rack" is two comparisons, and sums over subtrees are one pass from the
//! back.

use crate::id::DiskId;
use crate::map::Location;
use std::collections::BTreeMap;

/// Depth of disks in the tree.
const DISK_DEPTH: usize = 4;

/// Shares closer to a whole number than this are that number: what is left of floating-point error.
const EXACT: f64 = 1e-6;

/// How far a disk's share may leave its fair one so that a domain holds one chunk less. Below the 5 % that fairness
/// allows, because rounding to whole slots needs the rest.
const SPREAD_TOLERANCE: f64 = 0.03;

/// One disk that can take slots.
pub(super) struct Item<'a> {
    pub id: DiskId,
    pub location: &'a Location,
    /// Above zero.
    pub weight: u32,
}

/// Most chunks of one group in one domain, by kind; `usize::MAX` for no limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caps {
    pub zone: usize,
    pub rack: usize,
    pub server: usize,
}

impl Caps {
    pub const NONE: Caps = Caps { zone: usize::MAX, rack: usize::MAX, server: usize::MAX };

    fn at_depth(self, depth: usize) -> usize {
        match depth {
            0 => usize::MAX,
            1 => self.zone,
            2 => self.rack,
            3 => self.server,
            _ => 1,
        }
    }
}

pub(super) struct Node {
    pub parent: usize,
    pub depth: usize,
    /// One past the last node of the subtree.
    pub end: usize,
    pub children: Vec<usize>,
    /// Weight of a disk; zero elsewhere.
    weight: f64,
    /// The disk, at the leaves.
    pub disk: Option<DiskId>,
}

pub(super) struct Tree {
    pub nodes: Vec<Node>,
    /// Most chunks of a group in each node; one for a disk.
    pub caps: Vec<usize>,
    leaf_of: BTreeMap<DiskId, usize>,
}

/// Chunks of an average group in each node of a tree: the root's is the width of the group.
pub(super) struct Shares {
    /// What to aim at.
    pub quota: Vec<f64>,
    /// What weights and caps alone say; `quota` leaves it by at most [`SPREAD_TOLERANCE`].
    pub fair: Vec<f64>,
}

impl Tree {
    pub fn build(items: &[Item<'_>], caps: Caps) -> Tree {
        let mut by_place: BTreeMap<(&Location, DiskId), u32> = BTreeMap::new();
        for item in items {
            by_place.insert((item.location, item.id), item.weight);
        }
        let root = Node { parent: 0, depth: 0, end: 1, children: Vec::new(), weight: 0.0, disk: None };
        let mut tree = Tree { nodes: vec![root], caps: vec![usize::MAX], leaf_of: BTreeMap::new() };
        // Locations arrive sorted by zone, rack, server, so a domain is complete once the next one begins.
        let mut open: Option<&Location> = None;
        let (mut zone, mut rack, mut server) = (0, 0, 0);
        for ((location, id), weight) in by_place {
            let same_zone = open.is_some_and(|last| last.zone == location.zone);
            let same_rack = same_zone && open.is_some_and(|last| last.rack == location.rack);
            let same_server = same_rack && open.is_some_and(|last| last.server == location.server);
            if !same_zone {
                zone = tree.grow(0, caps, 0.0, None);
            }
            if !same_rack {
                rack = tree.grow(zone, caps, 0.0, None);
            }
            if !same_server {
                server = tree.grow(rack, caps, 0.0, None);
            }
            let leaf = tree.grow(server, caps, f64::from(weight), Some(id));
            tree.leaf_of.insert(id, leaf);
            open = Some(location);
        }
        for v in (1..tree.nodes.len()).rev() {
            let (parent, end) = (tree.nodes[v].parent, tree.nodes[v].end);
            tree.nodes[parent].end = tree.nodes[parent].end.max(end);
        }
        tree
    }

    fn grow(&mut self, parent: usize, caps: Caps, weight: f64, disk: Option<DiskId>) -> usize {
        let (v, depth) = (self.nodes.len(), self.nodes[parent].depth + 1);
        self.nodes.push(Node { parent, depth, end: v + 1, children: Vec::new(), weight, disk });
        self.nodes[parent].children.push(v);
        self.caps.push(caps.at_depth(depth));
        v
    }

    pub fn leaf(&self, disk: DiskId) -> Option<usize> {
        self.leaf_of.get(&disk).copied()
    }

    pub fn is_leaf(&self, v: usize) -> bool {
        self.nodes[v].depth == DISK_DEPTH
    }

    /// The leaves, in order of place.
    pub fn leaves(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.nodes.len()).filter(|v| self.is_leaf(*v))
    }

    /// Domains of that depth.
    pub fn count_at(&self, depth: usize) -> usize {
        self.nodes.iter().filter(|node| node.depth == depth).count()
    }

    /// The most chunks of one group that the tree can take. The caps are nested, so they form a laminar matroid: a
    /// group that keeps them and is shorter than this can always be extended, whatever it holds already.
    pub fn room(&self) -> usize {
        self.room_under(&self.caps)
    }

    /// Shares of a group of `width`, which must not be above [`Tree::room`].
    ///
    /// Fair means max-min fair: shares are proportional to weights, but a disk takes at most one chunk of a group and a
    /// domain at most its cap; what those cannot take goes to the others by weight. Then, level by level from the zones
    /// down, a share just above a whole number is lowered to it if every disk stays fair enough ([`fair_range`]) when
    /// its share of all `groups` is rounded: one disk more in one of two racks is no reason to put four of six chunks
    /// there.
    pub fn shares(&self, width: usize, groups: usize) -> Shares {
        let fair = self.solve(width, &self.caps);
        let mut quota = fair.clone();
        let mut caps = self.caps.clone();
        for depth in 1..DISK_DEPTH {
            let mut tighter = caps.clone();
            let mut changed = false;
            for v in (0..self.nodes.len()).filter(|v| self.nodes[*v].depth == depth) {
                let whole = quota[v].floor();
                if whole >= 1.0 && quota[v] > whole && quota[v] - whole <= SPREAD_TOLERANCE * quota[v] {
                    tighter[v] = whole as usize;
                    changed = true;
                }
            }
            if !changed || self.room_under(&tighter) < width {
                continue;
            }
            let candidate = self.solve(width, &tighter);
            let fair_enough = |v: usize| {
                let (low, high) = fair_range(fair[v] * groups as f64);
                let slots = candidate[v] * groups as f64;
                let near = (candidate[v] - fair[v]).abs() <= SPREAD_TOLERANCE * fair[v];
                near && (slots + EXACT).floor() as usize >= low && (slots - EXACT).ceil() as usize <= high
            };
            if self.leaves().all(fair_enough) {
                (quota, caps) = (candidate, tighter);
            }
        }
        Shares { quota, fair }
    }

    fn room_under(&self, caps: &[usize]) -> usize {
        let mut room = vec![0usize; self.nodes.len()];
        for v in (0..self.nodes.len()).rev() {
            room[v] = if self.is_leaf(v) { 1 } else { room[v].min(caps[v]) };
            if v > 0 {
                room[self.nodes[v].parent] += room[v];
            }
        }
        room[0]
    }

    /// Top down: each node hands its share to its children at one price per weight, found by bisection.
    fn solve(&self, width: usize, caps: &[usize]) -> Vec<f64> {
        let lightest = self.leaves().map(|v| self.nodes[v].weight).fold(f64::INFINITY, f64::min);
        let mut quota = vec![0.0; self.nodes.len()];
        let mut taken = vec![0.0; self.nodes.len()];
        if let Some(root) = quota.first_mut() {
            *root = width as f64;
        }
        for v in 0..self.nodes.len() {
            if self.is_leaf(v) || self.nodes[v].children.is_empty() {
                continue;
            }
            // At `high` every disk is full, so the children take all they can; at `low` nothing.
            let (mut low, mut high) = (0.0, 1.0 / lightest);
            loop {
                let middle = low + (high - low) / 2.0;
                if middle <= low || middle >= high {
                    break;
                }
                if self.take(v, middle, caps, &mut taken) < quota[v] {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            self.take(v, high, caps, &mut taken);
            for &child in &self.nodes[v].children {
                let whole = taken[child].round();
                quota[child] = if (taken[child] - whole).abs() < EXACT { whole } else { taken[child] };
            }
        }
        quota
    }

    /// What the children of `v` take at `price` chunks per weight.
    fn take(&self, v: usize, price: f64, caps: &[usize], taken: &mut [f64]) -> f64 {
        let end = self.nodes[v].end;
        for value in &mut taken[v..end] {
            *value = 0.0;
        }
        for w in (v + 1..end).rev() {
            let node = &self.nodes[w];
            taken[w] = if self.is_leaf(w) { (price * node.weight).min(1.0) } else { taken[w].min(caps[w] as f64) };
            taken[node.parent] += taken[w];
        }
        taken[v]
    }
}

/// Fewest and most slots of a disk whose fair share is `slots`: within 5 %, or rounded to a whole number.
pub(super) fn fair_range(slots: f64) -> (usize, usize) {
    let low = (slots * 0.95 - EXACT).ceil().min((slots + EXACT).floor());
    let high = (slots * 1.05 + EXACT).floor().max((slots - EXACT).ceil());
    (low.max(0.0) as usize, high as usize)
}

/// `share` rounded up to whole chunks, forgiving floating-point error; at least one.
pub(super) fn ceiling(share: f64) -> usize {
    ((share - EXACT).ceil() as usize).max(1)
}

/// A well-mixed number for each pair: the only source of variety in a layout, so that equal maps give equal layouts.
pub(super) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ b.wrapping_add(0x6a09_e667_f3bc_c909).wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
