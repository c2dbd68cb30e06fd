use super::super::list::merge;
use super::super::random_below;
use super::{cluster, put, put_command};
use granary_meta::record::{AccountId, BucketId};
use granary_meta::{ListFrom, ListItem, ObjectSummary};
use granary_placement::id::ShardId;
use std::collections::BTreeSet;

/// What a listing must be, by the plainest means: all keys, folded, sorted, cut.
fn naive_list(
    keys: &BTreeSet<String>,
    prefix: &str,
    delimiter: &str,
    from: &ListFrom,
    limit: usize,
) -> (Vec<ListItem>, bool) {
    let mut items: Vec<ListItem> = Vec::new();
    for key in keys.iter().filter(|key| key.starts_with(prefix)) {
        let rest = &key[prefix.len()..];
        let folded = (!delimiter.is_empty()).then(|| rest.find(delimiter)).flatten();
        let item = match folded {
            Some(at) => ListItem::Prefix(format!("{prefix}{}", &rest[..at + delimiter.len()])),
            None => ListItem::Object(summary(key)),
        };
        let after = match from {
            ListFrom::Start => true,
            ListFrom::After(last) => key > last && item.sort_key() != last,
        };
        if after && items.last() != Some(&item) {
            items.push(item);
        }
    }
    let more = items.len() > limit;
    items.truncate(limit);
    (items, more)
}

fn summary(key: &str) -> ObjectSummary {
    ObjectSummary {
        key: key.to_owned(),
        size_bytes: 1,
        etag: String::new(),
        modified_ms: 1,
        storage_class: String::new(),
        owner: AccountId::ROOT,
        checksum: None,
    }
}

/// A small generator, so that a failing seed can be run again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

#[tokio::test]
async fn listings_over_shards_equal_a_naive_sort() {
    let seed = random_below(u64::MAX - 1) + 1;
    println!("seed {seed}");
    listings_equal_a_naive_sort(seed).await;
    listings_equal_a_naive_sort(0x5eed).await;
}

async fn listings_equal_a_naive_sort(seed: u64) {
    let mut dice = Dice(seed);
    for _ in 0..40 {
        let (peers, shards) = cluster();
        let bucket = BucketId(9);
        let alphabet = ["a", "b", "/", ".", "é", "a/", "-"];
        let mut keys = BTreeSet::new();
        for _ in 0..dice.below(120) {
            let length = 1 + dice.below(6);
            let key: String = (0..length).map(|_| alphabet[dice.below(alphabet.len())]).collect();
            let shard = shards.shard_of(bucket, &key).unwrap();
            peers.command(shard, put_command(bucket, &key));
            keys.insert(key);
        }
        for (prefix, delimiter) in [("", ""), ("", "/"), ("a", "/"), ("a/", "/"), ("a", ""), ("", "a/"), ("zz", "/")] {
            let limit = 1 + dice.below(40);
            let mut from = match dice.below(3) {
                0 => ListFrom::After(alphabet[dice.below(alphabet.len())].repeat(2)),
                _ => ListFrom::Start,
            };
            loop {
                let page = shards
                    .list_objects(bucket, prefix, delimiter, from.clone(), u32::try_from(limit).unwrap())
                    .await
                    .unwrap();
                let (items, more) = naive_list(&keys, prefix, delimiter, &from, limit);
                assert_eq!(
                    (&page.items, page.more),
                    (&items, more),
                    "seed {seed}, {prefix:?} {delimiter:?} {from:?} {limit} of {keys:?}"
                );
                match page.items.last() {
                    Some(last) if page.more => from = ListFrom::After(last.sort_key().to_owned()),
                    _ => break,
                }
            }
        }
    }
}

#[tokio::test]
async fn a_merge_of_large_uneven_sources_reads_little_more_than_it_gives() {
    let sources: Vec<Vec<u64>> = vec![(0..50_000).collect(), (0..50_000).map(|n| n * 3).collect(), vec![], vec![7]];
    let fetched = std::sync::atomic::AtomicUsize::new(0);
    let fetch = |at: usize, after: Option<u64>, want: usize| {
        let rest: Vec<u64> = sources[at].iter().copied().filter(|n| after.is_none_or(|after| *n > after)).collect();
        fetched.fetch_add(want, std::sync::atomic::Ordering::Relaxed);
        async move { Ok::<_, ()>((rest.iter().copied().take(want).collect(), rest.len() > want)) }
    };
    let (items, more) = merge(4, 1000, |n| *n, fetch).await.unwrap();
    assert_eq!(items, (0..1000).collect::<Vec<u64>>());
    assert!(more);
    assert!(fetched.into_inner() < 4000);
}

#[tokio::test]
async fn a_listing_fails_rather_than_leave_a_shard_out() {
    let (peers, shards) = cluster();
    put(&shards, BucketId(1), "k").await.unwrap();
    peers.state().leaders.remove(&ShardId(3));
    assert!(shards.list_objects(BucketId(1), "", "", ListFrom::Start, 10).await.unwrap_err().outcome_unknown());
}
