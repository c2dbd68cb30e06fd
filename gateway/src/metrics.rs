//! What the gateway counts, in one registry that `/metrics` prints.
//!
//! [`Metrics`] is a cheap handle. The families that several parts share stand here as fields; a part with families of
//! its own makes them with [`Metrics::counter`] and its neighbours and keeps the handles. Labels are always from a
//! small fixed set (verbs, disks, shards), never keys or bucket names: the registry must not grow with the data.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Upper bounds of latency buckets, in seconds: a millisecond to a minute.
const LATENCY_BUCKETS_S: &[f64] =
    &[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0];

/// A metric that could not be made or registered: a name taken twice or malformed, so a mistake in the program.
#[derive(Debug, thiserror::Error)]
#[error("metric `{name}`: {source}")]
pub struct MetricError {
    /// Which metric.
    pub name: String,
    /// What the registry said.
    #[source]
    pub source: prometheus::Error,
}

/// Handle of the registry and the shared families.
#[derive(Clone, Debug)]
pub struct Metrics {
    shared: Arc<Shared>,
}

/// The families that are named in more than one folder.
#[derive(Debug)]
pub struct Shared {
    registry: Registry,
    /// S3 requests answered, by `verb` (S3 operation name) and `status` (HTTP status).
    pub requests: IntCounterVec,
    /// Time from the request's head to the end of the answer, by `verb`, in seconds.
    pub request_seconds: HistogramVec,
    /// Requests being served.
    pub requests_in_flight: IntGauge,
    /// Payload received from clients, in bytes.
    pub bytes_in: IntCounter,
    /// Payload sent to clients, in bytes.
    pub bytes_out: IntCounter,
    /// State of each disk as this gateway sees it, by `disk` and `state` (up, suspect, down): 1 or 0.
    pub disk_state: IntGaugeVec,
    /// Free bytes by `disk`.
    pub disk_free_bytes: IntGaugeVec,
    /// Size in bytes by `disk`.
    pub disk_capacity_bytes: IntGaugeVec,
    /// Chunks by `disk`.
    pub disk_chunks: IntGaugeVec,
    /// Does this gateway know a leader of the shard? By `shard`: 1 or 0.
    pub shard_leader_known: IntGaugeVec,
    /// Voters that answered, by `shard`.
    pub shard_voters: IntGaugeVec,
    /// Commands and queries sent to shards, by `kind` (command, query) and `result` (ok, unavailable, refused).
    pub shard_requests: IntCounterVec,
    /// Attempts beyond the first of those, by `reason` (not_leader, unavailable, link, not_sent,
    /// overloaded, clock_off).
    pub shard_retries: IntCounterVec,
    /// Time of commands and queries, retries included, by `kind`, in seconds.
    pub shard_seconds: HistogramVec,
    /// Epoch of the cluster map in use.
    pub map_epoch: IntGauge,
    /// Chunks in the repair queue at the last look.
    pub repair_queue: IntGauge,
    /// Slots of placement groups whose chunks are on their way to another disk.
    pub slots_moving: IntGauge,
    /// Disks out of service because they were dead.
    pub disks_away: IntGauge,
    /// Dead disks that stay in service, because nobody can take over or the limit is reached.
    pub disks_dead_in_service: IntGauge,
    /// Until when healing is paused, Unix seconds; 0 when it is not.
    pub heal_paused_until: IntGauge,
    /// How many more disks the placement group in most danger can lose. Without labels, and without a value as long as
    /// that is not known: 0 would be an alarm.
    pub least_failures_left: IntGaugeVec,
    /// Disk nodes started by `granary dev`, first start included, by `disk`.
    pub disk_node_starts: IntCounterVec,
}

impl std::ops::Deref for Metrics {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Metrics {
    /// A new registry with the shared families.
    ///
    /// # Errors
    /// Two families of one name.
    pub fn new() -> Result<Metrics, MetricError> {
        let registry = Registry::new();
        let shared = Shared {
            requests: counter_vec(&registry, "granary_s3_requests_total", "S3 requests answered", &["verb", "status"])?,
            request_seconds: histogram_vec(
                &registry,
                "granary_s3_request_seconds",
                "Time to answer S3 requests",
                &["verb"],
            )?,
            requests_in_flight: gauge(&registry, "granary_s3_requests_in_flight", "S3 requests being served")?,
            bytes_in: counter(&registry, "granary_s3_bytes_in_total", "Payload bytes received from clients")?,
            bytes_out: counter(&registry, "granary_s3_bytes_out_total", "Payload bytes sent to clients")?,
            disk_state: gauge_vec(&registry, "granary_disk_state", "1 for the state a disk is in", &["disk", "state"])?,
            disk_free_bytes: gauge_vec(
                &registry,
                "granary_disk_seen_free_bytes",
                "Bytes free for new chunks, as the disk said last",
                &["disk"],
            )?,
            disk_capacity_bytes: gauge_vec(
                &registry,
                "granary_disk_seen_capacity_bytes",
                "Size of the file system",
                &["disk"],
            )?,
            disk_chunks: gauge_vec(
                &registry,
                "granary_disk_seen_chunks",
                "Chunks in the disk's index, as it said last",
                &["disk"],
            )?,
            shard_leader_known: gauge_vec(
                &registry,
                "granary_shard_leader_known",
                "1 when the shard has a leader",
                &["shard"],
            )?,
            shard_voters: gauge_vec(
                &registry,
                "granary_shard_voters",
                "Replicas of the shard that answer",
                &["shard"],
            )?,
            shard_requests: counter_vec(
                &registry,
                "granary_shard_requests_total",
                "Requests to shards",
                &["kind", "result"],
            )?,
            shard_retries: counter_vec(
                &registry,
                "granary_shard_retries_total",
                "Attempts beyond the first",
                &["reason"],
            )?,
            shard_seconds: histogram_vec(&registry, "granary_shard_seconds", "Time of requests to shards", &["kind"])?,
            map_epoch: gauge(&registry, "granary_map_epoch", "Epoch of the cluster map in use")?,
            repair_queue: gauge(&registry, "granary_repair_queue", "Chunks waiting for repair")?,
            slots_moving: gauge(&registry, "granary_slots_moving", "Slots whose chunks move to another disk")?,
            disks_away: gauge(&registry, "granary_disks_away", "Disks out of service because they were dead")?,
            disks_dead_in_service: gauge(
                &registry,
                "granary_disks_dead_in_service",
                "Dead disks that stay in service because nobody can take over or the limit is reached",
            )?,
            heal_paused_until: gauge(
                &registry,
                "granary_heal_paused_until_seconds",
                "Until when healing is paused, in Unix time; 0 when it is not",
            )?,
            least_failures_left: gauge_vec(
                &registry,
                "granary_least_failures_left",
                "How many more disks the placement group in most danger can lose",
                &[],
            )?,
            disk_node_starts: counter_vec(&registry, "granary_disk_node_starts_total", "Disk node starts", &["disk"])?,
            registry,
        };
        Ok(Metrics { shared: Arc::new(shared) })
    }

    /// Makes and registers a counter. Names begin with `granary_`, counters end with `_total`.
    ///
    /// # Errors
    /// The name is taken or malformed.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricError> {
        counter(&self.shared.registry, name, help)
    }

    /// Makes and registers counters by labels.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricError> {
        counter_vec(&self.shared.registry, name, help, labels)
    }

    /// Makes and registers a gauge.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricError> {
        gauge(&self.shared.registry, name, help)
    }

    /// Makes and registers gauges by labels.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricError> {
        gauge_vec(&self.shared.registry, name, help, labels)
    }

    /// Makes and registers a histogram of seconds.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn histogram(&self, name: &str, help: &str) -> Result<Histogram, MetricError> {
        let made = Histogram::with_opts(HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS_S.to_vec()));
        register(&self.shared.registry, name, made)
    }

    /// Makes and registers histograms of seconds by labels.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn histogram_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<HistogramVec, MetricError> {
        histogram_vec(&self.shared.registry, name, help, labels)
    }

    /// Makes and registers a gauge of fractions.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn fraction(&self, name: &str, help: &str) -> Result<Gauge, MetricError> {
        register(&self.shared.registry, name, Gauge::new(name, help))
    }

    /// Registers counters that a part keeps by itself: `samples` gives (name, help, value) of each, always the same
    /// names in the same order, and is asked at each scrape. Printed as `{prefix}{name}_total`.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn register_sampled(
        &self,
        prefix: &str,
        samples: impl Fn() -> Vec<(&'static str, &'static str, u64)> + Send + Sync + 'static,
    ) -> Result<(), MetricError> {
        let mut descs = Vec::new();
        for (name, help, _) in samples() {
            let name = sampled_name(prefix, name);
            let desc = Desc::new(name.clone(), help.trim().to_owned(), Vec::new(), HashMap::new());
            descs.push(desc.map_err(|source| MetricError { name, source })?);
        }
        let sampled = Sampled { prefix: prefix.to_owned(), descs, samples: Box::new(samples) };
        let registered = self.shared.registry.register(Box::new(sampled));
        registered.map_err(|source| MetricError { name: sampled_name(prefix, "*"), source })
    }

    /// One S3 request was answered.
    pub fn request_done(&self, verb: &str, status: u16, took: Duration) {
        self.requests.with_label_values(&[verb, &status.to_string()]).inc();
        self.request_seconds.with_label_values(&[verb]).observe(took.as_secs_f64());
    }

    /// Everything, in Prometheus text format.
    ///
    /// # Errors
    /// What the encoder says; it writes to memory, so hardly ever.
    pub fn text(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.shared.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// (name, help, value).
type Samples = Box<dyn Fn() -> Vec<(&'static str, &'static str, u64)> + Send + Sync>;

/// Counters of a part that knows nothing of the registry.
struct Sampled {
    prefix: String,
    descs: Vec<Desc>,
    samples: Samples,
}

impl Collector for Sampled {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let family = |(name, help, value): (&str, &str, u64)| {
            // The description of the same name was made when it was registered, so this cannot fail.
            let counter = IntCounter::new(sampled_name(&self.prefix, name), help.trim()).ok()?;
            counter.inc_by(value);
            Some(counter.collect())
        };
        (self.samples)().into_iter().filter_map(family).flatten().collect()
    }
}

fn sampled_name(prefix: &str, name: &str) -> String {
    format!("{prefix}{name}_total")
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    name: &str,
    made: Result<C, prometheus::Error>,
) -> Result<C, MetricError> {
    let named = |source| MetricError { name: name.to_owned(), source };
    let metric = made.map_err(named)?;
    registry.register(Box::new(metric.clone())).map_err(named)?;
    Ok(metric)
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, MetricError> {
    register(registry, name, IntCounter::new(name, help))
}

fn counter_vec(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricError> {
    register(registry, name, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, MetricError> {
    register(registry, name, IntGauge::new(name, help))
}

fn gauge_vec(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricError> {
    register(registry, name, IntGaugeVec::new(Opts::new(name, help), labels))
}

fn histogram_vec(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<HistogramVec, MetricError> {
    let opts = HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS_S.to_vec());
    register(registry, name, HistogramVec::new(opts, labels))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    #[test]
    fn what_is_counted_is_printed_and_a_name_is_taken_once() {
        let metrics = Metrics::new().unwrap();
        metrics.request_done("PutObject", 200, Duration::from_millis(3));
        let own = metrics.counter("granary_own_total", "mine").unwrap();
        own.inc_by(7);
        assert!(metrics.counter("granary_own_total", "again").is_err());
        let text = String::from_utf8(metrics.text().unwrap()).unwrap();
        assert!(text.contains("granary_s3_requests_total{status=\"200\",verb=\"PutObject\"} 1"), "{text}");
        assert!(text.contains("granary_own_total 7"), "{text}");
    }

    #[test]
    fn every_metric_has_its_line_in_the_operations_page() {
        let page = include_str!("../../docs/operations.md");
        let own = include_str!("metrics.rs").split("#[cfg(test)]").next().unwrap();
        let mut names: Vec<String> =
            own.split('"').filter(|text| text.starts_with("granary_")).map(str::to_owned).collect();
        let sampled = [
            ("granary_object_", crate::object::ObjectCounters::default().samples()),
            ("granary_disk_", crate::disks::DiskCounters::default().samples()),
        ];
        for (prefix, samples) in sampled {
            names.extend(samples.iter().map(|(name, ..)| sampled_name(prefix, name)));
        }
        assert!(names.len() > 40, "{names:?}");
        // A name ends where its labels or its code span do.
        let missing: Vec<&String> =
            names.iter().filter(|name| !['`', '{'].iter().any(|end| page.contains(&format!("`{name}{end}")))).collect();
        assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
    }

    #[test]
    fn counters_that_a_part_keeps_itself_are_printed_as_they_stand_at_each_scrape() {
        let metrics = Metrics::new().unwrap();
        let kept = Arc::new(AtomicU64::new(3));
        let read = kept.clone();
        metrics.register_sampled("granary_part_", move || vec![("steps", " Steps made.", read.load(Relaxed))]).unwrap();
        let text = || String::from_utf8(metrics.text().unwrap()).unwrap();
        let printed = "# HELP granary_part_steps_total Steps made.\n# TYPE granary_part_steps_total counter\n";
        assert!(text().contains(&format!("{printed}granary_part_steps_total 3\n")), "{}", text());
        kept.store(5, Relaxed);
        assert!(text().contains("granary_part_steps_total 5\n"), "{}", text());
        assert!(metrics.counter("granary_part_steps_total", "taken").is_err());
    }
}
