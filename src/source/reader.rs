//! Either transport, as one type.

use std::fmt;
use std::str::FromStr;

use tokio::sync::watch;

use super::{End, Positions, Pull, Result, Stream, StreamOptions};
use crate::change::Sink;
use crate::lsn::Lsn;
use crate::pg::Config;

/// The way by which a slot is read. It may change from one reader to the next; the slot stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// The streaming replication protocol: see [`Stream`].
    Stream,
    /// SQL functions over an ordinary connection: see [`Pull`].
    Pull,
}

impl Transport {
    /// `stream` or `pull`.
    pub fn as_str(self) -> &'static str {
        match self {
            Transport::Stream => "stream",
            Transport::Pull => "pull",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text names no transport.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a transport: use stream or pull")]
pub struct UnknownTransport(String);

impl FromStr for Transport {
    type Err = UnknownTransport;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "stream" => Ok(Transport::Stream),
            "pull" => Ok(Transport::Pull),
            other => Err(UnknownTransport(other.to_string())),
        }
    }
}

/// A slot opened for reading, not being read yet.
#[derive(Debug)]
pub enum Reader {
    /// By the replication protocol.
    Stream(Stream),
    /// By SQL.
    Pull(Pull),
}

impl Reader {
    /// See [`Stream::open`] and [`Pull::open`].
    pub async fn open(
        config: &Config,
        transport: Transport,
        options: StreamOptions,
    ) -> Result<Reader> {
        Ok(match transport {
            Transport::Stream => Reader::Stream(Stream::open(config, options).await?),
            Transport::Pull => Reader::Pull(Pull::open(config, options).await?),
        })
    }

    /// The server's timeline: the recorded one, or one that continues it (a standby was promoted).
    /// It has to be recorded before anything of what is read is kept, as positions beyond the fork
    /// are the new timeline's.
    pub fn timeline(&self) -> u32 {
        match self {
            Reader::Stream(stream) => stream.timeline(),
            Reader::Pull(pull) => pull.timeline(),
        }
    }

    /// See [`Stream::run`] and [`Pull::run`].
    pub async fn run<S: Sink>(
        self,
        sink: &mut S,
        durable: watch::Receiver<Lsn>,
        positions: &watch::Sender<Positions>,
        stop: watch::Receiver<bool>,
    ) -> Result<End> {
        match self {
            Reader::Stream(stream) => stream.run(sink, durable, positions, stop).await,
            Reader::Pull(pull) => pull.run(sink, durable, positions, stop).await,
        }
    }
}
