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
    if heal.paused {
        let left_s = heal.paused_until_ms.saturating_sub(status.collected_ms) / 1000;
        lines.push(match heal.paused_until_ms {
            0 => "healing is paused: nothing is rebuilt or moved, and no disk goes out".to_owned(),
            until => format!(
                "healing is paused until {} ({left_s} s more): nothing is rebuilt or moved, and no disk goes out",
                utc(until)
            ),
        });
    }
    if heal.scrub_findings > 0 {
        lines.push(format!(
            "{} chunks that disks found damaged by themselves are not repaired yet",
            heal.scrub_findings
        ));
    }
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

/// A moment as text, such as `2026-02-28 09:05:07 UTC`.
pub fn utc(unix_ms: u64) -> String {
    let (seconds, mut days) = (unix_ms / 1000 % 86_400, unix_ms / 86_400_000);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years have 146,097 days.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::background::heal::HealStatus;

    #[test]
    fn a_moment_is_told_as_date_and_time() {
        for (unix_s, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_735_603_200, "2024-12-31 00:00:00 UTC"),
            (1_767_225_599, "2025-12-31 23:59:59 UTC"),
            (1_772_269_507, "2026-02-28 09:05:07 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (253_402_300_799, "9999-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(unix_s * 1000), text);
        }
    }

    #[test]
    fn a_pause_is_told_with_its_end() {
        let heal = |paused, paused_until_ms| {
            let heal = Some(HealStatus { paused, paused_until_ms, ..HealStatus::default() });
            lines(&Status { collected_ms: 1_772_269_507_000, heal, ..Status::default() })
        };
        assert_eq!(heal(false, 0), Vec::<String>::new());
        let said = heal(true, 1_772_269_567_000);
        let expected =
            "healing is paused until 2026-02-28 09:06:07 UTC (60 s more): nothing is rebuilt or moved, and no \
                        disk goes out";
        assert_eq!(said, [expected]);
    }
}
