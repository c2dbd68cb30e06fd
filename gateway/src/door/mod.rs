//! The places of a listener: who may connect, and who makes room for somebody else. The S3 and the admin listener each
//! have a door of their own.
//!
//! [`crowd`] decides; here the places are handed out and taken back.

mod crowd;

pub(crate) use crowd::{Bounds, Network};

use crowd::{Crowd, Decision, Number};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// All connections: who is in, and how to tell one to go.
pub(crate) struct Door {
    inside: Mutex<(Crowd, HashMap<Number, Guest>)>,
    /// Somebody left, or became silent.
    left: Notify,
    /// Nobody makes room before being silent for so long: a client needs a moment to send what it came for.
    grace: Duration,
}

/// A connection, as the door sees it.
struct Guest {
    /// Cancelled when its place is given to another.
    gone: CancellationToken,
    /// When it came, or its last request ended.
    silent_since: Instant,
}

impl Door {
    /// Nobody is in. A silent connection makes room once it has been silent for `grace`.
    pub(crate) fn new(bounds: Bounds, grace: Duration) -> Arc<Door> {
        Arc::new(Door { inside: Mutex::new((Crowd::new(bounds), HashMap::new())), left: Notify::new(), grace })
    }

    fn inside(&self) -> MutexGuard<'_, (Crowd, HashMap<Number, Guest>)> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, and whether its requests are to be refused. None: it is to be closed.
    pub(crate) async fn enter(self: &Arc<Door>, address: IpAddr) -> Option<(Place, bool)> {
        loop {
            // Before the decision, so that who leaves right after it is not missed.
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            if let Some(until) = self.wait_until() {
                tokio::select! {
                    () = left => {}
                    () = tokio::time::sleep_until(until) => {}
                }
                continue;
            }
            let decision = self.inside().0.arrive(address);
            let (number, refuse_all) = match decision {
                Decision::Serve(number) => (number, false),
                Decision::Refuse(number) => (number, true),
                Decision::Instead(number, out) => {
                    if let Some(guest) = self.inside().1.get(&out) {
                        guest.gone.cancel();
                    }
                    (number, false)
                }
                Decision::Close => return None,
                Decision::Wait => {
                    left.await;
                    continue;
                }
            };
            let gone = CancellationToken::new();
            self.inside().1.insert(number, Guest { gone: gone.clone(), silent_since: Instant::now() });
            return Some((Place { door: self.clone(), number, gone, busy: AtomicBool::new(false) }, refuse_all));
        }
    }

    /// When the connection that would make room has been silent for long enough; None when it has, or nobody need go.
    fn wait_until(&self) -> Option<Instant> {
        let inside = self.inside();
        let guest = inside.1.get(&inside.0.first_to_go()?)?;
        Some(guest.silent_since + self.grace).filter(|until| Instant::now() < *until)
    }
}

/// A connection's place; given back when dropped.
pub(crate) struct Place {
    door: Arc<Door>,
    number: Number,
    /// The place was given to another connection.
    gone: CancellationToken,
    /// A request is in work: its head is complete, and the last byte of its answer is not handed over yet.
    busy: AtomicBool,
}

impl Place {
    /// Waits until the place is given to another connection.
    pub(crate) async fn given_away(&self) {
        self.gone.cancelled().await;
    }

    /// A request is in work.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.door.inside();
        inside.0.leave(self.number);
        inside.1.remove(&self.number);
        drop(inside);
        self.door.left.notify_waiters();
    }
}

/// A request in work, until it is dropped.
pub(crate) struct Work(Arc<Place>);

impl Work {
    pub(crate) fn begin(place: &Arc<Place>) -> Work {
        place.busy.store(true, Ordering::Relaxed);
        place.door.inside().0.works(place.number);
        Work(place.clone())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Relaxed);
        let mut inside = self.0.door.inside();
        inside.0.rests(self.0.number);
        if let Some(guest) = inside.1.get_mut(&self.0.number) {
            guest.silent_since = Instant::now();
        }
        drop(inside);
        // Who waits may have its place now.
        self.0.door.left.notify_waiters();
    }
}
