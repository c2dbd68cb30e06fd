//! `granary shard`: how the metadata shards and their replicas stand, by the word of the disk nodes.

use super::admin_verbs::{Done, Target, QUICK};
use super::form::FormArgs;
use super::output::{print, print_json};
use crate::admin::api::{GetStatus, ReplicaRow, ShardRow};
use clap::Args;
use granary_placement::id::{DiskId, ShardId};
use serde::Serialize;
use std::io::{self, Write};
use std::process::ExitCode;

/// How each metadata shard stands.
#[derive(Debug, Args)]
pub(crate) struct ShardArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: FormArgs,
}

/// A shard.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Shard<'a> {
    shard: ShardId,
    leader: Option<DiskId>,
    term: Option<u64>,
    /// What its leader has applied; None without one.
    applied_index: Option<u64>,
    /// By the leader's word.
    voters: &'a [DiskId],
    /// By the map.
    members: &'a [DiskId],
    replicas: Vec<Replica<'a>>,
}

/// A replica: a voter, or another that answered.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Replica<'a> {
    disk: DiskId,
    is_voter: bool,
    /// leader, follower, candidate, learner, stopped or failed; None: its disk does not answer.
    state: Option<&'a str>,
    applied_index: Option<u64>,
    /// Entries of the leader's log that it has not applied; None when one of both is not known.
    lag: Option<u64>,
}

fn shard(row: &ShardRow) -> Shard<'_> {
    let of = |disk: DiskId| row.replicas.iter().find(|replica| replica.disk == disk);
    let leader = row.leader.and_then(of);
    let mut disks = row.voters.clone();
    disks.extend(row.replicas.iter().map(|replica| replica.disk));
    disks.sort_unstable();
    disks.dedup();
    let replica = |disk: DiskId| {
        let found: Option<&ReplicaRow> = of(disk);
        Replica {
            disk,
            is_voter: row.voters.contains(&disk),
            state: found.map(|replica| replica.state.as_str()),
            applied_index: found.map(|replica| replica.applied_index),
            lag: leader.zip(found).map(|(leader, found)| leader.last_log_index.saturating_sub(found.applied_index)),
        }
    };
    Shard {
        shard: row.shard,
        leader: row.leader,
        term: row.term,
        applied_index: leader.map(|leader| leader.applied_index),
        voters: &row.voters,
        members: &row.members,
        replicas: disks.into_iter().map(replica).collect(),
    }
}

pub(super) async fn run(args: ShardArgs) -> Done {
    let status = args.target.ask(&GetStatus {}, QUICK).await?;
    let shards: Vec<Shard<'_>> = status.shards.iter().map(shard).collect();
    match args.form.is_json() {
        true => print_json(&shards)?,
        false => print(|out| write_shards(out, &shards))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn write_shards(out: &mut dyn Write, shards: &[Shard<'_>]) -> io::Result<()> {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let mut line = |cells: [String; 5], replicas: &str| {
        let [shard, leader, term, applied, voters] = cells;
        writeln!(out, "{shard:>5}  {leader:>6}  {term:>6}  {applied:>12}  {voters:16}  {replicas}")
    };
    line(["shard", "leader", "term", "applied", "voters"].map(str::to_owned), "disk:state, entries behind the leader")?;
    for shard in shards {
        let replica = |replica: &Replica<'_>| {
            let behind = match replica.lag {
                Some(lag) if lag > 0 && replica.state != Some("leader") => format!(" -{lag}"),
                _ => String::new(),
            };
            format!("{}:{}{behind}", replica.disk, replica.state.unwrap_or("no answer"))
        };
        let cells = [
            shard.shard.to_string(),
            or_dash(shard.leader.map(|leader| leader.to_string())),
            or_dash(shard.term.map(|term| term.to_string())),
            or_dash(shard.applied_index.map(|index| index.to_string())),
            shard.voters.iter().map(DiskId::to_string).collect::<Vec<_>>().join(","),
        ];
        line(cells, &shard.replicas.iter().map(replica).collect::<Vec<_>>().join("  "))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_replica_lags_by_what_the_leaders_log_has_and_it_has_not_applied() {
        let replica = |disk, state: &str, applied_index, last_log_index| ReplicaRow {
            disk: DiskId(disk),
            state: state.to_owned(),
            applied_index,
            last_log_index,
        };
        let row = ShardRow {
            shard: ShardId(3),
            members: [1, 2, 3].map(DiskId).to_vec(),
            leader: Some(DiskId(2)),
            term: Some(7),
            voters: [1, 2, 3].map(DiskId).to_vec(),
            replicas: vec![replica(1, "follower", 95, 99), replica(2, "leader", 100, 101), replica(4, "learner", 0, 0)],
        };
        let shown = shard(&row);
        let lags: Vec<_> =
            shown.replicas.iter().map(|replica| (replica.disk.0, replica.is_voter, replica.lag)).collect();
        assert_eq!(lags, [(1, true, Some(6)), (2, true, Some(1)), (3, true, None), (4, false, Some(101))]);
        let mut text = Vec::new();
        write_shards(&mut text, &[shown]).unwrap();
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().nth(1).unwrap();
        let expected = "3 2 7 100 1,2,3 1:follower -6 2:leader 3:no answer 4:learner -101";
        assert_eq!(line.split_whitespace().collect::<Vec<_>>().join(" "), expected);
        // Without a leader nobody knows how far others are behind.
        let row = ShardRow { leader: None, ..row };
        assert!(shard(&row).replicas.iter().all(|replica| replica.lag.is_none()));
    }
}
