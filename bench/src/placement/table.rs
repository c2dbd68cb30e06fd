//! The result as text.

use super::size::{Lost, Nines, Size};
use super::Args;
use crate::output::line;
use std::io;

/// A row's name, and where its values are.
type Named<T> = (&'static str, fn(&Size) -> &T);

/// Prints a table of all sizes and then, for the last, what it rests on.
///
/// # Errors
/// The reader is gone.
pub(super) fn print(args: &Args, sizes: &[Size]) -> io::Result<()> {
    line(format_args!(
        "{} slots per disk, disks of {} TB, {} % full; rebuilding at {} % of {} MB/s a disk, {} min after a loss\n",
        args.groups_per_disk, args.disk_tb, args.fill_percent, args.share_percent, args.rate_mb, args.grace_minutes
    ))?;
    let row = |name: &str, cell: &dyn Fn(&Size) -> String| {
        let cells: String = sizes.iter().map(|size| format!(" {:>16}", cell(size))).collect();
        line(format_args!("{name:<44}{cells}"))
    };
    row("disks", &|size| size.disks.to_string())?;
    row("servers", &|size| size.servers.to_string())?;
    row("scheme", &|size| size.scheme.clone())?;
    row("groups", &|size| size.groups.to_string())?;
    row("slots per disk: least, mean, most", &|size| {
        format!("{} {:.1} {}", size.share.min, size.share.mean, size.share.max)
    })?;
    row("  farthest from the mean", &|size| format!("{:.1} %", size.share.off_percent))?;
    row("most chunks of a group on one server", &|size| size.chunks_per_server.to_string())?;
    row("pairs of disks that share a group", &|size| size.disk_pairs.to_string())?;
    row("  of all pairs", &|size| format!("{:.1} %", 100.0 * size.disk_pairs as f64 / size.all_pairs as f64))?;
    row("laid out in", &|size| format!("{:.1} s", size.layout_seconds))?;
    let losses: [Named<Lost>; 2] =
        [("one disk lost", |size| &size.disk_lost), ("one server lost", |size| &size.server_lost)];
    for (name, of) in losses {
        row(&format!("{name}: slots to move, moved"), &|size| format!("{}, {}", of(size).must_move, of(size).moved))?;
        row("  disks that take over, that help", &|size| format!("{}, {}", of(size).takers, of(size).helpers))?;
        row("  slots read or written: busiest, mean", &|size| {
            format!("{:.1}, {:.2}", of(size).busiest_slots, of(size).mean_slots)
        })?;
        row("  rebuilt in", &|size| time(of(size).hours))?;
        row("  from loss to full redundancy", &|size| time(of(size).hours + args.grace_minutes / 60.0))?;
        row("  rebuilt in, if all had the same to do", &|size| time(of(size).even_hours))?;
        row("  substitutes found in", &|size| format!("{:.1} s", of(size).substitutes_seconds))?;
    }
    row(&format!("slots per disk for one in {} min", args.target_minutes), &|size| match size.slots_needed {
        Some(slots) => format!("{slots} or more"),
        None => "no number".to_owned(),
    })?;
    row("  share of the rate, if all had the same", &|size| format!("{:.1} %", size.share_needed_percent))?;
    let nines: [Named<Nines>; 3] = [
        ("any object lost within a year", |size| &size.any_object),
        ("a given object lost within a year", |size| &size.given_object),
        ("a metadata shard blocked within a year", |size| &size.metadata_blocked),
    ];
    for (name, of) in nines {
        row(name, &|size| format!("{:.1e}", of(size).probability_per_year))?;
        row("  nines", &|size| format!("{:.2}", of(size).nines))?;
        row("  years to one", &|size| format!("{:.1e}", of(size).mttdl_years))?;
        if sizes.iter().any(|size| of(size).mostly_from.is_some()) {
            row("  mostly from", &|size| of(size).mostly_from.clone().unwrap_or_else(|| "-".to_owned()))?;
        }
    }
    row("part of the time an extent cannot be read", &|size| format!("{:.1e}", size.data_unavailable))?;
    row("  a metadata shard has no majority", &|size| format!("{:.1e}", size.metadata_unavailable))?;
    let Some(last) = sizes.last() else { return Ok(()) };
    line(format_args!("\nWhat the nines of {} disks rest on:", last.disks))?;
    for sentence in &last.assumptions {
        line(format_args!("- {sentence}"))?;
    }
    Ok(())
}

fn time(hours: f64) -> String {
    if hours < 1.0 {
        format!("{:.1} min", hours * 60.0)
    } else if hours < 100.0 {
        format!("{hours:.1} h")
    } else {
        format!("{:.1} d", hours / 24.0)
    }
}
