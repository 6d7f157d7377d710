//! Partitions that are published as their root: their changes come under one name, so one snapshot
//! has to say of all of them what the copy has.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::store::Stored;
use crate::catalog::{Table, TableKind};
use crate::id::QualifiedName;

/// By the name that changes come under, the tables that are copied.
#[derive(Debug, Default)]
pub(super) struct Families(BTreeMap<QualifiedName, Vec<QualifiedName>>);

impl Families {
    pub fn of(tables: &[Table]) -> Families {
        let mut families = Families::default();
        for table in tables.iter().filter(|table| table.kind == TableKind::Plain) {
            if let Some(under) = &table.published.under {
                families.0.entry(under.clone()).or_default().push(table.name.clone());
            }
        }
        families
    }

    /// A family whose finished parts were read under more than one snapshot.
    pub fn torn(&self, stored: &HashMap<QualifiedName, Vec<Stored>>) -> Option<&QualifiedName> {
        let mut families = self.0.iter();
        families.find(|(_, members)| snapshots(members, stored).len() > 1).map(|(under, _)| under)
    }

    /// Members with finished parts that do not fit what will be read under `snapshot_id`.
    pub fn misfits(
        &self,
        stored: &HashMap<QualifiedName, Vec<Stored>>,
        snapshot_id: &str,
    ) -> Vec<QualifiedName> {
        let mut misfits = Vec::new();
        for members in self.0.values() {
            let snapshots = snapshots(members, stored);
            let left = parts(members, stored).any(|part| !part.done);
            let other = snapshots.iter().any(|id| *id != Some(snapshot_id));
            if other && (left || snapshots.len() > 1) {
                let done = |name: &&QualifiedName| {
                    stored.get(*name).is_some_and(|parts| parts.iter().any(|part| part.done))
                };
                misfits.extend(members.iter().filter(done).cloned());
            }
        }
        misfits
    }
}

fn parts<'a>(
    members: &'a [QualifiedName],
    stored: &'a HashMap<QualifiedName, Vec<Stored>>,
) -> impl Iterator<Item = &'a Stored> {
    members.iter().filter_map(|name| stored.get(name)).flatten()
}

fn snapshots<'a>(
    members: &'a [QualifiedName],
    stored: &'a HashMap<QualifiedName, Vec<Stored>>,
) -> HashSet<Option<&'a str>> {
    parts(members, stored).filter(|p| p.done).map(|p| p.snapshot_id.as_deref()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::parts::Part;
    use super::*;

    fn name(name: &str) -> QualifiedName {
        QualifiedName::new("public", name)
    }

    fn stored(list: &[(&str, Option<&str>)]) -> HashMap<QualifiedName, Vec<Stored>> {
        let mut stored: HashMap<QualifiedName, Vec<Stored>> = HashMap::new();
        for (table, snapshot) in list {
            let part = Part { table: name(table), part: 1, parts: 1, lo_block: 0, hi_block: None };
            stored.entry(name(table)).or_default().push(Stored {
                part,
                done: snapshot.is_some(),
                begun: true,
                snapshot_id: snapshot.map(str::to_string),
                filenode: None,
                rows: 0,
                bytes: 0,
            });
        }
        stored
    }

    #[test]
    fn a_family_is_read_under_one_snapshot_or_again() {
        let families = Families([(name("root"), vec![name("a"), name("b")])].into());
        let whole = stored(&[("a", Some("1:1:")), ("b", Some("1:1:")), ("alone", Some("2:2:"))]);
        assert_eq!((families.torn(&whole), families.misfits(&whole, "9:9:")), (None, vec![]));
        let torn = stored(&[("a", Some("1:1:")), ("b", Some("2:2:"))]);
        assert_eq!(families.torn(&torn), Some(&name("root")));
        assert_eq!(families.misfits(&torn, "2:2:"), [name("a"), name("b")]);
        let left = stored(&[("a", Some("1:1:")), ("b", None)]);
        assert_eq!(families.torn(&left), None);
        assert_eq!(families.misfits(&left, "1:1:"), []);
        assert_eq!(families.misfits(&left, "2:2:"), [name("a")]);
        assert_eq!(families.misfits(&stored(&[("a", None), ("b", None)]), "2:2:"), []);
    }
}
