//! Rows of one table: which printed column goes where.

use std::sync::Arc;

use super::scan::{Literal, Name, Scan, pieces};
use crate::change::{Change, Column, OldRow, Relation, ReplicaIdentity, Row, RowBuilder, Value};
use crate::decode::described::{self, Described};

/// Why a message of a table cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The row is not of the shape or the identity that the table was described with.
    Shape,
    /// The plugin had no row to print.
    NoRow,
    /// The text is not test_decoding's.
    Text(&'static str),
    /// A name is not UTF-8.
    NotUtf8,
}

type Result<T> = std::result::Result<T, Trouble>;

/// A table as it was described, and as its rows are printed.
#[derive(Debug)]
pub(super) struct Table {
    described: Described,
    relation: Arc<Relation>,
    /// Every column in the order of printing.
    slots: Vec<Slot>,
    /// Described for the very message that comes next: what does not fit now is not mended by
    /// asking again.
    pub fresh: bool,
}

/// A printed column.
#[derive(Debug)]
struct Slot {
    column: Column,
    /// How it was printed last: ` name[type]:`. Empty at first.
    label: Vec<u8>,
    /// False for generated columns, which rows do not carry.
    carried: bool,
    not_null: bool,
}

/// What a message does to its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Insert,
    Update,
    Delete,
}

/// Part of a row that `Table::tuple` reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    New,
    /// Columns that are NULL are left out, under a key all others too.
    Old,
}

impl Table {
    /// From a description; `before` is what was known of the table until now.
    pub fn new(described: Described, before: Option<&Table>) -> Table {
        let full = described.identity == ReplicaIdentity::Full;
        let slots = described.columns.iter().map(|column| Slot {
            column: Column {
                name: column.name.clone(),
                type_oid: column.type_oid,
                type_modifier: column.type_modifier,
                key: full || column.key,
            },
            label: Vec::new(),
            carried: !column.generated,
            not_null: column.not_null,
        });
        let slots = slots.collect();
        let relation = described.relation();
        let relation = described::shared(before.map(|table| &table.relation), relation);
        Table { described, relation, slots, fresh: true }
    }

    pub fn relation(&self) -> &Arc<Relation> {
        &self.relation
    }

    /// The change that the rest of a message tells, after its verb.
    ///
    /// Where the row does not fit and the description is fresh, the row is older than a change of
    /// the table: a new row shows all of its columns, so the shape is taken from it.
    pub fn change(&mut self, verb: Verb, scan: Scan<'_>, rows: &mut RowBuilder) -> Result<Change> {
        let change = match self.read(verb, scan, rows) {
            Err(Trouble::Shape) if self.fresh && verb != Verb::Delete => {
                self.reshape(scan)?;
                self.read(verb, scan, rows)
            }
            change => change,
        }?;
        self.fresh = false;
        Ok(change)
    }

    fn read(&mut self, verb: Verb, mut scan: Scan<'_>, rows: &mut RowBuilder) -> Result<Change> {
        if scan.left() == b" (no-tuple-data)" {
            return Err(Trouble::NoRow);
        }
        match verb {
            Verb::Insert => {
                let new = self.last(&mut scan, Part::New, rows)?;
                Ok(Change::Insert { relation: self.relation.clone(), new })
            }
            Verb::Delete => {
                let old = self.last(&mut scan, Part::Old, rows)?;
                Ok(Change::Delete { relation: self.relation.clone(), old: self.old_row(old) })
            }
            Verb::Update => {
                let old = if scan.pass(b" old-key:") {
                    let old = self.tuple(&mut scan, Part::Old, rows)?;
                    if !scan.pass(b" new-tuple:") {
                        return Err(rest(scan));
                    }
                    Some(self.old_row(old))
                } else if self.is_full() {
                    return Err(Trouble::Shape);
                } else {
                    None
                };
                if scan.left() == b" (no-tuple-data)" {
                    return Err(Trouble::NoRow);
                }
                let new = self.last(&mut scan, Part::New, rows)?;
                Ok(Change::Update { relation: self.relation.clone(), old, new })
            }
        }
    }

    fn is_full(&self) -> bool {
        self.described.identity == ReplicaIdentity::Full
    }

    fn old_row(&self, row: Row) -> OldRow {
        if self.is_full() { OldRow::Full(row) } else { OldRow::Key(row) }
    }

    /// A tuple with which the message ends.
    fn last(&mut self, scan: &mut Scan<'_>, part: Part, rows: &mut RowBuilder) -> Result<Row> {
        let row = self.tuple(scan, part, rows)?;
        if scan.is_done() { Ok(row) } else { Err(rest(*scan)) }
    }

    /// Before 12, rows of a table WITH OIDS are printed with that system column first. Such a table
    /// cannot have a column of that name.
    fn pass_oid(&self, scan: &mut Scan<'_>) {
        let mut ahead = *scan;
        let printed = ahead.pass(b" oid[oid]:") && ahead.literal().is_some();
        if printed && !self.described.columns.iter().any(|column| column.name == "oid") {
            *scan = ahead;
        }
    }

    /// One row, its columns in the order of the slots.
    fn tuple(&mut self, scan: &mut Scan<'_>, part: Part, rows: &mut RowBuilder) -> Result<Row> {
        rows.clear();
        self.pass_oid(scan);
        let (full, fresh) = (self.is_full(), self.fresh);
        let mut next = Next::Unread;
        for slot in &mut self.slots {
            if !slot.is_next(scan, &mut next)? {
                let due = match part {
                    Part::New => true,
                    // A key's columns are never NULL. One that is NOT NULL and not there tells of
                    // another identity, or became NOT NULL since.
                    Part::Old if full => slot.not_null && slot.carried && !fresh,
                    Part::Old => slot.column.key && slot.carried,
                };
                if due {
                    return Err(Trouble::Shape);
                }
                if slot.carried {
                    rows.push(Value::Null);
                }
                continue;
            }
            if part == Part::Old && !slot.column.key {
                return Err(Trouble::Shape);
            }
            let literal = scan.literal().ok_or(Trouble::Text("a value"))?;
            if slot.carried {
                push(rows, literal);
            }
        }
        Ok(rows.take())
    }

    /// Takes the columns from the new row of this message. What the description has not keeps its
    /// name and no type: such a column was dropped or renamed since.
    fn reshape(&mut self, mut scan: Scan<'_>) -> Result<()> {
        if scan.pass(b" old-key:") {
            while !scan.pass(b" new-tuple:") {
                label(&mut scan)?;
                scan.literal().ok_or(Trouble::Text("a value"))?;
            }
        }
        self.pass_oid(&mut scan);
        let full = self.is_full();
        let mut slots = Vec::new();
        while !scan.is_done() {
            let name = label(&mut scan)?;
            scan.literal().ok_or(Trouble::Text("a value"))?;
            let known = self.described.columns.iter().find(|column| name.is(&column.name));
            let column = Column {
                name: name.text().ok_or(Trouble::NotUtf8)?,
                type_oid: known.map_or(0, |column| column.type_oid),
                type_modifier: known.map_or(-1, |column| column.type_modifier),
                key: full || known.is_some_and(|column| column.key),
            };
            let carried = known.is_none_or(|column| !column.generated);
            let not_null = known.is_some_and(|column| column.not_null);
            slots.push(Slot { column, label: Vec::new(), carried, not_null });
        }
        let carried = slots.iter().filter(|slot| slot.carried);
        let relation = Relation {
            columns: carried.map(|slot| slot.column.clone()).collect(),
            ..self.described.relation()
        };
        self.relation = described::shared(Some(&self.relation), relation);
        self.slots = slots;
        Ok(())
    }
}

/// The column that comes next in the text, read at most once.
#[derive(Clone, Copy)]
enum Next<'a> {
    Unread,
    Read {
        name: Name<'a>,
        label: &'a [u8],
    },
    /// No column.
    None,
}

impl Slot {
    /// True if the text goes on with this column; then its label is passed.
    fn is_next<'a>(&mut self, scan: &mut Scan<'a>, next: &mut Next<'a>) -> Result<bool> {
        if !self.label.is_empty() && scan.pass(&self.label) {
            *next = Next::Unread;
            return Ok(true);
        }
        if let Next::Unread = next {
            let mut ahead = *scan;
            *next = match label(&mut ahead) {
                Ok(name) => {
                    let len = scan.left().len().saturating_sub(ahead.left().len());
                    Next::Read { name, label: scan.left().get(..len).unwrap_or_default() }
                }
                Err(_) => Next::None,
            };
        }
        let Next::Read { name, label } = *next else { return Ok(false) };
        if !name.is(&self.column.name) {
            return Ok(false);
        }
        if !self.label.is_empty() {
            // Its type, or how names are quoted, is another than in the row before.
            return Err(Trouble::Shape);
        }
        self.label = label.to_vec();
        scan.pass(label);
        *next = Next::Unread;
        Ok(true)
    }
}

/// ` name[type]:`, passed.
fn label<'a>(scan: &mut Scan<'a>) -> Result<Name<'a>> {
    let read = |scan: &mut Scan<'a>| {
        let name = scan.pass(b" ").then(|| scan.name())??;
        scan.type_name()?;
        scan.pass(b":").then_some(name)
    };
    read(scan).ok_or(Trouble::Text("a column"))
}

/// What is wrong where a row should have ended: one more column, or no column at all.
fn rest(mut scan: Scan<'_>) -> Trouble {
    match label(&mut scan) {
        Ok(_) => Trouble::Shape,
        Err(trouble) => trouble,
    }
}

fn push(rows: &mut RowBuilder, literal: Literal<'_>) {
    match literal {
        Literal::Null => rows.push(Value::Null),
        Literal::Unchanged => rows.push(Value::Unchanged),
        Literal::Plain(text) => rows.push(Value::Text(text)),
        Literal::Doubled(raw) => rows.push_text_with(|text| {
            pieces(raw, b'\'').for_each(|piece| text.extend_from_slice(piece));
        }),
    }
}
