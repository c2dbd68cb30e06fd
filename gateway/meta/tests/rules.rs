//! Rules of buckets by epoch: what was once told to a shard is never undone by a gateway that remembers less.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::memory::MemoryShards;
use granary_meta::record::{AccountId, BucketId, BucketRecord, BucketRule, Versioning};
use granary_meta::{Answer, Command, Conditions, Query, Reply, VersionPick};
use granary_placement::id::{Epoch, ShardId};
use scenery::{map, put};

const BUCKET: BucketId = BucketId(1);
const SHARD: ShardId = ShardId(1);

struct Cluster(MemoryShards);

impl Cluster {
    /// With a bucket `b`.
    fn new() -> Cluster {
        let mut cluster = Cluster(MemoryShards::new(&map()).unwrap());
        let made = cluster.root(Command::CreateBucket { name: "b".to_owned(), owner: AccountId::ROOT });
        let Reply::Bucket(made) = made else { panic!("{made:?}") };
        assert_eq!((made.id, made.rule, made.rule_pending), (BUCKET, BucketRule::default(), false));
        cluster
    }

    fn root(&mut self, command: Command) -> Reply {
        self.0.command(ShardId::ROOT, 1, command).unwrap()
    }

    fn send(&mut self, command: Command) -> Reply {
        self.0.command(SHARD, 1, command).unwrap()
    }

    fn put(&mut self, rule_epoch: u64) -> Reply {
        let mut command = put(1, "k", b"body");
        if let Command::PutObject { rule_epoch: epoch, .. } = &mut command {
            *epoch = rule_epoch;
        }
        self.send(command)
    }

    fn delete(&mut self, version: VersionPick, rule_epoch: u64) -> Reply {
        let (key, conditions) = ("k".to_owned(), Conditions::default());
        self.send(Command::DeleteObject { bucket: BUCKET, key, version, conditions, rule_epoch })
    }

    /// (version, is null, is a marker) of what the shard has under a pick.
    fn get(&self, version: VersionPick) -> Option<(u64, bool, bool)> {
        let asked = Query::GetObject { bucket: BUCKET, key: "k".to_owned(), version };
        match self.0.query(SHARD, &asked).unwrap() {
            Answer::Object(found) => Some((found.version.0, found.null_version, found.delete_marker)),
            Answer::NoSuchKey => None,
            other => panic!("{other:?}"),
        }
    }
}

fn begin(versioning: Versioning, lock: bool) -> Command {
    Command::BeginBucketRule { name: "b".to_owned(), bucket: BUCKET, versioning, lock, policy_epoch: 0 }
}

fn end(epoch: u64) -> Command {
    Command::EndBucketRule { name: "b".to_owned(), bucket: BUCKET, epoch }
}

fn rule(epoch: u64, versioning: Versioning) -> BucketRule {
    BucketRule { epoch, versioning, lock: false, policy_epoch: 0 }
}

fn bucket(reply: Reply) -> BucketRecord {
    match reply {
        Reply::Bucket(bucket) => bucket,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_root_shard_numbers_rules_and_ends_only_the_last() {
    let mut cluster = Cluster::new();
    let first = bucket(cluster.root(begin(Versioning::Enabled, false)));
    assert_eq!((first.rule, first.rule_pending), (rule(1, Versioning::Enabled), true));
    let second = bucket(cluster.root(begin(Versioning::Suspended, false)));
    assert_eq!((second.rule, second.rule_pending), (rule(2, Versioning::Suspended), true));
    assert_eq!(cluster.root(end(1)), Reply::StaleRule { current: 2 });
    assert_eq!(cluster.root(end(2)), Reply::Done);
    assert_eq!(cluster.root(end(2)), Reply::Done, "repeated");
    let asked = Query::GetBucket { name: "b".to_owned() };
    let now = BucketRecord { rule_pending: false, ..second };
    assert_eq!(cluster.0.query(ShardId::ROOT, &asked).unwrap(), Answer::Bucket(now));

    let mut another = begin(Versioning::Enabled, false);
    if let Command::BeginBucketRule { bucket, .. } = &mut another {
        *bucket = BucketId(9);
    }
    assert_eq!(cluster.root(another), Reply::NoSuchBucket);
}

#[test]
fn versioning_is_never_off_again_and_a_lock_stays() {
    let mut cluster = Cluster::new();
    assert!(matches!(cluster.root(begin(Versioning::Off, true)), Reply::Refused(_)), "a lock wants versioning");
    bucket(cluster.root(begin(Versioning::Off, false)));
    bucket(cluster.root(begin(Versioning::Enabled, true)));
    for (versioning, lock) in
        [(Versioning::Off, true), (Versioning::Off, false), (Versioning::Suspended, true), (Versioning::Enabled, false)]
    {
        assert!(matches!(cluster.root(begin(versioning, lock)), Reply::Refused(_)), "{versioning:?} {lock}");
    }
    assert_eq!(bucket(cluster.root(begin(Versioning::Enabled, true))).rule.epoch, 3, "refusals take no number");
}

#[test]
fn a_write_by_another_rule_than_the_shards_changes_nothing() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.put(1), Reply::RuleBehind { known: 0 });
    assert_eq!(cluster.get(VersionPick::Current), None);
    let enabled = Command::SetBucketRule { bucket: BUCKET, rule: rule(1, Versioning::Enabled) };
    assert_eq!(cluster.send(enabled.clone()), Reply::Done);
    assert_eq!(cluster.send(enabled.clone()), Reply::Done, "repeated");
    assert_eq!(cluster.put(0), Reply::StaleRule { current: 1 });
    assert_eq!(cluster.delete(VersionPick::Current, 0), Reply::StaleRule { current: 1 });
    assert_eq!(cluster.get(VersionPick::Current), None);
    assert!(matches!(cluster.put(1), Reply::Put { .. }));

    let other = Command::SetBucketRule { bucket: BUCKET, rule: rule(1, Versioning::Suspended) };
    assert!(matches!(cluster.send(other), Reply::Refused(_)), "two rules of one epoch");
    let suspended = Command::SetBucketRule { bucket: BUCKET, rule: rule(2, Versioning::Suspended) };
    assert_eq!(cluster.send(suspended), Reply::Done);
    assert_eq!(cluster.send(enabled), Reply::StaleRule { current: 2 }, "late");
}

#[test]
fn versions_are_added_while_enabled_and_the_null_version_is_replaced_while_suspended() {
    let mut cluster = Cluster::new();
    cluster.put(0);
    cluster.send(Command::SetBucketRule { bucket: BUCKET, rule: rule(1, Versioning::Enabled) });
    cluster.put(1);
    assert_eq!(cluster.get(VersionPick::Current), Some((2, false, false)));
    assert_eq!(cluster.get(VersionPick::Null), Some((1, true, false)), "what was there before stays");

    cluster.send(Command::SetBucketRule { bucket: BUCKET, rule: rule(2, Versioning::Suspended) });
    cluster.put(2);
    assert_eq!(cluster.get(VersionPick::Current), Some((3, true, false)));
    assert_eq!(cluster.get(VersionPick::Null), Some((3, true, false)));
    assert_eq!(cluster.get(VersionPick::Seq(granary_meta::record::VersionSeq(1))), None, "replaced");

    let marker = Some(granary_meta::record::VersionSeq(4));
    assert_eq!(cluster.delete(VersionPick::Current, 2), Reply::Deleted { existed: true, marker });
    assert_eq!(cluster.get(VersionPick::Null), Some((4, true, true)), "the marker is the null version now");
    assert_eq!(cluster.delete(VersionPick::Null, 2), Reply::Deleted { existed: true, marker: None });
    assert_eq!(cluster.get(VersionPick::Current), Some((2, false, false)), "the next older one is the newest");
}

#[test]
fn a_completed_upload_is_answered_again_under_any_rule() {
    let mut cluster = Cluster::new();
    let (upload, key) = (granary_meta::record::UploadId([7; 16]), "k".to_owned());
    let record = granary_meta::record::UploadRecord {
        initiated_ms: 1,
        meta: granary_meta::record::ObjectMeta::default(),
        checksum: None,
        owner: AccountId::ROOT,
    };
    let create = |rule_epoch| Command::CreateUpload {
        bucket: BUCKET,
        key: "k".into(),
        upload,
        record: record.clone(),
        rule_epoch,
    };
    assert_eq!(cluster.send(create(3)), Reply::RuleBehind { known: 0 });
    assert_eq!(cluster.send(create(0)), Reply::Done);
    let part = granary_meta::record::PartRecord {
        number: 1,
        size_bytes: 4,
        etag: "e".into(),
        modified_ms: 1,
        checksum: None,
        data: scenery::inline(b"body"),
    };
    let put_part = |rule_epoch| Command::PutPart {
        bucket: BUCKET,
        key: key.clone(),
        upload,
        part: part.clone(),
        missing: Vec::new(),
        map_epoch: Epoch(1),
        rule_epoch,
    };
    assert_eq!(cluster.send(put_part(3)), Reply::RuleBehind { known: 0 });
    assert_eq!(cluster.send(put_part(0)), Reply::Done);
    let complete = |rule_epoch| Command::CompleteUpload {
        bucket: BUCKET,
        key: key.clone(),
        upload,
        parts: vec![(1, "e".into())],
        record: scenery::record(granary_meta::record::ObjectData::Extents(Vec::new()), 4, "done"),
        conditions: Conditions::default(),
        rule_epoch,
    };
    assert_eq!(cluster.send(complete(3)), Reply::RuleBehind { known: 0 });
    let done = cluster.send(complete(0));
    assert!(matches!(done, Reply::Put { .. }), "{done:?}");
    cluster.send(Command::SetBucketRule { bucket: BUCKET, rule: rule(1, Versioning::Enabled) });
    assert_eq!(cluster.send(complete(0)), done, "it took effect before the rule did");
}
