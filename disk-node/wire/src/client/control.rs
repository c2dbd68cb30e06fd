//! The control connection: many requests at once, answers in any order, made again on demand.

use super::{connect, Probe, Target};
use crate::auth::{Purpose, VersionRange, PROTOCOL_VERSIONS};
use crate::control::{ControlRequest, ControlResponse};
use crate::error::{AuthError, LinkError};
use crate::frame::{decode, encode, Frame, FrameReader, FrameWriter, Kind};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, Shared};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

/// Queue sizes are counted in units of this many bytes.
const QUEUE_UNIT_BYTES: usize = 1024;

type Connecting = Shared<BoxFuture<'static, Result<Arc<Connection>, LinkError>>>;

/// The link to one node.
pub(super) struct ControlLink {
    target: Target,
    state: Arc<Mutex<State>>,
    in_flight: Arc<Semaphore>,
    queue_units: Arc<Semaphore>,
}

/// Invariant: at most one connection is being made at a time, and none before `not_before`.
struct State {
    current: Current,
    failures: u32,
    /// After a failed connect: until when requests fail with that error at once.
    pause: Option<(Instant, LinkError)>,
}

enum Current {
    None,
    Connecting(Connecting),
    Connected(Arc<Connection>),
}

/// A request on its way out, and the room it takes in the queue.
struct Outgoing {
    frame: Frame,
    _units: Option<OwnedSemaphorePermit>,
}

struct Connection {
    /// The protocol version that both ends use.
    version: u16,
    outgoing: mpsc::Sender<Outgoing>,
    waiters: Arc<Mutex<Waiters>>,
    next_id: AtomicU64,
    probe: Probe,
    tasks: [AbortHandle; 2],
}

impl Drop for Connection {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Who waits for what. Once `closed` is set, nobody is added any more and nobody is left.
#[derive(Default)]
struct Waiters {
    waiting: HashMap<u64, Waiter>,
    closed: Option<LinkError>,
}

struct Waiter {
    /// Any byte of the request may have reached the peer.
    sent: bool,
    answer: oneshot::Sender<Result<Bytes, Lost>>,
}

/// Why no answer will come.
struct Lost {
    sent: bool,
    error: LinkError,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails everyone who waits, at once, and everyone who comes later.
fn close(waiters: &Mutex<Waiters>, error: LinkError) {
    let mut waiters = lock(waiters);
    if waiters.closed.is_none() {
        waiters.closed = Some(error.clone());
    }
    for (_, waiter) in waiters.waiting.drain() {
        let _ = waiter.answer.send(Err(Lost { sent: waiter.sent, error: error.clone() }));
    }
}

impl ControlLink {
    pub(super) fn new(target: Target) -> ControlLink {
        let permits = |count: usize| Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)));
        ControlLink {
            in_flight: permits(target.limits.max_control_in_flight),
            queue_units: permits(target.limits.max_control_queue_bytes / QUEUE_UNIT_BYTES),
            target,
            state: Arc::new(Mutex::new(State { current: Current::None, failures: 0, pause: None })),
        }
    }

    pub(super) async fn call(&self, request: ControlRequest, deadline: Duration) -> Result<ControlResponse, LinkError> {
        let (since, body) = (request.since(), encode(&request)?);
        drop(request);
        let answer = tokio::time::timeout(deadline, self.send(since, body)).await.map_err(|_| LinkError::Timeout)??;
        decode(&answer)
    }

    /// `since`: the oldest version that can read it.
    async fn send(&self, since: u16, body: Bytes) -> Result<Bytes, LinkError> {
        let _place = self.in_flight.try_acquire().map_err(|_| LinkError::Busy)?;
        match self.try_send(since, body.clone()).await {
            // The connection was dead before the request went out: that is not the caller's concern.
            Err(Lost { sent: false, error: LinkError::Closed(_) }) => {
                self.try_send(since, body).await.map_err(|lost| lost.error)
            }
            result => result.map_err(|lost| lost.error),
        }
    }

    async fn try_send(&self, since: u16, body: Bytes) -> Result<Bytes, Lost> {
        let unsent = |error| Lost { sent: false, error };
        let connection = self.connection().await.map_err(unsent)?;
        if connection.version < since {
            let needs = VersionRange { min: since, ..PROTOCOL_VERSIONS };
            let speaks = VersionRange { min: connection.version, max: connection.version };
            return Err(unsent(AuthError::Version { ours: needs, theirs: speaks }.into()));
        }
        let units = u32::try_from(body.len().div_ceil(QUEUE_UNIT_BYTES).max(1)).unwrap_or(u32::MAX);
        let units = units.min(
            u32::try_from(self.target.limits.max_control_queue_bytes / QUEUE_UNIT_BYTES).unwrap_or(u32::MAX).max(1),
        );
        let units =
            Arc::clone(&self.queue_units).acquire_many_owned(units).await.map_err(|_| unsent(LinkError::Busy))?;

        let id = connection.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, waiting) = oneshot::channel();
        {
            let mut waiters = lock(&connection.waiters);
            if let Some(error) = &waiters.closed {
                return Err(unsent(error.clone()));
            }
            waiters.waiting.insert(id, Waiter { sent: false, answer });
        }
        let _forget = Forget { waiters: Arc::clone(&connection.waiters), id };
        let frame = Frame { id, kind: Kind::Request, body };
        // A closed queue means that the waiter was told, or is about to be.
        let _ = connection.outgoing.send(Outgoing { frame, _units: Some(units) }).await;
        match waiting.await {
            Ok(result) => result,
            Err(_) => Err(Lost { sent: true, error: LinkError::Closed("the connection was given up".to_owned()) }),
        }
    }

    /// The connection, made if there is none.
    async fn connection(&self) -> Result<Arc<Connection>, LinkError> {
        let connecting = {
            let mut state = lock(&self.state);
            if let Current::Connected(connection) = &state.current {
                if lock(&connection.waiters).closed.is_none() {
                    if connection.probe.open() {
                        return Ok(Arc::clone(connection));
                    }
                    close(&connection.waiters, LinkError::Closed("closed by the peer".to_owned()));
                }
            }
            match &state.current {
                Current::Connecting(connecting) => connecting.clone(),
                Current::None | Current::Connected(_) => {
                    if let Some((until, error)) = &state.pause {
                        if Instant::now() < *until {
                            return Err(error.clone());
                        }
                    }
                    let connecting = self.start_connecting();
                    state.current = Current::Connecting(connecting.clone());
                    connecting
                }
            }
        };
        connecting.await
    }

    /// Makes a connection in a task of its own: a caller that gives up early must not keep it from ever being made.
    fn start_connecting(&self) -> Connecting {
        let (target, state) = (self.target.clone(), Arc::clone(&self.state));
        let task = tokio::spawn(async move {
            let result = Connection::open(&target).await;
            let mut state = lock(&state);
            match &result {
                Ok(connection) => {
                    state.current = Current::Connected(Arc::clone(connection));
                    state.failures = 0;
                    state.pause = None;
                }
                Err(error) => {
                    state.current = Current::None;
                    let doubled = target.limits.reconnect_min.saturating_mul(1 << state.failures.min(16));
                    state.failures = state.failures.saturating_add(1);
                    state.pause = Some((Instant::now() + doubled.min(target.limits.reconnect_max), error.clone()));
                }
            }
            result
        });
        async move { task.await.unwrap_or_else(|error| Err(LinkError::Connect(format!("connecting failed: {error}")))) }
            .boxed()
            .shared()
    }
}

/// Takes a waiter off the list when its caller is gone.
struct Forget {
    waiters: Arc<Mutex<Waiters>>,
    id: u64,
}

impl Drop for Forget {
    fn drop(&mut self) {
        lock(&self.waiters).waiting.remove(&self.id);
    }
}

impl Connection {
    async fn open(target: &Target) -> Result<Arc<Connection>, LinkError> {
        let (stream, session) = connect(target, Purpose::Control).await?;
        let probe = Probe::of(&stream)?;
        let (read, write) = stream.into_split();
        let waiters = Arc::new(Mutex::new(Waiters::default()));
        let (outgoing, queue) = mpsc::channel(target.limits.max_control_in_flight.clamp(1, 4096));
        let limits = &target.limits;

        let reader = FrameReader::new(read, session.to_client);
        let pings = outgoing.downgrade();
        let (told, timing) = (Arc::clone(&waiters), (limits.stall_timeout, limits.ping_every, limits.silence_timeout));
        let reading = tokio::spawn(async move {
            let error = read_loop(reader, &told, pings, timing).await;
            close(&told, error);
        });
        let writer = FrameWriter::new(write, session.to_server);
        let (told, stall) = (Arc::clone(&waiters), limits.stall_timeout);
        let writing = tokio::spawn(async move {
            if let Err(error) = write_loop(writer, queue, &told, stall).await {
                close(&told, LinkError::Closed(error.to_string()));
            }
        });
        let tasks = [reading.abort_handle(), writing.abort_handle()];
        Ok(Arc::new(Connection {
            version: session.version,
            outgoing,
            waiters,
            next_id: AtomicU64::new(1),
            probe,
            tasks,
        }))
    }
}

/// Hands answers to who waits for them, until the connection ends; returns why it did.
async fn read_loop(
    mut reader: FrameReader<OwnedReadHalf>,
    waiters: &Mutex<Waiters>,
    pings: mpsc::WeakSender<Outgoing>,
    (stall, ping_every, silence): (Duration, Duration, Duration),
) -> LinkError {
    let mut ping = tokio::time::interval(ping_every);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let silent = tokio::select! {
            frame = reader.next(stall) => match frame {
                Ok(Some(Frame { id, kind: Kind::Response, body })) => {
                    // Nobody waits any more when the deadline has passed.
                    if let Some(waiter) = lock(waiters).waiting.remove(&id) {
                        let _ = waiter.answer.send(Ok(body));
                    }
                    continue;
                }
                Ok(Some(Frame { kind: Kind::Pong, .. })) => continue,
                Ok(Some(frame)) => return LinkError::Protocol(format!("a {:?} from a server", frame.kind)),
                Ok(None) => return LinkError::Closed("closed by the peer".to_owned()),
                Err(LinkError::Timeout) => return LinkError::Closed("the peer stopped in the middle of a frame".to_owned()),
                // To the caller `TooLarge` means that its own request was; this is the peer's doing.
                Err(LinkError::TooLarge) => return LinkError::Protocol("a frame larger than allowed".to_owned()),
                Err(error) => return error,
            },
            _ = ping.tick() => reader.last_read().elapsed(),
        };
        if silent >= silence {
            return LinkError::Closed(format!("the peer was silent for {} s", silent.as_secs()));
        }
        if silent >= ping_every {
            let Some(queue) = pings.upgrade() else { return LinkError::Closed("not used any more".to_owned()) };
            // A full queue is a sign of life of its own kind: the write deadline watches it.
            let _ =
                queue.try_send(Outgoing { frame: Frame { id: 0, kind: Kind::Ping, body: Bytes::new() }, _units: None });
        }
    }
}

/// Sends what is queued, small frames together.
async fn write_loop(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: mpsc::Receiver<Outgoing>,
    waiters: &Mutex<Waiters>,
    stall: Duration,
) -> Result<(), LinkError> {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, 64).await > 0 {
        for outgoing in batch.drain(..) {
            if outgoing.frame.kind == Kind::Request {
                match lock(waiters).waiting.get_mut(&outgoing.frame.id) {
                    Some(waiter) => waiter.sent = true,
                    // Its caller is gone: spare the peer the work.
                    None => continue,
                }
            }
            writer.write(&outgoing.frame, stall).await?;
        }
        writer.flush(stall).await?;
    }
    Ok(())
}
