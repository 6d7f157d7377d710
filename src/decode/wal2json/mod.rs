//! wal2json, format 2, giving the events that pgoutput would give.
//!
//! Format 2 writes one JSON object for each change, and for BEGIN and COMMIT. Format 1 is not read:
//! it writes one object for a whole transaction, which the server cannot build past 1 GB
//! (wal2json#46, #183), and where there is nothing else (1.0), TRUNCATE leaves no trace and what an
//! origin brought is not told apart. Nor is a format 2 without the numbers of types (before 2.5):
//! a bytea is written there as its digits, like a text, so that one altered to the other while its
//! rows are in the stream would be misread in silence. Servers with either have test_decoding.
//!
//! What the plugin does not say, and where it comes from instead:
//! - a table's whole list of columns, its order and its key: the catalog ([`Step::Describe`]),
//!   asked again after each empty transaction, as DDL leaves one (DDL in one transaction with rows
//!   is not noticed by itself). A message that does not fit asks again too; one that does not fit
//!   the catalog either was written before an ALTER TABLE, and its own word is taken;
//! - unchanged TOAST values: columns of the table that an UPDATE leaves out;
//! - whether an UPDATE changed the key: `identity` is always there, so it is compared.
//!
//! What it cannot say: NaN and infinities of columns that are `real`, `double precision` or
//! `numeric` are `null` like NULL, before 2.6 ([`Numbers`]); RESTART IDENTITY and CASCADE (cascaded
//! tables are listed); a logical message behind its first NUL byte; a change of a column's modifier
//! alone; in an UPDATE written before ADD COLUMN, that the column was not there (it comes as
//! unchanged, which writes nothing). UPDATE and DELETE of a table without an
//! identity are left out with a WARNING: [`dropped`] knows it.
//!
//! Over the replication protocol textual output comes in the server's encoding, unconverted; from
//! `pg_logical_slot_peek_changes` in the client's. A database in another encoding than UTF8 has to
//! be read that way.

mod change;
mod message;
mod options;
mod table;
#[cfg(test)]
mod tests;
mod warning;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::described::{Described, Known, Tables};
use super::json::{self, Reader, Text, Wrong};
use super::{Error, Event, Result, Step};
use crate::change::{Change, Relation, RowBuilder};
use crate::id::QualifiedName;
use crate::limit::MESSAGE_BYTES;
use crate::lsn::Lsn;

use message::{Action, Fields, Head};
use table::Table;

pub use options::{Plugin, TOO_OLD, options, table_list};
pub use warning::dropped;

/// What a `null` in a column of type `real`, `double precision` or `numeric` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// NULL: numbers come as strings, NaN and infinities too (wal2json 2.6).
    Text,
    /// NULL or NaN or an infinity, and nobody can tell: an error.
    Ambiguous,
    /// NULL, as whoever runs the job says that these columns hold nothing else. In a column that is
    /// NOT NULL it is an error all the same.
    Plain,
}

/// Turns messages of one connection into steps.
#[derive(Debug)]
pub struct Decoder {
    tables: Tables<Table>,
    numbers: Numbers,
    origins: HashMap<u32, String>,
    truncated: Option<Truncated>,
    /// A change came since the last transaction began.
    wrote: bool,
    scratch: Scratch,
}

/// Memory used again for each message.
#[derive(Debug, Default)]
struct Scratch {
    new: RowBuilder,
    old: RowBuilder,
    schema: BytesMut,
    name: BytesMut,
}

/// The tables of one TRUNCATE so far.
#[derive(Debug)]
struct Truncated {
    lsn: Option<Lsn>,
    relations: Vec<Arc<Relation>>,
}

/// What went wrong with a message, before its place is known.
#[derive(Debug)]
enum Fault {
    Json(Wrong),
    Other(Box<Error>),
}

impl From<Wrong> for Fault {
    fn from(wrong: Wrong) -> Self {
        Fault::Json(wrong)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Other(Box::new(error))
    }
}

type Outcome<T> = std::result::Result<T, Fault>;

impl Decoder {
    /// Knows no table yet.
    pub fn new(numbers: Numbers) -> Self {
        Decoder {
            tables: Tables::default(),
            numbers,
            origins: HashMap::new(),
            truncated: None,
            wrote: false,
            scratch: Scratch::default(),
        }
    }

    /// What [`Step::Describe`] asked for: the table as the catalog has it now.
    pub fn describe(&mut self, described: Described) {
        let name = described.name.clone();
        let relation = self.tables.last(&name).map(|table| &table.relation);
        let table = Table::new(described, relation);
        self.tables.describe(&name, table);
    }

    /// The other answer: the table takes no part in the job. Its changes are passed over without a
    /// word, until it is asked for again.
    pub fn ignore(&mut self, table: &QualifiedName) {
        self.tables.ignore(table);
    }

    /// The name of a replication origin of the source (`pg_replication_origin`): wal2json gives its
    /// number only. A transaction of an origin not named here has the name "", and after an empty
    /// transaction none is.
    pub fn name_origin(&mut self, id: u32, name: impl Into<String>) {
        self.origins.insert(id, name.into());
    }

    /// Decodes one message. `lsn` is where the transport said it stands; of a COMMIT that does not
    /// tell it itself, that is taken as the commit's end.
    ///
    /// Errors for bytes that are not exactly one message (of a table that takes no part, only its
    /// beginning is looked at), and for values that wal2json has lost.
    /// Never panics; needs no more memory than the message has bytes.
    pub fn decode(&mut self, data: Bytes, lsn: Lsn) -> Result<Step> {
        let len = data.len();
        if len > MESSAGE_BYTES {
            return Err(Error::TooLong { lsn, bytes: len, most: MESSAGE_BYTES });
        }
        self.message(&data, lsn).map_err(|fault| match fault {
            Fault::Json(wrong) => {
                Error::Json { lsn, what: wrong.what, at: len.saturating_sub(wrong.left) }
            }
            Fault::Other(error) => *error,
        })
    }

    fn message(&mut self, data: &[u8], lsn: Lsn) -> Outcome<Step> {
        let mut reader = Reader::new(data);
        if !reader.eat_exact(b"{\"action\":") {
            return Err(Wrong { what: "a message of format 2", left: data.len() }.into());
        }
        let action = Action::read(&mut reader)?;
        if matches!(action, Action::Insert | Action::Update | Action::Delete) {
            let head = Head::read(&mut reader)?;
            return match self.truncated() {
                Some(step) => Ok(step),
                None => self.change(action, &head, lsn),
            };
        }
        let fields = Fields::read(&mut reader)?;
        if action == Action::Truncate {
            return self.truncate(&fields, lsn);
        }
        if let Some(step) = self.truncated() {
            return Ok(step);
        }
        match action {
            Action::Begin => {
                self.wrote = false;
                let origin = self.origin(fields.origin);
                fields.begin(origin).map(|begin| Step::Event(Event::Begin(begin)))
            }
            Action::Commit => {
                // DDL leaves an empty transaction, and so does whoever makes or drops an origin:
                // its number may be another's now.
                if !self.wrote {
                    self.tables.outdate();
                    self.origins.clear();
                }
                fields.commit(lsn).map(|commit| Step::Event(Event::Commit(commit)))
            }
            Action::Message => fields.message(lsn),
            // Above.
            Action::Insert | Action::Update | Action::Delete | Action::Truncate => {
                Ok(Step::Nothing)
            }
        }
    }

    fn origin(&self, id: Option<u32>) -> Option<String> {
        let id = id.filter(|id| *id != 0)?;
        Some(self.origins.get(&id).cloned().unwrap_or_default())
    }

    /// The TRUNCATE held back, once a message shows that it is complete.
    fn truncated(&mut self) -> Option<Step> {
        let Truncated { relations, .. } = self.truncated.take()?;
        let change = Change::Truncate { relations, cascade: false, restart_identity: false };
        Some(Step::Before(Event::Change { xid: None, change }))
    }

    /// One table of a TRUNCATE. The statement's tables come one by one with the same position, and
    /// must be emptied by one statement again, or foreign keys among them forbid it.
    fn truncate(&mut self, fields: &Fields<'_>, lsn: Lsn) -> Outcome<Step> {
        self.wrote = true;
        let other = |held: &Truncated| held.lsn != fields.lsn;
        if self.truncated.as_ref().is_some_and(other)
            && let Some(step) = self.truncated()
        {
            return Ok(step);
        }
        let Scratch { schema, name, .. } = &mut self.scratch;
        let (schema, name) = names(schema, name, fields.schema, fields.table)?;
        match self.tables.get_mut(schema, name) {
            None => Ok(Step::Describe(qualified(schema, name, lsn)?)),
            Some(Known::Ignored) => Ok(Step::Nothing),
            Some(Known::Table(table)) => {
                let held = Truncated { lsn: fields.lsn, relations: Vec::new() };
                let held = self.truncated.get_or_insert(held);
                held.relations.push(table.relation.clone());
                Ok(Step::Nothing)
            }
        }
    }

    fn change(&mut self, action: Action, head: &Head<'_>, lsn: Lsn) -> Outcome<Step> {
        self.wrote = true;
        let Scratch { new, old, schema, name } = &mut self.scratch;
        let (schema, name) = names(schema, name, head.schema, head.table)?;
        let table = match self.tables.get_mut(schema, name) {
            None => return Ok(Step::Describe(qualified(schema, name, lsn)?)),
            Some(Known::Ignored) => return Ok(Step::Nothing),
            Some(Known::Table(table)) => table,
        };
        let mut reading = change::Reading { table, numbers: self.numbers, new, old, lsn };
        match reading.change(action, head.rows)? {
            Some(change) => Ok(Step::Event(Event::Change { xid: None, change })),
            None => Ok(Step::Describe(qualified(schema, name, lsn)?)),
        }
    }
}

/// The two names of a message's table, without escapes.
fn names<'a>(
    schema: &'a mut BytesMut,
    name: &'a mut BytesMut,
    schema_text: Option<Text<'a>>,
    name_text: Option<Text<'a>>,
) -> Outcome<(&'a [u8], &'a [u8])> {
    let (Some(schema_text), Some(name_text)) = (schema_text, name_text) else {
        return Err(Wrong { what: "a schema and a table", left: 0 }.into());
    };
    Ok((plain(schema, schema_text)?, plain(name, name_text)?))
}

fn plain<'a>(scratch: &'a mut BytesMut, text: Text<'a>) -> json::Result<&'a [u8]> {
    if !text.escaped {
        return Ok(text.raw);
    }
    scratch.clear();
    text.write(scratch)?;
    Ok(scratch)
}

fn qualified(schema: &[u8], name: &[u8], lsn: Lsn) -> Result<QualifiedName> {
    match (std::str::from_utf8(schema), std::str::from_utf8(name)) {
        (Ok(schema), Ok(name)) => Ok(QualifiedName::new(schema, name)),
        _ => Err(Error::NameNotUtf8 { lsn }),
    }
}
