//! test_decoding: the plugin that every server since 9.4 has, for where nothing better is allowed.
//!
//! <https://www.postgresql.org/docs/current/test-decoding.html>; its only description is its
//! source, contrib/test_decoding/test_decoding.c, and that of PostgreSQL 10 to 18 prints alike:
//!
//! ```text
//! BEGIN 731
//! table public."My T": INSERT: id[integer]:1 "a.b"[character varying[]]:'{x,"it''s"}' n[oid]:null
//! table public.t: UPDATE: old-key: id[integer]:1 new-tuple: id[integer]:2 v[xml]:'<a/>'
//! table public.t: DELETE: id[integer]:2
//! table public.t, public.u: TRUNCATE: restart_seqs cascade
//! message: transactional: 1 prefix: p, sz: 2 content:hi
//! COMMIT 731 (at 2026-11-21 04:19:19.5+00)
//! ```
//!
//! A value is `null`, `unchanged-toast-datum`, a bare number (NaN and Infinity too), `true` or
//! `false`, `B'bits'`, or text between quotes with quotes doubled and nothing else changed: no
//! setting makes backslashes special. Old rows leave out what is NULL. So a table's columns, their
//! types' oids and its identity come from the catalog ([`Step::Describe`]); then each row becomes
//! what pgoutput would have given.
//!
//! # Positions
//!
//! The text has none; they come with the message, from START_REPLICATION's data header and from the
//! lsn column of `pg_logical_slot_peek_changes` alike (`LogicalDecodingContext.write_location`):
//!
//! | message | its position | pgoutput says besides |
//! | --- | --- | --- |
//! | BEGIN | start of the transaction's first record | start of the commit record, commit time |
//! | change | start of its record | |
//! | message | end of its record; the same in pgoutput's text | |
//! | COMMIT | end of the commit record | start of the commit record |
//!
//! From that, with the commit record at `start..end`:
//!
//! | | whole in one chunk | in several chunks | COMMIT |
//! | --- | --- | --- | --- |
//! | `begin.commit_lsn` | `end - 1` | end of the transaction before, or first record | |
//! | `commit.commit_lsn`, `commit.end_lsn` | | | `end - 1`, `end` |
//!
//! Progress, holds and fences are ends of records, and no end lies within a commit record: compared
//! with them `end - 1` answers as `start` does. The lower bound in the chunks of a large
//! transaction is not below where the stream began, so it is new wherever the stream began at the
//! target's progress; a server sends nothing that committed before. Who reads with `peek` from a
//! slot behind progress must advance the slot first: the batcher refuses what looks old and ends
//! new. A hold may be passed by a transaction larger than a batch, as one already open always was.
//!
//! # Where it differs from pgoutput
//!
//! - The catalog answers as it is now, the text as it was. What a new row shows of its columns is
//!   believed; an old row alone that fits no identity is [`Error::Reshaped`], and asks to set the
//!   identity back. Descriptions are asked for again when a row does not fit and after each empty
//!   transaction, as DDL leaves one: those of the ignored too, as a table may be attached to one
//!   that takes part. DDL in one transaction with rows is not noticed by itself. A changed
//!   key that comes in one transaction with rows, and
//!   whose old rows fit the old description, is not noticed.
//! - Every table of the database is printed: the caller tells what to [`Decoder::ignore`], among it
//!   partitioned tables (a TRUNCATE prints them beside their partitions), materialized views, and
//!   before 11 the `pg_temp_N` under which an ALTER TABLE writes a table anew.
//! - No origin is printed; `only-local` is all there is.
//! - A DELETE without identity is an error, where the server would have refused it if published.
//! - Over START_REPLICATION the bytes are in the database's encoding, not the session's: a database
//!   that is not UTF-8 (or SQL_ASCII) must be pulled, where the text is converted.
//! - A message whose prefix holds `, sz: N content:` may be split at the wrong place, and one with
//!   a NUL, pulled as text, ends there.
//!
//! Nothing survives a crash here and nothing has to.

#[cfg(test)]
mod properties;
mod scan;
mod table;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use self::scan::{Name, Scan};
use self::table::{Table, Trouble, Verb};
use super::described::{Described, Known, Tables};
use super::{Error, Event, Result, Step};
use crate::change::{Change, Commit, RowBuilder};
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// The plugin's options, for START_REPLICATION and the SQL functions alike; every version has
/// them. `only_local` leaves out what has any replication origin, an application's own included.
///
/// `skip-empty-xacts` stays off: with it a message (before 17) comes without its BEGIN.
/// `force-binary`, `include-rewrites` (11) and `stream-changes` (14) are off by default.
pub fn options(only_local: bool) -> Vec<(&'static str, String)> {
    let mut options =
        vec![("include-xids", "1".to_string()), ("include-timestamp", "1".to_string())];
    if only_local {
        options.push(("only-local", "1".to_string()));
    }
    options
}

/// Turns messages of one slot into events.
#[derive(Debug, Default)]
pub struct Decoder {
    tables: Tables<Table>,
    rows: RowBuilder,
    /// The transaction between BEGIN and COMMIT, and whether anything came in it.
    open: Option<(u32, bool)>,
}

impl Decoder {
    /// Knows no table yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Remembers a table as the catalog has it now.
    pub fn describe(&mut self, described: Described) {
        let name = described.name.clone();
        let table = Table::new(described, self.tables.last(&name));
        self.tables.describe(&name, table);
    }

    /// Passes over the changes of a table, until it is asked for again.
    pub fn ignore(&mut self, name: &QualifiedName) {
        self.tables.ignore(name);
    }

    /// Decodes one message. `lsn` is the position that came with it; a COMMIT's becomes the
    /// transaction's end.
    ///
    /// Rows are copied, once and into one allocation. Errors for text that is not exactly one
    /// message, and for rows that do not fit a table just described. Never panics.
    pub fn decode(&mut self, data: Bytes, lsn: Lsn) -> Result<Step> {
        let mut scan = Scan::new(&data);
        if scan.pass(b"table ") {
            if let Some((_, wrote)) = &mut self.open {
                *wrote = true;
            }
            return self.table(scan, lsn);
        }
        let step = if scan.pass(b"BEGIN ") {
            self.begin(&mut scan, lsn)
        } else if scan.pass(b"message: transactional: ") {
            return message(&data, scan, lsn).map(Step::Event);
        } else if let Some(event) = not_asked(scan.left()) {
            return Err(Error::NotAskedFor { event });
        } else if scan.pass(b"COMMIT ") {
            self.commit(&mut scan, lsn)?
        } else if scan.pass(b"sequence ") {
            return Ok(Step::Nothing); // As a version that was never released printed them.
        } else {
            None
        };
        match step {
            Some(step) if scan.is_done() => Ok(step),
            _ => Err(text(lsn, "another message", scan)),
        }
    }

    fn begin(&mut self, scan: &mut Scan<'_>, lsn: Lsn) -> Option<Step> {
        let xid = scan.number()?;
        self.open = Some((xid, false));
        Some(Step::Event(Event::Start { xid, first_lsn: lsn }))
    }

    fn commit(&mut self, scan: &mut Scan<'_>, lsn: Lsn) -> Result<Option<Step>> {
        let Some((xid, commit_time)) = commit_line(scan) else { return Ok(None) };
        match self.open.take() {
            Some((open, _)) if open != xid => return Err(Error::OtherCommit { xid, lsn }),
            Some((_, false)) => self.tables.outdate(),
            // Without BEGIN it is out of place, as the assembler says.
            _ => {}
        }
        let commit_lsn = Lsn(lsn.0.saturating_sub(1));
        Ok(Some(Step::Event(Event::Commit(Commit { commit_lsn, end_lsn: lsn, commit_time }))))
    }

    fn table(&mut self, mut scan: Scan<'_>, lsn: Lsn) -> Result<Step> {
        let start = scan;
        let (schema, name) = qualified(&mut scan).ok_or(text(lsn, "a table's name", scan))?;
        let verb = if scan.pass(b": INSERT:") {
            Verb::Insert
        } else if scan.pass(b": UPDATE:") {
            Verb::Update
        } else if scan.pass(b": DELETE:") {
            Verb::Delete
        } else {
            return self.truncate(start, lsn);
        };
        let full_name = || qualified_name(schema, name, lsn);
        let table = match self.tables.get_mut(&schema.bytes(), &name.bytes()) {
            Some(Known::Table(table)) => table,
            Some(Known::Ignored) => return Ok(Step::Nothing),
            None => return full_name().map(Step::Describe),
        };
        match table.change(verb, scan, &mut self.rows) {
            Ok(change) => Ok(Step::Event(Event::Change { xid: None, change })),
            Err(Trouble::Shape) if !table.fresh => full_name().map(Step::Describe),
            Err(Trouble::Shape) => Err(Error::Reshaped { relation: full_name()?, lsn }),
            Err(Trouble::NoRow) => Err(Error::NoRow { relation: full_name()?, lsn }),
            Err(Trouble::Text(expected)) => Err(text(lsn, expected, scan)),
            Err(Trouble::NotUtf8) => Err(Error::NameNotUtf8 { lsn }),
        }
    }

    /// `a.b, c.d: TRUNCATE: restart_seqs cascade`.
    fn truncate(&mut self, mut scan: Scan<'_>, lsn: Lsn) -> Result<Step> {
        let mut relations = Vec::new();
        let verb = b": TRUNCATE:";
        while !scan.pass(verb) {
            let (schema, name) = qualified(&mut scan).ok_or(text(lsn, "a table's name", scan))?;
            match self.tables.get_mut(&schema.bytes(), &name.bytes()) {
                Some(Known::Table(table)) => {
                    relations.push(table.relation().clone());
                }
                Some(Known::Ignored) => {}
                None => return qualified_name(schema, name, lsn).map(Step::Describe),
            }
            if !scan.pass(b", ") && !scan.left().starts_with(verb) {
                return Err(text(lsn, "a verb", scan));
            }
        }
        let plain = scan.pass(b" (no-flags)");
        let restart_identity = scan.pass(b" restart_seqs");
        let cascade = scan.pass(b" cascade");
        if !scan.is_done() || plain == (restart_identity || cascade) {
            return Err(text(lsn, "the flags of TRUNCATE", scan));
        }
        if relations.is_empty() {
            return Ok(Step::Nothing);
        }
        let change = Change::Truncate { relations, cascade, restart_identity };
        Ok(Step::Event(Event::Change { xid: None, change }))
    }
}

fn text(lsn: Lsn, expected: &'static str, scan: Scan<'_>) -> Error {
    Error::Text { lsn, expected, left: scan.left().len() }
}

/// `schema.table`.
fn qualified<'a>(scan: &mut Scan<'a>) -> Option<(Name<'a>, Name<'a>)> {
    let schema = scan.name()?;
    let name = scan.pass(b".").then(|| scan.name())??;
    Some((schema, name))
}

fn qualified_name(schema: Name<'_>, name: Name<'_>, lsn: Lsn) -> Result<QualifiedName> {
    let both = schema.text().zip(name.text());
    let (schema, name) = both.ok_or(Error::NameNotUtf8 { lsn })?;
    Ok(QualifiedName { schema, name })
}

/// `731 (at 2026-11-21 04:19:19.5+00)`.
fn commit_line(scan: &mut Scan<'_>) -> Option<(u32, PgTimestamp)> {
    let xid = scan.number()?;
    let at = scan.pass(b" (at ").then(|| scan.timestamp())??;
    scan.pass(b")").then_some((xid, at))
}

/// What streaming of transactions in progress and two-phase decoding print.
fn not_asked(text: &[u8]) -> Option<&'static str> {
    const STARTS: [&str; 9] = [
        "PREPARE TRANSACTION ",
        "COMMIT PREPARED ",
        "ROLLBACK PREPARED ",
        "opening a streamed block",
        "closing a streamed block",
        "aborting streamed",
        "preparing streamed",
        "committing streamed",
        "streaming ",
    ];
    STARTS.into_iter().find(|start| text.starts_with(start.as_bytes()))
}

/// `1 prefix: p, sz: 2 content:hi`, after what every message begins with.
///
/// A prefix may hold anything, so the first split at which the size is right is taken. Where no
/// size is right (the content was converted to another encoding, or ended at a NUL, both only when
/// pulled as text) the first split is.
fn message(data: &Bytes, mut scan: Scan<'_>, lsn: Lsn) -> Result<Event> {
    let wrong = Err(text(lsn, "a logical message", scan));
    let transactional = scan.pass(b"1");
    if !(transactional || scan.pass(b"0")) || !scan.pass(b" prefix: ") {
        return wrong;
    }
    let rest = scan.left();
    let mut first = None;
    for at in memchr::memmem::find_iter(rest, b", sz: ") {
        let mut split = Scan::new(rest.get(at..).unwrap_or_default());
        split.pass(b", sz: ");
        let Some(size) = split.number::<usize>() else { continue };
        if !split.pass(b" content:") {
            continue;
        }
        let right = size == split.left().len();
        first = first.filter(|_| !right).or(Some((at, split.left().len())));
        if right {
            break;
        }
    }
    let Some((at, len)) = first else { return wrong };
    let prefix = std::str::from_utf8(rest.get(..at).unwrap_or_default());
    let prefix = prefix.map_err(|_| Error::NameNotUtf8 { lsn })?.to_string();
    let content = data.slice(data.len().saturating_sub(len)..);
    let change = Change::Message { transactional, lsn, prefix, content };
    Ok(Event::Change { xid: None, change })
}
