//! From a board that breaks rules to one that keeps them, with as few moves as that takes.
//!
//! 1. Slots that break the scheme's own limits are vacated, and every vacant slot is filled ([`Board::fill`]). That
//!    always succeeds: the limits are a laminar matroid, so a group that keeps them can be extended to full width.
//! 2. Disks far from their target are brought to it by single moves; where no single move is legal, by a short chain.
//! 3. Groups that crowd a domain more than the shares demand are spread, within a small allowance of extra moves.

use super::board::{Board, Limits};
use super::tree::mix;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Longest chain of moves that brings one slot to a disk, by what it moves.
const CHAIN_MOVES: usize = 4;
const CHAIN_MOVES_OF_MOVED: usize = 16;

/// Legality checks that all chain searches of one settling may spend: bounds the time on topologies that allow no
/// better.
const CHAIN_CHECKS: u64 = 20_000_000;

/// Extra moves per hundred that are needed: to keep groups spread, and to bring a disk nearer to its target than its
/// band demands. Together they are what a change may move too much.
const SPREAD_PERCENT: usize = 5;
const SLACK_PERCENT: usize = 5;

/// How many moves may go into spreading alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Allowance {
    /// None, and nothing moves for the shares either: only slots without a disk get one.
    Vacant,
    /// A few per hundred of the others.
    Few,
    /// As many as it takes.
    All,
}

/// What searching may cost from here on.
struct Purse {
    /// Legality checks in chains.
    checks: u64,
    /// Extra moves in favour of spreading.
    extra: usize,
}

/// Which slots a chain may move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Through {
    /// Only those that have moved already: costs nothing.
    Moved,
    /// All.
    Any,
}

/// What a chain may do.
#[derive(Debug, Clone, Copy)]
struct Search {
    limits: Limits,
    through: Through,
}

/// How a search reached a disk: the slot that moves between it and the disk before, that disk, and the number of moves.
#[derive(Debug, Clone, Copy)]
struct Step {
    slot: usize,
    before: usize,
    moves: usize,
}

impl Board<'_> {
    /// Makes every rule hold. Returns false when slots stay vacant, which only a tree without room for a group causes,
    /// or disks that may not take a slot of it.
    pub fn settle(&mut self, allowance: Allowance) -> bool {
        if allowance != Allowance::Vacant {
            self.vacate_excess();
        }
        let Some(filled) = self.fill() else { return false };
        let mut purse = Purse { checks: CHAIN_CHECKS, extra: 0 };
        self.rearrange_moved(&mut purse);
        if allowance == Allowance::Vacant {
            return true;
        }
        self.aim(SLACK_PERCENT);
        let needy = self.needy_disks();
        let lacking: usize = needy.iter().map(|leaf| self.low(*leaf).saturating_sub(self.load(*leaf))).sum();
        purse.extra = match allowance {
            Allowance::Vacant => 0,
            Allowance::Few => (filled + lacking) * SPREAD_PERCENT / 100,
            Allowance::All => usize::MAX,
        };
        self.spread_on_the_way(&needy);
        self.raise(&needy, &mut purse);
        self.lower(&mut purse);
        self.spread_rest(purse.extra);
        true
    }

    fn vacate_excess(&mut self) {
        for group in 0..self.groups() {
            loop {
                let excess = self.slots_of(group).filter(|slot| self.crowded(*slot, Limits::Caps).is_some());
                let Some(slot) =
                    excess.min_by_key(|slot| self.at(*slot).map(|leaf| (self.deficit(leaf) * 1000.0) as i64))
                else {
                    break;
                };
                self.vacate(slot);
            }
        }
    }

    /// Returns how many slots were vacant; None when one stays so. All that can be filled are.
    fn fill(&mut self) -> Option<usize> {
        let vacant: Vec<usize> =
            (0..self.groups()).flat_map(|group| self.slots_of(group)).filter(|slot| self.at(*slot).is_none()).collect();
        let mut all = true;
        for &slot in &vacant {
            let any = |_| true;
            let found = self.best_disk(slot, Limits::Spread, &any, &any);
            match found.or_else(|| self.best_disk(slot, Limits::Caps, &any, &any)) {
                Some(leaf) => self.place(slot, leaf),
                None => all = false,
            }
        }
        all.then_some(vacant.len())
    }

    /// Slots are filled one after the other, so the last ones may find only full disks open to them: lets the slots
    /// that have moved change places.
    fn rearrange_moved(&mut self, purse: &mut Purse) {
        let leaves: Vec<usize> = self.tree.leaves().collect();
        // Rather a crowded domain than a move more: crowding is mended below when there are moves to spare.
        for limits in [Limits::Spread, Limits::Caps] {
            let search = Search { limits, through: Through::Moved };
            for &leaf in &leaves {
                while self.load(leaf) > self.high(leaf) && self.chain(leaf, false, search, purse) {}
                while self.load(leaf) < self.low(leaf) && self.chain(leaf, true, search, purse) {}
            }
        }
    }

    fn move_slot(&mut self, slot: usize, leaf: usize) {
        self.vacate(slot);
        self.place(slot, leaf);
    }

    /// Disks with too few slots, those that lack most first.
    fn needy_disks(&self) -> Vec<usize> {
        let mut needy: Vec<usize> = self.tree.leaves().filter(|leaf| self.load(*leaf) < self.low(*leaf)).collect();
        needy.sort_by_key(|leaf| (std::cmp::Reverse(self.goal(*leaf).saturating_sub(self.load(*leaf))), *leaf));
        needy
    }

    /// Moves that the targets need and that relieve a crowded domain as well: a new rack takes first what lies too
    /// close together.
    fn spread_on_the_way(&mut self, needy: &[usize]) {
        if needy.is_empty() {
            return;
        }
        for &leaf in needy {
            self.mark_needy(leaf, true);
        }
        let lacking: usize = needy.iter().map(|leaf| self.raise_to(*leaf).saturating_sub(self.load(*leaf))).sum();
        let over: usize = self.tree.leaves().map(|leaf| self.load(leaf).saturating_sub(self.high(leaf))).sum();
        // What disks outside their band must give away is enough for some of the needy; others may give only the rest.
        let mut from_others = lacking.saturating_sub(over);
        for group in 0..self.groups() {
            let mut useless = Vec::new();
            while let Some(slot) = self.crowded_slot(group, &useless) {
                let in_band = self.at(slot).is_some_and(|leaf| self.is_in_band(leaf));
                if in_band && from_others == 0 {
                    useless.push(slot);
                    continue;
                }
                let Some(leaf) = self.vacate(slot) else { break };
                let in_need = |v: usize| self.needy[v] > 0;
                match self.best_disk(slot, Limits::Spread, &in_need, &in_need) {
                    Some(taker) => {
                        self.place(slot, taker);
                        from_others -= usize::from(in_band);
                        if self.is_raised(taker) {
                            self.mark_needy(taker, false);
                        }
                    }
                    None => {
                        self.place(slot, leaf);
                        useless.push(slot);
                    }
                }
            }
        }
        self.needy.fill(0);
    }

    /// Of the slots of a group in crowded domains, the one on the most overloaded disk that can spare one.
    fn crowded_slot(&self, group: usize, except: &[usize]) -> Option<usize> {
        let slots =
            self.slots_of(group).filter(|slot| !except.contains(slot) && self.crowded(*slot, Limits::Spread).is_some());
        let wants = slots.filter_map(|slot| {
            let leaf = self.at(slot).filter(|leaf| self.load(*leaf) > self.low(*leaf))?;
            Some((self.want(leaf), slot))
        });
        wants.min().map(|(_, slot)| slot)
    }

    fn mark_needy(&mut self, leaf: usize, on: bool) {
        let mut v = leaf;
        loop {
            self.needy[v] = if on { self.needy[v] + 1 } else { self.needy[v].saturating_sub(1) };
            if v == 0 {
                return;
            }
            v = self.tree.nodes[v].parent;
        }
    }

    /// Brings slots to disks that lack them: by single moves that keep groups spread, by chains that do while the purse
    /// allows it, then by moves that keep only the caps.
    fn raise(&mut self, needy: &[usize], purse: &mut Purse) {
        for limits in [Limits::Spread, Limits::Caps] {
            for &taker in needy {
                let mut useless = BTreeSet::new();
                while !self.is_raised(taker) {
                    let donor = self.donors().find(|donor| !useless.contains(donor));
                    match donor.map(|donor| (donor, self.slot_for_need(donor, taker, limits))) {
                        Some((_, Some(slot))) => self.move_slot(slot, taker),
                        Some((donor, None)) => {
                            useless.insert(donor);
                        }
                        // A chain moves other disks' slots too, so it must be worth it.
                        None if self.is_in_band(taker) => break,
                        None if self.chain(taker, true, Search { limits, through: Through::Any }, purse) => {}
                        None => break,
                    }
                }
            }
        }
    }

    /// A donor outside its band gives even what crowds a domain: else it would have to move a slot more elsewhere.
    fn slot_for_need(&self, donor: usize, taker: usize, limits: Limits) -> Option<usize> {
        let slot = self.slot_to_give(donor, taker, limits);
        slot.or_else(|| (!self.is_in_band(donor)).then(|| self.slot_to_give(donor, taker, Limits::Caps)).flatten())
    }

    /// Takes slots from disks that have too many, in the same way.
    fn lower(&mut self, purse: &mut Purse) {
        let over: Vec<usize> = self.tree.leaves().filter(|leaf| self.load(*leaf) > self.high(*leaf)).collect();
        for limits in [Limits::Spread, Limits::Caps] {
            for &donor in &over {
                let mut useless = BTreeSet::new();
                while !self.is_lowered(donor) {
                    let taker = self.takers().find(|taker| !useless.contains(taker));
                    match taker.map(|taker| (taker, self.slot_to_give(donor, taker, limits))) {
                        Some((taker, Some(slot))) => self.move_slot(slot, taker),
                        Some((taker, None)) => {
                            useless.insert(taker);
                        }
                        None if self.is_in_band(donor) => break,
                        None if self.chain(donor, false, Search { limits, through: Through::Any }, purse) => {}
                        None => break,
                    }
                }
            }
        }
    }

    /// The slot of `donor` that `taker` may have: one that has moved already, then one from a crowded domain, then any.
    fn slot_to_give(&self, donor: usize, taker: usize, limits: Limits) -> Option<usize> {
        let fitting = self.held(donor).iter().copied().filter(|slot| self.fits(*slot, taker, limits));
        fitting.min_by_key(|slot| {
            let relieves = self.crowded(*slot, Limits::Spread).is_some();
            (!self.is_moved(*slot), !relieves, mix(self.group_of(*slot) as u64, taker as u64))
        })
    }

    /// Brings one slot to `start` (`pull`) or away from it, if need be through other disks, whose loads stay as they
    /// are. Breadth first, so by the fewest moves; each move of a chain is in another group, so each is still legal
    /// when its turn comes. Returns false when there is no chain.
    fn chain(&mut self, start: usize, pull: bool, search: Search, purse: &mut Purse) -> bool {
        let longest = match (search.through, search.limits) {
            (Through::Moved, _) => CHAIN_MOVES_OF_MOVED,
            (Through::Any, Limits::Caps) => CHAIN_MOVES,
            (Through::Any, Limits::Spread) => CHAIN_MOVES.min(purse.extra.saturating_add(1)),
        };
        let mut reached = BTreeMap::from([(start, Step { slot: usize::MAX, before: start, moves: 0 })]);
        let mut queue = VecDeque::from([start]);
        let leaves: Vec<usize> = self.tree.leaves().collect();
        while let Some(here) = queue.pop_front() {
            let (used, moves) = self.groups_on_the_way(&reached, here);
            if moves == longest {
                continue;
            }
            for &next in &leaves {
                if reached.contains_key(&next) {
                    continue;
                }
                let (giver, taker) = if pull { (next, here) } else { (here, next) };
                purse.checks = purse.checks.saturating_sub(self.held(giver).len() as u64 + 1);
                if purse.checks == 0 {
                    return false;
                }
                let slots = self.held(giver).iter().copied();
                let slots = slots.filter(|slot| search.through == Through::Any || self.is_moved(*slot));
                let slots = slots.filter(|slot| !used.contains(&self.group_of(*slot)));
                let fitting = slots.filter(|slot| self.fits(*slot, taker, search.limits));
                let Some(slot) = fitting.min_by_key(|slot| (!self.is_moved(*slot), *slot)) else { continue };
                reached.insert(next, Step { slot, before: here, moves: moves + 1 });
                if self.ends_chain(next, pull) {
                    if (search.through, search.limits) == (Through::Any, Limits::Spread) {
                        purse.extra = purse.extra.saturating_sub(moves);
                    }
                    self.walk_back(next, start, pull, &reached);
                    return true;
                }
                queue.push_back(next);
            }
        }
        false
    }

    /// Can the disk do with one slot less (`pull`) or more?
    fn ends_chain(&self, leaf: usize, pull: bool) -> bool {
        if pull {
            self.load(leaf) > self.low(leaf)
        } else {
            self.load(leaf) < self.high(leaf)
        }
    }

    /// The groups in which a chain up to `from` moves slots, and how many moves that is.
    fn groups_on_the_way(&self, reached: &BTreeMap<usize, Step>, from: usize) -> (Vec<usize>, usize) {
        let (mut here, mut groups) = (from, Vec::new());
        while let Some(step) = reached.get(&here).filter(|step| step.moves > 0) {
            groups.push(self.group_of(step.slot));
            here = step.before;
        }
        let moves = groups.len();
        (groups, moves)
    }

    fn walk_back(&mut self, end: usize, start: usize, pull: bool, reached: &BTreeMap<usize, Step>) {
        let mut here = end;
        while here != start {
            let Some(step) = reached.get(&here) else { break };
            self.move_slot(step.slot, if pull { step.before } else { here });
            here = step.before;
        }
    }

    /// Spreads groups that crowd a domain, while every disk stays inside its band.
    fn spread_rest(&mut self, mut budget: usize) {
        for group in 0..self.groups() {
            for slot in self.slots_of(group) {
                let costs = !self.is_moved(slot);
                if budget == 0 && costs {
                    continue;
                }
                let Some(leaf) = self.at(slot).filter(|leaf| self.load(*leaf) > self.low(*leaf)) else { continue };
                if self.crowded(slot, Limits::Spread).is_none() {
                    continue;
                }
                self.vacate(slot);
                let taker = self.best_disk(slot, Limits::Spread, &|_| true, &|v| self.load(v) < self.high(v));
                self.place(slot, taker.unwrap_or(leaf));
                if costs && self.is_moved(slot) {
                    budget -= 1;
                }
            }
        }
    }
}
