//! INSERT, UPDATE and DELETE: rows in column order.

use std::collections::HashSet;

use bytes::{BufMut, BytesMut};

use super::message::{Action, number};
use super::table::{Expected, Kind, Seen, Table};
use super::{Numbers, Outcome, plain};
use crate::change::{Change, OldRow, ReplicaIdentity, RowBuilder, Value};
use crate::decode::Error;
use crate::decode::json::{Reader, Result, Text, Token, Wrong};
use crate::lsn::Lsn;

/// `MaxHeapAttributeNumber`.
const COLUMNS_AT_MOST: usize = 1600;

/// One column of a message.
struct Cell<'a> {
    /// It is the column that was expected; name and type are not read then.
    expected: bool,
    name: Text<'a>,
    type_oid: Option<u32>,
    value: Token<'a>,
}

/// Which rows a message has shown.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    new: bool,
    old: bool,
}

/// Which row is being read; decides what a missing column means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// All columns are there.
    Inserted,
    /// Unchanged TOAST values are left out.
    Updated,
    /// Key columns are there.
    Key,
    /// All columns are there.
    Full,
}

impl Part {
    /// The value of a column that is not there; `None` if it should be.
    fn missing(self, column: &Expected) -> Option<Value<'static>> {
        match self {
            Part::Inserted | Part::Full => None,
            Part::Updated => Some(Value::Unchanged),
            // A key value too large for its row, of a key that did not change, is left out too.
            Part::Key if column.key => Some(Value::Unchanged),
            Part::Key => Some(Value::Null),
        }
    }

    /// The column that comes next, if none is missing.
    fn next(self, columns: &[Expected], from: usize) -> Option<&Expected> {
        let mut rest = columns.get(from..)?.iter();
        if self == Part::Key { rest.find(|column| column.key) } else { rest.next() }
    }
}

/// The next column of a list at whose opening bracket, or behind one of whose columns, the reader
/// is: `[{"name":..,"typeoid":..,"value":..},..]`.
fn next_cell<'a>(
    reader: &mut Reader<'a>,
    first: bool,
    expected: Option<&Expected>,
) -> Result<Option<Cell<'a>>> {
    if !begun(reader, first)? {
        return Ok(None);
    }
    let mut cell = Cell {
        expected: expected.is_some_and(|column| reader.eat_exact(&column.head)),
        name: Text { raw: b"", escaped: false },
        type_oid: None,
        value: Token::Null,
    };
    let mut has_value = cell.expected;
    let mut more = true;
    if cell.expected {
        cell.value = reader.token()?;
        more = reader.more(b'}')?;
    } else {
        reader.expect(b'{', "a column")?;
    }
    while more {
        match reader.key()?.raw {
            b"name" => cell.name = reader.string()?,
            b"typeoid" => cell.type_oid = number(reader)?,
            b"value" => {
                cell.value = reader.token()?;
                has_value = true;
            }
            _ => reader.skip()?,
        }
        more = reader.more(b'}')?;
    }
    if has_value { Ok(Some(cell)) } else { reader.wrong("a value in a column") }
}

/// All columns of a list with their types; `None` if a name is not UTF-8.
fn seen(reader: &mut Reader<'_>) -> Result<Option<Vec<Seen>>> {
    let (mut all, mut first, mut utf8) = (Vec::new(), true, true);
    while let Some(cell) = next_cell(reader, first, None)? {
        first = false;
        match cell.name.name()? {
            // What tells no type was refused before.
            Some(name) => all.push(Seen { name, type_oid: cell.type_oid.unwrap_or_default() }),
            None => utf8 = false,
        }
    }
    Ok(utf8.then_some(all))
}

/// True if a list has another element.
fn begun(reader: &mut Reader<'_>, first: bool) -> Result<bool> {
    if !first {
        return reader.more(b']');
    }
    reader.expect(b'[', "a list")?;
    Ok(!reader.eat(b']'))
}

/// Behind a field of a message: `None` if that was its last, and nothing follows.
fn continue_after(rows: &mut Option<Reader<'_>>) -> Result<()> {
    if let Some(reader) = rows
        && !reader.more(b'}')?
    {
        reader.end()?;
        *rows = None;
    }
    Ok(())
}

/// Reads the rows of one change of one table.
pub struct Reading<'r> {
    pub table: &'r mut Table,
    pub numbers: Numbers,
    pub new: &'r mut RowBuilder,
    pub old: &'r mut RowBuilder,
    pub lsn: Lsn,
}

impl Reading<'_> {
    /// The change; `None` if the table has to be described (again) first. `rows` is at the key of
    /// the message's first row; `None` if it has none.
    pub fn change(&mut self, action: Action, rows: Option<Reader<'_>>) -> Outcome<Option<Change>> {
        if let Some(shown) = self.fits(action, rows)? {
            self.table.fresh = false;
            return self.made(action, shown).map(Some);
        }
        if !self.table.fresh {
            return Ok(None);
        }
        if self.believes(action, rows)?
            && let Some(shown) = self.fits(action, rows)?
        {
            self.table.fresh = false;
            return self.made(action, shown).map(Some);
        }
        let relation = self.table.relation.name.clone();
        Err(Error::Unfitting { relation, lsn: self.lsn }.into())
    }

    /// Takes the table to have the columns of the rows, if any table can have them.
    fn believes(&mut self, action: Action, rows: Option<Reader<'_>>) -> Outcome<bool> {
        let (mut new, mut old) = (Vec::new(), Vec::new());
        let mut more = rows;
        while let Some(reader) = &mut more {
            let place = match reader.key()?.raw {
                b"columns" => &mut new,
                b"identity" => &mut old,
                _ => {
                    reader.skip()?;
                    continue_after(&mut more)?;
                    continue;
                }
            };
            let Some(all) = seen(reader)? else {
                return Err(Error::NameNotUtf8 { lsn: self.lsn }.into());
            };
            *place = all;
            continue_after(&mut more)?;
        }
        let possible = possible(&new) && possible(&old);
        if possible {
            self.table.believe(&new, action == Action::Insert, &old);
        }
        Ok(possible)
    }

    /// Reads the rows into the builders, once and without looking ahead; `None` if they are not
    /// rows of the table as it is known.
    fn fits(&mut self, action: Action, rows: Option<Reader<'_>>) -> Outcome<Option<Shown>> {
        self.new.clear();
        self.old.clear();
        let mut shown = Shown::default();
        let mut more = rows;
        while let Some(reader) = &mut more {
            match reader.key()?.raw {
                b"columns" if !shown.new => {
                    let inserted = action == Action::Insert;
                    let part = if inserted { Part::Inserted } else { Part::Updated };
                    if !self.row(reader, part)? {
                        return Ok(None);
                    }
                    shown.new = true;
                }
                b"identity" if !shown.old && action != Action::Insert => {
                    let full = self.table.relation.identity == ReplicaIdentity::Full;
                    if !self.row(reader, if full { Part::Full } else { Part::Key })? {
                        return Ok(None);
                    }
                    shown.old = true;
                }
                _ => reader.skip()?,
            }
            continue_after(&mut more)?;
        }
        Ok(Some(shown))
    }

    fn row(&mut self, reader: &mut Reader<'_>, part: Part) -> Outcome<bool> {
        let old = matches!(part, Part::Key | Part::Full);
        let (table, numbers, lsn) = (&*self.table, self.numbers, self.lsn);
        let out = if old { &mut *self.old } else { &mut *self.new };
        let mut at = 0;
        let mut first = true;
        let mut scratch = BytesMut::new();
        while let Some(cell) = next_cell(reader, first, part.next(&table.columns, at))? {
            first = false;
            let found = match (cell.expected, cell.type_oid) {
                (true, _) => table.columns.iter().skip(at).position(|c| part != Part::Key || c.key),
                (false, Some(type_oid)) => {
                    let name = plain(&mut scratch, cell.name)?;
                    table.find(at, name, type_oid).map(|found| found - at)
                }
                (false, None) => {
                    let relation = table.relation.name.clone();
                    return Err(Error::NoTypes { relation, lsn }.into());
                }
            };
            let rest = table.columns.get(at..).unwrap_or_default();
            let Some((column, skipped)) = found.and_then(|n| Some((rest.get(n)?, rest.get(..n)?)))
            else {
                return Ok(false);
            };
            if !left_out(skipped, part, out) || part == Part::Key && column.carried && !column.key {
                return Ok(false);
            }
            at += skipped.len() + 1;
            if column.carried && !push(out, column, cell.value, numbers, part)? {
                let (relation, column) = (table.relation.name.clone(), column.name.clone());
                return Err(Error::LostNumber { relation, column, lsn }.into());
            }
        }
        Ok(left_out(table.columns.get(at..).unwrap_or_default(), part, out))
    }

    fn made(&mut self, action: Action, shown: Shown) -> Outcome<Change> {
        let relation = self.table.relation.clone();
        let wrong = |what| Err(Wrong { what, left: 0 }.into());
        if action == Action::Delete {
            if !shown.old {
                return wrong("the deleted row's identity");
            }
            let old = self.old_row();
            return Ok(Change::Delete { relation, old });
        }
        if !shown.new {
            return wrong("the new row's columns");
        }
        if action == Action::Insert {
            return Ok(Change::Insert { relation, new: self.new.take() });
        }
        let full = relation.identity == ReplicaIdentity::Full;
        if full && !shown.old {
            return wrong("the old row, all of it");
        }
        // Without a change of the key, the identity is a copy out of the new row.
        let key_changed = || {
            let mut both = self.old.values().zip(self.new.values()).zip(&relation.columns);
            both.any(|((old, new), column)| column.key && old != new)
        };
        let old = (shown.old && (full || key_changed())).then(|| self.old_row());
        Ok(Change::Update { relation, old, new: self.new.take() })
    }

    fn old_row(&mut self) -> OldRow {
        match self.table.relation.identity {
            ReplicaIdentity::Full => OldRow::Full(self.old.take()),
            _ => OldRow::Key(self.old.take()),
        }
    }
}

/// True if a table can have these columns: no more than PostgreSQL's limit, and none twice.
fn possible(columns: &[Seen]) -> bool {
    let names: HashSet<_> = columns.iter().take(COLUMNS_AT_MOST + 1).map(|c| &c.name).collect();
    columns.len() <= COLUMNS_AT_MOST && names.len() == columns.len()
}

/// Pushes what missing columns mean; false if one of them should be there.
fn left_out(columns: &[Expected], part: Part, out: &mut RowBuilder) -> bool {
    for column in columns.iter().filter(|column| column.carried) {
        match part.missing(column) {
            Some(value) => out.push(value),
            None => return false,
        }
    }
    true
}

/// Pushes a value as the type's output text; false if it has been lost.
fn push(
    out: &mut RowBuilder,
    column: &Expected,
    value: Token<'_>,
    numbers: Numbers,
    part: Part,
) -> Result<bool> {
    match value {
        Token::Null => {
            let special = column.kind == Kind::Special
                && match numbers {
                    Numbers::Text => false,
                    Numbers::Ambiguous => true,
                    Numbers::Plain => column.not_null || part == Part::Key,
                };
            if special {
                return Ok(false);
            }
            out.push(Value::Null);
        }
        Token::Bool(value) => out.push(Value::Text(if value { b"t" } else { b"f" })),
        Token::Number(text) => out.push(Value::Text(text)),
        Token::Text(text) if column.kind == Kind::Bytea => {
            let hex = text.raw.len() % 2 == 0 && text.raw.iter().all(u8::is_ascii_hexdigit);
            if !hex {
                let what = "hexadecimal digits of a bytea (the session needs bytea_output = hex)";
                return Err(Wrong { what, left: 0 });
            }
            out.push_text_with(|bytes| {
                bytes.put_slice(b"\\x");
                bytes.put_slice(text.raw);
            });
        }
        Token::Text(text) if text.escaped => out.push_text_with(|bytes| text.write(bytes))?,
        Token::Text(text) => out.push(Value::Text(text.raw)),
    }
    Ok(true)
}
