//! Cluster settings in the root shard: what was set, under one epoch, so that a gateway fetches them only when they
//! changed.

use crate::apply::Tx;
use crate::check::check_setting;
use crate::keys::kind;
use crate::kv::{Kv, StateError};
use crate::record::SettingsRecord;
use crate::Reply;

/// Most settings that are not at their defaults. Part of the replicated history.
pub const MAX_SETTINGS: usize = 256;

/// See [`crate::Command::SetSetting`].
pub fn set<K: Kv + ?Sized>(tx: &mut Tx<'_, '_, K>, name: &str, value: Option<&str>) -> Result<Reply, StateError> {
    if let Err(why) = check_setting(name, value) {
        return Ok(Reply::Refused(why));
    }
    let key = tx.keys.single(kind::SETTINGS);
    let mut settings: SettingsRecord = tx.load(&key)?.unwrap_or_default();
    if settings.values.get(name).map(String::as_str) == value {
        return Ok(Reply::Settings { epoch: settings.epoch });
    }
    match value {
        Some(value) => {
            if settings.values.len() >= MAX_SETTINGS && !settings.values.contains_key(name) {
                return Ok(Reply::Refused(format!("there are {MAX_SETTINGS} settings")));
            }
            settings.values.insert(name.to_owned(), value.to_owned());
        }
        None => {
            settings.values.remove(name);
        }
    }
    settings.epoch += 1;
    tx.store(key, &settings)?;
    Ok(Reply::Settings { epoch: settings.epoch })
}
