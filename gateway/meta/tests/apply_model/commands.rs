//! Random commands that make sense often enough.

use crate::model::Model;
use crate::scenery::{extent, inline, record, Random};
use crate::KEYS;
use granary_meta::record::{
    AccountId, BucketId, BucketRule, ObjectData, ObjectMeta, PartRecord, UploadId, UploadRecord, Usage, VersionSeq,
    Versioning,
};
use granary_meta::{ChunkRef, Command, Conditions, VersionPick};
use granary_placement::id::{Epoch, ExtentId, PlacementGroupId};
use granary_placement::lease::LeaseStamp;

/// Makes commands from what the model knows.
pub struct Maker<'a> {
    pub random: Random,
    pub model: &'a Model,
    pub now: u64,
}

impl Maker<'_> {
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

    /// Mostly the rule that the shard has.
    fn rule_epoch(&mut self, bucket: BucketId) -> u64 {
        let known = self.model.rule(bucket.0).epoch;
        match self.random.below(16) {
            0 => known.saturating_sub(1),
            1 => known + 1,
            _ => known,
        }
    }

    /// Mostly the oldest map that the shard accepts, or the next.
    fn map_epoch(&mut self) -> Epoch {
        let Epoch(oldest) = self.model.oldest_map;
        match self.random.below(8) {
            0 => Epoch(oldest.saturating_sub(1)),
            1 => Epoch(oldest + 1),
            _ => Epoch(oldest),
        }
    }

    /// A rule as the root shard would make it, the one that is there, or an older one. Most buckets stay as they are
    /// for a while.
    fn rule_change(&mut self, bucket: BucketId) -> Command {
        let there = self.model.rule(bucket.0);
        let versioning = if self.random.chance(2) { Versioning::Enabled } else { Versioning::Suspended };
        let next = BucketRule { epoch: there.epoch + 1, versioning, lock: false, policy_epoch: self.random.below(9) };
        let rule = match self.random.below(6) {
            0 => there,
            1 if there.epoch > 0 => BucketRule { epoch: there.epoch - 1, ..next },
            2 => next,
            _ => return Command::Noop,
        };
        Command::SetBucketRule { bucket, rule }
    }

    /// Mostly the stamp of the present holder, at times of one before or the next.
    fn stamp(&mut self) -> LeaseStamp {
        let task = (*self.random.pick(&["heal.1", "heal.2"])).to_owned();
        let known = self.model.stamps.get(&task).copied().unwrap_or(0);
        let epoch = match self.random.below(8) {
            0 => known.saturating_sub(1),
            1 => known + 1,
            _ => known,
        };
        LeaseStamp { task, epoch }
    }

    /// The repair queue of slots: the generation that is queued, or another.
    fn slot_command(&mut self) -> Command {
        let lease = self.stamp();
        let (group, slot) = (PlacementGroupId(self.random.below(3) as u32), self.random.below(2) as u8);
        let there = self.model.slots.get(&(group, slot)).map_or(1, |there| there.generation);
        let generation = if self.random.chance(4) { there.saturating_sub(1) } else { there };
        match self.random.below(4) {
            0 => {
                let keep = self.random.chance(2);
                Command::QueueRepair { slots: vec![(group, slot), (group, slot + 1)], keep, lease }
            }
            1 => Command::RepairSlotDone { group, slot, generation, lease },
            _ => Command::AdvanceRepair { group, slot, generation, cursor: ExtentId(self.random.id()), lease },
        }
    }

    pub fn command(&mut self) -> Command {
        let bucket = BucketId(1 + self.random.below(2));
        let key = (*self.random.pick(&KEYS)).to_owned();
        let mut rule_epoch = self.rule_epoch(bucket);
        let etag = format!("{:x}", self.random.next());
        let uploads: Vec<_> = self.model.uploads.keys().cloned().collect();
        let known = (!uploads.is_empty()).then(|| self.random.pick(&uploads).clone());
        match self.random.below(25) {
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
                let map_epoch = self.map_epoch();
                Command::PutObject { bucket, key, record, missing, map_epoch, conditions, rule_epoch }
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
                Command::DeleteObject { bucket, key, version, conditions: Conditions::default(), rule_epoch }
            }
            8 => Command::CreateUpload {
                bucket,
                key,
                upload: UploadId(self.random.id()),
                record: UploadRecord {
                    initiated_ms: self.now,
                    meta: ObjectMeta::default(),
                    checksum: None,
                    owner: AccountId::ROOT,
                },
                rule_epoch,
            },
            9..=12 => {
                let Some((bucket, key, upload)) = known else { return Command::Noop };
                rule_epoch = self.rule_epoch(BucketId(bucket));
                let size = 2 + self.random.below(500);
                let (data, missing) = self.data(size);
                let size_bytes = data.extents().iter().map(|extent| extent.len_bytes).sum();
                let number = 1 + self.random.below(4) as u16;
                let part = PartRecord { number, size_bytes, etag, modified_ms: self.now, checksum: None, data };
                let (bucket, upload, map_epoch) = (BucketId(bucket), UploadId(upload), self.map_epoch());
                Command::PutPart { bucket, key, upload, part, missing, map_epoch, rule_epoch }
            }
            13 | 14 => {
                let Some((bucket, key, upload)) = known else { return Command::Noop };
                rule_epoch = self.rule_epoch(BucketId(bucket));
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
                    rule_epoch,
                }
            }
            15 => {
                let Some((bucket, key, upload)) = known else { return Command::Noop };
                Command::AbortUpload { bucket: BucketId(bucket), key, upload: UploadId(upload) }
            }
            16 => {
                // A bucket in use is too late to fence; an empty one would stay fenced for most of the run, so that is
                // left to bucket 3.
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
            18 => {
                // Now and then word of the repair before.
                let late = u64::from(self.random.chance(4));
                let chunks = self.model.missing.iter().take(2);
                let chunks = chunks.map(|(chunk, generation)| (*chunk, generation.saturating_sub(late))).collect();
                Command::RepairDone { chunks, lease: self.stamp() }
            }
            19 => Command::GarbageDone {
                extents: self.model.garbage.iter().take(3).map(|(extent, at)| (*at, *extent)).collect(),
                lease: self.stamp(),
            },
            20 => self.rule_change(bucket),
            21 => Command::RequireMap { epoch: self.map_epoch(), lease: self.stamp() },
            _ => self.slot_command(),
        }
    }
}
