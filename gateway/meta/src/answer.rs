//! Reads of a shard. Pure: a view of the state and a query in, an answer out. Work is bounded by the query's limit.

use crate::codec::{decode, CompletedUpload, Fence, Record};
use crate::keys::{
    kind, split_bucket_of_key, split_garbage_key, split_missing_key, split_repair_slot_key, split_upload_key, KeyRange,
    Keys,
};
use crate::kv::{Kv, StateError};
use crate::level::level_in;
use crate::record::{
    AccountId, BucketId, BucketRecord, ExtentRecord, ExtentRef, LeaseRecord, MissingRecord, ObjectData, ObjectRecord,
    PartRecord, RepairSlotRecord, SettingsRecord, UploadId, UploadRecord, Usage,
};
use crate::{list, maps};
use crate::{Answer, ChunkRef, Query, VersionPick};
use granary_placement::id::{ExtentId, PlacementGroupId, ShardId};

/// Most items of a page of keys or uploads.
const MAX_KEYS: u32 = 1_001;
/// Most items of other pages.
const MAX_ITEMS: u32 = 1_000;
/// Most parts of a page.
const MAX_PARTS: u32 = 10_000;

fn load<T: Record, K: Kv + ?Sized>(kv: &K, key: &[u8]) -> Result<Option<T>, StateError> {
    kv.get(key)?.map(|bytes| decode(&bytes)).transpose()
}

/// Gives entries of a range to `take` until it has `limit` of them; true when there is one more. `take` answers whether
/// it took it.
fn page<K: Kv + ?Sized>(
    kv: &K,
    range: &KeyRange,
    limit: usize,
    mut take: impl FnMut(&[u8], &[u8]) -> Result<bool, StateError>,
) -> Result<bool, StateError> {
    let mut cursor = kv.cursor(&range.to);
    cursor.seek(&range.from)?;
    let mut taken = 0;
    while let Some((key, value)) = cursor.entry() {
        if taken == limit {
            return Ok(true);
        }
        if take(key, value)? {
            taken += 1;
        }
        cursor.next()?;
    }
    Ok(false)
}

fn just_after(mut key: Vec<u8>) -> Vec<u8> {
    key.push(0);
    key
}

/// Does the query belong to the root shard? None: to any shard.
fn wants_root(query: &Query) -> Option<bool> {
    match query {
        Query::GetBucket { .. }
        | Query::ListBuckets { .. }
        | Query::GetMap { .. }
        | Query::ListLeases
        | Query::GetSettings { .. } => Some(true),
        Query::FeatureLevel => None,
        Query::GetObject { .. }
        | Query::ListObjects { .. }
        | Query::ListUploads { .. }
        | Query::ListParts { .. }
        | Query::CompletedUpload { .. }
        | Query::ExtentsOfGroup { .. }
        | Query::ExtentsAlive { .. }
        | Query::ListMissing { .. }
        | Query::ListGarbage { .. }
        | Query::BucketUsage { .. }
        | Query::ListRepairSlots { .. } => Some(false),
    }
}

/// Answers a query from one consistent view of the shard.
///
/// # Errors
/// [`StateError`] when the state cannot be read.
pub fn answer<K: Kv + ?Sized>(shard: ShardId, kv: &K, query: &Query) -> Result<Answer, StateError> {
    let keys = Keys::new(shard);
    if wants_root(query).is_some_and(|root| root != (shard == ShardId::ROOT)) {
        return Ok(Answer::Refused(format!("not a query of shard {shard}")));
    }
    match query {
        Query::GetObject { bucket, key, version } => get_object(kv, &keys, *bucket, key, *version),
        Query::ListObjects { bucket, prefix, delimiter, from, limit } => {
            if is_fenced(kv, &keys, *bucket)? {
                return Ok(Answer::BucketFenced);
            }
            let limit = (*limit).clamp(1, MAX_KEYS) as usize;
            list::list_objects(kv, &keys, *bucket, &list::Listing { prefix, delimiter, from, limit })
        }
        Query::ListUploads { bucket, prefix, after, limit } => {
            list_uploads(kv, &keys, *bucket, prefix, after.as_ref(), *limit)
        }
        Query::ListParts { bucket, key, upload, after, limit } => {
            list_parts(kv, &keys, *bucket, key, *upload, *after, *limit)
        }
        Query::CompletedUpload { bucket, key, upload } => {
            Ok(match load::<CompletedUpload, K>(kv, &keys.completed(*bucket, key, *upload))? {
                Some(done) => Answer::Completed { version: done.version, etag: done.etag, parts: done.parts },
                None => Answer::NoSuchUpload,
            })
        }
        Query::ExtentsOfGroup { group, after, limit } => extents(kv, &keys, *group, *after, *limit),
        Query::ExtentsAlive { extents, or_garbage } => {
            if extents.len() > MAX_ITEMS as usize {
                return Ok(Answer::Refused("too many extents".to_owned()));
            }
            let mut alive = Vec::with_capacity(extents.len());
            for (group, extent) in extents {
                let owned = kv.get(&keys.extent(*group, *extent))?.is_some();
                alive.push(owned || (*or_garbage && kv.get(&keys.garbage_index(*extent))?.is_some()));
            }
            Ok(Answer::Alive(alive))
        }
        Query::ListMissing { after, limit } => list_missing(kv, &keys, *after, *limit),
        Query::ListGarbage { until_ms, after, limit } => list_garbage(kv, &keys, *until_ms, *after, *limit),
        Query::BucketUsage { bucket } => {
            Ok(Answer::Usage(load::<Usage, K>(kv, &keys.usage(*bucket))?.unwrap_or_default()))
        }
        Query::GetBucket { name } => Ok(match load::<BucketRecord, K>(kv, &keys.bucket(name))? {
            Some(bucket) => Answer::Bucket(bucket),
            None => Answer::NoSuchBucket,
        }),
        Query::ListBuckets { owner, prefix, after, limit } => list_buckets(kv, &keys, (*owner, prefix), after, *limit),
        Query::GetMap { newer_than } => maps::answer(kv, &keys, *newer_than),
        Query::FeatureLevel => Ok(Answer::FeatureLevel(level_in(kv.get(&keys.single(kind::LEVEL))?)?)),
        Query::ListLeases => {
            let mut leases = Vec::new();
            // All of them: `leases` bounds how many there can be.
            page(kv, &keys.kind_range(kind::LEASE), usize::MAX, |_, value| {
                leases.push(decode::<LeaseRecord>(value)?);
                Ok(true)
            })?;
            Ok(Answer::Leases(leases))
        }
        Query::GetSettings { newer_than } => {
            let settings: SettingsRecord = load(kv, &keys.single(kind::SETTINGS))?.unwrap_or_default();
            if settings.epoch <= *newer_than {
                return Ok(Answer::SettingsUnchanged);
            }
            Ok(Answer::Settings { epoch: settings.epoch, values: settings.values })
        }
        Query::ListRepairSlots { after, limit } => list_repair_slots(kv, &keys, *after, *limit),
    }
}

fn is_fenced<K: Kv + ?Sized>(kv: &K, keys: &Keys, bucket: BucketId) -> Result<bool, StateError> {
    let fence = load::<Fence, K>(kv, &keys.fence(bucket))?;
    Ok(fence.is_some_and(|fence| fence.up))
}

fn get_object<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    bucket: BucketId,
    key: &str,
    version: VersionPick,
) -> Result<Answer, StateError> {
    if is_fenced(kv, keys, bucket)? {
        return Ok(Answer::BucketFenced);
    }
    let found = |record: Option<ObjectRecord>| match record {
        Some(record) => Answer::Object(Box::new(record)),
        None => Answer::NoSuchKey,
    };
    let current: Option<ObjectRecord> = load(kv, &keys.object(bucket, key))?;
    let wanted = |record: &ObjectRecord| match version {
        VersionPick::Current => true,
        VersionPick::Null => record.null_version,
        VersionPick::Seq(seq) => record.version == seq,
    };
    if current.as_ref().is_some_and(wanted) {
        return Ok(found(current));
    }
    if let VersionPick::Seq(seq) = version {
        return load(kv, &keys.version(bucket, key, seq)).map(found);
    }
    // Without a current object the newest version is a delete marker, if there is any; the null version may be
    // anywhere.
    let range = keys.versions_of(bucket, key);
    let mut cursor = kv.cursor(&range.to);
    cursor.seek(&range.from)?;
    while let Some((_, value)) = cursor.entry() {
        let record: ObjectRecord = decode(value)?;
        if wanted(&record) {
            return Ok(found(Some(record)));
        }
        cursor.next()?;
    }
    Ok(Answer::NoSuchKey)
}

fn list_uploads<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    bucket: BucketId,
    prefix: &str,
    after: Option<&(String, Option<UploadId>)>,
    limit: u32,
) -> Result<Answer, StateError> {
    if is_fenced(kv, keys, bucket)? {
        return Ok(Answer::BucketFenced);
    }
    let mut range = keys.bucket_range(kind::UPLOAD, bucket, prefix);
    if let Some((key, upload)) = after {
        let from = just_after(match upload {
            Some(upload) => keys.upload(bucket, key, *upload),
            None => keys.upload(bucket, key, UploadId([u8::MAX; 16])),
        });
        range.from = range.from.max(from);
    }
    let mut uploads = Vec::new();
    let more = page(kv, &range, limit.clamp(1, MAX_KEYS) as usize, |key, value| {
        let (key, id) = split_upload_key(key).ok_or_else(|| StateError::Value("key of an upload".to_owned()))?;
        uploads.push((key.to_owned(), id, decode::<UploadRecord>(value)?));
        Ok(true)
    })?;
    Ok(Answer::Uploads { uploads, more })
}

fn list_parts<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    bucket: BucketId,
    key: &str,
    id: UploadId,
    after: u16,
    limit: u32,
) -> Result<Answer, StateError> {
    let Some(upload) = load::<UploadRecord, K>(kv, &keys.upload(bucket, key, id))? else {
        return Ok(Answer::NoSuchUpload);
    };
    let range = KeyRange { from: just_after(keys.part(id, after)), to: keys.parts_of(id).to };
    let mut parts = Vec::new();
    let more = page(kv, &range, limit.clamp(1, MAX_PARTS) as usize, |_, value| {
        let part: PartRecord = decode(value)?;
        parts.push(PartRecord { data: ObjectData::Extents(Vec::new()), ..part });
        Ok(true)
    })?;
    Ok(Answer::Parts { upload, parts, more })
}

fn extents<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    group: Option<PlacementGroupId>,
    after: Option<(PlacementGroupId, ExtentId)>,
    limit: u32,
) -> Result<Answer, StateError> {
    let mut range = match group {
        Some(group) => keys.extents_of(group),
        None => keys.kind_range(kind::EXTENT),
    };
    if let Some((group, extent)) = after {
        range.from = range.from.max(just_after(keys.extent(group, extent)));
    }
    let mut extents = Vec::new();
    let more = page(kv, &range, limit.clamp(1, MAX_ITEMS) as usize, |_, value| {
        extents.push(decode::<ExtentRecord>(value)?);
        Ok(true)
    })?;
    Ok(Answer::Extents { extents, more })
}

fn list_missing<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    after: Option<ChunkRef>,
    limit: u32,
) -> Result<Answer, StateError> {
    let mut range = keys.kind_range(kind::MISSING);
    if let Some(chunk) = after {
        range.from = just_after(keys.missing(chunk));
    }
    let mut chunks = Vec::new();
    let more = page(kv, &range, limit.clamp(1, MAX_ITEMS) as usize, |key, value| {
        let chunk = split_missing_key(key).ok_or_else(|| StateError::Value("key of a missing chunk".to_owned()))?;
        let extent = load::<ExtentRecord, K>(kv, &keys.extent(chunk.group, chunk.extent))?;
        let extent = extent.ok_or_else(|| StateError::Value("missing chunk of no extent".to_owned()))?;
        chunks.push((chunk, decode::<MissingRecord>(value)?, extent));
        Ok(true)
    })?;
    Ok(Answer::Missing { chunks, more })
}

fn list_repair_slots<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    after: Option<(PlacementGroupId, u8)>,
    limit: u32,
) -> Result<Answer, StateError> {
    let mut range = keys.kind_range(kind::REPAIR_SLOT);
    if let Some((group, slot)) = after {
        range.from = just_after(keys.repair_slot(group, slot));
    }
    let mut slots = Vec::new();
    let more = page(kv, &range, limit.clamp(1, MAX_ITEMS) as usize, |key, value| {
        let (group, slot) =
            split_repair_slot_key(key).ok_or_else(|| StateError::Value("key of a repair slot".to_owned()))?;
        slots.push((group, slot, decode::<RepairSlotRecord>(value)?));
        Ok(true)
    })?;
    Ok(Answer::RepairSlots { slots, more })
}

fn list_garbage<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    until_ms: u64,
    after: Option<(u64, ExtentId)>,
    limit: u32,
) -> Result<Answer, StateError> {
    let mut range = keys.garbage_range();
    if let Some((queued_ms, extent)) = after {
        range.from = just_after(keys.garbage(queued_ms, extent));
    }
    if let Some(past) = until_ms.checked_add(1) {
        range.to = keys.garbage(past, ExtentId([0; 16]));
    }
    let mut extents = Vec::new();
    let more = page(kv, &range, limit.clamp(1, MAX_ITEMS) as usize, |key, value| {
        let queued_ms = split_garbage_key(key).ok_or_else(|| StateError::Value("key of garbage".to_owned()))?;
        extents.push((queued_ms, decode::<ExtentRef>(value)?));
        Ok(true)
    })?;
    Ok(Answer::Garbage { extents, more })
}

fn list_buckets<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    (owner, prefix): (Option<AccountId>, &str),
    after: &str,
    limit: u32,
) -> Result<Answer, StateError> {
    let mut range = keys.buckets_of(owner, prefix);
    if !after.is_empty() {
        let after = owner.map_or_else(|| keys.bucket(after), |owner| keys.bucket_of(owner, after));
        range.from = range.from.max(just_after(after));
    }
    let limit = limit.clamp(1, MAX_ITEMS) as usize;
    let mut buckets = Vec::new();
    // One more than asked for, because a bucket being deleted behind the last one must not count as more.
    page(kv, &range, limit + 1, |key, value| {
        let bucket: BucketRecord = match owner {
            None => decode(value)?,
            Some(_) => split_bucket_of_key(key)
                .map_or(Ok(None), |name| load(kv, &keys.bucket(name)))?
                .ok_or_else(|| StateError::Value("a bucket of an owner is not there".to_owned()))?,
        };
        let listed = !bucket.deleting;
        if listed {
            buckets.push(bucket);
        }
        Ok(listed)
    })?;
    let more = buckets.len() > limit;
    buckets.truncate(limit);
    Ok(Answer::Buckets { buckets, more })
}
