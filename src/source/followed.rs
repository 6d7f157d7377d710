//! The tables of a job, for decoders that print every table of the database by its name alone.
//!
//! A name may come to mean another table: dropped and made anew, renamed, swapped. So each is kept
//! with its oid from before the slot was made, and what the catalog says of a printed name now is
//! held against that. A name that cannot be explained stops the stream rather than lose its rows.

use std::collections::{HashMap, HashSet};

use super::{Error, Result};
use crate::id::QualifiedName;

/// Names and oids of the tables that take part; their partitions, those made later too, do as well.
#[derive(Clone, Debug, Default)]
pub struct Followed {
    oids: HashMap<QualifiedName, Option<u32>>,
    known: HashSet<u32>,
}

/// A table of the catalog as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relative {
    /// `pg_class.oid`.
    pub oid: u32,
    /// Schema and name.
    pub name: QualifiedName,
}

impl Followed {
    /// True if this very table is one of them, itself: whatever its name is now.
    pub fn contains(&self, oid: u32, name: &QualifiedName) -> bool {
        self.known.contains(&oid) || matches!(self.oids.get(name), Some(None))
    }

    /// True if the changes printed under `name` are to be read. `lineage` is the table of that name
    /// as the catalog has it now, then those it is a partition of; empty if there is none.
    ///
    /// Errors (`Stop`): the name was that of a table that takes part, and is nobody's or another
    /// table's now, so that its changes cannot be told.
    pub fn takes_part(&self, name: &QualifiedName, lineage: &[Relative]) -> Result<bool> {
        if lineage.iter().any(|table| self.contains(table.oid, &table.name)) {
            return Ok(true);
        }
        if let Some(other) = lineage.iter().find(|table| self.oids.contains_key(&table.name)) {
            return Err(Error::OtherTable { table: other.name.clone() });
        }
        // A name that is gone and was no table's of the job: made and dropped since, by anybody.
        if lineage.is_empty() && self.oids.contains_key(name) {
            return Err(Error::TableGone { table: name.clone() });
        }
        Ok(false)
    }
}

impl FromIterator<(QualifiedName, Option<u32>)> for Followed {
    fn from_iter<I: IntoIterator<Item = (QualifiedName, Option<u32>)>>(tables: I) -> Followed {
        let oids: HashMap<_, _> = tables.into_iter().collect();
        let known = oids.values().flatten().copied().collect();
        Followed { oids, known }
    }
}

/// Without oids, as jobs of an earlier version stored them: names are believed.
impl FromIterator<QualifiedName> for Followed {
    fn from_iter<I: IntoIterator<Item = QualifiedName>>(tables: I) -> Followed {
        tables.into_iter().map(|name| (name, None)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> QualifiedName {
        QualifiedName::new("public", name)
    }

    fn relative(oid: u32, table: &str) -> Relative {
        Relative { oid, name: name(table) }
    }

    #[test]
    fn a_name_is_followed_while_it_means_the_same_table() {
        let followed: Followed = [(name("t"), Some(7)), (name("old"), None)].into_iter().collect();
        let asked = |table: &str, lineage: &[Relative]| followed.takes_part(&name(table), lineage);
        assert!(asked("t", &[relative(7, "t")]).unwrap());
        assert!(asked("old", &[relative(99, "old")]).unwrap());
        assert!(asked("p", &[relative(8, "p"), relative(7, "t")]).unwrap());
        // Renamed: the target is asked for the new name, and refuses it.
        assert!(asked("t2", &[relative(7, "t2")]).unwrap());
        assert!(!asked("u", &[relative(8, "u")]).unwrap());
        assert!(!asked("u", &[]).unwrap());
        let gone = asked("t", &[]).unwrap_err().to_string();
        assert!(gone.contains("public.t ") && gone.contains("rename"), "{gone}");
        let other = asked("t", &[relative(8, "t")]).unwrap_err().to_string();
        assert!(other.contains("public.t ") && other.contains("another"), "{other}");
        assert!(asked("p", &[relative(9, "p"), relative(8, "t")]).is_err());
    }
}
