//! Settings of the whole cluster: asked of the root shard every five seconds, and followed by whoever works by them.
//!
//! The root shard checks only the form of a name and value, because the table differs between builds. Whoever sets one
//! checks it here against the table; whoever reads one that it does not know leaves it alone.

use crate::shards::buckets::{odd_answer, odd_reply};
use crate::shards::{jitter, ShardError, Shards};
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::ShardId;
use granary_placement::settings::{find, Scope, Setting, SettingError, Value, Values};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const POLL: Duration = Duration::from_secs(5);

/// Why a setting of the cluster was not changed.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// No such setting, or it cannot have that value.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// Each process has its own.
    #[error(
        "`{0}` belongs to each process: give it with --set, the environment or a file, and start the process again"
    )]
    Process(&'static str),
    /// The root shard.
    #[error(transparent)]
    Shard(#[from] ShardError),
}

impl SetError {
    /// Which setting and why, for the log: nothing of what was given, which may be a secret in the wrong place.
    pub fn for_log(&self) -> String {
        match self {
            SetError::Setting(SettingError::Unknown { nearest, .. }) => {
                let nearest = nearest.map(|name| format!(", the nearest is `{name}`")).unwrap_or_default();
                format!("no setting has that name{nearest}")
            }
            SetError::Setting(SettingError::Value { name, expected, .. }) => {
                format!("`{name}` cannot have that value: it is {expected}")
            }
            SetError::Process(_) | SetError::Shard(_) => self.to_string(),
        }
    }
}

/// Asks the root shard once. None: nothing is newer than `newer_than`.
///
/// # Errors
/// It does not answer.
pub async fn fetch(shards: &Shards, newer_than: u64) -> Result<Option<(u64, BTreeMap<String, String>)>, ShardError> {
    match shards.query(ShardId::ROOT, Query::GetSettings { newer_than }).await? {
        Answer::Settings { epoch, values } => Ok(Some((epoch, values))),
        Answer::SettingsUnchanged => Ok(None),
        other => Err(odd_answer(ShardId::ROOT, &other)),
    }
}

/// Sets one, or with None puts it back to its default; answers the value from now on.
///
/// # Errors
/// [`SetError`]; nothing was changed, but for a root shard that did not answer.
pub async fn set(shards: &Shards, name: &str, value: Option<&str>) -> Result<(&'static Setting, Value), SetError> {
    let setting = find(name)?;
    let given = value.map(|value| setting.parse(value)).transpose()?;
    let text = given.as_ref().map(|value| setting.render(value));
    if setting.scope != Scope::Cluster {
        return Err(SetError::Process(setting.name));
    }
    match shards.command(ShardId::ROOT, Command::SetSetting { name: setting.name.to_owned(), value: text }).await? {
        Reply::Settings { .. } => Ok((setting, given.unwrap_or_else(|| setting.default.clone()))),
        other => Err(odd_reply(ShardId::ROOT, &other).into()),
    }
}

/// Puts the root shard's settings over those of this process every five seconds, for ever. While the root shard does
/// not answer, the last ones hold.
pub async fn watch(shards: Shards, values: watch::Sender<Arc<Values>>) {
    let mut known = 0;
    loop {
        match refresh(&shards, &values, known).await {
            Ok(epoch) => known = epoch,
            // The map watch says so when the root shard is lost.
            Err(error) => tracing::debug!(%error, "the cluster's settings were not asked"),
        }
        tokio::time::sleep(jitter(POLL)).await;
    }
}

/// Returns once the root shard's settings are those of this process, and `part` goes by them. Who acts by settings
/// waits for that: by the defaults, a gateway that was just started would not know that healing is paused.
pub async fn known<T: PartialEq>(
    shards: &Shards,
    values: &watch::Sender<Arc<Values>>,
    part: &mut watch::Receiver<T>,
    make: fn(&Values) -> T,
) {
    while let Err(error) = refresh(shards, values, 0).await {
        tracing::debug!(%error, "the cluster's settings were not asked");
        tokio::time::sleep(jitter(POLL)).await;
    }
    // An error: this gateway stops.
    let _ = part.wait_for(|part| *part == make(&values.borrow())).await;
}

/// Asks the root shard once, and puts what is newer than `newer_than` over the settings of this process. Answers the
/// epoch that is known now.
async fn refresh(shards: &Shards, values: &watch::Sender<Arc<Values>>, newer_than: u64) -> Result<u64, ShardError> {
    let Some((epoch, cluster)) = fetch(shards, newer_than).await? else { return Ok(newer_than) };
    let (newest, unknown) = values.borrow().with_cluster(&cluster);
    for error in unknown {
        tracing::warn!(%error, "a setting of the cluster is not used by this build");
    }
    let changed = **values.borrow() != newest;
    if changed {
        tracing::info!(epoch, set = ?cluster, "the cluster's settings are in use");
        values.send_replace(Arc::new(newest));
    }
    Ok(epoch)
}

/// What one part works by, kept true until the values end: a receiver for the part, and the work of keeping it.
pub fn follow<T: PartialEq + Send + Sync + 'static>(
    mut values: watch::Receiver<Arc<Values>>,
    make: fn(&Values) -> T,
) -> (watch::Receiver<T>, impl std::future::Future<Output = ()> + Send) {
    let (part, following) = watch::channel(make(&values.borrow_and_update()));
    let work = async move {
        while values.changed().await.is_ok() {
            let newest = make(&values.borrow_and_update());
            part.send_if_modified(|known| {
                let changed = *known != newest;
                if changed {
                    *known = newest;
                }
                changed
            });
        }
    };
    (following, work)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::background::heal::HealSettings;
    use crate::metrics::Metrics;
    use crate::shards::memory::MemoryPeers;
    use crate::shards::tests::{map, HURRY};

    #[tokio::test]
    async fn a_part_follows_the_settings_it_reads_and_is_not_woken_by_others() {
        let values = watch::Sender::new(Arc::new(Values::default()));
        let (mut heal, work) = follow(values.subscribe(), HealSettings::from_settings);
        let work = tokio::spawn(work);
        assert_eq!(*heal.borrow_and_update(), HealSettings::default());
        let with = |name, value| Arc::new(Values::default().with(name, value).unwrap());
        values.send_replace(with("object.replay", "0"));
        values.send_replace(with("heal.rate", "1MiB/s"));
        heal.changed().await.unwrap();
        assert_eq!(heal.borrow_and_update().bytes_per_s, 1 << 20);
        values.send_replace(with("object.replay", "0"));
        heal.changed().await.unwrap();
        assert_eq!(*heal.borrow_and_update(), HealSettings::default());
        drop(values);
        work.await.unwrap();
        assert!(heal.changed().await.is_err(), "one change each, and then the end");
    }

    #[tokio::test]
    async fn who_waits_for_the_settings_goes_by_those_of_the_root_shard() {
        let peers = MemoryPeers::new(&map(5, 2, 1));
        let known_map = watch::Sender::new(Some(Arc::new(map(5, 2, 1))));
        let shards = Shards::with_timing(peers.clone(), known_map, Metrics::new().unwrap(), HURRY);
        set(&shards, "heal.paused_until", Some("1234")).await.unwrap();
        let values = watch::Sender::new(Arc::new(Values::default()));
        let (mut heal, work) = follow(values.subscribe(), HealSettings::from_settings);
        let work = tokio::spawn(work);
        assert_eq!(heal.borrow().paused_until_ms, 0);
        known(&shards, &values, &mut heal, HealSettings::from_settings).await;
        assert_eq!(heal.borrow().paused_until_ms, 1234);
        work.abort();
    }
}
