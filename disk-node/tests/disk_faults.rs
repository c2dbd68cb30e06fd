//! Calls to the disk that fail, files that vanish, bytes that rot, an index that is lost: what was acknowledged is kept
//! as long as the disk has it, and nothing wrong is ever served.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use granary_disk_node::store::core::Op;
use granary_disk_node::store::format::{header_region_bytes, PAGE_BYTES};
use granary_disk_node::store::StoreError;
use granary_wire::chunk::{block_count, ChunkHealth, BLOCK_BYTES};
use sim::check::{check, check_counts, contents};
use sim::engine::{Calls, Failure};
use sim::explore::{check_crashes, sequences, Effort};
use sim::scene::{chunk, Action, Scene, PAGES, TWO_PAGE_HEADERS};
use sim::{Fault, Random};
use std::time::Instant;

/// A call fails instead of the power: whatever the store still answers must hold, and after an error that is not "no
/// room" it answers nothing.
#[test]
fn a_failed_call_is_never_answered_for() {
    let mut random = Random(5);
    for fault in [Fault::Io, Fault::Full] {
        let (mut states, mut ended) = (0, 0);
        for actions in sequences(3) {
            let whole = Scene::new(PAGES);
            whole.run(&actions);
            for (cut, kind) in whole.device.kinds().into_iter().enumerate() {
                let scene = Scene::new(PAGES);
                scene.device.arm(cut as u64, fault);
                let model = scene.run(&actions);
                let calls = scene.device.calls();
                ended += u64::from(calls == cut as u64 + 1);
                if fault == Fault::Io || !matches!(kind, "create" | "fallocate" | "pwrite") {
                    assert_eq!(calls, cut as u64 + 1, "went on after a failed {kind} in {actions:?}");
                }
                let tell = || format!("{actions:?}, {fault:?} at call {cut} ({kind})");
                let effort = Effort { ways: 4, cuts: u64::MAX, scale: PAGES };
                states += check_crashes(&scene, &model, &effort, &mut random, &tell);
            }
        }
        println!("{fault:?}: {states} crash states, the store ended {ended} times");
    }
}

/// One read fails while the store recovers, or all from one on, and not the next time: nothing that may have been
/// acknowledged is removed or punched for it, and nothing wrong is indexed.
#[test]
fn a_read_that_fails_during_recovery_loses_nothing() {
    let mut random = Random(7);
    let (mut refused, mut tried) = (0, 0);
    for actions in sequences(3) {
        let scene = Scene::new(PAGES);
        let model = scene.run(&actions);
        // As many batches of the index as may be are lost, so that recovery has much to read.
        let frozen = scene.after_crash(&mut |ways| random.below(ways), 0);
        for (failing, count) in (0..).flat_map(|failing| [(failing, 1), (failing, u64::MAX)]) {
            let scene = frozen.after_crash(&mut |_| 0, 0);
            scene.device.fail_reads(failing, count);
            let (first, reached) = (scene.open().is_ok(), scene.device.reads() > failing);
            // From here on all can be read.
            scene.device.fail_reads(0, 0);
            refused += u64::from(!first);
            tried += 1;
            let tell = || format!("{actions:?}, {count} reads failed after {failing}");
            // Housekeeping comes in between, which removes segments with nothing alive in them.
            if let Ok(mut world) = scene.open() {
                world.core.housekeep(Instant::now()).unwrap();
            }
            let world = scene.open().unwrap_or_else(|error| panic!("{}: {error}", tell()));
            check(&model, &contents(&world), &tell);
            check_counts(&world, &tell);
            // Nothing of it is lost to a later rebuild either.
            let rebuilt = scene.without_index().open().unwrap();
            let found = contents(&rebuilt);
            for (number, allowed) in model.iter().filter(|(_, allowed)| !allowed.contains(&None)) {
                assert!(allowed.contains(&found.get(&chunk(*number)).cloned()), "chunk {number}: {}", tell());
            }
            if !reached {
                break;
            }
        }
    }
    println!("{tried} recoveries, {refused} refused to start");
    assert!(refused > 0 && tried > 1000);
}

/// With the index gone every acknowledged chunk comes back; chunks whose holes were not certain may come back too, but
/// only with bytes they had.
#[test]
fn a_lost_index_is_rebuilt_from_the_segments() {
    let mut random = Random(4);
    let mut states = 0;
    for actions in sequences(3) {
        let scene = Scene::new(PAGES);
        let model = scene.run(&actions);
        let world = scene.after_crash(&mut |ways| random.below(ways), 0).without_index().open().unwrap();
        let found = contents(&world);
        for (number, allowed) in &model {
            let there = found.get(&chunk(*number));
            if !allowed.contains(&None) {
                assert!(allowed.contains(&there.cloned()), "chunk {number} after {actions:?}");
            }
        }
        check_counts(&world, &|| format!("{actions:?}"));
        states += 1;
    }
    println!("{states} rebuilt");
}

/// The file of a segment is gone: its chunks are not there any more, and everything else is.
#[test]
fn chunks_of_a_missing_segment_leave_the_index() {
    let mut lost = 0;
    for actions in sequences(3) {
        let scene = Scene::new(PAGES);
        let model = scene.run(&actions);
        let before = contents(&scene.open().unwrap());
        let Some(segment) = scene.device.segments().first().copied() else { continue };
        scene.device.lose(segment);
        let world = scene.open().unwrap();
        let tell = || format!("{actions:?}");
        let found = contents(&world);
        assert!(found.iter().all(|(id, data)| before.get(id) == Some(data)), "{}", tell());
        check_counts(&world, &tell);
        for number in model.keys() {
            let health = world.shared.verify(&chunk(*number)).unwrap();
            assert_eq!(health == ChunkHealth::Good, found.contains_key(&chunk(*number)), "{}", tell());
            lost += u64::from(before.contains_key(&chunk(*number)) && health == ChunkHealth::Missing);
        }
    }
    assert!(lost > 0);
}

/// After any sequence, once nothing is alive, nothing of it is left on the disk but the segment being filled.
#[test]
fn space_of_deleted_and_aborted_chunks_comes_back() {
    for actions in sequences(3) {
        let scene = Scene::new(PAGES);
        scene.run(&actions);
        let mut world = scene.open().unwrap();
        world
            .core
            .commit(vec![Op::Delete { ids: (0..3).map(chunk).collect() }], &mut |_, outcome| assert!(outcome.is_ok()));
        while world.core.housekeep(Instant::now()).unwrap() {}
        world.core.housekeep(Instant::now()).unwrap();
        assert_eq!(scene.device.used(), 0, "{actions:?}");
        assert!(world.shared.index.holes().unwrap().is_empty(), "{actions:?}");
        assert_eq!(world.shared.verify(&chunk(0)), Ok(ChunkHealth::Missing));
    }
}

/// Behind the store's back, in a chunk of many blocks whose header has two pages: in each of its parts a flipped bit,
/// or a page that the disk does not give. Blocks that are not hit are served as before.
#[test]
fn no_block_is_served_that_is_not_what_was_written() {
    let scene = Scene::new(TWO_PAGE_HEADERS);
    let model = scene.run(&[Action::PutSmall(1), Action::PutBig(0), Action::Reopen]);
    let data = model[&0].first().unwrap().clone().unwrap();
    let at = scene.open().unwrap().shared.index.chunk(&chunk(0)).unwrap().unwrap();
    let (region, count) = (header_region_bytes(at.spec.len_bytes), block_count(at.spec.len_bytes) as u32);
    assert_eq!(region, 2 * PAGE_BYTES);
    let block_at = |block: u32| region + u64::from(block) * BLOCK_BYTES;
    // In the header's first page, in the checksums of its second one, in its own checksum, and in the blocks.
    let in_header = [20, 4000, PAGE_BYTES, 108 + 4 * u64::from(count) + 3];
    let in_blocks = [
        block_at(0),
        block_at(1) - 1,
        block_at(1),
        block_at(500) + 7,
        block_at(count - 1),
        region + at.spec.len_bytes - 1,
    ];
    for place in in_header.into_iter().chain(in_blocks) {
        for unreadable in [false, true] {
            let scene = scene.after_crash(&mut |_| 0, 0);
            let offset = at.offset + place;
            if unreadable {
                scene.device.make_unreadable(at.segment, offset / PAGE_BYTES);
            } else {
                scene.device.corrupt(at.segment, offset, |byte| byte ^ 16);
            }
            let hit = place.checked_sub(region).map(|within| (within / BLOCK_BYTES) as u32);
            let shared = scene.open().unwrap().shared;
            for block in [0, 1, 2, 499, 500, 501, count - 2, count - 1] {
                let read = shared.read_blocks(&chunk(0), block, 1).map(|blocks| blocks.data.concat());
                let written = data.slice(block as usize * BLOCK_BYTES as usize..);
                let written = written.slice(..written.len().min(BLOCK_BYTES as usize));
                match hit {
                    Some(hit) if hit != block => {
                        assert!(read.as_deref() == Ok(&written), "block {block}, hit at {place}")
                    }
                    _ if unreadable => {
                        assert!(matches!(read, Err(StoreError::Unreadable(_))), "block {block}, hit at {place}")
                    }
                    _ => assert_eq!(read, Err(StoreError::Corrupt { block }), "hit at {place}"),
                }
            }
            assert_eq!(shared.verify(&chunk(0)), Ok(ChunkHealth::Corrupt), "hit at {place}");
            assert_eq!(shared.verify(&chunk(1)), Ok(ChunkHealth::Good));
        }
    }
}

/// Each read, batch and flush of the index fails once, at the start or later, with or without having been carried out:
/// the store says so, once, and does nothing any more. With an index that works, all that was acknowledged is there.
#[test]
fn an_error_of_the_index_ends_the_store_and_loses_nothing() {
    let mut random = Random(11);
    let (mut tried, mut states) = (0, 0);
    for mut actions in sequences(2) {
        actions.extend([Action::Read(0), Action::Read(1), Action::Reopen, Action::PutSmall(2), Action::Delete(2)]);
        for (calls, failure) in [
            (Calls::Reads, Failure::Io),
            (Calls::Reads, Failure::Damaged),
            (Calls::Writes, Failure::Io),
            (Calls::Writes, Failure::IoAfterwards),
            (Calls::Writes, Failure::Damaged),
        ] {
            for number in 0.. {
                let scene = Scene::new(PAGES);
                scene.faults.arm(calls, number, failure);
                let model = scene.run(&actions);
                if !scene.faults.has_failed() {
                    break;
                }
                tried += 1;
                let tell = || format!("{actions:?}, {failure:?} at {calls:?} {number}");
                let told = scene.told.lock().unwrap().clone();
                let said = if failure == Failure::Damaged { "index is damaged: " } else { "index: input/output error" };
                assert!(told.len() == 1 && told[0].starts_with(said), "{told:?}; {}", tell());
                assert_eq!(scene.faults.writes_after(), 0, "the index was written to after an error; {}", tell());
                assert_eq!(scene.faults.marked_damaged(), failure == Failure::Damaged, "{}", tell());
                let effort = Effort { ways: 2, cuts: u64::MAX, scale: PAGES };
                states += check_crashes(&scene, &model, &effort, &mut random, &tell);
                let found = contents(&scene.started_again().open().unwrap());
                check(&model, &found, &tell);
                // What a start does with an index that was marked.
                let rebuilt = contents(&scene.without_index().open().unwrap());
                for (number, allowed) in model.iter().filter(|(_, allowed)| !allowed.contains(&None)) {
                    assert!(allowed.contains(&rebuilt.get(&chunk(*number)).cloned()), "chunk {number}: {}", tell());
                }
            }
        }
    }
    println!("{tried} errors, {states} crash states");
    assert!(tried > 5000);
}
