//! The house rules that a compiler does not hold: the layer table, one door per foreign library, the top level.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Names under a section of a manifest.
fn section(manifest: &str, section: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join(manifest)).unwrap();
    let mut inside = false;
    let mut names = BTreeSet::new();
    for line in text.lines() {
        if line.starts_with('[') {
            inside = line.trim() == section;
        } else if inside {
            if let Some((name, _)) = line.split_once('=') {
                names.insert(name.trim().trim_end_matches(".workspace").to_owned());
            }
        }
    }
    names
}

fn dependencies(manifest: &str) -> BTreeSet<String> {
    let names = section(manifest, "[dependencies]");
    assert!(!names.is_empty(), "{manifest} has no [dependencies]");
    names
}

/// Folders of the workspace's crates.
fn members() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let list = text.lines().find_map(|line| line.strip_prefix("members = [")).unwrap();
    list.trim_end_matches(']').split(", ").map(|member| member.trim_matches('"').to_owned()).collect()
}

fn rust_files(folder: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "{folder} has no Rust file");
    files
}

/// Does code (comments aside) name the crate as a path, or one of its family: `tower_http` is of the family of `tower`?
fn names(text: &str, library: &str) -> bool {
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    text.lines().map(|line| line.split("//").next().unwrap_or("")).any(|line| {
        line.match_indices(library).any(|(at, _)| {
            let (before, after) = (&line[..at], &line[at + library.len()..]);
            let after = if after.starts_with('_') { after.trim_start_matches(is_word) } else { after };
            let is_path = after.starts_with("::") || (before.ends_with("use ") && !after.starts_with(is_word));
            is_path && !before.ends_with(|letter| is_word(letter) || letter == ':')
        })
    })
}

#[test]
fn a_crate_is_named_by_its_paths_and_by_those_of_its_family() {
    for (text, named) in [
        ("use openraft::Raft;", true),
        ("    let raft = openraft::Raft::new();", true),
        ("use openraft_rt_tokio::TokioRuntime;", true),
        ("type Runtime = openraft_rt_tokio::TokioRuntime;", true),
        ("use openraft_rt_tokio as runtime;", true),
        ("use openraft;", true),
        ("use openrafts::Raft;", false),
        ("use crate::openraft::Raft;", false),
        ("use no_openraft::Raft;", false),
        ("let openraft_log = log;", false),
        ("/// As [`openraft::Raft`] says.", false),
        ("EnvFilter::new(\"info,openraft=warn\")", false),
    ] {
        assert_eq!(names(text, "openraft"), named, "{text}");
    }
}

/// Files below `folder` whose code names the crate or one of its family.
fn naming(folder: &str, library: &str) -> BTreeSet<String> {
    rust_files(folder)
        .into_iter()
        .filter(|file| names(&std::fs::read_to_string(file).unwrap(), library))
        .map(|file| file.strip_prefix(root()).unwrap().display().to_string())
        .collect()
}

/// Each crate, and which of ours it may depend on, in its code and in its tests.
const LAYERS: [(&str, &[&str]); 9] = [
    ("placement", &[]),
    ("disk-node/wire", &["granary-placement"]),
    ("gateway/meta", &["granary-placement"]),
    ("gateway/replica", &["granary-placement", "granary-wire", "granary-meta"]),
    ("disk-node", &["granary-placement", "granary-wire", "granary-replica"]),
    ("gateway", &["granary-placement", "granary-wire", "granary-meta"]),
    ("tests/client", &[]),
    ("bench", &["granary-placement", "granary-s3-client"]),
    ("tests", &["granary-s3-client"]),
];

#[test]
fn the_layer_table_holds() {
    for (folder, allowed) in LAYERS {
        let manifest = format!("{folder}/Cargo.toml");
        let allowed: BTreeSet<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
        for part in ["[dependencies]", "[dev-dependencies]", "[build-dependencies]"] {
            let mut ours = section(&manifest, part);
            ours.retain(|name| name.starts_with("granary-"));
            assert!(ours.is_subset(&allowed), "{manifest} {part} names {ours:?}, allowed are {allowed:?}");
        }
    }
}

#[test]
fn the_layer_table_is_whole_and_in_the_architecture_page() {
    let folders: BTreeSet<String> = LAYERS.iter().map(|(folder, _)| (*folder).to_owned()).collect();
    assert_eq!(folders, members().into_iter().collect(), "tidy's table and the workspace's members");
    let page = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    for folder in folders {
        assert!(page.contains(&format!("\n| `{folder}` |")), "{folder} has no row in docs/ARCHITECTURE.md");
    }
}

#[test]
fn the_pure_crates_do_no_io_and_know_no_clock() {
    let pure: [(&str, &[&str]); 2] = [
        ("placement", &["reed-solomon-novelpoly", "serde", "strsim", "thiserror", "toml"]),
        ("gateway/meta", &["granary-placement", "bytes", "crc32fast", "postcard", "serde", "thiserror"]),
    ];
    for (folder, allowed) in pure {
        let foreign = dependencies(&format!("{folder}/Cargo.toml"));
        let allowed: BTreeSet<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
        assert!(foreign.is_subset(&allowed), "{folder} depends on {foreign:?}");
        for library in ["std::fs", "std::net", "std::time::Instant", "std::time::SystemTime", "std::thread", "tokio"] {
            assert_eq!(naming(&format!("{folder}/src"), library), BTreeSet::new(), "{library} in {folder}");
        }
    }
}

#[test]
fn the_disk_node_knows_the_replica_crate_in_one_file() {
    let files = naming("disk-node/src", "granary_replica");
    assert_eq!(files, ["disk-node/src/roles.rs".to_owned()].into());
}

#[test]
fn each_foreign_library_has_one_door() {
    assert_eq!(
        naming("disk-node/src", "rocksdb").len(),
        1,
        "RocksDB in the disk node: {:?}",
        naming("disk-node/src", "rocksdb")
    );
    assert_eq!(
        naming("gateway/replica/src", "rocksdb").len(),
        1,
        "RocksDB in the replica crate: {:?}",
        naming("gateway/replica/src", "rocksdb")
    );
    for file in naming("gateway/replica/src", "openraft") {
        assert!(
            file == "gateway/replica/src/log.rs" || file.starts_with("gateway/replica/src/raft/"),
            "openraft in {file}"
        );
    }
    for (folder, library, door) in [
        ("gateway/src", "s3s", "gateway/src/s3/"),
        ("gateway/src", "percent_encoding", "gateway/src/s3/"),
        ("gateway/src", "form_urlencoded", "gateway/src/s3/"),
        ("gateway/src", "axum", "gateway/src/admin/"),
        ("gateway/src", "tower", "gateway/src/admin/"),
        ("gateway/src", "tower_http", "gateway/src/admin/"),
        ("gateway/src", "askama", "gateway/src/admin/"),
        ("placement/src", "toml", "placement/src/settings/"),
    ] {
        for file in naming(folder, library) {
            assert!(file.starts_with(door), "{library} in {file}, which is not in {door}");
        }
    }
    for (folder, library) in [
        ("gateway/src", "rocksdb"),
        ("gateway/src", "openraft"),
        ("gateway/src", "granary_replica"),
        ("disk-node/src", "openraft"),
        ("disk-node/src", "s3s"),
        ("disk-node/src", "axum"),
        ("disk-node/wire/src", "openraft"),
    ] {
        assert_eq!(naming(folder, library), BTreeSet::new(), "{library} in {folder}");
    }
}

/// What Cargo would compile: for each unit of a crate that is not ours, the sets of features it is compiled with.
fn foreign_units(plans: &[&[&str]]) -> BTreeMap<String, BTreeSet<String>> {
    let mut units: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let target = tempfile::tempdir().unwrap();
    for plan in plans {
        let done = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(*plan)
            .args(["--release", "--locked", "--offline", "--ignore-rust-version", "--workspace"])
            .args(["-Z", "unstable-options", "--unit-graph"])
            .current_dir(root())
            // Only prints the plan; stable Cargo shows it when told to behave as its own bootstrap does.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", target.path())
            .output()
            .unwrap();
        assert!(done.status.success(), "{plan:?}: {}", String::from_utf8_lossy(&done.stderr));
        let graph: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        for unit in graph["units"].as_array().unwrap() {
            let package = unit["pkg_id"].as_str().unwrap();
            let kind = unit["target"]["kind"].to_string();
            // A build script takes the features of the crate it belongs to, which may be two sets: one for macros, one
            // for the program.
            if package.starts_with("registry+") && !kind.contains("custom-build") {
                let (_, package) = package.rsplit_once('#').unwrap();
                // What macros and build scripts depend on has its own optimisation level, and so is compiled for them
                // alone.
                let name = format!("{package} {kind} {} at level {}", unit["mode"], unit["profile"]["opt_level"]);
                units.entry(name).or_default().insert(unit["features"].to_string());
            }
        }
    }
    units
}

#[test]
fn make_run_and_make_test_compile_each_foreign_crate_once() {
    let units = foreign_units(&[&["build", "--bins"], &["test", "--no-run"]]);
    assert!(units.keys().any(|name| name.starts_with("rocksdb@")), "{:?}", units.keys());
    let twice: Vec<_> = units.iter().filter(|(_, features)| features.len() > 1).collect();
    assert!(twice.is_empty(), "compiled more than once, with these features: {twice:#?}");
}

#[test]
fn the_top_level_is_what_the_design_names() {
    let allowed: BTreeSet<&str> = [
        ".ci",
        ".git",
        ".github",
        ".gitignore",
        ".granary",
        ".gitattributes",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "Makefile",
        "README.md",
        "bench",
        "clippy.toml",
        "disk-node",
        "docs",
        "gateway",
        "helm",
        "placement",
        "rustfmt.toml",
        "target",
        "tests",
    ]
    .into();
    for entry in std::fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(allowed.contains(name.as_str()), "{name} at the top level");
    }
}

#[test]
fn no_source_file_is_longer_than_one_sitting() {
    // With their folders below: tests, nested crates.
    for folder in ["placement", "disk-node", "gateway", "bench", "tests"] {
        for file in rust_files(folder) {
            let lines = std::fs::read_to_string(&file).unwrap().lines().count();
            assert!(lines <= 900, "{} has {lines} lines", file.display());
        }
    }
}

#[test]
fn comments_keep_within_120_columns() {
    let mut long = Vec::new();
    for folder in ["placement", "disk-node", "gateway", "bench", "tests"] {
        for file in rust_files(folder) {
            let text = std::fs::read_to_string(&file).unwrap();
            let mut drawing = false;
            for (number, line) in text.lines().enumerate() {
                let comment = line.trim_start().starts_with("//");
                drawing ^= comment && line.contains("```");
                // A drawing and a row of a table cannot be broken.
                if comment && !drawing && !line.ends_with('|') && line.chars().count() > 120 {
                    long.push(format!("{}:{}", file.strip_prefix(root()).unwrap().display(), number + 1));
                }
            }
        }
    }
    assert!(long.is_empty(), "comments beyond 120 columns: {long:#?}");
}

#[test]
fn a_folder_of_modules_has_its_head_inside() {
    for folder in ["placement", "disk-node", "gateway", "bench", "tests"] {
        for file in rust_files(folder) {
            let beside = file.with_extension("");
            let modules = std::fs::read_dir(&beside).into_iter().flatten().flatten();
            let modules = modules.filter(|entry| entry.path().extension().is_some_and(|end| end == "rs")).count();
            assert_eq!(modules, 0, "{}: its head belongs into {}/mod.rs", file.display(), beside.display());
        }
    }
}

#[test]
fn every_byte_format_has_a_page() {
    for page in ["cluster-map", "codec-np16", "chunk-store", "wire", "metadata"] {
        let path = root().join(format!("docs/formats/{page}.md"));
        assert!(path.exists(), "{} is missing", path.display());
    }
}

#[test]
fn no_secret_has_a_default() {
    for folder in ["disk-node/wire/src", "disk-node/src", "gateway/src"] {
        for file in rust_files(folder) {
            let text = std::fs::read_to_string(&file).unwrap();
            for forbidden in ["minioadmin", "changeme", "default_secret", "DEFAULT_SECRET"] {
                assert!(!text.contains(forbidden), "{forbidden} in {}", file.display());
            }
        }
    }
}

/// Names of the test functions of each Rust file, by the file's path.
fn tests_by_file() -> BTreeMap<String, BTreeSet<String>> {
    let mut tests = BTreeMap::new();
    for folder in ["placement", "disk-node", "gateway", "bench", "tests"] {
        for file in rust_files(folder) {
            let text = std::fs::read_to_string(&file).unwrap();
            let mut attributed = false;
            let mut names = BTreeSet::new();
            for line in text.lines().map(str::trim) {
                let name =
                    line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next());
                match name {
                    Some(name) if attributed => {
                        names.insert(name.to_owned());
                        attributed = false;
                    }
                    Some(_) => attributed = false,
                    None => attributed |= line == "#[test]" || line.starts_with("#[tokio::test"),
                }
            }
            tests.insert(file.strip_prefix(root()).unwrap().display().to_string(), names);
        }
    }
    tests
}

/// A row of evidence leads to its tests: each is there, and in a file or folder that the row names, if it names one.
#[test]
fn every_test_that_the_reliability_page_names_is_where_it_says() {
    let tests = tests_by_file();
    let page = std::fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for line in page.lines().filter(|line| line.starts_with('|')) {
        let words: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        let (paths, names): (Vec<&str>, Vec<&str>) =
            words.iter().filter(|word| !word.contains(' ')).partition(|word| word.contains('/'));
        for path in &paths {
            if !root().join(path).exists() {
                wrong.push(format!("there is no {path}"));
            }
        }
        for name in names.into_iter().filter(|name| name.matches('_').count() >= 2 && name.to_lowercase() == **name) {
            seen += 1;
            let mut files = tests.iter().filter(|(_, names)| names.contains(name)).map(|(file, _)| file).peekable();
            if files.peek().is_none() {
                wrong.push(format!("there is no test {name}"));
            } else if !paths.is_empty() && !files.any(|file| paths.iter().any(|path| file.starts_with(path))) {
                wrong.push(format!("{name} is in none of {paths:?}"));
            }
        }
        // What one types: the suite and a part of the test's name.
        for command in words.iter().filter(|word| word.contains("make test ARGS=")) {
            let arguments = command.split('\'').nth(1).unwrap_or_default();
            let (suites, name) = arguments.split_once(" -- ").unwrap_or((arguments, ""));
            for suite in suites.split_whitespace().filter(|word| *word != "--test") {
                seen += 1;
                let ends = [format!("tests/{suite}.rs"), format!("tests/{suite}/")];
                let mut of_suite = tests.iter().filter(|(file, _)| ends.iter().any(|end| file.contains(end.as_str())));
                let found = of_suite.any(|(file, names)| {
                    file.contains(&format!("/{name}.rs")) || names.iter().any(|test| test.contains(name))
                });
                if !found {
                    wrong.push(format!("`{command}` runs no test"));
                }
            }
        }
    }
    assert!(seen > 50, "the page's form has changed: {seen} names found");
    assert!(wrong.is_empty(), "docs/reliability.md: {wrong:#?}");
}
