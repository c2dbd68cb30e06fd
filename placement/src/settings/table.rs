//! The settings. One is added here, and read in the `from_settings` of the struct that uses it.
//!
//! Bounds keep out what cannot work; they do not say what is wise.

use super::Scope::{Cluster, Process};
use super::{Kind, Scope, Setting, Value};
use std::borrow::Cow;
use std::time::Duration;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn min(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

const fn of(name: &'static str, scope: Scope, default: Value, kind: Kind, meaning: &'static str) -> Setting {
    Setting { name, default, kind, scope, meaning }
}

const fn time(
    name: &'static str,
    scope: Scope,
    default: Duration,
    range: [Duration; 2],
    meaning: &'static str,
) -> Setting {
    of(name, scope, Value::Time(default), Kind::Time(range[0], range[1]), meaning)
}

const fn bytes(name: &'static str, scope: Scope, default: u64, range: [u64; 2], meaning: &'static str) -> Setting {
    of(name, scope, Value::Number(default), Kind::Bytes(range[0], range[1]), meaning)
}

const fn count(name: &'static str, scope: Scope, default: u64, range: [u64; 2], meaning: &'static str) -> Setting {
    of(name, scope, Value::Number(default), Kind::Count(range[0], range[1]), meaning)
}

/// Deadlines of requests.
const DEADLINE: [Duration; 2] = [ms(100), min(10)];
/// How long things are kept, held or waited for.
const WAIT: [Duration; 2] = [ms(1), min(60)];
/// Things at the same time.
const AT_ONCE: [u64; 2] = [1, 100_000];

/// All settings, section by section.
pub const TABLE: &[Setting] = &[
    // Payloads on their way into extents and back.
    bytes("object.inline_limit", Process, 8 * KIB, [0, 256 * KIB], "Payloads up to this many bytes ride in the object record."),
    bytes("object.extent", Process, 64 * MIB, [MIB, 64 * MIB], "Longest extent, in payload bytes."),
    bytes("object.whole_chunk", Process, MIB, [0, 64 * MIB], "Extents whose chunks are at most this long are sent with one request per chunk, all bytes at hand."),
    bytes("object.replay", Process, 8 * MIB, [0, 64 * MIB], "An extent that fails is written again elsewhere while no more than this much of it was taken from the body."),
    time("object.write_deadline", Process, s(10), DEADLINE, "How long one write to one disk may take, and how long its answer may take after the last byte."),
    time("object.read_deadline", Process, s(10), DEADLINE, "How long one read from one disk may take."),
    bytes("object.window", Process, MIB, [128 * KIB, 16 * MIB], "Bytes of one chunk per read request. A reader holds two windows of K of these."),
    bytes("object.memory", Process, 256 * MIB, [16 * MIB, TIB], "Bytes of payloads and XML bodies in memory at once, of all requests of a gateway. Beside them each GET may have one block."),
    time("object.memory_patience", Process, s(2), WAIT, "An upload that holds memory while nothing of its body comes is given up after this time when others wait for memory."),
    time("object.longest_upload", Process, min(24 * 60), [min(1), min(60 * 24 * 7)], "A payload that has taken longer to arrive is refused: what it wrote may be taken for left over."),
    time("object.hedge_floor", Process, ms(30), [ms(1), s(60)], "The shortest time after which other disks are asked for what one is late with."),
    of("object.hedge_percent", Process, Value::Number(10), Kind::Percent(0, 100), "Extra reads for slow disks, in percent of all reads. Reads in place of failed disks are not counted."),
    // Repair and garbage: the same for all gateways, changed while they run.
    time("heal.interval", Cluster, s(2), [ms(10), min(10)], "Time between two looks at the repair queues. With nothing to do for a while it is 30 s, if that is longer; then what another gateway's write found missing waits so long."),
    count("heal.extents_at_once", Cluster, 8, [1, 256], "Extents rebuilt at once."),
    of("heal.rate", Cluster, Value::Number(512 * MIB), Kind::BytesPerSecond(0, TIB), "Bytes read and written for rebuilding by one gateway; 0 for no ceiling."),
    bytes("heal.window", Cluster, MIB, [64 * KIB, 4 * MIB], "Bytes of each chunk in memory per extent that is being rebuilt."),
    count("heal.extents_per_pass", Cluster, 256, [1, 100_000], "Extents rebuilt between two looks at the queues."),
    count("heal.pages_per_pass", Cluster, 100, [1, 10_000], "Pages of 1,000 queue entries looked at per shard and pass."),
    time("heal.first_backoff", Cluster, s(5), WAIT, "First pause before a failed rebuild is tried again; it doubles up to heal.longest_backoff."),
    time("heal.longest_backoff", Cluster, min(5), WAIT, "Longest such pause."),
    time("heal.garbage_grace", Cluster, min(10), [s(1), min(60 * 24)], "Garbage younger than this stays: readers may be in the middle of it."),
    time("heal.longest_read", Cluster, min(24 * 60), [s(1), min(60 * 24 * 30)], "Garbage waits for reads that last longer than its grace, up to this long. Longer ones may find chunks gone when their object was overwritten or deleted."),
    time("heal.garbage_backoff", Cluster, s(30), WAIT, "Pause after garbage could not be deleted everywhere."),
    time("heal.sweep_interval", Cluster, min(6 * 60), [ms(10), min(60 * 24 * 30)], "Time between two sweeps over all disks for chunks that no shard knows."),
    time("heal.orphan_age", Cluster, min(48 * 60), [ms(10), min(60 * 24 * 30)], "Chunks that no shard knows stay at least this long: they may belong to an upload. To be longer than object.longest_upload."),
    time("heal.quarantine", Cluster, min(7 * 24 * 60), [ms(10), min(60 * 24 * 365)], "How long chunks that no shard knows are kept in quarantine before they are deleted."),
    of("heal.orphan_limit", Cluster, Value::Number(1), Kind::Percent(0, 100), "A disk of whose chunks more than this part is known to no shard is left alone until this is raised."),
    time("heal.move_settle", Cluster, s(10), [ms(10), min(60)], "How long a slot that got another disk is left alone: by then every gateway writes to the new one."),
    time("heal.out_after", Cluster, min(10), [s(1), min(60 * 24)], "A disk that a majority of the metadata disks and the gateway that heals have not reached for this long goes out of service, and the others take over what it held."),
    of("heal.out_limit", Cluster, Value::Auto, Kind::Percent(0, 100), "No more disks go out within an hour than this part of all disks, rounded up. auto: as many as the largest server has. 0: none, an operator decides."),
    time("heal.well_after", Cluster, min(1), [ms(100), min(60)], "A disk that did not answer is well again once it has answered for this long; one that went out is let back in."),
    of("heal.fill_ceiling", Cluster, Value::Number(90), Kind::Percent(1, 100), "A disk that would be fuller than this takes over nothing of a disk that went out, and gets no share of what is evened out after that."),
    count("heal.paused_until", Cluster, 0, [0, 253_402_300_799_999], "Repair is paused until then, in Unix milliseconds; what is more than 7 days ahead does not count. Set by `granary heal pause`."),
    time("heal.lease_ttl", Cluster, s(15), [s(1), min(10)], "A lease of background work that was not renewed for this long is taken over by another gateway."),
    time("heal.control_deadline", Cluster, s(10), DEADLINE, "How long a request to a disk that reads no chunks may take."),
    time("heal.verify_deadline", Cluster, min(1), DEADLINE, "How long a disk may take to verify a batch of chunks."),
    // How gateways watch disks and talk to them.
    time("disks.ping_interval", Process, s(1), [ms(50), min(1)], "Time between two pings of a disk."),
    time("disks.ping_deadline", Process, s(2), [ms(50), min(1)], "How long a ping may take. A disk that is suspect for nothing costs repairs."),
    time("disks.down_after", Process, s(2), [ms(50), min(10)], "A disk that has failed for this long is down. A refused connection is down at once."),
    time("disks.suspect_hold", Process, s(2), WAIT, "After an error in service a disk stays suspect this long, though it answers pings."),
    time("disks.unwritable_hold", Process, s(5), WAIT, "A disk that was full or overloaded gets no new chunks this long."),
    count("disks.pings_at_once", Process, 64, AT_ONCE, "Pings under way at once."),
    time("disks.connect_timeout", Process, s(2), DEADLINE, "Name lookup and TCP connect."),
    time("disks.handshake_timeout", Process, s(5), DEADLINE, "The handshake that follows."),
    time("disks.answer_timeout", Process, s(30), DEADLINE, "From the end of a request to the head of its answer."),
    time("disks.stall_timeout", Process, s(30), DEADLINE, "Without a byte more, in a body or a frame, either way."),
    count("disks.requests_at_once", Process, 128, AT_ONCE, "Chunk requests under way at once, per disk. Fewer when so many gateways share the node that seven eighths of its places (node.max_connections) divided by them, at least 8, are fewer."),
    time("disks.pool_wait", Process, s(3), WAIT, "How long a chunk request waits for a place among them, and a write for one at a disk node whose places are taken, before the disk counts as overloaded. Longer than the 2 s for which a silent connection keeps its place there."),
    count("disks.idle_connections", Process, 64, [0, 100_000], "Data connections kept for the next request, per disk."),
    time("disks.idle_keep", Process, s(5), WAIT, "How long they are kept. Shorter than node.head_timeout, so that the gateway is the one who closes."),
    count("disks.control_at_once", Process, 1024, AT_ONCE, "Control requests under way at once, per disk."),
    bytes("disks.control_queue", Process, 64 * MIB, [MIB, GIB], "Control requests waiting to be sent, in bytes of their bodies, per disk."),
    time("disks.reconnect_min", Process, ms(50), WAIT, "Pause after the first failed control connect; it doubles with each further failure."),
    time("disks.reconnect_max", Process, s(2), WAIT, "Longest such pause."),
    time("disks.control_ping_interval", Process, s(2), [ms(50), min(1)], "A silent control connection is asked for a sign of life this often."),
    time("disks.control_silence", Process, s(8), DEADLINE, "A control connection silent for this long is given up."),
    // How gateways find and ask metadata shards.
    time("shards.deadline", Process, s(20), DEADLINE, "How long a request to a shard is tried in all."),
    time("shards.attempt", Process, s(4), DEADLINE, "How long one attempt may take. Longer than an election, so that a busy leader is not deserted; short enough that a hung one is."),
    time("shards.silence", Process, s(2), WAIT, "How long a member that did not answer is left alone within one request."),
    time("shards.first_pause", Process, ms(20), WAIT, "The first pause after all members were asked; each next one is twice as long."),
    time("shards.longest_pause", Process, s(1), WAIT, "The longest such pause."),
    time("shards.settle", Process, s(3), WAIT, "How long a bucket lookup waits for a deletion under way to end one way or the other."),
    // The S3 listener.
    count("s3.max_connections", Process, 4096, AT_ONCE, "Connections served at the same time. The one that has been silent the longest makes room for a new one; when none is silent, requests on more are answered with 503."),
    count("s3.connections_per_address", Process, 1024, AT_ONCE, "The same for the connections of one address."),
    of("s3.trusted_proxies", Process, Value::Text(Cow::Borrowed("")), Kind::Text(1000), "Addresses and networks of proxies, with commas between them, such as 10.0.0.0/8: they speak for many clients and have no bound of their own."),
    count("s3.max_requests", Process, 1024, AT_ONCE, "Requests in work at the same time; more are answered with 503."),
    time("s3.header_timeout", Process, s(10), DEADLINE, "Longest wait for a request's headers: from the beginning of the connection for the first one, from their first byte for the others."),
    time("s3.body_idle_timeout", Process, min(1), DEADLINE, "Longest time in which a body makes no progress, in either direction."),
    bytes("s3.body_progress", Process, 4 * KIB, [1, MIB], "Fewer bytes than this are no progress, unless they are the last."),
    time("s3.keep_alive", Process, min(2), [s(1), min(60)], "Longest silence of a kept-alive connection between requests."),
    // Disk nodes: the chunk store.
    of("node.reserve", Process, Value::Auto, Kind::Bytes(0, 1 << 60), "Free space that new chunks never take: for deletes, the index and the metadata of a full disk. auto: 1 % of the file system, 64MiB to 8GiB, at most an eighth."),
    of("node.meta_reserve", Process, Value::Auto, Kind::Bytes(0, 1 << 60), "Free space below which metadata take deletes and repairs only. Repairs leave three quarters of node.reserve, so it is to be less than that; 0: no bound, and a full disk ends its node. auto: half of node.reserve."),
    bytes("node.segment", Process, 256 * MIB, [64 * KIB, TIB], "Length of a segment. A longer record gets a segment of its own; on a filling disk segments are shorter."),
    bytes("node.min_segment", Process, 4 * MIB, [64 * KIB, TIB], "Shortest segment worth making."),
    bytes("node.whole", Process, MIB, [64 * KIB, 64 * MIB], "Chunks up to this long are handed to the writer whole."),
    bytes("node.piece", Process, 256 * KIB, [64 * KIB, 64 * MIB], "Longer ones come in pieces of this size."),
    bytes("node.queue", Process, 64 * MIB, [MIB, 4 * GIB], "Payload waiting for the writer."),
    count("node.queue_requests", Process, 1024, AT_ONCE, "Requests waiting for the writer."),
    count("node.read_threads", Process, 4, [1, 256], "Threads that read."),
    count("node.read_queue", Process, 256, AT_ONCE, "Requests waiting for them."),
    bytes("node.flush", Process, 256 * MIB, [MIB, TIB], "The index is flushed after this much was written; bounds what recovery reads."),
    time("node.flush_interval", Process, s(30), [ms(100), min(60)], "And after this long."),
    time("node.punch_interval", Process, s(1), [ms(10), min(60)], "Space of dead chunks comes back within about this time."),
    // Disk nodes: the scrub.
    time("node.scrub_interval", Process, min(14 * 24 * 60), [ms(0), min(366 * 24 * 60)], "Every chunk of a disk is read and checked once in this time; 0ms: never. A shorter one than 1 s counts as 1 s."),
    of("node.scrub_floor", Process, Value::Number(MIB), Kind::BytesPerSecond(64 * KIB, TIB), "How fast that goes at least. Faster when the interval asks for it: what is left to read, divided by the time that is left."),
    of("node.scrub_ceiling", Process, Value::Number(64 * MIB), Kind::BytesPerSecond(64 * KIB, TIB), "How fast that goes at most, however late it is."),
    // Disk nodes: the listener.
    count("node.max_connections", Process, 512, AT_ONCE, "Connections for chunk requests at once. Each may buffer about a megabyte. One between two requests makes room for a new one. Fewer, with a warning, when the process may not open so many files."),
    count("node.max_control_connections", Process, 2048, AT_ONCE, "Connections for everything else: one for each gateway; on disks that hold the root shard one for each disk node, on other metadata disks one for each of them."),
    count("node.max_handshakes", Process, 256, AT_ONCE, "Connections at once that are not authenticated yet. The oldest makes room for a new one."),
    time("node.handshake_timeout", Process, s(5), DEADLINE, "From accept to the end of the handshake."),
    time("node.head_timeout", Process, s(10), DEADLINE, "For the whole head of a request, counted from the end of the one before: also how long a data connection may be idle."),
    time("node.stall_timeout", Process, s(30), DEADLINE, "Without a byte more, in a body or a frame, either way."),
    count("node.control_at_once", Process, 1024, AT_ONCE, "Control requests at work at once, per connection."),
    bytes("node.control_bytes", Process, 64 * MIB, [MIB, 4 * GIB], "Bodies of control requests at work, over all connections."),
    time("node.control_idle_timeout", Process, s(30), DEADLINE, "A control connection on which nothing came for this long is closed; clients ping more often."),
    time("node.stop_grace", Process, s(5), DEADLINE, "When stopping: how long requests under way may take to end."),
    // Disk nodes: Raft. The same on all disk nodes of a cluster.
    time("node.raft_heartbeat", Process, ms(250), [ms(10), min(1)], "Between two heartbeats of a leader."),
    time("node.raft_election_min", Process, s(1), [ms(50), min(5)], "Shortest time without a leader before an election. Several heartbeats."),
    time("node.raft_election_max", Process, s(2), [ms(100), min(10)], "Longest such time. It is drawn anew for each election."),
    time("node.raft_request", Process, s(10), DEADLINE, "How long a command or query may take before it is given up."),
    count("node.raft_snapshot_entries", Process, 5_000, [10, 10_000_000], "Log entries between two snapshots: how much a restarted replica replays at most."),
    bytes("node.raft_log", Process, 64 * MIB, [MIB, TIB], "Raft log of a shard kept once its state is durable, at most; a replica that lags by more learns from a snapshot."),
    count("node.raft_keep_entries", Process, 1_000, [0, 10_000_000], "Log entries kept behind a snapshot for replicas that lag a little."),
    time(
        "node.read_hedge",
        Process,
        ms(10),
        [ms(1), s(10)],
        "How long a read waits for the followers that its leader asked first before all are asked.",
    ),
    time(
        "node.raft_sleep_after",
        Process,
        s(10),
        [ms(0), min(60)],
        "A shard whose log has not grown for so long stops its timers; 0ms: never.",
    ),
];
