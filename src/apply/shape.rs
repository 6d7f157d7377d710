//! From one change to the statement that writes it: which columns are set, and how the row is
//! found. Pure.

use super::statement::{Bind, IdentityChange, Locator, Mapping, Source, Statement};
use crate::change::{Change, OldRow, Relation, ReplicaIdentity, Row, Value};

/// A row change laid out for writing.
#[derive(Debug)]
pub(super) struct Shape<'a> {
    /// What makes its statement differ from others of the same table.
    pub key: Vec<u8>,
    kind: Kind,
    source: Source,
    set: Vec<usize>,
    old: Vec<Value<'a>>,
    new: Vec<Value<'a>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Insert,
    Update,
    Replace(usize, IdentityChange),
    Delete,
}

/// Why a change cannot be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It does not say which row it means.
    NotIdentified,
    /// It breaks a promise of the decoder.
    Broken(String),
}

impl<'a> Shape<'a> {
    /// Lays out an INSERT, UPDATE or DELETE; `None` for what is no row change.
    pub fn new(
        relation: &Relation,
        mapping: &Mapping,
        change: &'a Change,
    ) -> Result<Option<Shape<'a>>, Unfit> {
        let shape = match change {
            Change::Insert { new, .. } => {
                Shape::of(Kind::Insert, Source::New, Vec::new(), values(relation, new)?)
            }
            Change::Delete { old, .. } => {
                let source = source(relation, mapping, Some(old))?;
                Shape::of(Kind::Delete, source, values(relation, old.row())?, Vec::new())
            }
            Change::Update { old, new, .. } => {
                let source = source(relation, mapping, old.as_ref())?;
                let old_values = match old {
                    Some(old) => values(relation, old.row())?,
                    None => Vec::new(),
                };
                let mut shape = Shape::of(Kind::Update, source, old_values, values(relation, new)?);
                shape.plan_update(mapping, matches!(old, Some(OldRow::Full(_))));
                shape
            }
            Change::Truncate { .. } | Change::Message { .. } => return Ok(None),
        };
        Ok(Some(shape.keyed(mapping)))
    }

    fn of(kind: Kind, source: Source, old: Vec<Value<'a>>, new: Vec<Value<'a>>) -> Self {
        Shape { key: Vec::new(), kind, source, set: Vec::new(), old, new }
    }

    /// Decides which columns are set: not what TOAST left unchanged (pgcopydb#710), not what the
    /// target computes, not the key that the row is found by, not a GENERATED ALWAYS identity
    /// (pgcopydb#976).
    fn plan_update(&mut self, mapping: &Mapping, old_is_full: bool) {
        let is_key = |column: &usize| match &mapping.locator {
            Locator::Key(columns) => columns.contains(column),
            Locator::Whole | Locator::None => false,
        };
        let identity = mapping.identity_always();
        self.set = (0..self.new.len())
            .filter(|c| mapping.is_written(*c) && Some(*c) != identity)
            .filter(|c| self.new.get(*c) != Some(&Value::Unchanged))
            .filter(|c| self.source == Source::Old || !is_key(c))
            .collect();
        let Some(identity) = identity else { return };
        let known = old_is_full || is_key(&identity);
        let change = match self.source {
            Source::New if is_key(&identity) => IdentityChange::Same,
            Source::Old if known && self.old.get(identity) == self.new.get(identity) => {
                IdentityChange::Same
            }
            Source::Old if known => IdentityChange::Changed,
            _ => IdentityChange::Unknown,
        };
        if change != IdentityChange::Same {
            self.kind = Kind::Replace(identity, change);
        }
    }

    fn keyed(mut self, mapping: &Mapping) -> Self {
        let mut key = vec![
            match self.kind {
                Kind::Insert => b'i',
                Kind::Delete => b'd',
                Kind::Update => b'u',
                Kind::Replace(_, IdentityChange::Unknown) => b'r',
                Kind::Replace(..) => b'R',
            },
            u8::from(self.source == Source::Old),
        ];
        if self.kind != Kind::Insert {
            let from = key.len();
            let whole = mapping.locator == Locator::Whole;
            key.extend((0..mapping.places.len()).map(|c| u8::from(whole && self.is_null(c)) << 1));
            for column in &self.set {
                if let Some(bits) = key.get_mut(from + column) {
                    *bits |= 1;
                }
            }
        }
        self.key = key;
        self
    }

    fn is_null(&self, column: usize) -> bool {
        let row = if self.source == Source::Old { &self.old } else { &self.new };
        row.get(column) == Some(&Value::Null)
    }

    /// The statement for all changes with this key.
    pub fn statement(&self, mapping: &Mapping) -> Statement {
        let is_null = |column| self.is_null(column);
        match self.kind {
            Kind::Insert => mapping.insert(),
            Kind::Delete => mapping.delete(&is_null, self.source),
            Kind::Update => mapping.update(&self.set, &is_null, self.source),
            Kind::Replace(identity, change) => {
                mapping.replace(&self.set, identity, change, &is_null, self.source)
            }
        }
    }

    /// The parameters of that statement. Errors if a value is needed that the stream does not have.
    pub fn params(
        &self,
        relation: &Relation,
        binds: &[Bind],
    ) -> Result<Vec<Option<&'a [u8]>>, Unfit> {
        binds
            .iter()
            .map(|bind| {
                let (value, column) = match bind {
                    Bind::New(column) => (self.new.get(*column), *column),
                    Bind::Old(column) => (self.old.get(*column), *column),
                };
                match value {
                    Some(Value::Null) => Ok(None),
                    Some(Value::Text(text)) => Ok(Some(*text)),
                    Some(Value::Unchanged) | None => Err(broken(relation, column, "is missing")),
                    Some(Value::Binary(_)) => Err(broken(relation, column, "is binary")),
                }
            })
            .collect()
    }
}

fn broken(relation: &Relation, column: usize, what: &str) -> Unfit {
    let name = relation.columns.get(column).map_or("?", |c| c.name.as_str());
    Unfit::Broken(format!("column {name} of {} {what} in the stream", relation.name))
}

fn values<'a>(relation: &Relation, row: &'a Row) -> Result<Vec<Value<'a>>, Unfit> {
    if row.len() == relation.columns.len() {
        return Ok(row.values().collect());
    }
    Err(Unfit::Broken(format!(
        "a row of {} has {} columns where the stream described {}",
        relation.name,
        row.len(),
        relation.columns.len()
    )))
}

/// Which row identifies the target's. Without an old row the key is unchanged and stands in the new
/// one; but under FULL an old row is always due, and only a full one will do.
fn source(relation: &Relation, mapping: &Mapping, old: Option<&OldRow>) -> Result<Source, Unfit> {
    let full = relation.identity == ReplicaIdentity::Full;
    match (&mapping.locator, old) {
        (Locator::None, _) => Err(Unfit::NotIdentified),
        (_, Some(OldRow::Full(_))) => Ok(Source::Old),
        (Locator::Key(_), Some(OldRow::Key(_))) if !full => Ok(Source::Old),
        (Locator::Key(_), None) if !full => Ok(Source::New),
        _ => Err(Unfit::NotIdentified),
    }
}

/// `(id)=(5)`: the columns by which people find the row. No other value is shown.
pub(super) fn describe_key(relation: &Relation, mapping: &Mapping, change: &Change) -> String {
    let row = match change {
        Change::Insert { new, .. } => new,
        Change::Update { old: Some(old), .. } | Change::Delete { old, .. } => old.row(),
        Change::Update { old: None, new, .. } => new,
        Change::Truncate { .. } | Change::Message { .. } => return "(all rows)".to_string(),
    };
    let columns = match &mapping.locator {
        Locator::Key(columns) => columns.clone(),
        Locator::Whole | Locator::None => {
            let place = |name: &String| relation.columns.iter().position(|c| c.name == *name);
            mapping.table.key.iter().filter_map(place).collect()
        }
    };
    if columns.is_empty() {
        return "(none: the table has no key)".to_string();
    }
    let values: Vec<Value<'_>> = row.values().collect();
    let (mut names, mut texts) = (Vec::new(), Vec::new());
    for column in columns {
        names.push(relation.columns.get(column).map_or("?", |c| c.name.as_str()));
        texts.push(match values.get(column).and_then(|v| v.bytes()) {
            Some(bytes) => String::from_utf8_lossy(bytes).chars().take(200).collect(),
            None => "null".to_string(),
        });
    }
    format!("({})=({})", names.join(", "), texts.join(", "))
}
