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
use crate::change::Value;
use crate::pg::OwnedParam;

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

/// Rows that one prepared statement writes, in pieces: a server copies each value some times, and
/// does that in its memory, and in the processor's, where a piece is small.
#[derive(Debug)]
pub(super) struct Arrays {
    /// For each column of the relation, its place among a piece's arrays.
    slots: Vec<Option<usize>>,
    carriers: Vec<Carrier>,
    pieces: Vec<Piece>,
    most: Most,
}

/// What a piece may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    /// Rows.
    pub rows: usize,
    /// Bytes of all its arrays: one row more ends the piece.
    pub bytes: usize,
}

/// All rows in one piece.
pub(super) const WHOLE: Most = Most { rows: usize::MAX, bytes: usize::MAX };

/// The rows of one execution.
#[derive(Debug)]
pub(super) struct Piece {
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
    pub fn new(mapping: &Mapping, columns: &[usize], most: Most) -> Arrays {
        let mut slots = vec![None; mapping.places.len()];
        for (place, column) in columns.iter().enumerate() {
            if let Some(slot) = slots.get_mut(*column) {
                *slot = Some(place);
            }
        }
        let carriers = columns.iter().map(|column| mapping.carrier(*column)).collect();
        Arrays { slots, carriers, pieces: Vec::new(), most }
    }

    /// Adds a row. On an error the arrays are of no more use.
    pub fn push<'a>(&mut self, row: impl Iterator<Item = Value<'a>>) -> Result<(), NoValue> {
        if self.pieces.last().is_none_or(|piece| piece.is_full(self.most)) {
            self.pieces.push(self.piece());
        }
        let Some(piece) = self.pieces.last_mut() else { return Ok(()) };
        for (column, (value, slot)) in row.zip(&self.slots).enumerate() {
            let Some(array) = slot.and_then(|slot| piece.arrays.get_mut(slot)) else { continue };
            match value {
                Value::Text(text) => array.push(piece.rows, Some(text)).ok_or(NoValue(column))?,
                Value::Null => array.push(piece.rows, None).ok_or(NoValue(column))?,
                Value::Unchanged | Value::Binary(_) => return Err(NoValue(column)),
            }
        }
        piece.rows += 1;
        Ok(())
    }

    /// An empty piece, with room for as much as the last one holds: an array that grows is copied
    /// each time, and those of one shape are alike.
    fn piece(&self) -> Piece {
        let last = self.pieces.last();
        let room = |place| last.and_then(|piece| piece.arrays.get(place)).map_or(0, Array::room);
        let array = |(place, carrier): (usize, &Carrier)| Array::new(*carrier, room(place));
        Piece { arrays: self.carriers.iter().enumerate().map(array).collect(), rows: 0 }
    }

    /// True if there are no rows.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.pieces.iter().map(Piece::rows).sum()
    }

    /// What each execution is given. None is empty.
    pub fn into_pieces(self) -> impl Iterator<Item = Piece> {
        self.pieces.into_iter()
    }
}

impl Piece {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn is_full(&self, most: Most) -> bool {
        self.rows >= most.rows
            || self.arrays.iter().map(|array| array.out.len()).sum::<usize>() >= most.bytes
    }

    /// The parameters, in the order of the columns given.
    pub fn into_params(self) -> impl Iterator<Item = OwnedParam> {
        let rows = self.rows as u32;
        self.arrays.into_iter().map(move |array| array.into_param(rows))
    }
}

impl Array {
    fn new(carrier: Carrier, room: usize) -> Array {
        let mut out = Vec::with_capacity(room.max(HEADER_BYTES));
        match carrier {
            Carrier::Literal | Carrier::None => out.push(b'{'),
            Carrier::Text | Carrier::Native(_) => out.resize(HEADER_BYTES, 0),
        }
        Array { carrier, out }
    }

    /// For another like it: an eighth more than it has.
    fn room(&self) -> usize {
        self.out.len() + self.out.len() / 8
    }

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

    fn into_param(mut self, rows: u32) -> OwnedParam {
        let element_oid = match self.carrier {
            Carrier::Text => TEXT_OID,
            Carrier::Native(native) => native.element_oid().unwrap_or(TEXT_OID),
            Carrier::Literal | Carrier::None => {
                self.out.push(b'}');
                return OwnedParam { binary: false, value: self.out };
            }
        };
        // The flag for NULLs may be set where there are none.
        let header = [1, 1, element_oid, rows, 1].map(u32::to_be_bytes);
        if let Some(place) = self.out.get_mut(..HEADER_BYTES) {
            place.copy_from_slice(header.as_flattened());
        }
        OwnedParam { binary: true, value: self.out }
    }
}
