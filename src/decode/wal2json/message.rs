//! The fields that messages of format 2 have besides rows.

use bytes::{Bytes, BytesMut};

use super::{Fault, Outcome};
use crate::change::{Begin, Change, Commit};
use crate::clock::PgTimestamp;
use crate::decode::json::{Reader, Result, Text, Token, Wrong};
use crate::decode::{Error, Event, Step};
use crate::lsn::Lsn;

/// What a message says happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Begin,
    Commit,
    Insert,
    Update,
    Delete,
    Truncate,
    Message,
}

impl Action {
    pub fn read(reader: &mut Reader<'_>) -> Result<Action> {
        match reader.string()?.raw {
            b"B" => Ok(Action::Begin),
            b"C" => Ok(Action::Commit),
            b"I" => Ok(Action::Insert),
            b"U" => Ok(Action::Update),
            b"D" => Ok(Action::Delete),
            b"T" => Ok(Action::Truncate),
            b"M" => Ok(Action::Message),
            _ => reader.wrong("an action of B, C, I, U, D, T and M"),
        }
    }
}

/// What stands in a message that is no change of a row; which of it, depends on the action. Unknown
/// keys are passed over, as newer versions add some.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fields<'a> {
    pub xid: Option<u32>,
    pub time: Option<Text<'a>>,
    pub origin: Option<u32>,
    pub lsn: Option<Lsn>,
    pub next_lsn: Option<Lsn>,
    pub schema: Option<Text<'a>>,
    pub table: Option<Text<'a>>,
    pub transactional: bool,
    pub prefix: Option<Text<'a>>,
    pub content: Option<Text<'a>>,
}

/// A change up to its rows, which are read once the table is known.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub schema: Option<Text<'a>>,
    pub table: Option<Text<'a>>,
    /// At the key of the first row; `None` if there is none.
    pub rows: Option<Reader<'a>>,
}

impl<'a> Head<'a> {
    /// From behind the action. The names come before the rows.
    pub fn read(reader: &mut Reader<'a>) -> Result<Head<'a>> {
        let mut head = Head { schema: None, table: None, rows: None };
        while reader.more(b'}')? {
            let field = *reader;
            match reader.key()?.raw {
                b"schema" => head.schema = text(reader)?,
                b"table" => head.table = text(reader)?,
                b"columns" | b"identity" => {
                    head.rows = Some(field);
                    return Ok(head);
                }
                _ => reader.skip()?,
            }
        }
        reader.end()?;
        Ok(head)
    }
}

impl<'a> Fields<'a> {
    /// The rest of the message, from behind its action.
    pub fn read(reader: &mut Reader<'a>) -> Result<Fields<'a>> {
        let mut fields = Fields::default();
        while reader.more(b'}')? {
            let key = reader.key()?;
            fields.take(key.raw, reader)?;
        }
        reader.end()?;
        Ok(fields)
    }

    /// One field's value.
    fn take(&mut self, key: &[u8], reader: &mut Reader<'a>) -> Result<()> {
        match key {
            b"xid" => self.xid = number(reader)?,
            b"timestamp" => self.time = text(reader)?,
            b"origin" => self.origin = number(reader)?,
            b"lsn" => self.lsn = position(reader)?,
            b"nextlsn" => self.next_lsn = position(reader)?,
            b"schema" => self.schema = text(reader)?,
            b"table" => self.table = text(reader)?,
            b"transactional" => self.transactional = reader.token()? == Token::Bool(true),
            b"prefix" => self.prefix = text(reader)?,
            b"content" => self.content = text(reader)?,
            _ => reader.skip()?,
        }
        Ok(())
    }

    pub fn begin(&self, origin: Option<String>) -> Outcome<Begin> {
        let (Some(xid), Some(commit_lsn)) = (self.xid, self.lsn) else {
            return Err(missing("xid and lsn: ask for include-xids and include-lsn"));
        };
        let ending = Default::default();
        Ok(Begin { commit_lsn, commit_time: self.commit_time()?, xid, origin, ending })
    }

    /// Before 2.3 the end is not in the message, but it is where the transport says it stands.
    pub fn commit(&self, lsn: Lsn) -> Outcome<Commit> {
        let Some(commit_lsn) = self.lsn else {
            return Err(missing("lsn: ask for include-lsn"));
        };
        let end_lsn = self.next_lsn.unwrap_or(lsn);
        Ok(Commit { commit_lsn, end_lsn, commit_time: self.commit_time()? })
    }

    pub fn commit_time(&self) -> Outcome<PgTimestamp> {
        let text = self.time.and_then(|time| std::str::from_utf8(time.raw).ok());
        let time = text.and_then(PgTimestamp::from_iso);
        time.ok_or_else(|| missing("a timestamp: ask for include-timestamp"))
    }

    pub fn message(&self, lsn: Lsn) -> Outcome<Step> {
        let (Some(prefix), Some(content)) = (self.prefix, self.content) else {
            return Err(missing("prefix and content"));
        };
        let Some(prefix) = prefix.name()? else { return Err(Error::NameNotUtf8 { lsn }.into()) };
        let mut bytes = BytesMut::new();
        content.write(&mut bytes)?;
        let (lsn, content) = (self.lsn.unwrap_or(lsn), Bytes::from(bytes));
        let change = Change::Message { transactional: self.transactional, lsn, prefix, content };
        Ok(Step::Event(Event::Change { xid: None, change }))
    }
}

fn missing(what: &'static str) -> Fault {
    Wrong { what, left: 0 }.into()
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<Option<Text<'a>>> {
    match reader.token()? {
        Token::Null => Ok(None),
        Token::Text(text) => Ok(Some(text)),
        _ => reader.wrong("a string or null"),
    }
}

/// An unsigned number; also as wal2json prints oids past 2^31, with a sign.
pub fn number(reader: &mut Reader<'_>) -> Result<Option<u32>> {
    match reader.token()? {
        Token::Null => Ok(None),
        Token::Number(digits) => {
            let text = std::str::from_utf8(digits).unwrap_or_default();
            let unsigned = text.parse::<u32>().ok();
            match unsigned.or_else(|| text.parse::<i32>().ok().map(|signed| signed as u32)) {
                Some(number) => Ok(Some(number)),
                None => reader.wrong("a number of 32 bits"),
            }
        }
        _ => reader.wrong("a number or null"),
    }
}

fn position(reader: &mut Reader<'_>) -> Result<Option<Lsn>> {
    let Some(text) = text(reader)? else { return Ok(None) };
    match std::str::from_utf8(text.raw).ok().and_then(|text| text.parse().ok()) {
        Some(lsn) => Ok(Some(lsn)),
        None => reader.wrong("a position"),
    }
}
