//! docs/settings.md is made from the table, and the table holds only what is read. `GRANARY_WRITE_GOLDEN=1` writes the
//! page anew.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use granary_placement::settings::{Scope, Setting, TABLE};
use std::fmt::Write;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

const HEAD: &str = "\
# Settings

This page is made from the table in `placement/src/settings/table.rs`, by its test; `granary config` prints the same
with the values in force.

A setting of scope *process* belongs to one process. It is given, in this order of precedence, by

1. `--set NAME=VALUE`, as often as needed, to `granary dev`, `granary gateway` or `granary-disk-node serve`;
2. the environment: `GRANARY_OBJECT_REPLAY` for `object.replay`;
3. a TOML file, `--config FILE` or `GRANARY_CONFIG`: `[object]`, then `replay = \"8MiB\"`. One file may serve all
   programs of a machine;
4. the default.

Settings of the section `node` are read by disk nodes, all others by gateways; `granary dev` takes both.

A setting of scope *cluster* is one value for the whole cluster, kept in the root shard. `granary config set NAME VALUE`
changes it, `granary config unset NAME` puts it back to its default, and running gateways follow within seconds.
`granary dev` also takes it from `--set`, environment and file, puts it there, and says so.

A time is a number and `ms`, `s`, `min`, `h` or `d`; a size is a number of bytes, or a number and `KiB`, `MiB`, `GiB` or
`TiB`. What makes no sense is refused with what would.
";

fn page() -> String {
    let mut page = HEAD.to_owned();
    let mut section = "";
    for setting in TABLE {
        if setting.section() != section {
            section = setting.section();
            write!(page, "\n## {section}\n\n| name | default | unit | scope | meaning |\n|---|---|---|---|---|\n")
                .unwrap();
        }
        let default = setting.render(&setting.default);
        let Setting { name, kind, scope, meaning, .. } = setting;
        writeln!(page, "| `{name}` | {default} | {} | {} | {meaning} |", kind.unit(), scope.name()).unwrap();
    }
    page
}

#[test]
fn the_page_of_settings_says_what_the_table_says() {
    let (path, page) = (root().join("docs/settings.md"), page());
    if std::env::var_os("GRANARY_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == page, "{} is not the table's: GRANARY_WRITE_GOLDEN=1 writes it anew", path.display());
}

fn sources(folder: &Path, into: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push(std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_setting_is_read_by_the_program_that_the_table_names() {
    let read = |folders: &[&str]| {
        let mut texts = Vec::new();
        folders.iter().for_each(|folder| sources(&root().join(folder), &mut texts));
        texts.retain(|text| text.contains("fn from_settings("));
        texts.concat()
    };
    let gateway = read(&["gateway/src", "disk-node/wire/src"]);
    let node = read(&["disk-node/src", "disk-node/wire/src", "gateway/replica/src"]);
    for setting in TABLE {
        let code = if setting.is_for_disk_nodes() { &node } else { &gateway };
        assert!(code.contains(&format!("(\"{}\")", setting.name)), "{} is listed, but nothing reads it", setting.name);
        assert!(
            setting.scope == Scope::Process || !setting.is_for_disk_nodes(),
            "disk nodes do not ask the root shard"
        );
    }
}
