//! How fast a shard's timers run.

use granary_placement::id::ShardId;
use granary_placement::settings::Values;
use openraft::SnapshotPolicy;
use std::sync::Arc;
use std::time::Duration;

/// Timers of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// Between heartbeats of a leader, in milliseconds.
    pub heartbeat_ms: u64,
    /// Shortest time without a leader before an election, in milliseconds.
    pub election_min_ms: u64,
    /// Longest, in milliseconds. Drawn anew for each election.
    pub election_max_ms: u64,
    /// How long a command or query may take before it is given up as Unavailable, in milliseconds.
    pub request_ms: u64,
    /// Log entries between two snapshots: how much a restarted replica replays at most.
    pub snapshot_entries: u64,
    /// Log entries kept behind a snapshot for replicas that lag a little.
    pub keep_entries: u64,
    /// Most bytes of log that a shard keeps once its state is durable, however few entries that are.
    pub log_bytes: u64,
    /// How long a read waits for the followers that it asked first before it asks all, in milliseconds.
    pub read_hedge_ms: u64,
    /// A shard whose log has not grown for so long stops its timers, in milliseconds; 0: never.
    pub sleep_after_ms: u64,
}

impl Timing {
    /// How long a heartbeat waits for those of other shards to the same disk.
    pub fn heartbeat_window(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms / 5)
    }

    /// Between two heartbeats of a link. A link without one for twice as long is lost: what its disk led has a new
    /// leader about a second later than if its shards had been awake. Links cost more than anything else while nobody
    /// is there, for there is one between each two disks.
    pub fn link_beat(&self) -> Duration {
        Duration::from_millis(self.election_min_ms)
    }

    /// The timers of that shard. The root shard never sleeps, and no client waits for it but one that makes or deletes
    /// a bucket: its timers run slower, for they are most of what a cluster costs that nobody uses.
    #[must_use]
    pub fn of(&self, shard: ShardId) -> Timing {
        match shard {
            ShardId::ROOT => Timing {
                heartbeat_ms: self.heartbeat_ms.saturating_mul(4).min(self.election_min_ms),
                election_min_ms: self.election_min_ms.saturating_mul(2),
                election_max_ms: self.election_max_ms.saturating_mul(2),
                ..self.clone()
            },
            _ => self.clone(),
        }
    }

    /// From the settings `node.raft_*`.
    pub fn from_settings(values: &Values) -> Timing {
        Timing {
            heartbeat_ms: millis(values.time("node.raft_heartbeat")),
            election_min_ms: millis(values.time("node.raft_election_min")),
            election_max_ms: millis(values.time("node.raft_election_max")),
            request_ms: millis(values.time("node.raft_request")),
            snapshot_entries: values.number("node.raft_snapshot_entries"),
            keep_entries: values.number("node.raft_keep_entries"),
            log_bytes: values.number("node.raft_log"),
            read_hedge_ms: millis(values.time("node.read_hedge")),
            sleep_after_ms: millis(values.time("node.raft_sleep_after")),
        }
    }
}

impl Default for Timing {
    fn default() -> Timing {
        Timing::from_settings(&Values::default())
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The library's configuration for a shard with these timers.
pub(super) fn raft_config(shard: ShardId, timing: &Timing) -> Result<Arc<openraft::Config>, String> {
    let config = openraft::Config {
        cluster_name: format!("shard-{shard}"),
        heartbeat_interval: timing.heartbeat_ms,
        election_timeout_min: timing.election_min_ms,
        election_timeout_max: timing.election_max_ms,
        install_snapshot_timeout: super::network::INSTALL_DEADLINE.as_millis() as u64,
        max_payload_entries: 256,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_entries),
        max_in_snapshot_log_to_keep: timing.keep_entries,
        replication_lag_threshold: timing.snapshot_entries,
        purge_batch_size: 64,
        api_channel_size: Some(1_024),
        notification_channel_size: Some(4_096),
        state_machine_channel_size: Some(256),
        enable_pre_vote: Some(true),
        allow_log_reversion: Some(false),
        // A leader that restarts must be elected again: only the blank entry of a new leadership tells it what was
        // committed before, and until then its reads could be older than ones already given.
        enable_leader_restore: Some(false),
        ..openraft::Config::default()
    };
    config.validate().map(Arc::new).map_err(|error| error.to_string())
}
