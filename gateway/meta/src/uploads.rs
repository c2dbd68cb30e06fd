//! Multipart uploads.
//!
//! Parts are owned like objects: their extents are in 'E' from PutPart on, so a completed object takes them over
//! without a word to any disk. A completed upload is kept in 'D' for a while, so that a repeated CompleteUpload is
//! answered as the first one was.

use crate::apply::Tx;
use crate::check::{check_data, check_key, MAX_PART_NUMBER};
use crate::codec::{decode, CompletedUpload};
use crate::kv::{Kv, StateError};
use crate::objects::{current, refused_by, store_newest};
use crate::record::{BucketId, ObjectData, ObjectRecord, PartRecord, UploadId, UploadRecord};
use crate::{maps, queues, rules, Conditions, Reply};

/// How long a completed upload is kept by the time of later commands, in milliseconds. Part of the replicated history.
pub const COMPLETED_KEEP_MS: u64 = 24 * 3600 * 1000;
/// Most completed uploads kept in a shard. Part of the replicated history.
pub const COMPLETED_KEEP: u64 = 4_096;
/// How many are looked at when one is added: more than one, so that a backlog shrinks.
const TRIM_STEP: u64 = 4;

/// Parts are few enough to be read in one scan.
const MAX_PARTS: usize = MAX_PART_NUMBER as usize;

/// See [`crate::Command::CreateUpload`].
pub fn create<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    upload: UploadId,
    record: &UploadRecord,
    rule_epoch: u64,
) -> Result<Reply, StateError> {
    if let Err(why) = check_key(key) {
        return Ok(Reply::Refused(why));
    }
    if tx.fenced(bucket)? {
        return Ok(Reply::BucketFenced);
    }
    if let Err(reply) = rules::for_write(tx, bucket, rule_epoch)? {
        return Ok(reply);
    }
    let upload_key = tx.keys.upload(bucket, key, upload);
    let parts = tx.keys.parts_of(upload);
    if tx.batch.get(&upload_key)?.is_some() || !tx.batch.scan(&parts.from, &parts.to, 1)?.is_empty() {
        return Ok(Reply::Refused("an upload of that id exists".to_owned()));
    }
    tx.store(upload_key, record)?;
    let mut usage = tx.usage(bucket)?;
    usage.uploads += 1;
    tx.store_usage(bucket, &usage)?;
    Ok(Reply::Done)
}

/// See [`crate::Command::PutPart`].
pub fn put_part<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    upload: UploadId,
    part: &PartRecord,
    placed: queues::Placed<'_>,
    rule_epoch: u64,
) -> Result<Reply, StateError> {
    if let Err(why) = check_key(key).and_then(|()| check_data(&part.data, part.size_bytes, placed.missing)) {
        return Ok(Reply::Refused(why));
    }
    if part.number == 0 || part.number > MAX_PART_NUMBER {
        return Ok(Reply::Refused(format!("part number {}", part.number)));
    }
    if tx.batch.get(&tx.keys.upload(bucket, key, upload))?.is_none() {
        return Ok(Reply::NoSuchUpload);
    }
    if let Err(reply) = rules::for_write(tx, bucket, rule_epoch)? {
        return Ok(reply);
    }
    if let Some(refusal) = maps::too_old(tx, &part.data, placed.map_epoch)? {
        return Ok(refusal);
    }
    if let Some(why) = queues::not_new(tx, part.data.extents())? {
        return Ok(Reply::Refused(why));
    }
    let mut usage = tx.usage(bucket)?;
    let part_key = tx.keys.part(upload, part.number);
    if let Some(old) = tx.load::<PartRecord>(&part_key)? {
        usage.upload_bytes -= old.size_bytes;
        queues::free_extents(tx, old.data.extents())?;
    }
    queues::own_extents(tx, bucket, key, part.data.extents(), placed.missing)?;
    usage.upload_bytes += part.size_bytes;
    tx.store(part_key, part)?;
    tx.store_usage(bucket, &usage)?;
    Ok(Reply::Done)
}

/// What a CompleteUpload asks for.
pub struct Completion<'a> {
    /// (number, ETag), ascending.
    pub parts: &'a [(u16, String)],
    /// The record; its data is ignored.
    pub record: &'a ObjectRecord,
    /// Conditions.
    pub conditions: &'a Conditions,
    /// Epoch of the bucket's rule by which the gateway decided.
    pub rule_epoch: u64,
}

/// The payload of parts put together. Only a lone part may be inline; of several, an inline one must be empty: a
/// payload is either in the record or in extents, and the gateway writes parts as extents.
fn join_parts(parts: Vec<PartRecord>) -> Result<ObjectData, String> {
    let mut parts = parts;
    if parts.len() == 1 {
        if let Some(part) = parts.pop() {
            return Ok(part.data);
        }
    }
    let mut extents = Vec::new();
    for part in parts {
        match part.data {
            ObjectData::Extents(of_part) => extents.extend(of_part),
            ObjectData::Inline { bytes, .. } if bytes.is_empty() => {}
            ObjectData::Inline { .. } => return Err(format!("part {} of several is inline", part.number)),
        }
    }
    Ok(ObjectData::Extents(extents))
}

/// See [`crate::Command::CompleteUpload`].
pub fn complete<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    upload: UploadId,
    wanted: &Completion<'_>,
) -> Result<Reply, StateError> {
    if let Err(why) = check_key(key) {
        return Ok(Reply::Refused(why));
    }
    if wanted.parts.is_empty() || !wanted.parts.windows(2).all(|pair| matches!(pair, [a, b] if a.0 < b.0)) {
        return Ok(Reply::Refused("parts are not in ascending order".to_owned()));
    }
    let upload_key = tx.keys.upload(bucket, key, upload);
    if tx.batch.get(&upload_key)?.is_none() {
        return Ok(match tx.load::<CompletedUpload>(&tx.keys.completed(bucket, key, upload))? {
            Some(done) if done.parts == wanted.parts => Reply::Put { version: done.version, etag: done.etag },
            _ => Reply::NoSuchUpload,
        });
    }
    let rule = match rules::for_write(tx, bucket, wanted.rule_epoch)? {
        Ok(rule) => rule,
        Err(reply) => return Ok(reply),
    };
    let mut taken = Vec::with_capacity(wanted.parts.len());
    for (number, etag) in wanted.parts {
        match tx.load::<PartRecord>(&tx.keys.part(upload, *number))? {
            Some(part) if part.etag == *etag => taken.push(part),
            _ => return Ok(Reply::InvalidPart { number: *number }),
        }
    }
    let current = current(tx, bucket, key)?;
    if let Some(refusal) = refused_by(wanted.conditions, current.as_ref()) {
        return Ok(refusal);
    }
    let size_bytes: u64 = taken.iter().map(|part| part.size_bytes).sum();
    if size_bytes != wanted.record.size_bytes {
        return Ok(Reply::Refused(format!("parts of {size_bytes} bytes for a size of {}", wanted.record.size_bytes)));
    }
    let data = match join_parts(taken) {
        Ok(data) => data,
        Err(why) => return Ok(Reply::Refused(why)),
    };
    end_upload(tx, bucket, upload_key, upload, Some(wanted.parts))?;
    let record = ObjectRecord { data, ..wanted.record.clone() };
    let reply = store_newest(tx, bucket, key, current, record, rule.versioning)?;
    if let Reply::Put { version, etag } = &reply {
        let done =
            CompletedUpload { at_ms: tx.now_ms, version: *version, etag: etag.clone(), parts: wanted.parts.to_vec() };
        keep_completed(tx, tx.keys.completed(bucket, key, upload), &done)?;
    }
    Ok(reply)
}

/// Removes the upload and its parts; frees the data of every part that is not taken over.
fn end_upload<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    upload_key: Vec<u8>,
    upload: UploadId,
    taken: Option<&[(u16, String)]>,
) -> Result<(), StateError> {
    let mut usage = tx.usage(bucket)?;
    let range = tx.keys.parts_of(upload);
    for (part_key, value) in tx.batch.scan(&range.from, &range.to, MAX_PARTS)? {
        let part: PartRecord = decode(&value)?;
        usage.upload_bytes -= part.size_bytes;
        let is_taken =
            taken.is_some_and(|taken| taken.binary_search_by_key(&part.number, |(number, _)| *number).is_ok());
        if !is_taken {
            queues::free_extents(tx, part.data.extents())?;
        }
        tx.batch.delete(part_key);
    }
    usage.uploads -= 1;
    tx.batch.delete(upload_key);
    tx.store_usage(bucket, &usage)
}

/// Writes 'D' and drops what is too old or too many.
fn keep_completed<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    key: Vec<u8>,
    done: &CompletedUpload,
) -> Result<(), StateError> {
    let mut counters = tx.counters()?;
    tx.batch.put(tx.keys.completed_order(counters.completed_next), key.clone());
    counters.completed_next += 1;
    tx.store(key, done)?;
    for _ in 0..TRIM_STEP {
        let order = tx.keys.completed_order(counters.completed_first);
        let Some(oldest_key) = tx.batch.get(&order)? else { break };
        let oldest: Option<CompletedUpload> = tx.load(&oldest_key)?;
        let too_many = counters.completed_next - counters.completed_first > COMPLETED_KEEP;
        let too_old = oldest.is_none_or(|oldest| oldest.at_ms.saturating_add(COMPLETED_KEEP_MS) < tx.now_ms);
        if !too_many && !too_old {
            break;
        }
        tx.batch.delete(oldest_key);
        tx.batch.delete(order);
        counters.completed_first += 1;
    }
    tx.store_counters(&counters)
}

/// See [`crate::Command::AbortUpload`].
pub fn abort<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    upload: UploadId,
) -> Result<Reply, StateError> {
    if let Err(why) = check_key(key) {
        return Ok(Reply::Refused(why));
    }
    let upload_key = tx.keys.upload(bucket, key, upload);
    if tx.batch.get(&upload_key)?.is_none() {
        return Ok(Reply::NoSuchUpload);
    }
    end_upload(tx, bucket, upload_key, upload, None)?;
    Ok(Reply::Done)
}
