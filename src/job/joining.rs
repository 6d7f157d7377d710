//! `--ddl` without event triggers: tables that are made on the source while the job follows it. No
//! publication has them, so nothing of them is in the stream.
//!
//! 1. A table that two looks have seen is made on the target, empty and with its indexes, or its
//!    SQL is told, as the policy says ([`Watcher::meet_newcomers`]).
//! 2. One that is there, empty and with the same columns, whoever made it, is noted in
//!    `walferry.newcomer`, unless a transaction has been under way for long: step 4 would wait for
//!    it, and the stream with that.
//! 3. The runner stops its streams and goes back to phase `copying` ([`Runner::join`]).
//! 4. There the table is published, and all transactions are waited for that have an id by then
//!    ([`Runner::take_in`]). One that is at work while a table is published may have some of its
//!    changes in the stream and not others: over, it is in every snapshot from then on.
//! 5. Those tables alone are read under such a snapshot. Exact visibility does the rest.
//!
//! A partition that is new and empty, of a table that takes part, is only made: the stream has all
//! that will be in it.
//!
//! A crash between any two steps goes on with the next: a note is taken back when its table has
//! been read, and all others have been before.
//!
//! Left out: triggers, rules and policies of such a table (indexes and constraints that come later,
//! and foreign keys, are [`super::silent`]'s); jobs of two ways, of a copy or a publication that
//! somebody else made, of halves, and of a target whose role may not set session_replication_role.
//! There, a cutover refuses the table by name.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::opening::Half;
use super::prepare::tell_blockers;
use super::run::{Notice, Runner};
use super::silent::{LOCK_TIMEOUT, Watcher};
use super::state::{Event, Phase};
use super::store::Store;
use super::{Error, Result, altering, newcomers};
use crate::catalog::{self, Table, TableKind};
use crate::decode::Plugin;
use crate::id::{QualifiedName, Stream};
use crate::pg::{self, Purpose, Session};
use crate::schema;
use crate::schema::policy::{Action, Class};
use crate::source::{publication, slot};

/// What a transaction may be old for the stream to wait for it.
const LONG: Duration = Duration::from_secs(5);

/// Between two looks at which transactions are still at work.
const STEP: Duration = Duration::from_millis(100);

/// Tables that belong to the job and are in no stream yet.
pub(super) struct Newcomers {
    options: schema::Options,
    /// Some are noted.
    pub(super) noted: Arc<AtomicBool>,
    /// What the last look has found.
    seen: HashSet<u32>,
    /// The first transaction id that was not given by then, of looks no longer ago than [`LONG`].
    given: VecDeque<(Instant, i64)>,
    /// What makes a family of them, by the oid of its first table: as its columns were.
    making: HashMap<u32, (String, Vec<String>)>,
}

impl Newcomers {
    pub(super) fn new(owners: bool, noted: Arc<AtomicBool>) -> Newcomers {
        let options = schema::Options {
            no_owner: !owners,
            no_privileges: !owners,
            ..schema::Options::default()
        };
        let (seen, given, making) = Default::default();
        Newcomers { options, noted, seen, given, making }
    }

    /// True while no transaction of the source has been under way for long.
    async fn is_quiet(&mut self, source: &mut Session) -> Result<bool> {
        let sql = "select pg_catalog.txid_snapshot_xmin(s), pg_catalog.txid_snapshot_xmax(s) \
             from pg_catalog.txid_current_snapshot() s";
        let row = source.query_one(sql, &[]).await?;
        let (xmin, xmax): (i64, i64) = (row.parse(0)?, row.parse(1)?);
        while self.given.len() > 1 && self.given.front().is_some_and(|(at, _)| at.elapsed() > LONG)
        {
            self.given.pop_front();
        }
        let quiet = self.given.front().is_some_and(|(_, xmax)| xmin >= *xmax);
        self.given.push_back((Instant::now(), xmax));
        Ok(quiet)
    }
}

/// A table with its partitions, or partitions of one that takes part: what is to come of it.
struct Family {
    /// What names it.
    first: Table,
    /// Those that are to be followed.
    joining: Vec<Table>,
    /// Those that the target lacks, parents before their partitions. With none to join: partitions
    /// that the stream carries, once they have rows.
    lacking: Vec<Table>,
}

impl Family {
    fn oids(&self) -> impl Iterator<Item = u32> + '_ {
        self.joining.iter().chain(&self.lacking).map(|table| table.oid)
    }
}

impl Watcher {
    /// Looks for tables that came since. What waits for somebody is put into `awaited`. True if
    /// there is more to be done soon.
    pub(super) async fn meet_newcomers(
        &mut self,
        source: &mut Session,
        home: &mut Store,
        awaited: &mut BTreeMap<String, String>,
    ) -> Result<bool> {
        let Some(newcomers) = &mut self.newcomers else { return Ok(false) };
        let (found, all) = strangers(source, home, &self.selection).await?;
        let there = catalog::tables(&mut home.session, &self.selection).await?;
        let families = families(&found, &all, &there);
        if families.is_empty() {
            newcomers.seen.clear();
            newcomers.given.clear();
            return Ok(false);
        }
        let quiet = newcomers.is_quiet(source).await?;
        let oids: HashSet<u32> = families.iter().flat_map(Family::oids).collect();
        newcomers.making.retain(|oid, _| oids.contains(oid));
        let before = std::mem::replace(&mut newcomers.seen, oids);
        let mut soon = newcomers.seen.iter().any(|oid| !before.contains(oid));
        for mut family in families {
            if family.oids().any(|oid| !before.contains(&oid)) {
                continue;
            }
            if family.lacking.is_empty() {
                soon |= self.note(home, &family, &there, quiet).await?;
                continue;
            }
            if family.joining.is_empty() {
                family.lacking = empty(source, family.lacking).await?;
                if family.lacking.is_empty() {
                    continue;
                }
            }
            if let Some(sql) = self.make(source, home, &family, &there).await? {
                awaited.insert(format!("table {}", family.first.name), sql);
            } else {
                soon = true;
            }
        }
        Ok(soon)
    }

    /// Makes what the target lacks, if that is wanted. Gives what is left to be run by hand.
    async fn make(
        &mut self,
        source: &mut Session,
        home: &mut Store,
        family: &Family,
        there: &[Table],
    ) -> Result<Option<String>> {
        let name = &family.first.name;
        let statements = match self.making(source, home, family, there).await {
            Ok(statements) => statements,
            Err(Error::Schema(error)) => {
                self.say(format!("warning: table {name} is new, and cannot be made: {error}"));
                return Ok(Some(format!("-- table {name}: {error}")));
            }
            Err(error) => return Err(error),
        };
        let told = statements.join("; ");
        let class = match family.first.partition_of {
            Some(_) => Class::NewPartition,
            None => Class::NewTable,
        };
        if self.policy.of(class) != Action::Apply {
            self.say(format!(
                "warning: table {name} is new on the source; it is followed once it is on the \
                 target, made by: {told}"
            ));
            return Ok(Some(told));
        }
        self.at_work(Some(home.session.cancel_handle()));
        let made = run(&mut home.session, &statements).await;
        self.at_work(None);
        match made {
            Ok(()) => {
                (self.report)(Notice::Said(format!("the source has it, made here: table {name}")));
                Ok(None)
            }
            Err(error) if error.is_closed() => Err(error.into()),
            Err(error) => {
                self.say(format!("warning: tried again with the next look: {told}: {error}"));
                Ok(Some(told))
            }
        }
    }

    /// What makes it, told by pg_dump once for the columns that it has; of a partition of a table
    /// that is there already, by its bounds.
    async fn making(
        &mut self,
        source: &mut Session,
        home: &mut Store,
        family: &Family,
        there: &[Table],
    ) -> Result<Vec<String>> {
        let there: HashSet<&QualifiedName> = there.iter().map(|table| &table.name).collect();
        let mut attached = Vec::new();
        for table in &family.lacking {
            if table.partition_of.as_ref().is_some_and(|parent| there.contains(parent)) {
                let session = &mut home.session;
                let done = altering::missing(source, session, table.oid, &table.name).await?;
                attached.extend(done.sql.unwrap_or_default());
            }
        }
        if !attached.is_empty() {
            return Ok(attached);
        }
        let Some(newcomers) = &mut self.newcomers else { return Ok(Vec::new()) };
        let columns: Vec<String> = family.lacking.iter().map(shape).collect();
        let (columns, oid) = (columns.join("; "), family.first.oid);
        if let Some((known, statements)) = newcomers.making.get(&oid)
            && *known == columns
        {
            return Ok(statements.clone());
        }
        let names: Vec<QualifiedName> = family.lacking.iter().map(|t| t.name.clone()).collect();
        let from = (&self.source, source.major_version());
        let options = &newcomers.options;
        let statements = schema::joining::making(from, &mut home.session, &names, options).await?;
        newcomers.making.insert(oid, (columns, statements.clone()));
        Ok(statements)
    }

    /// Notes tables that both sides have, if the target's are as the source's and empty, and nobody
    /// is at work for long. True if that is only a matter of time.
    async fn note(
        &mut self,
        home: &mut Store,
        family: &Family,
        there: &[Table],
        quiet: bool,
    ) -> Result<bool> {
        let name = &family.first.name;
        for table in &family.joining {
            let on_target = there.iter().find(|other| other.name == table.name);
            if on_target.is_none_or(|other| shape(other) != shape(table)) {
                self.say(format!(
                    "warning: table {name} is new on the source, and the target has another of \
                     that name: make it as the source's, or drop it"
                ));
                return Ok(false);
            }
            if has_rows(&mut home.session, table).await? {
                self.say(format!(
                    "warning: table {name} is new on the source, and has rows on the target: it \
                     is followed once it is empty there"
                ));
                return Ok(false);
            }
        }
        if !quiet {
            self.say(format!(
                "table {name} is new on the source, and waits until no transaction there is \
                 {LONG:?} old"
            ));
            return Ok(true);
        }
        home.note_newcomers(&family.joining).await?;
        if let Some(newcomers) = &self.newcomers {
            newcomers.noted.store(true, Ordering::SeqCst);
        }
        Ok(true)
    }
}

async fn has_rows(session: &mut Session, table: &Table) -> Result<bool> {
    let sql = format!("select exists (select from {})", table.name.quoted());
    Ok(session.query_one(&sql, &[]).await?.bool(0)?)
}

/// Those without rows. What others have may be from before they were attached, and in no stream.
async fn empty(source: &mut Session, tables: Vec<Table>) -> Result<Vec<Table>> {
    let mut empty = Vec::with_capacity(tables.len());
    for table in tables {
        if !has_rows(source, &table).await? {
            empty.push(table);
        }
    }
    Ok(empty)
}

/// All in one transaction, or nothing.
async fn run(session: &mut Session, statements: &[String]) -> pg::Result<()> {
    session.execute(LOCK_TIMEOUT).await?;
    session.execute("begin").await?;
    for sql in statements {
        if let Err(error) = session.execute(sql).await {
            if !error.is_closed() {
                session.execute("rollback").await?;
            }
            return Err(error);
        }
    }
    session.execute("commit").await?;
    Ok(())
}

/// Names of tables that the forward stream does not carry (of one with partitions, from 13 on, its
/// own), and all that are of the job.
async fn strangers(
    source: &mut Session,
    home: &mut Store,
    selection: &catalog::Selection,
) -> Result<(Vec<QualifiedName>, Vec<Table>)> {
    let mut all = catalog::tables(source, selection).await?;
    all.retain(|table| !table.unlogged && selection.has_rows(&table.name));
    let mut readings = home.load_readings().await?;
    let followed = readings.tables(Stream::Forward);
    let plugin = match readings.of(Stream::Forward) {
        Some(reading) => reading.plugin()?,
        None => return Ok((Vec::new(), all)),
    };
    let found = match plugin {
        Plugin::Pgoutput => {
            let names: Vec<QualifiedName> = all.iter().map(|table| table.name.clone()).collect();
            let publication = home.job().object(Stream::Forward);
            publication::missing(source, &publication, &names).await?
        }
        _ => newcomers::unfollowed(&followed, &all),
    };
    Ok((found, all))
}

/// What is found, by the trees that it belongs to.
fn families(found: &[QualifiedName], all: &[Table], there: &[Table]) -> Vec<Family> {
    let by_name: HashMap<&QualifiedName, &Table> = all.iter().map(|t| (&t.name, t)).collect();
    let there: HashSet<&QualifiedName> = there.iter().map(|table| &table.name).collect();
    let found: HashSet<&QualifiedName> = found.iter().collect();
    // Each with the number of parents that it has.
    let mut trees: BTreeMap<&QualifiedName, Vec<(usize, &Table)>> = BTreeMap::new();
    for table in all {
        let (mut depth, mut root) = (0, table);
        while let Some(parent) = root.partition_of.as_ref().and_then(|name| by_name.get(name)) {
            (depth, root) = (depth + 1, parent);
        }
        trees.entry(&root.name).or_default().push((depth, table));
    }
    let lacks = |table: &Table| !there.contains(&table.name);
    let mut families = Vec::new();
    for (root, mut tree) in trees {
        tree.sort_by_key(|(depth, _)| *depth);
        let tree: Vec<&Table> = tree.into_iter().map(|(_, table)| table).collect();
        let whole = found.contains(root);
        let joins = |table: &&Table| whole || found.contains(&table.name);
        let joining: Vec<Table> = tree.iter().copied().filter(joins).cloned().collect();
        let hangs = |table: &Table| table.partition_of.as_ref().is_some_and(|p| there.contains(p));
        let alone = joining.is_empty();
        let makes = |table: &&Table| {
            joins(table) || hangs(table) || (table.kind == TableKind::Partitioned && !alone)
        };
        let lacking = tree.iter().copied().filter(makes).filter(|table| lacks(table));
        let lacking: Vec<Table> = lacking.cloned().collect();
        if let Some(first) = lacking.first().or(joining.first()) {
            families.push(Family { first: first.clone(), joining, lacking });
        }
    }
    families
}

/// Names and types of its columns, in no order.
fn shape(table: &Table) -> String {
    let column = |column: &catalog::Column| format!("{} {}", column.name, column.type_name);
    let mut columns: Vec<String> = table.columns.iter().map(column).collect();
    columns.sort();
    format!("{}: {}", table.name, columns.join(", "))
}

impl Store {
    /// What is known of tables that had these names before is forgotten.
    async fn note_newcomers(&mut self, tables: &[Table]) -> Result<()> {
        let names = names_of(tables)?;
        let sql = "with named as (select o ->> 0 as schema, o ->> 1 as name \
               from pg_catalog.jsonb_array_elements($2::jsonb) o), \
             copied as (delete from walferry.table_copy c using named n \
               where c.job = $1 and c.schema = n.schema and c.name = n.name), \
             described as (delete from walferry.source_table t using named n \
               where t.stream = $3 and t.schema = n.schema and t.name = n.name) \
             insert into walferry.newcomer (job, schema, name) \
             select $1, schema, name from named on conflict do nothing";
        let (job, stream) = (self.job().to_string(), self.job().object(Stream::Forward));
        self.session.query_params(sql, &[Some(&job), Some(&names), Some(&stream)]).await?;
        Ok(())
    }

    async fn newcomers(&mut self) -> Result<HashSet<QualifiedName>> {
        let sql = "select schema, name from walferry.newcomer where job = $1";
        let job = self.job().to_string();
        let rows = self.session.query_params(sql, &[Some(&job)]).await?;
        rows.iter().map(|row| Ok(QualifiedName::new(row.str(0)?, row.str(1)?))).collect()
    }

    /// Their rows are there.
    pub(super) async fn forget_newcomers(&mut self) -> Result<()> {
        let job = self.job().to_string();
        let sql = "delete from walferry.newcomer where job = $1";
        self.session.query_params(sql, &[Some(&job)]).await?;
        Ok(())
    }
}

fn names_of(tables: &[Table]) -> Result<String> {
    let names: Vec<_> = tables.iter().map(|table| (&table.name.schema, &table.name.name)).collect();
    serde_json::to_string(&names).map_err(|e| Error::State(e.to_string()))
}

impl Runner {
    /// What is told of tables that are new, in jobs that may take them in. To be asked where the
    /// forward stream is followed.
    pub(super) async fn newcomers(&mut self) -> Result<Option<Newcomers>> {
        let options = &self.config.options;
        let others = options.publication.is_some() || options.brought || options.shared;
        let whole = self.config.half == Half::Both && !self.selection.tables_only;
        // Foreign keys that are made beside the stream would act on what is copied.
        let replica_role = self.row().await?.abilities.target.replica_role;
        if others || !whole || !replica_role || self.config.two_way.is_some() {
            return Ok(None);
        }
        let noted = !self.store.newcomers().await?.is_empty();
        Ok(Some(Newcomers::new(self.config.owners, Arc::new(AtomicBool::new(noted)))))
    }

    /// Back to phase `copying`, with the tables that are noted. A way back that was armed is armed
    /// anew before the next cutover: it would take for an application's what is copied.
    pub(super) async fn join(&mut self) -> Result<Event> {
        self.stop_looking().await;
        self.stop_streams().await;
        (self.heartbeat, self.slot) = (None, None);
        let mut names: Vec<String> =
            self.store.newcomers().await?.iter().map(QualifiedName::to_string).collect();
        names.sort();
        let said = format!("tables that are new on the source are taken in: {}", names.join(", "));
        self.say(Notice::Said(said));
        if self.row().await?.armed {
            let mut target = Session::control(&self.config.target).await?;
            slot::drop(&mut target, &self.config.job.object(Stream::Reverse)).await?;
            self.store.set_armed(false).await?;
        }
        self.store.set_phase(Phase::Copying).await?;
        self.say(Notice::Phase(Phase::Copying));
        Ok(Event::Start)
    }

    /// Has the forward stream carry the tables that are noted, and waits until every snapshot that
    /// is taken sees what it may have missed of them. Leaves those alone in `tables`, which all
    /// others are done of; true if there are some.
    pub(super) async fn take_in(&mut self, tables: &mut Vec<Table>) -> Result<bool> {
        let joining = self.store.newcomers().await?;
        if joining.is_empty() {
            return Ok(false);
        }
        tables.retain(|table| joining.contains(&table.name));
        let mut source = Session::connect(&self.config.source, Purpose::Sql).await?;
        let mut readings = self.store.load_readings().await?;
        if self.reading(Stream::Forward).await?.plugin()? == Plugin::Pgoutput {
            let name = self.config.job.object(Stream::Forward);
            let mut members = publication::list(&mut source, &name).await?.unwrap_or_default();
            members.extend(tables.iter().map(|table| table.name.clone()));
            publication::ensure(&mut source, &name, &members).await?;
        }
        readings.follow_more(tables);
        self.store.save_readings(&readings).await?;
        self.outlive(&mut source).await?;
        Ok(true)
    }

    /// Returns once all transactions are over that have an id by now, in any database.
    async fn outlive(&self, source: &mut Session) -> Result<()> {
        let row = source.query_one("select pg_catalog.txid_current()", &[]).await?;
        let sql = format!(
            "select pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot()) > {}",
            row.parse::<i64>(0)?
        );
        let mut tell = tell_blockers(&self.report, "what is copied next");
        while !source.query_one(&sql, &[]).await?.bool(0)? {
            let own = source.process_id();
            let blockers = slot::blockers(source, own).await?;
            tell(blockers.get(..1).unwrap_or_default());
            tokio::time::sleep(STEP).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
