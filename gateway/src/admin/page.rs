//! The status page: one HTML document made on the server, without scripts and without anything fetched from elsewhere.

use super::ready::Verdict;
use super::status::{DiskRow, ShardRow, Snapshot};
use std::fmt::Write;

const STYLE: &str = "\
:root{--ink:#1d2a33;--soft:#5c6d78;--line:#dfe6ea;--paper:#fff;--ground:#f3f6f7;--good:#1b7f4d;--warn:#a36200;--bad:#b3261e;--mark:#c9922e}\
@media(prefers-color-scheme:dark){:root{--ink:#e4ebef;--soft:#93a4af;--line:#2c3942;--paper:#172027;--ground:#10171c;--good:#55c48d;--warn:#e0a94a;--bad:#f2877f;--mark:#d9a94e}}\
*{box-sizing:border-box}body{margin:0;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground)}\
header{border-top:4px solid var(--mark);background:var(--paper);border-bottom:1px solid var(--line);padding:1rem 1.5rem}\
h1{margin:0;font-size:1.3rem}h2{font-size:1rem;margin:0 0 .6rem}main{padding:1.5rem;max-width:80rem;margin:auto;display:grid;gap:1.2rem}\
section{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:1rem 1.2rem;overflow-x:auto}\
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);white-space:nowrap}\
th{color:var(--soft);font-weight:500}tr:last-child td{border-bottom:0}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}\
.up,.ok{color:var(--good)}.suspect,.warn{color:var(--warn)}.down,.bad{color:var(--bad)}.soft{color:var(--soft)}\
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1.2rem}.cards b{display:block;font-size:1.5rem;font-weight:600}\
.bar{display:inline-block;width:7rem;height:.55rem;border-radius:3px;background:var(--line);overflow:hidden;vertical-align:middle}\
.bar i{display:block;height:100%;background:var(--mark)}ul{margin:.4rem 0 0;padding-left:1.2rem}";

/// The page.
pub fn render(snapshot: &Snapshot, verdict: &Verdict, s3: &str) -> String {
    let mut page = String::with_capacity(16 * 1024);
    let disks_up = snapshot.disks.iter().filter(|disk| disk.health == "up").count();
    let led = snapshot.shards.iter().filter(|shard| shard.leader.is_some()).count();
    let (class, word) = match (verdict.ready, verdict.warnings.is_empty()) {
        (true, true) => ("ok", "All is well"),
        (true, false) => ("warn", "Serving, with warnings"),
        (false, _) => ("bad", "Not ready"),
    };
    // Writing to a String cannot fail.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"refresh\" content=\"5\"><title>Granary</title><style>{STYLE}</style></head><body><header>\
         <h1>Granary <span class=\"{class}\">{word}</span></h1><div class=\"soft\">S3 at http://{} · cluster {} · map epoch {}</div></header><main>",
        escape(s3),
        escape(&snapshot.cluster_id),
        snapshot.epoch
    );
    if !verdict.reasons.is_empty() || !verdict.warnings.is_empty() {
        page += "<section><h2>What needs attention</h2><ul>";
        for (class, text) in
            verdict.reasons.iter().map(|text| ("bad", text)).chain(verdict.warnings.iter().map(|text| ("warn", text)))
        {
            let _ = write!(page, "<li class=\"{class}\">{}</li>", escape(text));
        }
        page += "</ul></section>";
    }
    let more = if snapshot.repair_queue.more { "+" } else { "" };
    let _ = write!(
        page,
        "<div class=\"cards\"><section><b>{disks_up} / {}</b>disks up</section><section><b>{led} / {}</b>shards with a leader</section>\
         <section><b>{}{more}</b>chunks waiting for repair</section><section><b>{}</b>scheme, {} placement groups</section></div>",
        snapshot.disks.len(),
        snapshot.shards.len(),
        snapshot.repair_queue.count,
        escape(&snapshot.default_scheme),
        snapshot.groups
    );
    page += "<section><h2>Disks</h2><table><tr><th>Disk<th>State<th>Address<th>Location<th>Roles<th class=\"n\">Chunks<th class=\"n\">Stored<th>Used<th class=\"n\">Free</tr>";
    for disk in &snapshot.disks {
        disk_row(&mut page, disk);
    }
    page += "</table></section><section><h2>Metadata shards</h2><table><tr><th>Shard<th>Leader<th class=\"n\">Term<th>Voters<th>Replicas that answer</tr>";
    for shard in &snapshot.shards {
        shard_row(&mut page, shard);
    }
    page += "</table></section><section><h2>Buckets</h2>";
    if snapshot.buckets.is_empty() {
        page += "<p class=\"soft\">None yet.</p>";
    } else {
        page +=
            "<table><tr><th>Bucket<th class=\"n\">Objects<th class=\"n\">Size<th class=\"n\">Uploads in progress</tr>";
        for bucket in &snapshot.buckets {
            let _ = match &bucket.usage {
                Some(usage) => write!(
                    page,
                    "<tr><td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}</tr>",
                    escape(&bucket.name),
                    usage.objects,
                    bytes(usage.bytes),
                    usage.uploads
                ),
                None => {
                    write!(page, "<tr><td>{}<td class=\"soft\" colspan=\"3\">not known now</tr>", escape(&bucket.name))
                }
            };
        }
        page += if snapshot.more_buckets { "</table><p class=\"soft\">and more</p>" } else { "</table>" };
    }
    page += "</section></main></body></html>\n";
    page
}

fn disk_row(page: &mut String, disk: &DiskRow) {
    let known = |value: Option<u64>| value.map_or_else(|| "–".to_owned(), bytes);
    let used = match (disk.capacity_bytes, disk.free_bytes) {
        (Some(capacity), Some(free)) if capacity > 0 => {
            let percent = u128::from(capacity.saturating_sub(free)) * 100 / u128::from(capacity);
            format!("<span class=\"bar\"><i style=\"width:{percent}%\"></i></span> {percent} %")
        }
        _ => "–".to_owned(),
    };
    let _ = write!(
        page,
        "<tr><td>{}<td class=\"{health}\">{health}<td>{}<td>{}<td>{}<td class=\"n\">{}<td class=\"n\">{}<td>{used}<td class=\"n\">{}</tr>",
        disk.disk,
        escape(&disk.address),
        escape(&disk.location),
        disk.roles.join(", "),
        disk.chunks.map_or_else(|| "–".to_owned(), |chunks| chunks.to_string()),
        known(disk.chunk_bytes),
        known(disk.free_bytes),
        health = escape(&disk.health),
    );
}

fn shard_row(page: &mut String, shard: &ShardRow) {
    let name = if shard.shard == 0 { "0 (root)".to_owned() } else { shard.shard.to_string() };
    let list = |disks: &[u32]| disks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let leader =
        shard.leader.map_or_else(|| "<span class=\"bad\">none</span>".to_owned(), |disk| format!("disk {disk}"));
    let replicas = shard.replicas.iter().map(|replica| format!("{} ({})", replica.disk, escape(&replica.state)));
    let _ = write!(
        page,
        "<tr><td>{name}<td>{leader}<td class=\"n\">{}<td>{}<td>{}</tr>",
        shard.term.map_or_else(String::new, |term| term.to_string()),
        list(&shard.voters),
        replicas.collect::<Vec<_>>().join(", ")
    );
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

/// Bytes for people, in binary units.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = units.get(unit).copied().unwrap_or_default();
    if unit == 0 {
        format!("{count} {name}")
    } else {
        format!("{value:.1} {name}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::{BucketRow, UsageRow};
    use super::*;

    #[test]
    fn names_cannot_break_out_of_the_page() {
        let usage = Some(UsageRow { objects: 3, bytes: 5 << 30, uploads: 0 });
        let buckets = vec![BucketRow { name: "<script>alert(1)</script>".into(), usage }];
        let snapshot = Snapshot { buckets, ..Snapshot::default() };
        let verdict = Verdict { ready: false, reasons: vec!["a < b".into()], warnings: vec![] };
        let page = render(&snapshot, &verdict, "127.0.0.1:9000");
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;") && page.contains("a &lt; b"));
        assert!(page.contains("5.0 GiB") && page.contains("Not ready"));
    }
}
