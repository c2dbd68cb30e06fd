//! The status page: one HTML document made on the server from `templates/status.html`, without scripts and without
//! anything fetched from elsewhere. askama escapes what it fills in.

use super::api::{DiskRow, Health, Readiness, Status};
use super::healing;
use askama::Template;
use granary_placement::map::DiskState;

/// The style sheet, served as `/granary.css`.
pub const CSS: &str = include_str!("../../templates/granary.css");

#[derive(Template)]
#[template(path = "status.html")]
struct StatusPage<'a> {
    status: &'a Status,
    readiness: &'a Readiness,
    s3: &'a str,
}

/// The page.
///
/// # Errors
/// What a value's `Display` says; hardly ever.
pub fn render(status: &Status, readiness: &Readiness, s3: &str) -> Result<String, askama::Error> {
    StatusPage { status, readiness, s3 }.render()
}

impl StatusPage<'_> {
    fn verdict_text(&self) -> &'static str {
        match (self.readiness.ready, self.readiness.warnings.is_empty()) {
            (true, true) => "all is well",
            (true, false) => "serving, with warnings",
            (false, _) => "not ready",
        }
    }

    fn verdict_class(&self) -> &'static str {
        match (self.readiness.ready, self.readiness.warnings.is_empty()) {
            (true, true) => "ok",
            (true, false) => "warn",
            (false, _) => "bad",
        }
    }

    fn disks_up(&self) -> usize {
        self.status.disks.iter().filter(|disk| disk.health == Health::Up).count()
    }

    fn shards_led(&self) -> usize {
        self.status.shards.iter().filter(|shard| shard.leader.is_some()).count()
    }

    fn stored(&self) -> String {
        bytes(self.status.disks.iter().filter_map(|disk| disk.chunk_bytes).fold(0, u64::saturating_add))
    }

    fn free(&self) -> String {
        bytes(self.status.disks.iter().filter_map(|disk| disk.free_bytes).fold(0, u64::saturating_add))
    }

    fn healing(&self) -> Vec<String> {
        healing::lines(self.status)
    }

    fn roles(disk: &DiskRow) -> String {
        disk.roles.iter().map(|role| role.name()).collect::<Vec<_>>().join(", ")
    }

    fn number(value: &Option<u64>) -> String {
        value.map_or_else(|| "–".to_owned(), |value| value.to_string())
    }

    fn size(value: &Option<u64>) -> String {
        value.as_ref().map_or_else(|| "–".to_owned(), Self::bytes)
    }

    fn bytes(count: &u64) -> String {
        bytes(*count)
    }

    fn used_percent(disk: &DiskRow) -> Option<u128> {
        let (capacity, free) = (disk.capacity_bytes.filter(|capacity| *capacity > 0)?, disk.free_bytes?);
        Some(u128::from(capacity.saturating_sub(free)) * 100 / u128::from(capacity))
    }
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
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::api::{BucketRow, UsageRow};
    use super::*;
    use crate::background::heal::{AwayDisk, DeadDisk, HealStatus};
    use granary_placement::id::{DiskId, DiskUuid};

    #[test]
    fn names_cannot_break_out_of_the_page() {
        let usage = Some(UsageRow { objects: 3, bytes: 5 << 30, uploads: 0 });
        let buckets = vec![BucketRow { name: "<script>alert(1)</script>".into(), usage }];
        let status = Status { buckets, ..Status::default() };
        let readiness = Readiness { ready: false, reasons: vec!["a < b".into()], warnings: vec![] };
        let page = render(&status, &readiness, "127.0.0.1:9000").unwrap();
        assert!(!page.contains("<script") && page.contains("script&#62;") && page.contains("a &#60; b"), "{page}");
        assert!(page.contains("5.0 GiB") && page.contains("not ready"));
        let foreign = ["http://", "https://", "//"].map(|start| page.matches(&format!("=\"{start}")).count());
        assert_eq!(foreign, [0; 3], "the page fetches nothing from elsewhere");
    }

    #[test]
    fn the_page_says_of_dead_disks_and_moves_what_granary_status_says() {
        let row = |disk: u32, state, slots_leaving| DiskRow {
            disk: DiskId(disk),
            uuid: DiskUuid([0; 16]),
            address: String::new(),
            location: String::new(),
            state,
            weight: 1,
            slots: 0,
            slots_leaving,
            roles: Vec::new(),
            health: Health::Down,
            capacity_bytes: None,
            free_bytes: None,
            chunks: None,
            chunk_bytes: None,
            epoch: None,
            last_error: None,
        };
        let dead = |disk: u32, stays: Option<&str>| DeadDisk {
            disk: DiskId(disk),
            dead_s: 7,
            stays: stays.map(str::to_owned),
        };
        let heal = HealStatus {
            dead_disks: vec![dead(1, None), dead(2, Some("nobody can")), dead(3, None)],
            out_after_s: 30,
            // Disk 4 is back already.
            away_disks: [3, 4]
                .map(|disk| AwayDisk {
                    disk: DiskId(disk),
                    out_s: 12,
                    waits: (disk == 3).then(|| "its chunks come home".to_owned()),
                })
                .to_vec(),
            move_bytes_left: 40 << 20,
            bytes_per_s_now: 8 << 20,
            ..HealStatus::default()
        };
        let status = Status {
            disks: vec![
                row(1, DiskState::In, 0),
                row(2, DiskState::In, 0),
                row(3, DiskState::Away, 50),
                row(4, DiskState::In, 0),
            ],
            groups_by_failures_left: [(-2, 1), (-1, 2), (0, 4), (2, 9)].into(),
            heal: Some(heal),
            ..Status::default()
        };
        let lines = healing::lines(&status);
        let expected = [
            "disk 1 has been dead for 7 s, and goes out of service after 30 s",
            "disk 2 is dead and stays in service: nobody can",
            "disk 3 was dead and went out of service 12 s ago: the others take over what it held",
            "disk 3 answers again and is let back in later: its chunks come home",
            "50 slots of disk 3 move to other disks",
            "about 40.0 MiB to be brought to their new disks, 8.0 MiB/s, about 6 s",
            "placement groups by how many disks they can lose: 2 more: 9, 0 more: 4, beyond repair: 3",
        ];
        assert_eq!(lines, expected);
        let readiness = Readiness { ready: true, reasons: vec![], warnings: vec![] };
        let page = render(&status, &readiness, "127.0.0.1:9000").unwrap();
        for line in expected {
            assert!(page.contains(&format!("<li>{line}</li>")), "{line}: {page}");
        }
        let fresh = render(&Status::default(), &readiness, "127.0.0.1:9000").unwrap();
        assert!(!fresh.contains("Dead disks"), "{fresh}");
    }
}
