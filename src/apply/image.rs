//! A row as it is after several changes, put together of what they carried. Pure.
//!
//! An update leaves out values of TOAST that it did not change, and they may be large: so they stay
//! where they came, and a row is looked at through the changes that made it.

use crate::change::row::Values;
use crate::change::{Row, Value};

/// A row as it was sent, its unchanged values being those of rows before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image<'a> {
    newest: &'a Row,
    /// Oldest first. Each has a value that none behind it has; so there are never more of them than
    /// columns.
    before: Vec<&'a Row>,
}

impl<'a> Image<'a> {
    /// Of one change.
    pub fn of(row: &'a Row) -> Image<'a> {
        Image { newest: row, before: Vec::new() }
    }

    /// What it is after the next change.
    pub fn then(mut self, new: &'a Row) -> Image<'a> {
        if !new.has_unchanged() {
            return Image::of(new);
        }
        self.before.push(self.newest);
        self.newest = new;
        self.forget_hidden();
        self
    }

    /// The same over what the row was before all of it.
    pub fn over(mut self, old: &'a Row) -> Image<'a> {
        self.before.insert(0, old);
        self.forget_hidden();
        self
    }

    /// Drops rows of which no value is seen.
    fn forget_hidden(&mut self) {
        let mut open: Vec<bool> = self.newest.values().map(|v| v == Value::Unchanged).collect();
        let mut is_seen = |row: &&'a Row| {
            let mut seen = false;
            for (open, value) in open.iter_mut().zip(row.values()) {
                if *open && value != Value::Unchanged {
                    (*open, seen) = (false, true);
                }
            }
            seen
        };
        self.before.reverse();
        self.before.retain(|row| is_seen(row));
        self.before.reverse();
    }

    /// The columns in order, as they are now.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut before: Vec<Values<'a>> = self.before.iter().map(|row| row.values()).collect();
        self.newest.values().map(move |value| {
            before
                .iter_mut()
                .filter_map(Iterator::next)
                .fold(None, latest)
                .filter(|_| value == Value::Unchanged)
                .unwrap_or(value)
        })
    }

    /// True if some value is in none of the changes.
    pub fn has_unchanged(&self) -> bool {
        self.values().any(|value| value == Value::Unchanged)
    }
}

/// Of values of one column, oldest first, the last one known.
fn latest<'a>(known: Option<Value<'a>>, value: Value<'a>) -> Option<Value<'a>> {
    if value == Value::Unchanged { known } else { Some(value) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::change::RowBuilder;

    fn row(values: &[Option<u8>]) -> Row {
        let mut builder = RowBuilder::new();
        for value in values {
            match value {
                Some(0) => builder.push(Value::Null),
                Some(value) => builder.push(Value::Text(&[*value])),
                None => builder.push(Value::Unchanged),
            }
        }
        builder.finish()
    }

    proptest! {
        #[test]
        fn a_row_seen_through_its_changes_is_the_one_that_they_leave(
            old in proptest::option::of(proptest::array::uniform4(0..9u8)),
            changes in proptest::collection::vec(
                proptest::array::uniform4(proptest::option::of(0..9u8)), 1..9),
        ) {
            let mut model = [None; 4];
            for change in old.iter().map(|old| old.map(Some)).chain(changes.iter().copied()) {
                model.iter_mut().zip(change).for_each(|(known, new)| *known = new.or(*known));
            }
            let rows: Vec<Row> = changes.iter().map(|change| row(change)).collect();
            let mut image = Image::of(&rows[0]);
            for row in &rows[1..] {
                image = image.then(row);
                prop_assert!(image.before.len() <= 4);
            }
            let old = old.map(|old| row(&old.map(Some)));
            if let Some(old) = &old {
                image = image.over(old);
            }
            prop_assert!(image.values().eq(row(&model).values()));
            prop_assert_eq!(image.has_unchanged(), model.contains(&None));
            prop_assert!(image.before.len() <= 4);
        }
    }
}
