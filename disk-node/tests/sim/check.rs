//! The model of what must hold, and what the store is found to hold.

use super::scene::{chunk, World};
use bytes::Bytes;
use granary_wire::chunk::{block_count, ChunkId};
use std::collections::{BTreeMap, BTreeSet};

/// What is known of a chunk: the contents it may have; None stands for absent.
pub type Model = BTreeMap<u8, BTreeSet<Option<Bytes>>>;

/// What the store holds: bytes by chunk, every block verified, and read from the middle as well.
pub fn contents(world: &World) -> BTreeMap<ChunkId, Bytes> {
    let mut all = BTreeMap::new();
    for (id, at) in world.shared.index.chunks(None, 1000).unwrap() {
        let count = block_count(at.spec.len_bytes) as u32;
        let read = |first, blocks| {
            let blocks = world.shared.read_blocks(&id, first, blocks);
            blocks.unwrap_or_else(|error| panic!("chunk {id} in the index: {error}")).data
        };
        let last = if count > 1 { read(count - 1, 1) } else { Vec::new() };
        let whole = read(0, count);
        assert!(last.iter().all(|block| Some(block) == whole.last()), "the last block of {id}");
        let bytes = if whole.len() == 1 { whole[0].clone() } else { whole.concat().into() };
        all.insert(id, bytes);
    }
    all
}

pub fn check(model: &Model, found: &BTreeMap<ChunkId, Bytes>, tell: &dyn Fn() -> String) {
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
pub fn check_counts(world: &World, tell: &dyn Fn() -> String) {
    let chunks = world.shared.index.chunks(None, 1000).unwrap();
    let disk = world.shared.index.disk().unwrap().unwrap();
    assert_eq!(disk.chunks, chunks.len() as u64, "{}", tell());
    assert_eq!(disk.chunk_bytes, chunks.iter().map(|(_, at)| at.spec.len_bytes).sum::<u64>(), "{}", tell());
    for (number, info) in world.shared.index.segments().unwrap() {
        let live = chunks.iter().filter(|(_, at)| at.segment == number).count() as u64;
        assert_eq!(info.live_records, live, "segment {number}; {}", tell());
    }
}
