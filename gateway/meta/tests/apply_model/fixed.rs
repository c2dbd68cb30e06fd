//! Corners of `apply`, one by one.

use crate::scenery::{extent, inline, put, record, request, Random};
use crate::{KEYS, SHARD};
use granary_meta::answer::answer;
use granary_meta::apply::{apply, KEPT_MS, LIFETIME_MS};
use granary_meta::kv::{MemoryKv, Overlay};
use granary_meta::record::{AccountId, BucketId, ExtentRef, ObjectData, UploadId, Usage};
use granary_meta::{Answer, ChunkRef, Command, Conditions, ListFrom, ListItem, MetaRequest, Query, Reply, VersionPick};
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

/// A command that changes nothing and whose reply is kept.
fn nothing(random: &mut Random, now_ms: u64) -> MetaRequest {
    let upload = UploadId([9; 16]);
    request(random, now_ms, Command::AbortUpload { bucket: BucketId(1), key: "none".into(), upload })
}

/// Entries of the request window.
fn kept(kv: &MemoryKv) -> usize {
    kv.entries.keys().filter(|key| key[2] == granary_meta::keys::kind::REQUEST).count()
}

#[test]
fn a_command_is_applied_once_however_many_others_come_between_its_retries() {
    let (mut kv, mut random) = (MemoryKv::default(), Random(5));
    let (made, window) = (1_000_000, granary_meta::apply::REQUEST_WINDOW as usize);
    let first = request(&mut random, made, put(1, "k", b"one"));
    let reply = apply_one(&mut kv, &first);
    let other = request(&mut random, made + 1, put(1, "k", b"two"));
    apply_one(&mut kv, &other);
    for _ in 0..window + 500 {
        apply_one(&mut kv, &nothing(&mut random, made + LIFETIME_MS));
    }
    let retry = |stamp_ms| MetaRequest { stamp_ms: Some(stamp_ms), ..first.clone() };
    assert_eq!(apply_one(&mut kv, &retry(made + LIFETIME_MS)), reply, "applied before, so not again");
    assert_eq!(kept(&kv), 2 * (window + 502));
    // Later than any retry could be applied, replies go, and what comes all the same is refused.
    let late = made + LIFETIME_MS + KEPT_MS + 1;
    for _ in 0..window {
        apply_one(&mut kv, &nothing(&mut random, late));
    }
    assert_eq!(kept(&kv), 2 * window, "the window is as long as it was before the rush");
    let age_ms = (late - made) as i64;
    assert_eq!(apply_one(&mut kv, &retry(1)), Reply::Expired { age_ms }, "by the shard's clock, which never goes back");
    let current = Query::GetObject { bucket: BucketId(1), key: "k".into(), version: VersionPick::Current };
    let Answer::Object(current) = answer(SHARD, &kv, &current).unwrap() else { panic!() };
    assert_eq!(current.data, inline(b"two"));
}

#[test]
fn a_gateway_whose_clock_is_an_hour_ahead_expires_nobody() {
    let (mut kv, mut random) = (MemoryKv::default(), Random(6));
    let hour = 3_600_000;
    apply_one(&mut kv, &request(&mut random, 10_000_000, put(1, "k", b"one")));
    let ahead =
        MetaRequest { stamp_ms: Some(10_000_001), ..request(&mut random, 10_000_001 + hour, put(1, "k", b"ahead")) };
    assert_eq!(apply_one(&mut kv, &ahead), Reply::Expired { age_ms: -(hour as i64) });
    let next = request(&mut random, 10_000_002, put(1, "k", b"two"));
    assert!(matches!(apply_one(&mut kv, &next), Reply::Put { .. }));
    // The same command again, when its time has come: it was refused, not applied.
    let again = MetaRequest { stamp_ms: Some(10_000_001 + hour), ..ahead };
    assert!(matches!(apply_one(&mut kv, &again), Reply::Put { .. }));
}

#[test]
fn background_work_pushes_no_reply_out_of_the_window() {
    let (mut kv, mut random) = (MemoryKv::default(), Random(7));
    let first = request(&mut random, 1, put(1, "k", b"one"));
    let reply = apply_one(&mut kv, &first);
    let entries = kv.entries.len();
    let chunks = Vec::new();
    for _ in 0..20_000 {
        apply_one(&mut kv, &request(&mut random, 2, Command::ReportMissing { chunks: chunks.clone() }));
    }
    assert_eq!((kv.entries.len(), apply_one(&mut kv, &first)), (entries, reply));
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
