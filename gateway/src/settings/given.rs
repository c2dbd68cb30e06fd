//! Settings given to one process: `--set`, environment, `--config FILE`.

use super::{read_small, SettingsError};
use clap::Args;
use granary_placement::settings::{Layers, Program, Values};
use std::path::PathBuf;

/// Environment variable of `--config`.
pub const CONFIG_VAR: &str = "GRANARY_CONFIG";

/// Options that every program with settings has.
#[derive(Debug, Clone, Default, Args)]
pub struct SettingsArgs {
    /// A setting, as NAME=VALUE; repeatable. `granary config` lists them.
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// TOML file of settings: sections by what comes before the point of a name.
    #[arg(long, value_name = "FILE", env = CONFIG_VAR)]
    pub config: Option<PathBuf>,
}

impl SettingsArgs {
    /// The values for `program`: `--set` before the environment before the file before the defaults.
    ///
    /// # Errors
    /// The file cannot be read, or something given does not stand.
    pub fn load(&self, program: Program) -> Result<Values, SettingsError> {
        let file = match &self.config {
            Some(path) => {
                let name = path.display().to_string();
                let text = String::from_utf8(read_small(path)?)
                    .map_err(|_| SettingsError::invalid(name.as_str(), "is not UTF-8"))?;
                Some((name, text))
            }
            None => None,
        };
        // A variable that is no UTF-8 is no setting.
        let environment: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let file = file.as_ref().map(|(name, text)| (name.as_str(), text.as_str()));
        Ok(Values::load(program, Layers { set: &self.set, environment: &environment, file })?)
    }
}
