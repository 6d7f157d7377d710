//! Between reader and applier: holds decoded items, in order, in bounded space.
//!
//! The reader must not wait for the applier on every item, nor run away from it (law 9). A buffer
//! takes items at one end through [`Sink`] and gives them at the other through [`Feed`]. When full
//! it makes the reader wait; the reader then stops reading, feedback goes on, and WAL stays on the
//! source, where it is safe.
//!
//! What survives a crash depends on the implementation. [`memory`] keeps nothing: the slot has been
//! told only what the target holds durably (law 1), so everything in it comes again. [`spool`]
//! keeps what it has synced to a local disk, and publishes up to which position that is: the slot
//! may be told so much without the target. [`kafka`] does the same in a topic.
//!
//! Obligations of every implementation, all checked by [`contract::check`]:
//! - order: items come out as they went in, each once;
//! - bounded: bytes held never exceed the limit, except that an item larger than the limit is let
//!   in when nothing else is held (or it would wait for ever);
//! - a full buffer makes `push` wait, and `pop` makes it go on;
//! - closing: after the sender is dropped what it pushed still comes out, then `None`; after the
//!   receiver is dropped `push` answers [`SinkClosed`], also one that is waiting;
//! - `pop` is cancel-safe: dropping its future loses no item.
//!
//! A durable buffer is more, checked by [`contract::check_durable`]: opened again after a crash it
//! gives everything up to its durable position, from any position that was not released, in order;
//! what is pushed again is dropped by its position (law 3); a reader that goes is no reason to
//! refuse a push, as another comes.
//!
//! [`SinkClosed`]: crate::change::SinkClosed

use std::future::Future;

use tokio::sync::watch;

use crate::change::{Feed, Item, Sink};
use crate::lsn::Lsn;

pub mod contract;
pub mod durable;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod memory;
pub mod spool;

/// The two ends of one buffer.
pub type Ends<S, O> = (S, O);

/// Makes buffers of a given limit in bytes, for [`contract::check`].
pub trait Make {
    /// The writing end.
    type Sink: Sink + 'static;
    /// The reading end.
    type Feed: Feed + 'static;

    /// A fresh, empty buffer.
    fn make(&self, limit_bytes: usize) -> Ends<Self::Sink, Self::Feed>;

    /// Bytes held now. What was read may count for a moment longer.
    fn bytes(&self, outlet: &Self::Feed) -> usize;

    /// Bytes that an item counts for.
    fn cost(&self, item: &Item) -> usize {
        item.bytes()
    }
}

/// Makes durable buffers, for [`contract::check_durable`].
pub trait MakeDurable {
    /// Where one keeps its items.
    type Place;
    /// One that is open.
    type Buffer;
    /// The writing end.
    type Sink: Sink + 'static;
    /// The reading end.
    type Feed: Feed + 'static;

    /// A fresh place.
    fn place(&self) -> Self::Place;

    /// Opens what is there.
    fn open(&self, place: &Self::Place) -> Self::Buffer;

    /// Its writing end.
    fn sink(&self, buffer: &Self::Buffer) -> Self::Sink;

    /// Its reading end, from a position on that was not released.
    fn feed(&self, buffer: &Self::Buffer, from_lsn: Lsn) -> Self::Feed;

    /// Exclusive end of what is on stable storage.
    fn durable(&self, buffer: &Self::Buffer) -> watch::Receiver<Lsn>;

    /// Everything below is not needed any more.
    fn release(&self, buffer: &Self::Buffer, lsn: Lsn);

    /// Lets go of the place, so that it can be opened again.
    fn close(&self, buffer: Self::Buffer) -> impl Future<Output = ()>;
}
