//! What a disk node counts. Names begin with `granary_disk_`; quantities end in their unit.

use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntGauge, Registry, TextEncoder};

/// All metrics of one disk node.
pub struct Metrics {
    registry: Registry,
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
    /// Seconds each `fdatasync` of a group took.
    pub sync_seconds: Histogram,
    /// Requests that shared one sync.
    pub group_requests: Histogram,
    /// Records the last start found behind the watermarks.
    pub recovered_records: IntGauge,
    /// Torn records the last start dropped.
    pub torn_records: IntGauge,
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
        Ok(Metrics {
            puts: counter("chunk_puts_total", "Chunks stored")?,
            put_bytes: counter("chunk_put_bytes_total", "Payload of chunks stored, in bytes")?,
            refused_full: counter("chunk_refused_full_total", "Uploads refused because the disk is full")?,
            reads: counter("chunk_reads_total", "Reads answered")?,
            read_bytes: counter("chunk_read_bytes_total", "Payload of reads answered, in bytes")?,
            deletes: counter("chunk_deletes_total", "Chunks deleted")?,
            corrupt_blocks: counter("corrupt_blocks_total", "Reads that met a bad or unreadable block")?,
            sync_seconds: histogram("sync_seconds", "Duration of each fdatasync of a group, in seconds", 0.000_25)?,
            group_requests: histogram("group_requests", "Requests that shared one sync", 1.0)?,
            recovered_records: gauge("recovered_records", "Records the last start found behind the watermarks")?,
            torn_records: gauge("torn_records", "Torn records the last start dropped")?,
            free_bytes: gauge("free_bytes", "What new chunks may still take, in bytes")?,
            chunks: gauge("chunks", "Chunks held")?,
            chunk_bytes: gauge("chunk_bytes", "Payload of chunks held, in bytes")?,
            registry,
        })
    }

    /// All of them in Prometheus text form.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::warn!(%error, "cannot render metrics");
        }
        text
    }
}
