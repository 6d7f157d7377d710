//! The reader's half of law 10: how many changes of each table were decoded, and how many filtered.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::change::{Change, Chunk, Relation};
use crate::id::QualifiedName;

/// Changes of one table since the counters were made. A TRUNCATE counts one for each of its tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCount {
    /// All that came out of the slot, filtered ones included.
    pub decoded: u64,
    /// Those dropped by the reader, because their transaction's origin is one to skip.
    pub filtered: u64,
}

/// Counters shared between the reader and whoever shows them. Clones count into the same place, so
/// one set can outlive many connections; what comes again after a reconnect is counted again.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    tables: Arc<Mutex<HashMap<QualifiedName, TableCount>>>,
}

impl Counters {
    /// All zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// The counts now.
    pub fn tables(&self) -> HashMap<QualifiedName, TableCount> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn add(&self, chunk: &Chunk, filtered: bool) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let mut add = |relation: &Relation, count: u64| {
            // Two steps, as `entry` would clone the name each time.
            if !tables.contains_key(&relation.name) {
                tables.insert(relation.name.clone(), TableCount::default());
            }
            if let Some(table) = tables.get_mut(&relation.name) {
                table.decoded += count;
                table.filtered += if filtered { count } else { 0 };
            }
        };
        // Changes of one table mostly stand together: look the table up once a run, not once a row.
        let mut run: Option<(&Arc<Relation>, u64)> = None;
        for change in &chunk.changes {
            let relation = match change {
                Change::Insert { relation, .. }
                | Change::Update { relation, .. }
                | Change::Delete { relation, .. } => relation,
                Change::Truncate { relations, .. } => {
                    relations.iter().for_each(|relation| add(relation, 1));
                    continue;
                }
                Change::Message { .. } => continue,
            };
            run = match run {
                Some((last, count)) if Arc::ptr_eq(last, relation) => Some((last, count + 1)),
                Some((last, count)) => {
                    add(last, count);
                    Some((relation, 1))
                }
                None => Some((relation, 1)),
            };
        }
        if let Some((last, count)) = run {
            add(last, count);
        }
    }
}
