//! A buffer in a Kafka topic: one partition for one stream.
//!
//! It exists so that neither a target that is away nor one that is slow makes the source keep WAL,
//! with no disk of ours to lose, and so that reading and applying can be done by different hosts.
//! Others may read the topic too: `proto/envelope.proto` says all there is to know.
//!
//! # Steps
//! 1. [`Log::open_at`] looks whether the topic is there, has one partition, is this stream's, and
//!    goes on from the target's progress; makes it if there was none; and writes a first record.
//!    [`Log::end_lsn`] is where the source is to be read from.
//! 2. [`KafkaSink`] writes items as records (`envelope`), through an idempotent producer that waits
//!    for all replicas (`writer`). [`Log::durable`] publishes what was acknowledged.
//! 3. [`KafkaFeed`], opened at the target's progress, finds its offset by halving (`topic`), and
//!    reads from there (`feed`). No offset is committed anywhere: progress is the target's (law 2).
//!
//! `follower` is the rule by which records are taken, the same for every reader.
//!
//! # When full
//! What was pushed and not released yet is counted, from when the topic was opened; at the limit
//! pushes wait, and WAL stays on the source. So do they while the brokers take nothing. A
//! transaction larger than the limit is let in once everything before has been released.
//!
//! # What survives a crash
//! All that was acknowledged, by the brokers' own word. A producer that is killed may leave a
//! transaction unfinished: its successor writes it again from the beginning, and readers go by the
//! one that was begun last. Records are deleted by the topic's retention alone. If that takes what
//! the target has not, the topic is written again from the target's progress on, for as long as the
//! slot was not told of it; if it was, [`Log::open_at`] tells that they are lost (law 4).
//!
//! ```text
//! slot told         500 (WAL below is gone from the source)
//! records     300-400 400-450 450-  | 450-450 450-520 520-560
//!             writer A, killed here ^ ^ writer B's first record, then the transaction again
//! progress            400: found by halving, nothing of A's last is given
//! ```
//!
//! Left out: more than one partition, keys, and deleting records that are not needed any more.

mod envelope;
mod error;
mod feed;
mod follower;
mod properties;
mod topic;
mod writer;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::watch;

pub use envelope::VERSION;
pub use error::{Error, Result};
pub use feed::KafkaFeed;
pub use properties::Properties;
pub use writer::KafkaSink;

use super::spool::{Coverage, Identity};
use crate::change::Item;
use crate::lsn::Lsn;
use topic::Topic;
use writer::{Shared, Writer};

/// How long a log that is closed waits for what is on its way.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// Which topic, and whose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Host and port of brokers, with commas between.
    pub brokers: String,
    /// The topic.
    pub topic: String,
    /// `kafka.*` settings.
    pub properties: Properties,
    /// Whose stream it holds.
    pub identity: Identity,
    /// Bytes of items pushed and not released; see "When full".
    pub limit_bytes: u64,
}

impl Options {
    /// Tells this stream's records from others'. A slot made anew on the same server goes on behind
    /// an older one of the same name: its positions are beyond.
    fn stream_id(&self) -> u64 {
        let Identity { job, stream, system, timeline, slot, .. } = &self.identity;
        let text = format!("{job}\n{stream}\n{system}/{timeline}\n{slot}");
        let hash = Sha256::digest(text.as_bytes());
        hash.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }
}

/// One stream's topic, open.
pub struct Log {
    options: Options,
    shared: Arc<Shared>,
    durable: watch::Receiver<Lsn>,
    /// `None` where it is only read.
    writer: Option<Arc<Writer>>,
}

/// What [`Log::open_at`] found.
pub enum Opened {
    /// It can be gone on with.
    Open(Log),
    /// The slot was told of positions that are neither on the target nor in the topic. What is in
    /// the topic, if anything.
    Lost(Option<Coverage>),
}

impl Log {
    /// Opens the topic to be written behind `progress_lsn`, the target's durable progress, when the
    /// slot was told `confirmed_lsn`: what only the topic can have must be in it (law 4). Makes the
    /// topic if it is not there and nothing is lost with it. Blocks, for some seconds if brokers
    /// do not answer.
    pub fn open_at(options: &Options, progress_lsn: Lsn, confirmed_lsn: Lsn) -> Result<Opened> {
        let topic = Topic::new(options)?;
        let needed = confirmed_lsn > progress_lsn;
        let extent = match topic.extent()? {
            Some(extent) => extent,
            None if needed => return Ok(Opened::Lost(None)),
            None => {
                topic.create()?;
                topic.extent()?.unwrap_or(topic::Extent { low: 0, high: 0 })
            }
        };
        let empty = extent.low == extent.high;
        if empty && needed {
            return Ok(Opened::Lost(None));
        }
        let end_lsn = match empty {
            true => progress_lsn,
            false => {
                let first_lsn = topic.first_lsn(extent)?;
                let mut end_lsn = topic.tail_lsn(extent)?;
                if first_lsn > progress_lsn || needed && end_lsn < confirmed_lsn {
                    end_lsn = topic.end_lsn(extent, progress_lsn)?;
                }
                if needed && end_lsn < confirmed_lsn {
                    return Ok(Opened::Lost(Some(Coverage { first_lsn, end_lsn })));
                }
                // The target may have got ahead, by another buffer.
                end_lsn.max(progress_lsn)
            }
        };
        let shared = Arc::new(Shared::new(options, end_lsn));
        let writer = Arc::new(Writer::open(shared.clone(), extent.high)?);
        Ok(Opened::Open(Self::with(options, shared, Some(writer))))
    }

    /// Opens the topic to be read only. Does not wait for a broker, and does not look whether the
    /// topic is there: the feed does.
    pub fn open_to_read(options: &Options) -> Log {
        Self::with(options, Arc::new(Shared::new(options, Lsn::ZERO)), None)
    }

    fn with(options: &Options, shared: Arc<Shared>, writer: Option<Arc<Writer>>) -> Log {
        let durable = shared.durable.subscribe();
        Log { options: options.clone(), shared, durable, writer }
    }

    /// The writing end; `None` where the topic was opened to be read. One at a time; items that the
    /// topic has already are dropped (law 3).
    pub fn sink(&self) -> Option<KafkaSink> {
        self.shared.sink_is_back();
        self.writer.clone().map(KafkaSink::new)
    }

    /// A reading end from a position on: the target's progress. Must be called within a runtime.
    /// What it meets is told by [`Log::failure`].
    pub fn feed(&self, from_lsn: Lsn) -> Result<KafkaFeed> {
        KafkaFeed::start(&self.options, from_lsn, self.shared.clone())
    }

    /// Exclusive end of what was pushed, in whole transactions: the source is read from here on.
    pub fn end_lsn(&self) -> Lsn {
        self.shared.pushed_lsn()
    }

    /// Exclusive end of what the brokers have acknowledged: what the slot may be told.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        self.durable.clone()
    }

    /// Everything below `lsn` is durable on the target: it does not count any more.
    pub fn release(&self, lsn: Lsn) {
        self.shared.release(lsn);
    }

    /// Bytes pushed and not released since it was opened.
    pub fn bytes(&self) -> u64 {
        self.shared.held()
    }

    /// What ended it, if something did: then pushes are refused and feeds end.
    pub fn failure(&self) -> Option<Error> {
        self.shared.failure()
    }

    /// What the brokers are in the way of, while something waits for them.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble()
    }

    /// Waits a moment for what is on its way, and lets go of the topic. Blocks.
    pub fn close(self) {
        self.shared.close();
        if let Some(writer) = &self.writer {
            writer.close(CLOSE_PATIENCE);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// About what an item takes on its way, in bytes.
pub fn cost(item: &Item) -> usize {
    item.bytes() + 256
}

/// Exclusive end of the transactions that a topic has from `from_lsn` on without a gap; `from_lsn`
/// if it has none, or is not there. Reads all of it. Blocks.
pub fn end_lsn(options: &Options, from_lsn: Lsn) -> Result<Lsn> {
    let topic = Topic::new(options)?;
    match topic.extent()? {
        Some(extent) => topic.end_lsn(extent, from_lsn),
        None => Ok(from_lsn),
    }
}

/// Asks the brokers for a topic: an error that a person must mend is better told before a job
/// begins. Blocks.
pub fn look(brokers: &str, topic: &str, properties: &Properties) -> Result<()> {
    let none = String::new;
    let options = Options {
        brokers: brokers.to_string(),
        topic: topic.to_string(),
        properties: properties.clone(),
        identity: Identity {
            job: none(),
            stream: none(),
            system: none(),
            timeline: 0,
            slot: none(),
            made_lsn: Lsn::ZERO,
        },
        limit_bytes: 0,
    };
    Topic::new(&options)?.extent().map(|_| ())
}
