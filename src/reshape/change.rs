//! One change of a mapped table, on its way from one row's shape to the other's.

use std::sync::Arc;

use super::images::{Answers, Image, Images};
use super::outline::{Kind, Outline};
use super::{Error, Result};
use crate::change::{Change, OldRow, Relation, Row, RowBuilder, Value};

/// A change that is finished, or waits for what is computed.
pub(super) enum Reshaped {
    Done(Change),
    Waiting(Box<Waiting>),
}

/// A change whose rows were asked about.
pub(super) struct Waiting {
    outline: Arc<Outline>,
    /// The row afterwards, with all that the row before knows of it.
    new: Option<(Row, Option<Image>)>,
    old: Option<(OldRow, Option<Image>)>,
    /// It is an UPDATE.
    updates: bool,
}

/// Asks for what has to be computed of a change's rows.
pub(super) fn reshape(
    outline: &Arc<Outline>,
    change: &Change,
    images: &mut Images,
) -> Result<Reshaped> {
    let (old, new, updates) = match change {
        Change::Insert { new, .. } => (None, Some(new), false),
        Change::Update { old, new, .. } => (old.as_ref(), Some(new), true),
        Change::Delete { old, .. } => (Some(old), None, false),
        Change::Truncate { .. } | Change::Message { .. } => {
            return Ok(Reshaped::Done(change.clone()));
        }
    };
    let removes = updates || new.is_none();
    if removes && outline.chooses() && !outline.sees_old() {
        return Err(blind(outline, "the columns of the row before by which rows are chosen"));
    }
    let new = match (new, old) {
        (Some(new), Some(old)) => Some(filled(outline, new, old)?),
        (Some(new), None) => Some(checked(outline, new)?.clone()),
        (None, _) => None,
    };
    let old = match old {
        Some(old) => {
            checked(outline, old.row())?;
            let image = images.add(outline, kind(old), &values(old.row()))?;
            Some((old.clone(), image))
        }
        None => None,
    };
    let new = match new {
        Some(row) => {
            let values = values(&row);
            if lacks(&outline.chooses_by(), &values) != Lacks::Nothing {
                return Err(blind(outline, "a TOASTed value by which rows are chosen"));
            }
            let image = images.add(outline, Kind::Whole, &values)?;
            Some((row, image))
        }
        None => None,
    };
    let waiting = Waiting { outline: outline.clone(), new, old, updates };
    Ok(Reshaped::Waiting(Box::new(waiting)))
}

impl Reshaped {
    /// The change as the target gets it.
    pub fn finish(self, answers: &Answers) -> Result<Change> {
        match self {
            Reshaped::Done(change) => Ok(change),
            Reshaped::Waiting(waiting) => waiting.finish(answers),
        }
    }
}

impl Waiting {
    fn finish(self, answers: &Answers) -> Result<Change> {
        let outline = &self.outline;
        let passes = |row: &Row, image: Option<Image>| -> Result<bool> {
            Ok(outline.has(&values(row))? && answers.passes(outline, image)?)
        };
        let is_in = self.new.as_ref().map(|(row, image)| passes(row, *image)).transpose()?;
        let was_in = match &self.old {
            Some((old, image)) => Some(passes(old.row(), *image)?),
            // The key is as it was, and rows are chosen by nothing else.
            None => is_in.filter(|_| self.updates),
        };
        let relation = outline.to.clone();
        let change = match (was_in, is_in) {
            (Some(true), Some(true)) => {
                Change::Update { relation, old: self.before(answers)?, new: self.after(answers)? }
            }
            (None, Some(true)) => {
                let new = self.after(answers)?;
                // A publication with a filter makes an INSERT of an UPDATE that lets a row in.
                if new.has_unchanged() {
                    return Err(blind(outline, "a TOASTed value of a row that the filter lets in"));
                }
                Change::Insert { relation, new }
            }
            (Some(false), Some(true)) => {
                let new = self.after(answers)?;
                if new.has_unchanged() {
                    return Err(blind(outline, "a TOASTed value of a row that the filter lets in"));
                }
                Change::Insert { relation, new }
            }
            (Some(true), None | Some(false)) => match self.before(answers)? {
                Some(old) => Change::Delete { relation, old },
                None => return Err(Error::Broken("a row left without one before".to_string())),
            },
            _ => left_out(&outline.left_out),
        };
        Ok(change)
    }

    fn after(&self, answers: &Answers) -> Result<Row> {
        match &self.new {
            Some((row, image)) => {
                written(&self.outline, Kind::Whole, &values(row), *image, answers)
            }
            None => Err(Error::Broken("a change without a row".to_string())),
        }
    }

    fn before(&self, answers: &Answers) -> Result<Option<OldRow>> {
        let Some((old, image)) = &self.old else { return Ok(None) };
        let row = written(&self.outline, kind(old), &values(old.row()), *image, answers)?;
        Ok(Some(match old {
            OldRow::Key(_) => OldRow::Key(row),
            OldRow::Full(_) => OldRow::Full(row),
        }))
    }
}

fn kind(old: &OldRow) -> Kind {
    match old {
        OldRow::Key(_) => Kind::Key,
        OldRow::Full(_) => Kind::Whole,
    }
}

/// A change that only counts.
fn left_out(relation: &Arc<Relation>) -> Change {
    Change::Insert { relation: relation.clone(), new: RowBuilder::new().finish() }
}

/// A row with the target's columns.
fn written(
    outline: &Outline,
    kind: Kind,
    values: &[Value<'_>],
    image: Option<Image>,
    answers: &Answers,
) -> Result<Row> {
    let mut builder = RowBuilder::new();
    for (place, output) in &outline.kept {
        let is_key = outline.from.columns.get(*place).is_some_and(|column| column.key);
        if kind == Kind::Key && !is_key {
            builder.push(Value::Null);
            continue;
        }
        let Some((at, output)) = output.and_then(|at| Some((at, outline.outputs.get(at)?))) else {
            builder.push(values.get(*place).copied().unwrap_or(Value::Null));
            continue;
        };
        match lacks(&output.depends, values) {
            Lacks::Nothing => builder.push(answers.value(outline, image, at)?),
            Lacks::All => builder.push(Value::Unchanged),
            Lacks::Some => {
                return Err(blind(outline, "a TOASTed value that a mask of other columns needs"));
            }
        }
    }
    Ok(builder.finish())
}

/// How much of what an expression speaks of the stream does not carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Nothing,
    Some,
    All,
}

fn lacks(depends: &[usize], values: &[Value<'_>]) -> Lacks {
    let lacking = |place: &&usize| values.get(**place) == Some(&Value::Unchanged);
    match depends.iter().filter(lacking).count() {
        0 => Lacks::Nothing,
        some if some == depends.len() => Lacks::All,
        _ => Lacks::Some,
    }
}

fn values(row: &Row) -> Vec<Value<'_>> {
    row.values().collect()
}

fn checked<'a>(outline: &Outline, row: &'a Row) -> Result<&'a Row> {
    let (due, came) = (outline.from.columns.len(), row.len());
    if due == came {
        return Ok(row);
    }
    let table = &outline.from.name;
    Err(Error::Broken(format!("a row of {table} has {came} columns where {due} were described")))
}

/// The row after an UPDATE, with what it lacks taken from the row before where that has it.
fn filled(outline: &Outline, new: &Row, old: &OldRow) -> Result<Row> {
    checked(outline, new)?;
    if !new.has_unchanged() {
        return Ok(new.clone());
    }
    let full = matches!(old, OldRow::Full(_));
    let mut builder = RowBuilder::new();
    let before = values(checked(outline, old.row())?);
    for ((place, value), before) in new.values().enumerate().zip(before) {
        let is_key = outline.from.columns.get(place).is_some_and(|column| column.key);
        let known = value == Value::Unchanged && (full || is_key);
        builder.push(if known { before } else { value });
    }
    Ok(builder.finish())
}

fn blind(outline: &Outline, what: &str) -> Error {
    Error::Blind { table: outline.from.name.clone(), what: what.to_string() }
}

#[cfg(test)]
mod tests;
