//! `granary heal`: how healing stands, and its pause and pace.

use super::admin_verbs::{Done, Target, QUICK};
use super::form::FormArgs;
use super::output::{print, print_json};
use crate::admin::api::{
    ConfigChanged, Count, GetConfig, GetStatus, HealStatus, HealingPaused, PauseHealing, ResumeHealing, SetConfig,
    Status,
};
use crate::admin::healing::{self, utc};
use crate::admin::page::bytes;
use crate::background::heal::pace::LONGEST_PAUSE;
use clap::{Args, Subcommand};
use granary_placement::settings::{Kind, Scope, Setting, Value};
use serde::Serialize;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Without a further verb: how healing stands.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct HealArgs {
    #[command(subcommand)]
    verb: Option<HealVerb>,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: FormArgs,
}

#[derive(Debug, Subcommand)]
enum HealVerb {
    /// Pause it in the whole cluster: nothing is rebuilt or moved, and no disk goes out of service. Ends by itself.
    Pause {
        /// How long, from 1s to 7d; a pause that is in force is replaced.
        #[arg(long = "for", value_name = "TIME", default_value = "1h", value_parser = pause_time)]
        time: Duration,
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        form: FormArgs,
    },
    /// End a pause.
    Resume {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        form: FormArgs,
    },
    /// Show how fast it may go and how fast it goes, or set the ceiling.
    Pace {
        /// Bytes per second that one gateway reads and writes for rebuilding, such as 64MiB/s; 0 for no ceiling.
        #[arg(long, value_name = "RATE")]
        ceiling: Option<String>,
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        form: FormArgs,
    },
}

/// The setting that is the ceiling.
const RATE: &str = "heal.rate";

fn pause_time(text: &str) -> Result<Duration, String> {
    let kind = Kind::Time(Duration::from_secs(1), LONGEST_PAUSE);
    let given = Setting { name: "--for", default: Value::Flag(false), kind, scope: Scope::Process, meaning: "" };
    match given.parse(text) {
        Ok(Value::Time(time)) => Ok(time),
        Ok(_) => Err("no time".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// How healing stands, for programs.
#[derive(Debug, Serialize)]
struct Healing<'a> {
    paused: bool,
    /// Unix milliseconds; 0 when it is not paused.
    paused_until_ms: u64,
    /// The admin address of the gateway that heals; None when none does.
    heals_at: Option<&'a str>,
    repair_queue: Count,
    /// Until the slots that move are on their new disks, at the rate of now; None: nothing moves, or it stands still.
    eta_s: Option<u64>,
    /// All that the gateway that heals tells; None: it has told nothing yet.
    heal: Option<&'a HealStatus>,
}

impl<'a> Healing<'a> {
    fn of(status: &'a Status) -> Healing<'a> {
        let heal = status.heal.as_ref();
        let moves = heal.filter(|heal| heal.move_bytes_left > 0);
        Healing {
            paused: heal.is_some_and(|heal| heal.paused),
            paused_until_ms: heal.map_or(0, |heal| heal.paused_until_ms),
            heals_at: status.heals_at.as_deref(),
            repair_queue: status.repair_queue,
            eta_s: moves.and_then(|heal| heal.move_bytes_left.checked_div(heal.bytes_per_s_now)).map(|s| s + 1),
            heal,
        }
    }
}

/// The ceiling and what is made of it, for programs.
#[derive(Debug, Serialize)]
struct PaceNow {
    /// As in `granary config`.
    ceiling: String,
    /// Lately, in bytes per second, where slots move.
    bytes_per_s_now: u64,
}

pub(super) async fn run(args: HealArgs) -> Done {
    match args.verb {
        None => {
            let status = args.target.ask(&GetStatus {}, QUICK).await?;
            let healing = Healing::of(&status);
            match args.form.is_json() {
                true => print_json(&healing)?,
                false => print(|out| write_healing(out, &status, &healing))?,
            }
        }
        Some(HealVerb::Pause { time, target, form }) => {
            let paused = target.ask(&PauseHealing { for_s: time.as_secs().max(1) }, QUICK).await?;
            print_pause(form, &paused)?;
        }
        Some(HealVerb::Resume { target, form }) => print_pause(form, &target.ask(&ResumeHealing {}, QUICK).await?)?,
        Some(HealVerb::Pace { ceiling: Some(ceiling), target, form }) => {
            let set = SetConfig { name: RATE.to_owned(), value: Some(ceiling) };
            let ConfigChanged { value, .. } = target.ask(&set, QUICK).await?;
            match form.is_json() {
                true => print_json(&serde_json::json!({ "ceiling": value }))?,
                false => print(|out| {
                    writeln!(out, "the ceiling is {} from now on; running gateways follow within seconds", rate(&value))
                })?,
            }
        }
        Some(HealVerb::Pace { ceiling: None, target, form }) => {
            let settings = target.ask(&GetConfig {}, QUICK).await?.settings;
            let status = target.ask(&GetStatus {}, QUICK).await?;
            let row = settings.into_iter().find(|row| row.name == RATE);
            let now = PaceNow {
                ceiling: row.and_then(|row| row.value).unwrap_or_else(|| "-".to_owned()),
                bytes_per_s_now: status.heal.as_ref().map_or(0, |heal| heal.bytes_per_s_now),
            };
            match form.is_json() {
                true => print_json(&now)?,
                false => print(|out| {
                    writeln!(out, "ceiling: {} per gateway ({RATE})", rate(&now.ceiling))?;
                    writeln!(out, "now: {}/s brought to slots that move", bytes(now.bytes_per_s_now))
                })?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A ceiling as people read it.
fn rate(value: &str) -> &str {
    if value.starts_with("0B") {
        "none"
    } else {
        value
    }
}

fn print_pause(form: FormArgs, paused: &HealingPaused) -> Result<(), super::output::OutputError> {
    if form.is_json() {
        return print_json(paused);
    }
    print(|out| match paused.paused_until_ms {
        0 => writeln!(out, "healing goes on; running gateways follow within seconds"),
        until => writeln!(out, "healing is paused until {}; running gateways follow within seconds", utc(until)),
    })
}

fn write_healing(out: &mut dyn Write, status: &Status, healing: &Healing<'_>) -> io::Result<()> {
    match healing.heals_at {
        Some(at) => writeln!(out, "healing is done by the gateway at {at}")?,
        None => writeln!(out, "no gateway heals just now")?,
    }
    let (queue, more) = (&healing.repair_queue, if healing.repair_queue.more { " or more" } else { "" });
    let partial = if queue.partial { "; some shards did not answer" } else { "" };
    writeln!(out, "chunks waiting for repair: {}{more}{partial}", queue.count)?;
    if let Some(heal) = healing.heal {
        writeln!(out, "slots that are not all on their new disks: {}", heal.queued_slots)?;
        writeln!(out, "extents that wait for a disk or a retry: {}", heal.waiting_extents)?;
        let ceiling = match heal.bytes_per_s {
            0 => "none".to_owned(),
            ceiling => format!("{}/s", bytes(ceiling)),
        };
        writeln!(out, "ceiling: {ceiling}; now: {}/s brought to slots that move", bytes(heal.bytes_per_s_now))?;
    }
    healing::lines(status).iter().try_for_each(|line| writeln!(out, "{line}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_pause_is_from_a_second_to_seven_days_long() {
        for (text, s) in [("1s", Some(1)), ("90min", Some(5400)), ("7d", Some(604_800)), ("8d", None), ("0s", None)] {
            assert_eq!(pause_time(text).ok(), s.map(Duration::from_secs), "{text}");
        }
        assert!(pause_time("60").unwrap_err().contains("a time from 1s to 7d"));
    }

    #[test]
    fn the_time_left_is_told_while_something_moves() {
        let told = |move_bytes_left, bytes_per_s_now| {
            let heal = Some(HealStatus { move_bytes_left, bytes_per_s_now, ..HealStatus::default() });
            Healing::of(&Status { heal, ..Status::default() }).eta_s
        };
        assert_eq!((told(0, 5), told(100, 0), told(100, 30)), (None, None, Some(4)));
        let mut text = Vec::new();
        let heal = HealStatus { paused: true, paused_until_ms: 61_000, bytes_per_s: 1 << 20, ..HealStatus::default() };
        let status = Status { heal: Some(heal), collected_ms: 1000, ..Status::default() };
        write_healing(&mut text, &status, &Healing::of(&status)).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("no gateway heals just now\nchunks waiting for repair: 0\n"), "{text}");
        assert!(text.contains("ceiling: 1.0 MiB/s; now: 0 B/s") && text.contains("paused until 1970-01-01 00:01:01"));
    }
}
