//! The repair queue of slots, and background work whose lease was taken over.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use granary_meta::leases::MAX_STAMPED_TASKS;
use granary_meta::memory::MemoryShard;
use granary_meta::record::RepairSlotRecord;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::{ExtentId, PlacementGroupId, ShardId};
use granary_placement::lease::LeaseStamp;
use scenery::{request, Random};

const GROUP: PlacementGroupId = PlacementGroupId(300);

struct Shard {
    shard: MemoryShard,
    random: Random,
    now_ms: u64,
}

impl Shard {
    fn new() -> Shard {
        Shard { shard: MemoryShard::new(ShardId(1)), random: Random(1), now_ms: 100 }
    }

    fn send(&mut self, command: Command) -> Reply {
        self.now_ms += 1;
        let sent = request(&mut self.random, self.now_ms, command);
        self.shard.apply(&sent).unwrap()
    }

    fn queue(&self) -> Vec<(PlacementGroupId, u8, RepairSlotRecord)> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let Answer::RepairSlots { slots, more } =
                self.shard.answer(&Query::ListRepairSlots { after, limit: 2 }).unwrap()
            else {
                panic!()
            };
            after = slots.last().map(|(group, slot, _)| (*group, *slot));
            all.extend(slots);
            if !more {
                return all;
            }
        }
    }
}

fn stamp(epoch: u64) -> LeaseStamp {
    LeaseStamp { task: "heal.1".to_owned(), epoch }
}

fn queue(slots: &[u8], epoch: u64) -> Command {
    Command::QueueRepair { slots: slots.iter().map(|slot| (GROUP, *slot)).collect(), keep: false, lease: stamp(epoch) }
}

fn advance(slot: u8, generation: u64, cursor: u8) -> Command {
    Command::AdvanceRepair { group: GROUP, slot, generation, cursor: ExtentId([cursor; 16]), lease: stamp(1) }
}

fn done(slot: u8, generation: u64) -> Command {
    Command::RepairSlotDone { group: GROUP, slot, generation, lease: stamp(1) }
}

#[test]
fn a_slot_that_is_queued_again_begins_anew_and_old_word_of_it_is_ignored() {
    let mut shard = Shard::new();
    shard.send(queue(&[2, 0, 1], 1));
    let first = RepairSlotRecord { queued_ms: 101, generation: 1, cursor: None };
    assert_eq!(shard.queue(), [(GROUP, 0, first), (GROUP, 1, first), (GROUP, 2, first)]);

    shard.send(advance(1, 1, 7));
    shard.send(advance(1, 1, 5));
    shard.send(advance(2, 9, 7));
    let advanced = RepairSlotRecord { cursor: Some(ExtentId([7; 16])), ..first };
    assert_eq!(shard.queue(), [(GROUP, 0, first), (GROUP, 1, advanced), (GROUP, 2, first)], "a late one goes not back");

    shard.send(queue(&[1], 1));
    let again = RepairSlotRecord { queued_ms: 101, generation: 5, cursor: None };
    assert_eq!(shard.queue()[1], (GROUP, 1, again));
    shard.send(advance(1, 1, 9));
    shard.send(done(1, 1));
    assert_eq!(shard.queue()[1], (GROUP, 1, again), "word of the repair before");
    shard.send(done(1, 5));
    assert_eq!(shard.queue().len(), 2);

    // Gone and back: the number is a new one, so that late word of the repair that ended does not end this one.
    shard.send(queue(&[1], 1));
    shard.send(done(1, 5));
    assert_eq!(shard.queue()[1], (GROUP, 1, RepairSlotRecord { queued_ms: 109, generation: 9, cursor: None }));
    assert!(matches!(shard.send(queue(&[0; 4_097], 1)), Reply::Refused(_)));

    // Kept: what is queued goes on where it stopped, what is not is queued.
    shard.send(advance(1, 9, 3));
    let before = shard.queue();
    let keep = Command::QueueRepair { slots: vec![(GROUP, 1), (GROUP, 8)], keep: true, lease: stamp(1) };
    assert_eq!(shard.send(keep), Reply::Done);
    assert_eq!(shard.queue()[..before.len()], before);
    assert_eq!((shard.queue().len(), shard.queue()[before.len()].1), (before.len() + 1, 8));
}

#[test]
fn background_work_under_a_lease_that_was_taken_over_does_nothing() {
    let mut shard = Shard::new();
    assert_eq!(shard.send(queue(&[0], 3)), Reply::Done);
    let before = shard.queue();
    let stale = Reply::StaleLease { current: 3 };
    let late = [
        queue(&[1], 2),
        advance(0, 1, 7),
        done(0, 1),
        Command::RepairDone { chunks: Vec::new(), lease: stamp(2) },
        Command::GarbageDone { extents: Vec::new(), lease: stamp(0) },
    ];
    for command in late {
        assert_eq!(shard.send(command.clone()), stale, "{command:?}");
    }
    assert_eq!(shard.queue(), before);
    assert_eq!(shard.send(Command::RepairDone { chunks: Vec::new(), lease: stamp(4) }), Reply::Done);
    assert_eq!(shard.send(queue(&[1], 3)), Reply::StaleLease { current: 4 }, "any command brings the news");
    let other = LeaseStamp { task: "heal.2".to_owned(), epoch: 1 };
    assert_eq!(shard.send(Command::RepairDone { chunks: Vec::new(), lease: other }), Reply::Done, "tasks are apart");
}

#[test]
fn stamps_have_names_and_are_bounded() {
    let mut shard = Shard::new();
    let with = |task: &str| {
        let lease = LeaseStamp { task: task.to_owned(), epoch: 1 };
        Command::RepairDone { chunks: Vec::new(), lease }
    };
    for task in ["", "a\0b", &"t".repeat(65)] {
        assert!(matches!(shard.send(with(task)), Reply::Refused(_)), "{task:?}");
    }
    for number in 0..MAX_STAMPED_TASKS {
        assert_eq!(shard.send(with(&format!("t{number}"))), Reply::Done);
    }
    assert!(matches!(shard.send(with("more")), Reply::Refused(_)));
    assert_eq!(shard.send(with("t0")), Reply::Done);
}

#[test]
fn word_of_a_repair_that_began_before_a_report_leaves_the_chunk_queued() {
    let mut shard = Shard::new();
    let (extent, key) = (scenery::extent(&mut Random(3), 4), "k".to_owned());
    let record = scenery::record(granary_meta::record::ObjectData::Extents(vec![extent.clone()]), 4, "");
    let put = Command::PutObject {
        bucket: granary_meta::record::BucketId(1),
        key,
        record,
        missing: Vec::new(),
        map_epoch: granary_placement::id::Epoch(0),
        conditions: granary_meta::Conditions::default(),
        rule_epoch: 0,
    };
    assert!(matches!(shard.send(put), Reply::Put { .. }));
    let chunk = granary_meta::ChunkRef { group: extent.group, extent: extent.extent, index: 1 };
    let listed = |shard: &Shard| match shard.shard.answer(&Query::ListMissing { after: None, limit: 9 }).unwrap() {
        Answer::Missing { chunks, .. } => chunks.iter().map(|(chunk, there, _)| (*chunk, *there)).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let done = |generation| Command::RepairDone { chunks: vec![(chunk, generation)], lease: stamp(1) };
    shard.send(Command::ReportMissing { chunks: vec![chunk] });
    let first = listed(&shard)[0].1;
    // The repair has written the chunk; it goes bad again, and a reader says so before the healer is done.
    shard.send(Command::ReportMissing { chunks: vec![chunk] });
    let second = listed(&shard)[0].1;
    assert!(second.generation > first.generation && second.queued_ms == first.queued_ms);
    shard.send(done(first.generation));
    assert_eq!(listed(&shard), [(chunk, second)]);
    shard.send(done(second.generation));
    assert!(listed(&shard).is_empty());
    shard.send(Command::ReportMissing { chunks: vec![chunk] });
    shard.send(done(second.generation));
    assert_eq!(listed(&shard).len(), 1, "a number is never used twice");
}
