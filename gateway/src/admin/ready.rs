//! Should this gateway get traffic? Decided from values; the reasons are for people.

use super::api::{DiskRow, Health, Readiness, Status};
use super::page::bytes;
use super::status::leaderless;
use super::AdminContext;
use crate::disks::FULL_BELOW_BYTES;
use crate::shards::now_ms;
use std::time::Duration;

/// An older word of the root shard says nothing about now.
const ROOT_SILENCE: Duration = Duration::from_secs(10);
const STATUS_AGE_MS: u64 = 15_000;
/// Fewer disks of a group than this take no write at all.
const MIN_GROUP_DISKS: usize = 2;

/// What a status does not say.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// The root shard has told us the map.
    pub confirmed: bool,
    /// Since when it has not answered.
    pub root_silence: Option<Duration>,
    /// S3 is being served.
    pub serving: bool,
}

impl Facts {
    /// As they are now.
    pub fn of(context: &AdminContext) -> Facts {
        Facts {
            confirmed: *context.shards.confirmed().borrow(),
            root_silence: context.shards.root_silence(),
            serving: *context.serving.borrow(),
        }
    }
}

/// Decides.
pub fn verdict(status: &Status, facts: &Facts) -> Readiness {
    let mut reasons = Vec::new();
    if !facts.confirmed {
        reasons.push("the root shard has not told the cluster map yet".to_owned());
    } else if facts.root_silence.is_none_or(|silence| silence > ROOT_SILENCE) {
        reasons.push(format!(
            "the root shard has not answered for {} s",
            facts.root_silence.unwrap_or_default().as_secs()
        ));
    }
    if !facts.serving {
        reasons.push("S3 is not served yet".to_owned());
    }
    if status.collected_ms == 0 || now_ms().saturating_sub(status.collected_ms) > STATUS_AGE_MS {
        reasons.push("the state of disks and shards is not known".to_owned());
    } else {
        let leaderless = leaderless(status);
        if !leaderless.is_empty() {
            let names: Vec<String> = leaderless.iter().take(8).map(ToString::to_string).collect();
            reasons.push(format!("{} shards have no leader ({})", leaderless.len(), names.join(", ")));
        }
        if !status.groups_by_disks_up.keys().any(|up| *up >= MIN_GROUP_DISKS) {
            reasons.push("no placement group has enough disks up to take a write".to_owned());
        }
    }
    let mut warnings: Vec<String> = status
        .disks
        .iter()
        .filter(|disk| disk.health != Health::Up)
        .take(16)
        .map(|disk| match &disk.last_error {
            Some(error) => {
                format!("disk {} is {}: {}", disk.disk, disk.health, error.chars().take(200).collect::<String>())
            }
            None => format!("disk {} is {}", disk.disk, disk.health),
        })
        .collect();
    let full =
        |disk: &&DiskRow| disk.health == Health::Up && disk.free_bytes.is_some_and(|free| free < FULL_BELOW_BYTES);
    for disk in status.disks.iter().filter(full).take(16) {
        warnings.push(format!(
            "disk {} is full: {} free for chunks",
            disk.disk,
            bytes(disk.free_bytes.unwrap_or_default())
        ));
    }
    for dead in status.heal.iter().flat_map(|heal| &heal.dead_disks).take(16) {
        warnings
            .extend(dead.stays.as_ref().map(|why| format!("disk {} is dead and stays in service: {why}", dead.disk)));
    }
    if status.repair_queue.count > 0 {
        let more = if status.repair_queue.more { " or more" } else { "" };
        warnings.push(format!("{}{more} chunks wait for repair", status.repair_queue.count));
    }
    Readiness { ready: reasons.is_empty(), reasons, warnings }
}

#[cfg(test)]
mod tests {
    use super::super::api::ShardRow;
    use super::*;
    use granary_placement::id::{DiskId, ShardId};

    fn healthy() -> (Status, Facts) {
        let shard = |shard| ShardRow {
            shard: ShardId(shard),
            members: vec![DiskId(1)],
            leader: Some(DiskId(1)),
            term: Some(1),
            voters: vec![DiskId(1)],
            replicas: vec![],
        };
        let status = Status {
            collected_ms: now_ms(),
            groups_by_disks_up: [(6, 50)].into(),
            shards: vec![shard(0), shard(1)],
            ..Status::default()
        };
        (status, Facts { confirmed: true, root_silence: Some(Duration::from_millis(500)), serving: true })
    }

    #[test]
    fn ready_needs_the_map_a_leader_for_each_shard_a_group_to_write_and_the_listener() {
        let (status, facts) = healthy();
        assert!(verdict(&status, &facts).ready);
        let not_ready = |status: &Status, facts: &Facts, why: &str| {
            let verdict = verdict(status, facts);
            assert!(!verdict.ready && verdict.reasons.iter().any(|reason| reason.contains(why)), "{verdict:?}");
        };
        not_ready(&status, &Facts { confirmed: false, ..facts }, "cluster map");
        not_ready(&status, &Facts { root_silence: Some(Duration::from_secs(60)), ..facts }, "60 s");
        not_ready(&status, &Facts { serving: false, ..facts }, "S3");
        not_ready(&Status { collected_ms: 0, ..status.clone() }, &facts, "not known");
        not_ready(
            &Status { groups_by_disks_up: [(1, 50), (0, 3)].into(), ..status.clone() },
            &facts,
            "placement group",
        );
        let mut leaderless = status;
        leaderless.shards[1].leader = None;
        not_ready(&leaderless, &facts, "1 shards have no leader (1)");
    }
}
