//! What all requests share: shards, object store, settings, and a cache of uploads.

use super::access::AccessKey;
use crate::disks::DiskHealth;
use crate::metrics::Metrics;
use crate::object::ObjectStore;
use crate::shards::Shards;
use granary_meta::record::{AccountId, BucketId, UploadId, UploadRecord};
use granary_placement::settings::Values;
use quick_cache::sync::Cache;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// An upload and what it belongs to: an id named with another bucket or key is another upload, which is not there.
pub(super) type UploadKey = (BucketId, String, UploadId);

/// Most uploads whose records are cached.
const CACHED_UPLOADS: usize = 10_000;

/// Settings of the S3 front end.
#[derive(Debug, Clone)]
pub struct S3Settings {
    /// The region clients sign for.
    pub region: String,
    /// Domain under which buckets are host names; None for path style alone.
    pub base_domain: Option<String>,
    /// Access keys by id. Empty ones are refused at start.
    pub keys: HashMap<String, AccessKey>,
    /// Connections served at the same time; a silent one makes room for more, or requests are answered with 503.
    pub max_connections: usize,
    /// The same for one address.
    pub connections_per_address: usize,
    /// Addresses and networks that have no bound of their own, with commas between them.
    pub trusted_proxies: String,
    /// Requests in work at the same time; more are answered with 503.
    pub max_requests: usize,
    /// Longest wait for the headers of a connection's first request, and for the rest of another's once its first byte
    /// came.
    pub header_timeout: Duration,
    /// Longest time in which a body makes no progress, in either direction.
    pub body_idle_timeout: Duration,
    /// Fewer bytes than this are no progress, unless they are the last.
    pub body_progress_bytes: u64,
    /// Longest silence of a kept-alive connection between requests.
    pub keep_alive: Duration,
    /// Where requests are counted; None: nowhere.
    pub metrics: Option<Metrics>,
}

impl S3Settings {
    /// Settings with one root key, for a region; the rest by default.
    pub fn new(region: &str, access_key: &str, secret: &str) -> S3Settings {
        S3Settings::from_settings(&Values::default(), region, access_key, secret)
    }

    /// From the settings `s3.*`, with one root key, for a region.
    pub fn from_settings(values: &Values, region: &str, access_key: &str, secret: &str) -> S3Settings {
        let key = AccessKey { secret: secret.to_owned(), account: AccountId::ROOT };
        S3Settings {
            region: region.to_owned(),
            base_domain: None,
            keys: HashMap::from([(access_key.to_owned(), key)]),
            max_connections: values.size("s3.max_connections"),
            connections_per_address: values.size("s3.connections_per_address"),
            trusted_proxies: values.text("s3.trusted_proxies").to_owned(),
            max_requests: values.size("s3.max_requests"),
            header_timeout: values.time("s3.header_timeout"),
            body_idle_timeout: values.time("s3.body_idle_timeout"),
            body_progress_bytes: values.number("s3.body_progress"),
            keep_alive: values.time("s3.keep_alive"),
            metrics: None,
        }
    }
}

/// Shared by all requests.
pub struct S3Context {
    pub(super) shards: Shards,
    pub(super) objects: ObjectStore,
    pub(super) settings: S3Settings,
    /// What uploads were created with; see [`Call::upload`](super::call::Call::upload).
    pub(super) uploads: Cache<UploadKey, Arc<UploadRecord>>,
}

impl S3Context {
    /// Serves what is in those shards and that object store.
    pub fn new(shards: Shards, objects: ObjectStore, settings: S3Settings) -> Arc<S3Context> {
        Arc::new(S3Context { shards, objects, settings, uploads: Cache::new(CACHED_UPLOADS) })
    }

    /// Whether there is a scheme of that name; storage classes are named after schemes.
    pub(super) fn has_scheme(&self, name: &str) -> bool {
        self.shards.current_map().is_some_and(|map| map.schemes.contains_key(name))
    }

    /// Whether disks answer, but fewer than two of them have room: trying again does not help, more space does.
    pub(super) fn disks_are_full(&self) -> bool {
        let view = self.objects.disks().view();
        let up = view.iter().filter(|disk| disk.health == DiskHealth::Up).count();
        let full = view.iter().filter(|disk| disk.is_full()).count();
        full > 0 && up - full < 2
    }
}
