//! Snapshot files: a whole shard, checksummed, on its way from a leader to a replica that lacks what the log no longer
//! has.
//!
//! ```text
//! header    "GRNSNAP1" (8) | shard (2, BE) | length of applied (4, BE) | applied: postcard AppliedState | CRC-32 of all before (4, BE)
//! block*    length of body (4, BE) | CRC-32 of shard, block number and body (4, BE) | body: postcard [(key without shard, value)]
//! end       0 (4) | CRC-32 of shard, block number and body (4, BE) | number of entries (8, BE)
//! ```
//! Both ends hold one block in memory. The file is installed in an order that a crash cannot turn into half a shard:
//! see [`install`].

use crate::message::AppliedState;
use crate::room::Space;
use crate::store::{StateDb, StateView};
use granary_meta::keys::{kind, Keys};
use granary_meta::kv::{Kv, StateError, Writes};
use granary_placement::id::ShardId;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Longest piece of a file in one message, in bytes.
pub const PIECE_BYTES: usize = 512 * 1024;
/// A block is closed when its entries are this long, in bytes.
const BLOCK_BYTES: usize = 256 * 1024;
/// Longest block a reader takes, in bytes: one entry may be as long as a record of 82,000 extents.
const MAX_BLOCK_BYTES: usize = 64 * 1024 * 1024;
const MAGIC: &[u8; 8] = b"GRNSNAP1";
/// Shard number of marker keys; no shard has it.
const MARKER_PREFIX: [u8; 2] = [0xff, 0xff];

/// What goes wrong with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file cannot be read or written.
    #[error("snapshot file: {0}")]
    File(#[from] std::io::Error),
    /// The file is not whole.
    #[error("snapshot file: {0}")]
    Damaged(String),
    /// The state database failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The disk has too little room for it.
    #[error("there is no room for a snapshot on this disk")]
    NoRoom,
}

fn damaged(why: impl Into<String>) -> SnapshotError {
    SnapshotError::Damaged(why.into())
}

type Block = Vec<(Vec<u8>, Vec<u8>)>;

fn block_crc(shard: ShardId, number: u32, body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&shard.0.to_be_bytes());
    crc.update(&number.to_be_bytes());
    crc.update(body);
    crc.finalize()
}

fn length(bytes: &[u8]) -> Result<[u8; 4], SnapshotError> {
    u32::try_from(bytes.len()).map(u32::to_be_bytes).map_err(|_| damaged("a block of 4 GiB"))
}

fn encoding(error: postcard::Error) -> SnapshotError {
    damaged(error.to_string())
}

/// How far a shard is applied in that view.
///
/// # Errors
/// [`StateError`].
pub fn applied_state<K: Kv + ?Sized>(kv: &K, shard: ShardId) -> Result<AppliedState, StateError> {
    match kv.get(&Keys::new(shard).single(kind::APPLIED))? {
        Some(bytes) => granary_meta::codec::decode(&bytes),
        None => Ok(AppliedState::default()),
    }
}

/// Writes one moment of a shard to a new file at `path` and says how far that is applied. Blocks.
///
/// # Errors
/// [`SnapshotError`]; the file is of no use then.
pub fn write_file(state: &StateDb, shard: ShardId, path: &Path, space: &Space) -> Result<AppliedState, SnapshotError> {
    let view = state.view();
    let applied = applied_state(&view, shard)?;
    let mut out = BufWriter::new(File::create(path)?);
    let applied_bytes = postcard::to_stdvec(&applied).map_err(encoding)?;
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&shard.0.to_be_bytes());
    header.extend_from_slice(&length(&applied_bytes)?);
    header.extend_from_slice(&applied_bytes);
    out.write_all(&header)?;
    out.write_all(&crc32fast::hash(&header).to_be_bytes())?;

    let (mut number, mut entries) = (0u32, 0u64);
    let mut block = Block::new();
    let mut block_bytes = 0;
    let range = Keys::new(shard).shard_range();
    let mut cursor = view.cursor(&range.to);
    cursor.seek(&range.from)?;
    while let Some((key, value)) = cursor.entry() {
        block_bytes += key.len() + value.len();
        block.push((key.get(2..).unwrap_or_default().to_vec(), value.to_vec()));
        entries += 1;
        if block_bytes >= BLOCK_BYTES {
            if !space.has_room_for(block_bytes as u64) {
                return Err(SnapshotError::NoRoom);
            }
            write_block(&mut out, shard, number, &block)?;
            number += 1;
            block.clear();
            block_bytes = 0;
        }
        cursor.next()?;
    }
    if !block.is_empty() {
        write_block(&mut out, shard, number, &block)?;
        number += 1;
    }
    out.write_all(&0u32.to_be_bytes())?;
    out.write_all(&block_crc(shard, number, &entries.to_be_bytes()).to_be_bytes())?;
    out.write_all(&entries.to_be_bytes())?;
    out.flush()?;
    Ok(applied)
}

fn write_block(out: &mut impl Write, shard: ShardId, number: u32, block: &Block) -> Result<(), SnapshotError> {
    let body = postcard::to_stdvec(block).map_err(encoding)?;
    out.write_all(&length(&body)?)?;
    out.write_all(&block_crc(shard, number, &body).to_be_bytes())?;
    out.write_all(&body)?;
    Ok(())
}

fn read_u32(input: &mut impl Read) -> Result<u32, SnapshotError> {
    let mut bytes = [0u8; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

/// Reads a file of `shard` and hands over its blocks, each checked. Blocks.
///
/// # Errors
/// [`SnapshotError`], also what `take` returned.
fn read_file(
    path: &Path,
    shard: ShardId,
    mut take: impl FnMut(Block) -> Result<(), SnapshotError>,
) -> Result<AppliedState, SnapshotError> {
    let mut input = BufReader::new(File::open(path)?);
    let mut header = [0u8; 14];
    input.read_exact(&mut header)?;
    let (magic, rest) = header.split_at(8);
    if magic != MAGIC {
        return Err(damaged("not a snapshot file"));
    }
    if rest.get(..2) != Some(shard.0.to_be_bytes().as_slice()) {
        return Err(damaged("of another shard"));
    }
    let applied_len = rest.get(2..6).and_then(|len| len.try_into().ok()).map(u32::from_be_bytes).unwrap_or(u32::MAX);
    if applied_len as usize > BLOCK_BYTES {
        return Err(damaged("header too long"));
    }
    let mut applied_bytes = vec![0u8; applied_len as usize];
    input.read_exact(&mut applied_bytes)?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    crc.update(&applied_bytes);
    if read_u32(&mut input)? != crc.finalize() {
        return Err(damaged("header checksum mismatch"));
    }
    let applied: AppliedState = postcard::from_bytes(&applied_bytes).map_err(encoding)?;

    let (mut number, mut entries) = (0u32, 0u64);
    loop {
        let len = read_u32(&mut input)? as usize;
        let crc = read_u32(&mut input)?;
        if len > MAX_BLOCK_BYTES {
            return Err(damaged("block too long"));
        }
        let mut body = vec![0u8; if len == 0 { 8 } else { len }];
        input.read_exact(&mut body)?;
        if block_crc(shard, number, &body) != crc {
            return Err(damaged(format!("block {number}: checksum mismatch")));
        }
        if len == 0 {
            if body != entries.to_be_bytes() || input.read(&mut [0u8; 1])? != 0 {
                return Err(damaged("wrong end"));
            }
            return Ok(applied);
        }
        let block: Block = postcard::from_bytes(&body).map_err(encoding)?;
        entries += block.len() as u64;
        number += 1;
        take(block)?;
    }
}

/// Reads a whole file and checks everything in it. Blocks.
///
/// # Errors
/// [`SnapshotError::Damaged`] when it is not whole.
pub fn check_file(path: &Path, shard: ShardId) -> Result<AppliedState, SnapshotError> {
    read_file(path, shard, |_| Ok(()))
}

/// The file a snapshot is installed from; it exists while the marker does.
fn install_path(dir: &Path, shard: ShardId) -> PathBuf {
    dir.join(format!("install-{shard}"))
}

fn marker_key(shard: ShardId) -> Vec<u8> {
    [MARKER_PREFIX, shard.0.to_be_bytes()].concat()
}

/// Replaces everything of a shard by a checked snapshot file at `path` (in `dir`, on the same file system). Blocks.
///
/// The file is first made durable under a fixed name; then a marker is written, the old state deleted, the new one
/// written, and the marker removed in the batch that says how far it is applied; at last all is flushed and the file
/// deleted. A crash leaves the old state, or the marker and the file, from which [`finish_interrupted`] begins again.
///
/// # Errors
/// [`SnapshotError`].
pub fn install(state: &StateDb, shard: ShardId, dir: &Path, path: &Path) -> Result<AppliedState, SnapshotError> {
    File::open(path)?.sync_all()?;
    let fixed = install_path(dir, shard);
    std::fs::rename(path, &fixed)?;
    File::open(dir)?.sync_all()?;
    replace(state, shard, &fixed)
}

/// Makes the state look as if an install had begun, or ended.
#[cfg(test)]
pub(crate) fn plant_marker(state: &StateDb, shard: ShardId, is_there: bool) {
    let marker = is_there.then(Vec::new);
    state.write(shard, Writes::from([(marker_key(shard), marker)]), None).unwrap_or_else(|error| panic!("{error}"));
}

fn replace(state: &StateDb, shard: ShardId, file: &Path) -> Result<AppliedState, SnapshotError> {
    let mut marker = Writes::new();
    marker.insert(marker_key(shard), Some(Vec::new()));
    state.write(shard, marker, None)?;
    // The marker must not be overtaken: a crash that keeps a later flush keeps it too, because memtables are flushed in
    // order.
    state.clear(shard)?;
    let prefix = shard.0.to_be_bytes();
    let applied_key = Keys::new(shard).single(kind::APPLIED);
    let mut last = Writes::new();
    let applied = read_file(file, shard, |block| {
        let mut writes = Writes::new();
        for (key, value) in block {
            let key = [prefix.as_slice(), key.as_slice()].concat();
            if key == applied_key {
                last.insert(key, Some(value));
            } else {
                writes.insert(key, Some(value));
            }
        }
        state.write(shard, writes, None)?;
        Ok(())
    })?;
    last.insert(marker_key(shard), None);
    state.write(shard, last, applied.last.map(|last| last.index))?;
    state.flush()?;
    std::fs::remove_file(file)?;
    Ok(applied)
}

/// Is this a moment in the middle of an install, with a part of the state only?
///
/// # Errors
/// The database cannot be read.
pub fn is_being_replaced(view: &StateView<'_>, shard: ShardId) -> Result<bool, StateError> {
    Ok(view.get(&marker_key(shard))?.is_some())
}

/// Carries out an install that a crash interrupted, if there was one, and removes a file that no marker speaks of.
///
/// # Errors
/// [`SnapshotError`]: the shard's replica cannot be used.
pub fn finish_interrupted(state: &StateDb, shard: ShardId, dir: &Path, space: &Space) -> Result<(), SnapshotError> {
    let file = install_path(dir, shard);
    if state.get(&marker_key(shard))?.is_some() {
        if !space.has_room_for(std::fs::metadata(&file)?.len()) {
            return Err(SnapshotError::NoRoom);
        }
        tracing::warn!(%shard, "a snapshot install was interrupted; beginning it again");
        replace(state, shard, &file)?;
    } else if file.exists() {
        std::fs::remove_file(&file)?;
    }
    Ok(())
}

/// Deletes everything of a shard, and an install that was interrupted, for certain. Blocks.
///
/// # Errors
/// [`SnapshotError`].
pub fn forget(state: &StateDb, shard: ShardId, dir: &Path) -> Result<(), SnapshotError> {
    let range = Keys::new(shard).shard_range();
    let something = {
        let mut cursor = state.cursor(&range.to);
        // What cannot be read is something, too.
        cursor.seek(&range.from).is_err() || cursor.entry().is_some()
    };
    if something || state.get(&marker_key(shard))?.is_some() {
        state.clear(shard)?;
        let mut writes = Writes::new();
        writes.insert(marker_key(shard), None);
        state.write(shard, writes, None)?;
        state.flush()?;
    }
    let file = install_path(dir, shard);
    if file.exists() {
        std::fs::remove_file(&file)?;
    }
    Ok(())
}

/// CRC-64-like digest of a shard's whole state: equal on replicas that applied the same entries. For tests and audits;
/// reads everything.
///
/// # Errors
/// [`StateError`].
pub fn state_hash<K: Kv + ?Sized>(kv: &K, shard: ShardId) -> Result<u64, StateError> {
    let range = Keys::new(shard).shard_range();
    let mut cursor = kv.cursor(&range.to);
    cursor.seek(&range.from)?;
    let mut low = crc32fast::Hasher::new();
    let mut high = crc32fast::Hasher::new_with_initial(0x9e37_79b9);
    while let Some((key, value)) = cursor.entry() {
        for part in [&(key.len() as u64).to_be_bytes(), key, &(value.len() as u64).to_be_bytes(), value] {
            low.update(part);
            // The second half sees the bytes between other neighbours, so that the two do not fail together.
            high.update(&[part.len() as u8 ^ 0x5a]);
            high.update(part);
        }
        cursor.next()?;
    }
    Ok(u64::from(high.finalize()) << 32 | u64::from(low.finalize()))
}
