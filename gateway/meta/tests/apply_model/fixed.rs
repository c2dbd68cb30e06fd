//! Corners of `apply`, one by one.

use crate::common::{extent, inline, put, record, request, Random};
use crate::{KEYS, SHARD};
use granary_meta::answer::answer;
use granary_meta::apply::apply;
use granary_meta::kv::{MemoryKv, Overlay};
use granary_meta::record::{AccountId, BucketId, ExtentRef, ObjectData, Usage};
use granary_meta::{Answer, ChunkRef, Command, Conditions, ListFrom, ListItem, MetaRequest, Query, Reply};
use granary_placement::id::Epoch;

#[test]
fn same_commands_give_the_same_bytes_in_any_batching() {
    let mut random = Random(11);
    let requests: Vec<MetaRequest> = (0..300)
        .map(|i| request(&mut Random(i), 5 + i, put(1, KEYS[(random.below(12)) as usize], &[i as u8; 9])))
        .collect();
    let mut states = Vec::new();
    for step in [1usize, 7, 300] {
        let mut kv = MemoryKv::default();
        for chunk in requests.chunks(step) {
            let mut overlay = Overlay::new(&kv);
            for request in chunk {
                apply(SHARD, &mut overlay, request).unwrap();
            }
            let writes = overlay.into_writes();
            kv.write(writes);
        }
        states.push(kv);
    }
    assert!(states[0] == states[1] && states[1] == states[2]);
}

fn apply_one(kv: &mut MemoryKv, request: &MetaRequest) -> Reply {
    let mut overlay = Overlay::new(kv);
    let reply = apply(SHARD, &mut overlay, request).unwrap();
    let writes = overlay.into_writes();
    kv.write(writes);
    reply
}

#[test]
fn request_window_is_bounded_and_repeats_inside_it_apply_once() {
    let mut kv = MemoryKv::default();
    let mut random = Random(5);
    let first = request(&mut random, 1, put(1, "k", b"one"));
    let reply = apply_one(&mut kv, &first);
    let window = granary_meta::apply::REQUEST_WINDOW;
    for _ in 0..window - 1 {
        let noop = request(&mut random, 2, Command::Noop);
        apply_one(&mut kv, &noop);
    }
    assert_eq!(apply_one(&mut kv, &first), reply, "still in the window");
    let entries = kv.entries.len();
    for _ in 0..100 {
        let noop = request(&mut random, 3, Command::Noop);
        apply_one(&mut kv, &noop);
    }
    assert_eq!(kv.entries.len(), entries, "the window grows");
}

#[test]
fn an_extent_is_not_committed_twice_nor_out_of_the_garbage() {
    let mut kv = MemoryKv::default();
    let mut random = Random(6);
    let data = ObjectData::Extents(vec![extent(&mut random, 10)]);
    let put_data = |data: &ObjectData, key: &str| Command::PutObject {
        bucket: BucketId(1),
        key: key.to_owned(),
        record: record(data.clone(), 10, "e"),
        missing: Vec::new(),
        map_epoch: Epoch(1),
        conditions: Conditions::default(),
        rule_epoch: 0,
    };
    let first = request(&mut random, 1, put_data(&data, "a"));
    assert!(matches!(apply_one(&mut kv, &first), Reply::Put { .. }));
    let again = request(&mut random, 2, put_data(&data, "b"));
    assert!(matches!(apply_one(&mut kv, &again), Reply::Refused(_)));
    let over = request(&mut random, 3, put(1, "a", b"new"));
    assert!(matches!(apply_one(&mut kv, &over), Reply::Put { .. }));
    let late = request(&mut random, 4, put_data(&data, "a"));
    assert!(matches!(apply_one(&mut kv, &late), Reply::Refused(_)), "its chunks are about to be deleted");
}

#[test]
fn malformed_commands_are_refused_and_change_nothing() {
    let mut random = Random(8);
    let whole = extent(&mut random, 10);
    let narrow = ExtentRef { slots: vec![0, 1], ..whole.clone() };
    let put_data = |key: &str, data: ObjectData, size: u64, missing: Vec<ChunkRef>| Command::PutObject {
        bucket: BucketId(1),
        key: key.to_owned(),
        record: record(data, size, "e"),
        missing,
        map_epoch: Epoch(1),
        conditions: Conditions::default(),
        rule_epoch: 0,
    };
    let chunk = |index| ChunkRef { group: whole.group, extent: whole.extent, index };
    let extents = |list: Vec<ExtentRef>| ObjectData::Extents(list);
    let bad = vec![
        put_data("", inline(b"x"), 1, vec![]),
        put_data("a\0b", inline(b"x"), 1, vec![]),
        put_data(&"k".repeat(1025), inline(b"x"), 1, vec![]),
        put_data("a", inline(b"x"), 2, vec![]),
        put_data("a", ObjectData::Inline { bytes: bytes::Bytes::from_static(b"x"), crc32: 0 }, 1, vec![]),
        put_data("a", extents(vec![whole.clone()]), 11, vec![]),
        put_data("a", extents(vec![whole.clone(), whole.clone()]), 20, vec![]),
        put_data("a", extents(vec![narrow]), 10, vec![]),
        put_data("a", extents(vec![whole.clone()]), 10, vec![chunk(0), chunk(1)]),
        put_data("a", extents(vec![whole.clone()]), 10, vec![chunk(9)]),
        put_data("a", inline(b"x"), 1, vec![chunk(0)]),
        Command::CreateBucket { name: "b".to_owned(), owner: AccountId::ROOT },
    ];
    for command in bad {
        let mut kv = MemoryKv::default();
        let sent = request(&mut random, 1, command);
        assert!(matches!(apply_one(&mut kv, &sent), Reply::Refused(_)), "{sent:?}");
        let usage = answer(SHARD, &kv, &Query::BucketUsage { bucket: BucketId(1) }).unwrap();
        assert_eq!(usage, Answer::Usage(Usage::default()));
    }
    let mut kv = MemoryKv::default();
    let one_missing = request(&mut random, 1, put_data("a", extents(vec![whole.clone()]), 10, vec![chunk(3)]));
    assert!(matches!(apply_one(&mut kv, &one_missing), Reply::Put { .. }));
}

#[test]
fn listing_keeps_byte_order_across_delimiters() {
    let mut kv = MemoryKv::default();
    let mut random = Random(9);
    for key in ["skel/x", "skel.other/x", "skel0", "skel"] {
        let sent = request(&mut random, 1, put(1, key, b"x"));
        apply_one(&mut kv, &sent);
    }
    let asked = Query::ListObjects {
        bucket: BucketId(1),
        prefix: String::new(),
        delimiter: "/".to_owned(),
        from: ListFrom::Start,
        limit: 10,
    };
    let Answer::Listing { items, more: false } = answer(SHARD, &kv, &asked).unwrap() else { panic!() };
    let keys: Vec<&str> = items.iter().map(ListItem::sort_key).collect();
    assert_eq!(keys, ["skel", "skel.other/", "skel/", "skel0"]);
}
