//! What the real `granary` does with its standard output: a reader that goes away, a disk that is full.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::process::{Command, Output, Stdio};

/// Verbs that print something without a cluster.
const PRINTING: [&[&str]; 3] = [&["--help"], &["--version"], &["disk", "replace", "--help"]];

fn granary(args: &[&str], out: Stdio) -> Output {
    Command::new(env!("CARGO_BIN_EXE_granary")).args(args).stdin(Stdio::null()).stdout(out).output().unwrap()
}

#[test]
fn a_reader_that_goes_away_ends_a_verb_quietly_with_the_exit_code_of_a_closed_pipe() {
    for args in PRINTING {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let said = granary(args, writer.into());
        assert_eq!((said.status.code(), String::from_utf8_lossy(&said.stderr).as_ref()), (Some(141), ""), "{args:?}");
    }
}

#[test]
fn a_full_disk_behind_standard_output_is_one_clear_line() {
    for args in PRINTING {
        let said = granary(args, File::create("/dev/full").unwrap().into());
        let text = String::from_utf8_lossy(&said.stderr);
        assert_eq!(said.status.code(), Some(1), "{args:?}");
        assert!(text.starts_with("granary: standard output: ") && text.lines().count() == 1, "{args:?}: {text}");
    }
}

#[test]
fn errors_of_verbs_are_one_clear_line() {
    let empty = tempfile::tempdir().unwrap();
    let dir = empty.path().to_str().unwrap();
    for (args, expected) in [
        (&["status", "--dir", dir] as &[&str], "has `granary dev` been started on it?"),
        (&["map"], "name one: the directory, or the address"),
        (&["gateway", "--map", "/none", "--secret-file", "/none"], "--root-credentials"),
        (&["init", "--config", "/none", "--secret-file", "/none", "--map-out", "/none"], "/none"),
    ] {
        let said = granary(args, Stdio::null());
        let text = String::from_utf8_lossy(&said.stderr);
        assert_eq!(said.status.code(), Some(1), "{args:?}: {text}");
        let good = text.starts_with("granary: ") && text.lines().count() == 1 && text.contains(expected);
        assert!(good, "{args:?}: {text}");
    }
}
