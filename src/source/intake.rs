//! What both transports share: from a plugin's messages to items in a sink.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::describe::Describer;
use super::options::Spoken;
use super::streamed::Streams;
use super::{Counters, Error, Positions, Result, StreamOptions, marker};
use crate::change::{Begin, Item, Sink};
use crate::clock::PgTimestamp;
use crate::decode::{self, AnyDecoder, Assembler, Event, Plugin, Step, wal2json};
use crate::lsn::Lsn;
use crate::pg::{Config, ServerError};

/// A commit is decoded before others see it: by a moment, or for as long as standbys take that it
/// waits for. So a table that a row does not fit is looked at again, so many times and so long
/// apart.
const LOOKS: u32 = 50;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Decodes, filters, counts, and publishes how far it is.
pub(super) struct Intake<'a, S> {
    slot: String,
    skip_origins: Vec<String>,
    skip_markers: Vec<String>,
    /// The transaction under way is one to drop.
    skipping: bool,
    counters: Counters,
    plugin: Plugin,
    decoder: AnyDecoder,
    describer: Describer,
    /// The last message, which is to be decoded again.
    more: Option<(Bytes, Lsn)>,
    assembler: Assembler,
    streams: Streams,
    /// Where items go.
    pub sink: &'a mut S,
    positions: &'a watch::Sender<Positions>,
    buffered_lsn: Lsn,
    commit_time: Option<PgTimestamp>,
    /// Transactions that were received before may come again, and are passed over.
    repeats: bool,
    passing: bool,
}

/// How far a message was taken at once.
pub(super) enum Taken {
    /// It is done, and has no more to say.
    Whole(Option<Item>),
    /// It has to do with a streamed transaction, whose file may have to be waited for.
    Streamed(Box<Event>),
    /// The decoder may have to know more; it has seen nothing of it.
    Asks(Bytes),
}

impl<'a, S: Sink> Intake<'a, S> {
    /// Begins at the options' start position.
    pub fn new(
        config: &Config,
        spoken: Spoken,
        options: &StreamOptions,
        repeats: bool,
        sink: &'a mut S,
        positions: &'a watch::Sender<Positions>,
    ) -> Self {
        Intake {
            slot: options.slot.clone(),
            skip_origins: options.skip_origins.clone(),
            skip_markers: options.skip_markers.clone(),
            skipping: false,
            counters: options.counters.clone(),
            plugin: spoken.plugin,
            decoder: AnyDecoder::new(spoken.plugin, spoken.numbers(options)),
            describer: Describer::new(config, options.followed.clone()),
            more: None,
            assembler: Assembler::new(options.start_lsn),
            streams: Streams::new(&options.slot, options.spill.clone()),
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

    /// Takes a message of the plugin as far as nothing has to be waited for, which is true of
    /// nearly all that pgoutput says: a future for each of a million messages costs as much as
    /// decoding them. Whatever is not [`Taken::Whole`] goes to [`Intake::later`].
    pub fn at_once(&mut self, data: Bytes, lsn: Lsn) -> Result<Taken> {
        if self.plugin != Plugin::Pgoutput {
            return Ok(Taken::Asks(data));
        }
        let event = match self.decoder.decode(data, lsn).map_err(|e| self.wrong(e))? {
            Step::Event(event) if self.streams.pass(&event) => event,
            Step::Event(event) => return Ok(Taken::Streamed(Box::new(event))),
            // Asked and described by text alone.
            Step::Before(_) | Step::Describe(_) | Step::Nothing => return Ok(Taken::Whole(None)),
        };
        let item = self.event(event).map_err(|e| self.wrong(e))?;
        Ok(Taken::Whole(item.and_then(|item| self.filter(item))))
    }

    /// Goes on with a message that was not taken at once; gives the item that it completes, if it
    /// does. It may have more to say: call [`Intake::more`] until that gives nothing.
    pub async fn later(&mut self, taken: Taken, lsn: Lsn) -> Result<Option<Item>> {
        let event = match taken {
            Taken::Whole(item) => return Ok(item),
            Taken::Streamed(event) => *event,
            Taken::Asks(data) => match self.asked(data, lsn).await? {
                Some(event) => event,
                None => return Ok(None),
            },
        };
        let Some(event) = self.streams.take(event).await? else { return Ok(None) };
        let item = self.event(event).map_err(|e| self.wrong(e))?;
        Ok(item.and_then(|item| self.filter(item)))
    }

    /// The event of a message. Waits for the source's answer where the decoder must know more;
    /// nothing is taken before.
    async fn asked(&mut self, data: Bytes, lsn: Lsn) -> Result<Option<Event>> {
        let mut looks = 0;
        loop {
            // A clone counts a reference; nothing is copied.
            let step = match self.decoder.decode(data.clone(), lsn) {
                Err(decode::Error::Reshaped { relation, .. }) if looks < LOOKS => {
                    looks += 1;
                    tokio::time::sleep(LOOK_AGAIN).await;
                    let described = self.describer.table(&relation).await?;
                    self.decoder.describe(&relation, described);
                    continue;
                }
                step => step.map_err(|e| self.wrong(e))?,
            };
            return Ok(Some(match step {
                Step::Event(Event::Begin(begin)) if self.is_nameless(&begin) => {
                    for (id, name) in self.describer.origins().await? {
                        self.decoder.name_origin(id, &name);
                    }
                    match self.decoder.decode(data, lsn).map_err(|e| self.wrong(e))? {
                        Step::Event(event) => event,
                        _ => Event::Begin(begin),
                    }
                }
                Step::Event(event) => event,
                Step::Before(event) => {
                    self.more = Some((data, lsn));
                    event
                }
                Step::Describe(name) => {
                    let described = self.describer.table(&name).await?;
                    self.decoder.describe(&name, described);
                    continue;
                }
                Step::Nothing => return Ok(None),
            }));
        }
    }

    /// Looks at what the server said before the message that comes next.
    ///
    /// Errors: that it has left out a change of a table that takes part (wal2json), or all that a
    /// publication shows (pgoutput from 18 on, where it was dropped).
    pub async fn warned(&mut self, warnings: Vec<ServerError>) -> Result<()> {
        for warning in warnings {
            tracing::warn!(slot = self.slot, %warning, "the source warns");
            let notice = warning.message;
            match self.plugin {
                Plugin::Wal2json => self.dropped(notice).await?,
                // The text is translated; 55000 is "object not in prerequisite state".
                Plugin::Pgoutput if warning.code == "55000" => {
                    return Err(Error::PublicationSkipped { slot: self.slot.clone(), notice });
                }
                Plugin::Pgoutput | Plugin::TestDecoding => {}
            }
        }
        Ok(())
    }

    async fn dropped(&mut self, notice: String) -> Result<()> {
        let Some(tables) = wal2json::dropped(&notice) else { return Ok(()) };
        let mut table = tables.is_empty().then(|| "of that name".to_string());
        for name in tables {
            if self.describer.table(&name).await?.is_some() {
                table = Some(name.quoted());
            }
        }
        match table {
            Some(table) => Err(self.wrong(crate::decode::Error::Dropped { table, notice })),
            None => Ok(()),
        }
    }

    /// What the last message says besides.
    pub async fn more(&mut self) -> Result<Option<Option<Item>>> {
        while let Some(event) = self.streams.next().await? {
            if let Some(item) = self.event(event).map_err(|e| self.wrong(e))? {
                return Ok(Some(self.filter(item)));
            }
        }
        match self.more.take() {
            Some((data, lsn)) => self.later(Taken::Asks(data), lsn).await.map(Some),
            None => Ok(None),
        }
    }

    /// An origin was made since the names were asked for.
    fn is_nameless(&self, begin: &Begin) -> bool {
        self.plugin == Plugin::Wal2json && begin.origin.as_deref() == Some("")
    }

    fn wrong(&self, source: crate::decode::Error) -> Error {
        Error::Decode { slot: self.slot.clone(), source }
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

    /// Counts the item; of a transaction to skip only the position is left.
    fn filter(&mut self, item: Item) -> Option<Item> {
        let Item::Chunk(chunk) = &item else { return Some(item) };
        if chunk.number == 0 {
            self.skipping = marker::is_from(chunk, &self.skip_origins, &self.skip_markers);
        }
        let skip = self.skipping;
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
