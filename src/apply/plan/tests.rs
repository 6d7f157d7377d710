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

fn read<'a>(row: impl Iterator<Item = Value<'a>>) -> (u8, u8, Option<u8>) {
    let number =
        |v: Value<'_>| v.bytes().map(|b| std::str::from_utf8(b).unwrap().parse::<u8>().unwrap());
    let values: Vec<Option<u8>> = row.map(number).collect();
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
        (0..5u8, 0..5u8, any::<u8>(), any::<Option<u8>>(), any::<bool>(), any::<bool>()).prop_map(
            |(k, n, v, w, moves, full)| { Op::Update(k, if moves { n } else { k }, v, w, full) }
        ),
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
            assert!(target.remove(&read(entry.key.values()).0).is_some(), "nothing to delete");
        }
    }
    for entry in entries {
        if let Net::Update(image) = &entry.net {
            let (k, v, w) = read(image.values());
            let before = target.get_mut(&k).expect("nothing to update");
            *before = (v, w.unwrap_or(before.1));
        }
    }
    for entry in entries {
        if let Net::Insert(image) | Net::Replace(image) = &entry.net {
            let (k, v, w) = read(image.values());
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
        let mut seen: Vec<u8> = entries.iter().map(|e| read(e.key.values()).0).collect();
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
                let at = target.iter().position(|r| *r == read(copies.row.values()).0);
                target.remove(at.expect("nothing to delete"));
            }
        }
        for copies in &copies {
            (0..copies.inserted).for_each(|_| target.push(read(copies.row.values()).0));
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
    let update = |k| Change::Update { relation: relation.clone(), old: None, new: row(k, 2, None) };
    let rekey = Change::Update {
        relation: relation.clone(),
        old: Some(OldRow::Key(row(1, 0, Some(0)))),
        new: row(2, 2, Some(2)),
    };
    let twice = [insert(1), insert(1)];
    assert_eq!(keyed(&RULES, twice.iter()), None);
    assert_eq!(keyed(&Rules { settable: false, ..RULES }, [update(1)].iter()), None);
    assert!(keyed(&Rules { settable: false, ..RULES }, [insert(1), update(1)].iter()).is_some());
    assert_eq!(keyed(&Rules { full: true, ..RULES }, [update(1)].iter()), None);
    assert_eq!(keyed(&Rules { complete: false, ..RULES }, [rekey].iter()), None);
    assert_eq!(keyed(&Rules { width: 2, ..RULES }, [insert(1)].iter()), None);
    assert_eq!(whole(3, [update(1)].iter()), None);
}
