//! From an output plugin's bytes to changes: pure, no I/O, no clock.
//!
//! Decoding has two steps, so that each can be read and tested alone. A decoder ([`pgoutput`])
//! turns one message into one [`Event`] and remembers the relations it was told of, because a
//! change names its table by oid only. The [`Assembler`] turns events into [`Item`]s: it puts a
//! transaction's changes into chunks of bounded size, closes the transaction at its COMMIT, and
//! turns a keepalive into a position where that is safe.
//!
//! One small transaction, worked through (PostgreSQL 15, protocol 1):
//!
//! ```text
//! BEGIN    commit_lsn 0/1A0, xid 731     opens the transaction
//! ORIGIN   "walferry_shop_reverse"       belongs to it; comes before any change
//! RELATION 16385 public.accounts         remembered; sent again only when it changes
//! INSERT   16385 (1, 'a')                a change, collected
//! keepalive end 0/190                    inside a transaction: no position comes of it
//! COMMIT   end_lsn 0/1D0                 gives Item::Chunk { number: 0, commit: Some(0/1D0) }
//! keepalive end 0/200                    between transactions: gives Item::Idle { 0/200 }
//! keepalive end 0/200                    nothing new: gives nothing
//! ```
//!
//! [`test_decoding`] writes text: what it leaves out is asked of the caller ([`Step::Describe`]),
//! and its transactions [`Event::Start`] without a position, which their COMMIT brings.
//!
//! Laws kept here: any bytes give a value or an error, never a panic (law 12), and no message
//! makes a decoder hold more than 64 kB and 16 bytes for each of its own; a transaction of any size
//! passes in chunks (law 9); a position is given only for what came before it (law 1). An
//! empty transaction gives a chunk too, or the slot would stand still under a load that publishes
//! nothing.
//!
//! Nothing survives a crash here and nothing has to: a new connection starts with a new decoder,
//! and the server describes each relation again before its first change.
//!
//! A prepared transaction is two: its changes, up to PREPARE TRANSACTION, and later what became of
//! it. Transactions in progress are parsed here and put together by the reader, which has a disk;
//! the assembler refuses their messages.
//!
//! [`Item`]: crate::change::Item

mod any;
mod assemble;
pub mod described;
mod error;
mod event;
mod json;
#[cfg(test)]
mod mutate;
pub mod pgoutput;
pub mod test_decoding;
#[cfg(test)]
mod tests;
pub mod wal2json;

pub use any::{AnyDecoder, Plugin, UnknownPlugin};
pub use assemble::Assembler;
pub use described::{Described, DescribedColumn};
pub use error::Error;
pub use event::{Event, Prepared, Step};
pub use pgoutput::Decoder;

/// Result with this room's error.
pub type Result<T> = std::result::Result<T, Error>;
