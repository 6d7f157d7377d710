//! A result row, every column as text.

use bytes::Bytes;

use super::{Error, Result};
use crate::lsn::Lsn;

/// One row of a query's result. Columns are counted from 0.
#[derive(Clone, Debug)]
pub struct Row {
    columns: Vec<Option<Bytes>>,
}

impl Row {
    /// From raw columns.
    pub fn new(columns: Vec<Option<Bytes>>) -> Self {
        Row { columns }
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// True if the result has no columns.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// The column's bytes, `None` for NULL or a column that is not there.
    pub fn bytes(&self, index: usize) -> Option<&Bytes> {
        self.columns.get(index).and_then(Option::as_ref)
    }

    /// The column as text, `None` for NULL.
    pub fn opt(&self, index: usize) -> Result<Option<&str>> {
        match self.columns.get(index) {
            None => Err(Error::Result(format!("no column {index} in a row of {}", self.len()))),
            Some(None) => Ok(None),
            Some(Some(bytes)) => std::str::from_utf8(bytes)
                .map(Some)
                .map_err(|_| Error::Result(format!("column {index} is not UTF-8"))),
        }
    }

    /// The column as text; NULL is an error.
    pub fn str(&self, index: usize) -> Result<&str> {
        self.opt(index)?.ok_or_else(|| Error::Result(format!("column {index} is NULL")))
    }

    /// The column as an owned string; NULL is an error.
    pub fn string(&self, index: usize) -> Result<String> {
        self.str(index).map(str::to_string)
    }

    /// The column parsed from its text; NULL is an error.
    pub fn parse<T: std::str::FromStr>(&self, index: usize) -> Result<T> {
        let text = self.str(index)?;
        text.parse().map_err(|_| Error::Result(format!("column {index}: cannot read \"{text}\"")))
    }

    /// The column parsed from its text, `None` for NULL.
    pub fn parse_opt<T: std::str::FromStr>(&self, index: usize) -> Result<Option<T>> {
        if self.opt(index)?.is_none() { Ok(None) } else { self.parse(index).map(Some) }
    }

    /// A boolean column (`t` or `f`).
    pub fn bool(&self, index: usize) -> Result<bool> {
        Ok(self.str(index)? == "t")
    }

    /// A pg_lsn column.
    pub fn lsn(&self, index: usize) -> Result<Lsn> {
        self.parse(index)
    }
}
