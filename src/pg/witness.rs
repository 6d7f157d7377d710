//! Who is told of every statement that the sessions of a [`super::Config`] send.
//!
//! Statements of the simple and the extended protocol, several of one request together, COPY, and
//! replication commands. Left out: the values of parameters and rows, and requests that are posted
//! while others are on their way, which are an applier's and nothing but rows.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::Error;

/// A statement that was answered, or was not.
#[derive(Clone, Copy, Debug)]
pub struct Heard<'a> {
    /// `label host:port/dbname` of the server.
    pub peer: &'a str,
    /// Its text, as it was sent: it may hold secrets.
    pub sql: &'a str,
    /// How long the answer took; of a COPY or a stream, its beginning.
    pub took: Duration,
    /// Why it failed, if it did.
    pub error: Option<&'a Error>,
}

/// Is told; must not block. Clones tell the same one.
#[derive(Clone)]
pub struct Witness(Arc<dyn Fn(Heard<'_>) + Send + Sync>);

impl Witness {
    /// Calls `hear` for each statement.
    pub fn new(hear: impl Fn(Heard<'_>) + Send + Sync + 'static) -> Witness {
        Witness(Arc::new(hear))
    }

    /// Tells it.
    pub(super) fn hear(&self, heard: Heard<'_>) {
        (self.0)(heard);
    }
}

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Witness")
    }
}
