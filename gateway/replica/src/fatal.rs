//! The first failure of a disk ends its process: no answer after it, no retry. RocksDB cannot be trusted to go on after
//! an I/O error.

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
}
