//! Rows as the data of a COPY. Pure.
//!
//! One row comes after the other, without arrays to build and take apart, and the rows go into the
//! table by the page. Where every column has a form for it they travel in binary, which a target
//! reads in half of the time; else the server's input functions get the same texts as by a
//! parameter.
//!
//! <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9>

use super::encode::NoValue;
use super::native::Native;
use super::statement::Mapping;
use crate::change::Value;

/// Signature, flags, and the length of an extension that is not there.
const BINARY_HEAD: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// A piece is complete once it has so many bytes.
const PIECE_BYTES: usize = 64 << 10;

/// What a row may have more than is left in a piece before that has to grow.
const PIECE_ROOM: usize = 4 << 10;

/// In place of another row's number of columns.
const BINARY_END: [u8; 2] = (-1_i16).to_be_bytes();

/// The rows of one COPY.
#[derive(Debug)]
pub(super) struct Lines {
    /// For each column of the relation, whether it is written and as what.
    columns: Vec<Form>,
    /// Number of columns that are written, where rows travel in binary.
    binary: Option<u16>,
    /// Complete ones: data of megabytes in one place would be copied each time it outgrew it.
    pieces: Vec<Vec<u8>>,
    /// The one that rows go to.
    out: Vec<u8>,
    rows: usize,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Left,
    Text,
    Binary(Native),
}

impl Lines {
    /// No rows yet; every column that may be written is taken from each.
    pub fn new(mapping: &Mapping) -> Lines {
        let natives = mapping.natives();
        let form = |column| match mapping.target(column).and_then(|c| c.native) {
            _ if !mapping.is_written(column) => Form::Left,
            Some(native) if natives.is_some() => Form::Binary(native),
            _ => Form::Text,
        };
        let columns = (0..mapping.places.len()).map(form).collect();
        let binary = natives.map(|natives| natives.len() as u16);
        let mut out = Vec::with_capacity(PIECE_BYTES + PIECE_ROOM);
        out.extend_from_slice(if binary.is_some() { BINARY_HEAD } else { b"" });
        Lines { columns, binary, pieces: Vec::new(), out, rows: 0 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// True if they are in binary.
    pub fn is_binary(&self) -> bool {
        self.binary.is_some()
    }

    /// The rows' data.
    pub fn into_pieces(mut self) -> Vec<Vec<u8>> {
        if self.is_binary() {
            self.out.extend_from_slice(&BINARY_END);
        }
        self.pieces.push(self.out);
        self.pieces
    }

    /// Adds a row. On an error the lines are of no more use.
    pub fn push<'a>(&mut self, row: impl Iterator<Item = Value<'a>>) -> Result<(), NoValue> {
        if let Some(count) = self.binary {
            self.out.extend_from_slice(&count.to_be_bytes());
        }
        let mut first = true;
        for (column, (value, form)) in row.zip(&self.columns).enumerate() {
            if !matches!(form, Form::Left) {
                push(&mut self.out, *form, value, std::mem::take(&mut first))
                    .ok_or(NoValue(column))?;
            }
        }
        if !self.is_binary() {
            self.out.push(b'\n');
        }
        if self.out.len() >= PIECE_BYTES {
            let next = Vec::with_capacity(PIECE_BYTES + PIECE_ROOM);
            self.pieces.push(std::mem::replace(&mut self.out, next));
        }
        self.rows += 1;
        Ok(())
    }
}

/// Appends one value; `None` if it has no such form.
fn push(out: &mut Vec<u8>, form: Form, value: Value<'_>, first: bool) -> Option<()> {
    match (form, value) {
        (Form::Binary(native), Value::Text(text)) => native.encode(text, out),
        (Form::Binary(_), Value::Null) => {
            out.extend_from_slice(&(-1_i32).to_be_bytes());
            Some(())
        }
        (_, Value::Text(text)) => {
            out.extend_from_slice(if first { b"" } else { b"\t" });
            escape(text, out);
            Some(())
        }
        (_, Value::Null) => {
            out.extend_from_slice(if first { b"\\N" } else { b"\t\\N" });
            Some(())
        }
        (_, Value::Unchanged | Value::Binary(_)) => None,
    }
}

fn escape(text: &[u8], out: &mut Vec<u8>) {
    let mut left = text;
    while let Some(at) = left.iter().position(|b| matches!(b, b'\\' | b'\t' | b'\n' | b'\r')) {
        let (plain, rest) = left.split_at(at);
        out.extend_from_slice(plain);
        let Some((special, rest)) = rest.split_first() else { break };
        out.extend_from_slice(match special {
            b'\t' => b"\\t",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            _ => b"\\\\",
        });
        left = rest;
    }
    out.extend_from_slice(left);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the manual says that a server reads a field.
    fn unescape(text: &[u8]) -> Vec<u8> {
        let (mut out, mut bytes) = (Vec::new(), text.iter().copied());
        while let Some(byte) = bytes.next() {
            assert!(!matches!(byte, b'\t' | b'\n' | b'\r'), "a bare delimiter");
            out.push(match byte {
                b'\\' => match bytes.next().unwrap() {
                    b't' => b'\t',
                    b'n' => b'\n',
                    b'r' => b'\r',
                    other => other,
                },
                plain => plain,
            });
        }
        out
    }

    proptest! {
        #[test]
        fn any_text_is_read_as_it_was(text in prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(b"\\\t\n\r.N".to_vec())], 0..40,
        )) {
            let mut out = Vec::new();
            escape(&text, &mut out);
            prop_assert_eq!(unescape(&out), text);
        }
    }
}
