//! Where a reader puts what it decoded, without knowing which buffer it is.
//!
//! The reader and the buffers live on one floor and do not know each other; this trait is what they
//! share.

use std::future::Future;

use super::Item;
use crate::lsn::Lsn;

/// The other end is gone; nothing pushed from now on would be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the buffer was closed by its reader")]
pub struct SinkClosed;

/// Takes items in order.
///
/// Obligations: items come out in the order in which they were pushed, each exactly once; `push`
/// waits while the buffer is full and no longer; a returned `Ok` means that the item is in the
/// buffer, or was there already. A buffer that is durable publishes how far by a watch of its own:
/// to wait for stable storage item by item would cost a sync each.
pub trait Sink: Send {
    /// Adds an item, waiting for room. Dropping the future drops the item.
    fn push(&mut self, item: Item) -> impl Future<Output = Result<(), SinkClosed>> + Send;
}

impl Item {
    /// The exclusive end position the stream has reached with this item: a transaction's end or an
    /// idle position. `None` for a chunk that does not end its transaction.
    pub fn end_lsn(&self) -> Option<Lsn> {
        match self {
            Item::Chunk(chunk) => chunk.commit.map(|commit| commit.end_lsn),
            Item::Idle { lsn } => Some(*lsn),
        }
    }
}
