//! A batch's net change, written as sets: for each table the rows that go, those that change, those
//! that come. Tables do not act on each other here (foreign keys and triggers are off), so their
//! order does not matter; a TRUNCATE is written where it stands, after all that came before it.

use std::sync::Arc;

use foldhash::HashMap;

use super::admit::Step;
use super::batch::Batch;
use super::encode::{Arrays, Most, NoValue, Piece, WHOLE};
use super::error::Result;
use super::folded::{Folded, claim_whole, fold, part};
use super::image::Image;
use super::lanes::PerLane;
use super::lines::Lines;
use super::plan::{Copies, Entry, Net};
use super::request::{Request, Role};
use super::routing::{Names, Prepared, Route, Statements};
use super::setwise;
use super::statement::{Locator, Mapping};
use super::writer::Writer;
use crate::change::{Relation, Value};
use crate::id::QualifiedName;
use crate::pg::{OwnedParam, Param};

/// Fewer changes of a table than this are not worth a set, whose statements cost more to start.
const TABLE_CHANGES_MIN: usize = 4;

/// Fewer rows than this do not go into a table by COPY, which takes longer to start.
const COPY_ROWS_MIN: usize = 32;

/// Fewer rows that go are counted one by one.
const COUNTED_ROWS_MIN: usize = 256;

/// Of the rows of a set, so many bytes go into one execution: a fourth of work_mem's default,
/// beyond which a server writes them to a file first.
const PIECE_BYTES: usize = 1 << 20;

/// What of a set is done how.
#[derive(Clone, Copy)]
struct Measure {
    /// So many new rows at least go by COPY.
    copied_min: usize,
    /// So many rows that go at least are counted by the server.
    counted_min: usize,
    /// What goes into one execution.
    most: Most,
}

/// The steps of each table, tables in the order of their first mention: a table described anew
/// within the batch has two entries, and the older description comes first.
#[derive(Default)]
struct Tables {
    list: Vec<(Arc<Relation>, Vec<usize>)>,
    places: HashMap<usize, usize>,
}

impl Tables {
    fn add(&mut self, relation: &Arc<Relation>, at: usize) {
        let next = self.list.len();
        let place = *self.places.entry(Arc::as_ptr(relation).addr()).or_insert(next);
        if place == next {
            self.list.push((relation.clone(), Vec::new()));
        }
        if let Some((_, steps)) = self.list.get_mut(place) {
            steps.push(at);
        }
    }
}

/// What is done with a table: rows encoded, and not yet part of a request.
enum Sets {
    Keyed { keys: Vec<usize>, deletes: Arrays, updates: Vec<Updates>, inserts: Inserts },
    Whole { deletes: Arrays, inserts: Inserts },
    Inserts(Inserts),
}

/// Rows that come: by INSERT, or by COPY where there are many, and the target takes one.
enum Inserts {
    Arrays(Arrays),
    Lines(Lines),
}

impl Inserts {
    /// No rows yet, of so many.
    fn new(mapping: &Mapping, measure: Measure, rows: usize) -> Inserts {
        let table = &mapping.table;
        match rows >= measure.copied_min && table.takes_copy && !table.counts_inserts {
            true => Inserts::Lines(Lines::new(mapping)),
            false => {
                let columns: Vec<usize> = mapping.written().collect();
                Inserts::Arrays(Arrays::new(mapping, &columns, measure.most))
            }
        }
    }

    fn push<'a>(
        &mut self,
        row: impl Iterator<Item = Value<'a>>,
    ) -> std::result::Result<(), NoValue> {
        match self {
            Inserts::Arrays(arrays) => arrays.push(row),
            Inserts::Lines(lines) => lines.push(row),
        }
    }
}

/// Updates that set the same columns.
struct Updates {
    set: Vec<usize>,
    arrays: Arrays,
}

impl Writer {
    /// Adds the statements of all steps, in set order as far as tables have one.
    pub(super) fn sets(
        &mut self,
        request: &mut Request,
        batch: &Batch,
        steps: &[Step],
    ) -> Result<()> {
        let mut tables = Tables::default();
        for (at, step) in steps.iter().enumerate() {
            match (step, step.of(batch)) {
                (Step::Row(..), Some((_, change))) => {
                    change.relations().iter().for_each(|relation| tables.add(relation, at));
                }
                _ => {
                    self.tables(request, batch, steps, std::mem::take(&mut tables))?;
                    self.step(request, batch, at, step)?;
                }
            }
        }
        self.tables(request, batch, steps, tables)
    }

    fn tables(
        &mut self,
        request: &mut Request,
        batch: &Batch,
        steps: &[Step],
        tables: Tables,
    ) -> Result<()> {
        let mut names = HashMap::<&QualifiedName, usize>::default();
        for (relation, _) in &tables.list {
            *names.entry(&relation.name).or_default() += 1;
        }
        for (relation, places) in &tables.list {
            // Of one that was described anew, the older changes come first.
            let once = names.get(&relation.name) == Some(&1);
            let chosen = || places.iter().filter_map(|at| steps.get(*at));
            let route = self.routes.get_mut(relation);
            let few = !self.always_sets && places.len() < TABLE_CHANGES_MIN;
            let measure = Measure {
                copied_min: if self.always_sets { 1 } else { COPY_ROWS_MIN },
                counted_min: if self.always_sets { 1 } else { COUNTED_ROWS_MIN },
                most: match self.set_rows {
                    0 => WHOLE,
                    rows => Most { rows, bytes: PIECE_BYTES },
                },
            };
            if let Some(route) = route
                && let Some(mapping) = &route.mapping
                && !(few && mapping.locator != Locator::Whole)
                && let Some(folded) = fold(route, mapping, self.sort_keys, || {
                    chosen().filter_map(|step| Some(step.of(batch)?.1))
                })
            {
                let rows = folded.len();
                let parts = part(request, mapping, &relation.name, folded, once);
                if let Ok(sets) = encode(&parts, mapping, measure) {
                    request.rows += rows;
                    write(request, &mut self.names, route, (sets, measure), None);
                    continue;
                }
                // Some value has no binary form.
                let plain = mapping.plain();
                if let Ok(sets) = encode(&parts, &plain, measure) {
                    request.rows += rows;
                    write(request, &mut self.names, route, (sets, measure), Some(&plain));
                    continue;
                }
            }
            request.rows += places.len();
            let late = claim_whole(request, &relation.name);
            for at in places {
                if let Some(step) = steps.get(*at) {
                    self.step(request.part(late), batch, *at, step)?;
                }
            }
        }
        Ok(())
    }
}

fn encode(
    parts: &[(bool, Folded<'_>)],
    mapping: &Mapping,
    measure: Measure,
) -> std::result::Result<Vec<(bool, Sets)>, NoValue> {
    parts.iter().map(|(late, folded)| Ok((*late, folded.encode(mapping, measure)?))).collect()
}

impl Folded<'_> {
    /// Encoded.
    fn encode(&self, mapping: &Mapping, measure: Measure) -> std::result::Result<Sets, NoValue> {
        match self {
            Folded::Keyed(keys, entries) => encode_keyed(mapping, measure, keys, entries),
            Folded::Whole(entries) => encode_whole(mapping, measure, entries),
            Folded::Inserts(rows) => {
                let mut inserts = Inserts::new(mapping, measure, rows.len());
                rows.iter().try_for_each(|row| inserts.push(row.values()))?;
                Ok(Sets::Inserts(inserts))
            }
        }
    }
}

fn encode_keyed(
    mapping: &Mapping,
    measure: Measure,
    keys: &[usize],
    entries: &[Entry<'_>],
) -> std::result::Result<Sets, NoValue> {
    let columns: Vec<usize> = mapping.written().collect();
    let mut deletes = Arrays::new(mapping, keys, measure.most);
    let comes = |e: &&Entry<'_>| matches!(e.net, Net::Insert(_) | Net::Replace(_));
    let mut inserts = Inserts::new(mapping, measure, entries.iter().filter(comes).count());
    let mut updates: Vec<Updates> = Vec::new();
    for entry in entries {
        match &entry.net {
            Net::Nothing => {}
            Net::Delete => deletes.push(entry.key.values())?,
            Net::Insert(image) => inserts.push(image.values())?,
            Net::Replace(image) => {
                deletes.push(entry.key.values())?;
                inserts.push(image.values())?;
            }
            Net::Update(image) => {
                let sets = |u: &Updates| is_set(&columns, keys, image).eq(u.set.iter().copied());
                let place = match updates.iter().position(sets) {
                    Some(place) => place,
                    None => {
                        let set: Vec<usize> = is_set(&columns, keys, image).collect();
                        let arrays = Arrays::new(mapping, &[keys, &set].concat(), measure.most);
                        updates.push(Updates { set, arrays });
                        updates.len() - 1
                    }
                };
                if let Some(updates) = updates.get_mut(place) {
                    updates.arrays.push(image.values())?;
                }
            }
        }
    }
    Ok(Sets::Keyed { keys: keys.to_vec(), deletes, updates, inserts })
}

/// Which columns an update sets: what may be written, is no key, and is known.
fn is_set<'a>(
    columns: &'a [usize],
    keys: &'a [usize],
    image: &Image<'a>,
) -> impl Iterator<Item = usize> + 'a {
    image.values().enumerate().filter_map(move |(column, value)| {
        let set = value != Value::Unchanged
            && columns.binary_search(&column).is_ok()
            && keys.binary_search(&column).is_err();
        set.then_some(column)
    })
}

fn encode_whole(
    mapping: &Mapping,
    measure: Measure,
    entries: &[Copies<'_>],
) -> std::result::Result<Sets, NoValue> {
    let columns: Vec<usize> = mapping.written().collect();
    // By one pass over the table, however many they are.
    let mut deletes = Arrays::new(mapping, &columns, WHOLE);
    let coming = entries.iter().map(|e| e.inserted).sum();
    let mut inserts = Inserts::new(mapping, measure, coming);
    for entry in entries {
        (0..entry.deleted).try_for_each(|_| deletes.push(entry.row.values()))?;
        (0..entry.inserted).try_for_each(|_| inserts.push(entry.row.values()))?;
    }
    Ok(Sets::Whole { deletes, inserts })
}

/// Adds the statements: what goes before what changes before what comes, as a row may take a unique
/// value that another gives up. `plain` is the mapping they were encoded by, if not the route's.
fn write(
    request: &mut Request,
    names: &mut PerLane<Names>,
    route: &mut Route,
    (parts, measure): (Vec<(bool, Sets)>, Measure),
    plain: Option<&Mapping>,
) {
    let Route { mapping: Some(mapping), statements, .. } = route else { return };
    let (names, statements) = (names.of_mut(request.lane), statements.of_mut(request.lane));
    for (late, sets) in parts {
        let (request, mapping) = (request.part(late), plain.unwrap_or(mapping));
        put(Desk { request, names, statements, mapping, plain }, sets, measure);
    }
}

fn put(mut at: Desk<'_>, sets: Sets, measure: Measure) {
    let inserts = match sets {
        Sets::Keyed { keys, deletes, updates, inserts } => {
            at.delete(&keys, deletes, measure.counted_min);
            for Updates { set, arrays } in updates {
                let mut key = b"su".to_vec();
                set.iter().for_each(|c| key.extend_from_slice(&(*c as u16).to_be_bytes()));
                let sql = |mapping: &Mapping| setwise::update(mapping, &keys, &set);
                at.run(key, arrays, Met::Guard, sql);
            }
            inserts
        }
        Sets::Whole { deletes, inserts } => {
            at.search(deletes);
            inserts
        }
        Sets::Inserts(inserts) => inserts,
    };
    match inserts {
        Inserts::Arrays(arrays) => {
            let met = if at.mapping.table.counts_inserts { Met::Guard } else { Met::Tag };
            at.run(b"si".to_vec(), arrays, met, setwise::insert);
        }
        Inserts::Lines(lines) => at.copy(lines),
    }
}

/// Where the statements of one table are put together.
struct Desk<'a> {
    request: &'a mut Request,
    names: &'a mut Names,
    statements: &'a mut Statements,
    mapping: &'a Mapping,
    plain: Option<&'a Mapping>,
}

impl Desk<'_> {
    /// The name of a statement, prepared at its first use.
    fn name(&mut self, mut key: Vec<u8>, sql: impl FnOnce(&Mapping) -> String) -> String {
        if self.plain.is_some() {
            key.push(b'p');
        }
        let prepared = self.statements.entry(key).or_insert_with(|| {
            let name = self.names.next();
            self.request.pipeline.parse(&name, &sql(self.mapping), &[]);
            Prepared { name, binds: Vec::new() }
        });
        prepared.name.clone()
    }

    /// Adds one COPY. Its tag tells how many rows went in.
    fn copy(&mut self, lines: Lines) {
        let rows = lines.rows();
        if rows > 0 {
            let name = self.name(b"sc".to_vec(), setwise::copy);
            self.request.pipeline.copy(&name, lines.into_pieces());
            self.request.roles.push(Role::Set { bare: Some(rows) });
        }
    }

    /// Adds the DELETEs, and what counts them.
    fn delete(&mut self, keys: &[usize], deletes: Arrays, counted_min: usize) {
        let rows = deletes.rows();
        if rows < counted_min || !setwise::counts(self.mapping, keys) {
            let sql = |mapping: &Mapping| setwise::delete(mapping, keys, false);
            return self.run(b"sd".to_vec(), deletes, Met::Guard, sql);
        }
        let before = self.name(b"sb".to_vec(), |mapping| setwise::counted(mapping).0);
        self.request.run(&before, Role::Aside);
        let sql = |mapping: &Mapping| setwise::delete(mapping, keys, true);
        self.run(b"sn".to_vec(), deletes, Met::Later, sql);
        let after = self.name(b"sa".to_vec(), |mapping| setwise::counted(mapping).1);
        let expected = rows.to_string();
        self.request.pipeline.run_mixed(&after, &[Param::Text(Some(expected.as_bytes()))]);
        self.request.roles.push(Role::Set { bare: None });
    }

    /// Adds one statement for each piece of the arrays; none for no rows.
    fn run(
        &mut self,
        key: Vec<u8>,
        arrays: Arrays,
        met: Met,
        sql: impl FnOnce(&Mapping) -> String,
    ) {
        if arrays.is_empty() {
            return;
        }
        let name = self.name(key, sql);
        for piece in arrays.into_pieces() {
            bind(self.request, &name, piece, met);
        }
    }

    /// Adds the DELETE by whole rows. It is planned anew each time, as the best way depends on how
    /// many rows there are, and by what the session forbids otherwise.
    fn search(&mut self, deletes: Arrays) {
        let Some(deletes) = deletes.into_pieces().next() else { return };
        self.request.aside(&search_plans(true));
        self.request.pipeline.parse("", &setwise::delete_whole(self.mapping), &[]);
        bind(self.request, "", deletes, Met::Guard);
        self.request.aside(&search_plans(false));
    }
}

/// Scans and hash joins, and nothing else, or what the session has otherwise. All three: the cost
/// of a forbidden scan is so high that next to it every join looks the same, and of a table that
/// was never analyzed the planner may think that it is small enough for a nested loop.
fn search_plans(whole: bool) -> String {
    let (scans, loops) = if whole { ("on", "off") } else { ("off", "on") };
    format!(
        "select pg_catalog.set_config('enable_seqscan', '{scans}', true), \
         pg_catalog.set_config('enable_hashjoin', '{scans}', true), \
         pg_catalog.set_config('enable_nestloop', '{loops}', true)"
    )
}

/// What tells that as many rows were met as the statement is given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Met {
    /// The statement itself, on the server.
    Guard,
    /// Its command tag.
    Tag,
    /// A statement behind it, on the server.
    Later,
}

fn bind(request: &mut Request, name: &str, piece: Piece, met: Met) {
    let rows = piece.rows();
    let mut params: Vec<OwnedParam> = piece.into_params().collect();
    if met == Met::Guard {
        params.push(OwnedParam { binary: false, value: rows.to_string().into_bytes() });
    }
    request.pipeline.run_owned(name, params);
    request.roles.push(Role::Set { bare: (met == Met::Tag).then_some(rows) });
}
