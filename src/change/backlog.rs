//! What a reader tells an applier beside the changes: that nothing more is being read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// True while all of a backlog has been read and decoded on the source: what is left to do is the
/// applier's alone, and its target may be given all that both have to give. A hint: nothing is lost
/// or done twice where it is wrong. Clones share one.
#[derive(Clone, Debug, Default)]
pub struct AllRead(Arc<AtomicBool>);

impl AllRead {
    /// To be said by the reader, and taken back before it goes on reading.
    pub fn set(&self, all_read: bool) {
        self.0.store(all_read, Ordering::Relaxed);
    }

    /// What was said last; false at first.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
