//! What a table's changes of a batch come to, and which of it may be written beside another batch.
//! Pure.

use super::claims::{self, Apart};
use super::encode::Carrier;
use super::plan::{self, Copies, Entry, Rules};
use super::request::Request;
use super::routing::Route;
use super::statement::{Locator, Mapping};
use crate::change::{Change, ReplicaIdentity, Row};
use crate::id::QualifiedName;

/// What a table's changes come to, before any of it is encoded.
pub(super) enum Folded<'a> {
    Keyed(Vec<usize>, Vec<Entry<'a>>),
    Whole(Vec<Copies<'a>>),
    /// Nothing but new rows.
    Inserts(Vec<&'a Row>),
}

/// The table's net change; `None` if its changes are to be written one by one.
pub(super) fn fold<'a, I: Iterator<Item = &'a Change> + Clone>(
    route: &Route,
    mapping: &Mapping,
    sort_keys: bool,
    changes: impl Fn() -> I,
) -> Option<Folded<'a>> {
    let mut written = mapping.written().peekable();
    written.peek()?;
    if written.any(|c| mapping.carrier(c) == Carrier::None) {
        return None;
    }
    let width = mapping.places.len();
    let new_row = |change: &'a Change| match change {
        Change::Insert { new, .. } if new.len() == width => Some(new),
        _ => None,
    };
    if let Some(rows) = changes().map(new_row).collect() {
        return Some(Folded::Inserts(rows));
    }
    let mut rules = Rules {
        width,
        keys: &[],
        complete: mapping.is_complete(),
        settable: true,
        full: route.relation.identity == ReplicaIdentity::Full,
    };
    match &mapping.locator {
        Locator::Key(keys) => {
            let mut keys = keys.clone();
            keys.sort_unstable();
            rules.keys = &keys;
            // SET cannot write such a column, and the stream does not say whether it changed.
            rules.settable = mapping.identity_always().is_none_or(|c| keys.contains(&c));
            let mut entries = plan::keyed(&rules, changes())?;
            if sort_keys {
                plan::sort(&keys, &mut entries);
            }
            Some(Folded::Keyed(keys, entries))
        }
        Locator::Whole if rules.complete => Some(Folded::Whole(plan::whole(width, changes())?)),
        Locator::Whole | Locator::None => None,
    }
}

impl<'a> Folded<'a> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        match self {
            Folded::Keyed(_, entries) => entries.len(),
            Folded::Whole(entries) => entries.len(),
            Folded::Inserts(rows) => rows.len(),
        }
    }

    /// A row with the key of each, in order.
    fn rows(&self) -> Box<dyn Iterator<Item = &'a Row> + '_> {
        match self {
            Folded::Keyed(_, entries) => Box::new(entries.iter().map(|entry| entry.key)),
            Folded::Inserts(rows) => Box::new(rows.iter().copied()),
            Folded::Whole(_) => Box::new(std::iter::empty()),
        }
    }

    /// Those that are not `met`, and those that are.
    fn partition(self, met: &[bool]) -> [Folded<'a>; 2] {
        let mut met = met.iter().copied().chain(std::iter::repeat(true));
        match self {
            Folded::Keyed(keys, entries) => {
                let (late, now) = entries.into_iter().partition(|_| met.next().unwrap_or(true));
                [Folded::Keyed(keys.clone(), now), Folded::Keyed(keys, late)]
            }
            Folded::Inserts(rows) => {
                let (late, now) = rows.into_iter().partition(|_| met.next().unwrap_or(true));
                [Folded::Inserts(now), Folded::Inserts(late)]
            }
            whole @ Folded::Whole(_) => [Folded::Inserts(Vec::new()), whole],
        }
    }
}

/// Notes what is written of the table, and takes apart what can be written now and what only after
/// those before have landed, which comes with `true`. `once`: the batch has the table once.
pub(super) fn part<'a>(
    request: &mut Request,
    mapping: &Mapping,
    table: &QualifiedName,
    folded: Folded<'a>,
    once: bool,
) -> Vec<(bool, Folded<'a>)> {
    if request.claims.is_none() {
        return vec![(false, folded)];
    }
    let apart = match once {
        true => Apart::of(mapping, matches!(folded, Folded::Inserts(_))),
        false => Apart::No,
    };
    let Apart::Keys(columns) = apart else {
        let late = match apart {
            Apart::Appends => {
                request.claims.iter_mut().for_each(|claims| claims.appends(table));
                request.others.iter().any(|others| others.stops_appends(table))
            }
            _ => claim_whole(request, table),
        };
        return vec![(late, folded)];
    };
    let mut columns = columns.to_vec();
    columns.sort_unstable();
    let keys: Vec<u64> = folded.rows().map(|row| claims::key(row, &columns)).collect();
    request.claims.iter_mut().for_each(|claims| claims.keys(table, keys.iter().copied()));
    if !request.meets(table) {
        return vec![(false, folded)];
    }
    let is_met = |key: &u64| request.others.iter().any(|others| others.has(table, *key));
    let met: Vec<bool> = keys.iter().map(is_met).collect();
    let [now, late] = folded.partition(&met);
    vec![(false, now), (true, late)]
}

/// Notes that the table is written as a whole; true if it can only be after those before.
pub(super) fn claim_whole(request: &mut Request, table: &QualifiedName) -> bool {
    request.claims.iter_mut().for_each(|claims| claims.whole(table));
    request.meets(table)
}
