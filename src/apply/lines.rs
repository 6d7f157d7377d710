//! Rows as the text of a COPY. Pure.
//!
//! The server's input functions get the same texts as by a parameter, one row after the other,
//! without arrays to build and take apart, and the rows go into the table by the page.
//!
//! <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2>

use super::encode::NoValue;
use super::statement::Mapping;
use crate::change::{Row, Value};

/// The rows of one COPY.
#[derive(Debug)]
pub(super) struct Lines {
    /// Whether each column of the relation is one of them.
    written: Vec<bool>,
    out: Vec<u8>,
    rows: usize,
}

impl Lines {
    /// No rows yet; every column that may be written is taken from each.
    pub fn new(mapping: &Mapping) -> Lines {
        let written = (0..mapping.places.len()).map(|c| mapping.is_written(c)).collect();
        Lines { written, out: Vec::new(), rows: 0 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows' text.
    pub fn text(&self) -> &[u8] {
        &self.out
    }

    /// Adds a row. On an error the lines are of no more use.
    pub fn push(&mut self, row: &Row) -> Result<(), NoValue> {
        let mut first = true;
        for (column, (value, written)) in row.values().zip(&self.written).enumerate() {
            if !written {
                continue;
            }
            if !std::mem::take(&mut first) {
                self.out.push(b'\t');
            }
            match value {
                Value::Text(text) => escape(text, &mut self.out),
                Value::Null => self.out.extend_from_slice(b"\\N"),
                Value::Unchanged | Value::Binary(_) => return Err(NoValue(column)),
            }
        }
        self.out.push(b'\n');
        self.rows += 1;
        Ok(())
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
