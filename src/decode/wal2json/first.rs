//! Format 1 in chunks: `{"xid":..,"change":[`, one object a change, `]}`.

use super::change::{Cells, Rows};
use super::message::{Action, Fields};
use super::{Decoder, Outcome};
use crate::change::{Begin, Commit};
use crate::clock::PgTimestamp;
use crate::decode::json::{Reader, Result, Token, Wrong};
use crate::decode::{Error, Event, Step};
use crate::lsn::Lsn;

/// What a transaction's head said of its commit.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    end_lsn: Lsn,
    time: PgTimestamp,
}

impl Open {
    /// Format 1 tells a commit's end only. No other record's start lies between the byte before it
    /// and it, so that byte serves wherever positions of commits are compared.
    fn commit(self) -> Commit {
        let commit_lsn = Lsn(self.end_lsn.0.saturating_sub(1));
        Commit { commit_lsn, end_lsn: self.end_lsn, commit_time: self.time }
    }
}

/// Where the parts of a change stand.
#[derive(Default)]
struct Lists<'a> {
    names: Option<Reader<'a>>,
    oids: Option<Reader<'a>>,
    values: Option<Reader<'a>>,
}

impl<'a> Lists<'a> {
    fn take(place: &mut Option<Reader<'a>>, reader: &mut Reader<'a>) -> Result<()> {
        *place = Some(*reader);
        reader.skip()
    }

    fn cells(self) -> Option<Cells<'a>> {
        let (names, values) = (self.names?, self.values?);
        Some(Cells::Lists { names, oids: self.oids, values })
    }
}

impl Decoder {
    /// One message of format 1.
    pub(super) fn first_format(&mut self, data: &[u8], lsn: Lsn) -> Outcome<Step> {
        let mut reader = Reader::new(data);
        if reader.eat(b']') {
            return self.tail(reader);
        }
        // A change that is not its transaction's first begins with the comma between them.
        reader.eat(b',');
        reader.expect(b'{', "an object")?;
        let mut fields = Fields::default();
        let mut head = reader;
        if head.key()?.raw == b"kind" {
            return self.first_change(reader, fields, lsn);
        }
        loop {
            let key = reader.key()?;
            if key.raw == b"change" {
                break;
            }
            fields.take(key.raw, &mut reader)?;
            reader.expect(b',', "a comma")?;
        }
        reader.expect(b'[', "a list of changes")?;
        match reader.peek() {
            None => self.head(&fields),
            Some(_) if fields.xid.is_none() => self.lone(reader, lsn),
            Some(_) => Err(Error::NotInChunks { lsn }.into()),
        }
    }

    fn head(&mut self, fields: &Fields<'_>) -> Outcome<Step> {
        let (Some(xid), Some(end_lsn)) = (fields.xid, fields.next_lsn) else {
            let what = "xid and nextlsn: ask for include-xids and include-lsn";
            return Err(Wrong { what, left: 0 }.into());
        };
        let open = Open { end_lsn, time: fields.commit_time()? };
        self.wrote = false;
        self.open = Some(open);
        let Commit { commit_lsn, commit_time, .. } = open.commit();
        let origin = self.origin(fields.origin);
        let ending = Default::default();
        Ok(Step::Event(Event::Begin(Begin { commit_lsn, commit_time, xid, origin, ending })))
    }

    fn tail(&mut self, mut reader: Reader<'_>) -> Outcome<Step> {
        reader.expect(b'}', "the end of a transaction")?;
        reader.end()?;
        match self.open.take() {
            Some(open) => {
                self.committed();
                Ok(Step::Event(Event::Commit(open.commit())))
            }
            None => Err(Wrong { what: "the head of a transaction before its end", left: 0 }.into()),
        }
    }

    /// A message outside any transaction is a whole object, in which 1.0 may leave a comma over.
    fn lone(&mut self, mut reader: Reader<'_>, lsn: Lsn) -> Outcome<Step> {
        reader.eat(b',');
        reader.expect(b'{', "an object")?;
        let mut fields = Fields::default();
        let mut more = true;
        while more {
            let key = reader.key()?;
            fields.take(key.raw, &mut reader)?;
            more = reader.more(b'}')?;
        }
        reader.expect(b']', "the end of a list")?;
        reader.expect(b'}', "the end of an object")?;
        reader.end()?;
        if fields.transactional {
            return Err(Error::NotInChunks { lsn }.into());
        }
        fields.message(lsn)
    }

    fn first_change<'a>(
        &mut self,
        mut reader: Reader<'a>,
        mut fields: Fields<'a>,
        lsn: Lsn,
    ) -> Outcome<Step> {
        let mut kind: &[u8] = b"";
        let (mut new, mut old) = (Lists::default(), Lists::default());
        let mut more = true;
        while more {
            let key = reader.key()?;
            match key.raw {
                b"kind" => match reader.token()? {
                    Token::Text(text) => kind = text.raw,
                    _ => return Ok(reader.wrong("a kind")?),
                },
                b"columnnames" => Lists::take(&mut new.names, &mut reader)?,
                b"columntypeoids" => Lists::take(&mut new.oids, &mut reader)?,
                b"columnvalues" => Lists::take(&mut new.values, &mut reader)?,
                b"oldkeys" => old_keys(&mut reader, &mut old)?,
                other => fields.take(other, &mut reader)?,
            }
            more = reader.more(b'}')?;
        }
        reader.end()?;
        let action = match kind {
            b"insert" => Action::Insert,
            b"update" => Action::Update,
            b"delete" => Action::Delete,
            b"message" => return fields.message(lsn),
            _ => return Ok(reader.wrong("a kind of insert, update, delete and message")?),
        };
        let rows = Rows { new: new.cells(), old: old.cells(), nulls_left_out: true };
        self.rows(action, &fields, rows, lsn)
    }
}

fn old_keys<'a>(reader: &mut Reader<'a>, old: &mut Lists<'a>) -> Result<()> {
    reader.expect(b'{', "an object")?;
    let mut more = true;
    while more {
        let key = reader.key()?;
        match key.raw {
            b"keynames" => Lists::take(&mut old.names, reader)?,
            b"keytypeoids" => Lists::take(&mut old.oids, reader)?,
            b"keyvalues" => Lists::take(&mut old.values, reader)?,
            _ => reader.skip()?,
        }
        more = reader.more(b'}')?;
    }
    Ok(())
}
