//! Columns of many rows as array parameters, one array a column. Pure.
//!
//! A `text[]` in binary holds a length and the value's own bytes for each element: nothing is
//! escaped and nothing parsed. It is cast to the column's type in SQL, which is that type's input
//! function, as for a single parameter, unless somebody made a cast from text that is another
//! function. Such columns travel as array literals of their own type instead.
//!
//! Numbers, times and the like travel in binary arrays of their own type (`native`): a target
//! spends a third less on a key that needs no cast.

use super::native::{Native, put};
use super::statement::Mapping;
use crate::change::{Row, Value};
use crate::pg::Param;

/// How a column travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// In a binary `text[]`.
    Text,
    /// In an array literal of its base type.
    Literal,
    /// In a binary array of its own type.
    Native(Native),
    /// Not in an array: its type has none.
    None,
}

impl Mapping {
    /// The same with every value as text, for rows that hold one without a binary form.
    pub(super) fn plain(&self) -> Mapping {
        let mut plain = self.clone();
        for column in &mut plain.table.columns {
            (column.carrier, column.native) = (column.plain_carrier, None);
        }
        plain
    }

    /// The types of the columns that may be written, in order, if all of them travel in binary.
    pub(super) fn natives(&self) -> Option<Vec<Native>> {
        self.written().map(|c| self.target(c).and_then(|column| column.native)).collect()
    }
}

/// `pg_type.oid` of text.
const TEXT_OID: u32 = 25;

/// Dimensions, whether there are NULLs, element type, length, lower bound.
const HEADER_BYTES: usize = 20;

/// The rows of one statement.
#[derive(Debug)]
pub(super) struct Arrays {
    /// For each column of the relation, its place among `arrays`.
    slots: Vec<Option<usize>>,
    arrays: Vec<Array>,
    rows: usize,
}

#[derive(Debug)]
struct Array {
    carrier: Carrier,
    out: Vec<u8>,
}

/// A value that the stream does not have, or that its carrier does not take: the column.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoValue(pub usize);

impl Arrays {
    /// No rows yet; `columns` of the relation are taken from each.
    pub fn new(mapping: &Mapping, columns: &[usize]) -> Arrays {
        let mut slots = vec![None; mapping.places.len()];
        let mut arrays = Vec::with_capacity(columns.len());
        for column in columns {
            if let Some(slot) = slots.get_mut(*column) {
                *slot = Some(arrays.len());
            }
            let carrier = mapping.carrier(*column);
            let literal = matches!(carrier, Carrier::Literal | Carrier::None);
            let out = if literal { vec![b'{'] } else { vec![0; HEADER_BYTES] };
            arrays.push(Array { carrier, out });
        }
        Arrays { slots, arrays, rows: 0 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds a row. On an error the arrays are of no more use.
    pub fn push(&mut self, row: &Row) -> Result<(), NoValue> {
        for (column, (value, slot)) in row.values().zip(&self.slots).enumerate() {
            let Some(array) = slot.and_then(|slot| self.arrays.get_mut(slot)) else { continue };
            match value {
                Value::Text(text) => array.push(self.rows, Some(text)).ok_or(NoValue(column))?,
                Value::Null => array.push(self.rows, None).ok_or(NoValue(column))?,
                Value::Unchanged | Value::Binary(_) => return Err(NoValue(column)),
            }
        }
        self.rows += 1;
        Ok(())
    }

    /// The parameters, in the order of the columns given.
    pub fn params(&mut self) -> impl Iterator<Item = Param<'_>> {
        let rows = self.rows as u32;
        self.arrays.iter_mut().map(move |array| array.param(rows))
    }
}

impl Array {
    fn push(&mut self, index: usize, text: Option<&[u8]>) -> Option<()> {
        match (self.carrier, text) {
            (Carrier::Literal | Carrier::None, text) => {
                if index > 0 {
                    self.out.push(b',');
                }
                self.push_literal(text);
            }
            (_, None) => self.out.extend_from_slice(&(-1i32).to_be_bytes()),
            (Carrier::Text, Some(text)) => put(&mut self.out, text),
            (Carrier::Native(native), Some(text)) => native.encode(text, &mut self.out)?,
        }
        Some(())
    }

    fn push_literal(&mut self, text: Option<&[u8]>) {
        let Some(text) = text else { return self.out.extend_from_slice(b"NULL") };
        self.out.push(b'"');
        for byte in text {
            if matches!(byte, b'"' | b'\\') {
                self.out.push(b'\\');
            }
            self.out.push(*byte);
        }
        self.out.push(b'"');
    }

    fn param(&mut self, rows: u32) -> Param<'_> {
        let element_oid = match self.carrier {
            Carrier::Text => TEXT_OID,
            Carrier::Native(native) => native.element_oid().unwrap_or(TEXT_OID),
            Carrier::Literal | Carrier::None => {
                self.out.push(b'}');
                return Param::Text(Some(&self.out));
            }
        };
        // The flag for NULLs may be set where there are none.
        let header = [1, 1, element_oid, rows, 1].map(u32::to_be_bytes);
        if let Some(place) = self.out.get_mut(..HEADER_BYTES) {
            place.copy_from_slice(header.as_flattened());
        }
        Param::Binary(&self.out)
    }
}
