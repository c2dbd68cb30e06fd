//! What a gateway is told.
//!
//! - [`given`]: the settings that an operator gives to one process: `--set`, environment, file;
//! - [`secrets`]: keys and tokens; [`files`]: the small files they lie in.
//!
//! The table of all settings is [`granary_placement::settings`]. Those of the whole cluster come from the root shard,
//! while a gateway runs: [`crate::ops::settings`].

pub mod files;
pub mod given;
pub mod secrets;

pub use files::{read_small, write_atomic};
pub use given::SettingsArgs;
pub use secrets::{random_token, read_token, RootCredentials, Secret, ROOT_ACCESS_KEY_VAR, ROOT_SECRET_KEY_VAR};

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Settings that do not stand. The text names the setting and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A value that cannot be.
    #[error("{setting}: {why}")]
    Invalid {
        /// The option, variable or file.
        setting: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A name or value among `--set`, environment and file.
    #[error(transparent)]
    Given(#[from] granary_placement::settings::LoadError),
    /// The system gives no randomness.
    #[error("no randomness from the operating system: {0}")]
    Random(getrandom::Error),
}

impl SettingsError {
    /// [`SettingsError::Invalid`].
    pub fn invalid(setting: impl Into<String>, why: impl Into<String>) -> SettingsError {
        SettingsError::Invalid { setting: setting.into(), why: why.into() }
    }

    /// [`SettingsError::File`].
    pub fn file(path: &Path, source: io::Error) -> SettingsError {
        SettingsError::File { path: path.to_owned(), source }
    }
}

/// How long requests in flight may take to end when the gateway stops.
pub const DRAIN: Duration = Duration::from_secs(10);
