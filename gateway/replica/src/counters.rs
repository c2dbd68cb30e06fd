//! What the replicas of a disk did.

/// Counts since the host was opened, which only grow, and some of how it stands now, which say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MetaCounters {
    /// Commands taken.
    pub commands: u64,
    /// Log entries they became.
    pub proposals: u64,
    /// Queries taken.
    pub queries: u64,
    /// Read barriers (rounds of heartbeats) they shared.
    pub read_barriers: u64,
    /// Those that had to ask everybody, because one that was asked first was late.
    pub late_barriers: u64,
    /// Syncs of the Raft log.
    pub log_syncs: u64,
    /// Appends, votes, truncations and purges those made durable; divided by `log_syncs`: the effect of group commit.
    pub log_writes: u64,
    /// Bytes written to the Raft log.
    pub log_bytes: u64,
    /// Log entries applied.
    pub entries_applied: u64,
    /// Requests in them.
    pub requests_applied: u64,
    /// Batches written to the state database.
    pub apply_batches: u64,
    /// Those that had to wait for the disk: what they read was not in memory, or the memory for writes was full.
    pub apply_waits: u64,
    /// Snapshots installed.
    pub snapshots_installed: u64,
    /// Raft heartbeats sent by timers.
    pub heartbeats: u64,
    /// Messages that carried them, those of several shards together.
    pub heartbeat_messages: u64,
    /// Heartbeats of links to other disks, sent or answered.
    pub link_beats: u64,
    /// Replicas whose timers stand still now.
    pub replicas_asleep: u64,
    /// Bytes of the Raft logs of all replicas now.
    pub log_kept_bytes: u64,
    /// The disk has no room for metadata to grow.
    pub is_full: bool,
    /// Another disk answers at this disk's address: it leads nothing.
    pub is_displaced: bool,
    /// Replicas that do not run now: their data cannot be used, or they failed and are opened again after a pause.
    pub replicas_stopped: u64,
    /// Times that a panic, or an error of its storage, ended a replica.
    pub replica_failures: u64,
    /// Damaged replicas that began anew, empty.
    pub replicas_rebuilt: u64,
}
