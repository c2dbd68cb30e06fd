//! The leases of background tasks as this disk knows them: the highest epoch of each task, kept durably.
//!
//! A background request carries the lease under which its sender does the task. Once a request of a newer holder was
//! obeyed, none of an older one ever is again, also after a restart: the epoch is synced to the file before the request
//! is obeyed, and it waits for the requests of the older holder that are being carried out.

use crate::label::replace_file;
use granary_placement::lease::LeaseStamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

const LEASES_FILE: &str = "leases.json";
const VERSION: u32 = 1;

/// Longest file, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// Tasks remembered. A cluster has a handful, or a few per shard.
const MAX_TASKS: usize = 4096;

/// Why a request under a lease is not obeyed.
#[derive(Debug, thiserror::Error)]
pub enum LeaseRefused {
    /// Another holder of the task has acted here since.
    #[error("the lease of task `{task}` was taken over: epoch {current} acted here already")]
    Stale {
        /// The task.
        task: String,
        /// The highest epoch seen.
        current: u64,
    },
    /// Not the name of a task.
    #[error("`{0}` cannot be the name of a task")]
    BadTask(String),
    /// More tasks than any cluster has.
    #[error("more than {MAX_TASKS} tasks")]
    TooMany,
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    version: u32,
    epochs: BTreeMap<String, u64>,
}

/// The highest epoch of each task.
pub struct Leases {
    path: PathBuf,
    /// Read-locked while a request under a lease is carried out, so that a newer holder's first one waits for it.
    epochs: Arc<RwLock<BTreeMap<String, u64>>>,
}

/// Held while a request under a lease is carried out.
pub struct UnderLease(#[allow(dead_code)] OwnedRwLockReadGuard<BTreeMap<String, u64>>);

impl Leases {
    /// Reads what the disk keeps.
    ///
    /// # Errors
    /// [`LeaseRefused::File`]: without it the disk would obey holders that it must refuse.
    pub fn open(dir: &Path) -> Result<Leases, LeaseRefused> {
        let path = dir.join(LEASES_FILE);
        let failed = |source| LeaseRefused::File { path: path.clone(), source };
        let kept = match std::fs::metadata(&path) {
            Ok(meta) if meta.len() > MAX_FILE_BYTES => return Err(failed(io::Error::other("far too long"))),
            Ok(_) => {
                std::fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Kept>(&text)?)).map_err(failed)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Kept { version: VERSION, ..Kept::default() },
            Err(error) => return Err(failed(error)),
        };
        if kept.version != VERSION {
            let text = format!("version {} of the file, this build knows {VERSION}", kept.version);
            return Err(failed(io::Error::other(text)));
        }
        Ok(Leases { path, epochs: Arc::new(RwLock::new(kept.epochs)) })
    }

    /// Lets a request under this lease in, or refuses it. The request is carried out while the answer is held.
    ///
    /// # Errors
    /// [`LeaseRefused`]. After [`LeaseRefused::File`] the disk is not to be trusted with anything.
    pub async fn admit(&self, lease: &LeaseStamp) -> Result<UnderLease, LeaseRefused> {
        if !LeaseStamp::is_task(&lease.task) {
            return Err(LeaseRefused::BadTask(lease.task.chars().take(64).collect()));
        }
        loop {
            let epochs = self.epochs.clone().read_owned().await;
            match epochs.get(&lease.task).copied() {
                Some(current) if current > lease.epoch => {
                    return Err(LeaseRefused::Stale { task: lease.task.clone(), current });
                }
                Some(current) if current == lease.epoch => return Ok(UnderLease(epochs)),
                _ => drop(epochs),
            }
            self.raise(lease).await?;
        }
    }

    /// Writes a higher epoch down, once the requests under way have ended.
    async fn raise(&self, lease: &LeaseStamp) -> Result<(), LeaseRefused> {
        let mut epochs = self.epochs.clone().write_owned().await;
        if epochs.get(&lease.task).is_some_and(|current| *current >= lease.epoch) {
            return Ok(());
        }
        if epochs.len() >= MAX_TASKS && !epochs.contains_key(&lease.task) {
            return Err(LeaseRefused::TooMany);
        }
        let mut raised = epochs.clone();
        raised.insert(lease.task.clone(), lease.epoch);
        let kept = Kept { version: VERSION, epochs: raised };
        let path = self.path.clone();
        // The lock goes along: when the connection of whoever asked breaks, the writing goes on, and nobody else may
        // write or read the epochs before it has ended.
        let written = tokio::task::spawn_blocking(move || {
            replace_file(&path, &serde_json::to_vec(&kept)?)?;
            *epochs = kept.epochs;
            Ok(())
        });
        let written = written.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        written.map_err(|source| LeaseRefused::File { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::time::Duration;

    fn lease(task: &str, epoch: u64) -> LeaseStamp {
        LeaseStamp { task: task.to_owned(), epoch }
    }

    fn stale(result: Result<UnderLease, LeaseRefused>) -> Option<u64> {
        match result {
            Err(LeaseRefused::Stale { current, .. }) => Some(current),
            _ => None,
        }
    }

    #[tokio::test]
    async fn an_older_holder_is_refused_for_good_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(dir.path()).unwrap();
        drop(leases.admit(&lease("heal", 3)).await.unwrap());
        drop(leases.admit(&lease("heal", 3)).await.unwrap());
        drop(leases.admit(&lease("heal", 7)).await.unwrap());
        assert_eq!(stale(leases.admit(&lease("heal", 6)).await), Some(7));
        // Another task is another matter.
        drop(leases.admit(&lease("garbage", 1)).await.unwrap());
        let leases = Leases::open(dir.path()).unwrap();
        assert_eq!(stale(leases.admit(&lease("heal", 6)).await), Some(7));
        assert_eq!(stale(leases.admit(&lease("garbage", 0)).await), Some(1));
        drop(leases.admit(&lease("heal", 7)).await.unwrap());
    }

    #[tokio::test]
    async fn a_new_holder_waits_for_what_the_old_one_has_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Arc::new(Leases::open(dir.path()).unwrap());
        let under_way = leases.admit(&lease("heal", 1)).await.unwrap();
        let newer = tokio::spawn({
            let leases = leases.clone();
            async move { leases.admit(&lease("heal", 2)).await.is_ok() }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!newer.is_finished());
        drop(under_way);
        assert!(newer.await.unwrap());
        assert_eq!(stale(leases.admit(&lease("heal", 1)).await), Some(2));
    }

    #[tokio::test]
    async fn a_higher_epoch_is_written_to_its_end_when_the_request_is_dropped_in_the_middle() {
        // Requests that are dropped at every point of their way, of two tasks at a time: the file always holds what was
        // admitted, and no writing meets another.
        let dir = tempfile::tempdir().unwrap();
        let leases = Arc::new(Leases::open(dir.path()).unwrap());
        for epoch in 1..200u64 {
            let dropped = tokio::spawn({
                let leases = leases.clone();
                async move { leases.admit(&lease("heal", epoch)).await.map(drop) }
            });
            for _ in 0..epoch % 7 {
                tokio::task::yield_now().await;
            }
            dropped.abort();
            drop(leases.admit(&lease("garbage", epoch)).await.unwrap());
            let kept: Kept = serde_json::from_slice(&std::fs::read(dir.path().join(LEASES_FILE)).unwrap()).unwrap();
            assert_eq!(kept.epochs, *leases.epochs.read().await, "epoch {epoch}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_taken_for_an_empty_one() {
        for text in ["", "{}", r#"{"version":2,"epochs":{}}"#, r#"{"version":1,"epochs":{"heal":-1}}"#] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(LEASES_FILE), text).unwrap();
            assert!(matches!(Leases::open(dir.path()), Err(LeaseRefused::File { .. })), "{text}");
        }
    }
}
