//! Records with versions of their own, and feature levels: replicas of two builds write the same bytes until the level
//! is raised.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::apply::{apply_by, Tx};
use granary_meta::codec::{decode, encode, encode_at, other_version, plain, FeatureLevel, Record};
use granary_meta::keys::{kind, Keys};
use granary_meta::kv::{MemoryKv, Overlay, StateError};
use granary_meta::level::{Build, FIRST_FEATURE_LEVEL, MAX_FEATURE_LEVEL};
use granary_meta::memory::{MemoryError, MemoryShards};
use granary_meta::record::AccountId;
use granary_meta::{Answer, Command, MetaRequest, Query, Reply, ShardRequest};
use granary_placement::id::{Epoch, ShardId};
use scenery::{away_map, map, put, request, seed, Random};
use serde::{Deserialize, Serialize};

const SHARD: ShardId = ShardId(1);

/// The older build's record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Old {
    text: String,
}

impl Record for Old {
    const VERSION: u8 = 1;

    fn version_at(_level: u32) -> u8 {
        1
    }
}

/// The newer build's: one field more, written from level 2 on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct New {
    text: String,
    author: u64,
}

impl New {
    fn migrate(from: Old) -> New {
        New { text: from.text, author: 1 }
    }
}

impl Record for New {
    const VERSION: u8 = 2;

    fn version_at(level: u32) -> u8 {
        if level < 2 {
            1
        } else {
            2
        }
    }

    fn encode_as(&self, version: u8, out: Vec<u8>) -> Result<Vec<u8>, StateError> {
        match version {
            1 => plain::encode(&Old { text: self.text.clone() }, out),
            _ => plain::encode(self, out),
        }
    }

    fn decode_as(version: u8, body: &[u8]) -> Result<New, StateError> {
        match version {
            1 => plain::decode(body).map(New::migrate),
            2 => plain::decode(body),
            other => Err(other_version(other)),
        }
    }
}

#[test]
fn a_record_reads_every_version_it_had_and_writes_the_one_of_the_level() {
    let old = Old { text: "hi".into() };
    let migrated = New { text: "hi".into(), author: 1 };
    assert_eq!(encode(&old).unwrap(), b"\x01\x02hi");
    assert_eq!(decode::<New>(b"\x01\x02hi").unwrap(), migrated);
    assert_eq!(decode::<New>(b"\x02\x02hi\x01").unwrap(), migrated);
    assert_eq!(encode_at(1, &migrated).unwrap(), b"\x01\x02hi");
    assert_eq!(encode_at(2, &migrated).unwrap(), b"\x02\x02hi\x01");
    for bad in [&b""[..], b"\x03\x02hi", b"\x01\x02hi\x01", b"\x02\x02hi"] {
        assert!(matches!(decode::<New>(bad), Err(StateError::Value(_))), "{bad:?}");
    }
    assert!(matches!(decode::<Old>(b"\x02\x02hi\x01"), Err(StateError::Value(_))), "the older build cannot know");
}

/// A replica of the shard, run by a build that writes a note with each command beside what `apply` writes.
struct Replica {
    kv: MemoryKv,
    build: Build,
}

impl Replica {
    fn apply(&mut self, request: &MetaRequest, note_as_new: bool) -> Result<Reply, StateError> {
        let mut batch = Overlay::new(&self.kv);
        let reply = apply_by(self.build, SHARD, &mut batch, request)?;
        let keys = Keys::new(SHARD);
        let level = level(&batch);
        let mut tx = Tx { batch: &mut batch, keys, now_ms: 1, account: AccountId::ROOT, build: self.build, level };
        let text = format!("{}", request.now_ms);
        let key = keys.single(b'n');
        if note_as_new {
            let author = tx.load::<New>(&key)?.map_or(1, |note| note.author);
            tx.store(key, &New { text, author })?;
        } else {
            tx.load::<Old>(&key)?;
            tx.store(key, &Old { text })?;
        }
        let writes = batch.into_writes();
        self.kv.write(writes);
        Ok(reply)
    }
}

fn level(batch: &Overlay<'_, MemoryKv>) -> u32 {
    let stored = batch.get(&Keys::new(SHARD).single(kind::LEVEL)).unwrap();
    stored.map_or(FIRST_FEATURE_LEVEL, |bytes| decode::<FeatureLevel>(&bytes).unwrap().0)
}

#[test]
fn two_builds_write_the_same_bytes_until_the_level_is_raised() {
    let seed = seed("two_builds_write_the_same_bytes_until_the_level_is_raised");
    let mut random = Random(seed);
    let mut older = Replica { kv: MemoryKv::default(), build: Build { max_level: 1 } };
    let mut newer = Replica { kv: MemoryKv::default(), build: Build { max_level: 2 } };
    for step in 0..200u64 {
        let command = match random.below(10) {
            0 => Command::SetFeatureLevel { level: 1 },
            1 => Command::SetFeatureLevel { level: 3 + random.below(9) as u32 },
            _ => {
                let key = *random.pick(&["a", "b", "c"]);
                put(1, key, &step.to_be_bytes())
            }
        };
        let refused = matches!(command, Command::SetFeatureLevel { level } if level > 1);
        let sent = request(&mut random, step, command);
        let (by_older, by_newer) = (older.apply(&sent, false).unwrap(), newer.apply(&sent, true).unwrap());
        assert_eq!(by_older, by_newer, "seed {seed}");
        assert_eq!(matches!(by_newer, Reply::Refused(_)), refused, "one level at a time");
        assert!(older.kv == newer.kv, "seed {seed} step {step}");
    }
    let raise = request(&mut random, 200, Command::SetFeatureLevel { level: 2 });
    let before = older.kv.clone();
    assert_eq!(older.apply(&raise, false), Err(StateError::Level { level: 2, known: 1 }));
    assert!(older.kv == before, "it stops, and neither applies nor skips");
    assert_eq!(newer.apply(&raise, true), Ok(Reply::Done));
    let key = Keys::new(SHARD).single(b'n');
    assert_eq!(newer.kv.entries[&key].first(), Some(&2), "from here on the newer version");

    // The state as a snapshot would bring it: the older build does not run on it.
    let mut behind = Replica { kv: newer.kv.clone(), build: Build { max_level: 1 } };
    let next = request(&mut random, 201, Command::Noop);
    assert_eq!(behind.apply(&next, false), Err(StateError::Level { level: 2, known: 1 }));
}

#[test]
fn no_disk_is_away_below_the_level_whose_builds_can_read_that() {
    let mut shards = MemoryShards::new(&map()).unwrap();
    let away = away_map(&map());
    let command = || Command::SetMap { map: Box::new(away.clone()) };
    let mut number = 0;
    let mut serve = |shards: &mut MemoryShards| {
        number += 1;
        let sent = request(&mut Random(number), 1, command());
        shards.serve(ShardId::ROOT, &ShardRequest::Command(sent).encode().unwrap())
    };
    let newest = Query::GetMap { newer_than: Epoch(0) };
    let before = Answer::Map(Box::new(map()));
    // The leader keeps it out of the log, where an older build would fall over it; one that is there all the same is
    // refused by every newer build.
    let refused = serve(&mut shards).unwrap_err();
    assert!(matches!(&refused, MemoryError::BadBytes(_)) && refused.to_string().contains("--raise"), "{refused}");
    assert!(
        matches!(shards.command(ShardId::ROOT, 1, command()).unwrap(), Reply::Refused(why) if why.contains("--raise"))
    );
    assert_eq!(shards.query(ShardId::ROOT, &newest).unwrap(), before);
    assert!(encode_at(1, &away).is_err(), "nothing writes it as of the version before");

    assert_eq!(shards.command(ShardId::ROOT, 1, Command::SetFeatureLevel { level: 2 }).unwrap(), Reply::Done);
    serve(&mut shards).unwrap();
    assert_eq!(shards.query(ShardId::ROOT, &newest).unwrap(), Answer::Map(Box::new(away)));
}

#[test]
fn a_level_unknown_to_the_build_is_refused_before_it_is_in_the_log() {
    let mut shards = MemoryShards::new(&map()).unwrap();
    for shard in [ShardId::ROOT, SHARD] {
        assert_eq!(shards.query(shard, &Query::FeatureLevel).unwrap(), Answer::FeatureLevel(FIRST_FEATURE_LEVEL));
        let raise = request(&mut Random(1), 1, Command::SetFeatureLevel { level: MAX_FEATURE_LEVEL + 1 });
        let bytes = ShardRequest::Command(raise).encode().unwrap();
        assert!(matches!(shards.serve(shard, &bytes), Err(MemoryError::BadBytes(_))));
        let same = Command::SetFeatureLevel { level: FIRST_FEATURE_LEVEL };
        assert_eq!(shards.command(shard, 1, same).unwrap(), Reply::Done);
    }
}
