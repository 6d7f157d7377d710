//! A row's columns in one contiguous piece of memory.
//!
//! The layout is pgoutput's own TupleData, so that a row is a slice of the message it came in, and
//! what a spool or Kafka carries: a big-endian u16 column count, then for each column one kind byte
//! (`n` null, `u` unchanged TOAST, `t` text, `b` binary), and for `t` and `b` a big-endian u32
//! length and that many bytes. One allocation (or none) a row, none a column.
//!
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>

use bytes::{BufMut, Bytes, BytesMut};

/// One column of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value<'a> {
    /// SQL NULL.
    Null,
    /// A TOASTed value that the statement did not change, and that the WAL therefore lacks. It
    /// must never be written: not as NULL, not as text (pgcopydb#710).
    Unchanged,
    /// The type's output text in the stream's client encoding.
    Text(&'a [u8]),
    /// The type's send format.
    Binary(&'a [u8]),
}

impl<'a> Value<'a> {
    /// The bytes of a text or binary value, `None` for NULL and unchanged.
    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Value::Text(bytes) | Value::Binary(bytes) => Some(bytes),
            Value::Null | Value::Unchanged => None,
        }
    }
}

/// The bytes are not a row.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum RowError {
    /// The bytes end before the row does.
    #[error("row data ends inside a column")]
    Truncated,
    /// A kind byte that no version of PostgreSQL sends.
    #[error("unknown column kind {0:#04x} in row data")]
    UnknownKind(u8),
}

/// A row whose layout has been checked once, so that reading it cannot fail.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    bytes: Bytes,
}

impl Row {
    /// Takes one row off the front of `bytes` without copying.
    pub fn split_from(bytes: &mut Bytes) -> Result<Row, RowError> {
        let len = measure(bytes)?;
        Ok(Row { bytes: bytes.split_to(len) })
    }

    /// The row in the layout above, as a spool keeps it.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.bytes.first_chunk::<2>().map_or(0, |c| usize::from(u16::from_be_bytes(*c)))
    }

    /// True for a row of a table without columns.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The columns in order.
    pub fn values(&self) -> Values<'_> {
        Values { left: self.bytes.get(2..).unwrap_or_default() }
    }

    /// True if some column is an unchanged TOAST value.
    pub fn has_unchanged(&self) -> bool {
        self.values().any(|v| v == Value::Unchanged)
    }
}

/// Iterator over a row's columns.
#[derive(Clone, Debug)]
pub struct Values<'a> {
    left: &'a [u8],
}

impl<'a> Iterator for Values<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        let (kind, rest) = self.left.split_first()?;
        if *kind == b'n' || *kind == b'u' {
            self.left = rest;
            return Some(if *kind == b'n' { Value::Null } else { Value::Unchanged });
        }
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        self.left = rest;
        Some(if *kind == b'b' { Value::Binary(value) } else { Value::Text(value) })
    }
}

fn measure(bytes: &[u8]) -> Result<usize, RowError> {
    let (count, mut left) = bytes.split_first_chunk::<2>().ok_or(RowError::Truncated)?;
    for _ in 0..u16::from_be_bytes(*count) {
        let (kind, rest) = left.split_first().ok_or(RowError::Truncated)?;
        left = match kind {
            b'n' | b'u' => rest,
            b't' | b'b' => {
                let (len, rest) = rest.split_first_chunk::<4>().ok_or(RowError::Truncated)?;
                rest.get(u32::from_be_bytes(*len) as usize..).ok_or(RowError::Truncated)?
            }
            other => return Err(RowError::UnknownKind(*other)),
        };
    }
    Ok(bytes.len() - left.len())
}

/// Makes [`Row`]s column by column, for decoders whose messages are not in this layout. One builder
/// serves any number of rows.
#[derive(Debug)]
pub struct RowBuilder {
    bytes: BytesMut,
    columns: u16,
}

/// A row of up to so many bytes is copied into memory of just its size; a larger one takes the
/// builder's memory with it, so that no builder keeps what one huge value needed.
const COPIED_BYTES: usize = 16 << 10;

impl Default for RowBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl RowBuilder {
    /// An empty row.
    pub fn new() -> Self {
        let mut builder = RowBuilder { bytes: BytesMut::with_capacity(64), columns: 0 };
        builder.clear();
        builder
    }

    /// An empty row again.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.put_u16(0);
        self.columns = 0;
    }

    /// Appends one column. Values longer than `u32::MAX` cannot occur: PostgreSQL stops at 1 GiB.
    pub fn push(&mut self, value: Value<'_>) {
        self.columns = self.columns.saturating_add(1);
        let (kind, data) = match value {
            Value::Null => (b'n', None),
            Value::Unchanged => (b'u', None),
            Value::Text(data) => (b't', Some(data)),
            Value::Binary(data) => (b'b', Some(data)),
        };
        self.bytes.put_u8(kind);
        if let Some(data) = data {
            self.bytes.put_u32(data.len() as u32);
            self.bytes.put_slice(data);
        }
    }

    /// Appends one text column that `write` writes in pieces.
    pub fn push_text_with<T>(&mut self, write: impl FnOnce(&mut BytesMut) -> T) -> T {
        self.columns = self.columns.saturating_add(1);
        self.bytes.put_u8(b't');
        let at = self.bytes.len();
        self.bytes.put_u32(0);
        let written = write(&mut self.bytes);
        let len = (self.bytes.len().saturating_sub(at + 4)) as u32;
        if let Some(place) = self.bytes.get_mut(at..).and_then(|b| b.first_chunk_mut::<4>()) {
            *place = len.to_be_bytes();
        }
        written
    }

    /// The columns so far.
    pub fn values(&self) -> Values<'_> {
        Values { left: self.bytes.get(2..).unwrap_or_default() }
    }

    /// The finished row; the builder is empty again.
    pub fn take(&mut self) -> Row {
        if let Some(count) = self.bytes.first_chunk_mut::<2>() {
            *count = self.columns.to_be_bytes();
        }
        let bytes = if self.bytes.len() <= COPIED_BYTES {
            Bytes::copy_from_slice(&self.bytes)
        } else {
            self.bytes.split().freeze()
        };
        self.clear();
        Row { bytes }
    }

    /// The finished row.
    pub fn finish(mut self) -> Row {
        self.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_row_gives_back_what_was_put_in() {
        let values = [
            Value::Null,
            Value::Text(b""),
            Value::Unchanged,
            Value::Text(b"x"),
            Value::Binary(b"\0"),
        ];
        let mut builder = RowBuilder::new();
        values.iter().for_each(|v| builder.push(*v));
        let row = builder.finish();
        assert_eq!(row.len(), 5);
        assert!(row.has_unchanged());
        assert_eq!(row.values().collect::<Vec<_>>(), values);
        let mut bytes = row.as_bytes().clone();
        assert_eq!(Row::split_from(&mut bytes).unwrap(), row);
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_builder_serves_many_rows_and_keeps_no_huge_one() {
        let mut builder = RowBuilder::new();
        for len in [0, 10, COPIED_BYTES * 3, 5] {
            builder.push(Value::Null);
            builder.push_text_with(|bytes| bytes.put_bytes(b'x', len));
            assert_eq!(builder.values().count(), 2);
            let row = builder.take();
            let text = vec![b'x'; len];
            assert_eq!(row.values().collect::<Vec<_>>(), [Value::Null, Value::Text(&text)]);
            assert!(builder.bytes.capacity() < COPIED_BYTES * 2, "{}", builder.bytes.capacity());
        }
        assert!(builder.take().is_empty());
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let mut builder = RowBuilder::new();
        builder.push(Value::Text(b"hello"));
        builder.push(Value::Null);
        let whole = builder.finish().as_bytes().clone();
        for len in 0..whole.len() {
            let mut cut = whole.slice(..len);
            assert_eq!(Row::split_from(&mut cut), Err(RowError::Truncated), "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_row_or_an_error(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = Bytes::from(data);
            if let Ok(row) = Row::split_from(&mut bytes) {
                prop_assert_eq!(row.values().count(), row.len());
            }
        }
    }
}
