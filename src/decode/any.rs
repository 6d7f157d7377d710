//! Whichever decoder a slot's plugin needs, as one type.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;

use super::wal2json::{self, Numbers};
use super::{Decoder, Described, Result, Step, test_decoding};
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// An output plugin that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plugin {
    /// PostgreSQL's own for logical replication; needs a publication.
    Pgoutput,
    /// JSON; needs nothing but its package on the server.
    Wal2json,
    /// Text; every server has it.
    TestDecoding,
}

impl Plugin {
    /// Each, in the order in which they are preferred: of the textual ones, test_decoding loses
    /// nothing of a value, which wal2json does before 2.6.
    pub const ALL: [Plugin; 3] = [Plugin::Pgoutput, Plugin::TestDecoding, Plugin::Wal2json];

    /// As the server knows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Plugin::Pgoutput => "pgoutput",
            Plugin::Wal2json => "wal2json",
            Plugin::TestDecoding => "test_decoding",
        }
    }

    /// True if BEGIN tells where the transaction committed, so that one received before is known.
    pub fn tells_commit_first(self) -> bool {
        self != Plugin::TestDecoding
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
#[error("\"{0}\" is not a decoder: use pgoutput, wal2json, test_decoding")]
pub struct UnknownPlugin(String);

impl FromStr for Plugin {
    type Err = UnknownPlugin;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "pgoutput" => Ok(Plugin::Pgoutput),
            "wal2json" => Ok(Plugin::Wal2json),
            "test_decoding" => Ok(Plugin::TestDecoding),
            other => Err(UnknownPlugin(other.to_string())),
        }
    }
}

/// A decoder of one connection.
#[derive(Debug)]
pub enum AnyDecoder {
    /// Of pgoutput.
    Pgoutput(Decoder),
    /// Of wal2json.
    Wal2json(Box<wal2json::Decoder>),
    /// Of test_decoding.
    TestDecoding(Box<test_decoding::Decoder>),
}

impl AnyDecoder {
    /// One that knows no table yet. `numbers` is for wal2json.
    pub fn new(plugin: Plugin, numbers: Numbers) -> AnyDecoder {
        match plugin {
            Plugin::Pgoutput => AnyDecoder::Pgoutput(Decoder::new()),
            Plugin::Wal2json => AnyDecoder::Wal2json(Box::new(wal2json::Decoder::new(numbers))),
            Plugin::TestDecoding => AnyDecoder::TestDecoding(Box::default()),
        }
    }

    /// Decodes one message; see each decoder. `lsn` is where the source said the message stands.
    pub fn decode(&mut self, data: Bytes, lsn: Lsn) -> Result<Step> {
        match self {
            AnyDecoder::Pgoutput(decoder) => decoder.decode(data, lsn).map(Step::Event),
            AnyDecoder::Wal2json(decoder) => decoder.decode(data, lsn),
            AnyDecoder::TestDecoding(decoder) => decoder.decode(data, lsn),
        }
    }

    /// Answers [`Step::Describe`]: the table, or `None` if its changes are not to be read.
    pub fn describe(&mut self, name: &QualifiedName, described: Option<Described>) {
        match (self, described) {
            (AnyDecoder::Pgoutput(_), _) => {} // Never asks.
            (AnyDecoder::Wal2json(decoder), Some(table)) => decoder.describe(table),
            (AnyDecoder::Wal2json(decoder), None) => decoder.ignore(name),
            (AnyDecoder::TestDecoding(decoder), Some(table)) => decoder.describe(table),
            (AnyDecoder::TestDecoding(decoder), None) => decoder.ignore(name),
        }
    }

    /// Tells the name of an origin to a decoder that is told numbers only.
    pub fn name_origin(&mut self, id: u32, name: &str) {
        if let AnyDecoder::Wal2json(decoder) = self {
            decoder.name_origin(id, name);
        }
    }
}
