//! `granary config`: settings listed, and those of the whole cluster changed.

use super::admin_verbs::{Done, Target, QUICK};
use super::output::{print, print_json, say};
use crate::admin::api::{ConfigChanged, GetConfig, SetConfig, SettingRow};
use crate::settings::{SettingsArgs, SettingsError};
use clap::{Args, Subcommand};
use granary_placement::settings::{Program, Scope};
use std::io::{self, Write};
use std::process::ExitCode;

/// Without a cluster: the settings that a process started here, with these options, would have.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    settings: SettingsArgs,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Changes of a setting of the whole cluster; running gateways follow.
#[derive(Debug, Subcommand)]
enum Change {
    /// Give a setting of the whole cluster a value.
    Set {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
        #[command(flatten)]
        target: Target,
    },
    /// Put a setting of the whole cluster back to its default.
    Unset {
        /// Its name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
}

pub(super) async fn run(args: ConfigArgs) -> Done {
    match args.change {
        Some(Change::Set { name, value, target }) => change(&target, SetConfig { name, value: Some(value) }).await?,
        Some(Change::Unset { name, target }) => change(&target, SetConfig { name, value: None }).await?,
        None => list(&args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn change(target: &Target, request: SetConfig) -> Result<(), Box<dyn std::error::Error>> {
    let ConfigChanged { name, value } = target.ask(&request, QUICK).await?;
    Ok(print(|out| writeln!(out, "{name} is {value} from now on; running gateways follow within seconds"))?)
}

async fn list(args: &ConfigArgs) -> Result<(), Box<dyn std::error::Error>> {
    let named = args.target.is_named();
    if named && !args.settings.set.is_empty() {
        let why = "a running cluster has the settings it was started with; leave it out, or name no cluster";
        return Err(SettingsError::invalid("--set", why).into());
    }
    let rows = if named {
        args.target.ask(&GetConfig {}, QUICK).await?.settings
    } else {
        args.settings.load(Program::Dev)?.rows(|setting| setting.scope == Scope::Process)
    };
    if args.json {
        print_json(&rows)?;
        return Ok(());
    }
    print(|out| write_rows(out, &rows))?;
    if !named {
        say(
            "values of the scope cluster lie in the root shard: name a cluster with --dir, or --admin and --token-file",
        );
    }
    Ok(())
}

fn write_rows(out: &mut dyn Write, rows: &[SettingRow]) -> io::Result<()> {
    let mut line = |columns: [&str; 6], meaning: &str| {
        let [name, value, default, unit, scope, source] = columns;
        writeln!(out, "{name:<29} {value:<10} {default:<10} {unit:<16} {scope:<7} {source:<11} {meaning}")
    };
    line(["name", "value", "default", "unit", "scope", "source"], "meaning")?;
    for row in rows {
        let (value, source) = row.value.as_deref().map_or(("-", "-"), |value| (value, row.source.name()));
        line([&row.name, value, &row.default, &row.unit, &row.scope, source], &row.meaning)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_placement::settings::Values;

    #[test]
    fn the_list_shows_what_is_in_force_and_where_it_comes_from() {
        let values = Values::default().with("object.replay", "4096").unwrap();
        let mut text = Vec::new();
        write_rows(&mut text, &values.rows(|setting| setting.scope == Scope::Process)).unwrap();
        let text = String::from_utf8(text).unwrap();
        let row = |name: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            line.split_whitespace().take(6).map(str::to_owned).collect()
        };
        assert_eq!(row("object.replay"), ["object.replay", "4KiB", "8MiB", "bytes", "process", "--set"]);
        assert_eq!(row("s3.keep_alive"), ["s3.keep_alive", "2min", "2min", "time", "process", "default"]);
        assert_eq!(row("heal.interval"), ["heal.interval", "-", "2s", "time", "cluster", "-"]);
        assert_eq!(text.lines().count(), granary_placement::settings::TABLE.len() + 1);
    }
}
