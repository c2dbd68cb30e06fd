//! Logs: to standard error, as text or JSON, filtered by `--log` or GRANARY_LOG.

use crate::settings::SettingsError;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Environment variable of the filter.
pub const LOG_VAR: &str = "GRANARY_LOG";

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Begins logging. `filter` as in tracing: `info`, `granary_gateway=debug`.
///
/// # Errors
/// The filter cannot be parsed, or logging has begun already.
pub fn init(filter: &str, format: LogFormat) -> Result<(), SettingsError> {
    // s3s logs every refused request as an error, missing keys too; the S3 front end writes one line per request
    // itself.
    let quiet = if filter.contains("s3s") { filter.to_owned() } else { format!("{filter},s3s=off") };
    let filter = EnvFilter::try_new(quiet)
        .map_err(|error| SettingsError::invalid("--log", format!("`{filter}` is no filter: {error}")))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let begun = match format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    begun.map_err(|error| SettingsError::invalid("--log", error.to_string()))
}
