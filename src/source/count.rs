//! The reader's half of law 10: how many changes of each table were decoded, and how many filtered.

use std::collections::{HashMap, VecDeque};
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
    books: Arc<Mutex<Books>>,
}

/// Descriptions whose counters are found without their names: a transaction's changes are of a few
/// tables in turn, and looking a name up costs as much as decoding a row.
const KNOWN: usize = 32;

#[derive(Debug, Default)]
struct Books {
    places: HashMap<QualifiedName, usize>,
    counts: Vec<TableCount>,
    /// The last that were met, with their places.
    known: VecDeque<(Arc<Relation>, usize)>,
}

impl Books {
    fn add(&mut self, relation: &Arc<Relation>, count: u64, filtered: bool) {
        let known = self.known.iter().find(|(known, _)| Arc::ptr_eq(known, relation));
        let place = known.map(|(_, place)| *place).unwrap_or_else(|| self.meet(relation));
        if let Some(table) = self.counts.get_mut(place) {
            table.decoded += count;
            table.filtered += if filtered { count } else { 0 };
        }
    }

    fn meet(&mut self, relation: &Arc<Relation>) -> usize {
        let next = self.counts.len();
        let place = *self.places.entry(relation.name.clone()).or_insert(next);
        if place == next {
            self.counts.push(TableCount::default());
        }
        self.known.truncate(KNOWN - 1);
        self.known.push_front((relation.clone(), place));
        place
    }
}

impl Counters {
    /// All zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// The counts now.
    pub fn tables(&self) -> HashMap<QualifiedName, TableCount> {
        let books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = |(name, place): (&QualifiedName, &usize)| {
            books.counts.get(*place).map(|count| (name.clone(), *count))
        };
        books.places.iter().filter_map(counted).collect()
    }

    pub(super) fn add(&self, chunk: &Chunk, filtered: bool) {
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        // Changes of one table mostly stand together: the table is looked up once a run.
        let mut run: Option<(&Arc<Relation>, u64)> = None;
        for change in &chunk.changes {
            let relation = match change {
                Change::Insert { relation, .. }
                | Change::Update { relation, .. }
                | Change::Delete { relation, .. } => relation,
                Change::Truncate { relations, .. } => {
                    relations.iter().for_each(|relation| books.add(relation, 1, filtered));
                    continue;
                }
                Change::Message { .. } => continue,
            };
            run = match run {
                Some((last, count)) if Arc::ptr_eq(last, relation) => Some((last, count + 1)),
                Some((last, count)) => {
                    books.add(last, count, filtered);
                    Some((relation, 1))
                }
                None => Some((relation, 1)),
            };
        }
        if let Some((last, count)) = run {
            books.add(last, count, filtered);
        }
    }
}
