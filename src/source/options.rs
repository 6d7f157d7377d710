//! What is to be read and how far a reader is: the same for both transports.

use std::sync::Arc;
use std::time::Duration;

use super::{Counters, Error, Followed, Recorded, Result};
use crate::change::{AllRead, Spill};
use crate::clock::PgTimestamp;
use crate::decode::wal2json::{self, Numbers};
use crate::decode::{Plugin, test_decoding};
use crate::id::quote_ident;
use crate::limit::{BULK_BYTES, BULK_MESSAGE_BYTES, BULK_TRANSACTION_BYTES, SILENCE};
use crate::lsn::Lsn;
use crate::pg;

/// What to read, and from where.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// The slot; its plugin is the recorded one.
    pub slot: String,
    /// The publications, for pgoutput.
    pub publications: Vec<String>,
    /// The target's durable progress: the exclusive end of what it has. The stream starts here.
    pub start_lsn: Lsn,
    /// What the slot may be told from the beginning: not beyond what is durable. The same, but
    /// where a spool that is not durable to its end is gone on with. A pull asks the watch of
    /// durable positions only.
    pub confirmed_lsn: Lsn,
    /// Server and slot as recorded when the slot was made; checked before anything is read.
    pub recorded: Recorded,
    /// Ask the server (14 and on) for messages of `pg_logical_emit_message`.
    pub messages: bool,
    /// Transactions with one of these origins are dropped here and counted as filtered: what came
    /// from the other direction must not go back (law 6).
    pub skip_origins: Vec<String>,
    /// The same for transactions whose first change is to the row of one of these streams in
    /// `walferry.progress`: where the other direction's writer may not use origins, it marks by
    /// that row what it writes.
    pub skip_markers: Vec<String>,
    /// Asked for a sign of life after this, given up after twice this. Wants to be longer than the
    /// largest single row takes to arrive.
    pub silence: Duration,
    /// The tables that take part, for decoders that read every table of the database: their changes
    /// and those of their partitions are read, all others passed over.
    pub followed: Arc<Followed>,
    /// No column holds NaN or an infinity, which wal2json before 2.6 cannot tell from NULL: without
    /// that promise, each NULL in a column of a number's type is an error there.
    pub plain_numbers: bool,
    /// Have a server that can (pgoutput, 15 and on) give prepared transactions at their PREPARE. A
    /// slot that was read so once is read so for ever.
    pub two_phase: bool,
    /// What is read in bulk before it is streamed, and the chunks of that and of a pull.
    pub bulk: BulkOptions,
    /// Where transactions in progress wait for their end: with it, a server that can is asked to
    /// send them (pgoutput, 14 and on, by the replication protocol).
    pub spill: Option<Arc<dyn Spill>>,
    /// Where decoded and filtered changes are counted.
    pub counters: Counters,
    /// Told when a backlog that is read in bulk is read to its end.
    pub all_read: AllRead,
}

/// What of a backlog is read in bulk, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BulkOptions {
    /// A backlog of so many bytes of log or more; `None` for never.
    pub least_bytes: Option<u64>,
    /// The source decodes a chunk while the one before is taken, by a second session and slot.
    pub ahead: bool,
    /// A transaction of up to about so many bytes of log; 0 leaves those that are longer than a
    /// chunk to the stream. The source keeps what is decoded of it in a temporary file.
    pub transaction_bytes: u64,
    /// Where messages of the first chunk have more bytes on average, all others are streamed;
    /// `None` for never.
    pub message_bytes: Option<u64>,
    /// Messages of a chunk, in bulk or by a pull; chosen by what chunks cost where `None`.
    pub messages: Option<u32>,
}

impl Default for BulkOptions {
    fn default() -> Self {
        BulkOptions {
            least_bytes: Some(BULK_BYTES),
            ahead: true,
            transaction_bytes: BULK_TRANSACTION_BYTES,
            message_bytes: Some(BULK_MESSAGE_BYTES),
            messages: None,
        }
    }
}

impl StreamOptions {
    /// Everything else at its default: messages on, no origin filter, silence of [`SILENCE`],
    /// nothing sent before it commits.
    pub fn new(slot: &str, publication: &str, start_lsn: Lsn, recorded: Recorded) -> Self {
        StreamOptions {
            slot: slot.to_string(),
            publications: vec![publication.to_string()],
            start_lsn,
            confirmed_lsn: start_lsn,
            recorded,
            messages: true,
            skip_origins: Vec::new(),
            skip_markers: Vec::new(),
            silence: SILENCE,
            followed: Arc::default(),
            plain_numbers: false,
            two_phase: false,
            bulk: BulkOptions::default(),
            spill: None,
            counters: Counters::new(),
            all_read: AllRead::default(),
        }
    }

    /// The slot's plugin, taken to be of the newest version.
    pub(super) fn spoken(&self) -> Result<Spoken> {
        let plugin = self.recorded.plugin.parse();
        let plugin =
            plugin.map_err(|unknown| Error::Plugin { slot: self.slot.clone(), unknown })?;
        Ok(Spoken { plugin, wal2json: wal2json::Plugin::V2_6 })
    }
}

/// The plugin, and which version of it. wal2json cannot be asked for its version, but refuses
/// options that it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spoken {
    pub plugin: Plugin,
    pub wal2json: wal2json::Plugin,
}

impl Spoken {
    /// What null means in a number's place.
    pub fn numbers(&self, options: &StreamOptions) -> Numbers {
        match self.wal2json.numbers() {
            Numbers::Ambiguous if options.plain_numbers => Numbers::Plain,
            numbers => numbers,
        }
    }

    /// Refuses a wal2json that tells too little, as far as its options show it; 2.3 and 2.4 show it
    /// in their first change.
    pub fn admit(&self, slot: &str) -> Result<()> {
        let older = self.wal2json == wal2json::Plugin::Older;
        if self.plugin == Plugin::Wal2json && older {
            return Err(Error::OldWal2json { slot: slot.to_string() });
        }
        Ok(())
    }

    /// True if the refusal is of an option that an older version does not know: then it is taken to
    /// be of that version, and wants to be asked again.
    pub fn older(&mut self, refused: &pg::Error) -> bool {
        let message = refused.server().map(|said| said.message.as_str()).unwrap_or_default();
        match (self.plugin, self.wal2json.refused(message)) {
            (Plugin::Wal2json, Some(older)) => {
                self.wal2json = older;
                true
            }
            _ => false,
        }
    }
}

/// How far a reader is. All are exclusive ends; `received >= decoded >= buffered`, published
/// together once a batch of messages, and at each turn of a wait for the sink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// Whole transactions and keepalives received.
    pub received_lsn: Lsn,
    /// Decoded; filtered transactions included.
    pub decoded_lsn: Lsn,
    /// Handed to the sink.
    pub buffered_lsn: Lsn,
    /// What the slot was last told.
    pub confirmed_lsn: Lsn,
    /// When the source committed the last decoded transaction.
    pub commit_time: Option<PgTimestamp>,
}

/// Why a reader ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// The sink, or whoever publishes durable positions, is gone.
    Closed,
    /// The server ended the stream, as it does when it shuts down.
    Source,
}

/// The options that a plugin is given, by START_REPLICATION as by the SQL functions.
pub(super) fn plugin_options(
    spoken: Spoken,
    major: u32,
    options: &StreamOptions,
) -> Vec<(&'static str, String)> {
    match spoken.plugin {
        Plugin::Pgoutput => pgoutput(major, options),
        Plugin::Wal2json => wal2json::options(spoken.wal2json, &[]),
        // It tells no origins: what has any is left out, or what we write would come back.
        Plugin::TestDecoding => test_decoding::options(!options.skip_origins.is_empty()),
    }
}

/// The highest protocol version the server knows, and the rest.
///
/// <https://www.postgresql.org/docs/current/protocol-logical-replication.html#PROTOCOL-LOGICAL-REPLICATION-PARAMS>
fn pgoutput(major: u32, options: &StreamOptions) -> Vec<(&'static str, String)> {
    let version = match major {
        0..14 => 1,
        14 => 2,
        15 => 3,
        _ => 4,
    };
    let names: Vec<String> = options.publications.iter().map(|name| quote_ident(name)).collect();
    let mut wanted =
        vec![("proto_version", version.to_string()), ("publication_names", names.join(","))];
    if options.messages && major >= 14 {
        wanted.push(("messages", "true".to_string()));
    }
    if options.two_phase && major >= 15 {
        wanted.push(("two_phase", "true".to_string()));
    }
    // parallel: the same, and a rollback tells where and when.
    match major {
        _ if options.spill.is_none() => {}
        0..14 => {}
        14 | 15 => wanted.push(("streaming", "on".to_string())),
        _ => wanted.push(("streaming", "parallel".to_string())),
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    impl Spill for Nowhere {
        fn create(&self) -> std::io::Result<Box<dyn crate::change::SpillFile>> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn streaming_is_asked_for_where_the_server_knows_it_and_there_is_a_place() {
        let mut options = StreamOptions::new("s", "s", Lsn::ZERO, Recorded::default());
        let asked = |major, options: &_| {
            let wanted = pgoutput(major, options).into_iter();
            wanted.filter(|(name, _)| *name == "streaming").map(|(_, value)| value).next()
        };
        assert_eq!(asked(18, &options), None);
        options.spill = Some(Arc::new(Nowhere));
        assert_eq!(asked(13, &options), None);
        assert_eq!(asked(14, &options).as_deref(), Some("on"));
        assert_eq!(asked(16, &options).as_deref(), Some("parallel"));
    }

    #[test]
    fn a_wal2json_that_tells_too_little_is_refused() {
        let spoken = |plugin, wal2json| Spoken { plugin, wal2json }.admit("s");
        for newer in [wal2json::Plugin::V2_3, wal2json::Plugin::V2_6] {
            assert!(spoken(Plugin::Wal2json, newer).is_ok(), "{newer:?}");
        }
        let refused = spoken(Plugin::Wal2json, wal2json::Plugin::Older).unwrap_err().to_string();
        assert!(refused.contains("2.5") && refused.contains("--decoder"), "{refused}");
        assert!(spoken(Plugin::TestDecoding, wal2json::Plugin::Older).is_ok());
    }
}
