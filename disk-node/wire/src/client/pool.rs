//! Data connections to one node: kept alive between requests, one request at a time on each, all bounded.

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

fn pause() -> Duration {
    let mut byte = [0u8; 1];
    // Without a random byte clients come in step, which is only less kind.
    let _ = getrandom::fill(&mut byte);
    let width = BUSY_PAUSE_MS.end - BUSY_PAUSE_MS.start;
    Duration::from_millis(BUSY_PAUSE_MS.start + width * u64::from(byte[0]) / 256)
}

/// The pool. In use: at most `max_in_use`; idle: at most `max_idle`.
pub(super) struct Pool {
    target: Target,
    in_use: Arc<Semaphore>,
    idle: Mutex<Vec<(Connection, Instant)>>,
    /// A connection came back.
    returned: Notify,
    /// Held by the one that asks a node again which had no place.
    knocking: tokio::sync::Mutex<()>,
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
    pool: Arc<Pool>,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(target: Target) -> Pool {
        let in_use = Arc::new(Semaphore::new(target.limits.max_in_use.clamp(1, Semaphore::MAX_PERMITS)));
        Pool {
            target,
            in_use,
            idle: Mutex::new(Vec::new()),
            returned: Notify::new(),
            knocking: tokio::sync::Mutex::new(()),
        }
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Connection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection: an idle one that is still good, unless `fresh`; else a new one. With `wait`, a node that has no
    /// place for one is asked again for as long as a request may wait for a place here: connections of other clients
    /// that fall silent make room, and a chunk is not dropped for a moment's crowd. Reads do not wait: other disks have
    /// chunks, too.
    pub(super) async fn lease(self: &Arc<Self>, fresh: bool, wait: bool) -> Result<Lease, ChunkError> {
        let permit = timeout(self.target.limits.pool_wait, Arc::clone(&self.in_use).acquire_owned())
            .await
            .ok()
            .and_then(Result::ok)
            .ok_or(ChunkError::Overloaded)?;
        let until = Instant::now() + self.target.limits.pool_wait;
        let mut turn = None;
        loop {
            let returned = self.returned.notified();
            while let Some(mut connection) = if fresh { None } else { self.pop_idle() } {
                if connection.sender.is_closed() || !connection.probe.quiet() {
                    continue;
                }
                // Its last answer is read; what remains is that hyper takes note.
                if let Ok(Ok(())) = timeout(self.target.limits.connect_timeout, connection.sender.ready()).await {
                    return Ok(Lease { connection, reused: true, pool: Arc::clone(self), _permit: permit });
                }
            }
            match self.connect().await {
                Err(LinkError::Busy) if wait && Instant::now() < until => {
                    let left = || until.saturating_duration_since(Instant::now());
                    // One of those that wait knocks again, the others wait for their turn.
                    if turn.is_none() {
                        turn = timeout(left(), self.knocking.lock()).await.ok();
                    }
                    // A connection that comes back here is as good as a new one.
                    let _ = timeout(left().min(pause()), returned).await;
                }
                connected => {
                    let connection = connected?;
                    return Ok(Lease { connection, reused: false, pool: Arc::clone(self), _permit: permit });
                }
            }
        }
    }

    /// The idle connection that was used last; those kept too long are closed.
    fn pop_idle(&self) -> Option<Connection> {
        let mut idle = self.idle();
        let keep = self.target.limits.idle_keep;
        idle.retain(|(_, since)| since.elapsed() < keep);
        idle.pop().map(|(connection, _)| connection)
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
        let Lease { connection, pool, .. } = self;
        let mut idle = pool.idle();
        let keep = pool.target.limits.idle_keep;
        idle.retain(|(_, since)| since.elapsed() < keep);
        if idle.len() < pool.target.limits.max_idle {
            idle.push((connection, Instant::now()));
            pool.returned.notify_one();
        }
    }
}
