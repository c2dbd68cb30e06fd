//! Listings over all shards: each shard gives its keys in order, and the pages are merged by byte order.
//!
//! Every shard holds about as much of a bucket as any other, so each is first asked for a little more than its fair
//! share; one whose page runs out before the answer is full is asked for the next. The merge itself ([`merge`]) knows
//! nothing of shards or keys.

use super::buckets::odd_answer;
use super::{ShardError, Shards};
use futures::future::try_join_all;
use granary_meta::record::{BucketId, PartRecord, UploadId, UploadRecord};
use granary_meta::{Answer, ListFrom, ListItem, Query};
use granary_placement::id::ShardId;
use std::collections::VecDeque;
use std::future::Future;

/// Most items of one page, ours and a shard's.
pub const MAX_PAGE: u32 = 1000;
/// The least a shard is asked for: small pages cost as much as a round trip anyway.
const MIN_SHARE: usize = 16;

/// A page of a listing of objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In byte order of their sort keys, each once.
    pub items: Vec<ListItem>,
    /// There is more: go on with [`ListFrom::After`] the last item's sort key.
    pub more: bool,
}

/// One upload of a listing.
pub type ListedUpload = (String, UploadId, UploadRecord);

/// A page of a listing of uploads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadPage {
    /// In byte order of key, then upload id.
    pub uploads: Vec<ListedUpload>,
    /// There is more after the last.
    pub more: bool,
}

/// A page of an upload's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartPage {
    /// The upload.
    pub upload: UploadRecord,
    /// In order of number, without their data.
    pub parts: Vec<PartRecord>,
    /// There is more after the last.
    pub more: bool,
}

impl Shards {
    /// Current objects of a bucket in byte order; keys that contain `delimiter` after `prefix` are folded into common
    /// prefixes. `limit`: up to 1,000; 0 gives an empty page.
    ///
    /// # Errors
    /// [`ShardError::BucketFenced`], or a shard does not answer: a listing is whole or fails, it never leaves a shard
    /// out.
    pub async fn list_objects(
        &self,
        bucket: BucketId,
        prefix: &str,
        delimiter: &str,
        from: ListFrom,
        limit: u32,
    ) -> Result<Page, ShardError> {
        let shards = self.listed_shards()?;
        let from = &from;
        let fetch = |source: usize, last: Option<String>, want: usize| {
            let shard = shards.get(source).copied().unwrap_or(ShardId::ROOT);
            let query = Query::ListObjects {
                bucket,
                prefix: prefix.to_owned(),
                delimiter: delimiter.to_owned(),
                from: last.map_or_else(|| from.clone(), ListFrom::After),
                limit: u32::try_from(want).unwrap_or(MAX_PAGE),
            };
            async move {
                match self.query(shard, query).await? {
                    Answer::Listing { items, more } => Ok((items, more)),
                    other => Err(odd_answer(shard, &other)),
                }
            }
        };
        let limit = limit.min(MAX_PAGE) as usize;
        let (items, more) = merge(shards.len(), limit, |item: &ListItem| item.sort_key().to_owned(), fetch).await?;
        Ok(Page { items, more })
    }

    /// Uploads of a bucket in byte order of key, then upload id. `after`: see [`Query::ListUploads`]. `limit`: as in
    /// [`Shards::list_objects`].
    ///
    /// # Errors
    /// As [`Shards::list_objects`].
    pub async fn list_uploads(
        &self,
        bucket: BucketId,
        prefix: &str,
        after: Option<(String, Option<UploadId>)>,
        limit: u32,
    ) -> Result<UploadPage, ShardError> {
        let shards = self.listed_shards()?;
        let after = &after;
        let fetch = |source: usize, last: Option<(String, UploadId)>, want: usize| {
            let shard = shards.get(source).copied().unwrap_or(ShardId::ROOT);
            let query = Query::ListUploads {
                bucket,
                prefix: prefix.to_owned(),
                after: last.map_or_else(|| after.clone(), |(key, upload)| Some((key, Some(upload)))),
                limit: u32::try_from(want).unwrap_or(MAX_PAGE),
            };
            async move {
                match self.query(shard, query).await? {
                    Answer::Uploads { uploads, more } => Ok((uploads, more)),
                    other => Err(odd_answer(shard, &other)),
                }
            }
        };
        let limit = limit.min(MAX_PAGE) as usize;
        let (uploads, more) =
            merge(shards.len(), limit, |(key, upload, _): &ListedUpload| (key.clone(), *upload), fetch).await?;
        Ok(UploadPage { uploads, more })
    }

    /// Parts of an upload after number `after`; None when there is no such upload. `limit`: 1 to 10,000.
    ///
    /// # Errors
    /// As [`Shards::list_objects`].
    pub async fn list_parts(
        &self,
        bucket: BucketId,
        key: &str,
        upload: UploadId,
        after: u16,
        limit: u32,
    ) -> Result<Option<PartPage>, ShardError> {
        let shard = self.shard_of(bucket, key)?;
        let query = Query::ListParts { bucket, key: key.to_owned(), upload, after, limit: limit.clamp(1, 10_000) };
        match self.query(shard, query).await? {
            Answer::Parts { upload, parts, more } => Ok(Some(PartPage { upload, parts, more })),
            Answer::NoSuchUpload => Ok(None),
            other => Err(odd_answer(shard, &other)),
        }
    }

    fn listed_shards(&self) -> Result<Vec<ShardId>, ShardError> {
        let shards = self.object_shards();
        if shards.is_empty() {
            return Err(ShardError::NoMap(ShardId(1)));
        }
        Ok(shards)
    }
}

struct Source<T, K> {
    waiting: VecDeque<T>,
    /// Key of the last item received: where the next page begins.
    last: Option<K>,
    more: bool,
}

/// Merges `sources` ordered sequences up to `limit` items; items of equal keys count as one. `fetch(source, after,
/// want)` gives the source's next page, of at most `want` items, and whether there is more; a page that is empty ends
/// its source. Returns the items and whether there is more.
pub(super) async fn merge<T, K, E, F>(
    sources: usize,
    limit: usize,
    key: impl Fn(&T) -> K,
    fetch: impl Fn(usize, Option<K>, usize) -> F,
) -> Result<(Vec<T>, bool), E>
where
    K: Ord + Clone,
    F: Future<Output = Result<(Vec<T>, bool), E>>,
{
    let mut merged: Vec<T> = Vec::new();
    if limit == 0 || sources == 0 {
        return Ok((merged, false));
    }
    let mut last_key: Option<K> = None;
    let mut all: Vec<Source<T, K>> =
        (0..sources).map(|_| Source { waiting: VecDeque::new(), last: None, more: true }).collect();
    loop {
        // A source that has run dry may hold the smallest key: all such are filled before the next item is chosen.
        // One item more than the page is wanted, to know whether there is more.
        let want = (limit + 1 - merged.len()).min(MIN_SHARE.max(2 * (limit + 1) / sources));
        let dry = all.iter().enumerate().filter(|(_, source)| source.waiting.is_empty() && source.more);
        let pages = try_join_all(dry.map(|(at, source)| {
            let page = fetch(at, source.last.clone(), want);
            async move { page.await.map(|page| (at, page)) }
        }))
        .await?;
        for (at, (items, more)) in pages {
            if let Some(source) = all.get_mut(at) {
                source.more = more && !items.is_empty();
                if let Some(last) = items.last() {
                    source.last = Some(key(last));
                }
                source.waiting.extend(items);
            }
        }
        // Take items while every source either has one waiting or is at its end.
        while !all.iter().any(|source| source.waiting.is_empty() && source.more) {
            let heads =
                all.iter().enumerate().filter_map(|(at, source)| source.waiting.front().map(|item| (key(item), at)));
            let Some((smallest, at)) = heads.min() else {
                return Ok((merged, false));
            };
            let Some(item) = all.get_mut(at).and_then(|source| source.waiting.pop_front()) else {
                return Ok((merged, false));
            };
            if last_key.as_ref() == Some(&smallest) {
                continue;
            }
            if merged.len() == limit {
                return Ok((merged, true));
            }
            last_key = Some(smallest);
            merged.push(item);
        }
    }
}
