//! Whichever buffer outlives the process: one type for who keeps a stream going through it.

use tokio::sync::watch;

#[cfg(feature = "kafka")]
use super::kafka;
use super::spool::{self, Spool};
use crate::change::{Feed, Item, Sink, SinkClosed};
use crate::fault::{Fault, Faulty};
use crate::lsn::Lsn;

/// Settings of the Kafka client; empty where walferry is built without it.
#[cfg(feature = "kafka")]
pub type KafkaProperties = kafka::Properties;
/// Settings of the Kafka client; empty where walferry is built without it.
#[cfg(not(feature = "kafka"))]
#[derive(Clone, Debug, Default)]
pub struct KafkaProperties(());

/// What went wrong in one of them.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The disk spool.
    #[error(transparent)]
    Spool(#[from] spool::Error),
    /// The topic.
    #[cfg(feature = "kafka")]
    #[error(transparent)]
    Kafka(#[from] kafka::Error),
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Spool(error) => error.fault(),
            #[cfg(feature = "kafka")]
            Error::Kafka(error) => error.fault(),
        }
    }
}

/// A durable buffer, open.
pub enum Durable {
    /// On a local disk.
    Spool(Spool),
    /// In a topic.
    #[cfg(feature = "kafka")]
    Kafka(kafka::Log),
}

impl Durable {
    /// The writing end; `None` where it was opened to be read only. One at a time.
    pub fn sink(&self) -> Option<DurableSink> {
        match self {
            Durable::Spool(spool) => Some(DurableSink::Spool(spool.sink())),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.sink().map(DurableSink::Kafka),
        }
    }

    /// The reading end from the target's progress on. Must be called within a runtime.
    pub fn feed(&self, from_lsn: Lsn) -> Result<DurableFeed, Error> {
        Ok(match self {
            Durable::Spool(spool) => DurableFeed::Spool(spool.feed(from_lsn)?),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => DurableFeed::Kafka(log.feed(from_lsn)?),
        })
    }

    /// Exclusive end of what was pushed, in whole transactions.
    pub fn end_lsn(&self) -> Lsn {
        match self {
            Durable::Spool(spool) => spool.end_lsn(),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.end_lsn(),
        }
    }

    /// Exclusive end of what the slot may be told.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        match self {
            Durable::Spool(spool) => spool.durable(),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.durable(),
        }
    }

    /// Everything below is durable on the target.
    pub fn release(&self, lsn: Lsn) {
        match self {
            Durable::Spool(spool) => spool.release(lsn),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.release(lsn),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        match self {
            Durable::Spool(spool) => spool.bytes(),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.bytes(),
        }
    }

    /// What ended it, if something did.
    pub fn failure(&self) -> Option<Error> {
        match self {
            Durable::Spool(spool) => spool.failure().map(Error::from),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.failure().map(Error::from),
        }
    }

    /// What it waits for, if it does.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Durable::Spool(spool) => spool.trouble(),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.trouble(),
        }
    }

    /// Lets go of it in order. Blocks.
    pub fn close(self) {
        match self {
            Durable::Spool(spool) => spool.close(),
            #[cfg(feature = "kafka")]
            Durable::Kafka(log) => log.close(),
        }
    }
}

/// The writing end of a durable buffer.
pub enum DurableSink {
    /// Of a spool.
    Spool(spool::SpoolSink),
    /// Of a topic.
    #[cfg(feature = "kafka")]
    Kafka(kafka::KafkaSink),
}

impl Sink for DurableSink {
    async fn push(&mut self, item: Item) -> Result<(), SinkClosed> {
        match self {
            DurableSink::Spool(sink) => sink.push(item).await,
            #[cfg(feature = "kafka")]
            DurableSink::Kafka(sink) => sink.push(item).await,
        }
    }
}

/// The reading end of a durable buffer.
pub enum DurableFeed {
    /// Of a spool.
    Spool(spool::SpoolFeed),
    /// Of a topic.
    #[cfg(feature = "kafka")]
    Kafka(kafka::KafkaFeed),
}

impl Feed for DurableFeed {
    async fn pop(&mut self) -> Option<Item> {
        match self {
            DurableFeed::Spool(feed) => feed.pop().await,
            #[cfg(feature = "kafka")]
            DurableFeed::Kafka(feed) => feed.pop().await,
        }
    }

    fn try_pop(&mut self) -> Option<Item> {
        match self {
            DurableFeed::Spool(feed) => feed.try_pop(),
            #[cfg(feature = "kafka")]
            DurableFeed::Kafka(feed) => feed.try_pop(),
        }
    }
}
