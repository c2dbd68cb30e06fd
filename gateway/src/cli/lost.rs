//! `granary lost`: what can no longer be read? Totals first, then what would bring it back, then the keys.
//!
//! The keys come page by page. As JSON they are printed as they come, and the totals after them; as text the totals
//! stand before them, so the lines of the keys wait in a file without a name in the temporary folder, however many they
//! are. What is kept in memory is a row per bucket and per disk.

use super::admin_verbs::{Done, Target};
use super::form::FormArgs;
use super::output::print;
use crate::admin::api::{FindLost, LostKey, LostPage};
use crate::admin::page::bytes;
use crate::background::heal::lost::Seen;
use crate::shards::random_id;
use clap::Args;
use granary_placement::id::{DiskId, ShardId};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::time::Duration;

/// One page. With `--read` disks read all chunks of it.
const PAGE: Duration = Duration::from_secs(3600);
/// Exit code when keys are lost, and everything was asked.
const LOST: u8 = 3;
/// Exit code when something could not be asked.
const UNKNOWN: u8 = 4;

/// List the keys that cannot be read now.
#[derive(Debug, Args)]
pub(crate) struct LostArgs {
    #[command(flatten)]
    target: Target,
    /// Only keys of this bucket.
    #[arg(long, value_name = "NAME")]
    bucket: Option<String>,
    /// Have every chunk read and checked by its disk, which takes as long as a census.
    #[arg(long)]
    read: bool,
    #[command(flatten)]
    form: FormArgs,
}

/// What was found, without the keys.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Summary {
    /// Keys that cannot be read now.
    keys_lost: u64,
    /// Payload of them, in bytes.
    bytes_lost: u64,
    /// Extents looked at.
    extents: u64,
    /// By bucket.
    buckets: BTreeMap<String, BucketLoss>,
    /// How many of the keys could be read if this disk alone returned, by silent disk.
    back_with_disk: BTreeMap<DiskId, u64>,
    /// How many could be read if all silent disks returned.
    back_with_all_disks: u64,
    /// Shards that did not answer; 0, the root shard: names of buckets are not known.
    unknown_shards: BTreeSet<ShardId>,
    /// Disks that are not down and did not answer all the same.
    unasked_disks: BTreeSet<DiskId>,
    /// Disks came or went, or the map changed, while it looked.
    changed_meanwhile: bool,
    #[serde(skip)]
    seen: Option<Seen>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
struct BucketLoss {
    keys: u64,
    bytes: u64,
}

impl Summary {
    fn add(&mut self, page: &LostPage) {
        self.extents += page.extents;
        let seen = self.seen.get_or_insert_with(|| page.seen.clone());
        self.changed_meanwhile |= page.changed || *seen != page.seen;
        for disk in &page.seen.down {
            self.back_with_disk.entry(*disk).or_default();
        }
        self.unknown_shards.extend(&page.unknown_shards);
        self.unasked_disks.extend(&page.unasked_disks);
        for key in &page.keys {
            self.keys_lost += 1;
            self.bytes_lost = self.bytes_lost.saturating_add(key.size_bytes);
            let bucket = self.buckets.entry(bucket_name(key)).or_default();
            bucket.keys += 1;
            bucket.bytes = bucket.bytes.saturating_add(key.size_bytes);
            key.back_with.iter().for_each(|disk| *self.back_with_disk.entry(*disk).or_default() += 1);
            self.back_with_all_disks += u64::from(key.back_with_all);
        }
    }

    /// Was everything asked, under one state of the disks?
    fn is_certain(&self) -> bool {
        self.unknown_shards.is_empty() && self.unasked_disks.is_empty() && !self.changed_meanwhile
    }

    fn exit_code(&self) -> ExitCode {
        ExitCode::from(match (self.is_certain(), self.keys_lost) {
            (false, _) => UNKNOWN,
            (true, 0) => 0,
            (true, _) => LOST,
        })
    }
}

fn bucket_name(key: &LostKey) -> String {
    key.bucket.clone().unwrap_or_else(|| format!("(bucket number {})", key.bucket_id))
}

pub(super) async fn run(args: LostArgs) -> Done {
    let is_json = args.form.is_json();
    let mut spool = match is_json {
        true => None,
        false => Some(BufWriter::new(spool_file()?)),
    };
    let (mut summary, mut from) = (Summary::default(), None);
    if is_json {
        print(|out| write!(out, "{{\"keys\":["))?;
    }
    loop {
        let request = FindLost { bucket: args.bucket.clone(), from, read: args.read };
        let page = args.target.ask(&request, PAGE).await?;
        match &mut spool {
            Some(spool) => page.keys.iter().try_for_each(|key| writeln!(spool, "{}", line(key)))?,
            None => print(|out| write_keys(out, &page.keys, summary.keys_lost == 0))?,
        }
        summary.add(&page);
        match page.next {
            Some(next) => from = Some(next),
            None => break,
        }
    }
    match spool {
        Some(spool) => {
            let mut lines = spool.into_inner().map_err(io::IntoInnerError::into_error)?;
            lines.rewind()?;
            print(|out| write_summary(out, &summary))?;
            copy(&mut lines)?;
        }
        None => print(|out| {
            // The summary's fields follow the keys in the same object.
            let fields = serde_json::to_string(&summary)?;
            writeln!(out, "\n],{}", fields.trim_start_matches('{'))
        })?,
    }
    Ok(summary.exit_code())
}

/// Keys as elements of a JSON list, a line each.
fn write_keys(out: &mut dyn Write, keys: &[LostKey], mut first: bool) -> io::Result<()> {
    for key in keys {
        out.write_all(if first { b"\n" } else { b",\n" })?;
        first = false;
        serde_json::to_writer(&mut *out, key)?;
    }
    Ok(())
}

/// A file that is gone when this process ends, whatever ends it.
fn spool_file() -> io::Result<File> {
    let id = random_id().map_err(io::Error::other)?;
    let path = std::env::temp_dir().join(format!("granary-lost-{}", hex::encode(id)));
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Prints the rest of a file.
fn copy(file: &mut File) -> Result<(), Box<dyn std::error::Error>> {
    let mut part = vec![0; 64 * 1024];
    loop {
        let count = file.read(&mut part)?;
        let Some(read) = part.get(..count).filter(|read| !read.is_empty()) else { return Ok(()) };
        print(|out| out.write_all(read))?;
    }
}

/// A key as a line: what is no printable character is escaped, for a key may hold line breaks.
fn line(key: &LostKey) -> String {
    let mut line = format!("{}/", bucket_name(key));
    for character in key.key.chars() {
        if character.is_control() {
            let _ = write!(line, "{}", character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

fn write_summary(out: &mut dyn Write, summary: &Summary) -> io::Result<()> {
    let shards: Vec<String> = summary.unknown_shards.iter().map(ShardId::to_string).collect();
    let disks: Vec<String> = summary.unasked_disks.iter().map(DiskId::to_string).collect();
    if !shards.is_empty() {
        writeln!(out, "unknown: metadata shards {} did not answer; keys in them are not listed", shards.join(", "))?;
    }
    if !disks.is_empty() {
        let disks = disks.join(", ");
        writeln!(out, "unknown: disks {disks} did not answer though they are up; keys may be listed for that alone")?;
    }
    if summary.changed_meanwhile {
        writeln!(out, "unknown: disks came or went meanwhile; keys may be left out or listed twice: ask again")?;
    }
    if summary.keys_lost == 0 {
        let (what, extents) =
            (if summary.is_certain() { "every key" } else { "every key asked about" }, summary.extents);
        return writeln!(out, "{what} can be read; {extents} extents were looked at");
    }
    writeln!(out, "{} keys cannot be read now, {}", summary.keys_lost, bytes(summary.bytes_lost))?;
    for (name, loss) in &summary.buckets {
        writeln!(out, "{:>12}  {:>10}  in {name}", loss.keys, bytes(loss.bytes))?;
    }
    for (disk, keys) in &summary.back_with_disk {
        writeln!(out, "{keys:>12}  could be read if disk {disk} alone returned")?;
    }
    writeln!(out, "{:>12}  could be read if all disks that do not answer returned", summary.back_with_all_disks)?;
    let never = summary.keys_lost.saturating_sub(summary.back_with_all_disks);
    writeln!(out, "{never:>12}  not even then\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use granary_placement::id::Epoch;

    fn key(name: &str, bucket: Option<&str>, back_with: &[u32], back_with_all: bool) -> LostKey {
        LostKey {
            bucket: bucket.map(str::to_owned),
            bucket_id: 7,
            key: name.to_owned(),
            size_bytes: 1024,
            back_with: back_with.iter().copied().map(DiskId).collect(),
            back_with_all,
            ..LostKey::default()
        }
    }

    fn page(keys: Vec<LostKey>) -> LostPage {
        let seen = Seen { epoch: Epoch(3), down: vec![DiskId(2), DiskId(5)] };
        LostPage { keys, seen, extents: 10, ..LostPage::default() }
    }

    fn text(summary: &Summary) -> String {
        let mut text = Vec::new();
        write_summary(&mut text, summary).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_summary_says_how_much_is_lost_where_and_what_brings_it_back() {
        let mut summary = Summary::default();
        summary.add(&page(vec![key("a", Some("one"), &[2, 5], true), key("b", None, &[2], true)]));
        summary.add(&page(vec![key("c", Some("one"), &[], false)]));
        let expected = "3 keys cannot be read now, 3.0 KiB\n           1     1.0 KiB  in (bucket number 7)\n           2     2.0 KiB  in one\n           2  could be read if disk 2 alone returned\n           1  could be read if disk 5 alone returned\n           2  could be read if all disks that do not answer returned\n           1  not even then\n\n";
        assert_eq!(text(&summary), expected);
        assert_eq!(summary.exit_code(), ExitCode::from(LOST));
        assert_eq!(line(&key("a\nb\u{1b}", Some("one"), &[], false)), "one/a\\nb\\u{1b}");
    }

    #[test]
    fn what_was_not_asked_is_said_and_has_an_exit_code_of_its_own() {
        let of = |page: LostPage| {
            let mut summary = Summary::default();
            summary.add(&page);
            summary
        };
        assert_eq!(text(&of(page(vec![]))), "every key can be read; 10 extents were looked at\n");
        assert_eq!(of(page(vec![])).exit_code(), ExitCode::SUCCESS);
        let lost = vec![key("a", Some("one"), &[], true)];
        for (unknown, says) in [
            (LostPage { unknown_shards: vec![ShardId(4)], ..page(vec![]) }, "metadata shards 4 did not answer"),
            (LostPage { unasked_disks: vec![DiskId(6)], ..page(lost.clone()) }, "disks 6 did not answer"),
            (LostPage { changed: true, ..page(lost) }, "disks came or went"),
        ] {
            let summary = of(unknown);
            assert!(text(&summary).starts_with("unknown: ") && text(&summary).contains(says), "{}", text(&summary));
            assert_eq!(summary.exit_code(), ExitCode::from(UNKNOWN));
        }
        let mut summary = of(page(vec![]));
        summary.add(&LostPage { seen: Seen::default(), ..page(vec![]) });
        assert!(!summary.is_certain(), "the disks were others at another page");
    }

    #[test]
    fn the_json_of_keys_and_summary_is_one_object() {
        let mut out = b"{\"keys\":[".to_vec();
        let keys = [key("a", Some("one"), &[2], true), key("b", None, &[], false)];
        write_keys(&mut out, &keys[..1], true).unwrap();
        write_keys(&mut out, &[], false).unwrap();
        write_keys(&mut out, &keys[1..], false).unwrap();
        let fields = serde_json::to_string(&Summary::default()).unwrap();
        let text = format!("{}\n],{}", String::from_utf8(out).unwrap(), fields.trim_start_matches('{'));
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(read["keys"].as_array().unwrap().len(), 2);
        assert_eq!((&read["keys_lost"], &read["keys"][1]["key"]), (&0.into(), &"b".into()));
    }
}
