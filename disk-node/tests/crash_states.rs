//! Power loss at every call to the disk, in every way it may leave the disk, for every short sequence of operations;
//! in drawn ways for longer sequences, long chunks, full disks, and processes that died before.
//!
//! The model is a map. After recovery: every acknowledged chunk is there with its bytes, every acknowledged deletion
//! holds, whatever was under way is there whole or not at all, nothing else is there; and recovering again gives the
//! same state.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use granary_disk_node::store::format::{header_region_bytes, PAGE_BYTES};
use granary_wire::chunk::block_count;
use sim::explore::{check_crashes, drawn, explore_all, seed, sequences, Effort, ALPHABET};
use sim::scene::{Action, Scale, Scene, BLOCKS, PAGES, TWO_PAGE_HEADERS};
use sim::{FailedSync, Fault, Random};
use std::time::Instant;

#[test]
fn every_crash_state_of_every_short_sequence_keeps_every_promise() {
    let begun = Instant::now();
    let mut total = 0;
    for (length, ways) in [(1, 65536), (2, 512), (3, 24), (4, 2)] {
        let sequences = sequences(length);
        let states = explore_all(&sequences, Effort { ways, cuts: u64::MAX, scale: PAGES }, 1);
        println!(
            "{} sequences of {length}: {states} crash states, {:.1} s",
            sequences.len(),
            begun.elapsed().as_secs_f64()
        );
        total += states;
    }
    println!("{total} crash states");
    assert!(total > 500_000);
}

#[test]
fn longer_sequences_keep_every_promise() {
    let seed = seed("longer_sequences_keep_every_promise");
    let sequences = drawn(60, 4, 11, &ALPHABET, &mut Random(seed));
    let effort = Effort { ways: 6, cuts: u64::MAX, scale: PAGES };
    println!("{} crash states", explore_all(&sequences, effort, seed));
}

/// The power goes again while the store recovers from the first loss.
#[test]
fn a_crash_at_each_step_of_recovery_loses_nothing() {
    let mut random = Random(3);
    let mut states = 0;
    let picked: Vec<Vec<Action>> =
        sequences(3).into_iter().filter(|actions| actions.contains(&Action::Delete(0))).collect();
    for actions in picked.iter().cycle().take(4 * picked.len()) {
        let whole = Scene::new(PAGES);
        whole.run(actions);
        let scene = Scene::new(PAGES);
        scene.device.arm(random.below(whole.device.calls() + 1), Fault::PowerLoss);
        let model = scene.run(actions);
        let survive = random.below(scene.engine.unflushed() as u64 + 1) as usize;
        let frozen = scene.after_crash(&mut |ways| random.below(ways), survive);
        for cut in 0.. {
            // The same crashed disk each time; recovery is cut one call later.
            let scene = frozen.after_crash(&mut |_| 0, 0);
            scene.device.arm(cut, Fault::PowerLoss);
            let finished = scene.open().is_ok();
            let tell = || format!("{actions:?}, recovery cut at call {cut}");
            let effort = Effort { ways: 8, cuts: u64::MAX, scale: PAGES };
            states += check_crashes(&scene, &model, &effort, &mut random, &tell);
            if finished {
                break;
            }
        }
    }
    println!("{states} crash states");
    assert!(states > 1000);
}

/// Room for two segments or three: records are refused, holes are punched to make room in the middle of a group, and
/// the power goes.
#[test]
fn power_loss_on_a_full_disk_keeps_every_promise() {
    let seed = seed("power_loss_on_a_full_disk_keeps_every_promise");
    let sequences = drawn(300, 4, 7, &ALPHABET, &mut Random(seed));
    for capacity in [40 * 1024, 64 * 1024, 100 * 1024] {
        let effort = Effort { ways: 3, cuts: u64::MAX, scale: Scale { capacity, ..PAGES } };
        println!("{capacity} bytes: {} crash states", explore_all(&sequences, effort, seed));
    }
}

/// What a process does besides when it dies and another one starts on the same page cache.
const DEATHS: [Action; 6] = [
    Action::Kill { keeps: false },
    Action::Kill { keeps: true },
    Action::FailSync(FailedSync::Nothing),
    Action::FailSync(FailedSync::AllBut(0)),
    Action::FailSync(FailedSync::AllBut(1)),
    Action::FailSync(FailedSync::Drawn(1)),
];

/// The page cache outlives a process: it has pages that nobody synced, and pages that a failed sync left there as
/// though they were on the disk. A process that starts on it takes in what is on the disk and nothing else: whatever it
/// finds is there after the next power loss too.
#[test]
fn what_a_process_finds_after_one_that_died_stays() {
    let seed = seed("what_a_process_finds_after_one_that_died_stays");
    let mut random = Random(seed);
    let mut sequences = drawn(2000, 1, 3, &ALPHABET, &mut random);
    for (number, actions) in sequences.iter_mut().enumerate() {
        // One at least, and before the end.
        let place = random.below(actions.len() as u64) as usize;
        actions.insert(place, DEATHS[number % DEATHS.len()]);
        if random.below(3) == 0 {
            actions.insert(place, DEATHS[random.below(DEATHS.len() as u64) as usize]);
        }
    }
    let effort = Effort { ways: 8, cuts: u64::MAX, scale: PAGES };
    println!("{} crash states", explore_all(&sequences, effort, seed));
}

#[test]
fn chunks_of_many_blocks_keep_every_promise() {
    let seed = seed("chunks_of_many_blocks_keep_every_promise");
    assert!(block_count(BLOCKS.long_bytes()) > 4);
    let alphabet: Vec<Action> = ALPHABET.into_iter().chain(DEATHS).collect();
    let mut long = sequences(1);
    long.extend(drawn(240, 2, 3, &alphabet, &mut Random(seed)));
    let effort = Effort { ways: 12, cuts: 24, scale: BLOCKS };
    println!("{} crash states", explore_all(&long, effort, seed));
}

#[test]
fn chunks_whose_header_has_two_pages_keep_every_promise() {
    let seed = seed("chunks_whose_header_has_two_pages_keep_every_promise");
    assert_eq!(header_region_bytes(TWO_PAGE_HEADERS.long_bytes()), 2 * PAGE_BYTES);
    let last_sync_fails = |reached| [Action::PutSmall(1), Action::FailSync(reached), Action::PutBig(0)].to_vec();
    let mut sequences = vec![
        vec![Action::PutSmall(0), Action::PutBig(0)],
        vec![Action::PutBig(0), Action::PutBig(0), Action::Delete(0)],
        vec![Action::Interleaved(0), Action::Reopen],
        last_sync_fails(FailedSync::Nothing),
        last_sync_fails(FailedSync::AllBut(0)),
        last_sync_fails(FailedSync::AllBut(1)),
    ];
    let alphabet: Vec<Action> = ALPHABET.into_iter().chain(DEATHS).collect();
    sequences.extend(drawn(4, 2, 1, &alphabet, &mut Random(seed)));
    let effort = Effort { ways: 6, cuts: 12, scale: TWO_PAGE_HEADERS };
    println!("{} crash states", explore_all(&sequences, effort, seed));
}
