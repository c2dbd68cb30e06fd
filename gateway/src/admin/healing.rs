//! How healing stands, in words: what is dead, what has gone out, what is moving and how long that will take, and how
//! much more may fail. For `granary status` and the status page.

use super::api::Status;
use super::page::bytes;
use granary_placement::id::DiskId;
use granary_placement::map::DiskState;

/// A line each; none when nothing is known.
pub fn lines(status: &Status) -> Vec<String> {
    let heal = status.heal.clone().unwrap_or_default();
    let state = |id: DiskId| status.disks.iter().find(|disk| disk.disk == id).map(|disk| disk.state);
    let mut lines = Vec::new();
    // What is published of the healing may be a little older than the map.
    for dead in heal.dead_disks.iter().filter(|dead| state(dead.disk) != Some(DiskState::Away)) {
        let (disk, s, after) = (dead.disk, dead.dead_s, heal.out_after_s);
        lines.push(match &dead.stays {
            Some(why) => format!("disk {disk} is dead and stays in service: {why}"),
            None => format!("disk {disk} has been dead for {s} s, and goes out of service after {after} s"),
        });
    }
    for away in heal.away_disks.iter().filter(|away| state(away.disk) == Some(DiskState::Away)) {
        let (disk, s) = (away.disk, away.out_s);
        lines
            .push(format!("disk {disk} was dead and went out of service {s} s ago: the others take over what it held"));
        if let Some(why) = &away.waits {
            lines.push(format!("disk {disk} answers again and is let back in later: {why}"));
        }
    }
    let leaving = || status.disks.iter().filter(|disk| disk.slots_leaving > 0);
    lines.extend(
        leaving().map(|disk| format!("{} slots of disk {} move to other disks", disk.slots_leaving, disk.disk)),
    );
    if leaving().next().is_some() {
        let (left, rate) = (heal.move_bytes_left, heal.bytes_per_s_now);
        let time =
            left.checked_div(rate).map_or_else(String::new, |s| format!(", {}/s, about {} s", bytes(rate), s + 1));
        lines.push(format!("about {} to be brought to their new disks{time}", bytes(left)));
    }
    let groups = status.groups_by_failures_left.range(0..).rev();
    let mut groups: Vec<String> = groups.map(|(left, groups)| format!("{left} more: {groups}")).collect();
    let beyond: usize = status.groups_by_failures_left.range(..0).map(|(_, groups)| groups).sum();
    if beyond > 0 {
        groups.push(format!("beyond repair: {beyond}"));
    }
    if !groups.is_empty() {
        lines.push(format!("placement groups by how many disks they can lose: {}", groups.join(", ")));
    }
    lines
}
