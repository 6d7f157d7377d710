//! Whichever decoder a slot's plugin needs, as one type.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;

use super::{Decoder, Result, Step};
use crate::lsn::Lsn;

/// An output plugin that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plugin {
    /// PostgreSQL's own for logical replication; needs a publication.
    Pgoutput,
}

impl Plugin {
    /// Each, in the order in which they are preferred.
    pub const ALL: [Plugin; 1] = [Plugin::Pgoutput];

    /// As the server knows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Plugin::Pgoutput => "pgoutput",
        }
    }

    /// True if its output is text, in the server's encoding where it comes over START_REPLICATION.
    pub fn is_textual(self) -> bool {
        self != Plugin::Pgoutput
    }
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name is of no plugin that can be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a decoder: use pgoutput")]
pub struct UnknownPlugin(String);

impl FromStr for Plugin {
    type Err = UnknownPlugin;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "pgoutput" => Ok(Plugin::Pgoutput),
            other => Err(UnknownPlugin(other.to_string())),
        }
    }
}

/// A decoder of one connection.
#[derive(Debug)]
pub enum AnyDecoder {
    /// Of pgoutput.
    Pgoutput(Decoder),
}

impl AnyDecoder {
    /// One that knows no table yet.
    pub fn new(plugin: Plugin) -> AnyDecoder {
        match plugin {
            Plugin::Pgoutput => AnyDecoder::Pgoutput(Decoder::new()),
        }
    }

    /// Decodes one message; see each decoder. `lsn` is where the source said the message stands.
    pub fn decode(&mut self, data: Bytes, lsn: Lsn) -> Result<Step> {
        match self {
            AnyDecoder::Pgoutput(decoder) => decoder.decode(data, lsn).map(Step::Event),
        }
    }
}
