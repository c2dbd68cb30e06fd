//! Random commands applied to a shard and to a model that is a few maps: every answer must agree.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod commands;
mod fixed;
mod model;
mod run;
#[path = "../scenery/mod.rs"]
mod scenery;

use granary_placement::id::ShardId;
use run::run;
use scenery::seed;

const SHARD: ShardId = ShardId(3);
const KEYS: [&str; 12] =
    ["a", "a/b", "a/b/c", "a/c", "a.x", "skel.other/x", "skel/x", "skel/y/z", "skel", "z", "\u{e9}/x", "a/b/"];

#[test]
fn random_commands_agree_with_the_model() {
    let seed = seed("random_commands_agree_with_the_model");
    for round in 0..40 {
        run(seed.wrapping_add(round), 400);
    }
}

#[test]
fn fixed_seed_agrees_with_the_model_and_reaches_every_corner() {
    let run = run(7, 3_000);
    assert!(run.model.next_seq > 500 && !run.model.garbage.is_empty() && !run.model.completed.is_empty());
    assert!(run.model.versions.values().any(|versions| versions.len() > 3), "no key with many versions was made");
    assert!(run.model.versions.values().any(|versions| versions.last().is_some_and(|version| version.marker)));
    for kind in ["stale rule", "rule behind", "stale lease", "stale map", "expired"] {
        assert!(run.model.refusals.get(kind).is_some_and(|times| *times > 20), "{kind}: {:?}", run.model.refusals);
    }
    assert!(run.model.slots.values().any(|slot| slot.cursor.is_some()), "no repair of a slot was under way");
}
