//! The net change of a batch: what becomes of each row, however often it was written. Pure.
//!
//! Changes of one table are folded by the key that finds their rows. What is left says at most one
//! thing of each key, so that it can be written as sets, in this order: rows that go, rows that
//! change, rows that come.
//!
//! Keys are told apart by their text. That is exact, as the source reads an old key from the very
//! row that it printed before. Two texts that the type holds equal (1.0 and 1.00) are two keys
//! here; as rows go before others come, what is written is right all the same.
//!
//! [`keyed`] and [`whole`] give `None` for what has no net change that the target would hold
//! equal to the row changes, or that contradicts itself (a row that comes twice). The caller then
//! writes this table's changes one by one, which also finds the culprit. Nothing is dropped that
//! has to meet a row: an update that sets nothing, or a row that goes and comes again, still does.

use std::borrow::Cow;
use std::collections::hash_map::Entry as Slot;

use foldhash::{HashMap, HashMapExt};

use super::image::Image;
use crate::change::{Change, OldRow, Row, RowBuilder, Value};

/// What becomes of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Net<'a> {
    /// It came and went.
    Nothing,
    /// A row comes.
    Insert(Image<'a>),
    /// Its row changes; what the image holds `Unchanged` stays.
    Update(Image<'a>),
    /// Its row goes.
    Delete,
    /// Its row goes and another comes.
    Replace(Image<'a>),
}

/// A key and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    /// A row with the key's columns; others may be NULL.
    pub key: &'a Row,
    /// The net change.
    pub net: Net<'a>,
}

/// What a table's rows are like, as far as folding needs to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    /// Number of columns of every row.
    pub width: usize,
    /// The columns that find a row, in ascending order.
    pub keys: &'a [usize],
    /// The stream has every column of the target's, so that a row may be made anew.
    pub complete: bool,
    /// A row may be changed by SET.
    pub settable: bool,
    /// Updates and deletes carry whole old rows (REPLICA IDENTITY FULL).
    pub full: bool,
}

impl Rules<'_> {
    /// Whether this is an old row that identifies.
    fn fits(&self, old: Option<&OldRow>) -> bool {
        !self.full || matches!(old, Some(OldRow::Full(_)))
    }
}

/// Folds the INSERTs, UPDATEs and DELETEs of one table by key, in the order of first mention.
pub(super) fn keyed<'a>(
    rules: &Rules<'_>,
    changes: impl Iterator<Item = &'a Change> + Clone,
) -> Option<Vec<Entry<'a>>> {
    let goes = |change: &'a Change| match change {
        Change::Delete { old, .. } if rules.fits(Some(old)) && old.row().len() == rules.width => {
            Some(Entry { key: old.row(), net: Net::Delete })
        }
        _ => None,
    };
    // Where nothing but rows that go, each goes once.
    if let Some(entries) = changes.clone().map(goes).collect() {
        return Some(entries);
    }
    let mut folder = Folder { rules, entries: Vec::new(), places: HashMap::new() };
    for change in changes {
        match change {
            Change::Insert { new, .. } => folder.insert(new, Image::of(new))?,
            Change::Delete { old, .. } if rules.fits(Some(old)) => folder.delete(old.row())?,
            Change::Update { old, new, .. } if rules.fits(old.as_ref()) => {
                folder.update(old.as_ref(), new)?;
            }
            _ => return None,
        }
    }
    let changes = |e: &Entry<'_>| matches!(e.net, Net::Update(_));
    if !rules.settable && folder.entries.iter().any(changes) {
        return None;
    }
    Some(folder.entries)
}

/// Puts rows that are there already in the order of their keys, so that the target finds one near
/// the one before; rows that come stay as they came, and behind. Texts are ordered by length first,
/// which is the order of numbers.
pub(super) fn sort(keys: &[usize], entries: &mut [Entry<'_>]) {
    entries.sort_by_cached_key(|entry| {
        let is_there = !matches!(entry.net, Net::Nothing | Net::Insert(_));
        let key = if is_there { key_of(entry.key, keys) } else { None };
        (!is_there, key.as_ref().map_or(0, |key| key.len()), key)
    });
}

struct Folder<'a, 'r> {
    rules: &'r Rules<'r>,
    entries: Vec<Entry<'a>>,
    places: HashMap<Cow<'a, [u8]>, usize>,
}

impl<'a> Folder<'a, '_> {
    /// The key's entry, made with `net` if there is none; true if it was made.
    fn entry(&mut self, row: &'a Row, net: Net<'a>) -> Option<(&mut Entry<'a>, bool)> {
        if row.len() != self.rules.width {
            return None;
        }
        let place = match self.places.entry(key_of(row, self.rules.keys)?) {
            Slot::Occupied(slot) => return Some((self.entries.get_mut(*slot.get())?, false)),
            Slot::Vacant(slot) => *slot.insert(self.entries.len()),
        };
        self.entries.push(Entry { key: row, net });
        Some((self.entries.get_mut(place)?, true))
    }

    fn insert(&mut self, key: &'a Row, image: Image<'a>) -> Option<()> {
        let (entry, _) = self.entry(key, Net::Nothing)?;
        entry.net = match entry.net {
            Net::Delete => Net::Replace(image),
            Net::Nothing => Net::Insert(image),
            _ => return None,
        };
        Some(())
    }

    fn delete(&mut self, old: &'a Row) -> Option<()> {
        let (entry, is_new) = self.entry(old, Net::Delete)?;
        if is_new {
            return Some(());
        }
        entry.net = match entry.net {
            Net::Insert(_) => Net::Nothing,
            Net::Update(_) | Net::Replace(_) => Net::Delete,
            Net::Nothing | Net::Delete => return None,
        };
        Some(())
    }

    fn update(&mut self, old: Option<&'a OldRow>, new: &'a Row) -> Option<()> {
        let keys = self.rules.keys;
        match old {
            Some(old) if key_of(old.row(), keys)? != key_of(new, keys)? => self.rekey(old, new),
            _ => self.change(new),
        }
    }

    fn change(&mut self, new: &'a Row) -> Option<()> {
        let (entry, is_new) = self.entry(new, Net::Update(Image::of(new)))?;
        if is_new {
            return Some(());
        }
        entry.net = match std::mem::replace(&mut entry.net, Net::Nothing) {
            Net::Insert(image) => Net::Insert(image.then(new)),
            Net::Update(image) => Net::Update(image.then(new)),
            Net::Replace(image) => Net::Replace(image.then(new)),
            Net::Nothing | Net::Delete => return None,
        };
        Some(())
    }

    /// The row goes under its old key and comes under the new one, which needs all of it.
    fn rekey(&mut self, old: &'a OldRow, new: &'a Row) -> Option<()> {
        if new.len() != self.rules.width {
            return None;
        }
        let place = self.places.get(&key_of(old.row(), self.rules.keys)?);
        let net = place.and_then(|p| self.entries.get(*p)).map(|e| &e.net);
        let made_here = matches!(net, Some(Net::Insert(_) | Net::Replace(_)));
        let mut image = match net {
            Some(Net::Insert(known) | Net::Update(known) | Net::Replace(known)) => {
                known.clone().then(new)
            }
            _ => Image::of(new),
        };
        if let (true, OldRow::Full(old)) = (image.has_unchanged(), old) {
            image = image.over(old);
        }
        if image.has_unchanged() || (!self.rules.complete && !made_here) {
            return None;
        }
        self.delete(old.row())?;
        self.insert(new, image)
    }
}

/// A row text and how many rows of it go and come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copies<'a> {
    /// The whole row.
    pub row: Cow<'a, Row>,
    /// So many equal rows go.
    pub deleted: usize,
    /// So many come.
    pub inserted: usize,
}

/// Folds the changes of a table that has no key and carries whole old rows. A row that was there
/// before and comes again is both deleted and inserted, so that it must be there.
pub(super) fn whole<'a>(
    width: usize,
    changes: impl Iterator<Item = &'a Change>,
) -> Option<Vec<Copies<'a>>> {
    let mut entries: Vec<Copies<'a>> = Vec::new();
    let mut places: HashMap<Cow<'a, Row>, usize> = HashMap::new();
    let mut note = |row: Cow<'a, Row>, comes: bool| {
        if row.len() != width || row.has_unchanged() {
            return None;
        }
        let next = entries.len();
        let place = *places.entry(row.clone()).or_insert(next);
        if place == next {
            entries.push(Copies { row, deleted: 0, inserted: 0 });
        }
        let entry = entries.get_mut(place)?;
        match comes {
            true => entry.inserted += 1,
            false if entry.inserted > 0 => entry.inserted -= 1,
            false => entry.deleted += 1,
        }
        Some(())
    };
    for change in changes {
        match change {
            Change::Insert { new, .. } => note(Cow::Borrowed(new), true)?,
            Change::Delete { old: OldRow::Full(old), .. } => note(Cow::Borrowed(old), false)?,
            Change::Update { old: Some(OldRow::Full(old)), new, .. } => {
                note(Cow::Borrowed(old), false)?;
                note(filled(new, old), true)?;
            }
            _ => return None,
        }
    }
    Some(entries)
}

/// `new`, its unchanged values taken from what the row was before.
fn filled<'a>(new: &'a Row, before: &'a Row) -> Cow<'a, Row> {
    if !new.has_unchanged() {
        return Cow::Borrowed(new);
    }
    let mut builder = RowBuilder::new();
    Image::of(new).over(before).values().for_each(|value| builder.push(value));
    Cow::Owned(builder.finish())
}

/// The key's columns in one piece; `None` if one has no text.
pub(super) fn key_of<'a>(row: &'a Row, keys: &[usize]) -> Option<Cow<'a, [u8]>> {
    let text = |value: Option<Value<'a>>| match value {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    };
    if let [column] = keys {
        return text(row.values().nth(*column)).map(Cow::Borrowed);
    }
    let mut joined = Vec::with_capacity(64);
    for (_, value) in row.values().enumerate().filter(|(column, _)| keys.contains(column)) {
        let text = text(Some(value))?;
        joined.extend_from_slice(&(text.len() as u32).to_be_bytes());
        joined.extend_from_slice(text);
    }
    (!keys.is_empty()).then_some(Cow::Owned(joined))
}

#[cfg(test)]
mod tests;
