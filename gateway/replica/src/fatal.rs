//! The first failure of a disk ends its process: no answer after it, no retry. RocksDB cannot be trusted to go on after
//! an I/O error.
//!
//! A panic elsewhere ends one replica ([`crate::raft::containment`]). One in what writes for all shards is a failure of
//! the disk: nobody knows what was written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Told the reason, once. It is to end the process.
pub type OnFatal = Arc<dyn Fn(String) + Send + Sync>;

/// Remembers that a failure happened, so that nothing is done after it.
#[derive(Clone)]
pub struct Fatal {
    raised: Arc<AtomicBool>,
    on_fatal: OnFatal,
}

impl Fatal {
    /// Calls `on_fatal` at the first failure.
    pub fn new(on_fatal: OnFatal) -> Fatal {
        Fatal { raised: Arc::default(), on_fatal }
    }

    /// A failure happened.
    pub fn raise(&self, reason: String) {
        if !self.raised.swap(true, Ordering::SeqCst) {
            tracing::error!(%reason, "metadata disk failed; the process must end");
            (self.on_fatal)(reason);
        }
    }

    /// Nothing failed yet?
    ///
    /// # Errors
    /// Something did.
    pub fn check(&self) -> Result<(), String> {
        if self.raised.load(Ordering::SeqCst) {
            return Err("the disk failed before".to_owned());
        }
        Ok(())
    }

    /// A panic while what this gives lives is a failure.
    pub fn at_a_panic(&self, doing: &'static str) -> AtPanic<'_> {
        AtPanic { fatal: self, doing }
    }
}

/// See [`Fatal::at_a_panic`].
pub struct AtPanic<'a> {
    fatal: &'a Fatal,
    doing: &'static str,
}

impl Drop for AtPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fatal.raise(format!("a panic while {}", self.doing));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::panic::{catch_unwind, AssertUnwindSafe};
    use std::sync::Mutex;

    #[test]
    fn a_panic_in_what_all_shards_share_is_a_failure_and_any_other_is_not() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = told.clone();
        let fatal = Fatal::new(Arc::new(move |why| tell.lock().unwrap().push(why)));
        let panics = |doing: Option<&'static str>| {
            let work = || {
                let _whole = doing.map(|doing| fatal.at_a_panic(doing));
                panic!("planted");
            };
            assert!(catch_unwind(AssertUnwindSafe(work)).is_err());
        };
        panics(None);
        drop(fatal.at_a_panic("writing"));
        assert!(fatal.check().is_ok());
        panics(Some("writing"));
        assert_eq!(*told.lock().unwrap(), ["a panic while writing"]);
        assert!(fatal.check().is_err());
    }
}
