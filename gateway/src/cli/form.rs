//! In which form a verb prints.

use clap::{Args, ValueEnum};

/// Text for people, or JSON for programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Form {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// The option of that.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct FormArgs {
    /// Form of what is printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Form,
    /// The same as `--output json`.
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

impl FormArgs {
    pub(super) fn is_json(self) -> bool {
        self.json || self.output == Form::Json
    }
}
