#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use granary_meta::keys::kind;
use std::sync::Arc;

const SHARD: ShardId = ShardId(3);

fn open(dir: &Path) -> StateDb {
    StateDb::open(dir, Fatal::new(Arc::new(|why| panic!("the process would end: {why}")))).unwrap()
}

fn put(key: &[u8], value: &[u8]) -> Writes {
    Writes::from([(key.to_vec(), Some(value.to_vec()))])
}

fn keys(kv: &dyn Kv) -> Result<Vec<Vec<u8>>, StateError> {
    let range = Keys::new(SHARD).shard_range();
    let mut cursor = kv.cursor(&range.to);
    cursor.seek(&range.from)?;
    let mut found = Vec::new();
    while let Some((key, _)) = cursor.entry() {
        found.push(key.to_vec());
        cursor.next()?;
    }
    Ok(found)
}

#[test]
fn a_read_that_may_not_wait_says_what_is_in_memory_and_never_that_something_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let key = Keys::new(SHARD).single(kind::MAP);
    {
        let state = open(dir.path());
        state.write(SHARD, put(&key, b"on disk"), Some(1)).unwrap();
        // It lies in the buffer for writes.
        assert_eq!(state.now(Wait::Never).get(&key), Ok(Some(b"on disk".to_vec())));
        assert_eq!(keys(&state.now(Wait::Never)), Ok(vec![key.clone()]));
        state.flush().unwrap();
    }
    // Nothing of the file's blocks is in memory after an opening.
    let state = open(dir.path());
    assert_eq!(state.now(Wait::Never).get(&key), Err(StateError::WouldWait));
    assert_eq!(state.view_by(Wait::Never).get(&key), Err(StateError::WouldWait));
    assert_eq!(keys(&state.now(Wait::Never)), Err(StateError::WouldWait));
    assert_eq!(keys(&state.view_by(Wait::Never)), Err(StateError::WouldWait));
    assert_eq!(state.now(Wait::Allowed).get(&key), Ok(Some(b"on disk".to_vec())));
    assert_eq!(keys(&state.now(Wait::Allowed)), Ok(vec![key.clone()]));
    // Whoever waited for it has brought it into memory.
    assert_eq!(state.now(Wait::Never).get(&key), Ok(Some(b"on disk".to_vec())));
    assert_eq!(state.view_by(Wait::Never).get(&key), Ok(Some(b"on disk".to_vec())));
    assert_eq!(keys(&state.now(Wait::Never)), Ok(vec![key]));
}

#[test]
fn work_that_is_long_is_not_done_where_it_may_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path());
    let at = |i: u32| [Keys::new(SHARD).single(kind::MAP), i.to_be_bytes().to_vec()].concat();
    let half = READS_AT_ONCE / 2;
    let first: Writes = (0..half).map(|i| (at(i), Some(Vec::new()))).collect();
    state.write(SHARD, first, Some(1)).unwrap();
    // Some work after another is as long as both together.
    let now = state.now(Wait::Never);
    assert_eq!(keys(&now).map(|keys| keys.len() as u32), Ok(half));
    assert!(now.get(&at(0)).is_ok());
    assert_eq!(keys(&now), Err(StateError::WouldWait));
    let now = state.now(Wait::Never);
    for i in 0..READS_AT_ONCE {
        assert!(now.get(&at(i)).is_ok());
    }
    assert_eq!(now.get(&at(0)), Err(StateError::WouldWait));
    // What may wait may be long.
    let all: Writes = (0..2 * READS_AT_ONCE).map(|i| (at(i), Some(Vec::new()))).collect();
    state.write(SHARD, all, Some(2)).unwrap();
    assert_eq!(keys(&state.now(Wait::Never)), Err(StateError::WouldWait));
    assert_eq!(keys(&state.now(Wait::Allowed)).map(|keys| keys.len() as u32), Ok(2 * READS_AT_ONCE));
}

#[test]
fn a_write_that_may_not_wait_writes_nothing_when_the_database_makes_writes_wait_and_ends_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path());
    let key = Keys::new(SHARD).single(kind::MAP);
    state.write(SHARD, put(&key, b"first"), Some(1)).unwrap();
    state.flush().unwrap();
    // One file is more than the database takes writes with.
    let stop = |at: &str| {
        state.db.set_options(&[("level0_slowdown_writes_trigger", at), ("level0_stop_writes_trigger", at)]).unwrap();
    };
    stop("1");
    let refused = state.write_by(Wait::Never, SHARD, put(&key, b"second"), Some(2));
    assert_eq!(refused, Err(StateError::WouldWait));
    assert_eq!(state.get(&key), Ok(Some(b"first".to_vec())));
    assert_eq!(lock(&state.applied).get(&SHARD), Some(&1));
    // What may wait does, until writes go on.
    let patient = std::thread::scope(|threads| {
        let waits = threads.spawn(|| state.write(SHARD, put(b"another", b"third"), None));
        std::thread::sleep(std::time::Duration::from_millis(100));
        stop("20");
        waits.join()
    });
    assert_eq!(patient.unwrap(), Ok(()));
    state.write_by(Wait::Never, SHARD, put(&key, b"second"), Some(2)).unwrap();
    assert_eq!(state.get(&key), Ok(Some(b"second".to_vec())));
    assert_eq!(lock(&state.applied).get(&SHARD), Some(&2));
}
