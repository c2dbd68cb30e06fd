//! A whole store in a few maps: the backend of the S3 tests. Small enough to be believed.

use crate::s3::backend::{
    Backend, BackendError, BrokenBody, Created, ListingPage, ReadError, Removed, StageError, StageSpec, StagedPayload,
    UploadsAfter, UploadsPage,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::StreamExt;
use granary_meta::record::{
    AccountId, BucketId, BucketRecord, BucketRule, ObjectData, ObjectRecord, PartRecord, UploadId, UploadRecord,
    VersionSeq,
};
use granary_meta::{Answer, ChunkRef, Command, Conditions, ListFrom, ListItem, ObjectSummary, Query, Reply};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Parts = BTreeMap<u16, PartRecord>;

#[derive(Default)]
struct State {
    buckets: BTreeMap<String, BucketRecord>,
    next_bucket: u64,
    objects: BTreeMap<(BucketId, String), ObjectRecord>,
    uploads: BTreeMap<(BucketId, String, UploadId), (UploadRecord, Parts)>,
    completed: BTreeMap<UploadId, (String, Vec<(u16, String)>)>,
    gone: BTreeSet<BucketId>,
}

/// What became of staged payloads.
#[derive(Default)]
pub struct Fates {
    pub committed: AtomicUsize,
    pub unknown: AtomicUsize,
    pub deleted: AtomicUsize,
}

#[derive(Default)]
pub struct Memory {
    state: Mutex<State>,
    pub fates: Arc<Fates>,
    /// The next commands lose their answer.
    pub lose_answers: AtomicUsize,
    /// Waited before every lookup of a bucket.
    pub lookup_delay_ms: AtomicU64,
}

struct Staged {
    data: ObjectData,
    fates: Option<Arc<Fates>>,
}

impl StagedPayload for Staged {
    fn data(&self) -> ObjectData {
        self.data.clone()
    }
    fn missing(&self) -> Vec<ChunkRef> {
        Vec::new()
    }
    fn committed(mut self: Box<Self>) {
        if let Some(fates) = self.fates.take() {
            fates.committed.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn unknown(mut self: Box<Self>) {
        if let Some(fates) = self.fates.take() {
            fates.unknown.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(fates) = self.fates.take() {
            fates.deleted.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn bytes_of(data: &ObjectData) -> Bytes {
    match data {
        ObjectData::Inline { bytes, .. } => bytes.clone(),
        ObjectData::Extents(_) => Bytes::new(),
    }
}

fn inline(bytes: Bytes) -> ObjectData {
    let crc32 = crc32fast::hash(&bytes);
    ObjectData::Inline { bytes, crc32 }
}

fn refused(old: Option<&ObjectRecord>, conditions: &Conditions) -> Option<Reply> {
    match (&conditions.if_match, old) {
        (Some(_), None) => return Some(Reply::NoSuchKey),
        (Some(etag), Some(old)) if etag != "*" && *etag != old.etag => return Some(Reply::PreconditionFailed),
        _ => {}
    }
    (conditions.if_none_match_any && old.is_some()).then_some(Reply::PreconditionFailed)
}

impl State {
    fn put(&mut self, bucket: BucketId, key: String, record: ObjectRecord, conditions: &Conditions) -> Reply {
        let at = (bucket, key);
        if let Some(reply) = refused(self.objects.get(&at), conditions) {
            return reply;
        }
        let etag = record.etag.clone();
        self.objects.insert(at, record);
        Reply::Put { version: VersionSeq(1), etag }
    }

    fn apply(&mut self, bucket: BucketId, command: Command) -> Reply {
        if self.gone.contains(&bucket) {
            return Reply::BucketFenced;
        }
        match command {
            Command::PutObject { bucket, key, record, conditions, .. } => self.put(bucket, key, record, &conditions),
            Command::DeleteObject { bucket, key, conditions, .. } => {
                let at = (bucket, key);
                if let Some(reply) = refused(self.objects.get(&at), &conditions) {
                    return reply;
                }
                Reply::Deleted { existed: self.objects.remove(&at).is_some(), marker: None }
            }
            Command::CreateUpload { bucket, key, upload, record, .. } => {
                self.uploads.insert((bucket, key, upload), (record, Parts::new()));
                Reply::Done
            }
            Command::PutPart { bucket, key, upload, part, .. } => match self.uploads.get_mut(&(bucket, key, upload)) {
                Some((_, parts)) => {
                    parts.insert(part.number, part);
                    Reply::Done
                }
                None => Reply::NoSuchUpload,
            },
            Command::AbortUpload { bucket, key, upload } => match self.uploads.remove(&(bucket, key, upload)) {
                Some(_) => Reply::Done,
                None => Reply::NoSuchUpload,
            },
            Command::CompleteUpload { bucket, key, upload, parts, mut record, conditions, .. } => {
                let at = (bucket, key.clone(), upload);
                let Some((_, have)) = self.uploads.get(&at) else { return Reply::NoSuchUpload };
                let mut bytes = BytesMut::new();
                for (number, etag) in &parts {
                    match have.get(number) {
                        Some(part) if part.etag == *etag => bytes.extend_from_slice(&bytes_of(&part.data)),
                        _ => return Reply::InvalidPart { number: *number },
                    }
                }
                record.data = inline(bytes.freeze());
                let etag = record.etag.clone();
                let reply = self.put(bucket, key, record, &conditions);
                if matches!(reply, Reply::Put { .. }) {
                    self.uploads.remove(&at);
                    self.completed.insert(upload, (etag, parts));
                }
                reply
            }
            other => Reply::Refused(format!("{other:?}")),
        }
    }

    fn answer(&self, bucket: BucketId, query: Query) -> Answer {
        if self.gone.contains(&bucket) {
            return Answer::BucketFenced;
        }
        match query {
            Query::GetObject { bucket, key, .. } => match self.objects.get(&(bucket, key)) {
                Some(record) => Answer::Object(Box::new(record.clone())),
                None => Answer::NoSuchKey,
            },
            Query::ListParts { bucket, key, upload, after, limit } => match self.uploads.get(&(bucket, key, upload)) {
                Some((record, parts)) => {
                    let mut page: Vec<_> =
                        parts.values().filter(|part| part.number > after).take(limit as usize + 1).cloned().collect();
                    let more = page.len() > limit as usize;
                    page.truncate(limit as usize);
                    Answer::Parts { upload: record.clone(), parts: page, more }
                }
                None => Answer::NoSuchUpload,
            },
            Query::CompletedUpload { upload, .. } => match self.completed.get(&upload) {
                Some((etag, parts)) => {
                    Answer::Completed { version: VersionSeq(1), etag: etag.clone(), parts: parts.clone() }
                }
                None => Answer::NoSuchUpload,
            },
            other => Answer::Refused(format!("{other:?}")),
        }
    }
}

impl Memory {
    /// Objects in all buckets.
    pub fn objects(&self) -> usize {
        self.state.lock().unwrap().objects.len()
    }

    /// The payload and record of an object in the bucket of that name.
    pub fn object(&self, bucket: &str, key: &str) -> Option<(Bytes, ObjectRecord)> {
        let state = self.state.lock().unwrap();
        let record = state.objects.get(&(state.buckets.get(bucket)?.id, key.to_owned()))?;
        Some((bytes_of(&record.data), record.clone()))
    }

    /// Sets the time an object was written at.
    pub fn touch(&self, bucket: &str, key: &str, modified_ms: u64) {
        let mut state = self.state.lock().unwrap();
        let id = state.buckets.get(bucket).unwrap().id;
        state.objects.get_mut(&(id, key.to_owned())).unwrap().modified_ms = modified_ms;
    }
}

#[async_trait]
impl Backend for Memory {
    fn has_scheme(&self, name: &str) -> bool {
        name == "wide"
    }

    async fn bucket(&self, name: &str) -> Result<Option<BucketRecord>, BackendError> {
        let delay = self.lookup_delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        Ok(self.state.lock().unwrap().buckets.get(name).cloned())
    }

    async fn bucket_now(&self, name: &str) -> Result<Option<BucketRecord>, BackendError> {
        self.bucket(name).await
    }

    async fn create_bucket(&self, name: &str, owner: AccountId) -> Result<Created, BackendError> {
        let mut state = self.state.lock().unwrap();
        if let Some(bucket) = state.buckets.get(name) {
            return Ok(Created::Exists(bucket.clone()));
        }
        state.next_bucket += 1;
        let bucket = BucketRecord {
            id: BucketId(state.next_bucket),
            name: name.to_owned(),
            created_ms: 1_700_000_000_000,
            owner,
            deleting: false,
            delete_attempt: 0,
            rule: BucketRule::default(),
            rule_pending: false,
        };
        state.buckets.insert(name.to_owned(), bucket.clone());
        Ok(Created::New(bucket))
    }

    async fn delete_bucket(&self, name: &str) -> Result<Removed, BackendError> {
        let mut state = self.state.lock().unwrap();
        let Some(id) = state.buckets.get(name).map(|bucket| bucket.id) else { return Ok(Removed::NoSuchBucket) };
        if state.objects.keys().any(|(bucket, _)| *bucket == id)
            || state.uploads.keys().any(|(bucket, ..)| *bucket == id)
        {
            return Ok(Removed::NotEmpty);
        }
        state.buckets.remove(name);
        state.gone.insert(id);
        Ok(Removed::Done)
    }

    async fn list_buckets(&self, after: &str, limit: u32) -> Result<(Vec<BucketRecord>, bool), BackendError> {
        let state = self.state.lock().unwrap();
        let mut page: Vec<_> = state.buckets.values().filter(|bucket| bucket.name.as_str() > after).cloned().collect();
        let more = page.len() > limit as usize;
        page.truncate(limit as usize);
        Ok((page, more))
    }

    async fn command_for(&self, bucket: BucketId, _: &str, command: Command) -> Result<Reply, BackendError> {
        let reply = self.state.lock().unwrap().apply(bucket, command);
        let lose =
            self.lose_answers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if lose {
            return Err(BackendError::OutcomeUnknown("lost on purpose".to_owned()));
        }
        Ok(reply)
    }

    async fn query_for(&self, bucket: BucketId, _: &str, query: Query) -> Result<Answer, BackendError> {
        Ok(self.state.lock().unwrap().answer(bucket, query))
    }

    async fn list_objects(
        &self,
        bucket: BucketId,
        prefix: &str,
        delimiter: &str,
        from: ListFrom,
        limit: u32,
    ) -> Result<Option<ListingPage>, BackendError> {
        let state = self.state.lock().unwrap();
        if state.gone.contains(&bucket) {
            return Ok(None);
        }
        let mut items: Vec<ListItem> = Vec::new();
        for ((have, key), record) in &state.objects {
            if *have != bucket || !key.starts_with(prefix) {
                continue;
            }
            let folded = match delimiter {
                "" => None,
                delimiter => {
                    key[prefix.len()..].find(delimiter).map(|at| key[..prefix.len() + at + delimiter.len()].to_owned())
                }
            };
            let item = match folded {
                Some(folded) => ListItem::Prefix(folded),
                None => ListItem::Object(ObjectSummary {
                    key: key.clone(),
                    size_bytes: record.size_bytes,
                    etag: record.etag.clone(),
                    modified_ms: record.modified_ms,
                    storage_class: record.meta.storage_class.clone(),
                    owner: record.owner,
                    checksum: record.checksum.as_ref().map(|checksum| (checksum.algorithm, checksum.kind)),
                }),
            };
            let after = match &from {
                ListFrom::Start => true,
                ListFrom::After(position) => item.sort_key().as_bytes() > position.as_bytes(),
            };
            if after && items.last() != Some(&item) {
                items.push(item);
            }
        }
        let more = items.len() > limit as usize;
        items.truncate(limit as usize);
        Ok(Some((items, more)))
    }

    async fn list_uploads(
        &self,
        bucket: BucketId,
        prefix: &str,
        after: UploadsAfter,
        limit: u32,
    ) -> Result<Option<UploadsPage>, BackendError> {
        let state = self.state.lock().unwrap();
        let mut page = Vec::new();
        for ((have, key, id), (record, _)) in &state.uploads {
            let wanted = match &after {
                None => true,
                Some((marker, None)) => key > marker,
                Some((marker, Some(last))) => (key, id) > (marker, last),
            };
            if *have == bucket && key.starts_with(prefix) && wanted {
                page.push((key.clone(), *id, record.clone()));
            }
        }
        let more = page.len() > limit as usize;
        page.truncate(limit as usize);
        Ok(Some((page, more)))
    }

    async fn stage(
        &self,
        spec: StageSpec<'_>,
        mut body: BoxStream<'_, Result<Bytes, BrokenBody>>,
    ) -> Result<Box<dyn StagedPayload>, StageError> {
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.next().await {
            bytes.extend_from_slice(&frame.map_err(|_| StageError::Body)?);
        }
        assert_eq!(bytes.len() as u64, spec.len_bytes, "the intake lets no other length through");
        Ok(Box::new(Staged { data: inline(bytes.freeze()), fates: Some(self.fates.clone()) }))
    }

    fn read(&self, data: &ObjectData, range: Range<u64>) -> BoxStream<'static, Result<Bytes, ReadError>> {
        let bytes = bytes_of(data).slice(range.start as usize..range.end as usize);
        let frames: Vec<_> = bytes.chunks(64 * 1024).map(|frame| Ok(bytes.slice_ref(frame))).collect();
        futures::stream::iter(frames).boxed()
    }
}
