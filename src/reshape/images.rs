//! Rows that something has to be computed of, all of one table and kind in one SELECT.

use std::collections::HashMap;
use std::sync::Arc;

use super::outline::{Kind, Outline};
use super::{Error, Result};
use crate::change::Value;
use crate::fault::{Fault, Faulty};
use crate::pg::{self, Pipeline, Reply, Session};

/// `int4[]` and `text[]`.
const INT4_ARRAY: u32 = 1007;
const TEXT_ARRAY: u32 = 1009;

/// Rows of the items at hand.
#[derive(Default)]
pub(super) struct Images {
    groups: Vec<Group>,
    /// By the outline's address.
    index: HashMap<(usize, Kind), usize>,
}

struct Group {
    outline: Arc<Outline>,
    kind: Kind,
    rows: usize,
    /// One array literal for each input, still open.
    arrays: Vec<Vec<u8>>,
}

/// A row that was asked about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    group: usize,
    row: usize,
    kind: Kind,
}

/// What was computed.
pub(super) struct Answers(pub(super) Vec<Vec<pg::Row>>);

impl Images {
    /// Asks for what has to be computed of a row; `None` if nothing has to. Values that the stream
    /// does not carry are given as NULL: what depends on them must not be used.
    pub fn add(
        &mut self,
        outline: &Arc<Outline>,
        kind: Kind,
        values: &[Value<'_>],
    ) -> Result<Option<Image>> {
        let query = outline.asks(kind);
        if query.is_empty() {
            return Ok(None);
        }
        let next = self.groups.len();
        let group = *self.index.entry((Arc::as_ptr(outline).addr(), kind)).or_insert(next);
        if group == next {
            let arrays = query.inputs.iter().map(|_| vec![b'{']).collect();
            self.groups.push(Group { outline: outline.clone(), kind, rows: 0, arrays });
        }
        let Some(of) = self.groups.get_mut(group) else {
            return Err(Error::Broken("a group of rows is lost".to_string()));
        };
        for (place, array) in query.inputs.iter().zip(&mut of.arrays) {
            if of.rows > 0 {
                array.push(b',');
            }
            match values.get(*place) {
                Some(Value::Text(text)) => push_element(array, text),
                Some(Value::Null | Value::Unchanged) => array.extend_from_slice(b"NULL"),
                Some(Value::Binary(_)) | None => {
                    return Err(Error::Broken(format!(
                        "column {place} of {} is not text in the stream",
                        outline.from.name
                    )));
                }
            }
        }
        let row = of.rows;
        of.rows += 1;
        Ok(Some(Image { group, row, kind }))
    }

    /// Has all computed, in one round trip.
    pub async fn compute(mut self, session: &mut Session) -> Result<Answers> {
        let mut pipeline = Pipeline::new();
        for group in &mut self.groups {
            let query = group.outline.asks(group.kind);
            let mut types = vec![INT4_ARRAY];
            types.resize(1 + group.arrays.len(), TEXT_ARRAY);
            pipeline.parse("", &query.sql, &types);
            let numbers: Vec<String> = (0..group.rows).map(|n| n.to_string()).collect();
            let numbers = format!("{{{}}}", numbers.join(","));
            group.arrays.iter_mut().for_each(|array| array.push(b'}'));
            let arrays = group.arrays.iter().map(Vec::as_slice);
            pipeline.run("", std::iter::once(numbers.as_bytes()).chain(arrays).map(Some));
        }
        let mut answers: Vec<Vec<pg::Row>> = vec![Vec::new()];
        if !pipeline.is_empty() {
            let outcome = session.exchange(pipeline, |reply| match reply {
                Reply::Row(row) => answers.last_mut().into_iter().for_each(|a| a.push(row.clone())),
                Reply::Done(_) => answers.push(Vec::new()),
            });
            if let Err(error) = outcome.await {
                return Err(self.refused(answers.len() - 1, error));
            }
        }
        for (group, answers) in self.groups.iter().zip(&answers) {
            if group.rows != answers.len() {
                let (asked, came) = (group.rows, answers.len());
                let table = &group.outline.from.name;
                return Err(Error::Broken(format!("{came} answers for {asked} rows of {table}")));
            }
        }
        Ok(Answers(answers))
    }

    fn refused(&self, at: usize, error: pg::Error) -> Error {
        match self.groups.get(at) {
            Some(group) if error.fault() == Fault::Stop && error.code().is_some() => {
                Error::Refused { table: group.outline.from.name.clone(), error: Box::new(error) }
            }
            _ => Error::Pg(error),
        }
    }
}

impl Answers {
    /// True if the row goes along; without a filter every row does.
    pub fn passes(&self, outline: &Outline, image: Option<Image>) -> Result<bool> {
        if outline.filter.is_none() {
            return Ok(true);
        }
        let row = image.and_then(|image| self.0.get(image.group)?.get(image.row));
        match row {
            Some(row) => Ok(row.bool(0)?),
            None => Err(Error::Broken(format!("no answer for a row of {}", outline.from.name))),
        }
    }

    /// A computed value.
    pub fn value(
        &self,
        outline: &Outline,
        image: Option<Image>,
        output: usize,
    ) -> Result<Value<'_>> {
        let found = image.and_then(|image| {
            let place = outline.asks(image.kind).place(output)?;
            Some((self.0.get(image.group)?.get(image.row)?, place))
        });
        match found {
            Some((row, place)) => {
                Ok(row.bytes(place).map_or(Value::Null, |bytes| Value::Text(bytes)))
            }
            None => Err(Error::Broken(format!("no answer for a row of {}", outline.from.name))),
        }
    }
}

/// A text as an element of an array literal.
pub(super) fn element(text: &[u8]) -> String {
    let mut element = Vec::with_capacity(text.len() + 2);
    push_element(&mut element, text);
    String::from_utf8_lossy(&element).into_owned()
}

fn push_element(array: &mut Vec<u8>, text: &[u8]) {
    array.push(b'"');
    for byte in text {
        if matches!(byte, b'"' | b'\\') {
            array.push(b'\\');
        }
        array.push(*byte);
    }
    array.push(b'"');
}
