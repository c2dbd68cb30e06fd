//! Deletions of one bucket at once, with commands that come late or twice: what was acknowledged never lies in a
//! deleted bucket.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::answer::answer;
use granary_meta::apply::apply;
use granary_meta::kv::{MemoryKv, Overlay};
use granary_meta::record::{AccountId, BucketId, BucketRecord, Usage};
use granary_meta::{Answer, Command, Conditions, Query, Reply, VersionPick};
use granary_placement::id::ShardId;
use scenery::{put, request, seed, Random};

const BUCKET: BucketId = BucketId(1);
const OBJECT_SHARDS: u16 = 3;

/// The state of all shards, the root shard too, and a bucket `b` in it.
struct Shards {
    kv: MemoryKv,
    random: Random,
}

impl Shards {
    fn new(seed: u64) -> Shards {
        let mut shards = Shards { kv: MemoryKv::default(), random: Random(seed) };
        let made = shards.send(0, Command::CreateBucket { name: "b".to_owned(), owner: AccountId::ROOT });
        assert!(matches!(made, Reply::Bucket(bucket) if bucket.id == BUCKET));
        shards
    }

    /// Every call is a request of its own: one that is repeated under its id is answered from memory, which is not the
    /// case to fear.
    fn send(&mut self, shard: u16, command: Command) -> Reply {
        let mut overlay = Overlay::new(&self.kv);
        let reply = apply(ShardId(shard), &mut overlay, &request(&mut self.random, 1, command)).unwrap();
        let writes = overlay.into_writes();
        self.kv.write(writes);
        reply
    }

    fn begin(&mut self) -> u64 {
        match self.send(0, begin()) {
            Reply::Bucket(marked) if marked.deleting => marked.delete_attempt,
            other => panic!("{other:?}"),
        }
    }

    fn bucket(&self) -> Option<BucketRecord> {
        match answer(ShardId::ROOT, &self.kv, &Query::GetBucket { name: "b".to_owned() }).unwrap() {
            Answer::Bucket(bucket) => Some(bucket),
            Answer::NoSuchBucket => None,
            other => panic!("{other:?}"),
        }
    }

    fn usage(&self, shard: u16) -> Usage {
        match answer(ShardId(shard), &self.kv, &Query::BucketUsage { bucket: BUCKET }).unwrap() {
            Answer::Usage(usage) => usage,
            other => panic!("{other:?}"),
        }
    }
}

fn begin() -> Command {
    Command::BeginDeleteBucket { name: "b".to_owned(), bucket: BUCKET }
}

fn fence(attempt: u64) -> Command {
    Command::FenceBucket { bucket: BUCKET, attempt }
}

fn unfence(attempt: u64) -> Command {
    Command::UnfenceBucket { bucket: BUCKET, attempt }
}

fn end(attempt: u64, remove: bool) -> Command {
    Command::EndDeleteBucket { name: "b".to_owned(), bucket: BUCKET, attempt, remove }
}

fn delete(key: &str) -> Command {
    let (key, version) = (key.to_owned(), VersionPick::Current);
    Command::DeleteObject { bucket: BUCKET, key, version, conditions: Conditions::default(), rule_epoch: 0 }
}

#[test]
fn a_late_unfence_of_one_deletion_leaves_the_fence_of_the_next() {
    let mut shards = Shards::new(1);
    shards.send(1, put(1, "k", b"x"));
    let first = shards.begin();
    assert_eq!(shards.send(1, fence(first)), Reply::Fenced { empty: false });
    assert_eq!(shards.send(2, fence(first)), Reply::Fenced { empty: true });
    shards.send(1, delete("k"));

    let second = shards.begin();
    assert_eq!(shards.send(1, fence(second)), Reply::Fenced { empty: true });
    assert_eq!(shards.send(2, fence(second)), Reply::Fenced { empty: true });
    assert_eq!(shards.send(2, unfence(first)), Reply::StaleAttempt { current: second });
    assert_eq!(shards.send(2, put(1, "late", b"x")), Reply::BucketFenced);
    assert_eq!(shards.send(0, end(second, true)), Reply::Done);
    assert_eq!(shards.send(0, end(first, false)), Reply::NoSuchBucket);
}

#[test]
fn a_deletion_that_was_taken_over_can_neither_fence_nor_end() {
    let mut shards = Shards::new(2);
    let first = shards.begin();
    assert_eq!(shards.send(1, fence(first)), Reply::Fenced { empty: true });
    let second = shards.begin();
    assert!(second > first);
    let stale = Reply::StaleAttempt { current: second };
    assert_eq!(shards.send(0, end(first, true)), stale);
    assert_eq!(shards.send(0, end(first, false)), stale, "the mark is the second one's");
    assert!(shards.bucket().unwrap().deleting);

    assert_eq!(shards.send(1, unfence(second)), Reply::Done, "an older fence comes off too");
    assert_eq!(shards.send(1, fence(first)), stale);
    assert!(matches!(shards.send(1, put(1, "k", b"x")), Reply::Put { .. }));
    assert_eq!(shards.send(0, end(second, false)), Reply::Done);
    for attempt in [first, second] {
        assert_eq!(shards.send(0, end(attempt, true)), stale, "nothing is marked");
    }
    assert!(!shards.bucket().unwrap().deleting);
    assert_eq!(shards.begin(), second + 1, "numbers go on rising after the mark was taken back");
}

#[test]
fn a_fence_that_comes_behind_its_own_unfence_stays_down() {
    let mut shards = Shards::new(3);
    let attempt = shards.begin();
    assert_eq!(shards.send(1, unfence(attempt)), Reply::Done);
    assert_eq!(shards.send(1, fence(attempt)), Reply::StaleAttempt { current: attempt });
    assert!(matches!(shards.send(1, put(1, "k", b"x")), Reply::Put { .. }));
    assert_eq!(shards.send(1, unfence(attempt)), Reply::Done, "repeating it is harmless");
}

/// A gateway that deletes the bucket, one command at a time.
struct Deletion {
    attempt: u64,
    /// Object shards that the present round has not reached.
    ahead: Vec<u16>,
    unfencing: bool,
    empty: bool,
    stale: bool,
}

impl Deletion {
    fn new(attempt: u64) -> Deletion {
        Deletion { attempt, ahead: (1..=OBJECT_SHARDS).collect(), unfencing: false, empty: true, stale: false }
    }

    /// Its next command, to shards in any order; None when a later attempt took over.
    fn next(&mut self, random: &mut Random) -> Option<(u16, Command)> {
        if self.ahead.is_empty() && !self.unfencing && !self.empty {
            self.unfencing = true;
            self.ahead = (1..=OBJECT_SHARDS).collect();
        }
        if self.ahead.is_empty() {
            return (!self.empty || !self.stale).then(|| (0, end(self.attempt, self.empty)));
        }
        let at = random.below(self.ahead.len() as u64) as usize;
        let shard = self.ahead.swap_remove(at);
        Some((shard, if self.unfencing { unfence(self.attempt) } else { fence(self.attempt) }))
    }

    fn heard(&mut self, reply: &Reply) {
        match reply {
            Reply::Fenced { empty } => self.empty &= empty,
            Reply::StaleAttempt { .. } => self.stale = true,
            Reply::Done => {}
            other => panic!("{other:?}"),
        }
    }
}

/// How often each corner was reached.
#[derive(Debug, Default)]
struct Seen {
    removed: u32,
    taken_back: u32,
    stale_fence: u32,
    stale_unfence: u32,
    stale_removal: u32,
}

impl Seen {
    fn note(&mut self, command: &Command, reply: &Reply) {
        let stale = matches!(reply, Reply::StaleAttempt { .. });
        match command {
            Command::FenceBucket { .. } => self.stale_fence += u32::from(stale),
            Command::UnfenceBucket { .. } => self.stale_unfence += u32::from(stale),
            Command::EndDeleteBucket { remove: true, .. } if stale => self.stale_removal += 1,
            Command::EndDeleteBucket { remove: true, .. } => self.removed += u32::from(*reply == Reply::Done),
            Command::EndDeleteBucket { .. } => self.taken_back += u32::from(*reply == Reply::Done),
            _ => {}
        }
    }
}

/// Deletions, PUTs and deletes of objects in any order, commands that come a second time at any later moment, deletions
/// that are broken off. Ends some time after the bucket is gone, or with a last deletion that nothing disturbs.
fn race(seed: u64, seen: &mut Seen) {
    let mut shards = Shards::new(seed);
    let mut random = Random(seed ^ 0x5eed);
    let mut deletions: Vec<Deletion> = Vec::new();
    let mut sent: Vec<(u16, Command)> = Vec::new();
    for _ in 0..150 {
        let key = format!("k{}", random.below(2));
        let shard = 1 + random.below(u64::from(OBJECT_SHARDS)) as u16;
        match random.below(20) {
            0..=1 if deletions.len() < 3 => {
                if let Reply::Bucket(marked) = shards.send(0, begin()) {
                    deletions.push(Deletion::new(marked.delete_attempt));
                }
            }
            2 => {
                let reply = shards.send(shard, put(1, &key, b"x"));
                assert!(
                    shards.bucket().is_some() || reply == Reply::BucketFenced,
                    "seed {seed}: {reply:?} in a deleted bucket"
                );
            }
            3..=5 => {
                shards.send(shard, delete(&key));
            }
            6 if !sent.is_empty() => {
                let (shard, command) = random.pick(&sent).clone();
                let reply = shards.send(shard, command.clone());
                seen.note(&command, &reply);
            }
            _ if deletions.is_empty() => {}
            7 if random.chance(4) => {
                deletions.swap_remove(0);
            }
            _ => {
                let at = random.below(deletions.len() as u64) as usize;
                let Some((shard, command)) = deletions[at].next(&mut random) else {
                    deletions.swap_remove(at);
                    continue;
                };
                let reply = shards.send(shard, command.clone());
                seen.note(&command, &reply);
                if shard == 0 {
                    deletions.swap_remove(at);
                } else {
                    deletions[at].heard(&reply);
                }
                sent.push((shard, command));
            }
        }
        if shards.bucket().is_none() {
            let usage: Vec<Usage> = (1..=OBJECT_SHARDS).map(|shard| shards.usage(shard)).collect();
            assert!(usage.iter().all(|usage| *usage == Usage::default()), "seed {seed}: {usage:?} in a deleted bucket");
        }
    }
    if shards.bucket().is_none() {
        return;
    }
    // Whatever they left behind, one more deletion sees to it: a bucket with objects takes PUTs again, an empty one
    // goes.
    let mut last = Deletion::new(shards.begin());
    while let Some((shard, command)) = last.next(&mut random) {
        let reply = shards.send(shard, command);
        last.heard(&reply);
        if shard == 0 {
            break;
        }
    }
    assert!(!last.stale, "seed {seed}");
    assert_eq!(shards.bucket().is_none(), last.empty, "seed {seed}");
    for shard in 1..=OBJECT_SHARDS {
        let reply = shards.send(shard, put(1, "k", b"x"));
        assert_eq!(reply == Reply::BucketFenced, last.empty, "seed {seed}, shard {shard}: {reply:?}");
    }
}

#[test]
fn no_acknowledged_put_is_lost_between_deletions_in_any_order() {
    let seed = seed("no_acknowledged_put_is_lost_between_deletions_in_any_order");
    let mut seen = Seen::default();
    for round in 0..2_000 {
        race(seed.wrapping_add(round), &mut seen);
    }
    println!("{seen:?}");
    let corners = [seen.removed, seen.taken_back, seen.stale_fence, seen.stale_unfence, seen.stale_removal];
    assert!(corners.iter().all(|times| *times > 20), "{seen:?}");
}
