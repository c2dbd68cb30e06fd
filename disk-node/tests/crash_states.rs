//! Power loss at every call to the disk, in every way it may leave the disk, for every short sequence of operations.
//!
//! The model is a map. After recovery: every acknowledged chunk is there with its bytes, every acknowledged deletion
//! holds, whatever was under way is there whole or not at all, nothing else is there; and recovering again gives the
//! same state.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use bytes::Bytes;
use granary_disk_node::metrics::Metrics;
use granary_disk_node::store::core::{Core, Done, Op, Whose};
use granary_disk_node::store::index::Index;
use granary_disk_node::store::index_memory::MemoryEngine;
use granary_disk_node::store::recover::recover;
use granary_disk_node::store::shared::Shared;
use granary_disk_node::store::{StoreError, StoreSettings};
use granary_placement::id::{DiskUuid, ExtentId, HashSlot, PlacementGroupId};
use granary_placement::scheme::CodecId;
use granary_wire::chunk::{block_count, block_crc, ChunkHealth, ChunkId, ChunkSpec, BLOCK_BYTES};
use sim::{Fault, SimDevice};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const DISK: DiskUuid = DiskUuid([7; 16]);

fn settings() -> StoreSettings {
    StoreSettings {
        segment_bytes: 48 * 1024,
        min_segment_bytes: 16 * 1024,
        reserve_bytes: 0,
        flush_interval: Duration::from_secs(1 << 30),
        punch_interval: Duration::ZERO,
        ..StoreSettings::default()
    }
}

fn metrics() -> Arc<Metrics> {
    static METRICS: OnceLock<Arc<Metrics>> = OnceLock::new();
    METRICS.get_or_init(|| Arc::new(Metrics::new().unwrap())).clone()
}

fn chunk(number: u8) -> ChunkId {
    ChunkId { group: PlacementGroupId(1), extent: ExtentId([number; 16]), index: 0, generation: 1 }
}

fn spec(len_bytes: u64) -> ChunkSpec {
    let owner = HashSlot(3);
    ChunkSpec {
        codec: CodecId::Np16,
        k: 4,
        m: 2,
        unit_bytes: 65536,
        extent_len_bytes: len_bytes * 4,
        len_bytes,
        owner,
        created_ms: 5,
    }
}

/// Bytes that no other write has.
fn payload(write: u64, len_bytes: u64) -> Bytes {
    let mut state = write.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len_bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn crcs(id: &ChunkId, data: &Bytes) -> Vec<u32> {
    data.chunks(BLOCK_BYTES as usize).enumerate().map(|(block, bytes)| block_crc(id, block as u32, bytes)).collect()
}

/// One step of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// A chunk of less than a page.
    PutSmall(u8),
    /// A chunk that comes in pieces.
    PutBig(u8),
    /// Two chunks and a deletion that share a group.
    Together(u8, u8),
    /// An upload that is given up half-way while another chunk goes past it.
    Abort(u8),
    /// A long upload with others of its own and another chunk, a flush and a deletion going past it: the watermark must
    /// wait for it, and a record that lies further back in the segment is the newer one.
    Interleaved(u8),
    Delete(u8),
    Flush,
    /// A clean stop and start.
    Reopen,
}

struct World {
    core: Core,
    shared: Arc<Shared>,
}

fn open(device: &SimDevice, engine: &MemoryEngine) -> Result<World, granary_disk_node::store::OpenError> {
    let shared = Shared::new(
        Arc::new(device.clone()),
        Index::new(Box::new(engine.clone())),
        DISK,
        settings(),
        metrics(),
        Arc::new(|_| {}),
    );
    let shared = Arc::new(shared);
    let (core, _) = recover(shared.clone())?;
    Ok(World { core, shared })
}

/// What is known of a chunk: the contents it may have; None stands for absent.
type Model = BTreeMap<u8, BTreeSet<Option<Bytes>>>;

/// Carries out a sequence until the power goes. Returns what must hold afterwards.
fn run(device: &SimDevice, engine: &MemoryEngine, actions: &[Action]) -> Model {
    let mut model: Model = (0..3).map(|number| (number, BTreeSet::from([None]))).collect();
    let Ok(mut world) = open(device, engine) else { return model };
    for (step, action) in actions.iter().enumerate() {
        let write = step as u64 * 10;
        let mut under_way: Vec<(u8, Option<Bytes>)> = Vec::new();
        let mut group = Vec::new();
        let put = |number: u8, data: &Bytes| Op::Put {
            id: chunk(number),
            spec: spec(data.len() as u64),
            whose: Whose::Client,
            payload: vec![data.clone()],
            crcs: crcs(&chunk(number), data),
        };
        match action {
            Action::PutSmall(number) => {
                let data = payload(write, 700);
                group.push(put(*number, &data));
                under_way.push((*number, Some(data)));
            }
            Action::PutBig(number) => {
                let data = payload(write, 9000);
                let ticket = match world.core.reserve(chunk(*number), spec(9000), Whose::Client) {
                    Ok(ticket) => ticket,
                    Err(StoreError::DiskFull) => continue,
                    Err(_) => return model,
                };
                for (piece, at) in [(data.slice(..4096), 0), (data.slice(4096..), 4096)] {
                    if world.core.write_piece(ticket, at, &[piece]).is_err() {
                        return model;
                    }
                }
                group.push(Op::Commit { ticket, crcs: crcs(&chunk(*number), &data) });
                under_way.push((*number, Some(data)));
            }
            Action::Together(one, two) => {
                let (first, second) = (payload(write, 500), payload(write + 1, 600));
                group.push(put(*one, &first));
                group.push(put(*two, &second));
                group.push(Op::Delete { ids: vec![chunk(*one)] });
                under_way.extend([(*one, Some(first)), (*two, Some(second)), (*one, None)]);
            }
            Action::Abort(number) => {
                let ticket = match world.core.reserve(chunk(*number), spec(5000), Whose::Client) {
                    Ok(ticket) => ticket,
                    Err(StoreError::DiskFull) => continue,
                    Err(_) => return model,
                };
                if world.core.write_piece(ticket, 0, &[payload(write, 3000)]).is_err() {
                    return model;
                }
                // Something is committed behind it while it is open, so that the watermark cannot pass.
                let data = payload(write + 1, 300);
                under_way.push((2, Some(data.clone())));
                let acknowledged = carry_out(&mut world, vec![put(2, &data)], &mut model, &under_way);
                world.core.abort(ticket);
                if !acknowledged {
                    return model;
                }
                under_way.clear();
            }
            Action::Interleaved(number) => {
                let ticket = match world.core.reserve(chunk(*number), spec(9000), Whose::Client) {
                    Ok(ticket) => ticket,
                    Err(StoreError::DiskFull) => continue,
                    Err(_) => return model,
                };
                let (long, short, other) = (payload(write, 9000), payload(write + 1, 400), payload(write + 2, 450));
                let steps = [
                    (vec![put(*number, &short), put(2, &other)], vec![(*number, Some(short)), (2, Some(other))]),
                    (vec![Op::Delete { ids: vec![chunk(2)] }], vec![(2, None)]),
                ];
                for (group, under_way) in steps {
                    if !carry_out(&mut world, group, &mut model, &under_way) {
                        return model;
                    }
                }
                if world.core.flush().is_err()
                    || world.core.write_piece(ticket, 0, std::slice::from_ref(&long)).is_err()
                {
                    return model;
                }
                group.push(Op::Commit { ticket, crcs: crcs(&chunk(*number), &long) });
                under_way.push((*number, Some(long)));
            }
            Action::Delete(number) => {
                group.push(Op::Delete { ids: vec![chunk(*number)] });
                under_way.push((*number, None));
            }
            Action::Flush => {
                if world.core.flush().is_err() {
                    return model;
                }
            }
            Action::Reopen => {
                if world.core.flush().is_err() {
                    return model;
                }
                match open(device, engine) {
                    Ok(again) => world = again,
                    Err(_) => return model,
                }
            }
        }
        if !carry_out(&mut world, group, &mut model, &under_way) || world.core.housekeep(Instant::now()).is_err() {
            return model;
        }
    }
    model
}

/// Commits a group and notes in the model what was acknowledged and what is open. False when the power went.
fn carry_out(world: &mut World, group: Vec<Op>, model: &mut Model, under_way: &[(u8, Option<Bytes>)]) -> bool {
    for (number, contents) in under_way {
        model.get_mut(number).unwrap().insert(contents.clone());
    }
    let (mut alive, mut full) = (true, Vec::new());
    let mut acknowledged = vec![false; group.len()];
    world.core.commit(group, &mut |place, outcome| match outcome {
        Ok(Done::Stored | Done::Deleted(_)) => acknowledged[place] = true,
        Err(StoreError::Failed(_)) => alive = false,
        Err(StoreError::DiskFull) => full.push(place),
        Err(other) => panic!("unexpected {other}"),
    });
    for place in full {
        // Refused: it must never be seen.
        let (number, contents) = &under_way[place];
        model.get_mut(number).unwrap().remove(contents);
    }
    for (place, (number, contents)) in under_way.iter().enumerate() {
        if acknowledged.get(place).copied().unwrap_or(false) {
            // From now on this, or what comes later in the group and may have happened.
            let later = under_way
                .iter()
                .skip(place + 1)
                .filter(|(other, _)| other == number)
                .map(|(_, contents)| contents.clone());
            model.insert(*number, std::iter::once(contents.clone()).chain(later).collect());
        }
    }
    alive
}

/// What the store holds: bytes by chunk, every block verified.
fn contents(world: &World) -> BTreeMap<ChunkId, Bytes> {
    let mut all = BTreeMap::new();
    for (id, at) in world.shared.index.chunks(None, 1000).unwrap() {
        let blocks = world.shared.read_blocks(&id, 0, block_count(at.spec.len_bytes) as u32);
        let blocks = blocks.unwrap_or_else(|error| panic!("chunk {id} in the index: {error}"));
        all.insert(id, blocks.data.concat().into());
    }
    all
}

fn check(model: &Model, found: &BTreeMap<ChunkId, Bytes>, tell: &dyn Fn() -> String) {
    for (number, allowed) in model {
        let there = found.get(&chunk(*number)).cloned();
        assert!(
            allowed.contains(&there),
            "chunk {number}: found {:?} bytes, {} possibilities; {}",
            there.map(|b| b.len()),
            allowed.len(),
            tell()
        );
    }
    assert!(
        found.keys().all(|id| model.keys().any(|number| chunk(*number) == *id)),
        "a chunk nobody wrote; {}",
        tell()
    );
}

/// The counts the index keeps must be those of its entries.
fn check_counts(world: &World, tell: &dyn Fn() -> String) {
    let chunks = world.shared.index.chunks(None, 1000).unwrap();
    let disk = world.shared.index.disk().unwrap().unwrap();
    assert_eq!(disk.chunks, chunks.len() as u64, "{}", tell());
    assert_eq!(disk.chunk_bytes, chunks.iter().map(|(_, at)| at.spec.len_bytes).sum::<u64>(), "{}", tell());
    for (number, info) in world.shared.index.segments().unwrap() {
        let live = chunks.iter().filter(|(_, at)| at.segment == number).count() as u64;
        assert_eq!(info.live_records, live, "segment {number}; {}", tell());
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Ways of a power loss looked at one by one when there are at most so many, else as many drawn at random.
struct Effort {
    ways: u64,
    /// Size of the disk, in bytes.
    capacity: u64,
}

/// A disk that the sequences do not fill.
const ROOMY: u64 = 1 << 20;

/// Checks ways the power may go right now. Returns how many states were looked at.
fn check_crashes(
    device: &SimDevice,
    engine: &MemoryEngine,
    model: &Model,
    effort: &Effort,
    random: &mut Random,
    tell: &dyn Fn() -> String,
) -> u64 {
    let ways = device.crash_states();
    let mut states = 0;
    for survive in 0..=engine.unflushed() {
        let rounds = ways.min(effort.ways);
        for round in 0..rounds {
            let mut way = round;
            let mut pick = |possibilities: u64| {
                if ways <= effort.ways {
                    let picked = way % possibilities;
                    way /= possibilities;
                    picked
                } else if round == 0 {
                    0
                } else if round == 1 {
                    // All of the newest, whole.
                    if possibilities == 2 {
                        1
                    } else {
                        possibilities - 2
                    }
                } else {
                    random.below(possibilities)
                }
            };
            let (device, engine) = (device.after_crash(&mut pick), engine.after_crash(survive));
            let world = open(&device, &engine).unwrap_or_else(|error| panic!("no recovery: {error}; {}", tell()));
            let found = contents(&world);
            check(model, &found, tell);
            check_counts(&world, tell);
            drop(world);
            let again = open(&device, &engine).unwrap();
            assert_eq!(contents(&again), found, "a second recovery differs; {}", tell());
            states += 1;
        }
    }
    states
}

/// Cuts the power at every call of the sequence.
fn explore(actions: &[Action], effort: &Effort, random: &mut Random) -> u64 {
    let whole = SimDevice::new(effort.capacity);
    run(&whole, &MemoryEngine::default(), actions);
    let calls = whole.calls();
    let mut states = 0;
    for cut in 0..=calls {
        let (device, engine) = (SimDevice::new(effort.capacity), MemoryEngine::default());
        device.arm(cut, Fault::PowerLoss);
        let model = run(&device, &engine, actions);
        let tell =
            || format!("{actions:?}, power lost at call {cut} of {calls} ({:?})", whole.kinds().get(cut as usize));
        states += check_crashes(&device, &engine, &model, effort, random, &tell);
    }
    states
}

const ALPHABET: [Action; 11] = [
    Action::PutSmall(0),
    Action::PutSmall(1),
    Action::PutBig(0),
    Action::PutBig(1),
    Action::Together(0, 1),
    Action::Abort(1),
    Action::Interleaved(0),
    Action::Delete(0),
    Action::Delete(1),
    Action::Flush,
    Action::Reopen,
];

fn sequences(length: u32) -> Vec<Vec<Action>> {
    let letters = ALPHABET.len();
    (0..letters.pow(length))
        .map(|code| (0..length).map(|place| ALPHABET[code / letters.pow(place) % letters]).collect())
        .collect()
}

fn explore_all(sequences: &[Vec<Action>], effort: Effort, seed: u64) -> u64 {
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let effort = &effort;
                scope.spawn(move || {
                    let mut random = Random(seed + worker as u64);
                    sequences
                        .iter()
                        .skip(worker)
                        .step_by(threads)
                        .map(|actions| explore(actions, effort, &mut random))
                        .sum::<u64>()
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    })
}

#[test]
fn every_crash_state_of_every_short_sequence_keeps_every_promise() {
    let begun = Instant::now();
    let mut total = 0;
    for (length, ways) in [(1, 65536), (2, 512), (3, 24), (4, 2)] {
        let sequences = sequences(length);
        let states = explore_all(&sequences, Effort { ways, capacity: ROOMY }, 1);
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
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_122);
    println!("seed {seed} (set SEED to replay)");
    let mut random = Random(seed);
    let sequences: Vec<Vec<Action>> = (0..60)
        .map(|_| (0..4 + random.below(12)).map(|_| ALPHABET[random.below(ALPHABET.len() as u64) as usize]).collect())
        .collect();
    println!("{} crash states", explore_all(&sequences, Effort { ways: 6, capacity: ROOMY }, seed));
}

/// The power goes again while the store recovers from the first loss.
#[test]
fn a_crash_at_each_step_of_recovery_loses_nothing() {
    let mut random = Random(3);
    let mut states = 0;
    let picked: Vec<Vec<Action>> =
        sequences(3).into_iter().filter(|actions| actions.contains(&Action::Delete(0))).collect();
    for actions in picked.iter().cycle().take(4 * picked.len()) {
        let (device, engine) = (SimDevice::new(1 << 20), MemoryEngine::default());
        let calls = {
            let whole = SimDevice::new(1 << 20);
            run(&whole, &MemoryEngine::default(), actions);
            whole.calls()
        };
        device.arm(random.below(calls + 1), Fault::PowerLoss);
        let model = run(&device, &engine, actions);
        let survive = random.below(engine.unflushed() as u64 + 1) as usize;
        let frozen = device.after_crash(&mut |ways| random.below(ways));
        let index = engine.after_crash(survive);
        for cut in 0.. {
            // The same crashed disk each time; recovery is cut one call later.
            let (device, engine) = (frozen.after_crash(&mut |_| 0), index.after_crash(0));
            device.arm(cut, Fault::PowerLoss);
            let finished = open(&device, &engine).is_ok();
            let tell = || format!("{actions:?}, recovery cut at call {cut}");
            states += check_crashes(&device, &engine, &model, &Effort { ways: 8, capacity: ROOMY }, &mut random, &tell);
            if finished {
                break;
            }
        }
    }
    println!("{states} crash states");
    assert!(states > 1000);
}

/// With the index gone every acknowledged chunk comes back; chunks whose holes were not certain may come back too, but
/// only with bytes they had.
#[test]
fn a_lost_index_is_rebuilt_from_the_segments() {
    let mut random = Random(4);
    let mut states = 0;
    for actions in sequences(3) {
        let (device, engine) = (SimDevice::new(1 << 20), MemoryEngine::default());
        let model = run(&device, &engine, &actions);
        let device = device.after_crash(&mut |ways| random.below(ways));
        let world = open(&device, &MemoryEngine::default()).unwrap();
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

/// After any sequence, once nothing is alive, nothing of it is left on the disk but the segment being filled.
#[test]
fn space_of_deleted_and_aborted_chunks_comes_back() {
    for actions in sequences(3) {
        let (device, engine) = (SimDevice::new(1 << 20), MemoryEngine::default());
        run(&device, &engine, &actions);
        let mut world = open(&device, &engine).unwrap();
        world
            .core
            .commit(vec![Op::Delete { ids: (0..3).map(chunk).collect() }], &mut |_, outcome| assert!(outcome.is_ok()));
        while world.core.housekeep(Instant::now()).unwrap() {}
        world.core.housekeep(Instant::now()).unwrap();
        assert_eq!(device.used(), 0, "{actions:?}");
        assert!(world.shared.index.holes().unwrap().is_empty(), "{actions:?}");
        assert_eq!(world.shared.verify(&chunk(0)), Ok(ChunkHealth::Missing));
    }
}

/// A call fails instead of the power: whatever the store still answers must hold, and after an error that is not "no
/// room" it answers nothing.
#[test]
fn a_failed_call_is_never_answered_for() {
    let mut random = Random(5);
    for fault in [Fault::Io, Fault::Full] {
        let (mut states, mut ended) = (0, 0);
        for actions in sequences(3) {
            let whole = SimDevice::new(1 << 20);
            run(&whole, &MemoryEngine::default(), &actions);
            for (cut, kind) in whole.kinds().into_iter().enumerate() {
                let (device, engine) = (SimDevice::new(1 << 20), MemoryEngine::default());
                device.arm(cut as u64, fault);
                let model = run(&device, &engine, &actions);
                ended += u64::from(device.calls() == cut as u64 + 1);
                if fault == Fault::Io || !matches!(kind, "create" | "fallocate" | "pwrite") {
                    assert_eq!(device.calls(), cut as u64 + 1, "went on after a failed {kind} in {actions:?}");
                }
                let tell = || format!("{actions:?}, {fault:?} at call {cut} ({kind})");
                states +=
                    check_crashes(&device, &engine, &model, &Effort { ways: 4, capacity: ROOMY }, &mut random, &tell);
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
        let (device, engine) = (SimDevice::new(1 << 20), MemoryEngine::default());
        let model = run(&device, &engine, &actions);
        // As many batches of the index as may be are lost, so that recovery has much to read.
        let (frozen, index) = (device.after_crash(&mut |ways| random.below(ways)), engine.after_crash(0));
        for (failing, count) in (0..).flat_map(|failing| [(failing, 1), (failing, u64::MAX)]) {
            let (device, engine) = (frozen.after_crash(&mut |_| 0), index.after_crash(0));
            device.fail_reads(failing, count);
            let (first, reached) = (open(&device, &engine).is_ok(), device.reads() > failing);
            // From here on all can be read.
            device.fail_reads(0, 0);
            refused += u64::from(!first);
            tried += 1;
            let tell = || format!("{actions:?}, {count} reads failed after {failing}");
            // Housekeeping comes in between, which removes segments with nothing alive in them.
            if let Ok(mut world) = open(&device, &engine) {
                world.core.housekeep(Instant::now()).unwrap();
            }
            let world = open(&device, &engine).unwrap_or_else(|error| panic!("{}: {error}", tell()));
            check(&model, &contents(&world), &tell);
            check_counts(&world, &tell);
            // Nothing of it is lost to a later rebuild either.
            let rebuilt = open(&device, &MemoryEngine::default()).unwrap();
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

/// The file of a segment is gone: its chunks are not there any more, and everything else is.
#[test]
fn chunks_of_a_missing_segment_leave_the_index() {
    let mut lost = 0;
    for actions in sequences(3) {
        let (device, engine) = (SimDevice::new(1 << 20), MemoryEngine::default());
        let model = run(&device, &engine, &actions);
        let before = contents(&open(&device, &engine).unwrap());
        let Some(segment) = device.segments().first().copied() else { continue };
        device.lose(segment);
        let world = open(&device, &engine).unwrap();
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

/// Room for two segments or three: records are refused, holes are punched to make room in the middle of a group, and
/// the power goes.
#[test]
fn power_loss_on_a_full_disk_keeps_every_promise() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(6);
    println!("seed {seed} (set SEED to replay)");
    let mut random = Random(seed);
    let sequences: Vec<Vec<Action>> = (0..300)
        .map(|_| (0..4 + random.below(8)).map(|_| ALPHABET[random.below(ALPHABET.len() as u64) as usize]).collect())
        .collect();
    for capacity in [40 * 1024, 64 * 1024, 100 * 1024] {
        println!("{capacity} bytes: {} crash states", explore_all(&sequences, Effort { ways: 3, capacity }, seed));
    }
}
