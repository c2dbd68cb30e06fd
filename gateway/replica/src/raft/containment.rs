//! The line that a panic in a replica does not cross: at most the shard's replica on this disk ends.
//!
//! openraft asserts what it takes for certain, and where it was wrong, it panics in one of its tasks. The others would
//! go on without that one: a leader whose replication died, a core that nobody feeds. So all tasks of a replica belong
//! to one [`Containment`], and so does whatever its callers do inside of it ([`Contained`]). A panic in any of them
//! marks the replica as failed. From then on nothing of it is polled any more, and nothing that it found out is told.
//!
//! **Invariant:** whether the replica has failed is asked after its answer is there and before the answer is given.

use futures::FutureExt;
use granary_placement::id::ShardId;
use granary_wire::control::ControlError;
use std::any::Any;
use std::future::{poll_fn, Future};
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe, Location, PanicHookInfo};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

tokio::task_local! {
    static OWNER: Arc<Containment>;
}

/// The replica has failed, or is stopping.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReplicaEnded(pub String);

impl From<ReplicaEnded> for ControlError {
    fn from(ended: ReplicaEnded) -> ControlError {
        ControlError::Unavailable(ended.0)
    }
}

/// What one replica runs, from its opening to its end.
pub struct Containment {
    shard: ShardId,
    /// Why it failed. Never taken back: whoever opens the replica again does so in another containment.
    failure: OnceLock<String>,
    /// Nothing of it is polled after this.
    is_over: AtomicBool,
    /// Wakes all that waits in it when it is over.
    stop: CancellationToken,
    /// Its tasks, its work on other threads, and its callers who are inside.
    tasks: TaskTracker,
}

/// What a panic says, and where it was, if that is known.
fn words_of(panic: &(dyn Any + Send), at: Option<&Location<'_>>) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without words");
    match at {
        Some(at) => format!("a panic at {at}: {text}"),
        None => format!("a panic: {text}"),
    }
}

/// For the process's panic hook, which runs before anything is unwound: marks the replica whose work panics on this
/// thread. False when it is nobody's.
pub fn note_panic(panic: &PanicHookInfo<'_>) -> bool {
    // The mark only: this thread may hold any lock at this moment. Whoever catches the panic does the rest.
    let mark = |owner: &Arc<Containment>| drop(owner.failure.set(words_of(panic.payload(), panic.location())));
    OWNER.try_with(mark).is_ok()
}

/// Work on a thread that may block, for the replica whose task asks for it.
///
/// # Errors
/// It panicked.
pub async fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let Some(owner) = Containment::current() else {
        return tokio::task::spawn_blocking(work).await.map_err(io::Error::other);
    };
    let inside = owner.clone();
    let done = owner.tasks.spawn_blocking(move || inside.contain_now(work)).await;
    done.map_err(io::Error::other)?.map_err(io::Error::other)
}

impl Containment {
    /// Nothing runs in it yet.
    pub fn new(shard: ShardId) -> Arc<Containment> {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        Arc::new(Containment { shard, failure: OnceLock::new(), is_over: AtomicBool::new(false), stop, tasks })
    }

    /// The one that this task belongs to.
    pub fn current() -> Option<Arc<Containment>> {
        OWNER.try_with(Arc::clone).ok()
    }

    /// Runs a task in it. One that is not to go on ends as if it had panicked.
    pub fn spawn<F>(self: Arc<Self>, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let owner = self.clone();
        self.tasks.spawn(async move {
            match owner.contain(future).await {
                Ok(output) => output,
                Err(ended) => std::panic::resume_unwind(Box::new(ended)),
            }
        })
    }

    /// Awaits work in it.
    ///
    /// # Errors
    /// [`ReplicaEnded`]; what the work gave, if it was done, must not be told.
    pub fn contain<'a, F>(self: &'a Arc<Self>, work: F) -> impl Future<Output = Result<F::Output, ReplicaEnded>> + 'a
    where
        F: Future + 'a,
    {
        // It is long. Put aside here, it is copied once, and not through every layer that awaits it.
        let work = Box::pin(work);
        async move {
            let _inside = self.tasks.token();
            let work = OWNER.scope(self.clone(), AssertUnwindSafe(work).catch_unwind());
            let stopped = self.stop.cancelled();
            tokio::pin!(work, stopped);
            let mut woken: Option<Waker> = None;
            poll_fn(|context| {
                let waker = context.waker();
                // To ask the token takes locks that all tasks of the replica share. Once it knows whom to wake, the
                // flag tells as much.
                if !woken.as_ref().is_some_and(|woken| woken.will_wake(waker)) {
                    if stopped.as_mut().poll(context).is_ready() {
                        return Poll::Ready(Err(self.ended()));
                    }
                    woken = Some(waker.clone());
                } else if self.is_over.load(Ordering::Acquire) {
                    return Poll::Ready(Err(self.ended()));
                }
                work.as_mut().poll(context).map(|done| self.judge(done))
            })
            .await
        }
    }

    /// Does work in it that does not wait.
    ///
    /// # Errors
    /// As [`Containment::contain`].
    pub fn contain_now<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> Result<T, ReplicaEnded> {
        self.check()?;
        let done = OWNER.sync_scope(self.clone(), || catch_unwind(AssertUnwindSafe(work)));
        self.judge(done)
    }

    fn judge<T>(&self, done: std::thread::Result<T>) -> Result<T, ReplicaEnded> {
        match done {
            Ok(value) => self.check().map(|()| value),
            Err(panic) => {
                self.fail(words_of(&*panic, None));
                Err(self.ended())
            }
        }
    }

    /// Ends everything in it at once.
    pub fn fail(&self, why: String) {
        let why = self.failure.get_or_init(|| why);
        if !self.stop.is_cancelled() {
            tracing::error!(shard = %self.shard, why, "a metadata replica failed; the others and the chunks go on");
            self.stop();
        }
    }

    fn stop(&self) {
        self.is_over.store(true, Ordering::Release);
        self.stop.cancel();
    }

    /// Has it not failed yet?
    ///
    /// # Errors
    /// Why it has.
    pub fn check(&self) -> Result<(), ReplicaEnded> {
        self.failure.get().map_or(Ok(()), |why| Err(ReplicaEnded(why.clone())))
    }

    fn ended(&self) -> ReplicaEnded {
        let why = self.failure.get().cloned();
        ReplicaEnded(why.unwrap_or_else(|| "the replica is stopping".to_owned()))
    }

    /// Waits until it fails, and says why.
    pub async fn failed(&self) -> String {
        self.stop.cancelled().await;
        match self.failure.get() {
            Some(why) => why.clone(),
            None => std::future::pending().await,
        }
    }

    /// Ends everything in it, and returns when nothing of it runs any more.
    pub async fn end(&self) {
        self.stop();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// A thing that is only used inside a containment.
pub struct Contained<T> {
    inside: T,
    by: Arc<Containment>,
}

impl<T> Contained<T> {
    /// Uses of it panic in there.
    pub fn new(inside: T, by: Arc<Containment>) -> Contained<T> {
        Contained { inside, by }
    }

    /// Awaits what is made of it.
    ///
    /// # Errors
    /// As [`Containment::contain`].
    pub fn call<'a, F>(
        &'a self,
        make: impl FnOnce(&'a T) -> F + 'a,
    ) -> impl Future<Output = Result<F::Output, ReplicaEnded>> + 'a
    where
        F: Future + 'a,
    {
        self.by.contain(async { make(&self.inside).await })
    }

    /// Looks at it.
    ///
    /// # Errors
    /// As [`Containment::contain_now`].
    pub fn look<V>(&self, look: impl FnOnce(&T) -> V) -> Result<V, ReplicaEnded> {
        self.by.contain_now(|| look(&self.inside))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::runtime::ReplicaRuntime;
    use super::*;
    use openraft::AsyncRuntime;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn what_was_found_out_before_a_failure_is_not_told_after_it() {
        let containment = Containment::new(ShardId(1));
        let by = containment.clone();
        let told = containment.contain(async move {
            by.fail("planted".to_owned());
            "confirmed"
        });
        let planted = || ReplicaEnded("planted".to_owned());
        assert_eq!(told.await, Err(planted()));
        assert_eq!(containment.contain(async { "later" }).await, Err(planted()));
        assert_eq!(containment.contain_now(|| "at once"), Err(planted()));

        // The hook has marked it, and nobody has caught the panic yet.
        let containment = Containment::new(ShardId(1));
        let by = containment.clone();
        let told = containment.contain(async move {
            by.failure.set("marked".to_owned()).unwrap();
            "confirmed"
        });
        assert_eq!(told.await, Err(ReplicaEnded("marked".to_owned())));
    }

    #[test]
    fn a_failure_wakes_whoever_polled_last_and_nothing_is_polled_after_it() {
        #[derive(Default)]
        struct Woken(AtomicU64);
        impl std::task::Wake for Woken {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let containment = Containment::new(ShardId(1));
        let polls = AtomicU64::new(0);
        let mut work = Box::pin(containment.contain(poll_fn(|_| {
            polls.fetch_add(1, Ordering::SeqCst);
            Poll::<()>::Pending
        })));
        let wakers = [Arc::<Woken>::default(), Arc::<Woken>::default()];
        let mut poll = |of: usize| work.as_mut().poll(&mut std::task::Context::from_waker(&wakers[of].clone().into()));
        for of in [0, 0, 1, 1] {
            assert!(poll(of).is_pending());
        }
        containment.fail("planted".to_owned());
        assert_eq!(wakers[1].0.load(Ordering::SeqCst), 1);
        assert_eq!(poll(1), Poll::Ready(Err(ReplicaEnded("planted".to_owned()))));
        assert_eq!(polls.load(Ordering::SeqCst), 4);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_panic_in_a_task_of_a_task_ends_all_of_the_replica_and_nothing_else() {
        let (one, other) = (Containment::new(ShardId(1)), Containment::new(ShardId(2)));
        let (polled, blocking) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let beside = polled.clone();
        let beats = one.contain(async move {
            let _ticks = ReplicaRuntime::spawn(async move {
                loop {
                    beside.fetch_add(1, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                }
            });
        });
        beats.await.unwrap();
        // Work on another thread that was begun before, and cannot be broken off.
        let (release, held) = oneshot::channel::<()>();
        let (begun, wait) = oneshot::channel::<()>();
        let (by, done) = (one.clone(), blocking.clone());
        let work = move || {
            begun.send(()).unwrap();
            held.blocking_recv().unwrap();
            done.store(1, Ordering::SeqCst);
        };
        let waiting = tokio::spawn(async move { by.contain(spawn_blocking(work)).await.map(drop) });
        wait.await.unwrap();

        let parent = one.contain(async {
            let child = ReplicaRuntime::spawn(async { ReplicaRuntime::spawn(async { panic!("planted") }).await });
            drop(child.await);
            std::future::pending::<()>().await;
        });
        let ended = ReplicaEnded("a panic: planted".to_owned());
        let told = async { (parent.await, one.failed().await, waiting.await.unwrap()) };
        let told = tokio::time::timeout(Duration::from_secs(20), told).await.expect("the panic is heard of");
        assert_eq!(told, (Err(ended.clone()), ended.0.clone(), Err(ended)));
        let mut end = Box::pin(one.end());
        assert!(futures::poll!(&mut end).is_pending(), "work on another thread goes on");
        release.send(()).unwrap();
        end.await;
        assert_eq!(blocking.load(Ordering::SeqCst), 1);
        let count = polled.load(Ordering::SeqCst);
        tokio::task::yield_now().await;
        assert_eq!(polled.load(Ordering::SeqCst), count, "a task beside it goes on");
        assert_eq!(other.contain(async { ReplicaRuntime::spawn(async { 7 }).await.unwrap() }).await, Ok(7));
    }
}
