//! Sequences of operations, and the ways in which the power may go during them.

use super::check::{check, check_counts, contents, Model};
use super::scene::{Action, Scale, Scene};
use super::{Fault, Random};

/// How much is tried.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Ways of a power loss looked at one by one when there are at most so many, else as many drawn at random.
    pub ways: u64,
    /// Calls of a sequence at which the power goes; drawn when it has more.
    pub cuts: u64,
    pub scale: Scale,
}

/// Decides what becomes of each thing that a power loss leaves open.
struct Draw<'a> {
    round: u64,
    /// Every way is looked at: the round is the number of one.
    all: Option<u64>,
    /// Pages seen so far, and how many there are.
    page: u64,
    pages: u64,
    random: &'a mut Random,
}

/// In so many pages a draw of its own for each leaves hardly ever a state that is nearly whole.
const MANY_PAGES: u64 = 16;

impl Draw<'_> {
    fn pick(&mut self, possibilities: u64) -> u64 {
        if let Some(way) = &mut self.all {
            let picked = *way % possibilities;
            *way /= possibilities;
            return picked;
        }
        // The newest, whole. Two possibilities has what is no page.
        let newest = if possibilities == 2 { 1 } else { possibilities - 2 };
        if possibilities != 2 {
            self.page += 1;
        }
        match self.round {
            0 => 0,
            1 => newest,
            _ if self.pages <= MANY_PAGES || possibilities == 2 => self.random.below(possibilities),
            // All is whole but one page: the first ones are those of a header, more often than not.
            2 | 3 if self.page + 1 == self.round => 0,
            4 if self.random.below(self.pages) == 0 => self.random.below(possibilities),
            2..=4 => newest,
            round => match self.random.below(1 << (round % 4 + 1)) {
                0 => self.random.below(possibilities),
                _ => newest,
            },
        }
    }
}

/// Checks ways the power may go right now. Returns how many states were looked at.
pub fn check_crashes(
    scene: &Scene,
    model: &Model,
    effort: &Effort,
    random: &mut Random,
    tell: &dyn Fn() -> String,
) -> u64 {
    let (ways, pages) = (scene.device.crash_states(), scene.device.open_pages());
    let mut states = 0;
    for survive in 0..=scene.engine.unflushed() {
        for round in 0..ways.min(effort.ways) {
            let all = (ways <= effort.ways).then_some(round);
            let mut draw = Draw { round, all, page: 0, pages, random };
            let after = scene.after_crash(&mut |possibilities| draw.pick(possibilities), survive);
            let world = after.open().unwrap_or_else(|error| panic!("no recovery: {error}; {}", tell()));
            let found = contents(&world);
            check(model, &found, tell);
            check_counts(&world, tell);
            drop(world);
            let again = after.open().unwrap();
            assert_eq!(contents(&again), found, "a second recovery differs; {}", tell());
            states += 1;
        }
    }
    states
}

/// Cuts the power at calls of the sequence.
fn explore(actions: &[Action], effort: &Effort, random: &mut Random) -> u64 {
    let whole = Scene::new(effort.scale);
    whole.run(actions);
    let calls = whole.device.calls();
    let kinds = whole.device.kinds();
    drop(whole);
    let cuts: Vec<u64> = if calls < effort.cuts {
        (0..=calls).collect()
    } else {
        (0..effort.cuts).map(|_| random.below(calls + 1)).collect()
    };
    let mut states = 0;
    for cut in cuts {
        let scene = Scene::new(effort.scale);
        scene.device.arm(cut, Fault::PowerLoss);
        let model = scene.run(actions);
        let tell = || format!("{actions:?}, power lost at call {cut} of {calls} ({:?})", kinds.get(cut as usize));
        states += check_crashes(&scene, &model, effort, random, &tell);
    }
    states
}

pub const ALPHABET: [Action; 11] = [
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

/// All sequences of the alphabet that are so long.
pub fn sequences(length: u32) -> Vec<Vec<Action>> {
    let letters = ALPHABET.len();
    (0..letters.pow(length))
        .map(|code| (0..length).map(|place| ALPHABET[code / letters.pow(place) % letters]).collect())
        .collect()
}

/// So many sequences, drawn, of `least` operations or up to `more` more.
pub fn drawn(count: u64, least: u64, more: u64, alphabet: &[Action], random: &mut Random) -> Vec<Vec<Action>> {
    let letter = |random: &mut Random| alphabet[random.below(alphabet.len() as u64) as usize];
    (0..count).map(|_| (0..least + random.below(more + 1)).map(|_| letter(random)).collect()).collect()
}

/// The seed of a random test, printed: from GRANARY_SEED, to replay one, or of the clock.
pub fn seed(test: &str) -> u64 {
    let seed = std::env::var("GRANARY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        since.as_secs() << 8 | u64::from(since.subsec_millis() % 256)
    });
    println!("{test}: GRANARY_SEED={seed}");
    seed
}

/// Explores the sequences on all processors. Returns how many states were looked at.
pub fn explore_all(sequences: &[Vec<Action>], effort: Effort, seed: u64) -> u64 {
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let effort = &effort;
                scope.spawn(move || {
                    let mut random = Random(seed.wrapping_add(worker as u64));
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
