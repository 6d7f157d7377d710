//! pgoutput, protocol versions 1 to 4.
//!
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>

use std::sync::Arc;

use bytes::{Buf, Bytes};
use foldhash::HashMap;

use super::{Error, Event, Prepared, Result};
use crate::change::{
    Begin, Change, Column, Commit, Ending, OldRow, Relation, ReplicaIdentity, Row,
};
use crate::clock::PgTimestamp;
use crate::id::QualifiedName;
use crate::lsn::Lsn;

/// Turns messages of one connection into events. Relations are remembered by oid; a description
/// that comes again unchanged keeps its `Arc`, so that pointer equality means "same table, same
/// shape".
#[derive(Debug, Default)]
pub struct Decoder {
    relations: HashMap<u32, Arc<Relation>>,
    /// Between Stream Start and Stream Stop, where messages carry a transaction id.
    streaming: bool,
}

impl Decoder {
    /// Knows no relation yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The description in force of a relation, if the stream has given one.
    pub fn relation(&self, oid: u32) -> Option<&Arc<Relation>> {
        self.relations.get(&oid)
    }

    /// Decodes one message. Rows are slices of `data`, not copies. `start_lsn` is where the stream
    /// said the message stands; errors name it.
    ///
    /// An empty message is what a server sends in place of an origin whose name it cannot look up.
    /// Errors for bytes that are not exactly one message, and for changes of relations not
    /// described or not fitting their description. Never panics.
    pub fn decode(&mut self, mut data: Bytes, start_lsn: Lsn) -> Result<Event> {
        let Ok(kind) = data.try_get_u8() else { return Ok(Event::UnknownOrigin) };
        let mut message = Message { data, kind, lsn: start_lsn };
        let event = self.event(&mut message)?;
        match message.data.len() {
            0 => Ok(event),
            bytes => Err(Error::Trailing { message: char::from(kind), lsn: start_lsn, bytes }),
        }
    }

    fn event(&mut self, m: &mut Message) -> Result<Event> {
        match m.kind {
            b'B' => Ok(Event::Begin(Begin {
                commit_lsn: m.lsn()?,
                commit_time: m.time()?,
                xid: m.u32()?,
                origin: None,
                ending: Ending::Commit,
            })),
            b'C' => Ok(Event::Commit(commit(m)?)),
            b'O' => Ok(Event::Origin { lsn: m.lsn()?, name: m.string()? }),
            b'R' => {
                self.stream_xid(m)?;
                self.describe(m)
            }
            b'Y' => {
                self.stream_xid(m)?;
                Ok(Event::Type { oid: m.u32()?, schema: m.schema()?, name: m.string()? })
            }
            b'I' | b'U' | b'D' | b'T' | b'M' => {
                let xid = self.stream_xid(m)?;
                Ok(Event::Change { xid, change: self.change(m)? })
            }
            b'S' => {
                self.streaming = true;
                Ok(Event::StreamStart { xid: m.u32()?, first: m.u8()? == 1 })
            }
            b'E' => {
                self.streaming = false;
                Ok(Event::StreamStop)
            }
            b'c' => Ok(Event::StreamCommit { xid: m.u32()?, commit: commit(m)? }),
            b'A' => stream_abort(m),
            b'b' => Ok(Event::BeginPrepare(prepared(m)?)),
            b'P' => Ok(Event::Prepare(flagged(m)?)),
            b'K' => Ok(Event::CommitPrepared(flagged(m)?)),
            b'r' => rollback_prepared(m),
            b'p' => Ok(Event::StreamPrepare(flagged(m)?)),
            kind => Err(Error::UnknownMessage { kind, lsn: m.lsn }),
        }
    }

    fn stream_xid(&self, m: &mut Message) -> Result<Option<u32>> {
        if self.streaming { m.u32().map(Some) } else { Ok(None) }
    }

    fn describe(&mut self, m: &mut Message) -> Result<Event> {
        let oid = m.u32()?;
        let name = QualifiedName { schema: m.schema()?, name: m.string()? };
        let letter = m.u8()?;
        let identity = ReplicaIdentity::from_letter(letter)
            .ok_or_else(|| m.field("the replica identity", letter))?;
        let count = m.u16()?;
        let mut columns = Vec::new();
        for _ in 0..count {
            let flags = m.u8()?;
            columns.push(Column {
                name: m.string()?,
                type_oid: m.u32()?,
                type_modifier: m.u32()? as i32,
                key: flags & 1 != 0,
            });
        }
        let relation = Relation { oid, name, identity, columns };
        let known = self.relations.get(&oid).filter(|known| ***known == relation);
        let relation = known.cloned().unwrap_or_else(|| Arc::new(relation));
        // A message cut short or too long must not leave its half behind.
        if m.data.is_empty() {
            self.relations.insert(oid, relation.clone());
        }
        Ok(Event::Relation(relation))
    }

    fn change(&self, m: &mut Message) -> Result<Change> {
        match m.kind {
            b'I' => {
                let relation = self.named(m)?;
                let part = m.u8()?;
                let new = new_row(m, part, &relation)?;
                Ok(Change::Insert { relation, new })
            }
            b'U' => {
                let relation = self.named(m)?;
                let part = m.u8()?;
                let old = match part {
                    b'K' | b'O' => Some(old_row(m, part, &relation)?),
                    _ => None,
                };
                let part = if old.is_some() { m.u8()? } else { part };
                let new = new_row(m, part, &relation)?;
                Ok(Change::Update { relation, old, new })
            }
            b'D' => {
                let relation = self.named(m)?;
                let part = m.u8()?;
                let old = old_row(m, part, &relation)?;
                Ok(Change::Delete { relation, old })
            }
            b'T' => self.truncate(m),
            _ => message(m),
        }
    }

    fn truncate(&self, m: &mut Message) -> Result<Change> {
        let count = m.u32()?;
        let options = m.u8()?;
        let mut relations = Vec::new();
        for _ in 0..count {
            relations.push(self.named(m)?);
        }
        Ok(Change::Truncate {
            relations,
            cascade: options & 1 != 0,
            restart_identity: options & 2 != 0,
        })
    }

    fn named(&self, m: &mut Message) -> Result<Arc<Relation>> {
        let oid = m.u32()?;
        self.relations.get(&oid).cloned().ok_or(Error::UnknownRelation {
            message: char::from(m.kind),
            lsn: m.lsn,
            oid,
        })
    }
}

fn new_row(m: &mut Message, part: u8, relation: &Relation) -> Result<Row> {
    if part == b'N' { m.row(relation) } else { Err(m.field("the kind of row", part)) }
}

fn old_row(m: &mut Message, part: u8, relation: &Relation) -> Result<OldRow> {
    match part {
        b'K' => Ok(OldRow::Key(m.row(relation)?)),
        b'O' => Ok(OldRow::Full(m.row(relation)?)),
        other => Err(m.field("the kind of row", other)),
    }
}

fn message(m: &mut Message) -> Result<Change> {
    let transactional = m.u8()? & 1 != 0;
    let lsn = m.lsn()?;
    let prefix = m.string()?;
    let len = m.u32()? as usize;
    if len > m.data.len() {
        return Err(m.truncated());
    }
    Ok(Change::Message { transactional, lsn, prefix, content: m.data.split_to(len) })
}

fn commit(m: &mut Message) -> Result<Commit> {
    m.u8()?; // Flags, unused in every version.
    Ok(Commit { commit_lsn: m.lsn()?, end_lsn: m.lsn()?, commit_time: m.time()? })
}

fn stream_abort(m: &mut Message) -> Result<Event> {
    let xid = m.u32()?;
    let subxid = m.u32()?;
    let at = if m.data.is_empty() { None } else { Some((m.lsn()?, m.time()?)) };
    Ok(Event::StreamAbort { xid, subxid, at })
}

fn prepared(m: &mut Message) -> Result<Prepared> {
    let (lsn, end_lsn, time) = (m.lsn()?, m.lsn()?, m.time()?);
    Ok(Prepared { lsn, end_lsn, time, xid: m.u32()?, gid: m.string()? })
}

fn flagged(m: &mut Message) -> Result<Prepared> {
    m.u8()?;
    prepared(m)
}

fn rollback_prepared(m: &mut Message) -> Result<Event> {
    m.u8()?;
    let (lsn, end_lsn) = (m.lsn()?, m.lsn()?);
    m.time()?; // When it was prepared.
    let time = m.time()?;
    let (xid, gid) = (m.u32()?, m.string()?);
    Ok(Event::RollbackPrepared(Prepared { lsn, end_lsn, time, xid, gid }))
}

/// A message being read. Every read is checked; a short one is an error.
struct Message {
    data: Bytes,
    kind: u8,
    lsn: Lsn,
}

impl Message {
    fn truncated(&self) -> Error {
        Error::Truncated { message: char::from(self.kind), lsn: self.lsn }
    }

    fn field(&self, field: &'static str, value: u8) -> Error {
        Error::Field { message: char::from(self.kind), lsn: self.lsn, field, value }
    }

    fn u8(&mut self) -> Result<u8> {
        self.data.try_get_u8().map_err(|_| self.truncated())
    }

    fn u16(&mut self) -> Result<u16> {
        self.data.try_get_u16().map_err(|_| self.truncated())
    }

    fn u32(&mut self) -> Result<u32> {
        self.data.try_get_u32().map_err(|_| self.truncated())
    }

    fn u64(&mut self) -> Result<u64> {
        self.data.try_get_u64().map_err(|_| self.truncated())
    }

    fn lsn(&mut self) -> Result<Lsn> {
        self.u64().map(Lsn)
    }

    fn time(&mut self) -> Result<PgTimestamp> {
        self.u64().map(|micros| PgTimestamp(micros as i64))
    }

    /// Text up to a NUL byte.
    fn string(&mut self) -> Result<String> {
        let len = memchr::memchr(0, &self.data).ok_or_else(|| self.truncated())?;
        let text = self.data.split_to(len);
        self.data.advance(1);
        match std::str::from_utf8(&text) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(Error::NotUtf8 { message: char::from(self.kind), lsn: self.lsn }),
        }
    }

    /// A schema's name; pg_catalog travels as the empty string.
    fn schema(&mut self) -> Result<String> {
        let name = self.string()?;
        Ok(if name.is_empty() { "pg_catalog".to_string() } else { name })
    }

    fn row(&mut self, relation: &Relation) -> Result<Row> {
        let row = Row::split_from(&mut self.data).map_err(|source| Error::Row {
            relation: relation.name.clone(),
            lsn: self.lsn,
            source,
        })?;
        if row.len() != relation.columns.len() {
            return Err(Error::ColumnCount {
                relation: relation.name.clone(),
                lsn: self.lsn,
                row_columns: row.len(),
                relation_columns: relation.columns.len(),
            });
        }
        Ok(row)
    }
}
