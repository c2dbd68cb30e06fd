//! What a disk node counts. Names begin with `granary_disk_`; quantities end in their unit.

use crate::label::now_ms;
use crate::roles::MetaCounters;
use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntGauge, Registry, TextEncoder};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

type Count = fn(&MetaCounters) -> u64;

/// What the shard replicas count: name behind `granary_disk_meta_`, help, and where it comes from.
const META: &[(&str, &str, Count)] = &[
    ("commands_total", "Commands taken by shards led here", |counters| counters.commands),
    ("proposals_total", "Log entries that commands became", |counters| counters.proposals),
    ("queries_total", "Queries taken by shards led here", |counters| counters.queries),
    ("read_barriers_total", "Rounds of heartbeats that queries shared", |counters| counters.read_barriers),
    ("read_barriers_late_total", "Those that had to ask every follower", |counters| counters.late_barriers),
    ("log_syncs_total", "Syncs of the Raft log", |counters| counters.log_syncs),
    ("log_writes_total", "Writes that syncs of the Raft log made durable", |counters| counters.log_writes),
    ("log_bytes_total", "Bytes written to the Raft log", |counters| counters.log_bytes),
    ("entries_applied_total", "Log entries applied", |counters| counters.entries_applied),
    ("requests_applied_total", "Requests in the log entries applied", |counters| counters.requests_applied),
    ("apply_batches_total", "Batches written to the state database", |counters| counters.apply_batches),
    ("apply_waits_total", "Those of them that had to wait for the disk", |counters| counters.apply_waits),
    ("snapshots_installed_total", "Snapshots installed", |counters| counters.snapshots_installed),
    ("heartbeats_total", "Raft heartbeats sent by timers", |counters| counters.heartbeats),
    ("heartbeat_messages_total", "Messages that carried Raft heartbeats", |counters| counters.heartbeat_messages),
    ("link_beats_total", "Heartbeats of links to other disks", |counters| counters.link_beats),
    ("replicas_rebuilt_total", "Damaged shard replicas that began anew, empty", |counters| counters.replicas_rebuilt),
    ("replica_failures_total", "Times that a panic or an error of its storage ended a shard replica", |counters| {
        counters.replica_failures
    }),
];

/// All metrics of one disk node.
pub struct Metrics {
    registry: Registry,
    /// In the order of [`META`].
    meta: Vec<IntCounter>,
    /// Held while `meta` is brought up to date.
    meta_turn: Mutex<()>,
    replicas_asleep: IntGauge,
    replicas_stopped: IntGauge,
    metadata_full: IntGauge,
    metadata_displaced: IntGauge,
    log_kept_bytes: IntGauge,
    /// 1 while the metadata of this disk cannot be opened.
    pub metadata_closed: IntGauge,
    /// Chunks stored.
    pub puts: IntCounter,
    /// Payload of them, in bytes.
    pub put_bytes: IntCounter,
    /// Uploads refused because the disk is full.
    pub refused_full: IntCounter,
    /// Reads answered.
    pub reads: IntCounter,
    /// Payload of them, in bytes.
    pub read_bytes: IntCounter,
    /// Chunks deleted.
    pub deletes: IntCounter,
    /// Reads that met a bad or unreadable block.
    pub corrupt_blocks: IntCounter,
    /// Headers and payload that the scrub read, in bytes.
    pub scrub_bytes: IntCounter,
    /// Chunks that the scrub found damaged.
    pub scrub_findings: IntCounter,
    /// Reads of the scrub that failed, and did not when they were repeated.
    pub scrub_second_reads_good: IntCounter,
    /// Chunks found damaged by the pass under way, or else by the last one.
    pub scrub_pass_findings: IntGauge,
    /// Chunks found damaged that were not repaired yet.
    pub scrub_damaged: IntGauge,
    /// How far the pass is, in thousandths.
    pub scrub_position: IntGauge,
    scrub_pass_age: IntGauge,
    /// When the last pass ended, or the first one began, in milliseconds since 1970; zero: none did.
    scrub_since_ms: AtomicU64,
    /// Seconds each `fdatasync` of a group took.
    pub sync_seconds: Histogram,
    /// Requests that shared one sync.
    pub group_requests: Histogram,
    /// Records the last start found behind the watermarks.
    pub recovered_records: IntGauge,
    /// Torn records the last start dropped.
    pub torn_records: IntGauge,
    /// Gateways that have connections here.
    pub gateways: IntGauge,
    /// What new chunks may still take, in bytes.
    pub free_bytes: IntGauge,
    /// Chunks held.
    pub chunks: IntGauge,
    /// Payload of them, in bytes.
    pub chunk_bytes: IntGauge,
}

impl Metrics {
    /// A registry of its own.
    ///
    /// # Errors
    /// Never in practice: names are fixed and registered once.
    pub fn new() -> Result<Metrics, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let counter = IntCounter::new(format!("granary_disk_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(format!("granary_disk_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let histogram = |name: &str, help: &str, first: f64| -> Result<Histogram, prometheus::Error> {
            let buckets = prometheus::exponential_buckets(first, 2.0, 14)?;
            let histogram =
                Histogram::with_opts(HistogramOpts::new(format!("granary_disk_{name}"), help).buckets(buckets))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let meta: Result<Vec<IntCounter>, prometheus::Error> =
            META.iter().map(|(name, help, _)| counter(&format!("meta_{name}"), help)).collect();
        Ok(Metrics {
            meta: meta?,
            meta_turn: Mutex::new(()),
            replicas_asleep: gauge("meta_replicas_asleep", "Shard replicas whose timers stand still")?,
            replicas_stopped: gauge("meta_replicas_stopped", "Shard replicas that do not run: damaged, or failed")?,
            log_kept_bytes: gauge("meta_log_kept_bytes", "Raft logs of all replicas, in bytes")?,
            metadata_full: gauge("meta_full", "1 while the disk has no room for metadata to grow")?,
            metadata_displaced: gauge("meta_displaced", "1 while another disk answers at this disk's address")?,
            metadata_closed: gauge("meta_closed", "1 while the metadata of this disk cannot be opened")?,
            puts: counter("chunk_puts_total", "Chunks stored")?,
            put_bytes: counter("chunk_put_bytes_total", "Payload of chunks stored, in bytes")?,
            refused_full: counter("chunk_refused_full_total", "Uploads refused because the disk is full")?,
            reads: counter("chunk_reads_total", "Reads answered")?,
            read_bytes: counter("chunk_read_bytes_total", "Payload of reads answered, in bytes")?,
            deletes: counter("chunk_deletes_total", "Chunks deleted")?,
            corrupt_blocks: counter("corrupt_blocks_total", "Reads that met a bad or unreadable block")?,
            scrub_bytes: counter("scrub_bytes_total", "Headers and payload read by the scrub, in bytes")?,
            scrub_findings: counter("scrub_findings_total", "Chunks that the scrub found damaged")?,
            scrub_second_reads_good: counter(
                "scrub_second_reads_good_total",
                "Reads of the scrub that failed once, and not again",
            )?,
            scrub_pass_findings: gauge("scrub_pass_findings", "Chunks found damaged by this pass, or the last one")?,
            scrub_damaged: gauge("scrub_damaged", "Chunks found damaged that were not repaired yet")?,
            scrub_position: gauge("scrub_position", "How far the pass is, in thousandths; 1000 between two")?,
            scrub_pass_age: gauge("scrub_pass_age_seconds", "Seconds since a pass came to its end")?,
            scrub_since_ms: AtomicU64::new(0),
            sync_seconds: histogram("sync_seconds", "Duration of each fdatasync of a group, in seconds", 0.000_25)?,
            group_requests: histogram("group_requests", "Requests that shared one sync", 1.0)?,
            recovered_records: gauge("recovered_records", "Records the last start found behind the watermarks")?,
            torn_records: gauge("torn_records", "Torn records the last start dropped")?,
            gateways: gauge("gateways", "Gateways that have connections here")?,
            free_bytes: gauge("free_bytes", "What new chunks may still take, in bytes")?,
            chunks: gauge("chunks", "Chunks held")?,
            chunk_bytes: gauge("chunk_bytes", "Payload of chunks held, in bytes")?,
            registry,
        })
    }

    /// Takes over what the shard replicas counted. Their counts only grow.
    pub fn record_meta(&self, counters: &MetaCounters) {
        // Two scrapes at once would both add what one of them has added already.
        let _turn = self.meta_turn.lock().unwrap_or_else(PoisonError::into_inner);
        for (metric, (_, _, count)) in self.meta.iter().zip(META) {
            metric.inc_by(count(counters).saturating_sub(metric.get()));
        }
        self.replicas_asleep.set(i64::try_from(counters.replicas_asleep).unwrap_or(i64::MAX));
        self.log_kept_bytes.set(i64::try_from(counters.log_kept_bytes).unwrap_or(i64::MAX));
        self.metadata_full.set(i64::from(counters.is_full));
        self.metadata_displaced.set(i64::from(counters.is_displaced));
        self.replicas_stopped.set(i64::try_from(counters.replicas_stopped).unwrap_or(i64::MAX));
    }

    /// When the last pass of the scrub ended, or while none did when the first one began.
    pub fn note_scrub(&self, since_ms: Option<u64>) {
        self.scrub_since_ms.store(since_ms.unwrap_or(0), Ordering::Relaxed);
    }

    /// All of them in Prometheus text form.
    pub fn render(&self) -> Vec<u8> {
        let since_ms = self.scrub_since_ms.load(Ordering::Relaxed);
        let age_ms = if since_ms == 0 { 0 } else { now_ms().saturating_sub(since_ms) };
        self.scrub_pass_age.set(i64::try_from(age_ms / 1000).unwrap_or(i64::MAX));
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::warn!(%error, "cannot render metrics");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn every_metric_has_its_line_in_the_operations_page() {
        let page = include_str!("../../docs/operations.md");
        let text = String::from_utf8(Metrics::new().unwrap().render()).unwrap();
        let names: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        assert!(names.len() > 20, "{names:?}");
        let missing: Vec<&&str> = names.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
        assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
    }

    #[test]
    fn counts_of_the_replicas_are_rendered_as_they_are_now() {
        let metrics = Metrics::new().unwrap();
        metrics.record_meta(&MetaCounters { commands: 7, replicas_asleep: 3, ..MetaCounters::default() });
        metrics.record_meta(&MetaCounters { commands: 9, replicas_asleep: 1, ..MetaCounters::default() });
        let text = String::from_utf8(metrics.render()).unwrap();
        assert!(text.contains("\ngranary_disk_meta_commands_total 9\n"), "{text}");
        assert!(text.contains("\ngranary_disk_meta_replicas_asleep 1\n"), "{text}");
    }
}
