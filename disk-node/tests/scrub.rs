//! The scrub over the simulated disk: whatever is wrong is found by one pass, what is good is never taken for damaged,
//! and a process that starts goes on where the one before was.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use granary_disk_node::store::core::{Op, Whose};
use granary_disk_node::store::format::{header_region_bytes, PAGE_BYTES};
use granary_disk_node::store::index::{Batch, Finding, Pass, Place, ScrubState};
use granary_disk_node::store::scrub::budget::{Pace, ScrubSettings};
use granary_disk_node::store::scrub::{Scrub, Step};
use granary_wire::chunk::{block_count, ChunkHealth, ChunkId, BLOCK_BYTES};
use sim::explore::seed;
use sim::scene::{chunk, crcs, payload, spec, Action, Scale, Scene, World, BLOCKS, PAGES, TWO_PAGE_HEADERS};
use sim::Random;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(1000);

/// The next step but for looks at the index.
fn read_step(scrub: &mut Scrub, now_ms: u64) -> Step {
    loop {
        match scrub.step(now_ms).unwrap() {
            Step::Looked { .. } => {}
            step => return step,
        }
    }
}

/// Steps until the pass is over; how many of them read, and how many bytes.
fn pass(scrub: &mut Scrub, now_ms: u64) -> (u64, u64) {
    let (mut reads, mut bytes) = (0, 0);
    let before = scrub.state().last.map_or(0, |last| last.number);
    while scrub.state().last.map_or(0, |last| last.number) == before {
        if let Step::Read { bytes: read } = scrub.step(now_ms).unwrap() {
            (reads, bytes) = (reads + 1, bytes + read);
        }
    }
    (reads, bytes)
}

fn scrubbed(world: &World) -> (Pass, u64, u64) {
    let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
    let (reads, bytes) = pass(&mut scrub, 1);
    (scrub.state().last.unwrap(), reads, bytes)
}

fn listed(world: &World) -> Vec<ChunkId> {
    let (chunks, more) = world.shared.damaged_chunks(None, 1000).unwrap();
    assert!(!more);
    assert_eq!(world.shared.findings_count(), chunks.len() as u64);
    chunks.into_iter().map(|chunk| chunk.id).collect()
}

fn place(world: &World, number: u8) -> Place {
    let at = world.shared.index.chunk(&chunk(number)).unwrap().unwrap();
    Place { segment: at.segment, offset: at.offset }
}

/// Three chunks, all of them durable.
fn three(scale: Scale) -> Scene {
    let scene = Scene::new(scale);
    scene.run(&[Action::PutSmall(1), Action::PutBig(0), Action::PutSmall(2), Action::Reopen]);
    scene
}

/// Where the bytes of a record lie that have a meaning: its header and its payload, by chunk.
fn bytes_of(world: &World, number: u8) -> (Place, u64, u64, u64) {
    let at = world.shared.index.chunk(&chunk(number)).unwrap().unwrap();
    let header = 108 + 4 * block_count(at.spec.len_bytes) + 4;
    (place(world, number), header, header_region_bytes(at.spec.len_bytes), at.spec.len_bytes)
}

#[test]
fn every_flipped_byte_of_a_header_or_a_payload_is_found_by_one_pass() {
    let seed = seed("every_flipped_byte_of_a_header_or_a_payload_is_found_by_one_pass");
    let mut random = Random(seed);
    let mut flipped = 0;
    // All of them where chunks are short; every header, and some of each block, where they are not.
    for (scale, number, step) in [(PAGES, 1, 1), (PAGES, 0, 7), (BLOCKS, 0, 1003), (TWO_PAGE_HEADERS, 0, 3_000_017)] {
        let frozen = three(scale);
        let (at, header, region, len) = bytes_of(&frozen.open().unwrap(), number);
        let in_header = (0..header).step_by(if scale.long > 100 { 97 } else { 1 });
        let in_payload = (0..len).step_by(step).map(|place| region + place);
        let last_of_blocks = (1..block_count(len)).step_by(100).map(|block| region + block * BLOCK_BYTES - 1);
        for place in in_header.chain(in_payload).chain(last_of_blocks).chain([region + len - 1]) {
            let scene = frozen.after_crash(&mut |_| 0, 0);
            let bit = 1 << random.below(8);
            scene.device.corrupt(at.segment, at.offset + place, |byte| byte ^ bit);
            let world = scene.open().unwrap();
            let (pass, ..) = scrubbed(&world);
            let tell = || format!("byte {place} of a record of {region} + {len}, bit {bit}");
            assert_eq!(listed(&world), [chunk(number)], "{}", tell());
            assert_eq!((pass.chunks, pass.findings), (3, 1), "{}", tell());
            assert!(world.shared.index.chunk(&chunk(number)).unwrap().is_some(), "never absent: {}", tell());
            flipped += 1;
        }
    }
    println!("{flipped} bytes flipped");
    assert!(flipped > 2000);
}

#[test]
fn records_that_are_cut_off_unreadable_or_without_their_file_are_damaged_and_not_absent() {
    for scale in [PAGES, BLOCKS] {
        let frozen = three(scale);
        let (at, _, region, len) = bytes_of(&frozen.open().unwrap(), 2);
        let is_last = (0..3).all(|number| place(&frozen.open().unwrap(), number) <= at);
        assert!(is_last, "all that is cut off is this chunk's");
        // A file that ends in each page of the record, at its beginning or just before the payload's end.
        let cuts = (0..region + len).step_by(PAGE_BYTES as usize).chain([1, region - 1, region + len - 1]);
        for cut in cuts {
            let scene = frozen.after_crash(&mut |_| 0, 0);
            let world = scene.open().unwrap();
            scene.device.truncate(at.segment, at.offset + cut);
            assert_eq!(scrubbed(&world).0.findings, 1, "cut off after {cut}");
            assert_eq!(listed(&world), [chunk(2)], "cut off after {cut}");
        }
        for page in 0..(region + len).div_ceil(PAGE_BYTES) {
            let scene = frozen.after_crash(&mut |_| 0, 0);
            scene.device.make_unreadable(at.segment, at.offset / PAGE_BYTES + page);
            let world = scene.open().unwrap();
            assert_eq!(scrubbed(&world).0.findings, 1, "page {page} is unreadable");
            assert_eq!(listed(&world), [chunk(2)], "page {page} is unreadable");
            assert!(world.shared.index.chunk(&chunk(2)).unwrap().is_some());
        }
        let scene = frozen.after_crash(&mut |_| 0, 0);
        let world = scene.open().unwrap();
        let there = (0..3).filter(|number| place(&world, *number).segment == at.segment);
        let there: Vec<ChunkId> = there.map(chunk).collect();
        scene.device.lose(at.segment);
        scrubbed(&world);
        assert_eq!(listed(&world), there, "the file is gone");
    }
}

#[test]
fn a_read_that_fails_once_damages_nothing_and_one_that_fails_twice_is_a_finding_until_a_good_read() {
    for scale in [PAGES, BLOCKS] {
        let frozen = three(scale);
        let (_, reads, bytes) = scrubbed(&frozen.after_crash(&mut |_| 0, 0).open().unwrap());
        for failing in 0..reads {
            let scene = frozen.after_crash(&mut |_| 0, 0);
            let world = scene.open().unwrap();
            scene.device.fail_reads(failing, 1);
            let (pass, again, all) = scrubbed(&world);
            assert_eq!((pass.chunks, pass.findings, again), (3, 0, reads + 1), "read {failing}");
            assert!(all > bytes && pass.bytes == bytes, "what was read twice is not counted twice: read {failing}");
            assert_eq!(listed(&world), [], "read {failing}");

            let scene = frozen.after_crash(&mut |_| 0, 0);
            let world = scene.open().unwrap();
            scene.device.fail_reads(failing, 2);
            assert_eq!(scrubbed(&world).0.findings, 1, "read {failing}");
            let [id] = listed(&world)[..] else { panic!("one chunk") };
            // As the healer does before it rebuilds a chunk.
            assert_eq!(world.shared.verify(&id), Ok(ChunkHealth::Good));
            assert_eq!(listed(&world), [], "it turned out to be good");
        }
        // Or the next pass reads it.
        let world = frozen.open().unwrap();
        frozen.device.fail_reads(0, 2);
        let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
        pass(&mut scrub, 1);
        assert_eq!(listed(&world).len(), 1);
        pass(&mut scrub, 1 + INTERVAL.as_millis() as u64);
        assert_eq!(listed(&world), []);
    }
}

fn put(number: u8, write: u64, len_bytes: u64) -> Op {
    let data = payload(write, len_bytes);
    let crcs = crcs(&chunk(number), &data);
    Op::Put { id: chunk(number), spec: spec(len_bytes), whose: Whose::Client, payload: vec![data], crcs }
}

fn carry_out(world: &mut World, ops: Vec<Op>) {
    world.core.commit(ops, &mut |_, outcome| assert!(outcome.is_ok()));
}

#[test]
fn a_finding_leaves_the_list_when_its_chunk_is_replaced_or_deleted_and_stays_over_a_restart_until_then() {
    let scene = three(PAGES);
    for number in [0, 1, 2] {
        let at = place(&scene.open().unwrap(), number);
        scene.device.corrupt(at.segment, at.offset + PAGE_BYTES, |byte| !byte);
    }
    let world = scene.open().unwrap();
    scrubbed(&world);
    assert_eq!(listed(&world), [chunk(0), chunk(1), chunk(2)]);
    let (page, more) = world.shared.damaged_chunks(Some(chunk(0)), 1).unwrap();
    assert_eq!((page.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), more), (vec![chunk(1)], true));

    let mut world = scene.after_crash(&mut |_| 0, 0).open().unwrap();
    Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
    assert_eq!(listed(&world), [chunk(0), chunk(1), chunk(2)], "after a power loss");
    carry_out(&mut world, vec![put(1, 77, 700)]);
    assert_eq!(listed(&world), [chunk(0), chunk(2)]);
    carry_out(&mut world, vec![Op::Delete { ids: vec![chunk(0)] }]);
    assert_eq!(listed(&world), [chunk(2)]);
    // One that is written again under its id is another record.
    carry_out(&mut world, vec![Op::Delete { ids: vec![chunk(2)] }, put(2, 78, 700), put(0, 79, 700)]);
    assert_eq!(listed(&world), []);
    assert_eq!(world.shared.index.findings(None, 10).unwrap(), []);
}

#[test]
fn a_header_that_a_reader_keeps_does_not_make_a_chunk_good_whose_header_rots() {
    let scene = three(PAGES);
    let world = scene.open().unwrap();
    world.shared.read_blocks(&chunk(1), 0, 1).unwrap();
    let at = place(&world, 1);
    scene.device.corrupt(at.segment, at.offset + 50, |byte| !byte);
    scrubbed(&world);
    assert_eq!(world.shared.verify(&chunk(1)), Ok(ChunkHealth::Corrupt));
    assert_eq!(listed(&world), [chunk(1)]);
}

/// A disk with several segments whose chunks are not in the order of their ids.
fn many() -> Scene {
    let scene = Scene::new(PAGES);
    let mut world = scene.open().unwrap();
    for number in 0..40u64 {
        carry_out(&mut world, vec![put((number * 23 % 40) as u8, number, 2000)]);
        world.core.housekeep(std::time::Instant::now()).unwrap();
    }
    world.core.flush().unwrap();
    scene.open().unwrap();
    scene
}

#[test]
fn a_pass_goes_over_the_disk_in_order_and_a_process_that_starts_goes_on_where_the_one_before_saved_it() {
    let frozen = many();
    let (all, reads, _) = scrubbed(&frozen.after_crash(&mut |_| 0, 0).open().unwrap());
    assert_eq!((all.chunks, all.findings, reads), (40, 0, 40));
    for stop in 0..reads {
        for saved in [false, true] {
            let scene = frozen.after_crash(&mut |_| 0, 0);
            let world = scene.open().unwrap();
            let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
            let mut before = Place::default();
            for step in 0..stop {
                assert!(matches!(read_step(&mut scrub, 5), Step::Read { .. }));
                assert!(scrub.state().cursor > before);
                before = scrub.state().cursor;
                if saved && step == stop / 2 {
                    scrub.save(5).unwrap();
                }
            }
            // A chunk that is read next rots.
            let unread = world.shared.index.chunks(None, 100).unwrap();
            let next = unread.iter().find(|(_, at)| Place { segment: at.segment, offset: at.offset } > before).unwrap();
            scene.device.corrupt(next.1.segment, next.1.offset + 40, |byte| !byte);
            drop((scrub, world));

            let world = scene.after_crash(&mut |_| 0, 0).open().unwrap();
            let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 6).unwrap();
            let expected = if saved && stop > 0 { stop / 2 + 1 } else { 0 };
            assert_eq!(scrub.state().current.map_or(0, |pass| pass.chunks), expected, "stopped after {stop}");
            let (rest, _) = pass(&mut scrub, 6);
            let last = scrub.state().last.unwrap();
            // The damaged one was read twice.
            assert_eq!((rest, last.chunks, last.findings), (40 - expected + 1, 40, 1), "stopped after {stop}");
            assert_eq!(last.number, 1);
            assert_eq!(listed(&world), [next.0]);
        }
    }
}

#[test]
fn a_cursor_that_cannot_be_read_has_the_pass_start_over() {
    let scene = many();
    let world = scene.open().unwrap();
    let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
    (0..20).for_each(|_| assert!(matches!(read_step(&mut scrub, 2), Step::Read { .. })));
    scrub.save(2).unwrap();
    let kept = scrub.state().encode();
    assert_eq!(ScrubState::decode(&kept), Some(*scrub.state()));
    for place in 0..kept.len() {
        let mut damaged = kept.clone();
        damaged[place] ^= 4;
        for value in [&damaged, &kept[..place].to_vec()] {
            assert_eq!(ScrubState::decode(value), None);
        }
        if place % 10 != 0 {
            continue;
        }
        world.shared.index.write(Batch { changes: vec![(b"x".to_vec(), Some(damaged))] }).unwrap();
        let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
        assert_eq!(*scrub.state(), ScrubState::default());
        assert_eq!(pass(&mut scrub, 3).0, 40);
    }
}

#[test]
fn passes_begin_an_interval_apart_and_leave_what_is_written_meanwhile_to_the_next() {
    let scene = many();
    let mut world = scene.open().unwrap();
    let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
    let begun = 1_000_000;
    (0..20).for_each(|_| assert!(matches!(read_step(&mut scrub, begun), Step::Read { .. })));
    carry_out(&mut world, vec![put(200, 1, 2000), put(201, 2, 2000)]);
    // Also when a process that starts goes through the index anew.
    scrub.save(begun).unwrap();
    let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
    assert_eq!(pass(&mut scrub, begun + 600_000).0, 20);
    assert_eq!(scrub.step(begun + 600_000).unwrap(), Step::Rest(Duration::from_secs(400)));
    assert_eq!(scrub.step(begun + 999_999).unwrap(), Step::Rest(Duration::from_millis(1)));
    assert_eq!(pass(&mut scrub, begun + 1_000_000).0, 42);
    // A process that starts keeps to that, and a clock that was put back puts nothing off.
    let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
    assert!(matches!(scrub.step(begun + 1_000_001).unwrap(), Step::Rest(_)));
    assert_eq!(pass(&mut scrub, begun - 1).0, 42);
    assert_eq!(scrub.state().last.unwrap().number, 3);
}

/// By a clock that moves only when the scrub waits.
#[test]
fn no_more_is_read_than_the_budget_allows_whatever_the_reads_take() {
    let seed = seed("no_more_is_read_than_the_budget_allows_whatever_the_reads_take");
    let mut random = Random(seed);
    let scene = three(TWO_PAGE_HEADERS);
    let world = scene.open().unwrap();
    let settings =
        |floor, ceiling| ScrubSettings { interval: INTERVAL, floor_bytes_per_s: floor, ceiling_bytes_per_s: ceiling };
    // (floor, ceiling, seconds that the pass takes: 65.3 MB are on the disk)
    for (settings, shortest_s, longest_s) in [
        (settings(1 << 20, 64 << 20), 62, 63),
        (settings(64 << 10, 64 << 20), 750, 1000),
        (settings(16 << 10, 16 << 10), 3980, 4000),
    ] {
        let mut scrub = Scrub::open(world.shared.clone(), INTERVAL, 1).unwrap();
        let (mut pace, start) = (Pace::default(), 10_000_000 * scrub.state().last.map_or(1, |last| last.number + 1));
        let (mut now, mut read, mut spent) = (Duration::from_millis(start), Vec::new(), Duration::ZERO);
        loop {
            let now_ms = now.as_millis() as u64;
            match scrub.step(now_ms).unwrap() {
                Step::Rest(_) => break,
                Step::Read { bytes } | Step::Looked { bytes } => {
                    let took = Duration::from_millis(random.below(8));
                    (now, spent) = (now + took, spent + took);
                    let (left, age) = scrub.left(now.as_millis() as u64);
                    let rate = settings.bytes_per_s(left, age);
                    read.push((now, bytes, rate));
                    now += pace.after(bytes, rate, now);
                }
            }
        }
        // From any read to any later one: no more than the highest rate, and one read.
        let most = read.iter().map(|(_, _, rate)| *rate).max().unwrap();
        assert!(most <= settings.ceiling_bytes_per_s);
        for (number, (from, _, _)) in read.iter().enumerate() {
            let mut bytes = 0;
            for (until, more, _) in &read[number + 1..] {
                bytes += more;
                let allowed = (*until - *from).as_secs_f64() * most as f64 + 1_100_000.0 + f64::from(8 << 10);
                assert!(bytes as f64 <= allowed, "{bytes} bytes in {:?} at {most} per second", *until - *from);
            }
        }
        let took = now - Duration::from_millis(start);
        let range = Duration::from_secs(shortest_s)..Duration::from_secs(longest_s) + spent;
        assert!(range.contains(&took), "{took:?}, {spent:?} of it reading, {range:?}");
    }
}

#[test]
fn what_is_kept_of_a_scrub_is_the_golden_bytes() {
    let pass = |number: u64, ended_ms| Pass {
        number,
        started_ms: 0x0001_9000_0000_0000 + number,
        ended_ms,
        until_sequence: 0x0102_0304,
        bytes: 0x0000_1122_3344_5566,
        chunks: 0x0077_8899,
        findings: 3,
    };
    let current = ScrubState {
        current: Some(pass(8, 0)),
        last: Some(pass(7, 0x0001_9000_0000_ffff)),
        cursor: Place { segment: 0x0a0b_0c0d, offset: 0x2000 },
    };
    let finding = Finding { sequence: 77, found_ms: 0x0001_9000_0000_0000 };
    let fixture = include_str!("fixtures/scrub-v1.txt");
    let lines: Vec<&str> = fixture.lines().filter(|line| !line.starts_with('#')).collect();
    let states = [current, ScrubState { current: None, ..current }];
    let written = [hex::encode(states[0].encode()), hex::encode(states[1].encode()), hex::encode(finding.encode())];
    assert_eq!(lines, written);
    for (line, state) in lines.iter().zip(states) {
        assert_eq!(ScrubState::decode(&hex::decode(line).unwrap()), Some(state));
    }
    assert_eq!(Finding::decode(&hex::decode(lines[2]).unwrap()), Some(finding));
}
