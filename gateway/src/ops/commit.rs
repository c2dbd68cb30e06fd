//! How a change of the cluster map becomes the map: read the newest, apply the change, offer the result to the root
//! shard, which takes it only if nobody was faster; else once more on top of what that one did.

use crate::shards::map_watch::MapSet;
use crate::shards::{ShardError, Shards};
use granary_placement::id::{Epoch, ShardId};
use granary_placement::map::ClusterMap;
use std::future::Future;
use std::sync::Arc;

/// How often a change is made again because another was faster, or because it is not known whether it was taken.
const ATTEMPTS: usize = 8;

/// The map in the root shard; a seam for tests.
pub trait MapStore: Sync {
    /// The newest map, asked for now.
    fn newest(&self) -> impl Future<Output = Result<Arc<ClusterMap>, ShardError>> + Send;
    /// Installs a map whose epoch is one above the one in force.
    fn install(&self, map: ClusterMap) -> impl Future<Output = Result<MapSet, ShardError>> + Send;
}

impl MapStore for Shards {
    async fn newest(&self) -> Result<Arc<ClusterMap>, ShardError> {
        self.refresh_map().await?;
        self.current_map().ok_or(ShardError::NoMap(ShardId::ROOT))
    }

    async fn install(&self, map: ClusterMap) -> Result<MapSet, ShardError> {
        self.set_map(map).await
    }
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum CommitError<E: std::error::Error + 'static> {
    /// The change makes no sense for the newest map. Nothing was changed.
    #[error(transparent)]
    Refused(E),
    /// The root shard does not answer, or does not take the map. When no answer came it may still be taken.
    #[error("the root shard did not take the change: {0}")]
    Root(#[source] ShardError),
    /// Others were faster each time. Nothing was changed.
    #[error("the cluster map changes all the time; try again")]
    Restless,
}

/// A change that was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// The map it was made on.
    pub before: Arc<ClusterMap>,
    /// The map now.
    pub after: ClusterMap,
}

/// Makes `change`, a pure function from the newest map to the next.
///
/// # Errors
/// [`CommitError`].
pub async fn commit<E: std::error::Error + 'static>(
    maps: &impl MapStore,
    change: impl Fn(&ClusterMap) -> Result<ClusterMap, E>,
) -> Result<Committed, CommitError<E>> {
    let mut offered: Option<Committed> = None;
    let mut failed = None;
    for _ in 0..ATTEMPTS {
        let before = maps.newest().await.map_err(CommitError::Root)?;
        // An answer that was lost: what is there now is what was offered.
        if let Some(made) = offered.take().filter(|made| made.after == *before) {
            return Ok(made);
        }
        let after = change(&before).map_err(CommitError::Refused)?;
        let made = Committed { before, after };
        match maps.install(made.after.clone()).await {
            Ok(MapSet::Done) => return Ok(made),
            Ok(MapSet::Conflict { current }) => {
                tracing::info!(
                    epoch = current.0,
                    "the cluster map changed meanwhile; the change is made on top of that"
                );
                failed = None;
            }
            Err(error) if error.outcome_unknown() => failed = Some(error),
            Err(error) => return Err(CommitError::Root(error)),
        }
        offered = Some(made);
    }
    Err(failed.map_or(CommitError::Restless, CommitError::Root))
}

/// The disks form another cluster, or none that is as far on as this map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the cluster has a map of epoch {current} already, this one has {ours}")]
pub struct FormedOtherwise {
    /// Epoch in force.
    pub current: Epoch,
    /// Epoch of the map given.
    pub ours: Epoch,
}

/// Installs the first map of a cluster. Done again, it does nothing: the map of the root shard is the one that counts,
/// whatever it has become since.
///
/// # Errors
/// [`CommitError`].
pub async fn commit_first(maps: &impl MapStore, map: &ClusterMap) -> Result<(), CommitError<FormedOtherwise>> {
    match maps.install(map.clone()).await.map_err(CommitError::Root)? {
        MapSet::Conflict { current } if current < map.epoch => {
            Err(CommitError::Refused(FormedOtherwise { current, ours: map.epoch }))
        }
        MapSet::Done | MapSet::Conflict { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::change::{drain, set_weight, ChangeError};
    use super::super::form::tests::cluster;
    use super::*;
    use granary_placement::id::DiskId;
    use std::collections::VecDeque;
    use std::sync::Mutex;

    /// What the next installation meets.
    #[derive(Clone, Copy, PartialEq)]
    enum Fate {
        /// Somebody gives disk 8 another weight first.
        Overtaken,
        /// It is taken, and the answer is lost.
        AnswerLost,
        /// It is lost on the way.
        RequestLost,
        /// It is refused.
        Refused,
    }

    struct Root {
        map: Mutex<ClusterMap>,
        fates: Mutex<VecDeque<Fate>>,
    }

    impl Root {
        fn new(fates: &[Fate]) -> Root {
            Root { map: Mutex::new(cluster(8)), fates: Mutex::new(fates.iter().copied().collect()) }
        }
    }

    impl MapStore for Root {
        async fn newest(&self) -> Result<Arc<ClusterMap>, ShardError> {
            Ok(Arc::new(self.map.lock().unwrap().clone()))
        }

        async fn install(&self, map: ClusterMap) -> Result<MapSet, ShardError> {
            let lost = || ShardError::Unavailable { shard: ShardId::ROOT, detail: "lost".to_owned() };
            let fate = self.fates.lock().unwrap().pop_front();
            let mut current = self.map.lock().unwrap();
            match fate {
                Some(Fate::Overtaken) => {
                    let weight = current.disk(DiskId(8)).unwrap().weight + 1;
                    *current = set_weight(&current, DiskId(8), weight).unwrap();
                }
                Some(Fate::RequestLost) => return Err(lost()),
                Some(Fate::Refused) => {
                    return Err(ShardError::Refused { shard: ShardId::ROOT, why: "senseless".to_owned() })
                }
                Some(Fate::AnswerLost) | None => {}
            }
            if map.epoch.0 != current.epoch.0 + 1 {
                return Ok(MapSet::Conflict { current: current.epoch });
            }
            *current = map;
            if fate == Some(Fate::AnswerLost) {
                return Err(lost());
            }
            Ok(MapSet::Done)
        }
    }

    #[tokio::test]
    async fn a_change_is_made_exactly_once_whatever_happens_on_the_way() {
        use Fate::{AnswerLost, Overtaken, RequestLost};
        // (what the attempts meet, epoch afterwards)
        for (fates, epoch) in [
            (&[] as &[Fate], 2),
            (&[Overtaken], 3),
            (&[Overtaken, Overtaken, Overtaken], 5),
            (&[RequestLost], 2),
            (&[AnswerLost], 2),
            (&[Overtaken, RequestLost, AnswerLost], 3),
        ] {
            let root = Root::new(fates);
            let made = commit(&root, |map| drain(map, DiskId(3))).await.unwrap();
            assert_eq!((made.after.epoch, &made.after), (Epoch(epoch), &*root.map.lock().unwrap()));
            assert_eq!(made.after, drain(&made.before, DiskId(3)).unwrap(), "made on top of what others did");
        }
    }

    #[tokio::test]
    async fn attempts_are_bounded_and_refusals_final() {
        let root = Root::new(&[Fate::Overtaken; 100]);
        let error = commit(&root, |map| drain(map, DiskId(3))).await.unwrap_err();
        assert!(matches!(error, CommitError::Restless), "{error}");
        let root = Root::new(&[Fate::RequestLost; 100]);
        let error = commit(&root, |map| drain(map, DiskId(3))).await.unwrap_err();
        assert!(matches!(error, CommitError::Root(ShardError::Unavailable { .. })), "{error}");
        let root = Root::new(&[Fate::Refused]);
        let error = commit(&root, |map| drain(map, DiskId(3))).await.unwrap_err();
        assert!(matches!(error, CommitError::Root(ShardError::Refused { .. })), "{error}");
        let root = Root::new(&[]);
        let error = commit(&root, |map| set_weight(map, DiskId(3), 1000)).await.unwrap_err();
        assert!(matches!(error, CommitError::Refused(ChangeError::SameWeight { .. })), "{error}");
        assert_eq!(root.map.lock().unwrap().epoch, Epoch(1), "a refused change changes nothing");
    }

    #[tokio::test]
    async fn the_first_map_is_installed_once_and_never_over_a_later_one() {
        let root = Root::new(&[Fate::Overtaken]);
        let first = ClusterMap { epoch: Epoch(2), ..cluster(8) };
        commit_first(&root, &first).await.unwrap();
        assert_ne!(*root.map.lock().unwrap(), first, "the map that is further on stays");
        let later = ClusterMap { epoch: Epoch(9), ..cluster(8) };
        let error = commit_first(&root, &later).await.unwrap_err();
        assert!(matches!(error, CommitError::Refused(FormedOtherwise { current: Epoch(2), .. })), "{error}");
    }
}
