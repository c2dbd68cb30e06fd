//! Buckets by owner: every account finds its own, page by page, and others' cost it nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::answer::answer;
use granary_meta::kv::{Cursor, Kv, StateError};
use granary_meta::memory::MemoryShards;
use granary_meta::record::AccountId;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::ShardId;
use scenery::{map, seed, Random};
use std::cell::Cell;
use std::collections::BTreeMap;

const ROOT: ShardId = ShardId::ROOT;

fn create(shards: &mut MemoryShards, name: &str, owner: AccountId) {
    let reply = shards.command(ROOT, 1, Command::CreateBucket { name: name.into(), owner }).unwrap();
    assert!(matches!(reply, Reply::Bucket(_)), "{reply:?}");
}

/// Marks a bucket as being deleted, and removes it too if `end` says so.
fn delete(shards: &mut MemoryShards, name: &str, end: bool) {
    let Answer::Bucket(found) = shards.query(ROOT, &Query::GetBucket { name: name.into() }).unwrap() else { panic!() };
    let (name, bucket) = (name.to_owned(), found.id);
    let begin = Command::BeginDeleteBucket { name: name.clone(), bucket };
    let Reply::Bucket(marked) = shards.command(ROOT, 1, begin).unwrap() else { panic!() };
    if end {
        let end = Command::EndDeleteBucket { name, bucket, attempt: marked.delete_attempt, remove: true };
        assert_eq!(shards.command(ROOT, 1, end).unwrap(), Reply::Done);
    }
}

/// All names, page by page.
fn listed(shards: &MemoryShards, owner: Option<AccountId>, prefix: &str, limit: u32) -> Vec<String> {
    let (mut names, mut after) = (Vec::<String>::new(), String::new());
    loop {
        let query = Query::ListBuckets { owner, prefix: prefix.into(), after, limit };
        let Answer::Buckets { buckets, more } = shards.query(ROOT, &query).unwrap() else { panic!() };
        assert!(buckets.len() <= limit as usize && (!more || !buckets.is_empty()));
        names.extend(buckets.into_iter().map(|bucket| bucket.name));
        if !more {
            return names;
        }
        after = names.last().unwrap().clone();
    }
}

#[test]
fn every_account_finds_its_own_buckets_and_nobody_elses() {
    let mut random = Random(seed("every_account_finds_its_own_buckets_and_nobody_elses"));
    let mut shards = MemoryShards::new(&map()).unwrap();
    let accounts = [1, 2, 256, u64::MAX].map(AccountId);
    // Owner, and whether it is being deleted.
    let mut model: BTreeMap<String, (AccountId, bool)> = BTreeMap::new();
    for _ in 0..600 {
        let name = format!("{}{}", random.pick(&["a", "ab", "b", "bucket-"]), random.below(30));
        match model.get(&name).copied() {
            None => {
                let owner = *random.pick(&accounts);
                create(&mut shards, &name, owner);
                model.insert(name, (owner, false));
            }
            Some((owner, _)) => {
                let end = random.chance(2);
                delete(&mut shards, &name, end);
                if end {
                    model.remove(&name);
                } else {
                    model.insert(name, (owner, true));
                }
            }
        }
        if random.chance(10) {
            let (prefix, limit) = (*random.pick(&["", "a", "ab1", "b", "z"]), 1 + random.below(9) as u32);
            for owner in accounts.map(Some).into_iter().chain([None]) {
                let expected: Vec<&String> = model
                    .iter()
                    .filter(|(name, (of, deleting))| {
                        name.starts_with(prefix) && !deleting && owner.is_none_or(|owner| owner == *of)
                    })
                    .map(|(name, _)| name)
                    .collect();
                let got = listed(&shards, owner, prefix, limit);
                assert_eq!(got.iter().collect::<Vec<_>>(), expected, "{owner:?} {prefix:?} {limit}");
            }
        }
    }
}

/// Counts the entries that are looked at.
struct Counting<'a, K> {
    kv: &'a K,
    entries: Cell<usize>,
}

struct CountingCursor<'a> {
    cursor: Box<dyn Cursor + 'a>,
    entries: &'a Cell<usize>,
}

impl<K: Kv> Kv for Counting<'_, K> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.entries.set(self.entries.get() + 1);
        self.kv.get(key)
    }

    fn cursor<'a>(&'a self, end: &[u8]) -> Box<dyn Cursor + 'a> {
        Box::new(CountingCursor { cursor: self.kv.cursor(end), entries: &self.entries })
    }
}

impl Cursor for CountingCursor<'_> {
    fn seek(&mut self, key: &[u8]) -> Result<(), StateError> {
        self.entries.set(self.entries.get() + 1);
        self.cursor.seek(key)
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.cursor.entry()
    }

    fn next(&mut self) -> Result<(), StateError> {
        self.entries.set(self.entries.get() + 1);
        self.cursor.next()
    }
}

#[test]
fn a_thousand_buckets_of_others_cost_an_account_nothing() {
    let mut shards = MemoryShards::new(&map()).unwrap();
    for number in 0..1000 {
        create(&mut shards, &format!("other-{number:04}"), AccountId(7));
    }
    for name in ["mine-1", "mine-2", "zzz"] {
        create(&mut shards, name, AccountId(8));
    }
    for (owner, expected) in [(8, 3), (9, 0)] {
        let kv = Counting { kv: &shards.shard(ROOT).unwrap().kv, entries: Cell::new(0) };
        let owner = Some(AccountId(owner));
        let query = Query::ListBuckets { owner, prefix: String::new(), after: String::new(), limit: 1000 };
        let Answer::Buckets { buckets, more: false } = answer(ROOT, &kv, &query).unwrap() else { panic!() };
        assert_eq!(buckets.len(), expected);
        assert!(kv.entries.get() < 20, "{} entries were looked at", kv.entries.get());
    }
}
