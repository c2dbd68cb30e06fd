//! Real backup programs against a real cluster while disks are killed, deleted and replaced. The restored tree is
//! compared byte for byte, whatever the tool says.
//!
//! Short form: about 100 MB of the Rust toolchain's folder. Long form (`make soak`): all of it, over 1 GB and 20,000
//! files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use granary_tests::cluster::{remove_dir, Cluster, DiskProcess, Options};
use granary_tests::programs::{find, Programs};
use granary_tests::seed::Random;
use granary_tests::tree::{add_odd_files, assert_same, manifest, toolchain_sample, Manifest};
use std::path::{Path, PathBuf};
use std::time::Duration;

struct Scene {
    cluster: Cluster,
    programs: Programs,
    tree: PathBuf,
    work: PathBuf,
    random: Random,
}

fn scene(test: &str, short_bytes: u64) -> Scene {
    let mut random = Random::of_this_run(test);
    let cluster = Cluster::start(Options::default());
    let work = cluster.work();
    let tree = toolchain_sample(&work, if granary_tests::soak() { u64::MAX } else { short_bytes });
    add_odd_files(&tree, &mut random);
    let programs = Programs::new(&cluster, &work);
    Scene { cluster, programs, tree, work, random }
}

/// Two different places out of six, by the seed.
fn two_places(random: &mut Random) -> (usize, usize) {
    let first = random.below(6) as usize;
    (first, (first + 1 + random.below(5) as usize) % 6)
}

/// The disks are dead already: delete what they held, start them empty, and watch redundancy come back.
fn replace_empty(cluster: &Cluster, disks: &[DiskProcess]) {
    for disk in disks {
        cluster.start_disk(disk);
    }
    let census = cluster.wait_full_redundancy(Duration::from_secs(if granary_tests::soak() { 1800 } else { 180 }));
    assert!(census["extents"].as_u64().unwrap() > 0, "an empty census proves nothing: {census}");
    assert_eq!(census["extents_lost"].as_u64(), Some(0), "{census}");
}

fn text(path: &Path) -> String {
    path.to_str().expect("a UTF-8 path").to_owned()
}

fn restic_scene(test: &str, newest: bool) {
    let Scene { cluster, programs, tree, work, mut random } = scene(test, 100 << 20);
    let restic = find("restic", newest);
    let repository = format!("s3:http://{}/b-restic/r", cluster.s3());
    let cache = text(&work.join("cache"));
    let restic_args = |args: &[&str]| -> Vec<String> {
        ["-o", "s3.bucket-lookup=path", "-r", &repository, "--cache-dir", &cache]
            .iter()
            .chain(args)
            .map(|arg| (*arg).to_owned())
            .collect()
    };
    let run = |args: &[&str]| {
        let all = restic_args(args);
        programs.run(&restic, &all.iter().map(String::as_str).collect::<Vec<_>>())
    };
    run(&["init"]);

    // Two disks die in the middle of the first backup; the tool must get through.
    let all = restic_args(&["backup", &text(&tree)]);
    let mut backup =
        programs.start(&restic, &all.iter().map(String::as_str).collect::<Vec<_>>(), &work.join("backup.log"));
    cluster.wait_until_uploading(&mut backup, 5 << 20);
    let (first, second) = two_places(&mut random);
    let dead = [cluster.kill_disk(first), cluster.kill_disk(second)];
    let status = backup.wait().unwrap();
    assert!(
        status.success(),
        "restic backup with two disks dead: {}",
        std::fs::read_to_string(work.join("backup.err")).unwrap_or_default()
    );

    // Go on writing with two disks dead, and read everything back.
    std::fs::write(tree.join("written while two disks are dead"), random.bytes(7_000_000)).unwrap();
    let source = manifest(&tree, true);
    run(&["backup", &text(&tree)]);
    run(&["check", "--read-data"]);
    let restore = |what: &str| {
        let target = work.join("restored");
        run(&["restore", "latest", "--target", &text(&target)]);
        let below = target.join(tree.strip_prefix("/").unwrap());
        assert_same(what, &source, &manifest(&below, true));
        remove_dir(&target);
    };
    restore("restic, two disks dead");

    for disk in &dead {
        remove_dir(&disk.dir);
    }
    restore("restic, two disks deleted");
    replace_empty(&cluster, &dead);
    restore("restic, two disks replaced");
    run(&["forget", "--keep-last", "1", "--prune"]);
    run(&["check", "--read-data"]);
}

#[test]
fn restic_of_today_survives_two_dead_disks() {
    restic_scene("restic_of_today_survives_two_dead_disks", true);
}

#[test]
fn restic_of_debian_survives_two_dead_disks() {
    restic_scene("restic_of_debian_survives_two_dead_disks", false);
}

fn rclone_scene(test: &str, newest: bool) {
    let Scene { cluster, programs, tree, work, mut random } = scene(test, 100 << 20);
    let rclone = find("rclone", newest);
    let run = |args: &[&str]| programs.run(&rclone, args);
    programs.run(&find("aws", true), &["s3", "mb", "s3://b-rclone"]);
    // Small parts force multipart.
    let sync = ["sync", "--links", "--s3-chunk-size", "5M", "--s3-upload-cutoff", "5M", "--transfers", "8"];

    let source_text = text(&tree);
    let args: Vec<&str> = sync.iter().copied().chain([source_text.as_str(), ":s3:b-rclone/p"]).collect();
    let mut backup = programs.start(&rclone, &args, &work.join("backup.log"));
    cluster.wait_until_uploading(&mut backup, 5 << 20);
    let (first, second) = two_places(&mut random);
    let dead = [cluster.kill_disk(first), cluster.kill_disk(second)];
    let status = backup.wait().unwrap();
    assert!(
        status.success(),
        "rclone sync with two disks dead: {}",
        std::fs::read_to_string(work.join("backup.err")).unwrap_or_default()
    );

    std::fs::write(tree.join("written while two disks are dead"), random.bytes(12_000_000)).unwrap();
    let source = manifest(&tree, true);
    run(&args);
    run(&["check", "--links", "--download", &source_text, ":s3:b-rclone/p"]);
    let restore = |what: &str| {
        let target = work.join("restored");
        run(&["copy", "--links", "--transfers", "8", ":s3:b-rclone/p", &text(&target)]);
        assert_same(what, &source, &manifest(&target, true));
        remove_dir(&target);
    };
    restore("rclone, two disks dead");
    for disk in &dead {
        remove_dir(&disk.dir);
    }
    restore("rclone, two disks deleted");
    replace_empty(&cluster, &dead);
    restore("rclone, two disks replaced");
}

#[test]
fn rclone_of_today_survives_two_dead_disks() {
    rclone_scene("rclone_of_today_survives_two_dead_disks", true);
}

#[test]
fn rclone_of_debian_survives_two_dead_disks() {
    rclone_scene("rclone_of_debian_survives_two_dead_disks", false);
}

/// aws, s3cmd and boto3 skip symbolic links, so does the judge here.
#[test]
fn aws_s3cmd_and_boto3_survive_two_dead_disks() {
    let Scene { cluster, programs, tree, work, mut random } =
        scene("aws_s3cmd_and_boto3_survive_two_dead_disks", 60 << 20);
    let (aws, s3cmd_new, s3cmd_old) = (find("aws", true), find("s3cmd", true), find("s3cmd", false));
    let source_text = text(&tree);
    programs.run(&aws, &["s3", "mb", "s3://b-aws"]);
    let host = cluster.s3().to_owned();
    let keys = [format!("--access_key={}", cluster.access_key()), format!("--secret_key={}", cluster.secret_key())];
    let hosts = [format!("--host={host}"), format!("--host-bucket={host}")];
    let s3cmd = |program: &Path, args: &[&str]| {
        let mut all: Vec<&str> = vec![&keys[0], &keys[1], &hosts[0], &hosts[1], "--region=us-east-1", "--no-ssl"];
        all.extend(args);
        programs.run(program, &all)
    };
    s3cmd(&s3cmd_new, &["mb", "s3://b-s3cmd"]);

    let mut backup = programs.start(
        &aws,
        &["s3", "sync", "--only-show-errors", "--no-follow-symlinks", &source_text, "s3://b-aws/p"],
        &work.join("backup.log"),
    );
    cluster.wait_until_uploading(&mut backup, 5 << 20);
    let (first, second) = two_places(&mut random);
    let dead = [cluster.kill_disk(first), cluster.kill_disk(second)];
    let status = backup.wait().unwrap();
    assert!(
        status.success(),
        "aws s3 sync with two disks dead: {}",
        std::fs::read_to_string(work.join("backup.err")).unwrap_or_default()
    );

    std::fs::write(tree.join("written while two disks are dead"), random.bytes(12_000_000)).unwrap();
    let source: Manifest = manifest(&tree, false);
    programs.run(&aws, &["s3", "sync", "--only-show-errors", "--no-follow-symlinks", &source_text, "s3://b-aws/p"]);
    for program in [&s3cmd_old, &s3cmd_new] {
        s3cmd(
            program,
            &["sync", "--quiet", "--multipart-chunk-size-mb=5", &format!("{source_text}/"), "s3://b-s3cmd/p/"],
        );
    }
    let boto = find("python3", true);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/boto3_tree.py");
    programs.run(&boto, &[&text(&script), "put", &source_text, "b-boto3"]);

    for disk in &dead {
        remove_dir(&disk.dir);
    }
    let restore_all = |what: &str| {
        let target = work.join("restored");
        programs.run(&aws, &["s3", "sync", "--only-show-errors", "s3://b-aws/p", &text(&target)]);
        assert_same(&format!("aws, {what}"), &source, &manifest(&target, true));
        remove_dir(&target);
        for program in [&s3cmd_old, &s3cmd_new] {
            std::fs::create_dir(&target).unwrap();
            s3cmd(program, &["sync", "--quiet", "s3://b-s3cmd/p/", &format!("{}/", text(&target))]);
            assert_same(&format!("s3cmd, {what}"), &source, &manifest(&target, true));
            remove_dir(&target);
        }
        programs.run(&boto, &[&text(&script), "get", &text(&target), "b-boto3"]);
        assert_same(&format!("boto3, {what}"), &source, &manifest(&target, true));
        remove_dir(&target);
    };
    restore_all("two disks deleted");
    replace_empty(&cluster, &dead);
    restore_all("two disks replaced");
}
