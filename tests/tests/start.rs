//! What `granary dev` and the other programs say when they cannot start: one clear line, exit code 1, and nothing
//! changed on disk. And settings, from the command line to the running cluster.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use granary_tests::cluster::{bin, free_ports, scratch, Cluster, Options};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Longer than anything here takes; what hangs ends with its name.
const PATIENCE: Duration = Duration::from_secs(60);

/// Everything below a folder: paths, and what files hold.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path.clone());
                found.insert(path, None);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                found.insert(path, Some(bytes));
            }
        }
    }
    found
}

/// A command that knows nothing of the environment's Granary.
fn program(name: &str) -> Command {
    let mut command = Command::new(bin(name));
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("GRANARY_") {
            command.env_remove(variable);
        }
    }
    command
}

fn dev(dir: &Path, more: &[&str]) -> Command {
    let [s3, admin] = free_ports().map(|port: u16| format!("127.0.0.1:{port}"));
    let mut command = program("granary");
    // What is said last of an option counts, so a test may name an address again.
    command.arg("dev").arg("--dir").arg(dir);
    if !more.contains(&"--s3") {
        command.args(["--s3", &s3]);
    }
    if !more.contains(&"--admin") {
        command.args(["--admin", &admin]);
    }
    command.args(more);
    command
}

/// It failed with exit code 1 and one line that says all of this.
fn refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(output.stdout.is_empty(), "{:?}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

#[test]
fn a_used_port_is_told_with_the_option_and_no_folder_is_made() {
    let folder = scratch("start-port");
    let dir = folder.path().join("cluster");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for option in ["--s3", "--admin"] {
        let output = dev(&dir, &[option, &address]).output().unwrap();
        refused(&output, &[option, &address, "another program listens there"]);
        assert!(!dir.exists());
    }
}

#[test]
fn a_foreign_folder_another_versions_data_and_a_file_are_told_and_left_alone() {
    let folder = scratch("start-foreign");
    let letters = folder.path().join("letters");
    std::fs::create_dir_all(letters.join("from-home")).unwrap();
    std::fs::write(letters.join("from-home/first.txt"), "dear").unwrap();
    let old = folder.path().join("old");
    std::fs::create_dir_all(old.join("disks/disk-1")).unwrap();
    std::fs::write(old.join("dev.json"), r#"{"version":1,"cluster_id":"x","something":"of old"}"#).unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let before = contents(folder.path());
    for (name, words) in [
        ("letters", vec!["is not empty and holds no Granary cluster", "`from-home`"]),
        ("old", vec!["holds data of format 1", "made by granary 0.1.0", "another --dir"]),
        ("file", vec!["is a file, not a folder"]),
    ] {
        let dir = folder.path().join(name);
        let path = dir.display().to_string();
        refused(&dev(&dir, &[]).output().unwrap(), &[&words[..], &[path.as_str()]].concat());
    }
    assert_eq!(contents(folder.path()), before);
}

/// Runs `granary dev` on a file system of its own, seen by it alone; gives what it said, and what lies there
/// afterwards.
fn on_a_file_system(size: &str, and_then: &str, more: &[&str]) -> (Output, String) {
    let folder = scratch("start-mount");
    let dir = folder.path().join("mounted");
    std::fs::create_dir(&dir).unwrap();
    let listing = folder.path().join("listing");
    let script = format!(
        "mount -t tmpfs -o size={size} none \"$0\" && {and_then} && shift && \"$@\"; code=$?; ls -A \"$0\" > {}; exit $code",
        listing.display()
    );
    let command = dev(&dir, more);
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.arg("--map-root-user");
    }
    unshare.args(["--mount", "sh", "-c", &script]).arg(&dir).arg("shifted").arg(command.get_program());
    unshare.args(command.get_args());
    for (variable, value) in command.get_envs() {
        if value.is_none() {
            unshare.env_remove(variable);
        }
    }
    let output = unshare.output().unwrap();
    (output, std::fs::read_to_string(listing).unwrap())
}

#[test]
fn a_full_disk_and_a_read_only_one_are_told_and_nothing_is_written() {
    let (output, there) = on_a_file_system("100m", "true", &[]);
    refused(&output, &["has 100 MiB free", "a new cluster of 8 disks needs at least 256 MiB"]);
    assert_eq!(there, "");
    let (output, there) = on_a_file_system("1g", "mount -o remount,bind,ro \"$0\"", &[]);
    refused(&output, &["is on a file system that is mounted read-only"]);
    assert_eq!(there, "");
}

#[test]
fn a_wrong_setting_is_refused_by_every_program_with_the_nearest_right_one() {
    let folder = scratch("start-settings");
    let dir = folder.path().join("cluster");
    let file = folder.path().join("granary.toml");
    std::fs::write(&file, "[object]\nreplay = \"8MB\"\n").unwrap();
    let file = file.display().to_string();
    let output = dev(&dir, &["--set", "heal.intervall=5s"]).output().unwrap();
    refused(&output, &["--set", "no setting `heal.intervall`", "did you mean `heal.interval`?"]);
    let output = dev(&dir, &[]).env("GRANARY_OBJECT_HEDGE_PERCENT", "200").output().unwrap();
    refused(&output, &["GRANARY_OBJECT_HEDGE_PERCENT", "from 0% to 100%"]);
    refused(
        &dev(&dir, &["--config", &file]).output().unwrap(),
        &["granary.toml", "`object.replay` cannot be `8MB`", "64MiB"],
    );
    let mut gateway = program("granary");
    gateway.args(["gateway", "--map", "map.json", "--secret-file", "secret", "--set", "heal.interval=5s"]);
    refused(&gateway.output().unwrap(), &["`granary config set heal.interval 5s`"]);
    let mut node = program("granary-disk-node");
    node.args(["serve", "--dir"]).arg(&dir).args(["--secret-file", "secret", "--set", "node.segmen=16MiB"]);
    let output = node.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("did you mean `node.segment`?"), "{said}");
    assert!(!dir.exists());
}

#[test]
fn settings_of_the_cluster_are_given_listed_changed_and_kept() {
    let set = ["--set", "heal.interval=5s", "--set", "node.segment=16MiB", "--set", "object.replay=4MiB"];
    let options = Options { extra: set.map(str::to_owned).to_vec(), ..Options::default() };
    let mut cluster = Cluster::start(options);
    let dir = cluster.dir().display().to_string();
    let config = |args: &[&str]| program("granary").arg("config").args(args).args(["--dir", &dir]).output().unwrap();
    let row = |name: &str| -> (String, String) {
        let output = config(&["--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        let row = rows.iter().find(|row| row["name"] == name).unwrap();
        let text = |field: &str| row[field].as_str().unwrap_or("-").to_owned();
        (text("value"), text("source"))
    };
    let becomes = |name: &str, value: &str, source: &str| {
        let started = Instant::now();
        while row(name) != (value.to_owned(), source.to_owned()) {
            assert!(started.elapsed() < PATIENCE, "{name} is {:?}, not {value}", row(name));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let log = cluster.dir().parent().unwrap().join("granary.log");
    let said = || {
        let line = "heal.interval of the cluster is 5s from now on; it was the default";
        std::fs::read_to_string(&log).unwrap().matches(line).count()
    };
    becomes("heal.interval", "5s", "cluster");
    becomes("node.segment", "16MiB", "command-line");
    becomes("object.replay", "4MiB", "command-line");
    becomes("shards.attempt", "4s", "default");
    assert_eq!(said(), 1);
    assert!(config(&["set", "heal.interval", "3s"]).status.success());
    becomes("heal.interval", "3s", "cluster");
    for (name, value, words) in [
        ("heal.intervall", "3s", "did you mean `heal.interval`?"),
        ("heal.interval", "3", "it is a time from 10ms to 10min"),
        ("object.replay", "1MiB", "belongs to each process"),
    ] {
        refused(&config(&["set", name, value]), &[words]);
    }
    assert!(config(&["unset", "heal.interval"]).status.success());
    becomes("heal.interval", "2s", "default");

    // A later start with the same options gives it again, and says so.
    assert_eq!(cluster.stop(), Some(0));
    cluster.start_again();
    becomes("heal.interval", "5s", "cluster");
    assert_eq!(said(), 2);
}
