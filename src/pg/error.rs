//! Errors of the wire, each naming the server they came from.

use std::fmt;
use std::io;

use postgres_protocol::message::backend::ErrorFields;

use crate::fault::{Fault, Faulty};

/// What PostgreSQL said, field by field.
///
/// <https://www.postgresql.org/docs/current/protocol-error-fields.html>
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `PANIC`.
    pub severity: String,
    /// SQLSTATE, five characters.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// Detail, if any.
    pub detail: Option<String>,
    /// Hint, if any.
    pub hint: Option<String>,
    /// 1-based character position in the statement.
    pub position: Option<usize>,
    /// Context (`CONTEXT:` lines).
    pub context: Option<String>,
    /// Schema of the table concerned.
    pub schema: Option<String>,
    /// Table concerned.
    pub table: Option<String>,
    /// Column concerned.
    pub column: Option<String>,
    /// Constraint concerned.
    pub constraint: Option<String>,
}

impl ServerError {
    /// From the fields of an ErrorResponse; what cannot be read is left empty.
    pub fn from_fields(mut fields: ErrorFields<'_>) -> Self {
        use fallible_iterator::FallibleIterator;
        let mut error = ServerError::default();
        while let Ok(Some(field)) = fields.next() {
            let text = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'V' => error.severity = text,
                b'S' if error.severity.is_empty() => error.severity = text,
                b'C' => error.code = text,
                b'M' => error.message = text,
                b'D' => error.detail = Some(text),
                b'H' => error.hint = Some(text),
                b'P' => error.position = text.parse().ok(),
                b'W' => error.context = Some(text),
                b's' => error.schema = Some(text),
                b't' => error.table = Some(text),
                b'c' => error.column = Some(text),
                b'n' => error.constraint = Some(text),
                _ => {}
            }
        }
        error
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code)?;
        if let Some(detail) = &self.detail {
            write!(f, "; {detail}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; hint: {hint}")?;
        }
        Ok(())
    }
}

/// What can go wrong between us and a server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A connection string, variable or file that cannot be used. Says which and why.
    #[error("{0}")]
    Config(String),
    /// No session could be had.
    #[error("cannot connect to {peer}: {detail}")]
    Connect {
        /// Which server.
        peer: String,
        /// Why, and what to do.
        detail: String,
        /// True if a later try may go better (refused, unreachable, starting up, too many clients).
        transient: bool,
        /// What the server said, where it was the server that refused.
        server: Option<Box<ServerError>>,
    },
    /// The server answered with an error.
    #[error("{peer}: {error}")]
    Server {
        /// Which server.
        peer: String,
        /// What it said.
        error: Box<ServerError>,
    },
    /// The connection broke.
    #[error("connection to {peer} lost: {source}")]
    Io {
        /// Which server.
        peer: String,
        /// How.
        source: io::Error,
    },
    /// The server did not answer in time.
    #[error("{peer} did not answer within {seconds} s: {doing}")]
    Timeout {
        /// Which server.
        peer: String,
        /// What was asked.
        doing: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The server sent what the protocol does not allow here.
    #[error("{peer} sent what the protocol does not allow: {detail}")]
    Protocol {
        /// Which server.
        peer: String,
        /// What.
        detail: String,
    },
    /// The session was used again after the future of an earlier request was dropped half way.
    #[error(
        "{peer}: an earlier request on this session was dropped half way and its answers are \
         still to come; open a new session"
    )]
    Abandoned {
        /// Which server.
        peer: String,
    },
    /// A result did not have the shape the query promises.
    #[error("unexpected result: {0}")]
    Result(String),
}

impl Error {
    /// No session, and none until a person acts.
    pub(super) fn refused(peer: &str, detail: impl Into<String>) -> Error {
        let (peer, detail) = (peer.to_string(), detail.into());
        Error::Connect { peer, detail, transient: false, server: None }
    }

    /// SQLSTATE, where the server gave one.
    pub fn code(&self) -> Option<&str> {
        self.server().map(|e| e.code.as_str())
    }

    /// The server's own error, where it is one.
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            Error::Server { error, .. } => Some(error),
            Error::Connect { server, .. } => server.as_deref(),
            _ => None,
        }
    }

    /// True if the session cannot be used any more.
    pub fn is_closed(&self) -> bool {
        match self {
            Error::Connect { .. } | Error::Io { .. } | Error::Protocol { .. } => true,
            Error::Timeout { .. } | Error::Abandoned { .. } => true,
            Error::Server { error, .. } => error.severity == "FATAL" || error.severity == "PANIC",
            Error::Config(_) | Error::Result(_) => false,
        }
    }
}

/// SQLSTATEs after which the same thing may succeed: connection failures, serialization failures
/// and deadlocks, lock timeouts, too many connections, server shutdown and start-up.
///
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn transient(code: &str) -> bool {
    code.starts_with("08")
        || matches!(code, "40001" | "40P01" | "55P03" | "53300" | "57P01" | "57P02" | "57P03")
        || matches!(code, "57P05" | "25P03" | "25P04") // a timeout that ended an idle session
        || code == "57014" // canceled by a person or a statement timeout
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Io { .. } | Error::Timeout { .. } => Fault::Retry,
            Error::Connect { transient: true, .. } => Fault::Retry,
            Error::Server { error, .. } if transient(&error.code) => Fault::Retry,
            Error::Result(_) | Error::Abandoned { .. } => Fault::Bug,
            _ => Fault::Stop,
        }
    }
}
