//! Random commands applied to a shard and to a model that is a few maps: every answer must agree.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{extent, inline, record, request, seed, Random};
use granary_meta::answer::answer;
use granary_meta::apply::apply;
use granary_meta::kv::{MemoryKv, Overlay};
use granary_meta::record::{
    BucketId, ExtentRef, ObjectData, ObjectMeta, PartRecord, UploadId, UploadRecord, Usage, VersionSeq,
};
use granary_meta::{
    Answer, ChunkRef, Command, Conditions, ListFrom, ListItem, MetaRequest, Query, Reply, VersionMode, VersionPick,
};
use granary_placement::id::{ExtentId, ShardId};
use std::collections::{BTreeMap, BTreeSet};

const SHARD: ShardId = ShardId(3);
const KEYS: [&str; 12] =
    ["a", "a/b", "a/b/c", "a/c", "a.x", "skel.other/x", "skel/x", "skel/y/z", "skel", "z", "\u{e9}/x", "a/b/"];

#[derive(Clone, Debug)]
struct Version {
    seq: u64,
    null: bool,
    marker: bool,
    size: u64,
    etag: String,
    extents: Vec<ExtentRef>,
}

/// What a finished upload was made of: part numbers with ETags, the version it became, and that version's ETag.
type Completed = (Vec<(u16, String)>, u64, String);

#[derive(Default)]
struct Model {
    /// Oldest first.
    versions: BTreeMap<(u64, String), Vec<Version>>,
    uploads: BTreeMap<(u64, String, [u8; 16]), BTreeMap<u16, PartRecord>>,
    completed: BTreeMap<[u8; 16], Completed>,
    /// Highest attempt seen, and is the fence up.
    fences: BTreeMap<u64, (u64, bool)>,
    owned: BTreeMap<ExtentId, ExtentRef>,
    missing: BTreeSet<ChunkRef>,
    garbage: BTreeMap<ExtentId, u64>,
    replies: BTreeMap<[u8; 16], Reply>,
    next_seq: u64,
}

impl Model {
    fn fenced(&self, bucket: u64) -> bool {
        self.fences.get(&bucket).is_some_and(|(_, up)| *up)
    }

    fn free(&mut self, extents: &[ExtentRef], now: u64) {
        for extent in extents {
            self.owned.remove(&extent.extent);
            self.missing.retain(|chunk| chunk.extent != extent.extent);
            self.garbage.insert(extent.extent, now);
        }
    }

    fn own(&mut self, extents: &[ExtentRef], missing: &[ChunkRef]) {
        self.owned.extend(extents.iter().map(|extent| (extent.extent, extent.clone())));
        self.missing.extend(missing.iter().copied());
    }

    fn current(&self, bucket: u64, key: &str) -> Option<&Version> {
        self.versions.get(&(bucket, key.to_owned()))?.last().filter(|version| !version.marker)
    }

    fn refusal(&self, bucket: u64, key: &str, conditions: &Conditions) -> Option<Reply> {
        let current = self.current(bucket, key);
        if conditions.if_none_match_any && current.is_some() {
            return Some(Reply::PreconditionFailed);
        }
        let wanted = conditions.if_match.as_ref()?;
        match current {
            None => Some(Reply::NoSuchKey),
            Some(version) if wanted == "*" || *wanted == version.etag => None,
            Some(_) => Some(Reply::PreconditionFailed),
        }
    }

    fn drop_null(&mut self, bucket: u64, key: &str, now: u64) -> bool {
        let Some(versions) = self.versions.get_mut(&(bucket, key.to_owned())) else { return false };
        let Some(at) = versions.iter().position(|version| version.null) else { return false };
        let gone = versions.remove(at);
        self.free(&gone.extents, now);
        true
    }

    fn add(&mut self, bucket: u64, key: &str, mut version: Version, mode: VersionMode, now: u64) -> Reply {
        if mode == VersionMode::Off {
            self.drop_null(bucket, key, now);
        }
        self.next_seq += 1;
        version.seq = self.next_seq;
        version.null = mode == VersionMode::Off;
        let reply = Reply::Put { version: VersionSeq(version.seq), etag: version.etag.clone() };
        self.versions.entry((bucket, key.to_owned())).or_default().push(version);
        reply
    }

    fn apply(&mut self, request: &MetaRequest) -> Reply {
        if let Some(reply) = self.replies.get(&request.request_id) {
            return reply.clone();
        }
        let reply = self.change(&request.command, request.now_ms);
        self.replies.insert(request.request_id, reply.clone());
        reply
    }

    fn change(&mut self, command: &Command, now: u64) -> Reply {
        match command {
            Command::PutObject { bucket, key, record, missing, conditions, mode } => {
                if self.fenced(bucket.0) {
                    return Reply::BucketFenced;
                }
                if let Some(refusal) = self.refusal(bucket.0, key, conditions) {
                    return refusal;
                }
                let extents = record.data.extents().to_vec();
                self.own(&extents, missing);
                let version = Version {
                    seq: 0,
                    null: false,
                    marker: false,
                    size: record.size_bytes,
                    etag: record.etag.clone(),
                    extents,
                };
                self.add(bucket.0, key, version, *mode, now)
            }
            Command::DeleteObject { bucket, key, version, mode, .. } => {
                self.delete(bucket.0, key, *version, *mode, now)
            }
            Command::CreateUpload { bucket, key, upload, .. } => {
                if self.fenced(bucket.0) {
                    return Reply::BucketFenced;
                }
                self.uploads.insert((bucket.0, key.clone(), upload.0), BTreeMap::new());
                Reply::Done
            }
            Command::PutPart { bucket, key, upload, part, missing } => {
                let id = (bucket.0, key.clone(), upload.0);
                if !self.uploads.contains_key(&id) {
                    return Reply::NoSuchUpload;
                }
                let old = self.uploads.get_mut(&id).unwrap().insert(part.number, part.clone());
                if let Some(old) = old {
                    self.free(old.data.extents(), now);
                }
                self.own(part.data.extents(), missing);
                Reply::Done
            }
            Command::CompleteUpload { bucket, key, upload, parts, record, conditions, mode } => {
                let id = (bucket.0, key.clone(), upload.0);
                let Some(there) = self.uploads.get(&id).cloned() else {
                    return match self.completed.get(&upload.0) {
                        Some((done, seq, etag)) if done == parts => {
                            Reply::Put { version: VersionSeq(*seq), etag: etag.clone() }
                        }
                        _ => Reply::NoSuchUpload,
                    };
                };
                for (number, etag) in parts {
                    if there.get(number).is_none_or(|part| part.etag != *etag) {
                        return Reply::InvalidPart { number: *number };
                    }
                }
                if let Some(refusal) = self.refusal(bucket.0, key, conditions) {
                    return refusal;
                }
                self.uploads.remove(&id);
                let mut extents = Vec::new();
                for (number, part) in &there {
                    if parts.iter().any(|(wanted, _)| wanted == number) {
                        extents.extend_from_slice(part.data.extents());
                    } else {
                        self.free(part.data.extents(), now);
                    }
                }
                let version = Version {
                    seq: 0,
                    null: false,
                    marker: false,
                    size: record.size_bytes,
                    etag: record.etag.clone(),
                    extents,
                };
                let reply = self.add(bucket.0, key, version, *mode, now);
                if let Reply::Put { version, etag } = &reply {
                    self.completed.insert(upload.0, (parts.clone(), version.0, etag.clone()));
                }
                reply
            }
            Command::AbortUpload { bucket, key, upload } => {
                match self.uploads.remove(&(bucket.0, key.clone(), upload.0)) {
                    None => Reply::NoSuchUpload,
                    Some(parts) => {
                        for part in parts.values() {
                            self.free(part.data.extents(), now);
                        }
                        Reply::Done
                    }
                }
            }
            Command::FenceBucket { bucket, attempt } => {
                let (seen, up) = self.fences.get(&bucket.0).copied().unwrap_or((0, true));
                if *attempt < seen || (*attempt == seen && !up) {
                    return Reply::StaleAttempt { current: seen };
                }
                let empty = !self.versions.iter().any(|((of, _), versions)| *of == bucket.0 && !versions.is_empty())
                    && !self.uploads.keys().any(|(of, _, _)| *of == bucket.0);
                self.fences.insert(bucket.0, (*attempt, empty));
                Reply::Fenced { empty }
            }
            Command::UnfenceBucket { bucket, attempt } => match self.fences.get(&bucket.0) {
                Some((seen, _)) if seen > attempt => Reply::StaleAttempt { current: *seen },
                _ => {
                    self.fences.insert(bucket.0, (*attempt, false));
                    Reply::Done
                }
            },
            Command::ReportMissing { chunks } => {
                for chunk in chunks {
                    if self.owned.get(&chunk.extent).is_some_and(|extent| usize::from(chunk.index) < extent.slots.len())
                    {
                        self.missing.insert(*chunk);
                    }
                }
                Reply::Done
            }
            Command::RepairDone { chunks } => {
                self.missing.retain(|chunk| !chunks.contains(chunk));
                Reply::Done
            }
            Command::GarbageDone { extents } => {
                for (at, extent) in extents {
                    if self.garbage.get(extent) == Some(at) {
                        self.garbage.remove(extent);
                    }
                }
                Reply::Done
            }
            other => panic!("not in this test: {other:?}"),
        }
    }

    fn delete(&mut self, bucket: u64, key: &str, pick: VersionPick, mode: VersionMode, now: u64) -> Reply {
        if self.fenced(bucket) {
            return Reply::BucketFenced;
        }
        let id = (bucket, key.to_owned());
        let at = match pick {
            VersionPick::Current => {
                let existed = self.current(bucket, key).is_some();
                let dropped = mode == VersionMode::Off && self.drop_null(bucket, key, now);
                let others = self.versions.get(&id).is_some_and(|versions| !versions.is_empty());
                let mut marker = None;
                if mode == VersionMode::On || others {
                    self.next_seq += 1;
                    marker = Some(VersionSeq(self.next_seq));
                    self.versions.entry(id).or_default().push(Version {
                        seq: self.next_seq,
                        null: mode == VersionMode::Off,
                        marker: true,
                        size: 0,
                        etag: String::new(),
                        extents: Vec::new(),
                    });
                }
                return Reply::Deleted { existed: existed || dropped || marker.is_some(), marker };
            }
            VersionPick::Null => self.versions.get(&id).and_then(|of| of.iter().position(|version| version.null)),
            VersionPick::Seq(seq) => {
                self.versions.get(&id).and_then(|of| of.iter().position(|version| version.seq == seq.0))
            }
        };
        let Some(at) = at else { return Reply::Deleted { existed: false, marker: None } };
        let gone = self.versions.get_mut(&id).unwrap().remove(at);
        self.free(&gone.extents, now);
        Reply::Deleted { existed: true, marker: None }
    }

    fn usage(&self, bucket: u64) -> Usage {
        let mut usage = Usage::default();
        for ((of, _), versions) in &self.versions {
            if *of == bucket {
                usage.objects += u64::from(versions.last().is_some_and(|version| !version.marker));
                usage.versions += versions.len() as u64;
                usage.bytes += versions.iter().map(|version| version.size).sum::<u64>();
            }
        }
        for ((of, _, _), parts) in &self.uploads {
            if *of == bucket {
                usage.uploads += 1;
                usage.upload_bytes += parts.values().map(|part| part.size_bytes).sum::<u64>();
            }
        }
        usage
    }

    /// Everything a listing would say, by folding all keys one by one.
    fn list(&self, bucket: u64, prefix: &str, delimiter: &str, from: &ListFrom) -> Vec<String> {
        let mut items: Vec<String> = Vec::new();
        for (of, key) in self.versions.keys() {
            if *of != bucket || self.current(bucket, key).is_none() || !key.starts_with(prefix) {
                continue;
            }
            let folded = match key[prefix.len()..].find(delimiter) {
                Some(at) if !delimiter.is_empty() => Some(key[..prefix.len() + at + delimiter.len()].to_owned()),
                _ => None,
            };
            if let ListFrom::After(after) = from {
                let under_done_prefix = folded.as_ref() == Some(after);
                if key.as_bytes() <= after.as_bytes() || under_done_prefix {
                    continue;
                }
            }
            let item = folded.unwrap_or_else(|| key.clone());
            if items.last() != Some(&item) {
                items.push(item);
            }
        }
        items
    }
}

struct Run {
    random: Random,
    kv: MemoryKv,
    model: Model,
    now: u64,
    history: Vec<MetaRequest>,
}

impl Run {
    fn data(&mut self, size: u64) -> (ObjectData, Vec<ChunkRef>) {
        let first = extent(&mut self.random, size / 2 + 1);
        let second = extent(&mut self.random, size - size / 2);
        let mut missing = Vec::new();
        if self.random.chance(4) {
            missing.push(ChunkRef { group: first.group, extent: first.extent, index: self.random.below(4) as u8 });
        }
        (ObjectData::Extents(vec![first, second]), missing)
    }

    fn conditions(&mut self, bucket: u64, key: &str) -> Conditions {
        let etag = self.model.current(bucket, key).map(|version| version.etag.clone());
        match self.random.below(8) {
            0 => Conditions { if_match: None, if_none_match_any: true },
            1 => Conditions { if_match: Some("*".to_owned()), if_none_match_any: false },
            2 => Conditions { if_match: Some(etag.unwrap_or_else(|| "none".to_owned())), if_none_match_any: false },
            _ => Conditions::default(),
        }
    }

    fn command(&mut self) -> Command {
        let bucket = BucketId(1 + self.random.below(2));
        let key = (*self.random.pick(&KEYS)).to_owned();
        let mode = if self.random.chance(3) { VersionMode::On } else { VersionMode::Off };
        let etag = format!("{:x}", self.random.next());
        let uploads: Vec<_> = self.model.uploads.keys().cloned().collect();
        let known = (!uploads.is_empty()).then(|| self.random.pick(&uploads).clone());
        match self.random.below(20) {
            0..=4 => {
                let conditions = self.conditions(bucket.0, &key);
                let size = 2 + self.random.below(1000);
                let (data, missing) =
                    if self.random.chance(3) { (inline(&vec![7; size as usize]), Vec::new()) } else { self.data(size) };
                let size_bytes = match &data {
                    ObjectData::Inline { bytes, .. } => bytes.len() as u64,
                    ObjectData::Extents(extents) => extents.iter().map(|extent| extent.len_bytes).sum(),
                };
                let record = record(data, size_bytes, &etag);
                Command::PutObject { bucket, key, record, missing, conditions, mode }
            }
            5..=7 => {
                let of_key: Vec<u64> = self
                    .model
                    .versions
                    .get(&(bucket.0, key.clone()))
                    .map(|versions| versions.iter().map(|version| version.seq).collect())
                    .unwrap_or_default();
                let version = match self.random.below(4) {
                    0 if !of_key.is_empty() => VersionPick::Seq(VersionSeq(*self.random.pick(&of_key))),
                    1 => VersionPick::Null,
                    _ => VersionPick::Current,
                };
                Command::DeleteObject { bucket, key, version, conditions: Conditions::default(), mode }
            }
            8 => Command::CreateUpload {
                bucket,
                key,
                upload: UploadId(self.random.id()),
                record: UploadRecord {
                    initiated_ms: self.now,
                    meta: ObjectMeta::default(),
                    checksum: None,
                    owner: granary_meta::record::AccountId::ROOT,
                },
            },
            9..=12 => {
                let Some((bucket, key, upload)) = known else { return Command::Noop };
                let size = 2 + self.random.below(500);
                let (data, missing) = self.data(size);
                let size_bytes = data.extents().iter().map(|extent| extent.len_bytes).sum();
                let number = 1 + self.random.below(4) as u16;
                let part = PartRecord { number, size_bytes, etag, modified_ms: self.now, checksum: None, data };
                Command::PutPart { bucket: BucketId(bucket), key, upload: UploadId(upload), part, missing }
            }
            13 | 14 => {
                let Some((bucket, key, upload)) = known else { return Command::Noop };
                let there = &self.model.uploads[&(bucket, key.clone(), upload)];
                let mut parts = Vec::new();
                let mut size_bytes = 0;
                for (number, part) in there {
                    if self.random.chance(5) {
                        continue;
                    }
                    let etag = if self.random.chance(12) { "wrong".to_owned() } else { part.etag.clone() };
                    parts.push((*number, etag));
                    size_bytes += part.size_bytes;
                }
                if parts.is_empty() {
                    return Command::Noop;
                }
                let conditions = self.conditions(bucket, &key);
                let record = record(ObjectData::Extents(Vec::new()), size_bytes, &etag);
                Command::CompleteUpload {
                    bucket: BucketId(bucket),
                    key,
                    upload: UploadId(upload),
                    parts,
                    record,
                    conditions,
                    mode,
                }
            }
            15 => {
                let Some((bucket, key, upload)) = known else { return Command::Noop };
                Command::AbortUpload { bucket: BucketId(bucket), key, upload: UploadId(upload) }
            }
            16 => {
                // A bucket in use is too late to fence; an empty one would stay fenced for most of the run, so that is left to bucket 3.
                let bucket = if self.random.chance(8) { bucket } else { BucketId(3) };
                let in_use = self.model.usage(bucket.0) != Usage::default();
                let seen = self.model.fences.get(&bucket.0).map_or(1, |(seen, _)| *seen);
                let attempt = (seen + self.random.below(3)).saturating_sub(1);
                if in_use || (bucket == BucketId(3) && self.random.chance(2)) {
                    Command::FenceBucket { bucket, attempt }
                } else {
                    Command::UnfenceBucket { bucket, attempt }
                }
            }
            17 => {
                let owned: Vec<_> = self.model.owned.values().cloned().collect();
                let mut chunks =
                    vec![ChunkRef { group: extent(&mut self.random, 1).group, extent: ExtentId([9; 16]), index: 0 }];
                if !owned.is_empty() {
                    let extent = self.random.pick(&owned).clone();
                    let index = self.random.below(6) as u8;
                    chunks.push(ChunkRef { group: extent.group, extent: extent.extent, index });
                }
                Command::ReportMissing { chunks }
            }
            18 => Command::RepairDone { chunks: self.model.missing.iter().take(2).copied().collect() },
            _ => Command::GarbageDone {
                extents: self.model.garbage.iter().take(3).map(|(extent, at)| (*at, *extent)).collect(),
            },
        }
    }

    fn step(&mut self) {
        let mut batch = Vec::new();
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        let mut overlay = Overlay::new(&self.kv);
        let steps = 1 + self.random.below(5);
        for _ in 0..steps {
            self.now += 1;
            // The overlay borrows the state, so the command is made from the model alone.
            let request = if !self.history.is_empty() && self.random.chance(10) {
                self.random.pick(&self.history).clone()
            } else {
                let command = {
                    let mut made = Run {
                        random: Random(self.random.next()),
                        kv: MemoryKv::default(),
                        model: std::mem::take(&mut self.model),
                        now: self.now,
                        history: Vec::new(),
                    };
                    let command = made.command();
                    self.model = made.model;
                    command
                };
                if command == Command::Noop {
                    continue;
                }
                request(&mut self.random, self.now, command)
            };
            expected.push(self.model.apply(&request));
            got.push(apply(SHARD, &mut overlay, &request).unwrap());
            batch.push(request);
        }
        let writes = overlay.into_writes();
        self.kv.write(writes);
        assert_eq!(got, expected, "{batch:#?}");
        self.history.extend(batch);
        if self.history.len() > 200 {
            self.history.drain(..100);
        }
    }

    fn ask(&self, what: Query) -> Answer {
        answer(SHARD, &self.kv, &what).unwrap()
    }

    fn compare(&mut self) {
        for bucket in 1..=3u64 {
            assert_eq!(
                self.ask(Query::BucketUsage { bucket: BucketId(bucket) }),
                Answer::Usage(self.model.usage(bucket))
            );
            for key in KEYS {
                self.compare_key(bucket, key);
            }
        }
        self.compare_queues();
        self.compare_uploads();
        for _ in 0..6 {
            self.compare_listing();
        }
    }

    fn compare_key(&self, bucket: u64, key: &str) {
        let versions = self.model.versions.get(&(bucket, key.to_owned())).cloned().unwrap_or_default();
        let picks = [
            (VersionPick::Current, versions.last()),
            (VersionPick::Null, versions.iter().find(|version| version.null)),
            (VersionPick::Seq(VersionSeq(u64::MAX)), None),
        ];
        let all = versions.iter().map(|version| (VersionPick::Seq(VersionSeq(version.seq)), Some(version)));
        for (version, expected) in picks.into_iter().chain(all) {
            if self.model.fenced(bucket) {
                continue;
            }
            let got = match self.ask(Query::GetObject { bucket: BucketId(bucket), key: key.to_owned(), version }) {
                Answer::Object(record) => Some((
                    record.version.0,
                    record.null_version,
                    record.delete_marker,
                    record.size_bytes,
                    record.data.extents().to_vec(),
                )),
                Answer::NoSuchKey => None,
                other => panic!("{other:?}"),
            };
            let expected = expected.map(|v| (v.seq, v.null, v.marker, v.size, v.extents.clone()));
            assert_eq!(got, expected, "{bucket}/{key} {version:?}");
        }
    }

    fn compare_queues(&self) {
        let Answer::Extents { extents, more: false } =
            self.ask(Query::ExtentsOfGroup { group: None, after: None, limit: 1000 })
        else {
            panic!("more than a page of extents")
        };
        let got: BTreeMap<ExtentId, ExtentRef> =
            extents.into_iter().map(|record| (record.extent.extent, record.extent)).collect();
        assert_eq!(got, self.model.owned);
        let Answer::Missing { chunks, more: false } = self.ask(Query::ListMissing { after: None, limit: 1000 }) else {
            panic!()
        };
        assert_eq!(chunks.into_iter().map(|(chunk, _, _)| chunk).collect::<BTreeSet<_>>(), self.model.missing);
        let mut garbage = BTreeMap::new();
        let mut until_ms = u64::MAX;
        let Answer::Garbage { extents, .. } = self.ask(Query::ListGarbage { until_ms, limit: 1000 }) else { panic!() };
        for (at, extent) in &extents {
            garbage.insert(extent.extent, *at);
            until_ms = *at;
        }
        assert!(extents.windows(2).all(|pair| pair[0].0 <= pair[1].0), "oldest first");
        let expected: BTreeMap<_, _> = self
            .model
            .garbage
            .iter()
            .filter(|(_, at)| extents.len() < 1000 || **at < until_ms)
            .map(|(id, at)| (*id, *at))
            .collect();
        assert!(expected.iter().all(|(id, at)| garbage.get(id) == Some(at)));
        assert!(garbage.iter().all(|(id, at)| self.model.garbage.get(id) == Some(at)));
    }

    fn compare_uploads(&self) {
        for ((bucket, key, upload), parts) in &self.model.uploads {
            let asked = Query::ListParts {
                bucket: BucketId(*bucket),
                key: key.clone(),
                upload: UploadId(*upload),
                after: 0,
                limit: 100,
            };
            let Answer::Parts { parts: got, more: false, .. } = self.ask(asked) else { panic!() };
            let got: Vec<_> = got.into_iter().map(|part| (part.number, part.etag)).collect();
            assert_eq!(got, parts.values().map(|part| (part.number, part.etag.clone())).collect::<Vec<_>>());
        }
        for bucket in 1..=2u64 {
            let (mut after, mut got) = (None, Vec::new());
            loop {
                let asked = Query::ListUploads {
                    bucket: BucketId(bucket),
                    prefix: String::new(),
                    after: after.clone(),
                    limit: 2,
                };
                let Answer::Uploads { uploads, more } = self.ask(asked) else { panic!() };
                got.extend(uploads.iter().map(|(key, id, _)| (bucket, key.clone(), id.0)));
                after = uploads.last().map(|(key, id, _)| (key.clone(), Some(*id)));
                if !more {
                    break;
                }
            }
            let expected: Vec<_> = self.model.uploads.keys().filter(|(of, _, _)| *of == bucket).cloned().collect();
            assert_eq!(got, expected);
        }
    }

    fn compare_listing(&mut self) {
        let bucket = 1 + self.random.below(2);
        let prefix = (*self.random.pick(&["", "", "a", "a/", "skel", "skel/", "zz"])).to_owned();
        let delimiter = (*self.random.pick(&["", "/", "/", "b", "/y/"])).to_owned();
        let mut from = match self.random.below(3) {
            0 => ListFrom::Start,
            1 => ListFrom::After((*self.random.pick(&KEYS)).to_owned()),
            _ => ListFrom::After((*self.random.pick(&["a/", "skel/", "b", "a/b"])).to_owned()),
        };
        let expected = self.model.list(bucket, &prefix, &delimiter, &from);
        let limit = 1 + self.random.below(4) as u32;
        let described =
            format!("bucket {bucket} prefix {prefix:?} delimiter {delimiter:?} from {from:?} limit {limit}");
        let mut got = Vec::new();
        loop {
            let asked = Query::ListObjects {
                bucket: BucketId(bucket),
                prefix: prefix.clone(),
                delimiter: delimiter.clone(),
                from: from.clone(),
                limit,
            };
            let Answer::Listing { items, more } = self.ask(asked) else { panic!() };
            assert!(items.len() <= limit as usize);
            got.extend(items.iter().map(|item| item.sort_key().to_owned()));
            if !more {
                break;
            }
            from = ListFrom::After(items.last().unwrap().sort_key().to_owned());
        }
        assert_eq!(got, expected, "{described}");
    }
}

fn run(seed: u64, steps: usize) -> Run {
    let mut run =
        Run { random: Random(seed), kv: MemoryKv::default(), model: Model::default(), now: 1_000, history: Vec::new() };
    for step in 0..steps {
        run.step();
        if step % 25 == 24 {
            run.compare();
        }
    }
    run
}

#[test]
fn random_commands_agree_with_the_model() {
    let seed = seed("random_commands_agree_with_the_model");
    for round in 0..40 {
        run(seed.wrapping_add(round), 400);
    }
}

#[test]
fn fixed_seed_agrees_with_the_model_and_reaches_every_corner() {
    let run = run(7, 3_000);
    assert!(run.model.next_seq > 500 && !run.model.garbage.is_empty() && !run.model.completed.is_empty());
    assert!(run.model.versions.values().any(|versions| versions.len() > 3), "no key with many versions was made");
    assert!(run.model.versions.values().any(|versions| versions.last().is_some_and(|version| version.marker)));
}

#[test]
fn same_commands_give_the_same_bytes_in_any_batching() {
    let mut random = Random(11);
    let requests: Vec<MetaRequest> = (0..300)
        .map(|i| request(&mut Random(i), 5 + i, common::put(1, KEYS[(random.below(12)) as usize], &[i as u8; 9])))
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
    let first = request(&mut random, 1, common::put(1, "k", b"one"));
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
    let put = |data: &ObjectData, key: &str| Command::PutObject {
        bucket: BucketId(1),
        key: key.to_owned(),
        record: record(data.clone(), 10, "e"),
        missing: Vec::new(),
        conditions: Conditions::default(),
        mode: VersionMode::Off,
    };
    let first = request(&mut random, 1, put(&data, "a"));
    assert!(matches!(apply_one(&mut kv, &first), Reply::Put { .. }));
    let again = request(&mut random, 2, put(&data, "b"));
    assert!(matches!(apply_one(&mut kv, &again), Reply::Refused(_)));
    let over = request(&mut random, 3, common::put(1, "a", b"new"));
    assert!(matches!(apply_one(&mut kv, &over), Reply::Put { .. }));
    let late = request(&mut random, 4, put(&data, "a"));
    assert!(matches!(apply_one(&mut kv, &late), Reply::Refused(_)), "its chunks are about to be deleted");
}

#[test]
fn malformed_commands_are_refused_and_change_nothing() {
    let mut random = Random(8);
    let whole = extent(&mut random, 10);
    let narrow = ExtentRef { slots: vec![0, 1], ..whole.clone() };
    let put = |key: &str, data: ObjectData, size: u64, missing: Vec<ChunkRef>| Command::PutObject {
        bucket: BucketId(1),
        key: key.to_owned(),
        record: record(data, size, "e"),
        missing,
        conditions: Conditions::default(),
        mode: VersionMode::Off,
    };
    let chunk = |index| ChunkRef { group: whole.group, extent: whole.extent, index };
    let extents = |list: Vec<ExtentRef>| ObjectData::Extents(list);
    let bad = vec![
        put("", inline(b"x"), 1, vec![]),
        put("a\0b", inline(b"x"), 1, vec![]),
        put(&"k".repeat(1025), inline(b"x"), 1, vec![]),
        put("a", inline(b"x"), 2, vec![]),
        put("a", ObjectData::Inline { bytes: bytes::Bytes::from_static(b"x"), crc32: 0 }, 1, vec![]),
        put("a", extents(vec![whole.clone()]), 11, vec![]),
        put("a", extents(vec![whole.clone(), whole.clone()]), 20, vec![]),
        put("a", extents(vec![narrow]), 10, vec![]),
        put("a", extents(vec![whole.clone()]), 10, vec![chunk(0), chunk(1)]),
        put("a", extents(vec![whole.clone()]), 10, vec![chunk(9)]),
        put("a", inline(b"x"), 1, vec![chunk(0)]),
        Command::CreateBucket { name: "b".to_owned(), owner: granary_meta::record::AccountId::ROOT },
    ];
    for command in bad {
        let mut kv = MemoryKv::default();
        let sent = request(&mut random, 1, command);
        assert!(matches!(apply_one(&mut kv, &sent), Reply::Refused(_)), "{sent:?}");
        let usage = answer(SHARD, &kv, &Query::BucketUsage { bucket: BucketId(1) }).unwrap();
        assert_eq!(usage, Answer::Usage(Usage::default()));
    }
    let mut kv = MemoryKv::default();
    let one_missing = request(&mut random, 1, put("a", extents(vec![whole.clone()]), 10, vec![chunk(3)]));
    assert!(matches!(apply_one(&mut kv, &one_missing), Reply::Put { .. }));
}

#[test]
fn listing_keeps_byte_order_across_delimiters() {
    let mut kv = MemoryKv::default();
    let mut random = Random(9);
    for key in ["skel/x", "skel.other/x", "skel0", "skel"] {
        let sent = request(&mut random, 1, common::put(1, key, b"x"));
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
