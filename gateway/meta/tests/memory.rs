//! Shards in memory answer as a leader would, and cluster settings in them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::memory::{MemoryError, MemoryShards};
use granary_meta::record::BucketId;
use granary_meta::settings::MAX_SETTINGS;
use granary_meta::{Answer, Command, MetaRequest, Query, Reply, ShardRequest, ShardResponse, VersionPick};
use granary_placement::id::{Epoch, ShardId};
use scenery::{map, put, request, Random};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

fn send(shards: &mut MemoryShards, shard: ShardId, request: &MetaRequest) -> Reply {
    let bytes = ShardRequest::Command(request.clone()).encode().unwrap();
    match ShardResponse::decode(&shards.serve(shard, &bytes).unwrap()).unwrap() {
        ShardResponse::Reply(reply) => reply,
        other => panic!("{other:?}"),
    }
}

fn ask(shards: &mut MemoryShards, shard: ShardId, query: Query) -> Answer {
    let bytes = ShardRequest::Query(query).encode().unwrap();
    match ShardResponse::decode(&shards.serve(shard, &bytes).unwrap()).unwrap() {
        ShardResponse::Answer(answer) => answer,
        other => panic!("{other:?}"),
    }
}

#[test]
fn shards_in_memory_serve_bytes_and_tell_what_was_applied() {
    let mut shards = MemoryShards::new(&map()).unwrap();
    assert_eq!(ask(&mut shards, ShardId::ROOT, Query::GetMap { newer_than: Epoch(0) }), Answer::Map(Box::new(map())));
    let told = Arc::new(Mutex::new(Vec::new()));
    let to = told.clone();
    shards.observe(Box::new(move |shard, request, reply| {
        to.lock().unwrap().push((shard, request.clone(), reply.clone()));
    }));

    let sent = request(&mut Random(1), 5, put(7, "k", b"body"));
    let reply = send(&mut shards, ShardId(2), &sent);
    assert!(matches!(reply, Reply::Put { .. }));
    assert_eq!(send(&mut shards, ShardId(2), &sent), reply, "repeated under its id");
    assert_eq!(*told.lock().unwrap(), vec![(ShardId(2), sent.clone(), reply.clone()); 2]);

    let get = Query::GetObject { bucket: BucketId(7), key: "k".to_owned(), version: VersionPick::Current };
    assert!(matches!(ask(&mut shards, ShardId(2), get.clone()), Answer::Object(_)));
    assert_eq!(shards.query(ShardId(1), &get).unwrap(), Answer::NoSuchKey, "another shard has its own state");
    assert_eq!(shards.command(ShardId(1), 6, Command::Noop).unwrap(), Reply::Done);
    assert_eq!(told.lock().unwrap().len(), 2, "the test's own commands are not told");
    assert!(shards.shard(ShardId(1)).is_some_and(|shard| !shard.kv.entries.is_empty()));

    assert!(matches!(shards.serve(ShardId(2), b"\x01nonsense"), Err(MemoryError::BadBytes(_))));
    assert_eq!(shards.serve(ShardId(9), b""), Err(MemoryError::NoSuchShard(ShardId(9))));
}

fn set(name: &str, value: Option<&str>) -> Command {
    Command::SetSetting { name: name.to_owned(), value: value.map(str::to_owned) }
}

#[test]
fn settings_have_an_epoch_and_go_out_only_when_newer() {
    let mut shards = MemoryShards::new(&map()).unwrap();
    let root = ShardId::ROOT;
    assert_eq!(shards.query(root, &Query::GetSettings { newer_than: 0 }).unwrap(), Answer::SettingsUnchanged);
    for (name, value, epoch) in [
        ("heal.out_after", Some("15s"), 1),
        ("heal.pace", Some("1"), 2),
        ("heal.pace", Some("1"), 2),
        ("heal.pace", Some("2"), 3),
        ("heal.out_after", None, 4),
        ("heal.out_after", None, 4),
    ] {
        assert_eq!(shards.command(root, 1, set(name, value)).unwrap(), Reply::Settings { epoch }, "{name} {value:?}");
    }
    let values = BTreeMap::from([("heal.pace".to_owned(), "2".to_owned())]);
    let now = Answer::Settings { epoch: 4, values };
    assert_eq!(shards.query(root, &Query::GetSettings { newer_than: 3 }).unwrap(), now);
    assert_eq!(shards.query(root, &Query::GetSettings { newer_than: 4 }).unwrap(), Answer::SettingsUnchanged);
}

#[test]
fn malformed_settings_are_refused_and_settings_are_bounded() {
    let mut shards = MemoryShards::new(&map()).unwrap();
    let root = ShardId::ROOT;
    let (long_name, long_value) = ("n".repeat(65), "v".repeat(257));
    for (name, value) in
        [("", Some("1")), ("Heal", Some("1")), ("heal out", None), (&*long_name, None), ("heal.x", Some(&*long_value))]
    {
        assert!(matches!(shards.command(root, 1, set(name, value)).unwrap(), Reply::Refused(_)), "{name:?}");
    }
    for number in 0..MAX_SETTINGS {
        shards.command(root, 1, set(&format!("n{number}"), Some("1"))).unwrap();
    }
    assert!(matches!(shards.command(root, 1, set("more", Some("1"))).unwrap(), Reply::Refused(_)));
    assert!(matches!(shards.command(root, 1, set("n0", Some("2"))).unwrap(), Reply::Settings { .. }));
    assert!(matches!(shards.command(ShardId(1), 1, set("n0", None)).unwrap(), Reply::Refused(_)));
}
