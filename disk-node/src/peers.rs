//! The other disk nodes: where they are, and one client for each that is talked to.

use crate::label::Label;
use crate::maps::Maps;
use crate::store::shared::lock;
use granary_placement::id::{DiskId, DiskUuid, ShardId};
use granary_wire::control::{ControlError, ControlRequest, ControlResponse, Reach};
use granary_wire::{AuthError, ClientLimits, Credentials, Ends, LinkError, NodeClient};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tokio_util::sync::CancellationToken;

/// How often the file of addresses is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A gateway that asked within this time finds this disk.
const GATEWAY_FINDS: Duration = Duration::from_secs(15);

/// A gateway that asks again within this time is not noted again. Every request of every gateway looks at the note;
/// writing it each time would have the processor cores take it from each other.
const NOTE_AGAIN: Duration = Duration::from_secs(1);

/// Between two questions for a newer map; up to a second is added at random, so that nodes do not ask in step.
/// Gateways offer every new map at once; this is for a node that they cannot reach.
const POLL: Duration = Duration::from_secs(5);
const POLL_DEADLINE: Duration = Duration::from_secs(2);
/// A disk that does not tell its status within this time is not reached.
const REACH: Duration = Duration::from_secs(2);
/// Without an answer by then, this node was late itself: its own clock should have ended the wait long before.
const OWN_STALL: Duration = Duration::from_secs(3);

/// Addresses from a file, which override those of the map.
struct Book {
    path: Option<PathBuf>,
    looked: Option<Instant>,
    modified: Option<SystemTime>,
    addresses: BTreeMap<DiskId, String>,
}

impl Book {
    fn look(&mut self) {
        let Some(path) = &self.path else { return };
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK_AGAIN) {
            return;
        }
        self.looked = Some(Instant::now());
        let read = || -> std::io::Result<Option<(SystemTime, Vec<u8>)>> {
            let modified = std::fs::metadata(path)?.modified()?;
            if Some(modified) == self.modified {
                return Ok(None);
            }
            Ok(Some((modified, std::fs::read(path)?)))
        };
        let parsed = match read() {
            Ok(None) => return,
            Ok(Some((modified, text))) => serde_json::from_slice::<BTreeMap<String, String>>(&text)
                .map_err(|error| error.to_string())
                .and_then(|book| {
                    book.into_iter()
                        .map(|(id, at)| id.parse().map(|id| (id, at)).map_err(|_| format!("`{id}`")))
                        .collect()
                })
                .map(|addresses| (modified, addresses)),
            Err(error) => Err(error.to_string()),
        };
        match parsed {
            Ok((modified, addresses)) => {
                self.modified = Some(modified);
                self.addresses = addresses;
            }
            // Half written, perhaps: the addresses known stay good, and it is looked at again.
            Err(why) => tracing::warn!(path = %path.display(), why, "cannot read the file of addresses"),
        }
    }
}

/// When somebody was heard last, without a lock.
struct LastHeard {
    begun: Instant,
    /// Milliseconds from `begun`, plus one; zero: nobody was heard yet.
    at_ms: AtomicU64,
}

impl LastHeard {
    fn new(begun: Instant) -> LastHeard {
        LastHeard { begun, at_ms: AtomicU64::new(0) }
    }

    fn since_begun_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.begun).as_millis()).unwrap_or(u64::MAX - 1)
    }

    fn note(&self, now: Instant) {
        let now_ms = self.since_begun_ms(now) + 1;
        let noted_ms = self.at_ms.load(Ordering::Relaxed);
        if noted_ms == 0 || now_ms.saturating_sub(noted_ms) >= NOTE_AGAIN.as_millis() as u64 {
            // Two at once write nearly the same time; the later one counts.
            self.at_ms.fetch_max(now_ms, Ordering::Relaxed);
        }
    }

    /// Was somebody heard less than `span` ago? The note may be older than the last request by up to [`NOTE_AGAIN`].
    fn within(&self, span: Duration, now: Instant) -> bool {
        let noted_ms = self.at_ms.load(Ordering::Relaxed);
        noted_ms > 0 && u128::from((self.since_begun_ms(now) + 1).saturating_sub(noted_ms)) < span.as_millis()
    }
}

/// The other disk nodes.
pub struct Peers {
    me: DiskId,
    uuid: DiskUuid,
    maps: Arc<Maps>,
    credentials: Credentials,
    book: Mutex<Book>,
    clients: Mutex<HashMap<DiskId, NodeClient>>,
    /// When a gateway asked last.
    gateway: LastHeard,
}

impl Peers {
    /// As the disk of that label. `book` is a file with a JSON object of disk id to `host:port`.
    pub fn new(label: &Label, maps: Arc<Maps>, credentials: Credentials, book: Option<PathBuf>) -> Peers {
        let book = Book { path: book, looked: None, modified: None, addresses: BTreeMap::new() };
        let (me, uuid) = (label.disk, label.uuid);
        Peers {
            me,
            uuid,
            maps,
            credentials,
            book: Mutex::new(book),
            clients: Mutex::default(),
            gateway: LastHeard::new(Instant::now()),
        }
    }

    /// This disk.
    pub fn me(&self) -> DiskId {
        self.me
    }

    /// Where a disk's node is.
    pub fn address(&self, disk: DiskId) -> Option<String> {
        let mut book = lock(&self.book);
        book.look();
        if let Some(address) = book.addresses.get(&disk) {
            return Some(address.clone());
        }
        let map = self.maps.newest()?;
        map.disk(disk).map(|disk| disk.address.clone()).filter(|address| !address.is_empty())
    }

    /// The disk that has this number in the newest map.
    pub fn uuid_of(&self, disk: DiskId) -> Option<DiskUuid> {
        self.maps.newest()?.disk(disk).map(|disk| disk.uuid)
    }

    /// The client of a disk's node; a new one when its address changed, or the disk that has the number. None while no
    /// map says which disk that is.
    pub fn client(&self, disk: DiskId) -> Option<NodeClient> {
        let address = self.address(disk)?;
        let ends = Ends { to: Some(self.uuid_of(disk)?), from: Some(self.uuid), gateway: None };
        let mut clients = lock(&self.clients);
        // As many as disks were ever talked to: members of shards here, a handful.
        match clients.get(&disk) {
            Some(client) if client.address() == address && client.ends() == ends => Some(client.clone()),
            _ => {
                let client = NodeClient::new(address, ends, self.credentials.clone(), ClientLimits::default());
                clients.insert(disk, client.clone());
                Some(client)
            }
        }
    }

    /// A gateway asked something: it finds this disk, whatever this end's own map and file of addresses say.
    pub fn note_gateway(&self) {
        self.gateway.note(Instant::now());
    }

    /// Has a gateway asked lately?
    pub fn gateway_finds_it(&self) -> bool {
        self.gateway.within(GATEWAY_FINDS, Instant::now())
    }

    /// A client of this disk's own node, as others find it; a new one each time, for an address may lead elsewhere by
    /// now.
    pub fn client_of_own(&self) -> Option<NodeClient> {
        let ends = Ends { to: Some(self.uuid), from: Some(self.uuid), gateway: None };
        let address = self.address(self.me)?;
        Some(NodeClient::new(address, ends, self.credentials.clone(), ClientLimits::default()))
    }

    /// Which of these disks answer this one right now, each asked for its status.
    pub async fn reaches(&self, disks: &[DiskId]) -> Vec<Reach> {
        futures::future::join_all(disks.iter().map(|disk| self.reach(*disk))).await
    }

    async fn reach(&self, disk: DiskId) -> Reach {
        if disk == self.me {
            return Reach::Reached;
        }
        let Some(kept) = self.client(disk) else { return Reach::Unknown };
        let began = Instant::now();
        let asked = ask_now(|again| {
            let client = match again {
                false => kept.clone(),
                true => NodeClient::new(
                    kept.address().to_owned(),
                    kept.ends(),
                    self.credentials.clone(),
                    ClientLimits::default(),
                ),
            };
            async move { client.control(ControlRequest::Status, REACH).await }
        });
        let answer = tokio::time::timeout(REACH, asked).await.unwrap_or(Err(LinkError::Timeout));
        judge(&answer, kept.ends().to, began.elapsed())
    }

    /// Asks members of the root shard for a newer map, one after the other, until told to stop.
    pub async fn poll_maps(&self, stop: CancellationToken) {
        let mut round = 0usize;
        loop {
            let jitter = Duration::from_millis(u64::from(random_u16()) % 1000);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(POLL + jitter) => {}
            }
            let Some(map) = self.maps.newest() else { continue };
            let Some(root) = map.shards.get(usize::from(ShardId::ROOT.0)) else { continue };
            let others: Vec<DiskId> = root.members.iter().copied().filter(|disk| *disk != self.me).collect();
            round = round.wrapping_add(1);
            let Some(client) = others.get(round % others.len().max(1)).and_then(|disk| self.client(*disk)) else {
                continue;
            };
            match client.control(ControlRequest::GetMapSince(map.epoch), POLL_DEADLINE).await {
                Ok(ControlResponse::MapDiffs(diffs)) => {
                    for diff in diffs {
                        if let Err(error) = self.maps.offer_diff(&diff).await {
                            tracing::error!(%error, peer = client.address(), "a difference of a peer's map was refused");
                            break;
                        }
                    }
                }
                Ok(ControlResponse::Map(Some(found))) => {
                    if let Err(error) = self.maps.offer(Arc::from(found)).await {
                        tracing::error!(%error, peer = client.address(), "a peer's map was refused");
                    }
                }
                Ok(_) => {}
                Err(LinkError::Auth(error)) => {
                    tracing::warn!(%error, peer = client.address(), "cannot ask for a newer map")
                }
                Err(error) => tracing::debug!(%error, peer = client.address(), "cannot ask for a newer map"),
            }
        }
    }
}

/// Asks over the kept connection. That none can be made may be the answer of an attempt before, and a connection that
/// is lost may have been old: then a new one is made at once. `ask(true)`: over a new one.
async fn ask_now<F>(ask: impl Fn(bool) -> F) -> Result<ControlResponse, LinkError>
where
    F: Future<Output = Result<ControlResponse, LinkError>>,
{
    match ask(false).await {
        Err(LinkError::Connect(_) | LinkError::Closed(_)) => ask(true).await,
        answer => answer,
    }
}

/// What the answer to a question for the status says of a disk. Only what speaks against the disk or the way to it is a
/// vote for its death: that this node is busy, late or of another version says nothing.
fn judge(answer: &Result<ControlResponse, LinkError>, meant: Option<DiskUuid>, took: Duration) -> Reach {
    match answer {
        Ok(ControlResponse::Status(status)) if Some(status.uuid) == meant => Reach::Reached,
        Ok(ControlResponse::Error(ControlError::Disk(_))) => Reach::Unreached,
        Ok(_) => Reach::Unknown,
        Err(_) if took >= OWN_STALL => Reach::Unknown,
        Err(LinkError::Connect(_) | LinkError::Closed(_) | LinkError::Timeout) => Reach::Unreached,
        // Proved: another disk is where this one should be.
        Err(LinkError::Auth(AuthError::Disk)) => Reach::Unreached,
        Err(LinkError::Auth(_) | LinkError::TooLarge | LinkError::Busy | LinkError::Protocol(_)) => Reach::Unknown,
    }
}

fn random_u16() -> u16 {
    let mut bytes = [0u8; 2];
    // Without random bytes nodes poll in step, which is only less kind.
    let _ = getrandom::fill(&mut bytes);
    u16::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use granary_placement::id::{ClusterId, Epoch};
    use granary_wire::auth::PROTOCOL_VERSIONS;
    use granary_wire::control::NodeStatus;
    use granary_wire::ClusterSecret;

    #[test]
    fn a_gateway_is_noted_once_a_second_and_counts_for_fifteen() {
        let start = Instant::now();
        let after = |ms: u64| start + Duration::from_millis(ms);
        let heard = LastHeard::new(start);
        assert!(!heard.within(GATEWAY_FINDS, start), "nobody asked yet");
        heard.note(start);
        assert!(heard.within(GATEWAY_FINDS, after(14_999)));
        assert!(!heard.within(GATEWAY_FINDS, after(15_000)));
        heard.note(after(999));
        assert!(!heard.within(GATEWAY_FINDS, after(15_000)), "less than a second after the note");
        heard.note(after(1_000));
        assert!(heard.within(GATEWAY_FINDS, after(15_999)));
        heard.note(after(500));
        assert!(heard.within(GATEWAY_FINDS, after(15_999)), "a request that was held up takes nothing back");
        assert!(!heard.within(GATEWAY_FINDS, after(16_000)));
    }

    #[test]
    fn only_what_speaks_against_a_disk_is_a_vote_that_it_is_not_reached() {
        let meant = DiskUuid([3; 16]);
        let status = |uuid| {
            Ok(ControlResponse::Status(NodeStatus {
                disk: Some(DiskId(5)),
                uuid,
                epoch: Epoch(1),
                capacity_bytes: 1,
                free_bytes: 1,
                chunks: 0,
                chunk_bytes: 0,
                feature_level: 1,
                data_connections: 0,
            }))
        };
        let text = || "x".to_owned();
        let version = AuthError::Version { ours: PROTOCOL_VERSIONS, theirs: PROTOCOL_VERSIONS };
        for (answer, expected) in [
            (status(meant), Reach::Reached),
            (status(DiskUuid([4; 16])), Reach::Unknown),
            (Ok(ControlResponse::Error(ControlError::Disk(text()))), Reach::Unreached),
            (Ok(ControlResponse::Error(ControlError::Overloaded)), Reach::Unknown),
            (Ok(ControlResponse::Done), Reach::Unknown),
            (Err(LinkError::Connect(text())), Reach::Unreached),
            (Err(LinkError::Closed(text())), Reach::Unreached),
            (Err(LinkError::Timeout), Reach::Unreached),
            (Err(AuthError::Disk.into()), Reach::Unreached),
            (Err(AuthError::Secret.into()), Reach::Unknown),
            (Err(AuthError::Cluster.into()), Reach::Unknown),
            (Err(AuthError::Message.into()), Reach::Unknown),
            (Err(version.into()), Reach::Unknown),
            (Err(LinkError::Busy), Reach::Unknown),
            (Err(LinkError::TooLarge), Reach::Unknown),
            (Err(LinkError::Protocol(text())), Reach::Unknown),
        ] {
            assert_eq!(judge(&answer, Some(meant), REACH), expected, "{answer:?}");
            // This node was late itself.
            let late = if answer.is_err() { Reach::Unknown } else { expected };
            assert_eq!(judge(&answer, Some(meant), REACH * 2), late, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn what_an_attempt_before_met_is_no_answer() {
        let (connect, closed) = (LinkError::Connect(String::new()), LinkError::Closed(String::new()));
        let done = || Ok(ControlResponse::Done);
        // (over the kept connection, over a new one, what counts)
        for (kept, new, counts) in [
            (done(), Err(connect.clone()), done()),
            (Err(connect.clone()), done(), done()),
            (Err(closed), done(), done()),
            (Err(connect.clone()), Err(LinkError::Timeout), Err(LinkError::Timeout)),
            (Err(LinkError::Busy), done(), Err(LinkError::Busy)),
            (Err(LinkError::Timeout), done(), Err(LinkError::Timeout)),
        ] {
            let answer = ask_now(|again| std::future::ready(if again { new.clone() } else { kept.clone() })).await;
            assert_eq!(answer, counts, "{kept:?} {new:?}");
        }
    }

    #[test]
    fn a_disk_looks_for_itself_where_others_do_and_calls_itself_by_its_uuid() {
        let folder = tempfile::tempdir().unwrap();
        let label = crate::label::format(&folder.path().join("disk"), ClusterId([7; 16]), DiskId(4), DiskUuid([3; 16]));
        let label = label.unwrap();
        let maps = Arc::new(Maps::open(&folder.path().join("disk"), label.clone()).unwrap());
        let secret = ClusterSecret::generate().unwrap();
        let credentials = Credentials { cluster: label.cluster, secret };
        let book = folder.path().join("addresses.json");
        let peers = Peers::new(&label, maps, credentials, Some(book.clone()));
        assert!(peers.client_of_own().is_none(), "nobody says where it is");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let reaches = runtime.block_on(peers.reaches(&[DiskId(4), DiskId(5)]));
        assert_eq!(reaches, [Reach::Reached, Reach::Unknown], "no map says which disk 5 is");
        std::fs::write(&book, r#"{"4": "here:1", "5": "there:1"}"#).unwrap();
        lock(&peers.book).looked = None;
        let own = peers.client_of_own().unwrap();
        assert_eq!(own.address(), "here:1");
        assert_eq!((own.ends().to, own.ends().from), (Some(label.uuid), Some(label.uuid)));

        assert!(!peers.gateway_finds_it());
        peers.note_gateway();
        assert!(peers.gateway_finds_it());
    }
}
