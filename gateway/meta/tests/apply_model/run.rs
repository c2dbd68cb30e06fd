//! Sends commands to a shard and to the model, and compares all that can be asked.

use crate::commands::Maker;
use crate::model::Model;
use crate::scenery::{request, Random};
use crate::{KEYS, SHARD};
use granary_meta::answer::answer;
use granary_meta::apply::apply;
use granary_meta::kv::{MemoryKv, Overlay};
use granary_meta::record::{BucketId, ExtentRef, UploadId, VersionSeq};
use granary_meta::{Answer, Command, ListFrom, MetaRequest, Query, VersionPick};
use granary_placement::id::ExtentId;
use std::collections::BTreeMap;

/// A shard, the model of it, and what was sent to both.
pub struct Run {
    pub random: Random,
    pub kv: MemoryKv,
    pub model: Model,
    now: u64,
    history: Vec<MetaRequest>,
}

impl Run {
    pub fn step(&mut self) {
        let mut batch = Vec::new();
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        let mut overlay = Overlay::new(&self.kv);
        let steps = 1 + self.random.below(5);
        for _ in 0..steps {
            self.now += 1;
            let mut request = if !self.history.is_empty() && self.random.chance(10) {
                self.random.pick(&self.history).clone()
            } else {
                let random = Random(self.random.next());
                let command = Maker { random, model: &self.model, now: self.now }.command();
                if command == Command::Noop {
                    continue;
                }
                request(&mut self.random, self.now, command)
            };
            // Leaders' clocks differ a little; some gateways' much, and some retries come late.
            request.stamp_ms = Some(self.now + self.random.below(3_000));
            match self.random.below(40) {
                0 => request.now_ms -= 39_000 + self.random.below(8_000),
                1 => request.now_ms += 4_000 + self.random.below(8_000),
                _ => {}
            }
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

    pub fn compare(&mut self) {
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
        let Answer::RepairSlots { slots, more: false } = self.ask(Query::ListRepairSlots { after: None, limit: 1000 })
        else {
            panic!()
        };
        assert_eq!(
            slots,
            self.model.slots.iter().map(|((group, slot), there)| (*group, *slot, *there)).collect::<Vec<_>>()
        );
        let queued: BTreeMap<_, _> = chunks.into_iter().map(|(chunk, there, _)| (chunk, there.generation)).collect();
        assert_eq!(queued, self.model.missing);
        let mut garbage = BTreeMap::new();
        let mut until_ms = u64::MAX;
        let Answer::Garbage { extents, .. } = self.ask(Query::ListGarbage { until_ms, after: None, limit: 1000 })
        else {
            panic!()
        };
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

pub fn run(seed: u64, steps: usize) -> Run {
    let mut run = Run {
        random: Random(seed),
        kv: MemoryKv::default(),
        model: Model::default(),
        now: 1_000_000,
        history: Vec::new(),
    };
    for step in 0..steps {
        run.step();
        if step % 25 == 24 {
            run.compare();
        }
    }
    run
}
