//! Where an applier takes its items from.

use std::future::Future;

use super::Item;

/// The reading end of a buffer: items in log order.
///
/// An implementation promises that
/// - items come out in the order in which the stream had them, each at most once per reading of the
///   stream; after the reader connected again, transactions may come a second time, from their
///   first chunk, and a transaction that was cut is not continued;
/// - `pop` is cancel-safe: a future dropped before it is ready has taken nothing;
/// - `pop` answers `None` only once the writing end is gone and everything has been taken.
pub trait Feed: Send {
    /// The next item, waiting for it. Cancel-safe.
    fn pop(&mut self) -> impl Future<Output = Option<Item>> + Send;

    /// The next item if there is one now. Does not block; `None` does not mean the end.
    fn try_pop(&mut self) -> Option<Item>;
}
