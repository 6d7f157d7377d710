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
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use crate::change::{Change, OldRow, Row, RowBuilder, Value};

/// A row as it was sent, or put together from several.
pub(super) type Image<'a> = Cow<'a, Row>;

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
    changes: impl Iterator<Item = &'a Change>,
) -> Option<Vec<Entry<'a>>> {
    let mut folder = Folder { rules, entries: Vec::new(), places: HashMap::new() };
    for change in changes {
        match change {
            Change::Insert { new, .. } => folder.insert(new, Cow::Borrowed(new))?,
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
        let (entry, is_new) = self.entry(new, Net::Update(Cow::Borrowed(new)))?;
        if is_new {
            return Some(());
        }
        entry.net = match &entry.net {
            Net::Insert(image) => Net::Insert(filled(new, image)),
            Net::Update(image) => Net::Update(filled(new, image)),
            Net::Replace(image) => Net::Replace(filled(new, image)),
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
                filled(new, known)
            }
            _ => Cow::Borrowed(new),
        };
        if let (true, OldRow::Full(old)) = (image.has_unchanged(), old) {
            image = Cow::Owned(fill(&image, old));
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
    pub row: Image<'a>,
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
    let mut places: HashMap<Image<'a>, usize> = HashMap::new();
    let mut note = |row: Image<'a>, comes: bool| {
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
                note(filled(new, &Cow::Borrowed(old)), true)?;
            }
            _ => return None,
        }
    }
    Some(entries)
}

/// `new`, its unchanged values taken from what the row was before.
fn filled<'a>(new: &'a Row, before: &Image<'a>) -> Image<'a> {
    if new.has_unchanged() { Cow::Owned(fill(new, before)) } else { Cow::Borrowed(new) }
}

fn fill(new: &Row, before: &Row) -> Row {
    let mut builder = RowBuilder::new();
    let mut before = before.values();
    for value in new.values() {
        let before = before.next();
        builder.push(match value {
            Value::Unchanged => before.unwrap_or(Value::Unchanged),
            value => value,
        });
    }
    builder.finish()
}

/// The key's columns in one piece; `None` if one has no text.
fn key_of<'a>(row: &'a Row, keys: &[usize]) -> Option<Cow<'a, [u8]>> {
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
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::change::{Column, Relation, ReplicaIdentity};
    use crate::id::QualifiedName;

    /// A row `(key, text, toast)`; `None` is a toast value that is not known.
    fn row(key: u8, text: u8, toast: Option<u8>) -> Row {
        let mut builder = RowBuilder::new();
        builder.push(Value::Text(key.to_string().as_bytes()));
        builder.push(Value::Text(text.to_string().as_bytes()));
        match toast {
            Some(toast) => builder.push(Value::Text(toast.to_string().as_bytes())),
            None => builder.push(Value::Unchanged),
        }
        builder.finish()
    }

    fn read(row: &Row) -> (u8, u8, Option<u8>) {
        let number = |v: Value<'_>| {
            v.bytes().map(|b| std::str::from_utf8(b).unwrap().parse::<u8>().unwrap())
        };
        let values: Vec<Option<u8>> = row.values().map(number).collect();
        (values[0].unwrap(), values[1].unwrap(), values[2])
    }

    fn relation() -> Arc<Relation> {
        let column = |name: &str| Column {
            name: name.to_string(),
            type_oid: 25,
            type_modifier: -1,
            key: name == "k",
        };
        Arc::new(Relation {
            oid: 1,
            name: QualifiedName::new("s", "t"),
            identity: ReplicaIdentity::Default,
            columns: ["k", "v", "w"].map(column).to_vec(),
        })
    }

    type Model = BTreeMap<u8, (u8, u8)>;

    /// What an application does next; what is not possible is left out.
    #[derive(Clone, Debug)]
    enum Op {
        Insert(u8, u8, u8),
        /// Key, new key, text, toast if it changes, whether the old row is sent whole.
        Update(u8, u8, u8, Option<u8>, bool),
        Delete(u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..5u8, any::<u8>(), any::<u8>()).prop_map(|(k, v, w)| Op::Insert(k, v, w)),
            (0..5u8, 0..5u8, any::<u8>(), any::<Option<u8>>(), any::<bool>(), any::<bool>())
                .prop_map(|(k, n, v, w, moves, full)| {
                    Op::Update(k, if moves { n } else { k }, v, w, full)
                }),
            (0..5u8).prop_map(Op::Delete),
        ]
    }

    /// The change of an operation on the source, whose rows it changes.
    fn change(rows: &mut Model, relation: &Arc<Relation>, op: &Op) -> Option<Change> {
        let relation = relation.clone();
        match *op {
            Op::Insert(k, v, w) => {
                (!rows.contains_key(&k)).then_some(())?;
                rows.insert(k, (v, w));
                Some(Change::Insert { relation, new: row(k, v, Some(w)) })
            }
            Op::Delete(k) => {
                rows.remove(&k)?;
                let old = OldRow::Key(row(k, 0, Some(0)));
                Some(Change::Delete { relation, old })
            }
            Op::Update(k, n, v, w, full) => {
                let before = *rows.get(&k)?;
                (n == k || !rows.contains_key(&n)).then_some(())?;
                rows.remove(&k);
                rows.insert(n, (v, w.unwrap_or(before.1)));
                let old = match (full, n != k) {
                    (true, _) => Some(OldRow::Full(row(k, before.0, Some(before.1)))),
                    (false, true) => Some(OldRow::Key(row(k, 0, Some(0)))),
                    (false, false) => None,
                };
                Some(Change::Update { relation, old, new: row(n, v, w) })
            }
        }
    }

    /// Writes entries as sets: each must meet its row, and no key may come twice.
    fn write(target: &mut Model, entries: &[Entry<'_>]) {
        for entry in entries {
            if matches!(entry.net, Net::Delete | Net::Replace(_)) {
                assert!(target.remove(&read(entry.key).0).is_some(), "nothing to delete");
            }
        }
        for entry in entries {
            if let Net::Update(image) = &entry.net {
                let (k, v, w) = read(image);
                let before = target.get_mut(&k).expect("nothing to update");
                *before = (v, w.unwrap_or(before.1));
            }
        }
        for entry in entries {
            if let Net::Insert(image) | Net::Replace(image) = &entry.net {
                let (k, v, w) = read(image);
                assert!(target.insert(k, (v, w.expect("known"))).is_none(), "key comes twice");
            }
        }
    }

    const RULES: Rules<'_> =
        Rules { width: 3, keys: &[0], complete: true, settable: true, full: false };

    proptest! {
        #[test]
        fn the_net_change_leaves_what_the_row_changes_leave(
            keys in proptest::collection::btree_map(0..5u8, any::<(u8, u8)>(), 0..5),
            ops in proptest::collection::vec(op(), 0..40),
        ) {
            let (mut source, relation) = (keys.clone(), relation());
            let changes: Vec<Change> =
                ops.iter().filter_map(|op| change(&mut source, &relation, op)).collect();
            let unknown = |c: &Change| {
                matches!(c, Change::Update { old: Some(OldRow::Key(_)), new, .. }
                    if new.has_unchanged())
            };
            let Some(entries) = keyed(&RULES, changes.iter()) else {
                // Refused only where a row must be made anew whose toast value is not known.
                prop_assert!(changes.iter().any(unknown));
                return Ok(());
            };
            let mut target = keys;
            write(&mut target, &entries);
            prop_assert_eq!(target, source);
            // Each key once, and no more entries than changes could make.
            let mut seen: Vec<u8> = entries.iter().map(|e| read(e.key).0).collect();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), entries.len());
        }

        #[test]
        fn rows_without_a_key_come_and_go_as_often_as_they_should(
            ops in proptest::collection::vec((0..4u8, 0..4u8, 0..3u8), 0..40),
        ) {
            let relation = relation();
            let (before, mut source) = (vec![0u8, 0, 1, 2], vec![0u8, 0, 1, 2]);
            let mut changes = Vec::new();
            for (old, new, kind) in ops {
                let there = source.iter().position(|r| *r == old);
                let (old, relation) = (OldRow::Full(row(old, 0, Some(7))), relation.clone());
                let toast = (kind == 2).then_some(7);
                match (kind, there) {
                    (0, _) => {
                        source.push(new);
                        changes.push(Change::Insert { relation, new: row(new, 0, Some(7)) });
                    }
                    (1, Some(at)) => {
                        source.remove(at);
                        changes.push(Change::Delete { relation, old });
                    }
                    (_, Some(at)) => {
                        source[at] = new;
                        let new = row(new, 0, toast);
                        changes.push(Change::Update { relation, old: Some(old), new });
                    }
                    _ => {}
                }
            }
            let copies = whole(3, changes.iter()).unwrap();
            let mut target = before;
            for copies in &copies {
                for _ in 0..copies.deleted {
                    let at = target.iter().position(|r| *r == read(&copies.row).0);
                    target.remove(at.expect("nothing to delete"));
                }
            }
            for copies in &copies {
                (0..copies.inserted).for_each(|_| target.push(read(&copies.row).0));
            }
            target.sort_unstable();
            source.sort_unstable();
            prop_assert_eq!(target, source);
        }
    }

    #[test]
    fn what_has_no_net_change_is_refused() {
        let relation = relation();
        let insert = |k| Change::Insert { relation: relation.clone(), new: row(k, 1, Some(1)) };
        let update =
            |k| Change::Update { relation: relation.clone(), old: None, new: row(k, 2, None) };
        let rekey = Change::Update {
            relation: relation.clone(),
            old: Some(OldRow::Key(row(1, 0, Some(0)))),
            new: row(2, 2, Some(2)),
        };
        let twice = [insert(1), insert(1)];
        assert_eq!(keyed(&RULES, twice.iter()), None);
        assert_eq!(keyed(&Rules { settable: false, ..RULES }, [update(1)].iter()), None);
        assert!(
            keyed(&Rules { settable: false, ..RULES }, [insert(1), update(1)].iter()).is_some()
        );
        assert_eq!(keyed(&Rules { full: true, ..RULES }, [update(1)].iter()), None);
        assert_eq!(keyed(&Rules { complete: false, ..RULES }, [rekey].iter()), None);
        assert_eq!(keyed(&Rules { width: 2, ..RULES }, [insert(1)].iter()), None);
        assert_eq!(whole(3, [update(1)].iter()), None);
    }
}
