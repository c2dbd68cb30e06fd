//! Data connections to one node: kept alive between requests, one request at a time on each, all bounded.
//!
//! **Invariant:** connections in use and idle are together at most `State::allowed`, which is the smaller of this end's
//! own setting and the share of its places that the node told last; requests that were under way when the share became
//! smaller may go beyond it until they end.

use super::{connect, Probe, Target};
use crate::auth::{Purpose, Session};
use crate::body::WireBody;
use crate::error::{ChunkError, LinkError};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// Between two attempts at a node that has no place, in milliseconds: drawn between these, so that clients do not come
/// in step.
const BUSY_PAUSE_MS: std::ops::Range<u64> = 100..300;

/// How many connections this end's own settings allow.
fn own_limit(target: &Target) -> usize {
    target.limits.max_in_use.clamp(1, Semaphore::MAX_PERMITS)
}

fn pause() -> Duration {
    let mut byte = [0u8; 1];
    // Without a random byte clients come in step, which is only less kind.
    let _ = getrandom::fill(&mut byte);
    let width = BUSY_PAUSE_MS.end - BUSY_PAUSE_MS.start;
    Duration::from_millis(BUSY_PAUSE_MS.start + width * u64::from(byte[0]) / 256)
}

/// The pool. Idle connections: at most `max_idle`.
pub(super) struct Pool {
    target: Target,
    /// What requests wait for. As many permits, taken or not, as `State::allowed` and `State::owed` together.
    permits: Arc<Semaphore>,
    state: Mutex<State>,
    /// A connection came back.
    returned: Notify,
    /// Held by the one that asks a node again which had no place.
    knocking: tokio::sync::Mutex<()>,
    busy_pause: fn() -> Duration,
}

struct State {
    /// The one that was used last stands last.
    idle: Vec<(Connection, Instant)>,
    /// Connections that requests have, those that are being made among them.
    leased: usize,
    /// Connections that there may be.
    allowed: usize,
    /// Requests under way beyond that; their permits go when they end.
    owed: usize,
}

impl State {
    /// Closes idle connections beyond what is allowed, those first that were silent the longest.
    fn close_excess(&mut self) {
        let room = self.allowed.saturating_sub(self.leased);
        let excess = self.idle.len().saturating_sub(room);
        self.idle.drain(..excess);
    }
}

/// A request's place among those under way.
struct Place {
    pool: Arc<Pool>,
    permit: Option<OwnedSemaphorePermit>,
    /// It counts in `State::leased`.
    has_connection: bool,
}

impl Place {
    fn takes_connection(&mut self, state: &mut State) {
        if !self.has_connection {
            self.has_connection = true;
            state.leased += 1;
        }
    }

    fn leaves_connection(&mut self, state: &mut State) {
        if self.has_connection {
            self.has_connection = false;
            state.leased -= 1;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let pool = Arc::clone(&self.pool);
        let mut state = pool.state();
        self.leaves_connection(&mut state);
        if let Some(permit) = self.permit.take().filter(|_| state.owed > 0) {
            state.owed -= 1;
            permit.forget();
        }
    }
}

/// A connection between requests.
struct Connection {
    sender: SendRequest<WireBody>,
    session: Session,
    counter: u64,
    probe: Probe,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection in use. Dropped, it is closed; [`Lease::give_back`] keeps it for the next request.
pub(super) struct Lease {
    connection: Connection,
    /// It has served a request before, so the peer may have closed it unnoticed.
    pub reused: bool,
    place: Place,
}

impl Pool {
    pub(super) fn new(target: Target) -> Pool {
        Pool::with_pause(target, pause)
    }

    /// `busy_pause`: how long to wait before a node that had no place is asked again.
    pub(super) fn with_pause(target: Target, busy_pause: fn() -> Duration) -> Pool {
        let allowed = own_limit(&target);
        Pool {
            target,
            permits: Arc::new(Semaphore::new(allowed)),
            state: Mutex::new(State { idle: Vec::new(), leased: 0, allowed, owed: 0 }),
            returned: Notify::new(),
            knocking: tokio::sync::Mutex::new(()),
            busy_pause,
        }
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node gives this gateway so many of its places; zero: it did not say. Idle connections beyond that are closed
    /// at once, and those in use when their requests end.
    pub(super) fn go_by_share(&self, share: u32) {
        let share = usize::try_from(share).unwrap_or(usize::MAX);
        let own = own_limit(&self.target);
        let allowed = if share == 0 { own } else { own.min(share) };
        let mut state = self.state();
        if allowed > state.allowed {
            let more = allowed - state.allowed;
            let kept = more.min(state.owed);
            state.owed -= kept;
            self.permits.add_permits(more - kept);
        } else {
            let fewer = state.allowed - allowed;
            state.owed += fewer - self.permits.forget_permits(fewer);
        }
        state.allowed = allowed;
        state.close_excess();
    }

    /// A place among the requests under way; None when there is none within `wait`.
    async fn place(self: &Arc<Self>, wait: Duration) -> Option<Place> {
        let until = Instant::now() + wait;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let permit = timeout(left, Arc::clone(&self.permits).acquire_owned()).await.ok()?.ok()?;
            let mut state = self.state();
            // A permit that came back from somebody who had given up waiting for it.
            if state.owed > 0 {
                state.owed -= 1;
                permit.forget();
                continue;
            }
            drop(state);
            return Some(Place { pool: Arc::clone(self), permit: Some(permit), has_connection: false });
        }
    }

    /// A connection: an idle one that is still good, unless `fresh`; else a new one. With `wait`, a node that has no
    /// place for one is asked again for as long as a request may wait for a place here: connections of other clients
    /// that fall silent make room, and a chunk is not dropped for a moment's crowd. Meanwhile its own place is free for
    /// reads. These do not wait: other disks have chunks, too.
    pub(super) async fn lease(self: &Arc<Self>, fresh: bool, wait: bool) -> Result<Lease, ChunkError> {
        let mut place = self.place(self.target.limits.pool_wait).await.ok_or(ChunkError::Overloaded)?;
        let until = Instant::now() + self.target.limits.pool_wait;
        let left = || until.saturating_duration_since(Instant::now());
        let mut turn = None;
        loop {
            let returned = self.returned.notified();
            while let Some(mut connection) = if fresh { None } else { self.pop_idle(&mut place) } {
                if connection.sender.is_closed() || !connection.probe.quiet() {
                    continue;
                }
                // Its last answer is read; what remains is that hyper takes note.
                if let Ok(Ok(())) = timeout(self.target.limits.connect_timeout, connection.sender.ready()).await {
                    return Ok(Lease { connection, reused: true, place });
                }
            }
            self.make_room(&mut place);
            match self.connect().await {
                Err(LinkError::Busy) if wait && !left().is_zero() => {
                    drop(place);
                    // One of those that wait knocks again, the others wait for their turn.
                    if turn.is_none() {
                        turn = timeout(left(), self.knocking.lock()).await.ok();
                    }
                    // A connection that comes back here, or came back before its turn, is as good as a new one.
                    if fresh || self.state().idle.is_empty() {
                        let _ = timeout(left().min((self.busy_pause)()), returned).await;
                    }
                    place = self.place(left()).await.ok_or(ChunkError::Overloaded)?;
                }
                connected => return Ok(Lease { connection: connected?, reused: false, place }),
            }
        }
    }

    /// The idle connection that was used last; those kept too long are closed.
    fn pop_idle(&self, place: &mut Place) -> Option<Connection> {
        let mut state = self.state();
        let keep = self.target.limits.idle_keep;
        state.idle.retain(|(_, since)| since.elapsed() < keep);
        let (connection, _) = state.idle.pop()?;
        place.takes_connection(&mut state);
        Some(connection)
    }

    /// For a connection that is about to be made. An idle one is in its way when a fresh one is wanted.
    fn make_room(&self, place: &mut Place) {
        let mut state = self.state();
        place.takes_connection(&mut state);
        state.close_excess();
    }

    /// Idle connections, and how many there may be in all.
    #[cfg(test)]
    pub(super) fn idle_and_allowed(&self) -> (usize, usize) {
        let state = self.state();
        (state.idle.len(), state.allowed)
    }

    /// Does a request wait for a place at the node?
    #[cfg(test)]
    pub(super) fn knocks(&self) -> bool {
        self.knocking.try_lock().is_err()
    }

    async fn connect(&self) -> Result<Connection, LinkError> {
        let (stream, session) = connect(&self.target, Purpose::Data).await?;
        let probe = Probe::of(&stream)?;
        // hyper's own buffer sizes: from 128 KiB to 1 MiB, adaptive or exact, none was measurably better.
        let (sender, connection) = http1::Builder::new()
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| LinkError::Connect(error.to_string()))?;
        let address = Arc::clone(&self.target.address);
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                // The request under way reports it; this line is for who debugs the connection itself.
                tracing::debug!(%address, %error, "data connection ended");
            }
        });
        Ok(Connection { sender, session, counter: 0, probe, task: task.abort_handle() })
    }
}

impl Lease {
    /// The connection's keys.
    pub(super) fn session(&self) -> &Session {
        &self.connection.session
    }

    /// The number of the next request.
    pub(super) fn next_counter(&mut self) -> u64 {
        let counter = self.connection.counter;
        self.connection.counter += 1;
        counter
    }

    /// Where requests go in.
    pub(super) fn sender(&mut self) -> &mut SendRequest<WireBody> {
        &mut self.connection.sender
    }

    /// Keeps the connection for the next request. Only after an answer that was read to its end.
    pub(super) fn give_back(self) {
        let Lease { connection, mut place, .. } = self;
        let pool = Arc::clone(&place.pool);
        {
            let mut state = pool.state();
            let keep = pool.target.limits.idle_keep;
            state.idle.retain(|(_, since)| since.elapsed() < keep);
            place.leaves_connection(&mut state);
            if state.idle.len() >= pool.target.limits.max_idle || state.leased + state.idle.len() >= state.allowed {
                return;
            }
            state.idle.push((connection, Instant::now()));
        }
        drop(place);
        pool.returned.notify_one();
    }
}
