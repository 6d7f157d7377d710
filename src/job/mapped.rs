//! `[[map]]`: the tables that a job's map makes, and the stream on its way through it.
//!
//! Tables that the map is about are not in the dump: walferry makes what they become itself, where
//! nobody has before, with columns, NOT NULL and the key, so that rows can be copied and followed.
//! Indexes, defaults, foreign keys and triggers of such a table are for whoever wants the target to
//! differ; a table that is there already is taken as it is, once check has looked at its columns.
//! What hangs on the source's table (foreign keys of others, views) stays behind, as with
//! `--exclude`.
//!
//! A filter is part of the publication where the source can have it there (15 and on), so that
//! fewer changes are sent; it is applied here all the same. Column lists are not: a table whose
//! whole rows identify may have none, and an application could drop none of the columns any more.
//!
//! A map of names alone is turned back by its inverse: the reverse stream goes through that, and
//! the target's tables are selected by the names that they have on the source.
//!
//! Any other is of the forward stream alone. What is to be undone has to be seen from the other
//! side, and a target with fewer rows, columns or other values cannot give it. So there is no way
//! back: a job is told so (`--one-way`) before it begins, a cutover is made only where it is told
//! once more, and nothing leads back. All else of a cutover is as ever: the source is fenced and
//! sealed, the stream drained, and sequences that mapped columns own on the target are set past
//! the source's.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::watch;

use super::Result;
use super::flip::FlipRequest;
use super::pipeline::{TableFilter, Task, Visibility, flatten};
use super::run::{JobConfig, Runner};
use super::store::JobRow;
use crate::apply::{Applied, Applier};
use crate::buffer::memory;
use crate::catalog::{self, Selection, Table};
use crate::change::{Feed, ReplicaIdentity};
use crate::fault::{Fault, Faulty};
use crate::id::{QualifiedName, Stream, quote_ident};
use crate::limit;
use crate::lsn::Lsn;
use crate::map::{self, Map};
use crate::pg::{Config, Session};
use crate::reshape::{self, Reshaper};

/// What a map keeps a job from.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A change cannot be put through it.
    #[error(transparent)]
    Reshape(#[from] reshape::Error),
    /// A name of the target that sections of the map do not lead back.
    #[error(
        "the job's map does not lead table {table} of the target back to the table of the source \
         that it came from, as another section's names are in the way: say --one-way, or give one \
         of the two another name"
    )]
    NamesTorn {
        /// The table on the target.
        table: QualifiedName,
    },
    /// There would be no way back.
    #[error(
        "the job has a [[map]], and so a cutover has no way back: {reasons}. Say walferry cutover \
         --one-way if it is meant; nothing was switched"
    )]
    OneWay {
        /// In words.
        reasons: String,
    },
    /// There is no way back.
    #[error(
        "the job has a [[map]], and no way back: {reasons}. The source is as it was at the switch; \
         applications stay on the target, and walferry finish ends the job"
    )]
    NoRollback {
        /// In words.
        reasons: String,
    },
}

impl Faulty for Error {
    fn fault(&self) -> Fault {
        match self {
            Error::Reshape(error) => error.fault(),
            Error::OneWay { .. } | Error::NoRollback { .. } | Error::NamesTorn { .. } => {
                Fault::Stop
            }
        }
    }
}

/// The tables whose schema comes by the dump.
pub(super) fn made_by_dump(selection: &Selection, map: Option<&Map>) -> Result<Selection> {
    match map {
        Some(map) => Ok(selection.without(&map.patterns())?),
        None => Ok(selection.clone()),
    }
}

/// What makes the table that a mapped one becomes: its columns and its key.
pub(super) fn ddl(table: &Table) -> String {
    let name = |column: &str| quote_ident(table.written(column));
    let mut lines: Vec<String> = table
        .stored_columns()
        .map(|column| {
            let not_null = if column.not_null { " NOT NULL" } else { "" };
            format!("{} {}{not_null}", name(&column.name), column.type_name)
        })
        .collect();
    let is_there = |column: &String| table.stored_columns().any(|c| c.name == *column);
    if !table.key.is_empty() && table.key.iter().all(is_there) {
        let key: Vec<String> = table.key.iter().map(|column| name(column)).collect();
        lines.push(format!("PRIMARY KEY ({})", key.join(", ")));
    }
    format!("CREATE TABLE {} ({})", table.written_name().quoted(), lines.join(", "))
}

/// Makes the tables of the map that are not there. May be repeated.
pub(super) async fn make_tables(target: &mut Session, map: &Map, tables: Vec<Table>) -> Result<()> {
    for table in tables.into_iter().map(|table| table.mapped_by(Some(map))) {
        if table.mapped.is_none() {
            continue;
        }
        let name = table.written_name();
        let sql = "select pg_catalog.to_regnamespace($1) is not null, \
             pg_catalog.to_regclass($2) is not null";
        let schema = quote_ident(&name.schema);
        let row = target.query_one(sql, &[Some(&schema), Some(&name.quoted())]).await?;
        let (has_schema, has_table) = (row.bool(0)?, row.bool(1)?);
        if !has_schema {
            target.execute(&format!("create schema {schema}")).await?;
        }
        if !has_table {
            target.execute(&ddl(&table)).await?;
        }
    }
    Ok(())
}

/// What publications may leave out: rows that a filter does, by its condition, where all that it
/// speaks of identifies rows. Slices of several targets are not among them: an UPDATE that moves a
/// row without its long values would come as an INSERT without them.
pub(super) fn filters(map: &Map, tables: &[Table]) -> BTreeMap<QualifiedName, String> {
    let filter = |table: &Table| {
        let mapped = map.of(&table.name).filter(|m| m.filter.is_some() && m.slice.is_none())?;
        let stored: Vec<&str> = table.stored_columns().map(|c| c.name.as_str()).collect();
        let spoken = mapped.filter_depends(&stored);
        let identifies = |column: &&str| table.identity_columns.iter().any(|c| c == column);
        let told = table.identity == ReplicaIdentity::Full || spoken.iter().all(identifies);
        Some((table.name.clone(), mapped.condition().filter(|_| told)?))
    };
    tables.iter().filter_map(filter).collect()
}

impl JobConfig {
    /// What turns the map back, where there is one and it can be; `None` without a map, too.
    pub(super) fn map_back(&self) -> Option<Arc<Map>> {
        let map = self.map.as_ref().filter(|_| !self.one_way)?;
        map.inverse().map(Arc::new)
    }

    /// What becomes of a stream's changes.
    pub(super) fn map_of(&self, stream: Stream) -> Option<Arc<Map>> {
        match stream {
            Stream::Forward => self.map.clone(),
            Stream::Reverse => self.map_back(),
        }
    }

    /// There is no way back, as the map has none, or none is wanted.
    pub fn is_one_way(&self) -> bool {
        self.map.is_some() && self.map_back().is_none()
    }

    /// Refuses to go on with another map, or key of it, than the job was made with: what is on the
    /// target went through that.
    pub(super) fn same_map(&self, row: &JobRow) -> Result<()> {
        if self.map.as_ref().map(|map| map.digest()) == row.options.map.as_deref() {
            return Ok(());
        }
        let (job, planned) = (self.job.to_string(), row.options.to_string());
        Err(super::Error::OtherOptions { job, planned })
    }
}

impl Runner {
    /// True for a job with a map, whose flip is a cutover that was asked for without a way back; an
    /// error for any other flip of a job whose map has none.
    pub(super) fn flies_one_way(&self, request: &FlipRequest) -> Result<bool> {
        let Some(map) = &self.config.map else { return Ok(false) };
        if !self.config.is_one_way() {
            return Ok(request.one_way && request.stream() == Stream::Forward);
        }
        let reasons = one_way(map);
        match (request.stream(), request.one_way) {
            (Stream::Forward, true) => Ok(true),
            (Stream::Forward, false) => Err(Error::OneWay { reasons }.into()),
            (Stream::Reverse, _) => Err(Error::NoRollback { reasons }.into()),
        }
    }

    /// The tables whose schema comes by the dump.
    pub(super) fn selection_by_dump(&self) -> Result<Selection> {
        made_by_dump(&self.selection, self.config.map.as_deref())
    }

    /// The job's tables by the names that a side has them under.
    pub(super) fn selection_on(&self, side: &Config) -> Selection {
        let map = self.config.map.as_ref().filter(|_| side.label == self.config.target.label);
        match map.filter(|_| !self.config.is_one_way()) {
            Some(map) => self.selection.on_target(map),
            None => self.selection.clone(),
        }
    }

    /// All tables of a side that may be of the job, whatever their names.
    pub(super) async fn all_tables(&self, side: &Config) -> Result<Vec<QualifiedName>> {
        match &self.config.map {
            None => self.fenced_tables(side).await,
            Some(_) => {
                let mut session = Session::control(side).await?;
                let tables = catalog::tables(&mut session, &Selection::default()).await?;
                Ok(tables.into_iter().map(|table| table.name).collect())
            }
        }
    }

    /// Sequences that columns of mapped tables own on the source, and those that the same columns
    /// own on the target, where somebody has made them.
    /// For the way back the other way round.
    pub(super) async fn mapped_sequences(
        &self,
        flip: Stream,
    ) -> Result<HashMap<QualifiedName, QualifiedName>> {
        let Some(map) = &self.config.map else { return Ok(HashMap::new()) };
        let mut source = Session::control(&self.config.source).await?;
        let mut target = Session::control(&self.config.target).await?;
        let there = owned_sequences(&mut target).await?;
        let mut renamed = HashMap::new();
        for ((table, column), sequence) in owned_sequences(&mut source).await? {
            let Some(mapped) = map.of(&table).filter(|mapped| mapped.keeps(&column)) else {
                continue;
            };
            let column = mapped.written(&column).to_string();
            if let Some(other) = there.get(&(mapped.target, column)) {
                renamed.insert(sequence, other.clone());
            }
        }
        Ok(match flip {
            Stream::Forward => renamed,
            Stream::Reverse => renamed.into_iter().map(|(here, there)| (there, here)).collect(),
        })
    }
}

/// Sequences by the table and column that own them.
async fn owned_sequences(
    session: &mut Session,
) -> Result<HashMap<(QualifiedName, String), QualifiedName>> {
    let sql = "select tn.nspname, t.relname, a.attname, n.nspname, c.relname \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         join pg_catalog.pg_depend d on d.objid = c.oid and d.objsubid = 0 \
             and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass \
             and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass \
             and d.deptype in ('a', 'i') \
         join pg_catalog.pg_class t on t.oid = d.refobjid \
         join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace \
         join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attnum = d.refobjsubid \
         where c.relkind = 'S'";
    let rows = session.query(sql).await?;
    let owned = rows.iter().map(|row| {
        let table = QualifiedName::new(row.str(0)?, row.str(1)?);
        let sequence = QualifiedName::new(row.str(3)?, row.str(4)?);
        Ok(((table, row.string(2)?), sequence))
    });
    owned.collect()
}

/// Why there is no way back through the map, in words.
pub(super) fn one_way(map: &Map) -> String {
    let lost: Vec<String> = map
        .named()
        .filter(|table| !table.one_way().is_empty())
        .map(|table| format!("{}: {}", table.source, table.one_way().join(", ")))
        .collect();
    match lost.is_empty() {
        true => "its names cannot be turned back one by one, or --one-way was said".to_string(),
        false => format!("a way back cannot give what the target does not have ({})", {
            lost.join("; ")
        }),
    }
}

/// What the applier is to be told of tables, by their names on the target.
pub(super) fn applied(
    map: &Arc<Map>,
    tables: &TableFilter,
    visibility: Visibility,
) -> (TableFilter, Visibility) {
    let (inner, names) = (tables.clone(), map.clone());
    let filter: TableFilter = Arc::new(move |table: &QualifiedName| {
        !map::is_left_out(table) && (names.may_fill(table) || inner(table))
    });
    let visibility = visibility
        .into_iter()
        .flat_map(|(name, seen)| match map.of(&name) {
            Some(table) => vec![(table.left_out(), seen.clone()), (table.target, seen)],
            None => vec![(name, seen)],
        })
        .collect();
    (filter, visibility)
}

/// Applies what the feed gives, through the map if there is one, until the feed has ended or the
/// last of `ends` says stop. The source is asked for what the map computes.
pub(super) async fn apply<F: Feed + 'static>(
    map: Option<(Arc<Map>, Config)>,
    applier: &mut Applier,
    feed: F,
    ends: (&watch::Sender<Applied>, watch::Receiver<Option<Lsn>>, watch::Receiver<bool>),
) -> Result<()> {
    let (positions, hold, stop) = ends;
    let Some((map, source)) = map else {
        return Ok(applier.run(feed, positions, hold, stop).await?);
    };
    let reshaper = Reshaper::connect(&source, map).await.map_err(Error::from)?;
    let (queue, reshaped) = memory::queue(limit::BUFFER_BYTES);
    let mut reshaping = Task(tokio::spawn(reshaper.run(feed, queue)));
    let stopping = stop.clone();
    let outcome = applier.run(reshaped, positions, hold, stop).await;
    if outcome.is_ok() && !*stopping.borrow() {
        // What the applier waited for ended before it did, and says why.
        flatten((&mut reshaping.0).await).map_err(Error::from)?;
    }
    Ok(outcome?)
}
