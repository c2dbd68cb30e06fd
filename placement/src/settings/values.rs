//! What an operator gave for the settings, and where: the command line counts before the environment, that before a
//! file, that before the default.
//!
//! A file or the environment may serve all programs of a machine: what another program reads is checked and otherwise
//! left alone. The command line is for one program, which refuses what it would not read.

use super::{cut, find, nearest, Scope, Setting, SettingError, Value, TABLE};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Begins every environment variable of a setting.
pub const VARIABLE_PREFIX: &str = "GRANARY_";

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// Nobody gave one.
    Default,
    /// The root shard.
    Cluster,
    /// `--config FILE`.
    File,
    /// An environment variable.
    Environment,
    /// `--set`.
    CommandLine,
}

impl Source {
    /// Word for lists.
    pub fn name(self) -> &'static str {
        match self {
            Source::Default => "default",
            Source::Cluster => "cluster",
            Source::File => "file",
            Source::Environment => "environment",
            Source::CommandLine => "--set",
        }
    }
}

/// Who reads the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `granary dev`: a gateway, disk nodes, and the cluster's own settings.
    Dev,
    /// `granary gateway`.
    Gateway,
    /// `granary-disk-node serve`.
    DiskNode,
}

impl Program {
    fn reads(self, setting: &Setting) -> bool {
        match self {
            Program::Dev => true,
            Program::Gateway => !setting.is_for_disk_nodes(),
            Program::DiskNode => setting.is_for_disk_nodes(),
        }
    }
}

/// What was given, as text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Layers<'a> {
    /// `NAME=VALUE` of each `--set`, in order; a later one replaces an earlier one.
    pub set: &'a [String],
    /// All environment variables; those that name no setting are left alone.
    pub environment: &'a [(String, String)],
    /// Name and text of the TOML file.
    pub file: Option<(&'a str, &'a str)>,
}

/// Settings that were given but do not stand. The text begins with where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// A name or value.
    #[error("{origin}: {source}")]
    Setting {
        /// `--set`, the variable, or the file.
        origin: String,
        /// What is wrong.
        #[source]
        source: SettingError,
    },
    /// Anything else.
    #[error("{origin}: {why}")]
    Form {
        /// As above.
        origin: String,
        /// What is wrong, and what to do.
        why: String,
    },
}

fn form(origin: &str, why: impl Into<String>) -> LoadError {
    LoadError::Form { origin: cut(origin), why: why.into() }
}

/// Values of all settings: those given, and defaults for the others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Values {
    given: BTreeMap<&'static str, (Value, Source)>,
}

/// One setting for lists, as the admin API tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// The value in force; None where whoever answers does not know it.
    pub value: Option<String>,
    /// The default.
    pub default: String,
    /// Its unit.
    pub unit: String,
    /// `cluster` or `process`.
    pub scope: String,
    /// Where the value comes from.
    pub source: Source,
    /// What it does.
    pub meaning: String,
}

impl Values {
    /// Puts the layers together.
    ///
    /// # Errors
    /// The first thing that does not stand; nothing is used then.
    pub fn load(program: Program, layers: Layers<'_>) -> Result<Values, LoadError> {
        let mut values = Values::default();
        if let Some((file, text)) = layers.file {
            for (name, value) in read_toml(file, text)? {
                values.take(program, file, &name, &value, Source::File)?;
            }
        }
        for (variable, value) in layers.environment {
            if let Some(name) = name_of_variable(variable)? {
                values.take(program, variable, name, value, Source::Environment)?;
            }
        }
        for given in layers.set {
            let (name, value) = given.split_once('=').ok_or_else(|| {
                form("--set", format!("`{}` must be NAME=VALUE, such as object.hedge_percent=5", cut(given)))
            })?;
            values.take(program, "--set", name.trim(), value, Source::CommandLine)?;
        }
        Ok(values)
    }

    fn take(
        &mut self,
        program: Program,
        origin: &str,
        name: &str,
        text: &str,
        source: Source,
    ) -> Result<(), LoadError> {
        let wrong = |source| LoadError::Setting { origin: cut(origin), source };
        let setting = find(name).map_err(wrong)?;
        let value = setting.parse(text).map_err(wrong)?;
        if setting.scope == Scope::Cluster && program != Program::Dev {
            let why = format!(
                "`{name}` is one for the whole cluster and is kept there: `granary config set {name} {}`",
                setting.render(&value)
            );
            return Err(form(origin, why));
        }
        if !program.reads(setting) {
            if source == Source::CommandLine {
                let (reads, here) = if setting.is_for_disk_nodes() {
                    ("disk nodes", "give it to `granary-disk-node serve`, or to `granary dev`")
                } else {
                    ("gateways", "give it to `granary gateway`, or to `granary dev`")
                };
                return Err(form(origin, format!("`{name}` is read by {reads}: {here}")));
            }
            return Ok(());
        }
        self.given.insert(setting.name, (value, source));
        Ok(())
    }

    /// The same values and one more, for tests and tools.
    ///
    /// # Errors
    /// No such setting, or it cannot have this value.
    pub fn with(mut self, name: &str, value: &str) -> Result<Values, SettingError> {
        let (setting, value) = super::check(name, value)?;
        self.given.insert(setting.name, (value, Source::CommandLine));
        Ok(self)
    }

    /// Takes out what was given for settings of the whole cluster, as name and value: it belongs in the root shard.
    pub fn take_cluster(&mut self) -> Vec<(&'static str, String)> {
        let cluster = TABLE.iter().filter(|setting| setting.scope == Scope::Cluster);
        cluster
            .filter_map(|setting| {
                let (value, _) = self.given.remove(setting.name)?;
                Some((setting.name, setting.render(&value)))
            })
            .collect()
    }

    /// The same values with those of the root shard. What this build does not know, or cannot read, stays at its
    /// default and is answered: a newer build may have set it.
    pub fn with_cluster(&self, cluster: &BTreeMap<String, String>) -> (Values, Vec<SettingError>) {
        let mut values = self.clone();
        let mut unknown = Vec::new();
        values.given.retain(|_, (_, source)| *source != Source::Cluster);
        for (name, text) in cluster {
            match super::check(name, text) {
                Ok((setting, value)) => {
                    values.given.insert(setting.name, (value, Source::Cluster));
                }
                Err(error) => unknown.push(error),
            }
        }
        (values, unknown)
    }

    /// What was given to the disk nodes of `granary dev`, as arguments of their `--set`.
    pub fn node_arguments(&self) -> Vec<String> {
        let nodes = TABLE.iter().filter(|setting| setting.is_for_disk_nodes());
        nodes
            .filter_map(|setting| {
                let (value, _) = self.given.get(setting.name)?;
                Some(format!("{}={}", setting.name, setting.render(value)))
            })
            .collect()
    }

    /// All settings with the values in force; those for which `known` says no have none.
    pub fn rows(&self, known: impl Fn(&Setting) -> bool) -> Vec<Row> {
        TABLE
            .iter()
            .map(|setting| {
                let (value, source) = self
                    .given
                    .get(setting.name)
                    .map_or((&setting.default, Source::Default), |(value, source)| (value, *source));
                Row {
                    name: setting.name.to_owned(),
                    value: known(setting).then(|| setting.render(value)),
                    default: setting.render(&setting.default),
                    unit: setting.kind.unit().to_owned(),
                    scope: setting.scope.name().to_owned(),
                    source,
                    meaning: setting.meaning.to_owned(),
                }
            })
            .collect()
    }

    /// The value in force.
    ///
    /// # Panics
    /// No setting has that name: a mistake in this program, which the test of each `from_settings` finds.
    fn value(&self, name: &str) -> &Value {
        match (self.given.get(name), find(name)) {
            (Some((value, _)), _) => value,
            (None, Ok(setting)) => &setting.default,
            (None, Err(error)) => panic!("{error}"),
        }
    }

    /// A time.
    ///
    /// # Panics
    /// It is no setting, or none of this kind: a mistake in this program. So do the others below.
    pub fn time(&self, name: &str) -> Duration {
        match self.value(name) {
            Value::Time(time) => *time,
            other => panic!("{name} is no time: {other:?}"),
        }
    }

    /// A number or size.
    ///
    /// # Panics
    /// As [`Values::time`].
    pub fn number(&self, name: &str) -> u64 {
        match self.value(name) {
            Value::Number(number) => *number,
            other => panic!("{name} is no number: {other:?}"),
        }
    }

    /// A number or size of things in memory.
    ///
    /// # Panics
    /// As [`Values::time`].
    pub fn size(&self, name: &str) -> usize {
        usize::try_from(self.number(name)).unwrap_or(usize::MAX)
    }

    /// A number or size; None: to be worked out.
    ///
    /// # Panics
    /// As [`Values::time`].
    pub fn number_or_auto(&self, name: &str) -> Option<u64> {
        match self.value(name) {
            Value::Auto => None,
            _ => Some(self.number(name)),
        }
    }

    /// Yes or no.
    ///
    /// # Panics
    /// As [`Values::time`].
    pub fn flag(&self, name: &str) -> bool {
        match self.value(name) {
            Value::Flag(flag) => *flag,
            other => panic!("{name} is no flag: {other:?}"),
        }
    }

    /// Text.
    ///
    /// # Panics
    /// As [`Values::time`].
    pub fn text(&self, name: &str) -> &str {
        match self.value(name) {
            Value::Text(text) => text,
            other => panic!("{name} is no text: {other:?}"),
        }
    }
}

/// The setting that a variable names. A variable that is a slip away from one is refused; any other is somebody else's.
fn name_of_variable(variable: &str) -> Result<Option<&'static str>, LoadError> {
    let Some(rest) = variable.strip_prefix(VARIABLE_PREFIX) else { return Ok(None) };
    if let Some(setting) = TABLE.iter().find(|setting| setting.variable() == variable) {
        return Ok(Some(setting.name));
    }
    let section = TABLE.iter().find(|setting| {
        rest.strip_prefix(&setting.section().to_ascii_uppercase()).is_some_and(|rest| rest.starts_with('_'))
    });
    let Some(section) = section.map(Setting::section) else { return Ok(None) };
    let name = rest.to_ascii_lowercase().replacen('_', ".", 1);
    match nearest(&name).and_then(|near| find(near).ok()) {
        Some(near) if near.section() == section => {
            Err(form(variable, format!("no setting has this variable; did you mean `{}`?", near.variable())))
        }
        _ => Ok(None),
    }
}

/// Names and values of a TOML file: `[heal]` and `interval = "2s"`, or `heal.interval = "2s"`.
fn read_toml(file: &str, text: &str) -> Result<Vec<(String, String)>, LoadError> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text.get(..span.start).unwrap_or_default().matches('\n').count() + 1);
        form(file, format!("line {line} is no TOML: {}", cut(error.message())))
    })?;
    let mut found = Vec::new();
    for (section, inside) in table {
        let toml::Value::Table(inside) = inside else {
            return Err(form(file, format!("`{}` stands in no section, such as [object]", cut(&section))));
        };
        for (name, value) in inside {
            let name = format!("{section}.{name}");
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                _ => return Err(form(file, format!("`{}` must be text, a whole number, true or false", cut(&name)))),
            };
            found.push((name, value));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn load(program: Program, set: &[&str], environment: &[(&str, &str)], file: &str) -> Result<Values, String> {
        let set = strings(set);
        let environment: Vec<(String, String)> =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let layers = Layers { set: &set, environment: &environment, file: Some(("granary.toml", file)) };
        Values::load(program, layers).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_counts_before_the_environment_before_the_file_before_the_default() {
        let file =
            "[object]\nhedge_percent = 1\nread_deadline = \"1s\"\nwrite_deadline = \"1s\"\n[s3]\nmax_requests = 5\n";
        let environment =
            [("GRANARY_OBJECT_HEDGE_PERCENT", "2"), ("GRANARY_OBJECT_READ_DEADLINE", "2s"), ("HOME", "/")];
        let set = ["object.hedge_percent=9", "object.hedge_percent=3"];
        let values = load(Program::Gateway, &set, &environment, file).unwrap();
        assert_eq!(values.number("object.hedge_percent"), 3);
        assert_eq!(values.time("object.read_deadline"), Duration::from_secs(2));
        assert_eq!(values.time("object.write_deadline"), Duration::from_secs(1));
        assert_eq!(values.size("s3.max_requests"), 5);
        assert_eq!(values.number("object.replay"), 8 << 20);
        let sources: BTreeMap<String, Source> =
            values.rows(|_| true).into_iter().map(|row| (row.name, row.source)).collect();
        assert_eq!(sources["object.hedge_percent"], Source::CommandLine);
        assert_eq!(sources["object.read_deadline"], Source::Environment);
        assert_eq!(sources["object.write_deadline"], Source::File);
        assert_eq!(sources["object.replay"], Source::Default);
    }

    #[test]
    fn what_does_not_stand_is_refused_with_its_origin_and_what_would_be_right() {
        let none: &[(&str, &str)] = &[];
        for (set, environment, file, said) in [
            (vec!["object.hedge_percnt=1"], none, "", "--set: there is no setting `object.hedge_percnt`; did you mean `object.hedge_percent`?"),
            (vec!["object.hedge_percent"], none, "", "--set: `object.hedge_percent` must be NAME=VALUE, such as"),
            (vec!["object.hedge_percent=200"], none, "", "it is a percentage from 0% to 100%"),
            (vec![], &[("GRANARY_OBJECT_HEDGE_PERCNT", "1")], "", "GRANARY_OBJECT_HEDGE_PERCNT: no setting has this variable; did you mean `GRANARY_OBJECT_HEDGE_PERCENT`?"),
            (vec![], &[("GRANARY_OBJECT_REPLAY", "many")], "", "GRANARY_OBJECT_REPLAY: `object.replay` cannot be `many`"),
            (vec![], none, "[object]\nreplya = 1", "granary.toml: there is no setting `object.replya`; did you mean `object.replay`?"),
            (vec![], none, "[object]\nreplay = 1.5", "granary.toml: `object.replay` must be text, a whole number"),
            (vec![], none, "replay = 1", "granary.toml: `replay` stands in no section"),
            (vec![], none, "[object]\n\nreplay = = 1", "granary.toml: line 3 is no TOML"),
            (vec!["heal.interval=5s"], none, "", "`granary config set heal.interval 5s`"),
            (vec![], none, "[heal]\ninterval = \"5s\"", "granary.toml: `heal.interval` is one for the whole cluster"),
            (vec!["node.segment=16MiB"], none, "", "`node.segment` is read by disk nodes"),
        ] {
            let error = load(Program::Gateway, &set, environment, file).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        assert!(load(Program::DiskNode, &["object.replay=1"], &[], "").unwrap_err().contains("is read by gateways"));
    }

    #[test]
    fn a_file_and_an_environment_may_serve_all_programs_and_strangers_are_left_alone() {
        let file = "object.hedge_percent = 1\nnode.segment = \"16MiB\"\n";
        // What Kubernetes puts into the environment of a pod beside a service named granary-s3.
        let environment = [
            ("GRANARY_S3_SERVICE_HOST", "10.0.0.1"),
            ("GRANARY_S3_PORT", "tcp://10.0.0.1:9000"),
            ("GRANARY_LOG", "info"),
        ];
        let gateway = load(Program::Gateway, &[], &environment, file).unwrap();
        let node = load(Program::DiskNode, &[], &environment, file).unwrap();
        assert_eq!((gateway.number("object.hedge_percent"), node.number("object.hedge_percent")), (1, 10));
        assert_eq!((gateway.number("node.segment"), node.number("node.segment")), (256 << 20, 16 << 20));
        assert!(
            load(Program::Gateway, &[], &[], "node.segment = \"big\"").is_err(),
            "what is not read is checked all the same"
        );
    }

    #[test]
    fn granary_dev_splits_what_it_is_given_between_cluster_disk_nodes_and_itself() {
        let set = ["heal.interval=90s", "node.reserve=auto", "node.segment=16777216", "object.replay=0"];
        let mut values = load(Program::Dev, &set, &[], "").unwrap();
        assert_eq!(values.take_cluster(), [("heal.interval", "90s".to_owned())]);
        assert_eq!(values.time("heal.interval"), Duration::from_secs(2));
        assert_eq!(values.node_arguments(), ["node.reserve=auto", "node.segment=16MiB"]);
        assert_eq!((values.number("object.replay"), values.number_or_auto("node.reserve")), (0, None));
        assert_eq!(values.number_or_auto("node.segment"), Some(16 << 20));
    }

    #[test]
    fn the_clusters_values_replace_each_other_and_strange_ones_are_told() {
        let cluster = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let own = load(Program::Gateway, &["object.replay=0"], &[], "").unwrap();
        let given = cluster(&[("heal.interval", "5s"), ("heal.rate", "much"), ("heal.of_a_newer_build", "1")]);
        let (values, unknown) = own.with_cluster(&given);
        assert_eq!((values.time("heal.interval"), values.number("object.replay")), (Duration::from_secs(5), 0));
        assert_eq!((values.number("heal.rate"), unknown.len()), (512 << 20, 2));
        let (values, unknown) = values.with_cluster(&cluster(&[]));
        assert_eq!((values, unknown), (own, vec![]));
    }
}
