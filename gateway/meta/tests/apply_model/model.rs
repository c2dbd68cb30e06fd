//! The model: a shard as a few maps.

use granary_meta::record::{
    BucketId, BucketRule, ExtentRef, ObjectData, PartRecord, RepairSlotRecord, Usage, VersionSeq, Versioning,
};
use granary_meta::{ChunkRef, Command, Conditions, ListFrom, MetaRequest, Reply, VersionPick};
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId};
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
pub struct Version {
    pub seq: u64,
    pub null: bool,
    pub marker: bool,
    pub size: u64,
    pub etag: String,
    pub extents: Vec<ExtentRef>,
}

/// What a finished upload was made of: part numbers with ETags, the version it became, and that version's ETag.
pub type Completed = (Vec<(u16, String)>, u64, String);

#[derive(Default)]
pub struct Model {
    /// Oldest first.
    pub versions: BTreeMap<(u64, String), Vec<Version>>,
    pub uploads: BTreeMap<(u64, String, [u8; 16]), BTreeMap<u16, PartRecord>>,
    pub completed: BTreeMap<[u8; 16], Completed>,
    /// Highest attempt seen, and is the fence up.
    pub fences: BTreeMap<u64, (u64, bool)>,
    pub owned: BTreeMap<ExtentId, ExtentRef>,
    /// With their generations.
    pub missing: BTreeMap<ChunkRef, u64>,
    pub garbage: BTreeMap<ExtentId, u64>,
    pub replies: BTreeMap<[u8; 16], Reply>,
    /// Commands applied.
    commands: u64,
    /// The highest stamp of them.
    pub clock: u64,
    pub next_seq: u64,
    pub rules: BTreeMap<u64, BucketRule>,
    /// The oldest map that payloads on disks may have been placed by.
    pub oldest_map: Epoch,
    /// Highest lease epoch seen of each task.
    pub stamps: BTreeMap<String, u64>,
    pub slots: BTreeMap<(PlacementGroupId, u8), RepairSlotRecord>,
    /// How often each kind of refusal was met.
    pub refusals: BTreeMap<&'static str, u64>,
}

impl Model {
    pub fn fenced(&self, bucket: u64) -> bool {
        self.fences.get(&bucket).is_some_and(|(_, up)| *up)
    }

    fn free(&mut self, extents: &[ExtentRef], now: u64) {
        for extent in extents {
            self.owned.remove(&extent.extent);
            self.missing.retain(|chunk, _| chunk.extent != extent.extent);
            self.garbage.insert(extent.extent, now);
        }
    }

    fn own(&mut self, extents: &[ExtentRef], missing: &[ChunkRef]) {
        self.owned.extend(extents.iter().map(|extent| (extent.extent, extent.clone())));
        let generation = self.commands + 1;
        self.missing.extend(missing.iter().map(|chunk| (*chunk, generation)));
    }

    pub fn current(&self, bucket: u64, key: &str) -> Option<&Version> {
        self.versions.get(&(bucket, key.to_owned()))?.last().filter(|version| !version.marker)
    }

    pub fn rule(&self, bucket: u64) -> BucketRule {
        self.rules.get(&bucket).copied().unwrap_or_default()
    }

    fn other_rule(&self, bucket: BucketId, epoch: u64) -> Option<Reply> {
        let known = self.rule(bucket.0).epoch;
        if epoch < known {
            return Some(Reply::StaleRule { current: known });
        }
        (epoch > known).then_some(Reply::RuleBehind { known })
    }

    /// Background work whose lease was taken over; notes the stamp otherwise.
    fn stale(&mut self, command: &Command) -> Option<Reply> {
        let (Command::RepairDone { lease, .. }
        | Command::GarbageDone { lease, .. }
        | Command::QueueRepair { lease, .. }
        | Command::AdvanceRepair { lease, .. }
        | Command::RepairSlotDone { lease, .. }
        | Command::RequireMap { lease, .. }) = command
        else {
            return None;
        };
        let current = self.stamps.entry(lease.task.clone()).or_default();
        if *current > lease.epoch {
            return Some(Reply::StaleLease { current: *current });
        }
        *current = lease.epoch;
        None
    }

    fn too_old(&self, data: &ObjectData, epoch: Epoch) -> Option<Reply> {
        let on_disks = !data.extents().is_empty();
        (on_disks && epoch < self.oldest_map).then_some(Reply::StaleMap { oldest: self.oldest_map })
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

    fn add(&mut self, bucket: u64, key: &str, mut version: Version, now: u64) -> Reply {
        let null = self.rule(bucket).versioning != Versioning::Enabled;
        if null {
            self.drop_null(bucket, key, now);
        }
        self.next_seq += 1;
        version.seq = self.next_seq;
        version.null = null;
        let reply = Reply::Put { version: VersionSeq(version.seq), etag: version.etag.clone() };
        self.versions.entry((bucket, key.to_owned())).or_default().push(version);
        reply
    }

    pub fn apply(&mut self, request: &MetaRequest) -> Reply {
        let repeatable = matches!(
            request.command,
            Command::ReportMissing { .. }
                | Command::RepairDone { .. }
                | Command::GarbageDone { .. }
                | Command::QueueRepair { .. }
                | Command::AdvanceRepair { .. }
                | Command::RepairSlotDone { .. }
                | Command::RequireMap { .. }
        );
        let clock = self.clock.max(request.stamp_ms.unwrap());
        if !repeatable {
            if let Some(reply) = self.replies.get(&request.request_id) {
                return reply.clone();
            }
            let age_ms = clock as i64 - request.now_ms as i64;
            if !(-5_000..=40_000).contains(&age_ms) {
                *self.refusals.entry("expired").or_default() += 1;
                return Reply::Expired { age_ms };
            }
        }
        self.clock = clock;
        let reply = match self.stale(&request.command) {
            Some(reply) => reply,
            None => self.change(&request.command, request.now_ms),
        };
        self.commands += 1;
        match reply {
            Reply::StaleRule { .. } => *self.refusals.entry("stale rule").or_default() += 1,
            Reply::RuleBehind { .. } => *self.refusals.entry("rule behind").or_default() += 1,
            Reply::StaleLease { .. } => *self.refusals.entry("stale lease").or_default() += 1,
            Reply::StaleMap { .. } => *self.refusals.entry("stale map").or_default() += 1,
            _ => {}
        }
        if !repeatable {
            self.replies.insert(request.request_id, reply.clone());
        }
        reply
    }

    fn change(&mut self, command: &Command, now: u64) -> Reply {
        match command {
            Command::PutObject { bucket, key, record, missing, map_epoch, conditions, rule_epoch } => {
                if self.fenced(bucket.0) {
                    return Reply::BucketFenced;
                }
                if let Some(refusal) = self.other_rule(*bucket, *rule_epoch) {
                    return refusal;
                }
                if let Some(refusal) = self.too_old(&record.data, *map_epoch) {
                    return refusal;
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
                self.add(bucket.0, key, version, now)
            }
            Command::DeleteObject { bucket, key, version, rule_epoch, .. } => {
                if self.fenced(bucket.0) {
                    return Reply::BucketFenced;
                }
                self.other_rule(*bucket, *rule_epoch).unwrap_or_else(|| self.delete(bucket.0, key, *version, now))
            }
            Command::CreateUpload { bucket, key, upload, rule_epoch, .. } => {
                if self.fenced(bucket.0) {
                    return Reply::BucketFenced;
                }
                if let Some(refusal) = self.other_rule(*bucket, *rule_epoch) {
                    return refusal;
                }
                self.uploads.insert((bucket.0, key.clone(), upload.0), BTreeMap::new());
                Reply::Done
            }
            Command::PutPart { bucket, key, upload, part, missing, map_epoch, rule_epoch } => {
                let id = (bucket.0, key.clone(), upload.0);
                if !self.uploads.contains_key(&id) {
                    return Reply::NoSuchUpload;
                }
                if let Some(refusal) = self.other_rule(*bucket, *rule_epoch) {
                    return refusal;
                }
                if let Some(refusal) = self.too_old(&part.data, *map_epoch) {
                    return refusal;
                }
                let old = self.uploads.get_mut(&id).unwrap().insert(part.number, part.clone());
                if let Some(old) = old {
                    self.free(old.data.extents(), now);
                }
                self.own(part.data.extents(), missing);
                Reply::Done
            }
            Command::CompleteUpload { bucket, key, upload, parts, record, conditions, rule_epoch } => {
                let id = (bucket.0, key.clone(), upload.0);
                let Some(there) = self.uploads.get(&id).cloned() else {
                    return match self.completed.get(&upload.0) {
                        Some((done, seq, etag)) if done == parts => {
                            Reply::Put { version: VersionSeq(*seq), etag: etag.clone() }
                        }
                        _ => Reply::NoSuchUpload,
                    };
                };
                if let Some(refusal) = self.other_rule(*bucket, *rule_epoch) {
                    return refusal;
                }
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
                let reply = self.add(bucket.0, key, version, now);
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
                let generation = self.commands + 1;
                for chunk in chunks {
                    if self.owned.get(&chunk.extent).is_some_and(|extent| usize::from(chunk.index) < extent.slots.len())
                    {
                        self.missing.insert(*chunk, generation);
                    }
                }
                Reply::Done
            }
            Command::RepairDone { chunks, .. } => {
                self.missing.retain(|chunk, generation| !chunks.contains(&(*chunk, *generation)));
                Reply::Done
            }
            Command::GarbageDone { extents, .. } => {
                for (at, extent) in extents {
                    if self.garbage.get(extent) == Some(at) {
                        self.garbage.remove(extent);
                    }
                }
                Reply::Done
            }
            Command::SetBucketRule { bucket, rule } => {
                let there = self.rule(bucket.0);
                if there.epoch > rule.epoch {
                    return Reply::StaleRule { current: there.epoch };
                }
                self.rules.insert(bucket.0, *rule);
                Reply::Done
            }
            Command::RequireMap { epoch, .. } => {
                self.oldest_map = self.oldest_map.max(*epoch);
                Reply::Done
            }
            Command::QueueRepair { slots, keep, .. } => {
                let generation = self.commands + 1;
                for slot in slots {
                    if *keep && self.slots.contains_key(slot) {
                        continue;
                    }
                    let queued_ms = self.slots.get(slot).map_or(now, |there| there.queued_ms);
                    self.slots.insert(*slot, RepairSlotRecord { queued_ms, generation, cursor: None });
                }
                Reply::Done
            }
            Command::AdvanceRepair { group, slot, generation, cursor, .. } => {
                if let Some(there) = self.slots.get_mut(&(*group, *slot)) {
                    if there.generation == *generation {
                        there.cursor = there.cursor.max(Some(*cursor));
                    }
                }
                Reply::Done
            }
            Command::RepairSlotDone { group, slot, generation, .. } => {
                if self.slots.get(&(*group, *slot)).is_some_and(|there| there.generation == *generation) {
                    self.slots.remove(&(*group, *slot));
                }
                Reply::Done
            }
            other => panic!("not in this test: {other:?}"),
        }
    }

    fn delete(&mut self, bucket: u64, key: &str, pick: VersionPick, now: u64) -> Reply {
        let id = (bucket, key.to_owned());
        let versioning = self.rule(bucket).versioning;
        let at = match pick {
            VersionPick::Current => {
                let existed = self.current(bucket, key).is_some();
                let dropped = versioning != Versioning::Enabled && self.drop_null(bucket, key, now);
                let mut marker = None;
                if versioning != Versioning::Off {
                    self.next_seq += 1;
                    marker = Some(VersionSeq(self.next_seq));
                    self.versions.entry(id).or_default().push(Version {
                        seq: self.next_seq,
                        null: versioning == Versioning::Suspended,
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

    pub fn usage(&self, bucket: u64) -> Usage {
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
    pub fn list(&self, bucket: u64, prefix: &str, delimiter: &str, from: &ListFrom) -> Vec<String> {
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
