//! What both transports share: from a plugin's messages to items in a sink.

use bytes::Bytes;
use tokio::sync::watch;

use super::{Counters, Error, Positions, Result, StreamOptions};
use crate::change::{Item, Sink};
use crate::clock::PgTimestamp;
use crate::decode::{AnyDecoder, Assembler, Event, Plugin, Step};
use crate::lsn::Lsn;

/// Decodes, filters, counts, and publishes how far it is.
pub(super) struct Intake<'a, S> {
    slot: String,
    skip_origins: Vec<String>,
    counters: Counters,
    decoder: AnyDecoder,
    assembler: Assembler,
    /// Where items go.
    pub sink: &'a mut S,
    positions: &'a watch::Sender<Positions>,
    buffered_lsn: Lsn,
    commit_time: Option<PgTimestamp>,
    /// Transactions that were received before may come again, and are passed over.
    repeats: bool,
    passing: bool,
}

impl<'a, S: Sink> Intake<'a, S> {
    /// Begins at the options' start position.
    pub fn new(
        plugin: Plugin,
        options: &StreamOptions,
        repeats: bool,
        sink: &'a mut S,
        positions: &'a watch::Sender<Positions>,
    ) -> Self {
        Intake {
            slot: options.slot.clone(),
            skip_origins: options.skip_origins.clone(),
            counters: options.counters.clone(),
            decoder: AnyDecoder::new(plugin),
            assembler: Assembler::new(options.start_lsn),
            sink,
            positions,
            buffered_lsn: options.start_lsn,
            commit_time: None,
            repeats,
            passing: false,
        }
    }

    /// Exclusive end of what has been received whole.
    pub fn decoded_lsn(&self) -> Lsn {
        self.assembler.decoded_lsn()
    }

    /// Exclusive end of what the sink has.
    pub fn buffered_lsn(&self) -> Lsn {
        self.buffered_lsn
    }

    /// True if the messages so far end inside a transaction.
    pub fn in_transaction(&self) -> bool {
        self.passing || self.assembler.in_transaction()
    }

    /// Takes a message of the plugin; gives the item that it completes, if it does.
    pub fn message(&mut self, data: Bytes, lsn: Lsn) -> Result<Option<Item>> {
        let item = match self.decoder.decode(data, lsn) {
            Ok(Step::Event(event)) => self.event(event),
            Ok(Step::Describe(_) | Step::Nothing) => Ok(None),
            Err(error) => Err(error),
        };
        let item = item.map_err(|source| Error::Decode { slot: self.slot.clone(), source })?;
        Ok(item.and_then(|item| self.filter(item)))
    }

    /// Takes a position below which (exclusive) nothing more comes.
    pub fn idle(&mut self, end_lsn: Lsn) -> Option<Item> {
        self.assembler.keepalive(end_lsn)
    }

    /// A transaction that was received before is passed over. Its commit record begins below what
    /// has been received, and no other's does, as commit records do not overlap.
    fn event(&mut self, event: Event) -> crate::decode::Result<Option<Item>> {
        match &event {
            Event::Begin(begin)
                if self.repeats && begin.commit_lsn < self.assembler.decoded_lsn() =>
            {
                self.passing = true;
                Ok(None)
            }
            Event::Commit(_) if self.passing => {
                self.passing = false;
                Ok(None)
            }
            _ if self.passing => Ok(None),
            _ => self.assembler.event(event),
        }
    }

    /// Counts the item; of a transaction with an origin to skip only the position is left.
    fn filter(&mut self, item: Item) -> Option<Item> {
        let Item::Chunk(chunk) = &item else { return Some(item) };
        let origin = chunk.begin.origin.as_deref();
        let skip = origin.is_some_and(|name| self.skip_origins.iter().any(|s| s == name));
        self.counters.add(chunk, skip);
        if let Some(commit) = chunk.commit {
            self.commit_time = Some(commit.commit_time);
        }
        if !skip {
            return Some(item);
        }
        chunk.commit.map(|commit| Item::Idle { lsn: commit.end_lsn })
    }

    /// The sink has everything up to here.
    pub fn buffered(&mut self, end_lsn: Option<Lsn>) {
        self.buffered_lsn = end_lsn.unwrap_or(self.buffered_lsn);
    }

    /// Tells whoever watches how far the reader is.
    pub fn publish(&self, received_lsn: Lsn, confirmed_lsn: Lsn) {
        self.publisher().publish(received_lsn, confirmed_lsn);
    }

    /// What publishes while a push borrows the sink.
    pub fn publisher(&self) -> Publisher<'a> {
        Publisher {
            positions: self.positions,
            decoded_lsn: self.assembler.decoded_lsn(),
            buffered_lsn: self.buffered_lsn,
            commit_time: self.commit_time,
        }
    }
}

/// Publishes positions as they stood when it was made.
pub(super) struct Publisher<'a> {
    positions: &'a watch::Sender<Positions>,
    decoded_lsn: Lsn,
    buffered_lsn: Lsn,
    commit_time: Option<PgTimestamp>,
}

impl Publisher<'_> {
    /// Wakes nobody if nothing has changed.
    pub fn publish(&self, received_lsn: Lsn, confirmed_lsn: Lsn) {
        let now = Positions {
            received_lsn,
            decoded_lsn: self.decoded_lsn,
            buffered_lsn: self.buffered_lsn,
            confirmed_lsn,
            commit_time: self.commit_time,
        };
        self.positions.send_if_modified(|positions| {
            let changed = *positions != now;
            *positions = now;
            changed
        });
    }
}
