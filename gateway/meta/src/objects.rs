//! Objects and their versions.
//!
//! What always holds for a key:
//! - 'O' has its newest version, unless that is a delete marker; then 'O' has nothing and the marker is the newest
//!   entry of 'V'. So a listing of 'O' meets no markers, however many there are.
//! - At most one version is the null version.
//! - Every extent of every version is in 'E', once, and in no garbage queue.
//! - Usage is the sum over the entries: `objects` counts 'O', `versions` counts 'O' and 'V'. Where the two are equal
//!   for a bucket, the bucket has nothing in 'V', and writes need not look there.

use crate::apply::Tx;
use crate::check::{check_data, check_key};
use crate::codec::{decode, ObjectHead};
use crate::kv::{Kv, StateError};
use crate::record::{BucketId, ObjectData, ObjectMeta, ObjectRecord, Usage, VersionSeq, Versioning};
use crate::{maps, queues, rules, Conditions, Reply, VersionPick};

/// How many versions one step of a scan takes.
const SCAN_STEP: usize = 128;

/// Is this write allowed on that current object? None: yes.
pub fn refused_by(conditions: &Conditions, current: Option<&ObjectRecord>) -> Option<Reply> {
    if conditions.if_none_match_any && current.is_some() {
        return Some(Reply::PreconditionFailed);
    }
    match (&conditions.if_match, current) {
        (None, _) => None,
        (Some(_), None) => Some(Reply::NoSuchKey),
        (Some(etag), Some(record)) if etag == "*" || *etag == record.etag => None,
        (Some(_), Some(_)) => Some(Reply::PreconditionFailed),
    }
}

/// The current object.
pub fn current<K: Kv + ?Sized>(
    tx: &Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
) -> Result<Option<ObjectRecord>, StateError> {
    tx.load(&tx.keys.object(bucket, key))
}

/// See [`crate::Command::PutObject`].
pub fn put<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    record: &ObjectRecord,
    placed: queues::Placed<'_>,
    conditions: &Conditions,
    rule_epoch: u64,
) -> Result<Reply, StateError> {
    if let Err(why) = check_key(key).and_then(|()| check_data(&record.data, record.size_bytes, placed.missing)) {
        return Ok(Reply::Refused(why));
    }
    if tx.fenced(bucket)? {
        return Ok(Reply::BucketFenced);
    }
    let rule = match rules::for_write(tx, bucket, rule_epoch)? {
        Ok(rule) => rule,
        Err(reply) => return Ok(reply),
    };
    if let Some(refusal) = maps::too_old(tx, &record.data, placed.map_epoch)? {
        return Ok(refusal);
    }
    let current = current(tx, bucket, key)?;
    if let Some(refusal) = refused_by(conditions, current.as_ref()) {
        return Ok(refusal);
    }
    if let Some(why) = queues::not_new(tx, record.data.extents())? {
        return Ok(Reply::Refused(why));
    }
    queues::own_extents(tx, bucket, key, record.data.extents(), placed.missing)?;
    store_newest(tx, bucket, key, current, record.clone(), rule.versioning)
}

/// Makes `record` the newest version. Its extents are owned already.
pub fn store_newest<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    current: Option<ObjectRecord>,
    record: ObjectRecord,
    versioning: Versioning,
) -> Result<Reply, StateError> {
    let mut usage = tx.usage(bucket)?;
    make_room(tx, bucket, key, current, versioning, &mut usage)?;
    let record = ObjectRecord {
        version: next_version(tx)?,
        null_version: versioning.writes_null(),
        delete_marker: false,
        ..record
    };
    usage.objects += 1;
    usage.versions += 1;
    usage.bytes += record.size_bytes;
    tx.store(tx.keys.object(bucket, key), &record)?;
    tx.store_usage(bucket, &usage)?;
    Ok(Reply::Put { version: record.version, etag: record.etag })
}

/// Takes the current object out of 'O', and with it, where writes replace the null version, that one, wherever it is.
/// True when a null version was removed.
fn make_room<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    current: Option<ObjectRecord>,
    versioning: Versioning,
    usage: &mut Usage,
) -> Result<bool, StateError> {
    let had_versions = usage.versions > usage.objects;
    if let Some(current) = current {
        tx.batch.delete(tx.keys.object(bucket, key));
        usage.objects -= 1;
        if versioning.writes_null() && current.null_version {
            drop_version(tx, &current, usage)?;
            return Ok(true);
        }
        tx.store(tx.keys.version(bucket, key, current.version), &current)?;
    }
    if versioning.writes_null() && had_versions {
        if let Some(null) = find_null(tx, bucket, key)? {
            tx.batch.delete(tx.keys.version(bucket, key, null.version));
            drop_version(tx, &null, usage)?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Frees what a version held; its entry is gone already.
fn drop_version<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    record: &ObjectRecord,
    usage: &mut Usage,
) -> Result<(), StateError> {
    usage.versions -= 1;
    usage.bytes -= record.size_bytes;
    queues::free_extents(tx, record.data.extents())
}

fn next_version<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>) -> Result<VersionSeq, StateError> {
    let mut counters = tx.counters()?;
    counters.versions += 1;
    tx.store_counters(&counters)?;
    Ok(VersionSeq(counters.versions))
}

/// The null version among those in 'V'.
fn find_null<K: Kv + ?Sized>(
    tx: &Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
) -> Result<Option<ObjectRecord>, StateError> {
    let range = tx.keys.versions_of(bucket, key);
    let mut from = range.from;
    loop {
        let page = tx.batch.scan(&from, &range.to, SCAN_STEP)?;
        for (_, value) in &page {
            if ObjectHead::decode(value)?.null_version {
                return decode(value).map(Some);
            }
        }
        match page.last() {
            Some((last, _)) if page.len() == SCAN_STEP => {
                from = last.clone();
                from.push(0);
            }
            _ => return Ok(None),
        }
    }
}

/// The newest version in 'V', with its key.
fn newest_version<K: Kv + ?Sized>(
    tx: &Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
) -> Result<Option<(Vec<u8>, ObjectRecord)>, StateError> {
    let range = tx.keys.versions_of(bucket, key);
    match tx.batch.scan(&range.from, &range.to, 1)?.pop() {
        Some((version_key, value)) => Ok(Some((version_key, decode(&value)?))),
        None => Ok(None),
    }
}

/// See [`crate::Command::DeleteObject`].
pub fn delete<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    version: VersionPick,
    conditions: &Conditions,
    rule_epoch: u64,
) -> Result<Reply, StateError> {
    if let Err(why) = check_key(key) {
        return Ok(Reply::Refused(why));
    }
    if tx.fenced(bucket)? {
        return Ok(Reply::BucketFenced);
    }
    let rule = match rules::for_write(tx, bucket, rule_epoch)? {
        Ok(rule) => rule,
        Err(reply) => return Ok(reply),
    };
    let current = current(tx, bucket, key)?;
    if version == VersionPick::Current {
        if let Some(refusal) = refused_by(conditions, current.as_ref()) {
            return Ok(refusal);
        }
        return delete_current(tx, bucket, key, current, rule.versioning);
    }
    delete_version(tx, bucket, key, version, current, conditions)
}

/// Off: removes the null version, which is the only one. Enabled: adds a marker, also where nothing is. Suspended:
/// replaces the null version by a marker, likewise.
fn delete_current<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    current: Option<ObjectRecord>,
    versioning: Versioning,
) -> Result<Reply, StateError> {
    let mut usage = tx.usage(bucket)?;
    let existed = current.is_some();
    let removed_null = make_room(tx, bucket, key, current, versioning, &mut usage)?;
    let marker = if versioning != Versioning::Off {
        let marker = ObjectRecord {
            version: next_version(tx)?,
            null_version: versioning.writes_null(),
            delete_marker: true,
            modified_ms: tx.now_ms,
            size_bytes: 0,
            etag: String::new(),
            part_sizes: Vec::new(),
            checksum: None,
            part_checksums: Vec::new(),
            meta: ObjectMeta::default(),
            owner: tx.account,
            data: ObjectData::Extents(Vec::new()),
        };
        usage.versions += 1;
        tx.store(tx.keys.version(bucket, key, marker.version), &marker)?;
        Some(marker.version)
    } else {
        None
    };
    tx.store_usage(bucket, &usage)?;
    Ok(Reply::Deleted { existed: existed || removed_null || marker.is_some(), marker })
}

/// Removes one version for good. The next older one becomes the newest.
fn delete_version<K: Kv + ?Sized>(
    tx: &mut Tx<'_, '_, K>,
    bucket: BucketId,
    key: &str,
    version: VersionPick,
    current: Option<ObjectRecord>,
    conditions: &Conditions,
) -> Result<Reply, StateError> {
    let wanted = |record: &ObjectRecord| match version {
        VersionPick::Seq(seq) => record.version == seq,
        VersionPick::Null | VersionPick::Current => record.null_version,
    };
    let is_current = current.as_ref().is_some_and(wanted);
    let found = match version {
        _ if is_current => current,
        VersionPick::Seq(seq) => tx.load(&tx.keys.version(bucket, key, seq))?,
        VersionPick::Null | VersionPick::Current => find_null(tx, bucket, key)?,
    };
    if let Some(refusal) = refused_by(conditions, found.as_ref()) {
        return Ok(refusal);
    }
    let Some(found) = found else {
        return Ok(Reply::Deleted { existed: false, marker: None });
    };
    let mut usage = tx.usage(bucket)?;
    let was_newest = if is_current {
        tx.batch.delete(tx.keys.object(bucket, key));
        usage.objects -= 1;
        true
    } else {
        let newest = newest_version(tx, bucket, key)?.is_some_and(|(_, newest)| newest.version == found.version);
        tx.batch.delete(tx.keys.version(bucket, key, found.version));
        newest && tx.batch.get(&tx.keys.object(bucket, key))?.is_none()
    };
    drop_version(tx, &found, &mut usage)?;
    if was_newest {
        if let Some((version_key, next)) = newest_version(tx, bucket, key)?.filter(|(_, next)| !next.delete_marker) {
            tx.batch.delete(version_key);
            tx.store(tx.keys.object(bucket, key), &next)?;
            usage.objects += 1;
        }
    }
    tx.store_usage(bucket, &usage)?;
    Ok(Reply::Deleted { existed: true, marker: None })
}
